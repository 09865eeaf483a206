//! What the reconciling task remembers of each pod. No decisions and no system calls but one `stat` per pod.

use super::{
    finder::Place,
    plan::{Actual, back_off},
    pod::Pod,
};
use crate::{kernel::PodPolicy, mesh::WorkloadUid};
use std::{collections::BTreeMap, sync::Arc, time::Instant};
use tokio::task::AbortHandle;

#[derive(Default)]
pub(super) struct Entries(BTreeMap<WorkloadUid, Entry>);

pub(super) enum Entry {
    /// A job holds it; `attempts` failed before.
    Busy {
        place: Place,
        attempts: u32,
        /// It is being released.
        is_leaving: bool,
    },
    Captured(Captured),
    Failed {
        place: Place,
        attempts: u32,
        retry_at: Instant,
    },
}

pub(super) struct Captured {
    pub(super) pod: Arc<Pod>,
    pub(super) policy: PodPolicy,
    /// Nothing leads to its namespace any more.
    pub(super) gone: bool,
    /// Whoever serves it was told.
    pub(super) announced: bool,
    /// Waits for changes in its namespace, or deals with one; `None` if nothing tells of them.
    pub(super) watch: Option<AbortHandle>,
    /// When its guards are to be linked, if they may not be yet.
    pub(super) link_at: Option<Instant>,
    /// A refresh that failed: how often, and when to try again.
    pub(super) refresh: Option<(u32, Instant)>,
    /// A release that failed: how often, and when to try again.
    pub(super) release: Option<(u32, Instant)>,
}

impl Captured {
    pub(super) fn new(pod: Arc<Pod>, policy: PodPolicy) -> Self {
        Self {
            pod,
            policy,
            gone: false,
            announced: false,
            watch: None,
            link_at: None,
            refresh: None,
            release: None,
        }
    }

    pub(super) fn release_attempts(&self) -> u32 {
        self.release.map_or(0, |(attempts, _)| attempts)
    }
}

impl Entries {
    pub(super) fn insert(&mut self, workload: WorkloadUid, entry: Entry) {
        self.0.insert(workload, entry);
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn remove(&mut self, workload: &WorkloadUid) {
        self.0.remove(workload);
    }

    pub(super) fn captured(&mut self, workload: &WorkloadUid) -> Option<&mut Captured> {
        match self.0.get_mut(workload)? {
            Entry::Captured(captured) => Some(captured),
            Entry::Busy { .. } | Entry::Failed { .. } => None,
        }
    }

    /// Takes a captured pod out, to be released: it is busy from now on.
    pub(super) fn take_captured(&mut self, workload: &WorkloadUid) -> Option<Captured> {
        let attempts = self.captured(workload)?.release_attempts();
        let place = self.captured(workload)?.pod.place.clone();
        let busy = Entry::Busy {
            place,
            attempts,
            is_leaving: true,
        };
        match self.0.insert(workload.clone(), busy) {
            Some(Entry::Captured(captured)) => Some(captured),
            Some(Entry::Busy { .. } | Entry::Failed { .. }) | None => None,
        }
    }

    /// Marks a pod as busy with being captured.
    pub(super) fn begin(&mut self, workload: &WorkloadUid, place: &Place) {
        let attempts = match self.0.get(workload) {
            Some(Entry::Failed {
                place: before,
                attempts,
                ..
            }) if before == place => *attempts,
            Some(Entry::Failed { .. } | Entry::Busy { .. } | Entry::Captured(_)) | None => 0,
        };
        self.insert(
            workload.clone(),
            Entry::Busy {
                place: place.clone(),
                attempts,
                is_leaving: false,
            },
        );
    }

    /// Marks an attempt to capture as failed, and says how many there were.
    pub(super) fn fail(&mut self, workload: &WorkloadUid, place: Place, now: Instant) -> u32 {
        let before = match self.0.get(workload) {
            Some(Entry::Busy { attempts, .. } | Entry::Failed { attempts, .. }) => *attempts,
            Some(Entry::Captured(_)) | None => 0,
        };
        let attempts = before.saturating_add(1);
        self.insert(
            workload.clone(),
            Entry::Failed {
                place,
                attempts,
                retry_at: now + back_off(attempts),
            },
        );
        attempts
    }

    /// What the plan wants to know.
    pub(super) fn actual(&self, now: Instant) -> BTreeMap<WorkloadUid, Actual> {
        let actual = |entry: &Entry| match entry {
            Entry::Busy { place, .. } => Actual::Busy { place: place.clone() },
            Entry::Failed { place, retry_at, .. } => Actual::Failed {
                place: place.clone(),
                retry_at: *retry_at,
            },
            Entry::Captured(captured) if captured.release.is_some_and(|(_, retry_at)| retry_at > now) => Actual::Busy {
                place: captured.pod.place.clone(),
            },
            Entry::Captured(Captured {
                pod,
                policy,
                gone,
                release,
                ..
            }) => Actual::Captured {
                place: pod.place.clone(),
                policy: policy.clone(),
                // A release that has begun is brought to its end: the pod is not steered any more.
                gone: *gone || release.is_some(),
            },
        };
        self.0
            .iter()
            .map(|(workload, entry)| (workload.clone(), actual(entry)))
            .collect()
    }

    pub(super) fn all_captured(&mut self) -> impl Iterator<Item = &mut Captured> {
        self.0.values_mut().filter_map(|entry| match entry {
            Entry::Captured(captured) => Some(captured),
            Entry::Busy { .. } | Entry::Failed { .. } => None,
        })
    }

    pub(super) fn has_failures(&self) -> bool {
        self.0.values().any(|entry| matches!(entry, Entry::Failed { .. }))
    }

    /// True if every pod that should be captured has been, or has failed once. One that leaves may take its time.
    pub(super) fn are_settled(&self) -> bool {
        !self
            .0
            .values()
            .any(|entry| matches!(entry, Entry::Busy { is_leaving: false, .. }))
    }

    /// True if no pod is being captured or released.
    pub(super) fn are_idle(&self) -> bool {
        !self.0.values().any(|entry| matches!(entry, Entry::Busy { .. }))
    }

    /// True if something that waited may be tried again, or a namespace has gone since the last call.
    pub(super) fn look(&mut self, now: Instant) -> bool {
        let mut is_due = false;
        for entry in self.0.values_mut() {
            is_due |= match entry {
                Entry::Busy { .. } => false,
                Entry::Failed { retry_at, .. } => *retry_at <= now,
                Entry::Captured(captured) => {
                    let is_gone = !captured.gone && !captured.pod.anchor.leads_to(&captured.pod.namespace);
                    captured.gone |= is_gone;
                    is_gone || captured.release.is_some_and(|(_, retry_at)| retry_at <= now)
                }
            };
        }
        is_due
    }
}

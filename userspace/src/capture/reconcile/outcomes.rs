//! What follows from a step that has ended.

use super::{LINK_AFTER, LINK_AGAIN, Reconciler, TICK};
use crate::{
    capture::{
        CaptureEvent, CapturedPod,
        entries::{Captured, Entry},
        error::CaptureError,
        jobs::{Done, blocking, heard, link, refresh},
        plan::{Wanted, back_off},
        pod::{self, Pod},
    },
    kernel::watch::Watch,
    net::PodListeners,
};
use std::{error::Error, sync::Arc, time::Instant};
use tokio::task::JoinError;
use tracing::{debug, error, warn};

impl Reconciler {
    /// `None` if nobody reads the events any more.
    pub(super) async fn finish(&mut self, done: Result<Done, JoinError>) -> Option<()> {
        match done {
            Ok(Done::Captured { wanted, outcome }) => return self.captured(wanted, *outcome).await,
            Ok(Done::Refreshed { pod, watch, outcome }) => {
                if let Some(captured) = self.entries.captured(&pod.workload) {
                    captured.refresh = outcome.as_ref().err().map(|error| {
                        let attempts = captured.refresh.map_or(0, |(attempts, _)| attempts).saturating_add(1);
                        let source = error as &dyn Error;
                        if error.lasts(attempts) {
                            warn!(workload = %pod.workload, attempts, error = source, "a pod is not up to date");
                        } else {
                            debug!(workload = %pod.workload, attempts, error = source, "a pod is not up to date");
                        }
                        (attempts, Instant::now() + back_off(attempts))
                    });
                }
                if let (Ok(()), Some(captured)) = (&outcome, self.entries.captured(&pod.workload)) {
                    captured.link_at.get_or_insert(Instant::now() + LINK_AFTER);
                }
                // One that failed is tried again by the tick, with a new watch.
                self.arm(&pod, watch.filter(|_| outcome.is_ok()));
            }
            Ok(Done::NodeRefreshed { watch, outcome }) => {
                if let Err(error) = outcome {
                    warn!(
                        error = &error as &dyn Error,
                        "the kernel programs do not know the node's addresses"
                    );
                }
                self.arm_node(watch);
            }
            Ok(Done::Linked { pod, outcome }) => {
                self.is_linking = false;
                if let (Err(error), Some(captured)) = (outcome, self.entries.captured(&pod.workload)) {
                    warn!(workload = %pod.workload, error = &error as &dyn Error, "a pod's guard is a filter still");
                    captured.link_at = Some(Instant::now() + LINK_AGAIN);
                }
                self.link_next(Instant::now());
            }
            Ok(Done::Withdrawn { captured }) => return self.stop(captured, true).await,
            Ok(Done::Released { captured, outcome }) => self.released(captured, outcome),
            // Only watches are aborted, by the release of their pod.
            Err(join) if join.is_cancelled() => {}
            Err(join) => error!(error = &join as &dyn Error, "a step of capture panicked"),
        }
        Some(())
    }

    async fn captured(
        &mut self,
        wanted: Wanted,
        outcome: Result<(Pod, PodListeners, Watch), CaptureError>,
    ) -> Option<()> {
        let workload = wanted.workload;
        let event = match outcome {
            Ok((pod, listeners, watch)) => {
                debug!(%workload, place = %pod.place, "pod captured");
                for moved in &listeners.moved {
                    let (role, port) = (moved.role, moved.port);
                    warn!(%workload, ?role, port, "the usual port is taken in the pod, another serves");
                }
                let namespace = pod.namespace.clone();
                let pod = Arc::new(pod);
                let captured = Captured {
                    announced: true,
                    link_at: Some(Instant::now() + LINK_AFTER),
                    ..Captured::new(Arc::clone(&pod), wanted.policy)
                };
                self.entries.insert(workload.clone(), Entry::Captured(captured));
                self.arm(&pod, Some(watch));
                CaptureEvent::Captured(CapturedPod {
                    workload,
                    namespace,
                    listeners,
                })
            }
            Err(error) => {
                let attempts = self.entries.fail(&workload, wanted.place, Instant::now());
                CaptureEvent::Failed {
                    workload,
                    error: Arc::new(error),
                    attempts,
                }
            }
        };
        self.events.send(event).await.ok()
    }

    fn released(&mut self, mut captured: Captured, outcome: Result<(), CaptureError>) {
        let workload = captured.pod.workload.clone();
        match outcome {
            Ok(()) => {
                debug!(%workload, "pod released");
                self.entries.remove(&workload);
            }
            Err(error) => {
                let attempts = captured.release_attempts().saturating_add(1);
                warn!(%workload, attempts, error = &error as &dyn Error, "a pod cannot be released yet");
                captured.release = Some((attempts, Instant::now() + back_off(attempts)));
                self.entries.insert(workload, Entry::Captured(captured));
            }
        }
    }

    /// Waits for changes in the pod's namespace, and refreshes it then.
    fn arm(&mut self, pod: &Arc<Pod>, watch: Option<Watch>) {
        let Some(captured) = self.entries.captured(&pod.workload) else {
            return;
        };
        if !Arc::ptr_eq(&captured.pod, pod) {
            return;
        }
        captured.watch = watch.map(|mut watch| {
            let (node, pod) = (self.node.clone(), Arc::clone(pod));
            self.jobs.spawn(async move {
                let watch = heard(&mut watch).await.then_some(watch);
                refresh(node, pod, watch).await
            })
        });
    }

    /// Tells the kernel side what is the node's own, now and after each change there.
    pub(super) fn arm_node(&mut self, watch: Option<Watch>) {
        let node = self.node.clone();
        self.jobs.spawn(async move {
            let watch = match watch {
                Some(mut watch) => heard(&mut watch).await.then_some(watch),
                None => Watch::open(&node.namespace).ok(),
            };
            if watch.is_none() {
                tokio::time::sleep(TICK).await;
            }
            let outcome = blocking(move || pod::set_node(&node)).await;
            Done::NodeRefreshed { watch, outcome }
        });
    }

    /// Begins to link the guards of a pod whose time has come, unless another's are being linked.
    pub(super) fn link_next(&mut self, now: Instant) {
        if self.is_linking {
            return;
        }
        let mut pods = self.entries.all_captured();
        let Some(captured) = pods.find(|captured| captured.link_at.is_some_and(|at| at <= now)) else {
            return;
        };
        captured.link_at = None;
        self.is_linking = true;
        self.jobs.spawn(link(self.node.clone(), Arc::clone(&captured.pod)));
    }
}

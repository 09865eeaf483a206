//! Hands what the index made to its readers, and tells the log once about each flaw that comes or goes.

use super::{
    index::Index,
    journal::{Journal, Publication, Reach},
    objects::ObjectRef,
    problem::{Origin, Problem},
};
use crate::mesh::MeshSnapshot;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::SystemTime,
};
use tokio::sync::watch;
use tracing::{info, warn};

/// What a source publishes. The first values are complete: nothing is published before a source has told everything.
#[derive(Debug, Clone)]
pub struct Published {
    pub snapshot: watch::Receiver<Arc<MeshSnapshot>>,
    /// Everything that is wrong right now, sorted: for `/config_dump`, and to be counted by `Flaw::name`.
    pub problems: watch::Receiver<Arc<[Problem]>>,
    /// Every namespace, and whether its label says that its pods are in the mesh.
    pub namespaces: watch::Receiver<Arc<BTreeMap<Arc<str>, bool>>>,
    /// Of a source whose objects have versions.
    pub journal: Journal,
}

/// The sending side.
#[derive(Debug)]
pub(super) struct Publisher {
    snapshot: watch::Sender<Arc<MeshSnapshot>>,
    problems: watch::Sender<Arc<[Problem]>>,
    namespaces: watch::Sender<Arc<BTreeMap<Arc<str>, bool>>>,
    journal: Journal,
}

impl Publisher {
    pub(super) fn new() -> (Self, Published) {
        let (snapshot, snapshots) = watch::channel(Arc::default());
        let (problems, all_problems) = watch::channel(Arc::default());
        let (namespaces, all_namespaces) = watch::channel(Arc::default());
        let journal = Journal::default();
        (
            Self {
                snapshot,
                problems,
                namespaces,
                journal: journal.clone(),
            },
            Published {
                snapshot: snapshots,
                problems: all_problems,
                namespaces: all_namespaces,
                journal,
            },
        )
    }

    /// Publishes what changed. `origin` knows where an object's text lies; `others` are flaws of no object; `reach` is what
    /// the journal is told of a new snapshot.
    pub(super) fn publish<'p>(
        &self,
        index: &mut Index,
        origin: impl Fn(&ObjectRef) -> Option<Origin>,
        others: impl Iterator<Item = &'p Problem>,
        others_changed: bool,
        reach: Option<&Reach>,
    ) {
        if index.findings_changed() || others_changed {
            let of_objects = index.findings().map(|(object, finding)| Problem {
                origin: origin(object),
                object: Some(object.clone()),
                finding: finding.clone(),
            });
            self.publish_problems(of_objects.chain(others.cloned()).collect());
        }
        if let Some(namespaces) = index.publish_namespaces() {
            self.namespaces.send_replace(namespaces);
        }
        if let Some(snapshot) = index.publish() {
            let number = snapshot.version;
            self.snapshot.send_replace(snapshot);
            if let Some(reach) = reach {
                self.journal.note(Publication {
                    snapshot: number,
                    at: SystemTime::now(),
                    reach: reach.clone(),
                });
            }
        }
    }

    fn publish_problems(&self, now: BTreeSet<Problem>) {
        let before = Arc::clone(&self.problems.borrow());
        for problem in now.iter().filter(|problem| before.binary_search(problem).is_err()) {
            warn!(flaw = problem.finding.flaw.name(), "{problem}");
        }
        for problem in before.iter().filter(|problem| !now.contains(problem)) {
            info!(flaw = problem.finding.flaw.name(), "no longer so: {problem}");
        }
        if !before.iter().eq(&now) {
            self.problems.send_replace(now.into_iter().collect());
        }
    }
}

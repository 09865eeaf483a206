//! When what the API server told was published: of each of the latest snapshots, how far into each kind's changes it
//! reaches. Whoever changed an object can see from it when this node took notice.

use super::objects::Kind;
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, VecDeque},
    sync::Arc,
    time::SystemTime,
};

/// Publications that are remembered: a second or more of a cluster in a hurry.
const KEPT: usize = 256;

/// The newest `metadata.resourceVersion` among the objects of each kind. Versions of one kind can be compared as numbers.
pub type Reach = BTreeMap<Kind, u64>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publication {
    /// Number of the snapshot.
    pub snapshot: u64,
    pub at: SystemTime,
    pub reach: Reach,
}

/// The latest publications. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Journal(Arc<Mutex<VecDeque<Publication>>>);

impl Journal {
    pub(super) fn note(&self, publication: Publication) {
        let mut kept = self.0.lock();
        if kept.len() == KEPT {
            kept.pop_front();
        }
        kept.push_back(publication);
    }

    /// From the oldest to the newest.
    pub fn latest(&self) -> Vec<Publication> {
        self.0.lock().iter().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_latest_publications_are_kept_and_no_more() {
        let journal = Journal::default();
        for snapshot in 1..=1_000 {
            journal.note(Publication {
                snapshot,
                at: SystemTime::UNIX_EPOCH,
                reach: Reach::from([(Kind::Pod, snapshot * 3)]),
            });
        }
        let latest = journal.latest();
        assert_eq!(latest.len(), KEPT);
        assert_eq!(latest.last().unwrap().reach[&Kind::Pod], 3_000);
        assert!(latest.is_sorted_by_key(|publication| publication.snapshot));
    }
}

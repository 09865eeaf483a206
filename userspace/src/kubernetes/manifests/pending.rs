//! What the watcher told since the last read: which files changed, and which are being written right now. Bounded.

use notify::{
    Event, EventKind,
    event::{AccessKind, AccessMode, ModifyKind, RenameMode},
};
use parking_lot::Mutex;
use std::{
    collections::{BTreeSet, HashMap},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use tokio::sync::Notify;

/// More changed paths than this, and the whole directory is read.
const MAX_PATHS: usize = 1024;
/// Whoever holds a file open for writing and is silent for this long is not writing it.
const WRITER_SILENT: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub(super) struct Pending {
    inner: Mutex<Inner>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Inner {
    paths: BTreeSet<PathBuf>,
    everything: bool,
    /// Written to and not closed since: the time of the last write.
    writers: HashMap<PathBuf, Instant>,
}

impl Pending {
    /// Called on the watcher's thread.
    pub(super) fn note(&self, event: notify::Result<Event>, root: &Path, now: Instant) {
        let mut inner = self.inner.lock();
        let Ok(event) = event else {
            inner.everything = true;
            inner.writers.clear();
            drop(inner);
            self.changed.notify_one();
            return;
        };
        match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write)) => {
                for path in &event.paths {
                    inner.writers.remove(path);
                }
            }
            // Reading changes nothing; our own reading least of all.
            EventKind::Access(_) => return,
            EventKind::Modify(ModifyKind::Data(_) | ModifyKind::Any) => {
                if inner.writers.len() >= MAX_PATHS {
                    inner
                        .writers
                        .retain(|_, last| now.duration_since(*last) < WRITER_SILENT);
                }
                if inner.writers.len() < MAX_PATHS {
                    inner.writers.extend(event.paths.iter().map(|path| (path.clone(), now)));
                }
            }
            EventKind::Remove(_)
            | EventKind::Modify(ModifyKind::Name(RenameMode::From | RenameMode::To | RenameMode::Both)) => {
                for path in &event.paths {
                    inner.writers.remove(path);
                }
            }
            EventKind::Any | EventKind::Create(_) | EventKind::Modify(_) | EventKind::Other => {}
        }
        for path in event.paths {
            // A folder, a link that a ConfigMap mount turns, a network namespace: look at everything.
            let is_manifest = path.starts_with(root) && super::listing::is_manifest_name(&path);
            if is_manifest && inner.paths.len() < MAX_PATHS {
                inner.paths.insert(path);
            } else {
                inner.everything = true;
            }
        }
        // Events were lost, perhaps that a file was closed.
        if event.attrs.flag().is_some() {
            inner.everything = true;
            inner.writers.clear();
        }
        drop(inner);
        self.changed.notify_one();
    }

    /// Look at everything: it is not known what changed.
    pub(super) fn everything(&self) {
        self.inner.lock().everything = true;
        self.changed.notify_one();
    }

    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// The changed files; `None` for everything. Both may hold nothing.
    pub(super) fn take(&self) -> Option<BTreeSet<PathBuf>> {
        let mut inner = self.inner.lock();
        let paths = std::mem::take(&mut inner.paths);
        if std::mem::take(&mut inner.everything) {
            None
        } else {
            Some(paths)
        }
    }

    /// True while a writer has the file open and has written lately.
    pub(super) fn is_being_written(&self, path: &Path, now: Instant) -> bool {
        let last = self.inner.lock().writers.get(path).copied();
        last.is_some_and(|last| now.saturating_duration_since(last) < WRITER_SILENT)
    }
}

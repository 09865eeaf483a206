//! What the watcher told since the last read: which files changed, and how far their writing has come. Bounded.

use super::listing::is_manifest_name;
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

/// How far the writing of a file has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Writing {
    /// A writer has the file open and has written lately.
    UnderWay,
    /// The file was finished before it got its name, and nobody has written to it since.
    Finished,
    Unknown,
}

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
    /// Renamed into their place since anybody asked.
    renamed: BTreeSet<PathBuf>,
}

impl Pending {
    /// Called on the watcher's thread.
    pub(super) fn note(&self, event: notify::Result<Event>, root: &Path, now: Instant) {
        if self.inner.lock().note(event, root, now) {
            self.changed.notify_one();
        }
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

    pub(super) fn writing(&self, path: &Path, now: Instant) -> Writing {
        let mut inner = self.inner.lock();
        let last = inner.writers.get(path).copied();
        let is_renamed = inner.renamed.remove(path);
        match last {
            Some(last) if now.saturating_duration_since(last) < WRITER_SILENT => Writing::UnderWay,
            None if is_renamed => Writing::Finished,
            Some(_) | None => Writing::Unknown,
        }
    }
}

impl Inner {
    /// True if there is something to look at.
    fn note(&mut self, event: notify::Result<Event>, root: &Path, now: Instant) -> bool {
        let Ok(event) = event.map_err(|_| self.lost()) else {
            return true;
        };
        // Events were lost, perhaps that a file was closed.
        if event.attrs.flag().is_some() {
            self.lost();
        }
        let mut is_data = false;
        match event.kind {
            EventKind::Access(AccessKind::Close(AccessMode::Write)) => {
                is_data = true;
                self.closed(&event.paths);
            }
            // Reading changes nothing; our own reading least of all.
            EventKind::Access(_) => return self.everything,
            EventKind::Modify(ModifyKind::Data(_) | ModifyKind::Any) => {
                is_data = true;
                self.written(&event.paths, now);
            }
            EventKind::Modify(ModifyKind::Name(RenameMode::To)) => {
                self.closed(&event.paths);
                if self.renamed.len() < MAX_PATHS {
                    self.renamed.extend(event.paths.iter().cloned());
                }
            }
            EventKind::Remove(_) | EventKind::Modify(ModifyKind::Name(RenameMode::From)) => {
                self.closed(&event.paths);
                self.not_renamed(&event.paths);
            }
            // Each end of it is told by itself, too.
            EventKind::Modify(ModifyKind::Name(RenameMode::Both)) => {}
            EventKind::Create(_) => self.not_renamed(&event.paths),
            EventKind::Any | EventKind::Modify(_) | EventKind::Other => {}
        }
        let mut matters = event.paths.is_empty();
        for path in event.paths {
            matters |= match Place::of(&path, root) {
                Place::Manifest if self.paths.len() < MAX_PATHS => {
                    self.paths.insert(path);
                    true
                }
                Place::Ignored => false,
                Place::Other if is_data => false,
                Place::Manifest | Place::Other => {
                    self.everything = true;
                    true
                }
                // Network namespaces are looked at every time.
                Place::Outside => true,
            };
        }
        matters || self.everything
    }

    fn written(&mut self, paths: &[PathBuf], now: Instant) {
        self.not_renamed(paths);
        if self.writers.len() >= MAX_PATHS {
            self.writers.retain(|_, last| now.duration_since(*last) < WRITER_SILENT);
        }
        if self.writers.len() < MAX_PATHS {
            self.writers.extend(paths.iter().map(|path| (path.clone(), now)));
        }
    }

    fn closed(&mut self, paths: &[PathBuf]) {
        for path in paths {
            self.writers.remove(path);
        }
    }

    fn not_renamed(&mut self, paths: &[PathBuf]) {
        for path in paths {
            self.renamed.remove(path);
        }
    }

    fn lost(&mut self) {
        self.everything = true;
        self.writers.clear();
        self.renamed.clear();
    }
}

/// Where a path lies, seen from the directory of manifests.
#[derive(Debug, PartialEq, Eq)]
enum Place {
    Manifest,
    /// Hidden, or in something hidden: never read (an editor's swap file, a file about to be renamed, `.git`).
    Ignored,
    /// A folder, or a link that a ConfigMap mount turns (`..data`): it can stand for many files.
    Other,
    Outside,
}

impl Place {
    fn of(path: &Path, root: &Path) -> Self {
        let Ok(below) = path.strip_prefix(root) else {
            return Self::Outside;
        };
        let begins = |begin: &[u8]| below.iter().any(|name| name.as_encoded_bytes().starts_with(begin));
        match (begins(b".."), begins(b".")) {
            (true, _) => Self::Other,
            (false, true) => Self::Ignored,
            (false, false) if is_manifest_name(path) => Self::Manifest,
            (false, false) => Self::Other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use notify::event::{CreateKind, DataChange};

    fn event(kind: EventKind, path: &str) -> notify::Result<Event> {
        Ok(Event::new(kind).add_path(Path::new("/m").join(path)))
    }

    const WRITE: EventKind = EventKind::Modify(ModifyKind::Data(DataChange::Any));
    const CLOSE: EventKind = EventKind::Access(AccessKind::Close(AccessMode::Write));
    const CREATE: EventKind = EventKind::Create(CreateKind::File);
    const RENAMED_FROM: EventKind = EventKind::Modify(ModifyKind::Name(RenameMode::From));
    const RENAMED_TO: EventKind = EventKind::Modify(ModifyKind::Name(RenameMode::To));
    const RENAMED_BOTH: EventKind = EventKind::Modify(ModifyKind::Name(RenameMode::Both));

    #[test]
    fn a_changed_manifest_is_looked_at_alone_and_what_could_be_many_files_makes_it_everything() {
        for (kind, path, wakes, everything) in [
            (WRITE, "a.yaml", true, false),
            (CREATE, "sub/a.json", true, false),
            (CREATE, ".a.yaml.partial", false, false),
            (WRITE, ".git/index.yaml", false, false),
            (WRITE, "notes.txt", false, false),
            (CREATE, "sub", true, true),
            (CREATE, "..data", true, true),
            (CREATE, "..2026_1/a.yaml", true, true),
            (CREATE, "/run/netns/x", true, false),
            (EventKind::Access(AccessKind::Read), "a.yaml", false, false),
        ] {
            let mut inner = Inner::default();
            let woke = inner.note(event(kind, path), Path::new("/m"), Instant::now());
            assert_eq!((woke, inner.everything), (wakes, everything), "{kind:?} {path}");
        }
    }

    #[test]
    fn a_file_is_being_written_from_the_first_write_to_the_close() {
        let (pending, root, path) = (Pending::default(), Path::new("/m"), Path::new("/m/a.yaml"));
        let start = Instant::now();
        pending.note(event(WRITE, "a.yaml"), root, start);
        assert_eq!(
            pending.writing(path, start + Duration::from_secs(30)),
            Writing::UnderWay
        );
        assert_eq!(
            pending.writing(path, start + WRITER_SILENT),
            Writing::Unknown,
            "its writer sleeps"
        );
        pending.note(event(CLOSE, "a.yaml"), root, start);
        assert_eq!(pending.writing(path, start), Writing::Unknown);
        pending.note(event(WRITE, "a.yaml"), root, start);
        pending.note(Err(notify::Error::generic("queue overflow")), root, start);
        assert_eq!(
            pending.writing(path, start),
            Writing::Unknown,
            "the close may be among the lost events"
        );
        assert_eq!(pending.take(), None);
    }

    #[test]
    fn a_file_that_is_renamed_into_its_place_is_finished_until_somebody_writes_to_it() {
        let (root, path, now) = (Path::new("/m"), Path::new("/m/a.yaml"), Instant::now());
        for (after, expected) in [
            (vec![], Writing::Finished),
            (vec![RENAMED_BOTH], Writing::Finished),
            (vec![WRITE], Writing::UnderWay),
            (vec![WRITE, CLOSE], Writing::Unknown),
            (vec![CREATE], Writing::Unknown),
            (vec![RENAMED_FROM], Writing::Unknown),
            (vec![RENAMED_FROM, RENAMED_TO], Writing::Finished),
        ] {
            let pending = Pending::default();
            for kind in std::iter::once(RENAMED_TO).chain(after.clone()) {
                pending.note(event(kind, "a.yaml"), root, now);
            }
            assert_eq!(pending.writing(path, now), expected, "{after:?}");
        }
        let pending = Pending::default();
        pending.note(event(RENAMED_TO, "a.yaml"), root, now);
        pending.note(Err(notify::Error::generic("queue overflow")), root, now);
        assert_eq!(pending.writing(path, now), Writing::Unknown);
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut inner = Inner::default();
        for i in 0..3 * MAX_PATHS {
            for kind in [WRITE, RENAMED_TO] {
                inner.note(
                    event(kind, &format!("{i}-{kind:?}.yaml")),
                    Path::new("/m"),
                    Instant::now(),
                );
            }
        }
        assert!(inner.paths.len() <= MAX_PATHS && inner.writers.len() <= MAX_PATHS && inner.everything);
        assert!(inner.renamed.len() <= MAX_PATHS);
    }
}

//! Which folders are watched. What no event tells is found by reading everything now and then.

use super::{directory::Directory, pending::Pending};
use notify::{RecommendedWatcher, RecursiveMode, Watcher};
use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};
use tracing::warn;

/// For files behind links, lost events, network file systems.
const RESCAN: Duration = Duration::from_secs(5);
/// The same where nothing can be watched.
const RESCAN_UNWATCHED: Duration = Duration::from_millis(500);

pub(super) struct Watching {
    root: PathBuf,
    pending: Arc<Pending>,
    watcher: Option<RecommendedWatcher>,
    /// Device and inode of the watched root: whoever deletes and makes it anew makes another one.
    watched_root: Option<(u64, u64)>,
    /// Folders in which network namespaces lie.
    namespaces: BTreeSet<PathBuf>,
}

impl Watching {
    pub(super) fn start(root: &Path, pending: &Arc<Pending>) -> Self {
        Self {
            root: root.to_owned(),
            pending: Arc::clone(pending),
            watcher: watch(root, pending),
            watched_root: identity(root),
            namespaces: BTreeSet::new(),
        }
    }

    pub(super) fn rescan_every(&self) -> Duration {
        if self.watcher.is_some() {
            RESCAN
        } else {
            RESCAN_UNWATCHED
        }
    }

    /// Watches what has come since. Cheap where nothing has.
    pub(super) fn keep_up(&mut self, directory: &Directory) {
        let root = identity(&self.root);
        if root.is_some() && root != self.watched_root {
            self.watcher = watch(&self.root, &self.pending);
            self.watched_root = root;
            self.namespaces.clear();
            self.pending.everything();
        }
        let Some(watcher) = &mut self.watcher else { return };
        // Pods end when their namespace goes: `ip netns delete` shows as an event in the folder.
        for folder in directory.namespace_folders() {
            if !folder.starts_with("/proc") && !self.namespaces.contains(folder) {
                // Where it fails, the rescan notices a little later.
                let _ = watcher.watch(folder, RecursiveMode::NonRecursive);
                self.namespaces.insert(folder.to_owned());
            }
        }
    }
}

fn watch(root: &Path, pending: &Arc<Pending>) -> Option<RecommendedWatcher> {
    let told = Arc::clone(pending);
    let root_of_events = root.to_owned();
    let watcher = notify::recommended_watcher(move |event| told.note(event, &root_of_events, Instant::now()));
    match watcher.and_then(|mut watcher| watcher.watch(root, RecursiveMode::Recursive).map(|()| watcher)) {
        Ok(watcher) => Some(watcher),
        Err(error) => {
            warn!(
                %error,
                dir = %root.display(),
                every = ?RESCAN_UNWATCHED,
                "the directory of manifests cannot be watched and is read again and again instead \
                 (fs.inotify.max_user_instances or fs.inotify.max_user_watches may be too small)"
            );
            None
        }
    }
}

fn identity(folder: &Path) -> Option<(u64, u64)> {
    fs::metadata(folder)
        .ok()
        .map(|metadata| (metadata.dev(), metadata.ino()))
}

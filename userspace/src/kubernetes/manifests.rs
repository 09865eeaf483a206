//! The directory of manifests as a source: `DIR/**/*.{yaml,yml,json}`, watched for changes. What it takes care of: that a
//! file being edited, however, never makes a policy vanish.

mod claims;
mod directory;
mod document;
mod netns;
mod pending;
#[cfg(test)]
mod tests;

use super::{
    index::{Index, IndexSettings},
    publish::{Published, Publisher},
};
use crate::shutdown::Shutdown;
use directory::{Directory, Scope};
use notify::{RecursiveMode, Watcher};
use pending::Pending;
use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};
use tracing::warn;

/// Events come in flocks: this much quiet ends one, and no flock lasts longer than `FLOCK`.
const QUIET: Duration = Duration::from_millis(5);
const FLOCK: Duration = Duration::from_millis(50);
/// For what no event tells: files behind symlinks, lost events, network file systems.
const RESCAN: Duration = Duration::from_secs(5);
/// The same where nothing can be watched.
const RESCAN_UNWATCHED: Duration = Duration::from_millis(500);

/// Why a directory cannot be a source at all.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("cannot read the directory of manifests {}", dir.display())]
    Directory { dir: PathBuf, source: io::Error },
}

/// Reads the whole directory, then publishes, then goes on watching it until the drain. Blocks for the first read; must be
/// called within a tokio runtime.
///
/// # Errors
/// `dir` is no directory or cannot be listed. What is wrong with its files is in `Published::problems`.
pub fn spawn(dir: &Path, settings: IndexSettings, shutdown: &Shutdown) -> Result<Published, ManifestError> {
    let unreadable = |source| ManifestError::Directory {
        dir: dir.to_owned(),
        source,
    };
    let root = std::path::absolute(dir).map_err(unreadable)?;
    std::fs::read_dir(&root).map_err(unreadable)?;
    // Watched before it is read: what changes in between is then noticed.
    let pending = Arc::new(Pending::default());
    let watcher = watch(&root, &pending);
    let (publisher, published) = Publisher::new();
    let mut state = State {
        directory: Directory::new(root, settings.node_name.clone()),
        index: Index::new(settings),
        publisher,
    };
    state.read(&pending, Scope::First);
    shutdown.spawn_essential("manifests", follow(state, pending, watcher, shutdown.clone()));
    Ok(published)
}

struct State {
    directory: Directory,
    index: Index,
    publisher: Publisher,
}

impl State {
    /// When to look again, if something was left for later.
    fn read(&mut self, pending: &Pending, scope: Scope) -> Option<Instant> {
        let now = directory::Now {
            monotonic: Instant::now(),
            wall: SystemTime::now(),
        };
        let outcome = self.directory.scan(scope, now, &mut self.index, &|path| {
            pending.is_being_written(path, now.monotonic)
        });
        self.publisher.publish(
            &mut self.index,
            |object| self.directory.origin(object),
            self.directory.problems(),
            outcome.problems_changed,
        );
        outcome.look_again
    }
}

async fn follow(
    mut state: State,
    pending: Arc<Pending>,
    mut watcher: Option<notify::RecommendedWatcher>,
    shutdown: Shutdown,
) {
    let mut watched = BTreeSet::new();
    let rescan = if watcher.is_some() { RESCAN } else { RESCAN_UNWATCHED };
    let mut next_rescan = Instant::now() + rescan;
    let mut look_again = None;
    loop {
        if let Some(watcher) = &mut watcher {
            watch_namespaces(watcher, &mut watched, &state.directory);
        }
        let wake = look_again.map_or(next_rescan, |at: Instant| at.min(next_rescan));
        tokio::select! {
            () = shutdown.draining() => return,
            () = pending.changed() => settle(&pending).await,
            () = tokio::time::sleep_until(wake.into()) => {}
        }
        let rescan_now = Instant::now() >= next_rescan;
        let scope = match pending.take() {
            Some(paths) if !rescan_now => Scope::Paths(paths),
            Some(_) | None => Scope::All,
        };
        if matches!(scope, Scope::All) {
            next_rescan = Instant::now() + rescan;
        }
        let reader = Arc::clone(&pending);
        let read = tokio::task::spawn_blocking(move || {
            let look_again = state.read(&reader, scope);
            (state, look_again)
        });
        match read.await {
            Ok((back, again)) => (state, look_again) = (back, again),
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        }
    }
}

/// Waits until the flock of events is over.
async fn settle(pending: &Pending) {
    let end = tokio::time::Instant::now() + FLOCK;
    while tokio::time::Instant::now() < end {
        if tokio::time::timeout(QUIET, pending.changed()).await.is_err() {
            return;
        }
    }
}

fn watch(root: &Path, pending: &Arc<Pending>) -> Option<notify::RecommendedWatcher> {
    let told = Arc::clone(pending);
    let root_of_events = root.to_owned();
    let watcher = notify::recommended_watcher(move |event| told.note(event, &root_of_events, Instant::now()));
    let watching = watcher.and_then(|mut watcher| watcher.watch(root, RecursiveMode::Recursive).map(|()| watcher));
    match watching {
        Ok(watcher) => Some(watcher),
        Err(error) => {
            warn!(%error, dir = %root.display(), "the directory of manifests cannot be watched; it is read every {RESCAN_UNWATCHED:?} \
                instead (fs.inotify.max_user_instances or max_user_watches may be too small)");
            None
        }
    }
}

/// Pods end when their namespace goes: `ip netns delete` shows as an event in the folder.
fn watch_namespaces(watcher: &mut notify::RecommendedWatcher, watched: &mut BTreeSet<PathBuf>, directory: &Directory) {
    for folder in directory.namespace_folders() {
        if !folder.starts_with("/proc") && !watched.contains(folder) {
            // Without it the rescan notices, later.
            let _ = watcher.watch(folder, RecursiveMode::NonRecursive);
            watched.insert(folder.to_owned());
        }
    }
}

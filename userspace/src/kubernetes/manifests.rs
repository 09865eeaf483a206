//! The directory of manifests as a source: `DIR/**/*.{yaml,yml,json}`, watched for changes. What it takes care of: that a
//! file being edited, however, never makes a policy vanish.

mod claims;
mod directory;
mod document;
mod listing;
mod netns;
mod pending;
#[cfg(test)]
mod tests;
mod watching;

use super::{
    index::{Index, IndexSettings},
    publish::{Published, Publisher},
};
use crate::shutdown::Shutdown;
use directory::{Directory, Scope};
use pending::Pending;
use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};
use watching::Watching;

/// Events come in flocks: this much quiet ends one, and no flock lasts longer than `FLOCK`.
const QUIET: Duration = Duration::from_millis(5);
const FLOCK: Duration = Duration::from_millis(10);
/// Why a directory cannot be a source at all.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("cannot read the directory of manifests {}", dir.display())]
    Directory { dir: PathBuf, source: io::Error },
}

/// Reads the whole directory, then publishes, then follows it until the drain begins. Blocks for the first read; must be
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
    let watching = Watching::start(&root, &pending);
    let (publisher, published) = Publisher::new();
    let mut state = State {
        directory: Directory::new(root, settings.node_name.clone()),
        index: Index::new(settings),
        publisher,
    };
    state.read(&pending, Scope::First);
    shutdown.spawn_essential("manifests", follow(state, pending, watching, shutdown.clone()));
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
            pending.writing(path, now.monotonic)
        });
        self.publisher.publish(
            &mut self.index,
            |object| self.directory.origin(object),
            self.directory.problems(),
            outcome.problems_changed,
            None,
        );
        outcome.look_again
    }
}

async fn follow(mut state: State, pending: Arc<Pending>, mut watching: Watching, shutdown: Shutdown) {
    let mut next_rescan = Instant::now() + watching.rescan_every();
    let mut look_again = None;
    loop {
        watching.keep_up(&state.directory);
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
            next_rescan = Instant::now() + watching.rescan_every();
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

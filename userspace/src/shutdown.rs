//! Who owns the tasks: every task of the process is spawned here under a name, a panic is noticed and logged with it, and
//! the end comes in two steps, drain (finish what you have) and cut (end now). Not here: what a task does when it drains.

use futures::FutureExt;
use parking_lot::RwLock;
use std::{
    any::Any,
    future::Future,
    io,
    panic::AssertUnwindSafe,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    task::AbortHandle,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing::{error, info, warn};

/// How long tasks have to end by themselves after the cut.
const CUT_GRACE: Duration = Duration::from_secs(1);

/// Owner of tasks. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    inner: Arc<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    tracker: TaskTracker,
    draining: CancellationToken,
    cut: CancellationToken,
    failed: CancellationToken,
    failure: OnceLock<Failure>,
    panics: AtomicU64,
    names: RwLock<Vec<Arc<Named>>>,
}

#[derive(Debug)]
struct Named {
    name: &'static str,
    running: AtomicUsize,
}

/// Counts a task as running for as long as its future lives, however it ends.
struct Running(Arc<Named>);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
    }
}

/// An essential task that ended while it should have run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    #[error("the task {task} panicked")]
    Panicked { task: &'static str },
    #[error("the task {task} ended before the drain")]
    Ended { task: &'static str },
}

/// How a drain ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Drained {
    /// Every task ended by itself within the deadline.
    Completely,
    /// The deadline passed; these tasks were told to end at once (name, how many), and did or did not.
    Cut { tasks: Vec<(&'static str, usize)> },
}

/// The signal that asked the process to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Termination {
    Interrupt,
    Terminate,
}

/// `task` with its panic caught, then `end`. An async block would hold the task twice: as what it captured and as what it
/// awaits.
fn owned<F: Future<Output = ()>>(task: F, end: impl FnOnce(std::thread::Result<()>)) -> impl Future<Output = ()> {
    AssertUnwindSafe(task).catch_unwind().map(end)
}

impl Shutdown {
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs `task` until it ends; the drain waits for it. A panic in it is logged with `name` and counted, and ends this
    /// task alone. Must be called within a tokio runtime.
    pub fn spawn<F>(&self, name: &'static str, task: F) -> AbortHandle
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let running = self.running(name);
        let inner = Arc::clone(&self.inner);
        let owned = owned(task, move |outcome| {
            let _running = running;
            if let Err(panic) = outcome {
                inner.note_panic(name, panic.as_ref());
            }
        });
        self.inner.tracker.spawn(owned).abort_handle()
    }

    /// Like [`Shutdown::spawn`], for a task without which the process makes no sense: when it ends before the drain,
    /// [`Shutdown::failure`] resolves.
    pub fn spawn_essential<F>(&self, name: &'static str, task: F) -> AbortHandle
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let running = self.running(name);
        let inner = Arc::clone(&self.inner);
        let owned = owned(task, move |outcome| {
            let _running = running;
            let failure = match outcome {
                Ok(()) => Failure::Ended { task: name },
                Err(panic) => {
                    inner.note_panic(name, panic.as_ref());
                    Failure::Panicked { task: name }
                }
            };
            if !inner.draining.is_cancelled() {
                error!(task = name, "an essential task ended");
                // Only the first failure is told: what follows is mostly its consequence.
                let _ = inner.failure.set(failure);
                inner.failed.cancel();
            }
        });
        self.inner.tracker.spawn(owned).abort_handle()
    }

    /// Resolves when the drain begins, at once if it has begun.
    pub fn draining(&self) -> impl Future<Output = ()> + Send + 'static {
        self.inner.draining.clone().cancelled_owned()
    }

    pub fn is_draining(&self) -> bool {
        self.inner.draining.is_cancelled()
    }

    /// Resolves when the drain's deadline has passed: whoever waits for it ends now.
    pub fn cut(&self) -> impl Future<Output = ()> + Send + 'static {
        self.inner.cut.clone().cancelled_owned()
    }

    /// True once an essential task has ended before the drain.
    pub fn has_failed(&self) -> bool {
        self.inner.failed.is_cancelled()
    }

    /// Resolves when an essential task has ended before the drain, with the first that did.
    pub async fn failure(&self) -> Failure {
        self.inner.failed.cancelled().await;
        match self.inner.failure.get() {
            Some(failure) => *failure,
            // Never: the failure is set before the token is cancelled.
            None => std::future::pending().await,
        }
    }

    /// Begins the drain, waits up to `deadline` for all tasks, then cuts the rest and gives them one more second. Tasks
    /// that are still there after that end with the runtime.
    pub async fn drain(&self, deadline: Duration) -> Drained {
        self.inner.draining.cancel();
        self.inner.tracker.close();
        info!(tasks = self.inner.tracker.len(), ?deadline, "draining");
        if tokio::time::timeout(deadline, self.inner.tracker.wait()).await.is_ok() {
            self.inner.cut.cancel();
            return Drained::Completely;
        }
        let tasks = self.tasks();
        warn!(?tasks, "the drain deadline has passed: cutting");
        self.inner.cut.cancel();
        if tokio::time::timeout(CUT_GRACE, self.inner.tracker.wait())
            .await
            .is_err()
        {
            error!(tasks = ?self.tasks(), "tasks did not end when cut");
        }
        Drained::Cut { tasks }
    }

    /// Running tasks by name, in the order in which the names were first used; names without a running task are left out.
    pub fn tasks(&self) -> Vec<(&'static str, usize)> {
        let names = self.inner.names.read();
        names
            .iter()
            .map(|n| (n.name, n.running.load(Ordering::Relaxed)))
            .filter(|(_, running)| *running > 0)
            .collect()
    }

    /// How many tasks have panicked.
    pub fn panics(&self) -> u64 {
        self.inner.panics.load(Ordering::Relaxed)
    }

    fn running(&self, name: &'static str) -> Running {
        // A few dozen names: a scan under a read lock is cheaper than hashing.
        let known = self.inner.names.read().iter().find(|n| n.name == name).cloned();
        let named = known.unwrap_or_else(|| {
            let mut names = self.inner.names.write();
            if let Some(named) = names.iter().find(|n| n.name == name) {
                return Arc::clone(named);
            }
            let named = Arc::new(Named {
                name,
                running: AtomicUsize::new(0),
            });
            names.push(Arc::clone(&named));
            named
        });
        named.running.fetch_add(1, Ordering::Relaxed);
        Running(named)
    }
}

impl Inner {
    fn note_panic(&self, task: &'static str, panic: &(dyn Any + Send)) {
        self.panics.fetch_add(1, Ordering::Relaxed);
        let text = panic.downcast_ref::<&str>().copied();
        let text = text
            .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
            .unwrap_or("no text");
        error!(task, panic = text, "a task panicked");
    }
}

/// Resolves at SIGTERM or SIGINT. The handlers stand once this returns from its first poll.
///
/// # Errors
/// The handlers cannot be installed.
pub async fn termination() -> io::Result<Termination> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(tokio::select! {
        _ = interrupt.recv() => Termination::Interrupt,
        _ = terminate.recv() => Termination::Terminate,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::pending;
    use tokio::sync::oneshot;

    const LONG: Duration = Duration::from_secs(10);

    #[test]
    fn a_task_is_held_once() {
        let task = async {
            let held = [1u8; 4096];
            tokio::task::yield_now().await;
            std::hint::black_box(held);
        };
        let size = size_of_val(&task);
        let owned = size_of_val(&owned(task, |_| {}));
        assert!(owned < size + 64, "{owned} bytes for a task of {size}");
    }

    #[tokio::test]
    async fn a_drain_waits_for_tasks_that_end_by_themselves() {
        let shutdown = Shutdown::new();
        let (done, finished) = oneshot::channel();
        let draining = shutdown.draining();
        shutdown.spawn("polite", async move {
            draining.await;
            tokio::task::yield_now().await;
            done.send(()).unwrap();
        });
        assert_eq!(shutdown.drain(LONG).await, Drained::Completely);
        finished.await.unwrap();
        assert_eq!(shutdown.tasks(), []);
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_does_not_drain_is_cut_after_the_deadline_and_named() {
        let shutdown = Shutdown::new();
        let cut = shutdown.cut();
        shutdown.spawn("stubborn", cut);
        shutdown.spawn("polite", shutdown.draining());
        let begin = tokio::time::Instant::now();
        let drained = shutdown.drain(LONG).await;
        assert_eq!(
            drained,
            Drained::Cut {
                tasks: vec![("stubborn", 1)]
            }
        );
        assert_eq!(begin.elapsed(), LONG, "once cut, it ended at once");
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_deaf_to_the_cut_does_not_hold_up_the_end() {
        let shutdown = Shutdown::new();
        shutdown.spawn("deaf", pending());
        let begin = tokio::time::Instant::now();
        shutdown.drain(LONG).await;
        assert_eq!(begin.elapsed(), LONG + CUT_GRACE);
        assert_eq!(shutdown.tasks(), [("deaf", 1)]);
    }

    #[tokio::test]
    async fn a_panic_ends_its_own_task_alone_and_is_counted() {
        let shutdown = Shutdown::new();
        shutdown.spawn("broken", async { panic!("as planned") });
        let (done, finished) = oneshot::channel();
        shutdown.spawn("sound", async move { done.send(()).unwrap() });
        finished.await.unwrap();
        assert_eq!(shutdown.drain(LONG).await, Drained::Completely);
        assert_eq!(shutdown.panics(), 1);
    }

    #[tokio::test]
    async fn the_end_of_an_essential_task_is_told() {
        let shutdown = Shutdown::new();
        assert!(!shutdown.has_failed());
        shutdown.spawn_essential("index", async {});
        let failure = tokio::time::timeout(LONG, shutdown.failure()).await.unwrap();
        assert!(shutdown.has_failed());
        assert_eq!(failure, Failure::Ended { task: "index" });

        let shutdown = Shutdown::new();
        shutdown.spawn_essential("index", async { panic!("as planned") });
        let failure = tokio::time::timeout(LONG, shutdown.failure()).await.unwrap();
        assert_eq!(failure, Failure::Panicked { task: "index" });
    }

    #[tokio::test]
    async fn an_essential_task_that_ends_in_the_drain_is_no_failure() {
        let shutdown = Shutdown::new();
        shutdown.spawn_essential("index", shutdown.draining());
        shutdown.drain(LONG).await;
        assert!(!shutdown.inner.failed.is_cancelled());
    }

    #[tokio::test]
    async fn an_aborted_task_is_no_longer_counted() {
        let shutdown = Shutdown::new();
        let task = shutdown.spawn("aborted", pending());
        assert_eq!(shutdown.tasks(), [("aborted", 1)]);
        task.abort();
        assert_eq!(shutdown.drain(LONG).await, Drained::Completely);
        assert_eq!(shutdown.tasks(), []);
    }
}

//! Capture as a task that can be stopped for a while: for as long as another daemon may be about to take the node over.

use super::{Snapshots, pods::Pods};
use crate::{
    capture::{self, CaptureEvent, CaptureSettings, Ended, Inherited, KernelSide},
    kernel::Kernel,
    shutdown::Shutdown,
};
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

/// Everything that capture needs, to begin or to begin anew.
pub(super) struct Capturing {
    pub(super) kernel: Arc<Kernel>,
    pub(super) settings: CaptureSettings,
    pub(super) snapshots: Snapshots,
    pub(super) events: mpsc::Sender<CaptureEvent>,
    pub(super) pods: Arc<Pods>,
    pub(super) shutdown: Shutdown,
}

/// Asks capture to stand still.
#[derive(Clone)]
pub(super) struct Pauses(mpsc::Sender<oneshot::Sender<Paused>>);

pub(super) type Asked = mpsc::Receiver<oneshot::Sender<Paused>>;

/// Capture stands still. Dropped, it goes on.
#[must_use = "dropping it lets capture go on"]
pub(super) struct Paused(oneshot::Sender<()>);

impl Paused {
    /// It never goes on here: another daemon captures.
    pub(super) fn for_good(self) {
        let _ = self.0.send(());
    }
}

impl Pauses {
    pub(super) fn new() -> (Self, Asked) {
        let (sender, receiver) = mpsc::channel(1);
        (Self(sender), receiver)
    }

    /// Returns once no step is under way and everything that happened has been taken note of; `None` if capture has ended.
    pub(super) async fn pause(&self) -> Option<Paused> {
        let (stopped, paused) = oneshot::channel();
        self.0.send(stopped).await.ok()?;
        paused.await.ok()
    }
}

impl Capturing {
    /// Runs until the drain begins. `left` is told when every pod has been released.
    pub(super) async fn run(self, mut asked: Asked, left: oneshot::Sender<()>) {
        let mut inherited = self.settings.inherited.clone();
        loop {
            let pause = CancellationToken::new();
            let settings = CaptureSettings {
                pause: pause.clone(),
                inherited,
                ..self.settings.clone()
            };
            let running = capture::reconcile(
                Arc::clone(&self.kernel) as Arc<dyn KernelSide>,
                settings,
                self.snapshots.clone(),
                self.events.clone(),
                self.shutdown.clone(),
            );
            tokio::pin!(running);
            let (ended, asks) = tokio::select! {
                ended = &mut running => (ended, None),
                Some(asks) = asked.recv() => {
                    pause.cancel();
                    (running.await, Some(asks))
                }
            };
            match ended {
                Ok(Ended::Paused) => {}
                Ok(Ended::Drained) => return,
                Ok(Ended::Left) => {
                    let _ = left.send(());
                    return self.shutdown.draining().await;
                }
                Err(error) => {
                    return error!(error = &error as &dyn std::error::Error, "pods cannot be captured");
                }
            }
            let (heard, all_heard) = oneshot::channel();
            if self.events.send(CaptureEvent::Paused { heard }).await.is_err() {
                return;
            }
            let _ = all_heard.await;
            let (for_good, is_over) = oneshot::channel();
            // Whoever asked may have lost patience: then it goes on at once.
            let _ = asks.map(|asks| asks.send(Paused(for_good)));
            if is_over.await.is_ok() {
                return self.shutdown.draining().await;
            }
            info!("capture goes on");
            inherited = match self.anew().await {
                Ok(inherited) => inherited,
                Err(error) => return error!(error = format!("{error:#}"), "capture cannot go on"),
            };
        }
    }

    /// Somebody else may have written to the kernel meanwhile.
    async fn anew(&self) -> anyhow::Result<Inherited> {
        let kernel = Arc::clone(&self.kernel);
        tokio::task::spawn_blocking(move || kernel.readopt()).await??;
        Ok(self.pods.keep())
    }
}

//! Capture as a task that can be stopped for a while: for as long as another daemon may be about to take the node over. It
//! owns the tenure, and gives it away or lets go of it when no step is under way: so nobody else has the node while this
//! process writes to it.

use super::{Snapshots, pods::Pods};
use crate::{
    capture::{self, CaptureEvent, CaptureSettings, Ended, Inherited, KernelSide},
    handover::Tenure,
    shutdown::Shutdown,
};
use std::sync::Arc;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tracing::{error, info};

/// Everything that capture needs, to begin or to begin anew.
pub(super) struct Capturing {
    pub(super) kernel: Arc<dyn KernelSide>,
    /// Where no other daemon can come: none.
    pub(super) tenure: Option<Tenure>,
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

/// Capture stands still, and the node is whose this is. Dropped, capture has it back and goes on.
#[must_use = "dropping it lets capture go on"]
pub(super) struct Paused {
    tenure: Option<Tenure>,
    goes_on: Option<oneshot::Sender<Resumed>>,
}

/// With what capture goes on after a pause.
struct Resumed {
    tenure: Option<Tenure>,
    /// Of another daemon, which had the node meanwhile.
    inherited: Option<Inherited>,
}

impl Paused {
    pub(super) fn tenure(&self) -> Option<&Tenure> {
        self.tenure.as_ref()
    }

    /// Another daemon captures: here it goes on only if the node is taken back.
    pub(super) fn give_away(mut self) -> Resting {
        Resting(self.goes_on.take())
    }
}

/// Capture stands still, for the node is another daemon's. Dropped, it does so until the end.
#[must_use = "dropping it ends capture"]
pub(super) struct Resting(Option<oneshot::Sender<Resumed>>);

impl Resting {
    /// The node is this daemon's again, with what came with it: capture goes on.
    pub(super) fn take_back(self, tenure: Tenure, inherited: Inherited) {
        if let Some(goes_on) = self.0 {
            let _ = goes_on.send(Resumed {
                tenure: Some(tenure),
                inherited: Some(inherited),
            });
        }
    }
}

impl Drop for Paused {
    fn drop(&mut self) {
        if let Some(goes_on) = self.goes_on.take() {
            let _ = goes_on.send(Resumed {
                tenure: self.tenure.take(),
                inherited: None,
            });
        }
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
    /// Runs until the drain begins. `left` gets the tenure when every pod has been released, or at the end, unless it is
    /// another daemon's by then.
    pub(super) async fn run(mut self, mut asked: Asked, left: oneshot::Sender<Option<Tenure>>) {
        let mut inherited = self.settings.inherited.clone();
        loop {
            let pause = CancellationToken::new();
            let settings = CaptureSettings {
                pause: pause.clone(),
                inherited,
                ..self.settings.clone()
            };
            let running = capture::reconcile(
                Arc::clone(&self.kernel),
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
                Ok(Ended::Drained) => {
                    let _ = left.send(self.tenure);
                    return;
                }
                Ok(Ended::Left) => {
                    let _ = left.send(self.tenure);
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
            let (goes_on, going_on) = oneshot::channel();
            let paused = Paused {
                tenure: self.tenure.take(),
                goes_on: Some(goes_on),
            };
            // Whoever asked may have lost patience: then it goes on at once.
            let _ = asks.map(|asks| asks.send(paused));
            let Ok(Resumed {
                tenure,
                inherited: given,
            }) = going_on.await
            else {
                return self.shutdown.draining().await;
            };
            self.tenure = tenure;
            if self.shutdown.is_draining() {
                let _ = left.send(self.tenure);
                return;
            }
            info!("capture goes on");
            inherited = match self.anew().await {
                Ok(kept) => given.unwrap_or(kept),
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        capture::testing::{NODE, Recorder, pod},
        handover::{Door, FromSuccessor, Link, LinkError},
        mesh::MeshSnapshot,
        net::testing::pod_namespace,
        testing::{DEADLINE, eventually},
    };
    use std::{
        os::fd::{AsFd, AsRawFd},
        path::PathBuf,
        time::Duration,
    };
    use tokio::sync::watch;

    /// Capture of one pod, with a tenure that another daemon gave.
    struct Scene {
        directory: tempfile::TempDir,
        kernel: Arc<Recorder>,
        predecessor: Link,
        pauses: Pauses,
        shutdown: Shutdown,
        _snapshots: watch::Sender<Arc<MeshSnapshot>>,
        _namespace: crate::net::Namespace,
    }

    impl Scene {
        async fn start(test: &str, kernel: Arc<Recorder>) -> Option<Self> {
            let namespace = pod_namespace(test)?;
            let netns = format!("/proc/{}/fd/{}", std::process::id(), namespace.as_fd().as_raw_fd());
            let mut mesh = MeshSnapshot {
                version: 1,
                node: Some(NODE.into()),
                ..MeshSnapshot::default()
            };
            mesh.set_workload(Arc::new(pod(netns.into())));
            let (publish, snapshots) = watch::channel(Arc::new(mesh));
            let directory = tempfile::tempdir().unwrap();
            let door = Door::open(&directory.path().join("door")).unwrap();
            let to_it = Link::open(&directory.path().join("door")).unwrap().expect("a door");
            let predecessor = door.next().await.unwrap();
            let given = Tenure::take(&directory.path().join("sock"))
                .unwrap()
                .expect("nobody has it");
            let lock = given.as_fd().try_clone_to_owned().unwrap();
            let (shutdown, (events, mut captured)) = (Shutdown::new(), mpsc::channel(16));
            let capturing = Capturing {
                kernel: Arc::clone(&kernel) as Arc<dyn KernelSide>,
                tenure: Some(Tenure::given(lock, Some(Arc::new(to_it)))),
                settings: CaptureSettings::by_manifests(NODE, Duration::ZERO),
                pods: Pods::of_test(snapshots.clone(), &shutdown),
                snapshots,
                events,
                shutdown: shutdown.clone(),
            };
            let (pauses, asked) = Pauses::new();
            shutdown.spawn("capture", capturing.run(asked, oneshot::channel().0));
            tokio::spawn(async move { while captured.recv().await.is_some() {} });
            Some(Self {
                directory,
                kernel,
                predecessor,
                pauses,
                shutdown,
                _snapshots: publish,
                _namespace: namespace,
            })
        }

        fn socket(&self) -> PathBuf {
            self.directory.path().join("sock")
        }

        fn is_owned(&self) -> bool {
            Tenure::take(&self.socket()).unwrap().is_none()
        }

        async fn until_nobody_owns(&self) {
            eventually("nobody owns the node", || !self.is_owned()).await;
        }
    }

    #[tokio::test]
    async fn nobody_else_has_the_node_before_the_last_step_has_ended() {
        let kernel = Arc::new(Recorder::default());
        let slow = kernel.slow.lock().await;
        let Some(scene) = Scene::start("tenure", Arc::clone(&kernel)).await else {
            return;
        };
        kernel.until_called("set_listeners", 1).await;
        scene.shutdown.drain(Duration::ZERO).await;
        assert!(scene.is_owned(), "a step is under way");
        let silence = Duration::from_millis(100);
        let said = scene.predecessor.hear::<FromSuccessor>(silence).await;
        assert!(
            matches!(said, Err(LinkError::Silent(_))),
            "the one before may go on: {said:?}"
        );
        drop(slow);
        scene.until_nobody_owns().await;
        let said = scene.predecessor.hear::<FromSuccessor>(DEADLINE).await;
        assert!(matches!(said, Err(LinkError::Closed)), "{said:?}");
    }

    #[tokio::test]
    async fn a_pause_has_the_tenure_and_gives_it_back_or_away() {
        let Some(scene) = Scene::start("pause", Arc::default()).await else {
            return;
        };
        let paused = scene.pauses.pause().await.unwrap();
        assert!(paused.tenure().is_some() && scene.is_owned());
        drop(paused);
        scene.kernel.until_called("readopt", 1).await;
        assert!(scene.is_owned(), "it goes on");
        let paused = scene.pauses.pause().await.unwrap();
        assert!(paused.tenure().is_some() && scene.is_owned());
        let resting = paused.give_away();
        scene.until_nobody_owns().await;
        assert_eq!(scene.kernel.called("readopt"), 1, "it stands still");
        let tenure = Tenure::take(&scene.socket()).unwrap().expect("nobody has it");
        resting.take_back(tenure, Inherited::default());
        scene.kernel.until_called("readopt", 2).await;
        assert!(scene.is_owned(), "it goes on");
        drop(scene.pauses.pause().await.unwrap().give_away());
        scene.until_nobody_owns().await;
        scene.shutdown.drain(DEADLINE).await;
        assert_eq!(scene.kernel.called("readopt"), 2);
    }
}

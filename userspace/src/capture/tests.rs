//! The whole task in real namespaces, with the kernel programs replaced by a record of what was asked of them.

mod capturing;
mod ending;
mod inheriting;
mod refusing;
mod releasing;

use super::testing::*;
use super::*;
use crate::{
    mesh::{MeshSnapshot, Workload},
    net::{
        NamespaceError,
        testing::{ip, pod_namespace, sysctl},
    },
    shutdown::Shutdown,
    testing::{eventually, within},
};
use std::{fmt::from_fn, os::fd::AsRawFd as _, path::PathBuf, time::Duration};
use tempfile::TempDir;
use tokio::{
    sync::{mpsc, watch},
    task::JoinHandle,
};
use tokio_util::sync::CancellationToken;

/// A running task with one pod, `a`, whose namespace is found by a symlink.
struct Running {
    namespace: Namespace,
    /// What the namespace looked like before anybody touched it.
    untouched: String,
    directory: TempDir,
    kernel: Arc<Recorder>,
    snapshots: watch::Sender<Arc<MeshSnapshot>>,
    events: mpsc::Receiver<CaptureEvent>,
    shutdown: Shutdown,
    leave: CancellationToken,
    pause: CancellationToken,
    task: JoinHandle<Result<Ended, NamespaceError>>,
}

impl Running {
    fn start(test: &str, recorder: impl FnOnce(&Namespace) -> Recorder) -> Option<Self> {
        let namespace = pod_namespace(test)?;
        let directory = tempfile::tempdir().unwrap();
        let path = format!("/proc/{}/fd/{}", std::process::id(), namespace.as_fd().as_raw_fd());
        std::os::unix::fs::symlink(path, directory.path().join("a")).unwrap();
        let kernel = Arc::new(recorder(&namespace));
        let (snapshots, receiver) = watch::channel(Arc::default());
        let (sender, events) = mpsc::channel(16);
        let settings = CaptureSettings::by_manifests(NODE, Duration::from_millis(300));
        let (leave, pause) = (settings.leave.clone(), settings.pause.clone());
        let shutdown = Shutdown::new();
        let task = reconcile(
            Arc::clone(&kernel) as Arc<dyn KernelSide>,
            settings,
            receiver,
            sender,
            shutdown.clone(),
        );
        let untouched = state(&namespace);
        let task = tokio::spawn(task);
        Some(Self {
            namespace,
            untouched,
            directory,
            kernel,
            snapshots,
            events,
            shutdown,
            leave,
            pause,
            task,
        })
    }

    fn path(&self) -> PathBuf {
        self.directory.path().join("a")
    }

    fn pod(&self) -> Workload {
        pod(self.path())
    }

    fn publish(&self, change: impl FnOnce(&mut MeshSnapshot)) {
        self.snapshots.send_modify(|snapshot| {
            let mut next = MeshSnapshot::clone(snapshot);
            next.version += 1;
            next.node = Some(NODE.into());
            change(&mut next);
            *snapshot = Arc::new(next);
        });
    }

    fn publish_pod(&self, pod: Workload) {
        self.publish(|snapshot| {
            for address in &pod.addresses {
                snapshot.by_address.insert(*address, pod.uid.clone());
            }
            snapshot.set_workload(Arc::new(pod));
        });
    }

    async fn event(&mut self) -> CaptureEvent {
        within("an event", self.events.recv()).await.expect("a running task")
    }

    async fn captured(&mut self) -> CapturedPod {
        match self.event().await {
            CaptureEvent::Captured(captured) => captured,
            other => panic!("{other:?}"),
        }
    }

    /// The pod is put into the mesh, and captured.
    async fn put_and_captured(&mut self) -> CapturedPod {
        self.publish_pod(self.pod());
        self.captured().await
    }

    /// Captured, and the start settled.
    async fn served(&mut self) -> CapturedPod {
        let served = self.put_and_captured().await;
        assert!(matches!(self.event().await, CaptureEvent::Settled));
        served
    }

    fn unlabel_pod(&self) {
        self.publish_pod(Workload {
            enrolled: false,
            ..self.pod()
        });
    }

    /// The reason of the next event, which is a failure.
    async fn failure(&mut self) -> &'static str {
        match self.event().await {
            CaptureEvent::Failed { error, .. } => error.reason(),
            other => panic!("{other:?}"),
        }
    }

    /// Ends when the pod is captured, whatever happens before.
    async fn until_captured(&mut self) {
        while !matches!(self.event().await, CaptureEvent::Captured(_)) {}
    }

    async fn until_untouched(&self) {
        let what = from_fn(|f| write!(f, "as it was; it is {}", state(&self.namespace)));
        eventually(what, || state(&self.namespace) == self.untouched).await;
    }

    /// What the task says at its end.
    async fn ended(&mut self) -> Ended {
        within("the end", &mut self.task).await.unwrap().unwrap()
    }
}

fn state(pod: &Namespace) -> String {
    let shown = ["rule", "-6 rule", "route show table all", "-6 route show table all"].map(|show| ip(pod, show));
    let sysctls = [
        "net/ipv4/tcp_fwmark_accept",
        "net/ipv4/fwmark_reflect",
        "net/ipv6/fwmark_reflect",
    ];
    shown.join("--\n") + &sysctls.map(|name| sysctl(pod, name)).join(" ")
}

//! The captured pods of the node: each is served by the proxy from its capture to its release, and the daemon is ready
//! when every one of its own is.

use super::Snapshots;
use crate::{
    admin::Readiness,
    capture::{CaptureEvent, CapturedPod},
    mesh::{MeshSnapshot, SpiffeId, Workload, WorkloadUid},
    proxy::{CapturedPodParts, PodHandle, ProxyContext, spawn_pod},
    shutdown::Shutdown,
    telemetry::dump,
};
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};
use tokio::sync::mpsc;
use tracing::{error, info, warn};

/// What has to be so before the daemon is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Condition {
    Snapshot,
    Programs,
    Pods,
    Running,
}

impl Condition {
    /// What is awaited from the start; `Running` only ceases.
    pub(super) const ALL: [Self; 3] = [Self::Snapshot, Self::Programs, Self::Pods];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Snapshot => "snapshot",
            Self::Programs => "programs",
            Self::Pods => "pods",
            Self::Running => "running",
        }
    }

    pub(super) fn awaited(self) -> (&'static str, &'static str) {
        let why = match self {
            Self::Snapshot => "the initial list is not complete",
            Self::Programs => "the kernel programs are not attached",
            Self::Pods => "not every pod of the node is captured",
            Self::Running => "running",
        };
        (self.name(), why)
    }
}

/// The node's pods as they are served.
pub(super) struct Pods {
    node: Arc<str>,
    context: Arc<ProxyContext>,
    drain: Duration,
    readiness: Readiness,
    shutdown: Shutdown,
    states: Mutex<BTreeMap<WorkloadUid, State>>,
}

enum State {
    Served(PodHandle),
    /// Why it is not captured.
    Failed(String),
}

impl Pods {
    pub(super) fn new(
        node: Arc<str>,
        context: Arc<ProxyContext>,
        drain: Duration,
        readiness: Readiness,
        shutdown: Shutdown,
    ) -> Arc<Self> {
        Arc::new(Self {
            node,
            context,
            drain,
            readiness,
            shutdown,
            states: Mutex::default(),
        })
    }

    /// Follows capture and snapshots until the drain begins.
    pub(super) async fn serve(self: Arc<Self>, mut events: mpsc::Receiver<CaptureEvent>) {
        let mut snapshots: Snapshots = self.context.snapshot.clone();
        let draining = self.shutdown.draining();
        tokio::pin!(draining);
        loop {
            let snapshot = Arc::clone(&snapshots.borrow_and_update());
            self.context.certs.want(identities(&snapshot, &self.node));
            tokio::select! {
                () = &mut draining => return,
                changed = snapshots.changed() => if changed.is_err() { return },
                event = events.recv() => match event {
                    Some(event) => self.take(event),
                    None => return,
                },
            }
        }
    }

    fn take(&self, event: CaptureEvent) {
        match event {
            CaptureEvent::Captured(pod) => self.captured(pod),
            CaptureEvent::Settled => self.readiness.met(Condition::Pods.name()),
            // Dropped: nobody but us says that it is in the mesh.
            CaptureEvent::Leaving { .. } => {}
            CaptureEvent::Released(workload) => {
                let state = self.states.lock().remove(&workload);
                if let Some(State::Served(handle)) = state {
                    info!(%workload, "released");
                    let drain = self.drain;
                    self.shutdown.spawn("release", handle.release(drain));
                }
            }
            CaptureEvent::Failed {
                workload,
                error,
                attempts,
            } => {
                self.context.metrics.gauges.capture_failed(error.reason());
                let cause = anyhow::Error::from(error);
                warn!(%workload, attempts, error = format!("{cause:#}"), "not captured");
                self.states.lock().insert(workload, State::Failed(format!("{cause:#}")));
            }
        }
        let served = |states: &BTreeMap<_, State>| states.values().filter(|s| matches!(s, State::Served(_))).count();
        self.context
            .metrics
            .gauges
            .set_captured_pods(served(&self.states.lock()));
    }

    fn captured(&self, pod: CapturedPod) {
        let CapturedPod {
            workload,
            namespace,
            listeners,
        } = pod;
        let parts = CapturedPodParts {
            workload: workload.clone(),
            namespace,
            listeners,
        };
        let state = match spawn_pod(&self.context, parts, &self.shutdown) {
            Ok(handle) => {
                info!(%workload, "captured");
                State::Served(handle)
            }
            Err(cause) => {
                error!(%workload, error = &cause as &dyn std::error::Error, "captured, but cannot be served: its connections are refused");
                State::Failed(cause.to_string())
            }
        };
        self.states.lock().insert(workload, state);
    }

    pub(super) fn list(&self) -> Vec<dump::CapturedPod> {
        let snapshot = Arc::clone(&self.context.snapshot.borrow());
        let states = self.states.lock();
        let pods = states.iter().map(|(uid, state)| {
            let workload = snapshot.workloads.get(uid);
            dump::CapturedPod {
                uid: uid.to_string(),
                name: workload.map(|w| w.name.to_string()).unwrap_or_default(),
                namespace: workload.map(|w| w.namespace.to_string()).unwrap_or_default(),
                state: match state {
                    State::Served(_) => "captured".to_owned(),
                    State::Failed(why) => why.clone(),
                },
            }
        });
        pods.collect()
    }
}

/// The pods of the mesh that this node should capture.
fn own<'s>(snapshot: &'s MeshSnapshot, node: &str) -> impl Iterator<Item = &'s Arc<Workload>> {
    let workloads = snapshot.workloads.values();
    workloads.filter(move |workload| {
        workload.enrolled
            && !workload.host_network
            && workload.netns.is_some()
            && workload.locality.node.as_deref() == Some(node)
    })
}

fn identities(snapshot: &MeshSnapshot, node: &str) -> BTreeSet<SpiffeId> {
    own(snapshot, node).map(|workload| workload.identity.clone()).collect()
}

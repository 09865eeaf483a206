//! The captured pods of the node: each is served by the proxy from its capture to its release, and the daemon is ready
//! when every one of its own is.

use super::Snapshots;
use crate::{
    admin::Readiness,
    capture::{CaptureEvent, CapturedPod, Inherited},
    kubernetes::announce::Announcements,
    mesh::{MeshSnapshot, SpiffeId, Workload, WorkloadUid},
    net::{PodListeners, Role},
    proxy::{CapturedPodParts, PodHandle, ProxyContext, spawn_pod},
    shutdown::Shutdown,
    telemetry::dump,
};
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    os::fd::OwnedFd,
    sync::Arc,
    time::Duration,
};
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

/// How long a pod that left the mesh still answers HBONE.
pub(super) const LINGER: Duration = Duration::from_secs(10);

/// What has to be so before the daemon is ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Condition {
    Snapshot,
    /// No other daemon has it.
    Node,
    Programs,
    Pods,
    Running,
}

impl Condition {
    /// What is awaited from the start; `Running` only ceases.
    pub(super) const ALL: [Self; 4] = [Self::Snapshot, Self::Node, Self::Programs, Self::Pods];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Snapshot => "snapshot",
            Self::Node => "node",
            Self::Programs => "programs",
            Self::Pods => "pods",
            Self::Running => "running",
        }
    }

    pub(super) fn awaited(self) -> (&'static str, &'static str) {
        let why = match self {
            Self::Snapshot => "the initial list is not complete",
            Self::Node => "the node is not this daemon's yet",
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
    /// Counts changes of `states`.
    told: watch::Sender<u64>,
    /// With an API server: the cluster hears of it.
    announcements: Option<Announcements>,
    /// Cancelled once every pod that should be captured when the node becomes ours has been, or has failed.
    settled: Mutex<CancellationToken>,
    /// Served from before a pause of capture, and not heard of since.
    unconfirmed: Mutex<BTreeSet<WorkloadUid>>,
}

/// A pod that is served: its namespace's cookie, and its listeners.
pub(super) type Sockets = (WorkloadUid, u64, Vec<(Role, OwnedFd)>);

enum State {
    Served {
        handle: PodHandle,
        /// Device and inode of its network namespace.
        namespace: (u64, u64),
    },
    /// Why it is not captured.
    Failed { why: String, is_final: bool },
}

/// How a pod stands with capture.
pub(super) enum Standing {
    /// Captured, in this namespace.
    Served((u64, u64)),
    Failed {
        why: String,
        is_final: bool,
    },
    Unknown,
}

impl Pods {
    pub(super) fn new(
        node: Arc<str>,
        context: Arc<ProxyContext>,
        drain: Duration,
        readiness: Readiness,
        announcements: Option<Announcements>,
        shutdown: Shutdown,
    ) -> Arc<Self> {
        Arc::new(Self {
            node,
            context,
            drain,
            readiness,
            shutdown,
            states: Mutex::default(),
            told: watch::Sender::new(0),
            announcements,
            settled: Mutex::default(),
            unconfirmed: Mutex::default(),
        })
    }

    /// Returns once every pod that should be captured when the node becomes ours has been, or has failed.
    pub(super) async fn settled(&self) {
        let settled = self.settled.lock().clone();
        settled.cancelled().await;
    }

    /// The listeners of the pods that are served, for another daemon to accept from as well.
    pub(super) fn sockets(&self) -> io::Result<Vec<Sockets>> {
        let states = self.states.lock();
        let served = states.iter().filter_map(|(workload, state)| match state {
            State::Served { handle, .. } => Some((workload, handle)),
            State::Failed { .. } => None,
        });
        served
            .map(|(workload, handle)| Ok((workload.clone(), handle.namespace(), handle.listeners()?)))
            .collect()
    }

    /// Capture begins anew: what is served stays so, with the listeners that this gives back. What capture does not find
    /// any more is let go when it has settled.
    pub(super) fn keep(&self) -> Inherited {
        let inherited = Inherited::default();
        let mut kept = BTreeSet::new();
        for (workload, namespace, sockets) in self.sockets().unwrap_or_default() {
            match PodListeners::inherit(namespace, sockets) {
                Ok(listeners) => {
                    inherited.put(namespace, listeners);
                    kept.insert(workload);
                }
                Err(error) => {
                    warn!(%workload, error = &error as &dyn std::error::Error, "a pod gets new listeners");
                }
            }
        }
        self.states.lock().retain(|workload, _| kept.contains(workload));
        *self.unconfirmed.lock() = kept;
        inherited
    }

    /// Another daemon serves the pods: nothing more is accepted here, and what is open goes on.
    pub(super) fn pass_on(&self) {
        for state in std::mem::take(&mut *self.states.lock()).into_values() {
            if let State::Served { handle, .. } = state {
                handle.pass_on();
            }
        }
        *self.settled.lock() = CancellationToken::new();
        self.announce(Announcements::forget);
        self.context.metrics.gauges.set_captured_pods(0);
        self.told.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Changes whenever the standing of a pod does.
    pub(super) fn told(&self) -> watch::Receiver<u64> {
        self.told.subscribe()
    }

    pub(super) fn standing(&self, pod: &WorkloadUid) -> Standing {
        match self.states.lock().get(pod) {
            Some(State::Served { namespace, .. }) => Standing::Served(*namespace),
            Some(State::Failed { why, is_final }) => Standing::Failed {
                why: why.clone(),
                is_final: *is_final,
            },
            None => Standing::Unknown,
        }
    }

    /// Follows capture and snapshots until the drain begins.
    pub(super) async fn serve(self: Arc<Self>, mut events: mpsc::Receiver<CaptureEvent>) {
        let mut snapshots: Snapshots = self.context.snapshot.clone();
        let draining = self.shutdown.draining();
        tokio::pin!(draining);
        loop {
            let snapshot = Arc::clone(&snapshots.borrow_and_update());
            self.context
                .certs
                .want(identities(&snapshot, &self.node, self.announcements.is_some()));
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
            CaptureEvent::Paused { heard } => drop(heard),
            CaptureEvent::Settled => {
                for workload in std::mem::take(&mut *self.unconfirmed.lock()) {
                    self.released(workload);
                }
                self.settled.lock().cancel();
                self.readiness.met(Condition::Pods.name());
                self.announce(Announcements::settled);
            }
            // Dropped where nobody but us says that it is in the mesh.
            CaptureEvent::Leaving { workload, proceed } => {
                self.announce(|announcements| announcements.leaving(workload, proceed));
            }
            CaptureEvent::Released(workload) => self.released(workload),
            CaptureEvent::Failed {
                workload,
                error,
                attempts,
            } => {
                let (reason, is_final, lasts) = (error.reason(), error.is_final(), error.lasts(attempts));
                let why = format!("{:#}", anyhow::Error::from(error));
                if lasts {
                    self.context.metrics.gauges.capture_failed(reason);
                    warn!(%workload, attempts, error = why, "not captured");
                } else {
                    debug!(%workload, attempts, error = why, "not captured");
                }
                self.announce(|announcements| announcements.failed(workload.clone(), reason, is_final, why.clone()));
                self.unconfirmed.lock().remove(&workload);
                self.states.lock().insert(workload, State::Failed { why, is_final });
            }
        }
        let served = |states: &BTreeMap<_, State>| {
            let states = states.values();
            states.filter(|state| matches!(state, State::Served { .. })).count()
        };
        self.context
            .metrics
            .gauges
            .set_captured_pods(served(&self.states.lock()));
        self.told.send_modify(|count| *count = count.wrapping_add(1));
    }

    fn released(&self, workload: WorkloadUid) {
        let state = self.states.lock().remove(&workload);
        if let Some(State::Served { handle, .. }) = state {
            info!(%workload, "released");
            let drain = self.drain;
            self.shutdown.spawn("release", handle.release(drain, self.linger()));
        }
        self.announce(|announcements| announcements.released(workload));
    }

    fn announce(&self, announce: impl FnOnce(&Announcements)) {
        if let Some(announcements) = &self.announcements {
            announce(announcements);
        }
    }

    /// Others hear late that a pod has left, where they hear it from the API server.
    fn linger(&self) -> Duration {
        match self.announcements {
            Some(_) => LINGER,
            None => Duration::ZERO,
        }
    }

    fn captured(&self, pod: CapturedPod) {
        let CapturedPod {
            workload,
            namespace,
            listeners,
        } = pod;
        let inode = namespace.inode();
        let is_kept = self.unconfirmed.lock().remove(&workload);
        if is_kept && matches!(self.standing(&workload), Standing::Served(before) if before == inode) {
            // The same sockets as before, which are served already.
            self.announce(|announcements| announcements.captured(workload));
            return;
        }
        let parts = CapturedPodParts {
            workload: workload.clone(),
            namespace,
            listeners,
        };
        let state = match spawn_pod(&self.context, parts, &self.shutdown) {
            Ok(handle) => {
                info!(%workload, "captured");
                self.announce(|announcements| announcements.captured(workload.clone()));
                State::Served {
                    handle,
                    namespace: inode,
                }
            }
            Err(cause) => {
                error!(%workload, error = &cause as &dyn std::error::Error, "captured, but cannot be served: its connections are refused");
                State::Failed {
                    why: cause.to_string(),
                    is_final: false,
                }
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
                    State::Served { .. } => "captured".to_owned(),
                    State::Failed { why, .. } => why.clone(),
                },
            }
        });
        pods.collect()
    }
}

/// The pods of the mesh that this node should capture.
fn own<'s>(snapshot: &'s MeshSnapshot, node: &str, are_found: bool) -> impl Iterator<Item = &'s Arc<Workload>> {
    snapshot.own.values().filter(move |workload| {
        workload.enrolled
            && !workload.host_network
            && (are_found || workload.netns.is_some())
            && workload.locality.node.as_deref() == Some(node)
    })
}

pub(super) fn identities(snapshot: &MeshSnapshot, node: &str, are_found: bool) -> BTreeSet<SpiffeId> {
    own(snapshot, node, are_found)
        .map(|workload| workload.identity.clone())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        capture::{CaptureError, testing::pod},
        certs::CertStore,
        mesh::{fixtures, map::visited},
        net::{Namespace, listen, testing::pod_namespace},
        proxy::{Connections, ProxySettings},
        telemetry::{Metrics, Place},
    };

    impl Pods {
        /// Of a node without certificates.
        pub(in crate::app) fn of_test(snapshot: Snapshots, shutdown: &Shutdown) -> Arc<Self> {
            let context = ProxyContext {
                snapshot,
                certs: CertStore::fixed([]),
                metrics: Metrics::new(Place::default()),
                connections: Connections::default(),
                settings: ProxySettings::default(),
            };
            let (drain, readiness) = (Duration::ZERO, Readiness::awaiting([]));
            let node = "node-a".into();
            Self::new(node, Arc::new(context), drain, readiness, None, shutdown.clone())
        }
    }

    #[tokio::test]
    async fn a_pod_that_capture_finds_elsewhere_or_only_later_is_served_by_its_new_listeners() {
        let (Some(old), Some(new)) = (pod_namespace("pods-old"), pod_namespace("pods-new")) else {
            return;
        };
        let mut mesh = MeshSnapshot::default();
        mesh.set_workload(Arc::new(pod("/nowhere".into())));
        let (_publish, snapshots) = watch::channel(Arc::new(mesh));
        let pods = Pods::of_test(snapshots, &Shutdown::new());
        let workload = WorkloadUid("a".into());
        let captured = |namespace: &Namespace, listeners| CapturedPod {
            workload: workload.clone(),
            namespace: namespace.clone(),
            listeners,
        };
        let served = || {
            let sockets = pods.sockets().unwrap();
            sockets
                .into_iter()
                .map(|(_, namespace, _)| namespace)
                .collect::<Vec<_>>()
        };
        pods.captured(captured(&old, listen(&old).unwrap()));
        // Its sandbox was made anew while capture stood still.
        let _inherited = pods.keep();
        pods.captured(captured(&new, listen(&new).unwrap()));
        assert_eq!(served(), [new.cookie()]);
        // It is captured at the second attempt.
        let _inherited = pods.keep();
        pods.take(CaptureEvent::Failed {
            workload: workload.clone(),
            error: Arc::new(CaptureError::Interrupted),
            attempts: 1,
        });
        pods.captured(captured(&new, listen(&new).unwrap()));
        pods.take(CaptureEvent::Settled);
        assert_eq!(served(), [new.cookie()]);
    }

    #[tokio::test]
    async fn what_a_pods_end_looks_like_is_no_failure_until_it_lasts() {
        let (_publish, snapshots) = watch::channel(Arc::default());
        let pods = Pods::of_test(snapshots, &Shutdown::new());
        let fail = |attempts| {
            pods.take(CaptureEvent::Failed {
                workload: WorkloadUid("a".into()),
                error: Arc::new(CaptureError::NoProcess),
                attempts,
            });
            pods.context.metrics.encode()
        };
        assert!(!fail(1).contains("no-process"));
        assert!(fail(100).contains("warren_capture_failures_total{reason=\"no-process\"} 1"));
    }

    #[test]
    fn which_identities_a_node_needs_costs_what_its_own_pods_do() {
        let costs = [1_000, 20_000].map(|pods| {
            let mesh = fixtures::large(pods);
            visited(|| assert_eq!(identities(&mesh, "node-0", true).len(), 10))
        });
        assert!(costs[0] < 50, "{costs:?}");
        assert_eq!(costs[0], costs[1], "it grows with the mesh");
    }
}

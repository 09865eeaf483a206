//! Who is connected: every open connection of every captured pod, with what policy needs to ask about it again. Listed by
//! admin, re-checked when policy changes, closed from outside. Not here: the copying (`relay`).

use crate::{
    mesh::{
        MeshSnapshot, Workload, WorkloadUid,
        policy::{self, Facts, MutualTls},
    },
    telemetry::{ConnectionFacts, ConnectionMetrics},
};
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU8, AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll},
    time::Instant,
};

/// Why the daemon closed a connection that was open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Closed {
    #[error("connection closed due to policy change")]
    PolicyChange,
    #[error("connection closed because the daemon is going away")]
    Cut,
    #[error("connection closed because the pod left the mesh")]
    Released,
}

impl Closed {
    const ALL: [Self; 3] = [Self::PolicyChange, Self::Cut, Self::Released];
}

/// What policy decided on when the connection was let in.
#[derive(Debug)]
pub(super) enum Admission {
    /// Ours to send: the other side decides.
    Outbound,
    Mesh(Facts),
    Plaintext(Facts),
}

impl Admission {
    /// What policy of today says about the connection.
    pub(super) fn holds(&self, snapshot: &MeshSnapshot, workload: &Workload) -> bool {
        match self {
            Self::Outbound => true,
            Self::Mesh(facts) => policy::authorize(snapshot, workload, facts).allows(),
            Self::Plaintext(facts) => {
                policy::mutual_tls(snapshot, workload, facts.destination.port()) == MutualTls::Permissive
                    && policy::authorize(snapshot, workload, facts).allows()
            }
        }
    }
}

/// One open connection.
#[derive(Debug)]
pub struct Open {
    pub facts: ConnectionFacts,
    pub source: SocketAddr,
    pub destination: SocketAddr,
    /// The tunnel's authority, if there is a tunnel.
    pub hbone_target: Option<SocketAddr>,
    pub since: Instant,
    pub metrics: ConnectionMetrics,
    pub(super) admission: Admission,
    /// 0, or one more than the index in [`Closed::ALL`].
    closed: AtomicU8,
    task: futures::task::AtomicWaker,
}

impl Open {
    /// Ends the connection with a reset on both sides. Only the first reason counts.
    pub fn close(&self, reason: Closed) {
        let index = Closed::ALL.iter().position(|r| *r == reason).map_or(1, |i| i + 1);
        let index = u8::try_from(index).unwrap_or(1);
        let _ = self
            .closed
            .compare_exchange(0, index, Ordering::AcqRel, Ordering::Acquire);
        self.task.wake();
    }

    pub fn closed(&self) -> Option<Closed> {
        let index = usize::from(self.closed.load(Ordering::Acquire)).checked_sub(1)?;
        Closed::ALL.get(index).copied()
    }

    pub(super) fn poll_closed(&self, cx: &Context<'_>) -> Poll<()> {
        self.task.register(cx.waker());
        if self.closed.load(Ordering::Acquire) == 0 {
            Poll::Pending
        } else {
            Poll::Ready(())
        }
    }
}

/// The open connections of the node.
#[derive(Debug, Default)]
pub struct Connections {
    pods: Mutex<HashMap<WorkloadUid, Arc<PodConnections>>>,
}

impl Connections {
    /// Every open connection, in no order.
    pub fn list(&self) -> Vec<Arc<Open>> {
        let pods: Vec<_> = self.pods.lock().values().cloned().collect();
        pods.iter()
            .flat_map(|pod| pod.open.lock().values().cloned().collect::<Vec<_>>())
            .collect()
    }

    pub fn len(&self) -> usize {
        self.pods.lock().values().map(|pod| pod.open.lock().len()).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn of(&self, pod: &WorkloadUid, limit: usize) -> Arc<PodConnections> {
        let mut pods = self.pods.lock();
        pods.retain(|_, pod| Arc::strong_count(pod) > 1);
        let fresh = || {
            Arc::new(PodConnections {
                limit,
                ..PodConnections::default()
            })
        };
        Arc::clone(pods.entry(pod.clone()).or_insert_with(fresh))
    }
}

/// The open connections of one pod.
#[derive(Debug, Default)]
pub(super) struct PodConnections {
    open: Mutex<HashMap<u64, Arc<Open>>>,
    next: AtomicU64,
    /// Connections accepted and not yet ended, open or not.
    held: AtomicUsize,
    limit: usize,
    ended: tokio::sync::Notify,
}

/// Room for one connection, given back when dropped.
#[derive(Debug)]
pub(super) struct Room(Arc<PodConnections>);

impl Drop for Room {
    fn drop(&mut self) {
        if self.0.held.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.ended.notify_waiters();
        }
    }
}

/// A connection in the list, taken off it when dropped.
#[derive(Debug)]
pub(super) struct Listed {
    pod: Arc<PodConnections>,
    id: u64,
}

impl Drop for Listed {
    fn drop(&mut self) {
        let gone = self.pod.open.lock().remove(&self.id);
        drop(gone);
    }
}

impl PodConnections {
    /// `None` when the pod has as many connections as it may have.
    pub(super) fn room(self: &Arc<Self>) -> Option<Room> {
        let held = self.held.fetch_add(1, Ordering::AcqRel);
        let room = Room(Arc::clone(self));
        (held < self.limit).then_some(room)
    }

    pub(super) fn list(self: &Arc<Self>, new: New) -> (Arc<Open>, Listed) {
        let open = Arc::new(Open {
            facts: new.facts,
            source: new.source,
            destination: new.destination,
            hbone_target: new.hbone_target,
            since: new.since,
            metrics: new.metrics,
            admission: new.admission,
            closed: AtomicU8::new(0),
            task: futures::task::AtomicWaker::new(),
        });
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.open.lock().insert(id, Arc::clone(&open));
        (
            open,
            Listed {
                pod: Arc::clone(self),
                id,
            },
        )
    }

    pub(super) fn close_all(&self, reason: Closed) {
        let open: Vec<_> = self.open.lock().values().cloned().collect();
        open.iter().for_each(|open| open.close(reason));
    }

    /// Closes what policy of today does not allow.
    pub(super) fn recheck(&self, snapshot: &MeshSnapshot, workload: &Workload) {
        let open: Vec<_> = self.open.lock().values().cloned().collect();
        for open in open {
            if !open.admission.holds(snapshot, workload) {
                open.close(Closed::PolicyChange);
            }
        }
    }

    /// Resolves when there is no connection, open or about to be.
    pub(super) async fn empty(&self) {
        loop {
            let ended = self.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            if self.held.load(Ordering::Acquire) == 0 {
                return;
            }
            ended.await;
        }
    }
}

/// What a connection is listed with.
pub(super) struct New {
    pub(super) facts: ConnectionFacts,
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
    pub(super) hbone_target: Option<SocketAddr>,
    pub(super) since: Instant,
    pub(super) metrics: ConnectionMetrics,
    pub(super) admission: Admission,
}

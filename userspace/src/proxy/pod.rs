//! One captured pod: its listeners, its connections, its pool of tunnels, from capture to release.

use super::{
    ProxySettings,
    accept::accept,
    connections::{Admission, Closed, Connections, Listed, New, Open, PodConnections},
    end::End,
    inbound, outbound, plaintext,
};
use crate::{
    certs::CertStore,
    hbone::{Dial, Dialled, PeerKey, Pool, PoolError},
    mesh::{MeshSnapshot, SpiffeId, Workload, WorkloadUid, policy},
    net::{self, Namespace, PodListeners, PodPorts, Role},
    shutdown::Shutdown,
    telemetry::{AccessEntry, ConnectionFacts, HboneSide, Metrics, access},
};
use futures::{FutureExt as _, future::BoxFuture};
use std::{
    fmt, io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Weak},
    time::{Duration, Instant, SystemTime},
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
};
use tokio_util::sync::CancellationToken;

/// What all pods of the node share.
pub struct ProxyContext {
    pub snapshot: watch::Receiver<Arc<MeshSnapshot>>,
    pub certs: CertStore,
    pub metrics: Arc<Metrics>,
    pub connections: Connections,
    pub settings: ProxySettings,
}

/// What `capture` hands over of a pod.
#[derive(Debug)]
pub struct CapturedPodParts {
    pub workload: WorkloadUid,
    pub namespace: Namespace,
    pub listeners: PodListeners,
}

/// Why a captured pod cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum PodError {
    #[error("the snapshot does not know the pod {0}")]
    Unknown(WorkloadUid),
    #[error("a listener of the pod {pod} cannot be waited for")]
    Listener { pod: WorkloadUid, source: io::Error },
}

/// What the connections of one pod share.
pub(super) struct Pod {
    pub(super) context: Arc<ProxyContext>,
    uid: WorkloadUid,
    pub(super) namespace: Namespace,
    ports: PodPorts,
    pub(super) connections: Arc<PodConnections>,
    /// Connections of peers, which bring tunnels.
    callers: Arc<PodConnections>,
    pub(super) pool: Pool,
    pub(super) tasks: Shutdown,
    /// The pod as it was last seen: it may leave the snapshot before its connections end.
    last_seen: watch::Receiver<Arc<Workload>>,
    /// Accept no more.
    pub(super) stop: CancellationToken,
    /// Accept no more from peers.
    stop_hbone: CancellationToken,
}

/// Owns a pod's listeners. Dropped, it stops accepting; connections that are open go on until they end by themselves or
/// the process does.
#[must_use = "dropping it stops accepting"]
pub struct PodHandle {
    pub(super) pod: Arc<Pod>,
    /// As long as somebody accepts from them.
    listeners: Vec<(Role, Weak<TcpListener>)>,
}

impl fmt::Debug for PodHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("PodHandle").field(&self.pod.uid).finish()
    }
}

/// Serves a captured pod from now on.
///
/// # Errors
/// The snapshot does not know the pod, or its listeners cannot be registered with the runtime.
pub fn spawn_pod(
    context: &Arc<ProxyContext>,
    parts: CapturedPodParts,
    tasks: &Shutdown,
) -> Result<PodHandle, PodError> {
    let CapturedPodParts {
        workload: uid,
        namespace,
        listeners,
    } = parts;
    let known = context.snapshot.borrow().workloads.get(&uid).cloned();
    let workload = known.ok_or_else(|| PodError::Unknown(uid.clone()))?;
    let (seen, last_seen) = watch::channel(Arc::clone(&workload));
    let dial = PodDial {
        certs: context.certs.clone(),
        identity: workload.identity.clone(),
        namespace: namespace.clone(),
    };
    let pod = Arc::new(Pod {
        connections: context.connections.of(&uid, context.settings.connections_per_pod),
        callers: context.connections.of(
            &WorkloadUid(format!("{uid} (HBONE)").into()),
            context.settings.hbone_connections_per_pod,
        ),
        pool: Pool::new(dial, Arc::clone(&context.settings.hbone), tasks.clone()),
        context: Arc::clone(context),
        namespace,
        ports: listeners.ports,
        tasks: tasks.clone(),
        last_seen,
        stop: CancellationToken::new(),
        stop_hbone: CancellationToken::new(),
        uid,
    });
    let register = |sockets: Vec<std::net::TcpListener>| -> Result<Vec<Arc<TcpListener>>, PodError> {
        let registered: io::Result<Vec<_>> = sockets.into_iter().map(TcpListener::from_std).collect();
        let registered = registered.map_err(|source| PodError::Listener {
            pod: pod.uid.clone(),
            source,
        })?;
        Ok(registered.into_iter().map(Arc::new).collect())
    };
    let (outbound, plaintext, hbone) = (
        register(listeners.outbound)?,
        register(listeners.plaintext)?,
        register(listeners.hbone)?,
    );
    let listeners = [
        (Role::Outbound, &outbound),
        (Role::Plaintext, &plaintext),
        (Role::Hbone, &hbone),
    ];
    let listeners = listeners
        .into_iter()
        .flat_map(|(role, sockets)| sockets.iter().map(move |socket| (role, Arc::downgrade(socket))))
        .collect();
    for listener in outbound {
        pod.serve(listener, "outbound listener", &pod.stop, |pod, socket, from| {
            pod.spawn_bounded("outbound connection", socket, from, outbound::serve);
        });
    }
    for listener in plaintext {
        pod.serve(listener, "plaintext listener", &pod.stop, |pod, socket, from| {
            pod.spawn_bounded("plaintext connection", socket, from, plaintext::serve);
        });
    }
    for listener in hbone {
        pod.serve(listener, "HBONE listener", &pod.stop_hbone, |pod, socket, from| {
            let Some(room) = pod.callers.room() else {
                tracing::debug!(pod = %pod.uid, %from, "too many HBONE connections");
                return net::abort(socket);
            };
            let (own, cut) = (Arc::clone(pod), pod.tasks.cut());
            pod.tasks.spawn("HBONE connection", async move {
                let _room = room;
                tokio::select! {
                    () = inbound::serve(own, socket, from) => {}
                    () = cut => {}
                }
            });
        });
    }
    let (watching, cut) = (Arc::clone(&pod), tasks.cut());
    tasks.spawn("policy of a pod", async move {
        tokio::select! {
            () = watching.watch(seen) => {}
            () = cut => watching.connections.close_all(Closed::Cut),
        }
    });
    Ok(PodHandle { pod, listeners })
}

impl PodHandle {
    /// Stops accepting, gives open connections until `deadline` to end, then resets the rest. Peers who have not heard may
    /// open HBONE connections for `linger` yet.
    pub async fn release(self, deadline: Duration, linger: Duration) {
        self.pod.stop.cancel();
        let begun = Instant::now();
        tokio::time::sleep(linger).await;
        self.pod.stop_hbone.cancel();
        let deadline = deadline.saturating_sub(begun.elapsed());
        if tokio::time::timeout(deadline, self.pod.connections.empty())
            .await
            .is_err()
        {
            self.pod.connections.close_all(Closed::Released);
        }
        self.pod.pool.close();
    }

    /// Other descriptors of its listeners, for another daemon that accepts from them as well. What is no longer accepted
    /// from is missing.
    ///
    /// # Errors
    /// There are too many descriptors open.
    pub fn listeners(&self) -> io::Result<Vec<(Role, OwnedFd)>> {
        let open = self.listeners.iter();
        open.filter_map(|(role, listener)| Some((*role, listener.upgrade()?)))
            .map(|(role, listener)| Ok((role, listener.as_fd().try_clone_to_owned()?)))
            .collect()
    }

    /// The cookie of the pod's network namespace.
    pub fn namespace(&self) -> u64 {
        self.pod.namespace.cookie()
    }

    /// Stops accepting, for somebody else accepts now, and lets peers know that they had better connect anew. What is open
    /// goes on until it ends or the process does; so does what is being accepted just now, for which the pool stays open. It
    /// ends with the last of them.
    pub fn pass_on(self) {
        drop(self);
    }
}

impl Drop for PodHandle {
    fn drop(&mut self) {
        self.pod.stop.cancel();
        self.pod.stop_hbone.cancel();
    }
}

impl Pod {
    fn serve(
        self: &Arc<Self>,
        listener: Arc<TcpListener>,
        name: &'static str,
        stop: &CancellationToken,
        take: impl Fn(&Arc<Self>, TcpStream, SocketAddr) + Send + Sync + 'static,
    ) {
        let (pod, stop) = (Arc::clone(self), stop.clone());
        let draining = self.tasks.draining();
        self.tasks.spawn(name, async move {
            let stop = async {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = draining => {}
                }
            };
            accept(listener, stop, |socket, from| take(&pod, socket, canonical(from))).await;
        });
    }

    /// Runs one connection in a task of its own, if the pod may have one more.
    fn spawn_bounded<F>(
        self: &Arc<Self>,
        name: &'static str,
        socket: TcpStream,
        from: SocketAddr,
        serve: impl FnOnce(Arc<Self>, TcpStream, SocketAddr) -> F,
    ) where
        F: Future<Output = ()> + Send + 'static,
    {
        let Some(room) = self.connections.room() else {
            tracing::debug!(pod = %self.uid, %from, end = %End::Overloaded, "connection reset");
            return net::abort(socket);
        };
        let connection = serve(Arc::clone(self), socket, from);
        // No async block, which would hold the connection twice.
        self.tasks.spawn(name, connection.map(move |()| drop(room)));
    }

    /// Follows the snapshot: keeps the pod's own entry, and closes what policy no longer allows.
    async fn watch(&self, seen: watch::Sender<Arc<Workload>>) {
        let mut snapshots = self.context.snapshot.clone();
        let mut old = Arc::clone(&snapshots.borrow_and_update());
        loop {
            tokio::select! {
                changed = snapshots.changed() => if changed.is_err() { return },
                // Followed until the last connection is gone: its policy may still change.
                () = self.gone() => return,
            }
            let new = Arc::clone(&snapshots.borrow_and_update());
            if let Some(workload) = new.workloads.get(&self.uid) {
                let same = seen.borrow().labels == workload.labels;
                if !same || !Arc::ptr_eq(&seen.borrow(), workload) {
                    seen.send_replace(Arc::clone(workload));
                }
                if !same || !policy::unchanged(&old, &new, &workload.namespace) {
                    self.connections.recheck(&new, workload);
                }
            }
            old = new;
        }
    }

    async fn gone(&self) {
        tokio::select! {
            () = self.stop_hbone.cancelled() => {}
            () = self.tasks.draining() => {}
        }
        self.callers.empty().await;
        self.connections.empty().await;
    }

    pub(super) fn workload(&self) -> Arc<Workload> {
        Arc::clone(&self.last_seen.borrow())
    }

    pub(super) fn snapshot(&self) -> Arc<MeshSnapshot> {
        Arc::clone(&self.context.snapshot.borrow())
    }

    pub(super) fn is_own_port(&self, port: u16) -> bool {
        port == crate::mesh::route::HBONE_PORT
            || [self.ports.outbound, self.ports.plaintext, self.ports.hbone].contains(&port)
    }

    /// True for what only somebody who dials the daemon itself can reach: a steered connection has neither.
    pub(super) fn is_own_listener(&self, destination: SocketAddr) -> bool {
        let own = |ip: IpAddr| self.last_seen.borrow().addresses.contains(&ip);
        policy::is_loopback_like(destination.ip()) || (self.is_own_port(destination.port()) && own(destination.ip()))
    }

    /// Lists a connection that stands, counted as opened. If policy has changed since `decided_by` so that it is no longer
    /// allowed, it is closed already.
    pub(super) fn list(&self, decided_by: &MeshSnapshot, new: Standing, admission: Admission) -> (Arc<Open>, Listed) {
        let metrics = self.context.metrics.connection(&new.facts);
        let (open, listed) = self.connections.list(New {
            facts: new.facts,
            source: new.source,
            destination: new.destination,
            hbone_target: new.hbone_target,
            since: new.since,
            metrics,
            admission,
        });
        // Listed first, looked at second: a change in between is seen here, a later one by the watch.
        let now = self.snapshot();
        if now.version != decided_by.version && !open.admission.holds(&now, &self.workload()) {
            open.close(Closed::PolicyChange);
        }
        (open, listed)
    }

    /// The one line and the last count of a connection that was listed.
    pub(super) fn report(&self, open: &Open, end: &End) {
        open.metrics.closed(end.flags());
        access::log(&AccessEntry {
            facts: &open.facts,
            source: open.source,
            destination: open.destination,
            hbone_target: open.hbone_target,
            request_bytes: open.metrics.received_bytes(),
            response_bytes: open.metrics.sent_bytes(),
            duration: open.since.elapsed(),
            error: (!end.is_well()).then_some(end),
        });
    }

    /// The same for one that never stood.
    pub(super) fn report_refused(&self, new: &Standing, end: &End) {
        self.context.metrics.connection(&new.facts).closed(end.flags());
        access::log(&AccessEntry {
            facts: &new.facts,
            source: new.source,
            destination: new.destination,
            hbone_target: new.hbone_target,
            request_bytes: 0,
            response_bytes: 0,
            duration: new.since.elapsed(),
            error: Some(end),
        });
    }

    pub(super) fn identity(&self) -> SpiffeId {
        self.last_seen.borrow().identity.clone()
    }

    pub(super) fn tunnel_gauge(&self, side: HboneSide) -> crate::telemetry::gauges::Open {
        self.context.metrics.gauges.hbone_tunnel(side)
    }
}

/// A connection as far as it is known.
pub(super) struct Standing {
    pub(super) facts: ConnectionFacts,
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
    pub(super) hbone_target: Option<SocketAddr>,
    pub(super) since: Instant,
}

/// Reaches peers from the pod's namespace, with the pod's certificate.
struct PodDial {
    certs: CertStore,
    identity: SpiffeId,
    namespace: Namespace,
}

impl Dial for PodDial {
    fn dial<'a>(&'a self, key: &'a PeerKey, deadline: Duration) -> BoxFuture<'a, Result<Dialled, PoolError>> {
        Box::pin(async move {
            let trust = self.certs.watch_trust();
            let svid = self
                .certs
                .get(&self.identity)
                .await
                .map_err(|e| PoolError::Certificate(Arc::new(e)))?;
            let tcp = net::dial_mesh(&self.namespace, key.local, key.next_hop, deadline).await;
            let tcp = tcp.map_err(|e| PoolError::Connect {
                next_hop: key.next_hop,
                source: Arc::new(e),
            })?;
            let left = svid.not_after().duration_since(SystemTime::now()).unwrap_or_default();
            Ok(Dialled {
                tcp,
                config: svid.client_config(&key.peer),
                trust,
                // The server ends the connection with our certificate; tunnels get half of the time to come to their end.
                retire_at: Instant::now().checked_add(left / 2),
            })
        })
    }
}

/// Addresses are compared and logged in one form: never v4-mapped, no scope.
pub(super) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

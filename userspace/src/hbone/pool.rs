//! The HBONE connections of one pod, shared by its tunnels. Keyed by everything that a peer can tell apart: the pod and
//! its identity (one pool is one pod), its local address, the next hop and whom that must prove to be.
//!
//! Tunnels of one connection share one TCP stream, so a small request waits behind whatever a bulk tunnel has put on its
//! way. A connection that carries bulk therefore gets no new tunnel while another can be had.

use super::{
    client::{self, ConnectionEnd},
    handshake::HandshakeError,
    headers,
    settings::HboneSettings,
    stream::{Link, Tunnel, TunnelEnd},
};
use crate::{certs::TrustWatch, mesh::SpiffeId, net::DialError, shutdown::Shutdown};
use bytes::Bytes;
use futures::future::BoxFuture;
use h2::client::SendRequest;
use http::HeaderValue;
use parking_lot::Mutex;
use rustls::ClientConfig;
use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{net::TcpStream, sync::Notify, time::sleep};
use tokio_util::sync::CancellationToken;

/// How long a connection waits for another tunnel when the daemon drains: what was accepted before may still want one.
const LEAVING: Duration = Duration::from_secs(1);

/// What distinguishes the connections of one pod.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PeerKey {
    /// The pod's address that the connection comes from.
    pub local: IpAddr,
    pub next_hop: SocketAddr,
    /// Whom the next hop must prove to be.
    pub peer: SpiffeId,
}

/// Why there is no connection to a peer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PoolError {
    #[error("cannot connect to {next_hop}")]
    Connect {
        next_hop: SocketAddr,
        #[source]
        source: Arc<DialError>,
    },
    #[error("there is no certificate")]
    Certificate(#[source] Arc<dyn std::error::Error + Send + Sync>),
    #[error("tls error: {0}")]
    Handshake(#[source] Arc<HandshakeError>),
    #[error("the connection ended before the tunnel began: {0}")]
    Ended(ConnectionEnd),
    #[error("the authority cannot be written")]
    Authority,
    #[error("the pod is going away")]
    GoingAway,
}

/// A connected socket and what TLS needs on it.
pub struct Dialled {
    pub tcp: TcpStream,
    pub config: Arc<ClientConfig>,
    /// Taken before `config` was made.
    pub trust: TrustWatch,
    /// The connection takes no new tunnels from then on: its certificate ends.
    pub retire_at: Option<Instant>,
}

/// How the pool reaches a peer: the pod's namespace and certificate stand behind it.
pub trait Dial: Send + Sync + 'static {
    fn dial<'a>(&'a self, key: &'a PeerKey, deadline: Duration) -> BoxFuture<'a, Result<Dialled, PoolError>>;
}

/// What a CONNECT says.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Where the peer should connect.
    pub authority: SocketAddr,
    /// The client's address, for `forwarded`.
    pub client: Option<SocketAddr>,
    pub baggage: Option<&'a HeaderValue>,
}

/// The pool of one pod. Clones share it. Once it is closed, or the daemon drains, a connection ends with its last tunnel.
#[derive(Clone)]
pub struct Pool(Arc<Shared>);

struct Shared {
    dial: Box<dyn Dial>,
    settings: Arc<HboneSettings>,
    tasks: Shutdown,
    peers: Mutex<HashMap<PeerKey, Peer>>,
    closed: CancellationToken,
}

#[derive(Default)]
struct Peer {
    connections: Vec<Arc<Pooled>>,
    dialling: Option<Arc<Dialling>>,
}

/// One attempt to dial, awaited by everybody who needs it.
#[derive(Default)]
struct Dialling {
    outcome: OnceLock<Result<(), PoolError>>,
    done: Notify,
}

struct Pooled {
    sender: SendRequest<Bytes>,
    tunnels: AtomicUsize,
    link: Arc<Link>,
    born: Instant,
    /// When the last tunnel ended, in milliseconds after `born`.
    idle_since: Mutex<Instant>,
    retire_at: Option<Instant>,
    /// Told when the last tunnel ends.
    unused: Notify,
    end: OnceLock<ConnectionEnd>,
}

/// Counts as one tunnel of its connection for as long as it lives.
pub(super) struct Lease(Arc<Pooled>);

impl Drop for Lease {
    fn drop(&mut self) {
        if self.0.tunnels.load(Ordering::Relaxed) == 1 {
            *self.0.idle_since.lock() = Instant::now();
        }
        if self.0.tunnels.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.unused.notify_one();
        }
    }
}

impl Pool {
    pub fn new(dial: impl Dial, settings: Arc<HboneSettings>, tasks: Shutdown) -> Self {
        Self(Arc::new(Shared {
            dial: Box::new(dial),
            settings,
            tasks,
            peers: Mutex::default(),
            closed: CancellationToken::new(),
        }))
    }

    /// Opens a tunnel. It may be written to at once; the peer's answer comes with the first that is received.
    ///
    /// # Errors
    /// No connection to the peer could be had. Nothing has been sent then.
    pub async fn open(&self, key: &PeerKey, request: Request<'_>) -> Result<Tunnel, PoolError> {
        let request = headers::connect(request.authority, request.client, request.baggage);
        let mut request = Some(request.ok_or(PoolError::Authority)?);
        // A connection may end between being chosen and being used; each round then finds one fewer.
        for _ in 0..=self.0.settings.connections_per_peer {
            let lease = self.lease(key).await?;
            let Some(attempt) = request.take() else { break };
            request = Some(attempt.clone());
            let mut sender = lease.0.sender.clone();
            match sender.send_request(attempt, false) {
                Ok((answer, send)) => {
                    let link = Arc::clone(&lease.0.link);
                    return Ok(Tunnel::opened(send, answer, link, lease));
                }
                Err(error) => {
                    let end = ConnectionEnd::Broken(error.to_string());
                    self.0.forget(key, &lease.0, end);
                }
            }
        }
        Err(PoolError::Ended(ConnectionEnd::Closed))
    }

    /// No more connections are dialled, and those without a tunnel end.
    pub fn close(&self) {
        self.0.closed.cancel();
        self.0.peers.lock().clear();
    }

    /// Connections and tunnels that are open now.
    pub fn census(&self) -> (usize, usize) {
        let peers = self.0.peers.lock();
        let connections = peers.values().flat_map(|peer| &peer.connections);
        connections.fold((0, 0), |(c, t), pooled| {
            (c + 1, t + pooled.tunnels.load(Ordering::Relaxed))
        })
    }

    async fn lease(&self, key: &PeerKey) -> Result<Lease, PoolError> {
        loop {
            let dialling = {
                let mut peers = self.0.peers.lock();
                if self.0.closed.is_cancelled() {
                    return Err(PoolError::GoingAway);
                }
                let peer = match peers.get_mut(key) {
                    Some(peer) => peer,
                    None => peers.entry(key.clone()).or_default(),
                };
                match peer.choose(&self.0.settings) {
                    Choice::Take(pooled) => return Ok(Lease::of(pooled)),
                    Choice::Dial => self.0.dialling(key, peer),
                }
            };
            let done = dialling.done.notified();
            tokio::pin!(done);
            // Registered before the outcome is looked at, so that it cannot slip through between.
            done.as_mut().enable();
            if dialling.outcome.get().is_none() {
                done.await;
            }
            match dialling.outcome.get() {
                Some(Ok(())) => {}
                // Another connection of the peer, though it carries bulk, is better than none.
                Some(Err(error)) => return self.0.any(key).ok_or_else(|| error.clone()),
                None => return Err(PoolError::GoingAway),
            }
        }
    }
}

impl Lease {
    fn of(pooled: &Arc<Pooled>) -> Self {
        pooled.tunnels.fetch_add(1, Ordering::AcqRel);
        Self(Arc::clone(pooled))
    }
}

enum Choice<'a> {
    Take(&'a Arc<Pooled>),
    Dial,
}

impl Peer {
    fn choose(&mut self, settings: &HboneSettings) -> Choice<'_> {
        let now = Instant::now();
        // A connection past its certificate serves its tunnels to their end, but is no longer found here.
        self.connections
            .retain(|c| c.end.get().is_none() && c.retire_at.is_none_or(|at| now < at));
        let room = |c: &&Arc<Pooled>| {
            let allowed = c.sender.current_max_send_streams().min(settings.tunnels_per_connection);
            c.tunnels.load(Ordering::Relaxed) < allowed
        };
        let load = |c: &&Arc<Pooled>| c.tunnels.load(Ordering::Relaxed);
        let quiet = self
            .connections
            .iter()
            .filter(room)
            .filter(|c| !c.link.meter.is_bulk())
            .min_by_key(load);
        let roomy = self.connections.iter().filter(room).min_by_key(load);
        let count = self.connections.len();
        let full = count >= settings.connections_per_peer;
        match (quiet, roomy) {
            (Some(c), _) if full || count >= settings.spread || load(&c) < settings.tunnels_before_spreading => {
                Choice::Take(c)
            }
            (Some(_), _) => Choice::Dial,
            // Beside bulk a tunnel does well; without room it does not open at all.
            (None, Some(c)) if full || count >= settings.connections_beside_bulk => Choice::Take(c),
            (None, _) if !full => Choice::Dial,
            (None, _) => match self.connections.iter().min_by_key(load) {
                Some(c) => Choice::Take(c),
                None => Choice::Dial,
            },
        }
    }
}

impl Shared {
    /// The attempt that is under way, or a new one.
    fn dialling(self: &Arc<Self>, key: &PeerKey, peer: &mut Peer) -> Arc<Dialling> {
        if let Some(dialling) = &peer.dialling {
            return Arc::clone(dialling);
        }
        let dialling = Arc::new(Dialling::default());
        peer.dialling = Some(Arc::clone(&dialling));
        // A task of its own: whoever asked first may go away, the others still wait.
        let (shared, key, attempt) = (Arc::clone(self), key.clone(), Arc::clone(&dialling));
        let cut = self.tasks.cut();
        self.tasks.spawn("hbone connection", async move {
            tokio::select! {
                () = Arc::clone(&shared).connect(&key, &attempt) => {}
                () = cut => {}
            }
            shared.conclude(&key, &attempt, Err(PoolError::GoingAway));
        });
        dialling
    }

    async fn connect(self: Arc<Self>, key: &PeerKey, attempt: &Arc<Dialling>) {
        let opened = match self.dial.dial(key, self.settings.connect_deadline).await {
            Ok(Dialled {
                tcp,
                config,
                trust,
                retire_at,
            }) => client::open(tcp, key.next_hop.ip(), config, trust, &self.settings)
                .await
                .map(|opened| (opened, retire_at))
                .map_err(|error| PoolError::Handshake(Arc::new(error))),
            Err(error) => Err(error),
        };
        let (opened, retire_at) = match opened {
            Ok(opened) => opened,
            Err(error) => return self.conclude(key, attempt, Err(error)),
        };
        let now = Instant::now();
        // The peer's certificate ends the connection, so tunnels that begin here have as long again to come to their end.
        let peer_retires = now.checked_add(opened.peer_left / 2);
        let pooled = Arc::new(Pooled {
            sender: opened.sender,
            tunnels: AtomicUsize::new(0),
            link: Arc::clone(&opened.link),
            born: now,
            idle_since: Mutex::new(now),
            retire_at: retire_at.into_iter().chain(peer_retires).min(),
            unused: Notify::new(),
            end: OnceLock::new(),
        });
        if !self.closed.is_cancelled() {
            self.peers
                .lock()
                .entry(key.clone())
                .or_default()
                .connections
                .push(Arc::clone(&pooled));
        }
        self.conclude(key, attempt, Ok(()));
        let end = tokio::select! {
            end = opened.driver.run(|| self.retire_if_unused(key, &pooled)) => end,
            () = self.until_to_end(key, &pooled) => ConnectionEnd::Idle,
        };
        tracing::debug!(next_hop = %key.next_hop, peer = %key.peer, %end, age = ?pooled.born.elapsed(), "HBONE connection ended");
        self.forget(key, &pooled, end);
    }

    /// Tells everybody who waits how the attempt went. Only the first outcome counts.
    fn conclude(&self, key: &PeerKey, attempt: &Arc<Dialling>, outcome: Result<(), PoolError>) {
        if attempt.outcome.set(outcome).is_err() {
            return;
        }
        {
            let mut peers = self.peers.lock();
            if let Some(peer) = peers.get_mut(key) {
                if peer.dialling.as_ref().is_some_and(|d| Arc::ptr_eq(d, attempt)) {
                    peer.dialling = None;
                }
                if peer.connections.is_empty() && peer.dialling.is_none() {
                    peers.remove(key);
                }
            }
        }
        attempt.done.notify_waiters();
    }

    /// Returns when new connections are of no use any more and this one's last tunnel has ended.
    async fn until_to_end(&self, key: &PeerKey, pooled: &Arc<Pooled>) {
        tokio::select! {
            () = self.closed.cancelled() => {}
            () = self.tasks.draining() => {}
        }
        while !self.retire_if_unused(key, pooled) {
            tokio::select! {
                () = pooled.unused.notified() => {}
                () = sleep(LEAVING) => {}
            }
        }
    }

    /// True, and the connection is no longer to be had, if it has had no tunnel for long enough.
    fn retire_if_unused(&self, key: &PeerKey, pooled: &Arc<Pooled>) -> bool {
        let mut peers = self.peers.lock();
        let listed = peers
            .get(key)
            .is_some_and(|p| p.connections.iter().any(|c| Arc::ptr_eq(c, pooled)));
        // Leases are given out under this lock alone, and only to listed connections.
        if pooled.tunnels.load(Ordering::Acquire) > 0 {
            return false;
        }
        let patience = match self.tasks.is_draining() {
            true => LEAVING,
            false => self.settings.idle,
        };
        if listed && pooled.idle_since.lock().elapsed() < patience {
            return false;
        }
        remove(&mut peers, key, pooled);
        true
    }

    fn forget(&self, key: &PeerKey, pooled: &Arc<Pooled>, end: ConnectionEnd) {
        // The first reason is the true one.
        let _ = pooled.end.set(end);
        remove(&mut self.peers.lock(), key, pooled);
    }

    fn any(&self, key: &PeerKey) -> Option<Lease> {
        let peers = self.peers.lock();
        let room = |c: &&Arc<Pooled>| {
            c.end.get().is_none() && c.tunnels.load(Ordering::Relaxed) < c.sender.current_max_send_streams()
        };
        let load = |c: &&Arc<Pooled>| c.tunnels.load(Ordering::Relaxed);
        peers
            .get(key)?
            .connections
            .iter()
            .filter(room)
            .min_by_key(load)
            .map(Lease::of)
    }
}

fn remove(peers: &mut HashMap<PeerKey, Peer>, key: &PeerKey, pooled: &Arc<Pooled>) {
    if let Some(peer) = peers.get_mut(key) {
        peer.connections.retain(|c| !Arc::ptr_eq(c, pooled));
        if peer.connections.is_empty() && peer.dialling.is_none() {
            peers.remove(key);
        }
    }
}

impl From<TunnelEnd> for PoolError {
    fn from(end: TunnelEnd) -> Self {
        Self::Ended(ConnectionEnd::Broken(end.to_string()))
    }
}

//! The connections of the CA's service: TLS with a certificate from the CA itself, HTTP/2, and a bound on everything an
//! unknown client could hold. Not here: what is answered (`signing`).

use super::{
    limit::Buckets,
    root::Issuing,
    signing::{Asker, SigningService},
};
use crate::{
    certs::{
        Authority, authority::SignError, proto::istio_certificate_service_server::IstioCertificateServiceServer, tls,
    },
    shutdown::Shutdown,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use parking_lot::Mutex;
use rcgen::KeyPair;
use rustls::{ServerConfig, server::NoServerSessionStorage, version::TLS13};
use rustls_pki_types::{PrivateKeyDer, UnixTime};
use std::{
    collections::HashMap,
    convert::Infallible,
    future::Future,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_rustls::TlsAcceptor;
use tower::Service;
use tracing::{debug, warn};

const MAX_CONNECTIONS: usize = 2048;
/// Connections of one address, so that nobody takes them all. A daemon shares one, or has a few while they follow each other;
/// who opens one per certificate has twice the 16 that a node asks for at a time.
const MAX_PER_ADDRESS: usize = 32;
/// New connections of one address, each a handshake that costs us more than the client's first packet.
const DIALS_PER_SECOND: u32 = 50;
const DIALS_BURST: u32 = 200;
const MOST_ADDRESSES: usize = 65_536;
/// What a node asks for at a time (`certs::keeper`) has room on one connection. What is refused is held on its own stream,
/// so a flood waits for itself.
const MAX_STREAMS: u32 = 16;
const MAX_HEADER_BYTES: u32 = 16 << 10;
const MAX_MESSAGE_BYTES: usize = 64 << 10;
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);
/// A connection without a request for this long is closed.
const IDLE: Duration = Duration::from_secs(60);
const KEEPALIVE: Duration = Duration::from_secs(20);
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
const SERVING_LIFETIME: Duration = Duration::from_secs(86_400);
/// Addresses of this machine that clients dial; beyond it the cache starts anew.
const MAX_SERVING: usize = 64;

/// The certificates the service shows. Clients that dial an address expect it in the certificate, so there is one per
/// dialled address, beside the names and addresses that were given.
pub(super) struct Serving {
    authority: Issuing,
    key: KeyPair,
    names: Vec<String>,
    addresses: Vec<IpAddr>,
    made: Mutex<Made>,
}

/// What one CA has made, until another takes its place.
#[derive(Default)]
struct Made {
    by: Option<Arc<Authority>>,
    configs: HashMap<IpAddr, (Arc<ServerConfig>, UnixTime)>,
}

#[derive(Debug, thiserror::Error)]
pub enum ServingError {
    #[error("there is no certificate authority yet")]
    NoAuthority,
    #[error("no key for the controller's own certificate")]
    Key(#[source] rcgen::Error),
    #[error("no certificate for the controller itself")]
    Sign(#[source] SignError),
    #[error("TLS cannot be configured")]
    Tls(#[source] rustls::Error),
}

impl Serving {
    pub(super) fn new(authority: Issuing, names: Vec<String>, addresses: Vec<IpAddr>) -> Result<Self, ServingError> {
        let key = KeyPair::generate().map_err(ServingError::Key)?;
        Ok(Self {
            authority,
            key,
            names,
            addresses,
            made: Mutex::default(),
        })
    }

    /// For a connection that was dialled to `address`; made anew after half of its certificate's life.
    pub(super) fn config(&self, address: IpAddr, now: UnixTime) -> Result<Arc<ServerConfig>, ServingError> {
        let address = address.to_canonical();
        let authority = self.authority.borrow().clone().ok_or(ServingError::NoAuthority)?;
        let mut made = self.made.lock();
        if !made.by.as_ref().is_some_and(|by| Arc::ptr_eq(by, &authority)) {
            *made = Made {
                by: Some(Arc::clone(&authority)),
                configs: HashMap::new(),
            };
        }
        if let Some((config, renewal)) = made.configs.get(&address)
            && now < *renewal
        {
            return Ok(config.clone());
        }
        if made.configs.len() >= MAX_SERVING {
            made.configs.clear();
        }
        let mut addresses = self.addresses.clone();
        if !addresses.contains(&address) {
            addresses.push(address);
        }
        let signed = authority
            .sign_server(&self.key, &self.names, &addresses, SERVING_LIFETIME, now)
            .map_err(ServingError::Sign)?;
        let half = signed.not_after.as_secs().saturating_sub(now.as_secs()) / 2;
        let key = PrivateKeyDer::Pkcs8(self.key.serialize_der().into());
        let mut config = ServerConfig::builder_with_provider(tls::provider())
            .with_protocol_versions(&[&TLS13])
            .map_err(ServingError::Tls)?
            .with_no_client_auth()
            .with_single_cert(signed.chain, key)
            .map_err(ServingError::Tls)?;
        config.alpn_protocols = vec![tls::ALPN.to_vec()];
        config.send_tls13_tickets = 0;
        config.session_storage = Arc::new(NoServerSessionStorage {});
        let config = Arc::new(config);
        let renewal = UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs() + half));
        made.configs.insert(address, (config.clone(), renewal));
        Ok(config)
    }
}

/// How many connections each address has and how fast it dials. Shared by the listener and the connections.
pub(super) struct Door {
    open: Mutex<HashMap<IpAddr, usize>>,
    dials: Mutex<Buckets<IpAddr>>,
}

/// One connection's place, given back when dropped.
struct Entered {
    door: Arc<Door>,
    address: IpAddr,
}

impl Door {
    pub(super) fn new() -> Arc<Self> {
        Arc::new(Self {
            open: Mutex::default(),
            dials: Mutex::new(Buckets::new(DIALS_PER_SECOND, DIALS_BURST, MOST_ADDRESSES)),
        })
    }

    /// `None` for an address that has, or dials, too many connections.
    fn enter(self: &Arc<Self>, address: IpAddr, now: std::time::Instant) -> Option<Entered> {
        let mut open = self.open.lock();
        if open.get(&address).is_some_and(|count| *count >= MAX_PER_ADDRESS) || !self.dials.lock().take(address, now) {
            return None;
        }
        *open.entry(address).or_default() += 1;
        Some(Entered {
            door: Arc::clone(self),
            address,
        })
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut open = self.door.open.lock();
        if let Some(count) = open.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                open.remove(&self.address);
            }
        }
    }
}

/// Accepts until the drain begins.
pub(super) async fn accept(listener: TcpListener, serving: Arc<Serving>, service: SigningService, shutdown: Shutdown) {
    let service = IstioCertificateServiceServer::new(service).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let door = Door::new();
    let mut pause = FIRST_PAUSE;
    let mut draining = std::pin::pin!(shutdown.draining());
    loop {
        let next = async {
            // A closed semaphore is impossible: nobody closes it.
            let permit = room.clone().acquire_owned().await.ok()?;
            Some((permit, listener.accept().await))
        };
        let (permit, accepted) = tokio::select! {
            () = &mut draining => return,
            next = next => match next {
                Some(next) => next,
                None => return,
            },
        };
        match accepted {
            Ok((stream, peer)) => {
                pause = FIRST_PAUSE;
                let address = peer.ip().to_canonical();
                let Some(entered) = door.enter(address, std::time::Instant::now()) else {
                    debug!(%peer, "connection closed: too many of its address");
                    continue;
                };
                let connection = Connection {
                    entered,
                    serving: serving.clone(),
                    service: service.clone(),
                    peer,
                    permit,
                };
                shutdown.spawn("controller connection", connection.run(stream, shutdown.clone()));
            }
            Err(error) => {
                warn!(%error, "cannot accept a connection");
                sleep(pause).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
    }
}

struct Connection {
    serving: Arc<Serving>,
    service: IstioCertificateServiceServer<SigningService>,
    peer: SocketAddr,
    permit: OwnedSemaphorePermit,
    entered: Entered,
}

impl Connection {
    async fn run(self, stream: TcpStream, shutdown: Shutdown) {
        let peer = self.peer;
        tokio::select! {
            result = self.serve(stream, &shutdown) => if let Err(error) = result {
                debug!(%peer, error = &*error, "connection ended");
            },
            () = shutdown.cut() => {}
        }
    }

    async fn serve(
        self,
        stream: TcpStream,
        shutdown: &Shutdown,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        stream.set_nodelay(true)?;
        let config = self
            .serving
            .config(stream.local_addr()?.ip(), UnixTime::now())
            .inspect_err(|error| debug!(%error, "cannot serve a connection"))?;
        let stream = timeout(HANDSHAKE_DEADLINE, TlsAcceptor::from(config).accept(stream)).await??;
        let last_request = Arc::new(Mutex::new(Instant::now()));
        let (service, touched) = (self.service.clone(), last_request.clone());
        let asker = Asker(self.entered.address);
        let answer = hyper::service::service_fn(move |mut request: http::Request<_>| {
            *touched.lock() = Instant::now();
            request.extensions_mut().insert(asker);
            let answer = service.clone().call(request);
            async move {
                Ok::<_, Infallible>(match timeout(REQUEST_DEADLINE, answer).await {
                    Ok(Ok(answer)) => answer,
                    Ok(Err(never)) => match never {},
                    Err(_) => tonic::Status::deadline_exceeded("the request took too long").into_http(),
                })
            }
        });
        let connection = hyper::server::conn::http2::Builder::new(Owned(shutdown.clone()))
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_STREAMS)
            .max_header_list_size(MAX_HEADER_BYTES)
            .keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .serve_connection(TokioIo::new(stream), answer);
        let mut connection = std::pin::pin!(connection);
        let mut draining = std::pin::pin!(shutdown.draining());
        let mut ending = false;
        loop {
            let idle = *last_request.lock() + IDLE;
            tokio::select! {
                result = &mut connection => {
                    drop(self.permit);
                    return Ok(result?);
                }
                () = &mut draining, if !ending => {
                    ending = true;
                    connection.as_mut().graceful_shutdown();
                }
                () = sleep_until(idle) => if idle == *last_request.lock() + IDLE {
                    return Ok(());
                }
            }
        }
    }
}

/// hyper spawns one task per request; they belong to the process as every other.
#[derive(Clone)]
struct Owned(Shutdown);

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for Owned {
    fn execute(&self, task: F) {
        self.0.spawn("controller request", task);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_cannot_take_the_place_of_another() {
        let door = Door::new();
        let (greedy, other): (IpAddr, IpAddr) = ("10.0.0.1".parse().unwrap(), "10.0.0.2".parse().unwrap());
        let now = std::time::Instant::now();
        let mut held: Vec<_> = (0..1000).filter_map(|_| door.enter(greedy, now)).collect();
        assert_eq!(held.len(), MAX_PER_ADDRESS);
        assert!(door.enter(other, now).is_some());
        held.clear();
        let again = (0..1000).filter(|_| door.enter(greedy, now).is_some()).count();
        assert!(
            (1..=DIALS_BURST as usize).contains(&again),
            "{again} dials at one moment"
        );
        assert!(door.enter(greedy, now + Duration::from_secs(1)).is_some());
        assert!(door.open.lock().is_empty(), "places are given back");
    }
}

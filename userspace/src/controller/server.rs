//! The connections of the CA's service: TLS with a certificate from the CA itself, HTTP/2, and a bound on everything an
//! unknown client could hold. Not here: what is answered (`signing`).

use super::signing::SigningService;
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

const MAX_CONNECTIONS: usize = 512;
const MAX_STREAMS: u32 = 32;
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
    authority: Arc<Authority>,
    key: KeyPair,
    names: Vec<String>,
    addresses: Vec<IpAddr>,
    made: Mutex<HashMap<IpAddr, (Arc<ServerConfig>, UnixTime)>>,
}

#[derive(Debug, thiserror::Error)]
pub enum ServingError {
    #[error("no key for the controller's own certificate")]
    Key(#[source] rcgen::Error),
    #[error("no certificate for the controller itself")]
    Sign(#[source] SignError),
    #[error("TLS cannot be configured")]
    Tls(#[source] rustls::Error),
}

impl Serving {
    pub(super) fn new(
        authority: Arc<Authority>,
        names: Vec<String>,
        addresses: Vec<IpAddr>,
    ) -> Result<Self, ServingError> {
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
        let mut made = self.made.lock();
        if let Some((config, renewal)) = made.get(&address)
            && now < *renewal
        {
            return Ok(config.clone());
        }
        if made.len() >= MAX_SERVING {
            made.clear();
        }
        let mut addresses = self.addresses.clone();
        if !addresses.contains(&address) {
            addresses.push(address);
        }
        let signed = self
            .authority
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
        made.insert(address, (config.clone(), renewal));
        Ok(config)
    }
}

/// Accepts until the drain begins.
pub(super) async fn accept(listener: TcpListener, serving: Arc<Serving>, service: SigningService, shutdown: Shutdown) {
    let service = IstioCertificateServiceServer::new(service).max_decoding_message_size(MAX_MESSAGE_BYTES);
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
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
                let connection = Connection {
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
            .inspect_err(|error| warn!(%error, "cannot serve a connection"))?;
        let stream = timeout(HANDSHAKE_DEADLINE, TlsAcceptor::from(config).accept(stream)).await??;
        let last_request = Arc::new(Mutex::new(Instant::now()));
        let (service, touched) = (self.service.clone(), last_request.clone());
        let answer = hyper::service::service_fn(move |request| {
            *touched.lock() = Instant::now();
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

//! The connection to the CA that calls share when they come close together: a handshake costs both sides more than the
//! certificate does. Dialled once for all who wait for it, offered for a few seconds, closed when the last call over it
//! has ended. Not here: what is asked, and when it is asked again (`issuer`).

use super::{names, tls};
use futures::{
    FutureExt,
    future::{BoxFuture, Shared},
};
use hyper::client::conn::http2::{self, SendRequest};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rustls::{ClientConfig, RootCertStore, client::Resumption, client::WebPkiServerVerifier, version::TLS13};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use std::{
    fmt,
    future::{Future, poll_fn},
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{
    net::TcpStream,
    sync::oneshot,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::body::Body;

/// For so long after it was opened a channel is offered to further calls. Short, so that calls spread over all replicas
/// of the CA, and one that went away silently does not hurt for longer.
const OFFERED: Duration = Duration::from_secs(5);
/// The calls that are then under way have so long to end.
pub(super) const LINGER: Duration = Duration::from_secs(10);
/// Resolving the CA's name may take this long: a search list of dead ends included.
const RESOLVE_DEADLINE: Duration = Duration::from_secs(5);
/// One address of the CA may take this long to answer a connect.
const CONNECT_DEADLINE: Duration = Duration::from_secs(3);
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);
/// Calls that begin before the CA has said how many it takes at once: as many as Warren's own. It resets the others.
const FIRST_STREAMS: usize = 16;

/// Whom to dial.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) host: String,
    pub(super) port: u16,
    /// The name its certificate must bear.
    pub(super) name: ServerName<'static>,
    /// Where the roots were read, for errors alone.
    pub(super) root: PathBuf,
}

/// Why there is no connection to the CA.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    #[error("the CA's root file {} holds no usable certificate", path.display())]
    RootForm { path: PathBuf },
    #[error("the TLS client cannot be configured")]
    Configure(#[source] rustls::Error),
    #[error("cannot resolve {host}")]
    Resolve { host: String, source: io::Error },
    #[error("cannot connect to the CA at {address}")]
    Connect { address: SocketAddr, source: io::Error },
    #[error("the TLS handshake with the CA at {address} failed")]
    Handshake { address: SocketAddr, source: io::Error },
    #[error("HTTP/2 with the CA failed")]
    Http2(#[source] hyper::Error),
    #[error("the attempt to connect to the CA ended unexpectedly")]
    Panicked,
}

type Outcome = Result<SendRequest<Body>, Arc<DialError>>;
type Connection = http2::Connection<TokioIo<TlsStream<TcpStream>>, Body, StreamTasks>;

/// What the next call may join: a channel, or the attempt to open it.
struct Offer {
    number: u64,
    /// The root file under which it was dialled.
    root: Vec<u8>,
    opening: Shared<BoxFuture<'static, Outcome>>,
}

/// The channels to one server; all of them end with this.
pub(super) struct Channels {
    server: Arc<Server>,
    offered: Duration,
    dialled: AtomicU64,
    offer: Arc<Mutex<Option<Offer>>>,
    tasks: Mutex<JoinSet<()>>,
}

/// An open channel, held for one call.
pub(super) struct Channel {
    number: u64,
    pub(super) sender: SendRequest<Body>,
    /// Another call had it opened: the server may have closed it since.
    pub(super) found: bool,
}

impl fmt::Debug for Channels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Channels")
            .field("server", &self.server)
            .finish_non_exhaustive()
    }
}

impl Channels {
    pub(super) fn new(server: Server) -> Self {
        Self {
            server: Arc::new(server),
            offered: OFFERED,
            dialled: AtomicU64::new(0),
            offer: Arc::default(),
            tasks: Mutex::default(),
        }
    }

    /// The channel that is on offer under these roots (PEM), or a new one. Whoever comes while it is being opened waits
    /// for that attempt and shares how it ends.
    ///
    /// # Errors
    /// The attempt failed. It is not remembered: the next call dials.
    pub(super) async fn get(&self, root: &[u8]) -> Result<Channel, Arc<DialError>> {
        let (number, opening, found) = {
            let mut offer = self.offer.lock();
            let (offer, found) = match offer.take_if(|offer| offer.root == root) {
                Some(known) => (offer.insert(known), true),
                None => (offer.insert(self.open(root)), false),
            };
            (offer.number, offer.opening.clone(), found)
        };
        let sender = opening.await?;
        Ok(Channel { number, sender, found })
    }

    /// Offers this channel to no further call. Those that have it go on.
    pub(super) fn withdraw(&self, channel: &Channel) {
        withdraw(&self.offer, channel.number);
    }

    fn open(&self, root: &[u8]) -> Offer {
        let (tell, told) = oneshot::channel();
        let number = self.dialled.fetch_add(1, Ordering::Relaxed);
        let life = Life {
            number,
            root: root.to_vec(),
            server: Arc::clone(&self.server),
            offered: self.offered,
            offer: Arc::clone(&self.offer),
            tell,
        };
        spawn_in(&mut self.tasks.lock(), life.run());
        let told = told.map(|outcome| outcome.unwrap_or_else(|_| Err(Arc::new(DialError::Panicked))));
        Offer {
            number,
            root: root.to_vec(),
            opening: told.boxed().shared(),
        }
    }

    #[cfg(test)]
    pub(super) fn offer_for(&mut self, offered: Duration) {
        self.offered = offered;
    }
}

fn withdraw(offer: &Mutex<Option<Offer>>, number: u64) {
    // What is dropped may wake others: not under the lock.
    let withdrawn = offer.lock().take_if(|offer| offer.number == number);
    drop(withdrawn);
}

/// One channel from the dial to its end. A task of its own: it goes on when the call that began it is given up.
struct Life {
    number: u64,
    root: Vec<u8>,
    server: Arc<Server>,
    offered: Duration,
    offer: Arc<Mutex<Option<Offer>>>,
    tell: oneshot::Sender<Outcome>,
}

impl Life {
    async fn run(self) {
        let tasks = StreamTasks::default();
        let connection = match dial(&self.server, &self.root, tasks.clone()).await {
            Ok((sender, connection)) => {
                // Nobody listens when another root file took this one's place: the sender is dropped and we end below.
                drop(self.tell.send(Ok(sender)));
                connection
            }
            Err(error) => {
                // In this order: a call that begins after the failure dials anew.
                withdraw(&self.offer, self.number);
                drop(self.tell.send(Err(Arc::new(error))));
                return;
            }
        };
        let mut connection = Box::pin(connection.fuse());
        // However the connection ends, its calls have the error.
        tokio::select! {
            _ = &mut connection => {}
            () = sleep(self.offered) => {}
        }
        withdraw(&self.offer, self.number);
        let last_calls = async move {
            // Ends when the last call has dropped its sender; what it spawned may still have to say goodbye.
            let _ = (&mut connection).await;
            drop(connection);
            tasks.ended().await;
        };
        let _ = timeout(LINGER, last_calls).await;
    }
}

async fn dial(server: &Server, root: &[u8], tasks: StreamTasks) -> Result<(SendRequest<Body>, Connection), DialError> {
    let stream = TokioIo::new(connect(server, root).await?);
    http2::Builder::new(tasks)
        .initial_max_send_streams(FIRST_STREAMS)
        .handshake(stream)
        .await
        .map_err(DialError::Http2)
}

async fn connect(server: &Server, root: &[u8]) -> Result<TlsStream<TcpStream>, DialError> {
    let config = Arc::new(client_config(server, root)?);
    let Server { host, port, name, .. } = server;
    let resolved = timeout(RESOLVE_DEADLINE, names::resolve(host, *port)).await;
    let unresolved = |source| DialError::Resolve {
        host: host.clone(),
        source,
    };
    let addresses = resolved
        .map_err(|_| unresolved(io::ErrorKind::TimedOut.into()))?
        .map_err(unresolved)?;
    let mut last = unresolved(io::ErrorKind::NotFound.into());
    for address in addresses {
        let tcp = match timeout(CONNECT_DEADLINE, TcpStream::connect(address)).await {
            Ok(Ok(tcp)) => tcp,
            Ok(Err(source)) => {
                last = DialError::Connect { address, source };
                continue;
            }
            Err(_) => {
                last = DialError::Connect {
                    address,
                    source: io::ErrorKind::TimedOut.into(),
                };
                continue;
            }
        };
        let failed = |source| DialError::Handshake { address, source };
        tcp.set_nodelay(true).map_err(failed)?;
        let handshake = TlsConnector::from(config).connect(name.clone(), tcp);
        return match timeout(HANDSHAKE_DEADLINE, handshake).await {
            Ok(stream) => stream.map_err(failed),
            Err(_) => Err(failed(io::ErrorKind::TimedOut.into())),
        };
    }
    Err(last)
}

/// The CA's server is checked as a web server is, by name or address, under its own roots.
fn client_config(server: &Server, root: &[u8]) -> Result<ClientConfig, DialError> {
    let malformed = || DialError::RootForm {
        path: server.root.clone(),
    };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(root) {
        roots
            .add(certificate.map_err(|_| malformed())?)
            .map_err(|_| malformed())?;
    }
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), tls::provider())
        .build()
        .map_err(|_| malformed())?;
    let mut config = ClientConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(DialError::Configure)?
        .with_webpki_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![tls::ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// hyper wants to spawn; what it spawns ends with the channel.
#[derive(Clone, Default)]
struct StreamTasks(Arc<Mutex<JoinSet<()>>>);

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for StreamTasks {
    fn execute(&self, task: F) {
        spawn_in(&mut self.0.lock(), task);
    }
}

impl StreamTasks {
    /// Resolves when the tasks of now have ended.
    async fn ended(&self) {
        while poll_fn(|cx| self.0.lock().poll_join_next(cx)).await.is_some() {}
    }
}

/// A set keeps what has ended until it is asked for it.
fn spawn_in(tasks: &mut JoinSet<()>, task: impl Future<Output = ()> + Send + 'static) {
    while tasks.try_join_next().is_some() {}
    tasks.spawn(task);
}

//! A mesh of two for tests: a CA of the moment, a server on loopback and a pool that dials it, with real TLS.

use super::{
    Dial, Dialled, Event, HboneSettings, Incoming, PeerKey, Pool, PoolError, Request, Tunnel, TunnelEnd, server,
};
use crate::{
    certs::{Svid, Trust, TrustBundle, TrustWatch},
    mesh::{SpiffeId, TrustDomain},
    shutdown::Shutdown,
    testing::within,
};
use bytes::Bytes;
use futures::future::BoxFuture;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose,
    SanType,
};
use rustls_pki_types::PrivateKeyDer;
use std::{
    future::poll_fn,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
};

pub(crate) fn spiffe(account: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://cluster.local/ns/shop/sa/{account}")).unwrap()
}

pub(crate) struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    trust: Arc<Trust>,
    client_bundle: watch::Sender<Option<Arc<Trust>>>,
    server_bundle: watch::Sender<Option<Arc<Trust>>>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        let trust = Arc::new(Trust {
            bundle: TrustBundle::from_der(vec![issuer.der().clone()]).unwrap(),
            domains: vec![TrustDomain::new("cluster.local").unwrap()],
        });
        Self {
            issuer,
            client_bundle: watch::Sender::new(Some(Arc::clone(&trust))),
            server_bundle: watch::Sender::new(Some(Arc::clone(&trust))),
            trust,
        }
    }

    /// From now on the client's daemon, or the server's, trusts another CA instead of this one.
    pub(crate) fn leave_the_bundle(&self, of_client: bool) {
        let bundle = if of_client {
            &self.client_bundle
        } else {
            &self.server_bundle
        };
        bundle.send_replace(Some(Self::new().trust));
    }

    pub(crate) fn svid(&self, id: &SpiffeId) -> Arc<Svid> {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into().unwrap())];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        let key = PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let key = rustls::crypto::aws_lc_rs::sign::any_ecdsa_type(&key).unwrap();
        Arc::new(Svid::new(id.clone(), vec![leaf.der().clone()], key, Arc::clone(&self.trust)).unwrap())
    }
}

/// The address that the server's pod pretends to have.
pub(crate) const POD: &str = "10.0.0.1:15008";

pub(crate) fn target() -> SocketAddr {
    "10.0.0.1:80".parse().unwrap()
}

#[derive(Clone)]
struct LoopbackDial {
    svid: Arc<Svid>,
    trust: TrustWatch,
    to: Arc<parking_lot::Mutex<SocketAddr>>,
    dialled: Arc<AtomicUsize>,
}

impl Dial for LoopbackDial {
    fn dial<'a>(&'a self, key: &'a PeerKey, _: Duration) -> BoxFuture<'a, Result<Dialled, PoolError>> {
        Box::pin(async move {
            self.dialled.fetch_add(1, Ordering::Relaxed);
            let to = *self.to.lock();
            let tcp = TcpStream::connect(to)
                .await
                .map_err(|e| PoolError::Certificate(Arc::new(e)))?;
            Ok(Dialled {
                tcp,
                config: self.svid.client_config(&key.peer),
                trust: self.trust.clone(),
                retire_at: None,
            })
        })
    }
}

/// A client's pool, and a server that hands its tunnels to a function.
pub(crate) struct TwoPods {
    pub(crate) authority: Authority,
    pub(crate) address: SocketAddr,
    to: Arc<parking_lot::Mutex<SocketAddr>>,
    dial: LoopbackDial,
    settings: Arc<HboneSettings>,
    pub(crate) pool: Pool,
    pub(crate) key: PeerKey,
    pub(crate) tasks: Shutdown,
    /// Connections dialled so far.
    pub(crate) dialled: Arc<AtomicUsize>,
    pub(crate) refused: Arc<AtomicUsize>,
    /// The names of handshakes that failed.
    pub(crate) failures: Arc<parking_lot::Mutex<Vec<Arc<str>>>>,
}

pub(crate) async fn two_pods<F>(
    settings: HboneSettings,
    on_tunnel: impl Fn(Incoming) -> F + Send + Sync + 'static,
) -> TwoPods
where
    F: Future<Output = ()> + Send + 'static,
{
    let authority = Authority::new();
    let settings = Arc::new(settings);
    let tasks = Shutdown::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let config = authority.svid(&spiffe("server")).server_config();
    let (refused, failures) = (
        Arc::new(AtomicUsize::new(0)),
        Arc::<parking_lot::Mutex<Vec<Arc<str>>>>::default(),
    );
    let on_tunnel = Arc::new(on_tunnel);
    let trust = TrustWatch::new(authority.server_bundle.subscribe());
    {
        let (tasks, settings, refused, failures) = (tasks.clone(), settings.clone(), refused.clone(), failures.clone());
        let accepting = tasks.clone();
        accepting.spawn("listener", async move {
            loop {
                let (tcp, from) = tokio::select! {
                    accepted = listener.accept() => accepted.unwrap(),
                    () = tasks.draining() => break,
                };
                let (config, settings, refused, failures) =
                    (config.clone(), settings.clone(), refused.clone(), failures.clone());
                let trust = trust.clone();
                let (on_tunnel, own) = (on_tunnel.clone(), tasks.clone());
                tasks.spawn("server", async move {
                    let server = match server::accept(tcp, from, POD.parse().unwrap(), config, trust, settings).await {
                        Ok(server) => server,
                        Err(error) => {
                            failures.lock().push(error.name().into());
                            return;
                        }
                    };
                    let serve = server.run(
                        |port| port == 15008,
                        own.draining(),
                        |event| match event {
                            Event::Tunnel(incoming) => {
                                own.spawn("tunnel", on_tunnel(incoming));
                            }
                            Event::Refused(_) => {
                                refused.fetch_add(1, Ordering::Relaxed);
                            }
                        },
                    );
                    tokio::select! {
                        end = serve => eprintln!("connection: {end}"),
                        () = own.cut() => {}
                    }
                });
            }
        });
    }
    let dialled = Arc::new(AtomicUsize::new(0));
    let to = Arc::new(parking_lot::Mutex::new(address));
    let dial = LoopbackDial {
        svid: authority.svid(&spiffe("client")),
        trust: TrustWatch::new(authority.client_bundle.subscribe()),
        to: to.clone(),
        dialled: dialled.clone(),
    };
    let pool = Pool::new(dial.clone(), settings.clone(), tasks.clone());
    let key = PeerKey {
        local: "127.0.0.1".parse().unwrap(),
        next_hop: address,
        peer: spiffe("server"),
    };
    TwoPods {
        authority,
        address,
        to,
        dial,
        settings,
        pool,
        key,
        tasks,
        dialled,
        refused,
        failures,
    }
}

/// To [`target`].
pub(super) fn request() -> Request<'static> {
    Request {
        authority: target(),
        client: None,
        baggage: None,
    }
}

impl TwoPods {
    pub(crate) async fn open(&self) -> Tunnel {
        self.open_to(target()).await
    }

    pub(crate) async fn open_to(&self, authority: SocketAddr) -> Tunnel {
        let request = Request { authority, ..request() };
        within("a tunnel", self.pool.open(&self.key, request)).await.unwrap()
    }

    /// Another client of the same server, whose tasks are its own.
    pub(crate) fn another_pool(&self) -> (Pool, Shutdown) {
        let tasks = Shutdown::new();
        let pool = Pool::new(self.dial.clone(), self.settings.clone(), tasks.clone());
        (pool, tasks)
    }

    /// Connections from now on go through `to`.
    pub(crate) fn redial(&mut self, to: SocketAddr) {
        *self.to.lock() = to;
    }

    pub(crate) fn dialled(&self) -> usize {
        self.dialled.load(Ordering::Relaxed)
    }
}

pub(crate) async fn send(tunnel: &mut Tunnel, bytes: &[u8]) -> Result<(), TunnelEnd> {
    within("room to send", poll_fn(|cx| tunnel.poll_send_ready(cx))).await?;
    tunnel.send(Bytes::copy_from_slice(bytes))
}

pub(crate) async fn receive(tunnel: &mut Tunnel) -> Option<Result<Bytes, TunnelEnd>> {
    let received = within("bytes", poll_fn(|cx| tunnel.poll_receive(cx))).await;
    if let Some(Ok(bytes)) = &received {
        tunnel.release(bytes.len());
    }
    received
}

/// Everything up to the peer's half-close.
pub(crate) async fn receive_all(tunnel: &mut Tunnel) -> Result<Vec<u8>, TunnelEnd> {
    let mut all = Vec::new();
    while let Some(bytes) = receive(tunnel).await {
        all.extend_from_slice(&bytes?);
    }
    Ok(all)
}

pub(crate) async fn receive_exactly(tunnel: &mut Tunnel, count: usize) -> Vec<u8> {
    let mut all = Vec::new();
    while all.len() < count {
        all.extend_from_slice(&receive(tunnel).await.expect("more bytes").expect("bytes"));
    }
    all
}

/// Sends back what comes, until the client has said all.
pub(crate) async fn echo(incoming: Incoming) {
    let Ok(mut tunnel) = incoming.accept() else { return };
    while let Some(Ok(bytes)) = poll_fn(|cx| tunnel.poll_receive(cx)).await {
        if poll_fn(|cx| tunnel.poll_send_ready(cx)).await.is_err() {
            return;
        }
        let length = bytes.len();
        if tunnel.send(bytes).is_err() {
            return;
        }
        tunnel.release(length);
    }
    let _ = tunnel.finish();
}

//! A CA for tests that counts its connections, breaks them, keeps silent and refuses. Not here: what is tested with it.

use super::{
    Authority,
    proto::{
        IstioCertificateRequest, IstioCertificateResponse,
        istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer},
    },
    tls,
};
use crate::mesh::SpiffeId;
use hyper::{server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use parking_lot::Mutex;
use rcgen::KeyPair;
use rustls::{ServerConfig, version::TLS13};
use rustls_pki_types::{PrivateKeyDer, UnixTime};
use std::{future::pending, net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};
use tower::Service;

pub(super) const HOUR: Duration = Duration::from_secs(3600);

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Conduct {
    Sign,
    Refuse,
    /// Connections of a lower number end before the answer.
    BreakBelow(usize),
    /// They stay and their calls are reset.
    ResetBelow(usize),
    Silence,
}

/// A CA that signs on TLS connections which it counts. What it has open ends with it.
pub(super) struct Ca {
    pub(super) address: SocketAddr,
    pub(super) seen: Arc<Seen>,
    pub(super) conduct: watch::Sender<Conduct>,
    pub(super) goodbye: CancellationToken,
    _tasks: JoinSet<()>,
}

#[derive(Default)]
pub(super) struct Seen(Mutex<Counts>);

impl Seen {
    pub(super) fn counts(&self) -> Counts {
        *self.0.lock()
    }
}

#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Counts {
    pub(super) accepted: usize,
    pub(super) ended: usize,
    pub(super) asked: usize,
}

struct Signing {
    number: usize,
    authority: Arc<Authority>,
    seen: Arc<Seen>,
    conduct: watch::Receiver<Conduct>,
    cut: CancellationToken,
}

#[tonic::async_trait]
impl IstioCertificateService for Signing {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        self.seen.0.lock().asked += 1;
        let mut conduct = self.conduct.clone();
        let conduct = *conduct.wait_for(|now| *now != Conduct::Silence).await.unwrap();
        match conduct {
            Conduct::Refuse => Err(Status::permission_denied("not yours")),
            Conduct::BreakBelow(number) if self.number < number => {
                self.cut.cancel();
                pending().await
            }
            Conduct::Sign | Conduct::BreakBelow(_) | Conduct::ResetBelow(_) | Conduct::Silence => {
                let csr = &request.get_ref().csr;
                let signed = self.authority.sign(csr, &id(), HOUR, UnixTime::now()).unwrap();
                let cert_chain = signed.pem_with_roots(self.authority.bundle());
                Ok(Response::new(IstioCertificateResponse { cert_chain }))
            }
        }
    }
}

impl Signing {
    async fn serve(self, tls: Arc<ServerConfig>, tcp: TcpStream, goodbye: CancellationToken) {
        let (cut, seen) = (self.cut.clone(), self.seen.clone());
        let stream = TlsAcceptor::from(tls).accept(tcp).await;
        if let Ok(stream) = stream {
            let (number, conduct) = (self.number, self.conduct.clone());
            let service = IstioCertificateServiceServer::new(self);
            let answer = service_fn(move |request| {
                let reset = matches!(*conduct.borrow(), Conduct::ResetBelow(below) if number < below);
                let answer = service.clone().call(request);
                async move {
                    match reset {
                        true => Err(h2::Error::from(h2::Reason::REFUSED_STREAM)),
                        false => Ok(answer.await.unwrap()),
                    }
                }
            });
            // As many streams as Warren's own controller takes.
            let connection = http2::Builder::new(TokioExecutor::new())
                .max_concurrent_streams(16)
                .serve_connection(TokioIo::new(stream), answer);
            let mut connection = std::pin::pin!(connection);
            tokio::select! {
                _ = &mut connection => {}
                () = cut.cancelled() => {}
                () = goodbye.cancelled() => {
                    connection.as_mut().graceful_shutdown();
                    let _ = connection.await;
                }
            }
        }
        seen.0.lock().ended += 1;
    }
}

impl Ca {
    pub(super) async fn start(authority: &Arc<Authority>, at: &str) -> Self {
        let listener = TcpListener::bind(at).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (key, now) = (KeyPair::generate().unwrap(), UnixTime::now());
        let signed = authority.sign_server(&key, &[], &[address.ip()], HOUR, now).unwrap();
        let mut tls = ServerConfig::builder_with_provider(tls::provider())
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(signed.chain, PrivateKeyDer::Pkcs8(key.serialize_der().into()))
            .unwrap();
        tls.alpn_protocols = vec![tls::ALPN.to_vec()];
        let tls = Arc::new(tls);
        let (seen, goodbye) = (Arc::<Seen>::default(), CancellationToken::new());
        let conduct = watch::Sender::new(Conduct::Sign);
        let (authority, counting, ending, conducting) =
            (authority.clone(), seen.clone(), goodbye.clone(), conduct.subscribe());
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            loop {
                let (tcp, _) = listener.accept().await.unwrap();
                let number = {
                    let mut counts = counting.0.lock();
                    counts.accepted += 1;
                    counts.accepted - 1
                };
                let signing = Signing {
                    number,
                    authority: authority.clone(),
                    seen: counting.clone(),
                    conduct: conducting.clone(),
                    cut: CancellationToken::new(),
                };
                connections.spawn(signing.serve(tls.clone(), tcp, ending.clone()));
            }
        });
        Self {
            address,
            seen,
            conduct,
            goodbye,
            _tasks: tasks,
        }
    }

    pub(super) fn counts(&self) -> Counts {
        self.seen.counts()
    }
}

pub(super) fn id() -> SpiffeId {
    SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/web").unwrap()
}

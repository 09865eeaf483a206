//! The client of the CA: Istio's `CreateCertificate` over TLS, one short connection per certificate. Files are read for
//! each request, so what changed in them is what counts. Not here: when to ask (`store`).

use super::{
    key::{DaemonKey, KeyError},
    names,
    proto::{IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient},
    read_bounded,
    store::Issue,
    tls,
};
use crate::{mesh::SpiffeId, telemetry::CaOutcome};
use http::Uri;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use rustls::{ClientConfig, RootCertStore, client::Resumption, client::WebPkiServerVerifier, version::TLS13};
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use std::{
    fmt,
    future::Future,
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    time::Duration,
};
use tokio::{net::TcpStream, task::JoinSet, time::timeout};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::{body::Body, metadata::MetadataValue};

/// Resolving the CA's name may take this long: a search list of dead ends included.
const RESOLVE_DEADLINE: Duration = Duration::from_secs(5);
/// One address of the CA may take this long to answer a connect.
const CONNECT_DEADLINE: Duration = Duration::from_secs(3);
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);
const CALL_DEADLINE: Duration = Duration::from_secs(8);
const DEFAULT_PORT: u16 = 15012;
const MAX_TOKEN_BYTES: usize = 16 << 10;
const MAX_ROOT_BYTES: usize = 1 << 20;
const MAX_ANSWER_BYTES: usize = 1 << 20;
/// Certificates in one answer: more than any chain.
const MAX_CHAIN: usize = 32;

/// Where the CA is: `https://host[:port]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CaAddress {
    host: String,
    port: u16,
    name: ServerName<'static>,
    origin: Uri,
}

#[derive(Debug, thiserror::Error)]
pub enum CaAddressError {
    #[error("it must begin with https://: certificates are not asked for in the clear")]
    Scheme,
    #[error("it must be https://HOST or https://HOST:PORT, without user, path or query")]
    Form,
}

impl FromStr for CaAddress {
    type Err = CaAddressError;

    fn from_str(text: &str) -> Result<Self, CaAddressError> {
        let Ok(origin) = text.parse::<Uri>() else {
            return Err(CaAddressError::Form);
        };
        if origin.scheme_str() != Some("https") {
            return Err(CaAddressError::Scheme);
        }
        let authority = origin.authority().ok_or(CaAddressError::Form)?;
        let text = authority.as_str();
        let colon = text.rsplit_once(']').map_or(text, |(_, after)| after).contains(':');
        let port = match authority.port_u16() {
            Some(0) => return Err(CaAddressError::Form),
            Some(port) => port,
            None if colon => return Err(CaAddressError::Form),
            None => DEFAULT_PORT,
        };
        if text.contains('@') || origin.query().is_some() || !matches!(origin.path(), "" | "/") {
            return Err(CaAddressError::Form);
        }
        let host = authority
            .host()
            .trim_start_matches('[')
            .trim_end_matches(']')
            .to_owned();
        let name = ServerName::try_from(host.clone()).map_err(|_| CaAddressError::Form)?;
        Ok(Self {
            port,
            host,
            name,
            origin,
        })
    }
}

impl fmt::Display for CaAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = &self.host;
        match host.contains(':') {
            true => write!(f, "https://[{host}]:{}", self.port),
            false => write!(f, "https://{host}:{}", self.port),
        }
    }
}

#[derive(Debug, Clone)]
pub struct CaClientSettings {
    pub address: CaAddress,
    /// The name its certificate must bear, where it is not the host of the address.
    pub server_name: Option<ServerName<'static>>,
    /// PEM file of the roots that vouch for the CA's server.
    pub root: PathBuf,
    /// File with the bearer token.
    pub token: Option<PathBuf>,
    /// Istio's `ClusterID`.
    pub cluster_id: String,
    /// The wished lifetime of certificates.
    pub lifetime: Duration,
}

/// A client of an Istio CA: Warren's controller, istiod, istio-csr.
#[derive(Debug)]
pub struct CaClient {
    settings: CaClientSettings,
}

/// Why the CA gave no certificate.
#[derive(Debug, thiserror::Error)]
pub enum IssueError {
    #[error("cannot read the token file {}", path.display())]
    Token { path: PathBuf, source: io::Error },
    #[error("the token file {} does not hold one line of visible ASCII", path.display())]
    TokenForm { path: PathBuf },
    #[error("cannot read the CA's root file {}", path.display())]
    Root { path: PathBuf, source: io::Error },
    #[error("the CA's root file {} holds no usable certificate", path.display())]
    RootForm { path: PathBuf },
    #[error("the TLS client cannot be configured")]
    Configure(#[source] rustls::Error),
    #[error("no certificate request")]
    Request(#[source] KeyError),
    #[error("cannot resolve {host}")]
    Resolve { host: String, source: io::Error },
    #[error("cannot connect to the CA at {address}")]
    Connect { address: SocketAddr, source: io::Error },
    #[error("the TLS handshake with the CA at {address} failed")]
    Handshake { address: SocketAddr, source: io::Error },
    #[error("HTTP/2 with the CA failed")]
    Http2(#[source] hyper::Error),
    #[error("the CA did not answer in time")]
    Deadline,
    #[error("the CA refused: {code:?}, {message}")]
    Refused { code: tonic::Code, message: String },
    #[error("the CA's answer holds no readable certificate chain")]
    Answer,
}

impl CaClient {
    pub fn new(settings: CaClientSettings) -> Self {
        Self { settings }
    }

    async fn token(&self) -> Result<Option<MetadataValue<tonic::metadata::Ascii>>, IssueError> {
        let Some(path) = &self.settings.token else {
            return Ok(None);
        };
        let text = read_bounded(path, MAX_TOKEN_BYTES)
            .await
            .map_err(|source| IssueError::Token {
                path: path.clone(),
                source,
            })?;
        let malformed = || IssueError::TokenForm { path: path.clone() };
        let token = std::str::from_utf8(&text).map_err(|_| malformed())?.trim();
        if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(malformed());
        }
        let mut value: MetadataValue<_> = format!("Bearer {token}").parse().map_err(|_| malformed())?;
        value.set_sensitive(true);
        Ok(Some(value))
    }

    async fn connect(&self) -> Result<TlsStream<TcpStream>, IssueError> {
        let config = Arc::new(client_config(&self.settings.root).await?);
        let CaAddress { host, port, name, .. } = &self.settings.address;
        let name = self.settings.server_name.as_ref().unwrap_or(name);
        let resolved = timeout(RESOLVE_DEADLINE, names::resolve(host, *port)).await;
        let unresolved = |source| IssueError::Resolve {
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
                    last = IssueError::Connect { address, source };
                    continue;
                }
                Err(_) => {
                    last = IssueError::Connect {
                        address,
                        source: io::ErrorKind::TimedOut.into(),
                    };
                    continue;
                }
            };
            let failed = |source| IssueError::Handshake { address, source };
            tcp.set_nodelay(true).map_err(failed)?;
            let handshake = TlsConnector::from(config).connect(name.clone(), tcp);
            return match timeout(HANDSHAKE_DEADLINE, handshake).await {
                Ok(stream) => stream.map_err(failed),
                Err(_) => Err(failed(io::ErrorKind::TimedOut.into())),
            };
        }
        Err(last)
    }

    /// One call with this very request.
    pub(crate) async fn call(
        &self,
        request: tonic::Request<IstioCertificateRequest>,
    ) -> Result<Vec<String>, IssueError> {
        let tasks = OwnedTasks::default();
        let stream = TokioIo::new(self.connect().await?);
        let (sender, connection) = hyper::client::conn::http2::handshake::<_, _, Body>(tasks.clone(), stream)
            .await
            .map_err(IssueError::Http2)?;
        let service = tower::service_fn(move |request| {
            let mut sender = sender.clone();
            async move { sender.send_request(request).await }
        });
        let mut client = IstioCertificateServiceClient::with_origin(service, self.settings.address.origin.clone())
            .max_decoding_message_size(MAX_ANSWER_BYTES);
        let answer = async {
            let answer = client.create_certificate(request).await;
            answer.map(|answer| answer.into_inner().cert_chain)
        };
        // The connection makes no progress by itself; when it ends first, the call fails by itself.
        let answer = timeout(CALL_DEADLINE, async {
            let mut connection = std::pin::pin!(futures::FutureExt::fuse(connection));
            let mut answer = std::pin::pin!(answer);
            loop {
                tokio::select! {
                    answer = &mut answer => return answer,
                    _ = &mut connection, if !futures::future::FusedFuture::is_terminated(&connection) => {}
                }
            }
        })
        .await
        .map_err(|_| IssueError::Deadline)?;
        answer.map_err(|status| IssueError::Refused {
            code: status.code(),
            message: status.message().to_owned(),
        })
    }
}

impl Issue for CaClient {
    type Error = IssueError;

    async fn issue(&self, key: &DaemonKey, id: &SpiffeId) -> Result<Vec<CertificateDer<'static>>, IssueError> {
        let csr = key.request(id).map_err(IssueError::Request)?;
        let identity = prost_types::Value {
            kind: Some(prost_types::value::Kind::StringValue(id.to_string())),
        };
        let metadata = prost_types::Struct {
            fields: [("ImpersonatedIdentity".to_owned(), identity)].into(),
        };
        let mut request = tonic::Request::new(IstioCertificateRequest {
            csr,
            validity_duration: i64::try_from(self.settings.lifetime.as_secs()).unwrap_or(i64::MAX),
            metadata: Some(metadata),
        });
        if let Some(token) = self.token().await? {
            request.metadata_mut().insert("authorization", token);
        }
        if let Ok(cluster) = self.settings.cluster_id.parse() {
            request.metadata_mut().insert("clusterid", cluster);
        }
        read_chain(&self.call(request).await?)
    }

    fn outcome(error: &IssueError) -> CaOutcome {
        match error {
            IssueError::Refused { code, .. } if is_no(*code) => CaOutcome::Refused,
            IssueError::Answer => CaOutcome::Unusable,
            IssueError::Token { .. }
            | IssueError::TokenForm { .. }
            | IssueError::Root { .. }
            | IssueError::RootForm { .. }
            | IssueError::Configure(_)
            | IssueError::Request(_)
            | IssueError::Resolve { .. }
            | IssueError::Connect { .. }
            | IssueError::Handshake { .. }
            | IssueError::Http2(_)
            | IssueError::Deadline
            | IssueError::Refused { .. } => CaOutcome::Unavailable,
        }
    }
}

/// The CA has decided, and would decide the same way again.
fn is_no(code: tonic::Code) -> bool {
    use tonic::Code;
    [
        Code::Unauthenticated,
        Code::PermissionDenied,
        Code::InvalidArgument,
        Code::FailedPrecondition,
        Code::NotFound,
        Code::Unimplemented,
    ]
    .contains(&code)
}

/// An element may hold several certificates: Istio puts a whole root file into the last one.
fn read_chain(answer: &[String]) -> Result<Vec<CertificateDer<'static>>, IssueError> {
    let mut chain = Vec::new();
    for certificate in answer
        .iter()
        .flat_map(|text| CertificateDer::pem_slice_iter(text.as_bytes()))
    {
        chain.push(certificate.map_err(|_| IssueError::Answer)?);
        if chain.len() > MAX_CHAIN {
            return Err(IssueError::Answer);
        }
    }
    if chain.is_empty() {
        Err(IssueError::Answer)
    } else {
        Ok(chain)
    }
}

/// The CA's server is checked as a web server is, by name or address, under its own roots.
async fn client_config(root: &Path) -> Result<ClientConfig, IssueError> {
    let text = read_bounded(root, MAX_ROOT_BYTES)
        .await
        .map_err(|source| IssueError::Root {
            path: root.to_owned(),
            source,
        })?;
    let malformed = || IssueError::RootForm { path: root.to_owned() };
    let mut roots = RootCertStore::empty();
    for certificate in CertificateDer::pem_slice_iter(&text) {
        roots
            .add(certificate.map_err(|_| malformed())?)
            .map_err(|_| malformed())?;
    }
    let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), tls::provider())
        .build()
        .map_err(|_| malformed())?;
    let mut config = ClientConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(IssueError::Configure)?
        .with_webpki_verifier(verifier)
        .with_no_client_auth();
    config.alpn_protocols = vec![tls::ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// hyper wants to spawn; what it spawns ends with the call.
#[derive(Clone, Default)]
struct OwnedTasks(Arc<Mutex<JoinSet<()>>>);

impl<F: Future<Output = ()> + Send + 'static> hyper::rt::Executor<F> for OwnedTasks {
    fn execute(&self, task: F) {
        self.0.lock().spawn(task);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_of_the_ca_is_an_https_host_and_port() {
        for (text, host, port) in [
            ("https://10.77.0.1:15012", "10.77.0.1", 15012),
            ("https://[fd77::1]:443", "fd77::1", 443),
            ("https://istiod.istio-system.svc", "istiod.istio-system.svc", 15012),
            ("https://ca/", "ca", 15012),
        ] {
            let address: CaAddress = text.parse().unwrap();
            assert_eq!((address.host.as_str(), address.port), (host, port), "{text}");
            assert_eq!(
                address.to_string().parse::<CaAddress>().unwrap().port,
                port,
                "{address}"
            );
        }
        for text in [
            "http://ca:1",
            "ca:1",
            "https://ca/path",
            "https://me@ca",
            "https://ca?x",
            "https://",
            "https://ca:",
            "https://ca:0",
            "https://ca:99999",
            "https://[fd77::1]:0",
            "",
        ] {
            assert!(text.parse::<CaAddress>().is_err(), "{text}");
        }
    }
}

//! The client of the CA: Istio's `CreateCertificate` over TLS. Files are read for each request, so what changed in them is
//! what counts. Not here: the connection it goes over (`channel`), and when to ask (`store`).

use super::{
    channel::{Channel, Channels, DialError, LINGER, Server},
    key::{DaemonKey, KeyError},
    proto::{IstioCertificateRequest, istio_certificate_service_client::IstioCertificateServiceClient},
    read_bounded,
    store::{Issue, with_causes},
};
use crate::{mesh::SpiffeId, telemetry::CaOutcome};
use http::Uri;
use rustls_pki_types::{CertificateDer, ServerName, pem::PemObject};
use std::{error::Error, fmt, io, path::PathBuf, str::FromStr, sync::Arc, time::Duration};
use tokio::time::timeout;
use tonic::metadata::MetadataValue;

/// From the open channel to the answer.
const CALL_DEADLINE: Duration = Duration::from_secs(8);
const _: () = assert!(
    CALL_DEADLINE.as_secs() < LINGER.as_secs(),
    "a channel would end in the middle of a call"
);
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

/// A client of an Istio CA: Warren's controller, istiod, istio-csr. What it has open ends with it.
#[derive(Debug)]
pub struct CaClient {
    settings: CaClientSettings,
    channels: Channels,
    call_deadline: Duration,
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
    #[error("no certificate request")]
    Request(#[source] KeyError),
    /// Shared by all who waited for the connection.
    #[error(transparent)]
    Dial(#[from] Arc<DialError>),
    #[error("the connection to the CA ended before its answer: {reason}")]
    Broken { reason: String },
    #[error("the CA did not answer in time")]
    Deadline,
    #[error("the CA refused: {code:?}, {message}")]
    Refused { code: tonic::Code, message: String },
    #[error("the CA's answer holds no readable certificate chain")]
    Answer,
}

impl CaClient {
    pub fn new(settings: CaClientSettings) -> Self {
        let CaAddress { host, port, name, .. } = &settings.address;
        let channels = Channels::new(Server {
            host: host.clone(),
            port: *port,
            name: settings.server_name.as_ref().unwrap_or(name).clone(),
            root: settings.root.clone(),
        });
        Self {
            settings,
            channels,
            call_deadline: CALL_DEADLINE,
        }
    }

    #[cfg(test)]
    pub(super) fn with_times(settings: CaClientSettings, offered: Duration, call_deadline: Duration) -> Self {
        let mut client = Self::new(settings);
        client.channels.offer_for(offered);
        client.call_deadline = call_deadline;
        client
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

    async fn root(&self) -> Result<Vec<u8>, IssueError> {
        let path = &self.settings.root;
        read_bounded(path, MAX_ROOT_BYTES)
            .await
            .map_err(|source| IssueError::Root {
                path: path.clone(),
                source,
            })
    }

    /// One call with this very request; once more where it lost a connection that another call had opened: the CA may
    /// have closed it, or begun to, before it saw this one.
    pub(crate) async fn call(
        &self,
        request: tonic::Request<IstioCertificateRequest>,
    ) -> Result<Vec<String>, IssueError> {
        let root = self.root().await?;
        let (metadata, extensions, message) = request.into_parts();
        let request = || tonic::Request::from_parts(metadata.clone(), extensions.clone(), message.clone());
        let channel = self.channels.get(&root).await?;
        match self.call_over(&channel, request()).await {
            Err(IssueError::Broken { .. }) if channel.found => {
                let channel = self.channels.get(&root).await?;
                self.call_over(&channel, request()).await
            }
            answer => answer,
        }
    }

    /// A channel that broke or kept silent is offered to nobody else.
    async fn call_over(
        &self,
        channel: &Channel,
        request: tonic::Request<IstioCertificateRequest>,
    ) -> Result<Vec<String>, IssueError> {
        let service = tower::service_fn(|request| {
            let mut sender = channel.sender.clone();
            async move { sender.send_request(request).await }
        });
        let mut client = IstioCertificateServiceClient::with_origin(service, self.settings.address.origin.clone())
            .max_decoding_message_size(MAX_ANSWER_BYTES);
        let Ok(answer) = timeout(self.call_deadline, client.create_certificate(request)).await else {
            self.channels.withdraw(channel);
            return Err(IssueError::Deadline);
        };
        match answer {
            Ok(answer) => Ok(answer.into_inner().cert_chain),
            Err(status) => match transport(&status) {
                Some(cause) => {
                    self.channels.withdraw(channel);
                    Err(IssueError::Broken {
                        reason: with_causes(cause),
                    })
                }
                None => Err(IssueError::Refused {
                    code: status.code(),
                    message: status.message().to_owned(),
                }),
            },
        }
    }
}

/// What hyper said, where tonic made a status of that: the CA itself has not answered.
fn transport(status: &tonic::Status) -> Option<&hyper::Error> {
    std::iter::successors(status.source(), |&error| error.source()).find_map(|error| error.downcast_ref())
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
            | IssueError::Request(_)
            | IssueError::Dial(_)
            | IssueError::Broken { .. }
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

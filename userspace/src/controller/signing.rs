//! Who may have which certificate: Istio's `CreateCertificate`, answered for nodes that show their token and only for
//! identities of pods bound to them. Not here: the connections it comes over (`server`).

use super::{
    callers::{Callers, Cluster},
    limit::Buckets,
    review::TokenRefused,
    reviews::ReviewError,
    root::Issuing,
};
use crate::{
    certs::{
        Authority,
        authority::SignError,
        proto::{
            IstioCertificateRequest, IstioCertificateResponse,
            istio_certificate_service_server::IstioCertificateService,
        },
    },
    mesh::{SpiffeId, TrustDomain, identity::IdentityError},
};
use parking_lot::Mutex;
use prost_types::value::Kind;
use rustls_pki_types::UnixTime;
use std::{
    collections::BTreeMap,
    io,
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::time::sleep;
use tonic::{Code, Request, Response, Status, metadata::MetadataMap};
use tracing::{info, warn};

/// Certificates that one node may ask for: per second, and at once when it starts with all its pods.
const PER_SECOND: u32 = 50;
const BURST: u32 = 500;
const MOST_NODES: usize = 16_384;
/// Lines of the log about refusals of one reason.
const LINES_PER_SECOND: u32 = 10;
const LINES_BURST: u32 = 100;
/// Who is refused waits so long for the answer: a flood takes its own streams, and little of our time.
const HELD: Duration = Duration::from_millis(500);
/// How often it is looked meanwhile whether there is reason to refuse still.
const GLANCE: Duration = Duration::from_millis(50);

/// Why a node gets no certificate.
#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error("no bearer token")]
    NoToken,
    #[error("an unknown token")]
    WrongToken,
    #[error("the token file cannot be read")]
    TokenFile(#[source] io::Error),
    #[error("the token is refused: {0}")]
    Token(TokenRefused),
    #[error("it is not known whose token this is")]
    Review(#[source] ReviewError),
    #[error("the pod {namespace}/{pod}, which the token is bound to, is on no node")]
    CallerUnknown { namespace: Arc<str>, pod: Arc<str> },
    #[error("{node} asks too often")]
    RateLimited { node: Arc<str> },
    #[error("there is no certificate authority yet, or its root still spreads")]
    NoAuthority,
    #[error("the state of the cluster is not known yet")]
    NotReady,
    #[error("no identity is asked for, or more than one")]
    NoIdentity,
    #[error("the identity asked for is no SPIFFE ID of a workload")]
    IdentityForm(#[source] IdentityError),
    #[error("{id} is not of the trust domain {ours}")]
    TrustDomain { id: SpiffeId, ours: TrustDomain },
    #[error("no pod on {node} has the identity {id}")]
    NotOnNode { id: SpiffeId, node: Arc<str> },
    #[error("a negative lifetime")]
    Lifetime,
    #[error("the certificate request is not acceptable")]
    Request(#[source] SignError),
    #[error("the CA cannot sign")]
    Signing(#[source] SignError),
}

impl Refusal {
    /// A short fixed name, for metric labels and tests.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::NoToken => "no_token",
            Self::WrongToken => "wrong_token",
            Self::TokenFile(_) => "token_file",
            Self::Token(refused) => refused.reason(),
            Self::Review(ReviewError::Flood) => "review_flood",
            Self::Review(ReviewError::Busy) => "review_busy",
            Self::Review(_) => "review_unanswered",
            Self::CallerUnknown { .. } => "caller_unknown",
            Self::RateLimited { .. } => "rate_limited",
            Self::NoAuthority => "no_authority",
            Self::NotReady => "not_ready",
            Self::NoIdentity => "no_identity",
            Self::IdentityForm(_) => "identity_form",
            Self::TrustDomain { .. } => "trust_domain",
            Self::NotOnNode { .. } => "not_on_node",
            Self::Lifetime => "lifetime",
            Self::Request(_) => "request",
            Self::Signing(_) => "signing",
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::NoToken | Self::WrongToken | Self::Token(_) => Code::Unauthenticated,
            Self::Review(ReviewError::Flood | ReviewError::Busy) | Self::RateLimited { .. } => Code::ResourceExhausted,
            Self::TokenFile(_) | Self::NotReady | Self::Review(_) | Self::CallerUnknown { .. } | Self::NoAuthority => {
                Code::Unavailable
            }
            Self::TrustDomain { .. } | Self::NotOnNode { .. } => Code::PermissionDenied,
            Self::NoIdentity | Self::IdentityForm(_) | Self::Lifetime | Self::Request(_) => Code::InvalidArgument,
            Self::Signing(_) => Code::Internal,
        }
    }

    /// What the node is told: enough to act on, nothing of files and causes inside the controller.
    fn status(&self) -> Status {
        match self {
            Self::Request(cause) => Status::new(self.code(), format!("{self}: {cause}")),
            Self::IdentityForm(cause) => Status::new(self.code(), format!("{self}: {cause}")),
            Self::NoToken
            | Self::WrongToken
            | Self::TokenFile(_)
            | Self::Token(_)
            | Self::Review(_)
            | Self::CallerUnknown { .. }
            | Self::RateLimited { .. }
            | Self::NoAuthority
            | Self::NotReady
            | Self::NoIdentity
            | Self::TrustDomain { .. }
            | Self::NotOnNode { .. }
            | Self::Lifetime
            | Self::Signing(_) => Status::new(self.code(), self.to_string()),
        }
    }
}

/// How many requests ended how: `issued`, or the reason of a refusal.
#[derive(Debug, Default)]
pub struct Outcomes(Mutex<BTreeMap<&'static str, u64>>);

impl Outcomes {
    fn count(&self, outcome: &'static str) {
        *self.0.lock().entry(outcome).or_default() += 1;
    }

    pub fn list(&self) -> Vec<(&'static str, u64)> {
        self.0.lock().iter().map(|(name, count)| (*name, *count)).collect()
    }
}

/// Who asks, as the connection knows it; carried beside each request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asker(pub(super) IpAddr);

/// The answering side of `CreateCertificate`.
pub(super) struct SigningService {
    pub(super) authority: Issuing,
    pub(super) callers: Arc<Callers>,
    pub(super) trust_domain: TrustDomain,
    pub(super) cluster: Cluster,
    pub(super) nodes: Mutex<Buckets<Arc<str>>>,
    /// For requests that wish none, and the most that is given.
    pub(super) default_lifetime: Duration,
    pub(super) most_lifetime: Duration,
    pub(super) outcomes: Arc<Outcomes>,
    /// Lines of the log that refusals may have, by reason.
    pub(super) quiet: Mutex<Buckets<&'static str>>,
}

impl SigningService {
    pub(super) fn node_buckets() -> Mutex<Buckets<Arc<str>>> {
        Mutex::new(Buckets::new(PER_SECOND, BURST, MOST_NODES))
    }

    pub(super) fn log_buckets() -> Mutex<Buckets<&'static str>> {
        Mutex::new(Buckets::new(LINES_PER_SECOND, LINES_BURST, MOST_NODES))
    }
}

#[tonic::async_trait]
impl IstioCertificateService for SigningService {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        let begin = Instant::now();
        let (metadata, extensions, request) = request.into_parts();
        let address = extensions.get::<Asker>().map(|asker| asker.0);
        match self.answer(&metadata, address, &request).await {
            Ok(response) => {
                self.outcomes.count("issued");
                Ok(Response::new(response))
            }
            Err((node, refusal)) => {
                self.outcomes.count(refusal.reason());
                if self.quiet.lock().take(refusal.reason(), Instant::now()) {
                    let cause = std::error::Error::source(&refusal).map(ToString::to_string);
                    let from = address.map(tracing::field::display);
                    warn!(
                        node = node.as_deref(),
                        from,
                        reason = refusal.reason(),
                        cause,
                        "{refusal}"
                    );
                }
                sleep(HELD.saturating_sub(begin.elapsed())).await;
                Err(refusal.status())
            }
        }
    }
}

impl SigningService {
    async fn answer(
        &self,
        metadata: &MetadataMap,
        address: Option<IpAddr>,
        request: &IstioCertificateRequest,
    ) -> Result<IstioCertificateResponse, (Option<Arc<str>>, Refusal)> {
        let node = self.authenticate(metadata, address).await;
        let node = node.map_err(|refusal| (None, refusal))?;
        if !self.nodes.lock().take(Arc::clone(&node), Instant::now()) {
            return Err((Some(Arc::clone(&node)), Refusal::RateLimited { node }));
        }
        let begin = Instant::now();
        loop {
            match self.issue(&node, request) {
                Ok(response) => return Ok(response),
                // A daemon may know of its pod a moment before the watch does, and would wait for its answer anyway.
                Err(Refusal::NotOnNode { .. } | Refusal::NotReady | Refusal::NoAuthority) if begin.elapsed() < HELD => {
                    sleep(GLANCE).await;
                }
                Err(refusal) => return Err((Some(node), refusal)),
            }
        }
    }

    async fn authenticate(&self, metadata: &MetadataMap, address: Option<IpAddr>) -> Result<Arc<str>, Refusal> {
        let token = bearer(metadata).ok_or(Refusal::NoToken)?;
        self.callers.node_of(token, address, &self.cluster).await
    }

    fn issue(&self, node: &Arc<str>, request: &IstioCertificateRequest) -> Result<IstioCertificateResponse, Refusal> {
        let id = requested_identity(request)?;
        may_have(&self.cluster, &self.trust_domain, node, &id)?;
        let authority = self.authority.borrow().clone().ok_or(Refusal::NoAuthority)?;
        let lifetime = match u64::try_from(request.validity_duration) {
            Ok(0) => self.default_lifetime,
            Ok(wish) => Duration::from_secs(wish),
            Err(_) => return Err(Refusal::Lifetime),
        };
        let lifetime = lifetime.min(self.most_lifetime);
        let signed = authority
            .sign(&request.csr, &id, lifetime, UnixTime::now())
            .map_err(|error| match error {
                SignError::Pem | SignError::Malformed | SignError::KeyAlgorithm | SignError::BadSignature => {
                    Refusal::Request(error)
                }
                SignError::Expired | SignError::Signing(_) => Refusal::Signing(error),
            })?;
        info!(%node, %id, serial = signed.serial, not_after = signed.not_after.as_secs(), "certificate issued");
        Ok(IstioCertificateResponse {
            cert_chain: signed.pem_with_roots(authority.bundle()),
        })
    }
}

fn bearer(metadata: &MetadataMap) -> Option<&[u8]> {
    let value = metadata.get("authorization")?.as_bytes();
    let (scheme, token) = value.split_at_checked("bearer ".len())?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| token.trim_ascii())
}

/// The identity of `ImpersonatedIdentity`, or else the one URI that the request itself names.
fn requested_identity(request: &IstioCertificateRequest) -> Result<SpiffeId, Refusal> {
    let impersonated = request
        .metadata
        .as_ref()
        .and_then(|metadata| metadata.fields.get("ImpersonatedIdentity"));
    let text = match impersonated.map(|value| &value.kind) {
        Some(Some(Kind::StringValue(id))) => id.clone(),
        Some(_) => return Err(Refusal::NoIdentity),
        None => {
            let mut uris = Authority::requested_uris(&request.csr).map_err(Refusal::Request)?;
            match (uris.pop(), uris.is_empty()) {
                (Some(id), true) => id,
                (Some(_), false) | (None, _) => return Err(Refusal::NoIdentity),
            }
        }
    };
    SpiffeId::parse(&text).map_err(Refusal::IdentityForm)
}

/// The rule: an identity of our trust domain that a pod bound to the asking node has.
fn may_have(cluster: &Cluster, trust_domain: &TrustDomain, node: &Arc<str>, id: &SpiffeId) -> Result<(), Refusal> {
    if id.trust_domain() != trust_domain.as_str() {
        return Err(Refusal::TrustDomain {
            id: id.clone(),
            ours: trust_domain.clone(),
        });
    }
    if !cluster.is_known() {
        return Err(Refusal::NotReady);
    }
    if cluster.has(node, id) {
        Ok(())
    } else {
        Err(Refusal::NotOnNode {
            id: id.clone(),
            node: node.clone(),
        })
    }
}

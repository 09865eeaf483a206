//! What is told of a connection, and under which labels: Istio's names, all of them always present.

use crate::mesh::{SpiffeId, Workload, service::ServiceKey};
use prometheus_client::encoding::{EncodeLabel, EncodeLabelSet, LabelSetEncoder};
use std::{fmt, sync::Arc};

const UNKNOWN: &str = "unknown";

/// Which end of the connection reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reporter {
    /// The client's side: the connection is outbound.
    Source,
    /// The server's side: the connection is inbound.
    Destination,
}

/// What protected the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum SecurityPolicy {
    MutualTls,
    /// Plaintext, or a refusal before anything was proved.
    Unknown,
}

/// How a connection ended, as metrics name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ResponseFlags {
    /// Nothing was wrong with it: `-`.
    None,
    /// Policy refused it, or closed it later.
    Deny,
    /// The next hop or the application could not be reached.
    Connect,
    TlsFailure,
    H2HandshakeFailure,
    /// The next hop did not answer on the HBONE port: a NetworkPolicy may be in the way.
    NetworkPolicy,
    /// There was no certificate for the source, or no identity to expect of the destination.
    IdentityError,
}

/// What is known about a connection when it opens. Metrics and access log are made of it.
#[derive(Debug, Clone)]
pub struct ConnectionFacts {
    pub reporter: Reporter,
    pub source: Option<Arc<Workload>>,
    pub destination: Option<Arc<Workload>>,
    /// The service that was dialled, if one was.
    pub service: Option<ServiceKey>,
    /// Proved by TLS in this connection; `None` otherwise, whatever the snapshot says.
    pub source_principal: Option<SpiffeId>,
    /// Proved by TLS in this connection; `None` otherwise, whatever the snapshot says.
    pub destination_principal: Option<SpiffeId>,
    pub security: SecurityPolicy,
}

impl Reporter {
    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Destination => "destination",
        }
    }

    /// The direction, as the access log writes it.
    pub fn direction(self) -> &'static str {
        match self {
            Self::Source => "outbound",
            Self::Destination => "inbound",
        }
    }
}

impl SecurityPolicy {
    pub fn name(self) -> &'static str {
        match self {
            Self::MutualTls => "mutual_tls",
            Self::Unknown => UNKNOWN,
        }
    }
}

impl ResponseFlags {
    pub const ALL: [Self; 7] = [
        Self::None,
        Self::Deny,
        Self::Connect,
        Self::TlsFailure,
        Self::H2HandshakeFailure,
        Self::NetworkPolicy,
        Self::IdentityError,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::None => "-",
            Self::Deny => "DENY",
            Self::Connect => "CONNECT",
            Self::TlsFailure => "TLS_FAILURE",
            Self::H2HandshakeFailure => "H2_HANDSHAKE_FAILURE",
            Self::NetworkPolicy => "NETWORK_POLICY",
            Self::IdentityError => "IDENTITY_ERROR",
        }
    }
}

impl fmt::Display for ResponseFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where the mesh is, as labels name it.
#[derive(Debug, Clone)]
pub struct Place {
    /// `source_cluster`, `destination_cluster`: Istio's cluster ID.
    pub cluster: Arc<str>,
    /// What follows `<service>.<namespace>.svc.` in a service's host name.
    pub domain: Arc<str>,
}

impl Default for Place {
    fn default() -> Self {
        Self {
            cluster: "Kubernetes".into(),
            domain: "cluster.local".into(),
        }
    }
}

/// One label set, without the response flags. Pods of one owner, with equal labels, share it.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Labels {
    reporter: Reporter,
    source: Party,
    service: Option<Host>,
    destination: Party,
    security: SecurityPolicy,
}

#[derive(Debug, Default, PartialEq, Eq, Hash)]
struct Party {
    workload: Option<Named>,
    principal: Option<SpiffeId>,
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Named {
    owner: Arc<str>,
    namespace: Arc<str>,
    canonical_service: Arc<str>,
    canonical_revision: Arc<str>,
    app: Arc<str>,
    version: Arc<str>,
    cluster: Arc<str>,
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Host {
    key: ServiceKey,
    name: Box<str>,
}

impl Labels {
    pub(super) fn new(facts: &ConnectionFacts, place: &Place) -> Self {
        Self {
            reporter: facts.reporter,
            source: Party::new(facts.source.as_deref(), facts.source_principal.as_ref(), place),
            service: facts.service.as_ref().map(|key| Host {
                key: key.clone(),
                name: host_name(key, &place.domain).to_string().into(),
            }),
            destination: Party::new(
                facts.destination.as_deref(),
                facts.destination_principal.as_ref(),
                place,
            ),
            security: facts.security,
        }
    }

    /// The set that stands for all those for which there is no room.
    pub(super) fn unknown(reporter: Reporter) -> Self {
        Self {
            reporter,
            source: Party::default(),
            service: None,
            destination: Party::default(),
            security: SecurityPolicy::Unknown,
        }
    }
}

impl Party {
    fn new(workload: Option<&Workload>, principal: Option<&SpiffeId>, place: &Place) -> Self {
        let named = workload.map(|w| Named {
            owner: Arc::clone(&w.owner),
            namespace: Arc::clone(&w.namespace),
            canonical_service: Arc::clone(&w.canonical_service),
            canonical_revision: Arc::clone(&w.canonical_revision),
            // Without labels of its own a pod goes by its canonical names, as with Istio's ambient data plane.
            app: w
                .label("app")
                .map_or_else(|| Arc::clone(&w.canonical_service), Arc::from),
            version: w
                .label("version")
                .map_or_else(|| Arc::clone(&w.canonical_revision), Arc::from),
            cluster: Arc::clone(&place.cluster),
        });
        Self {
            workload: named,
            principal: principal.cloned(),
        }
    }

    fn value<'a>(&'a self, of: impl FnOnce(&'a Named) -> &'a Arc<str>) -> &'a str {
        self.workload.as_ref().map_or(UNKNOWN, |w| of(w))
    }

    fn principal(&self) -> &str {
        self.principal.as_ref().map_or(UNKNOWN, SpiffeId::as_str)
    }
}

/// A service's host name, `<name>.<namespace>.svc.<domain>`.
pub(super) fn host_name(key: &ServiceKey, domain: &str) -> impl fmt::Display {
    fmt::from_fn(move |f| write!(f, "{}.{}.svc.{domain}", key.name, key.namespace))
}

/// One label set with its response flags: what a sample carries.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample<'a> {
    pub(super) labels: &'a Labels,
    pub(super) flags: ResponseFlags,
}

impl EncodeLabelSet for Sample<'_> {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        let Labels {
            reporter,
            source,
            service,
            destination,
            security,
        } = self.labels;
        let service = service.as_ref();
        for label in [
            ("reporter", reporter.name()),
            ("source_workload", source.value(|w| &w.owner)),
            ("source_canonical_service", source.value(|w| &w.canonical_service)),
            ("source_canonical_revision", source.value(|w| &w.canonical_revision)),
            ("source_workload_namespace", source.value(|w| &w.namespace)),
            ("source_principal", source.principal()),
            ("source_app", source.value(|w| &w.app)),
            ("source_version", source.value(|w| &w.version)),
            ("source_cluster", source.value(|w| &w.cluster)),
            ("destination_service", service.map_or(UNKNOWN, |s| &s.name)),
            (
                "destination_service_namespace",
                service.map_or(UNKNOWN, |s| &s.key.namespace),
            ),
            ("destination_service_name", service.map_or(UNKNOWN, |s| &s.key.name)),
            ("destination_workload", destination.value(|w| &w.owner)),
            (
                "destination_canonical_service",
                destination.value(|w| &w.canonical_service),
            ),
            (
                "destination_canonical_revision",
                destination.value(|w| &w.canonical_revision),
            ),
            ("destination_workload_namespace", destination.value(|w| &w.namespace)),
            ("destination_principal", destination.principal()),
            ("destination_app", destination.value(|w| &w.app)),
            ("destination_version", destination.value(|w| &w.version)),
            ("destination_cluster", destination.value(|w| &w.cluster)),
            ("request_protocol", "tcp"),
            ("response_flags", self.flags.name()),
            ("connection_security_policy", security.name()),
        ] {
            label.encode(encoder.encode_label())?;
        }
        Ok(())
    }
}

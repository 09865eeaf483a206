//! What Warren reads of each kind of object: the few fields that matter, taken from JSON one by one, so that a malformed
//! field elsewhere in an object changes nothing.

mod pod;
mod service;

pub(super) use pod::{Phase, Pod};
pub(super) use service::{EndpointSlice, Service};

use super::{
    enrolment::{DATAPLANE_MODE, Mode},
    field::{Field, Findings},
    problem::{Finding, Flaw},
};
use crate::mesh::service::TrafficDistribution;
use ipnet::IpNet;
use k8s_openapi::jiff::Timestamp;
use serde_json::Value;
use std::{collections::BTreeMap, fmt, sync::Arc, time::SystemTime};

const TRAFFIC_DISTRIBUTION: &str = "networking.istio.io/traffic-distribution";

/// The kinds that Warren reads. In this order: what others refer to comes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    Namespace,
    Node,
    ServiceCidr,
    AuthorizationPolicy,
    PeerAuthentication,
    Pod,
    EndpointSlice,
    Service,
}

/// What names an object for as long as the source holds it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ObjectRef {
    pub kind: Kind,
    /// Empty for Namespaces, Nodes and ServiceCIDRs.
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

/// What a document's `apiVersion` and `kind` mean to Warren.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recognized {
    Kind(Kind),
    /// A kind of ours in a version that nobody knows.
    UnknownVersion(Kind),
    /// Kubernetes' own, and of no meaning to the mesh.
    Irrelevant,
    Unknown,
}

/// `metadata`, as far as it matters.
#[derive(Debug, Clone)]
pub(super) struct Meta {
    pub(super) namespace: Arc<str>,
    pub(super) name: Arc<str>,
    pub(super) uid: Option<Arc<str>>,
    pub(super) created: Option<SystemTime>,
    pub(super) labels: BTreeMap<String, String>,
    pub(super) annotations: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Namespace {
    pub(super) mode: Option<Mode>,
    pub(super) distribution: Option<TrafficDistribution>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) region: Option<Arc<str>>,
    pub(super) zone: Option<Arc<str>>,
    pub(super) ranges: Vec<IpNet>,
}

impl Kind {
    pub fn is_cluster_scoped(self) -> bool {
        matches!(self, Self::Namespace | Self::Node | Self::ServiceCidr)
    }

    /// True for objects whose absence lets more through.
    pub fn restricts(self) -> bool {
        matches!(self, Self::AuthorizationPolicy | Self::PeerAuthentication)
    }

    pub fn word(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::ServiceCidr => "ServiceCIDR",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
            Self::PeerAuthentication => "PeerAuthentication",
            Self::Pod => "Pod",
            Self::EndpointSlice => "EndpointSlice",
            Self::Service => "Service",
        }
    }
}

impl Recognized {
    pub fn of(api_version: &str, kind: &str) -> Self {
        let (known, versions): (Kind, &[&str]) = match kind {
            "Namespace" => (Kind::Namespace, &["v1"]),
            "Node" => (Kind::Node, &["v1"]),
            "Pod" => (Kind::Pod, &["v1"]),
            // A Service of another group (Knative's, say) is another thing.
            "Service" if !api_version.contains('/') => (Kind::Service, &["v1"]),
            "EndpointSlice" => (Kind::EndpointSlice, &["discovery.k8s.io/v1"]),
            "ServiceCIDR" => (
                Kind::ServiceCidr,
                &["networking.k8s.io/v1", "networking.k8s.io/v1beta1"],
            ),
            "AuthorizationPolicy" => (
                Kind::AuthorizationPolicy,
                &["security.istio.io/v1", "security.istio.io/v1beta1"],
            ),
            "PeerAuthentication" => (
                Kind::PeerAuthentication,
                &["security.istio.io/v1", "security.istio.io/v1beta1"],
            ),
            _ => {
                return if irrelevant(api_version, kind) {
                    Self::Irrelevant
                } else {
                    Self::Unknown
                };
            }
        };
        if versions.contains(&api_version) {
            Self::Kind(known)
        } else {
            Self::UnknownVersion(known)
        }
    }
}

fn irrelevant(api_version: &str, kind: &str) -> bool {
    match api_version {
        "v1" => matches!(
            kind,
            "ServiceAccount"
                | "ConfigMap"
                | "Secret"
                | "Endpoints"
                | "Event"
                | "LimitRange"
                | "PersistentVolume"
                | "PersistentVolumeClaim"
                | "PodTemplate"
                | "ReplicationController"
                | "ResourceQuota"
        ),
        "apps/v1" => matches!(
            kind,
            "Deployment" | "ReplicaSet" | "StatefulSet" | "DaemonSet" | "ControllerRevision"
        ),
        "batch/v1" => matches!(kind, "Job" | "CronJob"),
        "networking.k8s.io/v1" => matches!(kind, "NetworkPolicy" | "Ingress" | "IngressClass" | "IPAddress"),
        "rbac.authorization.k8s.io/v1" => {
            matches!(kind, "Role" | "RoleBinding" | "ClusterRole" | "ClusterRoleBinding")
        }
        "policy/v1" => kind == "PodDisruptionBudget",
        "autoscaling/v2" => kind == "HorizontalPodAutoscaler",
        "apiextensions.k8s.io/v1" => kind == "CustomResourceDefinition",
        "scheduling.k8s.io/v1" => kind == "PriorityClass",
        "node.k8s.io/v1" => kind == "RuntimeClass",
        _ => false,
    }
}

impl Meta {
    /// # Errors
    /// An object without a legible name or namespace, or with a label that is no text: it could slip out of a selector.
    pub(super) fn read(kind: Kind, object: &Field<'_>, findings: &mut Findings) -> Result<Self, Finding> {
        let meta = object.get("metadata");
        let id = ObjectRef::of(kind, object, findings)?;
        let mut illegible = Findings::default();
        let labels = meta.get("labels").texts(&mut illegible);
        if let Some(finding) = illegible.0.pop() {
            return Err(finding);
        }
        Ok(Self {
            namespace: id.namespace,
            name: id.name,
            uid: meta
                .get("uid")
                .text(findings)
                .filter(|uid| !uid.is_empty())
                .map(Into::into),
            created: created(&meta.get("creationTimestamp"), findings),
            labels,
            annotations: meta.get("annotations").texts(findings),
        })
    }

    pub(super) fn label(&self, name: &str) -> Option<Arc<str>> {
        self.labels
            .get(name)
            .filter(|value| !value.is_empty())
            .map(|value| value.as_str().into())
    }

    pub(super) fn mode(&self, findings: &mut Findings) -> Option<Mode> {
        let text = self.labels.get(DATAPLANE_MODE)?;
        let mode = Mode::parse(text);
        if mode.is_none() {
            let flaw = Flaw::WrongValue {
                value: text.clone(),
                expected: "ambient or none; read as absent",
            };
            findings
                .0
                .push(Finding::new(format!("metadata.labels.{DATAPLANE_MODE}"), flaw));
        }
        mode
    }

    pub(super) fn distribution(&self, findings: &mut Findings) -> Option<TrafficDistribution> {
        let text = self.annotations.get(TRAFFIC_DISTRIBUTION)?;
        let distribution = distribution(text);
        if distribution.is_none() {
            let flaw = Flaw::WrongValue {
                value: text.clone(),
                expected: DISTRIBUTIONS,
            };
            findings.0.push(Finding::new(
                format!("metadata.annotations.{TRAFFIC_DISTRIBUTION}"),
                flaw,
            ));
        }
        distribution
    }
}

fn created(field: &Field<'_>, findings: &mut Findings) -> Option<SystemTime> {
    let text = field.text(findings)?;
    let time = text.parse::<Timestamp>().ok();
    if time.is_none() {
        findings.add(
            field,
            Flaw::WrongValue {
                value: text.to_owned(),
                expected: "a time like 2026-01-31T12:00:00Z",
            },
        );
    }
    time.map(SystemTime::from)
}

pub(super) const DISTRIBUTIONS: &str = "PreferClose, PreferSameZone or PreferSameNode; read as absent";

pub(super) fn distribution(text: &str) -> Option<TrafficDistribution> {
    match text {
        "PreferClose" | "PreferSameZone" => Some(TrafficDistribution::PreferSameZone),
        "PreferSameNode" => Some(TrafficDistribution::PreferSameNode),
        _ => None,
    }
}

impl Namespace {
    pub(super) fn read(meta: &Meta, findings: &mut Findings) -> Self {
        Self {
            mode: meta.mode(findings),
            distribution: meta.distribution(findings),
        }
    }
}

impl Node {
    pub(super) fn read(meta: &Meta, object: &Field<'_>, findings: &mut Findings) -> Self {
        let spec = object.get("spec");
        let mut cidrs = spec.get("podCIDRs").list(findings);
        if cidrs.is_empty() {
            cidrs.extend(Some(spec.get("podCIDR")).filter(|cidr| !cidr.is_absent()));
        }
        Self {
            region: meta.label("topology.kubernetes.io/region"),
            zone: meta.label("topology.kubernetes.io/zone"),
            ranges: ranges(&cidrs, findings),
        }
    }
}

/// The ranges of a ServiceCIDR.
pub(super) fn service_ranges(object: &Field<'_>, findings: &mut Findings) -> Vec<IpNet> {
    let cidrs = object.get("spec").get("cidrs").list(findings);
    ranges(&cidrs, findings)
}

/// A range that holds everything would make every destination one of the cluster's: it is refused.
fn ranges(cidrs: &[Field<'_>], findings: &mut Findings) -> Vec<IpNet> {
    let mut ranges = Vec::new();
    for field in cidrs {
        match field.cidr(findings) {
            Some(range) if range.prefix_len() == 0 => {
                findings.add(
                    field,
                    Flaw::WrongValue {
                        value: range.to_string(),
                        expected: "a part of the network",
                    },
                );
            }
            range => ranges.extend(range),
        }
    }
    ranges
}

/// A field that may be absent, but not illegible.
pub(super) fn legible<'a, T>(
    field: &Field<'a>,
    findings: &mut Findings,
    read: fn(&Field<'a>, &mut Findings) -> Option<T>,
) -> Result<Option<T>, Finding> {
    let value = read(field, findings);
    if value.is_none()
        && !field.is_absent()
        && let Some(finding) = findings.0.pop()
    {
        return Err(finding);
    }
    Ok(value)
}

impl ObjectRef {
    /// # Errors
    /// An object without a legible name, or with an illegible namespace.
    pub fn read(kind: Kind, value: &Value) -> Result<Self, Finding> {
        Self::of(kind, &Field::root(value), &mut Findings::default())
    }

    /// An object that names no namespace is of `default`, as for kubectl.
    fn of(kind: Kind, object: &Field<'_>, findings: &mut Findings) -> Result<Self, Finding> {
        let meta = object.get("metadata");
        let name = legible(&meta.get("name"), findings, Field::text)?.filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| Finding::new("metadata.name", Flaw::Missing))?;
        let namespace = if kind.is_cluster_scoped() {
            ""
        } else {
            let namespace = legible(&meta.get("namespace"), findings, Field::text)?;
            namespace.filter(|namespace| !namespace.is_empty()).unwrap_or("default")
        };
        Ok(Self {
            kind,
            namespace: namespace.into(),
            name: name.into(),
        })
    }
}

impl fmt::Display for ObjectRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind.word())?;
        f.write_str(" ")?;
        if !self.namespace.is_empty() {
            write!(f, "{}/", self.namespace)?;
        }
        f.write_str(&self.name)
    }
}

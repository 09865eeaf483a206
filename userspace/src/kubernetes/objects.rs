//! What Warren reads of each kind of object: the few fields that matter, taken from JSON one by one, so that a malformed
//! field elsewhere in an object changes nothing.

use super::{
    enrolment::{DATAPLANE_MODE, Mode, NETNS, REDIRECTION, SIDECAR_STATUS},
    field::{Field, Findings},
    problem::{Finding, Flaw},
};
use crate::mesh::service::{Affinity, ServiceKey, ServicePort, TrafficDistribution};
use ipnet::IpNet;
use k8s_openapi::jiff::Timestamp;
use serde_json::Value;
use std::{collections::BTreeMap, fmt, net::IpAddr, path::PathBuf, sync::Arc, time::Duration, time::SystemTime};

/// Kubernetes' default for `sessionAffinityConfig.clientIP.timeoutSeconds`.
const AFFINITY_TIMEOUT: Duration = Duration::from_secs(10_800);
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

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    /// Pending, Unknown, or a word that nobody knows.
    NotRunning,
    /// Running, or not said.
    Running,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pod {
    pub(super) uid: Option<Arc<str>>,
    pub(super) created: Option<SystemTime>,
    pub(super) labels: Arc<BTreeMap<String, String>>,
    pub(super) mode: Option<Mode>,
    /// `ambient.istio.io/redirection: enabled`.
    pub(super) redirected: bool,
    pub(super) sidecar: bool,
    pub(super) netns: Option<PathBuf>,
    pub(super) service_account: Arc<str>,
    pub(super) node: Option<Arc<str>>,
    pub(super) host_network: bool,
    pub(super) addresses: Vec<IpAddr>,
    pub(super) phase: Phase,
    pub(super) owner: Arc<str>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Service {
    pub(super) created: Option<SystemTime>,
    pub(super) vips: Vec<IpAddr>,
    pub(super) ports: Vec<ServicePort>,
    pub(super) affinity: Affinity,
    pub(super) distribution: Option<TrafficDistribution>,
    pub(super) local_only: bool,
    pub(super) publish_not_ready: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct EndpointSlice {
    pub(super) service: ServiceKey,
    /// (name, port); a missing name is the empty one, as in the Service.
    pub(super) ports: Vec<(Box<str>, Option<u16>)>,
    pub(super) endpoints: Vec<SliceEndpoint>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct SliceEndpoint {
    pub(super) address: IpAddr,
    pub(super) ready: bool,
    pub(super) node: Option<Arc<str>>,
    pub(super) zone: Option<Arc<str>>,
    /// The pod it stands for: needed for pods that share their node's address.
    pub(super) pod: Option<Arc<str>>,
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

    fn label(&self, name: &str) -> Option<Arc<str>> {
        self.labels
            .get(name)
            .filter(|value| !value.is_empty())
            .map(|value| value.as_str().into())
    }

    fn mode(&self, findings: &mut Findings) -> Option<Mode> {
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

    fn distribution(&self, findings: &mut Findings) -> Option<TrafficDistribution> {
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

const DISTRIBUTIONS: &str = "PreferClose, PreferSameZone or PreferSameNode; read as absent";

fn distribution(text: &str) -> Option<TrafficDistribution> {
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

impl Pod {
    /// `None` for a pod that has ended.
    ///
    /// # Errors
    /// A field without which it is unclear what the pod is.
    pub(super) fn read(meta: &Meta, object: &Field<'_>, findings: &mut Findings) -> Result<Option<Self>, Finding> {
        let (spec, status) = (object.get("spec"), object.get("status"));
        let phase = match status.get("phase").text(findings) {
            Some("Succeeded" | "Failed") => return Ok(None),
            Some("Running") | None => Phase::Running,
            Some(_) => Phase::NotRunning,
        };
        let host_network = legible(&spec.get("hostNetwork"), findings, Field::flag)?.unwrap_or(false);
        let account = legible(&spec.get("serviceAccountName"), findings, Field::text)?;
        let account = account.filter(|account| !account.is_empty()).unwrap_or("default");
        let mut addresses = Vec::new();
        let listed = status.get("podIPs").list(findings);
        let fields = listed.iter().map(|entry| entry.get("ip")).chain([status.get("podIP")]);
        for address in fields.filter_map(|field| field.address(findings)) {
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        if addresses.is_empty() && phase == Phase::Running {
            findings.add(&status.get("podIPs"), Flaw::NoAddress);
        }
        let owner = owner(meta, object, findings);
        Ok(Some(Self {
            uid: meta.uid.clone(),
            created: meta.created,
            mode: meta.mode(findings),
            redirected: meta
                .annotations
                .get(REDIRECTION)
                .is_some_and(|value| value == "enabled"),
            sidecar: meta.annotations.contains_key(SIDECAR_STATUS),
            netns: meta.annotations.get(NETNS).map(PathBuf::from),
            service_account: account.into(),
            node: spec
                .get("nodeName")
                .text(findings)
                .filter(|node| !node.is_empty())
                .map(Into::into),
            host_network,
            addresses,
            phase,
            owner: owner.unwrap_or_else(|| Arc::clone(&meta.name)),
            labels: Arc::new(meta.labels.clone()),
        }))
    }
}

/// A field that may be absent, but not illegible.
fn legible<'a, T>(
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

/// The name people know the workload by: the Deployment's, not its ReplicaSet's; the CronJob's, not its Job's.
fn owner(meta: &Meta, object: &Field<'_>, findings: &mut Findings) -> Option<Arc<str>> {
    let owners = object.get("metadata").get("ownerReferences").list(findings);
    let owner = owners
        .iter()
        .find(|owner| owner.get("controller").flag(findings) == Some(true))?;
    let name = owner.get("name").text(findings)?;
    let stem = match owner.get("kind").text(findings) {
        Some("ReplicaSet") => {
            let hash = meta.labels.get("pod-template-hash");
            hash.and_then(|hash| name.strip_suffix(hash.as_str()))
                .and_then(|stem| stem.strip_suffix('-'))
        }
        Some("Job") => name
            .rsplit_once('-')
            .filter(|(_, time)| (8..=10).contains(&time.len()) && time.bytes().all(|byte| byte.is_ascii_digit()))
            .map(|(stem, _)| stem),
        Some(_) | None => None,
    };
    Some(stem.filter(|stem| !stem.is_empty()).unwrap_or(name).into())
}

impl Service {
    /// `None` for one that is only a name for something outside.
    pub(super) fn read(meta: &Meta, object: &Field<'_>, findings: &mut Findings) -> Option<Self> {
        let spec = object.get("spec");
        if spec.get("type").text(findings) == Some("ExternalName") {
            return None;
        }
        let listed = spec.get("clusterIPs").list(findings);
        let mut vips = Vec::new();
        for field in listed.iter().cloned().chain([spec.get("clusterIP")]) {
            if field.is_absent() || matches!(field.text(findings), Some("None" | "")) {
                continue;
            }
            match field.address(findings) {
                Some(vip) if !vips.contains(&vip) => vips.push(vip),
                Some(_) | None => {}
            }
        }
        let mut ports = Vec::new();
        for entry in spec.get("ports").list(findings) {
            if entry.get("protocol").text(findings).unwrap_or("TCP") != "TCP" {
                continue;
            }
            let field = entry.get("port");
            if field.is_absent() {
                findings.add(&field, Flaw::Missing);
            }
            if let Some(port) = field.port(findings) {
                let name = entry
                    .get("name")
                    .text(findings)
                    .filter(|name| !name.is_empty())
                    .map(Into::into);
                ports.push(ServicePort { name, port });
            }
        }
        let affinity = match spec.get("sessionAffinity").text(findings) {
            Some("ClientIP") => {
                let seconds = object
                    .get("spec")
                    .get("sessionAffinityConfig")
                    .get("clientIP")
                    .get("timeoutSeconds");
                let timeout = seconds.number(findings).map_or(AFFINITY_TIMEOUT, Duration::from_secs);
                Affinity::ClientIp { timeout }
            }
            Some("None") | None => Affinity::None,
            Some(other) => {
                let flaw = Flaw::WrongValue {
                    value: other.to_owned(),
                    expected: "ClientIP or None; read as None",
                };
                findings.add(&spec.get("sessionAffinity"), flaw);
                Affinity::None
            }
        };
        let field = spec.get("trafficDistribution");
        let own = field.text(findings).and_then(|text| {
            let distribution = distribution(text);
            if distribution.is_none() {
                findings.add(
                    &field,
                    Flaw::WrongValue {
                        value: text.to_owned(),
                        expected: DISTRIBUTIONS,
                    },
                );
            }
            distribution
        });
        Some(Self {
            created: meta.created,
            vips,
            ports,
            affinity,
            distribution: own.or_else(|| meta.distribution(findings)),
            local_only: spec.get("internalTrafficPolicy").text(findings) == Some("Local"),
            publish_not_ready: spec.get("publishNotReadyAddresses").flag(findings).unwrap_or(false),
        })
    }
}

impl EndpointSlice {
    /// `None` for a slice of host names.
    ///
    /// # Errors
    /// A slice that does not say which service it belongs to.
    pub(super) fn read(meta: &Meta, object: &Field<'_>, findings: &mut Findings) -> Result<Option<Self>, Finding> {
        if object.get("addressType").text(findings) == Some("FQDN") {
            return Ok(None);
        }
        let Some(service) = meta.label("kubernetes.io/service-name") else {
            return Err(Finding::new(
                "metadata.labels.kubernetes.io/service-name",
                Flaw::Missing,
            ));
        };
        let mut ports = Vec::new();
        for entry in object.get("ports").list(findings) {
            if entry.get("protocol").text(findings).unwrap_or("TCP") == "TCP" {
                let port = entry.get("port");
                let number = port.port(findings);
                if number.is_some() || port.is_absent() {
                    ports.push((entry.get("name").text(findings).unwrap_or_default().into(), number));
                }
            }
        }
        let mut endpoints = Vec::new();
        for entry in object.get("endpoints").list(findings) {
            // All addresses of an endpoint are the same pod's; consumers take the first.
            let Some(address) = entry
                .get("addresses")
                .list(findings)
                .first()
                .and_then(|first| first.address(findings))
            else {
                if entry.get("addresses").is_absent() {
                    findings.add(&entry.get("addresses"), Flaw::Missing);
                }
                continue;
            };
            let target = entry.get("targetRef");
            let is_pod = target.get("kind").text(findings).unwrap_or("Pod") == "Pod";
            endpoints.push(SliceEndpoint {
                address,
                ready: entry.get("conditions").get("ready").flag(findings).unwrap_or(true),
                node: entry.get("nodeName").text(findings).map(Into::into),
                zone: entry.get("zone").text(findings).map(Into::into),
                pod: target.get("name").text(findings).filter(|_| is_pod).map(Into::into),
            });
        }
        Ok(Some(Self {
            service: ServiceKey {
                namespace: Arc::clone(&meta.namespace),
                name: service,
            },
            ports,
            endpoints,
        }))
    }
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

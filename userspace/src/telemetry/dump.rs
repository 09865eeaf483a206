//! What a running daemon tells of itself in `/config_dump`, as the words that both the daemon and the commands read.
//! Names of fields are ztunnel's where it has them. No secrets: keys never come near it.

use super::labels::host_name;
use crate::mesh::{
    MeshSnapshot, Workload as MeshWorkload,
    policy::{Action, Authorization, MutualTls, PeerAuth},
    service::Service as MeshService,
    workload::Protocol,
};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    time::SystemTime,
};

/// Everything, or the sections that were asked for; the others are empty.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Dump {
    pub version: Version,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub workloads: Vec<Workload>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub services: Vec<Service>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub policies: Vec<Policy>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub certificates: Vec<Certificate>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub captured_pods: Vec<CapturedPod>,
    /// Decisions of the kernel programs since they were loaded.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub kernel_counters: Vec<KernelCounter>,
    /// Objects that could not be understood.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<Problem>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub connections: Vec<Connection>,
    /// The latest snapshots, from the oldest to the newest.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub publications: Vec<Publication>,
}

/// A part of the dump that can be asked for alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Section {
    Workloads,
    Services,
    Policies,
    Certificates,
    CapturedPods,
    KernelCounters,
    Problems,
    Connections,
    Publications,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Version {
    /// The binary's version.
    pub warren: String,
    pub node: String,
    /// Number of the published snapshot; 0 before the first.
    pub snapshot: u64,
    /// Where the objects come from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_server: Option<ApiServer>,
}

/// What has passed between the daemon and the API server.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ApiServer {
    /// Since it last told anything about the kind that it has been silent about for longest; below 40 s while it is there.
    pub silent_seconds: Option<u64>,
    /// That kind.
    pub silent_about: Option<String>,
    pub requests: u64,
    pub failures: u64,
    pub bytes: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Workload {
    pub uid: String,
    pub name: String,
    pub namespace: String,
    pub workload_ips: Vec<IpAddr>,
    pub node: Option<String>,
    pub waypoint: Option<String>,
    /// `HBONE` or `TCP`.
    pub protocol: String,
    pub identity: String,
    pub workload_name: String,
    pub canonical_name: String,
    pub canonical_revision: String,
    pub enrolled: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Service {
    pub name: String,
    pub namespace: String,
    pub hostname: String,
    pub vips: Vec<IpAddr>,
    pub ports: Vec<u16>,
    pub waypoint: Option<String>,
    pub endpoints: Vec<Endpoint>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Endpoint {
    pub address: IpAddr,
    pub workload_uid: Option<String>,
    pub ready: bool,
    /// (service port, target port)
    pub ports: Vec<(u16, u16)>,
}

/// An AuthorizationPolicy or a PeerAuthentication.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Policy {
    pub kind: String,
    pub name: String,
    pub namespace: String,
    /// `Allow`, `Deny` …; of a PeerAuthentication its mode: `Strict`, `Permissive`, `Unset`.
    pub action: String,
    /// `Global`, `Namespace`, `WorkloadSelector`, `Waypoint`.
    pub scope: String,
    pub dry_run: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Certificate {
    /// The SPIFFE ID, or a root's subject.
    pub name: String,
    /// `Leaf` or `Root`.
    #[serde(rename = "type")]
    pub kind: String,
    /// `Available`, or what stands in the way.
    pub status: String,
    pub valid: bool,
    pub serial_number: Option<String>,
    /// `2024-08-21T15:32:05Z`; see [`moment`].
    pub not_before: Option<String>,
    pub not_after: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct CapturedPod {
    pub uid: String,
    pub name: String,
    pub namespace: String,
    /// `captured`, or why it is not.
    pub state: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KernelCounter {
    pub reason: String,
    pub count: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Problem {
    /// File and line, where there is one.
    pub origin: Option<String>,
    /// `kind namespace/name`, where the text says so.
    pub object: Option<String>,
    pub field: String,
    pub problem: String,
    pub advice: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Connection {
    /// `namespace/pod` of the captured pod.
    pub workload: String,
    /// `Inbound` or `Outbound`.
    pub direction: String,
    pub local: SocketAddr,
    pub remote: SocketAddr,
    /// The service or the pod that was meant, where it is not the remote itself.
    pub remote_target: Option<String>,
    /// `HBONE` or `TCP`.
    pub protocol: String,
}

/// How far a snapshot reaches into the changes of the API server's objects.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Publication {
    pub snapshot: u64,
    /// Unix time in microseconds.
    pub published_at: u64,
    /// By kind the newest `metadata.resourceVersion` that it takes into account.
    pub reach: BTreeMap<String, u64>,
}

impl Section {
    pub const ALL: [Self; 9] = [
        Self::Workloads,
        Self::Services,
        Self::Policies,
        Self::Certificates,
        Self::CapturedPods,
        Self::KernelCounters,
        Self::Problems,
        Self::Connections,
        Self::Publications,
    ];

    /// The key in the JSON, and the word in `/config_dump?section=`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Workloads => "workloads",
            Self::Services => "services",
            Self::Policies => "policies",
            Self::Certificates => "certificates",
            Self::CapturedPods => "capturedPods",
            Self::KernelCounters => "kernelCounters",
            Self::Problems => "problems",
            Self::Connections => "connections",
            Self::Publications => "publications",
        }
    }
}

/// A time as a dump has it: UTC, whole seconds.
pub fn moment(time: SystemTime) -> String {
    let mut text = Vec::new();
    super::text::time_stamp(time, &mut text);
    text.truncate("2024-08-21T15:32:05".len());
    text.push(b'Z');
    String::from_utf8_lossy(&text).into_owned()
}

/// The workloads of a snapshot, by namespace and name.
pub fn workloads(snapshot: &MeshSnapshot) -> Vec<Workload> {
    let mut all: Vec<Workload> = snapshot.workloads.values().map(|w| workload(w)).collect();
    all.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    all
}

fn workload(workload: &MeshWorkload) -> Workload {
    Workload {
        uid: workload.uid.to_string(),
        name: workload.name.to_string(),
        namespace: workload.namespace.to_string(),
        workload_ips: workload.addresses.clone(),
        node: workload.locality.node.as_deref().map(str::to_owned),
        waypoint: None,
        protocol: match workload.protocol {
            Protocol::Hbone => "HBONE",
            Protocol::Tcp => "TCP",
        }
        .to_owned(),
        identity: workload.identity.to_string(),
        workload_name: workload.owner.to_string(),
        canonical_name: workload.canonical_service.to_string(),
        canonical_revision: workload.canonical_revision.to_string(),
        enrolled: workload.enrolled,
    }
}

/// The services of a snapshot, by namespace and name. `domain` is the cluster's DNS domain.
pub fn services(snapshot: &MeshSnapshot, domain: &str) -> Vec<Service> {
    let mut all: Vec<Service> = snapshot.services.values().map(|s| service(s, domain)).collect();
    all.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    all
}

fn service(service: &MeshService, domain: &str) -> Service {
    let endpoints = service.endpoints.iter().map(|e| Endpoint {
        address: e.address,
        workload_uid: e.workload.as_ref().map(ToString::to_string),
        ready: e.ready,
        ports: e.ports.clone(),
    });
    Service {
        name: service.key.name.to_string(),
        namespace: service.key.namespace.to_string(),
        hostname: host_name(&service.key, domain).to_string(),
        vips: service.vips.clone(),
        ports: service.ports.iter().map(|p| p.port).collect(),
        waypoint: None,
        endpoints: endpoints.collect(),
    }
}

/// The policies of a snapshot, by namespace and name.
pub fn policies(snapshot: &MeshSnapshot) -> Vec<Policy> {
    let root = &*snapshot.root_namespace;
    let authorizations = snapshot.authorizations.values().map(|p| authorization(p, root));
    let peer_auths = snapshot.peer_auths.values().map(|p| peer_auth(p, root));
    let mut all: Vec<Policy> = authorizations.chain(peer_auths).collect();
    all.sort_by(|a, b| (&a.namespace, &a.name, &a.kind).cmp(&(&b.namespace, &b.name, &b.kind)));
    all
}

fn authorization(policy: &Authorization, root: &str) -> Policy {
    Policy {
        kind: "AuthorizationPolicy".to_owned(),
        name: policy.name.to_string(),
        namespace: policy.namespace.to_string(),
        action: match policy.action {
            Action::Allow => "Allow",
            Action::Deny => "Deny",
            Action::Audit => "Audit",
            Action::Custom => "Custom",
        }
        .to_owned(),
        scope: policy.scope.word(&policy.namespace, root).to_owned(),
        dry_run: policy.dry_run,
    }
}

fn peer_auth(policy: &PeerAuth, root: &str) -> Policy {
    Policy {
        kind: "PeerAuthentication".to_owned(),
        name: policy.name.to_string(),
        namespace: policy.namespace.to_string(),
        action: match policy.mode {
            Some(MutualTls::Strict) => "Strict",
            Some(MutualTls::Permissive) => "Permissive",
            None => "Unset",
        }
        .to_owned(),
        scope: policy.scope.word(&policy.namespace, root).to_owned(),
        dry_run: false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::testing;

    #[test]
    fn a_moment_is_utc_in_whole_seconds() {
        assert_eq!(moment(*testing::NOW), "2024-08-21T15:32:05Z");
    }

    #[test]
    fn each_section_is_a_key_of_the_dump() {
        let dump = Dump {
            workloads: vec![workload(&testing::workload("uid-1", "a", "a", &[]))],
            services: vec![Service {
                name: "s".into(),
                namespace: "n".into(),
                hostname: "s.n.svc.cluster.local".into(),
                vips: Vec::new(),
                ports: Vec::new(),
                waypoint: None,
                endpoints: Vec::new(),
            }],
            policies: vec![peer_auth(&PeerAuth::unreadable("n".into(), "p".into()), "istio-system")],
            certificates: vec![Certificate {
                name: "c".into(),
                kind: "Root".into(),
                status: "Available".into(),
                valid: true,
                serial_number: None,
                not_before: None,
                not_after: None,
            }],
            captured_pods: vec![CapturedPod {
                uid: "u".into(),
                name: "p".into(),
                namespace: "n".into(),
                state: "captured".into(),
            }],
            kernel_counters: vec![KernelCounter {
                reason: "steer".into(),
                count: 1,
            }],
            problems: vec![Problem {
                origin: None,
                object: None,
                field: String::new(),
                problem: "is missing".into(),
                advice: String::new(),
            }],
            connections: vec![Connection {
                workload: "n/p".into(),
                direction: "Inbound".into(),
                local: "10.0.0.1:80".parse().unwrap(),
                remote: "10.0.0.2:80".parse().unwrap(),
                remote_target: None,
                protocol: "HBONE".into(),
            }],
            publications: vec![Publication {
                snapshot: 7,
                published_at: 1,
                reach: BTreeMap::new(),
            }],
            ..Dump::default()
        };
        let json = serde_json::to_value(&dump).unwrap();
        for section in Section::ALL {
            assert!(
                json.get(section.name()).is_some(),
                "{} is not in {json}",
                section.name()
            );
        }
        assert_eq!(serde_json::from_value::<Dump>(json).unwrap(), dump);
    }
}

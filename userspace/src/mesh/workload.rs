//! A workload: a pod with an identity, as the mesh sees it.

use super::SpiffeId;
use std::{collections::BTreeMap, fmt, net::IpAddr, path::PathBuf, sync::Arc};

/// What names a workload for as long as it lives: the pod's Kubernetes UID, or `namespace/name` where it has none.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct WorkloadUid(pub Arc<str>);

impl fmt::Display for WorkloadUid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// How a workload is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    /// In the mesh: HBONE on port 15008 of its address.
    Hbone,
    /// Outside the mesh: unchanged.
    Tcp,
}

/// Where a workload runs; `None` where the node does not say.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Locality {
    pub region: Option<Arc<str>>,
    pub zone: Option<Arc<str>>,
    pub node: Option<Arc<str>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Workload {
    pub uid: WorkloadUid,
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub identity: SpiffeId,
    /// `status.podIPs`, canonical (never v4-mapped). Never empty.
    pub addresses: Vec<IpAddr>,
    pub locality: Locality,
    pub labels: Arc<BTreeMap<String, String>>,
    /// The owner's name (the Deployment, not its ReplicaSet), else the pod's own.
    pub owner: Arc<str>,
    pub canonical_service: Arc<str>,
    pub canonical_revision: Arc<str>,
    pub protocol: Protocol,
    pub host_network: bool,
    /// The wish: labels say that its own node should capture it.
    pub enrolled: bool,
    /// Where the pod's network namespace is mounted: a manifest's word, or what the container runtime said to the CNI plugin.
    pub netns: Option<PathBuf>,
    /// `spec.runtimeClassName`.
    pub runtime_class: Option<Arc<str>>,
}

impl Workload {
    /// The workload's address of the same family as `like`, if it has one.
    pub fn address_like(&self, like: IpAddr) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|a| a.is_ipv4() == like.is_ipv4())
    }

    /// `app` and `version` labels, as metrics name them.
    pub fn label(&self, name: &str) -> Option<&str> {
        self.labels.get(name).map(String::as_str)
    }
}

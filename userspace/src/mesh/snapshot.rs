//! One immutable picture of the mesh, built by the index and read by everyone. Cheap to clone and to patch: its maps
//! share what did not change.

use super::{
    Workload, WorkloadUid,
    policy::{Authorization, PeerAuth},
    service::{Service, ServiceKey},
};
use imbl::HashMap;
use ipnet::IpNet;
use std::{net::IpAddr, sync::Arc};

#[derive(Debug, Clone, Default)]
pub struct MeshSnapshot {
    pub workloads: HashMap<WorkloadUid, Arc<Workload>>,
    pub by_address: HashMap<IpAddr, WorkloadUid>,
    pub services: HashMap<ServiceKey, Arc<Service>>,
    pub by_vip: HashMap<IpAddr, ServiceKey>,
    /// By `namespace/name`.
    pub authorizations: HashMap<Arc<str>, Arc<Authorization>>,
    /// By `namespace/name`.
    pub peer_auths: HashMap<Arc<str>, Arc<PeerAuth>>,
    /// The cluster's pod and service ranges.
    pub ranges: Vec<IpNet>,
    /// Where mesh-wide policies live (`istio-system`).
    pub root_namespace: Arc<str>,
    /// Counts publications; two snapshots with the same number are the same.
    pub version: u64,
}

impl MeshSnapshot {
    pub fn workload_at(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.workloads.get(self.by_address.get(&address.to_canonical())?)
    }

    pub fn service_at(&self, vip: IpAddr) -> Option<&Arc<Service>> {
        self.services.get(self.by_vip.get(&vip.to_canonical())?)
    }
}

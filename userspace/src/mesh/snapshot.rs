//! One immutable picture of the mesh, built by the index and read by everyone. Cheap to clone and to patch: its maps
//! share what did not change, and `OrdMap::diff` between two snapshots visits only what did.

use super::{
    Workload, WorkloadUid,
    policy::{Authorization, PeerAuth, Policies},
    service::{Service, ServiceKey},
};
use imbl::OrdMap;
use ipnet::IpNet;
use std::{net::IpAddr, sync::Arc};

#[derive(Debug, Clone, Default)]
pub struct MeshSnapshot {
    /// Every pod that runs and has an address, in the mesh or not.
    pub workloads: OrdMap<WorkloadUid, Arc<Workload>>,
    /// Who has an address. Pods on the host's network share the node's: one of them stands for all (`workload_at`).
    pub by_address: OrdMap<IpAddr, WorkloadUid>,
    pub services: OrdMap<ServiceKey, Arc<Service>>,
    pub by_vip: OrdMap<IpAddr, ServiceKey>,
    pub authorizations: Policies<Authorization>,
    pub peer_auths: Policies<PeerAuth>,
    /// The cluster's pod and service ranges, none inside another.
    pub ranges: Vec<IpNet>,
    /// Where mesh-wide policies live (`istio-system`).
    pub root_namespace: Arc<str>,
    /// Counts publications; two snapshots with the same number are the same.
    pub version: u64,
}

impl MeshSnapshot {
    /// The workload that alone has this address: never one on its host's network.
    pub fn workload_at(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.workloads
            .get(self.by_address.get(&address.to_canonical())?)
            .filter(|workload| !workload.host_network)
    }

    pub fn service_at(&self, vip: IpAddr) -> Option<&Arc<Service>> {
        self.services.get(self.by_vip.get(&vip.to_canonical())?)
    }

    /// True if a pod has this address, its own or its host's.
    pub fn knows(&self, address: IpAddr) -> bool {
        self.by_address.contains_key(&address.to_canonical())
    }

    pub fn in_ranges(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.ranges.iter().any(|range| range.contains(&address))
    }
}

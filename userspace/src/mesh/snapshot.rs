//! One immutable picture of the mesh, built by the index and read by everyone. Cheap to clone and to patch: its maps
//! share what did not change, and `SharedMap::diff` between two snapshots visits only what did. Who reads every snapshot
//! reads what changed, or `own`; a walk over all workloads is for those whom a person asked.

use super::{
    SharedMap, Workload, WorkloadUid,
    policy::{Authorization, PeerAuth, Policies},
    service::{Service, ServiceKey},
};
use ipnet::IpNet;
use std::{net::IpAddr, sync::Arc};

#[derive(Debug, Clone, Default)]
pub struct MeshSnapshot {
    /// Every pod that runs and has an address, in the mesh or not.
    pub workloads: SharedMap<WorkloadUid, Arc<Workload>>,
    /// Those of them that run on `node`.
    pub own: SharedMap<WorkloadUid, Arc<Workload>>,
    /// The node that this picture is for; `None` where it is for none.
    pub node: Option<Arc<str>>,
    /// Who has an address. Pods on the host's network share the node's: one of them stands for all (`workload_at`).
    pub by_address: SharedMap<IpAddr, WorkloadUid>,
    pub services: SharedMap<ServiceKey, Arc<Service>>,
    pub by_vip: SharedMap<IpAddr, ServiceKey>,
    pub authorizations: Policies<Authorization>,
    pub peer_auths: Policies<PeerAuth>,
    /// The cluster's pod and service ranges, none inside another.
    pub ranges: Arc<[IpNet]>,
    /// Where mesh-wide policies live (`istio-system`).
    pub root_namespace: Arc<str>,
    /// Counts publications; two snapshots with the same number are the same.
    pub version: u64,
}

impl MeshSnapshot {
    /// Takes the place of the workload with its UID. Who has its addresses is another matter.
    pub fn set_workload(&mut self, workload: Arc<Workload>) {
        let uid = workload.uid.clone();
        if self.node.is_some() && workload.locality.node == self.node {
            self.own.insert(uid.clone(), Arc::clone(&workload));
        } else {
            self.own.remove(&uid);
        }
        self.workloads.insert(uid, workload);
    }

    pub fn remove_workload(&mut self, uid: &WorkloadUid) -> Option<Arc<Workload>> {
        self.own.remove(uid);
        self.workloads.remove(uid)
    }

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

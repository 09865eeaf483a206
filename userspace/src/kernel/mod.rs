//! Linux below us: programs, maps, links, pins, routes. What is written here outlives the daemon: everything is pinned,
//! and the next daemon adopts it.
//!
//! Every call blocks for as long as its system calls take: microseconds for a map, some milliseconds to attach a pod.

mod config;
mod error;

use crate::net::{Namespace, PodListeners};
use ipnet::IpNet;
use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
};

pub use config::{KernelConfig, Sizes, Tcx};
pub use error::{AttachError, MapError, OpenError};
pub use warren_common::{
    Family, PlaintextMode, PodNumber, Reason, Role,
    tables::{ServiceEntry, WorkloadEntry},
};

/// The kernel programs and their maps, open. Shared by reference: every method takes `&self`.
#[derive(Debug)]
pub struct Kernel {}

/// What a pod does with plaintext that arrives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodPolicy {
    pub mode: PlaintextMode,
    /// A policy selects the workload: with the daemon dead, nobody can say who may call.
    pub restricted: bool,
    /// Ports whose mode differs from `mode`.
    pub port_modes: Vec<(u16, PlaintextMode)>,
}

/// A pod that an earlier daemon captured, and that is still steered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdoptedPod {
    pub number: PodNumber,
    /// The cookie of its namespace.
    pub cookie: u64,
    /// The inode of its namespace; reused by the kernel once the namespace is gone.
    pub inode: u32,
}

/// How many entries a call wrote; 0 and 0 if the map said it already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Changes {
    pub written: usize,
    pub removed: usize,
}

/// A map that is too small for what the cluster holds, and how often that was met since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FullMap {
    pub map: &'static str,
    pub refused: u64,
}

/// Whole-cluster state. Each `sync_*` takes everything that should be in the map and writes the differences. If the map
/// is full, what fits is written and the error names the map: destinations that are missing fall to the ranges and are
/// steered, so a full map costs speed, never safety.
impl Kernel {
    /// Loads the programs, or replaces those that an earlier daemon left behind, and attaches what belongs to the node.
    pub fn open(_config: &KernelConfig) -> Result<Self, OpenError> {
        todo!()
    }

    /// Says which namespace and addresses are the node's own.
    pub fn set_node(&self, _namespace: &Namespace, _addresses: &BTreeSet<IpAddr>) -> Result<(), MapError> {
        todo!()
    }

    /// Every pod of the cluster, in the mesh or not.
    pub fn sync_workloads(&self, _wanted: &HashMap<IpAddr, WorkloadEntry>) -> Result<Changes, MapError> {
        todo!()
    }

    pub fn upsert_workload(&self, _address: IpAddr, _entry: WorkloadEntry) -> Result<(), MapError> {
        todo!()
    }

    pub fn remove_workload(&self, _address: IpAddr) -> Result<(), MapError> {
        todo!()
    }

    /// Every service, by VIP and port.
    pub fn sync_services(&self, _wanted: &HashMap<(IpAddr, u16), ServiceEntry>) -> Result<Changes, MapError> {
        todo!()
    }

    /// The cluster's pod and service ranges.
    pub fn sync_ranges(&self, _wanted: &BTreeSet<IpNet>) -> Result<Changes, MapError> {
        todo!()
    }

    /// What the programs decided since they were first loaded, by reason.
    pub fn counters(&self) -> Vec<(Reason, u64)> {
        todo!()
    }

    pub fn full_maps(&self) -> Vec<FullMap> {
        todo!()
    }
}

/// One pod. To capture: `number_for`, `set_policy`, `set_addresses`, `set_listeners`, `attach_pod`, then (with its routes
/// in place) `steer`. To release: `stop_steering`, drain, remove the routes, `detach_pod`.
impl Kernel {
    /// The number of the pod with this namespace cookie: the one it has, or a free one. Taken until `detach_pod`.
    pub fn number_for(&self, _cookie: u64) -> Result<PodNumber, MapError> {
        todo!()
    }

    pub fn set_policy(&self, _pod: PodNumber, _policy: &PodPolicy) -> Result<(), MapError> {
        todo!()
    }

    /// Every address that the pod's namespace has, loopback apart.
    pub fn set_addresses(&self, _pod: PodNumber, _addresses: &BTreeSet<IpAddr>) -> Result<(), MapError> {
        todo!()
    }

    /// From here on these sockets get what arrives, and connections are steered rather than refused.
    pub fn set_listeners(&self, _pod: PodNumber, _listeners: &PodListeners) -> Result<(), MapError> {
        todo!()
    }

    /// Attaches the arrival program to the namespace and the guard to each of its interfaces but `lo`; replaces those of
    /// an earlier daemon without a gap. On an error nothing stays attached that was not before.
    pub fn attach_pod(&self, _pod: PodNumber, _namespace: &Namespace) -> Result<(), AttachError> {
        todo!()
    }

    /// Attaches the guard to an interface that appeared later. Does nothing if it is there already.
    pub fn guard_interface(
        &self,
        _pod: PodNumber,
        _namespace: &Namespace,
        _interface: &str,
    ) -> Result<(), AttachError> {
        todo!()
    }

    /// From here on new connections of the pod are steered or refused.
    pub fn steer(&self, _pod: PodNumber, _cookie: u64) -> Result<(), MapError> {
        todo!()
    }

    /// From here on new connections of the pod are left alone, and what arrives passes where the daemon no longer listens.
    pub fn stop_steering(&self, _pod: PodNumber) -> Result<(), MapError> {
        todo!()
    }

    /// Detaches the programs, forgets the pod and frees its number. `None` if the namespace is gone.
    pub fn detach_pod(&self, _pod: PodNumber, _namespace: Option<&Namespace>) -> Result<(), AttachError> {
        todo!()
    }

    /// The pods found steered when the state was opened. Until `set_listeners` their mesh connections are refused.
    pub fn adopted_pods(&self) -> Vec<AdoptedPod> {
        todo!()
    }
}

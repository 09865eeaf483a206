//! Linux below us: programs, maps, links, pins, routes. What is written here outlives the daemon: everything is pinned,
//! and the next daemon adopts it.
//!
//! Every call blocks for as long as its system calls take: microseconds for a map, some milliseconds to attach a pod.

mod cgroup;
mod clsact;
mod config;
mod error;
mod guard;
pub mod interfaces;
mod mirror;
mod mounts;
mod netlink;
mod open;
mod pins;
mod pod;
mod programs;
pub mod routes;
mod shared;
pub mod sockets;
mod sys;
pub mod sysctls;
mod tables;
mod trace;
pub mod watch;

use crate::net::{self, Namespace, PodListeners};
use cgroup::Cgroup;
use ipnet::IpNet;
use mirror::Prefix;
use parking_lot::Mutex;
use pins::Pins;
use programs::Loading;
use socket2::SockRef;
use std::{
    collections::{BTreeSet, HashMap},
    net::{IpAddr, TcpListener},
};
use tables::{ClusterTables, Counters, PodTables};
use warren_common::{
    Address, PodSettings, Ports,
    tables::{Cookie, NodeFacts, PortKey, Present, ServiceKey},
};

pub use cgroup::kubepods_folders;
pub use config::{KernelConfig, Sizes, Tcx};
pub use error::{AttachError, MapError, OpenError};
pub use netlink::NetlinkError;
pub use trace::TraceLog;
pub use warren_common::{
    Family, PlaintextMode, PodNumber, Reason, Role,
    tables::{ServiceEntry, WorkloadEntry},
};

/// The kernel programs and their maps, open. Shared by reference: every method takes `&self`.
pub struct Kernel {
    pins: Pins,
    loading: Loading,
    /// True if the kernel has links for the guard, and they are to be used.
    tcx: bool,
    kubepods: Option<u64>,
    guard_id: u32,
    ebpf: Mutex<aya::Ebpf>,
    cluster: Mutex<ClusterTables>,
    pods: Mutex<PodTables>,
    counters: Counters,
    cgroup: Cgroup,
    found: Mutex<Found>,
}

/// What was there when the state was opened.
#[derive(Debug)]
struct Found {
    adopted: Vec<AdoptedPod>,
    unfinished: Vec<u32>,
}

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
    /// The cookie of its namespace. Never reused.
    pub cookie: u64,
    /// The inode of its namespace; 0 if somebody has removed its arrival program.
    pub inode: u32,
}

/// How many entries a call wrote; 0 and 0 if the map said it already.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Changes {
    pub written: usize,
    pub removed: usize,
}

/// A map that is too small for what the cluster holds, and how many entries have found no room since the start.
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
    pub fn open(config: &KernelConfig) -> Result<Self, OpenError> {
        open::open(config)
    }

    /// As [`Kernel::open`], after another daemon had the pinned state for a while: what is in the maps is read anew, and our
    /// programs take the place of its. Nothing else may be under way.
    pub fn readopt(&self) -> Result<(), OpenError> {
        open::readopt(self)
    }

    /// Says which namespace and addresses are the node's own.
    pub fn set_node(&self, namespace: &Namespace, addresses: &BTreeSet<IpAddr>) -> Result<(), MapError> {
        let mut pods = self.pods.lock();
        pods.set_addresses(PodNumber::NODE, addresses)?;
        pods.set_node(NodeFacts::new(namespace.cookie(), self.kubepods))
    }

    /// False if no cgroup of kubelet's was found: then a hostNetwork pod counts as the node itself.
    pub fn knows_kubepods(&self) -> bool {
        self.kubepods.is_some()
    }

    /// Every pod of the cluster, in the mesh or not.
    pub fn sync_workloads(&self, wanted: &HashMap<IpAddr, WorkloadEntry>) -> Result<Changes, MapError> {
        let wanted = wanted
            .iter()
            .map(|(address, entry)| (Address::from(*address), *entry))
            .collect();
        self.cluster.lock().workloads.sync(&wanted, |_| true)
    }

    pub fn upsert_workload(&self, address: IpAddr, entry: WorkloadEntry) -> Result<(), MapError> {
        self.cluster.lock().workloads.put(address.into(), entry).map(drop)
    }

    pub fn remove_workload(&self, address: IpAddr) -> Result<(), MapError> {
        self.cluster.lock().workloads.take(&address.into()).map(drop)
    }

    /// Every service, by VIP and port.
    pub fn sync_services(&self, wanted: &HashMap<(IpAddr, u16), ServiceEntry>) -> Result<Changes, MapError> {
        let wanted = wanted
            .iter()
            .map(|((vip, port), entry)| (ServiceKey::new((*vip).into(), *port), *entry))
            .collect();
        self.cluster.lock().services.sync(&wanted, |_| true)
    }

    pub fn upsert_service(&self, (vip, port): (IpAddr, u16), entry: ServiceEntry) -> Result<(), MapError> {
        let key = ServiceKey::new(vip.into(), port);
        self.cluster.lock().services.put(key, entry).map(drop)
    }

    pub fn remove_service(&self, (vip, port): (IpAddr, u16)) -> Result<(), MapError> {
        let key = ServiceKey::new(vip.into(), port);
        self.cluster.lock().services.take(&key).map(drop)
    }

    /// The cluster's pod and service ranges.
    pub fn sync_ranges(&self, wanted: &BTreeSet<IpNet>) -> Result<Changes, MapError> {
        let wanted = wanted.iter().map(|range| (prefix(range), Present::default())).collect();
        self.cluster.lock().ranges.sync(&wanted, |_| true)
    }

    /// What the programs decided since they were first loaded, by reason.
    pub fn counters(&self) -> Result<Vec<(Reason, u64)>, MapError> {
        self.counters.read()
    }

    pub fn full_maps(&self) -> Vec<FullMap> {
        let mut full: Vec<_> = self.cluster.lock().full().collect();
        full.extend(self.pods.lock().full());
        full
    }
}

/// One pod. To capture: `number_for`, `set_policy`, `set_addresses`, `set_listeners`, `guard_pod`, then (with its routes in
/// place) `attach_pod` and `steer`. To release: `stop_steering`, drain, remove the routes, `detach_pod`.
impl Kernel {
    /// The number of the pod with this namespace cookie: the one it has, or a free one. Taken until `detach_pod`.
    pub fn number_for(&self, cookie: u64) -> Result<PodNumber, MapError> {
        self.pods.lock().number_for(cookie)
    }

    /// If there is no room for the ports' modes the pod is STRICT as a whole, besides the error.
    pub fn set_policy(&self, pod: PodNumber, policy: &PodPolicy) -> Result<(), MapError> {
        let mut pods = self.pods.lock();
        let ports = pods.numbered(pod)?.settings.ports();
        let modes = policy
            .port_modes
            .iter()
            .map(|(port, mode)| (PortKey::new(pod, *port), (*mode).into()))
            .collect();
        let written = pods.set_port_modes(pod, &modes);
        let settings = match written {
            Ok(()) => PodSettings::new(policy.mode, policy.restricted, !modes.is_empty(), ports),
            Err(_) => PodSettings::new(PlaintextMode::Strict, policy.restricted, false, ports),
        };
        pods.set_settings(pod, settings)?;
        written
    }

    /// Every address that the pod's namespace has, loopback apart.
    pub fn set_addresses(&self, pod: PodNumber, addresses: &BTreeSet<IpAddr>) -> Result<(), MapError> {
        let mut pods = self.pods.lock();
        pods.numbered(pod)?;
        pods.set_addresses(pod, addresses)
    }

    /// From here on these sockets get what arrives, and connections are steered rather than refused.
    pub fn set_listeners(&self, pod: PodNumber, listeners: &PodListeners) -> Result<(), MapError> {
        let mut pods = self.pods.lock();
        let settings = pods.numbered(pod)?.settings;
        for role in Role::ALL {
            let sockets = listeners.of(outside(role));
            for family in Family::ALL {
                pods.set_listener(pod, role, family, of_family(sockets, family))?;
            }
        }
        pods.set_settings(pod, settings.with_ports(ports(listeners)))?;
        // Last: from here on connections are steered, and what is steered must find a listener.
        for family in Family::ALL {
            let cookie = of_family(&listeners.outbound, family)
                .and_then(|listener| SockRef::from(listener).cookie().ok())
                .map_or(Cookie::NONE, Cookie::new);
            pods.set_live(pod, family, cookie)?;
        }
        Ok(())
    }

    /// From here on new connections of the pod are steered or refused. `cookie` is its namespace's.
    pub fn steer(&self, pod: PodNumber, cookie: u64) -> Result<(), MapError> {
        let mut pods = self.pods.lock();
        pods.numbered(pod)?;
        pods.steered.put(Cookie::new(cookie), pod).map(drop)
    }

    /// From here on new connections of the pod are left alone, and what arrives passes where the daemon no longer listens.
    pub fn stop_steering(&self, pod: PodNumber) -> Result<(), MapError> {
        let mut pods = self.pods.lock();
        let numbered = pods.numbered(pod)?;
        pods.steered.take(&Cookie::new(numbered.cookie))?;
        pods.set_settings(pod, PodSettings::RELEASED.with_ports(numbered.settings.ports()))
    }

    /// The pods found steered when the state was opened. Until `set_listeners` their mesh connections are refused.
    pub fn adopted_pods(&self) -> Vec<AdoptedPod> {
        self.found.lock().adopted.clone()
    }

    /// The inodes of the namespaces where programs were found, but no steering: an earlier daemon ended in the middle of a
    /// capture or release. Their programs are gone now; rules, routes and sysctls may still be there.
    pub fn unfinished_pods(&self) -> Vec<u32> {
        self.found.lock().unfinished.clone()
    }
}

fn prefix(range: &IpNet) -> Prefix<Address> {
    let bits = match range {
        IpNet::V4(range) => 96 + u32::from(range.prefix_len()),
        IpNet::V6(range) => u32::from(range.prefix_len()),
    };
    Prefix {
        bits,
        key: range.network().into(),
    }
}

fn outside(role: Role) -> net::Role {
    match role {
        Role::Outbound => net::Role::Outbound,
        Role::Plaintext => net::Role::Plaintext,
        Role::Hbone => net::Role::Hbone,
    }
}

fn ports(listeners: &PodListeners) -> Ports {
    Ports {
        outbound: listeners.ports.outbound,
        plaintext: listeners.ports.plaintext,
        hbone: listeners.ports.hbone,
    }
}

fn of_family(listeners: &[TcpListener], family: Family) -> Option<&TcpListener> {
    listeners.iter().find(|listener| {
        listener
            .local_addr()
            .is_ok_and(|address| address.is_ipv4() == (family == Family::V4))
    })
}

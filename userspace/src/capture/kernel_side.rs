//! What capture asks of the kernel side, as a trait: the real one needs programs and root, tests record what was asked.

use crate::{
    kernel::{
        AdoptedPod, AttachError, Changes, Kernel, MapError, OpenError, PodNumber, PodPolicy, ServiceEntry,
        WorkloadEntry,
    },
    net::{Namespace, PodListeners},
};
use ipnet::IpNet;
use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
};

/// The part of [`Kernel`] that capture uses; each method is documented there.
pub trait KernelSide: Send + Sync {
    fn readopt(&self) -> Result<(), OpenError>;
    fn set_node(&self, namespace: &Namespace, addresses: &BTreeSet<IpAddr>) -> Result<(), MapError>;
    fn sync_workloads(&self, wanted: &HashMap<IpAddr, WorkloadEntry>) -> Result<Changes, MapError>;
    fn upsert_workload(&self, address: IpAddr, entry: WorkloadEntry) -> Result<(), MapError>;
    fn remove_workload(&self, address: IpAddr) -> Result<(), MapError>;
    fn sync_services(&self, wanted: &HashMap<(IpAddr, u16), ServiceEntry>) -> Result<Changes, MapError>;
    fn upsert_service(&self, at: (IpAddr, u16), entry: ServiceEntry) -> Result<(), MapError>;
    fn remove_service(&self, at: (IpAddr, u16)) -> Result<(), MapError>;
    fn sync_ranges(&self, wanted: &BTreeSet<IpNet>) -> Result<Changes, MapError>;
    fn adopted_pods(&self) -> Vec<AdoptedPod>;
    fn unfinished_pods(&self) -> Vec<u32>;
    fn remove_other_layouts(&self) -> Result<usize, OpenError>;
    fn number_for(&self, cookie: u64) -> Result<PodNumber, MapError>;
    fn set_policy(&self, pod: PodNumber, policy: &PodPolicy) -> Result<(), MapError>;
    fn set_addresses(&self, pod: PodNumber, addresses: &BTreeSet<IpAddr>) -> Result<(), MapError>;
    fn set_listeners(&self, pod: PodNumber, listeners: &PodListeners) -> Result<(), MapError>;
    fn guard_pod(&self, pod: PodNumber, namespace: &Namespace) -> Result<(), AttachError>;
    fn attach_pod(&self, pod: PodNumber, namespace: &Namespace) -> Result<(), AttachError>;
    fn guard_interface(&self, pod: PodNumber, namespace: &Namespace, interface: &str) -> Result<(), AttachError>;
    fn link_guards(&self, pod: PodNumber, namespace: &Namespace) -> Result<(), AttachError>;
    fn steer(&self, pod: PodNumber, cookie: u64) -> Result<(), MapError>;
    fn stop_steering(&self, pod: PodNumber) -> Result<(), MapError>;
    fn detach_pod(&self, pod: PodNumber, namespace: Option<&Namespace>) -> Result<(), AttachError>;
}

/// Delegates each method to the inherent one of its name.
macro_rules! delegate {
    ($(fn $name:ident($($argument:ident: $type:ty),*) -> $output:ty;)*) => {
        impl KernelSide for Kernel {
            $(fn $name(&self, $($argument: $type),*) -> $output {
                Kernel::$name(self, $($argument),*)
            })*
        }
    };
}

delegate! {
    fn readopt() -> Result<(), OpenError>;
    fn set_node(namespace: &Namespace, addresses: &BTreeSet<IpAddr>) -> Result<(), MapError>;
    fn sync_workloads(wanted: &HashMap<IpAddr, WorkloadEntry>) -> Result<Changes, MapError>;
    fn upsert_workload(address: IpAddr, entry: WorkloadEntry) -> Result<(), MapError>;
    fn remove_workload(address: IpAddr) -> Result<(), MapError>;
    fn sync_services(wanted: &HashMap<(IpAddr, u16), ServiceEntry>) -> Result<Changes, MapError>;
    fn upsert_service(at: (IpAddr, u16), entry: ServiceEntry) -> Result<(), MapError>;
    fn remove_service(at: (IpAddr, u16)) -> Result<(), MapError>;
    fn sync_ranges(wanted: &BTreeSet<IpNet>) -> Result<Changes, MapError>;
    fn adopted_pods() -> Vec<AdoptedPod>;
    fn unfinished_pods() -> Vec<u32>;
    fn remove_other_layouts() -> Result<usize, OpenError>;
    fn number_for(cookie: u64) -> Result<PodNumber, MapError>;
    fn set_policy(pod: PodNumber, policy: &PodPolicy) -> Result<(), MapError>;
    fn set_addresses(pod: PodNumber, addresses: &BTreeSet<IpAddr>) -> Result<(), MapError>;
    fn set_listeners(pod: PodNumber, listeners: &PodListeners) -> Result<(), MapError>;
    fn guard_pod(pod: PodNumber, namespace: &Namespace) -> Result<(), AttachError>;
    fn attach_pod(pod: PodNumber, namespace: &Namespace) -> Result<(), AttachError>;
    fn guard_interface(pod: PodNumber, namespace: &Namespace, interface: &str) -> Result<(), AttachError>;
    fn link_guards(pod: PodNumber, namespace: &Namespace) -> Result<(), AttachError>;
    fn steer(pod: PodNumber, cookie: u64) -> Result<(), MapError>;
    fn stop_steering(pod: PodNumber) -> Result<(), MapError>;
    fn detach_pod(pod: PodNumber, namespace: Option<&Namespace>) -> Result<(), AttachError>;
}

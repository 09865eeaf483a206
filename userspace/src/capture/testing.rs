//! The kernel side replaced by a record of what was asked of it, and the pod that tests capture.

use super::KernelSide;
use crate::{
    kernel::{
        AdoptedPod, AttachError, Changes, MapError, OpenError, PodNumber, PodPolicy, ServiceEntry, WorkloadEntry,
    },
    mesh::{Workload, WorkloadUid, fixtures, workload::Locality},
    net::{
        Namespace, PodListeners,
        testing::{ip, sysctl},
    },
    testing::eventually,
};
use ipnet::IpNet;
use parking_lot::Mutex;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt::from_fn,
    net::IpAddr,
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering},
};

pub(crate) const NODE: &str = "node-a";

/// Records what was asked, in words, and fails where it is told to.
#[derive(Default)]
pub(crate) struct Recorder {
    pub(super) calls: Mutex<Vec<String>>,
    pub(super) numbers: Mutex<BTreeMap<u64, u32>>,
    pub(super) adopted: Vec<AdoptedPod>,
    pub(super) unfinished: Vec<u32>,
    pub(super) failing: Mutex<BTreeSet<&'static str>>,
    /// What the namespace showed at the moment of `steer`.
    pub(super) seen_at_steer: Mutex<Vec<(String, String)>>,
    pub(super) namespaces: Mutex<HashMap<u32, Namespace>>,
    pub(super) linked: Mutex<Vec<u32>>,
    /// Held by whoever wants a step to take a while.
    pub(crate) slow: tokio::sync::Mutex<()>,
    /// How often programs of other layouts were removed.
    pub(super) alone: AtomicUsize,
}

impl Recorder {
    fn note(&self, name: &'static str, details: String) -> Result<(), MapError> {
        self.calls
            .lock()
            .push(format!("{name} {details}").trim_end().to_owned());
        if self.failing.lock().contains(name) {
            Err(MapError::Full { map: "FAKE", size: 0 })
        } else {
            Ok(())
        }
    }

    pub(super) fn fail(&self, name: &'static str) {
        self.failing.lock().insert(name);
    }

    pub(super) fn mend(&self) {
        self.failing.lock().clear();
    }

    pub(crate) fn called(&self, wanted: &str) -> usize {
        self.calls.lock().iter().filter(|call| call.starts_with(wanted)).count()
    }

    pub(super) async fn until_linked(&self, times: usize) {
        let what = from_fn(|f| write!(f, "{times} linked; they were {:?}", self.linked.lock()));
        eventually(what, || self.linked.lock().len() >= times).await;
    }

    pub(crate) async fn until_called(&self, wanted: &str, times: usize) {
        let what = from_fn(|f| write!(f, "{wanted}, {times} times; there were {:?}", self.calls.lock()));
        eventually(what, || self.called(wanted) >= times).await;
    }
}

impl KernelSide for Recorder {
    fn readopt(&self) -> Result<(), OpenError> {
        self.note("readopt", String::new()).map_err(OpenError::from)
    }
    fn set_node(&self, _: &Namespace, _: &BTreeSet<IpAddr>) -> Result<(), MapError> {
        Ok(())
    }
    fn sync_workloads(&self, wanted: &HashMap<IpAddr, WorkloadEntry>) -> Result<Changes, MapError> {
        self.note("sync_workloads", wanted.len().to_string())
            .map(|()| Changes::default())
    }
    fn upsert_workload(&self, address: IpAddr, _: WorkloadEntry) -> Result<(), MapError> {
        self.note("upsert_workload", address.to_string())
    }
    fn remove_workload(&self, address: IpAddr) -> Result<(), MapError> {
        self.note("remove_workload", address.to_string())
    }
    fn sync_services(&self, wanted: &HashMap<(IpAddr, u16), ServiceEntry>) -> Result<Changes, MapError> {
        self.note("sync_services", wanted.len().to_string())
            .map(|()| Changes::default())
    }
    fn upsert_service(&self, (vip, port): (IpAddr, u16), _: ServiceEntry) -> Result<(), MapError> {
        self.note("upsert_service", format!("{vip}:{port}"))
    }
    fn remove_service(&self, (vip, port): (IpAddr, u16)) -> Result<(), MapError> {
        self.note("remove_service", format!("{vip}:{port}"))
    }
    fn sync_ranges(&self, wanted: &BTreeSet<IpNet>) -> Result<Changes, MapError> {
        self.note("sync_ranges", wanted.len().to_string())
            .map(|()| Changes::default())
    }
    fn adopted_pods(&self) -> Vec<AdoptedPod> {
        self.adopted.clone()
    }
    fn unfinished_pods(&self) -> Vec<u32> {
        self.unfinished.clone()
    }
    fn number_for(&self, cookie: u64) -> Result<PodNumber, MapError> {
        self.note("number_for", String::new())?;
        let mut numbers = self.numbers.lock();
        let next = numbers.len() as u32;
        Ok(PodNumber::new(*numbers.entry(cookie).or_insert(next)))
    }
    fn set_policy(&self, pod: PodNumber, policy: &PodPolicy) -> Result<(), MapError> {
        self.note("set_policy", format!("{} {:?}", pod.get(), policy.mode))
    }
    fn set_addresses(&self, pod: PodNumber, addresses: &BTreeSet<IpAddr>) -> Result<(), MapError> {
        self.note("set_addresses", format!("{} {addresses:?}", pod.get()))
    }
    fn set_listeners(&self, pod: PodNumber, _: &PodListeners) -> Result<(), MapError> {
        self.note("set_listeners", pod.get().to_string())?;
        drop(self.slow.blocking_lock());
        Ok(())
    }
    fn guard_pod(&self, pod: PodNumber, _: &Namespace) -> Result<(), AttachError> {
        self.note("guard_pod", pod.get().to_string())?;
        Ok(())
    }
    fn attach_pod(&self, pod: PodNumber, namespace: &Namespace) -> Result<(), AttachError> {
        self.namespaces.lock().insert(pod.get(), namespace.clone());
        self.note("attach_pod", pod.get().to_string())?;
        Ok(())
    }
    fn guard_interface(&self, pod: PodNumber, _: &Namespace, interface: &str) -> Result<(), AttachError> {
        self.note("guard_interface", format!("{} {interface}", pod.get()))?;
        Ok(())
    }
    fn remove_other_layouts(&self) -> Result<usize, OpenError> {
        Ok(self.alone.fetch_add(1, Ordering::Relaxed))
    }
    fn link_guards(&self, pod: PodNumber, _: &Namespace) -> Result<(), AttachError> {
        // Apart from the others: it comes late, and by the clock.
        self.linked.lock().push(pod.get());
        Ok(())
    }
    fn steer(&self, pod: PodNumber, _: u64) -> Result<(), MapError> {
        let namespace = self.namespaces.lock().get(&pod.get()).unwrap().clone();
        let reflect = sysctl(&namespace, "net/ipv4/fwmark_reflect");
        self.seen_at_steer.lock().push((ip(&namespace, "rule"), reflect));
        self.note("steer", pod.get().to_string())
    }
    fn stop_steering(&self, pod: PodNumber) -> Result<(), MapError> {
        self.note("stop_steering", pod.get().to_string())
    }
    fn detach_pod(&self, pod: PodNumber, namespace: Option<&Namespace>) -> Result<(), AttachError> {
        if namespace.is_some() {
            drop(self.slow.blocking_lock());
        }
        self.namespaces.lock().remove(&pod.get());
        self.note(
            "detach_pod",
            format!("{} {}", pod.get(), if namespace.is_some() { "there" } else { "gone" }),
        )?;
        Ok(())
    }
}

/// The pod `a` of this node.
pub(crate) fn pod(netns: PathBuf) -> Workload {
    Workload {
        uid: WorkloadUid("a".into()),
        name: "a".into(),
        addresses: vec!["10.9.0.1".parse().unwrap(), "fd09::1".parse().unwrap()],
        locality: Locality {
            node: Some(NODE.into()),
            ..Locality::default()
        },
        netns: Some(netns),
        ..fixtures::workload("shop", "web", "10.9.0.1")
    }
}

/// With this pod captured by an earlier daemon under `number`.
pub(super) fn adopting(number: u32, namespace: &Namespace) -> Recorder {
    let (cookie, inode) = (namespace.cookie(), namespace.inode().1 as u32);
    Recorder {
        adopted: vec![AdoptedPod {
            number: PodNumber::new(number),
            cookie,
            inode,
        }],
        numbers: Mutex::new(BTreeMap::from([(cookie, number)])),
        ..Recorder::default()
    }
}

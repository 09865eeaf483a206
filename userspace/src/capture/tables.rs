//! What the kernel is told about the whole cluster: pods by address, services by VIP and port, ranges. The differences
//! between two snapshots are computed purely, and written in one place.

use super::kernel_side::KernelSide;
use crate::{
    kernel::{MapError, ServiceEntry, WorkloadEntry},
    mesh::{
        MeshSnapshot, WorkloadUid,
        service::{Endpoint, Service},
        workload::Protocol,
    },
};
use imbl::ordmap::DiffItem;
use ipnet::IpNet;
use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

/// Beyond this many differences the whole table is compared instead.
const FEW: usize = 1_024;

/// What the kernel was told last.
#[derive(Debug, Default)]
pub(super) struct Told {
    snapshot: Option<Arc<MeshSnapshot>>,
    services: HashMap<(IpAddr, u16), ServiceEntry>,
    ranges: BTreeSet<IpNet>,
}

impl Told {
    /// True if the kernel was told exactly this.
    pub(super) fn is(&self, snapshot: &Arc<MeshSnapshot>) -> bool {
        self.snapshot.as_ref().is_some_and(|told| Arc::ptr_eq(told, snapshot))
    }

    /// Tells the kernel what changed since. Blocks for its system calls. Ranges come first: what they cover is steered
    /// while the rest is not yet written, never left alone.
    ///
    /// # Errors
    /// A map is full or unusable. The next call starts from scratch.
    pub(super) fn tell(&mut self, kernel: &dyn KernelSide, snapshot: &Arc<MeshSnapshot>) -> Result<(), MapError> {
        let before = self.snapshot.take();
        let is_first = before.is_none();

        let ranges: BTreeSet<_> = snapshot.ranges.iter().copied().collect();
        if is_first || ranges != self.ranges {
            kernel.sync_ranges(&ranges)?;
            self.ranges = ranges;
        }

        let changes = before.as_deref().map(|before| workload_changes(before, snapshot));
        match changes {
            Some(changes) if changes.len() <= FEW => {
                for (address, entry) in changes {
                    match entry {
                        Some(entry) => kernel.upsert_workload(address, entry)?,
                        None => kernel.remove_workload(address)?,
                    }
                }
            }
            None | Some(_) => {
                kernel.sync_workloads(&all_workloads(snapshot))?;
            }
        }

        let may_differ = before.as_deref().is_none_or(|before| {
            !before.services.ptr_eq(&snapshot.services) || !before.workloads.ptr_eq(&snapshot.workloads)
        });
        if may_differ {
            let services = services(snapshot);
            if is_first || services != self.services {
                kernel.sync_services(&services)?;
                self.services = services;
            }
        }
        self.snapshot = Some(Arc::clone(snapshot));
        Ok(())
    }
}

/// What stands at an address; `None` if no pod does. A node's address is a pod's only in name, so it is outside.
fn entry_at(snapshot: &MeshSnapshot, address: IpAddr) -> Option<WorkloadEntry> {
    match snapshot.workload_at(address) {
        Some(workload) if workload.protocol == Protocol::Hbone => Some(WorkloadEntry::IN_MESH),
        Some(_) => Some(WorkloadEntry::OUTSIDE),
        None => snapshot.knows(address).then_some(WorkloadEntry::OUTSIDE),
    }
}

fn all_workloads(snapshot: &MeshSnapshot) -> HashMap<IpAddr, WorkloadEntry> {
    snapshot
        .by_address
        .keys()
        .filter_map(|address| Some((*address, entry_at(snapshot, *address)?)))
        .collect()
}

/// Addresses whose entry may differ between the snapshots, with what it is in the later one. Visits only what changed.
fn workload_changes(before: &MeshSnapshot, after: &MeshSnapshot) -> Vec<(IpAddr, Option<WorkloadEntry>)> {
    let mut touched = BTreeSet::new();
    for difference in before.by_address.diff(&after.by_address) {
        match difference {
            DiffItem::Add(address, _) | DiffItem::Remove(address, _) => touched.insert(*address),
            DiffItem::Update { old: (address, _), .. } => touched.insert(*address),
        };
    }
    for difference in before.workloads.diff(&after.workloads) {
        match difference {
            DiffItem::Add(_, workload) | DiffItem::Remove(_, workload) => touched.extend(&workload.addresses),
            DiffItem::Update {
                old: (_, old),
                new: (_, new),
            } => {
                touched.extend(&old.addresses);
                touched.extend(&new.addresses);
            }
        }
    }
    touched
        .into_iter()
        .map(|address| (address, entry_at(after, address)))
        .filter(|(address, entry)| entry_at(before, *address) != *entry)
        .collect()
}

fn services(snapshot: &MeshSnapshot) -> HashMap<(IpAddr, u16), ServiceEntry> {
    let mut entries = HashMap::new();
    for (vip, key) in &snapshot.by_vip {
        let Some(service) = snapshot.services.get(key) else {
            continue;
        };
        for port in &service.ports {
            entries.insert((*vip, port.port), service_entry(snapshot, service, *vip, port.port));
        }
    }
    entries
}

fn service_entry(snapshot: &MeshSnapshot, service: &Service, vip: IpAddr, port: u16) -> ServiceEntry {
    let (mut is_ready, mut is_in_mesh) = (false, false);
    for endpoint in service.endpoints.iter().filter(|endpoint| serves(endpoint, vip, port)) {
        is_ready |= endpoint.ready || service.publish_not_ready;
        is_in_mesh |= endpoint
            .workload
            .as_ref()
            .is_some_and(|workload| speaks_hbone(snapshot, workload));
    }
    ServiceEntry::new(is_ready, is_in_mesh)
}

fn serves(endpoint: &Endpoint, vip: IpAddr, port: u16) -> bool {
    endpoint.address.is_ipv4() == vip.is_ipv4() && endpoint.ports.iter().any(|(service_port, _)| *service_port == port)
}

fn speaks_hbone(snapshot: &MeshSnapshot, workload: &WorkloadUid) -> bool {
    snapshot
        .workloads
        .get(workload)
        .is_some_and(|workload| workload.protocol == Protocol::Hbone)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::{
        SpiffeId, Workload,
        service::{Affinity, ServiceKey, ServicePort, TrafficDistribution},
        workload::Locality,
    };

    fn pod(name: &str, address: &str, protocol: Protocol) -> Workload {
        Workload {
            uid: WorkloadUid(name.into()),
            name: name.into(),
            namespace: "shop".into(),
            identity: SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/web").unwrap(),
            addresses: vec![address.parse().unwrap()],
            locality: Locality::default(),
            labels: Arc::default(),
            owner: name.into(),
            canonical_service: name.into(),
            canonical_revision: "latest".into(),
            protocol,
            host_network: false,
            enrolled: true,
            netns: None,
            runtime_class: None,
        }
    }

    fn with(mut snapshot: MeshSnapshot, pod: Workload) -> MeshSnapshot {
        for address in &pod.addresses {
            snapshot.by_address.insert(*address, pod.uid.clone());
        }
        snapshot.workloads.insert(pod.uid.clone(), Arc::new(pod));
        snapshot
    }

    fn without(mut snapshot: MeshSnapshot, name: &str) -> MeshSnapshot {
        let pod = snapshot.workloads.remove(&WorkloadUid(name.into())).unwrap();
        for address in &pod.addresses {
            snapshot.by_address.remove(address);
        }
        snapshot
    }

    fn endpoint(pod: &str, address: &str, ready: bool) -> Endpoint {
        Endpoint {
            address: address.parse().unwrap(),
            workload: Some(WorkloadUid(pod.into())),
            node: None,
            zone: None,
            ready,
            ports: vec![(80, 8080)],
        }
    }

    fn with_service(mut snapshot: MeshSnapshot, vip: &str, endpoints: Vec<Endpoint>) -> MeshSnapshot {
        let key = ServiceKey {
            namespace: "shop".into(),
            name: "web".into(),
        };
        let vip = vip.parse().unwrap();
        snapshot.by_vip.insert(vip, key.clone());
        let service = Service {
            key: key.clone(),
            vips: vec![vip],
            ports: [80, 443].map(|port| ServicePort { name: None, port }).to_vec(),
            endpoints,
            affinity: Affinity::None,
            distribution: TrafficDistribution::Any,
            local_only: false,
            publish_not_ready: false,
        };
        snapshot.services.insert(key, Arc::new(service));
        snapshot
    }

    fn changes(before: &MeshSnapshot, after: &MeshSnapshot) -> Vec<(String, Option<WorkloadEntry>)> {
        workload_changes(before, after)
            .into_iter()
            .map(|(address, entry)| (address.to_string(), entry))
            .collect()
    }

    #[test]
    fn only_differences_are_told() {
        let one = with(MeshSnapshot::default(), pod("a", "10.0.0.1", Protocol::Hbone));
        let one = with(one, pod("b", "10.0.0.2", Protocol::Tcp));
        assert_eq!(changes(&one, &one.clone()), []);
        let relabelled = with(
            one.clone(),
            Workload {
                owner: "other".into(),
                ..pod("a", "10.0.0.1", Protocol::Hbone)
            },
        );
        assert_eq!(changes(&one, &relabelled), [], "the kernel does not know owners");
        let enrolled = with(one.clone(), pod("b", "10.0.0.2", Protocol::Hbone));
        assert_eq!(
            changes(&one, &enrolled),
            [("10.0.0.2".into(), Some(WorkloadEntry::IN_MESH))]
        );
        let moved = with(without(one.clone(), "a"), pod("a", "10.0.0.9", Protocol::Hbone));
        assert_eq!(
            changes(&one, &moved),
            [
                ("10.0.0.1".into(), None),
                ("10.0.0.9".into(), Some(WorkloadEntry::IN_MESH))
            ]
        );
    }

    #[test]
    fn differences_add_up_to_the_whole_table() {
        let mut table = HashMap::new();
        let mut before = MeshSnapshot::default();
        let one = with(before.clone(), pod("a", "10.0.0.1", Protocol::Hbone));
        let two = with(one.clone(), pod("b", "fd00::2", Protocol::Tcp));
        let three = with(without(two.clone(), "a"), pod("c", "10.0.0.1", Protocol::Tcp));
        let four = without(three.clone(), "c");
        for after in [one, two, three, four] {
            for (address, entry) in workload_changes(&before, &after) {
                match entry {
                    Some(entry) => table.insert(address, entry),
                    None => table.remove(&address),
                };
            }
            assert_eq!(table, all_workloads(&after));
            before = after;
        }
    }

    #[test]
    fn a_pod_on_the_hosts_network_is_outside_the_mesh() {
        let host = Workload {
            host_network: true,
            ..pod("proxy", "192.0.2.1", Protocol::Hbone)
        };
        let snapshot = with(MeshSnapshot::default(), host);
        assert_eq!(
            all_workloads(&snapshot),
            HashMap::from([("192.0.2.1".parse().unwrap(), WorkloadEntry::OUTSIDE)])
        );
    }

    #[test]
    fn a_service_is_what_its_endpoints_of_that_port_and_family_are() {
        let pods = with(MeshSnapshot::default(), pod("in", "10.0.0.1", Protocol::Hbone));
        let pods = with(pods, pod("out", "10.0.0.2", Protocol::Tcp));
        let in_mesh = |ready| endpoint("in", "10.0.0.1", ready);
        let outside = |ready| endpoint("out", "10.0.0.2", ready);
        for (endpoints, ready, mesh) in [
            (vec![], false, false),
            (vec![in_mesh(false)], false, true),
            (vec![in_mesh(true)], true, true),
            (vec![outside(true)], true, false),
            (vec![outside(true), in_mesh(false)], true, true),
            (vec![endpoint("in", "fd00::1", true)], false, false),
            (vec![endpoint("nobody", "10.0.0.7", true)], true, false),
        ] {
            let snapshot = with_service(pods.clone(), "10.96.0.1", endpoints);
            let entries = services(&snapshot);
            assert_eq!(
                entries[&("10.96.0.1".parse().unwrap(), 80)],
                ServiceEntry::new(ready, mesh)
            );
            assert_eq!(
                entries[&("10.96.0.1".parse().unwrap(), 443)],
                ServiceEntry::new(false, false)
            );
        }
    }
}

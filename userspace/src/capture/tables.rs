//! What the kernel is told about the whole cluster: pods by address, services by VIP and port, ranges. The differences
//! between two snapshots are computed purely, and written in one place.

use super::{
    kernel_side::KernelSide,
    services::{self, Dependents},
};
use crate::{
    kernel::{MapError, WorkloadEntry},
    mesh::{MeshSnapshot, workload::Protocol},
};
use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

/// Beyond this many differences the whole table is compared instead.
const FEW: usize = 1_024;

/// What the kernel was told last.
#[derive(Debug, Default)]
pub(super) struct Told(Option<(Arc<MeshSnapshot>, Dependents)>);

impl Told {
    /// True if the kernel was told exactly this.
    pub(super) fn is(&self, snapshot: &Arc<MeshSnapshot>) -> bool {
        self.0.as_ref().is_some_and(|(told, _)| Arc::ptr_eq(told, snapshot))
    }

    /// Tells the kernel what changed since. Blocks for its system calls. Ranges come first: what they cover is steered
    /// while the rest is not yet written, never left alone.
    ///
    /// # Errors
    /// A map is full or unusable. The next call starts from scratch.
    pub(super) fn tell(&mut self, kernel: &dyn KernelSide, snapshot: &Arc<MeshSnapshot>) -> Result<(), MapError> {
        let dependents = match self.0.take() {
            Some((before, dependents)) => tell_changes(kernel, &before, snapshot, dependents)?,
            None => tell_all(kernel, snapshot)?,
        };
        self.0 = Some((Arc::clone(snapshot), dependents));
        Ok(())
    }
}

fn tell_all(kernel: &dyn KernelSide, snapshot: &MeshSnapshot) -> Result<Dependents, MapError> {
    kernel.sync_ranges(&snapshot.ranges.iter().copied().collect())?;
    kernel.sync_workloads(&all_workloads(snapshot))?;
    kernel.sync_services(&services::all(snapshot))?;
    Ok(Dependents::of(snapshot))
}

fn tell_changes(
    kernel: &dyn KernelSide,
    before: &MeshSnapshot,
    after: &MeshSnapshot,
    mut dependents: Dependents,
) -> Result<Dependents, MapError> {
    if !Arc::ptr_eq(&before.ranges, &after.ranges) {
        kernel.sync_ranges(&after.ranges.iter().copied().collect())?;
    }
    let changes = workload_changes(before, after);
    if changes.len() > FEW {
        kernel.sync_workloads(&all_workloads(after))?;
    } else {
        for (address, entry) in changes {
            match entry {
                Some(entry) => kernel.upsert_workload(address, entry)?,
                None => kernel.remove_workload(address)?,
            }
        }
    }
    // What goes makes room for what comes.
    let (gone, there): (Vec<_>, Vec<_>) = services::changes(before, after, &mut dependents)
        .into_iter()
        .partition(|(_, entry)| entry.is_none());
    for (at, entry) in gone.into_iter().chain(there) {
        match entry {
            Some(entry) => kernel.upsert_service(at, entry)?,
            None => kernel.remove_service(at)?,
        }
    }
    Ok(dependents)
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
    touched.extend(
        before
            .by_address
            .diff(&after.by_address)
            .map(|difference| *difference.key),
    );
    for difference in before.workloads.diff(&after.workloads) {
        for workload in difference.old.into_iter().chain(difference.new) {
            touched.extend(&workload.addresses);
        }
    }
    touched
        .into_iter()
        .map(|address| (address, entry_at(after, address)))
        .filter(|(address, entry)| entry_at(before, *address) != *entry)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::{SpiffeId, Workload, WorkloadUid, workload::Locality};

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
        snapshot.set_workload(Arc::new(pod));
        snapshot
    }

    fn without(mut snapshot: MeshSnapshot, name: &str) -> MeshSnapshot {
        let pod = snapshot.remove_workload(&WorkloadUid(name.into())).unwrap();
        for address in &pod.addresses {
            snapshot.by_address.remove(address);
        }
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
}

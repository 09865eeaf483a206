//! Services as the kernel knows them: by VIP and port, whether anyone is ready and whether anyone is in the mesh. Pure. What
//! two snapshots differ in costs the services that it touches, not all of them.

use crate::{
    kernel::ServiceEntry,
    mesh::{
        MeshSnapshot, Workload, WorkloadUid,
        service::{Endpoint, Service, ServiceKey},
        workload::Protocol,
    },
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

/// A VIP and a port.
pub(super) type At = (IpAddr, u16);

/// Which services have which workload as an endpoint: what becomes of a workload may change what they are.
#[derive(Debug, Default)]
pub(super) struct Dependents(BTreeSet<(WorkloadUid, ServiceKey)>);

impl Dependents {
    pub(super) fn of(snapshot: &MeshSnapshot) -> Self {
        let mut dependents = Self::default();
        for service in snapshot.services.values() {
            dependents.add(service);
        }
        dependents
    }

    fn add(&mut self, service: &Service) {
        let workloads = service
            .endpoints
            .iter()
            .filter_map(|endpoint| endpoint.workload.clone());
        self.0.extend(workloads.map(|workload| (workload, service.key.clone())));
    }

    fn remove(&mut self, service: &Service) {
        for workload in service
            .endpoints
            .iter()
            .filter_map(|endpoint| endpoint.workload.clone())
        {
            self.0.remove(&(workload, service.key.clone()));
        }
    }

    fn on(&self, workload: &WorkloadUid) -> impl Iterator<Item = &ServiceKey> {
        let first = ServiceKey {
            namespace: "".into(),
            name: "".into(),
        };
        let from = self.0.range((workload.clone(), first)..);
        from.take_while(move |(uid, _)| uid == workload).map(|(_, key)| key)
    }
}

/// Every service, by VIP and port.
pub(super) fn all(snapshot: &MeshSnapshot) -> HashMap<At, ServiceEntry> {
    let services = snapshot.services.values();
    services.flat_map(|service| entries(snapshot, service)).collect()
}

/// Where an entry is another one in `after`; `None` where there is none any more. `dependents` are those of `before`, and
/// afterwards those of `after`.
pub(super) fn changes(
    before: &MeshSnapshot,
    after: &MeshSnapshot,
    dependents: &mut Dependents,
) -> Vec<(At, Option<ServiceEntry>)> {
    let mut touched: BTreeSet<ServiceKey> = BTreeSet::new();
    for difference in before.services.diff(&after.services) {
        touched.insert(difference.key.clone());
        if let Some(old) = difference.old {
            dependents.remove(old);
        }
        if let Some(new) = difference.new {
            dependents.add(new);
        }
    }
    for difference in before.by_vip.diff(&after.by_vip) {
        touched.extend(difference.old.into_iter().chain(difference.new).cloned());
    }
    for difference in before.workloads.diff(&after.workloads) {
        if difference.old.is_some_and(speaks_hbone) != difference.new.is_some_and(speaks_hbone) {
            touched.extend(dependents.on(difference.key).cloned());
        }
    }
    let of = |snapshot, key| entries_of(snapshot, key).into_iter().flatten();
    let were: BTreeMap<At, ServiceEntry> = touched.iter().flat_map(|key| of(before, key)).collect();
    let are: BTreeMap<At, ServiceEntry> = touched.iter().flat_map(|key| of(after, key)).collect();
    let gone = were.keys().filter(|at| !are.contains_key(*at)).map(|at| (*at, None));
    let there = are.iter().filter(|(at, entry)| were.get(*at) != Some(*entry));
    gone.chain(there.map(|(at, entry)| (*at, Some(*entry)))).collect()
}

fn entries_of<'s>(
    snapshot: &'s MeshSnapshot,
    key: &ServiceKey,
) -> Option<impl Iterator<Item = (At, ServiceEntry)> + 's> {
    Some(entries(snapshot, snapshot.services.get(key)?))
}

/// Those of one service, at the VIPs that are its own.
fn entries<'s>(snapshot: &'s MeshSnapshot, service: &'s Arc<Service>) -> impl Iterator<Item = (At, ServiceEntry)> + 's {
    let vips = service.vips.iter().copied();
    vips.filter(|vip| snapshot.by_vip.get(vip) == Some(&service.key))
        .flat_map(move |vip| {
            let ports = service.ports.iter().map(|port| port.port);
            ports.map(move |port| ((vip, port), entry(snapshot, service, vip, port)))
        })
}

fn entry(snapshot: &MeshSnapshot, service: &Service, vip: IpAddr, port: u16) -> ServiceEntry {
    let (mut is_ready, mut is_in_mesh) = (false, false);
    for endpoint in service.endpoints.iter().filter(|endpoint| serves(endpoint, vip, port)) {
        is_ready |= endpoint.ready || service.publish_not_ready;
        let workload = endpoint.workload.as_ref().and_then(|uid| snapshot.workloads.get(uid));
        is_in_mesh |= workload.is_some_and(speaks_hbone);
    }
    ServiceEntry::new(is_ready, is_in_mesh)
}

fn serves(endpoint: &Endpoint, vip: IpAddr, port: u16) -> bool {
    endpoint.address.is_ipv4() == vip.is_ipv4() && endpoint.ports.iter().any(|(service_port, _)| *service_port == port)
}

fn speaks_hbone(workload: &Arc<Workload>) -> bool {
    workload.protocol == Protocol::Hbone
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::fixtures::{self, workload};
    use proptest::prelude::*;

    fn pod(number: u8, protocol: Protocol) -> Workload {
        Workload {
            protocol,
            ..workload("shop", &format!("p{number}"), &format!("10.244.0.{number}"))
        }
    }

    fn endpoint(pod: u8, ready: bool) -> Endpoint {
        Endpoint {
            workload: Some(WorkloadUid(format!("uid-shop-p{pod}").into())),
            ready,
            ..fixtures::endpoint(&format!("10.244.0.{pod}"))
        }
    }

    /// What may happen to a small mesh, in any order.
    #[derive(Debug, Clone)]
    enum Happening {
        Pod(u8, Protocol),
        NoPod(u8),
        /// Service, VIP, endpoints.
        Service(u8, u8, Vec<(u8, bool)>),
        NoService(u8),
    }

    fn happening() -> impl Strategy<Value = Happening> {
        prop_oneof![
            (0..6_u8, any::<bool>())
                .prop_map(|(pod, hbone)| { Happening::Pod(pod, if hbone { Protocol::Hbone } else { Protocol::Tcp }) }),
            (0..6_u8).prop_map(Happening::NoPod),
            (
                0..3_u8,
                1..4_u8,
                proptest::collection::vec((0..6_u8, any::<bool>()), 0..4)
            )
                .prop_map(|(service, vip, endpoints)| Happening::Service(service, vip, endpoints)),
            (0..3_u8).prop_map(Happening::NoService),
        ]
    }

    fn happen(mesh: &mut MeshSnapshot, happening: Happening) {
        let remove = |mesh: &mut MeshSnapshot, number: u8| {
            let key = fixtures::service(&format!("s{number}"), "10.96.0.1", Vec::new()).key;
            for vip in mesh.services.remove(&key).iter().flat_map(|old| &old.vips) {
                if mesh.by_vip.get(vip) == Some(&key) {
                    mesh.by_vip.remove(vip);
                }
            }
        };
        match happening {
            Happening::Pod(number, protocol) => mesh.set_workload(Arc::new(pod(number, protocol))),
            Happening::NoPod(number) => drop(mesh.remove_workload(&pod(number, Protocol::Tcp).uid)),
            Happening::NoService(number) => remove(mesh, number),
            Happening::Service(number, vip, endpoints) => {
                remove(mesh, number);
                let endpoints = endpoints.into_iter().map(|(pod, ready)| endpoint(pod, ready)).collect();
                let service = fixtures::service(&format!("s{number}"), &format!("10.96.0.{vip}"), endpoints);
                // The last to claim a VIP has it.
                mesh.by_vip.insert(service.vips[0], service.key.clone());
                mesh.services.insert(service.key.clone(), Arc::new(service));
            }
        }
    }

    proptest! {
        #[test]
        fn differences_add_up_to_all_services(steps in proptest::collection::vec(proptest::collection::vec(happening(), 1..4), 1..20)) {
            let mut before = MeshSnapshot::default();
            let mut dependents = Dependents::of(&before);
            let mut table = HashMap::new();
            for step in steps {
                let mut after = before.clone();
                step.into_iter().for_each(|happening| happen(&mut after, happening));
                for (at, entry) in changes(&before, &after, &mut dependents) {
                    let old = match entry {
                        Some(entry) => table.insert(at, entry),
                        None => table.remove(&at),
                    };
                    prop_assert_ne!(old, entry, "what is as it was is not told");
                }
                prop_assert_eq!(&table, &all(&after));
                prop_assert_eq!(&dependents.0, &Dependents::of(&after).0);
                before = after;
            }
        }
    }

    #[test]
    fn a_service_is_what_its_endpoints_of_that_port_and_family_are() {
        let outside = |ready| endpoint(2, ready);
        let in_mesh = |ready| endpoint(1, ready);
        let of_other_family = Endpoint {
            address: "fd00::1".parse().unwrap(),
            ..in_mesh(true)
        };
        for (endpoints, ready, mesh) in [
            (vec![], false, false),
            (vec![in_mesh(false)], false, true),
            (vec![in_mesh(true)], true, true),
            (vec![outside(true)], true, false),
            (vec![outside(true), in_mesh(false)], true, true),
            (vec![of_other_family], false, false),
            (vec![endpoint(7, true)], true, false),
        ] {
            let mut service = fixtures::service("web", "10.96.0.1", endpoints);
            service.ports.extend(service.ports.clone());
            service.ports[1].port = 443;
            let pods = vec![pod(1, Protocol::Hbone), pod(2, Protocol::Tcp)];
            let entries = all(&fixtures::snapshot(pods, vec![service]));
            let at = |port| entries[&("10.96.0.1".parse().unwrap(), port)];
            assert_eq!(at(80), ServiceEntry::new(ready, mesh));
            assert_eq!(at(443), ServiceEntry::new(false, false));
        }
    }
}

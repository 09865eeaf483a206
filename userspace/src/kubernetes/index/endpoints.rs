//! The index' services: slices joined with Services and pods.

use super::{Index, Name};
use crate::kubernetes::{
    objects::{self, Kind, ObjectRef},
    problem::{Finding, Flaw},
};
use crate::mesh::service::{Endpoint, Service, ServiceKey};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
};

/// Services, their slices, and the ways to find them.
#[derive(Debug, Default)]
pub(super) struct Services {
    by_key: HashMap<ServiceKey, Entry>,
    by_namespace: HashMap<Arc<str>, BTreeSet<ServiceKey>>,
    slices: HashMap<Name, ServiceKey>,
    /// Everyone who says that a VIP is theirs.
    claims: HashMap<IpAddr, BTreeSet<ServiceKey>>,
    /// Who has an endpoint at an address.
    by_endpoint: HashMap<IpAddr, BTreeSet<ServiceKey>>,
}

/// A Service, its slices, or both: either may come first.
#[derive(Debug, Default)]
struct Entry {
    service: Option<objects::Service>,
    slices: BTreeMap<Arc<str>, objects::EndpointSlice>,
}

impl Index {
    pub(super) fn set_service(&mut self, key: ServiceKey, service: Option<objects::Service>) {
        let entry = self.services.by_key.entry(key.clone()).or_default();
        if entry.service == service {
            self.services.tidy(&key);
            return;
        }
        let old = std::mem::replace(&mut entry.service, service);
        let new_vips = entry
            .service
            .as_ref()
            .map(|service| service.vips.clone())
            .unwrap_or_default();
        let is_there = entry.service.is_some();
        let mut touched: BTreeSet<IpAddr> = BTreeSet::new();
        for vip in old.into_iter().flat_map(|old| old.vips) {
            touched.insert(vip);
            remove(&mut self.services.claims, &vip, &key);
        }
        for vip in new_vips {
            touched.insert(vip);
            self.services.claims.entry(vip).or_default().insert(key.clone());
        }
        if is_there {
            self.services
                .by_namespace
                .entry(Arc::clone(&key.namespace))
                .or_default()
                .insert(key.clone());
        } else {
            remove(&mut self.services.by_namespace, &key.namespace, &key);
        }
        let mut affected = BTreeSet::from([key.clone()]);
        for vip in &touched {
            affected.extend(self.services.claims.get(vip).into_iter().flatten().cloned());
        }
        for vip in touched {
            self.refresh_vip(vip);
        }
        for key in &affected {
            self.refresh_service(key);
        }
        self.services.tidy(&key);
    }

    pub(super) fn set_slice(&mut self, name: Name, slice: Option<objects::EndpointSlice>) {
        let old = self.services.slices.remove(&name);
        let mut affected = BTreeSet::new();
        if let Some(old) = old.filter(|old| slice.as_ref().map(|slice| &slice.service) != Some(old)) {
            let entry = self.services.by_key.entry(old.clone()).or_default();
            self.services
                .by_endpoint
                .note(&old, entry.slices.remove(&name.1).as_ref(), None, &entry.slices);
            affected.insert(old);
        }
        if let Some(slice) = slice {
            let key = slice.service.clone();
            self.services.slices.insert(name.clone(), key.clone());
            let entry = self.services.by_key.entry(key.clone()).or_default();
            if entry.slices.get(&name.1) != Some(&slice) {
                let old = entry.slices.insert(name.1, slice.clone());
                self.services
                    .by_endpoint
                    .note(&key, old.as_ref(), Some(&slice), &entry.slices);
                affected.insert(key);
            }
        }
        for key in affected {
            self.refresh_service(&key);
            self.services.tidy(&key);
        }
    }

    pub(super) fn refresh_services_of_namespace(&mut self, namespace: &str) {
        let keys: Vec<ServiceKey> = self
            .services
            .by_namespace
            .get(namespace)
            .into_iter()
            .flatten()
            .cloned()
            .collect();
        for key in keys {
            self.refresh_service(&key);
        }
    }

    /// A node that moves to another zone takes its endpoints along.
    pub(super) fn refresh_services_of_node(&mut self, node: &str) {
        for address in self.addresses_of_node(node) {
            self.refresh_services_at(address);
        }
    }

    /// Whoever has an endpoint at `address` asks again which pod that is.
    pub(super) fn refresh_services_at(&mut self, address: IpAddr) {
        let keys: Vec<ServiceKey> = self
            .services
            .by_endpoint
            .get(&address)
            .into_iter()
            .flatten()
            .cloned()
            .collect();
        for key in keys {
            self.refresh_service(&key);
        }
    }

    /// Joins one service with its slices. Costs its endpoints, not all pods.
    fn refresh_service(&mut self, key: &ServiceKey) {
        let entry = self.services.by_key.get(key);
        let Some((entry, service)) = entry.and_then(|entry| Some((entry, entry.service.as_ref()?))) else {
            self.changed |= self.snapshot.services.remove(key).is_some();
            self.note_derived(&service_ref(key), Vec::new());
            return;
        };
        let inherited = self
            .namespaces
            .get(&key.namespace)
            .and_then(|namespace| namespace.distribution);
        let joined = Service {
            key: key.clone(),
            vips: service
                .vips
                .iter()
                .copied()
                .filter(|vip| self.services.owner(*vip) == Some(key))
                .collect(),
            ports: service.ports.clone(),
            endpoints: self.endpoints(key, service, &entry.slices),
            affinity: service.affinity,
            distribution: service.distribution.or(inherited).unwrap_or_default(),
            local_only: service.local_only,
            publish_not_ready: service.publish_not_ready,
        };
        let lost = service.vips.iter().filter_map(|vip| {
            let winner = self.services.owner(*vip).filter(|winner| *winner != key)?;
            Some(Finding::new(
                "spec.clusterIPs",
                Flaw::DuplicateVip {
                    address: *vip,
                    winner: winner.to_string(),
                },
            ))
        });
        let findings = lost.collect();
        if self.snapshot.services.get(key).is_none_or(|old| **old != joined) {
            self.snapshot.services.insert(key.clone(), Arc::new(joined));
            self.changed = true;
        }
        self.note_derived(&service_ref(key), findings);
    }

    fn endpoints(
        &self,
        key: &ServiceKey,
        service: &objects::Service,
        slices: &BTreeMap<Arc<str>, objects::EndpointSlice>,
    ) -> Vec<Endpoint> {
        let mut endpoints: BTreeMap<IpAddr, Endpoint> = BTreeMap::new();
        for slice in slices.values() {
            let ports: Vec<(u16, u16)> = service
                .ports
                .iter()
                .filter_map(|port| {
                    let name = port.name.as_deref().unwrap_or_default();
                    let (_, target) = slice.ports.iter().find(|(slice_name, _)| **slice_name == *name)?;
                    Some((port.port, target.unwrap_or(port.port)))
                })
                .collect();
            for listed in &slice.endpoints {
                let by_name = listed.pod.as_ref().and_then(|pod| {
                    let named = self.workload_named(&(Arc::clone(&key.namespace), Arc::clone(pod)))?;
                    Some(named).filter(|workload| workload.addresses.contains(&listed.address))
                });
                let workload = by_name.or_else(|| self.snapshot.workload_at(listed.address));
                let locality = workload.map(|workload| &workload.locality);
                let node = listed.node.clone().or_else(|| locality?.node.clone());
                let of_node = || self.nodes.get(node.as_ref()?)?.zone.clone();
                let zone = listed.zone.clone().or_else(of_node);
                let endpoint = endpoints.entry(listed.address).or_insert_with(|| Endpoint {
                    address: listed.address,
                    workload: workload.map(|workload| workload.uid.clone()),
                    node,
                    zone,
                    ready: false,
                    ports: Vec::new(),
                });
                endpoint.ready |= listed.ready;
                for port in &ports {
                    if !endpoint.ports.contains(port) {
                        endpoint.ports.push(*port);
                    }
                }
            }
        }
        endpoints.into_values().collect()
    }

    fn refresh_vip(&mut self, vip: IpAddr) {
        let owner = self.services.owner(vip).cloned();
        if self.snapshot.by_vip.get(&vip) != owner.as_ref() {
            match owner {
                Some(key) => self.snapshot.by_vip.insert(vip, key),
                None => self.snapshot.by_vip.remove(&vip),
            };
            self.changed = true;
        }
    }
}

impl Services {
    /// Whose VIP it is: the oldest service's; one without a time is younger than all.
    fn owner(&self, vip: IpAddr) -> Option<&ServiceKey> {
        let created = |key: &&ServiceKey| {
            let service = self.by_key.get(*key).and_then(|entry| entry.service.as_ref());
            let created = service.and_then(|service| service.created);
            (created.is_none(), created)
        };
        self.claims.get(&vip)?.iter().min_by_key(created)
    }

    fn tidy(&mut self, key: &ServiceKey) {
        if self
            .by_key
            .get(key)
            .is_some_and(|entry| entry.service.is_none() && entry.slices.is_empty())
        {
            self.by_key.remove(key);
        }
    }

    #[cfg(test)]
    pub(super) fn sizes(&self) -> [(&'static str, usize); 5] {
        [
            ("services", self.by_key.len()),
            ("services by namespace", self.by_namespace.len()),
            ("slices", self.slices.len()),
            ("vips", self.claims.len()),
            ("endpoint addresses", self.by_endpoint.len()),
        ]
    }
}

trait ByEndpoint {
    /// Keeps the way from addresses to services in step when one slice of `key` changes; `now` are its slices after that.
    fn note(
        &mut self,
        key: &ServiceKey,
        old: Option<&objects::EndpointSlice>,
        new: Option<&objects::EndpointSlice>,
        now: &BTreeMap<Arc<str>, objects::EndpointSlice>,
    );
}

impl ByEndpoint for HashMap<IpAddr, BTreeSet<ServiceKey>> {
    fn note(
        &mut self,
        key: &ServiceKey,
        old: Option<&objects::EndpointSlice>,
        new: Option<&objects::EndpointSlice>,
        now: &BTreeMap<Arc<str>, objects::EndpointSlice>,
    ) {
        for endpoint in new.into_iter().flat_map(|slice| &slice.endpoints) {
            self.entry(endpoint.address).or_default().insert(key.clone());
        }
        let kept: BTreeSet<IpAddr> = now
            .values()
            .flat_map(|slice| &slice.endpoints)
            .map(|endpoint| endpoint.address)
            .collect();
        for endpoint in old.into_iter().flat_map(|slice| &slice.endpoints) {
            if !kept.contains(&endpoint.address) {
                remove(self, &endpoint.address, key);
            }
        }
    }
}

fn service_ref(key: &ServiceKey) -> ObjectRef {
    ObjectRef {
        kind: Kind::Service,
        namespace: Arc::clone(&key.namespace),
        name: Arc::clone(&key.name),
    }
}

fn remove<K: std::hash::Hash + Eq>(sets: &mut HashMap<K, BTreeSet<ServiceKey>>, at: &K, key: &ServiceKey) {
    if let Some(set) = sets.get_mut(at) {
        set.remove(key);
        if set.is_empty() {
            sets.remove(at);
        }
    }
}

//! The index' pods: who has which address, and the workload that follows from pod, namespace and node.

use super::{Index, Name, Source};
use crate::kubernetes::{
    enrolment::{Enrolment, PodFacts},
    objects::{Kind, ObjectRef, Phase, Pod},
    problem::{Finding, Flaw},
};
use crate::mesh::{
    SpiffeId, Workload, WorkloadUid,
    workload::{Locality, Protocol},
};
use std::{
    collections::{BTreeSet, HashMap},
    net::IpAddr,
    sync::Arc,
    time::SystemTime,
};

/// Pods and the ways to find them.
#[derive(Debug, Default)]
pub(super) struct Pods {
    by_name: HashMap<Name, Entry>,
    by_namespace: HashMap<Arc<str>, BTreeSet<Arc<str>>>,
    by_node: HashMap<Arc<str>, BTreeSet<Name>>,
    /// Everyone who says that an address is theirs.
    claims: HashMap<IpAddr, BTreeSet<Name>>,
    /// Who has which UID.
    uids: HashMap<WorkloadUid, Name>,
}

#[derive(Debug)]
struct Entry {
    pod: Pod,
    uid: WorkloadUid,
}

impl Index {
    /// `None`: the pod has ended or is deleted.
    pub(super) fn set_pod(&mut self, name: Name, pod: Option<Pod>) {
        let old = self.pods.by_name.get(&name);
        if old.map(|entry| &entry.pod) == pod.as_ref() {
            return;
        }
        let mut touched: BTreeSet<IpAddr> = BTreeSet::new();
        if let Some(old) = self.pods.by_name.remove(&name) {
            touched.extend(&old.pod.addresses);
            self.forget(&name, &old);
        }
        if let Some(pod) = pod {
            touched.extend(&pod.addresses);
            self.remember(&name, pod);
        } else {
            self.note_derived(&pod_ref(&name), Vec::new());
        }
        let mut affected: BTreeSet<Name> = BTreeSet::from([name]);
        for address in &touched {
            affected.extend(self.pods.claims.get(address).into_iter().flatten().cloned());
        }
        for name in &affected {
            self.refresh_pod(name);
        }
        for address in touched {
            self.refresh_address(address);
        }
    }

    pub(super) fn refresh_pods_of_namespace(&mut self, namespace: &str) {
        let Some((namespace, pods)) = self.pods.by_namespace.get_key_value(namespace) else {
            self.note_namespace(namespace);
            return;
        };
        let names: Vec<Name> = pods
            .iter()
            .map(|pod| (Arc::clone(namespace), Arc::clone(pod)))
            .collect();
        self.note_namespace(&Arc::clone(namespace));
        for name in names {
            self.refresh_pod(&name);
        }
    }

    pub(super) fn refresh_pods_of_node(&mut self, node: &str) {
        let names: Vec<Name> = self.pods.by_node.get(node).into_iter().flatten().cloned().collect();
        for name in names {
            self.refresh_pod(&name);
        }
    }

    pub(super) fn addresses_of_node(&self, node: &str) -> Vec<IpAddr> {
        let names = self.pods.by_node.get(node).into_iter().flatten();
        names
            .filter_map(|name| self.pods.by_name.get(name))
            .flat_map(|entry| entry.pod.addresses.iter().copied())
            .collect()
    }

    /// The UID of a pod that runs and has an address.
    pub(super) fn workload_named(&self, name: &Name) -> Option<&Arc<Workload>> {
        self.snapshot.workloads.get(&self.pods.by_name.get(name)?.uid)
    }

    fn remember(&mut self, name: &Name, pod: Pod) {
        let own = WorkloadUid(format!("{}/{}", name.0, name.1).into());
        let uid = match &pod.uid {
            Some(uid) if !self.pods.uids.contains_key(&WorkloadUid(Arc::clone(uid))) => WorkloadUid(Arc::clone(uid)),
            Some(_) | None => own,
        };
        self.pods.uids.insert(uid.clone(), name.clone());
        let first = {
            let pods = self.pods.by_namespace.entry(Arc::clone(&name.0)).or_default();
            pods.insert(Arc::clone(&name.1));
            pods.len() == 1
        };
        if let Some(node) = &pod.node {
            self.pods
                .by_node
                .entry(Arc::clone(node))
                .or_default()
                .insert(name.clone());
        }
        for address in &pod.addresses {
            self.pods.claims.entry(*address).or_default().insert(name.clone());
        }
        self.pods.by_name.insert(name.clone(), Entry { pod, uid });
        if first {
            self.note_namespace(&name.0);
        }
    }

    fn forget(&mut self, name: &Name, old: &Entry) {
        self.pods.uids.remove(&old.uid);
        self.changed |= self.snapshot.remove_workload(&old.uid).is_some();
        if remove(&mut self.pods.by_namespace, &name.0, &name.1) {
            self.note_namespace(&name.0);
        }
        if let Some(node) = &old.pod.node {
            remove(&mut self.pods.by_node, node, name);
        }
        for address in &old.pod.addresses {
            remove(&mut self.pods.claims, address, name);
        }
    }

    /// The workload of one pod, from its pod, namespace and node.
    pub(super) fn refresh_pod(&mut self, name: &Name) {
        let Some(entry) = self.pods.by_name.get(name) else {
            return;
        };
        let (pod, uid) = (&entry.pod, entry.uid.clone());
        let mut findings = Vec::new();
        let mut addresses = Vec::new();
        for address in &pod.addresses {
            match self.pods.owner(*address) {
                Some(winner) if winner != name && !pod.host_network => {
                    let winner = format!("{}/{}", winner.0, winner.1);
                    let flaw = Flaw::DuplicateAddress {
                        address: *address,
                        winner,
                    };
                    findings.push(Finding::new("status.podIPs", flaw));
                }
                Some(_) | None => addresses.push(*address),
            }
        }
        if let Some(wanted) = pod.uid.as_ref().filter(|wanted| ***wanted != *uid.0) {
            let holder = self.pods.uids.get(&WorkloadUid(Arc::clone(wanted)));
            let holder = holder
                .map(|holder| format!("{}/{}", holder.0, holder.1))
                .unwrap_or_default();
            findings.push(Finding::new(
                "metadata.uid",
                Flaw::DuplicateUid {
                    uid: wanted.to_string(),
                    holder,
                },
            ));
        }
        let workload = match SpiffeId::new(&self.settings.trust_domain, &name.0, &pod.service_account) {
            Ok(identity) => Some(self.workload(name, pod, uid.clone(), identity, addresses)),
            Err(_) => {
                let value = pod.service_account.to_string();
                let flaw = Flaw::WrongValue {
                    value,
                    expected: "a name that can be part of a SPIFFE ID",
                };
                findings.push(Finding::new("spec.serviceAccountName", flaw));
                None
            }
        };
        match workload.filter(|workload| !workload.addresses.is_empty()) {
            Some(workload) => {
                if self.snapshot.workloads.get(&uid).is_none_or(|old| **old != workload) {
                    self.snapshot.set_workload(Arc::new(workload));
                    self.changed = true;
                }
            }
            None => self.changed |= self.snapshot.remove_workload(&uid).is_some(),
        }
        self.note_derived(&pod_ref(name), findings);
    }

    fn workload(
        &self,
        name: &Name,
        pod: &Pod,
        uid: WorkloadUid,
        identity: SpiffeId,
        addresses: Vec<IpAddr>,
    ) -> Workload {
        let enrolled = Enrolment::of(PodFacts {
            namespace: &name.0,
            namespace_mode: self.namespaces.get(&name.0).and_then(|namespace| namespace.mode),
            pod_mode: pod.mode,
            host_network: pod.host_network,
            sidecar: pod.sidecar,
        })
        .is_wanted();
        let speaks_hbone = match self.settings.source {
            Source::Directory => enrolled,
            Source::ApiServer => pod.redirected && !pod.host_network,
        };
        let node = pod.node.as_ref().and_then(|node| self.nodes.get(node));
        let label = |names: &[&str]| {
            names
                .iter()
                .find_map(|name| pod.labels.get(*name))
                .filter(|value| !value.is_empty())
                .map(|v| v.as_str().into())
        };
        Workload {
            uid,
            name: Arc::clone(&name.1),
            namespace: Arc::clone(&name.0),
            identity,
            addresses,
            locality: Locality {
                region: node.and_then(|node| node.region.clone()),
                zone: node.and_then(|node| node.zone.clone()),
                node: pod.node.clone(),
            },
            labels: Arc::clone(&pod.labels),
            owner: Arc::clone(&pod.owner),
            canonical_service: label(&["service.istio.io/canonical-name", "app.kubernetes.io/name", "app"])
                .unwrap_or_else(|| Arc::clone(&pod.owner)),
            canonical_revision: label(&[
                "service.istio.io/canonical-revision",
                "app.kubernetes.io/version",
                "version",
            ])
            .unwrap_or_else(|| "latest".into()),
            protocol: if speaks_hbone { Protocol::Hbone } else { Protocol::Tcp },
            host_network: pod.host_network,
            enrolled,
            netns: match self.settings.source {
                Source::Directory => pod.netns.clone(),
                Source::ApiServer => self.sandboxes.of(pod.uid.as_ref()).map(|sandbox| sandbox.netns.clone()),
            },
            runtime_class: pod.runtime_class.clone(),
        }
    }

    fn refresh_address(&mut self, address: IpAddr) {
        let owner = self.pods.owner(address).and_then(|name| self.pods.by_name.get(name));
        let owner = owner
            .map(|entry| entry.uid.clone())
            .filter(|uid| self.snapshot.workloads.contains_key(uid));
        if self.snapshot.by_address.get(&address) != owner.as_ref() {
            match owner {
                Some(uid) => self.snapshot.by_address.insert(address, uid),
                None => self.snapshot.by_address.remove(&address),
            };
            self.changed = true;
        }
        self.refresh_services_at(address);
    }

    /// In a cluster a pod's Namespace always exists; in a directory it may have been forgotten, and with it its label.
    fn note_namespace(&mut self, namespace: &str) {
        let missing = self.settings.source == Source::Directory
            && self.pods.by_namespace.contains_key(namespace)
            && !self.namespaces.contains_key(namespace);
        let object = ObjectRef {
            kind: Kind::Namespace,
            namespace: "".into(),
            name: namespace.into(),
        };
        let findings = if missing {
            vec![Finding::new("", Flaw::NamespaceUnknown)]
        } else {
            Vec::new()
        };
        self.note_derived(&object, findings);
    }
}

impl Pods {
    pub(super) fn pod(&self, name: &Name) -> Option<&Pod> {
        Some(&self.by_name.get(name)?.pod)
    }

    /// Whose address it is: a pod's of its own before a host's, then the running one's, the newest one's.
    fn owner(&self, address: IpAddr) -> Option<&Name> {
        let claims = self.claims.get(&address)?;
        claims
            .iter()
            .max_by_key(|name| self.by_name.get(*name).map(|entry| rank(&entry.pod)))
    }
}

fn rank(pod: &Pod) -> (bool, Phase, Option<SystemTime>) {
    (!pod.host_network, pod.phase, pod.created)
}

fn pod_ref(name: &Name) -> ObjectRef {
    ObjectRef {
        kind: Kind::Pod,
        namespace: Arc::clone(&name.0),
        name: Arc::clone(&name.1),
    }
}

/// True if the set went with its last member.
fn remove<K: std::hash::Hash + Eq, V: Ord>(sets: &mut HashMap<K, BTreeSet<V>>, key: &K, value: &V) -> bool {
    let Some(set) = sets.get_mut(key) else { return false };
    set.remove(value);
    let empty = set.is_empty();
    if empty {
        sets.remove(key);
    }
    empty
}

#[cfg(test)]
impl Pods {
    pub(super) fn sizes(&self) -> [(&'static str, usize); 5] {
        [
            ("pods", self.by_name.len()),
            ("pods by namespace", self.by_namespace.len()),
            ("pods by node", self.by_node.len()),
            ("addresses", self.claims.len()),
            ("uids", self.uids.len()),
        ]
    }
}

//! From objects to snapshots: one object applied or deleted is one patch, whose cost depends on what the object touches,
//! not on how many pods there are. Pure: no clock, no file, no lock; owned by one task, which publishes.

#[cfg(test)]
mod cost;
mod endpoints;
mod pods;
mod sandboxes;
#[cfg(test)]
mod tests;

use super::{
    enrolment::Mode,
    field::{Field, Findings},
    objects::{EndpointSlice, Kind, Meta, Namespace, Node, ObjectRef, Pod, Service, service_ranges},
    policies::{self, Policy},
    problem::{Finding, Flaw},
};
use crate::mesh::{
    MeshSnapshot, TrustDomain,
    policy::{Authorization, PeerAuth},
    service::ServiceKey,
};
use endpoints::Services;
use ipnet::IpNet;
use pods::Pods;
use sandboxes::Sandboxes;
use serde_json::Value;
use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

/// Where objects come from, and therefore what they may say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// A directory of manifests: nobody writes the redirection annotation there, so a pod's enrolment is the fact that it
    /// speaks HBONE; `warren.mesh/netns` names its network namespace.
    Directory,
    /// The API server: the annotation `ambient.istio.io/redirection` is the fact; a tenant's netns path is ignored.
    ApiServer,
}

/// What the index needs to know besides the objects.
#[derive(Debug, Clone)]
pub struct IndexSettings {
    pub trust_domain: TrustDomain,
    /// Where mesh-wide policies live (`istio-system`).
    pub root_namespace: Arc<str>,
    /// Pod and service ranges that no Node or ServiceCIDR names.
    pub extra_ranges: Vec<IpNet>,
    pub source: Source,
    /// The node whose pods the snapshot has a list of (`own`), and whose pods' network namespaces the directory source
    /// checks; without one it checks all.
    pub node_name: Option<Arc<str>>,
}

/// The objects as far as they matter, and the snapshot that follows from them.
#[derive(Debug)]
pub struct Index {
    settings: IndexSettings,
    namespaces: HashMap<Arc<str>, Namespace>,
    namespaces_changed: bool,
    nodes: HashMap<Arc<str>, Node>,
    service_ranges: BTreeMap<Arc<str>, Vec<IpNet>>,
    /// A range came or went since the snapshot's were last put together.
    ranges_changed: bool,
    #[cfg(test)]
    aggregations: usize,
    pods: Pods,
    sandboxes: Sandboxes,
    services: Services,
    snapshot: MeshSnapshot,
    changed: bool,
    /// Flaws of an object's own text.
    read: BTreeMap<ObjectRef, Vec<Finding>>,
    /// Flaws that only other objects bring about (an address twice …).
    derived: BTreeMap<ObjectRef, Vec<Finding>>,
    findings_changed: bool,
}

pub use sandboxes::{NodeSandboxes, Sandbox};

/// A pod's or slice's namespace and name.
type Name = (Arc<str>, Arc<str>);

impl Index {
    pub fn new(settings: IndexSettings) -> Self {
        let snapshot = MeshSnapshot {
            root_namespace: Arc::clone(&settings.root_namespace),
            ranges: IpNet::aggregate(&settings.extra_ranges).into(),
            node: settings.node_name.clone(),
            ..MeshSnapshot::default()
        };
        Self {
            settings,
            namespaces: HashMap::new(),
            namespaces_changed: true,
            nodes: HashMap::new(),
            service_ranges: BTreeMap::new(),
            ranges_changed: false,
            #[cfg(test)]
            aggregations: 0,
            pods: Pods::default(),
            sandboxes: Sandboxes::default(),
            services: Services::default(),
            snapshot,
            changed: true,
            read: BTreeMap::new(),
            derived: BTreeMap::new(),
            findings_changed: true,
        }
    }

    /// The object as it now is. An object that cannot be understood leaves its predecessor in place; without one it is
    /// left out, and a policy denies what it may select.
    pub fn apply(&mut self, object: &ObjectRef, value: &Value) {
        let field = Field::root(value);
        let mut findings = Findings::default();
        match Meta::read(object.kind, &field, &mut findings) {
            Ok(meta) => {
                if let Err(finding) = self.apply_read(object.kind, &meta, &field, &mut findings) {
                    findings.0.push(finding);
                }
            }
            Err(finding) => {
                findings.0.push(finding);
                if object.kind.restricts() {
                    self.fail_closed(object, &mut findings);
                }
            }
        }
        self.note(object, findings.0);
    }

    /// An object of which nothing but kind, namespace and (perhaps) name is legible.
    pub fn apply_unreadable(&mut self, object: &ObjectRef) {
        let mut findings = Findings::default();
        if object.kind.restricts() {
            self.fail_closed(object, &mut findings);
        }
        self.note(object, findings.0);
    }

    pub fn delete(&mut self, object: &ObjectRef) {
        self.note(object, Vec::new());
        match object.kind {
            Kind::Namespace => {
                if self.namespaces.remove(&object.name).is_some() {
                    self.namespace_changed(&object.name);
                }
            }
            Kind::Node => {
                if let Some(old) = self.nodes.remove(&object.name) {
                    self.node_changed(&object.name, &old, &Node::default());
                }
            }
            Kind::ServiceCidr => {
                self.service_ranges.remove(&object.name);
                self.ranges_changed = true;
            }
            Kind::AuthorizationPolicy => {
                self.changed |= self
                    .snapshot
                    .authorizations
                    .remove(&object.namespace, &object.name)
                    .is_some();
            }
            Kind::PeerAuthentication => {
                self.changed |= self
                    .snapshot
                    .peer_auths
                    .remove(&object.namespace, &object.name)
                    .is_some();
            }
            Kind::Pod => {
                let name = (Arc::clone(&object.namespace), Arc::clone(&object.name));
                if let Some(uid) = self.pods.pod(&name).and_then(|pod| pod.uid.clone()) {
                    self.forget_sandbox(&uid);
                }
                self.set_pod(name, None);
            }
            Kind::EndpointSlice => self.set_slice((Arc::clone(&object.namespace), Arc::clone(&object.name)), None),
            Kind::Service => {
                let key = ServiceKey {
                    namespace: Arc::clone(&object.namespace),
                    name: Arc::clone(&object.name),
                };
                self.set_service(key, None);
            }
        }
    }

    /// The snapshot, if it differs from the one this gave before.
    pub fn publish(&mut self) -> Option<Arc<MeshSnapshot>> {
        self.put_ranges_together();
        if !std::mem::take(&mut self.changed) {
            return None;
        }
        self.snapshot.version += 1;
        Some(Arc::new(self.snapshot.clone()))
    }

    /// Every namespace, and whether its label says that its pods are in the mesh; if that differs from what this gave before.
    pub fn publish_namespaces(&mut self) -> Option<Arc<BTreeMap<Arc<str>, bool>>> {
        std::mem::take(&mut self.namespaces_changed).then(|| {
            let all = self.namespaces.iter();
            Arc::new(
                all.map(|(name, namespace)| (Arc::clone(name), namespace.mode == Some(Mode::Ambient)))
                    .collect(),
            )
        })
    }

    /// True if a flaw came or went since this was last asked.
    pub fn findings_changed(&mut self) -> bool {
        std::mem::take(&mut self.findings_changed)
    }

    /// Every flaw of every object.
    pub fn findings(&self) -> impl Iterator<Item = (&ObjectRef, &Finding)> {
        let all = self.read.iter().chain(&self.derived);
        all.flat_map(|(object, findings)| findings.iter().map(move |finding| (object, finding)))
    }

    fn apply_read(
        &mut self,
        kind: Kind,
        meta: &Meta,
        object: &Field<'_>,
        findings: &mut Findings,
    ) -> Result<(), Finding> {
        let name = (Arc::clone(&meta.namespace), Arc::clone(&meta.name));
        match kind {
            Kind::Namespace => {
                let namespace = Namespace::read(meta, findings);
                let old = self.namespaces.insert(Arc::clone(&meta.name), namespace.clone());
                if old != Some(namespace) {
                    self.namespace_changed(&meta.name);
                }
            }
            Kind::Node => {
                let node = Node::read(meta, object, findings);
                let old = self
                    .nodes
                    .insert(Arc::clone(&meta.name), node.clone())
                    .unwrap_or_default();
                self.node_changed(&meta.name, &old, &node);
            }
            Kind::ServiceCidr => {
                self.service_ranges
                    .insert(Arc::clone(&meta.name), service_ranges(object, findings));
                self.ranges_changed = true;
            }
            Kind::AuthorizationPolicy => match policies::authorization(meta, object, findings) {
                Policy::Read(policy) => self.set_authorization(policy),
                Policy::StandIn(policy) if self.snapshot.authorizations.get(&name.0, &name.1).is_none() => {
                    self.set_authorization(policy);
                }
                Policy::StandIn(_) => {}
            },
            Kind::PeerAuthentication => match policies::peer_authentication(meta, object, findings) {
                Policy::Read(policy) => self.set_peer_auth(policy),
                Policy::StandIn(policy) if self.snapshot.peer_auths.get(&name.0, &name.1).is_none() => {
                    self.set_peer_auth(policy);
                }
                Policy::StandIn(_) => {}
            },
            Kind::Pod => {
                let pod = Pod::read(meta, object, findings)?;
                let pod = pod.map(|pod| self.sandboxes.complete(pod));
                self.set_pod(name, pod);
            }
            Kind::EndpointSlice => {
                let slice = EndpointSlice::read(meta, object, findings)?;
                self.set_slice(name, slice);
            }
            Kind::Service => {
                let service = Service::read(meta, object, findings);
                self.set_service(
                    ServiceKey {
                        namespace: name.0,
                        name: name.1,
                    },
                    service,
                );
            }
        }
        Ok(())
    }

    fn fail_closed(&mut self, object: &ObjectRef, findings: &mut Findings) {
        let (namespace, name) = (Arc::clone(&object.namespace), Arc::clone(&object.name));
        let consequence = match object.kind {
            Kind::AuthorizationPolicy => {
                if self.snapshot.authorizations.get(&namespace, &name).is_none() {
                    self.set_authorization(Authorization::unreadable(namespace, name));
                }
                "it denies everything that it may select"
            }
            Kind::PeerAuthentication
            | Kind::Namespace
            | Kind::Node
            | Kind::ServiceCidr
            | Kind::Pod
            | Kind::EndpointSlice
            | Kind::Service => {
                if self.snapshot.peer_auths.get(&namespace, &name).is_none() {
                    self.set_peer_auth(PeerAuth::unreadable(namespace, name));
                }
                "what it may select is STRICT"
            }
        };
        findings.0.push(Finding::new("", Flaw::FailsClosed { consequence }));
    }

    fn set_authorization(&mut self, policy: Authorization) {
        if self
            .snapshot
            .authorizations
            .get(&policy.namespace, &policy.name)
            .is_none_or(|old| **old != policy)
        {
            self.snapshot.authorizations.insert(policy);
            self.changed = true;
        }
    }

    fn set_peer_auth(&mut self, policy: PeerAuth) {
        if self
            .snapshot
            .peer_auths
            .get(&policy.namespace, &policy.name)
            .is_none_or(|old| **old != policy)
        {
            self.snapshot.peer_auths.insert(policy);
            self.changed = true;
        }
    }

    fn namespace_changed(&mut self, namespace: &str) {
        self.namespaces_changed = true;
        self.refresh_pods_of_namespace(namespace);
        self.refresh_services_of_namespace(namespace);
    }

    fn node_changed(&mut self, name: &Arc<str>, old: &Node, new: &Node) {
        self.ranges_changed |= old.ranges != new.ranges;
        if (&old.zone, &old.region) != (&new.zone, &new.region) {
            self.refresh_pods_of_node(name);
            self.refresh_services_of_node(name);
        }
    }

    /// Walks the nodes, not the pods; once for all ranges that came or went since it was last called.
    fn put_ranges_together(&mut self) {
        if !std::mem::take(&mut self.ranges_changed) {
            return;
        }
        #[cfg(test)]
        {
            self.aggregations += 1;
        }
        let nodes = self.nodes.values().flat_map(|node| &node.ranges);
        let services = self.service_ranges.values().flatten();
        let all: Vec<IpNet> = self
            .settings
            .extra_ranges
            .iter()
            .chain(nodes)
            .chain(services)
            .copied()
            .collect();
        let ranges = IpNet::aggregate(&all);
        if *ranges != *self.snapshot.ranges {
            self.snapshot.ranges = ranges.into();
            self.changed = true;
        }
    }

    fn note(&mut self, object: &ObjectRef, findings: Vec<Finding>) {
        note(&mut self.read, &mut self.findings_changed, object, findings);
    }

    fn note_derived(&mut self, object: &ObjectRef, findings: Vec<Finding>) {
        note(&mut self.derived, &mut self.findings_changed, object, findings);
    }
}

fn note(all: &mut BTreeMap<ObjectRef, Vec<Finding>>, changed: &mut bool, object: &ObjectRef, findings: Vec<Finding>) {
    let before = if findings.is_empty() {
        all.remove(object).unwrap_or_default()
    } else if all.get(object) == Some(&findings) {
        return;
    } else {
        *changed = true;
        all.insert(object.clone(), findings).unwrap_or_default()
    };
    *changed |= !before.is_empty();
}

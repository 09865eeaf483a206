//! Objects applied and deleted, and the snapshot read.

mod pods;
mod policies;
mod publishing;
mod services;

use super::*;
use crate::mesh::{
    Workload,
    fixtures::ip,
    service::{Endpoint, Service},
};
use serde_json::json;

fn settings(source: Source) -> IndexSettings {
    IndexSettings {
        trust_domain: TrustDomain::new("cluster.local").unwrap(),
        root_namespace: "istio-system".into(),
        extra_ranges: vec!["10.96.0.0/12".parse().unwrap()],
        source,
        node_name: None,
    }
}

struct Mesh {
    index: Index,
    now: Arc<MeshSnapshot>,
}

impl Mesh {
    fn new(source: Source) -> Self {
        let mut index = Index::new(settings(source));
        let now = index.publish().unwrap();
        Self { index, now }
    }

    fn directory() -> Self {
        Self::new(Source::Directory)
    }

    fn apply(&mut self, kind: Kind, object: &Value) {
        self.index.apply(&ObjectRef::read(kind, object).unwrap(), object);
        self.read();
    }

    fn delete(&mut self, kind: Kind, namespace: &str, name: &str) {
        self.index.delete(&ObjectRef {
            kind,
            namespace: namespace.into(),
            name: name.into(),
        });
        self.read();
    }

    fn read(&mut self) {
        if let Some(now) = self.index.publish() {
            assert_eq!(now.version, self.now.version + 1);
            self.now = now;
        }
    }

    fn namespace(&mut self, name: &str, labels: Value) {
        self.apply(Kind::Namespace, &json!({"metadata": {"name": name, "labels": labels}}));
    }

    fn node(&mut self, name: &str, zone: &str, cidr: &str) {
        let labels = json!({"topology.kubernetes.io/zone": zone, "topology.kubernetes.io/region": "r1"});
        self.apply(
            Kind::Node,
            &json!({"metadata": {"name": name, "labels": labels}, "spec": {"podCIDRs": [cidr], "podCIDR": cidr}}),
        );
    }

    fn workload(&self, name: &str) -> Option<&Arc<Workload>> {
        self.now.workloads.values().find(|workload| *workload.name == *name)
    }

    fn service(&self, name: &str) -> &Service {
        self.now
            .services
            .values()
            .find(|service| *service.key.name == *name)
            .unwrap()
    }

    fn endpoints(&self, name: &str) -> Vec<Seen> {
        let text = |endpoint: &Endpoint| (endpoint.address.to_string(), endpoint.ready, endpoint.ports.clone());
        self.service(name).endpoints.iter().map(text).collect()
    }

    fn said(&self) -> Vec<String> {
        self.index
            .findings()
            .map(|(object, finding)| format!("{object}: {finding}"))
            .collect()
    }
}

/// Address, ready, (service port, target port).
type Seen = (String, bool, Vec<(u16, u16)>);

fn pod(name: &str, address: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "shop", "uid": format!("uid-{name}"), "labels": {"app": name}},
        "spec": {"serviceAccountName": name, "nodeName": "a"},
        "status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]},
    })
}

fn with(mut object: Value, pointer: &str, value: Value) -> Value {
    match object.pointer_mut(pointer) {
        Some(place) => *place = value,
        None => {
            let (parent, key) = pointer.rsplit_once('/').unwrap();
            let key = key.replace("~1", "/");
            object
                .pointer_mut(parent)
                .unwrap()
                .as_object_mut()
                .unwrap()
                .insert(key, value);
        }
    }
    object
}

/// Since that day of January.
fn since(day: u8, object: Value) -> Value {
    with(
        object,
        "/metadata/creationTimestamp",
        json!(format!("2026-01-{day:02}T00:00:00Z")),
    )
}

fn service(name: &str, vip: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {"clusterIP": vip, "clusterIPs": [vip], "ports": [{"name": "http", "port": 80, "targetPort": "web"}]},
    })
}

fn slice(name: &str, service: &str, endpoints: Value) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "shop", "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        "endpoints": endpoints,
    })
}

fn deny(name: &str) -> Value {
    json!({"metadata": {"name": name, "namespace": "shop"}, "spec": {"action": "DENY", "rules": [{}]}})
}

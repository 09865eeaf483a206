//! Objects applied and deleted, and the snapshot read.

use super::*;
use crate::mesh::{
    Workload,
    fixtures::ip,
    policy::{self, Facts, MutualTls},
    service::{Affinity, Endpoint, Service, TrafficDistribution},
    workload::Protocol,
};
use serde_json::json;
use std::{path::PathBuf, time::Duration};

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

#[test]
fn a_pod_becomes_a_workload_with_identity_place_and_names() {
    let mut mesh = Mesh::directory();
    mesh.namespace("shop", json!({"istio.io/dataplane-mode": "ambient"}));
    mesh.node("a", "z1", "10.244.1.0/24");
    let mut api = pod("api-6f7c9-x2x4z", "10.244.1.2");
    api["metadata"]["labels"] = json!({"app": "api", "version": "v2", "pod-template-hash": "6f7c9"});
    api["metadata"]["ownerReferences"] = json!([{"kind": "ReplicaSet", "name": "api-6f7c9", "controller": true}]);
    api["spec"]["serviceAccountName"] = json!("api");
    api["status"]["podIPs"] = json!([{"ip": "10.244.1.2"}, {"ip": "fd00:1::2"}]);
    mesh.apply(Kind::Pod, &api);
    let api = mesh.workload("api-6f7c9-x2x4z").unwrap();
    assert_eq!(api.identity.as_str(), "spiffe://cluster.local/ns/shop/sa/api");
    assert_eq!(api.addresses, [ip("10.244.1.2"), ip("fd00:1::2")]);
    assert_eq!(
        (&*api.owner, &*api.canonical_service, &*api.canonical_revision),
        ("api", "api", "v2")
    );
    assert_eq!(api.locality.zone.as_deref(), Some("z1"));
    assert_eq!(
        (api.locality.region.as_deref(), api.locality.node.as_deref()),
        (Some("r1"), Some("a"))
    );
    assert_eq!(
        (api.protocol, api.enrolled, &*api.uid.0),
        (Protocol::Hbone, true, "uid-api-6f7c9-x2x4z")
    );
    assert_eq!(mesh.now.workload_at(ip("fd00:1::2")).unwrap().uid, api.uid);
    assert_eq!(mesh.said(), Vec::<String>::new());
}

#[test]
fn owner_and_canonical_names_follow_istios_order() {
    let named = |labels: Value, owners: Value| {
        let mut mesh = Mesh::new(Source::ApiServer);
        let mut object = pod("p", "10.244.1.2");
        object["metadata"]["labels"] = labels;
        object["metadata"]["ownerReferences"] = owners;
        mesh.apply(Kind::Pod, &object);
        let pod = Arc::clone(mesh.workload("p").unwrap());
        format!("{} {} {}", pod.owner, pod.canonical_service, pod.canonical_revision)
    };
    let owned = |kind: &str, name: &str| json!([{"kind": kind, "name": name, "controller": true}]);
    assert_eq!(named(json!({}), json!([])), "p p latest");
    assert_eq!(named(json!({}), owned("StatefulSet", "db")), "db db latest");
    assert_eq!(
        named(json!({"pod-template-hash": "5d"}), owned("ReplicaSet", "api-5d")),
        "api api latest"
    );
    assert_eq!(
        named(json!({}), owned("ReplicaSet", "bare-5d")),
        "bare-5d bare-5d latest"
    );
    assert_eq!(
        named(json!({}), owned("Job", "nightly-29012345")),
        "nightly nightly latest"
    );
    assert_eq!(named(json!({}), owned("Job", "once-5")), "once-5 once-5 latest");
    assert_eq!(named(json!({}), json!([{"kind": "Node", "name": "x"}])), "p p latest");
    assert_eq!(named(json!({"app": "a", "version": "1"}), json!([])), "p a 1");
    let labels = json!({"app": "a", "version": "1", "app.kubernetes.io/name": "b", "app.kubernetes.io/version": "2"});
    assert_eq!(named(labels, json!([])), "p b 2");
    let labels = json!({
        "app": "a", "app.kubernetes.io/name": "b",
        "service.istio.io/canonical-name": "c", "service.istio.io/canonical-revision": "3"
    });
    assert_eq!(named(labels, json!([])), "p c 3");
}

#[test]
fn labelling_a_namespace_enrols_its_pods_and_unlabelling_lets_them_go() {
    let mut mesh = Mesh::directory();
    mesh.apply(Kind::Pod, &pod("api", "10.244.1.2"));
    assert!(!mesh.workload("api").unwrap().enrolled);
    assert_eq!(
        mesh.said(),
        ["Namespace shop: there is no Namespace object of this name, so its labels count as absent"]
    );
    mesh.namespace("shop", json!({"istio.io/dataplane-mode": "ambient"}));
    assert!(mesh.workload("api").unwrap().enrolled);
    assert_eq!(mesh.said(), Vec::<String>::new());
    mesh.apply(
        Kind::Pod,
        &with(
            pod("api", "10.244.1.2"),
            "/metadata/labels/istio.io~1dataplane-mode",
            json!("none"),
        ),
    );
    assert!(!mesh.workload("api").unwrap().enrolled);
    mesh.apply(Kind::Pod, &pod("api", "10.244.1.2"));
    mesh.namespace("shop", json!({}));
    assert!(!mesh.workload("api").unwrap().enrolled);
    mesh.namespace("shop", json!({"istio.io/dataplane-mode": "Ambient"}));
    assert!(!mesh.workload("api").unwrap().enrolled);
    assert!(
        mesh.said()[0].contains("metadata.labels.istio.io/dataplane-mode: \"Ambient\""),
        "{:?}",
        mesh.said()
    );
    mesh.delete(Kind::Namespace, "", "shop");
    assert_eq!(mesh.workload("api").unwrap().protocol, Protocol::Tcp);
}

#[test]
fn what_speaks_hbone_is_the_label_in_a_directory_and_the_annotation_in_a_cluster() {
    let enabled = |value: &str| {
        let annotation = json!({"ambient.istio.io/redirection": value, "warren.mesh/netns": "/run/netns/x"});
        with(pod("api", "10.244.1.2"), "/metadata/annotations", annotation)
    };
    let mut cluster = Mesh::new(Source::ApiServer);
    cluster.namespace("shop", json!({"istio.io/dataplane-mode": "ambient"}));
    cluster.apply(Kind::Pod, &pod("api", "10.244.1.2"));
    let api = cluster.workload("api").unwrap();
    assert_eq!((api.enrolled, api.protocol), (true, Protocol::Tcp));
    cluster.apply(Kind::Pod, &enabled("pending"));
    assert_eq!(cluster.workload("api").unwrap().protocol, Protocol::Tcp);
    cluster.apply(Kind::Pod, &enabled("enabled"));
    let api = cluster.workload("api").unwrap();
    assert_eq!(
        (api.protocol, api.netns.clone()),
        (Protocol::Hbone, None),
        "a tenant's path is not honoured"
    );
    cluster.namespace("shop", json!({}));
    let api = cluster.workload("api").unwrap();
    assert_eq!(
        (api.enrolled, api.protocol),
        (false, Protocol::Hbone),
        "still captured until it is released"
    );

    let mut directory = Mesh::directory();
    directory.namespace("shop", json!({}));
    directory.apply(Kind::Pod, &enabled("enabled"));
    let api = directory.workload("api").unwrap();
    assert_eq!(
        (api.protocol, api.netns.clone()),
        (Protocol::Tcp, Some(PathBuf::from("/run/netns/x")))
    );
}

#[test]
fn a_pod_that_ended_or_has_no_address_is_gone() {
    let mut mesh = Mesh::new(Source::ApiServer);
    for phase in ["Succeeded", "Failed"] {
        mesh.apply(Kind::Pod, &pod("api", "10.244.1.2"));
        assert!(mesh.workload("api").is_some());
        mesh.apply(
            Kind::Pod,
            &with(pod("api", "10.244.1.2"), "/status/phase", json!(phase)),
        );
        assert!(
            mesh.workload("api").is_none() && mesh.now.by_address.is_empty(),
            "{phase}"
        );
    }
    let pending = json!({"metadata": {"name": "new", "namespace": "shop"}, "status": {"phase": "Pending"}});
    mesh.apply(Kind::Pod, &pending);
    assert_eq!(
        (mesh.workload("new"), mesh.said()),
        (None, Vec::new()),
        "a pod that has no address yet is no flaw"
    );
    mesh.apply(
        Kind::Pod,
        &json!({"metadata": {"name": "new", "namespace": "shop"}, "spec": {}}),
    );
    assert_eq!(mesh.said().len(), 1);
    assert!(
        mesh.said()[0].starts_with("Pod shop/new: status.podIPs: the pod has no address"),
        "{:?}",
        mesh.said()
    );
}

#[test]
fn of_two_pods_with_one_address_the_running_then_the_newest_counts() {
    let mut mesh = Mesh::new(Source::ApiServer);
    let at = |name: &str, created: &str| with(pod(name, "10.244.1.2"), "/metadata/creationTimestamp", json!(created));
    mesh.apply(Kind::Pod, &at("old", "2026-01-01T00:00:00Z"));
    mesh.apply(Kind::Pod, &at("new", "2026-01-02T00:00:00Z"));
    assert_eq!(&*mesh.now.workload_at(ip("10.244.1.2")).unwrap().name, "new");
    assert_eq!(mesh.workload("old"), None);
    let said = mesh.said();
    assert_eq!(
        said,
        ["Pod shop/old: status.podIPs: 10.244.1.2 is also an address of pod shop/new, which counts"]
    );
    mesh.apply(
        Kind::Pod,
        &with(at("new", "2026-01-02T00:00:00Z"), "/status/phase", json!("Pending")),
    );
    assert_eq!(&*mesh.now.workload_at(ip("10.244.1.2")).unwrap().name, "old");
    mesh.delete(Kind::Pod, "shop", "old");
    assert_eq!(&*mesh.now.workload_at(ip("10.244.1.2")).unwrap().name, "new");
    assert_eq!(mesh.said(), Vec::<String>::new());
}

#[test]
fn pods_on_the_hosts_network_share_an_address_and_are_never_named_by_it() {
    let mut mesh = Mesh::directory();
    mesh.namespace("shop", json!({"istio.io/dataplane-mode": "ambient"}));
    for name in ["one", "two"] {
        mesh.apply(
            Kind::Pod,
            &with(pod(name, "192.168.0.1"), "/spec/hostNetwork", json!(true)),
        );
    }
    assert_eq!(mesh.said(), Vec::<String>::new());
    assert!(mesh.workload("one").is_some() && mesh.workload("two").is_some());
    assert!(mesh.now.knows(ip("192.168.0.1")));
    assert_eq!(mesh.now.workload_at(ip("192.168.0.1")), None);
    assert_eq!(mesh.workload("one").unwrap().protocol, Protocol::Tcp);
    mesh.delete(Kind::Pod, "shop", "one");
    assert!(mesh.now.knows(ip("192.168.0.1")));
    mesh.delete(Kind::Pod, "shop", "two");
    assert!(!mesh.now.knows(ip("192.168.0.1")));
}

#[test]
fn a_uid_used_twice_costs_neither_pod() {
    let mut mesh = Mesh::directory();
    mesh.namespace("shop", json!({}));
    mesh.apply(Kind::Pod, &pod("one", "10.244.1.1"));
    mesh.apply(
        Kind::Pod,
        &with(pod("two", "10.244.1.2"), "/metadata/uid", json!("uid-one")),
    );
    assert_eq!(&*mesh.workload("one").unwrap().uid.0, "uid-one");
    assert_eq!(&*mesh.workload("two").unwrap().uid.0, "shop/two");
    assert!(mesh.said()[0].starts_with("Pod shop/two: metadata.uid: uid-one is also the UID of pod shop/one"));
    mesh.delete(Kind::Pod, "shop", "two");
    assert!(mesh.workload("one").is_some());
}

#[test]
fn a_malformed_pod_leaves_its_predecessor_and_names_the_field() {
    let mut mesh = Mesh::directory();
    mesh.namespace("shop", json!({}));
    mesh.apply(Kind::Pod, &pod("api", "10.244.1.2"));
    for (pointer, value, field) in [
        ("/spec/hostNetwork", json!("yes"), "spec.hostNetwork"),
        ("/spec/serviceAccountName", json!(["x"]), "spec.serviceAccountName"),
        ("/metadata/labels", json!({"app": 1}), "metadata.labels.app"),
    ] {
        mesh.apply(Kind::Pod, &with(pod("api", "10.244.9.9"), pointer, value));
        assert_eq!(mesh.workload("api").unwrap().addresses, [ip("10.244.1.2")], "{field}");
        assert!(
            mesh.said()[0].starts_with(&format!("Pod shop/api: {field}: is not ")),
            "{:?}",
            mesh.said()
        );
    }
    mesh.apply(
        Kind::Pod,
        &with(
            pod("api", "127.0.0.1"),
            "/status/podIPs",
            json!([{"ip": "10.244.1.3"}, {"ip": "x"}]),
        ),
    );
    assert_eq!(mesh.workload("api").unwrap().addresses, [ip("10.244.1.3")]);
    assert_eq!(mesh.said().len(), 2, "{:?}", mesh.said());
    mesh.apply(
        Kind::Pod,
        &with(pod("api", "10.244.1.2"), "/spec/serviceAccountName", json!("a b")),
    );
    assert_eq!(mesh.workload("api"), None);
    assert!(mesh.said()[0].contains("spec.serviceAccountName"), "{:?}", mesh.said());
}

#[test]
fn a_service_is_joined_with_its_slices_whichever_comes_first() {
    let mut mesh = Mesh::new(Source::ApiServer);
    let endpoints = json!([
        {"addresses": ["10.244.1.2"], "conditions": {"ready": true}, "nodeName": "a", "zone": "z1"},
        {"addresses": ["10.244.1.3"], "conditions": {"ready": false}},
        {"addresses": ["10.244.1.4"], "conditions": {}},
    ]);
    mesh.apply(Kind::EndpointSlice, &slice("api-1", "api", endpoints));
    assert!(mesh.now.services.is_empty());
    mesh.apply(Kind::Service, &service("api", "10.96.0.2"));
    let ports = vec![(80, 8080)];
    let first = ("10.244.1.2".to_owned(), true, ports.clone());
    let rest = [
        ("10.244.1.3".to_owned(), false, ports.clone()),
        ("10.244.1.4".to_owned(), true, ports.clone()),
    ];
    assert_eq!(mesh.endpoints("api"), [vec![first.clone()], rest.to_vec()].concat());
    assert_eq!(mesh.service("api").endpoints[0].zone.as_deref(), Some("z1"));
    assert_eq!(&*mesh.now.service_at(ip("10.96.0.2")).unwrap().key.name, "api");
    mesh.apply(
        Kind::EndpointSlice,
        &slice("api-2", "api", json!([{"addresses": ["fd00:1::2"]}])),
    );
    assert_eq!(mesh.service("api").endpoints.len(), 4);
    mesh.delete(Kind::EndpointSlice, "shop", "api-1");
    assert_eq!(mesh.endpoints("api"), [("fd00:1::2".to_owned(), true, ports)]);
    mesh.delete(Kind::Service, "shop", "api");
    assert!(mesh.now.services.is_empty() && mesh.now.by_vip.is_empty());
}

#[test]
fn a_slice_that_moves_to_another_service_leaves_the_first() {
    let mut mesh = Mesh::new(Source::ApiServer);
    mesh.apply(Kind::Service, &service("api", "10.96.0.2"));
    mesh.apply(Kind::Service, &service("web", "10.96.0.3"));
    let endpoints = json!([{"addresses": ["10.244.1.2"]}]);
    mesh.apply(Kind::EndpointSlice, &slice("s", "api", endpoints.clone()));
    mesh.apply(Kind::EndpointSlice, &slice("s", "web", endpoints));
    assert_eq!((mesh.endpoints("api").len(), mesh.endpoints("web").len()), (0, 1));
}

#[test]
fn an_endpoint_knows_its_pod_and_takes_node_and_zone_from_it() {
    let mut mesh = Mesh::new(Source::ApiServer);
    mesh.apply(Kind::Service, &service("api", "10.96.0.2"));
    mesh.apply(
        Kind::EndpointSlice,
        &slice("s", "api", json!([{"addresses": ["10.244.1.2"]}])),
    );
    assert_eq!(mesh.service("api").endpoints[0].workload, None);
    mesh.apply(Kind::Pod, &pod("api", "10.244.1.2"));
    assert_eq!(
        mesh.service("api").endpoints[0].workload,
        Some(mesh.workload("api").unwrap().uid.clone())
    );
    assert_eq!(mesh.service("api").endpoints[0].node.as_deref(), Some("a"));
    mesh.node("a", "z1", "10.244.1.0/24");
    assert_eq!(mesh.service("api").endpoints[0].zone.as_deref(), Some("z1"));
    mesh.node("a", "z2", "10.244.1.0/24");
    assert_eq!(mesh.service("api").endpoints[0].zone.as_deref(), Some("z2"));
    assert_eq!(mesh.workload("api").unwrap().locality.zone.as_deref(), Some("z2"));
    mesh.delete(Kind::Pod, "shop", "api");
    assert_eq!(mesh.service("api").endpoints[0].workload, None);
}

#[test]
fn a_host_network_endpoint_is_the_pod_that_the_slice_names() {
    let mut mesh = Mesh::new(Source::ApiServer);
    for name in ["one", "two"] {
        mesh.apply(
            Kind::Pod,
            &with(pod(name, "192.168.0.1"), "/spec/hostNetwork", json!(true)),
        );
    }
    mesh.apply(Kind::Service, &service("two", "10.96.0.2"));
    let endpoint = json!([{"addresses": ["192.168.0.1"], "targetRef": {"kind": "Pod", "name": "two"}}]);
    mesh.apply(Kind::EndpointSlice, &slice("s", "two", endpoint));
    assert_eq!(
        mesh.service("two").endpoints[0].workload.as_ref().unwrap().0,
        "uid-two".into()
    );
}

#[test]
fn ports_are_joined_by_name_and_only_tcp_counts() {
    let mut mesh = Mesh::new(Source::ApiServer);
    let mut api = service("api", "10.96.0.2");
    api["spec"]["ports"] = json!([
        {"name": "http", "port": 80}, {"name": "admin", "port": 81}, {"name": "dns", "port": 53, "protocol": "UDP"}
    ]);
    mesh.apply(Kind::Service, &api);
    let mut first = slice("s1", "api", json!([{"addresses": ["10.244.1.2"]}]));
    first["ports"] = json!([
        {"name": "admin", "port": 9000}, {"name": "http", "port": 8080}, {"name": "dns", "port": 5353, "protocol": "UDP"}
    ]);
    mesh.apply(Kind::EndpointSlice, &first);
    assert_eq!(mesh.endpoints("api")[0].2, [(80, 8080), (81, 9000)]);
    assert_eq!(mesh.service("api").ports.len(), 2);
    let mut unnamed = service("plain", "10.96.0.3");
    unnamed["spec"]["ports"] = json!([{"port": 80}]);
    mesh.apply(Kind::Service, &unnamed);
    let mut second = slice("s2", "plain", json!([{"addresses": ["10.244.1.2"]}]));
    second["ports"] = json!([{"name": "", "port": 8080}]);
    mesh.apply(Kind::EndpointSlice, &second);
    assert_eq!(mesh.endpoints("plain")[0].2, [(80, 8080)]);
}

#[test]
fn what_a_service_asks_of_balancing_is_read() {
    let mut mesh = Mesh::new(Source::ApiServer);
    mesh.apply(Kind::Service, &service("plain", "10.96.0.2"));
    let plain = mesh.service("plain");
    assert_eq!(
        (plain.affinity, plain.distribution),
        (Affinity::None, TrafficDistribution::Any)
    );
    assert!(!plain.local_only && !plain.publish_not_ready);
    let mut all = service("all", "10.96.0.3");
    all["spec"]["clusterIPs"] = json!(["10.96.0.3", "fd00:96::3"]);
    all["spec"]["sessionAffinity"] = json!("ClientIP");
    all["spec"]["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": 60}});
    all["spec"]["internalTrafficPolicy"] = json!("Local");
    all["spec"]["publishNotReadyAddresses"] = json!(true);
    all["spec"]["trafficDistribution"] = json!("PreferSameNode");
    mesh.apply(Kind::Service, &all);
    let all = mesh.service("all");
    assert_eq!(
        all.affinity,
        Affinity::ClientIp {
            timeout: Duration::from_secs(60)
        }
    );
    assert_eq!(
        (all.distribution, all.vips.len()),
        (TrafficDistribution::PreferSameNode, 2)
    );
    assert!(all.local_only && all.publish_not_ready);
    for (name, vip) in [("headless", "None"), ("pending", "")] {
        mesh.apply(
            Kind::Service,
            &with(service(name, vip), "/spec/clusterIPs", json!([vip])),
        );
        assert!(mesh.service(name).vips.is_empty());
    }
    mesh.apply(Kind::Service, &json!({
        "metadata": {"name": "external", "namespace": "shop"}, "spec": {"type": "ExternalName", "externalName": "x.y"}
    }));
    assert!(
        mesh.now
            .services
            .values()
            .all(|service| &*service.key.name != "external")
    );
    assert_eq!(mesh.said(), Vec::<String>::new());
}

#[test]
fn traffic_distribution_comes_from_the_field_then_the_service_then_the_namespace() {
    let mut mesh = Mesh::new(Source::ApiServer);
    let annotation = |value: &str| json!({"networking.istio.io/traffic-distribution": value});
    mesh.apply(Kind::Service, &service("api", "10.96.0.2"));
    let shop = json!({"metadata": {"name": "shop", "annotations": annotation("PreferClose")}});
    mesh.apply(Kind::Namespace, &shop);
    assert_eq!(mesh.service("api").distribution, TrafficDistribution::PreferSameZone);
    let annotated = with(
        service("api", "10.96.0.2"),
        "/metadata/annotations",
        annotation("PreferSameNode"),
    );
    mesh.apply(Kind::Service, &annotated);
    assert_eq!(mesh.service("api").distribution, TrafficDistribution::PreferSameNode);
    mesh.apply(
        Kind::Service,
        &with(annotated.clone(), "/spec/trafficDistribution", json!("PreferSameZone")),
    );
    assert_eq!(mesh.service("api").distribution, TrafficDistribution::PreferSameZone);
    mesh.apply(
        Kind::Service,
        &with(annotated, "/spec/trafficDistribution", json!("Nearby")),
    );
    assert!(
        mesh.said()[0].starts_with("Service shop/api: spec.trafficDistribution: \"Nearby\""),
        "{:?}",
        mesh.said()
    );
}

#[test]
fn of_two_services_with_one_vip_the_oldest_counts() {
    let mut mesh = Mesh::new(Source::ApiServer);
    let at = |name: &str, time: &str| with(service(name, "10.96.0.2"), "/metadata/creationTimestamp", json!(time));
    mesh.apply(Kind::Service, &at("young", "2026-01-02T00:00:00Z"));
    mesh.apply(Kind::Service, &at("old", "2026-01-01T00:00:00Z"));
    assert_eq!(&*mesh.now.service_at(ip("10.96.0.2")).unwrap().key.name, "old");
    assert!(mesh.service("young").vips.is_empty());
    assert_eq!(
        mesh.said(),
        ["Service shop/young: spec.clusterIPs: 10.96.0.2 is also a VIP of service shop/old, which counts"]
    );
    mesh.delete(Kind::Service, "shop", "old");
    assert_eq!(&*mesh.now.service_at(ip("10.96.0.2")).unwrap().key.name, "young");
    assert_eq!(
        (mesh.service("young").vips.clone(), mesh.said()),
        (vec![ip("10.96.0.2")], Vec::new())
    );
}

#[test]
fn the_ranges_are_the_nodes_the_service_cidrs_and_the_flags() {
    let mut mesh = Mesh::new(Source::ApiServer);
    let ranges = |mesh: &Mesh| mesh.now.ranges.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(ranges(&mesh), ["10.96.0.0/12"]);
    mesh.node("a", "z1", "10.244.1.0/24");
    mesh.node("b", "z1", "10.244.2.0/24");
    mesh.apply(
        Kind::ServiceCidr,
        &json!({"metadata": {"name": "k"}, "spec": {"cidrs": ["10.96.0.0/16", "fd00:96::/108"]}}),
    );
    assert_eq!(
        ranges(&mesh),
        ["10.96.0.0/12", "10.244.1.0/24", "10.244.2.0/24", "fd00:96::/108"]
    );
    mesh.node("b", "z1", "0.0.0.0/0");
    mesh.delete(Kind::Node, "", "a");
    mesh.delete(Kind::ServiceCidr, "", "k");
    assert_eq!(ranges(&mesh), ["10.96.0.0/12"]);
    assert!(
        mesh.said()[0].starts_with("Node b: spec.podCIDRs[0]: \"0.0.0.0/0\""),
        "{:?}",
        mesh.said()
    );
}

fn deny(name: &str) -> Value {
    json!({"metadata": {"name": name, "namespace": "shop"}, "spec": {"action": "DENY", "rules": [{}]}})
}

fn is_allowed(mesh: &Mesh, name: &str) -> bool {
    let workload = mesh.workload(name).unwrap();
    let destination = std::net::SocketAddr::new(workload.addresses[0], 80);
    let facts = Facts {
        source: "10.244.9.9:1".parse().unwrap(),
        peer: None,
        destination,
    };
    policy::authorize(&mesh.now, workload, &facts).allows()
}

#[test]
fn policies_come_and_go() {
    let mut mesh = Mesh::new(Source::ApiServer);
    mesh.apply(Kind::Pod, &pod("api", "10.244.1.2"));
    assert!(is_allowed(&mesh, "api"));
    mesh.apply(Kind::AuthorizationPolicy, &deny("d"));
    assert!(!is_allowed(&mesh, "api"));
    mesh.delete(Kind::AuthorizationPolicy, "shop", "d");
    assert!(is_allowed(&mesh, "api"));
    let strict = json!({"metadata": {"name": "default", "namespace": "shop"}, "spec": {"mtls": {"mode": "STRICT"}}});
    mesh.apply(Kind::PeerAuthentication, &strict);
    assert_eq!(
        policy::mutual_tls(&mesh.now, mesh.workload("api").unwrap(), 80),
        MutualTls::Strict
    );
    mesh.delete(Kind::PeerAuthentication, "shop", "default");
    assert_eq!(
        policy::mutual_tls(&mesh.now, mesh.workload("api").unwrap(), 80),
        MutualTls::Permissive
    );
}

#[test]
fn a_policy_that_becomes_unreadable_keeps_its_last_form_and_one_that_never_was_denies() {
    let mut mesh = Mesh::new(Source::ApiServer);
    mesh.apply(Kind::Pod, &pod("api", "10.244.1.2"));
    let open = json!({"metadata": {"name": "p", "namespace": "shop"}, "spec": {"rules": [{}]}});
    mesh.apply(Kind::AuthorizationPolicy, &open);
    mesh.apply(
        Kind::AuthorizationPolicy,
        &with(open.clone(), "/spec/rules", json!("?")),
    );
    assert!(is_allowed(&mesh, "api"));
    assert_eq!(mesh.said().len(), 2, "{:?}", mesh.said());
    mesh.delete(Kind::AuthorizationPolicy, "shop", "p");
    mesh.apply(
        Kind::AuthorizationPolicy,
        &with(open.clone(), "/spec/rules", json!("?")),
    );
    assert!(!is_allowed(&mesh, "api"));
    mesh.apply(Kind::AuthorizationPolicy, &open);
    assert!(is_allowed(&mesh, "api"));
    let object = ObjectRef {
        kind: Kind::AuthorizationPolicy,
        namespace: "shop".into(),
        name: "q".into(),
    };
    mesh.index.apply_unreadable(&object);
    mesh.read();
    assert!(!is_allowed(&mesh, "api"));
    mesh.index.delete(&object);
    mesh.read();
    assert!(is_allowed(&mesh, "api"));
}

#[test]
fn what_says_nothing_new_publishes_nothing() {
    let mut mesh = Mesh::new(Source::ApiServer);
    let apply_all = |mesh: &mut Mesh| {
        mesh.namespace("shop", json!({}));
        mesh.node("a", "z1", "10.244.1.0/24");
        mesh.apply(Kind::Pod, &pod("api", "10.244.1.2"));
        mesh.apply(Kind::Service, &service("api", "10.96.0.2"));
        mesh.apply(
            Kind::EndpointSlice,
            &slice("s", "api", json!([{"addresses": ["10.244.1.2"]}])),
        );
        mesh.apply(Kind::AuthorizationPolicy, &deny("d"));
    };
    apply_all(&mut mesh);
    let before = mesh.now.version;
    apply_all(&mut mesh);
    let heartbeat = with(pod("api", "10.244.1.2"), "/metadata/resourceVersion", json!("12345"));
    mesh.apply(Kind::Pod, &heartbeat);
    assert_eq!(mesh.now.version, before);
}

#[test]
fn nothing_is_remembered_of_what_was_deleted() {
    let mut mesh = Mesh::directory();
    for i in 0..50 {
        let address = format!("10.244.1.{i}");
        mesh.apply(Kind::Pod, &pod(&format!("p{i}"), &address));
        mesh.apply(Kind::Service, &service(&format!("p{i}"), &format!("10.96.0.{i}")));
        let name = format!("s{i}");
        mesh.apply(
            Kind::EndpointSlice,
            &slice(&name, &format!("p{i}"), json!([{"addresses": [address]}])),
        );
    }
    for i in 0..50 {
        mesh.delete(Kind::EndpointSlice, "shop", &format!("s{i}"));
        mesh.delete(Kind::Pod, "shop", &format!("p{i}"));
        mesh.delete(Kind::Service, "shop", &format!("p{i}"));
    }
    for (what, left) in mesh.index.pods.sizes().into_iter().chain(mesh.index.services.sizes()) {
        assert_eq!(left, 0, "{what}");
    }
    assert!(mesh.now.workloads.is_empty() && mesh.now.by_address.is_empty() && mesh.now.services.is_empty());
    assert_eq!(mesh.said(), Vec::<String>::new());
}

#[test]
fn two_snapshots_differ_only_in_what_changed() {
    let mut mesh = Mesh::new(Source::ApiServer);
    for i in 0..200 {
        mesh.apply(Kind::Pod, &pod(&format!("p{i}"), &format!("10.244.1.{i}")));
    }
    let before = Arc::clone(&mesh.now);
    mesh.apply(
        Kind::Pod,
        &with(pod("p7", "10.244.1.7"), "/metadata/labels/app", json!("other")),
    );
    assert_eq!(before.workloads.diff(&mesh.now.workloads).count(), 1);
    assert_eq!(before.by_address.diff(&mesh.now.by_address).count(), 0);
}

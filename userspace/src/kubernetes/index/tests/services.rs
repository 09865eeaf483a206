//! Services, their slices and their endpoints.

use super::*;
use crate::mesh::service::{Affinity, TrafficDistribution};
use std::time::Duration;

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
    mesh.apply(Kind::Service, &since(2, service("young", "10.96.0.2")));
    mesh.apply(Kind::Service, &since(1, service("old", "10.96.0.2")));
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

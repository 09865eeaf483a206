//! The snapshots as a whole: their ranges, what makes a new one, and what is left of what was deleted.

use super::*;

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

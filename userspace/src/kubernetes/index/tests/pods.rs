//! Pods, and what their namespace and node say of them.

use super::*;
use crate::mesh::workload::Protocol;
use std::path::PathBuf;

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
    let new = since(2, pod("new", "10.244.1.2"));
    mesh.apply(Kind::Pod, &since(1, pod("old", "10.244.1.2")));
    mesh.apply(Kind::Pod, &new);
    assert_eq!(&*mesh.now.workload_at(ip("10.244.1.2")).unwrap().name, "new");
    assert_eq!(mesh.workload("old"), None);
    let said = mesh.said();
    assert_eq!(
        said,
        ["Pod shop/old: status.podIPs: 10.244.1.2 is also an address of pod shop/new, which counts"]
    );
    mesh.apply(Kind::Pod, &with(new, "/status/phase", json!("Pending")));
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

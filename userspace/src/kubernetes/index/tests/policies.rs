//! Policies that come, go and cannot be read.

use super::*;
use crate::mesh::policy::{self, Facts, MutualTls};

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

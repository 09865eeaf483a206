//! Every field as people write it, judged by what it does to a connection.

mod rules;
mod spoilt;
mod strictness;

use super::*;
use crate::{
    kubernetes::objects::Kind,
    mesh::{
        MeshSnapshot,
        fixtures::{identity, snapshot, workload},
        policy::{Facts, authorize, mutual_tls},
    },
};
use serde_json::{Value, json};

fn read(spec: Value) -> (Policy<Authorization>, Vec<String>) {
    let object = json!({"metadata": {"name": "p", "namespace": "shop"}, "spec": spec});
    read_object(&object)
}

fn read_object(object: &Value) -> (Policy<Authorization>, Vec<String>) {
    let mut findings = Findings::default();
    let field = Field::root(object);
    let meta = Meta::read(Kind::AuthorizationPolicy, &field, &mut findings).unwrap();
    let policy = authorization(&meta, &field, &mut findings);
    (policy, findings.0.iter().map(ToString::to_string).collect())
}

fn read_peer(spec: Value) -> (Policy<PeerAuth>, Vec<String>) {
    let object = json!({"metadata": {"name": "p", "namespace": "shop"}, "spec": spec});
    let mut findings = Findings::default();
    let field = Field::root(&object);
    let meta = Meta::read(Kind::PeerAuthentication, &field, &mut findings).unwrap();
    let policy = peer_authentication(&meta, &field, &mut findings);
    (policy, findings.0.iter().map(ToString::to_string).collect())
}

fn inner<T>(policy: Policy<T>) -> T {
    match policy {
        Policy::Read(policy) | Policy::StandIn(policy) => policy,
    }
}

fn mesh_with(policy: Authorization) -> MeshSnapshot {
    let mut mesh = snapshot(Vec::new(), Vec::new());
    mesh.authorizations.insert(policy);
    mesh
}

/// shop/api at 10.244.1.2 calls shop/web at 10.244.1.1:8080.
fn api() -> Facts {
    Facts {
        source: "10.244.1.2:40000".parse().unwrap(),
        peer: Some(identity("shop", "api")),
        destination: "10.244.1.1:8080".parse().unwrap(),
    }
}

fn plaintext() -> Facts {
    Facts { peer: None, ..api() }
}

/// Whether a policy of this one rule matches, seen from both actions.
fn matches(rule: &Value, facts: &Facts) -> bool {
    let web = workload("shop", "web", "10.244.1.1");
    let allow = inner(read(json!({"rules": [rule]})).0);
    let deny = inner(read(json!({"action": "DENY", "rules": [rule]})).0);
    let allows = authorize(&mesh_with(allow), &web, facts).allows();
    let denies = !authorize(&mesh_with(deny), &web, facts).allows();
    assert_eq!(allows, denies, "ALLOW and DENY read {rule} differently");
    allows
}

fn source(fields: Value) -> Value {
    json!({"from": [{"source": fields}]})
}

fn strict_at(policy: PeerAuth, port: u16) -> bool {
    let mut mesh = snapshot(Vec::new(), Vec::new());
    mesh.peer_auths.insert(policy);
    mutual_tls(&mesh, &workload("shop", "web", "10.244.1.1"), port) == MutualTls::Strict
}

//! Decisions by policies of a few lines.

mod authorizing;
mod mutual_tls;
mod properties;

use super::*;
use crate::mesh::{
    fixtures::{identity, snapshot, workload},
    policy::form::Pattern,
};
use std::collections::BTreeMap;

fn policy(name: &str, action: Action, rules: Vec<Rule>) -> Authorization {
    Authorization {
        namespace: "shop".into(),
        name: name.into(),
        action,
        scope: Scope::Namespace,
        rules,
        dry_run: false,
    }
}

fn with(policies: impl IntoIterator<Item = Authorization>) -> MeshSnapshot {
    let mut snapshot = snapshot(Vec::new(), Vec::new());
    for policy in policies {
        snapshot.authorizations.insert(policy);
    }
    snapshot
}

fn web() -> Workload {
    workload("shop", "web", "10.244.1.1")
}

fn facts(peer: Option<(&str, &str)>) -> Facts {
    Facts {
        source: "10.244.1.2:40000".parse().unwrap(),
        peer: peer.map(|(namespace, account)| identity(namespace, account)),
        destination: "10.244.1.1:8080".parse().unwrap(),
    }
}

fn name(text: &str) -> Arc<str> {
    text.into()
}

const API: &str = "cluster.local/ns/shop/sa/api";

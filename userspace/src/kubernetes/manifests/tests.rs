//! Directories as people write them, and edit them.

mod editing;
mod following;
mod reading;

use super::*;
use crate::{
    kubernetes::{Problem, Source},
    mesh::{
        MeshSnapshot, TrustDomain,
        fixtures::ip,
        policy::{self, Facts},
    },
    testing::DEADLINE,
};
use std::fs;
use tempfile::TempDir;

const BASE: &str = "
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}
---
apiVersion: v1
kind: Pod
metadata: {name: web, namespace: shop, labels: {app: web}}
spec: {serviceAccountName: web, nodeName: a}
status: {phase: Running, podIP: 10.244.1.1}
";

const DENY: &str = "
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: closed, namespace: shop}
spec:
  action: DENY
  rules:
  - from:
    - source: {notNamespaces: [bank]}
  - from:
    - source: {namespaces: [bank]}
";

fn settings() -> IndexSettings {
    IndexSettings {
        trust_domain: TrustDomain::new("cluster.local").unwrap(),
        root_namespace: "istio-system".into(),
        extra_ranges: Vec::new(),
        source: Source::Directory,
        node_name: Some("a".into()),
    }
}

/// A directory that is followed for as long as this lives.
struct Followed {
    dir: TempDir,
    published: Published,
    shutdown: Shutdown,
}

impl Followed {
    fn new(files: &[(&str, &str)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let shutdown = Shutdown::new();
        let published = spawn(dir.path(), settings(), &shutdown).unwrap();
        Self {
            dir,
            published,
            shutdown,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn now(&self) -> Arc<MeshSnapshot> {
        Arc::clone(&self.published.snapshot.borrow())
    }

    fn problems(&self) -> Vec<String> {
        self.published
            .problems
            .borrow()
            .iter()
            .map(ToString::to_string)
            .collect()
    }

    async fn until(&mut self, what: &str, holds: impl Fn(&MeshSnapshot) -> bool) {
        let waited = tokio::time::timeout(DEADLINE, self.published.snapshot.wait_for(|now| holds(now))).await;
        assert!(
            waited.is_ok_and(|open| open.is_ok()),
            "never: {what}; problems: {:?}",
            self.problems()
        );
    }

    async fn until_problems(&mut self, what: &str, holds: impl Fn(&[Problem]) -> bool) {
        let waited = tokio::time::timeout(DEADLINE, self.published.problems.wait_for(|now| holds(now))).await;
        assert!(
            waited.is_ok_and(|open| open.is_ok()),
            "never: {what}; problems: {:?}",
            self.problems()
        );
    }
}

fn is_allowed(mesh: &MeshSnapshot) -> bool {
    let web = mesh.workload_at(ip("10.244.1.1")).expect("the pod is there");
    let facts = Facts {
        source: "10.244.1.9:1".parse().unwrap(),
        peer: None,
        destination: "10.244.1.1:80".parse().unwrap(),
    };
    policy::authorize(mesh, web, &facts).allows()
}

fn has_pod(mesh: &MeshSnapshot, address: &str) -> bool {
    mesh.workload_at(ip(address)).is_some()
}

fn pod(name: &str, address: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: shop}}\nspec: {{nodeName: a}}\n\
         status: {{podIP: {address}}}\n"
    )
}

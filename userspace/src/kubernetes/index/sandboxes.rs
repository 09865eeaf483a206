//! What the node knows of its own pods before the API server does: the container runtime gives a pod its namespace and
//! addresses before its first container starts, kubelet reports them a second or two later.

use super::{Index, Name};
use crate::kubernetes::objects::Pod;
use std::{collections::HashMap, net::IpAddr, path::PathBuf, sync::Arc};
use tokio::sync::mpsc;

/// A pod's sandbox, as the container runtime made it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sandbox {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub uid: Arc<str>,
    pub addresses: Vec<IpAddr>,
    /// Where its network namespace is mounted on the node.
    pub netns: PathBuf,
}

/// What a source is told of its node's sandboxes: those that an earlier daemon left word of, and news.
#[derive(Debug)]
pub struct NodeSandboxes {
    pub known: Vec<Sandbox>,
    pub news: mpsc::Receiver<Sandbox>,
}

/// The sandboxes of pods, by the pods' UIDs.
#[derive(Debug, Default)]
pub(super) struct Sandboxes(HashMap<Arc<str>, Sandbox>);

impl Sandboxes {
    pub(super) fn of(&self, uid: Option<&Arc<str>>) -> Option<&Sandbox> {
        self.0.get(uid?)
    }

    /// The pod with the addresses of its sandbox, where the API server does not know them yet.
    pub(super) fn complete(&self, mut pod: Pod) -> Pod {
        if let Some(sandbox) = self.of(pod.uid.as_ref()).filter(|_| pod.addresses.is_empty()) {
            pod.addresses.clone_from(&sandbox.addresses);
        }
        pod
    }
}

impl Index {
    /// The runtime made a sandbox for a pod of this node: the pod counts as running there from now on, until it is deleted.
    /// May come before the pod itself.
    pub fn note_sandbox(&mut self, sandbox: Sandbox) {
        let (uid, name): (_, Name) = (
            Arc::clone(&sandbox.uid),
            (Arc::clone(&sandbox.namespace), Arc::clone(&sandbox.name)),
        );
        let before = self.sandboxes.0.insert(uid, sandbox);
        let Some(mut pod) = self.pods.pod(&name).cloned() else {
            return;
        };
        // What an earlier sandbox filled in is not what the API server says.
        if before.is_some_and(|before| before.addresses == pod.addresses) {
            pod.addresses.clear();
        }
        let pod = self.sandboxes.complete(pod);
        self.set_pod(name.clone(), Some(pod));
        // The addresses may be the same, and the namespace another one.
        self.refresh_pod(&name);
    }

    /// The sandbox is gone, or its pod is.
    pub fn forget_sandbox(&mut self, uid: &str) {
        self.sandboxes.0.remove(uid);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        kubernetes::{IndexSettings, Kind, ObjectRef, Source},
        mesh::{MeshSnapshot, TrustDomain},
    };
    use serde_json::{Value, json};
    use std::path::Path;

    fn index() -> Index {
        let mut index = Index::new(IndexSettings {
            trust_domain: TrustDomain::new("cluster.local").unwrap(),
            root_namespace: "istio-system".into(),
            extra_ranges: Vec::new(),
            source: Source::ApiServer,
            node_name: None,
        });
        index.publish();
        index
    }

    fn apply(index: &mut Index, uid: &str, addresses: &[&str]) -> Option<Arc<MeshSnapshot>> {
        let labels = json!({"istio.io/dataplane-mode": "ambient"});
        let ips: Vec<Value> = addresses.iter().map(|ip| json!({ "ip": ip })).collect();
        let object = json!({
            "metadata": {"name": "web-0", "namespace": "shop", "uid": uid, "labels": labels},
            "spec": {"nodeName": "n1"},
            "status": {"phase": "Pending", "podIPs": ips}
        });
        index.apply(&pod(), &object);
        index.publish()
    }

    fn pod() -> ObjectRef {
        ObjectRef {
            kind: Kind::Pod,
            namespace: "shop".into(),
            name: "web-0".into(),
        }
    }

    fn sandbox(uid: &str, address: &str, netns: &str) -> Sandbox {
        Sandbox {
            namespace: "shop".into(),
            name: "web-0".into(),
            uid: uid.into(),
            addresses: vec![address.parse().unwrap()],
            netns: netns.into(),
        }
    }

    fn netns_at<'s>(snapshot: &'s MeshSnapshot, address: &str) -> Option<&'s Path> {
        snapshot.workload_at(address.parse().unwrap())?.netns.as_deref()
    }

    #[test]
    fn a_pod_counts_as_running_from_its_sandbox_on_and_is_the_same_when_kubelet_reports() {
        let mut index = index();
        // The runtime may be quicker than our watch.
        index.note_sandbox(sandbox("u-1", "10.244.1.7", "/run/netns/cni-1"));
        assert!(index.publish().is_none());
        let snapshot = apply(&mut index, "u-1", &[]).unwrap();
        assert_eq!(netns_at(&snapshot, "10.244.1.7"), Some(Path::new("/run/netns/cni-1")));
        assert!(snapshot.workloads.values().all(|workload| workload.enrolled));
        assert!(
            apply(&mut index, "u-1", &["10.244.1.7"]).is_none(),
            "nothing is new to us"
        );
        // Kubelet's word counts, should it differ.
        let snapshot = apply(&mut index, "u-1", &["10.244.1.7", "fd00::7"]).unwrap();
        assert_eq!(netns_at(&snapshot, "fd00::7"), Some(Path::new("/run/netns/cni-1")));
    }

    #[test]
    fn a_new_sandbox_takes_the_place_of_the_one_before() {
        let mut index = index();
        apply(&mut index, "u-1", &[]);
        index.note_sandbox(sandbox("u-1", "10.244.1.7", "/run/netns/cni-1"));
        assert!(netns_at(&index.publish().unwrap(), "10.244.1.7").is_some());
        index.note_sandbox(sandbox("u-1", "10.244.1.8", "/run/netns/cni-2"));
        let snapshot = index.publish().unwrap();
        assert_eq!(netns_at(&snapshot, "10.244.1.7"), None);
        assert_eq!(netns_at(&snapshot, "10.244.1.8"), Some(Path::new("/run/netns/cni-2")));
        // With the address of the one before.
        index.note_sandbox(sandbox("u-1", "10.244.1.8", "/run/netns/cni-3"));
        let snapshot = index.publish().unwrap();
        assert_eq!(netns_at(&snapshot, "10.244.1.8"), Some(Path::new("/run/netns/cni-3")));
    }

    #[test]
    fn a_pods_successor_of_the_same_name_does_not_get_its_sandbox_nor_lose_its_own() {
        let mut index = index();
        apply(&mut index, "u-1", &[]);
        index.note_sandbox(sandbox("u-1", "10.244.1.7", "/run/netns/cni-1"));
        index.note_sandbox(sandbox("u-2", "10.244.1.8", "/run/netns/cni-2"));
        assert!(netns_at(&index.publish().unwrap(), "10.244.1.7").is_some());
        index.delete(&pod());
        assert!(index.publish().unwrap().workloads.is_empty());
        let snapshot = apply(&mut index, "u-2", &[]).unwrap();
        assert_eq!(netns_at(&snapshot, "10.244.1.8"), Some(Path::new("/run/netns/cni-2")));
        index.delete(&pod());
        apply(&mut index, "u-1", &[]);
        assert!(index.publish().is_none_or(|snapshot| snapshot.workloads.is_empty()));
        assert_eq!(index.sandboxes.0.len(), 0);
    }
}

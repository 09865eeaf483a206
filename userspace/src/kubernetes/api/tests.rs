//! News told to the index, and the snapshot read. The watch itself is tested against a real API server, at level cluster.

use super::{Told, watching::News};
use crate::{
    kubernetes::{Index, IndexSettings, Kind, ObjectRef, Source},
    mesh::{MeshSnapshot, TrustDomain},
};
use serde_json::{Value, json};
use std::sync::Arc;

struct Cluster {
    told: Told,
    index: Index,
}

impl Cluster {
    fn new() -> Self {
        let index = Index::new(IndexSettings {
            trust_domain: TrustDomain::new("cluster.local").unwrap(),
            root_namespace: "istio-system".into(),
            extra_ranges: Vec::new(),
            source: Source::ApiServer,
            node_name: None,
        });
        Self {
            told: Told::default(),
            index,
        }
    }

    fn tell(&mut self, kind: Kind, news: impl IntoIterator<Item = News>) {
        for news in news {
            self.told.take(kind, news, &mut self.index);
        }
    }

    fn list(&mut self, kind: Kind, objects: impl IntoIterator<Item = Value>) {
        self.tell(kind, [News::ListBegins]);
        self.tell(kind, objects.into_iter().map(News::Is));
        self.tell(kind, [News::ListEnds]);
    }

    fn pods(&mut self) -> Vec<String> {
        let snapshot = self.snapshot();
        let mut names: Vec<String> = snapshot.workloads.values().map(|pod| pod.name.to_string()).collect();
        names.sort();
        names
    }

    /// The index gives a snapshot when something changed; a range that comes is a change.
    fn snapshot(&mut self) -> Arc<MeshSnapshot> {
        let marker = ObjectRef {
            kind: Kind::Node,
            namespace: "".into(),
            name: "marker".into(),
        };
        let node = json!({"metadata": {"name": "marker"}, "spec": {"podCIDRs": ["192.0.2.0/24"]}});
        self.index.apply(&marker, &node);
        let snapshot = self.index.publish().expect("a new range");
        self.index.delete(&marker);
        snapshot
    }
}

fn pod(name: &str, address: &str) -> Value {
    json!({
        "metadata": {"name": name, "namespace": "shop", "uid": format!("uid-{name}")},
        "spec": {"nodeName": "n1", "serviceAccountName": name},
        "status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]},
    })
}

fn policy(name: &str, spec: &Value) -> Value {
    json!({"metadata": {"name": name, "namespace": "shop"}, "spec": spec})
}

const KINDS: [Kind; 8] = [
    Kind::Namespace,
    Kind::Node,
    Kind::ServiceCidr,
    Kind::AuthorizationPolicy,
    Kind::PeerAuthentication,
    Kind::Pod,
    Kind::EndpointSlice,
    Kind::Service,
];

#[test]
fn nothing_is_complete_before_every_kind_has_been_listed_or_is_known_to_be_missing() {
    let mut cluster = Cluster::new();
    for kind in KINDS {
        assert!(!cluster.told.everything(), "{kind:?} is still to come");
        if kind.restricts() {
            cluster.tell(kind, [News::KindIsMissing]);
        } else {
            cluster.list(kind, []);
        }
    }
    assert!(cluster.told.everything());
}

#[test]
fn what_a_second_list_no_longer_holds_is_gone() {
    let mut cluster = Cluster::new();
    cluster.list(Kind::Pod, [pod("a", "10.0.0.1"), pod("b", "10.0.0.2")]);
    assert_eq!(cluster.pods(), ["a", "b"]);
    cluster.tell(Kind::Pod, [News::Is(pod("c", "10.0.0.3"))]);
    cluster.list(Kind::Pod, [pod("b", "10.0.0.2")]);
    assert_eq!(cluster.pods(), ["b"]);
}

#[test]
fn a_list_that_broke_off_takes_nothing_away() {
    let mut cluster = Cluster::new();
    cluster.list(Kind::Pod, [pod("a", "10.0.0.1"), pod("b", "10.0.0.2")]);
    cluster.tell(Kind::Pod, [News::ListBegins, News::Is(pod("b", "10.0.0.2"))]);
    assert_eq!(cluster.pods(), ["a", "b"]);
    cluster.list(Kind::Pod, [pod("a", "10.0.0.1")]);
    assert_eq!(cluster.pods(), ["a"]);
}

#[test]
fn a_deletion_that_was_watched_takes_that_object_alone() {
    let mut cluster = Cluster::new();
    cluster.list(Kind::Pod, [pod("a", "10.0.0.1"), pod("b", "10.0.0.2")]);
    cluster.tell(Kind::Pod, [News::IsGone(pod("a", "10.0.0.1"))]);
    assert_eq!(cluster.pods(), ["b"]);
}

#[test]
fn when_a_kind_vanishes_its_policies_vanish_and_when_it_comes_back_they_count_again() {
    let mut cluster = Cluster::new();
    let deny = policy("deny", &json!({"action": "DENY", "rules": [{}]}));
    let held = |cluster: &mut Cluster| cluster.snapshot().authorizations.get("shop", "deny").is_some();
    cluster.list(Kind::AuthorizationPolicy, [deny.clone()]);
    assert!(held(&mut cluster));
    cluster.tell(Kind::AuthorizationPolicy, [News::KindIsMissing]);
    assert!(!held(&mut cluster));
    cluster.list(Kind::AuthorizationPolicy, [deny]);
    assert!(held(&mut cluster));
}

#[test]
fn a_malformed_policy_denies_and_is_told_of_and_the_others_count() {
    let mut cluster = Cluster::new();
    cluster.list(
        Kind::AuthorizationPolicy,
        [
            policy("broken", &json!({"action": 7})),
            policy("good", &json!({"action": "ALLOW", "rules": [{}]})),
        ],
    );
    let snapshot = cluster.snapshot();
    assert!(snapshot.authorizations.get("shop", "good").is_some());
    assert!(
        snapshot.authorizations.get("shop", "broken").is_some(),
        "it must not be left out"
    );
    let told: Vec<String> = cluster.index.findings().map(|(object, _)| object.to_string()).collect();
    assert!(told.iter().any(|object| object.contains("shop/broken")), "{told:?}");
}

#[test]
fn an_object_without_a_name_is_left_out_and_harms_nobody() {
    let mut cluster = Cluster::new();
    cluster.list(
        Kind::Pod,
        [json!({"metadata": {"name": 7}}), json!([]), pod("a", "10.0.0.1")],
    );
    assert_eq!(cluster.pods(), ["a"]);
}

#[test]
fn how_far_a_kinds_changes_are_known_never_goes_back() {
    let mut cluster = Cluster::new();
    let pod = |version: &str| json!({"metadata": {"name": "web", "namespace": "shop", "resourceVersion": version}});
    cluster.tell(Kind::Pod, ["9", "10", "7"].map(|version| News::Is(pod(version))));
    assert_eq!(cluster.told.reach()[&Kind::Pod], 10);
    cluster.tell(
        Kind::Pod,
        [News::IsGone(pod("12")), News::Is(json!({"metadata": {"name": "a"}}))],
    );
    assert_eq!(cluster.told.reach()[&Kind::Pod], 12);
    assert_eq!(cluster.told.reach().get(&Kind::Service), None);
}

//! That a patched snapshot is what one built anew would be, and that a patch costs as much among twenty thousand pods as
//! among a thousand: counted in entries of the snapshot that somebody looks at, not in time.

use super::{Index, IndexSettings, Source};
use crate::{
    kubernetes::objects::{Kind, ObjectRef},
    mesh::{MeshSnapshot, SharedMap, TrustDomain, map::visited},
};
use proptest::{prelude::*, sample::select};
use serde_json::{Value, json};
use std::collections::BTreeMap;

fn index(source: Source) -> Index {
    Index::new(IndexSettings {
        trust_domain: TrustDomain::new("cluster.local").unwrap(),
        root_namespace: "root".into(),
        extra_ranges: Vec::new(),
        source,
        node_name: Some("n0".into()),
    })
}

fn apply(index: &mut Index, kind: Kind, object: &Value) {
    index.apply(&ObjectRef::read(kind, object).unwrap(), object);
}

fn pod(name: u32, node: u32, address: &str) -> Value {
    json!({
        "metadata": {"name": format!("p{name}"), "namespace": "shop", "uid": format!("u{name}"), "labels": {"app": "web"}},
        "spec": {"nodeName": format!("n{node}"), "serviceAccountName": "web"},
        "status": {"phase": "Running", "podIPs": [{"ip": address}]},
    })
}

fn service(name: u32, vip: &str) -> Value {
    let ports = json!([{"port": 80}]);
    json!({"metadata": {"name": format!("s{name}"), "namespace": "shop"}, "spec": {"clusterIPs": [vip], "ports": ports}})
}

fn slice(name: u32, service: u32, addresses: impl Iterator<Item = String>) -> Value {
    let endpoints: Vec<Value> = addresses.map(|address| json!({"addresses": [address]})).collect();
    json!({
        "metadata": {
            "name": format!("e{name}"), "namespace": "shop",
            "labels": {"kubernetes.io/service-name": format!("s{service}")},
        },
        "endpoints": endpoints, "ports": [{"port": 8080}],
    })
}

/// Few names and few values, so that objects meet: addresses and VIPs are had twice, pods move, namespaces come and go.
fn object() -> impl Strategy<Value = (Kind, Value)> {
    let mode = || select(vec![json!({}), json!({"istio.io/dataplane-mode": "ambient"})]);
    let address = || (1..5_u32).prop_map(|i| format!("10.0.0.{i}"));
    let created = || select(vec!["2026-01-01T00:00:00Z", "2026-01-02T00:00:00Z"]);
    prop_oneof![
        1 => mode().prop_map(|labels| (Kind::Namespace, json!({"metadata": {"name": "shop", "labels": labels}}))),
        1 => (0..3_u32, select(vec!["z1", "z2"]), 0..3_u32).prop_map(|(node, zone, range)| {
            let labels = json!({"topology.kubernetes.io/zone": zone});
            let spec = json!({"podCIDRs": [format!("10.{range}.0.0/24")]});
            (Kind::Node, json!({"metadata": {"name": format!("n{node}"), "labels": labels}, "spec": spec}))
        }),
        4 => (0..5_u32, 0..3_u32, address(), mode(), any::<[bool; 3]>(), created()).prop_map(
            |(name, node, address, labels, [redirected, host, ended], created)| {
                let mut pod = pod(name, node, &address);
                pod["metadata"]["labels"] = labels;
                pod["metadata"]["creationTimestamp"] = json!(created);
                pod["spec"]["hostNetwork"] = json!(host);
                if redirected {
                    pod["metadata"]["annotations"] = json!({"ambient.istio.io/redirection": "enabled"});
                }
                if ended {
                    pod["status"]["phase"] = json!("Succeeded");
                }
                (Kind::Pod, pod)
            }
        ),
        2 => (0..3_u32, 1..3_u32, created()).prop_map(|(name, vip, created)| {
            let mut service = service(name, &format!("10.96.0.{vip}"));
            service["metadata"]["creationTimestamp"] = json!(created);
            (Kind::Service, service)
        }),
        2 => (0..3_u32, 0..3_u32, proptest::collection::vec(address(), 0..4))
            .prop_map(|(name, service, addresses)| (Kind::EndpointSlice, slice(name, service, addresses.into_iter()))),
        1 => (select(vec!["shop", "root"]), select(vec!["STRICT", "PERMISSIVE"])).prop_map(|(namespace, mode)| {
            let metadata = json!({"name": "default", "namespace": namespace});
            (Kind::PeerAuthentication, json!({"metadata": metadata, "spec": {"mtls": {"mode": mode}}}))
        }),
    ]
}

fn content<K: Ord + Clone, V: Clone>(map: &SharedMap<K, V>) -> BTreeMap<K, V> {
    map.iter().map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// Everything in a snapshot but its number.
fn same(one: &MeshSnapshot, other: &MeshSnapshot) -> Result<(), TestCaseError> {
    prop_assert_eq!(content(&one.workloads), content(&other.workloads));
    prop_assert_eq!(content(&one.own), content(&other.own));
    prop_assert_eq!(content(&one.by_address), content(&other.by_address));
    prop_assert_eq!(content(&one.services), content(&other.services));
    prop_assert_eq!(content(&one.by_vip), content(&other.by_vip));
    prop_assert_eq!(&one.ranges, &other.ranges);
    let policies = |mesh: &MeshSnapshot| mesh.peer_auths.values().cloned().collect::<Vec<_>>();
    prop_assert_eq!(policies(one), policies(other));
    Ok(())
}

proptest! {
    #[test]
    fn a_patched_snapshot_is_the_one_that_would_be_built_anew(
        source in select(vec![Source::Directory, Source::ApiServer]),
        steps in proptest::collection::vec((object(), any::<Option<()>>()), 1..60),
    ) {
        let mut patched = index(source);
        let mut snapshot = patched.publish().unwrap();
        let mut there: BTreeMap<ObjectRef, Value> = BTreeMap::new();
        for ((kind, object), stays) in steps {
            let name = ObjectRef::read(kind, &object).unwrap();
            if stays.is_some() || !there.contains_key(&name) {
                patched.apply(&name, &object);
                there.insert(name, object);
            } else {
                patched.delete(&name);
                there.remove(&name);
            }
            if let Some(news) = patched.publish() {
                snapshot = news;
            }
            // In the other order than they came in, as far as their kinds and names go.
            let mut anew = index(source);
            for (name, object) in there.iter().rev() {
                anew.apply(name, object);
            }
            same(&snapshot, &anew.publish().unwrap())?;
            prop_assert_eq!(
                patched.findings().map(|(object, finding)| format!("{object}: {finding}")).collect::<Vec<_>>(),
                anew.findings().map(|(object, finding)| format!("{object}: {finding}")).collect::<Vec<_>>()
            );
        }
    }
}

#[test]
fn the_ranges_of_a_thousand_nodes_are_put_together_once() {
    let mut index = index(Source::ApiServer);
    for i in 0..1_000_u32 {
        let spec = json!({"podCIDRs": [format!("10.{}.{}.0/24", i / 256, i % 256)]});
        let node = json!({"metadata": {"name": format!("n{i}")}, "spec": spec});
        apply(&mut index, Kind::Node, &node);
    }
    let snapshot = index.publish().unwrap();
    assert_eq!(index.aggregations, 1);
    assert!(
        snapshot
            .ranges
            .iter()
            .any(|range| range.contains(&"10.3.231.7".parse::<std::net::IpAddr>().unwrap()))
    );
    // A node that says the same as before, but for its zone, has no new range.
    let labels = json!({"topology.kubernetes.io/zone": "z1"});
    let spec = json!({"podCIDRs": ["10.0.0.0/24"]});
    apply(
        &mut index,
        Kind::Node,
        &json!({"metadata": {"name": "n0", "labels": labels}, "spec": spec}),
    );
    index.publish();
    assert_eq!(index.aggregations, 1);
}

/// Nodes of ten pods, services of ten.
fn large(pods: u32) -> Index {
    let mut index = index(Source::ApiServer);
    let address = |i: u32| format!("10.{}.{}.{}", i >> 16, i >> 8 & 255, i & 255);
    for i in 0..pods / 10 {
        apply(&mut index, Kind::Node, &json!({"metadata": {"name": format!("n{i}")}}));
        apply(
            &mut index,
            Kind::Service,
            &service(i, &format!("11.0.{}.{}", i >> 8, i & 255)),
        );
        apply(
            &mut index,
            Kind::EndpointSlice,
            &slice(i, i, (i * 10..i * 10 + 10).map(address)),
        );
    }
    for i in 0..pods {
        apply(&mut index, Kind::Pod, &pod(i, i / 10, &address(i)));
    }
    index.publish();
    index
}

#[test]
fn a_change_costs_the_same_in_a_mesh_of_any_size() {
    let relabelled = |index: &mut Index| {
        let mut changed = pod(537, 53, "10.0.2.25");
        changed["metadata"]["labels"] = json!({"app": "other"});
        apply(index, Kind::Pod, &changed);
    };
    let moved = |index: &mut Index| apply(index, Kind::Pod, &pod(537, 5, "10.99.0.1"));
    let gone = |index: &mut Index| {
        let name = ObjectRef::read(Kind::Pod, &pod(537, 53, "10.0.2.25")).unwrap();
        index.delete(&name);
    };
    let fewer = |index: &mut Index| {
        apply(
            index,
            Kind::EndpointSlice,
            &slice(7, 7, std::iter::once("10.0.0.71".to_owned())),
        )
    };
    let renumbered = |index: &mut Index| apply(index, Kind::Service, &service(7, "11.9.0.1"));
    type Change<'a> = (&'a str, &'a dyn Fn(&mut Index));
    let changes: [Change<'_>; 5] = [
        ("relabelled", &relabelled),
        ("moved", &moved),
        ("gone", &gone),
        ("fewer endpoints", &fewer),
        ("another VIP", &renumbered),
    ];
    let (mut small, mut big) = (large(1_000), large(20_000));
    for (what, change) in changes {
        let costs = [&mut small, &mut big].map(|index| {
            visited(|| {
                change(index);
                assert!(index.publish().is_some(), "{what}");
            })
        });
        assert!(costs[0] > 0 && costs[0] < 100, "{what}: {costs:?}");
        assert_eq!(costs[0], costs[1], "{what}: it grows with the mesh");
    }
}

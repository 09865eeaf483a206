//! Every field as people write it, judged by what it does to a connection.

use super::*;
use crate::kubernetes::objects::Kind;
use crate::mesh::{
    MeshSnapshot,
    fixtures::{identity, snapshot, workload},
    policy::{Facts, authorize, mutual_tls},
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

#[test]
fn every_field_of_a_source_matches_and_its_not_form_is_the_opposite() {
    // (field, not form, value, matches the mesh peer, matches the plaintext client)
    for (field, not, value, peer, plain) in [
        (
            "principals",
            "notPrincipals",
            "cluster.local/ns/shop/sa/api",
            true,
            false,
        ),
        (
            "principals",
            "notPrincipals",
            "cluster.local/ns/shop/sa/web",
            false,
            false,
        ),
        ("principals", "notPrincipals", "cluster.local/ns/shop/*", true, false),
        ("principals", "notPrincipals", "cluster.local/ns/sho/*", false, false),
        ("principals", "notPrincipals", "*/sa/api", true, false),
        ("principals", "notPrincipals", "*/sa/web", false, false),
        ("principals", "notPrincipals", "*", true, false),
        (
            "principals",
            "notPrincipals",
            "other.domain/ns/shop/sa/api",
            false,
            false,
        ),
        ("namespaces", "notNamespaces", "shop", true, false),
        ("namespaces", "notNamespaces", "bank", false, false),
        ("namespaces", "notNamespaces", "sh*", true, false),
        ("namespaces", "notNamespaces", "*op", true, false),
        ("namespaces", "notNamespaces", "*", true, false),
        ("serviceAccounts", "notServiceAccounts", "shop/api", true, false),
        ("serviceAccounts", "notServiceAccounts", "bank/api", false, false),
        ("serviceAccounts", "notServiceAccounts", "api", true, false),
        ("serviceAccounts", "notServiceAccounts", "web", false, false),
        ("serviceAccounts", "notServiceAccounts", "shop/*", true, false),
        ("serviceAccounts", "notServiceAccounts", "*/api", true, false),
        ("ipBlocks", "notIpBlocks", "10.244.1.2", true, true),
        ("ipBlocks", "notIpBlocks", "10.244.1.3", false, false),
        ("ipBlocks", "notIpBlocks", "10.0.0.0/8", true, true),
        ("ipBlocks", "notIpBlocks", "10.244.1.2/16", true, true),
        ("ipBlocks", "notIpBlocks", "::ffff:10.0.0.0/104", true, true),
        ("ipBlocks", "notIpBlocks", "fd00::/8", false, false),
    ] {
        for (facts, expected) in [(api(), peer), (plaintext(), plain)] {
            assert_eq!(
                matches(&source(json!({field: [value]})), &facts),
                expected,
                "{field} {value} {facts:?}"
            );
            assert_eq!(
                matches(&source(json!({not: [value]})), &facts),
                !expected,
                "{not} {value} {facts:?}"
            );
        }
    }
}

#[test]
fn a_service_account_counts_in_any_trust_domain() {
    let peer = crate::mesh::SpiffeId::parse("spiffe://other.domain/ns/shop/sa/api").unwrap();
    let facts = Facts {
        peer: Some(peer),
        ..api()
    };
    assert!(matches(&source(json!({"serviceAccounts": ["shop/api"]})), &facts));
    assert!(!matches(
        &source(json!({"principals": ["cluster.local/ns/shop/sa/api"]})),
        &facts
    ));
}

#[test]
fn ipv6_and_mapped_clients_are_found_in_their_blocks() {
    let v6 = Facts {
        source: "[fd00:1::2]:1".parse().unwrap(),
        ..api()
    };
    assert!(matches(&source(json!({"ipBlocks": ["fd00:1::/32"]})), &v6));
    assert!(!matches(&source(json!({"ipBlocks": ["0.0.0.0/0"]})), &v6));
    let mapped = Facts {
        source: "[::ffff:10.244.1.2]:1".parse().unwrap(),
        ..api()
    };
    assert!(matches(&source(json!({"ipBlocks": ["10.244.1.0/24"]})), &mapped));
}

#[test]
fn ports_match_and_not_ports_are_the_opposite() {
    let rule = |field: &str, ports: Value| json!({"to": [{"operation": {field: ports}}]});
    for (ports, expected) in [
        (json!(["8080"]), true),
        (json!(["80", "8080"]), true),
        (json!([8080]), true),
        (json!(["80"]), false),
    ] {
        assert_eq!(matches(&rule("ports", ports.clone()), &api()), expected, "{ports}");
        assert_eq!(
            matches(&rule("notPorts", ports.clone()), &api()),
            !expected,
            "not {ports}"
        );
    }
}

#[test]
fn every_key_of_when_matches_and_not_values_are_the_opposite() {
    for (key, value, peer, plain) in [
        ("source.ip", "10.244.0.0/16", true, true),
        ("source.ip", "192.0.2.1", false, false),
        ("source.namespace", "shop", true, false),
        ("source.namespace", "b*", false, false),
        ("source.principal", "cluster.local/ns/shop/sa/api", true, false),
        ("source.principal", "*", true, false),
        ("source.principal", "*/sa/web", false, false),
        ("destination.ip", "10.244.1.1", true, true),
        ("destination.ip", "10.244.1.2/32", false, false),
        ("destination.port", "8080", true, true),
        ("destination.port", "80", false, false),
    ] {
        for (facts, expected) in [(api(), peer), (plaintext(), plain)] {
            let rule = json!({"when": [{"key": key, "values": [value]}]});
            assert_eq!(matches(&rule, &facts), expected, "{key} {value} {facts:?}");
            let rule = json!({"when": [{"key": key, "notValues": [value]}]});
            assert_eq!(matches(&rule, &facts), !expected, "not {key} {value} {facts:?}");
        }
    }
}

#[test]
fn fields_are_anded_values_and_entries_are_ored_and_all_conditions_must_hold() {
    let here = json!({"namespaces": ["shop"], "ipBlocks": ["10.244.1.2"]});
    assert!(matches(&source(here), &api()));
    assert!(!matches(
        &source(json!({"namespaces": ["shop"], "ipBlocks": ["10.9.9.9"]})),
        &api()
    ));
    assert!(matches(&source(json!({"namespaces": ["bank", "shop"]})), &api()));
    assert!(!matches(
        &source(json!({"namespaces": ["shop"], "notPrincipals": ["*/sa/api"]})),
        &api()
    ));
    let either = json!({"from": [{"source": {"namespaces": ["bank"]}}, {"source": {"namespaces": ["shop"]}}]});
    assert!(matches(&either, &api()));
    let both = json!({"from": [{"source": {"namespaces": ["shop"]}}], "to": [{"operation": {"ports": ["80"]}}]});
    assert!(!matches(&both, &api()));
    let condition = |ports: &str| json!({"key": "destination.port", "values": [ports]});
    let namespace = json!({"key": "source.namespace", "values": ["shop"]});
    assert!(matches(&json!({"when": [condition("8080"), namespace]}), &api()));
    assert!(!matches(&json!({"when": [condition("80"), namespace]}), &api()));
    let both_sides = json!({"when": [{"key": "source.ip", "values": ["10.0.0.0/8"], "notValues": ["10.244.1.2"]}]});
    assert!(!matches(&both_sides, &api()));
    assert!(matches(&json!({}), &api()) && matches(&json!({}), &plaintext()));
}

#[test]
fn a_principal_with_its_scheme_is_taken_and_reported() {
    let rule = source(json!({"principals": ["spiffe://cluster.local/ns/shop/sa/api"]}));
    assert!(matches(&rule, &api()));
    let (_, said) = read(json!({"rules": [rule]}));
    assert_eq!(said.len(), 1, "{said:?}");
    assert!(
        said[0].starts_with("spec.rules[0].from[0].source.principals[0]: has spiffe://"),
        "{said:?}"
    );
}

/// (rule, what the report names). Each is dead as ALLOW, and denies the peer of its L4 part as DENY.
#[test]
fn what_l4_cannot_judge_is_stricter_both_ways_and_reported_with_its_field() {
    let web = workload("shop", "web", "10.244.1.1");
    for (rule, field) in [
        (
            json!({"to": [{"operation": {"methods": ["GET"]}}]}),
            "spec.rules[0].to[0].operation.methods",
        ),
        (
            json!({"to": [{"operation": {"paths": ["/x"], "ports": ["8080"]}}]}),
            "spec.rules[0].to[0].operation.paths",
        ),
        (
            json!({"to": [{"operation": {"hosts": ["x"]}}]}),
            "spec.rules[0].to[0].operation.hosts",
        ),
        (
            json!({"to": [{"operation": {"notMethods": ["GET"]}}]}),
            "spec.rules[0].to[0].operation.notMethods",
        ),
        (
            source(json!({"requestPrincipals": ["*"]})),
            "spec.rules[0].from[0].source.requestPrincipals",
        ),
        (
            source(json!({"remoteIpBlocks": ["10.0.0.0/8"]})),
            "spec.rules[0].from[0].source.remoteIpBlocks",
        ),
        (
            json!({"when": [{"key": "request.headers[x]", "values": ["1"]}]}),
            "spec.rules[0].when[0].key",
        ),
        (
            json!({"when": [{"key": "connection.sni", "values": ["1"]}]}),
            "spec.rules[0].when[0].key",
        ),
        (json!({"when": [{"key": "source.ip"}]}), "spec.rules[0].when[0].values"),
        (json!({"when": [{"values": ["1"]}]}), "spec.rules[0].when[0].key"),
        (
            json!({"form": [{"source": {"namespaces": ["shop"]}}]}),
            "spec.rules[0].form",
        ),
        (
            source(json!({"principal": ["x"]})),
            "spec.rules[0].from[0].source.principal",
        ),
        (
            source(json!({"ipBlocks": ["10.244.1.300"]})),
            "spec.rules[0].from[0].source.ipBlocks[0]",
        ),
        (
            source(json!({"ipBlocks": ["10.9.9.9", "10.0.0.0/40"]})),
            "spec.rules[0].from[0].source.ipBlocks[1]",
        ),
        (
            source(json!({"notIpBlocks": ["10.244.1.2", "?"]})),
            "spec.rules[0].from[0].source.notIpBlocks[1]",
        ),
        (
            source(json!({"principals": "*"})),
            "spec.rules[0].from[0].source.principals",
        ),
        (
            source(json!({"principals": []})),
            "spec.rules[0].from[0].source.principals",
        ),
        (
            source(json!({"principals": [""]})),
            "spec.rules[0].from[0].source.principals[0]",
        ),
        (
            source(json!({"namespaces": [null]})),
            "spec.rules[0].from[0].source.namespaces[0]",
        ),
        (json!({"from": [{"source": {}}]}), "spec.rules[0].from[0].source"),
        (json!({"from": [{}]}), "spec.rules[0].from[0]"),
        (json!({"from": []}), "spec.rules[0].from"),
        (json!({"from": null}), "spec.rules[0].from"),
        (
            json!({"to": [{"operation": {"ports": ["http"]}}]}),
            "spec.rules[0].to[0].operation.ports[0]",
        ),
        (
            json!({"to": [{"operation": {"ports": ["80", "70000"]}}]}),
            "spec.rules[0].to[0].operation.ports[1]",
        ),
        (json!({"to": [{"operation": {}}]}), "spec.rules[0].to[0].operation"),
        (json!(null), "spec.rules[0]"),
        (json!("x"), "spec.rules[0]"),
    ] {
        let (allow, said) = read(json!({"rules": [rule]}));
        assert!(
            said.iter().any(|text| text.starts_with(&format!("{field}: "))),
            "{rule}: {said:?}"
        );
        assert!(
            !authorize(&mesh_with(inner(allow)), &web, &api()).allows(),
            "ALLOW {rule}"
        );
        let (deny, said) = read(json!({"action": "DENY", "rules": [rule]}));
        assert!(
            said.iter().any(|text| text.starts_with(&format!("{field}: "))),
            "{rule}: {said:?}"
        );
        assert!(
            !authorize(&mesh_with(inner(deny)), &web, &api()).allows(),
            "DENY {rule}"
        );
    }
}

#[test]
fn the_l4_part_of_a_deny_still_bounds_it() {
    let rule = json!({"from": [{"source": {"namespaces": ["bank"]}}], "to": [{"operation": {"methods": ["GET"]}}]});
    let web = workload("shop", "web", "10.244.1.1");
    let (deny, said) = read(json!({"action": "DENY", "rules": [rule]}));
    let mesh = mesh_with(inner(deny));
    assert!(authorize(&mesh, &web, &api()).allows());
    assert!(
        !authorize(
            &mesh,
            &web,
            &Facts {
                peer: Some(identity("bank", "x")),
                ..api()
            }
        )
        .allows()
    );
    assert!(
        !said.iter().any(|text| text.contains("nothing but HTTP fields")),
        "{said:?}"
    );
    let rule = json!({"to": [{"operation": {"methods": ["GET"]}}]});
    let (_, said) = read(json!({"action": "DENY", "rules": [rule]}));
    assert!(
        said.iter()
            .any(|text| text.starts_with("spec.rules[0]: has nothing but HTTP fields")),
        "{said:?}"
    );
}

#[test]
fn audit_and_custom_are_reported_and_a_waypoints_policy_is_not() {
    for action in ["AUDIT", "CUSTOM"] {
        let (policy, said) = read(json!({"action": action, "rules": [{}]}));
        assert_eq!(
            said,
            [format!("spec.action: the action {action} is not enforced at L4")]
        );
        assert_eq!(inner(policy).action.to_string(), action);
    }
    let http = json!([{"to": [{"operation": {"methods": ["GET"]}}]}]);
    let target = json!([{"kind": "Gateway", "group": "gateway.networking.k8s.io", "name": "waypoint"}]);
    let (policy, said) = read(json!({"targetRefs": target, "rules": http}));
    assert_eq!((inner(policy).scope, said), (Scope::Waypoint, Vec::<String>::new()));
}

#[test]
fn dry_run_is_an_annotation_and_a_wrong_value_enforces() {
    for (value, dry, said) in [("true", true, 0), ("false", false, 0), ("yes please", false, 1)] {
        let object = json!({
            "metadata": {"name": "p", "namespace": "shop", "annotations": {"istio.io/dry-run": value}}, "spec": {}
        });
        let (policy, findings) = read_object(&object);
        assert_eq!(
            (inner(policy).dry_run, findings.len()),
            (dry, said),
            "{value}: {findings:?}"
        );
    }
}

#[test]
fn a_policy_that_cannot_be_understood_fails_closed_for_what_it_selects() {
    let web = workload("shop", "web", "10.244.1.1");
    let other = workload("shop", "other", "10.244.1.9");
    let selector = json!({"matchLabels": {"app": "web"}});
    // (spec, does it reach shop/other too?)
    for (spec, reaches_other) in [
        (json!({"action": "FORBID", "rules": []}), true),
        (json!({"action": 1}), true),
        (json!({"action": "FORBID", "selector": selector}), false),
        (json!({"action": "DENY", "rules": "x"}), true),
        (
            json!({"action": "DENY", "selector": selector, "rules": {"from": []}}),
            false,
        ),
        (json!({"rules": "x"}), true),
        (json!({"action": "ALLOW", "rule": [{}]}), true),
        (json!({"seletor": {}, "rules": [{}]}), true),
        (json!({"selector": {"matchLabels": {"app": 1}}, "rules": [{}]}), true),
        (json!({"selector": {"matchLabel": {"app": "x"}}, "rules": [{}]}), true),
        (json!({"selector": "web", "rules": [{}]}), true),
        (
            json!({"selector": selector, "targetRefs": [{"name": "x"}], "rules": [{}]}),
            true,
        ),
        (json!({"targetRefs": "x", "rules": [{}]}), true),
        (json!("x"), true),
        (json!(null), true),
        (json!({"action": null, "rules": [{}]}), true),
        (json!({"action": "DENY", "rules": null}), true),
        (json!({"selector": null, "rules": [{}]}), true),
        (json!({"selector": {"matchLabels": null}, "rules": [{}]}), true),
        (json!({"targetRefs": null, "rules": [{}]}), true),
        (json!({"targetRef": null, "rules": [{}]}), true),
    ] {
        let (policy, said) = read(spec.clone());
        let Policy::StandIn(policy) = policy else {
            panic!("{spec} was understood")
        };
        assert!(
            said.iter().any(|text| text.contains("cannot be understood")),
            "{spec}: {said:?}"
        );
        let mesh = mesh_with(policy);
        assert!(!authorize(&mesh, &web, &api()).allows(), "{spec}");
        assert_eq!(!authorize(&mesh, &other, &api()).allows(), reaches_other, "{spec}");
    }
}

#[test]
fn an_absent_spec_allows_nothing_and_empty_selectors_and_targets_are_absent() {
    let web = workload("shop", "web", "10.244.1.1");
    for spec in [
        json!({}),
        json!({"selector": {}}),
        json!({"selector": {"matchLabels": {}}}),
        json!({"targetRefs": []}),
    ] {
        let (policy, said) = read(spec.clone());
        assert!(matches!(policy, Policy::Read(_)) && said.is_empty(), "{spec}: {said:?}");
        assert!(!authorize(&mesh_with(inner(policy)), &web, &api()).allows(), "{spec}");
    }
}

fn strict_at(policy: PeerAuth, port: u16) -> bool {
    let mut mesh = snapshot(Vec::new(), Vec::new());
    mesh.peer_auths.insert(policy);
    mutual_tls(&mesh, &workload("shop", "web", "10.244.1.1"), port) == MutualTls::Strict
}

#[test]
fn every_mode_of_a_peer_authentication_is_read() {
    for (mode, strict) in [
        ("STRICT", true),
        ("PERMISSIVE", false),
        ("DISABLE", false),
        ("UNSET", false),
    ] {
        let (policy, said) = read_peer(json!({"mtls": {"mode": mode}}));
        assert_eq!((strict_at(inner(policy), 80), said.len()), (strict, 0), "{mode}");
    }
    assert!(!strict_at(inner(read_peer(json!({})).0), 80));
    let ports = json!({"8080": {"mode": "DISABLE"}, "9090": {"mode": "UNSET"}});
    let with = json!({"selector": {"matchLabels": {"app": "web"}}, "mtls": {"mode": "STRICT"}, "portLevelMtls": ports});
    let (policy, said) = read_peer(with);
    let policy = inner(policy);
    assert_eq!(said, Vec::<String>::new());
    assert!(!strict_at(policy.clone(), 8080) && strict_at(policy.clone(), 9090) && strict_at(policy, 1));
    let (policy, said) = read_peer(json!({"mtls": {"mode": "STRICT"}, "portLevelMtls": ports}));
    assert!(strict_at(inner(policy), 8080));
    assert_eq!(said, ["spec.portLevelMtls: counts only in a policy with a selector"]);
}

#[test]
fn a_peer_authentication_that_cannot_be_understood_is_strict() {
    for spec in [
        json!({"mtls": {"mode": "STRIKT"}}),
        json!({"mtls": "STRICT"}),
        json!({"mtl": {"mode": "PERMISSIVE"}}),
        json!({"selector": {"matchLabels": {"app": "web"}}, "portLevelMtls": {"http": {"mode": "PERMISSIVE"}}}),
        json!({"selector": {"matchLabels": {"app": "web"}}, "portLevelMtls": {"80": {"mode": "?"}}}),
        json!({"selector": 1}),
        json!([]),
        json!(null),
        json!({"mtls": null}),
        json!({"mtls": {"mode": null}}),
        json!({"selector": {"matchLabels": {"app": "web"}}, "portLevelMtls": {"80": null}}),
    ] {
        let (policy, said) = read_peer(spec.clone());
        assert!(matches!(policy, Policy::StandIn(_)), "{spec}: {said:?}");
        assert!(strict_at(inner(policy), 80), "{spec}");
    }
}

/// Puts `junk` in the place of the `n`th value below `value`, counted modulo how many there are.
fn spoil(value: &mut Value, n: usize, junk: &Value) {
    fn count(value: &Value) -> usize {
        1 + match value {
            Value::Array(elements) => elements.iter().map(count).sum::<usize>(),
            Value::Object(members) => members.values().map(count).sum(),
            _ => 0,
        }
    }
    fn replace(value: &mut Value, n: &mut usize, junk: &Value) {
        if *n == 0 {
            *value = junk.clone();
            *n = usize::MAX;
            return;
        }
        *n -= 1;
        match value {
            Value::Array(elements) => elements.iter_mut().for_each(|element| replace(element, n, junk)),
            Value::Object(members) => members.values_mut().for_each(|member| replace(member, n, junk)),
            _ => {}
        }
    }
    let mut n = n % count(value);
    replace(value, &mut n, junk);
}

fn clients() -> impl Iterator<Item = Facts> {
    let peers = [
        None,
        Some(identity("shop", "api")),
        Some(identity("bank", "teller")),
        Some(identity("bank", "web")),
    ];
    peers.into_iter().flat_map(|peer| {
        ["10.244.1.2:1", "192.0.2.1:1"].into_iter().flat_map(move |source| {
            let peer = peer.clone();
            [80, 8080].into_iter().map(move |port| Facts {
                source: source.parse().unwrap(),
                peer: peer.clone(),
                destination: std::net::SocketAddr::new("10.244.1.1".parse().unwrap(), port),
            })
        })
    })
}

use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    /// Whatever value of a policy is spoilt, it lets nobody in whom it kept out.
    #[test]
    fn spoiling_any_value_of_a_policy_never_widens_access(
        n: usize,
        deny: bool,
        junk in prop_oneof![Just(json!(null)), Just(json!(true)), Just(json!({"x": {}})), Just(json!([[[]]])), Just(json!(-1.5))],
    ) {
        let spec = json!({
            "action": if deny { "DENY" } else { "ALLOW" },
            "selector": {"matchLabels": {"app": "web"}},
            "rules": [
                {
                    "from": [
                        {"source": {"principals": ["cluster.local/ns/shop/*"], "notPrincipals": ["*/sa/web"]}},
                        {"source": {"namespaces": ["bank"], "serviceAccounts": ["bank/teller"], "ipBlocks": ["192.0.2.0/24"]}},
                    ],
                    "to": [{"operation": {"ports": ["8080"], "notPorts": ["1"]}}],
                    "when": [{"key": "source.ip", "values": ["0.0.0.0/0"], "notValues": ["10.9.9.9"]}],
                },
                {"from": [{"source": {"notNamespaces": ["shop"]}}]},
            ],
        });
        let mut spoilt = spec.clone();
        spoil(&mut spoilt, n, &junk);
        let web = workload("shop", "web", "10.244.1.1");
        let (before, after) = (mesh_with(inner(read(spec).0)), mesh_with(inner(read(spoilt.clone()).0)));
        for facts in clients() {
            let (before, after) = (authorize(&before, &web, &facts), authorize(&after, &web, &facts));
            prop_assert!(before.allows() || !after.allows(), "{spoilt}: {facts:?}");
        }
    }

    #[test]
    fn spoiling_any_value_of_a_strict_peer_authentication_never_opens_a_port(
        n: usize,
        junk in prop_oneof![Just(json!(null)), Just(json!(true)), Just(json!({"x": {}})), Just(json!([[[]]])), Just(json!("?"))],
    ) {
        let mut spec = json!({
            "selector": {"matchLabels": {"app": "web"}},
            "mtls": {"mode": "STRICT"},
            "portLevelMtls": {"8080": {"mode": "STRICT"}, "9090": {"mode": "UNSET"}},
        });
        spoil(&mut spec, n, &junk);
        // A label with another value selects others: that is no spoilt policy, but another one.
        prop_assume!(spec.pointer("/selector/matchLabels/app") != Some(&json!("?")));
        let policy = inner(read_peer(spec.clone()).0);
        for port in [80, 8080, 9090] {
            prop_assert!(strict_at(policy.clone(), port), "{spec} at {port}");
        }
    }
}

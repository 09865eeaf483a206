//! What a rule matches.

use super::*;

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

//! What layer 4 cannot judge and what nobody can understand: stricter, and reported.

use super::*;

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

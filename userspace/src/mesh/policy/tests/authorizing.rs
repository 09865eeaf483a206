//! Who may connect to whom, and which policy said so.

use super::*;

fn from(principal: &str) -> Rule {
    let principals = OneOf {
        values: vec![Pattern::new(principal)],
        not_values: Vec::new(),
    };
    Rule {
        from: vec![Source {
            principals,
            ..Source::default()
        }],
        ..Rule::default()
    }
}

#[test]
fn without_policies_everyone_may() {
    assert_eq!(authorize(&with([]), &web(), &facts(None)), Verdict::AllowedByDefault);
    assert!(unrestricted(&with([]), &web()));
}

#[test]
fn a_matching_deny_wins_over_every_allow_and_is_named() {
    let mesh = with([
        policy("a-allow", Action::Allow, vec![Rule::default()]),
        policy("m-deny", Action::Deny, vec![from(API)]),
        policy("z-deny", Action::Deny, vec![Rule::default()]),
    ]);
    let denied = |by: &str| Verdict::DeniedBy {
        namespace: name("shop"),
        name: name(by),
    };
    assert_eq!(
        authorize(&mesh, &web(), &facts(Some(("shop", "api")))),
        denied("m-deny")
    );
    assert_eq!(
        authorize(&mesh, &web(), &facts(Some(("shop", "other")))),
        denied("z-deny")
    );
}

#[test]
fn once_an_allow_selects_the_workload_only_what_matches_may() {
    let mesh = with([policy("one", Action::Allow, vec![from(API)])]);
    let allowed = Verdict::AllowedBy {
        namespace: name("shop"),
        name: name("one"),
    };
    assert_eq!(authorize(&mesh, &web(), &facts(Some(("shop", "api")))), allowed);
    assert_eq!(
        authorize(&mesh, &web(), &facts(Some(("shop", "other")))),
        Verdict::NotAllowed
    );
    assert_eq!(authorize(&mesh, &web(), &facts(None)), Verdict::NotAllowed);
    let elsewhere = workload("bank", "web", "10.244.1.3");
    assert_eq!(authorize(&mesh, &elsewhere, &facts(None)), Verdict::AllowedByDefault);
}

#[test]
fn a_policy_without_rules_never_matches_and_an_empty_rule_always_does() {
    let anyone = facts(None);
    assert_eq!(
        authorize(&with([policy("p", Action::Allow, vec![])]), &web(), &anyone),
        Verdict::NotAllowed
    );
    assert_eq!(
        authorize(&with([policy("p", Action::Deny, vec![])]), &web(), &anyone),
        Verdict::AllowedByDefault
    );
    assert!(
        authorize(
            &with([policy("p", Action::Allow, vec![Rule::default()])]),
            &web(),
            &anyone
        )
        .allows()
    );
    assert!(
        !authorize(
            &with([policy("p", Action::Deny, vec![Rule::default()])]),
            &web(),
            &anyone
        )
        .allows()
    );
}

#[test]
fn what_cannot_be_judged_at_l4_makes_a_rule_stricter_both_ways() {
    let http = Rule {
        beyond_l4: true,
        ..from(API)
    };
    let api = facts(Some(("shop", "api")));
    assert_eq!(
        authorize(&with([policy("p", Action::Allow, vec![http.clone()])]), &web(), &api),
        Verdict::NotAllowed
    );
    assert!(!authorize(&with([policy("p", Action::Deny, vec![http.clone()])]), &web(), &api).allows());
    let other = facts(Some(("shop", "other")));
    assert!(authorize(&with([policy("p", Action::Deny, vec![http])]), &web(), &other).allows());
}

#[test]
fn a_dry_run_is_told_and_never_enforced() {
    let deny = Authorization {
        dry_run: true,
        ..policy("p", Action::Deny, vec![Rule::default()])
    };
    let mesh = with([deny]);
    assert_eq!(authorize(&mesh, &web(), &facts(None)), Verdict::AllowedByDefault);
    assert!(unrestricted(&mesh, &web()));
    let told = dry_run(&mesh, &web(), &facts(None));
    assert_eq!(
        told,
        Some(Verdict::DeniedBy {
            namespace: name("shop"),
            name: name("p")
        })
    );
    assert_eq!(dry_run(&with([]), &web(), &facts(None)), None);
}

#[test]
fn audit_and_custom_restrict_nobody_at_l4() {
    for action in [Action::Audit, Action::Custom] {
        let mesh = with([policy("p", action, vec![Rule::default()])]);
        assert_eq!(authorize(&mesh, &web(), &facts(None)), Verdict::AllowedByDefault);
        assert!(unrestricted(&mesh, &web()));
    }
}

#[test]
fn a_scope_is_the_mesh_a_namespace_or_labels_and_never_a_waypoints() {
    let labels = |value: &str| Scope::Selector(BTreeMap::from([("app".to_owned(), value.to_owned())]));
    let (shop, bank) = (web(), workload("bank", "web", "10.244.1.3"));
    for (namespace, scope, in_shop, in_bank) in [
        ("shop", Scope::Namespace, true, false),
        ("istio-system", Scope::Namespace, true, true),
        ("shop", labels("web"), true, false),
        ("shop", labels("api"), false, false),
        ("istio-system", labels("web"), true, true),
        ("istio-system", labels("api"), false, false),
        ("other", Scope::Namespace, false, false),
        ("shop", Scope::Waypoint, false, false),
        ("istio-system", Scope::Waypoint, false, false),
    ] {
        let deny = Authorization {
            namespace: namespace.into(),
            scope: scope.clone(),
            ..policy("p", Action::Deny, vec![Rule::default()])
        };
        let mesh = with([deny]);
        let denies = |workload| !authorize(&mesh, workload, &facts(None)).allows();
        assert_eq!(
            (denies(&shop), denies(&bank)),
            (in_shop, in_bank),
            "{namespace} {scope:?}"
        );
        assert_eq!(unrestricted(&mesh, &shop), !in_shop);
    }
}

#[test]
fn every_label_of_a_selector_must_be_there() {
    let labels = BTreeMap::from([
        ("app".to_owned(), "web".to_owned()),
        ("version".to_owned(), "v2".to_owned()),
    ]);
    let deny = Authorization {
        scope: Scope::Selector(labels),
        ..policy("p", Action::Deny, vec![Rule::default()])
    };
    assert!(authorize(&with([deny]), &web(), &facts(None)).allows());
}

#[test]
fn a_change_of_policy_is_seen_by_the_namespaces_it_can_reach_alone() {
    let old = with([policy("p", Action::Allow, vec![])]);
    let mut new = old.clone();
    assert!(unchanged(&old, &new, "shop"));
    new.authorizations.insert(policy("q", Action::Deny, vec![]));
    assert!(!unchanged(&old, &new, "shop"));
    assert!(unchanged(&old, &new, "bank"));
    let mut root = old.clone();
    root.peer_auths
        .insert(PeerAuth::unreadable("istio-system".into(), "default".into()));
    assert!(!unchanged(&old, &root, "shop") && !unchanged(&old, &root, "bank"));
    assert!(new.authorizations.remove("shop", "q").is_some());
    assert_eq!(new.authorizations.len(), 1);
}

#[test]
fn patterns_are_exact_prefix_suffix_or_present() {
    for (pattern, parsed) in [
        ("abc", Pattern::Exact("abc".into())),
        ("abc*", Pattern::Prefix("abc".into())),
        ("*abc", Pattern::Suffix("abc".into())),
        ("*", Pattern::Present),
        ("*abc*", Pattern::Suffix("abc*".into())),
        ("a*c", Pattern::Exact("a*c".into())),
    ] {
        assert_eq!(Pattern::new(pattern), parsed, "{pattern}");
    }
}

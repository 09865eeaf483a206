use super::*;
use crate::mesh::{
    fixtures::{identity, snapshot, workload},
    policy::form::Pattern,
};
use ipnet::IpNet;
use proptest::{collection::vec, option, prelude::*, sample::select};
use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime},
};

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

const API: &str = "cluster.local/ns/shop/sa/api";

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

fn peer_auth(namespace: &str, name: &str, mode: Option<MutualTls>) -> PeerAuth {
    PeerAuth {
        namespace: namespace.into(),
        name: name.into(),
        created: None,
        scope: Scope::Namespace,
        mode,
        ports: BTreeMap::new(),
        unreadable: false,
    }
}

fn of_web(policy: PeerAuth) -> PeerAuth {
    PeerAuth {
        scope: Scope::Selector(BTreeMap::from([("app".to_owned(), "web".to_owned())])),
        ..policy
    }
}

fn mode_with(policies: impl IntoIterator<Item = PeerAuth>) -> MutualTls {
    let mut mesh = with([]);
    policies.into_iter().for_each(|policy| mesh.peer_auths.insert(policy));
    mutual_tls(&mesh, &web(), 8080)
}

const STRICT: Option<MutualTls> = Some(MutualTls::Strict);
const PERMISSIVE: Option<MutualTls> = Some(MutualTls::Permissive);

#[test]
fn the_nearest_peer_authentication_wins_and_unset_asks_the_next() {
    assert_eq!(mode_with([]), MutualTls::Permissive);
    let mesh = || peer_auth("istio-system", "default", STRICT);
    assert_eq!(mode_with([mesh()]), MutualTls::Strict);
    assert_eq!(
        mode_with([mesh(), peer_auth("shop", "default", PERMISSIVE)]),
        MutualTls::Permissive
    );
    assert_eq!(
        mode_with([mesh(), peer_auth("shop", "default", None)]),
        MutualTls::Strict
    );
    assert_eq!(
        mode_with([mesh(), peer_auth("bank", "default", PERMISSIVE)]),
        MutualTls::Strict
    );
    let own = of_web(peer_auth("shop", "web", STRICT));
    assert_eq!(
        mode_with([peer_auth("shop", "default", PERMISSIVE), own.clone()]),
        MutualTls::Strict
    );
    let unset = PeerAuth { mode: None, ..own };
    assert_eq!(
        mode_with([peer_auth("shop", "default", PERMISSIVE), mesh(), unset]),
        MutualTls::Permissive
    );
}

#[test]
fn of_two_peer_authentications_of_a_level_the_oldest_wins() {
    let at = |seconds| Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
    let old = PeerAuth {
        created: at(10),
        ..peer_auth("shop", "z-old", STRICT)
    };
    let young = PeerAuth {
        created: at(20),
        ..peer_auth("shop", "a-young", PERMISSIVE)
    };
    let timeless = peer_auth("shop", "a-timeless", PERMISSIVE);
    assert_eq!(
        mode_with([old.clone(), young.clone(), timeless.clone()]),
        MutualTls::Strict
    );
    assert_eq!(mode_with([young, timeless]), MutualTls::Permissive);
    let (old, young) = (
        of_web(old),
        of_web(PeerAuth {
            created: at(20),
            ..peer_auth("shop", "a", PERMISSIVE)
        }),
    );
    assert_eq!(mode_with([old, young]), MutualTls::Strict);
}

#[test]
fn a_port_has_its_own_mode_and_unset_is_the_workloads() {
    let mut mesh = with([]);
    let ports = BTreeMap::from([(8080, PERMISSIVE), (9090, None), (7070, STRICT)]);
    mesh.peer_auths.insert(of_web(PeerAuth {
        ports,
        ..peer_auth("shop", "web", STRICT)
    }));
    let at = |port| mutual_tls(&mesh, &web(), port);
    assert_eq!(
        (at(8080), at(9090), at(1)),
        (MutualTls::Permissive, MutualTls::Strict, MutualTls::Strict)
    );
    assert_eq!(port_modes(&mesh, &web()), [(8080, MutualTls::Permissive)]);
    assert_eq!(workload_mode(&mesh, &web()), MutualTls::Strict);
}

#[test]
fn a_peer_authentication_that_nobody_can_read_is_strict_whatever_else_says() {
    let open = of_web(PeerAuth {
        created: Some(SystemTime::UNIX_EPOCH),
        ..peer_auth("shop", "web", PERMISSIVE)
    });
    assert_eq!(
        mode_with([open, PeerAuth::unreadable("shop".into(), "x".into())]),
        MutualTls::Strict
    );
    assert_eq!(
        mode_with([PeerAuth::unreadable("bank".into(), "x".into())]),
        MutualTls::Permissive
    );
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

fn patterns() -> impl Strategy<Value = OneOf<Pattern>> {
    let one = || select(vec!["*", "a", "b", "a*", "*b", "cluster.local/*", "*/sa/a", API]).prop_map(Pattern::new);
    (vec(one(), 0..3), vec(one(), 0..2)).prop_map(|(values, not_values)| OneOf { values, not_values })
}

fn blocks() -> impl Strategy<Value = OneOf<IpNet>> {
    let one =
        || select(vec!["10.0.0.0/8", "10.244.1.2/32", "192.0.2.0/24", "fd00::/8"]).prop_map(|b| b.parse().unwrap());
    (vec(one(), 0..2), vec(one(), 0..2)).prop_map(|(values, not_values)| OneOf { values, not_values })
}

fn ports() -> impl Strategy<Value = OneOf<u16>> {
    let one = || select(vec![80u16, 8080]);
    (vec(one(), 0..2), vec(one(), 0..2)).prop_map(|(values, not_values)| OneOf { values, not_values })
}

fn rules() -> impl Strategy<Value = Rule> {
    let source = (patterns(), patterns(), blocks()).prop_map(|(principals, namespaces, ip_blocks)| Source {
        principals,
        namespaces,
        ip_blocks,
        ..Source::default()
    });
    let condition = prop_oneof![
        patterns().prop_map(Condition::SourceNamespace),
        patterns().prop_map(Condition::SourcePrincipal),
        blocks().prop_map(Condition::SourceIp),
        ports().prop_map(Condition::DestinationPort),
    ];
    let to = ports().prop_map(|ports| Operation { ports });
    (vec(source, 0..3), vec(to, 0..2), vec(condition, 0..3), any::<bool>()).prop_map(|(from, to, when, beyond_l4)| {
        Rule {
            from,
            to,
            when,
            beyond_l4,
        }
    })
}

fn scopes() -> impl Strategy<Value = (&'static str, Scope)> {
    let selector = |value: &str| Scope::Selector(BTreeMap::from([("app".to_owned(), value.to_owned())]));
    select(vec![
        ("shop", Scope::Namespace),
        ("istio-system", Scope::Namespace),
        ("bank", Scope::Namespace),
        ("shop", selector("web")),
        ("shop", selector("api")),
        ("shop", Scope::Waypoint),
    ])
}

fn actions() -> impl Strategy<Value = Action> {
    select(vec![Action::Allow, Action::Allow, Action::Deny, Action::Audit])
}

fn policies(action: impl Strategy<Value = Action>, names: &'static str) -> impl Strategy<Value = Authorization> {
    (action, names, scopes(), vec(rules(), 0..3), prop::bool::weighted(0.1)).prop_map(
        |(action, name, (namespace, scope), rules, dry_run)| Authorization {
            namespace: namespace.into(),
            name: name.into(),
            action,
            scope,
            rules,
            dry_run,
        },
    )
}

fn connections() -> impl Strategy<Value = Facts> {
    let peer = option::of((select(vec!["a", "shop", "b"]), select(vec!["a", "api"])));
    let source = select(vec!["10.244.1.2:1", "192.0.2.7:1", "[fd00::1]:1"]);
    (peer, source, select(vec![80u16, 8080])).prop_map(|(peer, source, port)| Facts {
        source: source.parse().unwrap(),
        destination: SocketAddr::new("10.244.1.1".parse().unwrap(), port),
        ..facts(peer)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2048))]

    #[test]
    fn adding_a_deny_never_widens_access(
        others in vec(policies(actions(), "[a-d]"), 0..5),
        deny in policies(Just(Action::Deny), "[x-z]"),
        facts in connections(),
    ) {
        let before = with(others.clone());
        let after = with(others.into_iter().chain([deny]));
        prop_assert!(authorize(&before, &web(), &facts).allows() || !authorize(&after, &web(), &facts).allows());
    }

    /// The last ALLOW that selects a workload is another matter: without any, Istio lets everyone in whom no DENY names.
    #[test]
    fn removing_an_allow_while_another_still_selects_the_workload_never_widens_access(
        others in vec(policies(actions(), "[a-d]"), 0..5),
        still_there in policies(Just(Action::Allow), "e"),
        removed in policies(Just(Action::Allow), "[x-z]"),
        facts in connections(),
    ) {
        let still_there =
            Authorization { namespace: name("shop"), scope: Scope::Namespace, dry_run: false, ..still_there };
        let after = with(others.clone().into_iter().chain([still_there.clone()]));
        let before = with(others.into_iter().chain([still_there, removed]));
        prop_assert!(authorize(&before, &web(), &facts).allows() || !authorize(&after, &web(), &facts).allows());
    }

    #[test]
    fn removing_the_last_allow_opens_exactly_what_no_deny_matches(
        others in vec(policies(Just(Action::Deny), "[a-d]"), 0..5),
        facts in connections(),
    ) {
        let mesh = with(others);
        let denied = matches!(authorize(&mesh, &web(), &facts), Verdict::DeniedBy { .. });
        prop_assert_eq!(authorize(&mesh, &web(), &facts).allows(), !denied);
    }

    #[test]
    fn a_field_that_cannot_be_judged_never_widens_access(
        others in vec(policies(actions(), "[a-d]"), 0..4),
        policy in policies(actions(), "[x-z]"),
        facts in connections(),
    ) {
        let mut stricter = policy.clone();
        stricter.rules.iter_mut().for_each(|rule| rule.beyond_l4 = true);
        let before = with(others.clone().into_iter().chain([policy]));
        let after = with(others.into_iter().chain([stricter]));
        prop_assert!(authorize(&before, &web(), &facts).allows() || !authorize(&after, &web(), &facts).allows());
    }

    #[test]
    fn a_policy_that_nobody_can_read_lets_nobody_in(
        others in vec(policies(actions(), "[a-d]"), 0..4),
        facts in connections(),
    ) {
        let mesh = with(others.into_iter().chain([Authorization::unreadable("shop".into(), "zz".into())]));
        prop_assert!(!authorize(&mesh, &web(), &facts).allows());
    }
}

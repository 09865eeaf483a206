//! What holds of any policies and any connection.

use super::*;
use ipnet::IpNet;
use proptest::{collection::vec, option, prelude::*, sample::select};

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

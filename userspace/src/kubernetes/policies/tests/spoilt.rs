//! Policies of which any value is spoilt.

use super::*;
use proptest::prelude::*;

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

//! Which endpoint of a service a connection goes to. Pure: randomness is an argument.

use super::{
    Workload,
    service::{Affinity, Endpoint, Service, TrafficDistribution},
};
use std::net::IpAddr;

/// Why no endpoint was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoEndpoint {
    #[error("the service has no such port")]
    NoSuchPort,
    #[error("no healthy upstream")]
    NoneReady,
}

/// What the choice depends on besides the service.
#[derive(Debug, Clone, Copy)]
pub struct Choice<'a> {
    pub from: &'a Workload,
    /// The VIP that was dialled: the endpoint is of its family.
    pub vip: IpAddr,
    pub port: u16,
    /// Uniformly random.
    pub random: u64,
}

/// The chosen endpoint and its port there: among the ready ones of the VIP's family, of the nearest group that
/// `trafficDistribution` asks for and that is not empty (same node, same zone, any).
///
/// `sessionAffinity: ClientIP` is a rendezvous hash of the client's address over that group, not a table of clients with
/// a clock: a client keeps its endpoint for as long as the endpoint is in the group, so `timeoutSeconds` never ends an
/// affinity early; every node and every restart chooses alike, and of a lost endpoint's clients alone move.
///
/// # Errors
/// No such port, or nobody ready behind it.
pub fn choose<'s>(service: &'s Service, choice: Choice<'_>) -> Result<(&'s Endpoint, u16), NoEndpoint> {
    if !service.ports.iter().any(|port| port.port == choice.port) {
        return Err(NoEndpoint::NoSuchPort);
    }
    let (mut nearest, mut count) = (Nearness::Any, 0);
    for (_, _, nearness) in candidates(service, choice) {
        if nearness > nearest {
            (nearest, count) = (nearness, 0);
        }
        count += u64::from(nearness == nearest);
    }
    let mut group = candidates(service, choice).filter(|(_, _, nearness)| *nearness == nearest);
    let chosen = match service.affinity {
        Affinity::ClientIp { .. } => {
            let client = choice.from.address_like(choice.vip).unwrap_or(choice.vip);
            group.max_by_key(|(endpoint, _, _)| (weight(client, endpoint.address), endpoint.address))
        }
        Affinity::None => group.nth(scale(choice.random, count)),
    };
    chosen
        .map(|(endpoint, port, _)| (endpoint, port))
        .ok_or(NoEndpoint::NoneReady)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Nearness {
    Any,
    Zone,
    Node,
}

fn candidates<'s, 'c>(
    service: &'s Service,
    choice: Choice<'c>,
) -> impl Iterator<Item = (&'s Endpoint, u16, Nearness)> + use<'s, 'c> {
    let here = &choice.from.locality;
    service.endpoints.iter().filter_map(move |endpoint| {
        let same_node = here.node.is_some() && endpoint.node == here.node;
        let same_zone = here.zone.is_some() && endpoint.zone == here.zone;
        let usable = (endpoint.ready || service.publish_not_ready)
            && endpoint.address.is_ipv4() == choice.vip.to_canonical().is_ipv4()
            && (same_node || !service.local_only);
        if !usable {
            return None;
        }
        let (_, target) = endpoint.ports.iter().find(|(port, _)| *port == choice.port)?;
        let nearness = match service.distribution {
            TrafficDistribution::Any => Nearness::Any,
            TrafficDistribution::PreferSameNode if same_node => Nearness::Node,
            TrafficDistribution::PreferSameZone | TrafficDistribution::PreferSameNode if same_zone => Nearness::Zone,
            TrafficDistribution::PreferSameZone | TrafficDistribution::PreferSameNode => Nearness::Any,
        };
        Some((endpoint, *target, nearness))
    })
}

/// `random` onto 0..count, without modulo's bias towards small numbers.
fn scale(random: u64, count: u64) -> usize {
    usize::try_from((u128::from(random) * u128::from(count)) >> 64).unwrap_or(0)
}

/// Equal on every node and in every version: FNV-1a over both addresses, then a final mix.
fn weight(client: IpAddr, endpoint: IpAddr) -> u64 {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for address in [client, endpoint] {
        let octets = match address.to_canonical() {
            IpAddr::V4(address) => address.to_ipv6_mapped().octets(),
            IpAddr::V6(address) => address.octets(),
        };
        for octet in octets {
            hash = (hash ^ u64::from(octet)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    hash ^ (hash >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::{
        fixtures::{endpoint, ip, service, workload},
        service::ServicePort,
        workload::Locality,
    };
    use proptest::prelude::*;
    use std::{collections::BTreeMap, time::Duration};

    fn at(address: &str, node: &str, zone: &str) -> Endpoint {
        Endpoint {
            node: Some(node.into()),
            zone: Some(zone.into()),
            ..endpoint(address)
        }
    }

    fn client(node: &str, zone: &str) -> Workload {
        let locality = Locality {
            region: None,
            zone: Some(zone.into()),
            node: Some(node.into()),
        };
        Workload {
            locality,
            ..workload("shop", "web", "10.244.1.1")
        }
    }

    fn chosen(service: &Service, from: &Workload, random: u64) -> Result<(IpAddr, u16), NoEndpoint> {
        let choice = Choice {
            from,
            vip: service.vips[0],
            port: 80,
            random,
        };
        choose(service, choice).map(|(endpoint, port)| (endpoint.address, port))
    }

    /// How often each endpoint is taken, over evenly spread randomness.
    fn shares(service: &Service, from: &Workload) -> BTreeMap<IpAddr, u32> {
        let mut shares = BTreeMap::new();
        for i in 0..1000u64 {
            *shares
                .entry(chosen(service, from, (2 * i + 1) * (u64::MAX / 2000)).unwrap().0)
                .or_default() += 1;
        }
        shares
    }

    #[test]
    fn ready_endpoints_share_evenly_and_the_others_get_nothing() {
        let mut deaf = endpoint("10.244.2.9");
        deaf.ready = false;
        let mut api = service(
            "api",
            "10.96.0.2",
            vec![endpoint("10.244.2.1"), deaf, endpoint("10.244.2.2")],
        );
        let web = client("a", "z1");
        assert_eq!(
            shares(&api, &web),
            BTreeMap::from([(ip("10.244.2.1"), 500), (ip("10.244.2.2"), 500)])
        );
        api.publish_not_ready = true;
        assert_eq!(shares(&api, &web).len(), 3);
    }

    #[test]
    fn a_missing_port_and_missing_endpoints_are_told_apart() {
        let web = client("a", "z1");
        let mut api = service("api", "10.96.0.2", vec![endpoint("10.244.2.1")]);
        assert_eq!(chosen(&api, &web, 0), Ok((ip("10.244.2.1"), 8080)));
        let choice = Choice {
            from: &web,
            vip: api.vips[0],
            port: 81,
            random: 0,
        };
        assert_eq!(choose(&api, choice), Err(NoEndpoint::NoSuchPort));
        api.endpoints[0].ready = false;
        assert_eq!(chosen(&api, &web, 0), Err(NoEndpoint::NoneReady));
        api.endpoints.clear();
        assert_eq!(chosen(&api, &web, 0), Err(NoEndpoint::NoneReady));
    }

    #[test]
    fn an_endpoint_counts_only_for_the_ports_it_serves() {
        let mut other = endpoint("10.244.2.2");
        other.ports = vec![(81, 8081)];
        let mut api = service("api", "10.96.0.2", vec![endpoint("10.244.2.1"), other]);
        api.ports.push(ServicePort {
            name: Some("b".into()),
            port: 81,
        });
        let web = client("a", "z1");
        assert_eq!(shares(&api, &web).len(), 1);
        let choice = Choice {
            from: &web,
            vip: api.vips[0],
            port: 81,
            random: 0,
        };
        assert_eq!(choose(&api, choice).unwrap().1, 8081);
    }

    #[test]
    fn the_endpoint_is_of_the_vips_family() {
        let mut api = service("api", "10.96.0.2", vec![endpoint("10.244.2.1"), endpoint("fd00::1")]);
        let web = client("a", "z1");
        assert_eq!(shares(&api, &web).into_keys().collect::<Vec<_>>(), [ip("10.244.2.1")]);
        api.vips = vec![ip("fd00:96::2")];
        assert_eq!(shares(&api, &web).into_keys().collect::<Vec<_>>(), [ip("fd00::1")]);
    }

    #[test]
    fn internal_traffic_policy_local_never_leaves_the_node() {
        let mut api = service(
            "api",
            "10.96.0.2",
            vec![at("10.244.2.1", "a", "z1"), at("10.244.3.1", "b", "z1")],
        );
        api.local_only = true;
        assert_eq!(
            shares(&api, &client("b", "z1")).into_keys().collect::<Vec<_>>(),
            [ip("10.244.3.1")]
        );
        assert_eq!(chosen(&api, &client("c", "z1"), 0), Err(NoEndpoint::NoneReady));
        let nowhere = workload("shop", "web", "10.244.1.1");
        api.endpoints[0].node = None;
        assert_eq!(
            chosen(&api, &nowhere, 0),
            Err(NoEndpoint::NoneReady),
            "an unknown node is no node of ours"
        );
    }

    #[test]
    fn a_preference_for_zone_or_node_widens_when_nobody_near_is_ready() {
        let mut api = service(
            "api",
            "10.96.0.2",
            vec![
                at("10.244.2.1", "a", "z1"),
                at("10.244.3.1", "b", "z1"),
                at("10.244.4.1", "c", "z2"),
            ],
        );
        let taken = |api: &Service, from: &Workload| shares(api, from).into_keys().collect::<Vec<_>>();
        let (one, two, three) = (ip("10.244.2.1"), ip("10.244.3.1"), ip("10.244.4.1"));
        api.distribution = TrafficDistribution::PreferSameZone;
        assert_eq!(taken(&api, &client("a", "z1")), [one, two]);
        assert_eq!(taken(&api, &client("x", "z2")), [three]);
        assert_eq!(taken(&api, &client("x", "z9")), [one, two, three]);
        assert_eq!(taken(&api, &workload("shop", "web", "10.244.1.1")), [one, two, three]);
        api.distribution = TrafficDistribution::PreferSameNode;
        assert_eq!(taken(&api, &client("a", "z1")), [one]);
        api.endpoints[0].ready = false;
        assert_eq!(taken(&api, &client("a", "z1")), [two]);
        api.endpoints[1].ready = false;
        assert_eq!(taken(&api, &client("a", "z1")), [three]);
    }

    #[test]
    fn client_affinity_ignores_randomness_and_spreads_clients() {
        let endpoints = (1..=4).map(|i| endpoint(&format!("10.244.2.{i}"))).collect();
        let mut api = service("api", "10.96.0.2", endpoints);
        api.affinity = Affinity::ClientIp {
            timeout: Duration::from_secs(1),
        };
        let mut clients: BTreeMap<IpAddr, u32> = BTreeMap::new();
        for i in 0..400u32 {
            let web = workload("shop", "web", &format!("10.244.{}.{}", 100 + i / 200, i % 200));
            let first = chosen(&api, &web, 0).unwrap().0;
            assert_eq!(chosen(&api, &web, u64::MAX).unwrap().0, first);
            *clients.entry(first).or_default() += 1;
        }
        assert!(
            clients.len() == 4 && clients.values().all(|n| (60..140).contains(n)),
            "{clients:?}"
        );
    }

    proptest! {
        /// Rendezvous: only the lost endpoint's clients move.
        #[test]
        fn losing_an_endpoint_moves_its_own_clients_alone(client in any::<[u8; 2]>(), lost in 0usize..5) {
            let endpoints = (1..=5).map(|i| endpoint(&format!("10.244.2.{i}"))).collect();
            let mut api = service("api", "10.96.0.2", endpoints);
            api.affinity = Affinity::ClientIp { timeout: Duration::from_secs(1) };
            let web = workload("shop", "web", &format!("10.244.{}.{}", client[0], client[1]));
            let before = chosen(&api, &web, 0).unwrap().0;
            let gone = api.endpoints.remove(lost).address;
            let after = chosen(&api, &web, 0).unwrap().0;
            prop_assert!(before == after || before == gone);
        }

        #[test]
        fn the_choice_is_always_a_ready_endpoint(ready in proptest::collection::vec(any::<bool>(), 0..8), random: u64) {
            let endpoints = ready.iter().enumerate();
            let endpoints = endpoints.map(|(i, ready)| Endpoint { ready: *ready, ..endpoint(&format!("10.244.2.{i}")) });
            let api = service("api", "10.96.0.2", endpoints.collect());
            let choice = Choice { from: &client("a", "z1"), vip: api.vips[0], port: 80, random };
            match choose(&api, choice) {
                Ok((endpoint, 8080)) => prop_assert!(endpoint.ready),
                Ok(other) => prop_assert!(false, "{other:?}"),
                Err(NoEndpoint::NoneReady) => prop_assert!(!ready.contains(&true)),
                Err(NoEndpoint::NoSuchPort) => prop_assert!(false),
            }
        }
    }
}

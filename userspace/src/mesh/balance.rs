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

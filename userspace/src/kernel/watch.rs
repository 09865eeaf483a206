//! What changes in a pod's namespace that capture depends on: interfaces, addresses, and our own rules and routes.

use super::{
    netlink::{NetlinkError, Rtnl, messages},
    routes,
};
use crate::net::Namespace;
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    address::{AddressAttribute, AddressMessage},
    link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage},
};
use rtnetlink::{
    packet_core::{NetlinkMessage, NetlinkPayload},
    sys::{AsyncSocket, AsyncSocketExt, SocketAddr, TokioSocket, protocols::NETLINK_ROUTE},
};
use std::{io, net::IpAddr};

/// An interface of a pod.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Link {
    pub index: u32,
    pub name: String,
    /// Of a kind that a pod makes itself to carry packets of others: a bridge (Docker, KubeVirt) or a tunnel device.
    pub carries_others: bool,
}

/// `lo` has this index in every namespace.
const LOOPBACK_INDEX: u32 = 1;

/// The interfaces by which packets may leave the pod: all but `lo`, in order.
pub fn links(namespace: &Namespace) -> Result<Vec<Link>, NetlinkError> {
    let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let mut links: Vec<_> = Rtnl::open(namespace)?
        .dump("list interfaces", request)?
        .into_iter()
        .filter_map(|answer| {
            if let RouteNetlinkMessage::NewLink(link) = answer {
                Some(link)
            } else {
                None
            }
        })
        .filter(|link| link.header.index != LOOPBACK_INDEX)
        .filter_map(|link| {
            let name = link.attributes.iter().find_map(|attribute| {
                if let LinkAttribute::IfName(name) = attribute {
                    Some(name.clone())
                } else {
                    None
                }
            })?;
            Some(Link {
                index: link.header.index,
                name,
                carries_others: carries_others(&link.attributes),
            })
        })
        .collect();
    links.sort_unstable();
    Ok(links)
}

fn carries_others(attributes: &[LinkAttribute]) -> bool {
    let about = attributes.iter().filter_map(|attribute| {
        if let LinkAttribute::LinkInfo(about) = attribute {
            Some(about)
        } else {
            None
        }
    });
    about
        .flatten()
        .any(|fact| matches!(fact, LinkInfo::Kind(InfoKind::Bridge | InfoKind::Tun)))
}

/// Every address of the namespace but the loopback ones, in order.
pub fn addresses(namespace: &Namespace) -> Result<Vec<IpAddr>, NetlinkError> {
    let mut netlink = Rtnl::open(namespace)?;
    let mut answers = Vec::new();
    // Asked for all families at once, the kernel takes its lock for all networking.
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = AddressMessage::default();
        request.header.family = family;
        answers.extend(netlink.dump("list addresses", RouteNetlinkMessage::GetAddress(request))?);
    }
    let mut addresses: Vec<_> = answers
        .into_iter()
        .filter_map(|answer| {
            if let RouteNetlinkMessage::NewAddress(address) = answer {
                Some(address)
            } else {
                None
            }
        })
        .filter_map(|address| own_address(&address.attributes))
        .filter(|address| !address.is_loopback())
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    Ok(addresses)
}

/// On a point-to-point link `Address` is the peer's and `Local` our own; IPv6 has no `Local` elsewhere.
fn own_address(attributes: &[AddressAttribute]) -> Option<IpAddr> {
    let local = attributes.iter().find_map(|attribute| {
        if let AddressAttribute::Local(address) = attribute {
            Some(*address)
        } else {
            None
        }
    });
    local.or_else(|| {
        attributes.iter().find_map(|attribute| {
            if let AddressAttribute::Address(address) = attribute {
                Some(*address)
            } else {
                None
            }
        })
    })
}

const RTNLGRP_LINK: u32 = 1;
const RTNLGRP_IPV4_IFADDR: u32 = 5;
const RTNLGRP_IPV4_ROUTE: u32 = 7;
const RTNLGRP_IPV4_RULE: u32 = 8;
const RTNLGRP_IPV6_IFADDR: u32 = 9;
const RTNLGRP_IPV6_ROUTE: u32 = 11;
const RTNLGRP_IPV6_RULE: u32 = 19;
const GROUPS: [u32; 7] = [
    RTNLGRP_LINK,
    RTNLGRP_IPV4_IFADDR,
    RTNLGRP_IPV4_ROUTE,
    RTNLGRP_IPV4_RULE,
    RTNLGRP_IPV6_IFADDR,
    RTNLGRP_IPV6_ROUTE,
    RTNLGRP_IPV6_RULE,
];

/// Hears of changes in one namespace. Keeps the namespace alive, as every open socket does.
pub struct Watch(TokioSocket);

impl Watch {
    /// Needs a tokio runtime.
    pub fn open(namespace: &Namespace) -> Result<Self, NetlinkError> {
        namespace
            .run(|| {
                let mut socket = TokioSocket::new(NETLINK_ROUTE)?;
                socket.socket_mut().bind(&SocketAddr::new(0, 0))?;
                for group in GROUPS {
                    socket.socket_mut().add_membership(group)?;
                }
                Ok(Self(socket))
            })?
            .map_err(|source| NetlinkError::Open { source })
    }

    /// Resolves when something that matters may have changed since the last call. Safe to drop and call again.
    pub async fn changed(&mut self) -> io::Result<()> {
        loop {
            match self.0.recv_from_full().await {
                Ok((datagram, _)) if messages(&datagram).any(is_of_interest) => return Ok(()),
                Ok(_) => {}
                // Messages were lost, so anything may have changed.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

fn is_of_interest(message: &[u8]) -> bool {
    // What we cannot read may be what matters.
    let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(message) else {
        return true;
    };
    let NetlinkPayload::InnerMessage(message) = message.payload else {
        return false;
    };
    if let RouteNetlinkMessage::DelRoute(route) = &message {
        route.header.protocol == routes::PROTOCOL
    } else if let RouteNetlinkMessage::DelRule(rule) = &message {
        routes::is_rule_of_ours(rule)
    } else {
        message.is_new_link() || message.is_del_link() || message.is_new_address() || message.is_del_address()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::testing::{ip, pod_namespace};
    use std::time::Duration;

    const DEADLINE: Duration = Duration::from_secs(10);

    #[test]
    fn interfaces_and_addresses_are_all_seen_but_loopback() {
        let Some(pod) = pod_namespace("watch-list") else { return };
        ip(&pod, "addr add 10.9.0.7 peer 10.9.9.9 dev wire");
        ip(&pod, "link add docker0 type bridge");
        let links: Vec<_> = links(&pod)
            .unwrap()
            .into_iter()
            .map(|link| (link.name, link.carries_others))
            .collect();
        assert_eq!(
            links,
            [("wire".into(), false), ("eth0".into(), false), ("docker0".into(), true)]
        );
        let addresses: Vec<_> = addresses(&pod).unwrap().iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["10.9.0.1", "10.9.0.7", "fd09::1"]);
    }

    #[tokio::test]
    async fn what_capture_depends_on_is_told_and_nothing_else() {
        let Some(pod) = pod_namespace("watch") else { return };
        let mut own = routes::Routes::open(&pod).unwrap();
        own.install_note(0).unwrap();
        own.install(&[]).unwrap();
        let mut watch = Watch::open(&pod).unwrap();
        for change in [
            "addr add 10.9.0.8/32 dev eth0",
            "addr del fd09::1/64 dev eth0",
            "link add eth1 type veth peer name wire1",
            "rule del pref 2",
            "-6 route flush table 15110",
        ] {
            ip(&pod, change);
            tokio::time::timeout(DEADLINE, watch.changed())
                .await
                .expect(change)
                .unwrap();
            while tokio::time::timeout(Duration::from_millis(50), watch.changed())
                .await
                .is_ok()
            {}
        }
        for other in [
            "route add 10.11.0.0/16 dev eth0",
            "route del 10.11.0.0/16",
            "rule add pref 9 lookup 9",
        ] {
            ip(&pod, other);
            let told = tokio::time::timeout(Duration::from_millis(50), watch.changed()).await;
            assert!(told.is_err(), "{other}");
        }
    }
}

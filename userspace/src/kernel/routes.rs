//! The policy routing of a captured pod: what turns marked connections round on `lo`, and what refuses them. Also where
//! the pod's own namespace keeps a note for a later daemon. It does not decide who is marked.
//!
//! | preference | mark | table |
//! |---|---|---|
//! | 1 | 0x113/0xfff | `prohibit default` |
//! | 2 | 0x110/0xff0 | `local default dev lo src POD_IP congctl cubic` |
//!
//! Explicit preferences, since the kernel puts a rule without one in front of all others, those of a CNI or VPN too.

use super::netlink::{NetlinkError, Rtnl};
use crate::net::{Namespace, marks};
use netlink_packet_route::{
    AddressFamily, RouteNetlinkMessage,
    route::{RouteAttribute, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType},
    rule::{RuleAction, RuleAttribute, RuleMessage},
};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use std::net::IpAddr;

/// Names what is ours in the output of `ip rule` and `ip route`: nothing else is ever removed.
pub(super) const PROTOCOL: RouteProtocol = RouteProtocol::Other(87);
const REFUSE_TABLE: u32 = 15_113;
const TURN_TABLE: u32 = 15_110;
const LOOPBACK_INDEX: u32 = 1;
/// The metric of the refusing route is this plus the note.
const NOTE_BASE: u32 = 100;
const NOTE_END: u32 = NOTE_BASE + 8;

const REFUSE_RULE: Rule = Rule {
    preference: 1,
    mark: marks::REFUSE,
    mask: 0xfff,
    table: REFUSE_TABLE,
};
const TURN_RULE: Rule = Rule {
    preference: 2,
    mark: marks::RANGE,
    mask: marks::MASK,
    table: TURN_TABLE,
};

#[derive(Clone, Copy)]
struct Rule {
    preference: u32,
    mark: u32,
    mask: u32,
    table: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    V4,
    V6,
}

impl Family {
    const ALL: [Self; 2] = [Self::V4, Self::V6];

    const fn number(self) -> AddressFamily {
        match self {
            Self::V4 => AddressFamily::Inet,
            Self::V6 => AddressFamily::Inet6,
        }
    }

    const fn has(self, address: &IpAddr) -> bool {
        address.is_ipv4() == matches!(self, Self::V4)
    }
}

/// The rules, tables and routes of one pod.
pub struct Routes {
    netlink: Rtnl,
    /// A kernel without IPv6 has nothing to steer in it.
    families: Vec<Family>,
    cubic: bool,
}

impl Routes {
    pub fn open(namespace: &Namespace) -> Result<Self, NetlinkError> {
        let has_v6 = namespace.run(|| std::path::Path::new("/proc/sys/net/ipv6").exists())?;
        let families = Family::ALL
            .into_iter()
            .filter(|family| *family == Family::V4 || has_v6)
            .collect();
        Ok(Self {
            netlink: Rtnl::open(namespace)?,
            families,
            cubic: true,
        })
    }

    /// A number below 8 that an earlier daemon has left in the namespace, if it did.
    pub fn note(&mut self) -> Result<Option<u8>, NetlinkError> {
        for route in self.routes_in(Family::V4, REFUSE_TABLE)? {
            if let Some(RouteAttribute::Priority(metric)) = route
                .attributes
                .iter()
                .find(|attribute| matches!(attribute, RouteAttribute::Priority(_)))
                && (NOTE_BASE..NOTE_END).contains(metric)
            {
                return Ok(Some((metric - NOTE_BASE) as u8));
            }
        }
        Ok(None)
    }

    /// Installs the refusing routes, with the note in their metric. Without their rule they have no effect yet.
    pub fn install_note(&mut self, note: u8) -> Result<(), NetlinkError> {
        for family in self.families.clone() {
            let route = refusing_route(family, note);
            self.replace_route("add the refusing route", route)?;
        }
        Ok(())
    }

    /// Installs routes and rules, or repairs what is missing of them; what is there stays as it is. `addresses` are the
    /// pod's, the first of each family becomes the source of the route.
    pub fn install(&mut self, addresses: &[IpAddr]) -> Result<(), NetlinkError> {
        for family in self.families.clone() {
            let source = addresses.iter().copied().find(|address| family.has(address));
            self.install_turning_route(family, source)?;
            for rule in [REFUSE_RULE, TURN_RULE] {
                let message = RouteNetlinkMessage::NewRule(rule_message(family, rule));
                match self
                    .netlink
                    .request("add a routing rule", message, NLM_F_CREATE | NLM_F_EXCL)
                {
                    Err(error) if error.errno() == Some(libc::EEXIST) => {}
                    outcome => outcome?,
                }
            }
        }
        Ok(())
    }

    fn install_turning_route(&mut self, family: Family, source: Option<IpAddr>) -> Result<(), NetlinkError> {
        loop {
            let route = turning_route(family, source, self.cubic);
            match self.replace_route("add the turning route", route) {
                // An unknown algorithm in the metrics: the host's own serves, at a cost in CPU.
                Err(error) if self.cubic && error.errno() == Some(libc::EINVAL) => self.cubic = false,
                outcome => return outcome,
            }
        }
    }

    fn replace_route(&mut self, asked: &'static str, route: RouteMessage) -> Result<(), NetlinkError> {
        self.netlink.request(
            asked,
            RouteNetlinkMessage::NewRoute(route),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
    }

    /// True if every rule and route is there.
    pub fn are_complete(&mut self) -> Result<bool, NetlinkError> {
        for family in self.families.clone() {
            let rules = self.rules(family)?;
            if [REFUSE_RULE, TURN_RULE]
                .iter()
                .any(|rule| !rules.iter().any(|other| is_ours(other, *rule)))
                || self.routes_in(family, TURN_TABLE)?.is_empty()
                || self.routes_in(family, REFUSE_TABLE)?.is_empty()
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Removes our rules, then our routes, however many of each there are, and nothing else.
    pub fn remove(&mut self) -> Result<(), NetlinkError> {
        for family in self.families.clone() {
            for rule in self.rules(family)? {
                if is_rule_of_ours(&rule) {
                    self.delete("remove a routing rule", RouteNetlinkMessage::DelRule(rule))?;
                }
            }
            for table in [TURN_TABLE, REFUSE_TABLE] {
                for route in self.routes_in(family, table)? {
                    self.delete("remove a route", RouteNetlinkMessage::DelRoute(route))?;
                }
            }
        }
        Ok(())
    }

    fn delete(&mut self, asked: &'static str, message: RouteNetlinkMessage) -> Result<(), NetlinkError> {
        match self.netlink.request(asked, message, 0) {
            Err(error) if matches!(error.errno(), Some(libc::ENOENT | libc::ESRCH)) => Ok(()),
            outcome => outcome,
        }
    }

    fn rules(&mut self, family: Family) -> Result<Vec<RuleMessage>, NetlinkError> {
        let mut message = RuleMessage::default();
        message.header.family = family.number();
        let answers = self
            .netlink
            .dump("list routing rules", RouteNetlinkMessage::GetRule(message))?;
        Ok(answers
            .into_iter()
            .filter_map(|answer| {
                if let RouteNetlinkMessage::NewRule(rule) = answer {
                    Some(rule)
                } else {
                    None
                }
            })
            .collect())
    }

    /// Our routes of one table.
    fn routes_in(&mut self, family: Family, table: u32) -> Result<Vec<RouteMessage>, NetlinkError> {
        let mut message = RouteMessage::default();
        message.header.address_family = family.number();
        message.attributes.push(RouteAttribute::Table(table));
        let answers = match self.netlink.dump("list routes", RouteNetlinkMessage::GetRoute(message)) {
            Err(error) if error.errno() == Some(libc::ENOENT) => return Ok(Vec::new()),
            answers => answers?,
        };
        Ok(answers
            .into_iter()
            .filter_map(|answer| {
                if let RouteNetlinkMessage::NewRoute(route) = answer {
                    Some(route)
                } else {
                    None
                }
            })
            .filter(|route| route.header.protocol == PROTOCOL)
            .filter(|route| route.attributes.contains(&RouteAttribute::Table(table)))
            .collect())
    }
}

fn rule_message(family: Family, rule: Rule) -> RuleMessage {
    let mut message = RuleMessage::default();
    message.header.family = family.number();
    message.header.action = RuleAction::ToTable;
    message.attributes = vec![
        RuleAttribute::Priority(rule.preference),
        RuleAttribute::FwMark(rule.mark),
        RuleAttribute::FwMask(rule.mask),
        RuleAttribute::Table(rule.table),
        RuleAttribute::Protocol(PROTOCOL),
    ];
    message
}

/// True for a rule that `install` makes.
pub(super) fn is_rule_of_ours(message: &RuleMessage) -> bool {
    [REFUSE_RULE, TURN_RULE].into_iter().any(|rule| is_ours(message, rule))
}

fn is_ours(message: &RuleMessage, rule: Rule) -> bool {
    let has = |attribute| message.attributes.contains(&attribute);
    has(RuleAttribute::Priority(rule.preference))
        && has(RuleAttribute::FwMark(rule.mark))
        && has(RuleAttribute::FwMask(rule.mask))
        && has(RuleAttribute::Table(rule.table))
        && has(RuleAttribute::Protocol(PROTOCOL))
}

fn route_message(family: Family, kind: RouteType, table: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family.number();
    message.header.protocol = PROTOCOL;
    message.header.kind = kind;
    message.attributes.push(RouteAttribute::Table(table));
    message
}

fn refusing_route(family: Family, note: u8) -> RouteMessage {
    let mut message = route_message(family, RouteType::Prohibit, REFUSE_TABLE);
    message.header.scope = RouteScope::Universe;
    message
        .attributes
        .push(RouteAttribute::Priority(NOTE_BASE + u32::from(note)));
    message
}

fn turning_route(family: Family, source: Option<IpAddr>, cubic: bool) -> RouteMessage {
    let mut message = route_message(family, RouteType::Local, TURN_TABLE);
    message.header.scope = if family == Family::V4 {
        RouteScope::Host
    } else {
        RouteScope::Universe
    };
    message.attributes.push(RouteAttribute::Oif(LOOPBACK_INDEX));
    if let Some(source) = source {
        message.attributes.push(RouteAttribute::PrefSource(source.into()));
    }
    if cubic {
        message
            .attributes
            .push(RouteAttribute::Metrics(vec![RouteMetric::CcAlgo("cubic".to_owned())]));
    }
    message
}

#[cfg(test)]
mod tests;

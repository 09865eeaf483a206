//! The clsact qdisc, which filters need: taken off where it holds none, since every packet would go through it.

use super::netlink::{NetlinkError, Rtnl};
use crate::net::Namespace;
use netlink_packet_route::{
    RouteNetlinkMessage,
    tc::{TcAttribute, TcHandle, TcHeader, TcMessage},
};

const KIND: &str = "clsact";
/// Its two sides, as parents of filters.
const SIDES: [TcHandle; 2] = [
    TcHandle {
        major: u16::MAX,
        minor: TcHandle::MIN_INGRESS,
    },
    TcHandle {
        major: u16::MAX,
        minor: TcHandle::MIN_EGRESS,
    },
];
const HANDLE: TcHandle = TcHandle {
    major: u16::MAX,
    minor: 0,
};

/// From every interface of the namespace on which nobody has a filter. What cannot be asked or removed stays: it costs
/// nanoseconds, and nothing else.
pub(super) fn remove_unused(namespace: &Namespace) {
    let Ok(mut rtnl) = Rtnl::open(namespace) else { return };
    for interface in interfaces(&mut rtnl).unwrap_or_default() {
        if is_unused(&mut rtnl, interface).unwrap_or(false) {
            let message = message(interface, HANDLE, TcHandle::CLSACT);
            let _ = rtnl.request(
                "remove a clsact qdisc",
                RouteNetlinkMessage::DelQueueDiscipline(message),
                0,
            );
        }
    }
}

/// Those that have it.
fn interfaces(rtnl: &mut Rtnl) -> Result<Vec<i32>, NetlinkError> {
    let request = RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default());
    let answers = rtnl.dump("list queueing disciplines", request)?;
    let found = answers.into_iter().filter_map(|answer| {
        let RouteNetlinkMessage::NewQueueDiscipline(qdisc) = answer else {
            return None;
        };
        let is_clsact = |attribute: &TcAttribute| matches!(attribute, TcAttribute::Kind(kind) if kind == KIND);
        qdisc.attributes.iter().any(is_clsact).then_some(qdisc.header.index)
    });
    Ok(found.collect())
}

fn is_unused(rtnl: &mut Rtnl, interface: i32) -> Result<bool, NetlinkError> {
    for side in SIDES {
        let request = RouteNetlinkMessage::GetTrafficFilter(message(interface, TcHandle::UNSPEC, side));
        if !rtnl.dump("list filters", request)?.is_empty() {
            return Ok(false);
        }
    }
    Ok(true)
}

fn message(interface: i32, handle: TcHandle, parent: TcHandle) -> TcMessage {
    TcMessage::from_parts(
        TcHeader {
            index: interface,
            handle,
            parent,
            ..TcHeader::default()
        },
        Vec::new(),
    )
}

//! A blocking netlink socket inside a pod's namespace, for a handful of requests that the kernel answers at once. What
//! is asked is the business of `routes`, `watch` and `sockets`.

use crate::net::{Namespace, NamespaceError};
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::{
    packet_core::{DecodeError, NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload},
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};
use std::io;

#[derive(Debug, thiserror::Error)]
pub enum NetlinkError {
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error("cannot open a netlink socket")]
    Open { source: io::Error },
    #[error("cannot {asked}")]
    Refused { asked: &'static str, source: io::Error },
    #[error("cannot read the kernel's answer to: {asked}")]
    Answer { asked: &'static str, source: DecodeError },
}

impl NetlinkError {
    /// The errno with which the kernel refused, if that is what happened.
    pub(super) fn errno(&self) -> Option<i32> {
        match self {
            Self::Refused { source, .. } => source.raw_os_error(),
            Self::Namespace(_) | Self::Open { .. } | Self::Answer { .. } => None,
        }
    }
}

/// A netlink socket stays in the namespace it was made in: it is used from anywhere.
pub(super) fn open(namespace: &Namespace, protocol: isize) -> Result<Socket, NetlinkError> {
    namespace
        .run(|| {
            let mut socket = Socket::new(protocol)?;
            socket.bind_auto()?;
            socket.connect(&SocketAddr::new(0, 0))?;
            Ok(socket)
        })?
        .map_err(|source| NetlinkError::Open { source })
}

/// Asks rtnetlink, one request at a time.
pub(super) struct Rtnl {
    socket: Socket,
    sequence: u32,
}

impl Rtnl {
    pub(super) fn open(namespace: &Namespace) -> Result<Self, NetlinkError> {
        let socket = open(namespace, NETLINK_ROUTE)?;
        // Lets a dump name the table it wants. Without it (below 4.20) there is more to read, nothing else.
        let _more_to_read = socket.set_netlink_get_strict_chk(true);
        Ok(Self { socket, sequence: 0 })
    }

    /// Has the kernel do one thing. `asked` completes "cannot …".
    pub(super) fn request(
        &mut self,
        asked: &'static str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<(), NetlinkError> {
        self.exchange(asked, message, flags | NLM_F_ACK).map(|_| ())
    }

    pub(super) fn dump(
        &mut self,
        asked: &'static str,
        message: RouteNetlinkMessage,
    ) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        self.exchange(asked, message, NLM_F_DUMP)
    }

    fn exchange(
        &mut self,
        asked: &'static str,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        let refused = |source| NetlinkError::Refused { asked, source };
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | flags;
        header.sequence_number = self.sequence;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::from(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map_err(refused)?;

        let mut answers = Vec::new();
        loop {
            let (datagram, _) = self.socket.recv_from_full().map_err(refused)?;
            for bytes in messages(&datagram) {
                let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes)
                    .map_err(|source| NetlinkError::Answer { asked, source })?;
                if answer.header.sequence_number != self.sequence {
                    continue;
                }
                match answer.payload {
                    NetlinkPayload::InnerMessage(message) => answers.push(message),
                    NetlinkPayload::Error(error) => match error.code {
                        None => return Ok(answers),
                        Some(_) => return Err(refused(error.to_io())),
                    },
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        return Err(refused(io::Error::from_raw_os_error(-done.code)));
                    }
                    NetlinkPayload::Done(_) => return Ok(answers),
                    NetlinkPayload::Noop | NetlinkPayload::Overrun(_) | _ => {}
                }
            }
        }
    }
}

/// Splits a datagram into its netlink messages, each with its header. Stops at the first that is cut short.
pub(super) fn messages(mut datagram: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*datagram.first_chunk()?) as usize;
        if length < 16 || length > datagram.len() {
            return None;
        }
        let (message, _) = datagram.split_at(length);
        datagram = datagram.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_that_is_cut_short_ends_the_datagram() {
        let mut datagram = Vec::new();
        for length in [17u32, 16, 400] {
            let start = datagram.len();
            datagram.extend(length.to_ne_bytes());
            datagram.resize(
                start + (length as usize).min(16).max(length as usize % 100).next_multiple_of(4),
                0,
            );
        }
        assert_eq!(messages(&datagram).map(<[u8]>::len).collect::<Vec<_>>(), [17, 16]);
        assert_eq!(messages(&[]).count(), 0);
        assert_eq!(messages(&[0; 64]).count(), 0);
    }
}

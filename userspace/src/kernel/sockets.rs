//! The TCP sockets of a pod that carry our marks: counting them while a release drains, ending them where it must.
//! Speaks `NETLINK_SOCK_DIAG`, see linux/inet_diag.h.

use super::netlink::{self, NetlinkError, messages};
use crate::net::{Namespace, marks};
use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_DUMP, NLM_F_REQUEST},
    sys::{Socket, protocols::NETLINK_SOCK_DIAG},
};
use std::io;

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const INET_DIAG_REQ_BYTECODE: u16 = 1;
const INET_DIAG_BC_MARK_COND: u8 = 10;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const HEADER: usize = 16;
/// `struct inet_diag_sockid`: what identifies a socket, its cookie included.
const SOCKET_ID: usize = 48;

/// Every state with an end to lose. Not TIME_WAIT (6), CLOSE (7), LISTEN (10).
const OPEN_STATES: u32 = {
    const STATES: [u32; 9] = [1, 2, 3, 4, 5, 8, 9, 11, 12];
    let (mut mask, mut at) = (0, 0);
    while at < STATES.len() {
        mask |= 1 << STATES[at];
        at += 1;
    }
    mask
};

const FAMILIES: [u8; 2] = [libc::AF_INET as u8, libc::AF_INET6 as u8];

/// How many open connections of the pod carry one of our marks: steered or delivered, at the application's end or ours.
pub fn count_marked(namespace: &Namespace) -> Result<usize, NetlinkError> {
    let mut diag = Diag::open(namespace)?;
    let mut count = 0;
    for family in FAMILIES {
        count += diag.marked(family)?.len();
    }
    Ok(count)
}

/// Ends those connections, each with a reset to its peer, and says how many there were.
///
/// # Errors
/// `EOPNOTSUPP` from a kernel without `CONFIG_INET_DIAG_DESTROY`.
pub fn destroy_marked(namespace: &Namespace) -> Result<usize, NetlinkError> {
    let mut diag = Diag::open(namespace)?;
    let mut count = 0;
    for family in FAMILIES {
        for id in diag.marked(family)? {
            match diag.destroy(family, &id) {
                Ok(()) => count += 1,
                // It ended by itself.
                Err(error) if error.errno() == Some(libc::ENOENT) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(count)
}

type SocketId = [u8; SOCKET_ID];

struct Diag(Socket);

impl Diag {
    fn open(namespace: &Namespace) -> Result<Self, NetlinkError> {
        netlink::open(namespace, NETLINK_SOCK_DIAG).map(Self)
    }

    fn marked(&mut self, family: u8) -> Result<Vec<SocketId>, NetlinkError> {
        let request = dump_request(family, marks::RANGE, marks::MASK);
        self.exchange("list the sockets that carry our marks", &request)
    }

    fn destroy(&mut self, family: u8, id: &SocketId) -> Result<(), NetlinkError> {
        self.exchange("end a socket", &destroy_request(family, id)).map(|_| ())
    }

    fn exchange(&mut self, asked: &'static str, request: &[u8]) -> Result<Vec<SocketId>, NetlinkError> {
        let refused = |source| NetlinkError::Refused { asked, source };
        self.0.send(request, 0).map_err(refused)?;
        let mut found = Vec::new();
        loop {
            let (datagram, _) = self.0.recv_from_full().map_err(refused)?;
            for message in messages(&datagram) {
                match answer(message) {
                    Answer::Socket(id) => found.push(id),
                    Answer::End(0) => return Ok(found),
                    Answer::End(code) => return Err(refused(io::Error::from_raw_os_error(-code))),
                    Answer::Other => {}
                }
            }
        }
    }
}

fn header(bytes: &mut Vec<u8>, kind: u16, flags: u16) {
    bytes.extend([0; 4]);
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    bytes.extend([0; 8]);
}

fn finish(mut bytes: Vec<u8>) -> Vec<u8> {
    let length = bytes.len() as u32;
    bytes[..4].copy_from_slice(&length.to_ne_bytes());
    bytes
}

/// `struct inet_diag_req_v2`
fn body(bytes: &mut Vec<u8>, family: u8, id: &SocketId) {
    bytes.extend([family, libc::IPPROTO_TCP as u8, 0, 0]);
    bytes.extend(OPEN_STATES.to_ne_bytes());
    bytes.extend(id);
}

fn dump_request(family: u8, mark: u32, mask: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(96);
    header(&mut bytes, SOCK_DIAG_BY_FAMILY, NLM_F_DUMP);
    body(&mut bytes, family, &[0; SOCKET_ID]);
    // One instruction: where the condition holds go to the end (accept), else past it (reject).
    const CODE: u16 = 12;
    bytes.extend((4 + CODE).to_ne_bytes());
    bytes.extend(INET_DIAG_REQ_BYTECODE.to_ne_bytes());
    bytes.extend([INET_DIAG_BC_MARK_COND, CODE as u8]);
    bytes.extend((CODE + 4).to_ne_bytes());
    bytes.extend(mark.to_ne_bytes());
    bytes.extend(mask.to_ne_bytes());
    finish(bytes)
}

fn destroy_request(family: u8, id: &SocketId) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(72);
    header(&mut bytes, SOCK_DESTROY, NLM_F_ACK);
    body(&mut bytes, family, id);
    finish(bytes)
}

enum Answer {
    Socket(SocketId),
    /// 0, or a negative errno.
    End(i32),
    Other,
}

fn answer(message: &[u8]) -> Answer {
    let Some((header, body)) = message.split_first_chunk::<HEADER>() else {
        return Answer::Other;
    };
    let code = || body.first_chunk().copied().map_or(0, i32::from_ne_bytes);
    match u16::from_ne_bytes([header[4], header[5]]) {
        NLMSG_ERROR | NLMSG_DONE => Answer::End(code()),
        // `struct inet_diag_msg`: four bytes, then the socket's identity.
        SOCK_DIAG_BY_FAMILY => match body.get(4..).and_then(<[u8]>::first_chunk) {
            Some(id) => Answer::Socket(*id),
            None => Answer::Other,
        },
        _ => Answer::Other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::testing::pod_namespace;
    use std::{
        io::Read,
        net::{TcpListener, TcpStream},
    };

    #[test]
    fn only_connections_with_our_marks_are_counted_and_ended() {
        let Some(pod) = pod_namespace("sock-diag") else { return };
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let connection = || {
                pod.run(|| {
                    let listener = TcpListener::bind(address).unwrap();
                    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
                    (client, listener.accept().unwrap().0)
                })
                .unwrap()
            };
            let (marked, mut peer) = connection();
            let (unmarked, _its_peer) = connection();
            let (daemon, _its_peer) = connection();
            socket2::SockRef::from(&daemon).set_mark(marks::DAEMON).unwrap();
            assert_eq!(count_marked(&pod).unwrap(), 0);
            socket2::SockRef::from(&marked).set_mark(marks::STEER).unwrap();
            assert_eq!(count_marked(&pod).unwrap(), 1);

            assert_eq!(destroy_marked(&pod).unwrap(), 1);
            assert_eq!(count_marked(&pod).unwrap(), 0);
            assert_eq!(peer.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
            assert!(marked.take_error().unwrap().is_some());
            for open in [&unmarked, &daemon] {
                assert!(open.take_error().unwrap().is_none());
                assert!(open.peer_addr().is_ok());
            }
        }
    }
}

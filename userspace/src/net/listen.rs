//! The daemon's listeners inside a pod's namespace: three roles, each on both loopback addresses. Kernel programs find
//! them through a sock map, so their port numbers matter to nobody but an application that wants the same ones.

use super::{Namespace, NamespaceError, marks};
use socket2::{Domain, Socket, Type};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    ops::RangeInclusive,
};

pub use warren_common::Role;

/// The port that Istio's users know to keep free.
const fn wanted_port(role: Role) -> u16 {
    match role {
        Role::Outbound => 15001,
        Role::Plaintext => 15006,
        Role::Hbone => 15008,
    }
}

/// True if the peer is an application of the pod, over `lo`: pacing and congestion control only cost there.
const fn is_local_hop(role: Role) -> bool {
    matches!(role, Role::Outbound)
}

/// The ports the listeners got, the same for both families.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PodPorts {
    pub outbound: u16,
    pub plaintext: u16,
    pub hbone: u16,
}

/// A role that did not get the port it wanted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moved {
    pub role: Role,
    pub port: u16,
}

/// The listeners of one pod: each role on 127.0.0.1 and, where the kernel has IPv6, on [::1]. They are nonblocking and
/// transparent (the local address of an accepted socket is the original destination); accepted sockets inherit
/// TCP_NODELAY and the daemon's mark.
#[derive(Debug)]
pub struct PodListeners {
    pub outbound: Vec<TcpListener>,
    pub plaintext: Vec<TcpListener>,
    pub hbone: Vec<TcpListener>,
    pub ports: PodPorts,
    pub moved: Vec<Moved>,
}

impl PodListeners {
    pub fn of(&self, role: Role) -> &[TcpListener] {
        match role {
            Role::Outbound => &self.outbound,
            Role::Plaintext => &self.plaintext,
            Role::Hbone => &self.hbone,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error("cannot listen on {address} for {role:?}")]
    Listen {
        role: Role,
        address: SocketAddr,
        source: io::Error,
    },
    #[error("port {wanted} for {role:?} is taken, and so is every port outside the ephemeral range {low} to {high}")]
    NoFreePort {
        role: Role,
        wanted: u16,
        low: u16,
        high: u16,
    },
}

/// Opens the listeners of a pod in its namespace.
pub fn listen(namespace: &Namespace) -> Result<PodListeners, ListenError> {
    namespace.run(|| {
        let mut moved = Vec::new();
        let mut open = |role| {
            let (sockets, port) = open_role(role, namespace.ephemeral_ports())?;
            if port != wanted_port(role) {
                moved.push(Moved { role, port });
            }
            Ok::<_, ListenError>((sockets, port))
        };
        let (outbound, outbound_port) = open(Role::Outbound)?;
        let (plaintext, plaintext_port) = open(Role::Plaintext)?;
        let (hbone, hbone_port) = open(Role::Hbone)?;
        let ports = PodPorts {
            outbound: outbound_port,
            plaintext: plaintext_port,
            hbone: hbone_port,
        };
        Ok(PodListeners {
            outbound,
            plaintext,
            hbone,
            ports,
            moved,
        })
    })?
}

fn open_role(role: Role, ephemeral: RangeInclusive<u16>) -> Result<(Vec<TcpListener>, u16), ListenError> {
    let (low, high) = ephemeral.into_inner();
    // Never an ephemeral port: a listener on 127.0.0.1:50051 makes the application's wildcard bind of 50051 fail.
    let free = (high.saturating_add(1)..=u16::MAX)
        .filter(|port| *port > high)
        .chain((1024..low).rev());
    for port in std::iter::once(wanted_port(role)).chain(free) {
        match open_pair(role, port) {
            Ok(sockets) => return Ok((sockets, port)),
            Err((_, source)) if source.kind() == io::ErrorKind::AddrInUse => {}
            Err((address, source)) => return Err(ListenError::Listen { role, address, source }),
        }
    }
    Err(ListenError::NoFreePort {
        role,
        wanted: wanted_port(role),
        low,
        high,
    })
}

fn open_pair(role: Role, port: u16) -> Result<Vec<TcpListener>, (SocketAddr, io::Error)> {
    let mut sockets = Vec::with_capacity(2);
    for ip in [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)] {
        let address = SocketAddr::new(ip, port);
        match open_one(role, address) {
            Ok(socket) => sockets.push(socket),
            // A kernel without IPv6 has no connections of that family to steer either.
            Err(error) if ip.is_ipv6() && error.raw_os_error() == Some(libc::EAFNOSUPPORT) => {}
            Err(error) => return Err((address, error)),
        }
    }
    Ok(sockets)
}

fn open_one(role: Role, address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM.nonblocking(), None)?;
    // Before listen: the kernel side recognises our listeners by the mark at that moment.
    socket.set_mark(marks::DAEMON)?;
    // Accepted sockets inherit it, and sit on the application's own port: without it the application could not bind
    // its port again after a restart.
    socket.set_reuse_address(true)?;
    if address.is_ipv4() {
        socket.set_ip_transparent_v4(true)?;
    } else {
        // Also lets [::1] be bound where IPv6 is switched off for now, so that switching it on later finds a listener.
        socket.set_ip_transparent_v6(true)?;
        socket.set_only_v6(true)?;
    }
    socket.set_tcp_nodelay(true)?;
    if is_local_hop(role) {
        prefer_cubic(&socket);
    }
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    if role == Role::Outbound {
        // Accepted sockets carry it, so their packets do: what the kernel answers for a client's socket that is gone (the
        // ACK out of TIME_WAIT, a RST) takes the mark of the packet it answers, and must come back to us over `lo`. With
        // the daemon's mark it would leave the pod in the clear, and our socket would wait for it in vain.
        socket.set_mark(marks::STEER)?;
    }
    Ok(socket.into())
}

/// The kernel caps it at `net.core.somaxconn`.
const BACKLOG: i32 = 32_768;

/// On `lo` a paced congestion control costs a multiple of the CPU and gains nothing. Where the kernel has no cubic, the
/// host's own choice stays.
pub(super) fn prefer_cubic(socket: &Socket) {
    if let Err(error) = socket.set_tcp_congestion(b"cubic") {
        tracing::debug!(%error, "no cubic on a local hop");
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing::pod_namespace, *};
    use std::net::TcpStream;

    #[test]
    fn every_role_listens_on_both_loopback_addresses() {
        let Some(pod) = pod_namespace("listen") else { return };
        let listeners = listen(&pod).unwrap();
        assert_eq!(
            listeners.ports,
            PodPorts {
                outbound: 15001,
                plaintext: 15006,
                hbone: 15008
            }
        );
        assert_eq!(listeners.moved, []);
        for role in Role::ALL {
            let addresses: Vec<_> = listeners
                .of(role)
                .iter()
                .map(|socket| socket.local_addr().unwrap().to_string())
                .collect();
            let port = wanted_port(role);
            assert_eq!(addresses, [format!("127.0.0.1:{port}"), format!("[::1]:{port}")]);
            for socket in listeners.of(role) {
                let socket = socket2::SockRef::from(socket);
                let mark = if role == Role::Outbound {
                    marks::STEER
                } else {
                    marks::DAEMON
                };
                assert_eq!(socket.mark().unwrap(), mark);
                assert!(socket.nonblocking().unwrap());
            }
        }
    }

    #[test]
    fn an_application_keeps_its_ports_and_can_still_bind_any_ephemeral_one() {
        let Some(pod) = pod_namespace("ports") else { return };
        let _application = pod.run(|| TcpListener::bind("0.0.0.0:15008").unwrap()).unwrap();
        let _also = pod.run(|| TcpListener::bind("[::]:15001").unwrap()).unwrap();
        let listeners = listen(&pod).unwrap();
        assert_eq!(
            listeners.ports,
            PodPorts {
                outbound: 61000,
                plaintext: 15006,
                hbone: 61001
            }
        );
        assert_eq!(
            listeners.moved,
            [
                Moved {
                    role: Role::Outbound,
                    port: 61000
                },
                Moved {
                    role: Role::Hbone,
                    port: 61001
                }
            ]
        );
        pod.run(|| TcpListener::bind("0.0.0.0:50051").map(drop))
            .unwrap()
            .unwrap();
    }

    #[test]
    fn accepted_sockets_do_not_delay_small_writes() {
        let Some(pod) = pod_namespace("inherit") else { return };
        let listeners = listen(&pod).unwrap();
        let listener = &listeners.outbound[0];
        let _client = pod
            .run(|| TcpStream::connect(listener.local_addr().unwrap()).unwrap())
            .unwrap();
        listener.set_nonblocking(false).unwrap();
        let (accepted, _) = listener.accept().unwrap();
        assert!(accepted.nodelay().unwrap());
        let accepted = socket2::SockRef::from(&accepted);
        assert_eq!(accepted.mark().unwrap(), marks::STEER);
        assert!(accepted.reuse_address().unwrap());
        assert!(accepted.tcp_congestion().unwrap().starts_with(b"cubic"));
    }
}

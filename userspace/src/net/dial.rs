//! Connections that the daemon opens from inside a pod's namespace. Only `socket(2)` has to happen in there: a socket
//! stays in the namespace it was made in.

use super::{Namespace, NamespaceError, listen::prefer_cubic, marks, options};
use socket2::{Domain, Socket, Type};
use std::{
    io,
    net::{IpAddr, SocketAddr},
    ops::RangeInclusive,
    time::Duration,
};
use tokio::net::{TcpSocket, TcpStream};

/// Why a connection could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error("no answer from {to} within {deadline:?}")]
    Timeout { to: SocketAddr, deadline: Duration },
    #[error("{to} refused the connection")]
    Refused { to: SocketAddr, source: io::Error },
    #[error("no way to {to}")]
    Unreachable { to: SocketAddr, source: io::Error },
    #[error("every port from {from} to {to} is in use")]
    NoPort { from: IpAddr, to: SocketAddr },
    #[error("{from} is not an address of the pod")]
    NoSuchSource { from: IpAddr, source: io::Error },
    #[error("{from} and {to} are of different families")]
    Families { from: IpAddr, to: SocketAddr },
    #[error("the daemon has no room for another connection")]
    Exhausted { source: io::Error },
    #[error("cannot connect to {to}")]
    Other { to: SocketAddr, source: io::Error },
}

impl DialError {
    fn from_connect(from: IpAddr, to: SocketAddr, deadline: Duration, source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::ECONNREFUSED | libc::ECONNRESET) => Self::Refused { to, source },
            Some(libc::ENETUNREACH | libc::EHOSTUNREACH | libc::EACCES | libc::ENETDOWN | libc::EHOSTDOWN) => {
                Self::Unreachable { to, source }
            }
            Some(libc::ETIMEDOUT) => Self::Timeout { to, deadline },
            Some(libc::EADDRNOTAVAIL) => Self::NoPort { from, to },
            Some(libc::EMFILE | libc::ENFILE | libc::ENOBUFS | libc::ENOMEM) => Self::Exhausted { source },
            _ => Self::Other { to, source },
        }
    }
}

/// Opens the connection of an HBONE tunnel: from the pod's own address, with the host's congestion control.
pub async fn dial_mesh(
    namespace: &Namespace,
    source: IpAddr,
    next_hop: SocketAddr,
    deadline: Duration,
) -> Result<TcpStream, DialError> {
    let socket = from_own_address(namespace, source, next_hop)?;
    connect(socket, source, next_hop, deadline).await
}

/// Opens a connection to a destination outside the mesh on behalf of the pod.
pub async fn dial_plain(
    namespace: &Namespace,
    source: IpAddr,
    destination: SocketAddr,
    deadline: Duration,
) -> Result<TcpStream, DialError> {
    let socket = from_own_address(namespace, source, destination)?;
    connect(socket, source, destination, deadline).await
}

fn from_own_address(namespace: &Namespace, source: IpAddr, to: SocketAddr) -> Result<Socket, DialError> {
    let socket = open(namespace, source, to)?;
    let prepare = || {
        // Unmarked, our own SYN would be steered back to us, forever.
        socket.set_mark(marks::DAEMON)?;
        options::choose_port_at_connect(&socket)?;
        socket.set_tcp_nodelay(true)
    };
    prepare().map_err(|error| DialError::Other { to, source: error })?;
    socket
        .bind(&SocketAddr::new(source, 0).into())
        .map_err(|error| DialError::NoSuchSource {
            from: source,
            source: error,
        })?;
    Ok(socket)
}

/// How the local port of a delivered connection is found.
#[derive(Clone, Copy)]
enum Port {
    /// This one or none, at `connect`.
    Only(u16),
    /// Any, at `connect`.
    Any,
    /// This one, at `bind`.
    Named(u16),
}

/// How often a port is named when the kernel finds none.
const LAST_RESORTS: usize = 16;

/// Ports that no `connect` chooses, so that naming one takes it from nobody but a listener to come: above the ephemeral
/// ones where there are any, else below.
fn spare_ports(ephemeral: &RangeInclusive<u16>) -> RangeInclusive<u16> {
    match ephemeral.end().checked_add(1) {
        Some(first) => first..=u16::MAX,
        None => 1024..=ephemeral.start().saturating_sub(1).max(1024),
    }
}

/// Opens a connection to the pod's application that shows the client's address, and its port where that is free.
///
/// It must neither run out of ports nor take them from the application. So an ephemeral port is chosen at `connect`: one
/// named at `bind` is lost to every `connect` in the pod for as long as its connection or its TIME_WAIT lasts, and 28,000
/// clients in a minute would cut the pod off from the world.
///
/// The socket is bound to `lo`, for three reasons. The pod's own address is a local route of its interface, and without
/// it the arrival would count as one from outside. The turning route that is found instead brings its congestion control
/// along. And on `lo` alone, with `tcp_tw_reuse` at its default, a port in TIME_WAIT is taken again after a second.
pub async fn deliver(
    namespace: &Namespace,
    client: SocketAddr,
    application: SocketAddr,
    deadline: Duration,
) -> Result<TcpStream, DialError> {
    let ephemeral = namespace.ephemeral_ports();
    let own = match client.port() {
        0 => None,
        port if ephemeral.contains(&port) => Some(Port::Only(port)),
        port => Some(Port::Named(port)),
    };
    let spare = spare_ports(&ephemeral);
    let last_resorts = std::iter::repeat_with(|| Port::Named(rand::random_range(spare.clone()))).take(LAST_RESORTS);
    let attempts = own.into_iter().chain([Port::Any]).chain(last_resorts);
    let deliver = async {
        for port in attempts {
            match deliver_from(namespace, client.ip(), port, application, deadline).await {
                Err(DialError::NoPort { .. }) => {}
                outcome => return outcome,
            }
        }
        Err(DialError::NoPort {
            from: client.ip(),
            to: application,
        })
    };
    let timeout = |_| {
        Err(DialError::Timeout {
            to: application,
            deadline,
        })
    };
    tokio::time::timeout(deadline, deliver).await.unwrap_or_else(timeout)
}

async fn deliver_from(
    namespace: &Namespace,
    from: IpAddr,
    port: Port,
    to: SocketAddr,
    deadline: Duration,
) -> Result<TcpStream, DialError> {
    let socket = open(namespace, from, to)?;
    let prepare = || {
        socket.set_mark(marks::DELIVER)?;
        if from == to.ip() {
            // A pod that calls itself through a service: the application's answers find its address on the pod's
            // interface, and never a socket bound to `lo`.
            prefer_cubic(&socket);
        } else {
            socket.bind_device(Some(b"lo"))?;
        }
        if from.is_ipv4() {
            socket.set_ip_transparent_v4(true)?
        } else {
            socket.set_ip_transparent_v6(true)?
        };
        match port {
            // Shared with our other connections from the same client port.
            Port::Named(_) => socket.set_reuse_address(true)?,
            Port::Any => options::choose_port_at_connect(&socket)?,
            Port::Only(port) => {
                options::choose_port_at_connect(&socket)?;
                // Below 6.3 it is any port.
                if let Err(error) = options::choose_port_among(&socket, port..=port) {
                    tracing::debug!(%error, "the client's port cannot be asked for");
                }
            }
        }
        socket.set_tcp_nodelay(true)
    };
    prepare().map_err(|source| DialError::Other { to, source })?;
    let bound = match port {
        Port::Named(port) => SocketAddr::new(from, port),
        Port::Any | Port::Only(_) => SocketAddr::new(from, 0),
    };
    match socket.bind(&bound.into()) {
        Ok(()) => connect(socket, from, to, deadline).await,
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Err(DialError::NoPort { from, to }),
        Err(source) => Err(DialError::NoSuchSource { from, source }),
    }
}

fn open(namespace: &Namespace, from: IpAddr, to: SocketAddr) -> Result<Socket, DialError> {
    if from.is_ipv4() != to.is_ipv4() {
        return Err(DialError::Families { from, to });
    }
    namespace
        .run(|| Socket::new(Domain::for_address(to), Type::STREAM.nonblocking(), None))?
        .map_err(|source| DialError::from_connect(from, to, Duration::ZERO, source))
}

async fn connect(socket: Socket, from: IpAddr, to: SocketAddr, deadline: Duration) -> Result<TcpStream, DialError> {
    let socket = TcpSocket::from_std_stream(socket.into());
    match tokio::time::timeout(deadline, socket.connect(to)).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(source)) => Err(DialError::from_connect(from, to, deadline, source)),
        Err(_) => Err(DialError::Timeout { to, deadline }),
    }
}

/// Closes a connection with a reset, so that the other end sees an abort and not an orderly end.
pub fn abort(stream: TcpStream) {
    if let Err(error) = socket2::SockRef::from(&stream).set_linger(Some(Duration::ZERO)) {
        tracing::debug!(%error, "cannot reset a connection, it is closed instead");
    }
}

#[cfg(test)]
mod tests {
    use super::{super::testing::pod_namespace, *};

    const DEADLINE: Duration = Duration::from_secs(10);

    #[tokio::test]
    async fn tunnels_come_from_the_pods_own_address_with_the_daemons_mark() {
        let Some(pod) = pod_namespace("dial") else { return };
        for own in ["10.9.0.1", "fd09::1"] {
            let own: IpAddr = own.parse().unwrap();
            let listener = pod.run(|| std::net::TcpListener::bind((own, 0)).unwrap()).unwrap();
            let to = listener.local_addr().unwrap();
            let stream = dial_mesh(&pod, own, to, DEADLINE).await.unwrap();
            assert_eq!(stream.local_addr().unwrap().ip(), own);
            assert!(stream.nodelay().unwrap());
            assert_eq!(socket2::SockRef::from(&stream).mark().unwrap(), marks::DAEMON);

            // Not the listener's own port: a process that somebody is just starting may hold it open a moment longer.
            let refused = dial_plain(&pod, own, SocketAddr::new(own, 9), DEADLINE).await;
            assert!(matches!(refused, Err(DialError::Refused { .. })), "{refused:?}");
        }
    }

    #[tokio::test]
    async fn a_dial_that_fails_says_why() {
        let Some(pod) = pod_namespace("dial-fails") else { return };
        let own: IpAddr = "10.9.0.1".parse().unwrap();
        let to = |text: &str| text.parse::<SocketAddr>().unwrap();

        let outcome = dial_mesh(&pod, "10.9.0.2".parse().unwrap(), to("10.9.0.9:15008"), DEADLINE).await;
        assert!(matches!(outcome, Err(DialError::NoSuchSource { .. })), "{outcome:?}");
        let outcome = dial_mesh(&pod, own, to("[fd09::9]:15008"), DEADLINE).await;
        assert!(matches!(outcome, Err(DialError::Families { .. })), "{outcome:?}");
        let outcome = dial_mesh(&pod, own, to("10.9.0.9:15008"), Duration::from_millis(50)).await;
        assert!(matches!(outcome, Err(DialError::Timeout { .. })), "{outcome:?}");
        super::super::testing::ip(&pod, "route add prohibit 10.10.0.0/16");
        let outcome = dial_mesh(&pod, own, to("10.10.0.9:15008"), DEADLINE).await;
        assert!(matches!(outcome, Err(DialError::Unreachable { .. })), "{outcome:?}");
    }

    #[test]
    fn a_spare_port_is_never_one_that_connect_chooses() {
        for ephemeral in [32_768..=60_999, 1024..=65_535, 49_152..=65_535, 1..=65_534] {
            let spare = spare_ports(&ephemeral);
            assert!(!spare.is_empty());
            if ephemeral != (1024..=65_535) {
                assert!(
                    spare.end() < ephemeral.start() || spare.start() > ephemeral.end(),
                    "{spare:?} {ephemeral:?}"
                );
            }
        }
    }
}

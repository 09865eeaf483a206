//! Connections that the daemon opens from inside a pod's namespace. Only `socket(2)` has to happen in there: a socket
//! stays in the namespace it was made in.

use super::{Namespace, NamespaceError, listen::prefer_cubic, marks, options};
use socket2::{Domain, Socket, Type};
use std::{
    io,
    net::{IpAddr, SocketAddr},
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

/// How often a port is tried explicitly when the kernel finds none.
const PORT_ATTEMPTS: u32 = 16;

/// Opens a connection to the pod's application that shows the client's address, and its port where that is free.
///
/// A port named at `bind` may be one in TIME_WAIT towards the same destination (with timestamps, which are on by
/// default); one chosen at `connect` may not. So the client's own port comes first, then the kernel's choice, and
/// when TIME_WAIT has used those up, ports named at random: a client that opens and closes connections without end is
/// never told that the ports ran out.
pub async fn deliver(
    namespace: &Namespace,
    client: SocketAddr,
    application: SocketAddr,
    deadline: Duration,
) -> Result<TcpStream, DialError> {
    let from = client.ip();
    if client.port() != 0
        && let Some(socket) = as_client(namespace, client, application)?
    {
        match connect(socket, from, application, deadline).await {
            Err(DialError::NoPort { .. }) => {}
            outcome => return outcome,
        }
    }
    if let Some(socket) = as_client(namespace, SocketAddr::new(from, 0), application)? {
        match connect(socket, from, application, deadline).await {
            Err(DialError::NoPort { .. }) => {}
            outcome => return outcome,
        }
    }
    for _ in 0..PORT_ATTEMPTS {
        let port = rand::random_range(32_768..=60_999);
        let Some(socket) = as_client(namespace, SocketAddr::new(from, port), application)? else {
            continue;
        };
        match connect(socket, from, application, deadline).await {
            Err(DialError::NoPort { .. }) => {}
            outcome => return outcome,
        }
    }
    Err(DialError::NoPort { from, to: application })
}

/// A socket bound to the client's address; `None` if its port is taken by something that does not share.
fn as_client(namespace: &Namespace, client: SocketAddr, to: SocketAddr) -> Result<Option<Socket>, DialError> {
    let socket = open(namespace, client.ip(), to)?;
    let prepare = || {
        socket.set_mark(marks::DELIVER)?;
        if client.is_ipv4() {
            socket.set_ip_transparent_v4(true)?
        } else {
            socket.set_ip_transparent_v6(true)?
        };
        if client.port() == 0 {
            options::choose_port_at_connect(&socket)?;
        } else {
            // Shared with our other connections from the same client port, and with those in TIME_WAIT.
            socket.set_reuse_address(true)?;
        }
        prefer_cubic(&socket);
        socket.set_tcp_nodelay(true)
    };
    prepare().map_err(|source| DialError::Other { to, source })?;
    match socket.bind(&client.into()) {
        Ok(()) => Ok(Some(socket)),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => Ok(None),
        Err(source) => Err(DialError::NoSuchSource {
            from: client.ip(),
            source,
        }),
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

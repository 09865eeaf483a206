//! A small HTTP/1 server for a few known paths: one request a connection, a deadline for each, a bound on all.

use crate::shutdown::Shutdown;
use http::{HeaderValue, Method, Request, Response, StatusCode, header, request::Parts};
use http_body_util::Full;
use hyper::{
    body::{Bytes, Incoming},
    server::conn::http1,
    service::service_fn,
};
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    convert::Infallible,
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    sync::Arc,
    time::Duration,
};
use tokio::{net::TcpStream, sync::Semaphore};
use tracing::{debug, warn};

/// Connections of one server at a time; the next wait in the backlog.
const MAX_CONNECTIONS: usize = 64;
const BACKLOG: i32 = 128;
const MAX_REQUEST_BYTES: usize = 16 << 10;
const HEADER_DEADLINE: Duration = Duration::from_secs(5);
/// For one request with its answer: a reader of a large dump may be slow, but not forever.
const CONNECTION_DEADLINE: Duration = Duration::from_secs(30);
const LONGEST_BACK_OFF: Duration = Duration::from_secs(1);

/// Where a server listens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Listen {
    /// 127.0.0.1, and ::1 where the host has IPv6.
    Loopback(u16),
    At(SocketAddr),
    /// Every address of both families; of IPv4 alone where the host has no IPv6.
    Everywhere(u16),
}

#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {address} for {server}{}", advice(source))]
pub struct BindError {
    server: &'static str,
    address: SocketAddr,
    source: io::Error,
}

fn advice(source: &io::Error) -> &'static str {
    match source.raw_os_error() {
        Some(libc::EADDRINUSE) => " (another process has the port; choose another by its flag, or 0 for none)",
        Some(libc::EACCES) => " (ports below 1024 need CAP_NET_BIND_SERVICE)",
        Some(libc::EADDRNOTAVAIL) => " (this host has no such address)",
        _ => "",
    }
}

/// What is shown under which paths.
pub trait Site: Send + Sync + 'static {
    /// Paths with the methods that they take; HEAD comes with GET.
    fn paths(&self) -> &'static [(&'static str, &'static [Method])];

    /// Called for known paths and methods alone.
    fn answer(self: Arc<Self>, request: &Parts) -> Answer;
}

/// An answer that is there, or one that takes work: that is done off the threads that carry connections.
pub enum Answer {
    Now(Response<Full<Bytes>>),
    Later(Box<dyn FnOnce() -> Response<Full<Bytes>> + Send>),
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Now(_) => "Now",
            Self::Later(_) => "Later",
        })
    }
}

/// Opens the sockets of a server. With port 0 the system chooses one, the same for both families.
///
/// # Errors
/// Names the server and the address that could not be had.
pub fn bind(server: &'static str, listen: Listen) -> Result<Vec<TcpListener>, BindError> {
    let open = |address: SocketAddr| {
        open(address).map_err(|source| BindError {
            server,
            address,
            source,
        })
    };
    match listen {
        Listen::At(address) => Ok(vec![open(address)?]),
        Listen::Everywhere(port) => match open((Ipv6Addr::UNSPECIFIED, port).into()) {
            Err(error) if no_ipv6(&error.source) => Ok(vec![open((Ipv4Addr::UNSPECIFIED, port).into())?]),
            Ok(listener) => Ok(vec![listener]),
            Err(error) => Err(error),
        },
        Listen::Loopback(port) => {
            let first = open((Ipv4Addr::LOCALHOST, port).into())?;
            let port = first.local_addr().map_or(port, |a| a.port());
            match open((Ipv6Addr::LOCALHOST, port).into()) {
                Ok(second) => Ok(vec![first, second]),
                Err(error) if no_ipv6(&error.source) => Ok(vec![first]),
                Err(error) => Err(error),
            }
        }
    }
}

/// IPv6 is not built in, switched off by sysctl, or off for the loopback interface.
fn no_ipv6(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EAFNOSUPPORT) || error.kind() == io::ErrorKind::AddrNotAvailable
}

fn open(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
    if let IpAddr::V6(ip) = address.ip() {
        socket.set_only_v6(!ip.is_unspecified())?;
    }
    // A restarted daemon must not wait for the connections of the one before.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

/// Serves `site` on each listener until the drain begins. For servers that are to answer while the connections drain,
/// that is a `Shutdown` of their own, drained last.
pub fn serve(
    listeners: Vec<TcpListener>,
    site: Arc<impl Site>,
    name: &'static str,
    shutdown: &Shutdown,
) -> io::Result<()> {
    let room = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    for listener in listeners {
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let (site, room, inner) = (Arc::clone(&site), Arc::clone(&room), shutdown.clone());
        shutdown.spawn(name, async move {
            let draining = inner.draining();
            tokio::pin!(draining);
            let mut back_off = Duration::from_millis(10);
            loop {
                let accepted = async {
                    // The semaphore is never closed.
                    let permit = Arc::clone(&room).acquire_owned().await.ok();
                    (permit, listener.accept().await)
                };
                let (permit, accepted) = tokio::select! {
                    () = &mut draining => return,
                    accepted = accepted => accepted,
                };
                match accepted {
                    Ok((stream, _)) => {
                        back_off = Duration::from_millis(10);
                        let site = Arc::clone(&site);
                        inner.spawn(name, async move {
                            serve_one(stream, site, name).await;
                            drop(permit);
                        });
                    }
                    Err(error) => {
                        warn!(server = name, %error, "cannot accept");
                        tokio::time::sleep(back_off).await;
                        back_off = (back_off * 2).min(LONGEST_BACK_OFF);
                    }
                }
            }
        });
    }
    Ok(())
}

async fn serve_one(stream: TcpStream, site: Arc<impl Site>, name: &'static str) {
    let service = service_fn(move |request: Request<Incoming>| {
        let site = Arc::clone(&site);
        async move { Ok::<_, Infallible>(respond(site, request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_DEADLINE)
        .max_buf_size(MAX_REQUEST_BYTES)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), service);
    match tokio::time::timeout(CONNECTION_DEADLINE, connection).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(
            server = name,
            error = &error as &(dyn std::error::Error + 'static),
            "request failed"
        ),
        Err(_) => debug!(server = name, "request took too long"),
    }
}

async fn respond(site: Arc<impl Site>, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let (parts, _body) = request.into_parts();
    let paths = site.paths();
    let Some((_, methods)) = paths.iter().find(|(path, _)| *path == parts.uri.path()) else {
        let known: String = paths.iter().map(|(path, _)| format!("{path}\n")).collect();
        return text(StatusCode::NOT_FOUND, format!("not found; there is:\n{known}"));
    };
    let asked = if parts.method == Method::HEAD {
        &Method::GET
    } else {
        &parts.method
    };
    if !methods.contains(asked) {
        let allowed = methods.iter().map(Method::as_str).collect::<Vec<_>>().join(", ");
        let mut response = text(StatusCode::METHOD_NOT_ALLOWED, format!("use {allowed}\n"));
        if let Ok(value) = HeaderValue::from_str(&allowed) {
            response.headers_mut().insert(header::ALLOW, value);
        }
        return response;
    }
    match site.answer(&parts) {
        Answer::Now(response) => response,
        Answer::Later(work) => tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| {
            warn!(path = parts.uri.path(), %error, "an answer failed");
            text(
                StatusCode::INTERNAL_SERVER_ERROR,
                "the answer failed; the log says why\n",
            )
        }),
    }
}

pub(super) fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    with_type(status, "text/plain; charset=utf-8", body)
}

pub(super) fn with_type(status: StatusCode, media: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(header::CONTENT_TYPE, HeaderValue::from_static(media));
    response
}

/// The values of `name` in a query, decoded.
pub(super) fn query_values(query: Option<&str>, name: &str) -> Vec<String> {
    let pairs = query
        .unwrap_or_default()
        .split('&')
        .map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    pairs
        .filter(|(key, _)| *key == name)
        .map(|(_, value)| decoded(value))
        .collect()
}

/// `%3A` becomes `:`, `+` a space; what is no valid escape stays as it is.
fn decoded(text: &str) -> String {
    let hex = |b: u8| char::from(b).to_digit(16).and_then(|d| u8::try_from(d).ok());
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        match (first, tail) {
            (b'+', _) => out.push(b' '),
            (b'%', [high, low, after @ ..]) => match (hex(*high), hex(*low)) {
                (Some(high), Some(low)) => {
                    out.push(high << 4 | low);
                    rest = after;
                }
                _ => out.push(b'%'),
            },
            (byte, _) => out.push(*byte),
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

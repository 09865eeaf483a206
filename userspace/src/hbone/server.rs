//! The answering side of an HBONE connection: who called, and for which tunnel. Not here: whether they may, and where the
//! tunnel's bytes go (`proxy::inbound`).

use super::{
    client::ConnectionEnd,
    handshake::{self, HandshakeError, Wire},
    headers::{self, RequestRefusal},
    keepalive::{Beat, Keepalive},
    settings::HboneSettings,
    stream::{Link, Tunnel, TunnelEnd},
};
use crate::{
    certs::{Distrust, TrustWatch},
    mesh::SpiffeId,
};
use bytes::Bytes;
use futures::future::BoxFuture;
use h2::{
    RecvStream,
    server::{Builder, Connection, SendResponse},
};
use http::{Response, StatusCode};
use rustls::ServerConfig;
use std::{
    future::{Future, poll_fn},
    net::SocketAddr,
    pin::{Pin, pin},
    sync::Arc,
    task::Poll,
    time::{Instant, SystemTime},
};
use tokio::{
    net::TcpStream,
    time::{Sleep, sleep, timeout},
};

/// Both ends of an accepted connection, as TCP and TLS know them.
#[derive(Debug)]
pub struct Caller {
    /// Proved by mutual TLS.
    pub peer: SpiffeId,
    /// The client pod's address, and the port of its daemon's socket.
    pub address: SocketAddr,
    /// The address that was dialled: the pod's, port 15008.
    pub dialled: SocketAddr,
}

/// A request for a tunnel that makes sense. Nothing that the client sent in it goes anywhere before [`Incoming::accept`].
pub struct Incoming {
    pub caller: Arc<Caller>,
    /// The client pod's address; the port is the application's own if `forwarded` told it, else 0.
    pub client: SocketAddr,
    /// An address of the pod and a port that is not the mesh's.
    pub target: SocketAddr,
    body: RecvStream,
    respond: SendResponse<Bytes>,
    link: Arc<Link>,
}

impl Incoming {
    /// Tells the client that the tunnel stands.
    ///
    /// # Errors
    /// The client has gone.
    pub fn accept(mut self) -> Result<Tunnel, TunnelEnd> {
        let send = self
            .respond
            .send_response(Response::new(()), false)
            .map_err(|e| TunnelEnd::from_h2(&e))?;
        Ok(Tunnel::accepted(send, self.body, self.link))
    }

    /// Tells the client that there will be no tunnel. What it has sent already is thrown away.
    pub fn refuse(mut self, refusal: RequestRefusal) {
        refuse(&mut self.respond, refusal);
    }
}

fn refuse(respond: &mut SendResponse<Bytes>, refusal: RequestRefusal) {
    let mut response = Response::new(());
    *response.status_mut() = StatusCode::from_u16(refusal.status()).unwrap_or(StatusCode::SERVICE_UNAVAILABLE);
    // A client that has gone needs no answer.
    let _ = respond.send_response(response, true);
}

/// What a connection brings.
pub enum Event {
    Tunnel(Incoming),
    Refused(RequestRefusal),
}

/// A connection whose client has proved who it is.
pub struct Server {
    connection: Connection<Wire, Bytes>,
    keepalive: Keepalive,
    caller: Arc<Caller>,
    settings: Arc<HboneSettings>,
    /// When the client is asked to open another connection, since its certificate ends.
    retire: Pin<Box<Sleep>>,
    distrust: BoxFuture<'static, Distrust>,
}

/// TLS and HTTP/2 over `tcp`, which was dialled as `dialled` from `address`.
///
/// # Errors
/// The client is none of the mesh, or speaks something else, or takes too long.
pub async fn accept(
    tcp: TcpStream,
    address: SocketAddr,
    dialled: SocketAddr,
    config: Arc<ServerConfig>,
    trust: TrustWatch,
    settings: Arc<HboneSettings>,
) -> Result<Server, HandshakeError> {
    let deadline = settings.handshake_deadline;
    let (wire, peer, proof) = handshake::accept(tcp, config, deadline).await?;
    let mut builder = Builder::new();
    builder
        .initial_window_size(settings.stream_window)
        .initial_connection_window_size(settings.connection_window)
        .max_frame_size(settings.max_frame_size)
        .max_header_list_size(settings.server_header_list)
        .max_concurrent_streams(settings.max_concurrent_streams)
        .max_send_buffer_size(settings.send_buffer)
        .max_concurrent_reset_streams(HboneSettings::RESET_STREAMS)
        .max_pending_accept_reset_streams(HboneSettings::RESET_STREAMS)
        .max_local_error_reset_streams(None)
        .data_frame_budget(HboneSettings::DATA_FRAME_BUDGET);
    let mut connection = timeout(deadline, builder.handshake(wire))
        .await
        .map_err(|_| HandshakeError::Timeout(deadline))?
        .map_err(HandshakeError::Http2)?;
    let ping = connection.ping_pong();
    let ping = ping.ok_or_else(|| HandshakeError::Http2(h2::Reason::INTERNAL_ERROR.into()))?;
    let keepalive = Keepalive::new(ping, &settings);
    let caller = Arc::new(Caller { peer, address, dialled });
    Ok(Server {
        connection,
        keepalive,
        caller,
        settings,
        retire: Box::pin(sleep(proof.left(SystemTime::now()) / 2)),
        distrust: Box::pin(trust.distrust(proof)),
    })
}

impl Server {
    pub fn caller(&self) -> &Arc<Caller> {
        &self.caller
    }

    /// Serves the connection until it ends. `reserved` are the ports of the mesh in this pod. When `draining` resolves the
    /// client is told to go elsewhere, and the connection ends with its last tunnel.
    pub async fn run(
        mut self,
        reserved: impl Fn(u16) -> bool,
        draining: impl Future<Output = ()>,
        mut event: impl FnMut(Event),
    ) -> ConnectionEnd {
        let mut draining = pin!(draining);
        let mut drains = false;
        let mut busy_at = Instant::now();
        let link = Arc::new(Link::new());
        let Self {
            connection,
            keepalive,
            caller,
            settings,
            retire,
            distrust,
        } = &mut self;
        poll_fn(|cx| {
            if !drains && (draining.as_mut().poll(cx).is_ready() || retire.as_mut().poll(cx).is_ready()) {
                drains = true;
                connection.graceful_shutdown();
            }
            if let Poll::Ready(distrust) = distrust.as_mut().poll(cx) {
                link.distrust(distrust.clone());
                return Poll::Ready(ConnectionEnd::Distrusted(distrust));
            }
            loop {
                match connection.poll_accept(cx) {
                    Poll::Ready(Some(Ok((request, mut respond)))) => {
                        match headers::target(&request, caller.dialled.ip(), &reserved) {
                            Ok(target) => event(Event::Tunnel(Incoming {
                                client: SocketAddr::new(
                                    caller.address.ip(),
                                    headers::forwarded_port(request.headers()),
                                ),
                                target,
                                caller: Arc::clone(caller),
                                body: request.into_body(),
                                respond,
                                link: Arc::clone(&link),
                            })),
                            Err(refusal) => {
                                refuse(&mut respond, refusal);
                                event(Event::Refused(refusal));
                            }
                        }
                    }
                    Poll::Ready(Some(Err(error))) => return Poll::Ready(ConnectionEnd::Broken(error.to_string())),
                    Poll::Ready(None) => return Poll::Ready(ConnectionEnd::Closed),
                    Poll::Pending => break,
                }
            }
            while let Poll::Ready(beat) = keepalive.poll_beat(cx) {
                match beat {
                    Beat::Dead => return Poll::Ready(ConnectionEnd::PingTimeout),
                    Beat::Sent if connection.has_streams() => busy_at = Instant::now(),
                    // Twice the client's patience: normally the client closes first.
                    Beat::Sent if busy_at.elapsed() >= settings.idle * 2 && !drains => {
                        drains = true;
                        connection.graceful_shutdown();
                    }
                    Beat::Sent => {}
                }
            }
            Poll::Pending
        })
        .await
    }
}

//! The dialling side of an HBONE connection: HTTP/2 over TLS, driven by one task. Not here: which connection a tunnel
//! takes (`pool`).

use super::{
    goodbye::Goodbye,
    handshake::{self, HandshakeError, Wire},
    keepalive::{Beat, Keepalive},
    settings::HboneSettings,
    stream::Link,
};
use crate::certs::{Distrust, TrustWatch};
use bytes::Bytes;
use futures::future::BoxFuture;
use h2::client::{Builder, Connection, SendRequest};
use rustls::ClientConfig;
use std::{
    future::{Future as _, poll_fn},
    net::IpAddr,
    pin::Pin,
    sync::Arc,
    task::Poll,
    time::{Duration, SystemTime},
};
use tokio::{net::TcpStream, time::timeout};

/// Why a connection, once it stood, is no more.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConnectionEnd {
    #[error("the connection was not needed")]
    Idle,
    #[error("the peer did not answer a PING in time")]
    PingTimeout,
    #[error("the connection was closed")]
    Closed,
    #[error("the daemon is going away")]
    Cut,
    #[error("{0}")]
    Distrusted(Distrust),
    #[error("{0}")]
    Broken(String),
}

/// A connection that has just been opened: what sends requests, and what must be driven for that.
pub(super) struct Opened {
    pub(super) sender: SendRequest<Bytes>,
    pub(super) driver: Driver,
    pub(super) link: Arc<Link>,
    /// How long the peer's certificate lives.
    pub(super) peer_left: Duration,
}

pub(super) struct Driver {
    connection: Connection<Goodbye<Wire>, Bytes>,
    keepalive: Keepalive,
    link: Arc<Link>,
    distrust: BoxFuture<'static, Distrust>,
}

/// TLS and HTTP/2 over `tcp`. The peer's SETTINGS are not waited for, so that the first CONNECT leaves at once.
///
/// # Errors
/// The peer is not whom `config` expects, or speaks something else.
pub(super) async fn open(
    tcp: TcpStream,
    server: IpAddr,
    config: Arc<ClientConfig>,
    trust: TrustWatch,
    settings: &HboneSettings,
) -> Result<Opened, HandshakeError> {
    let (wire, proof) = handshake::connect(tcp, server, config, settings.handshake_deadline).await?;
    let mut builder = Builder::new();
    builder
        .enable_push(false)
        .initial_window_size(settings.stream_window)
        .initial_connection_window_size(settings.connection_window)
        .max_frame_size(settings.max_frame_size)
        .max_header_list_size(settings.client_header_list)
        .max_send_buffer_size(settings.send_buffer)
        .max_concurrent_reset_streams(HboneSettings::RESET_STREAMS)
        .max_local_error_reset_streams(None)
        .data_frame_budget(HboneSettings::DATA_FRAME_BUDGET);
    let deadline = settings.handshake_deadline;
    let (sender, mut connection) = timeout(deadline, builder.handshake(Goodbye::new(wire)))
        .await
        .map_err(|_| HandshakeError::Timeout(deadline))?
        .map_err(HandshakeError::Http2)?;
    let ping = connection.ping_pong();
    // There is exactly one caller, so the handle is always there.
    let ping = ping.ok_or_else(|| HandshakeError::Http2(h2::Reason::INTERNAL_ERROR.into()))?;
    let keepalive = Keepalive::new(ping, settings);
    let link = Arc::new(Link::new());
    Ok(Opened {
        sender,
        peer_left: proof.left(SystemTime::now()),
        driver: Driver {
            connection,
            keepalive,
            link: Arc::clone(&link),
            distrust: Box::pin(trust.distrust(proof)),
        },
        link,
    })
}

impl Driver {
    /// Moves the connection's bytes until it ends. `beat` is asked from time to time whether the connection may close
    /// for want of use.
    pub(super) async fn run(mut self, mut unused: impl FnMut() -> bool) -> ConnectionEnd {
        poll_fn(|cx| {
            match Pin::new(&mut self.connection).poll(cx) {
                Poll::Ready(Ok(())) => return Poll::Ready(ConnectionEnd::Closed),
                Poll::Ready(Err(error)) => return Poll::Ready(ConnectionEnd::Broken(error.to_string())),
                Poll::Pending => {}
            }
            if let Poll::Ready(distrust) = self.distrust.as_mut().poll(cx) {
                self.link.distrust(distrust.clone());
                return Poll::Ready(ConnectionEnd::Distrusted(distrust));
            }
            while let Poll::Ready(beat) = self.keepalive.poll_beat(cx) {
                match beat {
                    Beat::Dead => return Poll::Ready(ConnectionEnd::PingTimeout),
                    Beat::Sent if unused() => return Poll::Ready(ConnectionEnd::Idle),
                    Beat::Sent => {}
                }
            }
            Poll::Pending
        })
        .await
    }
}

//! From a TCP connection to a TLS connection with a verified peer, on either side. Not here: which peers are believed
//! (`certs::verify`) and HTTP/2.

use super::readahead::ReadAhead;
use crate::{
    certs::{self, PeerRejected, Proof},
    mesh::SpiffeId,
};
use rustls::{AlertDescription, ClientConfig, InvalidMessage, PeerIncompatible, ServerConfig};
use rustls_pki_types::{CertificateDer, ServerName};
use std::{io, net::IpAddr, sync::Arc, time::Duration};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{TlsAcceptor, TlsConnector, TlsStream};

/// Unsent bytes that the kernel keeps on the wire: enough that the link never runs dry, little enough that a small
/// message does not wait behind megabytes of a bulk tunnel.
const NOT_SENT_LOW_WATER: u32 = 1 << 20;

/// Why two daemons do not speak HBONE with each other.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    #[error("no handshake within {0:?}")]
    Timeout(Duration),
    #[error("the peer speaks no TLS")]
    Plaintext,
    #[error("the peer offers no TLS 1.3")]
    TlsVersion,
    #[error("the peer offers a protocol other than h2")]
    Alpn,
    #[error("the peer is refused")]
    Peer(#[source] PeerRejected),
    #[error("the peer ended the handshake: {0:?}")]
    Alert(AlertDescription),
    #[error("the peer closed the connection during the handshake")]
    Closed,
    #[error("tls error")]
    Tls(#[source] rustls::Error),
    #[error("the connection broke during the handshake")]
    Io(#[source] io::Error),
    #[error("HTTP/2 could not begin")]
    Http2(#[source] h2::Error),
}

impl HandshakeError {
    /// A stable name for counters and logs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Timeout(_) => "timeout",
            Self::Plaintext => "plaintext",
            Self::TlsVersion => "tls_version",
            Self::Alpn => "alpn",
            Self::Peer(rejected) => rejected.reason(),
            Self::Alert(_) => "alert",
            Self::Closed => "closed",
            Self::Tls(_) => "tls",
            Self::Io(_) => "io",
            Self::Http2(_) => "http2",
        }
    }

    fn from_io(error: io::Error) -> Self {
        match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
            Some(tls) => Self::from_tls(tls.clone()),
            None if error.kind() == io::ErrorKind::UnexpectedEof => Self::Closed,
            None => Self::Io(error),
        }
    }

    fn from_tls(error: rustls::Error) -> Self {
        if let Some(rejected) = certs::tls::rejection(&error) {
            return Self::Peer(rejected);
        }
        if let rustls::Error::AlertReceived(alert) = error {
            return if alert == AlertDescription::NoApplicationProtocol {
                Self::Alpn
            } else if alert == AlertDescription::ProtocolVersion {
                Self::TlsVersion
            } else {
                Self::Alert(alert)
            };
        }
        if let rustls::Error::InvalidMessage(reason) = &error
            && matches!(
                reason,
                InvalidMessage::InvalidContentType
                    | InvalidMessage::UnknownProtocolVersion
                    | InvalidMessage::MessageTooLarge
                    | InvalidMessage::InvalidEmptyPayload
            )
        {
            return Self::Plaintext;
        }
        if let rustls::Error::PeerIncompatible(reason) = &error
            && matches!(
                reason,
                PeerIncompatible::SupportedVersionsExtensionRequired
                    | PeerIncompatible::Tls12NotOffered
                    | PeerIncompatible::Tls12NotOfferedOrEnabled
                    | PeerIncompatible::Tls13RequiredForQuic
                    | PeerIncompatible::ServerDoesNotSupportTls12Or13
                    | PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig
            )
        {
            return Self::TlsVersion;
        }
        if error == rustls::Error::NoApplicationProtocol {
            return Self::Alpn;
        }
        Self::Tls(error)
    }
}

/// Ciphertext that is put together before it is written, in bytes.
const WRITE_BEHIND: usize = 256 << 10;

/// A TLS connection over TCP.
pub(super) type Wire = TlsStream<ReadAhead>;

/// Dials the TLS side of a connection; `config` knows whom the server must prove to be.
pub(super) async fn connect(
    tcp: TcpStream,
    server: IpAddr,
    config: Arc<ClientConfig>,
    deadline: Duration,
) -> Result<(Wire, Proof), HandshakeError> {
    prepare(&tcp);
    let name = ServerName::IpAddress(server.into());
    match timeout(deadline, TlsConnector::from(config).connect(name, ReadAhead::new(tcp))).await {
        Ok(Ok(mut stream)) => {
            let (_, tls) = stream.get_mut();
            let proof = proof(tls.peer_certificates())?;
            tls.set_buffer_limit(Some(WRITE_BEHIND));
            Ok((TlsStream::Client(stream), proof))
        }
        Ok(Err(error)) => Err(HandshakeError::from_io(error)),
        Err(_) => Err(HandshakeError::Timeout(deadline)),
    }
}

/// Answers the TLS side of a connection and tells who the client proved to be.
pub(super) async fn accept(
    tcp: TcpStream,
    config: Arc<ServerConfig>,
    deadline: Duration,
) -> Result<(Wire, SpiffeId, Proof), HandshakeError> {
    prepare(&tcp);
    let tls = TlsAcceptor::from(config).accept(ReadAhead::new(tcp));
    let mut stream = match timeout(deadline, tls).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(HandshakeError::from_io(error)),
        Err(_) => return Err(HandshakeError::Timeout(deadline)),
    };
    let (_, tls) = stream.get_mut();
    let leaf = tls.peer_certificates().and_then(|chain| chain.first());
    let leaf = leaf.ok_or(HandshakeError::Peer(PeerRejected::NoCertificate))?;
    let peer = certs::peer_id(leaf).map_err(HandshakeError::Peer)?;
    let proof = proof(tls.peer_certificates())?;
    tls.set_buffer_limit(Some(WRITE_BEHIND));
    Ok((TlsStream::Server(stream), peer, proof))
}

fn proof(chain: Option<&[CertificateDer<'_>]>) -> Result<Proof, HandshakeError> {
    let proof = chain.and_then(Proof::of);
    proof.ok_or(HandshakeError::Peer(PeerRejected::NoCertificate))
}

fn prepare(tcp: &TcpStream) {
    let socket = socket2::SockRef::from(tcp);
    let prepared = socket
        .set_tcp_notsent_lowat(NOT_SENT_LOW_WATER)
        .and_then(|()| socket.set_tcp_nodelay(true));
    if let Err(error) = prepared {
        tracing::debug!(%error, "a socket of the wire keeps the kernel's defaults");
    }
}

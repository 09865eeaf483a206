//! Why a connection ended, in the words that operators search their logs for and the flags that metrics carry.

use super::{connections::Closed, relay::Ended};
use crate::{
    hbone::{HandshakeError, PoolError, TunnelEnd},
    mesh::{policy::Verdict, route::Refusal},
    net::DialError,
    telemetry::ResponseFlags,
};
use std::{
    error::Error,
    fmt,
    io::{self, ErrorKind},
    net::SocketAddr,
};

/// The end of a captured connection, from its first moment on.
#[derive(Debug)]
pub(super) enum End {
    Completely,
    /// There is no way to the destination.
    Refused(Refusal),
    /// No HBONE connection to the next hop.
    NoTunnel(PoolError),
    /// The peer did not answer the CONNECT in time.
    NoAnswer,
    /// Policy says no.
    Denied(Verdict),
    /// The workload takes mutual TLS alone.
    Strict,
    /// A destination outside the mesh, or our own application, could not be reached.
    Unreachable(DialError),
    /// The pod has as many connections as it may have.
    Overloaded,
    /// A connection to the daemon itself.
    OwnListener {
        destination: SocketAddr,
    },
    /// No certificate, so no handshake.
    NoCertificate(crate::certs::CertError),
    /// The peer did not come through the handshake.
    Handshake(HandshakeError),
    /// The client of a tunnel went away before the application answered.
    Abandoned(TunnelEnd),
    Application(ErrorKind),
    Far(ErrorKind),
    Tunnel(TunnelEnd),
    Closed(Closed),
}

impl End {
    pub(super) fn of_relay(ended: Ended, closed: Option<Closed>) -> Self {
        match (ended, closed) {
            (Ended::Completely, _) => Self::Completely,
            (Ended::Closed, Some(closed)) => Self::Closed(closed),
            (Ended::Closed, None) => Self::Closed(Closed::Cut),
            (Ended::Application(kind), _) => Self::Application(kind),
            (Ended::Far(kind), _) => Self::Far(kind),
            (Ended::Tunnel(end), _) => Self::Tunnel(end),
        }
    }

    pub(super) fn is_well(&self) -> bool {
        matches!(self, Self::Completely)
    }

    pub(super) fn flags(&self) -> ResponseFlags {
        match self {
            // A reset is how many applications end: it is logged, but not a failure of the mesh.
            Self::Completely
            | Self::Application(_)
            | Self::Far(_)
            | Self::Tunnel(TunnelEnd::Reset(_))
            | Self::Abandoned(_)
            | Self::Closed(Closed::Cut | Closed::Released) => ResponseFlags::None,
            Self::Denied(_)
            | Self::Strict
            | Self::Closed(Closed::PolicyChange)
            | Self::Tunnel(TunnelEnd::Refused(401)) => ResponseFlags::Deny,
            Self::Tunnel(TunnelEnd::Distrusted(_)) => ResponseFlags::TlsFailure,
            Self::Handshake(error) => flags_of_handshake(error),
            Self::NoTunnel(PoolError::Handshake(error)) => flags_of_handshake(error),
            Self::NoTunnel(PoolError::Certificate(_)) | Self::NoCertificate(_) => ResponseFlags::IdentityError,
            Self::NoTunnel(PoolError::Connect { source, .. }) if matches!(**source, DialError::Timeout { .. }) => {
                ResponseFlags::NetworkPolicy
            }
            Self::NoTunnel(
                PoolError::Connect { .. } | PoolError::Ended(_) | PoolError::Authority | PoolError::GoingAway,
            )
            | Self::Refused(_)
            | Self::NoAnswer
            | Self::Unreachable(_)
            | Self::Overloaded
            | Self::OwnListener { .. }
            | Self::Tunnel(TunnelEnd::Refused(_) | TunnelEnd::Lost(_)) => ResponseFlags::Connect,
        }
    }
}

fn flags_of_handshake(error: &HandshakeError) -> ResponseFlags {
    match error {
        HandshakeError::Http2(_) => ResponseFlags::H2HandshakeFailure,
        HandshakeError::Timeout(_)
        | HandshakeError::Plaintext
        | HandshakeError::TlsVersion
        | HandshakeError::Alpn
        | HandshakeError::Peer(_)
        | HandshakeError::Alert(_)
        | HandshakeError::Closed
        | HandshakeError::Tls(_)
        | HandshakeError::Io(_) => ResponseFlags::TlsFailure,
    }
}

/// An error and its causes in one line.
fn chain(f: &mut fmt::Formatter<'_>, error: &(dyn Error + 'static)) -> fmt::Result {
    write!(f, "{}", crate::telemetry::access::Causes(error))
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Completely => f.write_str("complete"),
            Self::Refused(refusal) => write!(f, "{refusal}"),
            Self::NoTunnel(PoolError::Connect { source, .. }) if matches!(**source, DialError::Timeout { .. }) => {
                f.write_str("connection timed out, maybe a NetworkPolicy is blocking HBONE port 15008")
            }
            Self::NoTunnel(PoolError::Handshake(error)) => {
                f.write_str("tls error: ")?;
                chain(f, error.as_ref())
            }
            Self::NoTunnel(error) => chain(f, error),
            Self::NoAnswer => f.write_str("the peer did not answer the CONNECT in time"),
            Self::Denied(verdict) => {
                f.write_str("connection closed due to policy rejection: ")?;
                match verdict {
                    Verdict::DeniedBy { namespace, name } => write!(f, "explicitly denied by: {namespace}/{name}"),
                    Verdict::NotAllowed => f.write_str("allow policies exist, but none allowed"),
                    Verdict::AllowedByDefault | Verdict::AllowedBy { .. } => f.write_str("policy changed meanwhile"),
                }
            }
            Self::Strict => {
                f.write_str("connection closed due to policy rejection: plaintext, but mutual TLS is STRICT")
            }
            Self::Unreachable(error) => chain(f, error),
            Self::Overloaded => f.write_str("the pod has too many connections"),
            Self::OwnListener { destination } => write!(f, "{destination} is a listener of the mesh itself"),
            Self::NoCertificate(error) => chain(f, error),
            Self::Handshake(error) => {
                f.write_str("tls error: ")?;
                chain(f, error)
            }
            Self::Abandoned(end) | Self::Tunnel(end) => write!(f, "{end}"),
            Self::Application(kind) => write!(f, "io error: {}", io::Error::from(*kind)),
            Self::Far(kind) => write!(f, "io error at the destination: {}", io::Error::from(*kind)),
            Self::Closed(closed) => write!(f, "{closed}"),
        }
    }
}

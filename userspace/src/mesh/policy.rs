//! Who may call whom: AuthorizationPolicy and PeerAuthentication at L4, as Istio defines them.

use super::{MeshSnapshot, SpiffeId, Workload};
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

/// One AuthorizationPolicy, parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Authorization {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

/// One PeerAuthentication, parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerAuth {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

/// A connection as policy sees it, from the destination's side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The client's address; the port is 0 where unknown.
    pub source: SocketAddr,
    /// Proved by mutual TLS; `None` for plaintext.
    pub peer: Option<SpiffeId>,
    /// The pod's address and port.
    pub destination: SocketAddr,
}

/// What policy says, and by which rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// No ALLOW policy selects the workload and no DENY matches.
    AllowedByDefault,
    AllowedBy { namespace: Arc<str>, name: Arc<str> },
    DeniedBy { namespace: Arc<str>, name: Arc<str> },
    /// ALLOW policies select the workload, and none of them matches.
    NotAllowed,
}

impl Verdict {
    pub fn allows(&self) -> bool {
        matches!(self, Self::AllowedByDefault | Self::AllowedBy { .. })
    }
}

/// What a workload does with plaintext.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MutualTls {
    Permissive,
    Strict,
}

/// Decides one connection towards `workload`.
pub fn authorize(_snapshot: &MeshSnapshot, _workload: &Workload, _facts: &Facts) -> Verdict {
    todo!()
}

/// The effective mode of `workload` at `port`.
pub fn mutual_tls(_snapshot: &MeshSnapshot, _workload: &Workload, _port: u16) -> MutualTls {
    todo!()
}

/// True if no AuthorizationPolicy selects the workload: anyone may call, whatever the daemon's state.
pub fn unrestricted(_snapshot: &MeshSnapshot, _workload: &Workload) -> bool {
    todo!()
}

/// Ports whose mode differs from the workload's own.
pub fn port_modes(_snapshot: &MeshSnapshot, _workload: &Workload) -> Vec<(u16, MutualTls)> {
    todo!()
}

/// The policies that restrict an address nobody knows: kept here so that absence is a decision too.
pub fn is_loopback_like(address: IpAddr) -> bool {
    address.is_loopback() || address.is_unspecified()
}

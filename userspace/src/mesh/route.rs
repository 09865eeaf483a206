//! Where a captured connection goes. Pure: no clock, no socket, no lock.

use super::{MeshSnapshot, SpiffeId, Workload, service::Service};
use std::{net::SocketAddr, sync::Arc};

/// The port of HBONE in every pod of the mesh.
pub const HBONE_PORT: u16 = 15008;

/// The outcome of routing one captured connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// Tunnel through the daemon at `next_hop`, which must prove to be `peer`.
    Hbone {
        next_hop: SocketAddr,
        authority: SocketAddr,
        peer: SpiffeId,
        destination: Arc<Workload>,
        service: Option<Arc<Service>>,
    },
    /// Send unchanged: the destination is not in the mesh.
    Passthrough {
        destination: SocketAddr,
        workload: Option<Arc<Workload>>,
        service: Option<Arc<Service>>,
    },
    /// Inside the cluster's ranges, but the snapshot does not know it: it may know in a moment.
    Unknown,
    /// Close the connection and count the reason.
    Refuse(Refusal),
}

/// Why a captured connection goes nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    #[error("no healthy upstream")]
    NoHealthyUpstream,
    #[error("the service has no such port")]
    NoSuchServicePort,
    #[error("the destination is a listener of the mesh itself")]
    OwnListener,
    #[error("the destination lies in the cluster's ranges, but is no known pod or service")]
    UnknownDestination,
}

/// Routes a connection of `from` to `destination`. `random` is uniformly random and picks among equal endpoints.
pub fn route(_snapshot: &MeshSnapshot, _from: &Workload, _destination: SocketAddr, _random: u64) -> Route {
    todo!()
}

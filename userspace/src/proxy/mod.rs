//! The connections of captured pods, layer 4: what their applications open (`outbound`), what reaches them through the
//! mesh (`inbound`) and without it (`plaintext`). Application bytes are copied, never read. Not here: how connections get
//! here (`capture`, `kernel`) and the wire between daemons (`hbone`).

mod accept;
pub mod connections;
mod dry_run;
mod end;
mod inbound;
mod outbound;
mod plaintext;
mod pod;
mod relay;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

pub use connections::{Closed, Connections, Open};
pub use pod::{CapturedPodParts, PodError, PodHandle, ProxyContext, spawn_pod};

use crate::hbone::HboneSettings;
use std::{sync::Arc, time::Duration};

/// Bounds and waits of the proxy.
#[derive(Debug, Clone)]
pub struct ProxySettings {
    pub hbone: Arc<HboneSettings>,
    /// Connections of one pod, all kinds together. More are reset at once.
    pub connections_per_pod: usize,
    /// HBONE connections to one pod, those in their handshake included.
    pub hbone_connections_per_pod: usize,
    /// How long the pod's application may take to accept.
    pub deliver_deadline: Duration,
    /// How long a destination outside the mesh may take to accept.
    pub dial_deadline: Duration,
    /// How long a connection to an unknown address of the cluster waits for a snapshot that knows it.
    pub unknown_wait: Duration,
    /// How many endpoints of a service are tried for one connection.
    pub endpoint_attempts: u32,
}

impl Default for ProxySettings {
    fn default() -> Self {
        Self {
            hbone: Arc::default(),
            connections_per_pod: 32_768,
            hbone_connections_per_pod: 4_096,
            deliver_deadline: Duration::from_secs(10),
            dial_deadline: Duration::from_secs(30),
            unknown_wait: Duration::from_secs(1),
            endpoint_attempts: 3,
        }
    }
}

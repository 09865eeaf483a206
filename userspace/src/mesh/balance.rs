//! Which endpoint of a service a connection goes to. Pure: randomness is an argument.

use super::{
    Workload,
    service::{Endpoint, Service},
};
use std::net::IpAddr;

/// Why no endpoint was chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoEndpoint {
    #[error("the service has no such port")]
    NoSuchPort,
    #[error("no healthy upstream")]
    NoneReady,
}

/// What the choice depends on besides the service.
#[derive(Debug, Clone, Copy)]
pub struct Choice<'a> {
    pub from: &'a Workload,
    /// The VIP that was dialled: the endpoint is of its family.
    pub vip: IpAddr,
    pub port: u16,
    /// Uniformly random.
    pub random: u64,
}

/// The chosen endpoint and its port there.
///
/// # Errors
/// No such port, or nobody ready behind it.
pub fn choose<'s>(_service: &'s Service, _choice: Choice<'_>) -> Result<(&'s Endpoint, u16), NoEndpoint> {
    todo!()
}

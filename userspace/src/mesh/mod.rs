//! The mesh as plain values and pure functions: no async, no I/O, no clock, no lock.

pub mod balance;
#[cfg(test)]
pub(crate) mod fixtures;
pub mod identity;
pub mod map;
pub mod policy;
pub mod route;
pub mod service;
pub mod snapshot;
pub mod workload;

pub use identity::{SpiffeId, TrustDomain};
pub use map::SharedMap;
pub use snapshot::MeshSnapshot;
pub use workload::{Workload, WorkloadUid};

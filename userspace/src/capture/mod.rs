//! Keeps the kernel in agreement with the pods that should be captured: what to do is decided by pure functions (`plan`,
//! `tables`), done step by step (`pod`), and kept going by one task (`reconcile`). It does not serve connections: whoever
//! reads the events does.

mod adopt;
#[cfg(test)]
mod cost;
mod entries;
mod error;
mod finder;
mod jobs;
mod kernel_side;
mod names;
mod node;
mod plan;
mod pod;
mod reconcile;
mod runtime;
mod services;
mod tables;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;

use crate::{
    mesh::WorkloadUid,
    net::{Namespace, PodListeners},
};
use std::sync::Arc;
use tokio::sync::oneshot;

pub use error::CaptureError;
pub use finder::{Finder, Place};
pub use kernel_side::KernelSide;
pub use node::Inherited;
pub use plan::{Actual, Scope, Step, Wanted, plan};
pub use reconcile::{CaptureSettings, Ended, reconcile};

/// A pod whose connections reach these listeners from now on.
#[derive(Debug)]
pub struct CapturedPod {
    pub workload: WorkloadUid,
    pub namespace: Namespace,
    pub listeners: PodListeners,
}

/// What becomes of the node's pods, in the order in which it happens.
#[derive(Debug)]
pub enum CaptureEvent {
    Captured(CapturedPod),
    /// It is about to be released: whoever told others that it is in the mesh takes that back now, and drops `proceed`.
    Leaving {
        workload: WorkloadUid,
        proceed: oneshot::Sender<()>,
    },
    /// New connections are left alone; those that are open end by themselves, or are ended by the kernel soon. Also of a
    /// pod that was never captured, when nobody wants that any more.
    Released(WorkloadUid),
    /// Once: every pod that should be captured at the start has been, or has failed.
    Settled,
    /// It is tried again, later each time.
    Failed {
        workload: WorkloadUid,
        error: Arc<CaptureError>,
        attempts: u32,
    },
    /// Nothing follows until capture goes on, here or in another daemon; `heard` is dropped by whoever reads this.
    Paused {
        heard: oneshot::Sender<()>,
    },
}

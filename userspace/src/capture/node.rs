//! What is common to all pods of the node: whose namespace is whose, and what an earlier daemon left.

use super::{error::CaptureError, finder::Finder, kernel_side::KernelSide};
use crate::{
    mesh::WorkloadUid,
    net::{Namespace, PodListeners},
};
use parking_lot::Mutex;
use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

/// Which pod has which namespace, by cookie: two pods that name one namespace would take each other's place.
pub(super) type Claims = Arc<Mutex<HashMap<u64, WorkloadUid>>>;

pub(super) struct Claim {
    claims: Claims,
    cookie: u64,
}

impl Claim {
    pub(super) fn take(claims: &Claims, cookie: u64, workload: &WorkloadUid) -> Result<Self, CaptureError> {
        match claims.lock().entry(cookie) {
            std::collections::hash_map::Entry::Occupied(other) => Err(CaptureError::SharedNamespace {
                other: other.get().clone(),
            }),
            std::collections::hash_map::Entry::Vacant(free) => {
                free.insert(workload.clone());
                Ok(Self {
                    claims: Arc::clone(claims),
                    cookie,
                })
            }
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.claims.lock().remove(&self.cookie);
    }
}

/// What is common to all pods of the node.
#[derive(Clone)]
pub(super) struct Node {
    pub(super) kernel: Arc<dyn KernelSide>,
    /// The node's own.
    pub(super) namespace: Namespace,
    /// The daemon's: the node's, or that of its own pod.
    pub(super) own: Namespace,
    /// Looks for pods; without it they are where the manifests say.
    pub(super) finder: Option<Arc<Finder>>,
    pub(super) claims: Claims,
    /// Cookies of the namespaces that an earlier daemon captured and this one has not taken over yet.
    pub(super) adopted: Arc<Mutex<HashSet<u64>>>,
    pub(super) inherited: Inherited,
}

/// Listeners that the daemon before this one opened and this one was given, by the cookie of the pod's namespace.
#[derive(Debug, Clone, Default)]
pub struct Inherited(Arc<Mutex<HashMap<u64, PodListeners>>>);

impl Inherited {
    pub fn put(&self, namespace: u64, listeners: PodListeners) {
        self.0.lock().insert(namespace, listeners);
    }

    /// Copies: another attempt may need them again.
    pub(super) fn copy(&self, namespace: u64) -> Option<PodListeners> {
        self.0.lock().get(&namespace)?.try_clone().ok()
    }

    pub(super) fn forget(&self, namespace: u64) {
        self.0.lock().remove(&namespace);
    }

    /// Nobody is left who accepts from those that have no pod by now.
    pub(super) fn forget_all(&self) {
        self.0.lock().clear();
    }
}

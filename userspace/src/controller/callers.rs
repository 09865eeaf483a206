//! Which node asks: by the API server's word on its service-account token, or by a file of tokens where there is no API
//! server; and which identities are on that node. Not here: what it may have (`signing`).

use super::{
    review::Binding,
    reviews::{ReviewError, Reviews},
    signing::Refusal,
    tokens::TokenFile,
};
use crate::{
    kubernetes::bindings::BoundPods,
    mesh::{MeshSnapshot, SpiffeId},
};
use std::{net::IpAddr, sync::Arc};
use tokio::sync::watch;

/// How a bearer token becomes a node's name.
pub(super) enum Callers {
    File(TokenFile),
    Reviews(Reviews),
}

/// Which pods are bound to which node.
#[derive(Debug, Clone)]
pub enum Cluster {
    /// As the directory of manifests has it.
    Snapshot(watch::Receiver<Arc<MeshSnapshot>>),
    /// As the API server has it.
    Pods(BoundPods),
}

impl Callers {
    pub(super) async fn node_of(
        &self,
        token: &[u8],
        address: Option<IpAddr>,
        cluster: &Cluster,
    ) -> Result<Arc<str>, Refusal> {
        match self {
            Self::File(file) => {
                let tokens = file.current().await.map_err(Refusal::TokenFile)?;
                tokens.node_of(token).ok_or(Refusal::WrongToken)
            }
            Self::Reviews(reviews) => {
                // What is no text is no token either, and is refused as such.
                let token = std::str::from_utf8(token).unwrap_or_default();
                let binding = reviews.binding_of(token, address).await.map_err(refusal)?;
                match binding {
                    Binding::Node(node) => Ok(node),
                    Binding::Pod { namespace, name, uid } => {
                        let node = cluster.node_of_pod(&namespace, &name, uid.as_deref());
                        node.ok_or(Refusal::CallerUnknown { namespace, pod: name })
                    }
                }
            }
        }
    }
}

fn refusal(error: ReviewError) -> Refusal {
    match error {
        ReviewError::Refused(refused) => Refusal::Token(refused),
        ReviewError::Unanswered(_) | ReviewError::Busy | ReviewError::Flood => Refusal::Review(error),
    }
}

impl Cluster {
    /// What was there at the start is known.
    pub fn is_known(&self) -> bool {
        match self {
            Self::Snapshot(snapshot) => snapshot.borrow().version > 0,
            Self::Pods(pods) => pods.is_complete(),
        }
    }

    /// Resolves when it is.
    pub async fn known(&self) {
        match self {
            Self::Snapshot(snapshot) => {
                let mut snapshot = snapshot.clone();
                if snapshot.wait_for(|snapshot| snapshot.version > 0).await.is_err() {
                    std::future::pending::<()>().await;
                }
            }
            Self::Pods(pods) => pods.completed().await,
        }
    }

    /// True if a pod that is bound to `node` has this identity.
    pub(super) fn has(&self, node: &str, id: &SpiffeId) -> bool {
        match self {
            Self::Snapshot(snapshot) => snapshot
                .borrow()
                .workloads
                .values()
                .any(|workload| workload.identity == *id && workload.locality.node.as_deref() == Some(node)),
            Self::Pods(pods) => pods.has(node, id.namespace(), id.service_account()),
        }
    }

    /// The node of a pod that is still the same one.
    fn node_of_pod(&self, namespace: &str, name: &str, uid: Option<&str>) -> Option<Arc<str>> {
        match self {
            Self::Snapshot(snapshot) => {
                let snapshot = snapshot.borrow();
                let pod = snapshot.workloads.values().find(|workload| {
                    *workload.namespace == *namespace
                        && *workload.name == *name
                        && uid.is_none_or(|uid| *workload.uid.0 == *uid)
                })?;
                pod.locality.node.clone()
            }
            Self::Pods(pods) => {
                let pod = pods.pod(namespace, name)?;
                uid.is_none_or(|uid| *pod.uid == *uid).then_some(pod.node)
            }
        }
    }
}

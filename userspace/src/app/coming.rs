//! What a daemon that is told to end asks Kubernetes: whether another daemon of this node is on its way, which nobody else
//! knows before it is there.

use anyhow::Context;
use k8s_openapi::api::core::v1::Pod;
use kube::{Api, Client, api::ListParams};
use std::{sync::Arc, time::Duration};
use tracing::debug;

/// How the daemons' pods are labelled.
const DAEMONS: &str = "app.kubernetes.io/name=warren-node";
/// The name of the own pod, which has a host name of its own.
const HOST_NAME: &str = "/proc/sys/kernel/hostname";
/// How long the API server may take to answer.
const ASK: Duration = Duration::from_secs(2);

/// The answer, if it comes while there is time to wait for it.
///
/// # Errors
/// There is none.
pub(super) async fn answer<T>(asked: impl Future<Output = kube::Result<T>>) -> anyhow::Result<T> {
    let answered = tokio::time::timeout(ASK, asked).await;
    Ok(answered.context("the API server does not answer in time")??)
}

/// The pods of this node's daemons, as Kubernetes has them.
pub(super) struct Daemons {
    pub(super) client: Client,
    pub(super) namespace: String,
    pub(super) node: Arc<str>,
}

impl Daemons {
    /// True if there is a pod for one more daemon that has not begun to serve. Unless that is certain, it is not so.
    pub(super) async fn is_one_coming(&self) -> bool {
        let pods: Api<Pod> = Api::namespaced(self.client.clone(), &self.namespace);
        let of_node = ListParams::default()
            .labels(DAEMONS)
            .fields(&format!("spec.nodeName={}", self.node));
        match answer(pods.list(&of_node)).await {
            Ok(pods) => {
                let own = std::fs::read_to_string(HOST_NAME).unwrap_or_default();
                pods.items.iter().any(|pod| is_coming(pod, own.trim()))
            }
            Err(error) => {
                debug!(
                    error = format!("{error:#}"),
                    "whether another daemon is on its way is not known"
                );
                false
            }
        }
    }
}

/// Neither the own one, nor one that ends, nor one that serves, nor one that has ended.
fn is_coming(pod: &Pod, own: &str) -> bool {
    let Some(status) = &pod.status else { return false };
    let mut conditions = status.conditions.iter().flatten();
    let is_ready = conditions.any(|one| one.type_ == "Ready" && one.status == "True");
    let is_over = matches!(status.phase.as_deref(), Some("Succeeded" | "Failed"));
    let is_own = pod.metadata.name.as_deref() == Some(own);
    !is_own && pod.metadata.deletion_timestamp.is_none() && !is_ready && !is_over
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(metadata: serde_json::Value, status: serde_json::Value) -> Pod {
        serde_json::from_value(json!({"metadata": metadata, "status": status})).unwrap()
    }

    #[test]
    fn a_daemon_that_does_not_serve_yet_is_coming_and_no_other() {
        let is_coming = |pod: Pod| super::is_coming(&pod, "warren-node-own");
        let ready = |status: &str| json!({"phase": "Running", "conditions": [{"type": "Ready", "status": status}]});
        let next = || json!({"name": "warren-node-next"});
        assert!(is_coming(pod(next(), json!({"phase": "Pending"}))));
        assert!(is_coming(pod(next(), ready("False"))));
        assert!(!is_coming(pod(next(), ready("True"))));
        assert!(!is_coming(pod(next(), json!({"phase": "Failed"}))));
        assert!(!is_coming(pod(json!({"name": "warren-node-own"}), ready("False"))));
        let ends = json!({"name": "warren-node-before", "deletionTimestamp": "2026-11-22T12:00:00Z"});
        assert!(!is_coming(pod(ends, ready("False"))));
    }
}

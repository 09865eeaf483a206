//! Asks the API server about one pod: for whoever has to know before any watch has told, or without a daemon.

use super::enrolment::{DATAPLANE_MODE, Enrolment, Mode, PodFacts, SIDECAR_STATUS};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::{Api, Client, ResourceExt, api::ListParams};
use std::sync::Arc;

/// On the API server's picture of a static pod: the UID that the kubelet knows it by.
const STATIC_UID: &str = "kubernetes.io/config.hash";

/// What the API server says about a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Asked {
    /// `uid` is the API server's: a kubelet has another one for a static pod.
    Known { uid: Arc<str>, enrolment: Enrolment },
    /// There is no such pod, or another one of its name.
    Unknown,
}

/// Whether the pod should be in the mesh.
///
/// # Errors
/// The API server does not say.
pub async fn about(client: &Client, namespace: &str, name: &str, uid: &str) -> kube::Result<Asked> {
    let named = |name: &str| ListParams::default().fields(&format!("metadata.name={name}"));
    // Lists: what a daemon may read anyway.
    let (pods, namespaces) = (
        Api::<Pod>::namespaced(client.clone(), namespace),
        Api::<Namespace>::all(client.clone()),
    );
    let (only, selected) = (named(name), named(namespace));
    let (pods, namespaces) = futures::future::try_join(pods.list(&only), namespaces.list(&selected)).await?;
    let pod = pods.items.first().filter(|pod| is(pod, uid));
    Ok(match (pod, namespaces.items.first()) {
        (Some(pod), Some(namespace)) => known(pod, namespace),
        (None, _) | (_, None) => Asked::Unknown,
    })
}

fn is(pod: &Pod, uid: &str) -> bool {
    pod.uid().as_deref() == Some(uid) || pod.annotations().get(STATIC_UID).is_some_and(|known| known == uid)
}

fn known(pod: &Pod, namespace: &Namespace) -> Asked {
    let mode = |labels: &std::collections::BTreeMap<String, String>| Mode::parse(labels.get(DATAPLANE_MODE)?);
    let name = namespace.name_any();
    let enrolment = Enrolment::of(PodFacts {
        namespace: &name,
        namespace_mode: mode(namespace.labels()),
        pod_mode: mode(pod.labels()),
        host_network: pod.spec.as_ref().and_then(|spec| spec.host_network).unwrap_or(false),
        sidecar: pod.annotations().contains_key(SIDECAR_STATUS),
    });
    Asked::Known {
        uid: pod.uid().unwrap_or_default().into(),
        enrolment,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn pod(labels: serde_json::Value, annotations: serde_json::Value) -> Pod {
        let meta =
            json!({"name": "web-0", "namespace": "shop", "uid": "u-1", "labels": labels, "annotations": annotations});
        serde_json::from_value(json!({"metadata": meta})).unwrap()
    }

    #[test]
    fn a_static_pod_is_known_by_the_kubelets_uid_too() {
        let mirror = pod(json!({}), json!({"kubernetes.io/config.hash": "8a9c"}));
        assert!(is(&mirror, "8a9c") && is(&mirror, "u-1") && !is(&mirror, "u-2"));
    }

    #[test]
    fn labels_mean_here_what_they_mean_in_the_index() {
        let ambient = json!({"istio.io/dataplane-mode": "ambient"});
        let namespace: Namespace =
            serde_json::from_value(json!({"metadata": {"name": "shop", "labels": ambient}})).unwrap();
        let enrolment = |pod: &Pod| match known(pod, &namespace) {
            Asked::Known { enrolment, .. } => enrolment,
            Asked::Unknown => panic!("unknown"),
        };
        assert_eq!(enrolment(&pod(json!({}), json!({}))), Enrolment::ByNamespace);
        let out = json!({"istio.io/dataplane-mode": "none"});
        assert_eq!(enrolment(&pod(out, json!({}))), Enrolment::RefusedByPod);
        let sidecar = json!({"sidecar.istio.io/status": "{}"});
        assert_eq!(enrolment(&pod(json!({}), sidecar)), Enrolment::Sidecar);
    }
}

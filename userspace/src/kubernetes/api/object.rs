//! One object as it comes from the wire: JSON of whatever kind, freed at once of what nobody reads. A page of a list holds
//! hundreds of them, and a field that is malformed in one must not cost the others.

use kube::{
    Resource,
    api::ObjectMeta,
    core::{ApiResource, DynamicResourceScope},
};
use serde::{Deserialize, Deserializer};
use serde_json::Value;
use std::borrow::Cow;

/// The parts of a pod that are large and that the mesh does not look at.
const OF_PODS: [&str; 7] = [
    "containers",
    "initContainers",
    "ephemeralContainers",
    "volumes",
    "affinity",
    "tolerations",
    "topologySpreadConstraints",
];
const OF_POD_STATUS: [&str; 4] = [
    "containerStatuses",
    "initContainerStatuses",
    "ephemeralContainerStatuses",
    "conditions",
];
const OF_NODE_STATUS: [&str; 5] = ["images", "nodeInfo", "conditions", "volumesInUse", "volumesAttached"];
/// kubectl keeps the whole object a second time in here.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// The object's JSON, and the few words that the watch itself needs.
#[derive(Debug, Clone)]
pub(super) struct Object {
    meta: ObjectMeta,
    pub(super) value: Value,
}

impl Object {
    fn of(mut value: Value) -> Self {
        strip(&mut value);
        let word = |name: &str| value["metadata"][name].as_str().map(str::to_owned);
        let meta = ObjectMeta {
            name: word("name"),
            namespace: word("namespace"),
            resource_version: word("resourceVersion"),
            ..ObjectMeta::default()
        };
        Self { meta, value }
    }
}

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Value::deserialize(deserializer).map(Self::of)
    }
}

fn strip(value: &mut Value) {
    if let Some(meta) = value.get_mut("metadata").and_then(Value::as_object_mut) {
        meta.remove("managedFields");
        if let Some(annotations) = meta.get_mut("annotations").and_then(Value::as_object_mut) {
            annotations.remove(LAST_APPLIED);
        }
    }
    // What is no pod has no containers; what is no node has no nodeInfo. Other kinds keep every field.
    let is_pod = value.pointer("/spec/containers").is_some();
    let is_node = value.pointer("/status/nodeInfo").is_some();
    let mut remove = |part: &str, names: &[&str]| {
        if let Some(fields) = value.get_mut(part).and_then(Value::as_object_mut) {
            for name in names {
                fields.remove(*name);
            }
        }
    };
    if is_pod {
        remove("spec", &OF_PODS);
        remove("status", &OF_POD_STATUS);
    } else if is_node {
        remove("status", &OF_NODE_STATUS);
    }
}

impl Resource for Object {
    type DynamicType = ApiResource;
    type Scope = DynamicResourceScope;

    fn kind(resource: &ApiResource) -> Cow<'_, str> {
        resource.kind.as_str().into()
    }

    fn group(resource: &ApiResource) -> Cow<'_, str> {
        resource.group.as_str().into()
    }

    fn version(resource: &ApiResource) -> Cow<'_, str> {
        resource.version.as_str().into()
    }

    fn plural(resource: &ApiResource) -> Cow<'_, str> {
        resource.plural.as_str().into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.meta
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.meta
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_pod_keeps_what_the_mesh_reads_and_loses_what_is_large() {
        let object = Object::of(json!({
            "metadata": {
                "name": "web", "namespace": "shop", "resourceVersion": "7", "labels": {"app": "web"},
                "managedFields": [{"manager": "kubelet"}],
                "annotations": {LAST_APPLIED: "{}", "ambient.istio.io/redirection": "enabled"},
            },
            "spec": {"containers": [{"name": "c"}], "nodeName": "n1", "serviceAccountName": "web", "volumes": []},
            "status": {"phase": "Running", "podIP": "10.0.0.1", "conditions": [], "containerStatuses": []},
        }));
        assert_eq!(
            object.value,
            json!({
                "metadata": {
                    "name": "web", "namespace": "shop", "resourceVersion": "7", "labels": {"app": "web"},
                    "annotations": {"ambient.istio.io/redirection": "enabled"},
                },
                "spec": {"nodeName": "n1", "serviceAccountName": "web"},
                "status": {"phase": "Running", "podIP": "10.0.0.1"},
            })
        );
        assert_eq!(object.meta.resource_version.as_deref(), Some("7"));
    }

    #[test]
    fn a_policy_keeps_every_field_so_that_unknown_ones_are_found() {
        let policy =
            json!({"metadata": {"name": "p"}, "spec": {"volumes": [], "rules": []}, "status": {"conditions": []}});
        assert_eq!(Object::of(policy.clone()).value, policy);
    }

    #[test]
    fn a_malformed_object_is_still_an_object() {
        for text in [
            r#"{"metadata": 7}"#,
            r#"{"metadata": {"labels": [1]}, "spec": "x"}"#,
            "[]",
        ] {
            let object: Object = serde_json::from_str(text).expect("any JSON");
            assert_eq!(object.meta, ObjectMeta::default());
        }
    }
}

//! What is installed: the manifests rendered from the Helm chart, carried in the binary. Pure.

use super::api::Resource;
use serde_json::Value;

const WARREN: &str = include_str!("../../../deploy/manifests/warren.yaml");
const DEFINITIONS: &str = include_str!("../../../deploy/manifests/warren-crds.yaml");

/// Warren's namespace, as the rendered manifests have it.
pub(super) const NAMESPACE: &str = "warren-system";
pub(super) const NODE: &str = "warren-node";
pub(super) const CONTROLLER: &str = "warren-controller";
/// Every object of Warren bears `app.kubernetes.io/part-of: warren`.
pub(super) const PART_OF: &str = "app.kubernetes.io/part-of";

pub(super) const NAMESPACES: Resource = Resource::new("v1", "namespaces");
pub(super) const NODES: Resource = Resource::new("v1", "nodes");
pub(super) const PODS: Resource = Resource::new("v1", "pods");
pub(super) const EVENTS: Resource = Resource::new("v1", "events");
pub(super) const CONFIG_MAPS: Resource = Resource::new("v1", "configmaps");
pub(super) const SECRETS: Resource = Resource::new("v1", "secrets");
pub(super) const DAEMON_SETS: Resource = Resource::new("apps/v1", "daemonsets");
pub(super) const DEPLOYMENTS: Resource = Resource::new("apps/v1", "deployments");
pub(super) const CUSTOM_RESOURCES: Resource = Resource::new("apiextensions.k8s.io/v1", "customresourcedefinitions");

/// What an object is part of: one line of `warren install` each, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Component {
    Definitions,
    Namespace,
    Permissions,
    Controller,
    Daemons,
}

impl Component {
    pub(super) const ALL: [Self; 5] = [
        Self::Definitions,
        Self::Namespace,
        Self::Permissions,
        Self::Controller,
        Self::Daemons,
    ];

    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Definitions => "Custom resources",
            Self::Namespace => "Namespace",
            Self::Permissions => "Permissions",
            Self::Controller => "Controller",
            Self::Daemons => "Node daemons",
        }
    }
}

/// One object to install.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Object {
    pub(super) resource: Resource,
    pub(super) component: Component,
    pub(super) value: Value,
}

impl Object {
    pub(super) fn text(&self, at: &str) -> &str {
        self.value.pointer(at).and_then(Value::as_str).unwrap_or_default()
    }

    pub(super) fn kind(&self) -> &str {
        self.text("/kind")
    }

    pub(super) fn name(&self) -> &str {
        self.text("/metadata/name")
    }

    pub(super) fn namespace(&self) -> Option<&str> {
        self.value.pointer("/metadata/namespace").and_then(Value::as_str)
    }
}

/// What is wrong with the manifests that this binary carries: a fault of its build.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("the manifests in this binary are no YAML: {0}")]
    Yaml(String),
    #[error("the manifests in this binary hold a {0}, which the command does not know")]
    Kind(String),
}

/// All objects, components in order.
pub(super) fn all() -> Result<Vec<Object>, ManifestError> {
    let mut objects = parse(DEFINITIONS)?;
    objects.extend(parse(WARREN)?);
    objects.sort_by_key(|object| object.component);
    Ok(objects)
}

fn parse(text: &str) -> Result<Vec<Object>, ManifestError> {
    let documents: Vec<Value> =
        serde_saphyr::from_multiple(text).map_err(|error| ManifestError::Yaml(error.to_string()))?;
    documents
        .into_iter()
        .filter(|document| !document.is_null())
        .map(object)
        .collect()
}

fn object(value: Value) -> Result<Object, ManifestError> {
    let kind = value["kind"].as_str().unwrap_or_default();
    let name = value.pointer("/metadata/name").and_then(Value::as_str);
    let rbac = |plural| Resource::new("rbac.authorization.k8s.io/v1", plural);
    let (resource, component) = match kind {
        "CustomResourceDefinition" => (CUSTOM_RESOURCES, Component::Definitions),
        "Namespace" => (NAMESPACES, Component::Namespace),
        "ServiceAccount" => (Resource::new("v1", "serviceaccounts"), Component::Permissions),
        "ClusterRole" => (rbac("clusterroles"), Component::Permissions),
        "ClusterRoleBinding" => (rbac("clusterrolebindings"), Component::Permissions),
        "Role" => (rbac("roles"), Component::Permissions),
        "RoleBinding" => (rbac("rolebindings"), Component::Permissions),
        "Service" => (Resource::new("v1", "services"), Component::Controller),
        "PodDisruptionBudget" => (
            Resource::new("policy/v1", "poddisruptionbudgets"),
            Component::Controller,
        ),
        "Deployment" => (DEPLOYMENTS, Component::Controller),
        "DaemonSet" if name == Some(NODE) => (DAEMON_SETS, Component::Daemons),
        other => return Err(ManifestError::Kind(other.to_owned())),
    };
    Ok(Object {
        resource,
        component,
        value,
    })
}

/// The objects as one text that `kubectl apply --server-side -f -` takes.
pub(super) fn printed(objects: &[Object]) -> Result<String, ManifestError> {
    let mut text = String::new();
    for object in objects {
        let yaml = serde_saphyr::to_string(&object.value).map_err(|error| ManifestError::Yaml(error.to_string()))?;
        text.push_str("---\n");
        text.push_str(&yaml);
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_binary_carries_every_component() {
        let objects = all().unwrap();
        for component in Component::ALL {
            assert!(
                objects.iter().any(|object| object.component == component),
                "{component:?}"
            );
        }
        assert!(objects.is_sorted_by_key(|object| object.component));
    }

    #[test]
    fn what_is_printed_is_what_would_be_installed() {
        let objects = all().unwrap();
        assert_eq!(parse(&printed(&objects).unwrap()).unwrap(), objects);
    }

    /// A row such as `| ClusterRole | `pods` | list, watch | why |`.
    #[test]
    fn every_verb_of_every_role_has_its_reason_in_the_list_of_rights() {
        let page = include_str!("../../../deploy/RBAC.md");
        let section = |name: &str| {
            let (_, rest) = page.split_once(&format!("## {name}\n")).unwrap();
            rest.split("\n## ").next().unwrap().to_owned()
        };
        let texts = |rule: &Value, key: &str| -> Vec<String> {
            let list = rule[key].as_array().into_iter().flatten();
            list.map(|one| one.as_str().unwrap().to_owned()).collect()
        };
        let objects = all().unwrap();
        let mut expected = Vec::new();
        for role in objects.iter().filter(|object| object.kind().ends_with("Role")) {
            for rule in role.value["rules"].as_array().unwrap() {
                for resource in texts(rule, "resources") {
                    let group = texts(rule, "apiGroups").join("");
                    let mut named = resource;
                    if !group.is_empty() {
                        named.push_str(&format!(".{group}"));
                    }
                    let names = texts(rule, "resourceNames");
                    let each = if names.is_empty() {
                        vec![named]
                    } else {
                        names.iter().map(|name| format!("{named}/{name}")).collect()
                    };
                    let verbs = texts(rule, "verbs").join(", ");
                    let kind = if role.kind() == "Role" {
                        "Role in Warren's namespace"
                    } else {
                        "ClusterRole"
                    };
                    let rows = each.iter().map(|one| format!("| {kind} | `{one}` | {verbs} |"));
                    expected.extend(rows.map(|row| (role.name().to_owned(), row)));
                }
            }
        }
        for (account, row) in &expected {
            assert!(section(account).contains(row.as_str()), "{account} has no row {row}");
        }
        let rows = page
            .lines()
            .filter(|line| line.starts_with("| ClusterRole") || line.starts_with("| Role in"));
        assert_eq!(rows.count(), expected.len(), "the page lists what is not granted");
    }

    #[test]
    fn every_object_is_marked_as_warrens() {
        for object in all().unwrap() {
            let part_of = &object.value["metadata"]["labels"][PART_OF];
            assert_eq!(part_of, "warren", "{} {}", object.kind(), object.name());
        }
    }
}

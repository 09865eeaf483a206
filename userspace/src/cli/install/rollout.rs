//! How far the pods of a component are.

use crate::cli::{
    api::{ApiError, Cluster},
    manifests::{CONTROLLER, Component, DAEMON_SETS, DEPLOYMENTS, NAMESPACE, NODE},
};
use serde_json::Value;
use std::fmt;

/// Pods of the newest form, of those that are wanted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Rollout {
    wanted: u64,
    newest: u64,
    ready: u64,
    /// The numbers are about the object as it is now.
    current: bool,
}

impl Rollout {
    /// As the API server has it. A component that does not run pods is done.
    pub(super) async fn of(cluster: &Cluster, component: Component) -> Result<Self, ApiError> {
        let found = match component {
            Component::Controller => cluster.get(DEPLOYMENTS, Some(NAMESPACE), CONTROLLER).await?,
            Component::Daemons => cluster.get(DAEMON_SETS, Some(NAMESPACE), NODE).await?,
            Component::Definitions | Component::Namespace | Component::Permissions => {
                return Ok(Self {
                    current: true,
                    ..Self::default()
                });
            }
        };
        Ok(found.as_ref().map(Self::from_object).unwrap_or_default())
    }

    /// Of a Deployment or a DaemonSet.
    fn from_object(object: &Value) -> Self {
        let number = |at: &str| object.pointer(at).and_then(Value::as_u64);
        let status = |name: &str| number(&format!("/status/{name}")).unwrap_or(0);
        let is_daemon_set = object.pointer("/spec/replicas").is_none();
        let generation = number("/metadata/generation");
        Self {
            wanted: if is_daemon_set {
                status("desiredNumberScheduled")
            } else {
                number("/spec/replicas").unwrap_or(1)
            },
            newest: if is_daemon_set {
                status("updatedNumberScheduled")
            } else {
                status("updatedReplicas")
            },
            ready: if is_daemon_set {
                status("numberReady")
            } else {
                status("availableReplicas")
            },
            current: number("/status/observedGeneration") >= generation && generation.is_some(),
        }
    }

    pub(super) fn is_done(self) -> bool {
        self.current && self.newest >= self.wanted && self.ready >= self.wanted
    }
}

impl fmt::Display for Rollout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // During an update, pods of the old form are ready, too.
        write!(f, "{} of {} ready", self.ready.min(self.newest), self.wanted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn daemons(observed: u64, updated: u64, ready: u64) -> Rollout {
        Rollout::from_object(&json!({
            "metadata": {"generation": 2},
            "spec": {},
            "status": {
                "observedGeneration": observed,
                "desiredNumberScheduled": 3,
                "updatedNumberScheduled": updated,
                "numberReady": ready,
            },
        }))
    }

    #[test]
    fn numbers_from_before_a_change_do_not_count() {
        assert!(!daemons(1, 3, 3).is_done());
        assert!(daemons(2, 3, 3).is_done());
    }

    #[test]
    fn ready_pods_of_the_old_form_are_not_ready_ones_of_the_new() {
        let rollout = daemons(2, 1, 3);
        assert!(!rollout.is_done());
        assert_eq!(rollout.to_string(), "1 of 3 ready");
    }

    #[test]
    fn a_deployment_is_counted_by_what_is_available() {
        let object = json!({
            "metadata": {"generation": 1},
            "spec": {"replicas": 2},
            "status": {"observedGeneration": 1, "updatedReplicas": 2, "availableReplicas": 1},
        });
        assert_eq!(Rollout::from_object(&object).to_string(), "1 of 2 ready");
        assert!(!Rollout::from_object(&object).is_done());
    }
}

//! What is to be done about this node's pods. Pure: the snapshot, what is there already and the time are arguments.

use super::finder::Place;
use crate::{
    kernel::{PlaintextMode, PodPolicy},
    mesh::{
        MeshSnapshot, Workload, WorkloadUid,
        policy::{self, MutualTls},
    },
};
use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    sync::Arc,
    time::{Duration, Instant},
};

/// A pod that should be captured, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    pub workload: WorkloadUid,
    pub place: Place,
    /// `spec.runtimeClassName`.
    pub runtime_class: Option<Arc<str>>,
    pub addresses: Vec<IpAddr>,
    pub policy: PodPolicy,
}

/// What is there of a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Actual {
    /// Something is being done about it; nothing else may be.
    Busy { place: Place },
    /// `gone`: nothing leads to the namespace that was captured any more.
    Captured {
        place: Place,
        policy: PodPolicy,
        gone: bool,
    },
    /// The last attempt failed.
    Failed { place: Place, retry_at: Instant },
}

impl Actual {
    fn place(&self) -> &Place {
        match self {
            Self::Busy { place } | Self::Captured { place, .. } | Self::Failed { place, .. } => place,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Capture(Wanted),
    SetPolicy {
        workload: WorkloadUid,
        policy: PodPolicy,
    },
    /// `drain`: the pod lives on, so its open connections are given time.
    Release {
        workload: WorkloadUid,
        drain: bool,
    },
    /// A failed attempt that nobody wants any more.
    Forget {
        workload: WorkloadUid,
    },
}

/// Which pods are this daemon's to capture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope<'a> {
    /// Those of this node that a manifest names a namespace for.
    Named { node: &'a str },
    /// All of this node, which are looked for.
    Found { node: &'a str },
    /// None any more: the mesh is taken off this node.
    Nothing,
}

/// The steps towards what `snapshot` wants, given what is there. Releases come first: they free what captures may need.
pub fn plan(
    snapshot: &MeshSnapshot,
    scope: Scope<'_>,
    actual: &BTreeMap<WorkloadUid, Actual>,
    now: Instant,
) -> Vec<Step> {
    let wanted = wanted(snapshot, scope);
    let mut steps = Vec::new();
    let mut occupied: BTreeSet<&Place> = BTreeSet::new();
    for (workload, pod) in actual {
        let still_wanted = wanted.get(workload).filter(|wanted| wanted.place == *pod.place());
        match (pod, still_wanted) {
            (Actual::Captured { gone: true, .. }, _) => {
                steps.push(Step::Release {
                    workload: workload.clone(),
                    drain: false,
                });
            }
            (Actual::Captured { .. }, None) => {
                steps.push(Step::Release {
                    workload: workload.clone(),
                    drain: snapshot_has(snapshot, workload),
                });
            }
            (Actual::Failed { .. }, None) => {
                steps.push(Step::Forget {
                    workload: workload.clone(),
                });
                continue;
            }
            (Actual::Captured { policy, .. }, Some(wanted)) if *policy != wanted.policy => {
                steps.push(Step::SetPolicy {
                    workload: workload.clone(),
                    policy: wanted.policy.clone(),
                });
            }
            (Actual::Captured { .. } | Actual::Busy { .. }, _) => {}
            // It holds nothing: another pod with this path may try.
            (Actual::Failed { .. }, Some(_)) => continue,
        }
        occupied.insert(pod.place());
    }
    for (workload, wanted) in &wanted {
        let is_due = match actual.get(workload) {
            None => true,
            Some(Actual::Failed { place, retry_at }) => *retry_at <= now || *place != wanted.place,
            Some(Actual::Busy { .. } | Actual::Captured { .. }) => false,
        };
        if is_due && occupied.insert(&wanted.place) {
            steps.push(Step::Capture(wanted.clone()));
        }
    }
    steps
}

fn snapshot_has(snapshot: &MeshSnapshot, workload: &WorkloadUid) -> bool {
    snapshot.workloads.contains_key(workload)
}

/// The pods of this node that should be captured and can be found.
pub(super) fn wanted(snapshot: &MeshSnapshot, scope: Scope<'_>) -> BTreeMap<WorkloadUid, Wanted> {
    let own = snapshot.own.values();
    own.filter_map(|workload| {
        let wanted = Wanted {
            workload: workload.uid.clone(),
            place: place(workload, scope)?,
            runtime_class: workload.runtime_class.clone(),
            addresses: workload.addresses.clone(),
            policy: pod_policy(snapshot, workload),
        };
        Some((workload.uid.clone(), wanted))
    })
    .collect()
}

/// Where a pod that should be captured is found; `None` for one that should not.
fn place(workload: &Workload, scope: Scope<'_>) -> Option<Place> {
    let uid = Arc::clone(&workload.uid.0);
    match scope {
        Scope::Named { node } if is_wanted(workload, node) => workload.netns.clone().map(Place::Path),
        Scope::Found { node } if is_wanted(workload, node) => Some(match workload.netns.clone() {
            Some(path) => Place::Runtime { path, uid },
            None => Place::Processes { uid },
        }),
        Scope::Named { .. } | Scope::Found { .. } | Scope::Nothing => None,
    }
}

/// A pod of the node with the wish of its labels, but never where capture would take the node or the control plane down.
fn is_wanted(workload: &Workload, node_name: &str) -> bool {
    workload.locality.node.as_deref() == Some(node_name)
        && workload.enrolled
        && !workload.host_network
        && &*workload.namespace != "kube-system"
}

fn pod_policy(snapshot: &MeshSnapshot, workload: &Workload) -> PodPolicy {
    let mode = |mode| match mode {
        MutualTls::Permissive => PlaintextMode::Permissive,
        MutualTls::Strict => PlaintextMode::Strict,
    };
    PodPolicy {
        mode: mode(policy::workload_mode(snapshot, workload)),
        restricted: !policy::unrestricted(snapshot, workload),
        port_modes: policy::port_modes(snapshot, workload)
            .into_iter()
            .map(|(port, port_mode)| (port, mode(port_mode)))
            .collect(),
    }
}

/// How long to wait before attempt number `attempts` + 1: doubling from 100 ms up to half a minute.
pub(super) fn back_off(attempts: u32) -> Duration {
    Duration::from_millis(100)
        .saturating_mul(1 << attempts.saturating_sub(1).min(9))
        .min(Duration::from_secs(30))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::{
        SpiffeId,
        workload::{Locality, Protocol},
    };
    use std::path::PathBuf;

    fn pod(name: &str) -> Workload {
        Workload {
            uid: uid(name),
            name: name.into(),
            namespace: "shop".into(),
            identity: SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/web").unwrap(),
            addresses: vec!["10.77.1.2".parse().unwrap()],
            locality: Locality {
                node: Some("node-a".into()),
                ..Locality::default()
            },
            labels: Arc::default(),
            owner: name.into(),
            canonical_service: name.into(),
            canonical_revision: "latest".into(),
            protocol: Protocol::Hbone,
            host_network: false,
            enrolled: true,
            netns: Some(path(name)),
            runtime_class: None,
        }
    }

    fn uid(name: &str) -> WorkloadUid {
        WorkloadUid(name.into())
    }

    fn path(name: &str) -> PathBuf {
        PathBuf::from("/run/netns").join(name)
    }

    fn at(name: &str) -> Place {
        Place::Path(path(name))
    }

    fn snapshot(pods: impl IntoIterator<Item = Workload>) -> MeshSnapshot {
        let mut snapshot = MeshSnapshot {
            node: Some("node-a".into()),
            ..MeshSnapshot::default()
        };
        for pod in pods {
            snapshot.set_workload(Arc::new(pod));
        }
        snapshot
    }

    fn open_policy() -> PodPolicy {
        PodPolicy {
            mode: PlaintextMode::Permissive,
            restricted: false,
            port_modes: Vec::new(),
        }
    }

    fn captured(name: &str) -> Actual {
        Actual::Captured {
            place: at(name),
            policy: open_policy(),
            gone: false,
        }
    }

    fn steps(snapshot: &MeshSnapshot, actual: impl IntoIterator<Item = (WorkloadUid, Actual)>) -> Vec<String> {
        plan(
            snapshot,
            Scope::Named { node: "node-a" },
            &actual.into_iter().collect(),
            Instant::now(),
        )
        .into_iter()
        .map(|step| match step {
            Step::Capture(wanted) => format!("capture {}", wanted.workload),
            Step::SetPolicy { workload, .. } => format!("set policy {workload}"),
            Step::Release { workload, drain: true } => format!("release {workload}"),
            Step::Release { workload, drain: false } => format!("release {workload} at once"),
            Step::Forget { workload } => format!("forget {workload}"),
        })
        .collect()
    }

    #[test]
    fn enrolled_pods_of_this_node_are_captured_and_no_others() {
        let elsewhere = Locality {
            node: Some("node-b".into()),
            ..Locality::default()
        };
        let pods = [
            pod("enrolled"),
            Workload {
                enrolled: false,
                ..pod("not-enrolled")
            },
            Workload {
                host_network: true,
                ..pod("host-network")
            },
            Workload {
                namespace: "kube-system".into(),
                ..pod("system")
            },
            Workload {
                locality: elsewhere,
                ..pod("elsewhere")
            },
            Workload {
                locality: Locality::default(),
                ..pod("nowhere")
            },
            Workload {
                netns: None,
                ..pod("no-namespace")
            },
        ];
        assert_eq!(steps(&snapshot(pods), []), ["capture enrolled"]);
    }

    #[test]
    fn nothing_is_done_about_a_pod_that_is_as_it_should_be_or_in_work() {
        let snapshot = snapshot([pod("a"), pod("b")]);
        let actual = [(uid("a"), captured("a")), (uid("b"), Actual::Busy { place: at("b") })];
        assert_eq!(steps(&snapshot, actual), [""; 0]);
    }

    #[test]
    fn a_pod_that_leaves_the_mesh_drains_and_one_that_ends_does_not() {
        let snapshot = snapshot([
            Workload {
                enrolled: false,
                ..pod("left")
            },
            pod("gone"),
        ]);
        let gone = Actual::Captured {
            place: at("gone"),
            policy: open_policy(),
            gone: true,
        };
        let actual = [
            (uid("left"), captured("left")),
            (uid("deleted"), captured("deleted")),
            (uid("gone"), gone),
        ];
        assert_eq!(
            steps(&snapshot, actual),
            ["release deleted at once", "release gone at once", "release left"]
        );
    }

    #[test]
    fn a_namespace_is_released_by_one_pod_before_another_takes_it() {
        let snapshot = snapshot([Workload {
            netns: Some(path("shared")),
            ..pod("new")
        }]);
        let actual = [(uid("old"), captured("shared"))];
        assert_eq!(steps(&snapshot, actual), ["release old at once"]);
        let actual = [(uid("old"), Actual::Busy { place: at("shared") })];
        assert_eq!(steps(&snapshot, actual), [""; 0]);
    }

    #[test]
    fn of_two_pods_with_one_namespace_one_is_captured() {
        let pods = ["one", "two"].map(|name| Workload {
            netns: Some(path("shared")),
            ..pod(name)
        });
        assert_eq!(steps(&snapshot(pods), []), ["capture one"]);
    }

    #[test]
    fn a_failed_capture_waits_its_time_unless_the_pod_moved() {
        let snapshot = snapshot([pod("a"), pod("b"), pod("c")]);
        let later = Instant::now() + Duration::from_secs(60);
        let failed = |netns: &str, retry_at| Actual::Failed {
            place: at(netns),
            retry_at,
        };
        let actual = [
            (uid("a"), failed("a", later)),
            (uid("b"), failed("b", Instant::now())),
            (uid("c"), failed("before", later)),
            (uid("d"), failed("d", later)),
        ];
        assert_eq!(
            steps(&snapshot, actual),
            ["forget c", "forget d", "capture b", "capture c"]
        );
    }

    #[test]
    fn waiting_doubles_up_to_half_a_minute() {
        assert_eq!(back_off(1), Duration::from_millis(100));
        assert_eq!(back_off(2), Duration::from_millis(200));
        assert_eq!(back_off(9), Duration::from_millis(25_600));
        assert_eq!(back_off(10), Duration::from_secs(30));
        assert_eq!(back_off(u32::MAX), Duration::from_secs(30));
    }
}

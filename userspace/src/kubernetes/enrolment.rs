//! Which pods should be in the mesh. Pure.

/// The label `istio.io/dataplane-mode` of a Namespace or Pod.
pub const DATAPLANE_MODE: &str = "istio.io/dataplane-mode";
/// Written on a pod once it is captured: others may then speak HBONE with it.
pub const REDIRECTION: &str = "ambient.istio.io/redirection";
/// Written by Istio's sidecar injector.
pub const SIDECAR_STATUS: &str = "sidecar.istio.io/status";
/// The pod's network namespace: a path, honoured from the directory source alone.
pub const NETNS: &str = "warren.mesh/netns";

/// What `istio.io/dataplane-mode` says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Ambient,
    None,
}

/// What the wish depends on.
#[derive(Debug, Clone, Copy)]
pub struct PodFacts<'a> {
    pub namespace: &'a str,
    pub namespace_mode: Option<Mode>,
    pub pod_mode: Option<Mode>,
    pub host_network: bool,
    pub sidecar: bool,
}

/// Why a pod is, or is not, wanted in the mesh.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Enrolment {
    ByPod,
    ByNamespace,
    /// Neither the pod nor its namespace asks for it.
    NotAsked,
    /// The pod says `none`, whatever its namespace says.
    RefusedByPod,
    HostNetwork,
    KubeSystem,
    Sidecar,
}

impl Mode {
    /// `None` for a value that means nothing.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "ambient" => Some(Self::Ambient),
            "none" => Some(Self::None),
            _ => None,
        }
    }
}

impl Enrolment {
    pub fn of(pod: PodFacts<'_>) -> Self {
        match (pod.pod_mode, pod.namespace_mode) {
            _ if pod.host_network => Self::HostNetwork,
            _ if pod.namespace == "kube-system" => Self::KubeSystem,
            _ if pod.sidecar => Self::Sidecar,
            (Some(Mode::None), _) => Self::RefusedByPod,
            (Some(Mode::Ambient), _) => Self::ByPod,
            (None, Some(Mode::Ambient)) => Self::ByNamespace,
            (None, Some(Mode::None) | None) => Self::NotAsked,
        }
    }

    pub fn is_wanted(self) -> bool {
        matches!(self, Self::ByPod | Self::ByNamespace)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: PodFacts<'_> = PodFacts {
        namespace: "shop",
        namespace_mode: None,
        pod_mode: None,
        host_network: false,
        sidecar: false,
    };

    #[test]
    fn the_pods_own_label_wins_over_its_namespaces() {
        let ambient = PodFacts {
            namespace_mode: Some(Mode::Ambient),
            ..POD
        };
        assert_eq!(Enrolment::of(POD), Enrolment::NotAsked);
        assert_eq!(Enrolment::of(ambient), Enrolment::ByNamespace);
        assert_eq!(
            Enrolment::of(PodFacts {
                pod_mode: Some(Mode::None),
                ..ambient
            }),
            Enrolment::RefusedByPod
        );
        assert_eq!(
            Enrolment::of(PodFacts {
                pod_mode: Some(Mode::Ambient),
                ..POD
            }),
            Enrolment::ByPod
        );
        let out = PodFacts {
            namespace_mode: Some(Mode::None),
            ..POD
        };
        assert_eq!(Enrolment::of(out), Enrolment::NotAsked);
        assert_eq!(
            Enrolment::of(PodFacts {
                pod_mode: Some(Mode::Ambient),
                ..out
            }),
            Enrolment::ByPod
        );
    }

    #[test]
    fn some_pods_are_never_in_the_mesh_whatever_the_labels() {
        let asked = PodFacts {
            namespace_mode: Some(Mode::Ambient),
            pod_mode: Some(Mode::Ambient),
            ..POD
        };
        assert_eq!(
            Enrolment::of(PodFacts {
                host_network: true,
                ..asked
            }),
            Enrolment::HostNetwork
        );
        assert_eq!(
            Enrolment::of(PodFacts {
                namespace: "kube-system",
                ..asked
            }),
            Enrolment::KubeSystem
        );
        assert_eq!(Enrolment::of(PodFacts { sidecar: true, ..asked }), Enrolment::Sidecar);
        assert!(Enrolment::of(asked).is_wanted());
        for never in [
            Enrolment::HostNetwork,
            Enrolment::KubeSystem,
            Enrolment::Sidecar,
            Enrolment::RefusedByPod,
        ] {
            assert!(!never.is_wanted());
        }
    }
}

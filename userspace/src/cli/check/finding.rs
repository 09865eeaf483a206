//! What can be wrong with a cluster, each by its name.

use super::Area;

/// How much it matters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Severity {
    /// Something does not do what one would expect.
    Warning,
    /// Pods are not, or will not be, in the mesh; or traffic is, or will be, refused.
    Error,
}

macro_rules! problems {
    ($($(#[$doc:meta])* $problem:ident = $name:literal in $area:ident,)*) => {
        /// Everything that `warren check` looks for.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub(crate) enum Problem {
            $($(#[$doc])* $problem,)*
        }

        impl Problem {
            #[cfg(test)]
            pub(super) const ALL: &'static [Self] = &[$(Self::$problem),*];

            pub(crate) fn name(self) -> &'static str {
                match self {
                    $(Self::$problem => $name,)*
                }
            }

            pub(crate) fn area(self) -> Area {
                match self {
                    $(Self::$problem => Area::$area,)*
                }
            }
        }
    };
}

problems! {
    /// The API server does not answer.
    ApiAway = "api-away" in Api,
    /// The person may not read something, so it was not looked at.
    NotChecked = "not-checked" in Api,
    KubernetesTooOld = "kubernetes-too-old" in Api,

    KernelTooOld = "kernel-too-old" in Nodes,
    /// A node of an architecture or system that Warren is not built for.
    NodeUnsupported = "node-unsupported" in Nodes,
    NodeNotReady = "node-not-ready" in Nodes,
    /// A node that is short of disk, memory or process numbers.
    NodePressure = "node-pressure" in Nodes,

    CiliumSocketBalancing = "cilium-socket-lb" in Network,
    CiliumExclusive = "cilium-cni-exclusive" in Network,
    CalicoConnectTimeBalancing = "calico-connect-time-lb" in Network,
    StrictNetworkPolicy = "strict-network-policy" in Network,
    /// Istio's own ambient mode is on the same nodes.
    SecondMesh = "second-mesh" in Network,

    DefinitionMissing = "definition-missing" in Definitions,
    DefinitionVersion = "definition-version" in Definitions,

    /// An account, or the person, may not do something that is needed.
    RightMissing = "right-missing" in Permissions,
    PodSecurity = "pod-security" in Permissions,

    NotInstalled = "not-installed" in Installation,
    VersionSkew = "version-skew" in Installation,
    ImageMissing = "image-missing" in Installation,
    /// Kubernetes does not make Warren's pods at all: quota, admission.
    PodsRefused = "pods-refused" in Installation,

    ControllerNotReady = "controller-not-ready" in Controller,

    RootMissing = "root-missing" in Certificates,
    RootExpired = "root-expired" in Certificates,
    RootExpiring = "root-expiring" in Certificates,
    RootNotYetValid = "root-not-yet-valid" in Certificates,
    BundleMissing = "bundle-missing" in Certificates,
    /// Nodes do not trust the root that signs.
    BundleMismatch = "bundle-mismatch" in Certificates,
    TokenAudience = "token-audience" in Certificates,

    /// A node without a daemon.
    DaemonMissing = "daemon-missing" in Daemons,
    DaemonNotReady = "daemon-not-ready" in Daemons,
    DaemonRestarts = "daemon-restarts" in Daemons,
    ClockSkew = "clock-skew" in Daemons,
    /// The CNI plugin is not in its place on a node.
    CniMissing = "cni-plugin-missing" in Daemons,
    /// A daemon has not heard from the API server for long.
    StaleState = "stale-state" in Daemons,
    /// A map of the kernel is full.
    MapFull = "kernel-map-full" in Daemons,
    /// Objects that a daemon does not understand.
    ObjectsNotUnderstood = "objects-not-understood" in Policies,

    /// Sidecars and ambient for one namespace.
    TwoModes = "two-modes" in Pods,
    /// A value of the label that means nothing.
    UnknownMode = "unknown-mode" in Pods,
    CaptureFailed = "capture-failed" in Pods,
    NotCaptured = "not-captured" in Pods,

    /// A NetworkPolicy that does not let HBONE in.
    HboneBlocked = "hbone-blocked" in Policies,
    /// STRICT is in force, and somebody still comes in the clear.
    PlaintextRefused = "plaintext-refused" in Policies,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    pub(crate) problem: Problem,
    pub(crate) severity: Severity,
    /// What it is about: `node n1`, `pod shop/web-0`.
    pub(crate) subject: String,
    /// What is so.
    pub(crate) what: String,
    /// What to do.
    pub(crate) advice: String,
}

impl Finding {
    pub(super) fn error(problem: Problem, subject: impl Into<String>, what: impl Into<String>, advice: &str) -> Self {
        Self {
            problem,
            severity: Severity::Error,
            subject: subject.into(),
            what: what.into(),
            advice: advice.to_owned(),
        }
    }

    pub(super) fn warning(problem: Problem, subject: impl Into<String>, what: impl Into<String>, advice: &str) -> Self {
        Self {
            severity: Severity::Warning,
            ..Self::error(problem, subject, what, advice)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_problem_has_a_name_of_its_own_in_kebab_case() {
        let names: BTreeSet<_> = Problem::ALL.iter().map(|problem| problem.name()).collect();
        assert_eq!(names.len(), Problem::ALL.len());
        for name in names {
            assert!(name.bytes().all(|b| b == b'-' || b.is_ascii_lowercase()), "{name}");
        }
    }
}

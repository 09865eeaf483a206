//! Why a step with a pod failed.

use crate::{
    kernel::{AttachError, MapError, NetlinkError, interfaces::InterfacesError, sysctls::SysctlError},
    mesh::WorkloadUid,
    net::{ListenError, NamespaceError},
};
use std::sync::Arc;

/// Attempts, after which what might have passed has not.
const PASSES: u32 = 5;

/// Why a pod could not be captured, kept up to date or released, by step.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error(
        "no process of it is found below the node's kubepods cgroup: its sandbox is not there, or is no process of this kernel"
    )]
    NoProcess,
    #[error("its namespace is the node's own")]
    NodeNamespace,
    #[error("its namespace is the daemon's own")]
    OwnNamespace,
    #[error("its namespace is that of {other}")]
    SharedNamespace { other: WorkloadUid },
    #[error("none of its addresses is in its namespace")]
    ForeignNamespace,
    #[error("it forwards packets for others, which would bypass the mesh")]
    Forwards,
    #[error("its containers run in {runtime} (runtime class {class:?}), whose sockets this kernel does not see")]
    ForeignKernel { runtime: &'static str, class: Arc<str> },
    #[error("the kernel's tables cannot hold the cluster")]
    Tables { source: Arc<MapError> },
    #[error("no room for another pod")]
    Number { source: MapError },
    #[error("cannot open its listeners")]
    Listen { source: ListenError },
    #[error("cannot set up its sysctls")]
    Sysctls { source: SysctlError },
    #[error("cannot set up its routing")]
    Routes { source: NetlinkError },
    #[error(transparent)]
    Interfaces(#[from] InterfacesError),
    #[error("cannot watch its interfaces and addresses")]
    Watch { source: NetlinkError },
    #[error("cannot attach its programs")]
    Attach { source: AttachError },
    #[error("cannot write its settings")]
    Settings { source: MapError },
    #[error("cannot switch its steering")]
    Steer { source: MapError },
    #[error("cannot end its connections")]
    Sockets { source: NetlinkError },
    #[error("the step did not finish")]
    Interrupted,
}

impl CaptureError {
    /// True if another attempt cannot help as long as the pod is what it is.
    pub fn is_final(&self) -> bool {
        matches!(
            self,
            Self::ForeignKernel { .. } | Self::Forwards | Self::NodeNamespace | Self::OwnNamespace
        )
    }

    /// False for what a pod shows that is being taken down, or not all there yet: it passes within a second or two.
    pub fn lasts(&self, attempts: u32) -> bool {
        attempts >= PASSES || !matches!(self, Self::NoProcess | Self::Routes { .. })
    }

    /// One word, for metrics and logs.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Namespace(_) => "namespace",
            Self::NoProcess => "no-process",
            Self::NodeNamespace => "node-namespace",
            Self::OwnNamespace => "own-namespace",
            Self::SharedNamespace { .. } => "shared-namespace",
            Self::ForeignNamespace => "foreign-namespace",
            Self::Forwards => "forwards",
            Self::ForeignKernel { .. } => "foreign-kernel",
            Self::Tables { .. } => "tables-full",
            Self::Number { .. } => "no-room",
            Self::Listen { .. } => "listen",
            Self::Sysctls { .. } => "sysctls",
            Self::Routes { .. } => "routes",
            Self::Interfaces(_) => "interfaces",
            Self::Watch { .. } => "watch",
            Self::Attach { .. } => "attach",
            Self::Settings { .. } => "settings",
            Self::Steer { .. } => "steer",
            Self::Sockets { .. } => "sockets",
            Self::Interrupted => "interrupted",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_pods_end_looks_like_lasts_only_after_several_attempts() {
        assert!(!CaptureError::NoProcess.lasts(1));
        assert!(!CaptureError::NoProcess.lasts(PASSES - 1));
        assert!(CaptureError::NoProcess.lasts(PASSES));
        assert!(CaptureError::Forwards.lasts(1));
    }
}

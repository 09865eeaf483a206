//! The ways in which a pod's guard can be attached, each of which the tests of the guard try.

use warren::{
    kernel::{Kernel, KernelConfig, PodNumber, Tcx},
    net::Namespace,
};

/// How a pod's guard is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Guard {
    /// As on a kernel without links.
    Filter,
    /// As right after a pod's start.
    Fresh,
    /// As on a pod that has been there for a while.
    Linked,
}

impl Guard {
    pub const ALL: [Self; 3] = [Self::Filter, Self::Fresh, Self::Linked];

    pub fn configure(self, config: &mut KernelConfig) {
        if self == Self::Filter {
            config.tcx = Tcx::Netlink;
        }
    }

    pub fn link(self, kernel: &Kernel, pod: PodNumber, namespace: &Namespace) {
        if self == Self::Linked {
            kernel.link_guards(pod, namespace).unwrap();
        }
    }
}

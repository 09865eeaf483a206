//! What the kernel side is told once, at the start.

use std::path::PathBuf;

#[derive(Debug, Clone)]
pub struct KernelConfig {
    /// A directory on bpffs; one per daemon. State lives in a versioned folder below it.
    pub pin_dir: PathBuf,
    /// The cgroup v2 folder whose processes are watched: every pod's, and the daemon's own, whose end is noticed by its
    /// listeners' closing. `None`: the root of the hierarchy, from `/proc/mounts`.
    pub cgroup: Option<PathBuf>,
    /// The cgroup folder of the pods. `None`: looked for below the watched folder.
    pub kubepods: Option<PathBuf>,
    pub sizes: Sizes,
    pub tcx: Tcx,
    /// Log every decision of the programs at level trace. Costs nothing when off.
    pub trace: bool,
}

impl KernelConfig {
    /// With the defaults, pinned below `pin_dir`.
    pub fn at(pin_dir: impl Into<PathBuf>) -> Self {
        Self {
            pin_dir: pin_dir.into(),
            cgroup: None,
            kubepods: None,
            sizes: Sizes::default(),
            tcx: Tcx::Auto,
            trace: false,
        }
    }
}

/// Entries per map. An adopted map keeps the size it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sizes {
    /// Pod addresses of the cluster.
    pub workloads: u32,
    /// Service VIPs times ports.
    pub services: u32,
    /// Pod and service ranges.
    pub ranges: u32,
    /// Captured pods of this node.
    pub pods: u32,
    /// Addresses and port modes of all captured pods, each.
    pub pod_details: u32,
    /// Connects of the node's own processes that are under way.
    pub node_connects: u32,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            workloads: 65_536,
            services: 65_536,
            ranges: 4_096,
            pods: 1_024,
            pod_details: 8_192,
            node_connects: 16_384,
        }
    }
}

/// How the guard is attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tcx {
    /// By a link where the kernel has them (6.6), else by a filter.
    Auto,
    /// By a filter of a clsact qdisc, as below 6.6.
    Netlink,
}

//! The maps: their names, keys and values. No type has padding; addresses and ports
//! are in network order, other numbers in the machine's, since a map never leaves it.

use crate::{Address, PlaintextMode, PodNumber};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Names of the maps, as pinned and as in the object files.
pub mod names {
    /// [`super::NodeFacts`], one cell.
    pub const NODE: &str = "NODE";
    /// Reason to count, per CPU.
    pub const COUNTERS: &str = "COUNTERS";
    /// [`super::Cookie`] of a namespace to [`crate::PodNumber`]: whose connections are steered.
    pub const PODS: &str = "PODS";
    /// Pod number to [`crate::PodSettings`].
    pub const SETTINGS: &str = "SETTINGS";
    /// [`super::PortKey`] to [`super::PortMode`].
    pub const PORT_MODES: &str = "PORT_MODES";
    /// [`super::OwnAddress`] to nothing of interest.
    pub const OWN_ADDRESSES: &str = "OWN_ADDRESSES";
    /// [`crate::Address`] to [`super::WorkloadEntry`].
    pub const WORKLOADS: &str = "WORKLOADS";
    /// [`super::ServiceKey`] to [`super::ServiceEntry`].
    pub const SERVICES: &str = "SERVICES";
    /// Prefix of an [`crate::Address`] (IPv4: 96 and its own length) to nothing of interest.
    pub const RANGES: &str = "RANGES";
    /// [`crate::pod::live_index`] to the [`super::Cookie`] of the open outbound listener, 0 where there is none.
    pub const LIVE: &str = "LIVE";
    /// [`crate::pod::listener_index`] to socket.
    pub const LISTENERS: &str = "LISTENERS";
    /// [`super::Cookie`] of a socket that a process of the node is about to connect, to [`super::Instant`].
    pub const NODE_DIALS: &str = "NODE_DIALS";
    /// [`crate::FourTuple`] of a connection from a process of the node, to [`super::Instant`].
    pub const NODE_CONNECTS: &str = "NODE_CONNECTS";
    /// The ring of trace lines.
    pub const TRACE: &str = "AYA_LOGS";
}

/// The cookie of a namespace or socket: never reused, never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Cookie(u64);

impl Cookie {
    pub const NONE: Self = Self::new(0);

    #[inline(always)]
    pub const fn new(cookie: u64) -> Self {
        Self(cookie)
    }

    #[inline(always)]
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// Nanoseconds of the kernel's monotonic clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Instant(u64);

impl Instant {
    #[inline(always)]
    pub const fn new(nanoseconds: u64) -> Self {
        Self(nanoseconds)
    }

    #[inline(always)]
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// What the programs know of the node they run on. All zero: no process counts as the node's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct NodeFacts {
    namespace: u64,
    kubepods: u64,
}

impl NodeFacts {
    pub const UNKNOWN: Self = Self {
        namespace: 0,
        kubepods: 0,
    };

    /// `namespace`: the cookie of the node's own network namespace. `kubepods`: the id of the cgroup below which every
    /// container lives, those on the host's network too.
    pub const fn new(namespace: u64, kubepods: Option<u64>) -> Self {
        let kubepods = match kubepods {
            Some(cgroup) => cgroup,
            None => 0,
        };
        Self { namespace, kubepods }
    }

    /// 0 where it is not known.
    #[inline(always)]
    pub const fn namespace(&self) -> u64 {
        self.namespace
    }

    #[inline(always)]
    pub const fn kubepods(&self) -> Option<u64> {
        match self.kubepods {
            0 => None,
            cgroup => Some(cgroup),
        }
    }
}

/// A pod of the cluster, in the mesh or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct WorkloadEntry {
    in_mesh: u32,
}

impl WorkloadEntry {
    pub const IN_MESH: Self = Self { in_mesh: 1 };
    pub const OUTSIDE: Self = Self { in_mesh: 0 };

    #[inline(always)]
    pub const fn is_in_mesh(&self) -> bool {
        self.in_mesh != 0
    }
}

/// A service's VIP and port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ServiceKey {
    vip: Address,
    port: u16,
    _zero: u16,
}

impl ServiceKey {
    #[inline(always)]
    pub const fn new(vip: Address, port: u16) -> Self {
        Self {
            vip,
            port: port.to_be(),
            _zero: 0,
        }
    }

    pub const fn vip(&self) -> Address {
        self.vip
    }

    pub const fn port(&self) -> u16 {
        u16::from_be(self.port)
    }
}

/// What stands behind a service's port.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ServiceEntry {
    ready: u16,
    in_mesh: u16,
}

impl ServiceEntry {
    /// `ready`: some endpoint is ready. `in_mesh`: some endpoint is in the mesh.
    pub const fn new(ready: bool, in_mesh: bool) -> Self {
        Self {
            ready: ready as u16,
            in_mesh: in_mesh as u16,
        }
    }

    #[inline(always)]
    pub const fn has_ready_endpoint(&self) -> bool {
        self.ready != 0
    }

    #[inline(always)]
    pub const fn has_mesh_endpoint(&self) -> bool {
        self.in_mesh != 0
    }
}

/// An address that a pod (or the node, [`PodNumber::NODE`]) has itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct OwnAddress {
    pod: PodNumber,
    address: Address,
}

impl OwnAddress {
    #[inline(always)]
    pub const fn new(pod: PodNumber, address: Address) -> Self {
        Self { pod, address }
    }

    pub const fn pod(&self) -> PodNumber {
        self.pod
    }

    pub const fn address(&self) -> Address {
        self.address
    }
}

/// A port of a pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PortKey {
    pod: PodNumber,
    port: u16,
    _zero: u16,
}

impl PortKey {
    #[inline(always)]
    pub const fn new(pod: PodNumber, port: u16) -> Self {
        Self {
            pod,
            port: port.to_be(),
            _zero: 0,
        }
    }

    pub const fn pod(&self) -> PodNumber {
        self.pod
    }

    pub const fn port(&self) -> u16 {
        u16::from_be(self.port)
    }
}

/// A [`PlaintextMode`] as a map value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PortMode {
    strict: u32,
}

impl From<PlaintextMode> for PortMode {
    fn from(mode: PlaintextMode) -> Self {
        Self {
            strict: matches!(mode, PlaintextMode::Strict).into(),
        }
    }
}

impl PortMode {
    #[inline(always)]
    pub const fn get(&self) -> PlaintextMode {
        if self.strict != 0 {
            PlaintextMode::Strict
        } else {
            PlaintextMode::Permissive
        }
    }
}

/// The value where being in the map says it all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Present(u32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn node_facts_never_written_name_no_namespace() {
        let facts = NodeFacts::read_from_bytes(&[0; size_of::<NodeFacts>()]).unwrap();
        assert_eq!(facts, NodeFacts::UNKNOWN);
        assert_eq!((facts.namespace(), facts.kubepods()), (0, None));
    }

    #[test]
    fn values_come_back_as_they_went_in() {
        let facts = NodeFacts::new(9, Some(77));
        assert_eq!((facts.namespace(), facts.kubepods()), (9, Some(77)));
        for mode in [PlaintextMode::Strict, PlaintextMode::Permissive] {
            assert_eq!(PortMode::from(mode).get(), mode);
        }
        let entry = ServiceEntry::new(true, false);
        assert_eq!((entry.has_ready_endpoint(), entry.has_mesh_endpoint()), (true, false));
        assert_eq!(Cookie::new(u64::MAX - 1).get(), u64::MAX - 1);
    }

    /// Changing one of these without raising [`crate::LAYOUT_VERSION`] makes a new daemon misread what is pinned.
    #[test]
    fn the_sizes_are_those_of_layout_1() {
        assert_eq!(crate::LAYOUT_VERSION, 1);
        let sizes = [
            size_of::<Address>(),
            size_of::<crate::FourTuple>(),
            size_of::<crate::PodSettings>(),
            size_of::<NodeFacts>(),
            size_of::<WorkloadEntry>(),
            size_of::<ServiceKey>(),
            size_of::<ServiceEntry>(),
            size_of::<OwnAddress>(),
            size_of::<PortKey>(),
            size_of::<PortMode>(),
        ];
        assert_eq!(sizes, [16, 36, 8, 16, 4, 20, 4, 20, 8, 4]);
    }
}

//! A captured pod as the programs know it: a number, its settings, and the daemon's listeners inside it.

use crate::Family;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Names a captured pod of this node in the maps. It outlives a restart of the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PodNumber(u32);

impl PodNumber {
    /// Not a pod: under this number the node's own addresses are kept.
    pub const NODE: Self = Self::new(u32::MAX);

    #[inline(always)]
    pub const fn new(number: u32) -> Self {
        Self(number)
    }

    #[inline(always)]
    pub const fn get(self) -> u32 {
        self.0
    }
}

/// What a listener of the daemon is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    /// Steered connections of the pod's applications.
    Outbound,
    /// Plaintext for the pod, from outside the mesh.
    Plaintext,
    /// HBONE for the pod.
    Hbone,
}

impl Role {
    pub const ALL: [Self; 3] = [Self::Outbound, Self::Plaintext, Self::Hbone];

    const fn index(self) -> u32 {
        match self {
            Self::Outbound => 0,
            Self::Plaintext => 1,
            Self::Hbone => 2,
        }
    }
}

/// Sockets that the sock map holds per pod; the fourth role is spare.
pub const LISTENERS_PER_POD: u32 = 8;
/// One cell per family.
pub const LIVE_PER_POD: u32 = 2;

/// Where the sock map holds a listener.
#[inline(always)]
pub const fn listener_index(pod: PodNumber, role: Role, family: Family) -> u32 {
    pod.get() * LISTENERS_PER_POD + role.index() * 2 + family.index()
}

/// Where `LIVE` holds the outbound listener of a family.
#[inline(always)]
pub const fn live_index(pod: PodNumber, family: Family) -> u32 {
    pod.get() * LIVE_PER_POD + family.index()
}

/// What a pod does with plaintext, at a port or in general.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum PlaintextMode {
    Permissive,
    Strict,
}

/// The ports of the daemon's listeners, the same for both families; 0 where there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Ports {
    pub outbound: u16,
    pub plaintext: u16,
    pub hbone: u16,
}

/// What the daemon says about a pod's arrivals. All zero, as the map begins, is a pod that is not captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct PodSettings {
    flags: u16,
    outbound: u16,
    plaintext: u16,
    hbone: u16,
}

const CAPTURED: u16 = 1;
const STRICT: u16 = 2;
/// A policy selects the workload, so nobody but the daemon can say who may call.
const RESTRICTED: u16 = 4;
/// Some port has a mode of its own, in `PORT_MODES`.
const PORT_MODES: u16 = 8;

impl PodSettings {
    /// Steering has ended: what arrives goes to the daemon while it listens, and passes where it does not.
    pub const RELEASED: Self = Self {
        flags: 0,
        outbound: 0,
        plaintext: 0,
        hbone: 0,
    };

    /// `restricted`: a policy selects the workload. `port_modes`: some port's mode differs from `mode`.
    pub const fn new(mode: PlaintextMode, restricted: bool, port_modes: bool, ports: Ports) -> Self {
        let mut flags = CAPTURED;
        if matches!(mode, PlaintextMode::Strict) {
            flags |= STRICT;
        }
        if restricted {
            flags |= RESTRICTED;
        }
        if port_modes {
            flags |= PORT_MODES;
        }
        Self {
            flags,
            ..Self::RELEASED
        }
        .with_ports(ports)
    }

    /// The same pod, its listeners elsewhere.
    pub const fn with_ports(self, ports: Ports) -> Self {
        Self {
            outbound: ports.outbound,
            plaintext: ports.plaintext,
            hbone: ports.hbone,
            ..self
        }
    }

    #[inline(always)]
    pub const fn is_captured(&self) -> bool {
        self.flags & CAPTURED != 0
    }

    #[inline(always)]
    pub const fn is_restricted(&self) -> bool {
        self.flags & RESTRICTED != 0
    }

    #[inline(always)]
    pub const fn has_port_modes(&self) -> bool {
        self.flags & PORT_MODES != 0
    }

    #[inline(always)]
    pub const fn mode(&self) -> PlaintextMode {
        if self.flags & STRICT != 0 {
            PlaintextMode::Strict
        } else {
            PlaintextMode::Permissive
        }
    }

    #[inline(always)]
    pub const fn ports(&self) -> Ports {
        Ports {
            outbound: self.outbound,
            plaintext: self.plaintext,
            hbone: self.hbone,
        }
    }

    /// The role of the daemon's listener at a port, if there is one.
    #[inline(always)]
    pub const fn role_at(&self, port: u16) -> Option<Role> {
        let ports = self.ports();
        if port == 0 {
            None
        } else if port == ports.outbound {
            Some(Role::Outbound)
        } else if port == ports.plaintext {
            Some(Role::Plaintext)
        } else if port == ports.hbone {
            Some(Role::Hbone)
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn no_two_listeners_share_a_cell() {
        let mut cells = BTreeSet::new();
        for pod in [0, 1, 2, 77] {
            for role in Role::ALL {
                for family in Family::ALL {
                    let index = listener_index(PodNumber::new(pod), role, family);
                    assert!(cells.insert(index), "{pod} {role:?} {family:?}");
                    assert_eq!(index / LISTENERS_PER_POD, pod);
                }
            }
        }
    }

    #[test]
    fn settings_say_what_they_were_made_of() {
        let ports = Ports {
            outbound: 15001,
            plaintext: 15006,
            hbone: 61000,
        };
        for (mode, restricted, modes) in [
            (PlaintextMode::Strict, false, true),
            (PlaintextMode::Permissive, true, false),
            (PlaintextMode::Strict, true, true),
            (PlaintextMode::Permissive, false, false),
        ] {
            let settings = PodSettings::new(mode, restricted, modes, ports);
            assert!(settings.is_captured());
            assert_eq!(settings.mode(), mode);
            assert_eq!(settings.is_restricted(), restricted);
            assert_eq!(settings.has_port_modes(), modes);
            assert_eq!(settings.ports(), ports);
            assert_eq!(settings.role_at(61000), Some(Role::Hbone));
            assert_eq!(settings.role_at(15008), None);
            assert_eq!(settings.role_at(0), None);
        }
    }

    #[test]
    fn a_cell_never_written_is_a_released_pod_without_listeners() {
        let settings = PodSettings::read_from_bytes(&[0; size_of::<PodSettings>()]).unwrap();
        assert_eq!(settings, PodSettings::RELEASED);
        assert!(!settings.is_captured());
        assert_eq!(settings.role_at(0), None);
    }
}

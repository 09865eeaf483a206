//! What arrives at a captured pod: decided at every search for a listener (a SYN, the ACK that answers a SYN cookie, a
//! SYN that meets a TIME_WAIT), never for an established connection.

use crate::{Address, PlaintextMode, PodSettings, Reason, Role};

/// Where peers reach the daemon of a captured pod.
pub const HBONE_PORT: u16 = 15008;

/// What can be known of an arrival. Each is asked for at most once, and only where it matters.
pub trait ArrivalFacts {
    fn destination(&self) -> Address;
    fn destination_port(&self) -> u16;
    /// True if it was routed to the pod's own `lo`. What the pod sends to its own address is not: that counts as having
    /// come in on the interface which has the address.
    fn is_on_loopback_device(&self) -> bool;
    fn settings(&self) -> PodSettings;
    /// True if the destination is an address of the pod itself.
    fn is_to_own_address(&self) -> bool;
    /// True if the source is an address of the pod itself.
    fn is_from_own_address(&self) -> bool;
    /// True if the daemon's listener of that role is open, for the destination's family.
    fn is_listening(&self, role: Role) -> bool;
    /// True if a process of the node connected with exactly this source and destination, a moment ago.
    fn is_noted_by_node(&self) -> bool;
    /// True if the source is an address of the node.
    fn is_from_node_address(&self) -> bool;
    /// The mode of the destination port, where it has one of its own.
    fn port_mode(&self) -> Option<PlaintextMode>;
}

/// What becomes of an arrival.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arrival {
    /// To whoever listens, as if we were not there.
    Pass(Reason),
    /// The listener search ends without a listener: the peer gets a RST.
    Drop(Reason),
    /// To the daemon's listener of that role; if it is not open, what `absent` says.
    Hand { role: Role, reason: Reason, absent: Absent },
}

/// What becomes of an arrival for a listener that is not open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Absent {
    Pass(Reason),
    Drop(Reason),
}

#[inline(always)]
pub fn arrive(facts: &impl ArrivalFacts) -> Arrival {
    let (destination, port, settings) = (facts.destination(), facts.destination_port(), facts.settings());

    // Nobody dials the daemon directly: its connection would lead to the next one, without end.
    if destination.is_loopback()
        && let Some(role) = settings.role_at(port)
        && facts.is_listening(role)
    {
        return Arrival::Drop(Reason::DropDaemonDialled);
    }

    if facts.is_on_loopback_device() {
        if destination.is_loopback() {
            return Arrival::Pass(Reason::ArriveLoopback);
        }
        // The daemon's deliveries: it binds them to lo.
        if facts.is_to_own_address() {
            return Arrival::Pass(Reason::ArriveOwnAddress);
        }
        // Whatever else turns round on lo was steered. Never let it fall through: the application's own wildcard
        // listener would take it.
        return Arrival::Hand {
            role: Role::Outbound,
            reason: Reason::ArriveSteered,
            absent: Absent::Drop(Reason::DropSteeredNoListener),
        };
    }

    if port == HBONE_PORT {
        return Arrival::Hand {
            role: Role::Hbone,
            reason: Reason::ArriveHbone,
            absent: if settings.is_captured() {
                Absent::Drop(Reason::DropHboneNoListener)
            } else {
                Absent::Pass(Reason::ArriveReleased)
            },
        };
    }

    if !settings.is_captured() {
        return Arrival::Pass(Reason::ArriveReleased);
    }
    // The pod calls itself. Somebody outside who claims the pod's address never sees the answer to its SYN.
    if facts.is_from_own_address() {
        return Arrival::Pass(Reason::ArriveOwnAddress);
    }
    if facts.is_noted_by_node() {
        return Arrival::Pass(Reason::ArriveFromNode);
    }

    let mode = if settings.has_port_modes() {
        facts.port_mode()
    } else {
        None
    };
    match mode.unwrap_or(settings.mode()) {
        PlaintextMode::Strict if facts.is_from_node_address() => Arrival::Drop(Reason::DropStrictFromNodeAddress),
        PlaintextMode::Strict => Arrival::Drop(Reason::DropStrict),
        PlaintextMode::Permissive => Arrival::Hand {
            role: Role::Plaintext,
            reason: Reason::ArrivePlaintext,
            absent: if settings.is_restricted() {
                Absent::Drop(Reason::DropPlaintextNoListener)
            } else {
                Absent::Pass(Reason::ArrivePlaintextUnrestricted)
            },
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Ports;
    use std::net::IpAddr;

    const PORTS: Ports = Ports {
        outbound: 15001,
        plaintext: 15006,
        hbone: 15008,
    };
    const PERMISSIVE: PodSettings = PodSettings::new(PlaintextMode::Permissive, false, false, PORTS);
    const STRICT: PodSettings = PodSettings::new(PlaintextMode::Strict, false, false, PORTS);

    #[derive(Clone, Copy)]
    struct Facts {
        destination: &'static str,
        port: u16,
        on_lo: bool,
        settings: PodSettings,
        to_own: bool,
        from_own: bool,
        listening: bool,
        noted: bool,
        from_node_address: bool,
        port_mode: Option<PlaintextMode>,
    }

    impl ArrivalFacts for Facts {
        fn destination(&self) -> Address {
            self.destination.parse::<IpAddr>().unwrap().into()
        }
        fn destination_port(&self) -> u16 {
            self.port
        }
        fn is_on_loopback_device(&self) -> bool {
            self.on_lo
        }
        fn settings(&self) -> PodSettings {
            self.settings
        }
        fn is_to_own_address(&self) -> bool {
            self.to_own
        }
        fn is_from_own_address(&self) -> bool {
            self.from_own
        }
        fn is_listening(&self, _role: Role) -> bool {
            self.listening
        }
        fn is_noted_by_node(&self) -> bool {
            self.noted
        }
        fn is_from_node_address(&self) -> bool {
            self.from_node_address
        }
        fn port_mode(&self) -> Option<PlaintextMode> {
            self.port_mode
        }
    }

    /// Plaintext from outside to a port of the pod.
    const PLAINTEXT: Facts = Facts {
        destination: "10.0.0.2",
        port: 80,
        on_lo: false,
        settings: PERMISSIVE,
        to_own: true,
        from_own: false,
        listening: true,
        noted: false,
        from_node_address: false,
        port_mode: None,
    };
    const ON_LO: Facts = Facts {
        on_lo: true,
        ..PLAINTEXT
    };

    #[test]
    fn nobody_dials_the_daemons_listeners_on_any_loopback_address() {
        for destination in ["127.0.0.1", "127.9.9.9", "::1"] {
            for port in [15001, 15006, 15008] {
                for on_lo in [true, false] {
                    let facts = Facts {
                        destination,
                        port,
                        on_lo,
                        ..PLAINTEXT
                    };
                    assert_eq!(
                        arrive(&facts),
                        Arrival::Drop(Reason::DropDaemonDialled),
                        "{destination} {port}"
                    );
                }
            }
        }
    }

    #[test]
    fn the_application_may_use_those_ports_on_loopback_once_the_daemon_is_gone() {
        let facts = Facts {
            destination: "127.0.0.1",
            port: 15001,
            listening: false,
            ..ON_LO
        };
        assert_eq!(arrive(&facts), Arrival::Pass(Reason::ArriveLoopback));
    }

    #[test]
    fn an_application_that_listens_on_15001_itself_is_reached_when_the_daemon_moved() {
        let settings = PERMISSIVE.with_ports(Ports {
            outbound: 61000,
            ..PORTS
        });
        let facts = Facts {
            destination: "127.0.0.1",
            port: 15001,
            settings,
            ..ON_LO
        };
        assert_eq!(arrive(&facts), Arrival::Pass(Reason::ArriveLoopback));
        assert_eq!(
            arrive(&Facts { port: 61000, ..facts }),
            Arrival::Drop(Reason::DropDaemonDialled)
        );
    }

    #[test]
    fn the_pod_reaches_itself_and_is_reached_by_the_daemon_even_under_strict() {
        for settings in [PERMISSIVE, STRICT] {
            let facts = Facts { settings, ..ON_LO };
            assert_eq!(arrive(&facts), Arrival::Pass(Reason::ArriveOwnAddress));
            let by_its_interface = Facts {
                from_own: true,
                on_lo: false,
                ..facts
            };
            assert_eq!(arrive(&by_its_interface), Arrival::Pass(Reason::ArriveOwnAddress));
            let facts = Facts {
                destination: "::1",
                port: 8080,
                ..facts
            };
            assert_eq!(arrive(&facts), Arrival::Pass(Reason::ArriveLoopback));
        }
    }

    #[test]
    fn what_turned_round_on_lo_reaches_the_daemon_or_nobody_whatever_its_port() {
        for port in [80, 15001, 15008] {
            for settings in [PERMISSIVE, STRICT, PodSettings::RELEASED] {
                let facts = Facts {
                    destination: "10.0.0.9",
                    port,
                    settings,
                    to_own: false,
                    ..ON_LO
                };
                assert_eq!(
                    arrive(&facts),
                    Arrival::Hand {
                        role: Role::Outbound,
                        reason: Reason::ArriveSteered,
                        absent: Absent::Drop(Reason::DropSteeredNoListener)
                    }
                );
            }
        }
    }

    #[test]
    fn hbone_reaches_the_daemon_or_nobody_wherever_its_listener_is() {
        let moved = PERMISSIVE.with_ports(Ports { hbone: 61000, ..PORTS });
        for settings in [PERMISSIVE, STRICT, moved] {
            assert_eq!(
                arrive(&Facts {
                    port: 15008,
                    settings,
                    ..PLAINTEXT
                }),
                Arrival::Hand {
                    role: Role::Hbone,
                    reason: Reason::ArriveHbone,
                    absent: Absent::Drop(Reason::DropHboneNoListener)
                }
            );
        }
    }

    #[test]
    fn the_nodes_own_connects_pass_under_strict_and_its_address_alone_does_not() {
        let strict = Facts {
            settings: STRICT,
            from_node_address: true,
            ..PLAINTEXT
        };
        assert_eq!(
            arrive(&Facts { noted: true, ..strict }),
            Arrival::Pass(Reason::ArriveFromNode)
        );
        assert_eq!(arrive(&strict), Arrival::Drop(Reason::DropStrictFromNodeAddress));
    }

    #[test]
    fn strict_drops_plaintext_and_permissive_hands_it_to_the_daemon() {
        assert_eq!(
            arrive(&Facts {
                settings: STRICT,
                ..PLAINTEXT
            }),
            Arrival::Drop(Reason::DropStrict)
        );
        assert_eq!(
            arrive(&PLAINTEXT),
            Arrival::Hand {
                role: Role::Plaintext,
                reason: Reason::ArrivePlaintext,
                absent: Absent::Pass(Reason::ArrivePlaintextUnrestricted)
            }
        );
    }

    #[test]
    fn with_the_daemon_dead_only_an_unrestricted_pod_is_reached_in_plaintext() {
        let settings = PodSettings::new(PlaintextMode::Permissive, true, false, PORTS);
        assert_eq!(
            arrive(&Facts { settings, ..PLAINTEXT }),
            Arrival::Hand {
                role: Role::Plaintext,
                reason: Reason::ArrivePlaintext,
                absent: Absent::Drop(Reason::DropPlaintextNoListener)
            }
        );
    }

    #[test]
    fn a_ports_own_mode_comes_before_the_pods() {
        let open_port = Facts {
            settings: PodSettings::new(PlaintextMode::Strict, false, true, PORTS),
            port_mode: Some(PlaintextMode::Permissive),
            ..PLAINTEXT
        };
        assert!(matches!(
            arrive(&open_port),
            Arrival::Hand {
                role: Role::Plaintext,
                ..
            }
        ));
        let closed_port = Facts {
            settings: PodSettings::new(PlaintextMode::Permissive, false, true, PORTS),
            port_mode: Some(PlaintextMode::Strict),
            ..PLAINTEXT
        };
        assert_eq!(arrive(&closed_port), Arrival::Drop(Reason::DropStrict));
        assert_eq!(
            arrive(&Facts {
                port_mode: None,
                ..open_port
            }),
            Arrival::Drop(Reason::DropStrict)
        );
    }

    #[test]
    fn a_released_pod_is_reached_again_and_its_open_tunnels_peers_still_find_the_daemon() {
        let released = Facts {
            settings: PodSettings::RELEASED,
            ..PLAINTEXT
        };
        assert_eq!(arrive(&released), Arrival::Pass(Reason::ArriveReleased));
        assert_eq!(
            arrive(&Facts {
                port: 15008,
                ..released
            }),
            Arrival::Hand {
                role: Role::Hbone,
                reason: Reason::ArriveHbone,
                absent: Absent::Pass(Reason::ArriveReleased)
            }
        );
    }
}

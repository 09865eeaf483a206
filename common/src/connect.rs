//! What leaves a pod: decided once per connection, at connect, before the SYN is built. Also which marks a socket sheds
//! when it dials again, and which connects of the node are remembered for the arrival.

use crate::{
    Address, PodNumber, Reason, marks,
    tables::{ServiceEntry, WorkloadEntry},
};

/// What can be known of a connection at connect. Each is asked for at most once, and only where it matters.
pub trait ConnectFacts {
    /// The mark of the socket.
    fn mark(&self) -> u32;
    /// The captured pod whose namespace the socket is in.
    fn pod(&self) -> Option<PodNumber>;
    fn destination(&self) -> Address;
    /// The destination, as a pod of the cluster.
    fn workload(&self) -> Option<WorkloadEntry>;
    /// The destination, as a service's VIP and port.
    fn service(&self) -> Option<ServiceEntry>;
    /// True if the destination is inside the cluster's pod or service ranges.
    fn is_in_ranges(&self) -> bool;
    /// True if the destination is an address of the pod itself.
    fn is_own_address(&self, pod: PodNumber) -> bool;
    /// True if the daemon listens for steered connections of the destination's family.
    fn is_listener_live(&self, pod: PodNumber) -> bool;
}

/// What becomes of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Connect {
    /// As if we were not there.
    Pass(Reason),
    /// Into the daemon, by the mark [`marks::STEER`].
    Steer(Reason),
    /// EHOSTUNREACH, by the mark [`marks::REFUSE`].
    Refuse(Reason),
}

#[inline(always)]
pub fn connect(facts: &impl ConnectFacts) -> Connect {
    // Without this the daemon would capture itself, forever.
    if matches!(facts.mark(), marks::DAEMON | marks::DELIVER) {
        return Connect::Pass(Reason::ConnectFromDaemon);
    }
    let Some(pod) = facts.pod() else {
        return Connect::Pass(Reason::ConnectNotCaptured);
    };
    if facts.destination().is_loopback() {
        return Connect::Pass(Reason::ConnectLoopback);
    }
    let steer = match facts.workload() {
        Some(workload) if workload.is_in_mesh() => Reason::SteerWorkload,
        Some(_) => return Connect::Pass(Reason::ConnectOutsideMesh),
        None => match facts.service() {
            Some(service) if !service.has_ready_endpoint() => {
                return Connect::Refuse(Reason::RefuseNoReadyEndpoint);
            }
            Some(service) if service.has_mesh_endpoint() => Reason::SteerService,
            Some(_) => return Connect::Pass(Reason::ConnectServiceOutsideMesh),
            None if facts.is_in_ranges() => Reason::SteerUnknown,
            None => return Connect::Pass(Reason::ConnectOutsideCluster),
        },
    };
    if facts.is_own_address(pod) {
        return Connect::Pass(Reason::ConnectToSelf);
    }
    if facts.is_listener_live(pod) {
        Connect::Steer(steer)
    } else {
        Connect::Refuse(Reason::RefuseNoListener)
    }
}

/// True if a socket that dials again must lose its mark first: routing comes before the decision, so the mark of the
/// first attempt would decide the second. The daemon's marks stay, it sets them anew for each socket.
#[inline(always)]
pub const fn sheds_mark(mark: u32) -> bool {
    matches!(mark, marks::STEER | marks::REFUSE)
}

/// Nanoseconds for which a noted connect of the node lets its arrival pass.
pub const NODE_CONNECT_LIFETIME: u64 = 5_000_000_000;

/// What can be known of a connect before its port is.
pub trait NodeConnectFacts {
    /// True if the socket's namespace is the node's own.
    fn is_node_namespace(&self) -> bool;
    /// True if the destination is a workload in the mesh.
    fn is_to_mesh(&self) -> bool;
    /// True if the process is a container's: a pod on the host's network is not the node.
    fn is_in_kubepods(&self) -> bool;
}

/// True if this is the node itself calling a workload, as kubelet's probes do: its arrival is to know.
#[inline(always)]
pub fn is_node_connect(facts: &impl NodeConnectFacts) -> bool {
    facts.is_node_namespace() && facts.is_to_mesh() && !facts.is_in_kubepods()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::IpAddr;

    #[derive(Clone, Copy)]
    struct Facts {
        mark: u32,
        captured: bool,
        destination: &'static str,
        workload: Option<WorkloadEntry>,
        service: Option<ServiceEntry>,
        in_ranges: bool,
        own: bool,
        live: bool,
    }

    impl ConnectFacts for Facts {
        fn mark(&self) -> u32 {
            self.mark
        }
        fn pod(&self) -> Option<PodNumber> {
            self.captured.then_some(PodNumber::new(7))
        }
        fn destination(&self) -> Address {
            self.destination.parse::<IpAddr>().unwrap().into()
        }
        fn workload(&self) -> Option<WorkloadEntry> {
            self.workload
        }
        fn service(&self) -> Option<ServiceEntry> {
            self.service
        }
        fn is_in_ranges(&self) -> bool {
            self.in_ranges
        }
        fn is_own_address(&self, _pod: PodNumber) -> bool {
            self.own
        }
        fn is_listener_live(&self, _pod: PodNumber) -> bool {
            self.live
        }
    }

    /// A captured pod with a live daemon that connects to an address nobody knows, outside the cluster.
    const TO_THE_WORLD: Facts = Facts {
        mark: 0,
        captured: true,
        destination: "192.0.2.1",
        workload: None,
        service: None,
        in_ranges: false,
        own: false,
        live: true,
    };
    const TO_PEER: Facts = Facts {
        workload: Some(WorkloadEntry::IN_MESH),
        in_ranges: true,
        ..TO_THE_WORLD
    };

    #[test]
    fn the_daemon_never_captures_itself() {
        for mark in [marks::DAEMON, marks::DELIVER] {
            for live in [true, false] {
                assert_eq!(
                    connect(&Facts { mark, live, ..TO_PEER }),
                    Connect::Pass(Reason::ConnectFromDaemon)
                );
            }
        }
    }

    #[test]
    fn a_namespace_that_is_no_captured_pod_is_left_alone() {
        assert_eq!(
            connect(&Facts {
                captured: false,
                live: false,
                ..TO_PEER
            }),
            Connect::Pass(Reason::ConnectNotCaptured)
        );
    }

    #[test]
    fn what_is_in_the_mesh_or_might_be_is_steered() {
        assert_eq!(connect(&TO_PEER), Connect::Steer(Reason::SteerWorkload));
        assert_eq!(
            connect(&Facts {
                service: Some(ServiceEntry::new(true, true)),
                ..TO_THE_WORLD
            }),
            Connect::Steer(Reason::SteerService)
        );
        assert_eq!(
            connect(&Facts {
                in_ranges: true,
                ..TO_THE_WORLD
            }),
            Connect::Steer(Reason::SteerUnknown)
        );
    }

    #[test]
    fn what_is_known_to_be_outside_is_never_touched_even_with_the_daemon_dead() {
        for live in [true, false] {
            let outside = [
                (
                    Facts {
                        workload: Some(WorkloadEntry::OUTSIDE),
                        in_ranges: true,
                        ..TO_THE_WORLD
                    },
                    Reason::ConnectOutsideMesh,
                ),
                (
                    Facts {
                        service: Some(ServiceEntry::new(true, false)),
                        in_ranges: true,
                        ..TO_THE_WORLD
                    },
                    Reason::ConnectServiceOutsideMesh,
                ),
                (TO_THE_WORLD, Reason::ConnectOutsideCluster),
                (
                    Facts {
                        destination: "::1",
                        in_ranges: true,
                        ..TO_THE_WORLD
                    },
                    Reason::ConnectLoopback,
                ),
                (
                    Facts {
                        destination: "127.0.0.1",
                        ..TO_PEER
                    },
                    Reason::ConnectLoopback,
                ),
            ];
            for (facts, reason) in outside {
                assert_eq!(connect(&Facts { live, ..facts }), Connect::Pass(reason));
            }
        }
    }

    #[test]
    fn with_nobody_listening_whatever_would_be_steered_is_refused() {
        let steered = [
            TO_PEER,
            Facts {
                service: Some(ServiceEntry::new(true, true)),
                ..TO_THE_WORLD
            },
            Facts {
                in_ranges: true,
                ..TO_THE_WORLD
            },
        ];
        for facts in steered {
            assert_eq!(
                connect(&Facts { live: false, ..facts }),
                Connect::Refuse(Reason::RefuseNoListener)
            );
        }
    }

    #[test]
    fn a_service_without_a_ready_endpoint_is_refused_mesh_or_not() {
        for in_mesh in [true, false] {
            for live in [true, false] {
                assert_eq!(
                    connect(&Facts {
                        service: Some(ServiceEntry::new(false, in_mesh)),
                        live,
                        ..TO_PEER_RANGE
                    }),
                    Connect::Refuse(Reason::RefuseNoReadyEndpoint)
                );
            }
        }
    }
    const TO_PEER_RANGE: Facts = Facts {
        in_ranges: true,
        ..TO_THE_WORLD
    };

    #[test]
    fn a_pod_that_dials_itself_stays_inside_whatever_the_daemon_does() {
        for live in [true, false] {
            for facts in [TO_PEER, TO_PEER_RANGE] {
                assert_eq!(
                    connect(&Facts {
                        own: true,
                        live,
                        ..facts
                    }),
                    Connect::Pass(Reason::ConnectToSelf)
                );
            }
        }
    }

    #[test]
    fn a_mark_of_the_applications_own_does_not_take_it_out_of_the_mesh() {
        for mark in [1, marks::STEER, marks::REFUSE, 0x538] {
            assert_eq!(
                connect(&Facts { mark, ..TO_PEER }),
                Connect::Steer(Reason::SteerWorkload),
                "{mark:#x}"
            );
        }
    }

    #[test]
    fn a_socket_that_dials_again_sheds_our_marks_and_no_others() {
        assert!(sheds_mark(marks::STEER) && sheds_mark(marks::REFUSE));
        for mark in [0, marks::DAEMON, marks::DELIVER, 1, 0x110, 0x114] {
            assert!(!sheds_mark(mark), "{mark:#x}");
        }
    }

    struct Process {
        node: bool,
        to_mesh: bool,
        kubepods: bool,
    }

    impl NodeConnectFacts for Process {
        fn is_node_namespace(&self) -> bool {
            self.node
        }
        fn is_to_mesh(&self) -> bool {
            self.to_mesh
        }
        fn is_in_kubepods(&self) -> bool {
            self.kubepods
        }
    }

    #[test]
    fn only_the_nodes_own_processes_count_as_the_node() {
        let kubelet = Process {
            node: true,
            to_mesh: true,
            kubepods: false,
        };
        assert!(is_node_connect(&kubelet));
        assert!(!is_node_connect(&Process {
            kubepods: true,
            ..kubelet
        }));
        assert!(!is_node_connect(&Process { node: false, ..kubelet }));
        assert!(!is_node_connect(&Process {
            to_mesh: false,
            ..kubelet
        }));
    }
}

//! Why a connection passed, was steered, refused or dropped: one word each, shared by kernel counters, metrics, logs,
//! `check` and tests. The order is the counters' index: append, never reorder without raising the layout version.

macro_rules! reasons {
    ($($(#[$doc:meta])* $reason:ident = $name:literal,)*) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u32)]
        pub enum Reason {
            $($(#[$doc])* $reason,)*
        }

        impl Reason {
            pub const ALL: [Self; [$($name),*].len()] = [$(Self::$reason),*];
            /// Kebab-case, in the order of [`Reason::ALL`].
            pub const NAMES: [&str; Self::ALL.len()] = [$($name),*];

            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$reason => $name,)*
                }
            }
        }
    };
}

reasons! {
    // What leaves a pod, at connect.
    /// The daemon's own connection.
    ConnectFromDaemon = "connect-from-daemon",
    /// The socket's namespace is no captured pod.
    ConnectNotCaptured = "connect-not-captured",
    /// To a loopback address.
    ConnectLoopback = "connect-loopback",
    /// To one of the pod's own addresses.
    ConnectToSelf = "connect-to-self",
    /// To a workload known to be outside the mesh.
    ConnectOutsideMesh = "connect-outside-mesh",
    /// To a service that has no endpoint in the mesh.
    ConnectServiceOutsideMesh = "connect-service-outside-mesh",
    /// To an address outside the cluster's ranges.
    ConnectOutsideCluster = "connect-outside-cluster",
    /// To a workload in the mesh.
    SteerWorkload = "steer-workload",
    /// To a service with endpoints in the mesh.
    SteerService = "steer-service",
    /// To an address inside the cluster's ranges that nobody knows (yet).
    SteerUnknown = "steer-unknown",
    /// To a service without a ready endpoint.
    RefuseNoReadyEndpoint = "refuse-no-ready-endpoint",
    /// It would be steered, and nobody listens for steered connections.
    RefuseNoListener = "refuse-no-listener",
    /// The kernel would not set the mark. The connection goes on without it.
    MarkFailed = "mark-failed",
    /// A socket bound to a device was unbound, so that the steering route applies.
    DeviceUnbound = "device-unbound",
    /// A socket bound to a device could not be unbound; the guard drops its SYN.
    DeviceKept = "device-kept",
    /// A socket dialled again, and the mark of its first attempt was taken off.
    MarkCleared = "mark-cleared",
    /// A process of the node itself connects to a workload, and the arrival will know.
    NodeConnectNoted = "node-connect-noted",

    // What arrives at a pod, at the listener search.
    /// Dropped: somebody dialled a listener of the daemon itself.
    DropDaemonDialled = "drop-daemon-dialled",
    /// Inside the pod, to a loopback address.
    ArriveLoopback = "arrive-loopback",
    /// Inside the pod, to its own address: itself, or the daemon's delivery.
    ArriveOwnAddress = "arrive-own-address",
    /// A steered connection, to the daemon.
    ArriveSteered = "arrive-steered",
    /// Dropped: a steered connection, and the daemon is not there.
    DropSteeredNoListener = "drop-steered-no-listener",
    /// HBONE, to the daemon.
    ArriveHbone = "arrive-hbone",
    /// Dropped: HBONE, and the daemon is not there.
    DropHboneNoListener = "drop-hbone-no-listener",
    /// From a process of the node itself, as kubelet's probes.
    ArriveFromNode = "arrive-from-node",
    /// Dropped: plaintext where the mode is STRICT.
    DropStrict = "drop-strict",
    /// Dropped: plaintext where the mode is STRICT, from an address of the node but not from a process of it (NodePort
    /// traffic after masquerading, or a pod on the host's network).
    DropStrictFromNodeAddress = "drop-strict-from-node-address",
    /// Plaintext, to the daemon.
    ArrivePlaintext = "arrive-plaintext",
    /// Plaintext, the daemon is not there, and no policy selects the workload.
    ArrivePlaintextUnrestricted = "arrive-plaintext-unrestricted",
    /// Dropped: plaintext, the daemon is not there, and a policy selects the workload.
    DropPlaintextNoListener = "drop-plaintext-no-listener",
    /// The pod has been released.
    ArriveReleased = "arrive-released",

    // What leaves a pod, at its interfaces.
    /// Dropped: a packet that carries a mark of ours left the pod.
    MarkedPacketLeaving = "drop-marked-packet-leaving",
}

impl Reason {
    /// Its place among the counters.
    #[inline(always)]
    pub const fn index(self) -> u32 {
        self as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_reason_has_one_place_and_one_kebab_name() {
        for (index, reason) in Reason::ALL.into_iter().enumerate() {
            assert_eq!(reason.index() as usize, index);
            assert_eq!(reason.name(), Reason::NAMES[index]);
            assert!(
                reason.name().bytes().all(|b| b == b'-' || b.is_ascii_lowercase()),
                "{}",
                reason.name()
            );
        }
        assert_eq!(Reason::NAMES.iter().collect::<BTreeSet<_>>().len(), Reason::ALL.len());
    }

    #[test]
    fn whatever_drops_says_so_in_its_name() {
        for reason in Reason::ALL {
            assert_eq!(
                format!("{reason:?}").starts_with("Drop") || reason == Reason::MarkedPacketLeaving,
                reason.name().starts_with("drop-")
            );
        }
    }
}

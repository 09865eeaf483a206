//! Where a captured connection goes. Pure: no clock, no socket, no lock.

use super::{
    MeshSnapshot, SpiffeId, Workload,
    balance::{Choice, NoEndpoint, choose},
    policy::is_loopback_like,
    service::Service,
    workload::Protocol,
};
use std::{net::SocketAddr, sync::Arc};

/// The port of HBONE in every pod of the mesh.
pub const HBONE_PORT: u16 = 15008;

/// The outcome of routing one captured connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// Tunnel through the daemon at `next_hop`, which must prove to be `peer`.
    Hbone {
        next_hop: SocketAddr,
        authority: SocketAddr,
        peer: SpiffeId,
        destination: Arc<Workload>,
        service: Option<Arc<Service>>,
    },
    /// Send unchanged: the destination is not in the mesh, or is the caller itself, whose bytes never leave the pod.
    Passthrough {
        destination: SocketAddr,
        workload: Option<Arc<Workload>>,
        service: Option<Arc<Service>>,
    },
    /// Inside the cluster's ranges, but the snapshot does not know it: it may know in a moment.
    Unknown,
    /// Close the connection and count the reason.
    Refuse(Refusal),
}

/// Why a captured connection goes nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Refusal {
    #[error("no healthy upstream")]
    NoHealthyUpstream,
    #[error("the service has no such port")]
    NoSuchServicePort,
    #[error("the destination is a listener of the mesh itself")]
    OwnListener,
    #[error("the destination lies in the cluster's ranges, but is no known pod or service")]
    UnknownDestination,
}

/// Routes a connection of `from` to `destination`. `random` is uniformly random and picks among equal endpoints.
pub fn route(snapshot: &MeshSnapshot, from: &Workload, destination: SocketAddr, random: u64) -> Route {
    let destination = canonical(destination);
    if is_loopback_like(destination.ip()) {
        return Route::Refuse(Refusal::OwnListener);
    }
    if snapshot.knows(destination.ip()) {
        return to_pod(from, destination, snapshot.workload_at(destination.ip()), None);
    }
    let Some(service) = snapshot.service_at(destination.ip()) else {
        return if snapshot.in_ranges(destination.ip()) {
            Route::Unknown
        } else {
            Route::Passthrough {
                destination,
                workload: None,
                service: None,
            }
        };
    };
    let choice = Choice {
        from,
        vip: destination.ip(),
        port: destination.port(),
        random,
    };
    match choose(service, choice) {
        Ok((endpoint, port)) => {
            let workload = endpoint.workload.as_ref().and_then(|uid| snapshot.workloads.get(uid));
            let workload = workload.or_else(|| snapshot.workload_at(endpoint.address));
            let destination = SocketAddr::new(endpoint.address, port);
            if workload.is_none() && !snapshot.knows(endpoint.address) && snapshot.in_ranges(endpoint.address) {
                return Route::Unknown;
            }
            to_pod(from, destination, workload, Some(service))
        }
        Err(NoEndpoint::NoneReady) => Route::Refuse(Refusal::NoHealthyUpstream),
        Err(NoEndpoint::NoSuchPort) => Route::Refuse(Refusal::NoSuchServicePort),
    }
}

/// `workload` is the one behind `destination`, if it is one that we know.
fn to_pod(
    from: &Workload,
    destination: SocketAddr,
    workload: Option<&Arc<Workload>>,
    service: Option<&Arc<Service>>,
) -> Route {
    let service = service.cloned();
    match workload {
        Some(pod) if pod.protocol == Protocol::Hbone && !pod.host_network => {
            if destination.port() == HBONE_PORT {
                return Route::Refuse(Refusal::OwnListener);
            }
            if pod.uid == from.uid {
                return Route::Passthrough {
                    destination,
                    workload: Some(Arc::clone(pod)),
                    service,
                };
            }
            Route::Hbone {
                next_hop: SocketAddr::new(destination.ip(), HBONE_PORT),
                authority: destination,
                peer: pod.identity.clone(),
                destination: Arc::clone(pod),
                service,
            }
        }
        Some(_) | None => Route::Passthrough {
            destination,
            workload: workload.cloned(),
            service,
        },
    }
}

/// Never v4-mapped, no scope: as the snapshot stores addresses.
fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mesh::fixtures::{endpoint, identity, service, snapshot, workload};

    fn to(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    /// `web` and `api` in the mesh, `old` outside, `host` on its node's network, and services in front of some.
    fn mesh() -> MeshSnapshot {
        let outside = Workload {
            protocol: Protocol::Tcp,
            ..workload("shop", "old", "10.244.1.9")
        };
        let host = Workload {
            host_network: true,
            protocol: Protocol::Tcp,
            ..workload("shop", "host", "10.244.9.9")
        };
        let mut deaf = endpoint("10.244.1.2");
        deaf.ready = false;
        snapshot(
            vec![
                workload("shop", "web", "10.244.1.1"),
                workload("shop", "api", "10.244.1.2"),
                outside,
                host,
            ],
            vec![
                service("api", "10.96.0.2", vec![endpoint("10.244.1.2")]),
                service("web", "10.96.0.1", vec![endpoint("10.244.1.1")]),
                service("old", "10.96.0.9", vec![endpoint("10.244.1.9")]),
                service("deaf", "10.96.0.3", vec![deaf]),
                service("ahead", "10.96.0.4", vec![endpoint("10.244.7.7")]),
                service("outside", "10.96.0.5", vec![endpoint("192.0.2.5")]),
                service("host", "10.96.0.6", vec![endpoint("10.244.9.9")]),
            ],
        )
    }

    fn from_web(destination: &str) -> Route {
        let mesh = mesh();
        let web = mesh.workload_at("10.244.1.1".parse().unwrap()).unwrap();
        route(&mesh, web, to(destination), 0)
    }

    #[test]
    fn a_pod_of_the_mesh_is_reached_by_its_address_through_port_15008() {
        let Route::Hbone {
            next_hop,
            authority,
            peer,
            destination,
            service,
        } = from_web("10.244.1.2:9000")
        else {
            panic!("not HBONE")
        };
        assert_eq!((next_hop, authority), (to("10.244.1.2:15008"), to("10.244.1.2:9000")));
        assert_eq!(peer, identity("shop", "api"));
        assert_eq!((&*destination.name, service), ("api", None));
    }

    #[test]
    fn a_vip_becomes_an_endpoint_and_the_target_port() {
        let Route::Hbone {
            next_hop,
            authority,
            peer,
            service,
            ..
        } = from_web("10.96.0.2:80")
        else {
            panic!("not HBONE")
        };
        assert_eq!((next_hop, authority), (to("10.244.1.2:15008"), to("10.244.1.2:8080")));
        assert_eq!(peer, identity("shop", "api"));
        assert_eq!(&*service.unwrap().key.name, "api");
    }

    #[test]
    fn a_v4_mapped_destination_is_the_v4_one() {
        assert_eq!(from_web("[::ffff:10.244.1.2]:9000"), from_web("10.244.1.2:9000"));
        assert_eq!(from_web("[::ffff:10.96.0.2]:80"), from_web("10.96.0.2:80"));
    }

    #[test]
    fn a_pod_that_calls_itself_never_leaves_itself() {
        for (dialled, reached) in [
            ("10.96.0.1:80", "10.244.1.1:8080"),
            ("10.244.1.1:8080", "10.244.1.1:8080"),
        ] {
            let Route::Passthrough {
                destination, workload, ..
            } = from_web(dialled)
            else {
                panic!("{dialled}")
            };
            assert_eq!(
                (destination, &*workload.unwrap().name),
                (to(reached), "web"),
                "{dialled}"
            );
        }
    }

    #[test]
    fn what_is_known_to_be_outside_the_mesh_is_left_alone() {
        for (dialled, reached, name) in [
            ("10.244.1.9:5432", "10.244.1.9:5432", Some("old")),
            ("10.96.0.9:80", "10.244.1.9:8080", Some("old")),
            ("10.244.9.9:80", "10.244.9.9:80", None),
            ("10.96.0.6:80", "10.244.9.9:8080", None),
            ("192.0.2.1:443", "192.0.2.1:443", None),
            ("10.96.0.5:80", "192.0.2.5:8080", None),
        ] {
            let Route::Passthrough {
                destination, workload, ..
            } = from_web(dialled)
            else {
                panic!("{dialled}")
            };
            assert_eq!(
                (destination, workload.as_ref().map(|w| &*w.name)),
                (to(reached), name),
                "{dialled}"
            );
        }
    }

    #[test]
    fn an_unknown_address_of_the_cluster_is_not_called_outside() {
        assert_eq!(from_web("10.244.200.1:80"), Route::Unknown);
        assert_eq!(from_web("10.100.0.1:80"), Route::Unknown);
        assert_eq!(
            from_web("10.96.0.4:80"),
            Route::Unknown,
            "an endpoint whose pod is not known yet"
        );
    }

    #[test]
    fn what_cannot_be_routed_is_refused_by_name() {
        for (dialled, reason) in [
            ("127.0.0.1:15001", Refusal::OwnListener),
            ("127.0.0.1:80", Refusal::OwnListener),
            ("[::1]:15008", Refusal::OwnListener),
            ("0.0.0.0:80", Refusal::OwnListener),
            ("[::ffff:127.0.0.1]:15001", Refusal::OwnListener),
            ("10.244.1.1:15008", Refusal::OwnListener),
            ("10.244.1.2:15008", Refusal::OwnListener),
            ("10.96.0.3:80", Refusal::NoHealthyUpstream),
            ("10.96.0.2:81", Refusal::NoSuchServicePort),
        ] {
            assert_eq!(from_web(dialled), Route::Refuse(reason), "{dialled}");
        }
    }
}

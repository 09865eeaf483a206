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

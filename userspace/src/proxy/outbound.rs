//! What a pod's applications open: steered here, routed, and carried through the mesh or past it.

use super::{
    connections::Admission,
    end::End,
    pod::{Pod, Standing, canonical},
    relay::{Application, Ended, SocketRelay, TunnelRelay},
};
use crate::{
    hbone::{PeerKey, PoolError, Request, Tunnel},
    mesh::{
        MeshSnapshot, SpiffeId, Workload,
        route::{Refusal, Route, route},
        service::Service,
    },
    net,
    telemetry::{ConnectionFacts, HboneSide, Reporter, SecurityPolicy},
};
use std::{future::poll_fn, net::SocketAddr, sync::Arc, time::Instant};
use tokio::{
    net::TcpStream,
    time::{timeout, timeout_at},
};

pub(super) async fn serve(pod: Arc<Pod>, socket: TcpStream, client: SocketAddr) {
    let since = Instant::now();
    // Steering leaves the address alone: where the socket was accepted is where it was going.
    let Ok(destination) = socket.local_addr().map(canonical) else {
        return;
    };
    let source = pod.workload();
    let refused = |facts: ConnectionFacts, hop: SocketAddr, hbone_target, end: End| {
        pod.report_refused(
            &Standing {
                facts,
                source: client,
                destination: hop,
                hbone_target,
                since,
            },
            &end,
        );
    };
    if pod.is_own_listener(destination) {
        refused(
            plain_facts(&source, None, None),
            destination,
            None,
            End::OwnListener { destination },
        );
        return net::abort(socket);
    }
    match find_route(&pod, &source, destination).await {
        (
            snapshot,
            Route::Hbone {
                next_hop,
                authority,
                peer,
                destination: to,
                service,
            },
        ) => {
            let hop = Hop {
                next_hop,
                authority,
                peer,
                to,
                service,
            };
            match open_tunnel(&pod, &source, client, destination, hop).await {
                Ok((tunnel, hop)) => tunnelled(&pod, &snapshot, socket, tunnel, hop, source, client, since).await,
                Err((error, hop)) => {
                    let facts = plain_facts(&source, Some(hop.to), hop.service.as_deref());
                    refused(facts, hop.next_hop, Some(hop.authority), End::NoTunnel(error));
                    net::abort(socket);
                }
            }
        }
        (
            snapshot,
            Route::Passthrough {
                destination: to,
                workload,
                service,
            },
        ) => {
            let facts = plain_facts(&source, workload, service.as_deref());
            passed(&pod, &snapshot, socket, to, facts, client, since).await;
        }
        (_, Route::Refuse(refusal)) => {
            refused(
                plain_facts(&source, None, None),
                destination,
                None,
                End::Refused(refusal),
            );
            net::abort(socket);
        }
        (_, Route::Unknown) => {
            let end = End::Refused(Refusal::UnknownDestination);
            refused(plain_facts(&source, None, None), destination, None, end);
            net::abort(socket);
        }
    }
}

/// Where to go, waiting a moment for a snapshot that knows the destination.
async fn find_route(pod: &Pod, source: &Workload, destination: SocketAddr) -> (Arc<MeshSnapshot>, Route) {
    let snapshot = pod.snapshot();
    match route(&snapshot, source, destination, rand::random()) {
        Route::Unknown => {}
        known @ (Route::Hbone { .. } | Route::Passthrough { .. } | Route::Refuse(_)) => return (snapshot, known),
    }
    let deadline = tokio::time::Instant::now() + pod.context.settings.unknown_wait;
    let mut snapshots = pod.context.snapshot.clone();
    loop {
        let snapshot = Arc::clone(&snapshots.borrow_and_update());
        match route(&snapshot, source, destination, rand::random()) {
            Route::Unknown => {}
            known @ (Route::Hbone { .. } | Route::Passthrough { .. } | Route::Refuse(_)) => return (snapshot, known),
        }
        match timeout_at(deadline, snapshots.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) | Err(_) => return (snapshot, Route::Unknown),
        }
    }
}

/// One endpoint in the mesh.
struct Hop {
    next_hop: SocketAddr,
    authority: SocketAddr,
    peer: SpiffeId,
    to: Arc<Workload>,
    service: Option<Arc<Service>>,
}

/// A tunnel to `hop` or, as long as none of the application's bytes has been read, to another endpoint of its service.
async fn open_tunnel(
    pod: &Pod,
    source: &Workload,
    client: SocketAddr,
    destination: SocketAddr,
    mut hop: Hop,
) -> Result<(Tunnel, Hop), (PoolError, Hop)> {
    let mut attempts = 1;
    let mut tried = Vec::new();
    loop {
        let local = if source.addresses.contains(&client.ip()) {
            client.ip()
        } else {
            source.address_like(hop.next_hop.ip()).unwrap_or(client.ip())
        };
        let key = PeerKey {
            local,
            next_hop: hop.next_hop,
            peer: hop.peer.clone(),
        };
        let request = Request {
            authority: hop.authority,
            client: Some(client),
            baggage: None,
        };
        let error = match pod.pool.open(&key, request).await {
            Ok(tunnel) => return Ok((tunnel, hop)),
            Err(error) => error,
        };
        if hop.service.is_none() || attempts >= pod.context.settings.endpoint_attempts {
            return Err((error, hop));
        }
        attempts += 1;
        tried.push(hop.next_hop);
        match another(pod, source, destination, &tried) {
            Some(other) => {
                tracing::debug!(%error, tried = %hop.next_hop, next = %other.next_hop, "trying another endpoint");
                hop = other;
            }
            None => return Err((error, hop)),
        }
    }
}

/// An endpoint in the mesh that was not tried yet, if chance finds one.
fn another(pod: &Pod, source: &Workload, destination: SocketAddr, tried: &[SocketAddr]) -> Option<Hop> {
    let snapshot = pod.snapshot();
    (0..16).find_map(|_| match route(&snapshot, source, destination, rand::random()) {
        Route::Hbone {
            next_hop,
            authority,
            peer,
            destination,
            service,
        } if !tried.contains(&next_hop) => Some(Hop {
            next_hop,
            authority,
            peer,
            to: destination,
            service,
        }),
        Route::Hbone { .. } | Route::Passthrough { .. } | Route::Unknown | Route::Refuse(_) => None,
    })
}

#[expect(clippy::too_many_arguments, reason = "the parts of one connection, each used once")]
async fn tunnelled(
    pod: &Pod,
    snapshot: &MeshSnapshot,
    socket: TcpStream,
    tunnel: Tunnel,
    hop: Hop,
    source: Arc<Workload>,
    client: SocketAddr,
    since: Instant,
) {
    let _gauge = pod.tunnel_gauge(HboneSide::Client);
    let facts = ConnectionFacts {
        reporter: Reporter::Source,
        source_principal: Some(source.identity.clone()),
        source: Some(source),
        destination: Some(hop.to),
        service: hop.service.map(|service| service.key.clone()),
        destination_principal: Some(hop.peer),
        security: SecurityPolicy::MutualTls,
    };
    let (destination, hbone_target) = (hop.next_hop, Some(hop.authority));
    let standing = Standing {
        facts,
        source: client,
        destination,
        hbone_target,
        since,
    };
    let (open, _listed) = pod.list(snapshot, standing, Admission::Outbound);
    let mut relay = TunnelRelay::new(socket, tunnel, Arc::clone(&open), Application::Client);
    let deadline = pod.context.settings.hbone.answer_deadline;
    let end = match timeout(deadline, poll_fn(|cx| relay.poll_answered(cx))).await {
        Ok(None) => End::of_relay(relay.await, open.closed()),
        Ok(Some(ended)) => End::of_relay(ended, open.closed()),
        Err(_) => {
            relay.end(&Ended::Closed);
            End::NoAnswer
        }
    };
    pod.report(&open, &end);
}

async fn passed(
    pod: &Pod,
    snapshot: &MeshSnapshot,
    socket: TcpStream,
    destination: SocketAddr,
    facts: ConnectionFacts,
    client: SocketAddr,
    since: Instant,
) {
    let standing = Standing {
        facts,
        source: client,
        destination,
        hbone_target: None,
        since,
    };
    let deadline = pod.context.settings.dial_deadline;
    let far = match net::dial_plain(&pod.namespace, client.ip(), destination, deadline).await {
        Ok(far) => far,
        Err(error) => {
            pod.report_refused(&standing, &End::Unreachable(error));
            return net::abort(socket);
        }
    };
    let (open, _listed) = pod.list(snapshot, standing, Admission::Outbound);
    let ended = SocketRelay::new(socket, far, Arc::clone(&open), Application::Client).await;
    pod.report(&open, &End::of_relay(ended, open.closed()));
}

/// Facts of a connection in which TLS has proved nothing.
fn plain_facts(source: &Arc<Workload>, to: Option<Arc<Workload>>, service: Option<&Service>) -> ConnectionFacts {
    ConnectionFacts {
        reporter: Reporter::Source,
        source: Some(Arc::clone(source)),
        destination: to,
        service: service.map(|service| service.key.clone()),
        source_principal: None,
        destination_principal: None,
        security: SecurityPolicy::Unknown,
    }
}

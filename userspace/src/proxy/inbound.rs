//! What reaches a pod through the mesh: HBONE ends here, policy decides on the proven identity, and the application sees
//! the client's address.

use super::{
    connections::Admission,
    dry_run,
    end::End,
    pod::{Pod, Standing, canonical},
    relay::{Application, TunnelRelay},
};
use crate::{
    hbone::{Caller, Event, Incoming, RequestRefusal, server},
    mesh::policy::{self, Facts},
    net::{self, DialError},
    telemetry::{ConnectionFacts, HboneSide, Reporter, SecurityPolicy},
};
use std::{net::SocketAddr, sync::Arc, time::Instant};
use tokio::net::TcpStream;

/// One HBONE connection and all its tunnels.
pub(super) async fn serve(pod: Arc<Pod>, socket: TcpStream, from: SocketAddr) {
    let since = Instant::now();
    let Ok(dialled) = socket.local_addr().map(canonical) else {
        return;
    };
    // Steering only brings what was sent to the pod's own address.
    if policy::is_loopback_like(dialled.ip()) {
        return net::abort(socket);
    }
    let refused = |end: End| {
        let facts = facts(&pod, from, None, SecurityPolicy::Unknown);
        pod.report_refused(
            &Standing {
                facts,
                source: from,
                destination: dialled,
                hbone_target: None,
                since,
            },
            &end,
        );
    };
    let trust = pod.context.certs.watch_trust();
    let config = match pod.context.certs.get(&pod.identity()).await {
        Ok(svid) => svid.server_config(),
        Err(error) => {
            refused(End::NoCertificate(error));
            return net::abort(socket);
        }
    };
    let settings = Arc::clone(&pod.context.settings.hbone);
    let server = match server::accept(socket, from, dialled, config, trust, settings).await {
        Ok(server) => server,
        Err(error) => return refused(End::Handshake(error)),
    };
    let _gauge = pod.context.metrics.gauges.hbone_connection(HboneSide::Server);
    let caller = Arc::clone(server.caller());
    let leaving = async {
        tokio::select! {
            () = pod.stop.cancelled() => {}
            () = pod.tasks.draining() => {}
        }
    };
    let end = server
        .run(
            |port| pod.is_own_port(port),
            leaving,
            |event| take(&pod, event, &caller),
        )
        .await;
    tracing::debug!(peer = %caller.peer, from = %caller.address, %end, "HBONE connection ended");
}

fn take(pod: &Arc<Pod>, event: Event, caller: &Caller) {
    match event {
        Event::Tunnel(incoming) => match pod.connections.room() {
            Some(room) => {
                let own = Arc::clone(pod);
                pod.tasks.spawn("inbound tunnel", async move {
                    let _room = room;
                    tunnel(own, incoming).await;
                });
            }
            None => {
                let standing = standing(pod, &incoming, Instant::now());
                incoming.refuse(RequestRefusal::Overloaded);
                pod.report_refused(&standing, &End::Overloaded);
            }
        },
        Event::Refused(refusal) => {
            tracing::debug!(peer = %caller.peer, from = %caller.address, reason = refusal.name(), "request refused");
        }
    }
}

async fn tunnel(pod: Arc<Pod>, incoming: Incoming) {
    let since = Instant::now();
    let (snapshot, workload) = (pod.snapshot(), pod.workload());
    let (client, target) = (incoming.client, incoming.target);
    let asked = Facts {
        source: client,
        peer: Some(incoming.caller.peer.clone()),
        destination: target,
    };
    let standing = standing(&pod, &incoming, since);
    dry_run::tell(&snapshot, &workload, &asked);
    let verdict = policy::authorize(&snapshot, &workload, &asked);
    if !verdict.allows() {
        incoming.refuse(RequestRefusal::Denied);
        return pod.report_refused(&standing, &End::Denied(verdict));
    }
    let socket = match net::deliver(&pod.namespace, client, target, pod.context.settings.deliver_deadline).await {
        Ok(socket) => socket,
        Err(error) => {
            incoming.refuse(refusal_of(&error));
            return pod.report_refused(&standing, &End::Unreachable(error));
        }
    };
    let tunnel = match incoming.accept() {
        Ok(tunnel) => tunnel,
        Err(end) => {
            net::abort(socket);
            return pod.report_refused(&standing, &End::Abandoned(end));
        }
    };
    let _gauge = pod.tunnel_gauge(HboneSide::Server);
    let (open, _listed) = pod.list(&snapshot, standing, Admission::Mesh(asked));
    let ended = TunnelRelay::new(socket, tunnel, Arc::clone(&open), Application::Server).await;
    pod.report(&open, &End::of_relay(ended, open.closed()));
}

fn refusal_of(error: &DialError) -> RequestRefusal {
    match error {
        DialError::Timeout { .. } => RequestRefusal::ApplicationTimeout,
        DialError::Refused { .. } | DialError::Unreachable { .. } => RequestRefusal::ApplicationRefused,
        DialError::Exhausted { .. } | DialError::NoPort { .. } => RequestRefusal::Overloaded,
        DialError::Namespace(_)
        | DialError::NoSuchSource { .. }
        | DialError::Families { .. }
        | DialError::Other { .. } => RequestRefusal::Internal,
    }
}

fn standing(pod: &Pod, incoming: &Incoming, since: Instant) -> Standing {
    let caller = &incoming.caller;
    Standing {
        facts: facts(pod, caller.address, Some(caller), SecurityPolicy::MutualTls),
        source: incoming.client,
        destination: caller.dialled,
        hbone_target: Some(incoming.target),
        since,
    }
}

/// `caller` is there once TLS has proved who it is; what the snapshot says of the address counts only if it agrees.
fn facts(pod: &Pod, from: SocketAddr, caller: Option<&Caller>, security: SecurityPolicy) -> ConnectionFacts {
    let destination = pod.workload();
    let source = pod.snapshot().workload_at(from.ip()).cloned();
    ConnectionFacts {
        reporter: Reporter::Destination,
        source: source.filter(|source| caller.is_none_or(|caller| caller.peer == source.identity)),
        service: None,
        source_principal: caller.map(|caller| caller.peer.clone()),
        destination_principal: caller.map(|_| destination.identity.clone()),
        destination: Some(destination),
        security,
    }
}

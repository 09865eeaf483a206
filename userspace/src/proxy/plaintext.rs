//! What reaches a pod without the mesh: let in if its settings and policies say so, logged and counted like the rest.

use super::{
    connections::Admission,
    dry_run,
    end::End,
    pod::{Pod, Standing, canonical},
    relay::{Application, SocketRelay},
};
use crate::{
    mesh::policy::{self, Facts, MutualTls},
    net,
    telemetry::{ConnectionFacts, Reporter, SecurityPolicy},
};
use std::{net::SocketAddr, sync::Arc, time::Instant};
use tokio::net::TcpStream;

pub(super) async fn serve(pod: Arc<Pod>, socket: TcpStream, client: SocketAddr) {
    let since = Instant::now();
    let Ok(destination) = socket.local_addr().map(canonical) else {
        return;
    };
    let (snapshot, workload) = (pod.snapshot(), pod.workload());
    let standing = Standing {
        facts: ConnectionFacts {
            reporter: Reporter::Destination,
            source: snapshot.workload_at(client.ip()).cloned(),
            destination: Some(Arc::clone(&workload)),
            service: None,
            source_principal: None,
            destination_principal: None,
            security: SecurityPolicy::Unknown,
        },
        source: client,
        destination,
        hbone_target: None,
        since,
    };
    let refuse = |end: End| pod.report_refused(&standing, &end);
    if pod.is_own_listener(destination) {
        refuse(End::OwnListener { destination });
        return net::abort(socket);
    }
    // The kernel refuses it already; it may be a moment behind.
    if policy::mutual_tls(&snapshot, &workload, destination.port()) == MutualTls::Strict {
        refuse(End::Strict);
        return net::abort(socket);
    }
    let asked = Facts {
        source: client,
        peer: None,
        destination,
    };
    dry_run::tell(&snapshot, &workload, &asked);
    let verdict = policy::authorize(&snapshot, &workload, &asked);
    if !verdict.allows() {
        refuse(End::Denied(verdict));
        return net::abort(socket);
    }
    // Never the client's own port: the application's end would have the addresses of the socket we hold.
    let from = SocketAddr::new(client.ip(), 0);
    let deadline = pod.context.settings.deliver_deadline;
    let application = match net::deliver(&pod.namespace, from, destination, deadline).await {
        Ok(application) => application,
        Err(error) => {
            refuse(End::Unreachable(error));
            return net::abort(socket);
        }
    };
    let (open, _listed) = pod.list(&snapshot, standing, Admission::Plaintext(asked));
    let ended = SocketRelay::new(application, socket, Arc::clone(&open), Application::Server).await;
    pod.report(&open, &End::of_relay(ended, open.closed()));
}

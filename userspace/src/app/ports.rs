//! The daemon's own HTTP ports: opened first of all, served as soon as there is something to say.

use crate::{
    admin::{self, AdminSite, AdminState, BindError, Listen, MetricsSite, Readiness, ReadinessSite},
    config::Ports,
    shutdown::Shutdown,
    telemetry::Metrics,
};
use std::{io, sync::Arc};

/// The sockets of the daemon's own servers, open and not yet served.
pub(super) struct OwnPorts {
    admin: Vec<std::net::TcpListener>,
    metrics: Vec<std::net::TcpListener>,
    readiness: Vec<std::net::TcpListener>,
}

impl OwnPorts {
    pub(super) fn bind(ports: &Ports) -> Result<Self, BindError> {
        let open = |name, port, listen: Listen| match port {
            0 => Ok(Vec::new()),
            _ => admin::bind(name, listen),
        };
        let admin = match ports.admin_address {
            Some(address) => Listen::At((address, ports.admin_port).into()),
            None => Listen::Loopback(ports.admin_port),
        };
        Ok(Self {
            admin: open("admin", ports.admin_port, admin)?,
            metrics: open("metrics", ports.metrics_port, Listen::Everywhere(ports.metrics_port))?,
            readiness: open(
                "readiness",
                ports.readiness_port,
                Listen::Everywhere(ports.readiness_port),
            )?,
        })
    }

    /// Metrics and readiness: from the start, so that a role which waits says for what.
    pub(super) fn serve_health(
        &mut self,
        metrics: &Arc<Metrics>,
        readiness: &Readiness,
        tasks: &Shutdown,
    ) -> io::Result<()> {
        let site = Arc::new(MetricsSite(Arc::clone(metrics)));
        admin::serve(std::mem::take(&mut self.metrics), site, "metrics", tasks)?;
        let site = Arc::new(ReadinessSite(readiness.clone()));
        admin::serve(std::mem::take(&mut self.readiness), site, "readiness", tasks)
    }

    pub(super) fn serve_admin(self, state: Option<AdminState>, tasks: &Shutdown) -> io::Result<()> {
        let site = Arc::new(AdminSite {
            state,
            logging: crate::telemetry::logging::handle(),
        });
        admin::serve(self.admin, site, "admin", tasks)
    }
}

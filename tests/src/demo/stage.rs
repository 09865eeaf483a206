//! The demo's world with everything running in it: pods, applications, controller, daemons, the packet capture.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context, Result};

use super::PREFIX;
use super::apps::{self, Database};
use super::manifests;
use super::report::Report;
use super::wire::Capture;
use crate::mesh::{Mesh, binary};
use crate::process::Process;
use crate::topology::{Node, PodSpec, World};

/// A service as deploy/demo/services.yaml has it.
#[derive(Debug, Clone, Copy)]
pub struct Service {
    vip: Ipv4Addr,
    port: u16,
}

pub const WEB: Service = Service {
    vip: Ipv4Addr::new(10, 96, 0, 10),
    port: apps::HTTP_PORT,
};
pub const DATABASE: Service = Service {
    vip: Ipv4Addr::new(10, 96, 0, 20),
    port: apps::DATABASE_PORT,
};
pub const ECHO: Service = Service {
    vip: Ipv4Addr::new(10, 96, 0, 30),
    port: apps::ECHO_PORT,
};

/// The processes come before the world: they end before what they run in.
#[derive(Debug)]
pub struct Stage {
    pub mesh: Mesh,
    pub capture: Capture,
    pub database: Database,
    applications: Vec<Process>,
    pub world: World,
    pub ipv6: bool,
}

impl Stage {
    /// Builds it all. The applications run before the mesh does, and are never started again.
    pub fn set(ipv6: bool, report: &mut Report) -> Result<Self> {
        for program in ["warren", "load"] {
            binary(program)?;
        }
        report.progress("building two nodes and five pods from network namespaces");
        let world = world(PREFIX)?;
        // The world describes itself as well; what holds here is deploy/demo.
        manifests::write_all(&world.manifest_directory(), ipv6)?;

        report.progress("starting nginx in three pods");
        let mut applications = Vec::new();
        for name in ["web-1", "web-2", "outsider"] {
            applications.push(apps::start_nginx(&world, world.pod(name))?);
        }
        report.progress("starting a TCP echo");
        applications.push(apps::start_echo(world.pod("store"))?);
        report.progress("starting a database");
        let database = Database::start(&world, world.pod("store"), |line| report.remark(line))?;
        report.progress("starting a packet capture between the nodes");
        let capture = Capture::start(&world)?;
        report.progress("starting the controller and two daemons");
        let mesh = Mesh::builder().ipv6(ipv6).start(&world).context("start the mesh")?;
        Ok(Self {
            mesh,
            capture,
            database,
            applications,
            world,
            ipv6,
        })
    }

    /// Where a pod's port is.
    pub fn at(&self, pod: &str, port: u16) -> SocketAddr {
        SocketAddr::new(self.world.pod(pod).ip(self.ipv6), port)
    }

    /// Where a service is.
    pub fn vip(&self, service: Service) -> SocketAddr {
        let ip: IpAddr = if self.ipv6 {
            manifests::counterpart(service.vip).into()
        } else {
            service.vip.into()
        };
        SocketAddr::new(ip, service.port)
    }

    /// Adds a policy of deploy/demo/policies to what the mesh should do.
    pub fn apply_policy(&self, name: &str) -> Result<()> {
        self.world.apply(name, &manifests::policy(name, self.ipv6)?)
    }

    pub fn remove_policy(&self, name: &str) -> Result<()> {
        self.world.delete_manifest(name)
    }

    /// Everything lives on when this program ends.
    pub fn keep(mut self) {
        self.mesh.detach();
        self.capture.process().detach();
        self.database.process().detach();
        self.applications.iter_mut().for_each(Process::detach);
        self.world.keep();
    }
}

/// Two nodes, four pods for the mesh and one that stays outside, as deploy/demo/pods.yaml has them; nothing runs in them.
pub fn world(prefix: &str) -> Result<World> {
    World::builder(prefix)
        .pod(pod("client", Node::A, "demo", "client", 10))
        .pod(pod("web-1", Node::A, "demo", "web", 11))
        .pod(pod("web-2", Node::B, "demo", "web", 11))
        .pod(pod("store", Node::B, "demo", "store", 12))
        .pod(pod("outsider", Node::B, "outside", "outsider", 20))
        .start()
}

fn pod(name: &str, node: Node, namespace: &str, account: &str, number: u8) -> PodSpec {
    PodSpec::new(name, node)
        .namespace(namespace)
        .service_account(account)
        .number(number)
}

/// A text that no other program sends, to be looked for on the wire.
pub fn marker(what: &str) -> String {
    format!("in-the-clear-{what}-{}", std::process::id())
}

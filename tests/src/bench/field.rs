//! The measuring field: one world in which every lane has its pods, with servers and relays running. `row` says what to measure.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::{Lane, Options, Path};
use crate::load::{ConnectRate, Report};
use crate::mesh::{Mesh, binary};
use crate::process::{Process, ProcessBuilder};
use crate::topology::{Node, Pod, PodSpec, World};
use crate::wait::DEADLINE;

/// Connections go to these in turn: a client has 28,000 ports for each, and plain TCP needs more than that in a second.
const PORTS: [u16; 4] = [7001, 7002, 7003, 7004];
/// Where the relay beside a server listens.
const RELAY_PORT: u16 = 15008;

/// Where the relay beside a client listens for the server of that path.
fn relay_address(path: Path) -> Ipv4Addr {
    match path {
        Path::Cross => Ipv4Addr::new(127, 0, 0, 1),
        Path::Same => Ipv4Addr::new(127, 0, 0, 2),
    }
}

/// The pods of a set: `client` and `other` on node A, `far` on node B, `near` on node A.
fn pods(set: &'static str) -> [(String, Node); 4] {
    let name = |role| format!("{set}-{role}");
    [
        (name("client"), Node::A),
        (name("other"), Node::A),
        (name("near"), Node::A),
        (name("far"), Node::B),
    ]
}

fn server(path: Path) -> &'static str {
    match path {
        Path::Cross => "far",
        Path::Same => "near",
    }
}

pub struct Field {
    // Before the world: processes end first.
    _servers: Vec<Process>,
    relays: Vec<(Path, End, Process)>,
    world: World,
}

/// Which end of a lane a relay serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    Source,
    SourceOfOther,
    Destination,
}

impl Field {
    pub fn build(options: &Options) -> Result<Self> {
        let mut builder = World::builder(&options.prefix).pinned(options.pin);
        for (name, node) in pods("plain") {
            builder = builder.pod(PodSpec::outsider(name, node).beyond_node_cgroup());
        }
        if options.lanes.contains(&Lane::Mesh) {
            for (name, node) in pods("mesh") {
                builder = builder.pod(PodSpec::new(name, node));
            }
        }
        let world = builder.start()?;
        let mut servers = Vec::new();
        for pod in world.pods() {
            let is_server = pod.spec.name.ends_with("near") || pod.spec.name.ends_with("far");
            if !is_server {
                // Clients close first; without this their ports are used up after 28,000 connections to a port.
                pod.namespace.sysctls(&[("ipv4/tcp_tw_reuse", "1")])?;
            } else {
                let listen =
                    PORTS.map(|port| format!("--listen={}", SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port)));
                servers.push(announced(pod.command(binary("load")?).arg("serve").args(listen))?);
            }
        }
        let mut field = Self {
            _servers: servers,
            relays: Vec::new(),
            world,
        };
        if options.lanes.contains(&Lane::Floor) {
            field.start_relays(options)?;
        }
        Ok(field)
    }

    fn start_relays(&mut self, options: &Options) -> Result<()> {
        let directory = self.world.directory().join("floor");
        fs::create_dir_all(&directory)?;
        let certificate = rcgen::generate_simple_self_signed(vec!["floor".to_owned()])?;
        fs::write(directory.join("cert.der"), certificate.cert.der())?;
        fs::write(directory.join("key.der"), certificate.signing_key.serialize_der())?;
        let ports = PORTS.map(|port| port.to_string()).join(",");
        let workers = if options.pin { "1" } else { "2" };
        let relay = |pod: &Pod, name: String, role: &[String], at: Ipv4Addr| -> Result<Process> {
            announced(
                pod.command(binary("floor")?)
                    .named(name)
                    .arg("--certificate")
                    .arg(&directory)
                    .args(["--ports", &ports, "--workers", workers, "--at", &at.to_string()])
                    .args(&options.floor_args)
                    .args(role),
            )
        };
        for path in [Path::Cross, Path::Same] {
            let server = self.world.pod(&format!("plain-{}", server(path)));
            let to = SocketAddr::new(server.v4.into(), RELAY_PORT).to_string();
            let at = relay_address(path);
            let name = |end: &str| format!("floor-{path:?}-{end}").to_lowercase();
            let inward = relay(server, name("in"), &["in".to_owned(), to.clone()], at)?;
            self.relays.push((path, End::Destination, inward));
            for (client, end) in [("plain-client", End::Source), ("plain-other", End::SourceOfOther)] {
                let outward = relay(
                    self.world.pod(client),
                    name(client),
                    &["out".to_owned(), to.clone()],
                    at,
                )?;
                self.relays.push((path, end, outward));
            }
        }
        Ok(())
    }

    pub fn start_mesh(&self, options: &Options) -> Result<Mesh> {
        let mut builder = Mesh::builder();
        for arg in &options.node_args {
            builder = builder.node_arg(arg);
        }
        let mut mesh = builder.start(&self.world)?;
        for node in Node::BOTH {
            let pid = mesh.daemon_mut(node).process().pid();
            eprintln!("the daemon of node {} is process {pid}", node.letter());
        }
        Ok(mesh)
    }

    fn pod(&self, lane: Lane, role: &str) -> &Pod {
        let set = match lane {
            Lane::Plain | Lane::Floor => "plain",
            Lane::Mesh => "mesh",
        };
        self.world.pod(&format!("{set}-{role}"))
    }

    fn target(&self, lane: Lane, path: Path) -> IpAddr {
        match lane {
            Lane::Plain | Lane::Mesh => self.pod(lane, server(path)).v4.into(),
            Lane::Floor => relay_address(path).into(),
        }
    }

    fn command(&self, pod: &Pod, lane: Lane, path: Path, mode: &str, ports: &[u16]) -> Result<ProcessBuilder> {
        let to = self.target(lane, path);
        let targets = ports.iter().map(|port| format!("--to={}", SocketAddr::new(to, *port)));
        Ok(pod
            .command(binary("load")?)
            .named(format!("{}-load-{mode}", pod.name))
            .arg(mode)
            .args(targets))
    }

    fn load_from(
        &self,
        pod: &Pod,
        lane: Lane,
        path: Path,
        mode: &str,
        time: Duration,
        args: &[&str],
    ) -> Result<Report> {
        let ports = if mode == "connect" { &PORTS[..] } else { &PORTS[..1] };
        let text = self
            .command(pod, lane, path, mode, ports)?
            .arg(format!("--seconds={}", time.as_secs_f64()))
            .args(args)
            .output(time + Duration::from_secs(30))?;
        serde_json::from_str(&text).with_context(|| format!("parse the report `{text}`"))
    }

    /// Runs the load tool in the lane's client.
    pub fn load(&self, lane: Lane, path: Path, mode: &str, time: Duration, args: &[&str]) -> Result<Report> {
        self.load_from(self.pod(lane, "client"), lane, path, mode, time, args)
    }

    /// Runs it in another pod of the client's node, towards the same server.
    pub fn load_from_other_pod(
        &self,
        lane: Lane,
        path: Path,
        mode: &str,
        time: Duration,
        args: &[&str],
    ) -> Result<Report> {
        self.load_from(self.pod(lane, "other"), lane, path, mode, time, args)
    }

    /// One stream from client to server for `time`, in the background.
    pub fn start_bulk(&self, lane: Lane, path: Path, time: Duration) -> Result<Process> {
        self.command(self.pod(lane, "client"), lane, path, "bulk", &PORTS[..1])?
            .arg(format!("--seconds={}", time.as_secs_f64()))
            .spawn()
    }

    /// Connections one after the other to a single port; the server must see the client's own address.
    pub fn connections_in_a_row(&self, lane: Lane, workers: usize, count: u64) -> Result<ConnectRate> {
        let client = self.pod(lane, "client");
        let text = self
            .command(client, lane, Path::Cross, "connect", &PORTS[..1])?
            .args([
                format!("--workers={workers}"),
                format!("--count={count}"),
                format!("--expect={}", client.v4),
            ])
            .output(Duration::from_secs(600))?;
        let report = serde_json::from_str(&text).with_context(|| format!("parse the report `{text}`"))?;
        let Report::Connect(rate) = report else {
            bail!("not a report of connects: {report:?}")
        };
        Ok(rate)
    }

    /// One connection from both clients: after it, certificates are there and tunnels are pooled.
    pub fn warm_up(&self, lane: Lane, path: Path) -> Result<()> {
        for role in ["client", "other"] {
            let report = self.load_from(
                self.pod(lane, role),
                lane,
                path,
                "connect",
                Duration::ZERO,
                &["--count", "1"],
            )?;
            let Report::Connect(rate) = report else {
                bail!("not a report of connects")
            };
            ensure!(
                rate.errors == 0,
                "{role} cannot connect: {}",
                rate.first_error.unwrap_or_default()
            );
        }
        Ok(())
    }

    /// Fails when the mesh lane went past the mesh: its figures would be those of plain.
    pub fn check_captured(&self, mesh: &Mesh) -> Result<()> {
        mesh.daemon(Node::A)
            .wait_for_metric(
                "istio_tcp_connections_opened_total",
                &["reporter=\"source\""],
                1.0,
                DEADLINE,
            )
            .context("the mesh lane does not go through the mesh")
    }

    /// The relays that carry the path from the client: source and destination.
    pub fn floor_pids(&self, path: Path) -> [Option<u32>; 2] {
        [End::Source, End::Destination].map(|wanted| {
            let relay = self.relays.iter().find(|(of, end, _)| (*of, *end) == (path, wanted));
            relay.map(|(_, _, process)| process.pid())
        })
    }

    /// Holds `count` connections of the mesh lane open until the returned process is dropped.
    pub fn hold(&self, count: usize) -> Result<Process> {
        let mut process = self
            .command(
                self.pod(Lane::Mesh, "client"),
                Lane::Mesh,
                Path::Cross,
                "hold",
                &PORTS[..1],
            )?
            .arg(format!("--connections={count}"))
            .with_pipes()
            .spawn()?;
        process
            .read_line(Duration::from_secs(60))
            .with_context(|| format!("hold {count} connections open"))?;
        Ok(process)
    }

    pub fn copy_logs(&self, to: &std::path::Path) -> Result<()> {
        fs::create_dir_all(to)?;
        for entry in fs::read_dir(self.world.log_directory())? {
            let entry = entry?;
            fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
        Ok(())
    }
}

/// Time from spawn to readiness of a daemon whose node has two pods in the mesh, nothing pinned before; once a round.
pub fn time_to_ready(options: &Options) -> Result<Vec<Duration>> {
    (0..options.rounds)
        .map(|_| {
            let world = World::builder(format!("{}-ready", options.prefix))
                .pinned(options.pin)
                .pod(PodSpec::new("one", Node::A))
                .pod(PodSpec::new("two", Node::A))
                .start()?;
            let mut mesh = Mesh::builder().start_controller(&world)?;
            mesh.daemon_mut(Node::A).start_timed(DEADLINE)
        })
        .collect()
}

/// Starts a process that writes a line when it is ready, and waits for that line.
fn announced(builder: ProcessBuilder) -> Result<Process> {
    let process = builder.spawn()?;
    process.wait_for_line("listening", DEADLINE)?;
    Ok(process)
}

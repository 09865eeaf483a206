//! How a mesh is started: the certificate authority's files, the flags of controller and daemons, and their order.

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{CA_PORT, Daemon, Mesh, binary};
use crate::topology::{Node, World};
use crate::wait::{DEADLINE, wait_until_ok};

/// How the mesh is started.
#[derive(Debug, Clone, Default)]
pub struct MeshBuilder {
    node_args: Vec<String>,
    controller_args: Vec<String>,
    env: Vec<(String, String)>,
    ipv6: bool,
    handover: bool,
}

impl MeshBuilder {
    /// The daemons can be replaced: [`Daemon::replace`].
    #[must_use]
    pub fn handover(self) -> Self {
        Self { handover: true, ..self }
    }

    /// The controller is reached by its IPv6 address.
    #[must_use]
    pub fn ipv6(self, ipv6: bool) -> Self {
        Self { ipv6, ..self }
    }

    /// One more argument of both `warren node`.
    #[must_use]
    pub fn node_arg(mut self, arg: impl Into<String>) -> Self {
        self.node_args.push(arg.into());
        self
    }

    #[must_use]
    pub fn controller_arg(mut self, arg: impl Into<String>) -> Self {
        self.controller_args.push(arg.into());
        self
    }

    /// One more environment variable of all three processes.
    #[must_use]
    pub fn env(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.push((key.into(), value.into()));
        self
    }

    /// Starts the controller, then both daemons, and waits until both are ready.
    pub fn start(self, world: &World) -> Result<Mesh> {
        let mut mesh = self.start_controller(world)?;
        for node in Node::BOTH {
            mesh.daemon_mut(node).start()?;
        }
        for node in Node::BOTH {
            mesh.daemon_mut(node).wait_ready(DEADLINE)?;
        }
        Ok(mesh)
    }

    /// Starts the controller alone; the daemons are there to be started by [`Daemon::start`].
    pub fn start_controller(self, world: &World) -> Result<Mesh> {
        let warren = binary("warren")?;
        let directory = world.directory().join("mesh");
        fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))?;
        let files = CaFiles::write(&directory, world)?;
        let at = SocketAddr::new(world.controller().ip(self.ipv6), CA_PORT);
        let mut command = world
            .controller()
            .command(&warren)
            .arg("controller")
            .arg("--ca-dir")
            .arg(&files.directory)
            .arg("--ca-tokens")
            .arg(&files.tokens)
            .arg("--manifests")
            .arg(world.manifest_directory())
            .args(["--listen", &at.to_string(), "--trust-domain", "cluster.local"])
            .args(&self.controller_args);
        for (key, value) in &self.env {
            command = command.env(key, value);
        }
        let mut controller = command.spawn()?;
        let namespace = world.node(Node::B).namespace.clone();
        wait_until_ok("the controller listens", DEADLINE, || {
            ensure!(controller.is_running(), "the controller ended: {}", controller.log());
            ensure!(files.root.exists(), "no {}", files.root.display());
            namespace.run(|| Ok(std::net::TcpStream::connect_timeout(&at, Duration::from_secs(1)).map(drop)?))
        })?;
        let handover = |node: Node| {
            let socket = directory.join(format!("handover-{}.sock", node.letter()));
            self.handover.then(|| format!("--handover-socket={}", socket.display()))
        };
        let daemon = |node: Node| {
            let args = node_args(world, node, &files, at)
                .into_iter()
                .chain(handover(node))
                .chain(self.node_args.iter().cloned());
            Daemon::new(world.daemon(node), warren.clone(), args.collect(), self.env.clone())
        };
        Ok(Mesh {
            controller,
            daemons: [daemon(Node::A), daemon(Node::B)],
            directory: files.directory.clone(),
        })
    }
}

fn node_args(world: &World, node: Node, files: &CaFiles, ca: SocketAddr) -> Vec<String> {
    let text = |path: &Path| path.display().to_string();
    let pairs = [
        ("--node-name", world.node(node).name.clone()),
        ("--manifests", text(&world.manifest_directory())),
        ("--ca-address", format!("https://{ca}")),
        ("--ca-root", text(&files.root)),
        ("--ca-token", text(&files.token(node))),
        ("--trust-domain", "cluster.local".to_owned()),
        ("--pin-dir", text(&world.pin_directory(node))),
        ("--cgroup", text(&world.node_cgroup(node))),
    ];
    let mut args = vec!["node".to_owned()];
    args.extend(pairs.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]));
    args
}

/// What controller and daemons trust each other by.
struct CaFiles {
    directory: PathBuf,
    root: PathBuf,
    tokens: PathBuf,
}

impl CaFiles {
    fn write(directory: &Path, world: &World) -> Result<Self> {
        let ca = directory.join("ca");
        let files = Self {
            root: ca.join("root-cert.pem"),
            directory: ca,
            tokens: directory.join("tokens"),
        };
        let mut lines = String::new();
        for node in Node::BOTH {
            let token = format!("token-of-{}-{}", world.node(node).name, std::process::id());
            lines.push_str(&format!("{token} {}\n", world.node(node).name));
            fs::write(files.token(node), token).context("write a token")?;
        }
        fs::write(&files.tokens, lines).context("write the controller's tokens")?;
        Ok(files)
    }

    fn token(&self, node: Node) -> PathBuf {
        self.tokens.with_extension(node.letter())
    }
}

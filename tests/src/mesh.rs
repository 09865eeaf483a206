//! The mesh in a world: one controller, one `warren node` per node, and what they say about themselves. Starts the real
//! binary; decides nothing about pods.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::process::Process;
use crate::topology::{Node, Place, World};
use crate::wait::{DEADLINE, http_get, wait_until, wait_until_ok};

/// The daemon's own ports, in its node's namespace.
pub const ADMIN_PORT: u16 = 15000;
pub const METRICS_PORT: u16 = 15020;
pub const READY_PORT: u16 = 15021;
/// The controller's.
pub const CA_PORT: u16 = 15012;

/// A binary of this workspace: `WARREN_BIN` for `warren`, else beside the running one, else of the other profile.
pub fn binary(name: &str) -> Result<PathBuf> {
    if let (true, Some(path)) = (name == "warren", std::env::var_os("WARREN_BIN")) {
        return Ok(path.into());
    }
    let me = std::env::current_exe().context("find the running binary")?;
    let profile = me
        .ancestors()
        .find(|path| {
            path.file_name()
                .is_some_and(|name| name == "debug" || name == "release")
        })
        .context("the running binary is below neither target/debug nor target/release")?;
    let target = profile.parent().context("target/ has a parent")?;
    let mut candidates = vec![
        profile.join(name),
        target.join("release").join(name),
        target.join("debug").join(name),
    ];
    candidates.retain(|path| path.exists());
    match candidates.into_iter().next() {
        Some(path) => Ok(path),
        None => bail!(
            "no binary `{name}` below {}: build it first (`cargo xtask build`)",
            target.display()
        ),
    }
}

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
        let daemon = |node: Node| Daemon {
            place: world.daemon(node),
            process: None,
            generation: 0,
            successors: 0,
            args: node_args(world, node, &files, at)
                .into_iter()
                .chain(handover(node))
                .chain(self.node_args.iter().cloned())
                .collect(),
            env: self.env.clone(),
            warren: warren.clone(),
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

/// A controller and two daemons.
#[derive(Debug)]
pub struct Mesh {
    daemons: [Daemon; 2],
    controller: Process,
    directory: PathBuf,
}

impl Mesh {
    /// With default flags.
    pub fn start(world: &World) -> Result<Self> {
        Self::builder().start(world)
    }

    pub fn builder() -> MeshBuilder {
        MeshBuilder::default()
    }

    pub fn daemon(&self, node: Node) -> &Daemon {
        &self.daemons[usize::from(node.number() - 1)]
    }

    pub fn daemon_mut(&mut self, node: Node) -> &mut Daemon {
        &mut self.daemons[usize::from(node.number() - 1)]
    }

    pub fn controller(&mut self) -> &mut Process {
        &mut self.controller
    }

    /// The CA's directory.
    pub fn ca_directory(&self) -> &Path {
        &self.directory
    }

    /// All three processes live on after this one, until the world is cleared.
    pub fn detach(&mut self) {
        self.controller.detach();
        self.daemons
            .iter_mut()
            .filter_map(|daemon| daemon.process.as_mut())
            .for_each(Process::detach);
    }
}

/// One node's `warren node`, running or not.
#[derive(Debug)]
pub struct Daemon {
    place: Place,
    process: Option<Process>,
    /// How many daemons were replaced here. In the tests they share the node's namespace, so each needs ports of its own.
    generation: u16,
    /// How many successors were started: each has a log of its own.
    successors: u16,
    warren: PathBuf,
    args: Vec<String>,
    env: Vec<(String, String)>,
}

impl Daemon {
    /// Starts it, and does not wait until it is ready.
    pub fn start(&mut self) -> Result<&mut Process> {
        let mut command = self.place.command(&self.warren).args(&self.args);
        if self.generation > 0 {
            let ports = [
                ("admin", ADMIN_PORT),
                ("metrics", METRICS_PORT),
                ("readiness", READY_PORT),
            ];
            let port = |(name, port)| format!("--{name}-port={}", self.port(port));
            command = command
                .args(ports.map(port))
                .named(format!("{}-warren-{}", self.place.name, self.successors));
        }
        for (key, value) in &self.env {
            command = command.env(key, value);
        }
        Ok(self.process.insert(command.spawn()?))
    }

    /// Starts a successor and waits until it is ready: the daemon is that one from then on. Gives back the one before, which
    /// runs on.
    pub fn replace(&mut self, deadline: Duration) -> Result<Process> {
        let before = self.process.take().context("there is no daemon to replace")?;
        self.generation += 1;
        self.successors += 1;
        self.restart(deadline)?;
        Ok(before)
    }

    /// Starts a successor and does not wait; it is given back. The daemon stays the one that it is.
    pub fn start_successor(&mut self) -> Result<Process> {
        let before = self.process.take();
        self.generation += 1;
        self.successors += 1;
        let started = self.start().map(drop);
        let successor = std::mem::replace(&mut self.process, before);
        self.generation -= 1;
        started?;
        successor.context("no successor")
    }

    fn port(&self, port: u16) -> u16 {
        port + 100 * (self.generation % 8)
    }

    /// The process. Panics when the daemon was never started.
    #[track_caller]
    pub fn process(&mut self) -> &mut Process {
        match &mut self.process {
            Some(process) => process,
            None => panic!("the daemon of {} was never started", self.place.name),
        }
    }

    /// `kill -9`: programs and pins stay.
    pub fn kill(&mut self) -> Result<()> {
        self.process().kill()
    }

    /// Starts it again after [`Daemon::kill`] or [`Process::stop`], and waits until it is ready.
    pub fn restart(&mut self, deadline: Duration) -> Result<()> {
        self.start()?;
        self.wait_ready(deadline)
    }

    /// Waits for `/healthz/ready` to answer 200.
    pub fn wait_ready(&mut self, deadline: Duration) -> Result<()> {
        let what = format!("the daemon of {} is ready", self.place.name);
        wait_until_ok(&what, deadline, || {
            let process = self.process();
            ensure!(process.is_running(), "it ended: {}", process.log());
            let (status, body) = self.get(READY_PORT, "/healthz/ready")?;
            ensure!(status == 200, "not ready: {status} {body}");
            Ok(())
        })
        .with_context(|| format!("its log: {}", self.log()))
    }

    /// Starts it and says how long it took from the spawn until readiness answered 200.
    pub fn start_timed(&mut self, deadline: Duration) -> Result<Duration> {
        let begin = Instant::now();
        self.start()?;
        let address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), self.port(READY_PORT));
        // One thread in the namespace that asks every millisecond: entering it anew each time would be measured as well.
        let took = self.place.namespace.run(|| {
            while begin.elapsed() < deadline {
                if matches!(http_get(address, "/healthz/ready"), Ok((200, _))) {
                    return Ok(Some(begin.elapsed()));
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(None)
        })?;
        took.with_context(|| format!("the daemon of {} is not ready: {}", self.place.name, self.log()))
    }

    pub fn log(&self) -> String {
        self.process.as_ref().map(Process::log).unwrap_or_default()
    }

    /// Waits until a line of the log contains `text`, and gives back that line.
    pub fn wait_for_line(&self, text: &str, deadline: Duration) -> Result<String> {
        match &self.process {
            Some(process) => process.wait_for_line(text, deadline),
            None => bail!("the daemon of {} was never started", self.place.name),
        }
    }

    /// `GET` from the daemon, asked inside its node's namespace.
    pub fn get(&self, port: u16, path: &str) -> Result<(u16, String)> {
        let address = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), self.port(port));
        self.place.namespace.run(|| http_get(address, path))
    }

    /// The metrics as Prometheus reads them.
    pub fn metrics(&self) -> Result<String> {
        let (status, body) = self.get(METRICS_PORT, "/metrics")?;
        ensure!(status == 200, "metrics: {status} {body}");
        Ok(body)
    }

    /// The sum of a metric's series whose labels contain each of `labels` (`reporter="source"`); 0 where there is none.
    pub fn metric(&self, name: &str, labels: &[&str]) -> Result<f64> {
        Ok(sum_series(&self.metrics()?, name, labels))
    }

    /// Waits until [`Daemon::metric`] is at least `value`.
    pub fn wait_for_metric(&self, name: &str, labels: &[&str], value: f64, deadline: Duration) -> Result<()> {
        let what = format!("{name}{labels:?} is {value} on {}", self.place.name);
        wait_until(&what, deadline, || {
            self.metric(name, labels).ok().filter(|now| *now >= value)
        })
        .map(drop)
    }

    pub fn config_dump(&self) -> Result<serde_json::Value> {
        let (status, body) = self.get(ADMIN_PORT, "/config_dump")?;
        ensure!(status == 200, "config_dump: {status} {body}");
        serde_json::from_str(&body).context("parse the config dump")
    }
}

fn sum_series(text: &str, name: &str, labels: &[&str]) -> f64 {
    text.lines()
        .filter_map(|line| {
            let rest = line.strip_prefix(name)?;
            let (series, value) = match rest.strip_prefix('{') {
                Some(labelled) => labelled.rsplit_once("} ")?,
                None => ("", rest.strip_prefix(' ')?),
            };
            labels
                .iter()
                .all(|label| series.contains(label))
                .then(|| value.split(' ').next()?.parse::<f64>().ok())?
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn series_are_summed_by_name_and_labels() {
        let text =
            "# HELP a b\na_total{x=\"1\",y=\"2\"} 3\na_total{x=\"2\",y=\"2\"} 4\na_total_more{x=\"1\"} 9\nplain 5\n";
        assert_eq!(sum_series(text, "a_total", &["y=\"2\""]), 7.0);
        assert_eq!(sum_series(text, "a_total", &["x=\"1\"", "y=\"2\""]), 3.0);
        assert_eq!(sum_series(text, "plain", &[]), 5.0);
        assert_eq!(sum_series(text, "absent", &[]), 0.0);
    }
}

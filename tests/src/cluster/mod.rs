//! A real Kubernetes with Warren in it, for tests of level cluster: `cargo xtask test cluster` brings it up and says where
//! it is, all tests of a run share it. Each works in a namespace of its own.

mod inside;
mod kubectl;
mod namespace;
mod warren;

pub use kubectl::Kubectl;
pub use namespace::{AMBIENT, Namespace, PodShape, STRICT, Said};
pub use warren::{NAMESPACE as SYSTEM, Told};

use anyhow::{Context, Result};
use std::{
    path::PathBuf,
    process::Command,
    sync::{Once, OnceLock},
    time::Duration,
};

/// How long a pod, a rollout or a policy may take. Kubelets ask their API server in intervals of seconds.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// The cluster that the environment names.
#[derive(Debug)]
pub struct Cluster {
    pub kubectl: Kubectl,
    /// An image with busybox.
    pub busybox: String,
    /// The rig's script; `None` where the cluster is somebody else's.
    rig: Option<PathBuf>,
    /// Where it is written that Warren cannot be installed, and why, for the test programs that come after.
    not_installed: Option<PathBuf>,
}

/// The cluster of this run.
///
/// # Panics
/// Nobody named one.
pub fn cluster() -> &'static Cluster {
    static CLUSTER: OnceLock<Cluster> = OnceLock::new();
    CLUSTER.get_or_init(|| {
        Cluster::from_environment().expect("tests of level cluster are run by `cargo xtask test cluster`")
    })
}

/// The cluster, with Warren installed and ready on every node.
///
/// # Panics
/// Warren cannot be installed, or is not ready in time.
pub fn meshed() -> &'static Cluster {
    static INSTALLED: OnceLock<()> = OnceLock::new();
    let cluster = cluster();
    INSTALLED.get_or_init(|| {
        tell_on_failure();
        cluster.install_warren().expect("Warren is installed");
    });
    cluster
}

/// A test that fails leaves what the cluster was doing in its output.
fn tell_on_failure() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            before(panic);
            eprintln!("{}", cluster().diagnosis());
        }));
    });
}

impl Cluster {
    fn from_environment() -> Result<Self> {
        let variable = |name: &str| std::env::var(name).with_context(|| format!("{name} is not set"));
        let kubeconfig = variable("KUBECONFIG")?;
        Ok(Self {
            kubectl: Kubectl::new(variable("WARREN_KUBECTL")?.into(), kubeconfig.into()),
            busybox: variable("WARREN_BUSYBOX")?,
            rig: std::env::var_os("WARREN_RIG").map(PathBuf::from),
            not_installed: std::env::var_os("WARREN_NOT_INSTALLED").map(PathBuf::from),
        })
    }

    /// Stops, starts and enters nodes and components; `None` (said aloud) where they are not ours.
    pub fn rig(&self) -> Option<Rig<'_>> {
        if self.rig.is_none() {
            eprintln!("SKIPPED: this test stops parts of the cluster, and this cluster is somebody else's");
        }
        self.rig.as_ref().map(|script| Rig { script })
    }

    /// Names of the nodes, sorted; at least two.
    ///
    /// # Errors
    /// The cluster does not answer, or has fewer.
    pub fn nodes(&self) -> Result<Vec<String>> {
        let workers = [
            "get",
            "nodes",
            "-l",
            "!node-role.kubernetes.io/control-plane",
            "-o",
            "jsonpath={.items[*].metadata.name}",
        ];
        let mut names: Vec<String> = self
            .kubectl
            .run(workers)?
            .split_whitespace()
            .map(str::to_owned)
            .collect();
        names.sort();
        anyhow::ensure!(names.len() >= 2, "the tests need two nodes, and there are {names:?}");
        Ok(names)
    }

    /// What somebody who looks into a failure asks first: the pods, what became of Warren's, and what these said beside their
    /// access logs.
    pub fn diagnosis(&self) -> String {
        let ask = |words: &[&str]| match self.kubectl.run(words) {
            Ok(text) => text,
            Err(error) => format!("{error:#}\n"),
        };
        let mut text = ask(&["get", "pods", "-A", "-o", "wide"]);
        for label in ["warren-node", "warren-controller"] {
            let selector = format!("app.kubernetes.io/name={label}");
            text += &format!("── {label}\n");
            let logs = ["logs", "-n=warren-system", "-l", &selector, "--prefix", "--tail=2000"];
            for line in ask(&logs).lines().filter(|line| !line.contains("connection complete")) {
                text += &format!("{line}\n");
            }
        }
        text + "── events\n" + &ask(&["-n", "warren-system", "get", "events"])
    }
}

/// The parts of the test cluster that can be stopped.
#[derive(Debug, Clone, Copy)]
pub struct Rig<'a> {
    script: &'a PathBuf,
}

impl Rig<'_> {
    /// `rig.sh` with these words.
    ///
    /// # Errors
    /// It failed; its words are the reason.
    pub fn run(&self, words: &[&str]) -> Result<String> {
        kubectl::output(Command::new(self.script).args(words))
    }

    /// Runs a command on a node, in the node's own namespaces. `node` is the node's name.
    ///
    /// # Errors
    /// It failed.
    pub fn on_node(&self, node: &str, command: &[&str]) -> Result<String> {
        let number = node.trim_start_matches('n');
        self.run(&[&["node", number], command].concat())
    }
}

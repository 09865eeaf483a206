//! Warren in the cluster: installed once per run, and what its daemons log and count.

use super::{Cluster, PATIENCE};
use crate::wait::wait_until_ok;
use anyhow::{Context, Result, bail, ensure};
use std::{collections::BTreeMap, process::Command, time::Duration};

pub const NAMESPACE: &str = "warren-system";
const ROLLOUT: Duration = Duration::from_secs(300);
/// The label of the daemons' pods.
const DAEMONS: &str = "app.kubernetes.io/name=warren-node";

/// What a subcommand of `warren` said, and how it ended.
#[derive(Debug)]
pub struct Told {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Cluster {
    /// Runs this tree's `warren` as a person at a terminal would, with the rights of the cluster's admin.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn warren(&self, words: &[&str]) -> Result<Told> {
        let program = std::env::var("WARREN_BIN").context("WARREN_BIN is not set")?;
        let kubectl = self.kubectl.command();
        let mut command = Command::new(&program);
        for (name, value) in kubectl.get_envs() {
            command.env(name, value.unwrap_or_default());
        }
        let ended = command
            .args(words)
            .output()
            .with_context(|| format!("cannot start {program}"))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Told {
            code: ended.status.code(),
            stdout: text(&ended.stdout),
            stderr: text(&ended.stderr),
        })
    }

    /// The image that this run made.
    ///
    /// # Errors
    /// Nobody said which.
    pub fn image(&self) -> Result<String> {
        let tag = std::env::var("WARREN_IMAGE_TAG").context("WARREN_IMAGE_TAG is not set")?;
        Ok(format!("warren.mesh/warren:{tag}"))
    }

    /// Installs this tree's Warren and waits until it is ready. Done already: changes nothing.
    ///
    /// # Errors
    /// It is not ready in time; what `warren install` said about it.
    pub fn install_warren(&self) -> Result<()> {
        // Each try that fails takes minutes, and so would every test after it.
        if let Some(why) = self
            .not_installed
            .as_ref()
            .and_then(|file| std::fs::read_to_string(file).ok())
        {
            bail!("not tried again, after it could not be installed for an earlier test of this run: {why}");
        }
        self.try_to_install().inspect_err(|error| {
            if let Some(file) = &self.not_installed
                && let Err(error) = std::fs::write(file, format!("{error:#}"))
            {
                eprintln!("{}: {error}", file.display());
            }
        })
    }

    fn try_to_install(&self) -> Result<()> {
        let told = self.warren(&["install", "--image", &self.image()?])?;
        ensure!(
            told.code == Some(0),
            "warren install: {:?}\n{}{}",
            told.code,
            told.stdout,
            told.stderr
        );
        self.warren_ready()
    }

    /// Waits until controller and daemons are ready.
    ///
    /// # Errors
    /// They are not, in time.
    pub fn warren_ready(&self) -> Result<()> {
        for what in ["deployment/warren-controller", "daemonset/warren-node"] {
            let timeout = format!("--timeout={}s", ROLLOUT.as_secs());
            self.kubectl
                .run(["-n", NAMESPACE, "rollout", "status", what, &timeout])?;
        }
        Ok(())
    }

    /// Replaces every daemon, as an update would, and waits until the new ones have taken over. On nodes that Kubernetes takes
    /// for healthy: a while after the API server was away, it takes them for lost, and updates them in another way.
    ///
    /// # Errors
    /// They have not, in time.
    pub fn restart_daemons(&self) -> Result<()> {
        let timeout = format!("--timeout={}s", ROLLOUT.as_secs());
        self.kubectl
            .run(["wait", "--for=condition=Ready", "nodes", "--all", &timeout])?;
        self.warren_ready()?;
        self.begin_update()?;
        self.warren_ready()
    }

    /// Has every daemon replaced, and does not wait for it.
    ///
    /// # Errors
    /// The API server refuses.
    pub fn begin_update(&self) -> Result<()> {
        let words = ["-n", NAMESPACE, "rollout", "restart", "daemonset/warren-node"];
        self.kubectl.run(words).map(drop)
    }

    /// Takes the daemons off their nodes without deleting their DaemonSet, and waits until they are gone.
    ///
    /// # Errors
    /// They are not, in time.
    pub fn withdraw_daemons(&self) -> Result<()> {
        self.daemons_on("\"nowhere\"")?;
        let pods = ["-n", NAMESPACE, "get", "pods", "-l", DAEMONS, "-o", "name"];
        self.kubectl.until(PATIENCE, &pods, str::is_empty).map(drop)
    }

    /// Lets withdrawn daemons come back, and waits until they are ready.
    ///
    /// # Errors
    /// They are not, in time.
    pub fn readmit_daemons(&self) -> Result<()> {
        self.daemons_on("null")?;
        self.warren_ready()
    }

    /// Daemons run where the label `warren.mesh/test`, which no node has, is this JSON value; everywhere, if it is `null`.
    fn daemons_on(&self, value: &str) -> Result<()> {
        let patch =
            format!("{{\"spec\":{{\"template\":{{\"spec\":{{\"nodeSelector\":{{\"warren.mesh/test\":{value}}}}}}}}}}}");
        let daemons = "daemonset/warren-node";
        self.kubectl
            .run(["-n", NAMESPACE, "patch", daemons, "--type=merge", "-p", &patch])
            .map(drop)
    }

    /// The name of the daemon's pod on a node; of the newest, where an earlier one still drains.
    ///
    /// # Errors
    /// There is none.
    pub fn daemon(&self, node: &str) -> Result<String> {
        let field = format!("spec.nodeName={node}");
        let words = [
            "-n",
            NAMESPACE,
            "get",
            "pods",
            "-l",
            DAEMONS,
            "--field-selector",
            &field,
            "--sort-by=.metadata.creationTimestamp",
            "-o",
            "jsonpath={.items[-1:].metadata.name}",
        ];
        self.kubectl.run(words)
    }

    /// How often the container of each daemon's pod has been started, by pod, as far back as the cluster's Events go.
    ///
    /// # Errors
    /// They cannot be read.
    pub fn daemon_starts(&self) -> Result<BTreeMap<String, u32>> {
        let words = [
            "-n",
            NAMESPACE,
            "get",
            "events",
            "--field-selector=reason=Started",
            "-o",
            "jsonpath={range .items[*]}{.involvedObject.name} {.count}{\"\\n\"}{end}",
        ];
        let mut starts = BTreeMap::new();
        for line in self
            .kubectl
            .run(words)?
            .lines()
            .filter(|line| line.starts_with("warren-node-"))
        {
            let (pod, count) = line.split_once(' ').unwrap_or((line, "1"));
            let count: u32 = count.parse().with_context(|| format!("no count: {line:?}"))?;
            *starts.entry(pod.to_owned()).or_default() += count;
        }
        Ok(starts)
    }

    /// Waits for a line of the access log of a node's daemon that holds all of these words.
    ///
    /// # Errors
    /// There is none in time.
    pub fn access_line(&self, node: &str, words: &[&str]) -> Result<String> {
        let daemon = self.daemon(node)?;
        wait_until_ok(&format!("{daemon} logs {words:?}"), PATIENCE, || {
            let log = self.kubectl.run(["-n", NAMESPACE, "logs", &daemon])?;
            let found = log.lines().find(|line| words.iter().all(|word| line.contains(word)));
            found.map(str::to_owned).context("no such line")
        })
    }

    /// The sum of a metric of a node's daemon, over the label sets that hold all of `labels`.
    ///
    /// # Errors
    /// The daemon's metrics cannot be read.
    pub fn metric(&self, node: &str, name: &str, labels: &[&str]) -> Result<f64> {
        let path = format!(
            "/api/v1/namespaces/{NAMESPACE}/pods/{}:15020/proxy/metrics",
            self.daemon(node)?
        );
        let text = self.kubectl.run(["get", "--raw", &path])?;
        let lines = text.lines().filter(|line| {
            let metric = line.split(['{', ' ']).next().unwrap_or_default();
            metric == name && labels.iter().all(|label| line.contains(label))
        });
        let values = lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        Ok(values.sum())
    }
}

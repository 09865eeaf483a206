//! Warren in the cluster: installed once per run, and what its daemons log and count.

use super::{Cluster, PATIENCE};
use crate::wait::wait_until_ok;
use anyhow::{Context, Result};
use std::{path::PathBuf, time::Duration};

pub(crate) const NAMESPACE: &str = "warren-system";
const ROLLOUT: Duration = Duration::from_secs(120);

impl Cluster {
    /// Installs this tree's Warren and waits until it is ready. Done already: waits alone.
    pub(super) fn install_warren(&self) -> Result<()> {
        for name in ["warren-crds", "warren"] {
            self.kubectl.apply(&manifests(name)?)?;
        }
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

    /// The name of the daemon's pod on a node.
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
            "app.kubernetes.io/name=warren-node",
            "--field-selector",
            &field,
            "-o",
            "jsonpath={.items[0].metadata.name}",
        ];
        self.kubectl.run(words)
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

/// The rendered manifests, with the image of this run.
fn manifests(name: &str) -> Result<String> {
    let root = std::env::var("WARREN_ROOT").context("WARREN_ROOT is not set")?;
    let file = PathBuf::from(root).join(format!("deploy/manifests/{name}.yaml"));
    let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let tag = std::env::var("WARREN_IMAGE_TAG").context("WARREN_IMAGE_TAG is not set")?;
    let version = env!("CARGO_PKG_VERSION");
    let from = format!("image: warren.mesh/warren:{version}");
    Ok(text.replace(&from, &format!("image: warren.mesh/warren:{tag}")))
}

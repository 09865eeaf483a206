//! A test's own namespace: servers that say who they are, clients that ask, and what each of them said.

use super::{Cluster, PATIENCE};
use crate::{Process, ProcessBuilder, wait::wait_until_ok};
use anyhow::{Context, Result};
use std::{
    path::PathBuf,
    process::Output,
    sync::atomic::{AtomicU32, Ordering},
};
use tempfile::TempDir;

/// Where servers listen.
pub(crate) const PORT: u16 = 8080;

/// The labels of a namespace whose pods are in the mesh.
pub const AMBIENT: &str = "istio.io/dataplane-mode: ambient";
/// What makes a namespace refuse everybody outside the mesh.
pub const STRICT: &str = "{apiVersion: security.istio.io/v1, kind: PeerAuthentication, metadata: {name: strict}, \
                          spec: {mtls: {mode: STRICT}}}";

/// A namespace that goes with this value.
#[derive(Debug)]
pub struct Namespace<'c> {
    pub name: String,
    cluster: &'c Cluster,
    /// What programs of the test say; gone with this value.
    logs: TempDir,
}

/// How a command in a pod ended.
#[derive(Debug)]
pub struct Said {
    pub succeeded: bool,
    pub text: String,
}

/// What a pod of the tests can differ in.
#[derive(Debug, Clone, Default)]
pub struct PodShape<'a> {
    /// On this node; on any otherwise.
    pub node: Option<&'a str>,
    /// More lines of the pod's spec, as YAML in flow style: `hostNetwork: true`.
    pub spec: &'a str,
    /// More lines of the container.
    pub container: &'a str,
    /// More labels.
    pub labels: &'a str,
}

impl<'a> PodShape<'a> {
    pub fn on(node: &'a str) -> Self {
        Self {
            node: Some(node),
            ..Self::default()
        }
    }
}

impl Cluster {
    /// A fresh namespace with a client, `web`, on the first node and a server, `db`, on the second, ready; and the names of the
    /// nodes.
    ///
    /// # Errors
    /// The API server refuses it, or they are not ready in time.
    pub fn pair(&self, stem: &str, labels: &str) -> Result<(Namespace<'_>, Vec<String>)> {
        let nodes = self.nodes()?;
        let namespace = self.namespace(stem, labels)?;
        namespace.client("web", &PodShape::on(&nodes[0]))?;
        namespace.server("db", &PodShape::on(&nodes[1]))?;
        namespace.ready(&["web", "db"])?;
        Ok((namespace, nodes))
    }

    /// A fresh namespace; `labels` in YAML's flow style, such as `istio.io/dataplane-mode: ambient`.
    ///
    /// # Errors
    /// The API server refuses it.
    pub fn namespace(&self, stem: &str, labels: &str) -> Result<Namespace<'_>> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("wt-{stem}-{}-{number}", std::process::id());
        self.kubectl.apply(&format!(
            "{{apiVersion: v1, kind: Namespace, metadata: {{name: {name}, labels: {{{labels}}}}}}}"
        ))?;
        let logs = tempfile::Builder::new().prefix(&name).tempdir()?;
        Ok(Namespace {
            name,
            cluster: self,
            logs,
        })
    }
}

impl Namespace<'_> {
    /// A server that answers with its pod's name, with a service account and a Service of its own name.
    ///
    /// # Errors
    /// The API server refuses it.
    pub fn server(&self, name: &str, shape: &PodShape<'_>) -> Result<()> {
        let command = format!("mkdir /tmp/w; hostname >/tmp/w/index.html; exec httpd -f -p {PORT} -h /tmp/w");
        self.pod(name, &command, shape)?;
        self.apply(&format!(
            "{{apiVersion: v1, kind: Service, metadata: {{name: {name}}}, \
              spec: {{selector: {{app: {name}}}, ports: [{{port: 80, targetPort: {PORT}}}]}}}}"
        ))
    }

    /// A pod that does nothing until it is asked to.
    ///
    /// # Errors
    /// The API server refuses it.
    pub fn client(&self, name: &str, shape: &PodShape<'_>) -> Result<()> {
        self.pod(name, "exec sleep 1000000", shape)
    }

    /// A pod with a shell's command, and a service account of the same name.
    ///
    /// # Errors
    /// The API server refuses it.
    pub fn pod(&self, name: &str, command: &str, shape: &PodShape<'_>) -> Result<()> {
        let node = shape
            .node
            .map(|node| format!("nodeSelector: {{kubernetes.io/hostname: {node}}},"));
        let more = |lines: &str| {
            if lines.is_empty() {
                String::new()
            } else {
                format!("{lines},")
            }
        };
        self.apply(&format!(
            "{{apiVersion: v1, kind: ServiceAccount, metadata: {{name: {name}}}}}\n---\n\
             {{apiVersion: v1, kind: Pod, metadata: {{name: {name}, labels: {{{} app: {name}}}}}, \
              spec: {{serviceAccountName: {name}, terminationGracePeriodSeconds: 0, {} {} \
              containers: [{{name: c, image: \"{}\", imagePullPolicy: IfNotPresent, {} command: [sh, -c, {command:?}]}}]}}}}",
            more(shape.labels),
            node.unwrap_or_default(),
            more(shape.spec),
            self.cluster.busybox,
            more(shape.container),
        ))
    }

    /// Manifests in this namespace.
    ///
    /// # Errors
    /// The API server refuses one.
    pub fn apply(&self, manifests: &str) -> Result<()> {
        let named: Vec<String> = manifests
            .split("\n---\n")
            .map(|one| one.replacen("metadata: {", &format!("metadata: {{namespace: {}, ", self.name), 1))
            .collect();
        self.cluster.kubectl.apply(&named.join("\n---\n"))
    }

    /// A folder for the logs of a program of the test.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn log_directory(&self, name: &str) -> Result<PathBuf> {
        let folder = self.logs.path().join(name);
        std::fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
        Ok(folder)
    }

    /// kubectl in this namespace.
    ///
    /// # Errors
    /// It failed.
    pub fn kubectl(&self, words: &[&str]) -> Result<String> {
        self.cluster.kubectl.run(["-n", &self.name].iter().chain(words))
    }

    /// Waits until all of these pods are ready.
    ///
    /// # Errors
    /// One was not in time.
    pub fn ready(&self, pods: &[&str]) -> Result<()> {
        let timeout = format!("--timeout={}s", PATIENCE.as_secs());
        let names: Vec<String> = pods.iter().map(|pod| format!("pod/{pod}")).collect();
        let mut words = vec!["wait", "--for=condition=Ready", &timeout];
        words.extend(names.iter().map(String::as_str));
        self.kubectl(&words).map(drop)
    }

    /// Puts the namespace into the mesh, or takes it out.
    ///
    /// # Errors
    /// The API server refuses it.
    pub fn enrol(&self, wanted: bool) -> Result<()> {
        let label = if wanted {
            "istio.io/dataplane-mode=ambient"
        } else {
            "istio.io/dataplane-mode-"
        };
        let words = ["label", "namespace", &self.name, "--overwrite", label];
        self.cluster.kubectl.run(words).map(drop)
    }

    /// Waits until both of a [`Cluster::pair`] are captured, or neither is.
    ///
    /// # Errors
    /// They are not, in time.
    pub fn pair_captured(&self, wanted: bool) -> Result<()> {
        self.captured("web", wanted)?;
        self.captured("db", wanted)
    }

    /// Waits until the pod says of itself that it is captured, or is not.
    ///
    /// # Errors
    /// It did not in time.
    pub fn captured(&self, pod: &str, wanted: bool) -> Result<()> {
        let path = r"jsonpath={.metadata.annotations.ambient\.istio\.io/redirection}";
        let words = ["-n", &self.name, "get", "pod", pod, "-o", path];
        let expected = if wanted { "enabled" } else { "" };
        self.cluster.kubectl.until(PATIENCE, &words, |said| said == expected)?;
        Ok(())
    }

    /// The pod's own address.
    ///
    /// # Errors
    /// It has none in time.
    pub fn address(&self, pod: &str) -> Result<String> {
        let words = ["-n", &self.name, "get", "pod", pod, "-o", "jsonpath={.status.podIP}"];
        self.cluster.kubectl.until(PATIENCE, &words, |said| !said.is_empty())
    }

    /// Runs a shell's command in a pod.
    ///
    /// # Errors
    /// kubectl could not be started.
    pub fn sh(&self, pod: &str, command: &str) -> Result<Said> {
        let Output { status, stdout, stderr } = self
            .cluster
            .kubectl
            .command()
            .args(["-n", &self.name, "exec", pod, "--", "sh", "-c", command])
            .output()
            .context("cannot start kubectl")?;
        let text = String::from_utf8_lossy(&stdout).into_owned() + &String::from_utf8_lossy(&stderr);
        Ok(Said {
            succeeded: status.success(),
            text: text.trim().to_owned(),
        })
    }

    /// As [`Self::sh`], while the test goes on; what it says goes to a log.
    ///
    /// # Errors
    /// kubectl could not be started.
    pub fn spawn(&self, pod: &str, command: &str) -> Result<Process> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let log = self.log_directory(&format!("{pod}-{number}"))?;
        let kubectl = self.cluster.kubectl.command();
        let mut builder = ProcessBuilder::new(kubectl.get_program(), log);
        for (name, value) in kubectl.get_envs() {
            builder = builder.env(name, value.unwrap_or_default());
        }
        builder
            .args(["-n", &self.name, "exec", pod, "--", "sh", "-c", command])
            .spawn()
    }

    /// One HTTP request from a pod; what the server answered.
    ///
    /// # Errors
    /// kubectl could not be started.
    pub fn ask(&self, client: &str, to: &str) -> Result<Said> {
        self.sh(client, &format!("timeout 5 wget -q -O - http://{to}/"))
    }

    /// Asks until it is answered: a Service's rules follow within seconds.
    ///
    /// # Errors
    /// It is not, in time: what was said last.
    pub fn answered(&self, client: &str, to: &str) -> Result<String> {
        wait_until_ok(&format!("{client} is answered by {to}"), PATIENCE, || {
            let said = self.ask(client, to)?;
            anyhow::ensure!(said.succeeded, "{}", said.text);
            Ok(said.text)
        })
    }

    /// Asks until it is refused.
    ///
    /// # Errors
    /// It is still answered when time is up.
    pub fn refused(&self, client: &str, to: &str) -> Result<()> {
        wait_until_ok(&format!("{client} is refused by {to}"), PATIENCE, || {
            let said = self.ask(client, to)?;
            anyhow::ensure!(!said.succeeded, "it was answered {:?}", said.text);
            Ok(())
        })
    }

    /// How often the pod's containers have been started again.
    ///
    /// # Errors
    /// There is no such pod.
    pub fn restarts(&self, pod: &str) -> Result<String> {
        let path = "jsonpath={.status.containerStatuses[*].restartCount}";
        self.kubectl(&["get", "pod", pod, "-o", path])
    }

    /// The identity of a service account of this namespace.
    pub fn identity(&self, account: &str) -> String {
        format!("spiffe://cluster.local/ns/{}/sa/{account}", self.name)
    }
}

impl Drop for Namespace<'_> {
    fn drop(&mut self) {
        // A failing test tells what is in it first.
        if std::thread::panicking() {
            let words = ["get", "pods,events", "-o", "wide"];
            eprintln!("── {}\n{}", self.name, self.kubectl(&words).unwrap_or_default());
        }
        let words = ["delete", "namespace", &self.name, "--wait=false"];
        if let Err(error) = self.cluster.kubectl.run(words) {
            eprintln!("{} stays: {error:#}", self.name);
        }
    }
}

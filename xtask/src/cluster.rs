//! The cluster that tests of level cluster run on: the rig of tests/kube, built once into the cache and brought up for one
//! run, or whichever cluster `KUBECONFIG` leads to. Where neither can be, it says what is missing. And the API server
//! alone that the benchmark at scale fills.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::{image, run, tree};

/// The image's tag, so that no test takes a released image for the one of this tree.
const TAG: &str = "test";
/// Prefixes of the rigs' namespaces; one rig of a name at a time.
const RIG: &str = "wtcl";
const RIG_OF_SCALE: &str = "wtsc";
/// The rig's image with busybox.
const BUSYBOX: &str = "rig.local/busybox:1";
/// What the rig's scripts call.
const COMMANDS: [&str; 7] = ["bash", "ip", "nsenter", "unshare", "openssl", "sysctl", "python3"];
/// What building it needs beside them.
const BUILDERS: [&str; 4] = ["go", "gcc", "apt-get", "dpkg"];

/// Which cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Choice {
    #[default]
    Rig,
    /// Any that `KUBECONFIG` points at.
    Kubeconfig,
}

impl Choice {
    pub(crate) fn named(name: &str) -> Result<Self> {
        match name {
            "rig" => Ok(Self::Rig),
            "kubeconfig" => Ok(Self::Kubeconfig),
            _ => bail!("there is no cluster {name:?}; it is rig or kubeconfig"),
        }
    }
}

/// A cluster that is up, with Warren's image in it where we could put it there. A rig goes down with this value.
#[derive(Debug)]
pub(crate) struct Cluster {
    environment: Vec<(&'static str, String)>,
    rig: Option<Rig>,
}

#[derive(Debug)]
struct Rig {
    name: &'static str,
    binaries: PathBuf,
}

/// What this machine lacks; empty where tests of level cluster can run.
pub(crate) fn lacks(choice: Choice) -> Vec<String> {
    match choice {
        Choice::Rig => lacks_of_rig(true),
        Choice::Kubeconfig => lacks_of_kubeconfig(),
    }
}

/// What a rig lacks: one with nodes, or an API server alone.
fn lacks_of_rig(for_nodes: bool) -> Vec<String> {
    let mut lacks = Vec::new();
    if std::env::consts::ARCH != "x86_64" {
        lacks.push("a processor of amd64, for which the test cluster is built".to_owned());
    }
    let Some(binaries) = binaries() else {
        lacks.push("a folder for the test cluster: set WARREN_CACHE, or HOME".to_owned());
        return lacks;
    };
    let mut commands = COMMANDS.to_vec();
    if !binaries.join("key").exists() {
        commands.extend(BUILDERS);
    }
    let missing = commands.into_iter().filter(|command| tree::find(command).is_none());
    lacks.extend(missing.map(|command| format!("the command {command}")));
    if !run::is_root() && tree::find("sudo").is_none() {
        lacks.push("root, or sudo".to_owned());
    }
    if for_nodes {
        lacks.extend(lacks_of_nodes(|path| Path::new(path).exists()));
    }
    lacks
}

/// The hierarchies that the nodes' kubelets and daemons work in.
fn lacks_of_nodes(exists: impl Fn(&str) -> bool) -> Vec<String> {
    let wanted = [
        (
            "/sys/fs/cgroup/unified/cgroup.procs",
            "cgroup v2 at /sys/fs/cgroup/unified",
        ),
        ("/sys/fs/cgroup/memory/cgroup.procs", "cgroup v1 below /sys/fs/cgroup"),
    ];
    let missing = wanted.into_iter().filter(|(path, _)| !exists(path));
    missing
        .map(|(_, what)| {
            format!("{what}: the test cluster's nodes need it (`--cluster kubeconfig` uses another cluster)")
        })
        .collect()
}

fn lacks_of_kubeconfig() -> Vec<String> {
    let mut lacks = Vec::new();
    match std::env::var_os("KUBECONFIG") {
        None => lacks.push("KUBECONFIG, the file that leads to the cluster".to_owned()),
        Some(file) if !Path::new(&file).is_file() => {
            lacks.push(format!("the file {} that KUBECONFIG names", Path::new(&file).display()));
        }
        Some(_) => {}
    }
    if kubectl().is_none() {
        lacks.push("the command kubectl".to_owned());
    }
    lacks
}

impl Cluster {
    /// Brings it up, and `istiod` to be started beside it if that is wanted. `warren` is the binary that the image is made of.
    pub(crate) fn up(choice: Choice, istiod: bool, warren: &Path) -> Result<Self> {
        let archive = run::step_of("writing the image of the tests", || image::of_binary(warren, TAG))?;
        let not_installed = tree::target().join("not-installed");
        if let Err(error) = std::fs::remove_file(&not_installed)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            bail!("cannot remove {}: {error}", not_installed.display());
        }
        let mut environment = vec![
            ("WARREN_IMAGE_TAG", TAG.to_owned()),
            ("WARREN_NOT_INSTALLED", not_installed.display().to_string()),
        ];
        match choice {
            Choice::Rig => {
                let rig = Rig::build(RIG)?;
                environment.push(("KUBECONFIG", rig.kubeconfig().display().to_string()));
                environment.extend(rig.environment());
                if istiod {
                    environment.push(("ISTIOD", built_istiod()?.display().to_string()));
                }
                environment.push(("WARREN_RIG", script("rig.sh").display().to_string()));
                environment.push(("WARREN_BUSYBOX", BUSYBOX.to_owned()));
                for (name, program) in [("WARREN_KUBECTL", "kubectl"), ("WARREN_HELM", "helm")] {
                    environment.push((name, rig.binaries.join("bin").join(program).display().to_string()));
                }
                environment.push(("WARREN_ETCD_FOLDER", rig.binaries.join("bin").display().to_string()));
                // From here on it goes down with this value, whether it came up or not.
                let cluster = Self {
                    environment,
                    rig: Some(rig),
                };
                cluster.bring_up(&archive)?;
                Ok(cluster)
            }
            Choice::Kubeconfig => {
                let kubeconfig = std::env::var("KUBECONFIG").context("KUBECONFIG is not set")?;
                let kubectl = kubectl().context("there is no kubectl")?;
                load_into_kind(&kubectl, &archive)?;
                let busybox = std::env::var("WARREN_BUSYBOX").unwrap_or_else(|_| "busybox:stable".to_owned());
                environment.push(("KUBECONFIG", kubeconfig));
                environment.push(("WARREN_KUBECTL", kubectl.display().to_string()));
                environment.push(("WARREN_BUSYBOX", busybox));
                if let Some(helm) = tree::find("helm") {
                    environment.push(("WARREN_HELM", helm.display().to_string()));
                }
                Ok(Self { environment, rig: None })
            }
        }
    }

    fn bring_up(&self, archive: &Path) -> Result<()> {
        let Some(rig) = &self.rig else { return Ok(()) };
        run::step("bringing two nodes up", || run::run(&mut rig.command(&["up", "2"])?))?;
        run::step("putting the image on them", || {
            run::run(&mut rig.command(&["import", &archive.display().to_string()])?)
        })
    }

    pub(crate) fn environment(&self) -> &[(&'static str, String)] {
        &self.environment
    }

    /// What each test's program is started by: within the rig's control plane, from where everything can be reached.
    pub(crate) fn runner(&self) -> Vec<String> {
        let within = self.rig.iter().map(|_| script("rig.sh").display().to_string());
        within.flat_map(|script| [script, "cp".to_owned()]).collect()
    }

    /// `cargo xtask test cluster --cluster kubeconfig` with this rig as the cluster that `KUBECONFIG` leads to, for the
    /// tests that `filters` name; `None` where this cluster is no rig of ours.
    pub(crate) fn by_kubeconfig(&self, filters: &[&str]) -> Result<Option<Command>> {
        let Some(rig) = &self.rig else { return Ok(None) };
        let own = std::env::current_exe().context("this program's own path is not known")?;
        let mut command = rig.command(&["cp", &own.display().to_string()])?;
        command
            .args(["test", "cluster", "--cluster", "kubeconfig", "--"])
            .args(filters)
            .env("KUBECONFIG", rig.kubeconfig())
            .env("WARREN_BUSYBOX", BUSYBOX)
            .current_dir(tree::root());
        Ok(Some(command))
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if std::env::var_os("WARREN_KEEP_CLUSTER").is_some() {
            return;
        }
        if let Some(rig) = &self.rig {
            rig.down();
        }
    }
}

/// `program` in the network of an API server of which nobody else changes the objects, with the way to it in KUBECONFIG.
/// The server comes up with the command and goes down with it, also where a Ctrl-C ends it.
pub(crate) fn beside_api_server(program: &Path, environment: &[(&'static str, String)]) -> Result<Command> {
    let lacks = lacks_of_rig(false);
    if !lacks.is_empty() {
        bail!("an API server cannot run here; there is no {}", lacks.join(", no "));
    }
    let rig = Rig::build(RIG_OF_SCALE)?;
    let definitions = tree::root().join("deploy/manifests/warren-crds.yaml");
    rig.command_with(
        &[
            "alone",
            &definitions.display().to_string(),
            &program.display().to_string(),
        ],
        environment,
    )
}

impl Rig {
    fn build(name: &'static str) -> Result<Self> {
        let binaries = binaries().context("there is no folder for the test cluster")?;
        let rig = Self { name, binaries };
        if tree::find("go").is_none() {
            run::say("no go here: the test cluster is taken as it lies in the cache");
            return Ok(rig);
        }
        run::step("building the test cluster (minutes, the first time)", || {
            run::run(Command::new(script("build.sh")).arg(&rig.binaries))
        })?;
        Ok(rig)
    }

    fn state(&self) -> PathBuf {
        std::env::temp_dir().join(format!("kube-rig-{}", self.name))
    }

    fn kubeconfig(&self) -> PathBuf {
        self.state().join("pki/admin.kubeconfig")
    }

    fn environment(&self) -> [(&'static str, String); 3] {
        [
            ("BIN", self.binaries.display().to_string()),
            ("P", self.name.to_owned()),
            ("RUN", self.state().display().to_string()),
        ]
    }

    fn command(&self, arguments: &[&str]) -> Result<Command> {
        self.command_with(arguments, &[])
    }

    fn command_with(&self, arguments: &[&str], more: &[(&'static str, String)]) -> Result<Command> {
        let script = script("rig.sh").display().to_string();
        let environment = [self.environment().as_slice(), more].concat();
        let mut command = run::as_root(&script, &environment, "the test cluster lives in network namespaces")?;
        command.args(arguments).stdin(Stdio::null());
        Ok(command)
    }

    fn down(&self) {
        if let Err(error) = self.command(&["down"]).and_then(|mut down| run::run(&mut down)) {
            run::say(&format!("the test cluster stays: {error:#}"));
        }
    }
}

/// Where the rig's programs lie, outside every checkout.
fn binaries() -> Option<PathBuf> {
    tree::cache().map(|cache| cache.join("kube"))
}

/// Istio's control plane, from the cache or built into it.
fn built_istiod() -> Result<PathBuf> {
    let folder = tree::cache()
        .context("there is no folder for istiod: set WARREN_CACHE, or HOME")?
        .join("istiod");
    if tree::find("go").is_none() {
        run::say("no go here: istiod is taken as it lies in the cache");
    } else {
        run::step("building istiod (minutes, the first time)", || {
            run::run(Command::new(script("istiod.sh")).arg(&folder))
        })?;
    }
    let program = folder.join("istiod");
    anyhow::ensure!(
        program.is_file(),
        "there is no {}: install go, which builds it",
        program.display()
    );
    Ok(program)
}

fn script(name: &str) -> PathBuf {
    tree::root().join("tests/kube").join(name)
}

fn kubectl() -> Option<PathBuf> {
    let built = binaries().map(|folder| folder.join("bin/kubectl"));
    tree::find("kubectl").or_else(|| built.filter(|path| path.is_file()))
}

/// A cluster of kind takes the image from us; into any other one its owner has to put it.
fn load_into_kind(kubectl: &Path, archive: &Path) -> Result<()> {
    let context = run::read(Command::new(kubectl).args(["config", "current-context"]))?;
    match (context.trim().strip_prefix("kind-"), tree::find("kind")) {
        (Some(name), Some(kind)) => run::run(
            Command::new(kind)
                .args(["load", "image-archive", "--name", name])
                .arg(archive),
        ),
        (Some(_) | None, _) => {
            run::say(&format!(
                "the nodes must already have the image of {}",
                archive.display()
            ));
            Ok(())
        }
    }
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn nodes_lack_the_hierarchies_that_a_machine_with_cgroup_v2_alone_does_not_have() {
        assert_eq!(lacks_of_nodes(|_| true), Vec::<String>::new());
        let lacks = lacks_of_nodes(|path| path == "/sys/fs/cgroup/cgroup.procs");
        assert!(
            lacks[0].contains("cgroup v2 at /sys/fs/cgroup/unified") && lacks[1].contains("cgroup v1"),
            "{lacks:?}"
        );
        // An API server alone has no nodes.
        let alone = lacks_of_rig(false).join("; ");
        assert!(!alone.contains("cgroup"), "{alone}");
    }

    #[test]
    fn a_cluster_that_does_not_exist_is_refused_by_name() {
        assert_eq!(Choice::named("kubeconfig").expect("known"), Choice::Kubeconfig);
        let error = Choice::named("minikube").expect_err("unknown").to_string();
        assert!(
            error.contains("\"minikube\"") && error.contains("rig or kubeconfig"),
            "{error}"
        );
    }
}

//! A world of two nodes on one machine: names, addresses, wires, routes. Namespaces only; who runs in them is `process` and
//! `mesh`, what a cluster would say about them is `manifests`.
//!
//! ```text
//!  PREFIX-a 10.78.0.1 ── wire0 ── 10.78.0.2 PREFIX-b        PREFIX-controller 10.78.1.1 (behind node a)
//!     │ veth per pod                   │ veth per pod
//!  PREFIX-client 10.77.1.10         PREFIX-server 10.77.2.10     (and fd78::, fd77:: alike)
//! ```

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Deref;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::leftovers::{self, Ledger, Leftovers};
use crate::netns::{self, Namespace};
use crate::process::ProcessBuilder;
use crate::{cgroup, manifests};

mod spec;
mod wiring;

use spec::v6_of;
pub use spec::{Node, PodSpec, ServiceSpec};

/// The interface of a node that leads to the other node: what a packet capture of "the wire" listens on.
pub const WIRE: &str = "wire0";

/// Where processes run: a namespace, a cgroup, maybe a CPU.
#[derive(Debug, Clone)]
pub struct Place {
    /// The full name, with the world's prefix: of the namespace, and of the node in the manifests.
    pub name: String,
    pub namespace: Namespace,
    pub cgroup: PathBuf,
    pub cpu: Option<usize>,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    logs: PathBuf,
}

impl Place {
    /// A command that will run here. Its output goes to the world's log directory.
    pub fn command(&self, program: impl AsRef<Path>) -> ProcessBuilder {
        let program = program.as_ref();
        let short = program.file_name().unwrap_or_default().to_string_lossy();
        ProcessBuilder::new(program, self.logs.clone())
            .named(format!("{}-{short}", self.name))
            .in_namespace(&self.namespace)
            .in_cgroup(&self.cgroup)
            .on_cpu(self.cpu)
    }

    pub fn ip(&self, ipv6: bool) -> IpAddr {
        if ipv6 { self.v6.into() } else { self.v4.into() }
    }
}

/// A pod of the world.
#[derive(Debug, Clone)]
pub struct Pod {
    pub spec: PodSpec,
    place: Place,
}

impl Deref for Pod {
    type Target = Place;

    fn deref(&self) -> &Place {
        &self.place
    }
}

/// What a world is built from.
#[derive(Debug, Clone)]
pub struct WorldBuilder {
    prefix: String,
    pods: Vec<PodSpec>,
    services: Vec<ServiceSpec>,
    pin: bool,
    cubic: bool,
}

impl WorldBuilder {
    #[must_use]
    pub fn pod(mut self, spec: PodSpec) -> Self {
        self.pods.push(spec);
        self
    }

    #[must_use]
    pub fn service(mut self, spec: ServiceSpec) -> Self {
        self.services.push(spec);
        self
    }

    /// Node A with its pods on CPU 0, node B with its pods on CPU 1.
    #[must_use]
    pub fn pinned(self, pin: bool) -> Self {
        Self { pin, ..self }
    }

    /// The machine's own congestion control instead of cubic.
    #[must_use]
    pub fn host_congestion_control(self) -> Self {
        Self { cubic: false, ..self }
    }

    /// Builds the namespaces and writes the manifests. What an earlier run under the prefix left is cleared first.
    pub fn start(self) -> Result<World> {
        let run = leftovers::run_directory()?;
        let ledger = Ledger::open(&run, &self.prefix)?;
        let directory = run.join(&self.prefix);
        if directory.exists() {
            fs::remove_dir_all(&directory).with_context(|| format!("remove {}", directory.display()))?;
        }
        let cgroup = cgroup::v2_root()?.join(&self.prefix);
        let pins = directory.join("bpf");
        let logs = directory.join("logs");
        for path in [&directory, &logs, &directory.join("manifests")] {
            fs::create_dir_all(path).with_context(|| format!("create {}", path.display()))?;
        }
        let place = |name: &str, below: &str, v4: Ipv4Addr, v6: Ipv6Addr, cpu: Option<usize>| Place {
            name: format!("{}-{name}", self.prefix),
            namespace: Namespace::named(format!("{}-{name}", self.prefix)),
            cgroup: cgroup.join(below),
            cpu,
            v4,
            v6,
            logs: logs.clone(),
        };
        let node = |node: Node| {
            let number = node.number();
            let v6 = v6_of(format_args!("fd78::{number}"));
            let cpu = self.pin.then(|| node.index());
            place(
                node.letter(),
                &format!("{}/system", node.letter()),
                Ipv4Addr::new(10, 78, 0, number),
                v6,
                cpu,
            )
        };
        let mut world = World {
            nodes: [node(Node::A), node(Node::B)],
            controller: place(
                "controller",
                "controller",
                Ipv4Addr::new(10, 78, 1, 1),
                v6_of(format_args!("fd78::1:1")),
                None,
            ),
            pods: Vec::new(),
            services: self.services,
            leftovers: Leftovers {
                cgroup,
                pins,
                directory: directory.clone(),
                namespaces: Vec::new(),
            },
            prefix: self.prefix,
            directory,
            pin: self.pin,
            cubic: self.cubic,
            ledger,
            kept: false,
        };
        world.build_nodes()?;
        world.add_pods(self.pods)?;
        Ok(world)
    }
}

/// A world that is up. Dropped, it is gone: processes, pins, namespaces, cgroups.
#[derive(Debug)]
pub struct World {
    prefix: String,
    directory: PathBuf,
    nodes: [Place; 2],
    controller: Place,
    pods: Vec<Pod>,
    services: Vec<ServiceSpec>,
    leftovers: Leftovers,
    ledger: Ledger,
    pin: bool,
    cubic: bool,
    kept: bool,
}

impl World {
    /// A world whose namespaces, cgroups and files are named after `prefix`.
    pub fn builder(prefix: impl Into<String>) -> WorldBuilder {
        WorldBuilder {
            prefix: prefix.into(),
            pods: Vec::new(),
            services: Vec::new(),
            pin: false,
            cubic: true,
        }
    }

    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The node itself: its processes are no pod's (kubelet would be one).
    pub fn node(&self, node: Node) -> &Place {
        &self.nodes[node.index()]
    }

    /// The root of what the node's daemon captures: what `--cgroup` gets.
    pub fn node_cgroup(&self, node: Node) -> PathBuf {
        self.leftovers.cgroup.join(node.letter())
    }

    /// The node as its daemon sees it: in a cgroup of its own below `kubepods`, as the DaemonSet's pod.
    pub fn daemon(&self, node: Node) -> Place {
        Place {
            cgroup: self.node_cgroup(node).join("kubepods/warren"),
            ..self.node(node).clone()
        }
    }

    /// Where the node's daemon pins: a directory of its own in the world's bpffs.
    pub fn pin_directory(&self, node: Node) -> PathBuf {
        self.leftovers.pins.join(node.letter())
    }

    pub fn controller(&self) -> &Place {
        &self.controller
    }

    /// The pod of that name. Panics if the world has none.
    #[track_caller]
    pub fn pod(&self, name: &str) -> &Pod {
        match self.pods.iter().find(|pod| pod.spec.name == name) {
            Some(pod) => pod,
            None => panic!("no pod `{name}` in this world"),
        }
    }

    pub fn pods(&self) -> &[Pod] {
        &self.pods
    }

    /// The service of that name. Panics if the world has none.
    #[track_caller]
    pub fn service(&self, name: &str) -> &ServiceSpec {
        match self.services.iter().find(|service| service.name == name) {
            Some(service) => service,
            None => panic!("no service `{name}` in this world"),
        }
    }

    pub fn services(&self) -> &[ServiceSpec] {
        &self.services
    }

    /// The world's files; gone with the world.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    pub fn manifest_directory(&self) -> PathBuf {
        self.directory.join("manifests")
    }

    pub fn log_directory(&self) -> PathBuf {
        self.directory.join("logs")
    }

    /// Every network namespace of the world.
    pub fn namespaces(&self) -> impl Iterator<Item = &Namespace> {
        self.nodes
            .iter()
            .chain([&self.controller])
            .map(|place| &place.namespace)
            .chain(self.pods.iter().map(|pod| &pod.namespace))
    }

    /// Puts a file beside the generated manifests, atomically; `name` ends in `.yaml`.
    pub fn apply(&self, name: &str, yaml: &str) -> Result<()> {
        manifests::write(&self.manifest_directory(), name, yaml)
    }

    pub fn delete_manifest(&self, name: &str) -> Result<()> {
        let path = self.manifest_directory().join(name);
        fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))
    }

    /// Adds pods to the running world and to its manifests.
    pub fn add_pods(&mut self, specs: Vec<PodSpec>) -> Result<()> {
        let from = self.pods.len();
        self.attach_pods(specs)?;
        for pod in &self.pods[from..] {
            self.apply(&manifests::pod_file(&pod.spec), &manifests::pod(pod))?;
        }
        manifests::write_cluster(self)
    }

    /// Adds a pod whose namespace runs and that no manifest mentions yet; [`World::publish_pod`] makes it known.
    pub fn add_unpublished_pod(&mut self, spec: PodSpec) -> Result<()> {
        self.add_unpublished_pods(vec![spec])
    }

    /// Several at once, which costs less than one after the other.
    pub fn add_unpublished_pods(&mut self, specs: Vec<PodSpec>) -> Result<()> {
        self.attach_pods(specs)
    }

    /// Writes the pod's manifest as it is now.
    pub fn publish_pod(&self, name: &str) -> Result<()> {
        self.publish_pods([name])
    }

    pub fn publish_pods<'n>(&self, names: impl IntoIterator<Item = &'n str>) -> Result<()> {
        for name in names {
            let pod = self.pod(name);
            self.apply(&manifests::pod_file(&pod.spec), &manifests::pod(pod))?;
        }
        manifests::write_cluster(self)
    }

    /// Changes what the manifests say about a pod (labels, service account …); its namespace stays as it is.
    pub fn change_pod(&mut self, name: &str, change: impl FnOnce(&mut PodSpec)) -> Result<()> {
        let Some(pod) = self.pods.iter_mut().find(|pod| pod.spec.name == name) else {
            anyhow::bail!("no pod `{name}` in this world");
        };
        change(&mut pod.spec);
        self.publish_pod(name)
    }

    /// Ends the pod: its processes, its namespace, its manifest.
    pub fn delete_pod(&mut self, name: &str) -> Result<()> {
        self.delete_pods([name])
    }

    pub fn delete_pods<'n>(&mut self, names: impl IntoIterator<Item = &'n str>) -> Result<()> {
        let mut deleted = Vec::new();
        for name in names {
            let Some(index) = self.pods.iter().position(|pod| pod.spec.name == name) else {
                anyhow::bail!("no pod `{name}` in this world");
            };
            let pod = self.pods.remove(index);
            self.delete_manifest(&manifests::pod_file(&pod.spec))?;
            deleted.push(pod);
        }
        manifests::write_cluster(self)?;
        let _guard = leftovers::changing();
        for pod in &deleted {
            cgroup::kill_and_remove(&pod.cgroup)?;
        }
        let namespaces: Vec<&str> = deleted.iter().map(|pod| pod.namespace.name()).collect();
        netns::delete(&namespaces)?;
        self.leftovers
            .namespaces
            .retain(|name| !namespaces.contains(&name.as_str()));
        self.ledger.write(&self.leftovers)
    }

    /// Leaves the world up when this process ends; the next one of this prefix clears it.
    pub fn keep(mut self) {
        self.kept = true;
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if self.kept {
            self.ledger.forget();
            return;
        }
        if let Err(error) = self.ledger.clear() {
            eprintln!("the world `{}` is not cleared: {error:#}", self.prefix);
        }
    }
}

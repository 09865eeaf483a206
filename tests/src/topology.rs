//! A world of two nodes on one machine: names, addresses, wires, routes. Namespaces only; who runs in them is `process` and
//! `mesh`, what a cluster would say about them is `manifests`.
//!
//! ```text
//!  PREFIX-a 10.78.0.1 ── wire0 ── 10.78.0.2 PREFIX-b        PREFIX-controller 10.78.1.1 (behind node a)
//!     │ veth per pod                   │ veth per pod
//!  PREFIX-client 10.77.1.10         PREFIX-server 10.77.2.10     (and fd78::, fd77:: alike)
//! ```

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::Deref;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::leftovers::{self, Ledger, Leftovers};
use crate::netns::{self, Namespace};
use crate::process::ProcessBuilder;
use crate::{cgroup, congestion, manifests};

/// The interface of a node that leads to the other node: what a packet capture of "the wire" listens on.
pub const WIRE: &str = "wire0";

/// One of the two nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Node {
    A,
    B,
}

impl Node {
    pub const BOTH: [Self; 2] = [Self::A, Self::B];

    pub fn letter(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
        }
    }

    /// 1 or 2: the third byte of its pods' addresses.
    pub fn number(self) -> u8 {
        match self {
            Self::A => 1,
            Self::B => 2,
        }
    }

    fn index(self) -> usize {
        usize::from(self.number() - 1)
    }

    /// Its pods' ranges, as in `spec.podCIDRs`.
    pub fn pod_ranges(self) -> [String; 2] {
        let number = self.number();
        [format!("10.77.{number}.0/24"), format!("fd77::{number}:0/112")]
    }
}

/// What a pod should be like.
#[derive(Debug, Clone)]
pub struct PodSpec {
    pub name: String,
    pub node: Node,
    /// The Kubernetes namespace.
    pub namespace: String,
    pub service_account: String,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    /// Whether the pod is in the mesh; one that is not is still in the manifests.
    pub in_mesh: bool,
    /// The last number of its addresses; chosen from 10 on if absent.
    pub number: Option<u8>,
    /// Whether its processes run where the node's daemon sees them: below the node's cgroup.
    pub below_node_cgroup: bool,
}

impl PodSpec {
    /// A pod of the mesh, in the namespace `default`, with a service account and a label `app` of its own name.
    pub fn new(name: impl Into<String>, node: Node) -> Self {
        let name = name.into();
        Self {
            node,
            namespace: "default".to_owned(),
            service_account: name.clone(),
            labels: BTreeMap::from([("app".to_owned(), name.clone())]),
            annotations: BTreeMap::new(),
            in_mesh: true,
            number: None,
            below_node_cgroup: true,
            name,
        }
    }

    /// A pod that never joins the mesh.
    pub fn outsider(name: impl Into<String>, node: Node) -> Self {
        Self {
            in_mesh: false,
            ..Self::new(name, node)
        }
    }

    /// Out of sight of every kernel program of the mesh: what the mesh is compared with must not run them.
    #[must_use]
    pub fn beyond_node_cgroup(self) -> Self {
        Self {
            below_node_cgroup: false,
            ..self
        }
    }

    #[must_use]
    pub fn namespace(self, namespace: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            ..self
        }
    }

    #[must_use]
    pub fn service_account(self, service_account: impl Into<String>) -> Self {
        Self {
            service_account: service_account.into(),
            ..self
        }
    }

    #[must_use]
    pub fn label(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.labels.insert(key.into(), value.into());
        self
    }

    #[must_use]
    pub fn annotation(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.annotations.insert(key.into(), value.into());
        self
    }

    #[must_use]
    pub fn number(self, number: u8) -> Self {
        Self {
            number: Some(number),
            ..self
        }
    }
}

/// A Service of one TCP port; its endpoints are the pods of its namespace with the label `app: APP`.
#[derive(Debug, Clone)]
pub struct ServiceSpec {
    pub name: String,
    pub namespace: String,
    pub app: String,
    pub port: u16,
    pub target_port: u16,
    /// The last number of its VIPs, 10.96.0.N and fd96::N.
    pub number: u8,
}

impl ServiceSpec {
    /// A service in the namespace `default` named as the app it selects, its target port that of the service.
    pub fn new(app: impl Into<String>, number: u8, port: u16) -> Self {
        let app = app.into();
        Self {
            name: app.clone(),
            namespace: "default".to_owned(),
            app,
            port,
            target_port: port,
            number,
        }
    }

    #[must_use]
    pub fn namespace(self, namespace: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            ..self
        }
    }

    #[must_use]
    pub fn target_port(self, target_port: u16) -> Self {
        Self { target_port, ..self }
    }

    pub fn v4(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 96, 0, self.number)
    }

    pub fn v6(&self) -> Ipv6Addr {
        v6_of(format_args!("fd96::{}", self.number))
    }
}

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
        self.attach_pods(vec![spec])
    }

    /// Writes the pod's manifest as it is now.
    pub fn publish_pod(&self, name: &str) -> Result<()> {
        let pod = self.pod(name);
        self.apply(&manifests::pod_file(&pod.spec), &manifests::pod(pod))?;
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
        let Some(index) = self.pods.iter().position(|pod| pod.spec.name == name) else {
            anyhow::bail!("no pod `{name}` in this world");
        };
        let pod = self.pods.remove(index);
        self.delete_manifest(&manifests::pod_file(&pod.spec))?;
        manifests::write_cluster(self)?;
        cgroup::kill_and_remove(&pod.cgroup)?;
        netns::delete(&[pod.namespace.name()])
    }

    /// Leaves the world up when this process ends; the next one of this prefix clears it.
    pub fn keep(mut self) {
        self.kept = true;
    }

    fn build_nodes(&mut self) -> Result<()> {
        let _guard = leftovers::changing();
        let places: Vec<Place> = self.nodes.iter().chain([&self.controller]).cloned().collect();
        let names: Vec<&str> = places.iter().map(|place| place.namespace.name()).collect();
        self.leftovers.namespaces = names.iter().map(|name| (*name).to_owned()).collect();
        self.ledger.write(&self.leftovers)?;
        leftovers::mount_bpffs(&self.leftovers.pins)?;
        for node in Node::BOTH {
            cgroup::create(&self.daemon(node).cgroup)?;
        }
        for place in &places {
            cgroup::create(&place.cgroup)?;
        }
        netns::create(&names)?;
        self.prepare(&places)?;
        let (a, b, controller) = (names[0], names[1], names[2]);
        netns::ip_batch(
            &[],
            &[
                format!("link add name {WIRE} netns {a} type veth peer name {WIRE} netns {b}"),
                format!("link add name controller netns {a} type veth peer name eth0 netns {controller}"),
            ],
        )?;
        for node in Node::BOTH {
            let Place { v4, v6, namespace, .. } = self.node(node);
            let other = match node {
                Node::A => Node::B,
                Node::B => Node::A,
            };
            let peer = self.node(other);
            let [pods4, pods6] = other.pod_ranges();
            let mut lines = vec![
                "link set lo up".to_owned(),
                format!("addr add {v4}/24 dev {WIRE}"),
                format!("addr add {v6}/112 dev {WIRE} nodad"),
                format!("link set {WIRE} up"),
                format!("route add {pods4} via {} src {v4}", peer.v4),
                format!("route add {pods6} via {} src {v6}", peer.v6),
            ];
            match node {
                Node::A => lines.extend(attachment_at_node("controller", &self.controller, v4, v6)),
                Node::B => {
                    lines.push(format!("route add {} via {} src {v4}", self.controller.v4, peer.v4));
                    lines.push(format!("route add {} via {} src {v6}", self.controller.v6, peer.v6));
                }
            }
            namespace.ip(&lines)?;
        }
        self.controller.namespace.ip(&attachment_inside(&self.controller))
    }

    fn attach_pods(&mut self, specs: Vec<PodSpec>) -> Result<()> {
        let _guard = leftovers::changing();
        let from = self.pods.len();
        for spec in specs {
            let pod = self.place_pod(spec)?;
            self.pods.push(pod);
        }
        let added = self.pods[from..].to_vec();
        if added.is_empty() {
            return Ok(());
        }
        let names: Vec<&str> = added.iter().map(|pod| pod.namespace.name()).collect();
        self.leftovers
            .namespaces
            .extend(names.iter().map(|name| (*name).to_owned()));
        self.ledger.write(&self.leftovers)?;
        for pod in &added {
            cgroup::create(&pod.cgroup)?;
        }
        netns::create(&names)?;
        self.prepare(&added.iter().map(|pod| pod.place.clone()).collect::<Vec<_>>())?;
        let links: Vec<String> = added
            .iter()
            .map(|pod| {
                let (inside, node) = (pod.namespace.name(), self.node(pod.spec.node).namespace.name());
                format!(
                    "link add name {} netns {node} type veth peer name eth0 netns {inside}",
                    link_name(pod)
                )
            })
            .collect();
        netns::ip_batch(&[], &links)?;
        for node in Node::BOTH {
            let Place { v4, v6, namespace, .. } = self.node(node);
            let mine = added.iter().filter(|pod| pod.spec.node == node);
            let lines: Vec<String> = mine
                .flat_map(|pod| attachment_at_node(&link_name(pod), pod, v4, v6))
                .collect();
            if !lines.is_empty() {
                namespace.ip(&lines)?;
            }
        }
        added
            .iter()
            .try_for_each(|pod| pod.namespace.ip(&attachment_inside(pod)))
    }

    fn place_pod(&self, spec: PodSpec) -> Result<Pod> {
        ensure!(
            self.pods.iter().all(|pod| pod.spec.name != spec.name),
            "two pods named `{}`",
            spec.name
        );
        let taken = |number: u8| {
            self.pods
                .iter()
                .any(|pod| pod.spec.node == spec.node && pod.spec.number == Some(number))
        };
        let number = match spec.number {
            Some(number) => number,
            None => (10..250)
                .find(|number| !taken(*number))
                .context("no address is left on the node")?,
        };
        ensure!(
            !taken(number),
            "two pods numbered {number} on node {}",
            spec.node.letter()
        );
        let third = spec.node.number();
        let name = format!("{}-{}", self.prefix, spec.name);
        let cgroup = match spec.below_node_cgroup {
            true => self.node_cgroup(spec.node).join("kubepods"),
            false => self.leftovers.cgroup.join("beyond"),
        };
        let place = Place {
            namespace: Namespace::named(name.clone()),
            name,
            cgroup: cgroup.join(&spec.name),
            cpu: self.pin.then(|| spec.node.index()),
            v4: Ipv4Addr::new(10, 77, third, number),
            v6: v6_of(format_args!("fd77::{third}:{number}")),
            logs: self.log_directory(),
        };
        Ok(Pod {
            spec: PodSpec {
                number: Some(number),
                ..spec
            },
            place,
        })
    }

    /// Sysctls of fresh namespaces; those of `default` must precede the interfaces.
    fn prepare(&self, places: &[Place]) -> Result<()> {
        let nodes: Vec<&str> = self.nodes.iter().map(|node| node.namespace.name()).collect();
        for place in places {
            place.namespace.sysctls(&[
                ("ipv4/conf/all/rp_filter", "0"),
                ("ipv4/conf/default/rp_filter", "0"),
                // Without this every new IPv6 address waits a second for duplicates that cannot be.
                ("ipv6/conf/all/accept_dad", "0"),
                ("ipv6/conf/default/accept_dad", "0"),
                ("ipv6/conf/default/accept_ra", "0"),
            ])?;
            if nodes.contains(&place.namespace.name()) {
                place
                    .namespace
                    .sysctls(&[("ipv4/ip_forward", "1"), ("ipv6/conf/all/forwarding", "1")])?;
            }
        }
        if self.cubic {
            let namespaces: Vec<&Namespace> = places.iter().map(|place| &place.namespace).collect();
            congestion::use_cubic(&namespaces, &leftovers::run_directory()?)?;
        }
        Ok(())
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
        } else if std::env::var_os("WARREN_KEEP_LOGS").is_none() {
            // Logs of a world that is gone help nobody; losing them is no failure either.
            let _ = fs::remove_dir_all(&self.directory);
        }
    }
}

/// Interface names have at most 15 bytes, pods' names more: the number is unique on its node.
fn link_name(pod: &Pod) -> String {
    format!("pod{}", pod.spec.number.unwrap_or_default())
}

/// The node's end of a pod's veth, as the CNI plugin ptp makes it: a gateway address and a host route.
fn attachment_at_node(link: &str, place: &Place, node4: &Ipv4Addr, node6: &Ipv6Addr) -> Vec<String> {
    let Place { v4, v6, .. } = place;
    vec![
        format!("addr add 169.254.1.1/32 dev {link}"),
        format!("addr add fe80::1/64 dev {link} nodad"),
        format!("link set {link} up"),
        format!("route add {v4}/32 dev {link} src {node4}"),
        format!("route add {v6}/128 dev {link} src {node6}"),
    ]
}

fn attachment_inside(place: &Place) -> Vec<String> {
    let Place { v4, v6, .. } = place;
    vec![
        "link set lo up".to_owned(),
        format!("addr add {v4}/32 dev eth0"),
        format!("addr add {v6}/128 dev eth0 nodad"),
        "link set eth0 up".to_owned(),
        "route add 169.254.1.1/32 dev eth0 scope link".to_owned(),
        format!("route add default via 169.254.1.1 dev eth0 src {v4}"),
        "route add ::/0 via fe80::1 dev eth0".to_owned(),
    ]
}

/// Numbers are written as digits, so that fd77::1:10 belongs to 10.77.1.10.
#[track_caller]
fn v6_of(text: std::fmt::Arguments<'_>) -> Ipv6Addr {
    match text.to_string().parse() {
        Ok(address) => address,
        Err(error) => panic!("{text}: {error}"),
    }
}

//! A node and two pods as network namespaces, steered by the real kernel programs, for the tests of `kernel`. Each world
//! has namespaces and a pin directory of its own; all worlds of a test process share one cgroup.

#![allow(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]
#![allow(dead_code, unused_imports, unreachable_pub, reason = "each test binary uses a part")]

mod cgroup;
mod guard;
mod talk;

pub use guard::Guard;
pub use talk::*;

use cgroup::Membership;
use std::{
    collections::{BTreeSet, HashMap},
    fs,
    io::{self, BufRead, Write},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::{Child, ChildStdout, Command, ExitStatus, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};
use warren::{
    kernel::{Kernel, KernelConfig, PlaintextMode, PodNumber, PodPolicy, Reason, ServiceEntry, Sizes, WorkloadEntry},
    net::{self, Namespace, PodListeners, Role},
};

/// Longer than anything here takes on the slowest machine.
pub const DEADLINE: Duration = Duration::from_secs(10);
/// How long to wait for an answer that should not come.
pub const SILENCE: Duration = Duration::from_millis(1500);

pub const A: [&str; 2] = ["10.77.0.2", "fd77::2"];
pub const B: [&str; 2] = ["10.77.0.3", "fd77::3"];
/// In the cluster's ranges, and nobody's.
pub const NOBODY: [&str; 2] = ["10.77.0.99", "fd77::99"];
pub const VIP: [&str; 2] = ["10.96.0.10", "fd96::10"];
/// The node as the pods see it, outside the ranges.
pub const NODE: [&str; 2] = ["169.254.1.1", "fd00::1"];

/// True if the test may run; says why not otherwise.
fn runs() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIPPED: needs root, for network namespaces and kernel programs");
    }
    root
}

pub struct World {
    name: String,
    pub node: Namespace,
    pub a: Namespace,
    pub b: Namespace,
    pub config: KernelConfig,
    /// `None`: another process made this world and will end it.
    owned: Option<Membership>,
}

const WORLD_NAME: &str = "WARREN_TEST_WORLD";
const WORLD_CGROUP: &str = "WARREN_TEST_CGROUP";

/// In a child: waits until the parent has put it where it belongs.
pub fn wait_for_parent() {
    let mut line = String::new();
    io::stdin().read_line(&mut line).unwrap();
}

/// Another process of the same test binary.
pub struct Helper {
    child: Child,
    lines: io::Lines<io::BufReader<ChildStdout>>,
}

impl Helper {
    /// The rest of the next line that has `marker`.
    pub fn said(&mut self, marker: &str) -> String {
        let mut lines = self.lines.by_ref().map(Result::unwrap);
        let line = lines.find(|line| line.contains(marker));
        let line = line.unwrap_or_else(|| panic!("the child ended without saying {marker}"));
        line.split_once(marker).unwrap().1.to_owned()
    }

    /// As `kill -9` does.
    pub fn kill(&mut self) -> ExitStatus {
        self.child.kill().unwrap();
        self.child.wait().unwrap()
    }

    pub fn end(mut self) {
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

static WORLDS: AtomicU32 = AtomicU32::new(0);

impl World {
    /// `None`: the test may not run, and why has been said.
    pub fn new() -> Option<Self> {
        if !runs() {
            return None;
        }
        let name = format!(
            "warren-test-{}-{}",
            std::process::id(),
            WORLDS.fetch_add(1, Ordering::Relaxed)
        );
        let cgroup = Membership::enter();
        let script = r#"
            set -e
            for n in node a b; do ip netns add $P-$n; ip -n $P-$n link set lo up; done
            N="ip netns exec $P-node"
            $N sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.all.rp_filter=0
            ip -n $P-node addr add fd00::1/128 dev lo nodad
            i=2
            for n in a b; do
              ip -n $P-node link add v$n type veth peer name eth0 netns $P-$n
              ip -n $P-node addr add fe80::1/64 dev v$n nodad
              ip -n $P-node addr add 169.254.1.1/32 dev v$n
              ip -n $P-node link set v$n up
              ip -n $P-$n addr add 10.77.0.$i/32 dev eth0
              ip -n $P-$n addr add fd77::$i/128 dev eth0 nodad
              ip -n $P-$n link set eth0 up
              ip -n $P-$n route add 169.254.1.1 dev eth0 scope link
              ip -n $P-$n route add default via 169.254.1.1 dev eth0
              ip -n $P-$n -6 route add default via fe80::1 dev eth0
              ip -n $P-node route add 10.77.0.$i dev v$n
              ip -n $P-node -6 route add fd77::$i dev v$n
              for f in -4 -6; do
                ip -n $P-$n $f rule add pref 1 fwmark 0x113 lookup 113
                ip -n $P-$n $f route add prohibit default table 113
                ip -n $P-$n $f rule add pref 2 fwmark 0x111 lookup 111
                ip -n $P-$n $f rule add pref 2 fwmark 0x112 lookup 111
                ip -n $P-$n $f route add local default dev lo table 111
              done
              ip netns exec $P-$n sysctl -qw net.ipv4.tcp_fwmark_accept=1
              i=$((i+1))
            done"#;
        shell(&name, script);
        let path = cgroup.path.clone();
        Some(Self::at(name, path, Some(cgroup)))
    }

    /// A world whose pods are guarded in one of the ways there are.
    pub fn guarded_by(guard: Guard) -> Option<Self> {
        let mut world = Self::new()?;
        guard.configure(&mut world.config);
        Some(world)
    }

    /// The world that the parent of this process made.
    pub fn of_parent() -> Option<Self> {
        let (name, cgroup) = (std::env::var(WORLD_NAME).ok()?, std::env::var(WORLD_CGROUP).ok()?);
        Some(Self::at(name, cgroup.into(), None))
    }

    fn at(name: String, cgroup: PathBuf, owned: Option<Membership>) -> Self {
        let open = |part: &str| Namespace::open(Path::new(&format!("/run/netns/{name}-{part}"))).unwrap();
        let config = KernelConfig {
            cgroup: Some(cgroup),
            sizes: Sizes {
                pods: 16,
                pod_details: 64,
                ..Sizes::default()
            },
            ..KernelConfig::at(format!("/sys/fs/bpf/{name}"))
        };
        Self {
            node: open("node"),
            a: open("a"),
            b: open("b"),
            name,
            config,
            owned,
        }
    }

    /// Runs a test of this binary, which must have one, in a process of its own, which finds the world by `of_parent`.
    pub fn spawn(&self, test: &str, cgroup: &Path) -> Helper {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture", "--test-threads=1"])
            .env(WORLD_NAME, &self.name)
            .env(WORLD_CGROUP, self.cgroup())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        fs::write(cgroup.join("cgroup.procs"), child.id().to_string()).unwrap();
        // The child waits for this before it does anything: it is in its cgroup now.
        child.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
        let lines = io::BufReader::new(child.stdout.take().unwrap()).lines();
        Helper { child, lines }
    }

    /// Runs a shell script; `$P` is the prefix of the namespaces' names.
    pub fn shell(&self, script: &str) {
        shell(&self.name, script);
    }

    /// What a command wrote; `$P` is the world's name.
    pub fn output(&self, script: &str) -> String {
        let output = Command::new("sh")
            .args(["-ec", script])
            .env("P", &self.name)
            .output()
            .unwrap();
        assert!(
            output.status.success(),
            "{script}: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        String::from_utf8(output.stdout).unwrap()
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn cgroup(&self) -> &Path {
        self.config.cgroup.as_deref().unwrap()
    }

    /// Where the layout of this daemon is pinned.
    pub fn pins(&self) -> PathBuf {
        self.config.pin_dir.join("v1")
    }

    /// Every pin but the maps.
    pub fn links(&self) -> Vec<PathBuf> {
        let mut found = Vec::new();
        let mut folders = vec![self.pins().join("links"), self.pins().join("pods")];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).unwrap().map(Result::unwrap) {
                if entry.file_type().unwrap().is_dir() {
                    folders.push(entry.path());
                } else {
                    found.push(entry.path());
                }
            }
        }
        found.sort();
        found
    }

    /// Opens the kernel side and tells it of A, B and the ranges.
    pub fn open(&self) -> Kernel {
        let kernel = Kernel::open(&self.config).unwrap();
        let workloads = A
            .iter()
            .chain(&B)
            .map(|address| (ip(address), WorkloadEntry::IN_MESH))
            .collect();
        kernel.sync_workloads(&workloads).unwrap();
        kernel.sync_ranges(&ranges()).unwrap();
        kernel
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if self.owned.is_none() {
            return;
        }
        for part in ["node", "a", "b"] {
            let _ = Command::new("ip")
                .args(["netns", "del", &format!("{}-{part}", self.name)])
                .status();
        }
        let _ = fs::remove_dir_all(&self.config.pin_dir);
    }
}

fn shell(name: &str, script: &str) {
    let status = Command::new("sh").env("P", name).args(["-c", script]).status().unwrap();
    assert!(status.success(), "{script}");
}

pub fn ranges() -> BTreeSet<ipnet::IpNet> {
    ["10.77.0.0/16", "fd77::/16", "10.96.0.0/16", "fd96::/16"]
        .iter()
        .map(|range| range.parse().unwrap())
        .collect()
}

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub fn at(address: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip(address), port)
}

pub const PERMISSIVE: PodPolicy = PodPolicy {
    mode: PlaintextMode::Permissive,
    restricted: false,
    port_modes: Vec::new(),
};

pub fn strict() -> PodPolicy {
    PodPolicy {
        mode: PlaintextMode::Strict,
        ..PERMISSIVE
    }
}

/// A pod with listeners that say who took the connection.
pub struct Captured {
    pub number: PodNumber,
    pub listeners: PodListeners,
}

/// Captures a pod in the order that `Kernel` asks for.
pub fn capture(kernel: &Kernel, namespace: &Namespace, addresses: [&str; 2], policy: &PodPolicy) -> Captured {
    let number = kernel.number_for(namespace.cookie()).unwrap();
    kernel.set_policy(number, policy).unwrap();
    kernel
        .set_addresses(number, &addresses.iter().map(|address| ip(address)).collect())
        .unwrap();
    let listeners = listen(kernel, number, namespace);
    attach(kernel, number, namespace);
    kernel.steer(number, namespace.cookie()).unwrap();
    Captured { number, listeners }
}

pub fn attach(kernel: &Kernel, number: PodNumber, namespace: &Namespace) {
    kernel.guard_pod(number, namespace).unwrap();
    kernel.attach_pod(number, namespace).unwrap();
}

pub fn listen(kernel: &Kernel, number: PodNumber, namespace: &Namespace) -> PodListeners {
    let listeners = net::listen(namespace).unwrap();
    for role in Role::ALL {
        for listener in listeners.of(role) {
            greet(listener.try_clone().unwrap(), &format!("{role:?}"));
        }
    }
    kernel.set_listeners(number, &listeners).unwrap();
    listeners
}

/// Ends the listening of every clone, as the daemon's death would.
pub fn close(listeners: PodListeners) {
    for role in Role::ALL {
        for listener in listeners.of(role) {
            socket2::SockRef::from(listener)
                .shutdown(std::net::Shutdown::Both)
                .unwrap();
        }
    }
}

/// How long the fastest of three attempts takes: the machine may stand still during one.
pub fn fastest(mut attempt: impl FnMut()) -> Duration {
    let attempts = (0..3).map(|_| {
        let start = Instant::now();
        attempt();
        start.elapsed()
    });
    attempts.min().unwrap()
}

pub fn count(kernel: &Kernel, reason: Reason) -> u64 {
    let counters = kernel.counters().unwrap();
    counters
        .into_iter()
        .find(|(counted, _)| *counted == reason)
        .map_or(0, |(_, count)| count)
}

/// What was counted, for the eyes of whoever looks into a failure.
pub fn counted(kernel: &Kernel) -> Vec<(&'static str, u64)> {
    let counters = kernel.counters().unwrap();
    counters
        .into_iter()
        .filter(|(_, count)| *count > 0)
        .map(|(reason, count)| (reason.name(), count))
        .collect()
}

#[track_caller]
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < DEADLINE, "waited in vain: {what}");
        thread::sleep(Duration::from_millis(5));
    }
}

pub fn service(ready: bool, in_mesh: bool) -> HashMap<(IpAddr, u16), ServiceEntry> {
    VIP.iter()
        .map(|vip| ((ip(vip), 80), ServiceEntry::new(ready, in_mesh)))
        .collect()
}

//! The daemon that is measured: the real one, in a network namespace, a process namespace, a cgroup and a bpffs of its own,
//! beside the API server. Its own node's pods have no sandboxes, so that it finds and captures none of them.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::objects::OWN_NODE;
use crate::cgroup;
use crate::leftovers::{self, Ledger, Leftovers};
use crate::mesh::binary;
use crate::netns::{self, Namespace};
use crate::process::{Process, ProcessBuilder};
use crate::wait::{DEADLINE, http_get, wait_until, wait_until_ok};

const PREFIX: &str = "warren-scale";
/// In the network of the rig's control plane, beside the API server and whatever nodes there are.
const ADDRESS: IpAddr = IpAddr::V4(Ipv4Addr::new(172, 30, 0, 200));
const BRIDGE: &str = "br0";
const ADMIN: u16 = 15000;
const METRICS: u16 = 15020;
/// How long it may take to read a cluster.
const READ: Duration = Duration::from_secs(180);
/// Of the clock of /proc.
const TICKS_PER_SECOND: f64 = 100.0;

/// Where daemons run, one after the other. To be made in the network namespace of the rig's control plane.
pub struct Site {
    namespace: Namespace,
    leftovers: Leftovers,
    ledger: Ledger,
}

impl Site {
    pub fn make() -> Result<Self> {
        let run = leftovers::run_directory()?;
        let ledger = Ledger::open(&run, PREFIX)?;
        let leftovers = Leftovers {
            cgroup: cgroup::v2_root()?.join(PREFIX),
            pins: run.join(format!("{PREFIX}-bpf")),
            directory: run.join(PREFIX),
            namespaces: vec![PREFIX.to_owned()],
        };
        let _changing = leftovers::changing();
        ledger.write(&leftovers)?;
        netns::create(&[PREFIX])?;
        netns::ip_batch(
            &[],
            &[
                format!("link add {PREFIX} type veth peer name eth0 netns {PREFIX}"),
                format!("link set {PREFIX} master {BRIDGE} up"),
            ],
        )
        .context("join the network of the API server: is this its network namespace?")?;
        let namespace = Namespace::named(PREFIX);
        namespace.ip(&[
            "link set lo up".to_owned(),
            "link set eth0 up".to_owned(),
            format!("address add {ADDRESS}/24 dev eth0"),
        ])?;
        cgroup::create(&leftovers.cgroup)?;
        leftovers::mount_bpffs(&leftovers.pins)?;
        fs::create_dir_all(&leftovers.directory)?;
        Ok(Self {
            namespace,
            leftovers,
            ledger,
        })
    }

    /// Starts a daemon and waits until it has read the whole cluster.
    pub fn start(&self, kubeconfig: &Path) -> Result<Daemon> {
        let directory = &self.leftovers.directory;
        // Nobody signs anything here, but there must be somebody to ask.
        let (root, token) = (directory.join("root.pem"), directory.join("token"));
        let authority = rcgen::generate_simple_self_signed([PREFIX.to_owned()])?;
        fs::write(&root, authority.cert.pem())?;
        fs::write(&token, "nobody reads this")?;
        let text = |path: &Path| path.display().to_string();
        let flags = [
            ("--node-name", OWN_NODE.to_owned()),
            ("--kubeconfig", text(kubeconfig)),
            ("--ca-address", "https://127.0.0.1:15012".to_owned()),
            ("--ca-root", text(&root)),
            ("--ca-token", text(&token)),
            ("--pin-dir", text(&self.leftovers.pins.join("pins"))),
            ("--cgroup", text(&self.leftovers.cgroup)),
            ("--cni-socket", text(&directory.join("cni.sock"))),
            ("--admin-address", ADDRESS.to_string()),
        ];
        // The daemon wants to see a node's first process; here that is itself.
        let mut process = ProcessBuilder::new("unshare", directory.clone())
            .named("daemon")
            .args(["--pid", "--fork", "--kill-child", "--mount-proc", "--"])
            .arg(binary("warren")?)
            .args(["node", "--no-cni"])
            .args(flags.iter().flat_map(|(flag, value)| [*flag, value.as_str()]))
            .in_namespace(&self.namespace)
            .in_cgroup(&self.leftovers.cgroup)
            .spawn()?;
        let begin = SystemTime::now();
        let ended = |process: &mut Process| format!("the daemon has ended: {}", process.log());
        wait_until_ok("the daemon has read the cluster", READ, || {
            ensure!(process.is_running(), "{}", ended(&mut process));
            let (status, text) = http_get(SocketAddr::new(ADDRESS, METRICS), "/metrics")?;
            ensure!(
                status == 200 && value_of(&text, "warren_snapshot_version") > 0.0,
                "no snapshot yet"
            );
            Ok(())
        })?;
        let children = format!("/proc/{0}/task/{0}/children", process.pid());
        let pid = wait_until("the daemon has a process", DEADLINE, || {
            fs::read_to_string(&children)
                .ok()?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })?;
        Ok(Daemon {
            process,
            pid,
            read_in: begin.elapsed().unwrap_or_default(),
        })
    }

    pub fn log(&self) -> PathBuf {
        self.leftovers.directory.join("daemon.out")
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if let Err(error) = self.ledger.clear() {
            eprintln!("{error:#}");
        }
    }
}

/// What a daemon has cost so far.
#[derive(Debug, Clone, Copy, Default)]
pub struct Spent {
    pub cpu: Duration,
    pub api_requests: u64,
    pub api_bytes: u64,
}

impl Spent {
    pub fn since(self, before: Self) -> Self {
        Self {
            cpu: self.cpu.saturating_sub(before.cpu),
            api_requests: self.api_requests - before.api_requests,
            api_bytes: self.api_bytes - before.api_bytes,
        }
    }
}

/// A snapshot as the daemon's journal has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Publication {
    pub at: SystemTime,
    pub reach: BTreeMap<String, u64>,
}

/// A running daemon.
pub struct Daemon {
    process: Process,
    pid: u32,
    /// From its start to its first snapshot.
    pub read_in: Duration,
}

impl Daemon {
    /// MiB that are resident now, and at most so far.
    pub fn resident(&self) -> Result<(f64, f64)> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid)).context("the daemon is gone")?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().trim_end_matches(" kB").parse::<f64>().ok()
        };
        let (now, most) = (field("VmRSS:"), field("VmHWM:"));
        Ok((now.context("no VmRSS")? / 1024.0, most.context("no VmHWM")? / 1024.0))
    }

    pub fn spent(&self) -> Result<Spent> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).context("the daemon is gone")?;
        let (status, metrics) = http_get(SocketAddr::new(ADDRESS, METRICS), "/metrics")?;
        ensure!(status == 200, "metrics: {status}");
        Ok(Spent {
            cpu: cpu_of(&stat).context("read the daemon's /proc/PID/stat")?,
            api_requests: value_of(&metrics, "warren_api_requests_total") as u64,
            api_bytes: value_of(&metrics, "warren_api_bytes_total") as u64,
        })
    }

    /// The latest snapshots, by their number.
    pub fn publications(&self) -> Result<BTreeMap<u64, Publication>> {
        let (status, text) = http_get(SocketAddr::new(ADDRESS, ADMIN), "/config_dump?section=publications")?;
        ensure!(status == 200, "publications: {status} {text}");
        parse(&text)
    }

    pub fn stop(mut self) -> Result<()> {
        self.process.kill()
    }
}

fn parse(dump: &str) -> Result<BTreeMap<u64, Publication>> {
    let dump: Value = serde_json::from_str(dump)?;
    let list = dump["publications"].as_array().map(Vec::as_slice).unwrap_or_default();
    let read = |entry: &Value| {
        let reach = entry["reach"].as_object()?.iter();
        let publication = Publication {
            at: UNIX_EPOCH + Duration::from_micros(entry["publishedAt"].as_u64()?),
            reach: reach
                .filter_map(|(kind, version)| Some((kind.clone(), version.as_u64()?)))
                .collect(),
        };
        Some((entry["snapshot"].as_u64()?, publication))
    };
    list.iter()
        .map(|entry| read(entry).context("an entry of the journal"))
        .collect()
}

/// User and system time, from the text of `/proc/PID/stat`.
fn cpu_of(stat: &str) -> Option<Duration> {
    // The name may hold spaces and brackets.
    let mut fields = stat.rsplit_once(") ")?.1.split(' ').skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(Duration::from_secs_f64((user + system) as f64 / TICKS_PER_SECOND))
}

/// Of a metric without labels.
fn value_of(metrics: &str, name: &str) -> f64 {
    let mut values = metrics
        .lines()
        .filter_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    values
        .next()
        .and_then(|value| value.trim().parse().ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_proc_says_of_a_process_is_read_whatever_its_name() {
        let stat = "7 (a b) c) S 1 7 7 0 -1 4194560 1 0 0 0 250 125 0 0 20 0 4 0 100 1 1";
        assert_eq!(cpu_of(stat), Some(Duration::from_millis(3_750)));
        assert_eq!(cpu_of("7 (a"), None);
    }

    #[test]
    fn a_journal_is_read_and_one_that_cannot_be_is_no_empty_one() {
        let dump =
            r#"{"version": {}, "publications": [{"snapshot": 7, "publishedAt": 1500000, "reach": {"Pod": 12}}]}"#;
        let publication = Publication {
            at: UNIX_EPOCH + Duration::from_millis(1_500),
            reach: BTreeMap::from([("Pod".to_owned(), 12)]),
        };
        assert_eq!(parse(dump).unwrap(), BTreeMap::from([(7, publication)]));
        assert!(parse(r#"{"publications": [{"snapshot": "x"}]}"#).is_err());
        assert_eq!(value_of("a_total 7\na 3.5\n", "a"), 3.5);
    }
}

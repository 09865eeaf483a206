//! Pods that come and go all the time: what they cost the daemon is given back.
//!
//! `WARREN_CHURN_SECONDS=120` makes it the real thing, with its speed asserted too; it takes a few seconds otherwise.

use std::collections::{HashMap, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use k8s_openapi::jiff::Timestamp;
use warren_tests::churn::{Held, asked_time, quantile};
use warren_tests::process::Follower;
use warren_tests::wait::wait_until_ok;
use warren_tests::{DEADLINE, Mesh, Node, PodSpec, World};

/// Pods that come at once.
const FLOCK: usize = 5;
/// How often: 50 pods a second.
const EVERY: Duration = Duration::from_millis(100);
/// How many flocks there are before the oldest goes.
const ALIVE: usize = 3;
/// Numbers of a node's addresses that flocks take in turn: each is long free again when its turn comes.
const NUMBERS: usize = 200;

fn pods_folder(world: &World) -> Result<PathBuf> {
    let root = world.pin_directory(Node::A);
    let mut layouts = fs::read_dir(&root)
        .with_context(|| format!("read {}", root.display()))?
        .flatten();
    let layout = layouts.next().context("a layout's folder")?;
    Ok(layout.path().join("pods"))
}

/// Pods whose arrival program is attached.
fn attached(folder: &Path) -> usize {
    let pods = fs::read_dir(folder).into_iter().flatten().flatten();
    pods.filter(|pod| pod.path().join("arrive").exists()).count()
}

fn held(world: &World, mesh: &mut Mesh) -> Result<Held> {
    let pins = attached(&pods_folder(world)?);
    let daemon = mesh.daemon_mut(Node::A);
    let pid = daemon.process().pid();
    Ok(Held {
        captured: daemon.metric("warren_captured_pods", &[])? as u64,
        tasks: daemon.metric("warren_tasks", &[])? as u64,
        descriptors: fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64,
        pins,
    })
}

/// What is held once two looks in a row see the same.
fn settled(world: &World, mesh: &mut Mesh) -> Result<Held> {
    let mut last = None;
    wait_until_ok("the daemon is at rest", DEADLINE, || {
        let now = held(world, mesh)?;
        ensure!(now.captured == 1, "{now:?}");
        let is_same = last.as_ref() == Some(&now);
        last = Some(now);
        ensure!(is_same, "it is not");
        Ok(())
    })?;
    last.context("what is held")
}

/// Flocks of pods that come, are captured and go, and how long each pod waited.
struct Churn {
    daemon: Follower,
    flocks: usize,
    alive: VecDeque<Vec<String>>,
    /// Since when a pod that is not captured yet is in the manifests.
    waiting: HashMap<String, SystemTime>,
    latencies: Vec<Duration>,
}

impl Churn {
    /// For as long as `time`, then until the last has gone. How long the pods came for.
    fn run(&mut self, world: &mut World, time: Duration) -> Result<Duration> {
        let begin = Instant::now();
        let mut turns = 0;
        while begin.elapsed() < time {
            self.come(world)?;
            if self.alive.len() > ALIVE {
                self.go(world)?;
            }
            turns += 1;
            self.watch((begin + EVERY * turns).saturating_duration_since(Instant::now()))?;
        }
        let took = begin.elapsed();
        while !self.alive.is_empty() {
            self.go(world)?;
        }
        Ok(took)
    }

    fn come(&mut self, world: &mut World) -> Result<()> {
        let flock = self.flocks;
        self.flocks += 1;
        let names: Vec<String> = (0..FLOCK).map(|pod| format!("p{flock}-{pod}")).collect();
        let specs = names.iter().enumerate().map(|(pod, name)| {
            let number = 20 + (flock * FLOCK + pod) % NUMBERS;
            PodSpec::new(name, Node::A)
                .number(number as u8)
                .service_account("churn")
        });
        world.add_unpublished_pods(specs.collect())?;
        world.publish_pods(names.iter().map(String::as_str).inspect(|name| {
            let place = world.pod(name).namespace.path();
            self.waiting.insert(place.display().to_string(), SystemTime::now());
        }))?;
        self.alive.push_back(names);
        Ok(())
    }

    /// The oldest flock goes, once all of it is captured.
    fn go(&mut self, world: &mut World) -> Result<()> {
        let Some(names) = self.alive.pop_front() else {
            return Ok(());
        };
        let places: Vec<String> = names
            .iter()
            .map(|name| world.pod(name).namespace.path().display().to_string())
            .collect();
        wait_until_ok("a flock is captured", DEADLINE, || {
            self.watch(Duration::ZERO)?;
            let waiting: Vec<_> = places
                .iter()
                .filter(|place| self.waiting.contains_key(*place))
                .collect();
            ensure!(waiting.is_empty(), "{waiting:?} are not");
            Ok(())
        })?;
        world.delete_pods(names.iter().map(String::as_str))
    }

    /// Notes who is captured, for that long.
    fn watch(&mut self, time: Duration) -> Result<()> {
        let begin = Instant::now();
        loop {
            for line in self.daemon.new_lines()? {
                if let Some((at, place)) = captured(&line)
                    && let Some(since) = self.waiting.remove(place)
                {
                    self.latencies.push(at.duration_since(since)?);
                }
            }
            if begin.elapsed() >= time {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// When, by the daemon's clock, and where: whoever makes the next pods meanwhile reads it later.
fn captured(line: &str) -> Option<(SystemTime, &str)> {
    let (time, rest) = line.split_once(char::is_whitespace)?;
    let (_, fields) = rest.split_once("pod captured")?;
    let (_, place) = fields.split_once("place=")?;
    let place = place.split([' ', '"']).find(|word| !word.is_empty())?;
    Some((time.parse::<Timestamp>().ok()?.into(), place))
}

#[test]
fn what_pods_that_come_and_go_cost_is_given_back() -> Result<()> {
    let asked = asked_time();
    let mut world = World::builder("wt-churn").pod(PodSpec::new("stays", Node::A)).start()?;
    let mut mesh = Mesh::builder()
        .env("WARREN_LOG_LEVEL", "info,warren::capture=debug")
        .start(&world)?;
    let mut churn = Churn {
        daemon: mesh.daemon_mut(Node::A).process().follow()?,
        flocks: 0,
        alive: VecDeque::new(),
        waiting: HashMap::new(),
        latencies: Vec::new(),
    };
    // The first flocks fill caches, pools and the allocator.
    churn.run(&mut world, Duration::from_secs(1))?;
    let before = settled(&world, &mut mesh)?;
    let memory = mesh.daemon_mut(Node::A).process().resident_kib()?;
    let first = churn.flocks;
    churn.latencies.clear();

    let took = churn.run(&mut world, asked.unwrap_or(Duration::from_secs(4)))?;
    let pods = (churn.flocks - first) * FLOCK;
    wait_until_ok("everything is given back", DEADLINE, || {
        let now = held(&world, &mut mesh)?;
        ensure!(now.is_back(&before), "{now:?}, and before {before:?}");
        Ok(())
    })?;
    let grown = mesh
        .daemon_mut(Node::A)
        .process()
        .resident_kib()?
        .saturating_sub(memory);
    let rate = pods as f64 / took.as_secs_f64();
    let mut at = |share| quantile(&mut churn.latencies, share);
    let p99 = at(0.99);
    eprintln!(
        "{rate:.0} pods a second for {took:?}: captured {:?} after their manifests (median), {p99:?} (p99), {:?} (last); \
         memory {memory} KiB, then {grown} KiB more",
        at(0.5),
        at(1.0),
    );
    ensure!(
        churn.latencies.len() == pods,
        "{} of {pods} pods were captured",
        churn.latencies.len()
    );
    ensure!(grown < 16_384, "{grown} KiB more after {pods} pods");
    if asked.is_some() {
        let wanted = FLOCK as f64 / EVERY.as_secs_f64();
        ensure!(rate > 0.9 * wanted, "{rate:.0} pods a second, and not {wanted:.0}");
        ensure!(p99 < Duration::from_millis(100), "p99 is {p99:?}");
    }
    Ok(())
}

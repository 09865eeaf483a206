//! Pods that come and go all the time: what they cost the daemon is given back.
//!
//! `WARREN_CHURN_SECONDS=120` makes it the real thing, with its speed asserted too; it takes a few seconds otherwise.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use warren_tests::wait::wait_until_ok;
use warren_tests::{DEADLINE, Mesh, Node, PodSpec, World};

/// Pods that come at once, and how often: 50 a second.
const FLOCK: usize = 10;
const EVERY: Duration = Duration::from_millis(200);

/// What the daemon holds.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    descriptors: usize,
    pinned_pods: usize,
    captured: u64,
    tasks: u64,
}

fn pods_folder(world: &World) -> Result<PathBuf> {
    let root = world.pin_directory(Node::A);
    let mut layouts = fs::read_dir(&root)
        .with_context(|| format!("read {}", root.display()))?
        .flatten();
    let layout = layouts.next().context("a layout's folder")?;
    Ok(layout.path().join("pods"))
}

/// Pods whose arrival program is attached: the last step but the switch.
fn attached(folder: &Path) -> usize {
    let pods = fs::read_dir(folder).into_iter().flatten().flatten();
    pods.filter(|pod| pod.path().join("arrive").exists()).count()
}

fn held(world: &World, mesh: &mut Mesh) -> Result<Held> {
    let daemon = mesh.daemon_mut(Node::A);
    let pid = daemon.process().pid();
    Ok(Held {
        descriptors: fs::read_dir(format!("/proc/{pid}/fd"))?.count(),
        pinned_pods: attached(&pods_folder(world)?),
        captured: daemon.metric("warren_captured_pods", &[])? as u64,
        tasks: daemon.metric("warren_tasks", &[])? as u64,
    })
}

fn resident_kb(mesh: &mut Mesh) -> Result<u64> {
    let pid = mesh.daemon_mut(Node::A).process().pid();
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS")).context("VmRSS")?;
    let number = line.split_ascii_whitespace().nth(1).context("a number")?;
    Ok(number.parse()?)
}

#[test]
fn what_pods_that_come_and_go_cost_is_given_back() -> Result<()> {
    let asked: Option<u64> = std::env::var("WARREN_CHURN_SECONDS")
        .ok()
        .and_then(|text| text.parse().ok());
    let time = Duration::from_secs(asked.unwrap_or(4));
    let mut world = World::builder("wt-churn").pod(PodSpec::new("stays", Node::A)).start()?;
    let mut mesh = Mesh::start(&world)?;
    let folder = pods_folder(&world)?;
    // The first flock fills caches, pools and the allocator.
    let mut latencies = Vec::new();
    churn(&mut world, &folder, &mut latencies, 0)?;
    wait_until_ok("the first flock is forgotten", DEADLINE, || {
        ensure!(attached(&folder) == 1);
        Ok(())
    })?;
    let before = settled(&world, &mut mesh)?;
    let memory = resident_kb(&mut mesh)?;

    latencies.clear();
    let begin = Instant::now();
    let mut flocks = 0_u32;
    while begin.elapsed() < time {
        flocks += 1;
        churn(&mut world, &folder, &mut latencies, flocks as usize)?;
        std::thread::sleep((EVERY * flocks).saturating_sub(begin.elapsed()));
    }
    let took = begin.elapsed();
    wait_until_ok("everything is given back", DEADLINE, || {
        let now = held(&world, &mut mesh)?;
        ensure!(now == before, "{now:?}, and before {before:?}");
        Ok(())
    })?;
    let grown = resident_kb(&mut mesh)?.saturating_sub(memory);
    latencies.sort_unstable();
    let at = |share: f64| latencies[((latencies.len() - 1) as f64 * share) as usize];
    let rate = f64::from(flocks) * FLOCK as f64 / took.as_secs_f64();
    eprintln!(
        "{rate:.0} pods a second for {took:?}: a flock of {FLOCK} captured after {:?} (median), {:?} (p99), {:?} (last); \
         memory {memory} kB, then {grown} kB more",
        at(0.5),
        at(0.99),
        at(1.0),
    );
    ensure!(grown < 16_384, "{grown} kB more after {} pods", flocks as usize * FLOCK);
    if asked.is_some() {
        ensure!(at(0.99) < Duration::from_millis(100), "p99 is {:?}", at(0.99));
    }
    Ok(())
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

/// A flock comes, is captured, and goes. Its latency is that of the slowest, from the manifests on.
fn churn(world: &mut World, folder: &Path, latencies: &mut Vec<Duration>, flock: usize) -> Result<()> {
    let names: Vec<String> = (0..FLOCK).map(|pod| format!("p{flock}-{pod}")).collect();
    // A flock's addresses are free again only when the one before is gone.
    let first = 20 + (flock % 8) * FLOCK;
    for (pod, name) in names.iter().enumerate() {
        let number = u8::try_from(first + pod)?;
        world.add_unpublished_pod(PodSpec::new(name, Node::A).number(number))?;
    }
    wait_until_ok("the flock before is forgotten", DEADLINE, || {
        ensure!(attached(folder) == 1);
        Ok(())
    })?;
    let begin = Instant::now();
    for name in &names {
        world.publish_pod(name)?;
    }
    let deadline = Instant::now() + DEADLINE;
    while attached(folder) < 1 + FLOCK {
        ensure!(Instant::now() < deadline, "the flock is not captured");
        std::thread::sleep(Duration::from_millis(1));
    }
    latencies.push(begin.elapsed());
    for name in &names {
        world.delete_pod(name)?;
    }
    Ok(())
}

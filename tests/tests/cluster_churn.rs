//! Pods of the mesh that come and go as fast as the kubelets make them: what they cost the daemons is given back.
//!
//! `WARREN_CHURN_SECONDS=120` makes it the real thing, with its speed asserted too; it takes a few seconds otherwise.

use anyhow::{Context, Result, ensure};
use std::{
    collections::BTreeMap,
    thread,
    time::{Duration, Instant},
};
use warren_tests::churn::{Held, asked_time, quantile};
use warren_tests::cluster::{AMBIENT, Cluster, PodShape, SYSTEM, cluster, meshed};
use warren_tests::wait::wait_until_ok;

/// Pods at once.
const FLOCK: u32 = 16;
/// In which a job's pods are gone, and what they cost with them.
const REST: Duration = Duration::from_secs(120);

fn held(cluster: &Cluster, node: &str) -> Result<Held> {
    let metric = |name| cluster.metric(node, name, &[]);
    let pins = pins(cluster, node)?;
    let of = |program| pins.iter().filter(|pin| pin.contains(program)).count();
    // A guard becomes a link, which has a pin, when its pod is ten seconds old.
    ensure!(of("/arrive") <= of("/guard-"), "a guard is no link yet: {pins:?}");
    Ok(Held {
        captured: metric("warren_captured_pods")? as u64,
        tasks: metric("warren_tasks")? as u64,
        descriptors: metric("process_open_fds")? as u64,
        pins: pins.len(),
    })
}

fn pins(cluster: &Cluster, node: &str) -> Result<Vec<String>> {
    let Some(rig) = cluster.rig() else {
        return Ok(Vec::new());
    };
    let found = rig.on_node(node, &["find", "/sys/fs/bpf/warren"])?;
    Ok(found.lines().map(str::to_owned).collect())
}

/// What is held once several looks in a row see the same: connections to the API server come and go.
fn settled(cluster: &Cluster, node: &str) -> Result<Held> {
    let (mut last, mut same) = (None, 0);
    wait_until_ok(&format!("the daemon of {node} is at rest"), REST, || {
        let now = held(cluster, node)?;
        same = if last.as_ref() == Some(&now) { same + 1 } else { 0 };
        last = Some(now);
        thread::sleep(Duration::from_millis(500));
        ensure!(same >= 3, "it is not: {last:?}");
        Ok(())
    })?;
    last.context("what is held")
}

/// Pods that do nothing, one after the other, for as long as `time`; how many there were.
fn churn(namespace: &str, name: &str, time: Duration) -> Result<u32> {
    let kubectl = &cluster().kubectl;
    kubectl.apply(&format!(
        "{{apiVersion: batch/v1, kind: Job, metadata: {{name: {name}, namespace: {namespace}}}, \
          spec: {{completions: 100000, parallelism: {FLOCK}, template: {{spec: {{restartPolicy: Never, \
          terminationGracePeriodSeconds: 0, containers: [{{name: c, image: \"{}\", imagePullPolicy: IfNotPresent, \
          command: [\"true\"]}}]}}}}}}}}",
        cluster().busybox
    ))?;
    thread::sleep(time);
    let path = "jsonpath={.status.succeeded}";
    let count = kubectl.run(["-n", namespace, "get", "job", name, "-o", path])?;
    let deadline = format!("--timeout={}s", REST.as_secs());
    kubectl.run([
        "-n",
        namespace,
        "delete",
        "job",
        name,
        "--cascade=foreground",
        &deadline,
    ])?;
    Ok(count.parse().unwrap_or(0))
}

/// How long each pod of a node waited for its capture, from the moment that its sandbox existed and the runtime asked.
fn latencies(cluster: &Cluster, node: &str) -> Result<Vec<Duration>> {
    let log = cluster.kubectl.run(["-n", SYSTEM, "logs", &cluster.daemon(node)?])?;
    let lines = log.lines().filter(|line| line.contains("a pod starts captured"));
    Ok(lines.filter_map(|line| duration(line.split("took=").nth(1)?)).collect())
}

/// `1.5ms`, as durations are logged.
fn duration(text: &str) -> Option<Duration> {
    let text = text.split([' ', '"', '}', ',']).next()?;
    let at = text.find(|letter: char| !letter.is_ascii_digit() && letter != '.')?;
    let (number, unit) = text.split_at(at);
    let seconds = match unit {
        "s" => 1.0,
        "ms" => 1e-3,
        "µs" => 1e-6,
        "ns" => 1e-9,
        _ => return None,
    };
    Some(Duration::from_secs_f64(number.parse::<f64>().ok()? * seconds))
}

#[test]
fn what_pods_that_come_and_go_cost_the_daemons_is_given_back() -> Result<()> {
    let asked = asked_time();
    let time = asked.unwrap_or(Duration::from_secs(10));
    let cluster = meshed();
    let nodes = cluster.nodes()?;
    let namespace = cluster.namespace("churn", AMBIENT)?;
    namespace.client("stays", &PodShape::default())?;
    namespace.ready(&["stays"])?;
    // The first flock fills caches, pools and the allocator.
    churn(&namespace.name, "first", Duration::from_secs(8))?;
    let mut before = BTreeMap::new();
    for node in &nodes {
        let memory = cluster.metric(node, "process_resident_memory_bytes", &[])?;
        before.insert(node, (settled(cluster, node)?, memory, latencies(cluster, node)?.len()));
    }

    let begin = Instant::now();
    let count = churn(&namespace.name, "second", time)?;
    let took = begin.elapsed();
    let mut waited = Vec::new();
    for (node, (_, _, earlier)) in &before {
        waited.extend(latencies(cluster, node)?.into_iter().skip(*earlier));
    }
    ensure!(
        waited.len() >= count as usize,
        "{count} pods ran, and {} were captured",
        waited.len()
    );
    for (node, (before, memory, _)) in &before {
        wait_until_ok(&format!("everything is given back on {node}"), REST, || {
            let now = held(cluster, node)?;
            ensure!(now.is_back(before), "{now:?}, and before {before:?}");
            Ok(())
        })?;
        let grown = (cluster.metric(node, "process_resident_memory_bytes", &[])? - memory) / 1024.0;
        eprintln!(
            "{node}: {before:?}; {:.0} kB resident before, {grown:.0} kB more after",
            memory / 1024.0
        );
        ensure!(grown < 16_384.0, "{node} has {grown} kB more after {count} pods");
    }
    let mut at = |share| quantile(&mut waited, share);
    let p99 = at(0.99);
    eprintln!(
        "{count} pods in {time:?} (with their removal {took:?}); captured {:?} after the sandbox (median), {p99:?} (p99), {:?} (last)",
        at(0.5),
        at(1.0),
    );
    if asked.is_some() {
        ensure!(p99 < Duration::from_millis(100), "p99 is {p99:?}");
    }
    Ok(())
}

//! Updates of the daemons under new connections: the next daemon takes the listeners over, and none fails.

use anyhow::{Context, Result, ensure};
use std::time::Instant;
use warren_tests::{
    DEADLINE,
    cluster::{AMBIENT, Namespace, PATIENCE, PodShape, SYSTEM, cluster, meshed},
    load::{ConnectRate, Traffic},
    mesh::binary,
};

/// So many that the client's own ports, each of which rests a minute after use, last for any rate.
const PORTS: [u16; 4] = [7001, 7002, 7003, 7004];
/// New connections a second, as far as the machine goes.
const RATE: f64 = 200.0;
/// Another rate, for who wants to know how many a machine carries through.
const RATE_VARIABLE: &str = "WARREN_REPLACEMENT_RATE";
/// What even a slow machine carries in two rolling updates.
const FEWEST: u64 = 1000;

fn wanted_rate() -> Result<f64> {
    match std::env::var(RATE_VARIABLE) {
        Ok(value) => value
            .parse()
            .with_context(|| format!("{RATE_VARIABLE} is no number: {value:?}")),
        Err(_) => Ok(RATE),
    }
}

fn captured<'c>(stem: &str, names: &[String]) -> Result<Namespace<'c>> {
    let namespace = meshed().namespace(stem, AMBIENT)?;
    namespace.client("client", &PodShape::on(&names[0]))?;
    namespace.client("server", &PodShape::on(&names[1]))?;
    namespace.ready(&["client", "server"])?;
    for pod in ["client", "server"] {
        namespace.captured(pod, true)?;
    }
    Ok(namespace)
}

/// Has every daemon replaced while new connections come, and returns how the update went: none has failed, none but its own
/// successor took a node, and it is the new daemons that serve.
fn none_fails_while(
    namespace: &Namespace,
    nodes: &[String],
    update: impl FnOnce() -> Result<()>,
) -> Result<ConnectRate> {
    let load = binary("load")?;
    let listen = PORTS.map(|port| format!("--listen=[::]:{port}"));
    let server = namespace.inside("server", &load)?.arg("serve").args(listen).spawn()?;
    server.wait_for_line("listening", DEADLINE)?;
    let started = cluster().daemon_starts()?;
    let before: Vec<String> = nodes.iter().map(|node| cluster().daemon(node)).collect::<Result<_>>()?;

    let to = namespace.address("server")?.parse()?;
    let traffic = Traffic::start(namespace.inside("client", &load)?, to, &PORTS, 512, wanted_rate()?)?;
    update()?;
    let connects = traffic.end()?;
    ensure!(connects.errors == 0, "{connects:?}\n{}", cluster().diagnosis());
    ensure!(connects.rate.operations > FEWEST, "too few: {connects:?}");
    // Who gives its node away waits to be told to end: had it ended, kubelet would have started it again, to take the node back.
    for (pod, starts) in cluster().daemon_starts()? {
        let wanted = started.get(&pod).copied().unwrap_or(1);
        ensure!(starts == wanted, "{pod} was started {starts} times, not {wanted}");
    }
    // The daemons are others, and it is they who served at the end.
    for (node, before) in nodes.iter().zip(&before) {
        ensure!(
            cluster().daemon(node)? != *before,
            "the daemon of {node} was not replaced"
        );
        cluster().access_line(node, &["connection complete", &namespace.name])?;
    }
    Ok(connects)
}

#[test]
fn a_rolling_update_of_the_daemons_fails_no_new_connection() -> Result<()> {
    // Programs of the test run in the pods, which only a cluster on this machine allows.
    let Some(_) = meshed().rig() else { return Ok(()) };
    let nodes = cluster().nodes()?;
    let namespace = captured("replaced", &nodes)?;
    let mut took = Vec::new();
    let connects = none_fails_while(&namespace, &nodes, || {
        for _ in 0..2 {
            let begun = Instant::now();
            cluster().restart_daemons()?;
            took.push(begun.elapsed());
        }
        Ok(())
    })?;
    eprintln!(
        "{} new connections, none of which failed, during two rolling updates ({took:?}): {connects:?}",
        connects.rate.operations
    );
    Ok(())
}

#[test]
fn an_update_fails_none_either_on_a_node_that_kubernetes_takes_for_lost() -> Result<()> {
    let Some(rig) = meshed().rig() else { return Ok(()) };
    let nodes = cluster().nodes()?;
    let namespace = captured("lost", &nodes)?;
    let (kubelet, lost) = (format!("kubelet-{}", nodes[1]), format!("node/{}", nodes[1]));
    let patience = format!("--timeout={}s", PATIENCE.as_secs());
    let connects = none_fails_while(&namespace, &nodes, || {
        let daemon = format!("pod/{}", cluster().daemon(&nodes[1])?);
        rig.run(&["stop", &kubelet])?;
        let begun = (|| {
            let kubectl = &cluster().kubectl;
            kubectl.run(["wait", "--for=condition=Ready=Unknown", &lost, &patience])?;
            kubectl.run(["-n", SYSTEM, "wait", "--for=condition=Ready=False", &daemon, &patience])?;
            // From here on Kubernetes ends the daemon there as soon as it has made the pod of the next.
            cluster().begin_update()
        })();
        rig.run(&["start", &kubelet])?;
        begun?;
        cluster().warren_ready()
    })?;
    eprintln!(
        "{} new connections, none of which failed: {connects:?}",
        connects.rate.operations
    );
    Ok(())
}

//! A rolling update of the daemons under new connections: the next daemon takes the listeners over, and none fails.

use anyhow::{Context, Result, ensure};
use std::time::{Duration, Instant};
use warren_tests::{
    DEADLINE, Process,
    cluster::{Namespace, PodShape, cluster, meshed},
    load::{ConnectRate, Report},
    mesh::binary,
};

const AMBIENT: &str = "istio.io/dataplane-mode: ambient";
const PORT: u16 = 7001;
/// New connections a second, as far as the machine goes.
const RATE: f64 = 500.0;
/// Longer than every daemon takes to be replaced twice.
const SECONDS: u32 = 90;

/// What the traffic says at its end.
fn report(mut traffic: Process) -> Result<ConnectRate> {
    let status = traffic.wait(Duration::from_secs(u64::from(SECONDS) + 60))?;
    ensure!(status.success(), "{}", traffic.log());
    let said = traffic.stdout();
    let line = said.lines().rfind(|line| line.starts_with('{')).context(said.clone())?;
    match serde_json::from_str(line)? {
        Report::Connect(connects) => Ok(connects),
        other => anyhow::bail!("{other:?}"),
    }
}

fn on(node: &str) -> PodShape<'_> {
    PodShape {
        node: Some(node),
        ..PodShape::default()
    }
}

fn captured<'c>(names: &[String]) -> Result<Namespace<'c>> {
    let namespace = meshed().namespace("replaced", AMBIENT)?;
    namespace.client("client", &on(&names[0]))?;
    namespace.client("server", &on(&names[1]))?;
    namespace.ready(&["client", "server"])?;
    for pod in ["client", "server"] {
        namespace.captured(pod, true)?;
    }
    Ok(namespace)
}

#[test]
fn a_rolling_update_of_the_daemons_fails_no_new_connection() -> Result<()> {
    // Programs of the test run in the pods, which only a cluster on this machine allows.
    let Some(_) = meshed().rig() else { return Ok(()) };
    let nodes = cluster().nodes()?;
    let namespace = captured(&nodes)?;
    let load = binary("load")?;
    let listen = format!("--listen=[::]:{PORT}");
    let server = namespace.inside("server", &load)?.args(["serve", &listen]).spawn()?;
    server.wait_for_line("listening", DEADLINE)?;
    let before: Vec<String> = nodes.iter().map(|node| cluster().daemon(node)).collect::<Result<_>>()?;

    let to = format!("--to={}:{PORT}", namespace.address("server")?);
    let mut traffic = namespace
        .inside("client", &load)?
        .args(["connect", &to, "--workers=512"])
        .args([format!("--rate={RATE}"), format!("--seconds={SECONDS}")])
        .spawn()?;
    let mut took = Vec::new();
    for _ in 0..2 {
        let begun = Instant::now();
        cluster().restart_daemons()?;
        took.push(begun.elapsed());
    }
    ensure!(traffic.is_running(), "the traffic ended first: {}", traffic.log());
    let connects = report(traffic)?;
    eprintln!(
        "{} of {} new connections failed during two rolling updates ({took:?}): {connects:?}",
        connects.errors,
        connects.rate.operations + connects.errors
    );
    ensure!(connects.errors == 0, "{connects:?}");
    // A machine that builds without optimisation and carries a cluster beside reaches less than the rate, but not much.
    let expected = RATE * f64::from(SECONDS);
    ensure!(
        connects.rate.operations as f64 > 0.4 * expected,
        "too few: {connects:?}"
    );
    // The daemons are others, and it is they who served at the end.
    for (node, before) in nodes.iter().zip(&before) {
        ensure!(
            cluster().daemon(node)? != *before,
            "the daemon of {node} was not replaced"
        );
        cluster().access_line(node, &["connection complete", &namespace.name])?;
    }
    Ok(())
}

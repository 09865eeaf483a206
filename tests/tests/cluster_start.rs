//! A pod of the mesh is captured before its first container starts, whatever the daemon does; a pod outside never waits.

use anyhow::{Result, ensure};
use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};
use warren_tests::cluster::{AMBIENT, Cluster, Namespace, PATIENCE, PodShape, STRICT, cluster, meshed};

const PODS: u32 = 100;
/// In which they all have run. Pods that wait for a daemon are tried again by the kubelet, later each time.
const ALL_PODS: Duration = Duration::from_secs(600);
/// A server that answers nobody but the mesh.
fn strict_server<'c>(cluster: &'c Cluster, stem: &str) -> Result<Namespace<'c>> {
    let namespace = cluster.namespace(stem, AMBIENT)?;
    namespace.server("db", &PodShape::default())?;
    namespace.ready(&["db"])?;
    namespace.captured("db", true)?;
    namespace.apply(STRICT)?;
    namespace.client("probe", &PodShape::default())?;
    namespace.ready(&["probe"])?;
    namespace.answered("probe", "db")?;
    Ok(namespace)
}

/// Pods whose first instruction is one request, never tried again; how many of them failed.
fn first_connections(namespace: &Namespace<'_>, name: &str) -> Result<u32> {
    let to = namespace.address("db")?;
    namespace.apply(&format!(
        "{{apiVersion: batch/v1, kind: Job, metadata: {{name: {name}}}, spec: {{completions: {PODS}, parallelism: 20, \
          backoffLimit: {PODS}, template: {{spec: {{restartPolicy: Never, terminationGracePeriodSeconds: 0, \
          containers: [{{name: c, image: \"{}\", imagePullPolicy: IfNotPresent, \
          command: [timeout, \"20\", wget, -q, -O, /dev/null, \"http://{to}:8080/\"]}}]}}}}}}}}",
        cluster().busybox
    ))?;
    let done = "jsonpath={.status.succeeded}";
    let wanted = PODS.to_string();
    let words = ["-n", &namespace.name, "get", "job", name, "-o", done];
    cluster().kubectl.until(ALL_PODS, &words, |said| said == wanted)?;
    let failed = namespace.kubectl(&["get", "job", name, "-o", "jsonpath={.status.failed}"])?;
    Ok(failed.parse().unwrap_or(0))
}

/// Brings the daemons back when the test ends, however it ends.
struct Back;

impl Drop for Back {
    fn drop(&mut self) {
        if let Err(error) = cluster().readmit_daemons() {
            eprintln!("the daemons do not come back: {error:#}");
        }
    }
}

#[test]
fn a_hundred_pods_make_their_first_connection_through_the_mesh() -> Result<()> {
    let namespace = strict_server(meshed(), "first")?;
    let failed = first_connections(&namespace, "first")?;
    ensure!(failed == 0, "{failed} first connections failed");
    Ok(())
}

#[test]
fn a_hundred_pods_make_their_first_connection_through_the_mesh_while_daemons_are_replaced() -> Result<()> {
    let namespace = strict_server(meshed(), "restarts")?;
    let over = AtomicBool::new(false);
    let (failed, replaced) = thread::scope(|scope| {
        let replacing = scope.spawn(|| -> Result<u32> {
            let mut times = 0;
            while !over.load(Ordering::Relaxed) {
                cluster().restart_daemons()?;
                times += 1;
            }
            Ok(times)
        });
        let failed = first_connections(&namespace, "first");
        over.store(true, Ordering::Relaxed);
        let replaced = replacing.join().map_err(|_| anyhow::anyhow!("replacing panicked"))?;
        Ok::<_, anyhow::Error>((failed?, replaced?))
    })?;
    eprintln!("{failed} of {PODS} first connections failed while all daemons were replaced {replaced} times");
    ensure!(replaced > 0, "no daemon was replaced meanwhile");
    ensure!(failed == 0, "{failed} first connections failed");
    let events = namespace.kubectl(&["get", "events", "-o", "jsonpath={.items[*].reason}"])?;
    ensure!(!events.contains("CaptureFailed"), "Events tell of captures that failed");
    Ok(())
}

#[test]
fn without_a_daemon_a_pod_outside_starts_and_one_of_the_mesh_waits_and_is_then_captured() -> Result<()> {
    let cluster = meshed();
    let node = cluster.nodes()?.remove(0);
    let (inside, outside) = (cluster.namespace("waits", AMBIENT)?, cluster.namespace("free", "")?);
    let back = Back;
    cluster.withdraw_daemons()?;

    // While there is no daemon: it would wait for ever.
    outside.client("web", &PodShape::on(&node))?;
    outside.ready(&["web"])?;
    inside.client("web", &PodShape::on(&node))?;
    let state = [
        "get",
        "pod",
        "web",
        "-o",
        "jsonpath={.status.containerStatuses[0].state.running}",
    ];
    let until = Instant::now() + Duration::from_secs(8);
    while Instant::now() < until {
        ensure!(
            inside.kubectl(&state)?.is_empty(),
            "a pod of the mesh runs, and nobody captured it"
        );
        thread::sleep(Duration::from_millis(500));
    }
    drop(back);
    inside.ready(&["web"])?;
    inside.captured("web", true)
}

#[test]
fn the_plugin_is_put_back_into_the_chain_when_somebody_takes_it_out() -> Result<()> {
    let cluster = meshed();
    let Some(rig) = cluster.rig() else { return Ok(()) };
    let chain = |node: &str| rig.on_node(node, &["sh", "-c", "cat /etc/cni/net.d/*.conflist"]);
    for node in cluster.nodes()? {
        ensure!(
            chain(&node)?.contains("warren-cni"),
            "{node} has no plugin in its chain"
        );
    }
    let node = cluster.nodes()?.remove(0);
    let original = "for f in /etc/cni/net.d/*.conflist; do python3 - $f <<'P'\n\
                    import json,sys\nf=sys.argv[1]; c=json.load(open(f))\n\
                    c['plugins']=[p for p in c['plugins'] if p['type']!='warren-cni']\n\
                    json.dump(c,open(f+'.new','w'))\nP\nmv $f.new $f; done";
    rig.on_node(&node, &["sh", "-c", original])?;
    warren_tests::wait::wait_until_ok("the plugin is back", PATIENCE, || {
        let chain = chain(&node)?;
        ensure!(chain.contains("warren-cni"), "{chain}");
        Ok(())
    })
}

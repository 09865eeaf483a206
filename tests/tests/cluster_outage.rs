//! Parts of the cluster stop, and the mesh goes on: API server, etcd, controller, a whole node, a daemon.

use anyhow::{Context, Result, ensure};
use std::{
    net::{IpAddr, SocketAddr},
    thread,
    time::{Duration, Instant},
};
use warren_tests::cluster::{AMBIENT, Cluster, Namespace, PATIENCE, PodShape, Rig, STRICT, cluster, meshed};
use warren_tests::wait::{DEADLINE, http_get, wait_until_ok};

/// A daemon pauses three seconds at most before it asks an API server again that was away; the rest is for kubectl.
const SOON: Duration = Duration::from_secs(30);
/// How long the API server stays away.
const AWAY: Duration = Duration::from_secs(120);

/// Web on the first node, db on the second, both captured and under STRICT, so that every answer came through the mesh.
fn pair<'c>(cluster: &'c Cluster, stem: &str) -> Result<(Namespace<'c>, Vec<String>)> {
    let (namespace, nodes) = cluster.pair(stem, AMBIENT)?;
    namespace.pair_captured(true)?;
    namespace.apply(STRICT)?;
    namespace.answered("web", "db")?;
    Ok((namespace, nodes))
}

/// New connections from web to db, one after the other, by a shell that lives in the pod and needs no API server.
struct Traffic<'n> {
    namespace: &'n Namespace<'n>,
}

impl<'n> Traffic<'n> {
    fn start(namespace: &'n Namespace<'n>) -> Result<Self> {
        let to = namespace.address("db")?;
        let ask = format!("timeout 30 wget -q -O /dev/null http://{to}:8080/");
        let one = format!("if {ask}; then echo ok; else echo failed $(date +%T); fi");
        let all = format!("while [ ! -e /tmp/end ]; do {one}; done >/tmp/traffic 2>&1; touch /tmp/ended");
        let said = namespace.sh("web", &format!("setsid sh -c '{all}' </dev/null >/dev/null 2>&1 &"))?;
        ensure!(said.succeeded, "{}", said.text);
        Ok(Self { namespace })
    }

    /// Ends it. How many connections there were; none of them failed.
    fn end(self) -> Result<usize> {
        wait_until_ok("the traffic ends", PATIENCE, || {
            let ended = self
                .namespace
                .sh("web", "touch /tmp/end; sleep 1; test -e /tmp/ended")?;
            ensure!(ended.succeeded, "{}", ended.text);
            Ok(())
        })?;
        let said = self
            .namespace
            .sh("web", "grep -c ok /tmp/traffic; grep failed /tmp/traffic | head -20")?;
        let mut lines = said.text.lines();
        let answered: usize = lines.next().context("no count")?.parse()?;
        let failures: Vec<&str> = lines.filter(|line| line.starts_with("failed")).collect();
        ensure!(
            failures.is_empty(),
            "{answered} were answered, and these failed: {failures:?}"
        );
        ensure!(answered > 0, "there was no traffic");
        Ok(answered)
    }
}

/// Where the daemons serve readiness and metrics; asked directly, as the API server may be away.
fn daemons(cluster: &Cluster, nodes: &[String]) -> Result<Vec<IpAddr>> {
    nodes
        .iter()
        .map(|node| {
            let pod = cluster.daemon(node)?;
            let words = [
                "-n",
                "warren-system",
                "get",
                "pod",
                &pod,
                "-o",
                "jsonpath={.status.podIP}",
            ];
            Ok(cluster.kubectl.run(words)?.parse()?)
        })
        .collect()
}

/// What the daemon answers; asked again where it is the connection that fails.
fn get(daemon: IpAddr, port: u16, path: &str) -> Result<(u16, String)> {
    let address = SocketAddr::new(daemon, port);
    wait_until_ok(&format!("{address} answers"), DEADLINE, || http_get(address, path))
}

fn is_ready(daemon: IpAddr) -> Result<()> {
    let (status, body) = get(daemon, 15021, "/healthz/ready")?;
    ensure!(status == 200, "{daemon} is not ready: {body}");
    Ok(())
}

fn silence(daemon: IpAddr) -> Result<f64> {
    let (_, body) = get(daemon, 15020, "/metrics")?;
    let line = body.lines().find(|line| line.starts_with("warren_api_silent_seconds"));
    let value = line
        .and_then(|line| line.rsplit(' ').next())
        .context("no such metric")?;
    Ok(value.parse()?)
}

/// Ends a pod's sandbox behind the API server's back: the kubelet makes a new one, with a new address.
fn move_pod(rig: Rig<'_>, node: &str, namespace: &str, pod: &str) -> Result<()> {
    let filter = format!(
        "labels.\"io.kubernetes.pod.name\"=={pod},labels.\"io.kubernetes.pod.namespace\"=={namespace},\
         labels.\"io.cri-containerd.kind\"==sandbox"
    );
    let sandbox = rig.on_node(node, &["ctr", "-n", "k8s.io", "containers", "ls", "-q", &filter])?;
    let sandbox = sandbox.trim();
    ensure!(!sandbox.is_empty(), "no sandbox of {namespace}/{pod} on {node}");
    rig.on_node(
        node,
        &["ctr", "-n", "k8s.io", "tasks", "kill", "-s", "SIGKILL", sandbox],
    )?;
    Ok(())
}

#[test]
fn no_connection_fails_while_the_api_server_is_away_and_what_moved_is_right_at_once_after() -> Result<()> {
    let Some(rig) = cluster().rig() else { return Ok(()) };
    let (namespace, nodes) = pair(meshed(), "away")?;
    namespace.server("moved", &PodShape::on(&nodes[1]))?;
    namespace.ready(&["moved"])?;
    namespace.captured("moved", true)?;
    namespace.answered("web", "moved")?;
    let (before, daemons) = (namespace.address("moved")?, daemons(cluster(), &nodes)?);
    let traffic = Traffic::start(&namespace)?;

    rig.run(&["stop", "kube-apiserver"])?;
    let stopped = Instant::now();
    move_pod(rig, &nodes[1], &namespace.name, "moved")?;
    while stopped.elapsed() < AWAY {
        for daemon in &daemons {
            is_ready(*daemon)?;
        }
        thread::sleep(Duration::from_secs(1));
    }
    for daemon in &daemons {
        let silence = silence(*daemon)?;
        ensure!(
            silence > 60.0,
            "{daemon} says that it heard of the API server {silence} s ago"
        );
    }
    rig.run(&["start", "kube-apiserver"])?;

    let words = [
        "-n",
        &namespace.name,
        "get",
        "pod",
        "moved",
        "-o",
        "jsonpath={.status.podIP}",
    ];
    let after = cluster()
        .kubectl
        .until(PATIENCE, &words, |address| !address.is_empty() && address != before)?;
    let known = Instant::now();
    namespace.captured("moved", true)?;
    ensure!(namespace.answered("web", &format!("{after}:8080"))? == "moved");
    ensure!(
        known.elapsed() < SOON,
        "right {:?} after the API server knew",
        known.elapsed()
    );
    let answered = traffic.end()?;
    eprintln!("{answered} connections, none failed");
    Ok(())
}

#[test]
fn etcd_restarts_and_no_connection_fails_and_the_next_label_counts() -> Result<()> {
    let Some(rig) = cluster().rig() else { return Ok(()) };
    let (namespace, nodes) = pair(meshed(), "etcd")?;
    let traffic = Traffic::start(&namespace)?;
    rig.run(&["stop", "etcd"])?;
    rig.run(&["start", "etcd"])?;
    namespace.server("later", &PodShape::on(&nodes[0]))?;
    namespace.ready(&["later"])?;
    namespace.captured("later", true)?;
    namespace.answered("web", "later")?;
    traffic.end().map(drop)
}

#[test]
fn a_node_restarts_and_its_pods_come_back_captured() -> Result<()> {
    let Some(rig) = cluster().rig() else { return Ok(()) };
    let (namespace, nodes) = pair(meshed(), "node")?;
    let number = nodes[1].trim_start_matches('n');
    rig.run(&["node-down", number])?;
    rig.run(&["node-up", number])?;
    cluster().warren_ready()?;
    wait_until_ok("db runs again", PATIENCE, || {
        ensure!(namespace.restarts("db")? != "0", "it has not been started again");
        namespace.ready(&["db"])
    })?;
    namespace.captured("db", true)?;
    // Under STRICT: it is through the mesh, or not at all.
    namespace.answered("web", "db").map(drop)
}

#[test]
fn traffic_goes_on_without_the_controller() -> Result<()> {
    let (namespace, _) = pair(meshed(), "headless")?;
    let traffic = Traffic::start(&namespace)?;
    let scale = |replicas: &str| {
        let words = ["-n", "warren-system", "scale", "deployment/warren-controller", replicas];
        cluster().kubectl.run(words)
    };
    scale("--replicas=0")?;
    let pods = [
        "-n",
        "warren-system",
        "get",
        "pods",
        "-l",
        "app.kubernetes.io/name=warren-controller",
        "-o",
        "name",
    ];
    let gone = cluster().kubectl.until(PATIENCE, &pods, str::is_empty);
    let answered = gone.and_then(|_| namespace.answered("web", "db"));
    scale("--replicas=2")?;
    answered?;
    cluster().warren_ready()?;
    traffic.end().map(drop)
}

#[test]
fn a_daemon_that_is_killed_comes_back_and_serves_the_same_pods() -> Result<()> {
    let Some(rig) = cluster().rig() else { return Ok(()) };
    let (namespace, nodes) = pair(meshed(), "killed")?;
    for node in &nodes {
        rig.on_node(node, &["pkill", "-KILL", "-x", "warren"])?;
        namespace.answered("web", "db")?;
    }
    cluster().warren_ready()?;
    ensure!(namespace.restarts("web")? == "0" && namespace.restarts("db")? == "0");
    Ok(())
}

//! Policies on a real Kubernetes: under STRICT the kubelet's probes pass and see the address they always saw, and whoever
//! else comes in plaintext is refused, by whichever way.

use anyhow::{Context, Result, ensure};
use std::{thread, time::Duration};
use warren_tests::cluster::{AMBIENT, Cluster, Namespace, PATIENCE, PodShape, STRICT, cluster, meshed};
use warren_tests::wait::wait_until_ok;

/// Of the servers.
const PORT: u16 = 8080;

/// A captured server on the second node of a namespace that is STRICT, and the names of the nodes.
fn strict<'c>(cluster: &'c Cluster, stem: &str) -> Result<(Namespace<'c>, Vec<String>)> {
    let (namespace, nodes) = cluster.pair(stem, AMBIENT)?;
    namespace.pair_captured(true)?;
    namespace.apply(STRICT)?;
    Ok((namespace, nodes))
}

/// A client of a namespace outside the mesh.
fn outsider<'c>(cluster: &'c Cluster, shape: &PodShape<'_>) -> Result<Namespace<'c>> {
    let outside = cluster.namespace("outside", "")?;
    outside.client("web", shape)?;
    outside.ready(&["web"])?;
    Ok(outside)
}

fn db(namespace: &Namespace<'_>) -> Result<String> {
    Ok(format!("{}:8080", namespace.address("db")?))
}

#[test]
fn a_client_of_the_mesh_is_answered_under_strict_and_one_outside_is_refused() -> Result<()> {
    let (namespace, nodes) = strict(meshed(), "strict")?;
    let outside = outsider(cluster(), &PodShape::on(&nodes[0]))?;
    let to = db(&namespace)?;
    outside.refused("web", &to)?;
    namespace.answered("web", &to)?;
    Ok(())
}

#[test]
fn without_strict_a_client_outside_is_answered() -> Result<()> {
    let (namespace, nodes) = strict(meshed(), "permissive")?;
    let outside = outsider(cluster(), &PodShape::on(&nodes[0]))?;
    let to = db(&namespace)?;
    outside.refused("web", &to)?;
    namespace.kubectl(&["delete", "peerauthentication", "strict"])?;
    outside.answered("web", &to)?;
    Ok(())
}

#[test]
fn a_process_of_another_pod_of_the_same_node_is_refused_under_strict() -> Result<()> {
    let (namespace, nodes) = strict(meshed(), "samenode")?;
    let outside = outsider(cluster(), &PodShape::on(&nodes[1]))?;
    outside.refused("web", &db(&namespace)?)
}

#[test]
fn a_host_network_pod_of_the_same_node_is_refused_under_strict() -> Result<()> {
    let (namespace, nodes) = strict(meshed(), "hostpod")?;
    let host = PodShape {
        spec: "hostNetwork: true",
        ..PodShape::on(&nodes[1])
    };
    let outside = outsider(cluster(), &host)?;
    outside.refused("web", &db(&namespace)?)
}

#[test]
fn a_client_through_a_node_port_is_refused_under_strict_and_answered_without() -> Result<()> {
    let (namespace, nodes) = strict(meshed(), "nodeport")?;
    namespace.apply(
        "{apiVersion: v1, kind: Service, metadata: {name: outer}, \
          spec: {type: NodePort, selector: {app: db}, ports: [{port: 80, targetPort: 8080}]}}",
    )?;
    let port = namespace.kubectl(&["get", "service", "outer", "-o", "jsonpath={.spec.ports[0].nodePort}"])?;
    // The first node forwards to the pod of the second, masqueraded to its own address; the second to its own pod.
    let outside = outsider(cluster(), &PodShape::on(&nodes[0]))?;
    let addresses: Vec<String> = nodes.iter().map(|node| node_address(node)).collect::<Result<_>>()?;
    for address in &addresses {
        outside.refused("web", &format!("{address}:{port}"))?;
    }
    namespace.kubectl(&["delete", "peerauthentication", "strict"])?;
    for address in &addresses {
        outside.answered("web", &format!("{address}:{port}"))?;
    }
    Ok(())
}

fn node_address(node: &str) -> Result<String> {
    let path = "jsonpath={.status.addresses[?(@.type==\"InternalIP\")].address}";
    let text = cluster().kubectl.run(["get", "node", node, "-o", path])?;
    text.split_whitespace()
        .next()
        .map(str::to_owned)
        .context("a node without an address")
}

/// A pod with one kind of probe, in a namespace that is STRICT: ready, and still ready and not restarted later.
fn probed(stem: &str, probe: &str) -> Result<()> {
    let (namespace, nodes) = strict(meshed(), stem)?;
    let lines = all_probes(PORT, probe);
    let shape = PodShape {
        container: &lines,
        ..PodShape::on(&nodes[1])
    };
    namespace.server("probed", &shape)?;
    stays_ready(&namespace, "probed")
}

/// Ready in a namespace that is STRICT, and still ready and not restarted later.
fn stays_ready(namespace: &Namespace<'_>, pod: &str) -> Result<()> {
    namespace.ready(&[pod])?;
    namespace.captured(pod, true)?;
    // What is watched for is that nothing happens, for several periods of both probes.
    thread::sleep(Duration::from_secs(6));
    namespace.ready(&[pod])?;
    ensure!(
        namespace.restarts(pod)? == "0",
        "a probe failed and the container was started again"
    );
    let path = r#"jsonpath={range .items[*]}{.message}{"\n"}{end}"#;
    let told = namespace.kubectl(&["get", "events", "--field-selector", "reason=Unhealthy", "-o", path])?;
    let failed: Vec<&str> = told
        .lines()
        .filter(|line| !line.is_empty() && !line.starts_with("Startup probe"))
        .collect();
    ensure!(failed.is_empty(), "{failed:?}");
    Ok(())
}

/// Readiness and liveness by this probe, both from when the server listens on `port`: an exec probe sees that, which no
/// policy touches.
fn all_probes(port: u16, probe: &str) -> String {
    format!(
        "startupProbe: {{exec: {{command: [sh, -c, \"cat /proc/net/tcp* | grep -qi ':{port:04x} [0:]* 0a '\"]}}, \
           periodSeconds: 1, timeoutSeconds: 30, failureThreshold: 120}}, \
         readinessProbe: {{{probe}, periodSeconds: 1, timeoutSeconds: 30, failureThreshold: 1}}, \
         livenessProbe: {{{probe}, periodSeconds: 1, timeoutSeconds: 30, failureThreshold: 2}}"
    )
}

/// etcd answers the gRPC health protocol on its clients' port.
#[test]
fn grpc_probes_pass_under_strict() -> Result<()> {
    let Ok(programs) = std::env::var("WARREN_ETCD_FOLDER") else {
        eprintln!("SKIPPED: WARREN_ETCD_FOLDER does not say where the nodes have etcd, the server of this test");
        return Ok(());
    };
    let (namespace, nodes) = strict(meshed(), "grpc")?;
    let container = format!(
        "volumeMounts: [{{name: programs, mountPath: /programs, readOnly: true}}], {}",
        all_probes(2379, "grpc: {port: 2379}")
    );
    let shape = PodShape {
        spec: &format!("volumes: [{{name: programs, hostPath: {{path: {programs}}}}}]"),
        container: &container,
        ..PodShape::on(&nodes[1])
    };
    let serve = "exec /programs/etcd --data-dir /tmp/etcd --listen-peer-urls http://127.0.0.1:2380 \
                 --listen-client-urls http://0.0.0.0:2379 --advertise-client-urls http://127.0.0.1:2379";
    namespace.pod("probed", serve, &shape)?;
    stays_ready(&namespace, "probed")
}

#[test]
fn http_probes_pass_under_strict() -> Result<()> {
    probed("http", "httpGet: {path: /, port: 8080}")
}

#[test]
fn tcp_probes_pass_under_strict() -> Result<()> {
    probed("tcp", "tcpSocket: {port: 8080}")
}

#[test]
fn exec_probes_pass_under_strict() -> Result<()> {
    probed("exec", "exec: {command: [cat, /tmp/w/index.html]}")
}

#[test]
fn a_probe_comes_from_the_nodes_own_address() -> Result<()> {
    let (namespace, nodes) = strict(meshed(), "seen")?;
    let shape = PodShape {
        container: "readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}",
        ..PodShape::on(&nodes[1])
    };
    let serve = "mkdir /tmp/w; hostname >/tmp/w/index.html; exec httpd -f -vv -p 8080 -h /tmp/w";
    namespace.pod("seen", serve, &shape)?;
    namespace.ready(&["seen"])?;
    let of_node = node_address(&nodes[1])?;
    // A ptp network's host end has the first address of the node's pod range.
    let range = cluster()
        .kubectl
        .run(["get", "node", &nodes[1], "-o", "jsonpath={.spec.podCIDR}"])?;
    let gateway = range.replace(".0/24", ".1");
    wait_until_ok("the probe's address is logged", PATIENCE, || {
        let log = namespace.kubectl(&["logs", "seen"])?;
        ensure!(log.contains(&of_node) || log.contains(&gateway), "it saw {log:?}");
        Ok(())
    })
}

#[test]
fn a_policy_admits_one_identity_and_denies_the_other() -> Result<()> {
    let cluster = meshed();
    let nodes = cluster.nodes()?;
    let namespace = cluster.namespace("allow", AMBIENT)?;
    namespace.server("db", &PodShape::on(&nodes[1]))?;
    namespace.client("web", &PodShape::on(&nodes[0]))?;
    namespace.client("batch", &PodShape::on(&nodes[0]))?;
    namespace.ready(&["db", "web", "batch"])?;
    for pod in ["db", "web", "batch"] {
        namespace.captured(pod, true)?;
    }
    namespace.answered("batch", "db")?;
    namespace.apply(&format!(
        "{{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {{name: web-only}}, \
          spec: {{selector: {{matchLabels: {{app: db}}}}, action: ALLOW, \
          rules: [{{from: [{{source: {{principals: [\"cluster.local/ns/{}/sa/web\"]}}}}]}}]}}}}",
        namespace.name
    ))?;
    namespace.refused("batch", "db")?;
    namespace.answered("web", "db")?;
    cluster
        .access_line(
            &nodes[1],
            &[&namespace.identity("batch"), "inbound", "policy rejection"],
        )
        .map(drop)
}

#[test]
fn a_policy_that_cannot_be_understood_denies_and_is_counted() -> Result<()> {
    let (namespace, nodes) = strict(meshed(), "broken")?;
    namespace.answered("web", "db")?;
    namespace.apply(
        "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: broken}, \
          spec: {action: ALLOW, rules: [{from: [{source: {ipBlocks: [nowhere]}}]}]}}",
    )?;
    namespace.refused("web", "db")?;
    wait_until_ok("the flaw is counted", PATIENCE, || {
        let flaws = cluster().metric(&nodes[1], "warren_manifest_errors", &[])?;
        ensure!(flaws >= 1.0, "it counts {flaws}");
        Ok(())
    })?;
    namespace.kubectl(&["delete", "authorizationpolicy", "broken"])?;
    namespace.answered("web", "db").map(drop)
}

//! `warren install`, `check` and `uninstall`, and Helm, on a real Kubernetes: what they say is so, and in the end nothing
//! is left behind.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::{process::Command, sync::OnceLock, time::Duration};
use warren_tests::cluster::{AMBIENT, Cluster, Namespace, PATIENCE, PodShape, Rig, SYSTEM, Told, meshed};
use warren_tests::wait::wait_until_ok;

const REMOVAL: Duration = Duration::from_secs(90);
/// Everything on a node, and in the namespaces of its pods, that Warren could have left.
const TRACES: &str = "ls -d /sys/fs/bpf/warren* /opt/cni/bin/warren-cni /etc/cni/net.d/warren /run/warren/* 2>/dev/null; \
                      grep -l warren /etc/cni/net.d/*list 2>/dev/null; \
                      for ns in /run/netns/*; do nsenter --net=$ns ip rule; nsenter --net=$ns ip -6 rule; \
                      nsenter --net=$ns ip route show table all; nsenter --net=$ns ip -6 route show table all; done | \
                      grep -e fwmark -e 'table [0-9]' ; true";

/// Warren, installed for this file's tests alone: what earlier ones left in counters is gone with the daemons.
fn fresh() -> Result<&'static Cluster> {
    static FRESH: OnceLock<()> = OnceLock::new();
    let cluster = meshed();
    if FRESH.set(()).is_ok() {
        removed(cluster)?;
        cluster.install_warren()?;
    }
    Ok(cluster)
}

fn removed(cluster: &Cluster) -> Result<()> {
    ended_well("uninstall", &cluster.warren(&["uninstall"])?)
}

fn ended_well(what: &str, told: &Told) -> Result<()> {
    ensure!(
        told.code == Some(0),
        "warren {what}: {:?}\n{}{}",
        told.code,
        told.stdout,
        told.stderr
    );
    Ok(())
}

/// What `check` finds.
struct Findings {
    /// By name and subject.
    found: Vec<(String, String)>,
    code: Option<i32>,
}

fn findings(cluster: &Cluster) -> Result<Findings> {
    let told = cluster.warren(&["check", "--output", "json"])?;
    let listed: Value = serde_json::from_str(&told.stdout).with_context(|| told.stderr.clone())?;
    let text = |finding: &Value, field: &str| finding[field].as_str().unwrap_or_default().to_owned();
    let all = listed.as_array().into_iter().flatten();
    Ok(Findings {
        found: all.map(|one| (text(one, "name"), text(one, "subject"))).collect(),
        code: told.code,
    })
}

fn is_well(cluster: &Cluster) -> Result<()> {
    wait_until_ok("check finds nothing", PATIENCE, || {
        let Findings { found, code } = findings(cluster)?;
        ensure!(found.is_empty() && code == Some(0), "{found:?}, exit code {code:?}");
        Ok(())
    })
}

/// `check` names the fault that is in the cluster now, with a subject that holds `subject`.
fn is_named(cluster: &Cluster, name: &str, subject: &str) -> Result<()> {
    wait_until_ok(&format!("check names {name}"), PATIENCE, || {
        let found = findings(cluster)?.found;
        let named = found
            .iter()
            .any(|(found, about)| found == name && about.contains(subject));
        ensure!(named, "it found {found:?}");
        Ok(())
    })
}

fn pair<'c>(cluster: &'c Cluster, stem: &str) -> Result<(Namespace<'c>, Vec<String>)> {
    let (namespace, nodes) = cluster.pair(stem, AMBIENT)?;
    namespace.pair_captured(true)?;
    namespace.answered("web", "db")?;
    Ok((namespace, nodes))
}

/// Nothing of Warren's is on the nodes; their pods are what they were before.
fn no_trace(rig: Rig<'_>, nodes: &[String]) -> Result<()> {
    for node in nodes {
        wait_until_ok(&format!("nothing is left on {node}"), PATIENCE, || {
            let left = rig.on_node(node, &["sh", "-c", TRACES])?;
            ensure!(left.trim().is_empty(), "{left}");
            Ok(())
        })?;
    }
    Ok(())
}

/// Something of Warren's is on the node: what [`no_trace`] looks for can be seen.
fn has_traces(rig: Rig<'_>, node: &str) -> Result<()> {
    let there = rig.on_node(node, &["sh", "-c", TRACES])?;
    for wanted in ["/sys/fs/bpf/warren", "warren-cni", "conflist", "fwmark"] {
        ensure!(there.contains(wanted), "no {wanted} in {there}");
    }
    Ok(())
}

#[test]
fn check_finds_nothing_on_a_healthy_cluster_with_pods_in_the_mesh() -> Result<()> {
    let cluster = fresh()?;
    let (_namespace, _) = pair(cluster, "well")?;
    is_well(cluster)?;
    wait_until_ok("check says that all is well", PATIENCE, || {
        let told = cluster.warren(&["check"])?;
        ended_well("check", &told)?;
        ensure!(told.stdout.contains("All is well."), "{}", told.stdout);
        Ok(())
    })
}

#[test]
fn check_names_a_right_that_is_missing() -> Result<()> {
    let cluster = fresh()?;
    let role = cluster.kubectl.json(&["get", "clusterrole", "warren-node"])?;
    let rules = role["rules"].as_array().context("rules")?;
    let at = rules
        .iter()
        .position(|rule| {
            rule["resources"]
                .as_array()
                .is_some_and(|all| all.contains(&"services".into()))
        })
        .context("no rule about services")?;
    let patch = format!("[{{\"op\": \"remove\", \"path\": \"/rules/{at}\"}}]");
    cluster
        .kubectl
        .run(["patch", "clusterrole", "warren-node", "--type=json", "-p", &patch])?;
    is_named(cluster, "right-missing", "warren-node")?;
    cluster.install_warren()?;
    is_well(cluster)
}

#[test]
fn check_names_a_definition_that_is_gone_and_installing_again_brings_it_back() -> Result<()> {
    let cluster = fresh()?;
    let (namespace, _) = pair(cluster, "crds")?;
    let name = "authorizationpolicies.security.istio.io";
    cluster.kubectl.run(["delete", "crd", name])?;
    is_named(cluster, "definition-missing", "authorizationpolicies")?;
    namespace.answered("web", "db")?;
    cluster.install_warren()?;
    is_well(cluster)?;
    // The daemons take the kind up again without being restarted.
    namespace.apply(
        "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: none}, spec: {action: ALLOW}}",
    )?;
    namespace.refused("web", "db")?;
    namespace.kubectl(&["delete", "authorizationpolicy", "none"])?;
    namespace.answered("web", "db").map(drop)
}

#[test]
fn check_names_namespaces_whose_labels_contradict_or_mean_nothing() -> Result<()> {
    let cluster = fresh()?;
    let both = cluster.namespace("both", &format!("{AMBIENT}, istio-injection: enabled"))?;
    let strange = cluster.namespace("strange", "istio.io/dataplane-mode: sometimes")?;
    both.client("web", &PodShape::default())?;
    strange.client("web", &PodShape::default())?;
    is_named(cluster, "two-modes", &both.name)?;
    is_named(cluster, "unknown-mode", &strange.name)
}

#[test]
fn check_names_a_network_policy_that_lets_no_hbone_in() -> Result<()> {
    let cluster = fresh()?;
    let (namespace, _) = pair(cluster, "netpol")?;
    namespace.apply(
        "{apiVersion: networking.k8s.io/v1, kind: NetworkPolicy, metadata: {name: only-http}, \
          spec: {podSelector: {matchLabels: {app: db}}, policyTypes: [Ingress], ingress: [{ports: [{port: 8080}]}]}}",
    )?;
    is_named(cluster, "hbone-blocked", "only-http")
}

#[test]
fn check_names_a_policy_that_is_not_understood() -> Result<()> {
    let cluster = fresh()?;
    let (namespace, _) = pair(cluster, "broken")?;
    namespace.apply(
        "{apiVersion: security.istio.io/v1, kind: AuthorizationPolicy, metadata: {name: broken}, \
          spec: {action: ALLOW, rules: [{from: [{source: {ipBlocks: [nowhere]}}]}]}}",
    )?;
    is_named(cluster, "objects-not-understood", "")?;
    namespace.kubectl(&["delete", "authorizationpolicy", "broken"])?;
    is_well(cluster)
}

#[test]
fn check_names_a_daemon_that_is_missing() -> Result<()> {
    let cluster = fresh()?;
    cluster.withdraw_daemons()?;
    is_named(cluster, "daemon-missing", &cluster.nodes()?[0])?;
    cluster.readmit_daemons()?;
    cluster.install_warren()?;
    is_well(cluster)
}

#[test]
fn check_names_the_taints_that_keep_the_controller_from_every_node() -> Result<()> {
    let cluster = fresh()?;
    let Some(_) = cluster.rig() else { return Ok(()) };
    let taint = |what: &str| cluster.kubectl.run(["taint", "nodes", "--all", what]);
    taint("kept-for=others:NoSchedule")?;
    let named = || -> Result<()> {
        cluster.kubectl.run([
            "-n",
            SYSTEM,
            "delete",
            "pods",
            "-l",
            "app.kubernetes.io/name=warren-controller",
        ])?;
        wait_until_ok("check names the taint", PATIENCE, || {
            let told = cluster.warren(&["check"])?;
            let words: Vec<&str> = told.stdout.split_whitespace().collect();
            let said = words.join(" ");
            ensure!(said.contains("controller-not-ready"), "{}", told.stdout);
            ensure!(
                said.contains("Taints: kept-for=others:NoSchedule (2 of 2 nodes)"),
                "{}",
                told.stdout
            );
            Ok(())
        })
    };
    let named = named();
    taint("kept-for-")?;
    named?;
    cluster.warren_ready()?;
    is_well(cluster)
}

#[test]
fn what_a_dry_run_prints_is_what_is_installed() -> Result<()> {
    let cluster = fresh()?;
    let told = cluster.warren(&["install", "--dry-run", "--image", &cluster.image()?])?;
    ended_well("install --dry-run", &told)?;
    let file = std::env::temp_dir().join(format!("warren-dry-run-{}.yaml", std::process::id()));
    std::fs::write(&file, &told.stdout)?;
    // What controllers of the cluster write into new objects may still come, and the API server may be busy.
    let compared = wait_until_ok("nothing differs", PATIENCE, || {
        let compared = cluster
            .kubectl
            .command()
            .args(["diff", "--server-side", "--force-conflicts", "-f"])
            .arg(&file)
            .output()?;
        ensure!(
            compared.status.code() == Some(0),
            "{}{}",
            String::from_utf8_lossy(&compared.stdout),
            String::from_utf8_lossy(&compared.stderr)
        );
        Ok(())
    });
    std::fs::remove_file(&file)?;
    compared
}

#[test]
fn installing_again_replaces_no_pod() -> Result<()> {
    let cluster = fresh()?;
    let names = || {
        cluster
            .kubectl
            .run(["-n", SYSTEM, "get", "pods", "-o", "jsonpath={.items[*].metadata.uid}"])
    };
    let before = names()?;
    cluster.install_warren()?;
    ensure!(names()? == before, "other pods than before");
    Ok(())
}

#[test]
fn uninstall_cuts_no_connection_restarts_no_pod_and_leaves_nothing_behind() -> Result<()> {
    let cluster = fresh()?;
    let (namespace, nodes) = pair(cluster, "leave")?;
    if let Some(rig) = cluster.rig() {
        has_traces(rig, &nodes[0])?;
    }
    // Thirty seconds is how long what is open may go on; this takes fifteen and more.
    let feed = "i=0; while [ $i -lt 75 ]; do echo $i; i=$((i+1)); sleep 0.2; done";
    let serve = format!("nc -l -p 9000 -e sh -c '{feed}'");
    let mut server = namespace.spawn("db", &serve)?;
    let to = namespace.address("db")?;
    wait_until_ok("db listens", PATIENCE, || {
        // 9000, in state LISTEN.
        let said = namespace.sh("db", "cat /proc/net/tcp* | grep -qi ':2328 [0:]* 0a '")?;
        ensure!(said.succeeded, "{}", said.text);
        Ok(())
    })?;
    let mut reader = namespace.spawn("web", &format!("nc {to} 9000 </dev/null | tee /tmp/got | tail -1"))?;
    warren_tests::wait_until("the transfer has begun", PATIENCE, || {
        namespace.sh("web", "test -s /tmp/got").ok()?.succeeded.then_some(())
    })?;

    removed(cluster)?;
    reader.wait(REMOVAL)?;
    ensure!(reader.stdout().trim() == "74", "it ended with {:?}", reader.stdout());
    server.wait(REMOVAL)?;
    if let Some(rig) = cluster.rig() {
        no_trace(rig, &nodes)?;
    }
    namespace.captured("web", false)?;
    namespace.answered("web", "db")?;
    ensure!(namespace.restarts("web")? == "0" && namespace.restarts("db")? == "0");
    let left = cluster.kubectl.run([
        "get",
        "all,clusterroles,clusterrolebindings",
        "-A",
        "-l",
        "app.kubernetes.io/part-of=warren",
        "-o",
        "name",
    ])?;
    ensure!(left.is_empty(), "{left}");

    cluster.install_warren()?;
    namespace.captured("web", true)?;
    namespace.captured("db", true)?;
    namespace.answered("web", "db").map(drop)
}

#[test]
fn helm_installs_and_uninstalls_it_as_the_readme_says() -> Result<()> {
    let cluster = fresh()?;
    let Ok(helm) = std::env::var("WARREN_HELM") else {
        eprintln!("SKIPPED: there is no helm");
        return Ok(());
    };
    let root = std::env::var("WARREN_ROOT").context("WARREN_ROOT is not set")?;
    let kubectl = cluster.kubectl.command();
    let run = |words: &[&str]| -> Result<()> {
        let mut command = Command::new(&helm);
        for (name, value) in kubectl.get_envs() {
            command.env(name, value.unwrap_or_default());
        }
        let ended = command.args(words).output()?;
        ensure!(
            ended.status.success(),
            "helm {words:?}: {}",
            String::from_utf8_lossy(&ended.stderr)
        );
        Ok(())
    };
    let (namespace, nodes) = pair(cluster, "helm")?;
    ended_well("uninstall", &cluster.warren(&["uninstall", "--crds"])?)?;

    let image = cluster.image()?;
    let (_, tag) = image.rsplit_once(':').context("a tag")?;
    run(&["install", "warren-crds", &format!("{root}/deploy/charts/warren-crds")])?;
    cluster.kubectl.run(["create", "namespace", SYSTEM])?;
    cluster.kubectl.run([
        "label",
        "namespace",
        SYSTEM,
        "pod-security.kubernetes.io/enforce=privileged",
        "istio.io/dataplane-mode=none",
    ])?;
    let tag = format!("image.tag={tag}");
    run(&[
        "install",
        "warren",
        &format!("{root}/deploy/charts/warren"),
        "-n",
        SYSTEM,
        "--set",
        &tag,
    ])?;
    cluster.warren_ready()?;
    namespace.captured("web", true)?;
    namespace.captured("db", true)?;
    namespace.answered("web", "db")?;

    let told = cluster.warren(&["uninstall"])?;
    ensure!(
        told.code != Some(0) && told.stderr.contains("installed by Helm (release warren)"),
        "{told:?}"
    );
    cluster.warren_ready()?;
    cluster.kubectl.run([
        "-n",
        SYSTEM,
        "delete",
        "daemonset",
        "warren-node",
        "--cascade=foreground",
    ])?;
    run(&["uninstall", "warren", "-n", SYSTEM, "--wait"])?;
    run(&["uninstall", "warren-crds", "--wait"])?;
    if let Some(rig) = cluster.rig() {
        no_trace(rig, &nodes)?;
    }
    namespace.answered("web", "db")?;
    ended_well("uninstall", &cluster.warren(&["uninstall"])?)?;
    cluster.install_warren()
}

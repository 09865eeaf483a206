//! A label puts a namespace's pods into the mesh and takes them out again, on a real Kubernetes: nothing restarts, nothing
//! that is open breaks, and what is new is HBONE with both identities.

use anyhow::{Result, ensure};
use std::time::{Duration, Instant};
use warren_tests::cluster::{AMBIENT, Namespace, PATIENCE, PodShape, cluster, meshed};
use warren_tests::wait_until;

/// What db gives in 40 portions over about eight seconds: a file of random bytes, whose checksum it prints once.
const PREPARE: &str = "mkdir -p /tmp/w/cgi-bin; dd if=/dev/urandom of=/tmp/data bs=256k count=40 2>/dev/null; \
                       printf '#!/bin/sh\\nprintf \"Content-Type: text/plain\\\\r\\\\n\\\\r\\\\n\"\\ni=0; while [ $i -lt 40 ]; do \
                       dd if=/tmp/data bs=256k skip=$i count=1 2>/dev/null; i=$((i+1)); sleep 0.2; done\\n' \
                       >/tmp/w/cgi-bin/slow; chmod +x /tmp/w/cgi-bin/slow; md5sum </tmp/data";

/// Opens a transfer from db to web, does `meanwhile`, and compares the checksums at the end.
fn transfer_across(namespace: &Namespace<'_>, meanwhile: impl FnOnce() -> Result<()>) -> Result<()> {
    let (from, sent) = (namespace.address("db")?, namespace.sh("db", PREPARE)?);
    ensure!(sent.succeeded, "{}", sent.text);
    let read = format!("wget -q -O - http://{from}:8080/cgi-bin/slow | tee /tmp/got | md5sum");
    let mut reader = namespace.spawn("web", &read)?;
    wait_until("the transfer has begun", PATIENCE, || {
        namespace.sh("web", "test -s /tmp/got").ok()?.succeeded.then_some(())
    })?;
    meanwhile()?;
    ensure!(
        reader.wait(PATIENCE)?.success(),
        "the transfer failed: {}",
        reader.log()
    );
    ensure!(
        reader.stdout().trim() == sent.text,
        "sent {:?}, received {:?}",
        sent.text,
        reader.stdout()
    );
    Ok(())
}

#[test]
fn warren_becomes_ready_on_every_node() -> Result<()> {
    let cluster = meshed();
    for node in cluster.nodes()? {
        let silent = cluster.metric(&node, "warren_api_silent_seconds", &["\"Pod\""])?;
        ensure!(
            silent < 60.0,
            "{node} has heard nothing of the API server for {silent} s"
        );
        ensure!(cluster.metric(&node, "warren_snapshot_version", &[])? >= 1.0);
    }
    Ok(())
}

#[test]
fn traffic_between_nodes_is_hbone_with_both_identities_soon_after_the_label() -> Result<()> {
    let (namespace, nodes) = meshed().pair("label", "")?;
    namespace.answered("web", "db")?;
    let labelled = Instant::now();
    namespace.enrol(true)?;
    namespace.pair_captured(true)?;
    let captured = labelled.elapsed();
    namespace.answered("web", "db")?;
    let (client, server) = (namespace.identity("web"), namespace.identity("db"));
    cluster().access_line(&nodes[1], &[&client, &server, "inbound"])?;
    cluster().access_line(&nodes[0], &[&client, &server, "outbound"])?;
    ensure!(namespace.restarts("web")? == "0" && namespace.restarts("db")? == "0");
    // Two seconds where nothing else goes on. Kubelets and resyncs work in minutes: who waits for one of these is late.
    eprintln!("captured {captured:?} after the label");
    ensure!(
        captured < Duration::from_secs(30),
        "captured {captured:?} after the label"
    );
    Ok(())
}

#[test]
fn a_transfer_that_is_open_when_the_label_comes_ends_intact() -> Result<()> {
    let (namespace, _) = meshed().pair("open", "")?;
    transfer_across(&namespace, || {
        namespace.enrol(true)?;
        namespace.pair_captured(true)
    })
}

#[test]
fn a_transfer_that_is_open_when_the_label_goes_ends_intact() -> Result<()> {
    let (namespace, _) = meshed().pair("close", AMBIENT)?;
    namespace.pair_captured(true)?;
    namespace.answered("web", "db")?;
    transfer_across(&namespace, || namespace.enrol(false))?;
    namespace.pair_captured(false)
}

#[test]
fn pods_of_an_unlabelled_namespace_are_released_and_still_reach_each_other() -> Result<()> {
    let (namespace, nodes) = meshed().pair("release", AMBIENT)?;
    namespace.pair_captured(true)?;
    namespace.answered("web", "db")?;
    namespace.enrol(false)?;
    namespace.pair_captured(false)?;
    namespace.answered("web", "db")?;
    let before = cluster().metric(&nodes[1], "istio_tcp_connections_opened_total", &[&namespace.name])?;
    namespace.answered("web", "db")?;
    let after = cluster().metric(&nodes[1], "istio_tcp_connections_opened_total", &[&namespace.name])?;
    ensure!(before == after, "a released pod's connection went through the daemon");
    ensure!(namespace.restarts("web")? == "0" && namespace.restarts("db")? == "0");
    Ok(())
}

#[test]
fn a_service_is_reached_by_name_by_vip_and_by_pod_address() -> Result<()> {
    let (namespace, _) = meshed().pair("names", AMBIENT)?;
    namespace.pair_captured(true)?;
    let vip = namespace.kubectl(&["get", "service", "db", "-o", "jsonpath={.spec.clusterIP}"])?;
    let pod = format!("{}:8080", namespace.address("db")?);
    let full = format!("db.{}.svc.cluster.local", namespace.name);
    for to in ["db", &full, &vip, &pod] {
        ensure!(namespace.answered("web", to)? == "db", "by {to}");
    }
    Ok(())
}

#[test]
fn two_pods_of_one_node_speak_through_the_mesh_too() -> Result<()> {
    let cluster = meshed();
    let node = cluster.nodes()?.remove(0);
    let namespace = cluster.namespace("one", AMBIENT)?;
    namespace.client("web", &PodShape::on(&node))?;
    namespace.server("db", &PodShape::on(&node))?;
    namespace.ready(&["web", "db"])?;
    namespace.pair_captured(true)?;
    namespace.answered("web", "db")?;
    cluster.access_line(
        &node,
        &[&namespace.identity("web"), &namespace.identity("db"), "inbound"],
    )?;
    Ok(())
}

#[test]
fn a_pod_that_opts_out_stays_outside_and_is_still_reached() -> Result<()> {
    let cluster = meshed();
    let nodes = cluster.nodes()?;
    let namespace = cluster.namespace("optout", AMBIENT)?;
    let out = PodShape {
        labels: "istio.io/dataplane-mode: none",
        ..PodShape::on(&nodes[1])
    };
    namespace.client("web", &PodShape::on(&nodes[0]))?;
    namespace.server("db", &out)?;
    namespace.ready(&["web", "db"])?;
    namespace.captured("web", true)?;
    namespace.answered("web", "db")?;
    namespace.captured("db", false)
}

#[test]
fn a_pod_of_the_hosts_network_is_never_captured() -> Result<()> {
    let cluster = meshed();
    let nodes = cluster.nodes()?;
    let namespace = cluster.namespace("host", AMBIENT)?;
    let host = PodShape {
        spec: "hostNetwork: true",
        ..PodShape::on(&nodes[0])
    };
    namespace.client("web", &host)?;
    namespace.server("db", &PodShape::on(&nodes[1]))?;
    namespace.ready(&["web", "db"])?;
    namespace.captured("db", true)?;
    ensure!(namespace.answered("web", &format!("{}:8080", namespace.address("db")?))? == "db");
    namespace.captured("web", false)
}

#[test]
fn a_pod_alone_may_be_labelled() -> Result<()> {
    let (namespace, _) = meshed().pair("alone", "")?;
    namespace.kubectl(&["label", "pod", "db", "istio.io/dataplane-mode=ambient"])?;
    namespace.captured("db", true)?;
    namespace.answered("web", "db")?;
    namespace.captured("web", false)
}

#[test]
fn a_name_that_is_used_again_belongs_to_the_new_pod() -> Result<()> {
    let (namespace, nodes) = meshed().pair("again", AMBIENT)?;
    namespace.pair_captured(true)?;
    for _ in 0..3 {
        namespace.kubectl(&["delete", "pod", "db", "--now"])?;
        namespace.server("db", &PodShape::on(&nodes[0]))?;
        namespace.ready(&["db"])?;
        namespace.captured("db", true)?;
        ensure!(namespace.answered("web", "db")? == "db");
    }
    Ok(())
}

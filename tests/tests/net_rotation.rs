//! The root changes under traffic: old and new trusted side by side, and not one connection fails.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose};
use serde_json::Value;
use warren_tests::load::Traffic;
use warren_tests::mesh::binary;
use warren_tests::wait::wait_until_ok;
use warren_tests::{Conversation, DEADLINE, Mesh, Node, PodSpec, World};

const PORT: u16 = 7001;
/// New connections a second.
const RATE: f64 = 100.0;
/// What certificates live: the change takes one lifetime, so the test does.
const LIFETIME: Duration = Duration::from_secs(14);

/// Certificate and key of a new CA, PEM.
fn new_ca() -> Result<(String, String)> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "another root");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    Ok((params.self_signed(&key)?.pem(), key.serialize_pem()))
}

/// Whole or not at all, as every tool of an operator would.
fn put(directory: &Path, name: &str, text: &str) -> Result<()> {
    let beside = directory.join(".new");
    fs::write(&beside, text)?;
    fs::rename(&beside, directory.join(name)).with_context(|| name.to_owned())
}

/// The names of the roots that the daemon of `node` trusts.
fn roots(mesh: &Mesh, node: Node) -> Result<Vec<String>> {
    let dump = mesh.daemon(node).config_dump()?;
    let certificates = dump["certificates"].as_array().context("no certificates")?;
    let roots = certificates.iter().filter(|certificate| certificate["type"] == "Root");
    Ok(roots
        .filter_map(|root| root["name"].as_str().map(str::to_owned))
        .collect())
}

fn wait_for_roots(mesh: &Mesh, count: usize) -> Result<()> {
    for node in Node::BOTH {
        wait_until_ok(&format!("{count} roots are trusted"), DEADLINE, || {
            let roots = roots(mesh, node)?;
            ensure!(roots.len() == count, "node {} trusts {roots:?}", node.letter());
            Ok(())
        })?;
    }
    Ok(())
}

/// Serial numbers of the workloads' certificates on `node`.
fn serials(mesh: &Mesh, node: Node) -> Result<Vec<Value>> {
    let dump = mesh.daemon(node).config_dump()?;
    let certificates = dump["certificates"].as_array().context("no certificates")?;
    let leaves = certificates.iter().filter(|certificate| certificate["type"] == "Leaf");
    Ok(leaves.map(|leaf| leaf["serialNumber"].clone()).collect())
}

#[test]
fn a_root_changes_without_a_failed_connection() -> Result<()> {
    let world = World::builder("wt-rotation")
        .pod(PodSpec::new("client", Node::A))
        .pod(PodSpec::new("server", Node::B))
        .start()?;
    let mut mesh = Mesh::builder()
        .node_arg(format!("--svid-lifetime={}s", LIFETIME.as_secs()))
        .controller_arg("--root-spread=12s")
        .start(&world)?;
    let listen = format!("--listen=[::]:{PORT}");
    let load = binary("load")?;
    let server = world.pod("server").command(&load).args(["serve", &listen]).spawn()?;
    server.wait_for_line("listening", DEADLINE)?;
    let to = SocketAddr::new(world.pod("server").ip(false), PORT);
    let directory = mesh.ca_directory().to_owned();
    let old = fs::read_to_string(directory.join("root-cert.pem"))?;
    let (new, key) = new_ca()?;

    let mut long = Conversation::open(world.pod("client"), to, DEADLINE)?;
    long.send(b"E")?;
    let traffic = Traffic::start(world.pod("client").command(&load), to.ip(), &[PORT], 16, RATE)?;

    // Both are trusted, the old one issues.
    put(&directory, "root-cert.pem", &format!("{old}{new}"))?;
    wait_for_roots(&mesh, 2)?;
    wait_until_ok("the controller has read both roots", DEADLINE, || {
        let log = mesh.controller().log();
        let has_read = |line: &str| line.contains("certificate authority read") && line.contains("roots=2");
        ensure!(log.lines().any(has_read), "{log}");
        Ok(())
    })?;
    // The new one issues. In between the files do not fit each other, which harms nobody.
    put(&directory, "ca-key.pem", &key)?;
    put(&directory, "cert-chain.pem", &new)?;
    put(&directory, "ca-cert.pem", &new)?;
    let issued = "certificates are issued by the certificate authority that was read last";
    wait_until_ok("the new CA issues", 2 * DEADLINE, || {
        // At the start, with both roots, and with the new key.
        ensure!(mesh.controller().log().matches(issued).count() >= 3, "not yet");
        Ok(())
    })?;
    // Renewed once more, and no certificate is of the old root any more.
    for node in Node::BOTH {
        let before = serials(&mesh, node)?;
        wait_until_ok("certificates of the new CA", 2 * LIFETIME + DEADLINE, || {
            let now = serials(&mesh, node)?;
            ensure!(
                now.iter().all(|serial| !before.contains(serial)),
                "not renewed: {now:?}"
            );
            Ok(())
        })?;
    }
    put(&directory, "root-cert.pem", &new)?;
    wait_for_roots(&mesh, 1)?;
    let connects = traffic.end()?;
    eprintln!("{} connections, {} errors", connects.rate.operations, connects.errors);
    ensure!(connects.errors == 0 && connects.rate.operations > 1000, "{connects:?}");

    // The connection from before outlived none of the certificates that its ends had shown, and the log says so.
    long.wait_for_end(DEADLINE)?;
    let logs = Node::BOTH.map(|node| mesh.daemon(node).log()).concat();
    ensure!(
        logs.contains("connection closed because the peer is no longer trusted"),
        "not named"
    );
    Ok(())
}

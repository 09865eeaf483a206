//! The root changes under traffic: old and new trusted side by side, and not one connection fails.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, KeyPair, KeyUsagePurpose};
use serde_json::Value;
use warren_tests::load::Report;
use warren_tests::mesh::binary;
use warren_tests::wait::wait_until_ok;
use warren_tests::{Conversation, DEADLINE, Mesh, Node, PodSpec, World};

const PORT: u16 = 7001;
/// What certificates live: the change takes one lifetime, so the test does.
const LIFETIME: Duration = Duration::from_secs(14);
/// A changed file of roots is seen within ten seconds.
const SEEN: Duration = Duration::from_secs(25);

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
        wait_until_ok(&format!("{count} roots are trusted"), SEEN, || {
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
    let mut traffic = world
        .pod("client")
        .command(&load)
        .args(["connect", &format!("--to={to}"), "--workers=2", "--seconds=70"])
        .named("traffic")
        .spawn()?;

    // Both are trusted, the old one issues.
    put(&directory, "root-cert.pem", &format!("{old}{new}"))?;
    wait_for_roots(&mesh, 2)?;
    // The new one issues. In between the files do not fit each other, which harms nobody.
    put(&directory, "ca-key.pem", &key)?;
    put(&directory, "cert-chain.pem", &new)?;
    put(&directory, "ca-cert.pem", &new)?;
    let issued = "certificates are issued by the certificate authority that was read last";
    wait_until_ok("the new CA issues", Duration::from_secs(40), || {
        // At the start, with both roots, and with the new key.
        ensure!(mesh.controller().log().matches(issued).count() >= 3, "not yet");
        Ok(())
    })?;
    // Renewed once more, and no certificate is of the old root any more.
    for node in Node::BOTH {
        let before = serials(&mesh, node)?;
        wait_until_ok("certificates of the new CA", 2 * LIFETIME, || {
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
    ensure!(traffic.is_running(), "the traffic ended before the rotation did");
    let status = traffic.wait(Duration::from_secs(60))?;
    ensure!(status.success(), "{}", traffic.log());
    let report = traffic.stdout();
    let line = report
        .lines()
        .find(|line| line.starts_with('{'))
        .context(report.clone())?;
    let Report::Connect(connects) = serde_json::from_str(line)? else {
        anyhow::bail!("{line}")
    };
    eprintln!("{} connections, {} errors", connects.rate.operations, connects.errors);
    ensure!(connects.errors == 0, "{line}");
    ensure!(connects.rate.operations > 1000, "{line}");

    // The connection from before outlived none of the certificates that its ends had shown, and the log says so.
    long.wait_for_end(DEADLINE)?;
    let logs = Node::BOTH.map(|node| mesh.daemon(node).log()).concat();
    ensure!(
        logs.contains("connection closed because the peer is no longer trusted"),
        "not named"
    );
    Ok(())
}

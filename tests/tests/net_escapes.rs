//! Ways out of the mesh that a pod may try, and what becomes of them.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use warren_tests::agent::{Agent, Order, Outcome, Serve};
use warren_tests::demo::wire::Capture;
use warren_tests::wait::wait_until_ok;
use warren_tests::{DEADLINE, Mesh, Node, PodSpec, World};

const PORT: u16 = 7000;
const SHORT: Duration = Duration::from_secs(3);

fn world(prefix: &str) -> Result<World> {
    World::builder(prefix)
        .pod(PodSpec::new("client", Node::A))
        .pod(PodSpec::new("server", Node::B))
        .pod(PodSpec::outsider("outsider", Node::B))
        .start()
}

fn any(port: u16) -> SocketAddr {
    SocketAddr::new("::".parse().expect("an address"), port)
}

fn echo_server(world: &World, pod: &str) -> Result<Agent> {
    let mut agent = Agent::start(world.pod(pod))?;
    agent.must_listen("echo", any(PORT), Serve::Echo)?;
    Ok(agent)
}

/// No packet of `from` towards `to` was seen on the wire but HBONE.
fn assert_no_plaintext(packets: &[warren_tests::demo::wire::Packet], from: IpAddr, to: IpAddr) {
    for packet in packets {
        if let Some(segment) = &packet.tcp {
            let ours = segment.from.ip() == from && segment.to.ip() == to;
            assert!(!ours || segment.to.port() == 15008, "in the clear: {segment:?}");
        }
    }
}

#[test]
fn a_socket_bound_to_a_device_is_steered_all_the_same() -> Result<()> {
    let world = world("wt-device")?;
    let mesh = Mesh::start(&world)?;
    let _server = echo_server(&world, "server")?;
    let mut client = Agent::start(world.pod("client"))?;
    let mut capture = Capture::start(&world)?;
    for ipv6 in [false, true] {
        let to = SocketAddr::new(world.pod("server").ip(ipv6), PORT);
        let opened = client.order(&Order::Open {
            name: "bound".into(),
            family_of: to,
            bind: None,
            device: Some("eth0".into()),
            mark: None,
        })?;
        ensure!(opened == Outcome::Done, "{opened:?}");
        let outcome = client.dial("bound", to, DEADLINE)?;
        // Steered, or dropped at the guard: never in the clear.
        if outcome.connected() {
            client.must_echo("bound", "bound to a device", DEADLINE)?;
        }
        let end = capture.fence(&world)?;
        assert_no_plaintext(&capture.packets()?[..end], world.pod("client").ip(ipv6), to.ip());
    }
    drop(mesh);
    Ok(())
}

#[test]
fn an_open_steered_connection_whose_rule_is_flushed_is_stopped_at_the_guard() -> Result<()> {
    let world = world("wt-flush")?;
    let mesh = Mesh::start(&world)?;
    let _server = echo_server(&world, "server")?;
    let mut client = Agent::start(world.pod("client"))?;
    let mut capture = Capture::start(&world)?;
    for ipv6 in [false, true] {
        let to = SocketAddr::new(world.pod("server").ip(ipv6), PORT);
        client.must_connect("open", to, DEADLINE)?;
        client.must_echo("open", "as it should be", DEADLINE)?;
        let dropped = || {
            mesh.daemon(Node::A)
                .metric("warren_kernel_decisions_total", &["drop-marked-packet-leaving"])
        };
        let before = dropped()?;
        // Again and again: the daemon may have put the rule back before anything was sent without it.
        wait_until_ok("the guard counts", DEADLINE, || {
            world.pod("client").namespace.run(|| {
                let family = if ipv6 { "-6" } else { "-4" };
                let mut flush = Command::new("ip");
                flush.args([family, "rule", "del", "pref", "2"]);
                // Not there yet again is as good.
                Ok(flush.stderr(Stdio::null()).status()?)
            })?;
            client.send("open", "must not be seen")?;
            ensure!(dropped()? > before, "nothing dropped yet");
            Ok(())
        })?;
        let end = capture.fence(&world)?;
        let packets = &capture.packets()?[..end];
        assert_no_plaintext(packets, world.pod("client").ip(ipv6), to.ip());
        assert!(!packets.iter().any(|packet| packet.contains("must not be seen")));
    }
    Ok(())
}

fn descriptors(pid: u32) -> Result<usize> {
    Ok(std::fs::read_dir(Path::new("/proc").join(pid.to_string()).join("fd"))?.count())
}

#[test]
fn whoever_dials_the_daemons_own_listeners_is_refused_and_its_descriptors_stay_flat() -> Result<()> {
    let world = world("wt-dial")?;
    let mut mesh = Mesh::start(&world)?;
    let mut client = Agent::start(world.pod("client"))?;
    let pid = mesh.daemon_mut(Node::A).process().pid();
    let before = descriptors(pid)?;
    for round in 0..50 {
        for ip in ["127.0.0.1", "::1"] {
            for port in [15001, 15006, 15008] {
                let to = SocketAddr::new(ip.parse()?, port);
                let outcome = client.connect("dial", to, SHORT)?;
                ensure!(!outcome.connected(), "round {round}: {to} answered");
                // On `lo` a refusal of IPv4 has no RST: one wait of each is enough.
                if round > 0 && matches!(outcome.errno(), Some("TimedOut" | "ETIMEDOUT")) {
                    return Ok(());
                }
            }
        }
        ensure!(
            descriptors(pid)? <= before + 20,
            "descriptors grow: {before} to {}",
            descriptors(pid)?
        );
    }
    Ok(())
}

#[test]
fn an_application_may_have_the_ports_that_the_daemon_uses() -> Result<()> {
    let world = world("wt-ports")?;
    let _mesh = Mesh::start(&world)?;
    let mut server = Agent::start(world.pod("server"))?;
    let mut client = Agent::start(world.pod("client"))?;
    for port in [15001u16, 15006, 50051] {
        let on = SocketAddr::new("0.0.0.0".parse()?, port);
        let outcome = server.listen(&port.to_string(), on, Serve::Echo)?;
        let to = SocketAddr::new(world.pod("server").ip(false), port);
        match (port, &outcome) {
            (50051, _) => ensure!(outcome == Outcome::Done, "{on}: {outcome:?}"),
            // The daemon was there first; what matters is that the application is told, not fooled.
            (_, Outcome::Failed { errno, .. }) => {
                ensure!(errno == "EADDRINUSE", "{on}: {errno}");
                continue;
            }
            _ => {}
        }
        client
            .must_connect("call", to, DEADLINE)
            .with_context(|| format!("{to}"))?;
        client.must_echo("call", "hello", DEADLINE)?;
    }
    Ok(())
}

#[test]
fn an_application_that_had_the_daemons_ports_first_keeps_them_and_is_captured() -> Result<()> {
    let mut world = world("wt-first")?;
    let mesh = Mesh::start(&world)?;
    world.add_unpublished_pod(PodSpec::new("early", Node::B))?;
    let mut early = Agent::start(world.pod("early"))?;
    for port in [15001u16, 15006, 15008] {
        early.must_listen(&port.to_string(), any(port), Serve::Greet)?;
    }
    early.must_listen("echo", any(PORT), Serve::Echo)?;
    world.publish_pod("early")?;
    let mut client = Agent::start(world.pod("client"))?;
    let to = SocketAddr::new(world.pod("early").ip(false), PORT);
    wait_until_ok("it is captured and served", DEADLINE, || {
        client.must_connect("call", to, DEADLINE)?;
        client.must_echo("call", "hello", DEADLINE)?;
        client.close("call")?;
        mesh.daemon(Node::B)
            .wait_for_line("direction=\"inbound\"", SHORT)
            .map(drop)
    })?;
    for port in [15001u16, 15006] {
        let to = SocketAddr::new(world.pod("early").ip(false), port);
        client.must_connect("own", to, DEADLINE)?;
        let said = client.receive("own", DEADLINE)?;
        ensure!(
            matches!(&said, Outcome::Received { text } if text.starts_with("hello")),
            "{to}: {said:?}"
        );
    }
    Ok(())
}

#[test]
fn a_closed_port_of_a_captured_pod_refuses_at_once() -> Result<()> {
    let world = world("wt-closed")?;
    let _mesh = Mesh::start(&world)?;
    let _server = echo_server(&world, "server")?;
    let mut client = Agent::start(world.pod("client"))?;
    let mut outsider = Agent::start(world.pod("outsider"))?;
    for ipv6 in [false, true] {
        let closed = SocketAddr::new(world.pod("server").ip(ipv6), 7999);
        for (who, agent) in [("client", &mut client), ("outsider", &mut outsider)] {
            // Through the daemon the connection may open first: then it is reset before anything comes back.
            let outcome = match agent.connect("closed", closed, DEADLINE)? {
                Outcome::Connected { .. } => agent.receive("closed", DEADLINE)?,
                other => other,
            };
            ensure!(
                matches!(outcome.errno(), Some("ECONNREFUSED" | "ECONNRESET")),
                "{who} at {closed}: {outcome:?}"
            );
        }
    }
    Ok(())
}

#[test]
fn release_under_load_cuts_nothing_off_into_the_clear() -> Result<()> {
    let mut world = world("wt-release")?;
    let mesh = Mesh::start(&world)?;
    let _server = echo_server(&world, "server")?;
    let mut client = Agent::start(world.pod("client"))?;
    let mut capture = Capture::start(&world)?;
    let to = SocketAddr::new(world.pod("server").ip(false), PORT);
    client.must_connect("open", to, DEADLINE)?;
    client.must_echo("open", "before the release", DEADLINE)?;
    let mark = capture.fence(&world)?;
    world.change_pod("client", |spec| spec.in_mesh = false)?;
    wait_until_ok("new connections go in the clear", DEADLINE, || {
        client.must_connect("new", to, DEADLINE)?;
        client.must_echo("new", "a new one", DEADLINE)?;
        let end = capture.fence(&world)?;
        let plain = capture.packets()?[mark..end]
            .iter()
            .any(|packet| packet.contains("a new one"));
        ensure!(plain, "still in the mesh");
        Ok(())
    })?;
    // The old one goes on through the daemon, or ends; its bytes never leave in the clear.
    if client.send("open", "of the old one")? == Outcome::Done {
        let outcome = client.receive("open", DEADLINE)?;
        ensure!(
            matches!(
                &outcome,
                Outcome::Received { .. } | Outcome::End | Outcome::Failed { .. }
            ),
            "{outcome:?}"
        );
    }
    let end = capture.fence(&world)?;
    ensure!(
        !capture.packets()?[mark..end]
            .iter()
            .any(|packet| packet.contains("of the old one"))
    );
    client.close("open")?;
    wait_until_ok("nothing of ours is left in the pod", DEADLINE, || {
        let rules = world.pod("client").namespace.run(|| {
            let output = Command::new("ip").args(["rule", "list"]).output()?;
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        })?;
        ensure!(!rules.contains("fwmark"), "{rules}\n{}", mesh.daemon(Node::A).log());
        Ok(())
    })
}

//! Four holes of the obvious way to steer arrivals, each closed. Every attack is first seen to work: against the same pod
//! with its arrival program taken away, which is an `sk_lookup` that passes everything.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use warren_tests::agent::{Agent, Order, Outcome, Serve, Shape};
use warren_tests::wait::wait_until_ok;
use warren_tests::{DEADLINE, Mesh, Node, PodSpec, World};

const PORT: u16 = 7000;
/// A SYN that has to be sent again takes a second.
const NO_RETRANSMISSION: Duration = Duration::from_millis(900);
const SYN_ACK: u8 = 0x12;
/// How often a client uses its port again.
const ATTEMPTS: u32 = 5;

fn world(prefix: &str) -> Result<World> {
    World::builder(prefix)
        .pod(PodSpec::new("client", Node::A))
        .pod(PodSpec::new("server", Node::B))
        .pod(PodSpec::outsider("outsider", Node::A))
        .start()
}

fn any(port: u16) -> SocketAddr {
    SocketAddr::new("::".parse().expect("an address"), port)
}

const STRICT: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: default}
spec: {mtls: {mode: STRICT}}
";

/// Waits until the kernel refuses an outsider's plain connection: before it does so the daemon may reset what it accepts.
fn wait_until_strict(outsider: &mut Agent, to: SocketAddr) -> Result<()> {
    wait_until_ok("plaintext is refused", DEADLINE, || {
        let outcome = outsider.connect("probe", to, DEADLINE)?;
        ensure!(outcome.errno() == Some("ECONNREFUSED"), "{outcome:?}");
        Ok(())
    })
}

/// Takes the arrival programs of a node's pods away by removing their pinned links.
fn pass_everything(world: &World, node: Node) -> Result<()> {
    let mut removed = 0;
    let mut folders: Vec<PathBuf> = vec![world.pin_directory(node)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.file_name().is_some_and(|name| name == "arrive") {
                fs::remove_file(&path)?;
                removed += 1;
            }
        }
    }
    ensure!(
        removed > 0,
        "no arrival link below {}",
        world.pin_directory(node).display()
    );
    Ok(())
}

/// The daemon holds its links open, so a link goes only when the daemon has ended.
fn without_arrival_programs(world: &World, mesh: &mut Mesh, node: Node) -> Result<()> {
    mesh.daemon_mut(node).kill()?;
    pass_everything(world, node)
}

#[test]
fn a_client_that_reuses_its_port_after_the_other_end_closed_first_connects_at_once_in_both_directions() -> Result<()> {
    let world = world("wt-reuse")?;
    let mesh = Mesh::start(&world)?;
    let mut server = Agent::start(world.pod("server"))?;
    server.must_listen("greet", any(PORT), Serve::GreetAndClose)?;
    for ipv6 in [false, true] {
        let to = SocketAddr::new(world.pod("server").ip(ipv6), PORT);
        for (pod, direction, node, reporter) in [
            ("client", "outbound", Node::A, r#"reporter="source""#),
            ("outsider", "inbound", Node::B, r#"reporter="destination""#),
        ] {
            let mut agent = Agent::start(world.pod(pod))?;
            let from = SocketAddr::new(world.pod(pod).ip(ipv6), 40123);
            let opened = "istio_tcp_connections_opened_total";
            let before = mesh.daemon(node).metric(opened, &[reporter])?;
            let mut fastest_reuse = Duration::MAX;
            for attempt in 0..ATTEMPTS {
                match agent.connect_from("call", to, Some(from), DEADLINE)? {
                    Outcome::Connected { after_us, .. } => {
                        if attempt > 0 {
                            fastest_reuse = fastest_reuse.min(Duration::from_micros(after_us));
                        }
                    }
                    other => bail!("{direction}, attempt {attempt}: {other:?}"),
                }
                let (said, end) = agent.read_to_end("call", DEADLINE)?;
                ensure!(
                    said.starts_with("hello"),
                    "{direction}, attempt {attempt}: {said:?}, {end:?}"
                );
                agent.close("call")?;
            }
            // Of several the fastest: the machine may stand still during one.
            ensure!(fastest_reuse < NO_RETRANSMISSION, "{direction}: {fastest_reuse:?}");
            // Not one of them went round the daemon.
            let after = before + f64::from(ATTEMPTS);
            let daemon = mesh.daemon(node);
            daemon.wait_for_metric(opened, &[reporter], after, DEADLINE)?;
        }
    }
    Ok(())
}

#[test]
fn with_syn_cookies_no_connection_reaches_the_application_past_policy() -> Result<()> {
    let world = world("wt-cookies")?;
    let mut mesh = Mesh::start(&world)?;
    world.pod("server").namespace.sysctls(&[("ipv4/tcp_syncookies", "2")])?;
    let mut server = Agent::start(world.pod("server"))?;
    server.must_listen("greet", any(PORT), Serve::Greet)?;
    let mut client = Agent::start(world.pod("client"))?;
    let mut outsider = Agent::start(world.pod("outsider"))?;
    // Each end of the mesh has been served, by cookies, before.
    for ipv6 in [false, true] {
        let to = SocketAddr::new(world.pod("server").ip(ipv6), PORT);
        outsider.must_connect("before", to, DEADLINE)?;
        client.must_connect("mesh", to, DEADLINE)?;
    }
    world.apply("strict.yaml", STRICT)?;
    for ipv6 in [false, true] {
        let to = SocketAddr::new(world.pod("server").ip(ipv6), PORT);
        wait_until_strict(&mut outsider, to)?;
        let from = SocketAddr::new(world.pod("outsider").ip(ipv6), 40999);
        for _ in 0..10 {
            let outcome = outsider.connect("plain", to, DEADLINE)?;
            ensure!(!outcome.connected(), "{outcome:?}");
        }
        let flags = syn(&mut outsider, from, to, Shape::Plain)?;
        ensure!(!flags.contains(&SYN_ACK), "{flags:x?}");
        client.must_connect("mesh-again", to, DEADLINE)?;
        let said = client.receive("mesh-again", DEADLINE)?;
        ensure!(
            matches!(&said, Outcome::Received { text } if text.starts_with("hello")),
            "{said:?}"
        );
    }
    without_arrival_programs(&world, &mut mesh, Node::B)?;
    let to = SocketAddr::new(world.pod("server").ip(false), PORT);
    // The kernel detaches a link a moment after its pin is gone.
    wait_until_ok("the attack itself works", DEADLINE, || {
        ensure!(outsider.connect("plain", to, DEADLINE)?.connected(), "refused");
        Ok(())
    })?;
    Ok(())
}

fn syn(agent: &mut Agent, from: SocketAddr, to: SocketAddr, shape: Shape) -> Result<Vec<u8>> {
    match agent.order(&Order::Syn {
        from,
        to,
        shape,
        wait_ms: 1200,
    })? {
        Outcome::Answers { flags } => Ok(flags),
        other => bail!("{shape:?} from {from} to {to}: {other:?}"),
    }
}

#[test]
fn neither_tiny_fragments_nor_extension_headers_get_past_policy() -> Result<()> {
    let world = world("wt-shapes")?;
    let mut mesh = Mesh::start(&world)?;
    let mut server = Agent::start(world.pod("server"))?;
    server.must_listen("greet", any(PORT), Serve::Greet)?;
    let mut outsider = Agent::start(world.pod("outsider"))?;
    world.apply("strict.yaml", STRICT)?;
    let attacks = [(false, Shape::Fragments), (true, Shape::DestinationOptions)];
    for (ipv6, shape) in attacks {
        let to = SocketAddr::new(world.pod("server").ip(ipv6), PORT);
        wait_until_strict(&mut outsider, to)?;
        let from = SocketAddr::new(world.pod("outsider").ip(ipv6), 41000);
        for shape in [Shape::Plain, shape] {
            let flags = syn(&mut outsider, from, to, shape)?;
            ensure!(!flags.contains(&SYN_ACK), "{shape:?} got past: {flags:x?}");
        }
    }
    ensure!(server.accepted("greet")?.is_empty());
    without_arrival_programs(&world, &mut mesh, Node::B)?;
    for (ipv6, shape) in attacks {
        let to = SocketAddr::new(world.pod("server").ip(ipv6), PORT);
        let from = SocketAddr::new(world.pod("outsider").ip(ipv6), 41001);
        wait_until_ok("the attack itself works", DEADLINE, || {
            let flags = syn(&mut outsider, from, to, shape)?;
            ensure!(flags.contains(&SYN_ACK), "{shape:?} {flags:x?}");
            Ok(())
        })?;
    }
    Ok(())
}

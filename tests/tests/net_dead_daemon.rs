//! A daemon that is dead: nothing leaves its pods in the clear, the rest goes on, and the next daemon takes over.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use warren_tests::agent::{Agent, Outcome, Serve};
use warren_tests::demo::wire::Capture;
use warren_tests::wait::wait_until_ok;
use warren_tests::{DEADLINE, Mesh, Node, PodSpec, ServiceSpec, World};

const PORT: u16 = 7000;
const AT_ONCE: Duration = Duration::from_secs(1);

fn world(prefix: &str) -> Result<World> {
    World::builder(prefix)
        .pod(PodSpec::new("client", Node::A))
        .pod(PodSpec::new("neighbour", Node::A))
        .pod(PodSpec::new("server", Node::B))
        .pod(PodSpec::outsider("outsider", Node::B))
        .service(ServiceSpec::new("server", 10, PORT))
        .start()
}

fn any(ipv6: bool, port: u16) -> SocketAddr {
    let any = if ipv6 { "::".parse() } else { "0.0.0.0".parse() };
    SocketAddr::new(any.expect("an address"), port)
}

/// A refusal: by the system call itself, and at once in the fastest of three tries, as the machine may stand still during
/// one.
fn assert_refused(client: &mut Agent, to: SocketAddr, what: &str) -> Result<()> {
    let mut fastest = Duration::MAX;
    for _ in 0..3 {
        match client.connect("refused", to, DEADLINE)? {
            Outcome::Failed { errno, after_us } => {
                assert!(
                    ["EHOSTUNREACH", "ECONNREFUSED", "ECONNRESET"].contains(&errno.as_str()),
                    "{what}: {errno}"
                );
                fastest = fastest.min(Duration::from_micros(after_us));
            }
            other => panic!("{what}: {other:?}"),
        }
    }
    assert!(fastest < AT_ONCE, "{what} took {fastest:?}");
    Ok(())
}

#[test]
fn with_the_daemon_dead_mesh_calls_are_refused_nothing_leaks_and_the_next_daemon_serves() -> Result<()> {
    let mut world = world("wt-dead")?;
    let mut mesh = Mesh::start(&world)?;
    let mut client = Agent::start(world.pod("client"))?;
    let mut capture = Capture::start(&world)?;
    let mut servers = Vec::new();
    for pod in ["server", "neighbour", "outsider"] {
        let mut agent = Agent::start(world.pod(pod))?;
        agent.must_listen("echo", any(true, PORT), Serve::Echo)?;
        servers.push(agent);
    }
    for ipv6 in [false, true] {
        let server = SocketAddr::new(world.pod("server").ip(ipv6), PORT);
        client.must_connect("before", server, DEADLINE)?;
        client.must_echo("before", "through the mesh", DEADLINE)?;
    }

    mesh.daemon_mut(Node::A).kill()?;
    let mark = capture.fence(&world)?;
    // Created while nobody could tell the kernel.
    world.add_pods(vec![PodSpec::new("newcomer", Node::B)])?;
    let mut newcomer = Agent::start(world.pod("newcomer"))?;
    newcomer.must_listen("echo", any(true, PORT), Serve::Echo)?;
    for ipv6 in [false, true] {
        let vip = if ipv6 {
            world.service("server").v6().into()
        } else {
            world.service("server").v4().into()
        };
        for (what, ip) in [
            ("a pod of the other node", world.pod("server").ip(ipv6)),
            ("a pod of the same node", world.pod("neighbour").ip(ipv6)),
            ("a service", vip),
            (
                "a pod that is newer than the daemon's death",
                world.pod("newcomer").ip(ipv6),
            ),
        ] {
            assert_refused(&mut client, SocketAddr::new(ip, PORT), what)?;
        }
        let outsider = SocketAddr::new(world.pod("outsider").ip(ipv6), PORT);
        // The very socket that was refused may go elsewhere.
        let again = client.dial("refused", outsider, DEADLINE)?;
        ensure!(
            again.connected(),
            "a refused socket that dials outside the mesh: {again:?}"
        );
        client.must_echo("refused", "outside the mesh", DEADLINE)?;
        client.must_connect("outside", outsider, DEADLINE)?;
        client.must_echo("outside", "outside the mesh", DEADLINE)?;
    }
    let end = capture.fence(&world)?;
    let outsider = [world.pod("outsider").ip(false), world.pod("outsider").ip(true)];
    for packet in &capture.packets()?[mark..end] {
        let Some(segment) = &packet.tcp else { continue };
        let of_client = [false, true].map(|six| world.pod("client").ip(six));
        ensure!(
            !of_client.contains(&segment.from.ip())
                || outsider.contains(&segment.to.ip())
                || segment.to.port() == 15008,
            "the client's plaintext on the wire: {segment:?}"
        );
    }

    let begin = Instant::now();
    mesh.daemon_mut(Node::A).start()?;
    for ipv6 in [false, true] {
        for pod in ["server", "neighbour", "newcomer"] {
            let to = SocketAddr::new(world.pod(pod).ip(ipv6), PORT);
            wait_until_ok("a new daemon serves", DEADLINE, || {
                client.must_connect("after", to, DEADLINE)?;
                client.must_echo("after", "through the mesh again", DEADLINE)
            })?;
        }
    }
    eprintln!(
        "the new daemon served everyone {} ms after its start",
        begin.elapsed().as_millis()
    );
    Ok(())
}

#[test]
fn with_the_daemon_dead_a_wildcard_listener_does_not_get_its_own_calls_to_others() -> Result<()> {
    let world = world("wt-self")?;
    let mut mesh = Mesh::start(&world)?;
    let mut client = Agent::start(world.pod("client"))?;
    client.must_listen("own", any(true, PORT), Serve::Greet)?;
    mesh.daemon_mut(Node::A).kill()?;
    for ipv6 in [false, true] {
        let other = SocketAddr::new(world.pod("server").ip(ipv6), PORT);
        assert_refused(&mut client, other, "another service on the same port")?;
        ensure!(client.accepted("own")?.is_empty(), "the pod was connected to itself");
    }
    Ok(())
}

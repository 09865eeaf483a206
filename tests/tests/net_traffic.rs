//! What applications do with connections, done through the mesh: on one node and across two, by both families.

use std::fs;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use warren_tests::agent::{Agent, Order, Outcome, Serve};
use warren_tests::wait::wait_until_ok;
use warren_tests::{DEADLINE, Mesh, Node, Pod, PodSpec, ServiceSpec, World};

const PORT: u16 = 7000;

fn world(prefix: &str) -> Result<World> {
    World::builder(prefix)
        .pod(PodSpec::new("client", Node::A))
        .pod(PodSpec::new("neighbour", Node::A))
        .pod(PodSpec::new("server", Node::B))
        .service(ServiceSpec::new("server", 10, 80).target_port(PORT))
        .service(ServiceSpec::new("client", 11, 80).target_port(PORT))
        .start()
}

/// How many bytes lie unread in the pod's connections to its own `port`.
fn unread_at(pod: &Pod, port: u16) -> Result<u64> {
    // A dual-stack listener's IPv4 connections are in the table of IPv6.
    let text = pod
        .namespace
        .run(|| Ok(["tcp", "tcp6"].map(|name| fs::read_to_string(format!("/proc/thread-self/net/{name}")))))?;
    const ESTABLISHED: &str = "01";
    let port = format!(":{port:04X}");
    let mut unread = 0;
    for table in text {
        for line in table?.lines() {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let [_, local, _, ESTABLISHED, queues, ..] = fields[..] else {
                continue;
            };
            if local.ends_with(&port) {
                let (_, received) = queues.split_once(':').context("no queues")?;
                unread += u64::from_str_radix(received, 16)?;
            }
        }
    }
    Ok(unread)
}

fn any(port: u16) -> SocketAddr {
    SocketAddr::new("::".parse().expect("an address"), port)
}

#[test]
fn pods_talk_by_address_by_service_and_to_themselves_and_servers_see_who_calls() -> Result<()> {
    let world = world("wt-talk")?;
    let _mesh = Mesh::start(&world)?;
    let mut servers = Vec::new();
    for pod in ["server", "neighbour", "client"] {
        let mut agent = Agent::start(world.pod(pod))?;
        agent.must_listen("greet", any(PORT), Serve::Greet)?;
        servers.push(agent);
    }
    let mut client = Agent::start(world.pod("client"))?;
    for ipv6 in [false, true] {
        let own = world.pod("client").ip(ipv6);
        let vip = |name: &str| match ipv6 {
            true => SocketAddr::new(world.service(name).v6().into(), 80),
            false => SocketAddr::new(world.service(name).v4().into(), 80),
        };
        for (what, to) in [
            (
                "a pod of the other node",
                SocketAddr::new(world.pod("server").ip(ipv6), PORT),
            ),
            (
                "a pod of the same node",
                SocketAddr::new(world.pod("neighbour").ip(ipv6), PORT),
            ),
            ("a service", vip("server")),
            ("its own service", vip("client")),
            ("itself", SocketAddr::new(own, PORT)),
        ] {
            let outcome = client.connect("call", to, DEADLINE)?;
            // The address that was dialled stays the peer, whoever answers.
            let Outcome::Connected { peer, .. } = outcome else {
                anyhow::bail!("{what}, {to}: {outcome:?}")
            };
            ensure!(peer == to, "{what}: the peer of {to} is {peer}");
            // The server speaks first.
            let said = client.receive("call", DEADLINE)?;
            let hello = format!("hello {}", SocketAddr::new(own, 0));
            let hello = hello.trim_end_matches('0');
            ensure!(
                matches!(&said, Outcome::Received { text } if text.starts_with(hello)),
                "{what}: {said:?} does not begin with {hello:?}"
            );
            client.must_echo("call", "there and back", DEADLINE).context(what)?;
            // Half a connection closes; the other half goes on until it has said all.
            client.send("call", "last words")?;
            client.order(&Order::HalfClose { name: "call".into() })?;
            let (rest, end) = client.read_to_end("call", DEADLINE)?;
            ensure!(rest == "last words" && end == Outcome::End, "{what}: {rest:?}, {end:?}");
        }
    }
    Ok(())
}

#[test]
fn a_policy_in_dry_run_is_told_in_the_log_and_never_enforced() -> Result<()> {
    let world = world("wt-dry")?;
    let mesh = Mesh::start(&world)?;
    world.apply(
        "dry.yaml",
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {name: nobody, namespace: default, annotations: {istio.io/dry-run: \"true\"}}\n\
         spec: {action: DENY, rules: [{}]}\n",
    )?;
    let mut server = Agent::start(world.pod("server"))?;
    server.must_listen("echo", any(PORT), Serve::Echo)?;
    let mut client = Agent::start(world.pod("client"))?;
    let to = SocketAddr::new(world.pod("server").ip(false), PORT);
    wait_until_ok("the policy is told of", DEADLINE, || {
        client.must_connect("call", to, DEADLINE)?;
        client.must_echo("call", "there and back", DEADLINE)?;
        client.order(&Order::Close {
            name: "call".into(),
            reset: false,
        })?;
        let line = mesh
            .daemon(Node::B)
            .wait_for_line("policies in dry run", Duration::from_millis(500))?;
        ensure!(line.contains("denied by default/nobody"), "{line}");
        Ok(())
    })
}

#[test]
fn a_reset_of_either_side_arrives_as_a_reset_at_the_other() -> Result<()> {
    let world = world("wt-reset")?;
    let _mesh = Mesh::start(&world)?;
    let mut server = Agent::start(world.pod("server"))?;
    server.must_listen("hold", any(PORT), Serve::Discard)?;
    let mut client = Agent::start(world.pod("client"))?;
    let to = SocketAddr::new(world.pod("server").ip(false), PORT);

    client.must_connect("call", to, DEADLINE)?;
    client.send("call", "hello")?;
    wait_until_ok("the server has it", DEADLINE, || {
        ensure!(!server.accepted("hold")?.is_empty(), "nobody came");
        Ok(())
    })?;
    client.order(&Order::Close {
        name: "call".into(),
        reset: true,
    })?;
    wait_until_ok("the server's connection is gone", DEADLINE, || {
        // A socket that was reset has no peer any more.
        ensure!(server.accepted("hold")?.is_empty(), "still there");
        Ok(())
    })?;

    let mut slow = Agent::start(world.pod("server"))?;
    slow.must_listen("park", any(PORT + 1), Serve::Hold)?;
    let to = SocketAddr::new(to.ip(), PORT + 1);
    client.must_connect("second", to, DEADLINE)?;
    client.send("second", "hello")?;
    // Not before the bytes are there unread: an end without any is an orderly one.
    wait_until_ok("the server has it", DEADLINE, || {
        ensure!(!slow.accepted("park")?.is_empty(), "nobody came");
        let unread = unread_at(world.pod("server"), PORT + 1)?;
        ensure!(unread > 0, "no bytes came");
        Ok(())
    })?;
    drop(slow);
    let (_, end) = client.read_to_end("second", DEADLINE)?;
    ensure!(
        end.errno() == Some("ECONNRESET"),
        "unread bytes were thrown away: {end:?}"
    );
    Ok(())
}

#[test]
fn a_connection_from_before_the_capture_survives_it_and_new_ones_are_in_the_mesh() -> Result<()> {
    let mut world = World::builder("wt-before")
        .pod(PodSpec::outsider("client", Node::A))
        .pod(PodSpec::outsider("server", Node::B))
        .start()?;
    let mesh = Mesh::start(&world)?;
    let mut server = Agent::start(world.pod("server"))?;
    server.must_listen("echo", any(PORT), Serve::Echo)?;
    let mut client = Agent::start(world.pod("client"))?;
    for ipv6 in [false, true] {
        let to = SocketAddr::new(world.pod("server").ip(ipv6), PORT);
        client.must_connect(&format!("old-{ipv6}"), to, DEADLINE)?;
    }
    for pod in ["server", "client"] {
        world.change_pod(pod, |spec| spec.in_mesh = true)?;
    }
    for ipv6 in [false, true] {
        let to = SocketAddr::new(world.pod("server").ip(ipv6), PORT);
        wait_until_ok("new connections are in the mesh", DEADLINE, || {
            let opened = || {
                mesh.daemon(Node::B).metric(
                    "istio_tcp_connections_opened_total",
                    &["mutual_tls", "reporter=\"destination\""],
                )
            };
            let before = opened()?;
            client.must_connect("new", to, DEADLINE)?;
            client.must_echo("new", "a new one", DEADLINE)?;
            ensure!(opened()? > before, "not through HBONE yet");
            Ok(())
        })?;
        let old = format!("old-{ipv6}");
        client.must_echo(&old, "still here", DEADLINE)?;
    }
    Ok(())
}

#[test]
fn a_tunnel_silent_for_many_pings_and_idle_times_still_carries_bytes_both_ways() -> Result<()> {
    let world = world("wt-silent")?;
    // 10 s and 5 min, divided by 600. How long an answer may take is no interval, and stays one that a busy machine keeps.
    let mut mesh = Mesh::builder()
        .node_arg("--hbone-ping")
        .node_arg("17ms")
        .node_arg("--hbone-dead-after")
        .node_arg("60s")
        .node_arg("--hbone-idle")
        .node_arg("500ms")
        .start(&world)?;
    let mut server = Agent::start(world.pod("server"))?;
    server.must_listen("echo", any(PORT), Serve::Echo)?;
    let mut client = Agent::start(world.pod("client"))?;
    let to = SocketAddr::new(world.pod("server").ip(false), PORT);
    client.must_connect("call", to, DEADLINE)?;
    client.must_echo("call", "before the silence", DEADLINE)?;
    // Ten idle times, and three hundred pings: time is what this is about.
    std::thread::sleep(Duration::from_secs(5));
    client.must_echo("call", "after the silence", DEADLINE)?;
    client.close("call")?;
    // And with nobody left, the connection itself goes.
    mesh.daemon_mut(Node::A);
    wait_until_ok("the idle connection is closed", DEADLINE, || {
        let open = mesh.daemon(Node::A).metric("warren_hbone_connections", &["client"])?;
        ensure!(open == 0.0, "{open} open");
        Ok(())
    })
}

const STRICT: &str = "
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {name: default, namespace: default}
spec: {mtls: {mode: STRICT}}
";

#[test]
fn under_strict_the_nodes_own_processes_reach_a_pod_and_a_pod_on_the_nodes_network_does_not() -> Result<()> {
    let world = world("wt-probe")?;
    let _mesh = Mesh::start(&world)?;
    let mut server = Agent::start(world.pod("server"))?;
    server.must_listen("echo", any(PORT), Serve::Echo)?;
    world.apply("strict.yaml", STRICT)?;
    let mut kubelet = Agent::start(world.node(Node::B))?;
    let mut host_network = world.node(Node::B).clone();
    host_network.cgroup = world.pod("server").cgroup.clone();
    let mut host_network = Agent::start(&host_network)?;
    for ipv6 in [false, true] {
        let to = SocketAddr::new(world.pod("server").ip(ipv6), PORT);
        wait_until_ok("a pod on the node's network is refused", DEADLINE, || {
            let outcome = host_network.connect("call", to, DEADLINE)?;
            ensure!(!outcome.connected(), "let in");
            Ok(())
        })?;
        kubelet.must_connect("probe", to, DEADLINE)?;
        kubelet.must_echo("probe", "are you well?", DEADLINE)?;
    }
    Ok(())
}

#[test]
fn the_guard_works_by_a_filter_where_the_kernel_has_no_links_for_it() -> Result<()> {
    let world = world("wt-clsact")?;
    let mut mesh = Mesh::builder().node_arg("--tc").node_arg("netlink").start(&world)?;
    let mut server = Agent::start(world.pod("server"))?;
    server.must_listen("echo", any(PORT), Serve::Echo)?;
    let mut client = Agent::start(world.pod("client"))?;
    let to = SocketAddr::new(world.pod("server").ip(false), PORT);
    client.must_connect("call", to, DEADLINE)?;
    client.must_echo("call", "by a filter", DEADLINE)?;
    let filters = || {
        world.pod("client").namespace.run(|| {
            let output = std::process::Command::new("tc")
                .args(["filter", "show", "dev", "eth0", "egress"])
                .output()?;
            Ok(String::from_utf8_lossy(&output.stdout).matches("bpf").count())
        })
    };
    let before = filters()?;
    ensure!(before > 0, "no filter");
    mesh.daemon_mut(Node::A).kill()?;
    ensure!(filters()? == before, "the filter went with the daemon");
    mesh.daemon_mut(Node::A).restart(DEADLINE)?;
    wait_until_ok("the next daemon has replaced it", DEADLINE, || {
        ensure!(filters()? == before, "{} filters", filters()?);
        Ok(())
    })?;
    client.must_connect("after", to, DEADLINE)?;
    client.must_echo("after", "by the next daemon", DEADLINE)
}

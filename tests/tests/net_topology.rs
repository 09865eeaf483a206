//! The world that the other tests stand on: does it reach, and does it vanish?

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;

use anyhow::{Context, Result};
use warren_tests::{DEADLINE, Node, Place, PodSpec, World};

fn world(prefix: &str) -> Result<World> {
    World::builder(prefix)
        .pod(PodSpec::new("client", Node::A))
        .pod(PodSpec::new("neighbour", Node::A))
        .pod(PodSpec::new("server", Node::B))
        .pod(PodSpec::outsider("outsider", Node::B))
        .start()
}

/// One connection from `from` to `to`; what the server sees as the client's address must be the client's own.
fn call(from: &Place, to: &Place, ipv6: bool) -> Result<()> {
    let context = || format!("{} to {}, ipv6 {ipv6}", from.name, to.name);
    let listener = to
        .namespace
        .run(|| Ok(TcpListener::bind(SocketAddr::new(to.ip(ipv6), 7000))?))
        .with_context(context)?;
    let server = std::thread::spawn(move || -> Result<SocketAddr> {
        let (mut stream, peer) = listener.accept()?;
        stream.write_all(b"hello")?;
        Ok(peer)
    });
    let text = from.namespace.run(|| {
        let mut stream = TcpStream::connect_timeout(&SocketAddr::new(to.ip(ipv6), 7000), DEADLINE)?;
        stream.set_read_timeout(Some(DEADLINE))?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        Ok(text)
    });
    assert_eq!(text.with_context(context)?, "hello");
    let peer = server.join().expect("the server thread ends").with_context(context)?;
    assert_eq!(peer.ip(), from.ip(ipv6), "{}", context());
    Ok(())
}

#[test]
fn pods_nodes_and_outsiders_reach_each_other_by_both_families_from_their_own_addresses() -> Result<()> {
    let world = world("wt-reach")?;
    for ipv6 in [false, true] {
        for from in ["client", "outsider"] {
            for to in ["server", "neighbour"] {
                call(world.pod(from), world.pod(to), ipv6)?;
            }
        }
        call(world.pod("server"), world.pod("outsider"), ipv6)?;
        for node in Node::BOTH {
            call(world.node(node), world.pod("server"), ipv6)?;
            call(world.node(node), world.controller(), ipv6)?;
        }
    }
    Ok(())
}

#[test]
fn no_namespace_of_a_world_holds_a_packet_filter_rule() -> Result<()> {
    let world = world("wt-rules")?;
    for namespace in world.namespaces() {
        let output = namespace.run(|| Ok(Command::new("nft").args(["list", "ruleset"]).output()?))?;
        assert!(output.status.success(), "{output:?}");
        assert_eq!(String::from_utf8_lossy(&output.stdout), "", "{}", namespace.name());
    }
    Ok(())
}

#[test]
fn namespaces_use_cubic_and_the_machine_keeps_its_own_list() -> Result<()> {
    let allowed = || std::fs::read_to_string("/proc/sys/net/ipv4/tcp_allowed_congestion_control");
    let before = allowed()?;
    let world = world("wt-cubic")?;
    assert_eq!(allowed()?, before);
    for namespace in world.namespaces() {
        let used = namespace.run(|| Ok(std::fs::read_to_string("/proc/sys/net/ipv4/tcp_congestion_control")?))?;
        assert_eq!(used.trim(), "cubic", "{}", namespace.name());
    }
    Ok(())
}

#[test]
fn a_world_that_is_dropped_leaves_no_namespace_no_process_and_no_cgroup() -> Result<()> {
    let world = world("wt-gone")?;
    let mut sleeper = world.pod("client").command("sleep").arg("1000").spawn()?;
    let members = std::fs::read_to_string(world.pod("client").cgroup.join("cgroup.procs"))?;
    assert_eq!(members.trim(), sleeper.pid().to_string());
    let paths: Vec<_> = world.namespaces().map(|namespace| namespace.path()).collect();
    let (cgroup, directory) = (world.node_cgroup(Node::A), world.directory().to_owned());
    assert!(paths.iter().all(|path| path.exists()) && cgroup.exists() && directory.exists());
    drop(world);
    assert!(!sleeper.is_running());
    assert!(paths.iter().all(|path| !path.exists()), "{paths:?}");
    assert!(!cgroup.exists() && !directory.exists());
    let mounts = std::fs::read_to_string("/proc/mounts")?;
    assert!(!mounts.contains("wt-gone"), "{mounts}");
    Ok(())
}

#[test]
fn a_world_left_by_a_run_that_died_is_cleared_by_the_next() -> Result<()> {
    let mut first = world("wt-left")?;
    let mut sleeper = first.pod("client").command("sleep").arg("1000").spawn()?;
    first.add_pods(vec![PodSpec::new("late", Node::B)])?;
    let late = first.pod("late").namespace.path();
    first.keep();
    assert!(late.exists() && sleeper.is_running());
    let second = world("wt-left")?;
    assert!(!late.exists() && !sleeper.is_running());
    call(second.pod("client"), second.pod("server"), false)
}

#[test]
fn two_worlds_of_one_prefix_are_refused() -> Result<()> {
    let _first = world("wt-twice")?;
    let error = world("wt-twice").expect_err("the prefix is taken");
    assert!(
        format!("{error:#}").contains("another process has a world named `wt-twice` up"),
        "{error:#}"
    );
    Ok(())
}

#[test]
fn a_late_pod_is_reached_and_a_deleted_one_is_gone() -> Result<()> {
    let mut world = world("wt-late")?;
    world.add_pods(vec![PodSpec::new("late", Node::B)])?;
    call(world.pod("client"), world.pod("late"), true)?;
    let (path, manifest) = (
        world.pod("late").namespace.path(),
        world.manifest_directory().join("pod-default-late.yaml"),
    );
    assert!(manifest.exists());
    world.delete_pod("late")?;
    assert!(!path.exists() && !manifest.exists());
    Ok(())
}

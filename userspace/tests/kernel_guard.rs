//! The guard, which keeps marked packets inside a captured pod, on the real kernel.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test")]

mod world;

use socket2::{Domain, Socket, Type};
use std::{io::Write, net::TcpStream, path::PathBuf};
use warren::kernel::{Kernel, Reason};
use world::*;

#[test]
fn an_open_steered_connection_does_not_go_on_in_the_clear_when_a_rule_is_flushed() {
    for guard in Guard::ALL {
        let Some(world) = World::guarded_by(guard) else { return };
        let kernel = world.open();
        let a = capture(&kernel, &world.a, A, &PERMISSIVE);
        guard.link(&kernel, a.number, &world.a);
        for (peer, family) in B.into_iter().zip(["-4", "-6"]) {
            serve(&world.b, peer, 8080);
            let mut stream = world
                .a
                .run(|| TcpStream::connect_timeout(&at(peer, 8080), DEADLINE))
                .unwrap()
                .unwrap();
            answer(&stream).unwrap();
            let before = count(&kernel, Reason::MarkedPacketLeaving);
            world.shell(&format!("ip -n $P-a {family} rule del pref 2 fwmark 0x111"));
            stream.write_all(b"secret").unwrap();
            eventually("the guard drops it", || {
                count(&kernel, Reason::MarkedPacketLeaving) > before
            });
        }
    }
}

#[test]
fn the_guard_is_put_on_interfaces_that_appear_later() {
    for guard in Guard::ALL {
        let Some(world) = World::guarded_by(guard) else { return };
        let kernel = world.open();
        let a = capture(&kernel, &world.a, A, &PERMISSIVE);
        world.shell("ip -n $P-a link add late type veth peer name late-peer && ip -n $P-a link set late-peer up && ip -n $P-a link set late up && ip -n $P-a addr add 192.0.2.1/24 dev late");
        for _ in 0..2 {
            kernel.guard_interface(a.number, &world.a, "late").unwrap();
            kernel.guard_interface(a.number, &world.a, "never-there").unwrap();
            guard.link(&kernel, a.number, &world.a);
        }
        // Marked, and routed to the device by somebody's rule before ours.
        world.shell("ip -n $P-a rule add pref 0 to 192.0.2.2 lookup main && ip -n $P-a neigh add 192.0.2.2 lladdr 02:00:00:00:00:01 dev late");
        let socket = world
            .a
            .run(|| Socket::new(Domain::IPV4, Type::DGRAM, None).unwrap())
            .unwrap();
        socket.set_mark(warren::net::marks::STEER).unwrap();
        let _ = socket.send_to(b"x", &at("192.0.2.2", 9).into());
        eventually("the guard drops it", || {
            count(&kernel, Reason::MarkedPacketLeaving) == 1
        });
    }
}

#[test]
fn a_link_takes_the_place_of_a_pods_filter_and_a_release_leaves_neither() {
    for guard in Guard::ALL {
        let Some(world) = World::guarded_by(guard) else { return };
        let kernel = world.open();
        let a = capture(&kernel, &world.a, A, &strict());
        assert_eq!(
            (has_clsact(&world), guard_links(&world)),
            (true, 0),
            "{guard:?}: at first"
        );
        for _ in 0..2 {
            guard.link(&kernel, a.number, &world.a);
        }
        let is_linked = guard == Guard::Linked;
        assert_eq!(
            (has_clsact(&world), guard_links(&world)),
            (!is_linked, usize::from(is_linked)),
            "{guard:?}"
        );
        // The next daemon finds either, and keeps it.
        drop(kernel);
        let kernel = Kernel::open(&world.config).unwrap();
        let _listeners = listen(&kernel, a.number, &world.a);
        attach(&kernel, a.number, &world.a);
        assert_eq!(
            (has_clsact(&world), guard_links(&world)),
            (!is_linked, usize::from(is_linked)),
            "{guard:?}, the next daemon"
        );
        kernel.stop_steering(a.number).unwrap();
        kernel.detach_pod(a.number, Some(&world.a)).unwrap();
        assert_eq!(
            (has_clsact(&world), guard_links(&world)),
            (false, 0),
            "{guard:?}: released"
        );
    }
}

#[test]
fn a_filter_of_somebody_else_stays_with_its_qdisc() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    world.shell(
        "tc -n $P-a qdisc add dev eth0 clsact && tc -n $P-a filter add dev eth0 ingress bpf bytecode '1,6 0 0 0'",
    );
    let a = capture(&kernel, &world.a, A, &strict());
    kernel.link_guards(a.number, &world.a).unwrap();
    kernel.stop_steering(a.number).unwrap();
    kernel.detach_pod(a.number, Some(&world.a)).unwrap();
    let filters = world.output("tc -n $P-a filter show dev eth0 ingress");
    assert!(filters.contains("bytecode"), "{filters:?}");
    assert_eq!(world.output("tc -n $P-a filter show dev eth0 egress").trim(), "");
}

#[test]
fn a_filter_of_an_earlier_daemon_is_replaced_and_taken_off_at_release() {
    let Some(world) = World::guarded_by(Guard::Filter) else {
        return;
    };
    let filters = |world: &World| {
        let shown = world.output("tc -n $P-a filter show dev eth0 egress");
        shown.matches("handle 0x5752").count()
    };
    let first = world.open();
    let a = capture(&first, &world.a, A, &PERMISSIVE);
    assert_eq!(filters(&world), 1);
    drop(first);
    let second = world.open();
    attach(&second, a.number, &world.a);
    assert_eq!(filters(&world), 1);
    second.stop_steering(a.number).unwrap();
    second.detach_pod(a.number, Some(&world.a)).unwrap();
    assert_eq!(filters(&world), 0);
}

fn has_clsact(world: &World) -> bool {
    world.output("tc -n $P-a qdisc show dev eth0").contains("clsact")
}

fn guard_links(world: &World) -> usize {
    let is_guard = |path: &PathBuf| {
        path.file_name()
            .is_some_and(|name| name.to_string_lossy().starts_with("guard"))
    };
    world.links().iter().filter(|path| is_guard(path)).count()
}

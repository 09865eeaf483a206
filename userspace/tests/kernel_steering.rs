//! What leaves a captured pod, on the real kernel.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test")]

mod world;

use socket2::{Domain, Socket, Type};
use std::{
    collections::HashMap,
    io::{ErrorKind, Read, Write},
    net::TcpStream,
};
use warren::kernel::{Kernel, MapError, Reason, WorkloadEntry};
use world::*;

#[test]
fn a_call_to_a_workload_of_the_mesh_reaches_the_daemon_with_its_destination() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    let _a = capture(&kernel, &world.a, A, &PERMISSIVE);
    for peer in B {
        serve(&world.b, peer, 8080);
        assert_answered(dial(&world.a, at(peer, 8080)), "Outbound", at(peer, 8080));
    }
    assert_eq!(count(&kernel, Reason::SteerWorkload), 2);
    assert_eq!(count(&kernel, Reason::ArriveSteered), 2);
}

#[test]
fn an_address_of_the_cluster_that_nobody_knows_is_steered_and_the_world_outside_is_not() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    let _a = capture(&kernel, &world.a, A, &PERMISSIVE);
    for (nobody, node) in NOBODY.into_iter().zip(NODE) {
        assert_answered(dial(&world.a, at(nobody, 80)), "Outbound", at(nobody, 80));
        let outside = serve(&world.node, node, 8080);
        assert_answered(dial(&world.a, outside), "app", outside);
    }
    assert_eq!(count(&kernel, Reason::SteerUnknown), 2);
    assert_eq!(count(&kernel, Reason::ConnectOutsideCluster), 2);
}

#[test]
fn a_workload_outside_the_mesh_is_reached_directly_daemon_or_not() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    for peer in B {
        kernel.upsert_workload(ip(peer), WorkloadEntry::OUTSIDE).unwrap();
    }
    let a = capture(&kernel, &world.a, A, &PERMISSIVE);
    let apps = B.map(|peer| serve(&world.b, peer, 8080));
    for app in apps {
        assert_answered(dial(&world.a, app), "app", app);
    }
    close(a.listeners);
    for app in apps {
        assert_answered(dial(&world.a, app), "app", app);
    }
}

#[test]
fn a_service_is_steered_refused_or_left_alone_by_what_stands_behind_it() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    let _a = capture(&kernel, &world.a, A, &PERMISSIVE);
    for vip in VIP {
        let vip = at(vip, 80);
        kernel.sync_services(&service(true, true)).unwrap();
        assert_answered(dial(&world.a, vip), "Outbound", vip);
        kernel.sync_services(&service(false, true)).unwrap();
        assert_fails(dial(&world.a, vip), ErrorKind::HostUnreachable);
        kernel.sync_services(&HashMap::new()).unwrap();
        assert_answered(dial(&world.a, vip), "Outbound", vip);
    }
    // Left alone, it leaves the pod for the node, where nobody listens.
    kernel.sync_services(&service(true, false)).unwrap();
    world.shell("ip -n $P-node addr add 10.96.0.10/32 dev lo");
    assert_fails(dial(&world.a, at(VIP[0], 80)), ErrorKind::ConnectionRefused);
    assert_eq!(count(&kernel, Reason::RefuseNoReadyEndpoint), 2);
    assert_eq!(count(&kernel, Reason::ConnectServiceOutsideMesh), 1);
}

#[test]
fn with_the_daemon_gone_mesh_connections_are_refused_at_once_and_others_go_on() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    let a = capture(&kernel, &world.a, A, &PERMISSIVE);
    close(a.listeners);
    for (peer, node) in B.into_iter().zip(NODE) {
        serve(&world.b, peer, 8080);
        let took = fastest(|| assert_fails(dial(&world.a, at(peer, 8080)), ErrorKind::HostUnreachable));
        assert!(took < SILENCE, "at once, not after a retransmission");
        let outside = serve(&world.node, node, 8080);
        assert_answered(dial(&world.a, outside), "app", outside);
    }
    assert_eq!(count(&kernel, Reason::RefuseNoListener), 6);

    // Another daemon's listeners, and it goes on.
    listen(&kernel, a.number, &world.a);
    for peer in B {
        assert_answered(dial(&world.a, at(peer, 8080)), "Outbound", at(peer, 8080));
    }
}

/// The second line behind the refusal at connect: a marked packet that no listener of the daemon waits for.
#[test]
fn what_turns_round_without_a_daemon_never_reaches_the_pods_own_wildcard_listener() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    let a = capture(&kernel, &world.a, A, &PERMISSIVE);
    close(a.listeners);
    serve(&world.a, "::", 8080);
    for (own, peer) in A.into_iter().zip(B) {
        // The daemon's mark for deliveries passes the decision at connect and turns round all the same.
        let answer = world
            .a
            .run(|| {
                let socket = Socket::new(Domain::for_address(at(peer, 8080)), Type::STREAM, None)?;
                socket.set_mark(warren::net::marks::DELIVER)?;
                socket.bind(&at(own, 0).into())?;
                socket.connect_timeout(&at(peer, 8080).into(), SILENCE)?;
                answer(&socket.into())
            })
            .unwrap();
        assert!(answer.is_err(), "{answer:?}");
    }
    assert!(
        count(&kernel, Reason::DropSteeredNoListener) >= 2,
        "{:?}",
        counted(&kernel)
    );
}

#[test]
fn nobody_dials_the_daemons_listeners() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    let a = capture(&kernel, &world.a, A, &PERMISSIVE);
    let ports = a.listeners.ports;
    for loopback in ["127.0.0.1", "127.1.2.3", "::1"] {
        for port in [ports.outbound, ports.plaintext, ports.hbone] {
            let answer = dial_for(&world.a, at(loopback, port), SILENCE);
            assert!(answer.is_err(), "{loopback}:{port} {answer:?}");
        }
        let app = serve(&world.a, loopback, 9090);
        assert_answered(dial(&world.a, app), "app", app);
    }
}

#[test]
fn a_pod_reaches_itself() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    let a = capture(&kernel, &world.a, A, &strict());
    serve(&world.a, "::", 8080);
    for own in A {
        assert_answered(dial(&world.a, at(own, 8080)), "app", at(own, 8080));
    }
    close(a.listeners);
    for own in A {
        assert_answered(dial(&world.a, at(own, 8080)), "app", at(own, 8080));
    }
    assert_eq!(count(&kernel, Reason::ConnectToSelf), 4);
    assert_eq!(count(&kernel, Reason::ArriveOwnAddress), 4);
}

#[test]
fn a_socket_bound_to_a_device_is_steered_all_the_same() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    let _a = capture(&kernel, &world.a, A, &PERMISSIVE);
    for peer in B {
        serve(&world.b, peer, 8080);
        let stream = world
            .a
            .run(|| {
                let socket = Socket::new(Domain::for_address(at(peer, 8080)), Type::STREAM, None).unwrap();
                socket.bind_device(Some(b"eth0")).unwrap();
                socket.connect_timeout(&at(peer, 8080).into(), DEADLINE).unwrap();
                TcpStream::from(socket)
            })
            .unwrap();
        assert_answered(answer(&stream), "Outbound", at(peer, 8080));
    }
    assert_eq!(count(&kernel, Reason::DeviceUnbound), 2);
}

/// Runs in a process of its own, without the capability to leave a device.
#[test]
fn child_that_dials_bound_to_a_device_without_privileges() {
    let Some(world) = World::of_parent() else { return };
    wait_for_parent();
    for peer in B {
        let dialled = world.a.run(|| {
            let socket = Socket::new(Domain::for_address(at(peer, 8080)), Type::STREAM, None).unwrap();
            socket.bind_device(Some(b"eth0")).unwrap();
            nix::unistd::seteuid(65534.into()).unwrap();
            let dialled = socket
                .connect_timeout(&at(peer, 8080).into(), SILENCE)
                .map_err(|error| error.kind());
            nix::unistd::seteuid(0.into()).unwrap();
            dialled
        });
        println!("answer: {:?}", dialled.unwrap());
    }
}

#[test]
fn a_socket_that_may_not_leave_its_device_does_not_leave_the_pod_either() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    let _a = capture(&kernel, &world.a, A, &PERMISSIVE);
    for peer in B {
        serve(&world.b, peer, 8080);
    }
    let mut child = world.spawn("child_that_dials_bound_to_a_device_without_privileges", world.cgroup());
    for _ in B {
        assert_eq!(child.said("answer: "), "Err(TimedOut)");
    }
    child.end();
    assert!(
        count(&kernel, Reason::MarkedPacketLeaving) >= 2,
        "{:?}",
        counted(&kernel)
    );
    assert_eq!(count(&kernel, Reason::DeviceKept), 2);
}

#[test]
fn a_socket_that_was_refused_may_dial_something_outside_the_mesh() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    let a = capture(&kernel, &world.a, A, &PERMISSIVE);
    close(a.listeners);
    for (peer, node) in B.into_iter().zip(NODE) {
        let outside = serve(&world.node, node, 8080);
        let stream = world
            .a
            .run(|| {
                let socket = Socket::new(Domain::for_address(outside), Type::STREAM, None).unwrap();
                let refused = socket.connect(&at(peer, 8080).into()).unwrap_err();
                assert_eq!(refused.kind(), ErrorKind::HostUnreachable);
                socket.connect(&outside.into()).unwrap();
                TcpStream::from(socket)
            })
            .unwrap();
        assert_answered(answer(&stream), "app", outside);
    }
}

#[test]
fn a_full_map_never_lets_mesh_traffic_out() {
    let Some(mut world) = World::new() else { return };
    world.config.sizes.workloads = 2;
    let kernel = Kernel::open(&world.config).unwrap();
    kernel.sync_ranges(&ranges()).unwrap();
    let workloads = A
        .iter()
        .chain(&B)
        .map(|address| (ip(address), WorkloadEntry::IN_MESH))
        .collect();
    assert!(matches!(
        kernel.sync_workloads(&workloads),
        Err(MapError::Full {
            map: "WORKLOADS",
            size: 2
        })
    ));
    assert_eq!(kernel.full_maps()[0].refused, 2);
    let _a = capture(&kernel, &world.a, A, &PERMISSIVE);
    for peer in B {
        serve(&world.b, peer, 8080);
        assert_answered(dial(&world.a, at(peer, 8080)), "Outbound", at(peer, 8080));
    }
}

#[test]
fn a_released_pods_new_connections_are_its_own_again_and_its_open_ones_go_on() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    let a = capture(&kernel, &world.a, A, &strict());
    serve(&world.a, A[0], 8080);
    serve(&world.b, B[0], 8080);
    let mut open = world
        .a
        .run(|| TcpStream::connect_timeout(&at(B[0], 8080), DEADLINE))
        .unwrap()
        .unwrap();
    answer(&open).unwrap();
    assert_fails(dial(&world.b, at(A[0], 8080)), ErrorKind::ConnectionRefused);

    kernel.stop_steering(a.number).unwrap();
    assert_answered(dial(&world.a, at(B[0], 8080)), "app", at(B[0], 8080));
    assert_answered(dial(&world.b, at(A[0], 8080)), "app", at(A[0], 8080));
    open.write_all(b"still").unwrap();
    open.set_nonblocking(true).unwrap();
    assert_eq!(open.read(&mut [0]).unwrap_err().kind(), ErrorKind::WouldBlock);

    close(a.listeners);
    kernel.detach_pod(a.number, Some(&world.a)).unwrap();
    assert_answered(dial(&world.a, at(B[0], 8080)), "app", at(B[0], 8080));
    let pinned = world.config.pin_dir.join("v1/pods");
    assert_eq!(std::fs::read_dir(pinned).unwrap().count(), 0);
}

/// Collects what is logged.
#[derive(Clone, Default)]
struct Lines(std::sync::Arc<std::sync::Mutex<Vec<u8>>>);

impl Write for Lines {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(line)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn with_trace_on_every_decision_is_a_line_with_its_reason() {
    let Some(mut world) = World::new() else { return };
    world.config.trace = true;
    let kernel = world.open();
    let lines = Lines::default();
    let writer = lines.clone();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(tracing::Level::TRACE)
        .with_ansi(false)
        .with_writer(move || writer.clone())
        .finish();
    let _subscribed = tracing::subscriber::set_default(subscriber);
    let log = tokio::spawn(kernel.trace_log().unwrap().run());
    assert!(kernel.trace_log().is_none());
    let _a = capture(&kernel, &world.a, A, &PERMISSIVE);
    for peer in B {
        assert_answered(dial(&world.a, at(peer, 8080)), "Outbound", at(peer, 8080));
    }
    for expected in [
        "connect to 10.77.0.3 port 8080 reason=\"steer-workload\"",
        "connect to fd77::3 port 8080 reason=\"steer-workload\"",
        "pod 0 reached at 10.77.0.3 port 8080 from 10.77.0.2 reason=\"arrive-steered\"",
        "pod 0 reached at fd77::3 port 8080 from fd77::2 reason=\"arrive-steered\"",
    ] {
        let text = || String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
        let logged = tokio::time::timeout(DEADLINE, async {
            while !text().contains(expected) {
                tokio::task::yield_now().await;
            }
        });
        assert!(logged.await.is_ok(), "{expected} is not in {}", text());
    }
    log.abort();
}

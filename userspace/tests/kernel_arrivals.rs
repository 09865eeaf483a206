//! What arrives at a captured pod, on the real kernel.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test")]

mod world;

use nix::libc;
use socket2::{Domain, Socket, Type};
use std::{
    fs,
    io::{self, ErrorKind},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};
use warren::{
    kernel::{PlaintextMode, PodPolicy, Reason, WorkloadEntry},
    net::{Namespace, marks},
};
use world::*;

/// As the daemon does it: from the client's address, marked, on lo.
fn deliver(namespace: &Namespace, client: &str, application: SocketAddr) -> io::Result<String> {
    let socket = namespace
        .run(|| Socket::new(Domain::for_address(application), Type::STREAM, None))
        .unwrap()?;
    socket.set_mark(marks::DELIVER)?;
    if application.is_ipv4() {
        socket.set_ip_transparent_v4(true)?;
    } else {
        socket.set_ip_transparent_v6(true)?;
    }
    socket.bind_device(Some(b"lo"))?;
    socket.bind(&at(client, 0).into())?;
    socket.connect_timeout(&application.into(), SILENCE)?;
    answer(&TcpStream::from(socket))
}

#[test]
fn the_daemons_delivery_reaches_the_application_under_strict_and_shows_the_client() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    let _a = capture(&kernel, &world.a, A, &strict());
    serve(&world.a, "::", 8080);
    for (own, client) in A.into_iter().zip(B) {
        let answer = deliver(&world.a, client, at(own, 8080)).unwrap();
        let from = at(client, 0).to_string();
        assert!(
            answer.starts_with(&format!("app {} from {}", at(own, 8080), &from[..from.len() - 1])),
            "{answer}"
        );
    }
}

#[test]
fn plaintext_is_dropped_under_strict_and_handed_to_the_daemon_else() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    let a = capture(&kernel, &world.a, A, &strict());
    for own in A {
        serve(&world.a, own, 8080);
        assert_fails(dial(&world.b, at(own, 8080)), ErrorKind::ConnectionRefused);
    }
    assert_eq!(count(&kernel, Reason::DropStrict), 2);

    kernel.set_policy(a.number, &PERMISSIVE).unwrap();
    for own in A {
        assert_answered(dial(&world.b, at(own, 8080)), "Plaintext", at(own, 8080));
    }
}

#[test]
fn a_ports_own_mode_counts_more_than_the_pods() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    let policy = PodPolicy {
        port_modes: vec![(8080, PlaintextMode::Permissive)],
        ..strict()
    };
    let a = capture(&kernel, &world.a, A, &policy);
    for own in A {
        assert_answered(dial(&world.b, at(own, 8080)), "Plaintext", at(own, 8080));
        assert_fails(dial(&world.b, at(own, 9090)), ErrorKind::ConnectionRefused);
    }
    let policy = PodPolicy {
        port_modes: vec![(9090, PlaintextMode::Strict)],
        ..PERMISSIVE
    };
    kernel.set_policy(a.number, &policy).unwrap();
    for own in A {
        assert_answered(dial(&world.b, at(own, 8080)), "Plaintext", at(own, 8080));
        assert_fails(dial(&world.b, at(own, 9090)), ErrorKind::ConnectionRefused);
    }
}

#[test]
fn hbone_reaches_the_daemon_even_where_an_application_has_its_port() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    for own in A {
        serve(&world.a, own, 15008);
    }
    // The daemon finds the port free on loopback, or takes another: it is reached all the same.
    let a = capture(&kernel, &world.a, A, &strict());
    for own in A {
        assert_answered(dial(&world.b, at(own, 15008)), "Hbone", at(own, 15008));
    }
    close(a.listeners);
    for own in A {
        assert_fails(dial(&world.b, at(own, 15008)), ErrorKind::ConnectionRefused);
    }
}

#[test]
fn with_the_daemon_gone_plaintext_passes_only_where_no_policy_restricts_it() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    let a = capture(&kernel, &world.a, A, &PERMISSIVE);
    close(a.listeners);
    for own in A {
        let app = serve(&world.a, own, 8080);
        assert_answered(dial(&world.b, app), "app", app);
    }
    let restricted = PodPolicy {
        restricted: true,
        ..PERMISSIVE
    };
    kernel.set_policy(a.number, &restricted).unwrap();
    for own in A {
        assert_fails(dial(&world.b, at(own, 8080)), ErrorKind::ConnectionRefused);
    }
    assert_eq!(count(&kernel, Reason::ArrivePlaintextUnrestricted), 2);
    assert_eq!(count(&kernel, Reason::DropPlaintextNoListener), 2);
}

/// Runs in a process of its own, in a cgroup below kubepods: a container on the host's network.
#[test]
fn child_that_dials_from_the_nodes_namespace() {
    let Some(world) = World::of_parent() else { return };
    wait_for_parent();
    for own in A {
        println!(
            "answer: {:?}",
            dial(&world.node, at(own, 8080)).map_err(|error| error.kind())
        );
    }
}

#[test]
fn the_nodes_own_processes_pass_under_strict_and_containers_on_its_network_do_not() {
    let Some(mut world) = World::new() else { return };
    let kubepods = world.cgroup().join(format!("{}-kubepods", world.name()));
    let container = kubepods.join("besteffort");
    fs::create_dir_all(&container).unwrap();
    world.config.kubepods = Some(kubepods.clone());
    let kernel = world.open();
    let addresses = ["169.254.1.1", "fd00::1", "fe80::1"].map(ip).into_iter().collect();
    kernel.set_node(&world.node, &addresses).unwrap();
    let _a = capture(&kernel, &world.a, A, &strict());
    let apps = A.map(|own| serve(&world.a, own, 8080));
    for app in apps {
        assert_answered(dial(&world.node, app), "app", app);
    }
    assert_eq!(count(&kernel, Reason::ArriveFromNode), 2);

    let mut child = world.spawn("child_that_dials_from_the_nodes_namespace", &container);
    for _ in apps {
        assert_eq!(child.said("answer: "), "Err(ConnectionRefused)");
    }
    child.end();
    assert_eq!(count(&kernel, Reason::DropStrictFromNodeAddress), 2);
    assert_eq!(count(&kernel, Reason::ArriveFromNode), 2);
    fs::remove_dir(container)
        .and_then(|()| fs::remove_dir(kubepods))
        .unwrap();

    // A pod outside the mesh needs no note, and makes none.
    for own in A {
        kernel.upsert_workload(ip(own), WorkloadEntry::OUTSIDE).unwrap();
    }
    let before = count(&kernel, Reason::NodeConnectNoted);
    let _ = dial(&world.node, apps[0]);
    assert_eq!(count(&kernel, Reason::NodeConnectNoted), before);
}

/// How long a connection to A takes from a port that was used a moment before, and which A closed first, so that the
/// TIME_WAIT is A's. Of three the fastest: the machine may stand still during one.
fn reuse_port_after_time_wait(from: &Namespace, source: SocketAddr, to: SocketAddr) -> Duration {
    let connect = || {
        let (stream, took) = from
            .run(|| {
                let socket = Socket::new(Domain::for_address(to), Type::STREAM, None).unwrap();
                socket.set_reuse_address(true).unwrap();
                socket.bind(&source.into()).unwrap();
                let start = Instant::now();
                socket.connect_timeout(&to.into(), DEADLINE).unwrap();
                (TcpStream::from(socket), start.elapsed())
            })
            .unwrap();
        assert_eq!(answer(&stream).unwrap(), "bye");
        let mut nothing = [0];
        assert_eq!(
            io::Read::read(&mut &stream, &mut nothing).unwrap(),
            0,
            "closed by the other end first"
        );
        took
    };
    connect();
    (0..3).map(|_| connect()).min().unwrap()
}

/// Listens as a role of the daemon does, and closes each connection first.
fn close_first(listeners: &[std::net::TcpListener]) {
    for listener in listeners {
        let listener = listener.try_clone().unwrap();
        listener.set_nonblocking(false).unwrap();
        std::thread::spawn(move || {
            while let Ok((mut stream, _)) = listener.accept() {
                let _ = io::Write::write_all(&mut stream, b"bye\n");
            }
        });
    }
}

#[test]
fn a_client_that_reuses_its_port_after_we_closed_first_connects_at_once_in_both_directions() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    let number = kernel.number_for(world.a.cookie()).unwrap();
    kernel.set_policy(number, &PERMISSIVE).unwrap();
    kernel.set_addresses(number, &A.map(ip).into_iter().collect()).unwrap();
    let listeners = warren::net::listen(&world.a).unwrap();
    close_first(&listeners.outbound);
    close_first(&listeners.plaintext);
    kernel.set_listeners(number, &listeners).unwrap();
    attach(&kernel, number, &world.a);
    kernel.steer(number, world.a.cookie()).unwrap();
    for (own, peer) in A.into_iter().zip(B) {
        let inbound = reuse_port_after_time_wait(&world.b, at(peer, 33333), at(own, 8080));
        let outbound = reuse_port_after_time_wait(&world.a, at(own, 33333), at(peer, 8080));
        // A SYN that is not answered is sent again after a second.
        for (direction, took) in [("inbound", inbound), ("outbound", outbound)] {
            assert!(took < Duration::from_millis(900), "{direction} {own}: {took:?}");
        }
    }
}

#[test]
fn under_syn_cookies_nothing_reaches_the_application_past_policy() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    world.shell("ip netns exec $P-a sysctl -qw net.ipv4.tcp_syncookies=2");
    let a = capture(&kernel, &world.a, A, &PERMISSIVE);
    for (own, peer) in A.into_iter().zip(B) {
        serve(&world.a, own, 8080);
        // The application's own listener has sent cookies lately: without sk_lookup it would now take any valid ACK.
        assert_answered(dial(&world.a, at(own, 8080)), "app", at(own, 8080));
        for _ in 0..3 {
            assert_answered(dial(&world.b, at(own, 8080)), "Plaintext", at(own, 8080));
            assert_answered(dial(&world.b, at(own, 15008)), "Hbone", at(own, 15008));
            assert_answered(dial(&world.a, at(peer, 8080)), "Outbound", at(peer, 8080));
        }
    }
    kernel.set_policy(a.number, &strict()).unwrap();
    for own in A {
        assert_fails(dial(&world.b, at(own, 8080)), ErrorKind::ConnectionRefused);
    }
}

#[test]
fn a_connection_open_before_the_pod_was_captured_goes_on() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    let mut open = Vec::new();
    for (own, peer) in A.into_iter().zip(B) {
        serve(&world.a, own, 8080);
        serve(&world.b, peer, 8080);
        for (from, to) in [(&world.b, own), (&world.a, peer)] {
            let stream = from.run(|| TcpStream::connect(at(to, 8080)).unwrap()).unwrap();
            answer(&stream).unwrap();
            open.push(stream);
        }
    }
    let _a = capture(&kernel, &world.a, A, &strict());
    for mut stream in open {
        io::Write::write_all(&mut stream, b"still here").unwrap();
        eventually("it is acknowledged", || unacknowledged(&stream) == 0);
    }
}

/// Bytes sent that the other end has not acknowledged.
#[allow(unsafe_code, reason = "SIOCOUTQ has no safe wrapper")]
fn unacknowledged(stream: &TcpStream) -> i32 {
    use std::os::fd::AsRawFd;
    let mut waiting = 0_i32;
    // SAFETY: SIOCOUTQ (TIOCOUTQ) writes one int.
    let result = unsafe { libc::ioctl(stream.as_raw_fd(), libc::TIOCOUTQ, std::ptr::from_mut(&mut waiting)) };
    assert_eq!(result, 0);
    waiting
}

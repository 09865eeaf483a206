//! What outlives the daemon, on the real kernel.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test")]

mod world;

use std::{fs, io::ErrorKind, os::unix::process::ExitStatusExt, time::Instant};
use warren::kernel::{Kernel, OpenError, Reason};
use world::*;

/// Runs in a process of its own, to be killed.
#[test]
fn child_that_captures_a() {
    let Some(world) = World::of_parent() else { return };
    wait_for_parent();
    let kernel = world.open();
    let a = capture(&kernel, &world.a, A, &strict());
    println!("captured: {}", a.number.get());
    loop {
        std::thread::park();
    }
}

#[test]
fn a_killed_daemons_pods_stay_closed_until_the_next_one_adopts_them() {
    let Some(world) = World::new() else { return };
    let mut daemon = world.spawn("child_that_captures_a", world.cgroup());
    let number = daemon.said("captured: ");
    for (own, peer) in A.into_iter().zip(B) {
        serve(&world.b, peer, 8080);
        serve(&world.a, own, 8080);
        assert_answered(dial(&world.a, at(peer, 8080)), "Outbound", at(peer, 8080));
    }
    assert_eq!(daemon.kill().signal(), Some(9));

    for (own, peer) in A.into_iter().zip(B) {
        let took = fastest(|| assert_fails(dial(&world.a, at(peer, 8080)), ErrorKind::HostUnreachable));
        assert!(took < SILENCE, "at once");
        assert_fails(dial(&world.a, at(NOBODY[0], 8080)), ErrorKind::HostUnreachable);
        assert_fails(dial(&world.b, at(own, 8080)), ErrorKind::ConnectionRefused);
        assert_answered(dial(&world.a, at(own, 8080)), "app", at(own, 8080));
    }
    for node in NODE {
        let outside = serve(&world.node, node, 8080);
        assert_answered(dial(&world.a, outside), "app", outside);
    }

    let start = Instant::now();
    let kernel = Kernel::open(&world.config).unwrap();
    println!("opened over pins in {:?}", start.elapsed());
    let adopted = kernel.adopted_pods();
    assert_eq!(adopted.len(), 1);
    assert_eq!(adopted[0].number.get().to_string(), number);
    assert_eq!(adopted[0].cookie, world.a.cookie());
    assert_eq!(u64::from(adopted[0].inode), world.a.inode().1);
    assert_eq!(kernel.number_for(world.a.cookie()).unwrap(), adopted[0].number);
    // Nothing has changed for the pod yet.
    assert_fails(dial(&world.a, at(B[0], 8080)), ErrorKind::HostUnreachable);
    assert_fails(dial(&world.b, at(A[0], 8080)), ErrorKind::ConnectionRefused);

    let before = world.links();
    let _listeners = listen(&kernel, adopted[0].number, &world.a);
    attach(&kernel, adopted[0].number, &world.a);
    assert_eq!(world.links(), before, "the links are the same, their programs new");
    for (own, peer) in A.into_iter().zip(B) {
        assert_answered(dial(&world.a, at(peer, 8080)), "Outbound", at(peer, 8080));
        assert_fails(dial(&world.b, at(own, 8080)), ErrorKind::ConnectionRefused);
    }
    // The counters went on from where they were.
    assert!(count(&kernel, Reason::RefuseNoListener) >= 5);
    assert_eq!(count(&kernel, Reason::MarkedPacketLeaving), 0);
}

#[test]
fn a_daemon_that_goes_on_after_another_had_the_node_knows_what_that_one_did() {
    let Some(world) = World::new() else { return };
    let first = world.open();
    let a = capture(&first, &world.a, A, &strict());
    let links_before = world.links();

    // The other has the same sockets for A, as a successor does, and captures B; then it dies.
    let other = Kernel::open(&world.config).unwrap();
    assert_eq!(other.number_for(world.a.cookie()).unwrap(), a.number);
    other
        .set_listeners(a.number, &a.listeners.try_clone().unwrap())
        .unwrap();
    attach(&other, a.number, &world.a);
    let b = capture(&other, &world.b, B, &strict());
    other.sync_ranges(&Default::default()).unwrap();
    drop(other);
    assert_answered(dial(&world.a, at(B[0], 8080)), "Outbound", at(B[0], 8080));
    close(b.listeners);
    assert_fails(dial(&world.b, at(A[0], 8080)), ErrorKind::HostUnreachable);

    first.readopt().unwrap();
    let mut adopted: Vec<_> = first.adopted_pods().iter().map(|pod| pod.cookie).collect();
    adopted.sort_unstable();
    let mut expected = [world.a.cookie(), world.b.cookie()];
    expected.sort_unstable();
    assert_eq!(adopted, expected);
    assert!(first.unfinished_pods().is_empty());
    // What the other wrote is known: the ranges are written anew, and B keeps its number.
    assert!(first.sync_ranges(&ranges()).unwrap().written > 0);
    assert_eq!(first.number_for(world.b.cookie()).unwrap(), b.number);
    attach(&first, a.number, &world.a);
    let _listeners = listen(&first, b.number, &world.b);
    attach(&first, b.number, &world.b);
    assert_answered(dial(&world.a, at(B[0], 8080)), "Outbound", at(B[0], 8080));
    assert_answered(dial(&world.b, at(A[0], 8080)), "Outbound", at(A[0], 8080));
    assert!(
        links_before.iter().all(|link| world.links().contains(link)),
        "no link is another"
    );
    assert_eq!(count(&first, Reason::MarkedPacketLeaving), 0);
}

#[test]
fn pins_of_a_namespace_that_is_gone_are_removed_at_the_next_start() {
    let Some(mut world) = World::new() else { return };
    let mut daemon = world.spawn("child_that_captures_a", world.cgroup());
    daemon.said("captured: ");
    daemon.kill();
    assert_eq!(fs::read_dir(world.pins().join("pods")).unwrap().count(), 1);
    world.shell("ip netns del $P-a");
    // Ours was the last handle of it.
    world.a = world.b.clone();
    eventually("the pod is forgotten", || {
        Kernel::open(&world.config).unwrap().adopted_pods().is_empty()
    });
    assert_eq!(fs::read_dir(world.pins().join("pods")).unwrap().count(), 0);
}

#[test]
fn a_pod_that_was_not_steered_yet_when_the_daemon_ended_is_left_alone() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    let number = kernel.number_for(world.a.cookie()).unwrap();
    kernel.set_policy(number, &strict()).unwrap();
    attach(&kernel, number, &world.a);
    serve(&world.a, A[0], 8080);
    assert_fails(dial(&world.b, at(A[0], 8080)), ErrorKind::ConnectionRefused);
    drop(kernel);
    let kernel = Kernel::open(&world.config).unwrap();
    assert_eq!(kernel.adopted_pods(), []);
    assert_eq!(fs::read_dir(world.pins().join("pods")).unwrap().count(), 0);
    // The kernel detaches a link a moment after its pin is gone.
    eventually("the pod is reached again", || dial(&world.b, at(A[0], 8080)).is_ok());
}

#[test]
fn what_another_layout_left_pinned_is_removed_and_nothing_else() {
    let Some(world) = World::new() else { return };
    let kernel = world.open();
    let a = capture(&kernel, &world.a, A, &strict());
    let own = world.links();
    let other = world.config.pin_dir.join("v99");
    fs::create_dir_all(other.join("pods/3")).unwrap();
    // A pin is a name: another one of the same link will do.
    fs::hard_link(&own[0], other.join("pods/3/arrive")).unwrap();
    assert_eq!(kernel.remove_other_layouts().unwrap(), 1);
    assert!(!other.exists());
    assert_eq!(world.links(), own);
    assert_eq!(kernel.remove_other_layouts().unwrap(), 0);
    close(a.listeners);
}

#[test]
fn a_map_that_is_pinned_keeps_its_size_and_its_entries() {
    let Some(mut world) = World::new() else { return };
    world.config.sizes.workloads = 4;
    let kernel = world.open();
    let _a = capture(&kernel, &world.a, A, &PERMISSIVE);
    drop(kernel);
    world.config.sizes.workloads = 100;
    world.config.sizes.pods = 1;
    let kernel = Kernel::open(&world.config).unwrap();
    // The same four are known already, so that nothing is written.
    let four = A
        .iter()
        .chain(&B)
        .map(|address| (ip(address), warren::kernel::WorkloadEntry::IN_MESH))
        .collect();
    assert_eq!(kernel.sync_workloads(&four).unwrap(), Default::default());
    let fifth = kernel.upsert_workload(ip(NOBODY[0]), warren::kernel::WorkloadEntry::IN_MESH);
    assert!(
        matches!(fifth, Err(warren::kernel::MapError::Full { size: 4, .. })),
        "{fifth:?}"
    );
    assert!(kernel.number_for(1).is_ok(), "there is room for sixteen pods still");
}

#[test]
fn what_cannot_be_opened_is_named() {
    let Some(world) = World::new() else { return };
    let mut config = world.config.clone();
    config.cgroup = Some("/nowhere".into());
    assert!(matches!(Kernel::open(&config), Err(OpenError::Cgroup { .. })));
    let mut config = world.config.clone();
    config.cgroup = Some("/tmp".into());
    assert!(matches!(Kernel::open(&config), Err(OpenError::Program { .. })));
    config.pin_dir = "/proc/warren".into();
    assert!(matches!(Kernel::open(&config), Err(OpenError::NoBpffs { .. })));
}

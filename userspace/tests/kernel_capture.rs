//! Capture with the real kernel programs: from a snapshot to steered connections, and back.

#![allow(
    clippy::unwrap_used,
    clippy::wildcard_enum_match_arm,
    reason = "a test ends where something is not as it should be"
)]

mod world;

use std::{io::ErrorKind, net::TcpStream, path::PathBuf, sync::Arc, time::Duration};
use tokio::{
    runtime::Runtime,
    sync::{mpsc, watch},
};
use warren::{
    capture::{CaptureEvent, CaptureSettings, CapturedPod, KernelSide, reconcile},
    kernel::{Kernel, Reason},
    mesh::{
        MeshSnapshot, SpiffeId, Workload, WorkloadUid,
        policy::{MutualTls, PeerAuth},
        workload::{Locality, Protocol},
    },
    net::{self, Namespace},
    shutdown::Shutdown,
};
use world::*;

/// A daemon, as far as capture goes, over a world's kernel state.
struct Daemon {
    kernel: Arc<Kernel>,
    snapshots: watch::Sender<Arc<MeshSnapshot>>,
    events: mpsc::Receiver<CaptureEvent>,
    runtime: Runtime,
}

impl Daemon {
    fn start(world: &World) -> Self {
        let kernel = Arc::new(Kernel::open(&world.config).unwrap());
        let (snapshots, receiver) = watch::channel(Arc::default());
        let (sender, events) = mpsc::channel(16);
        let settings = CaptureSettings::by_manifests("node-a", Duration::from_millis(200));
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let side = Arc::clone(&kernel) as Arc<dyn KernelSide>;
        let node = world.node.clone();
        // The daemon lives in the node's namespace; the threads of its runtime were started before, so this one moves.
        std::thread::scope(|scope| {
            scope.spawn(|| {
                node.settle().unwrap();
                let task = reconcile(side, settings, receiver, sender, Shutdown::new());
                runtime.spawn(async move {
                    task.await.unwrap();
                });
            });
        });
        Self {
            kernel,
            snapshots,
            events,
            runtime,
        }
    }

    fn publish(&self, change: impl FnOnce(&mut MeshSnapshot)) {
        self.snapshots.send_modify(|snapshot| {
            let mut next = MeshSnapshot::clone(snapshot);
            next.version += 1;
            next.node = Some("node-a".into());
            next.ranges = ranges().into_iter().collect();
            change(&mut next);
            *snapshot = Arc::new(next);
        });
    }

    fn publish_pods(&self, pods: impl IntoIterator<Item = Workload>) {
        self.publish_pods_with(pods, |_| ());
    }

    fn publish_pods_with(&self, pods: impl IntoIterator<Item = Workload>, change: impl FnOnce(&mut MeshSnapshot)) {
        self.publish(|snapshot| {
            change(snapshot);
            for pod in pods {
                for address in &pod.addresses {
                    snapshot.by_address.insert(*address, pod.uid.clone());
                }
                snapshot.set_workload(Arc::new(pod));
            }
        });
    }

    fn event(&mut self) -> CaptureEvent {
        let next = async { tokio::time::timeout(DEADLINE, self.events.recv()).await };
        self.runtime.block_on(next).expect("an event").expect("a running task")
    }

    /// Waits until this many pods are captured; their listeners stay open without anybody who accepts.
    fn captured(&mut self, count: usize) -> Vec<CapturedPod> {
        let mut captured = Vec::new();
        while captured.len() < count {
            match self.event() {
                CaptureEvent::Captured(pod) => captured.push(pod),
                CaptureEvent::Settled => {}
                other => panic!("{other:?}"),
            }
        }
        captured
    }
}

fn pod(world: &World, name: &str, addresses: [&str; 2]) -> Workload {
    Workload {
        uid: WorkloadUid(name.into()),
        name: name.into(),
        namespace: "shop".into(),
        identity: SpiffeId::parse("spiffe://cluster.local/ns/shop/sa/web").unwrap(),
        addresses: addresses.map(ip).to_vec(),
        locality: Locality {
            node: Some("node-a".into()),
            ..Locality::default()
        },
        labels: Arc::default(),
        owner: name.into(),
        canonical_service: name.into(),
        canonical_revision: "latest".into(),
        protocol: Protocol::Hbone,
        host_network: false,
        enrolled: true,
        netns: Some(PathBuf::from(format!("/run/netns/{}-{name}", world.name()))),
        runtime_class: None,
    }
}

fn strict_everywhere(snapshot: &mut MeshSnapshot) {
    let strict = PeerAuth::of_namespace("shop".into(), "strict".into(), Some(MutualTls::Strict));
    snapshot.peer_auths.insert(strict);
}

/// A world whose pods have no rules yet.
fn bare_world() -> Option<World> {
    let world = World::new()?;
    world.shell(
        "for n in a b; do for f in -4 -6; do
           ip -n $P-$n $f rule del pref 1; ip -n $P-$n $f rule del pref 2; ip -n $P-$n $f rule del pref 2
           ip -n $P-$n $f route flush table 111; ip -n $P-$n $f route flush table 113
         done; done",
    );
    Some(world)
}

fn rules(namespace: &Namespace) -> String {
    let show = |family: &str| {
        let command = || std::process::Command::new("ip").args([family, "rule"]).output();
        String::from_utf8(namespace.run(command).unwrap().unwrap().stdout).unwrap()
    };
    show("-4") + &show("-6")
}

#[test]
fn a_pod_of_the_snapshot_is_steered_until_it_leaves_the_mesh() {
    let Some(world) = bare_world() else { return };
    let (rules_before, mut daemon) = (rules(&world.a), Daemon::start(&world));
    daemon.publish_pods([pod(&world, "a", A), pod(&world, "b", B)]);
    let captured = daemon.captured(2);
    let a = captured
        .iter()
        .find(|pod| pod.namespace.cookie() == world.a.cookie())
        .unwrap();
    let mut open = Vec::new();
    for (index, peer) in B.into_iter().enumerate() {
        serve(&world.b, peer, 8080);
        let client = world
            .a
            .run(|| TcpStream::connect_timeout(&at(peer, 8080), DEADLINE))
            .unwrap()
            .unwrap();
        let listener = &a.listeners.outbound[index];
        listener.set_nonblocking(false).unwrap();
        let (accepted, from) = listener.accept().unwrap();
        assert_eq!(
            accepted.local_addr().unwrap(),
            at(peer, 8080),
            "the original destination"
        );
        assert_eq!(from, client.local_addr().unwrap());
        open.push((client, accepted));
    }

    daemon.publish_pods([Workload {
        enrolled: false,
        ..pod(&world, "a", A)
    }]);
    while !matches!(daemon.event(), CaptureEvent::Released(uid) if &*uid.0 == "a") {}
    eventually("the pod is as it was", || rules(&world.a) == rules_before);
    for (mut client, _accepted) in open {
        client.set_read_timeout(Some(DEADLINE)).unwrap();
        let ended = std::io::Read::read(&mut client, &mut [0]).unwrap_err();
        assert!(
            matches!(ended.kind(), ErrorKind::ConnectionAborted | ErrorKind::ConnectionReset),
            "{ended:?}"
        );
    }
    assert_eq!(count(&daemon.kernel, Reason::MarkedPacketLeaving), 0);
    // Uncaptured now: it reaches the peer's plaintext listener by itself, not its own daemon.
    let b = captured
        .iter()
        .find(|pod| pod.namespace.cookie() == world.b.cookie())
        .unwrap();
    let client = world
        .a
        .run(|| TcpStream::connect_timeout(&at(B[0], 8080), DEADLINE))
        .unwrap()
        .unwrap();
    let listener = &b.listeners.plaintext[0];
    listener.set_nonblocking(false).unwrap();
    assert_eq!(listener.accept().unwrap().1, client.local_addr().unwrap());
}

#[test]
fn what_the_daemon_delivers_reaches_the_application_even_under_strict() {
    let Some(world) = bare_world() else { return };
    let mut daemon = Daemon::start(&world);
    daemon.publish_pods_with([pod(&world, "a", A), pod(&world, "b", B)], strict_everywhere);
    let _captured = daemon.captured(2);
    for (own, peer) in A.into_iter().zip(B) {
        serve(&world.b, peer, 8080);
        // From another pod, from nowhere, and from the pod itself.
        for client in [own, if own.contains(':') { "fd99::9" } else { "10.99.9.9" }, peer] {
            let client = at(client, 41_000);
            let stream = daemon
                .runtime
                .block_on(net::deliver(&world.b, client, at(peer, 8080), DEADLINE))
                .unwrap();
            assert_eq!(stream.local_addr().unwrap(), client);
            let stream = stream.into_std().unwrap();
            stream.set_nonblocking(false).unwrap();
            assert_eq!(
                answer(&stream).unwrap(),
                format!("app {} from {client}", at(peer, 8080))
            );
        }
        let refused = daemon
            .runtime
            .block_on(net::deliver(&world.b, at(own, 42_000), at(peer, 8081), DEADLINE));
        assert!(matches!(refused, Err(net::DialError::Refused { .. })), "{refused:?}");
    }
    assert_eq!(count(&daemon.kernel, Reason::MarkedPacketLeaving), 0);
}

#[test]
fn the_next_daemon_takes_pods_over_and_lets_go_of_what_nobody_wants() {
    let Some(world) = bare_world() else { return };
    let rules_before = rules(&world.b);
    let mut first = Daemon::start(&world);
    first.publish_pods([pod(&world, "a", A), pod(&world, "b", B)]);
    let captured = first.captured(2);
    for peer in B {
        serve(&world.b, peer, 8080);
    }
    // Dies without a word: its listeners close, what it pinned stays.
    drop((first, captured));
    // A process that another test is about to start may hold copies of the listeners for a moment.
    let is_refused = || dial(&world.a, at(B[0], 8080)).is_err_and(|error| error.kind() == ErrorKind::HostUnreachable);
    eventually("mesh connections are refused", is_refused);

    let mut second = Daemon::start(&world);
    assert_fails(dial(&world.a, at(B[0], 8080)), ErrorKind::HostUnreachable);
    let outside = Workload {
        enrolled: false,
        ..pod(&world, "b", B)
    };
    second.publish_pods([pod(&world, "a", A), outside]);
    let captured = second.captured(1);
    let client = world
        .a
        .run(|| TcpStream::connect_timeout(&at(B[0], 8080), DEADLINE))
        .unwrap()
        .unwrap();
    let listener = &captured[0].listeners.outbound[0];
    listener.set_nonblocking(false).unwrap();
    assert_eq!(listener.accept().unwrap().1, client.local_addr().unwrap());
    eventually("b is as it was", || rules(&world.b) == rules_before);
    assert_answered(dial(&world.node, at(B[0], 8080)), "app", at(B[0], 8080));
}

//! Routes in a namespace of the test's own, and what connections meet there.

use super::{super::sysctls, *};
use crate::net::{
    DialError, abort, deliver,
    testing::{ip, pod_namespace, set_sysctl},
};
use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

const DEADLINE: Duration = Duration::from_secs(10);
const POD: [&str; 2] = ["10.9.0.1", "fd09::1"];

fn addresses() -> Vec<IpAddr> {
    POD.map(|address| address.parse().unwrap()).to_vec()
}

/// Everything that a pod's network configuration shows.
fn state(pod: &Namespace) -> String {
    ["rule", "-6 rule", "route show table all", "-6 route show table all"]
        .map(|show| ip(pod, show))
        .join("--\n")
}

fn capture(pod: &Namespace) -> Routes {
    sysctls::switch_on(pod).unwrap();
    let mut routes = Routes::open(pod).unwrap();
    routes.install_note(0).unwrap();
    routes.install(&addresses()).unwrap();
    routes
}

async fn application(pod: &Namespace, address: &str) -> TcpListener {
    let listener = pod.run(|| std::net::TcpListener::bind(address).unwrap()).unwrap();
    listener.set_nonblocking(true).unwrap();
    TcpListener::from_std(listener).unwrap()
}

#[test]
fn rules_and_routes_come_go_and_are_repaired_without_a_trace() {
    let Some(pod) = pod_namespace("routes") else { return };
    let before = state(&pod);
    let mut routes = Routes::open(&pod).unwrap();
    assert_eq!(routes.note().unwrap(), None);
    routes.install_note(5).unwrap();
    assert_eq!(routes.note().unwrap(), Some(5));
    assert!(!routes.are_complete().unwrap());
    routes.install(&addresses()).unwrap();
    assert!(routes.are_complete().unwrap());
    let installed = state(&pod);
    for wanted in [
        "1:\tfrom all fwmark 0x113/0xfff lookup 15113 proto 87",
        "2:\tfrom all fwmark 0x110/0xff0 lookup 15110 proto 87",
        "local default dev lo table 15110 proto 87 scope host src 10.9.0.1 congctl cubic",
        "local default dev lo table 15110 proto 87 src fd09::1 metric 1024 congctl cubic",
        "prohibit default table 15113 proto 87 metric 105",
        "prohibit default dev lo table 15113 proto 87 metric 105",
    ] {
        assert!(installed.contains(wanted), "{wanted}\n{installed}");
    }

    let mut again = Routes::open(&pod).unwrap();
    assert_eq!(again.note().unwrap(), Some(5));
    again.install_note(5).unwrap();
    again.install(&addresses()).unwrap();
    assert_eq!(state(&pod), installed);

    for loss in ["rule del pref 2", "-6 rule del pref 1", "route flush table 15110"] {
        ip(&pod, loss);
        assert!(!again.are_complete().unwrap(), "{loss}");
        again.install(&addresses()).unwrap();
        assert_eq!(state(&pod), installed, "{loss}");
    }
    ip(&pod, "rule add pref 2 fwmark 0x110/0xff0 lookup 15110");
    again.remove().unwrap();
    ip(&pod, "rule del pref 2 fwmark 0x110/0xff0 lookup 15110");
    assert_eq!(state(&pod), before);
    again.remove().unwrap();
}

#[tokio::test]
async fn the_application_sees_the_clients_address_and_port() {
    let Some(pod) = pod_namespace("deliver") else { return };
    let _routes = capture(&pod);
    for (client, address) in [
        ("10.77.1.9:41000", "10.9.0.1:8080"),
        ("[fd77::9]:41000", "[fd09::1]:8080"),
    ] {
        let listener = application(&pod, address).await;
        let (client, address): (SocketAddr, SocketAddr) = (client.parse().unwrap(), address.parse().unwrap());
        let mut stream = deliver(&pod, client, address, DEADLINE).await.unwrap();
        assert_eq!(stream.local_addr().unwrap(), client);
        let (mut accepted, peer) = listener.accept().await.unwrap();
        assert_eq!(peer, client);
        for socket in [socket2::SockRef::from(&stream), socket2::SockRef::from(&accepted)] {
            assert_eq!(socket.mark().unwrap(), marks::DELIVER);
            assert!(socket.tcp_congestion().unwrap().starts_with(b"cubic"));
        }
        stream.write_all(b"ping").await.unwrap();
        let mut bytes = [0; 4];
        tokio::time::timeout(DEADLINE, accepted.read_exact(&mut bytes))
            .await
            .unwrap()
            .unwrap();
        accepted.write_all(b"pong").await.unwrap();
        tokio::time::timeout(DEADLINE, stream.read_exact(&mut bytes))
            .await
            .unwrap()
            .unwrap();
        assert_eq!(&bytes, b"pong");

        let second = deliver(&pod, client, address, DEADLINE).await.unwrap();
        let (_, peer) = listener.accept().await.unwrap();
        assert_eq!(peer, second.local_addr().unwrap(), "the port is taken by the first");
        assert_eq!(peer.ip(), client.ip());

        abort(stream);
        let error = tokio::time::timeout(DEADLINE, accepted.read(&mut bytes))
            .await
            .unwrap()
            .unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    }
}

#[tokio::test]
async fn a_closed_port_is_refused_at_once() {
    let Some(pod) = pod_namespace("closed") else { return };
    let _routes = capture(&pod);
    for (client, address) in [
        ("10.77.1.9:41000", "10.9.0.1:8080"),
        ("[fd77::9]:41000", "[fd09::1]:8080"),
    ] {
        // Of three tries the fastest: the machine may stand still during one.
        let mut fastest = Duration::MAX;
        for _ in 0..3 {
            let start = Instant::now();
            let outcome = deliver(&pod, client.parse().unwrap(), address.parse().unwrap(), DEADLINE).await;
            assert!(matches!(outcome, Err(DialError::Refused { .. })), "{outcome:?}");
            fastest = fastest.min(start.elapsed());
        }
        assert!(fastest < Duration::from_secs(1));
    }
}

/// One connection from `client` which the daemon's side closes first, so that TIME_WAIT is ours.
async fn come_and_go(pod: &Namespace, client: SocketAddr, listener: &TcpListener) -> SocketAddr {
    let address = listener.local_addr().unwrap();
    let mut stream = deliver(pod, client, address, DEADLINE).await.unwrap();
    let (mut accepted, peer): (TcpStream, _) = tokio::time::timeout(DEADLINE, listener.accept())
        .await
        .unwrap()
        .unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(accepted.read(&mut [0]).await.unwrap(), 0);
    drop(accepted);
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
    peer
}

/// The same namespace, with the few ports that `connect` may choose from standing for the 28,000 of the default.
fn with_64_ports(pod: &Namespace) -> Namespace {
    set_sysctl(pod, "net/ipv4/ip_local_port_range", "40000 40063");
    pod.run(|| Namespace::current().unwrap()).unwrap()
}

#[tokio::test]
async fn ports_in_time_wait_neither_run_out_nor_cut_the_pod_off() {
    let Some(pod) = pod_namespace("time-wait") else { return };
    let pod = with_64_ports(&pod);
    let _routes = capture(&pod);
    set_sysctl(&pod, "net/ipv4/tcp_tw_reuse", "0");
    for address in ["10.9.0.1:8080", "[fd09::1]:8080"] {
        let listener = application(&pod, address).await;
        let address = listener.local_addr().unwrap();
        let ip: IpAddr = if address.is_ipv4() { "10.77.1.9" } else { "fd77::9" }.parse().unwrap();
        for port in [0, 20_000, 40_000] {
            for round in 0..200u16 {
                let client = SocketAddr::new(ip, if port == 0 { 0 } else { port + round % 16 });
                let peer = come_and_go(&pod, client, &listener).await;
                assert_eq!(peer.ip(), ip, "connection {round}");
                assert!(
                    port != 20_000 || peer == client,
                    "no connect chooses it, so it is free at once"
                );
            }
        }
        let outgoing = pod.run(|| std::net::TcpStream::connect(address)).unwrap();
        assert!(
            outgoing.is_ok(),
            "the pod's own connections still find ports: {outgoing:?}"
        );
    }
}

#[tokio::test]
async fn a_client_gets_its_own_port_again_a_second_later() {
    let Some(pod) = pod_namespace("own-port") else { return };
    let _routes = capture(&pod);
    for (client, address) in [
        ("10.77.1.9:41000", "10.9.0.1:8080"),
        ("[fd77::9]:41000", "[fd09::1]:8080"),
    ] {
        let listener = application(&pod, address).await;
        let client = client.parse().unwrap();
        assert_eq!(come_and_go(&pod, client, &listener).await, client);
        let gone = Instant::now();
        let next = come_and_go(&pod, client, &listener).await;
        assert!(
            next != client || gone.elapsed() >= Duration::from_secs(1),
            "still in TIME_WAIT"
        );
        let start = Instant::now();
        while come_and_go(&pod, client, &listener).await != client {
            assert!(start.elapsed() < DEADLINE);
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

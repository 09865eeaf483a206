//! The wire between two pods, over loopback TCP and real TLS.

use super::{testing::*, *};
use crate::{
    certs::{Distrust, PeerRejected},
    shutdown::Drained,
    testing::{DEADLINE, eventually, within},
};
use rstest::rstest;
use std::{
    future::poll_fn,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

/// Hands each tunnel out unanswered, so that a test decides what becomes of it.
async fn pods_with_tunnels(settings: HboneSettings) -> (TwoPods, tokio::sync::mpsc::UnboundedReceiver<Incoming>) {
    let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
    let pods = two_pods(settings, move |incoming| {
        let sent = sender.send(incoming);
        async move { drop(sent) }
    })
    .await;
    (pods, receiver)
}

#[tokio::test]
async fn bytes_go_both_ways_and_each_direction_closes_by_itself() {
    let (pods, mut tunnels) = pods_with_tunnels(HboneSettings::default()).await;
    let mut client = pods.open().await;
    // CONNECT and first bytes travel together: nothing waits for the answer.
    send(&mut client, b"first").await.unwrap();
    let incoming = within("a tunnel", tunnels.recv()).await.unwrap();
    assert_eq!(incoming.caller.peer, spiffe("client"));
    assert_eq!(incoming.target, target());
    let mut server = incoming.accept().unwrap();
    assert_eq!(receive_exactly(&mut server, 5).await, b"first");
    client.finish().unwrap();
    assert_eq!(receive(&mut server).await, None, "the client has said all");
    send(&mut server, b"still talking").await.unwrap();
    assert_eq!(receive_exactly(&mut client, 13).await, b"still talking");
    server.finish().unwrap();
    assert_eq!(receive(&mut client).await, None);
}

#[tokio::test]
async fn the_server_may_speak_first_and_finish_first() {
    let (pods, mut tunnels) = pods_with_tunnels(HboneSettings::default()).await;
    let mut client = pods.open().await;
    let mut server = within("a tunnel", tunnels.recv()).await.unwrap().accept().unwrap();
    send(&mut server, b"220 ready").await.unwrap();
    server.finish().unwrap();
    assert_eq!(receive_all(&mut client).await.unwrap(), b"220 ready");
    send(&mut client, b"thanks").await.unwrap();
    client.finish().unwrap();
    assert_eq!(receive_all(&mut server).await.unwrap(), b"thanks");
}

#[rstest]
#[case::client(true)]
#[case::server(false)]
#[tokio::test]
async fn a_reset_of_one_side_reaches_the_other(#[case] client_resets: bool) {
    let (pods, mut tunnels) = pods_with_tunnels(HboneSettings::default()).await;
    let mut client = pods.open().await;
    let mut server = within("a tunnel", tunnels.recv()).await.unwrap().accept().unwrap();
    send(&mut server, b"x").await.unwrap();
    receive_exactly(&mut client, 1).await;
    let (resetting, other) = if client_resets {
        (&mut client, &mut server)
    } else {
        (&mut server, &mut client)
    };
    resetting.reset();
    assert_eq!(receive(other).await, Some(Err(TunnelEnd::Reset(h2::Reason::CANCEL))));
}

#[tokio::test]
async fn a_reset_is_noticed_after_the_peers_half_close() {
    let (pods, mut tunnels) = pods_with_tunnels(HboneSettings::default()).await;
    let mut client = pods.open().await;
    let mut server = within("a tunnel", tunnels.recv()).await.unwrap().accept().unwrap();
    client.finish().unwrap();
    assert_eq!(receive(&mut server).await, None);
    client.reset();
    assert_eq!(
        within("the reset", poll_fn(|cx| server.poll_reset(cx))).await,
        TunnelEnd::Reset(h2::Reason::CANCEL)
    );
}

#[rstest]
#[case(RequestRefusal::Denied, 401)]
#[case(RequestRefusal::ApplicationRefused, 503)]
#[tokio::test]
async fn a_refused_tunnel_tells_its_status_and_the_connection_lives_on(
    #[case] refusal: RequestRefusal,
    #[case] status: u16,
) {
    let (pods, mut tunnels) = pods_with_tunnels(HboneSettings::default()).await;
    let mut other = pods.open().await;
    let mut other_server = within("a tunnel", tunnels.recv()).await.unwrap().accept().unwrap();
    let mut client = pods.open().await;
    send(&mut client, b"never to be seen").await.unwrap();
    within("a tunnel", tunnels.recv()).await.unwrap().refuse(refusal);
    assert_eq!(receive(&mut client).await, Some(Err(TunnelEnd::Refused(status))));
    send(&mut other, b"alive").await.unwrap();
    assert_eq!(receive_exactly(&mut other_server, 5).await, b"alive");
    assert_eq!(pods.dialled(), 1);
}

#[rstest]
#[case("10.0.0.2:80", 400)]
#[case("127.0.0.1:80", 400)]
#[case("10.0.0.1:15008", 503)]
#[tokio::test]
async fn an_authority_that_is_not_this_pods_is_refused(#[case] authority: &str, #[case] status: u16) {
    let pods = two_pods(HboneSettings::default(), echo).await;
    let mut client = pods.open_to(authority.parse().unwrap()).await;
    assert_eq!(receive(&mut client).await, Some(Err(TunnelEnd::Refused(status))));
    assert_eq!(pods.refused.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_hundred_tunnels_opened_at_once_share_one_connection() {
    let pods = Arc::new(
        two_pods(
            HboneSettings {
                spread: 1,
                ..HboneSettings::default()
            },
            echo,
        )
        .await,
    );
    let tunnels = futures::future::join_all((0..100).map(|_| pods.open())).await;
    assert_eq!(pods.dialled(), 1);
    let echoes = tunnels.into_iter().enumerate().map(|(i, mut tunnel)| async move {
        let text = format!("tunnel {i}");
        send(&mut tunnel, text.as_bytes()).await.unwrap();
        tunnel.finish().unwrap();
        assert_eq!(receive_all(&mut tunnel).await.unwrap(), text.as_bytes());
    });
    futures::future::join_all(echoes).await;
    // One more than a connection takes is another connection, and what was full is used again once it has room.
    let mut more = futures::future::join_all((0..101).map(|_| pods.open())).await;
    assert_eq!(pods.dialled(), 2);
    more.clear();
    let _tunnel = pods.open().await;
    assert_eq!(pods.dialled(), 2);
}

#[tokio::test]
async fn a_peer_that_is_another_workload_gets_no_byte() {
    let pods = two_pods(HboneSettings::default(), echo).await;
    let key = PeerKey {
        peer: spiffe("somebody-else"),
        ..pods.key.clone()
    };
    let error = within("a refusal", pods.pool.open(&key, request()))
        .await
        .err()
        .unwrap();
    let PoolError::Handshake(error) = error else {
        panic!("{error:?}")
    };
    assert!(matches!(*error, HandshakeError::Peer(_)), "{error:?}");
    assert_eq!(error.name(), "unexpected");
}

#[tokio::test]
async fn every_tunnel_that_waited_for_a_failed_connection_is_told() {
    let pods = two_pods(HboneSettings::default(), echo).await;
    let key = PeerKey {
        peer: spiffe("somebody-else"),
        ..pods.key.clone()
    };
    let outcomes = within(
        "refusals",
        futures::future::join_all((0..10).map(|_| pods.pool.open(&key, request()))),
    )
    .await;
    assert!(outcomes.iter().all(Result::is_err));
    assert_eq!(pods.dialled(), 1);
    assert_eq!(pods.pool.census(), (0, 0));
}

#[tokio::test]
async fn a_tunnel_that_is_silent_for_many_idle_times_still_carries_bytes() {
    let settings = HboneSettings::default().faster(6000);
    let idle = settings.idle;
    let pods = two_pods(settings, echo).await;
    let mut tunnel = pods.open().await;
    send(&mut tunnel, b"before").await.unwrap();
    receive_exactly(&mut tunnel, 6).await;
    tokio::time::sleep(idle * 10).await;
    send(&mut tunnel, b"after").await.unwrap();
    assert_eq!(receive_exactly(&mut tunnel, 5).await, b"after");
    assert_eq!(pods.pool.census(), (1, 1));
}

#[tokio::test]
async fn a_connection_without_a_tunnel_closes_and_the_next_tunnel_opens_another() {
    let pods = two_pods(HboneSettings::default().faster(6000), echo).await;
    drop(pods.open().await);
    eventually("the idle connection closed", || pods.pool.census() == (0, 0)).await;
    let mut tunnel = pods.open().await;
    send(&mut tunnel, b"x").await.unwrap();
    receive_exactly(&mut tunnel, 1).await;
    assert_eq!(pods.dialled(), 2);
}

#[tokio::test]
async fn once_the_pool_is_closed_or_the_daemon_drains_a_connection_ends_with_its_last_tunnel() {
    // Nothing else ends it within the test.
    let settings = HboneSettings {
        ping_interval: Duration::from_secs(3600),
        ..HboneSettings::default()
    };
    let pods = two_pods(settings, echo).await;
    for is_closed in [true, false] {
        let (pool, tasks) = pods.another_pool();
        let mut tunnel = within("a tunnel", pool.open(&pods.key, request())).await.unwrap();
        let draining = tasks.clone();
        let drain = if is_closed {
            pool.close();
            assert!(pool.open(&pods.key, request()).await.is_err(), "it is closed");
            None
        } else {
            Some(tokio::spawn(
                async move { draining.drain(Duration::from_secs(60)).await },
            ))
        };
        send(&mut tunnel, b"x").await.unwrap();
        assert_eq!(receive_exactly(&mut tunnel, 1).await, b"x", "what is open goes on");
        if !is_closed {
            // What was accepted before the drain still finds its tunnel.
            drop(within("another", pool.open(&pods.key, request())).await.unwrap());
        }
        drop(tunnel);
        eventually("the connection has ended", || tasks.tasks().is_empty()).await;
        if let Some(drain) = drain {
            assert!(matches!(drain.await.unwrap(), Drained::Completely));
        }
    }
}

#[tokio::test]
async fn a_peer_that_stops_answering_is_given_up() {
    // A relay between the two that can be made to swallow everything.
    let settings = HboneSettings {
        ping_interval: Duration::from_millis(50),
        ping_timeout: Duration::from_secs(2),
        ..HboneSettings::default()
    };
    let mut pods = two_pods(settings, echo).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let between = listener.local_addr().unwrap();
    let to = pods.address;
    let (stop, stopped) = tokio::sync::watch::channel(false);
    tokio::spawn(async move {
        let (mut near, _) = listener.accept().await.unwrap();
        let mut far = tokio::net::TcpStream::connect(to).await.unwrap();
        let mut stopped = stopped.clone();
        tokio::select! {
            _ = tokio::io::copy_bidirectional(&mut near, &mut far) => {}
            () = async { drop(stopped.wait_for(|stop| *stop).await) } => {}
        }
        std::future::pending::<()>().await
    });
    pods.redial(between);
    let mut tunnel = pods.open().await;
    send(&mut tunnel, b"x").await.unwrap();
    receive_exactly(&mut tunnel, 1).await;
    stop.send(true).unwrap();
    assert!(matches!(receive(&mut tunnel).await, Some(Err(TunnelEnd::Lost(_)))));
    assert_eq!(pods.pool.census().0, 0);
}

#[rstest]
#[case::client(true)]
#[case::server(false)]
#[tokio::test]
async fn a_root_that_leaves_the_bundle_ends_the_connections_of_its_peers_by_name(#[case] of_client: bool) {
    let (pods, mut tunnels) = pods_with_tunnels(HboneSettings::default()).await;
    let mut client = pods.open().await;
    let mut server = within("a tunnel", tunnels.recv()).await.unwrap().accept().unwrap();
    send(&mut client, b"x").await.unwrap();
    receive_exactly(&mut server, 1).await;
    pods.authority.leave_the_bundle(of_client);
    let (near, far) = if of_client {
        (&mut client, &mut server)
    } else {
        (&mut server, &mut client)
    };
    let Some(Err(TunnelEnd::Distrusted(why))) = receive(near).await else {
        panic!("still believed, or without a reason")
    };
    let Distrust::Rejected(PeerRejected::UnknownIssuer | PeerRejected::BadSignature) = why else {
        panic!("{why:?}")
    };
    assert!(matches!(receive(far).await, Some(Err(TunnelEnd::Lost(_)))));
    eventually("the pool forgets the connection", || pods.pool.census().0 == 0).await;
}

#[tokio::test]
async fn a_draining_server_finishes_its_tunnels_and_takes_no_more() {
    let pods = two_pods(HboneSettings::default(), echo).await;
    let mut tunnel = pods.open().await;
    send(&mut tunnel, b"before").await.unwrap();
    receive_exactly(&mut tunnel, 6).await;
    let tasks = pods.tasks.clone();
    let drained = tokio::spawn(async move { tasks.drain(DEADLINE).await });
    // After GOAWAY the pool dials anew, and nobody listens any more.
    within("GOAWAY", async {
        loop {
            if pods.pool.open(&pods.key, request()).await.is_err() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    send(&mut tunnel, b"after").await.unwrap();
    assert_eq!(receive_exactly(&mut tunnel, 5).await, b"after");
    tunnel.finish().unwrap();
    assert_eq!(receive_all(&mut tunnel).await.unwrap(), b"");
    drop(tunnel);
    assert_eq!(
        within("the drain", drained).await.unwrap(),
        crate::shutdown::Drained::Completely
    );
}

#[rstest]
#[case(4)]
#[case(40)]
#[tokio::test]
async fn readers_that_stop_reading_freeze_no_other_tunnel(#[case] stalled: usize) {
    let settings = HboneSettings {
        spread: 1,
        ..HboneSettings::default()
    };
    let window = settings.stream_window as usize;
    // The server of a stalled tunnel sends as much as it may; nobody takes it.
    let (pods, mut tunnels) = pods_with_tunnels(settings).await;
    let mut held = Vec::new();
    for _ in 0..stalled {
        let client = pods.open().await;
        let mut server = within("a tunnel", tunnels.recv()).await.unwrap().accept().unwrap();
        held.push(client);
        tokio::spawn(async move {
            let chunk = bytes::Bytes::from(vec![0; 64 << 10]);
            let mut sent = 0;
            while sent < 2 * window && poll_fn(|cx| server.poll_send_ready(cx)).await.is_ok() {
                sent += chunk.len();
                server.send(chunk.clone()).unwrap();
            }
            std::future::pending::<()>().await;
            drop(server);
        });
    }
    // All that can come has come when a tunnel opened on the same connection works, again and again.
    let mut client = pods.open().await;
    let mut server = within("a tunnel", tunnels.recv()).await.unwrap().accept().unwrap();
    for _ in 0..200 {
        send(&mut client, &[1; 1024]).await.unwrap();
        receive_exactly(&mut server, 1024).await;
        send(&mut server, &[2; 64 << 10]).await.unwrap();
        receive_exactly(&mut client, 64 << 10).await;
    }
    assert_eq!(pods.dialled(), 1, "the tunnels were to share a connection");
}

#[tokio::test]
async fn a_tunnel_that_is_not_read_takes_no_more_than_its_window() {
    let settings = HboneSettings::default();
    let (window, buffer) = (settings.stream_window as usize, settings.send_buffer);
    let (pods, mut tunnels) = pods_with_tunnels(settings).await;
    let client = pods.open().await;
    let mut server = within("a tunnel", tunnels.recv()).await.unwrap().accept().unwrap();
    let chunk = bytes::Bytes::from(vec![0; 64 << 10]);
    let mut sent = 0;
    while let Ok(Ok(())) =
        tokio::time::timeout(Duration::from_millis(300), poll_fn(|cx| server.poll_send_ready(cx))).await
    {
        sent += chunk.len();
        server.send(chunk.clone()).unwrap();
        assert!(sent <= window + buffer + chunk.len(), "{sent}");
    }
    assert!(sent >= window);
    drop(client);
}

#[tokio::test]
async fn a_tunnel_opened_beside_bulk_gets_a_connection_of_its_own() {
    let pods = two_pods(HboneSettings::default(), echo).await;
    let mut bulk = pods.open().await;
    let chunk = vec![0; 128 << 10];
    for _ in 0..64 {
        send(&mut bulk, &chunk).await.unwrap();
        receive_exactly(&mut bulk, chunk.len()).await;
    }
    let _small = pods.open().await;
    assert_eq!(pods.dialled(), 2);
    let _another = pods.open().await;
    assert_eq!(pods.dialled(), 2, "the quiet connection is shared");
}

#[tokio::test]
async fn thousands_of_tiny_frames_do_not_end_the_connection() {
    let (pods, mut tunnels) = pods_with_tunnels(HboneSettings::default()).await;
    let mut client = pods.open().await;
    let mut server = within("a tunnel", tunnels.recv()).await.unwrap().accept().unwrap();
    for _ in 0..20_000 {
        send(&mut client, b"tiny").await.unwrap();
        tokio::task::yield_now().await;
    }
    client.finish().unwrap();
    assert_eq!(receive_all(&mut server).await.unwrap().len(), 80_000);
}

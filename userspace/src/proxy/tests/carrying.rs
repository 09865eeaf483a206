//! Bytes, ends and resets, as the applications see them.

use super::*;
use std::{future::Future, net::SocketAddr};

#[tokio::test]
async fn a_connection_goes_through_the_mesh_and_both_sides_know_whose_it_is() {
    let Some(nodes) = two_nodes("through the mesh").await else {
        return;
    };
    let listener = nodes.listen(7001);
    let (mut client, mut server) = nodes.connection(&listener).await;
    assert_eq!(client.peer_addr().unwrap(), "10.9.0.2:7001".parse().unwrap());
    client.write_all(b"ping").await.unwrap();
    expect(&mut server, b"ping").await;
    server.write_all(b"pong!").await.unwrap();
    expect(&mut client, b"pong!").await;
    let source = nodes.client_side.connections.list().remove(0);
    let destination = nodes.server_side.connections.list().remove(0);
    for open in [&source, &destination] {
        assert_eq!(
            open.facts.source_principal.as_ref().unwrap().service_account(),
            "client"
        );
        assert_eq!(
            open.facts.destination_principal.as_ref().unwrap().service_account(),
            "server"
        );
        assert_eq!(open.hbone_target, Some("10.9.0.2:7001".parse().unwrap()));
        eventually("bytes are counted while the connection is open", || {
            (open.metrics.received_bytes(), open.metrics.sent_bytes()) == (4, 5)
        })
        .await;
    }
    assert_eq!(
        destination.source,
        client.local_addr().unwrap(),
        "forwarded tells the client's own port"
    );
    drop((client, server, source, destination));
    nodes.nothing_is_open().await;
}

#[tokio::test]
async fn the_client_may_say_all_first_and_still_be_answered() {
    let Some(nodes) = two_nodes("half-close of the client").await else {
        return;
    };
    let listener = nodes.listen(7001);
    let (mut client, mut server) = nodes.connection(&listener).await;
    client.write_all(b"request").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut server).await.unwrap(), b"request");
    server.write_all(b"answer").await.unwrap();
    drop(server);
    assert_eq!(read_to_end(&mut client).await.unwrap(), b"answer");
    drop(client);
    nodes.nothing_is_open().await;
}

#[tokio::test]
async fn the_server_may_speak_first_and_finish_first() {
    let Some(nodes) = two_nodes("half-close of the server").await else {
        return;
    };
    let listener = nodes.listen(7001);
    let (mut client, mut server) = nodes.connection(&listener).await;
    server.write_all(b"220 ready").await.unwrap();
    server.shutdown().await.unwrap();
    assert_eq!(read_to_end(&mut client).await.unwrap(), b"220 ready");
    client.write_all(b"goodbye").await.unwrap();
    drop(client);
    assert_eq!(read_to_end(&mut server).await.unwrap(), b"goodbye");
    drop(server);
    nodes.nothing_is_open().await;
}

#[tokio::test]
async fn a_reset_of_either_application_resets_the_other() {
    let Some(nodes) = two_nodes("resets").await else { return };
    let listener = nodes.listen(7001);
    for client_resets in [true, false] {
        let (mut client, mut server) = nodes.connection(&listener).await;
        client.write_all(b"x").await.unwrap();
        expect(&mut server, b"x").await;
        let (resetting, mut other) = if client_resets {
            (client, server)
        } else {
            (server, client)
        };
        reset(resetting);
        assert_eq!(
            ending(&mut other).await,
            Err(ErrorKind::ConnectionReset),
            "client resets: {client_resets}"
        );
    }
    nodes.nothing_is_open().await;
}

#[tokio::test]
async fn a_port_where_nobody_listens_is_a_reset_at_once() {
    let Some(nodes) = two_nodes("closed port").await else {
        return;
    };
    let mut client = nodes.dial(7002).await.unwrap();
    assert_eq!(ending(&mut client).await, Err(ErrorKind::ConnectionReset));
    nodes.nothing_is_open().await;
}

#[tokio::test]
async fn many_megabytes_arrive_as_they_were_sent() {
    let Some(nodes) = two_nodes("bulk").await else { return };
    let listener = nodes.listen(7001);
    let (client, server) = nodes.connection(&listener).await;
    const BYTES: usize = 24 << 20;
    let content: Arc<Vec<u8>> = Arc::new((0..BYTES).map(|i| (i % 251) as u8).collect());
    let both = [client, server].map(|socket| {
        let content = Arc::clone(&content);
        tokio::spawn(async move {
            let (mut read, mut write) = socket.into_split();
            let sending = Arc::clone(&content);
            let sent = tokio::spawn(async move {
                // Pieces of odd sizes, none of them that of a buffer.
                for piece in sending.chunks(77_777) {
                    write.write_all(piece).await.unwrap();
                }
                write.shutdown().await.unwrap();
                write
            });
            let mut got = Vec::with_capacity(BYTES);
            read.read_to_end(&mut got).await.unwrap();
            assert!(got == *content, "the bytes differ");
            sent.await.unwrap();
        })
    });
    for end in both {
        within("both directions", end).await.unwrap();
    }
    nodes.nothing_is_open().await;
}

#[tokio::test]
async fn readers_that_do_not_read_harm_no_other_connection_of_the_pair() {
    let Some(nodes) = two_nodes("stalled readers").await else {
        return;
    };
    let listener = nodes.listen(7001);
    let mut stalled = Vec::new();
    for _ in 0..40 {
        let (client, mut server) = nodes.connection(&listener).await;
        let sending = tokio::spawn(async move {
            let chunk = vec![0; 1 << 20];
            for _ in 0..64 {
                if server.write_all(&chunk).await.is_err() {
                    break;
                }
            }
        });
        stalled.push((client, sending));
    }
    let (mut client, mut server) = nodes.connection(&listener).await;
    for _ in 0..100 {
        client.write_all(&[1; 1024]).await.unwrap();
        expect(&mut server, &[1; 1024]).await;
        server.write_all(&[2; 100 << 10]).await.unwrap();
        expect(&mut client, &[2; 100 << 10]).await;
    }
    // What was held up goes on where it stopped.
    let (mut reader, sending) = stalled.swap_remove(7);
    let mut left = vec![0; 64 << 20];
    within("the rest", reader.read_exact(&mut left)).await.unwrap();
    within("the sender", sending).await.unwrap();
}

#[tokio::test]
async fn thousands_of_tiny_writes_to_a_reader_that_waits_arrive_and_harm_nobody() {
    let Some(nodes) = two_nodes("tiny writes").await else {
        return;
    };
    let listener = nodes.listen(7001);
    let (mut other, mut other_server) = nodes.connection(&listener).await;
    let (mut client, server) = nodes.connection(&listener).await;
    // A small receive buffer makes a reader slow soon.
    socket2::SockRef::from(&client).set_recv_buffer_size(4096).unwrap();
    const WRITES: usize = 30_000;
    let writing = tokio::spawn(async move {
        server.set_nodelay(true).unwrap();
        let mut server = server;
        for i in 0..WRITES {
            server.write_all(&(i as u32).to_be_bytes()).await.unwrap();
            tokio::task::yield_now().await;
        }
        server.shutdown().await.unwrap();
        server
    });
    for _ in 0..50 {
        other.write_all(b"hello").await.unwrap();
        expect(&mut other_server, b"hello").await;
    }
    let all = read_to_end(&mut client).await.unwrap();
    within("the writer", writing).await.unwrap();
    let numbers: Vec<u32> = all
        .chunks(4)
        .map(|n| u32::from_be_bytes(n.try_into().unwrap()))
        .collect();
    assert!(numbers.iter().copied().eq(0..WRITES as u32));
    other.write_all(b"hello").await.unwrap();
    expect(&mut other_server, b"hello").await;
}

#[tokio::test]
async fn a_hundred_connections_at_once_all_arrive() {
    let Some(nodes) = two_nodes("hundred at once").await else {
        return;
    };
    let listener = nodes.listen(7001);
    let echo = tokio::spawn(async move {
        loop {
            let (mut socket, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                let (mut read, mut write) = socket.split();
                tokio::io::copy(&mut read, &mut write).await
            });
        }
    });
    let clients = (0..100).map(|i: u32| {
        let nodes = &nodes;
        async move {
            let mut client = nodes.dial(7001).await.unwrap();
            client.write_all(&i.to_be_bytes()).await.unwrap();
            expect(&mut client, &i.to_be_bytes()).await;
        }
    });
    futures::future::join_all(clients).await;
    nodes.nothing_is_open().await;
    echo.abort();
}

#[test]
fn a_connections_task_is_small() {
    // What every open connection costs, besides its socket and its stream.
    assert!(
        size_of::<relay::TunnelRelay>() <= 512,
        "{}",
        size_of::<relay::TunnelRelay>()
    );
    assert!(
        size_of::<relay::SocketRelay>() <= 320,
        "{}",
        size_of::<relay::SocketRelay>()
    );
    fn size<F: Future>(_: impl FnOnce(Arc<pod::Pod>, TcpStream, SocketAddr) -> F) -> usize {
        size_of::<F>()
    }
    assert!(size(outbound::serve) <= 3 << 10, "{}", size(outbound::serve));
    assert!(size(plaintext::serve) <= 3 << 10, "{}", size(plaintext::serve));
}

//! Peers that do what they should not, spoken to a real server with a client of their own.

use super::{testing::*, *};
use crate::testing::{eventually, within};
use h2::{Reason, client::SendRequest};
use http::{Method, Request as HttpRequest, StatusCode};
use rstest::rstest;
use rustls_pki_types::ServerName;
use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

/// An authenticated client that says what it likes.
async fn rogue(pods: &TwoPods) -> SendRequest<bytes::Bytes> {
    let config = pods.authority.svid(&spiffe("client")).client_config(&spiffe("server"));
    let tcp = TcpStream::connect(pods.address).await.unwrap();
    let name = ServerName::IpAddress(pods.address.ip().into());
    let tls = tokio_rustls::TlsConnector::from(config)
        .connect(name, tcp)
        .await
        .unwrap();
    let (sender, connection) = h2::client::Builder::new()
        .max_header_list_size(1 << 20)
        .handshake(tls)
        .await
        .unwrap();
    tokio::spawn(connection);
    sender
}

/// Whether a tunnel of this connection still echoes.
async fn lives(sender: &SendRequest<bytes::Bytes>) {
    let mut sender = sender.clone();
    let request = headers::connect(target(), None, None).unwrap();
    let (answer, mut send) = sender.send_request(request, false).unwrap();
    send.send_data("alive".into(), true).unwrap();
    let answer = within("an answer", answer).await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    let mut body = answer.into_body();
    assert_eq!(within("the echo", body.data()).await.unwrap().unwrap(), "alive");
}

#[rstest]
#[case::method(HttpRequest::builder().method(Method::GET).uri("http://10.0.0.1:80/"), 400)]
#[case::post(HttpRequest::builder().method(Method::POST).uri("http://10.0.0.1:80/"), 400)]
#[case::address(HttpRequest::builder().method(Method::CONNECT).uri("10.0.0.2:80"), 400)]
#[case::loopback(HttpRequest::builder().method(Method::CONNECT).uri("127.0.0.1:80"), 400)]
#[case::no_port(HttpRequest::builder().method(Method::CONNECT).uri("10.0.0.1"), 400)]
#[case::own_port(HttpRequest::builder().method(Method::CONNECT).uri("10.0.0.1:15008"), 503)]
#[case::name(HttpRequest::builder().method(Method::CONNECT).uri("web.shop:80"), 503)]
#[tokio::test]
async fn a_request_that_makes_no_sense_is_answered_and_the_connection_lives_on(
    #[case] request: http::request::Builder,
    #[case] status: u16,
) {
    let pods = two_pods(HboneSettings::default(), echo).await;
    let mut sender = rogue(&pods).await;
    let (answer, _send) = sender.send_request(request.body(()).unwrap(), false).unwrap();
    assert_eq!(within("an answer", answer).await.unwrap().status().as_u16(), status);
    lives(&sender).await;
    assert_eq!(pods.refused.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_connect_without_authority_is_answered_with_400() {
    let pods = two_pods(HboneSettings::default(), echo).await;
    let mut wire = raw(&pods).await;
    // :method CONNECT as a literal without indexing, and nothing else.
    let mut block = vec![0x02, 7];
    block.extend_from_slice(b"CONNECT");
    wire.write_all(&frame(0x1, 0x4, 1, &block)).await.unwrap();
    // 0x8c is the static table's `:status 400`.
    assert!(headers_of(&mut wire, 1).await.starts_with(&[0x8c]));
}

#[rstest]
#[case::traceparent("traceparent", b"00-zz-zz-zz".as_slice())]
#[case::traceparent_of_the_wrong_length("traceparent", b"00".as_slice())]
#[case::traceparent_that_is_not_ascii("traceparent", b"\xff\xfe\x80".as_slice())]
#[case::baggage("baggage", b"=;=,,;%zz".as_slice())]
#[case::forwarded("forwarded", b"for=\"[::1\";;,".as_slice())]
#[tokio::test]
async fn a_malformed_hint_is_ignored(#[case] name: &'static str, #[case] value: &[u8]) {
    let pods = two_pods(HboneSettings::default(), echo).await;
    let mut sender = rogue(&pods).await;
    let mut request = headers::connect(target(), None, None).unwrap();
    request
        .headers_mut()
        .insert(name, http::HeaderValue::from_bytes(value).unwrap());
    let (answer, _send) = sender.send_request(request, false).unwrap();
    assert_eq!(within("an answer", answer).await.unwrap().status(), StatusCode::OK);
    lives(&sender).await;
}

#[tokio::test]
async fn oversized_headers_are_refused_and_the_connection_lives_on() {
    let pods = two_pods(HboneSettings::default(), echo).await;
    let mut sender = rogue(&pods).await;
    let mut request = headers::connect(target(), None, None).unwrap();
    request
        .headers_mut()
        .insert("baggage", "x".repeat(80 << 10).parse().unwrap());
    let (answer, _send) = sender.send_request(request, false).unwrap();
    match within("an answer", answer).await {
        Ok(answer) => assert_eq!(answer.status(), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE),
        Err(error) => assert!(error.is_reset(), "{error}"),
    }
    lives(&sender).await;
}

#[tokio::test]
async fn tunnels_beyond_the_limit_are_refused_and_the_others_live_on() {
    let settings = HboneSettings {
        max_concurrent_streams: 3,
        ..HboneSettings::default()
    };
    let pods = two_pods(settings, echo).await;
    let mut wire = raw(&pods).await;
    // Without waiting for SETTINGS, four at once: HEADERS without END_STREAM, `:method CONNECT`, `:authority 10.0.0.1:80`.
    let mut block = vec![0x02, 7];
    block.extend_from_slice(b"CONNECT");
    block.extend_from_slice(&[0x01, 11]);
    block.extend_from_slice(b"10.0.0.1:80");
    for stream in [1, 3, 5, 7] {
        wire.write_all(&frame(0x1, 0x4, stream, &block)).await.unwrap();
    }
    let refused = within("a refusal", async {
        loop {
            let (kind, stream, payload) = next_frame(&mut wire).await;
            if kind == 0x3 {
                break (stream, payload);
            }
        }
    })
    .await;
    assert_eq!(refused, (7, u32::from(Reason::REFUSED_STREAM).to_be_bytes().to_vec()));
    wire.write_all(&frame(0x0, 0x0, 5, b"alive")).await.unwrap();
    within("the echo", async {
        loop {
            let (kind, stream, payload) = next_frame(&mut wire).await;
            assert_ne!(kind, 0x7, "the connection is ended");
            if (kind, stream) == (0x0, 5) {
                break assert_eq!(payload, b"alive");
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_opens_and_resets_without_end_harms_nobody() {
    let pods = two_pods(HboneSettings::default(), echo).await;
    let sender = rogue(&pods).await;
    for _ in 0..50 {
        // Fewer than `RESET_STREAMS` in one go: past that the peer's own connection is ended, with all of its tunnels.
        for _ in 0..100 {
            let mut sender = within("room", sender.clone().ready()).await.unwrap();
            let request = headers::connect(target(), None, None).unwrap();
            let (_answer, mut send) = sender.send_request(request, false).unwrap();
            send.send_reset(Reason::CANCEL);
            tokio::task::yield_now().await;
        }
        lives(&sender).await;
    }
}

/// A client that has no certificate.
#[derive(Debug)]
struct Nothing;

impl rustls::client::ResolvesClientCert for Nothing {
    fn resolve(&self, _: &[&[u8]], _: &[rustls::SignatureScheme]) -> Option<Arc<rustls::sign::CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

async fn refusal(pods: &TwoPods) -> Arc<str> {
    eventually("the refusal", || pods.failures.lock().len() == 1).await;
    pods.failures.lock()[0].clone()
}

#[tokio::test]
async fn plaintext_to_the_hbone_port_is_refused_by_name() {
    for greeting in [
        "GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        "EHLO example.com\r\n",
    ] {
        let pods = two_pods(HboneSettings::default(), echo).await;
        let mut tcp = TcpStream::connect(pods.address).await.unwrap();
        tcp.write_all(greeting.as_bytes()).await.unwrap();
        assert_eq!(&*refusal(&pods).await, "plaintext", "{greeting}");
        let mut rest = Vec::new();
        // Closed, with or without a word.
        let _ = within("the end", tcp.read_to_end(&mut rest)).await;
    }
}

#[tokio::test]
async fn tls_1_2_is_refused_by_name() {
    let pods = two_pods(HboneSettings::default(), echo).await;
    let mut tcp = TcpStream::connect(pods.address).await.unwrap();
    tcp.write_all(&client_hello_of_tls_1_2()).await.unwrap();
    assert_eq!(&*refusal(&pods).await, "tls_version");
}

#[tokio::test]
async fn another_application_protocol_is_refused_by_name_and_none_is_taken() {
    for (protocols, expected) in [(vec![b"http/1.1".to_vec()], Some("alpn")), (vec![], None)] {
        let pods = two_pods(HboneSettings::default(), echo).await;
        let config = pods.authority.svid(&spiffe("client")).client_config(&spiffe("server"));
        let mut config = (*config).clone();
        config.alpn_protocols = protocols;
        let tcp = TcpStream::connect(pods.address).await.unwrap();
        let name = ServerName::IpAddress(pods.address.ip().into());
        let tls = tokio_rustls::TlsConnector::from(Arc::new(config))
            .connect(name, tcp)
            .await;
        match expected {
            Some(expected) => {
                drop(tls);
                assert_eq!(&*refusal(&pods).await, expected);
            }
            None => {
                let (sender, connection) = h2::client::handshake(tls.unwrap()).await.unwrap();
                tokio::spawn(connection);
                lives(&sender).await;
            }
        }
    }
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused_by_name() {
    let pods = two_pods(HboneSettings::default(), echo).await;
    let with = pods.authority.svid(&spiffe("client")).client_config(&spiffe("server"));
    let mut config = (*with).clone();
    config.client_auth_cert_resolver = Arc::new(Nothing);
    let tcp = TcpStream::connect(pods.address).await.unwrap();
    let name = ServerName::IpAddress(pods.address.ip().into());
    let _tls = tokio_rustls::TlsConnector::from(Arc::new(config))
        .connect(name, tcp)
        .await;
    assert_eq!(&*refusal(&pods).await, "no_certificate");
}

#[tokio::test]
async fn a_peer_that_never_finishes_its_handshake_is_given_up() {
    let settings = HboneSettings {
        handshake_deadline: Duration::from_millis(100),
        ..HboneSettings::default()
    };
    let pods = two_pods(settings, echo).await;
    let mut tcp = TcpStream::connect(pods.address).await.unwrap();
    // A record header that promises 512 bytes, and then nothing.
    tcp.write_all(&[22, 3, 1, 2, 0]).await.unwrap();
    assert_eq!(&*refusal(&pods).await, "timeout");
}

#[tokio::test]
async fn a_peer_that_never_begins_http2_is_given_up() {
    let settings = HboneSettings {
        handshake_deadline: Duration::from_secs(3),
        ..HboneSettings::default()
    };
    let pods = two_pods(settings, echo).await;
    let config = pods.authority.svid(&spiffe("client")).client_config(&spiffe("server"));
    let tcp = TcpStream::connect(pods.address).await.unwrap();
    let name = ServerName::IpAddress(pods.address.ip().into());
    let _tls = tokio_rustls::TlsConnector::from(config)
        .connect(name, tcp)
        .await
        .unwrap();
    assert_eq!(&*refusal(&pods).await, "timeout");
}

/// TLS up and HTTP/2 begun; frames are written and read by hand.
async fn raw(pods: &TwoPods) -> tokio_rustls::client::TlsStream<TcpStream> {
    let config = pods.authority.svid(&spiffe("client")).client_config(&spiffe("server"));
    let tcp = TcpStream::connect(pods.address).await.unwrap();
    let name = ServerName::IpAddress(pods.address.ip().into());
    let mut tls = tokio_rustls::TlsConnector::from(config)
        .connect(name, tcp)
        .await
        .unwrap();
    tls.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
    tls.write_all(&frame(0x4, 0, 0, &[])).await.unwrap();
    tls
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut frame = vec![length[1], length[2], length[3], kind, flags];
    frame.extend_from_slice(&stream.to_be_bytes());
    frame.extend_from_slice(payload);
    frame
}

async fn next_frame(wire: &mut tokio_rustls::client::TlsStream<TcpStream>) -> (u8, u32, Vec<u8>) {
    let mut head = [0; 9];
    within("a frame", wire.read_exact(&mut head)).await.unwrap();
    let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
    let mut payload = vec![0; length];
    within("its payload", wire.read_exact(&mut payload)).await.unwrap();
    (
        head[3],
        u32::from_be_bytes([head[5], head[6], head[7], head[8]]),
        payload,
    )
}

async fn headers_of(wire: &mut tokio_rustls::client::TlsStream<TcpStream>, wanted: u32) -> Vec<u8> {
    loop {
        let (kind, stream, payload) = next_frame(wire).await;
        if (kind, stream) == (0x1, wanted) {
            return payload;
        }
    }
}

/// What an old client says: TLS 1.2 at most, one suite, a group and a signature algorithm.
fn client_hello_of_tls_1_2() -> Vec<u8> {
    let mut hello = vec![3, 3];
    hello.extend_from_slice(&[7; 32]);
    hello.push(0);
    hello.extend_from_slice(&[0, 2, 0xc0, 0x2b, 1, 0]);
    let extensions = [
        [0, 10, 0, 4, 0, 2, 0, 23].as_slice(),
        [0, 11, 0, 2, 1, 0].as_slice(),
        [0, 13, 0, 4, 0, 2, 4, 3].as_slice(),
        [0, 16, 0, 5, 0, 3, 2, b'h', b'2'].as_slice(),
    ]
    .concat();
    hello.extend_from_slice(&u16::try_from(extensions.len()).unwrap().to_be_bytes());
    hello.extend_from_slice(&extensions);
    let length = u32::try_from(hello.len()).unwrap().to_be_bytes();
    let handshake = [&[1, length[1], length[2], length[3]], hello.as_slice()].concat();
    let length = u16::try_from(handshake.len()).unwrap().to_be_bytes();
    [&[22, 3, 1, length[0], length[1]], handshake.as_slice()].concat()
}

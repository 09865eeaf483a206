//! The three servers, asked over real connections.

use super::*;
use crate::{
    mesh::MeshSnapshot,
    shutdown::Shutdown,
    telemetry::{Metrics, Place, dump, logging::LogHandle},
    testing::refused,
};
use std::{
    net::{Ipv4Addr, SocketAddr, TcpListener},
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::watch,
    time::timeout,
};

const LONG: Duration = Duration::from_secs(20);

fn start(site: Arc<impl Site>, shutdown: &Shutdown) -> SocketAddr {
    let listeners = bind("test", Listen::Loopback(0)).unwrap();
    let address = listeners[0].local_addr().unwrap();
    serve(listeners, site, "test", shutdown).unwrap();
    address
}

/// Status, headers and body of one request, written as it is.
async fn raw(address: SocketAddr, request: &str) -> (u16, String, String) {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    timeout(LONG, stream.read_to_string(&mut answer))
        .await
        .unwrap()
        .unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap_or((&answer, ""));
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head.to_lowercase(), body.to_owned())
}

async fn ask(address: SocketAddr, method: &str, path: &str) -> (u16, String, String) {
    raw(address, &format!("{method} {path} HTTP/1.1\r\nhost: x\r\n\r\n")).await
}

fn state() -> AdminState {
    let snapshot = MeshSnapshot {
        version: 7,
        ..MeshSnapshot::default()
    };
    let (_, snapshot) = watch::channel(Arc::new(snapshot));
    AdminState::new("node-a".into(), "cluster.local".into(), snapshot)
        .kernel_counters(|| {
            vec![dump::KernelCounter {
                reason: "steer_mesh".into(),
                count: 3,
            }]
        })
        .connections(|| panic!("nobody asked for it"))
}

#[tokio::test]
async fn readiness_is_503_with_the_reasons_until_all_is_met() {
    let shutdown = Shutdown::new();
    let readiness = Readiness::awaiting([
        ("state", "the initial list is not published"),
        ("programs", "not attached"),
    ]);
    let address = start(Arc::new(ReadinessSite(readiness.clone())), &shutdown);
    let (status, _, body) = ask(address, "GET", "/healthz/ready").await;
    assert_eq!(status, 503);
    assert_eq!(
        body,
        "not ready\nprograms: not attached\nstate: the initial list is not published\n"
    );
    readiness.met("state");
    assert_eq!(
        ask(address, "GET", "/healthz/ready").await.2,
        "not ready\nprograms: not attached\n"
    );
    readiness.met("programs");
    let (status, _, body) = ask(address, "GET", "/healthz/ready").await;
    assert_eq!((status, body.as_str()), (200, "ready\n"));
    readiness.pending("listeners", "no listener for ambient/echo-1");
    assert_eq!(ask(address, "GET", "/healthz/ready").await.0, 503);
}

#[tokio::test]
async fn metrics_are_openmetrics_under_both_of_istios_paths() {
    let shutdown = Shutdown::new();
    let address = start(Arc::new(MetricsSite(Metrics::new(Place::default()))), &shutdown);
    for path in ["/metrics", "/stats/prometheus"] {
        let (status, head, body) = ask(address, "GET", path).await;
        assert_eq!(status, 200);
        assert!(
            head.contains("content-type: application/openmetrics-text; version=1.0.0; charset=utf-8"),
            "{head}"
        );
        assert!(body.contains("# TYPE istio_tcp_connections_opened counter\n"), "{body}");
        assert!(body.ends_with("# EOF\n"));
    }
}

#[tokio::test]
async fn a_dump_has_all_sections_or_those_that_are_asked_for() {
    let shutdown = Shutdown::new();
    let quiet = state().connections(Vec::new);
    let address = start(
        Arc::new(AdminSite {
            state: Some(quiet),
            logging: None,
        }),
        &shutdown,
    );
    let (status, head, body) = ask(address, "GET", "/config_dump").await;
    assert_eq!(status, 200);
    assert!(head.contains("content-type: application/json"));
    let dump: dump::Dump = serde_json::from_str(&body).unwrap();
    assert_eq!((dump.version.node.as_str(), dump.version.snapshot), ("node-a", 7));
    assert_eq!(dump.kernel_counters.len(), 1);

    let (_, _, body) = ask(address, "GET", "/config_dump?section=workloads&section=certificates").await;
    assert_eq!(serde_json::from_str::<dump::Dump>(&body).unwrap().kernel_counters, []);
    let (status, _, body) = ask(address, "GET", "/config_dump?section=keys").await;
    assert_eq!(status, 400);
    assert!(
        body.contains("no section \"keys\"; there is: workloads, services"),
        "{body}"
    );
}

#[tokio::test]
async fn the_level_is_told_and_changed_over_http() {
    let shutdown = Shutdown::new();
    let (logging, _filter) = LogHandle::detached("info");
    let site = AdminSite {
        state: None,
        logging: Some(logging),
    };
    let address = start(Arc::new(site), &shutdown);
    for (path, expected) in [
        ("/logging", "current log level is info\n"),
        ("/logging?level=debug", "current log level is debug\n"),
        (
            "/logging?level=warn,warren::proxy:trace",
            "current log level is warren::proxy=trace,warn\n",
        ),
        ("/logging?reset", "current log level is info\n"),
    ] {
        let (status, _, body) = ask(address, "POST", path).await;
        assert_eq!((status, body.as_str()), (200, expected), "{path}");
    }
    let (status, _, body) = ask(address, "POST", "/logging?level=loud").await;
    assert_eq!(status, 400);
    assert!(
        body.starts_with("\"loud\" is no log level") && body.contains("POST /logging?level="),
        "{body}"
    );
    assert_eq!(ask(address, "POST", "/logging").await.2, "current log level is info\n");
    assert_eq!(
        ask(address, "GET", "/config_dump").await.0,
        404,
        "this role has nothing to dump"
    );
}

#[tokio::test]
async fn an_answer_that_panics_harms_nobody_else() {
    let shutdown = Shutdown::new();
    let address = start(
        Arc::new(AdminSite {
            state: Some(state()),
            logging: None,
        }),
        &shutdown,
    );
    assert_eq!(ask(address, "GET", "/config_dump?section=connections").await.0, 500);
    assert_eq!(ask(address, "GET", "/config_dump?section=workloads").await.0, 200);
}

#[tokio::test]
async fn wrong_paths_methods_and_requests_are_refused() {
    let shutdown = Shutdown::new();
    let address = start(
        Arc::new(AdminSite {
            state: Some(state()),
            logging: None,
        }),
        &shutdown,
    );
    let (status, _, body) = ask(address, "GET", "/config").await;
    assert_eq!(status, 404);
    assert!(body.contains("/config_dump\n"), "{body}");
    let (status, head, _) = ask(address, "POST", "/config_dump").await;
    assert_eq!(status, 405);
    assert!(head.contains("allow: get"), "{head}");
    let (status, head, _) = ask(address, "GET", "/logging?level=debug").await;
    assert_eq!(status, 405);
    assert!(head.contains("allow: post"), "{head}");
    let (status, _, body) = ask(address, "HEAD", "/").await;
    assert_eq!((status, body.as_str()), (200, ""));
    assert_eq!(raw(address, "nonsense\r\n\r\n").await.0, 400);
    let long = format!("GET / HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "a".repeat(64 << 10));
    assert_eq!(raw(address, &long).await.0, 431);
}

#[tokio::test]
async fn a_client_that_says_nothing_is_let_go() {
    let shutdown = Shutdown::new();
    let address = start(Arc::new(ReadinessSite(Readiness::default())), &shutdown);
    let mut silent = TcpStream::connect(address).await.unwrap();
    let mut rest = Vec::new();
    timeout(LONG, silent.read_to_end(&mut rest))
        .await
        .expect("the server ends it")
        .unwrap();
    assert_eq!(ask(address, "GET", "/healthz/ready").await.0, 200);
}

#[tokio::test]
async fn silent_clients_do_not_keep_others_out_for_long() {
    let shutdown = Shutdown::new();
    let address = start(Arc::new(ReadinessSite(Readiness::default())), &shutdown);
    let mut silent = Vec::new();
    for _ in 0..100 {
        silent.push(TcpStream::connect(address).await.unwrap());
    }
    assert_eq!(
        timeout(LONG, ask(address, "GET", "/healthz/ready")).await.unwrap().0,
        200
    );
}

#[tokio::test]
async fn the_drain_ends_the_servers() {
    let shutdown = Shutdown::new();
    let address = start(Arc::new(ReadinessSite(Readiness::default())), &shutdown);
    assert_eq!(ask(address, "GET", "/healthz/ready").await.0, 200);
    assert_eq!(shutdown.drain(LONG).await, crate::shutdown::Drained::Completely);
    refused(address).await;
}

#[test]
fn a_port_that_is_taken_is_named() {
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    let address = taken.local_addr().unwrap();
    let error = bind("admin", Listen::Loopback(address.port())).unwrap_err();
    let expected = format!("cannot listen on {address} for admin (another process has the port;");
    assert!(error.to_string().starts_with(&expected), "{error}");
}

#[tokio::test]
async fn both_families_are_served_everywhere() {
    let shutdown = Shutdown::new();
    let listeners = bind("test", Listen::Everywhere(0)).unwrap();
    let bound = listeners[0].local_addr().unwrap();
    serve(
        listeners,
        Arc::new(ReadinessSite(Readiness::default())),
        "test",
        &shutdown,
    )
    .unwrap();
    assert_eq!(
        ask((Ipv4Addr::LOCALHOST, bound.port()).into(), "GET", "/healthz/ready")
            .await
            .0,
        200
    );
    if bound.is_ipv6() {
        assert_eq!(
            ask(
                (std::net::Ipv6Addr::LOCALHOST, bound.port()).into(),
                "GET",
                "/healthz/ready"
            )
            .await
            .0,
            200
        );
    }
}

#[test]
fn queries_are_decoded() {
    let values = |query, name| super::server::query_values(Some(query), name);
    assert_eq!(
        values("level=warren%3A%3aproxy:debug%2Ch2:off&x", "level"),
        ["warren::proxy:debug,h2:off"]
    );
    assert_eq!(values("level=a+b%&level=%zz", "level"), ["a b%", "%zz"]);
    assert_eq!(values("reset", "reset"), [""]);
    assert_eq!(values("levels=x", "level"), [""; 0]);
}

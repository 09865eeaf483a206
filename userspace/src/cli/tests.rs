//! Tables as they are printed, and commands against servers good and bad.

use super::*;
use crate::telemetry::dump;
use std::net::SocketAddr;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
};

fn workload(namespace: &str, name: &str, ips: &[&str], node: Option<&str>, protocol: &str) -> dump::Workload {
    dump::Workload {
        uid: format!("{namespace}/{name}"),
        name: name.into(),
        namespace: namespace.into(),
        workload_ips: ips.iter().map(|ip| ip.parse().unwrap()).collect(),
        node: node.map(str::to_owned),
        waypoint: None,
        protocol: protocol.into(),
        identity: format!("spiffe://cluster.local/ns/{namespace}/sa/{name}"),
        workload_name: name.into(),
        canonical_name: name.into(),
        canonical_revision: "latest".into(),
        enrolled: protocol == "HBONE",
    }
}

fn whole() -> Dump {
    let endpoint = |ready| dump::Endpoint {
        address: "10.77.2.22".parse().unwrap(),
        workload_uid: None,
        ready,
        ports: vec![(80, 8080)],
    };
    let policy = |kind: &str, name: &str, action: &str, scope: &str, dry_run| dump::Policy {
        kind: kind.into(),
        name: name.into(),
        namespace: "ambient".into(),
        action: action.into(),
        scope: scope.into(),
        dry_run,
    };
    Dump {
        workloads: vec![
            workload(
                "ambient",
                "echo-1-7d4c8b9f5-abc12",
                &["10.77.1.11", "fd77::1:11"],
                Some("node-a"),
                "HBONE",
            ),
            workload("default", "shell", &["10.77.2.99"], None, "TCP"),
        ],
        services: vec![
            dump::Service {
                name: "echo-2".into(),
                namespace: "ambient".into(),
                hostname: "echo-2.ambient.svc.cluster.local".into(),
                vips: vec!["10.96.0.2".parse().unwrap()],
                ports: vec![80],
                waypoint: None,
                endpoints: vec![endpoint(true), endpoint(false)],
            },
            dump::Service {
                name: "headless".into(),
                namespace: "default".into(),
                hostname: "headless.default.svc.cluster.local".into(),
                vips: Vec::new(),
                ports: vec![80],
                waypoint: None,
                endpoints: Vec::new(),
            },
        ],
        policies: vec![
            policy("AuthorizationPolicy", "echo-1", "Allow", "WorkloadSelector", true),
            policy("PeerAuthentication", "default", "Strict", "Namespace", false),
        ],
        certificates: vec![
            dump::Certificate {
                name: "spiffe://cluster.local/ns/ambient/sa/echo-1".into(),
                kind: "Leaf".into(),
                status: "Available".into(),
                valid: true,
                serial_number: Some("ab:cd".into()),
                not_before: Some("2024-08-21T15:32:05Z".into()),
                not_after: Some("2024-08-22T15:32:05Z".into()),
            },
            dump::Certificate {
                name: "spiffe://cluster.local/ns/ambient/sa/echo-2".into(),
                kind: "Leaf".into(),
                status: "Initializing".into(),
                valid: false,
                serial_number: None,
                not_before: None,
                not_after: None,
            },
        ],
        connections: vec![dump::Connection {
            workload: "ambient/echo-1-7d4c8b9f5-abc12".into(),
            direction: "Outbound".into(),
            local: "10.77.1.11:51484".parse().unwrap(),
            remote: "10.77.2.22:80".parse().unwrap(),
            remote_target: Some("echo-2.ambient.svc.cluster.local".into()),
            protocol: "HBONE".into(),
        }],
        ..Dump::default()
    }
}

#[test]
fn the_tables_have_istios_columns() {
    let dump = whole();
    assert_eq!(
        tables::workloads(&dump),
        "\
NAMESPACE   POD NAME                 ADDRESS                 NODE     WAYPOINT   PROTOCOL
ambient     echo-1-7d4c8b9f5-abc12   10.77.1.11,fd77::1:11   node-a   None       HBONE
default     shell                    10.77.2.99              None     None       TCP
"
    );
    assert_eq!(
        tables::services(&dump),
        "\
NAMESPACE   SERVICE NAME   SERVICE VIP   WAYPOINT   ENDPOINTS
ambient     echo-2         10.96.0.2     None       1/2
default     headless       None          None       0/0
"
    );
    assert_eq!(
        tables::policies(&dump),
        "\
NAMESPACE   POLICY NAME   ACTION            SCOPE
ambient     echo-1        Allow (dry run)   WorkloadSelector
ambient     default       Strict            Namespace
"
    );
    assert_eq!(
        tables::certificates(&dump),
        "\
CERTIFICATE NAME                              TYPE   STATUS         VALID CERT   SERIAL NUMBER   NOT AFTER              NOT BEFORE
spiffe://cluster.local/ns/ambient/sa/echo-1   Leaf   Available      true         ab:cd           2024-08-22T15:32:05Z   2024-08-21T15:32:05Z
spiffe://cluster.local/ns/ambient/sa/echo-2   Leaf   Initializing   false        None            None                   None
"
    );
    assert_eq!(
        tables::connections(&dump),
        "\
WORKLOAD                         DIRECTION   LOCAL              REMOTE          REMOTE TARGET                      PROTOCOL
ambient/echo-1-7d4c8b9f5-abc12   Outbound    10.77.1.11:51484   10.77.2.22:80   echo-2.ambient.svc.cluster.local   HBONE
"
    );
}

#[test]
fn a_table_without_rows_has_its_titles() {
    assert_eq!(
        tables::policies(&Dump::default()),
        "NAMESPACE   POLICY NAME   ACTION   SCOPE\n"
    );
}

#[test]
fn a_cell_cannot_speak_to_the_terminal() {
    let dump = Dump {
        workloads: vec![workload("a", "b\u{1b}[2J\nc", &[], None, "TCP")],
        ..Dump::default()
    };
    assert!(tables::workloads(&dump).contains("b?[2J?c"));
}

#[test]
fn a_namespace_narrows_every_section() {
    let mut dump = whole();
    of_namespace(&mut dump, "default");
    assert_eq!((dump.workloads.len(), dump.services.len()), (1, 1));
    assert_eq!(
        (dump.policies.len(), dump.certificates.len(), dump.connections.len()),
        (0, 0, 0)
    );
    let mut dump = whole();
    of_namespace(&mut dump, "ambient");
    assert_eq!((dump.workloads.len(), dump.services.len()), (1, 1));
    assert_eq!(
        (dump.policies.len(), dump.certificates.len(), dump.connections.len()),
        (2, 2, 1)
    );
}

fn query(address: SocketAddr, output: Output) -> Query {
    Query {
        admin: format!("http://{address}").parse().unwrap(),
        output,
        namespace: None,
    }
}

/// Answers every request as a daemon does that holds `dump`.
async fn daemon(dump: Dump) -> SocketAddr {
    let json = serde_json::to_string(&dump).unwrap();
    strange(format!(
        "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{json}",
        json.len()
    ))
    .await
}

#[tokio::test]
async fn a_command_shows_what_the_daemon_holds() {
    let address = daemon(whole()).await;
    let table = read(
        &query(address, Output::Table),
        Section::Connections,
        tables::connections,
    )
    .await
    .unwrap();
    assert_eq!(table, tables::connections(&whole()));
    let json = read(&query(address, Output::Json), Section::Connections, tables::connections)
        .await
        .unwrap();
    let connections: Vec<dump::Connection> = serde_json::from_str(&json).unwrap();
    assert_eq!(connections, whole().connections);
    let json = read(&query(address, Output::Json), Section::Workloads, tables::workloads)
        .await
        .unwrap();
    let workloads: Vec<dump::Workload> = serde_json::from_str(&json).unwrap();
    assert_eq!(workloads, whole().workloads);
    let empty = daemon(Dump::default()).await;
    let json = read(&query(empty, Output::Json), Section::Workloads, tables::workloads)
        .await
        .unwrap();
    assert_eq!(json, "[]\n");
}

#[tokio::test]
async fn the_version_is_told_with_and_without_a_daemon() {
    let own = env!("CARGO_PKG_VERSION");
    let version_of_daemon = dump::Version {
        warren: "9.9.9".into(),
        node: "node-a".into(),
        snapshot: 7,
        api_server: None,
    };
    let address = daemon(Dump {
        version: version_of_daemon,
        ..Dump::default()
    })
    .await;
    let text = version(&query(address, Output::Table)).await;
    assert_eq!(
        text,
        format!("warren {own}\ndaemon 9.9.9 (node node-a, at http://{address})\n")
    );
    let nobody = unused().await;
    assert_eq!(version(&query(nobody, Output::Table)).await, format!("warren {own}\n"));
}

async fn unused() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

#[tokio::test]
async fn without_a_daemon_the_error_says_what_to_try() {
    let nobody = unused().await;
    let error = read(&query(nobody, Output::Table), Section::Workloads, tables::workloads)
        .await
        .unwrap_err();
    let text = error.to_string();
    assert!(
        text.starts_with(&format!("no daemon answers at http://{nobody}\n")),
        "{text}"
    );
    assert!(text.contains("--admin"), "{text}");
}

/// A server that answers every connection with `answer`.
async fn strange(answer: impl Into<String>) -> SocketAddr {
    let answer = answer.into();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            // Whoever closes with the request unread sends a reset, which may overtake the answer.
            let _ = stream.read(&mut [0; 1024]).await;
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    address
}

#[tokio::test]
async fn whoever_else_answers_is_not_believed() {
    for (answer, expected) in [
        ("SSH-2.0-x\r\n", "does not speak HTTP"),
        (
            "HTTP/1.1 404 Not Found\r\ncontent-length: 3\r\n\r\nno\n",
            "answered 404 Not Found: no",
        ),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nhello\n",
            "is not understood",
        ),
        (
            "HTTP/1.1 200 OK\r\ncontent-length: 999999999\r\n\r\n",
            "does not speak HTTP",
        ),
    ] {
        let address = strange(answer).await;
        let error = read(&query(address, Output::Table), Section::Workloads, tables::workloads)
            .await
            .unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[test]
fn an_admin_url_is_a_host_and_a_port() {
    for (text, expected) in [
        ("http://127.0.0.1:15000", Some("http://127.0.0.1:15000")),
        ("http://localhost", Some("http://localhost:15000")),
        ("127.0.0.1:15000", Some("http://127.0.0.1:15000")),
        ("http://[::1]:15001/", Some("http://[::1]:15001")),
        ("https://127.0.0.1:15000", None),
        ("http://127.0.0.1:15000/config_dump", None),
        ("http://me@127.0.0.1", None),
        ("", None),
    ] {
        let url: Option<AdminUrl> = text.parse().ok();
        assert_eq!(url.map(|url| url.to_string()).as_deref(), expected, "{text}");
    }
}

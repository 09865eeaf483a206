//! Who is let through: by policy, by what the snapshot knows, by how many there are.

use super::*;
use crate::mesh::policy::PeerAuth;

#[tokio::test]
async fn a_denied_client_is_reset_and_the_application_never_sees_it() {
    let Some(nodes) = two_nodes("denied").await else { return };
    let listener = nodes.listen(7001);
    nodes.policy(Authorization::unreadable("shop".into(), "nobody".into()));
    let mut client = nodes.dial(7001).await.unwrap();
    let _ = client.write_all(b"secret").await;
    assert_eq!(ending(&mut client).await, Err(ErrorKind::ConnectionReset));
    nodes.nothing_is_open().await;
    assert!(
        tokio::time::timeout(Duration::from_millis(50), listener.accept())
            .await
            .is_err()
    );
}

#[tokio::test]
async fn a_change_of_policy_closes_what_is_no_longer_allowed() {
    let Some(nodes) = two_nodes("policy change").await else {
        return;
    };
    let listener = nodes.listen(7001);
    let (mut client, mut server) = nodes.connection(&listener).await;
    client.write_all(b"x").await.unwrap();
    expect(&mut server, b"x").await;
    let open = nodes.server_side.connections.list().remove(0);
    // Policies of other namespaces change nothing.
    nodes.policy(Authorization::unreadable("elsewhere".into(), "nobody".into()));
    client.write_all(b"y").await.unwrap();
    expect(&mut server, b"y").await;
    assert_eq!(open.closed(), None);
    nodes.policy(Authorization::unreadable("shop".into(), "nobody".into()));
    assert_eq!(ending(&mut client).await, Err(ErrorKind::ConnectionReset));
    assert_eq!(ending(&mut server).await, Err(ErrorKind::ConnectionReset));
    assert_eq!(open.closed(), Some(Closed::PolicyChange));
    assert_eq!(
        Closed::PolicyChange.to_string(),
        "connection closed due to policy change"
    );
    drop((client, server));
    nodes.nothing_is_open().await;
}

#[tokio::test]
async fn plaintext_is_let_in_until_it_is_strict() {
    let Some(nodes) = two_nodes("plaintext").await else {
        return;
    };
    let mut client = nodes.dial_plaintext().await;
    let listener = nodes.listen(PLAINTEXT_PORT);
    let (mut server, from) = within("a connection", listener.accept()).await.unwrap();
    assert_eq!(from.ip(), CLIENT.parse::<std::net::IpAddr>().unwrap());
    client.write_all(b"ping").await.unwrap();
    expect(&mut server, b"ping").await;
    server.write_all(b"pong").await.unwrap();
    expect(&mut client, b"pong").await;
    let open = nodes.server_side.connections.list().remove(0);
    assert_eq!((open.facts.source_principal.as_ref(), open.hbone_target), (None, None));
    nodes.peer_auth(PeerAuth::unreadable("shop".into(), "strict".into()));
    assert_eq!(ending(&mut client).await, Err(ErrorKind::ConnectionReset));
    assert_eq!(ending(&mut server).await, Err(ErrorKind::ConnectionReset));
    assert_eq!(open.closed(), Some(Closed::PolicyChange));
    drop((client, server, listener));
    let mut refused = nodes.dial_plaintext().await;
    assert_eq!(ending(&mut refused).await, Err(ErrorKind::ConnectionReset));
    nodes.nothing_is_open().await;
}

#[tokio::test]
async fn a_connection_to_the_daemons_own_listener_is_reset() {
    let Some(nodes) = two_nodes("own listener").await else {
        return;
    };
    let mut client = nodes.dial_own_listener().await;
    assert_eq!(ending(&mut client).await, Err(ErrorKind::ConnectionReset));
    nodes.nothing_is_open().await;
}

#[tokio::test]
async fn a_pod_has_no_more_connections_than_its_settings_say() {
    let settings = ProxySettings {
        connections_per_pod: 2,
        ..ProxySettings::default()
    };
    let Some(nodes) = two_nodes_with("limit", settings).await else {
        return;
    };
    let listener = nodes.listen(7001);
    let first = nodes.connection(&listener).await;
    let second = nodes.connection(&listener).await;
    let mut third = nodes.dial(7001).await.unwrap();
    assert_eq!(ending(&mut third).await, Err(ErrorKind::ConnectionReset));
    drop((first, second));
    nodes.nothing_is_open().await;
    nodes.connection(&listener).await;
}

#[tokio::test]
async fn an_unknown_address_of_the_cluster_waits_for_a_snapshot_that_knows_it() {
    let Some(nodes) = two_nodes("unknown").await else {
        return;
    };
    let listener = nodes.listen(7001);
    let known = Arc::clone(&nodes.snapshot.borrow());
    let address: std::net::IpAddr = SERVER.parse().unwrap();
    nodes.publish(|mesh| {
        mesh.ranges = ["10.9.0.0/24".parse().unwrap()].into();
        mesh.by_address.remove(&address);
    });
    let client = nodes.dial(7001).await.unwrap();
    let (client, _server) = tokio::join!(
        async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            nodes.publish(|mesh| *mesh = (*known).clone());
            client
        },
        async { within("a connection", listener.accept()).await.unwrap() }
    );
    assert_eq!(
        nodes.client_side.connections.list()[0].facts.security,
        crate::telemetry::SecurityPolicy::MutualTls
    );
    drop(client);
    nodes.publish(|mesh| {
        mesh.ranges = ["10.9.0.0/24".parse().unwrap()].into();
        mesh.by_address.remove(&address);
    });
    let mut client = nodes.dial(7001).await.unwrap();
    assert_eq!(ending(&mut client).await, Err(ErrorKind::ConnectionReset));
}

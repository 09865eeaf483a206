//! A daemon that drains, and a pod that leaves the mesh.

use super::*;
use crate::shutdown::Drained;

#[tokio::test]
async fn a_drain_lets_connections_end_and_the_deadline_ends_the_rest() {
    let Some(nodes) = two_nodes("drain").await else { return };
    let listener = nodes.listen(7001);
    let (mut one, mut one_server) = nodes.connection(&listener).await;
    let (mut two, two_server) = nodes.connection(&listener).await;
    let tasks = nodes.server_tasks.clone();
    let draining = tokio::spawn(async move { tasks.drain(Duration::from_secs(2)).await });
    eventually("the drain began", || nodes.server_tasks.is_draining()).await;
    one.write_all(b"still here").await.unwrap();
    expect(&mut one_server, b"still here").await;
    drop((one, one_server));
    let Drained::Cut { .. } = within("the cut", draining).await.unwrap() else {
        panic!("the second was left open")
    };
    assert_eq!(ending(&mut two).await, Err(ErrorKind::ConnectionReset));
    drop(two_server);
    nodes.nothing_is_open().await;
}

#[tokio::test]
async fn a_released_pod_ends_its_connections_after_the_deadline() {
    let Some(mut nodes) = two_nodes("release").await else {
        return;
    };
    let listener = nodes.listen(7001);
    let (mut client, server) = nodes.connection(&listener).await;
    let open = nodes.client_side.connections.list().remove(0);
    let handle = nodes.handles.remove(0);
    within("the release", handle.release(Duration::from_millis(50), Duration::ZERO)).await;
    assert_eq!(ending(&mut client).await, Err(ErrorKind::ConnectionReset));
    assert_eq!(open.closed(), Some(Closed::Released));
    drop((client, server));
    nodes.nothing_is_open().await;
}

#[tokio::test]
async fn a_tunnel_that_comes_after_a_pod_has_left_is_closed_when_policy_forbids_it() {
    let Some(mut nodes) = two_nodes("late tunnel").await else {
        return;
    };
    let listener = nodes.listen(7001);
    // Its peer has a connection to it, and the pod has nothing open.
    drop(nodes.connection(&listener).await);
    nodes.nothing_is_open().await;
    let server = nodes.handles.remove(1);
    let (deadline, linger) = (Duration::from_secs(60), Duration::from_secs(60));
    let lingering = tokio::spawn(server.release(deadline, linger));
    // Enough for whoever follows policy to see that nothing is open.
    tokio::time::sleep(Duration::from_millis(200)).await;
    let (mut client, server) = nodes.connection(&listener).await;
    eventually("the tunnel stands", || !nodes.server_side.connections.is_empty()).await;
    nodes.policy(Authorization::unreadable("shop".into(), "nobody".into()));
    assert_eq!(ending(&mut client).await, Err(ErrorKind::ConnectionReset));
    drop((client, server));
    nodes.nothing_is_open().await;
    lingering.abort();
}

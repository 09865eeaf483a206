//! Pods that leave the mesh, and what they leave behind.

use super::*;
use std::net::{TcpListener, TcpStream};

#[tokio::test]
async fn leaving_the_mesh_ends_steered_connections_and_leaves_no_trace() {
    let Some(mut running) = Running::start("release", |_| Recorder::default()) else {
        return;
    };
    let _served = running.served().await;
    let (marked, _peer) = running
        .namespace
        .run(|| {
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            (client, listener.accept().unwrap())
        })
        .unwrap();
    socket2::SockRef::from(&marked)
        .set_mark(crate::net::marks::STEER)
        .unwrap();

    running.unlabel_pod();
    assert!(matches!(running.event().await, CaptureEvent::Leaving { .. }));
    assert!(matches!(running.event().await, CaptureEvent::Released(uid) if uid == running.pod().uid));
    running.kernel.until_called("detach_pod 0 there", 1).await;
    assert!(marked.take_error().unwrap().is_some(), "it had its time to drain");
    running.until_untouched().await;
    let calls = running.kernel.calls.lock().clone();
    assert_eq!(calls[calls.len() - 2..], ["stop_steering 0", "detach_pod 0 there"]);
}

#[tokio::test]
async fn a_namespace_that_is_gone_is_the_pods_end() {
    let Some(mut running) = Running::start("gone", |_| Recorder::default()) else {
        return;
    };
    let _served = running.served().await;
    std::fs::remove_file(running.path()).unwrap();
    assert!(matches!(running.event().await, CaptureEvent::Released(_)));
    running.kernel.until_called("detach_pod", 1).await;
    assert_eq!(running.failure().await, "namespace");
}

#[tokio::test]
async fn a_pod_leaves_only_after_others_were_told() {
    let Some(mut running) = Running::start("leaving", |_| Recorder::default()) else {
        return;
    };
    let _served = running.served().await;
    running.unlabel_pod();
    let CaptureEvent::Leaving { workload, proceed } = running.event().await else {
        panic!("it is released before others are told");
    };
    assert_eq!(workload, running.pod().uid);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(running.kernel.called("stop_steering"), 0);
    drop(proceed);
    assert!(matches!(running.event().await, CaptureEvent::Released(_)));
    running.until_untouched().await;
}

#[tokio::test]
async fn a_daemon_that_is_taken_off_the_node_releases_every_pod_and_ends() {
    let Some(mut running) = Running::start("leave", |_| Recorder::default()) else {
        return;
    };
    let _served = running.put_and_captured().await;
    running.leave.cancel();
    loop {
        // Dropped with the event.
        if let CaptureEvent::Released(_) = running.event().await {
            break;
        }
    }
    running.ended().await;
    assert_eq!(running.kernel.called("detach_pod 0 there"), 1);
    running.until_untouched().await;
}

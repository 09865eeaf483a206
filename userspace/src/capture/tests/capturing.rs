//! Pods that enter the mesh, and what is kept up to date of those that are in it.

use super::*;
use crate::mesh::policy::{MutualTls, PeerAuth};

#[tokio::test]
async fn a_pod_is_steered_last_when_everything_stands_ready() {
    let Some(mut running) = Running::start("capture", |_| Recorder::default()) else {
        return;
    };
    let captured = running.put_and_captured().await;
    assert_eq!(captured.namespace.cookie(), running.namespace.cookie());
    assert_eq!(captured.listeners.ports.outbound, 15001);
    assert!(matches!(running.event().await, CaptureEvent::Settled));
    assert_eq!(
        *running.kernel.calls.lock(),
        [
            "sync_ranges 0",
            "sync_workloads 2",
            "sync_services 0",
            "number_for",
            "set_policy 0 Permissive",
            "set_addresses 0 {10.9.0.1, fd09::1}",
            "set_listeners 0",
            "guard_pod 0",
            "attach_pod 0",
            "steer 0"
        ]
    );
    let seen = running.kernel.seen_at_steer.lock().clone();
    assert!(seen[0].0.contains("fwmark 0x110/0xff0 lookup 15110"), "{seen:?}");
    assert_eq!(seen[0].1, "1");
}

#[tokio::test]
async fn nothing_is_captured_or_released_before_the_first_snapshot() {
    let Some(mut running) = Running::start("unpublished", |namespace| adopting(7, namespace)) else {
        return;
    };
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(*running.kernel.calls.lock(), [""; 0]);
    running.put_and_captured().await;
    assert_eq!(running.kernel.called("steer 7"), 1, "under the number it had");
    assert_eq!(
        running.kernel.called("stop_steering") + running.kernel.called("detach_pod"),
        0
    );
}

#[tokio::test]
async fn a_capture_that_fails_is_undone_and_tried_again() {
    let Some(mut running) = Running::start("retry", |_| Recorder::default()) else {
        return;
    };
    running.kernel.fail("attach_pod");
    running.publish_pod(running.pod());
    for attempt in [1, 2] {
        let event = running.event().await;
        let CaptureEvent::Failed { error, attempts, .. } = &event else {
            // After the first failure the start is settled.
            assert!(matches!(event, CaptureEvent::Settled));
            continue;
        };
        assert_eq!((error.reason(), *attempts), ("attach", attempt));
    }
    assert_eq!(running.kernel.called("steer"), 0);
    running.until_untouched().await;
    running.kernel.mend();
    running.until_captured().await;
}

#[tokio::test]
async fn policy_addresses_interfaces_and_rules_are_kept_up_to_date() {
    let Some(mut running) = Running::start("refresh", |_| Recorder::default()) else {
        return;
    };
    let _served = running.put_and_captured().await;
    running.publish(|snapshot| {
        let strict = PeerAuth::of_namespace("shop".into(), "strict".into(), Some(MutualTls::Strict));
        snapshot.peer_auths.insert(strict);
    });
    running.kernel.until_called("set_policy 0 Strict", 1).await;

    ip(&running.namespace, "addr add 10.9.0.8/32 dev eth0");
    running
        .kernel
        .until_called("set_addresses 0 {10.9.0.1, 10.9.0.8, fd09::1}", 1)
        .await;
    ip(&running.namespace, "link add eth1 type veth peer name wire1");
    running.kernel.until_called("guard_interface 0 eth1", 1).await;
    ip(&running.namespace, "rule del pref 2");
    eventually("the rule is put back", || {
        ip(&running.namespace, "rule").contains("lookup 15110")
    })
    .await;
}

#[tokio::test]
async fn the_guards_of_a_pod_that_stays_are_linked_after_its_start_and_again_after_a_change() {
    let Some(mut running) = Running::start("linked", |_| Recorder::default()) else {
        return;
    };
    let _served = running.put_and_captured().await;
    assert_eq!(*running.kernel.linked.lock(), [0; 0], "its start does not wait for it");
    running.kernel.until_linked(1).await;
    ip(&running.namespace, "link add eth1 type veth peer name wire1");
    running.kernel.until_called("guard_interface 0 eth1", 1).await;
    running.kernel.until_linked(2).await;
}

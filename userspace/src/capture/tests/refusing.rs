//! Pods that cannot be captured, each by its reason.

use super::*;
use crate::net::testing::set_sysctl;

#[tokio::test]
async fn a_pod_of_another_kernel_is_refused_by_the_name_of_its_runtime() {
    let Some(mut running) = Running::start("kata", |_| Recorder::default()) else {
        return;
    };
    running.publish_pod(Workload {
        runtime_class: Some("kata-qemu".into()),
        ..running.pod()
    });
    let event = running.event().await;
    let CaptureEvent::Failed { error, .. } = &event else {
        panic!("{event:?}");
    };
    assert_eq!(error.reason(), "foreign-kernel");
    assert!(error.to_string().contains("Kata Containers"), "{error}");
    assert_eq!(state(&running.namespace), running.untouched);
}

#[tokio::test]
async fn a_full_table_refuses_capture_and_touches_nothing() {
    let Some(mut running) = Running::start("full", |_| Recorder::default()) else {
        return;
    };
    running.kernel.fail("sync_workloads");
    running.publish_pod(running.pod());
    assert_eq!(running.failure().await, "tables-full");
    assert_eq!(running.kernel.called("number_for"), 0);
    assert_eq!(state(&running.namespace), running.untouched);
    running.kernel.mend();
    running.until_captured().await;
}

#[tokio::test]
async fn a_pod_that_forwards_for_others_is_refused_by_name() {
    let Some(mut running) = Running::start("forwards", |namespace| {
        ip(namespace, "link add docker0 type bridge");
        set_sysctl(namespace, "net/ipv4/ip_forward", "1");
        Recorder::default()
    }) else {
        return;
    };
    running.publish_pod(running.pod());
    assert_eq!(running.failure().await, "forwards");
}

#[tokio::test]
async fn the_node_itself_is_never_captured() {
    let Some(mut running) = Running::start("own", |_| Recorder::default()) else {
        return;
    };
    let own = PathBuf::from("/proc/self/ns/net");
    running.publish_pod(Workload {
        netns: Some(own),
        ..running.pod()
    });
    assert_eq!(running.failure().await, "node-namespace");
}

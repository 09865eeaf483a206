//! What an earlier daemon left.

use super::*;
use crate::kernel::{AdoptedPod, PodNumber};
use std::sync::atomic::Ordering;

#[tokio::test]
async fn a_taken_over_pod_that_fails_stays_refused_and_is_not_let_go() {
    let Some(mut running) = Running::start("adopt-fails", |namespace| adopting(3, namespace)) else {
        return;
    };
    running.kernel.fail("attach_pod");
    running.publish_pod(running.pod());
    assert!(matches!(running.event().await, CaptureEvent::Failed { .. }));
    assert_eq!(
        running.kernel.called("stop_steering") + running.kernel.called("detach_pod"),
        0
    );
    assert!(ip(&running.namespace, "rule").contains("lookup 15110"));
    running.kernel.mend();
    running.until_captured().await;
}

#[tokio::test]
async fn what_an_earlier_daemon_captured_and_nobody_wants_is_released_without_being_waited_for() {
    let recorder = |namespace: &Namespace| {
        // As the earlier daemon left it: one of the sysctls was on before it came.
        crate::kernel::sysctls::switch_on(namespace).unwrap();
        let mut routes = crate::kernel::routes::Routes::open(namespace).unwrap();
        routes.install_note(0b010).unwrap();
        routes.install(&[]).unwrap();
        let mut recorder = adopting(3, namespace);
        recorder.adopted.push(AdoptedPod {
            number: PodNumber::new(4),
            cookie: u64::MAX,
            inode: 1,
        });
        recorder
    };
    let Some(mut running) = Running::start("adopt-unwanted", recorder) else {
        return;
    };
    let kernel = Arc::clone(&running.kernel);
    let slow = kernel.slow.lock().await;
    running.unlabel_pod();
    let event = running.event().await;
    assert!(
        matches!(event, CaptureEvent::Settled),
        "its release is waited for, or somebody is told of it: {event:?}"
    );
    assert_eq!(kernel.called("detach_pod 3"), 0);
    drop(slow);
    running.kernel.until_called("detach_pod 3 there", 1).await;
    running.kernel.until_called("detach_pod 4 gone", 1).await;
    assert!(!ip(&running.namespace, "rule").contains("lookup 15110"));
    assert_eq!(sysctl(&running.namespace, "net/ipv4/tcp_fwmark_accept"), "0");
    assert_eq!(sysctl(&running.namespace, "net/ipv4/fwmark_reflect"), "1");
}

#[tokio::test]
async fn a_release_that_an_earlier_daemon_began_is_finished() {
    let recorder = |namespace: &Namespace| {
        crate::kernel::sysctls::switch_on(namespace).unwrap();
        let mut routes = crate::kernel::routes::Routes::open(namespace).unwrap();
        routes.install_note(0).unwrap();
        routes.install(&[]).unwrap();
        Recorder {
            unfinished: vec![namespace.inode().1 as u32],
            ..Recorder::default()
        }
    };
    let Some(mut running) = Running::start("unfinished", recorder) else {
        return;
    };
    running.unlabel_pod();
    assert!(matches!(running.event().await, CaptureEvent::Settled));
    assert!(!ip(&running.namespace, "rule").contains("lookup 15110"));
    assert_eq!(sysctl(&running.namespace, "net/ipv4/tcp_fwmark_accept"), "0");
}

#[tokio::test]
async fn programs_of_another_layout_stay_until_every_pod_is_captured_anew() {
    let Some(mut running) = Running::start("layouts", |_| Recorder::default()) else {
        return;
    };
    running.kernel.fail("attach_pod");
    running.publish_pod(running.pod());
    assert!(matches!(running.event().await, CaptureEvent::Failed { .. }));
    assert!(matches!(running.event().await, CaptureEvent::Settled));
    running.kernel.until_called("attach_pod", 2).await;
    assert_eq!(
        running.kernel.alone.load(Ordering::Relaxed),
        0,
        "they may be what keeps it closed"
    );
    running.kernel.mend();
    eventually("they are removed", || running.kernel.alone.load(Ordering::Relaxed) > 0).await;
    running.publish(|_| {});
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(running.kernel.alone.load(Ordering::Relaxed), 1, "once is enough");
}

//! The end of the daemon, which is no end of capture.

use super::*;
use crate::testing::DEADLINE;

#[tokio::test]
async fn the_daemons_end_leaves_its_pods_captured() {
    let Some(mut running) = Running::start("drain", |_| Recorder::default()) else {
        return;
    };
    let _served = running.put_and_captured().await;
    within("the drain", running.shutdown.drain(DEADLINE)).await;
    running.ended().await;
    assert_eq!(
        running.kernel.called("stop_steering") + running.kernel.called("detach_pod"),
        0
    );
    assert!(ip(&running.namespace, "rule").contains("lookup 15110"));
}

#[tokio::test]
async fn capture_ends_when_its_last_step_has_ended() {
    for is_drain in [true, false] {
        let Some(mut running) = Running::start("still", |_| Recorder::default()) else {
            return;
        };
        let kernel = Arc::clone(&running.kernel);
        let slow = kernel.slow.lock().await;
        running.publish_pod(running.pod());
        running.kernel.until_called("set_listeners", 1).await;
        let ended = if is_drain {
            running.shutdown.drain(Duration::ZERO).await;
            Ended::Drained
        } else {
            running.pause.cancel();
            Ended::Paused
        };
        let early = tokio::time::timeout(Duration::from_millis(200), &mut running.task).await;
        assert!(early.is_err(), "a step is under way: {early:?}");
        drop(slow);
        assert_eq!(running.ended().await, ended);
        let calls = kernel.calls.lock().clone();
        assert_eq!(calls.last().map(String::as_str), Some("steer 0"), "{calls:?}");
    }
}

#[tokio::test]
async fn capture_that_begins_when_the_daemon_ends_does_nothing() {
    let Some(mut running) = Running::start("late", |_| Recorder::default()) else {
        return;
    };
    running.publish_pod(running.pod());
    running.shutdown.drain(Duration::ZERO).await;
    assert_eq!(running.ended().await, Ended::Drained);
    assert_eq!(*running.kernel.calls.lock(), [""; 0]);
}

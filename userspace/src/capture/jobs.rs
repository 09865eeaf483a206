//! What the reconciling task has others do: steps that block, and waits. Each ends in a [`Done`].

use super::{
    entries::Captured,
    error::CaptureError,
    node::Node,
    plan::Wanted,
    pod::{self, Pod},
};
use crate::{kernel::watch::Watch, net::PodListeners};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::task::spawn_blocking;

/// How often a draining pod's connections are counted.
const DRAIN_POLL: Duration = Duration::from_millis(100);
/// Changes in a namespace come in bursts.
const SETTLE: Duration = Duration::from_millis(20);

/// What a job was about, and how it ended.
pub(super) enum Done {
    Captured {
        wanted: Wanted,
        outcome: Box<Result<(Pod, PodListeners, Watch), CaptureError>>,
    },
    Refreshed {
        pod: Arc<Pod>,
        watch: Option<Watch>,
        outcome: Result<(), CaptureError>,
    },
    Linked {
        pod: Arc<Pod>,
        outcome: Result<(), CaptureError>,
    },
    /// Others have been told, or were not to be waited for.
    Withdrawn { captured: Captured },
    Released {
        captured: Captured,
        outcome: Result<(), CaptureError>,
    },
    NodeRefreshed {
        watch: Option<Watch>,
        outcome: Result<(), CaptureError>,
    },
}

/// True once something changed; false if the watch is broken.
pub(super) async fn heard(watch: &mut Watch) -> bool {
    if watch.changed().await.is_err() {
        return false;
    }
    while let Ok(Ok(())) = tokio::time::timeout(SETTLE, watch.changed()).await {}
    true
}

pub(super) async fn refresh(node: Node, pod: Arc<Pod>, watch: Option<Watch>) -> Done {
    let outcome = blocking({
        let pod = Arc::clone(&pod);
        move || pod::refresh(&node, &pod)
    });
    Done::Refreshed {
        outcome: outcome.await,
        pod,
        watch,
    }
}

pub(super) async fn link(node: Node, pod: Arc<Pod>) -> Done {
    let outcome = blocking({
        let pod = Arc::clone(&pod);
        move || pod::link_guards(&node, &pod)
    });
    Done::Linked {
        outcome: outcome.await,
        pod,
    }
}

/// Lets what is open end by itself for a while, then ends it, then removes what it depended on.
///
/// Those who have not heard yet go on to call the pod as one of the mesh: for `linger` that is answered.
pub(super) async fn release(
    node: &Node,
    pod: &Arc<Pod>,
    drain: Duration,
    linger: Duration,
) -> Result<(), CaptureError> {
    let begun = Instant::now();
    while begun.elapsed() < drain.max(linger) {
        let pod = Arc::clone(pod);
        if blocking(move || pod::count_steered(&pod)).await? == 0 && begun.elapsed() >= linger {
            break;
        }
        tokio::time::sleep(DRAIN_POLL).await;
    }
    let (node, pod) = (node.clone(), Arc::clone(pod));
    blocking(move || pod::remove(&node, &pod)).await
}

pub(super) async fn blocking<T: Send + 'static>(
    step: impl FnOnce() -> Result<T, CaptureError> + Send + 'static,
) -> Result<T, CaptureError> {
    spawn_blocking(step).await.unwrap_or(Err(CaptureError::Interrupted))
}

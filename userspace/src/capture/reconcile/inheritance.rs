//! What earlier daemons left on the node: taken over, released or removed.

use super::Reconciler;
use crate::{
    capture::{
        adopt::{self, Owner},
        entries::{Captured, Entry},
        pod,
    },
    kernel::{PlaintextMode, PodPolicy},
    mesh::{MeshSnapshot, WorkloadUid},
};
use std::{error::Error, sync::Arc};
use tokio::task::spawn_blocking;
use tracing::{debug, info, warn};

impl Reconciler {
    /// Once: releases what an earlier daemon captured and nobody wants any more. What is wanted is taken over by its
    /// capture, which finds its number by its namespace.
    pub(super) async fn take_over(&mut self, snapshot: &Arc<MeshSnapshot>) -> Option<()> {
        let Some(adopted) = self.adopted.take() else {
            return Some(());
        };
        let (node, snapshot, scope) = (self.node.clone(), Arc::clone(snapshot), self.scope());
        for (path, namespace) in adopt::unfinished(&node, &snapshot, scope, &node.kernel.unfinished_pods()) {
            match pod::finish(&namespace) {
                Ok(true) => info!(path = %path.display(), "a release that an earlier daemon began is finished"),
                Ok(false) => {}
                Err(error) => {
                    warn!(path = %path.display(), error = &error as &dyn Error, "a release that an earlier daemon began cannot be finished");
                }
            }
        }
        for (adopted, owner) in adopt::owners(&node, &snapshot, scope, adopted) {
            let number = adopted.number;
            let outcome = match owner {
                Owner::Wanted(workload) => {
                    debug!(%workload, number = number.get(), "a pod of an earlier daemon is taken over");
                    Ok(())
                }
                Owner::Unwanted { found, place } => {
                    info!(%place, "a pod of an earlier daemon is not wanted any more");
                    let workload = WorkloadUid(place.to_string().into());
                    match pod::unwanted(&self.node, number, workload.clone(), found, place) {
                        Ok(pod) => {
                            let captured = Captured::new(Arc::new(pod), any_policy());
                            self.entries.insert(workload.clone(), Entry::Captured(captured));
                            self.begin_release(&workload, true).await?;
                            Ok(())
                        }
                        Err(error) => Err(error),
                    }
                }
                Owner::Ended => {
                    info!(number = number.get(), "a pod of an earlier daemon has ended");
                    pod::forget(&self.node, number)
                }
            };
            if let Err(error) = outcome {
                warn!(
                    number = number.get(),
                    error = &error as &dyn Error,
                    "a pod of an earlier daemon stays as it is"
                );
            }
        }
        Some(())
    }

    /// What a daemon of another layout left. As long as a pod is not captured anew, it may be what keeps that pod closed.
    pub(super) async fn remove_other_layouts(&self) {
        let kernel = Arc::clone(&self.node.kernel);
        match spawn_blocking(move || kernel.remove_other_layouts()).await {
            Ok(Ok(0)) | Err(_) => {}
            Ok(Ok(count)) => info!(count, "programs of a daemon with another layout are removed"),
            Ok(Err(error)) => {
                warn!(
                    error = &error as &dyn Error,
                    "programs of a daemon with another layout stay until the next start"
                );
            }
        }
    }
}

/// For a pod that is about to be released.
fn any_policy() -> PodPolicy {
    PodPolicy {
        mode: PlaintextMode::Permissive,
        restricted: false,
        port_modes: Vec::new(),
    }
}

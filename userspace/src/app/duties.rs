//! What one daemon of a node does for the cluster at a time: it writes what is captured, answers the CNI plugin and keeps it
//! installed. Begun when the daemon owns the node, stopped while another may be about to.

use super::{
    Snapshots,
    cni::{self, Answers},
    succession,
};
use crate::{
    cni::{
        install::{self, Folders},
        server::{self, SocketError},
        standing::Namespaces,
    },
    kubernetes::{
        announce::{self, Announcements},
        client::kubeconfig_for_others,
    },
    shutdown::Shutdown,
};
use kube::Client;
use parking_lot::Mutex;
use serde_json::Value;
use std::{
    convert::Infallible,
    path::PathBuf,
    sync::{Arc, atomic::AtomicBool},
    time::Duration,
};
use tokio::{
    net::UnixListener,
    sync::{mpsc, watch},
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

/// How often the token that the plugin uses is looked at: kubelet replaces it every hour.
const TOKEN: Duration = Duration::from_secs(60);

pub(super) struct Duties {
    pub(super) announcements: Announcements,
    pub(super) client: Client,
    pub(super) node: Arc<str>,
    pub(super) snapshots: Snapshots,
    pub(super) plugin: Option<Plugin>,
    /// Cancelled when Warren is taken off the node.
    pub(super) leave: CancellationToken,
    pub(super) shutdown: Shutdown,
    pub(super) term: Mutex<Option<Term>>,
}

/// What the CNI plugin needs.
pub(super) struct Plugin {
    pub(super) folders: Folders,
    pub(super) entry: Value,
    pub(super) socket: PathBuf,
    pub(super) namespaces: watch::Receiver<Arc<Namespaced>>,
    pub(super) kubeconfig: Option<PathBuf>,
    /// For a metric.
    pub(super) is_installed: Arc<AtomicBool>,
    pub(super) answers: Arc<Answers>,
}

/// From a start to the next stop.
pub(super) struct Term {
    stop: CancellationToken,
    /// Closed when the last of its tasks has stopped.
    running: mpsc::Receiver<Infallible>,
}

/// The socket of the CNI plugin, where there is one.
pub(super) struct Bound(Option<UnixListener>);

impl Duties {
    /// What [`Duties::start`] needs.
    ///
    /// # Errors
    /// The plugin cannot be answered.
    pub(super) fn bind(&self) -> Result<Bound, SocketError> {
        let bound = self.plugin.as_ref().map(|plugin| server::bind(&plugin.socket));
        bound.transpose().map(Bound)
    }

    pub(super) fn start(&self, Bound(listener): Bound) {
        let (busy, running) = mpsc::channel(1);
        let term = Term {
            stop: CancellationToken::new(),
            running,
        };
        let stop = term.stop.clone();
        let announcing = announce::announce(
            self.announcements.clone(),
            self.client.clone(),
            Arc::clone(&self.node),
            self.snapshots.clone(),
            self.shutdown.clone(),
        );
        let announcing = self.until(&stop, &busy, announcing);
        self.shutdown.spawn_essential("announcements", announcing);
        if let (Some(plugin), Some(listener)) = (&self.plugin, listener) {
            let answers = Arc::clone(&plugin.answers);
            let answering = server::serve(listener, answers, stop.clone(), self.shutdown.clone());
            self.shutdown
                .spawn_essential("CNI", self.until(&stop, &busy, answering));
            let leave = self.leave.clone().cancelled_owned();
            let folders = || plugin.folders.clone();
            let (binary, is_installed) = ("/proc/self/exe".into(), Arc::clone(&plugin.is_installed));
            let installed = install::keep(folders(), binary, plugin.entry.clone(), is_installed, leave);
            self.shutdown.spawn("CNI plugin", self.until(&stop, &busy, installed));
            let word = keep_word(folders(), plugin.namespaces.clone());
            self.shutdown.spawn("CNI namespaces", self.until(&stop, &busy, word));
            let kubeconfig = keep_kubeconfig(folders(), plugin.kubeconfig.clone());
            self.shutdown
                .spawn("CNI kubeconfig", self.until(&stop, &busy, kubeconfig));
        }
        *self.term.lock() = Some(term);
    }

    /// Returns when what the daemon that had the node meanwhile has heard of sandboxes counts here too.
    pub(super) async fn look_again(&self) {
        let Some(plugin) = &self.plugin else { return };
        let sandboxes = plugin.answers.0.look_again().await;
        let mut snapshots = self.snapshots.clone();
        succession::catch_up(None, &mut snapshots, |snapshot| cni::are_known(&sandboxes, snapshot)).await;
    }

    /// Returns once nothing of it is done any more.
    pub(super) async fn stop(&self) {
        let term = self.term.lock().take();
        if let Some(mut term) = term {
            term.stop.cancel();
            let _ = term.running.recv().await;
        }
    }

    fn until<T: Future<Output = ()> + Send + 'static>(
        &self,
        stop: &CancellationToken,
        busy: &mpsc::Sender<Infallible>,
        task: T,
    ) -> impl Future<Output = ()> + Send + 'static {
        until(stop.clone(), busy.clone(), self.shutdown.draining(), task)
    }
}

/// `task`, which is dropped when its term is stopped, unless it ends by itself then; and then lives on in name, for its end
/// would be a failure.
async fn until(
    stop: CancellationToken,
    busy: mpsc::Sender<Infallible>,
    draining: impl Future<Output = ()>,
    task: impl Future<Output = ()>,
) {
    let mut draining = std::pin::pin!(draining);
    tokio::select! {
        () = stop.cancelled() => {}
        // Who waits for an answer is told.
        () = &mut draining => return stop.cancel(),
        () = task => if !stop.is_cancelled() {
            return;
        }
    }
    drop(busy);
    draining.await;
}

/// Leaves word for the plugin which namespaces are in the mesh, as they change.
async fn keep_word(folders: Folders, mut namespaces: watch::Receiver<Arc<Namespaced>>) {
    loop {
        let mut word = Namespaces::default();
        for (name, is_mesh) in namespaces.borrow_and_update().iter() {
            let side = if *is_mesh { &mut word.mesh } else { &mut word.outside };
            side.insert(name.to_string());
        }
        let state = folders.state();
        let written = tokio::task::spawn_blocking(move || word.write(&state)).await;
        if let Ok(Err(error)) = written {
            warn!(%error, "no word is left for the CNI plugin about the namespaces of the mesh");
        }
        if namespaces.changed().await.is_err() {
            // Nobody publishes any more: the daemon ends.
            return std::future::pending().await;
        }
    }
}

/// Namespaces by name, and whether their label says that they are in the mesh.
type Namespaced = std::collections::BTreeMap<Arc<str>, bool>;

async fn keep_kubeconfig(folders: Folders, given: Option<PathBuf>) {
    let mut before = Vec::new();
    loop {
        match kubeconfig_for_others(given.as_deref()) {
            Ok(text) if text != before => match install::write_kubeconfig(&folders, &text) {
                Ok(()) => before = text,
                Err(error) => warn!(%error, "the CNI plugin's way to the API server cannot be written"),
            },
            Ok(_) => {}
            Err(error) => warn!(%error, "the CNI plugin has no way to the API server"),
        }
        tokio::time::sleep(TOKEN).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    /// Often enough that whoever is asked first of two that are ready has been each of them.
    const OFTEN: usize = 64;

    #[tokio::test]
    async fn a_duty_that_ends_because_its_term_is_stopped_is_no_failure() {
        for _ in 0..OFTEN {
            let (stop, draining) = (CancellationToken::new(), CancellationToken::new());
            let (busy, mut running) = mpsc::channel(1);
            let answering = stop.clone().cancelled_owned();
            let mut duty = std::pin::pin!(until(stop.clone(), busy, draining.clone().cancelled_owned(), answering));
            assert!(duty.as_mut().now_or_never().is_none());
            stop.cancel();
            assert!(
                duty.as_mut().now_or_never().is_none(),
                "it ended, which is a failure of an essential task"
            );
            assert!(running.recv().now_or_never().is_some(), "it has stopped");
            draining.cancel();
            assert!(duty.as_mut().now_or_never().is_some());
        }
    }

    #[tokio::test]
    async fn a_duty_that_ends_by_itself_is_a_failure() {
        let (busy, _running) = mpsc::channel(1);
        let duty = until(CancellationToken::new(), busy, std::future::pending(), async {});
        assert!(duty.now_or_never().is_some());
    }
}

//! What a daemon of a cluster has beside one that is told by manifests: it finds its pods on the node, answers the CNI
//! plugin, tells the cluster which pods are captured, and takes everything off the node when it is uninstalled.

use super::{
    Snapshots,
    cni::{Admitted, Answers, Records},
    coming::{self, Daemons},
    duties::{Duties, Plugin},
    pods::{LINGER, Pods},
};
use crate::{
    capture::{CaptureSettings, Finder},
    cni::{
        install::{self, Folders},
        spec::entry,
    },
    config::{CniArgs, NodeConfig},
    kernel::Kernel,
    kubernetes::{NodeSandboxes, Published, Sandbox, announce::Announcements},
    net::Namespace,
    shutdown::Shutdown,
    telemetry::{Live, Metrics},
};
use anyhow::Context;
use futures::{StreamExt, pin_mut};
use k8s_openapi::api::{apps::v1::DaemonSet, core::v1};
use kube::{
    Api, Client,
    api::ListParams,
    core::PartialObjectMeta,
    runtime::{
        WatchStreamExt,
        watcher::{self, Event},
    },
};
use parking_lot::Mutex;
use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// The first process of the node, which the daemon sees by hostPID.
const NODE_NAMESPACE: &str = "/proc/1/ns/net";
const NODE_ROOT: &str = "/proc/1/root";
/// Where the daemon sees the node's folders, and the plugin does not.
const HOST: &str = "/host";
const DAEMON_SET: &str = "warren-node";
/// The namespace that everything of Warren's is in, unless a service account says otherwise.
const NAMESPACE: &str = "warren-system";
const OWN_NAMESPACE: &str = "/var/run/secrets/kubernetes.io/serviceaccount/namespace";
/// Sandboxes that wait for the index.
const SANDBOXES: usize = 256;
/// How often records of sandboxes are looked through.
const PURGE: Duration = Duration::from_secs(60);

/// What is needed before the desired state is read.
pub(super) struct OnNode {
    finder: Arc<Finder>,
    node_namespace: Namespace,
    records: Records,
    sandboxes: mpsc::Sender<Sandbox>,
    own_namespace: String,
    cni: CniArgs,
    announcements: Announcements,
    leave: CancellationToken,
}

impl OnNode {
    /// # Errors
    /// The node cannot be looked at: the daemon needs hostPID and privileges.
    pub(super) fn open(config: &NodeConfig) -> anyhow::Result<(Self, NodeSandboxes)> {
        let cgroups = (config.kernel.cgroup.clone(), config.kernel.kubepods.clone());
        let finder = Finder::new(Path::new("/proc"), Path::new(NODE_ROOT), cgroups.0, cgroups.1)
            .context("the node's files cannot be reached: the daemon's pod needs hostPID and privileges")?;
        let node_namespace = Namespace::open(Path::new(NODE_NAMESPACE))
            .context("the node's network namespace cannot be entered: the daemon's pod needs hostPID and privileges")?;
        let folder = config.cni.cni_socket.parent().unwrap_or(Path::new("/run/warren"));
        let records = Records {
            folder: folder.join("sandboxes"),
        };
        let (sandboxes, news) = mpsc::channel(SANDBOXES);
        let known = records.read(&finder);
        let on_node = Self {
            finder: Arc::new(finder),
            node_namespace,
            records,
            sandboxes,
            own_namespace: own_namespace(config),
            cni: config.cni.clone(),
            announcements: Announcements::default(),
            leave: CancellationToken::new(),
        };
        Ok((on_node, NodeSandboxes { known, news }))
    }

    pub(super) fn announcements(&self) -> Announcements {
        self.announcements.clone()
    }

    pub(super) fn capture_settings(&self, node_name: &str, drain: Duration) -> CaptureSettings {
        CaptureSettings {
            linger: LINGER,
            node_namespace: Some(self.node_namespace.clone()),
            finder: Some(Arc::clone(&self.finder)),
            leave: self.leave.clone(),
            ..CaptureSettings::by_manifests(node_name, drain)
        }
    }

    /// As [`Records::tell`].
    pub(super) async fn look_again(&self) -> Vec<Sandbox> {
        self.records.tell(&self.finder, &self.sandboxes).await
    }

    /// Nothing is written yet, neither to the cluster nor to the node: see [`Duties::start`].
    pub(super) fn start(
        self,
        config: &NodeConfig,
        client: Client,
        published: &Published,
        pods: &Arc<Pods>,
        metrics: &Metrics,
        shutdown: &Shutdown,
    ) -> Cluster {
        let node: Arc<str> = config.node_name.as_str().into();
        let snapshots: Snapshots = published.snapshot.clone();
        let is_deleted = Arc::new(AtomicBool::new(false));
        shutdown.spawn(
            "own DaemonSet",
            follow_own(
                client.clone(),
                self.own_namespace.clone(),
                Arc::clone(&is_deleted),
                shutdown.clone(),
            ),
        );
        let folders = (!self.cni.no_cni).then(|| Folders {
            bin: self.cni.cni_bin_dir.clone(),
            conf: self.cni.cni_conf_dir.clone(),
        });
        if folders.is_some() {
            shutdown.spawn(
                "sandboxes",
                purge(self.records.clone(), Arc::clone(&self.finder), shutdown.clone()),
            );
        }
        let plugin = folders.clone().map(|folders| Plugin {
            entry: entry(&self.cni.cni_socket, &on_host(&folders.state()), &self.own_namespace),
            folders,
            socket: self.cni.cni_socket.clone(),
            namespaces: published.namespaces.clone(),
            kubeconfig: config.source.kubeconfig.clone(),
            is_installed: has_plugin(metrics),
            answers: Arc::new(Answers(Arc::new(Admitted {
                node: Arc::clone(&node),
                pods: Arc::clone(pods),
                snapshots: snapshots.clone(),
                finder: self.finder,
                client: client.clone(),
                records: self.records.clone(),
                sandboxes: self.sandboxes,
            }))),
        });
        let duties = Duties {
            announcements: self.announcements,
            client: client.clone(),
            node,
            snapshots,
            plugin,
            leave: self.leave.clone(),
            shutdown: shutdown.clone(),
            term: Mutex::default(),
        };
        Cluster {
            client,
            own_namespace: self.own_namespace,
            is_deleted,
            leave: self.leave,
            folders,
            run: self.cni.cni_socket,
            records: self.records,
            duties: Arc::new(duties),
        }
    }
}

/// What says whether the plugin is in its place, read at each scrape.
fn has_plugin(metrics: &Metrics) -> Arc<AtomicBool> {
    let is_installed = Arc::new(AtomicBool::new(false));
    metrics.register(Live::cni_installed(Arc::clone(&is_installed)));
    is_installed
}

/// The plugin runs on the node: it does not see our mounts.
fn on_host(path: &Path) -> PathBuf {
    match path.strip_prefix(HOST) {
        Ok(below) => Path::new("/").join(below),
        Err(_) => path.to_owned(),
    }
}

fn own_namespace(config: &NodeConfig) -> String {
    let told = std::env::var("WARREN_NAMESPACE").ok();
    let by_account = || match config.source.kubeconfig {
        Some(_) => None,
        None => std::fs::read_to_string(OWN_NAMESPACE).ok(),
    };
    let found = told.or_else(by_account).map(|name| name.trim().to_owned());
    found
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| NAMESPACE.to_owned())
}

/// Removes the records of sandboxes that are gone.
async fn purge(records: Records, finder: Arc<Finder>, shutdown: Shutdown) {
    let draining = shutdown.draining();
    tokio::pin!(draining);
    loop {
        tokio::select! {
            () = &mut draining => return,
            () = tokio::time::sleep(PURGE) => {}
        }
        let (records, finder) = (records.clone(), Arc::clone(&finder));
        let _ = tokio::task::spawn_blocking(move || records.read(&finder)).await;
    }
}

/// Notes when the DaemonSet is deleted: by the time the daemon is told to end it may not be allowed to ask any more.
async fn follow_own(client: Client, namespace: String, is_deleted: Arc<AtomicBool>, shutdown: Shutdown) {
    let own: Api<PartialObjectMeta<DaemonSet>> = Api::namespaced(client, &namespace);
    let only = watcher::Config::default()
        .fields(&format!("metadata.name={DAEMON_SET}"))
        .timeout(30);
    let events = watcher::watcher(own, only).default_backoff();
    pin_mut!(events);
    let draining = shutdown.draining();
    tokio::pin!(draining);
    loop {
        let event = tokio::select! {
            () = &mut draining => return,
            event = events.next() => event,
        };
        match event {
            Some(Ok(Event::Apply(set) | Event::InitApply(set))) => {
                is_deleted.store(set.metadata.deletion_timestamp.is_some(), Ordering::Relaxed);
            }
            Some(Ok(Event::Delete(_))) => is_deleted.store(true, Ordering::Relaxed),
            Some(Ok(Event::Init | Event::InitDone)) => {}
            // Without the right to look, what is asked at the end has to do.
            Some(Err(error)) => tracing::debug!(%error, "the own DaemonSet is not seen"),
            None => return,
        }
    }
}

/// What is needed at the end.
pub(super) struct Cluster {
    client: Client,
    own_namespace: String,
    is_deleted: Arc<AtomicBool>,
    leave: CancellationToken,
    folders: Option<Folders>,
    run: PathBuf,
    records: Records,
    duties: Arc<Duties>,
}

impl Cluster {
    pub(super) fn duties(&self) -> Arc<Duties> {
        Arc::clone(&self.duties)
    }

    pub(super) fn daemons(&self) -> Daemons {
        Daemons {
            client: self.client.clone(),
            namespace: self.own_namespace.clone(),
            node: Arc::clone(&self.duties.node),
        }
    }

    /// True if the daemon ends because Warren is taken off the cluster. Unless that is certain, it is not so.
    pub(super) async fn is_uninstalled(&self) -> bool {
        if self.is_deleted.load(Ordering::Relaxed) {
            return true;
        }
        coming::answer(self.ask()).await.unwrap_or_else(|error| {
            warn!(
                error = format!("{error:#}"),
                "whether the DaemonSet is still wanted is not known: everything stays in place"
            );
            false
        })
    }

    async fn ask(&self) -> kube::Result<bool> {
        let sets: Api<DaemonSet> = Api::namespaced(self.client.clone(), &self.own_namespace);
        match sets.get_metadata_opt(DAEMON_SET).await? {
            None => return Ok(true),
            Some(set) if set.metadata.deletion_timestamp.is_some() => return Ok(true),
            Some(_) => {}
        }
        let only = ListParams::default().fields(&format!("metadata.name={}", self.own_namespace));
        let namespaces: Api<v1::Namespace> = Api::all(self.client.clone());
        let found = namespaces.list_metadata(&only).await?;
        Ok(found
            .items
            .first()
            .is_none_or(|namespace| namespace.metadata.deletion_timestamp.is_some()))
    }

    /// Releases every pod. The capture task ends when they are.
    pub(super) fn leave(&self) {
        info!("Warren is being uninstalled: every pod is released");
        self.leave.cancel();
    }

    /// Takes the plugin off the node. Before the pods are released, so that no new one waits for us.
    pub(super) fn remove_plugin(&self) {
        let Some(folders) = &self.folders else { return };
        match install::remove(folders) {
            Ok(()) => info!("the CNI plugin is taken out"),
            Err(error) => warn!(
                error = &error as &dyn std::error::Error,
                "the CNI plugin cannot be taken out"
            ),
        }
    }

    /// Removes what is left on the node: pins, socket, records, and what was written while the plugin was taken out.
    pub(super) fn remove_rest(&self, kernel: &Kernel) {
        self.remove_plugin();
        if let Err(error) = kernel.remove_pins() {
            warn!(
                error = &error as &dyn std::error::Error,
                "the kernel programs cannot be removed"
            );
        }
        let _ = std::fs::remove_file(&self.run);
        let _ = std::fs::remove_dir_all(&self.records.folder);
        info!("nothing of Warren is left on the node");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_plugin_is_told_the_nodes_own_paths() {
        assert_eq!(
            on_host(Path::new("/host/etc/cni/net.d/warren")),
            Path::new("/etc/cni/net.d/warren")
        );
        assert_eq!(
            on_host(Path::new("/etc/cni/net.d/warren")),
            Path::new("/etc/cni/net.d/warren")
        );
    }
}

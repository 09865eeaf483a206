//! The wiring: builds the parts of a role from its configuration and joins them by values.

mod absence;
mod capturing;
mod cluster;
mod cni;
mod coming;
mod controller;
mod duties;
mod handover;
mod plugin;
mod pods;
mod ports;
mod settings;
mod showing;
mod source;
mod succession;
mod views;

pub use controller::run_controller;
pub use plugin::run_plugin;

use crate::{
    admin::{AdminState, Readiness},
    capture::{CaptureSettings, KernelSide},
    certs::{
        CertStore,
        issuer::{CaClient, CaClientSettings},
        key::DaemonKey,
        store::StoreSettings,
    },
    config::NodeConfig,
    handover::Tenure,
    kernel::Kernel,
    mesh::MeshSnapshot,
    proxy::{Connections, ProxyContext},
    shutdown::{Drained, Shutdown, termination},
    telemetry::Metrics,
};
use anyhow::{Context, anyhow};
use capturing::{Capturing, Pauses};
use cluster::{Cluster, OnNode};
use handover::{Owner, Standing};
use pods::{Condition, Pods};
use ports::OwnPorts;
use rustls_pki_types::ServerName;
use settings::{kernel_config, place, proxy_settings, trust_domains};
use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};
use succession::Heir;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// Events that wait for the proxy while it serves earlier ones.
const EVENTS: usize = 256;
/// How often the file of the root certificates is looked at.
const ROOT_REREAD: Duration = Duration::from_secs(10);
/// How long the release of every pod, and then the rest, may take when Warren is uninstalled and open connections have had
/// their time. Kubelet waits fifteen seconds more than these have.
const LEAVE: Duration = Duration::from_secs(5);
/// By how much the end of a daemon may last longer than its drain: a little less than kubelet waits.
const BEFORE_DRAIN: Duration = Duration::from_secs(12);
/// How long metrics and readiness still answer after the connections have ended.
const ADMIN_GRACE: Duration = Duration::from_millis(200);

/// Runs a node's daemon until it is told to end.
///
/// # Errors
/// It cannot start, or cannot go on.
pub async fn run_node(config: NodeConfig) -> anyhow::Result<()> {
    let shutdown = Shutdown::new();
    let mut terminated = std::pin::pin!(termination());
    let metrics = Metrics::new(place(&config.mesh));
    let readiness = Readiness::awaiting(Condition::ALL.map(Condition::awaited));
    // Taken first: a port that is in use is told before anything changes on the node.
    let mut ports = OwnPorts::bind(&config.ports)?;
    let admin_tasks = Shutdown::new();
    ports.serve_health(&metrics, &readiness, &admin_tasks)?;

    let begun = tokio::select! {
        running = start(&config, &metrics, &readiness, &shutdown) => running,
        outcome = wait(&mut terminated, &shutdown) => {
            end(config.run.drain_deadline, &shutdown, &admin_tasks, &readiness).await;
            return outcome;
        }
    };
    let running = match begun {
        Ok(running) => running,
        Err(error) => {
            end(config.run.drain_deadline, &shutdown, &admin_tasks, &readiness).await;
            return Err(error);
        }
    };
    ports.serve_admin(Some(running.state), &admin_tasks)?;
    info!(node = config.node_name, "the node's daemon runs");

    let outcome = wait(terminated, &shutdown).await;
    let told = Instant::now();
    let is_ours = match &running.standing {
        Some(standing) => standing.close().await,
        None => true,
    };
    let mut released = running.released;
    let uninstalled = match running.cluster {
        Some(cluster) if outcome.is_ok() && is_ours && cluster.is_uninstalled().await => cluster,
        Some(_) | None => {
            // The next daemon has the node as soon as capture stands still.
            drop(released);
            let left = (config.run.drain_deadline + BEFORE_DRAIN).saturating_sub(told.elapsed());
            end(config.run.drain_deadline.min(left), &shutdown, &admin_tasks, &readiness).await;
            return outcome;
        }
    };
    readiness.pending(Condition::Running.name(), "being uninstalled");
    uninstalled.leave();
    uninstalled.remove_plugin();
    let in_time = tokio::time::timeout(config.run.drain_deadline + LEAVE, &mut released).await;
    if in_time.is_err() {
        warn!("not every pod could be released in time");
    }
    end(LEAVE, &shutdown, &admin_tasks, &readiness).await;
    uninstalled.remove_rest(&running.kernel);
    let tenure = in_time.unwrap_or_else(|_| Ok(released.try_recv().ok().flatten()));
    if let (Ok(Some(tenure)), Some(socket)) = (tenure, config.meeting_place()) {
        tenure.remove(&socket);
    }
    outcome
}

/// A daemon that has started.
struct Running {
    state: AdminState,
    kernel: Arc<Kernel>,
    cluster: Option<Cluster>,
    /// Gets the tenure when every pod has been released, or capture has ended.
    released: oneshot::Receiver<Option<Tenure>>,
    /// Where no other daemon can come: none.
    standing: Option<Standing>,
}

/// Returns when the node is this daemon's, and its pods are served.
async fn start(
    config: &NodeConfig,
    metrics: &Arc<Metrics>,
    readiness: &Readiness,
    shutdown: &Shutdown,
) -> anyhow::Result<Running> {
    let (on_node, sandboxes) = match config.source.manifests {
        Some(_) => (None, None),
        None => {
            let (on_node, sandboxes) = OnNode::open(config)?;
            (Some(on_node), Some(sandboxes))
        }
    };
    let (published, server) = source::desired_state(config, sandboxes, metrics, shutdown).await?;
    readiness.met(Condition::Snapshot.name());
    let certs = certificates(config, metrics, shutdown)?;

    let (tenure, heir) = match config.meeting_place() {
        None => (None, None),
        Some(place) => {
            let identities = pods::identities(&published.snapshot.borrow(), &config.node_name, on_node.is_some());
            let prepare = async || succession::fetch(&certs, &identities).await;
            let (tenure, heir) = succession::arrive(&place, &config.node_name, readiness, prepare).await?;
            (Some(tenure), heir)
        }
    };
    // The daemon before may have recorded some while this one waited.
    let sandboxes = match &on_node {
        Some(on_node) => on_node.look_again().await,
        None => Vec::new(),
    };
    let mut snapshots = published.snapshot.clone();
    succession::catch_up(heir.as_ref(), &mut snapshots, |snapshot| {
        cni::are_known(&sandboxes, snapshot)
    })
    .await;
    // Whoever writes to the node owns it, even if nobody waits for this any more.
    let opened = tokio::task::spawn_blocking({
        let kernel = kernel_config(&config.kernel);
        move || (Kernel::open(&kernel), tenure)
    });
    let (kernel, tenure) = opened.await?;
    let kernel = Arc::new(kernel.context("the kernel programs cannot be used")?);
    readiness.met(Condition::Programs.name());
    trace_log(&kernel, shutdown);

    let context = Arc::new(ProxyContext {
        snapshot: published.snapshot.clone(),
        certs: certs.clone(),
        metrics: Arc::clone(metrics),
        connections: Connections::default(),
        settings: proxy_settings(config),
    });
    let pods = Pods::new(
        config.node_name.as_str().into(),
        Arc::clone(&context),
        config.run.drain_deadline,
        readiness.clone(),
        on_node.as_ref().map(OnNode::announcements),
        shutdown.clone(),
    );
    let (events, captured) = mpsc::channel(EVENTS);
    let settings = match &on_node {
        Some(on_node) => on_node.capture_settings(&config.node_name, config.run.drain_deadline),
        None => CaptureSettings::by_manifests(config.node_name.as_str(), config.run.drain_deadline),
    };
    let capturing = Capturing {
        kernel: Arc::clone(&kernel) as Arc<dyn KernelSide>,
        tenure,
        settings: CaptureSettings {
            inherited: heir.as_ref().map(|heir| heir.inherited.clone()).unwrap_or_default(),
            ..settings
        },
        snapshots: published.snapshot.clone(),
        events,
        pods: Arc::clone(&pods),
        shutdown: shutdown.clone(),
    };
    let (pauses, asked) = Pauses::new();
    let (left, released) = oneshot::channel();
    shutdown.spawn_essential("capture", capturing.run(asked, left));
    shutdown.spawn_essential("pods", Arc::clone(&pods).serve(captured));
    shutdown.spawn(
        "metrics upkeep",
        Arc::clone(metrics).upkeep(published.snapshot.clone(), shutdown.clone()),
    );
    shutdown.spawn(
        "snapshot metrics",
        showing::count_snapshots(published.snapshot.clone(), Arc::clone(metrics), shutdown.clone()),
    );
    showing::register(metrics, &published, &kernel, &certs, shutdown);

    let contact = server.as_ref().map(|(contact, _)| contact.clone());
    let cluster = match (on_node, server) {
        (Some(on_node), Some((_, client))) => Some(on_node.start(config, client, &published, &pods, metrics, shutdown)),
        _ => None,
    };
    let duties = cluster.as_ref().map(Cluster::duties);
    let predecessor = heir.as_ref().map(Heir::predecessor);
    succession::begin(heir, &pods, duties.as_deref()).await?;
    readiness.met(Condition::Node.name());
    let standing = config.meeting_place().map(|socket| {
        let owner = Owner {
            socket,
            node: config.node_name.clone(),
            predecessor,
            daemons: cluster.as_ref().map(Cluster::daemons),
            pauses,
            pods: Arc::clone(&pods),
            duties,
            shutdown: shutdown.clone(),
            closing: CancellationToken::new(),
        };
        owner.start()
    });
    Ok(Running {
        state: showing::admin_state(config, &published, &kernel, &certs, &pods, &context)
            .api_server(move || contact.as_ref().map(source::view)),
        kernel,
        cluster,
        released,
        standing,
    })
}

/// Waits for a signal, or for a task without which there is no point in going on.
async fn wait(
    terminated: impl Future<Output = io::Result<crate::shutdown::Termination>>,
    shutdown: &Shutdown,
) -> anyhow::Result<()> {
    tokio::select! {
        signal = terminated => {
            let signal = signal.context("signals cannot be waited for")?;
            info!(?signal, "told to end");
            Ok(())
        }
        failure = shutdown.failure() => Err(anyhow!(failure)),
    }
}

/// Drains the connections, then the servers that told about them.
async fn end(drain: Duration, shutdown: &Shutdown, admin_tasks: &Shutdown, readiness: &Readiness) {
    readiness.pending(Condition::Running.name(), "draining");
    match shutdown.drain(drain).await {
        Drained::Completely => info!("drained"),
        Drained::Cut { tasks } => warn!(?tasks, "ended with connections open"),
    }
    admin_tasks.drain(ADMIN_GRACE).await;
}

/// The programs' own lines, where somebody wants to read them.
fn trace_log(kernel: &Kernel, shutdown: &Shutdown) {
    if !tracing::enabled!(target: "warren::kernel", tracing::Level::TRACE) {
        return;
    }
    let Some(log) = kernel.trace_log() else {
        return warn!("the kernel programs say nothing: their log cannot be opened");
    };
    let draining = shutdown.draining();
    shutdown.spawn("kernel trace", async move {
        tokio::select! {
            ended = log.run() => if let Err(error) = ended {
                warn!(%error, "the kernel programs' log has ended");
            },
            () = draining => {}
        }
    });
}

fn certificates(config: &NodeConfig, metrics: &Arc<Metrics>, shutdown: &Shutdown) -> anyhow::Result<CertStore> {
    let server_name = config.ca_server_name.clone().map(ServerName::try_from);
    let issuer = CaClient::new(CaClientSettings {
        address: config.ca_address.clone(),
        server_name: server_name.transpose().context("--ca-server-name")?,
        root: config.ca_root.clone(),
        token: Some(config.ca_token.clone()),
        cluster_id: config.mesh.cluster_name.clone(),
        lifetime: config.svid_lifetime,
    });
    let settings = StoreSettings {
        trust_domains: trust_domains(&config.mesh),
        ca_root: config.ca_root.clone(),
        reread: ROOT_REREAD,
        metrics: Some(Arc::clone(metrics)),
    };
    // Connections that drain still need their certificates.
    let (store, keeper) = CertStore::new(issuer, DaemonKey::generate()?, settings, shutdown.cut());
    let draining = shutdown.draining();
    shutdown.spawn("certificates", async move {
        tokio::select! {
            () = keeper => {}
            () = draining => {}
        }
    });
    Ok(store)
}

/// Snapshots as everybody reads them.
type Snapshots = watch::Receiver<Arc<MeshSnapshot>>;

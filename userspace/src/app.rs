//! The wiring: builds the parts of a role from its configuration and joins them by values.

mod cluster;
mod cni;
mod controller;
mod plugin;
mod pods;
mod source;
mod views;

pub use controller::run_controller;
pub use plugin::run_plugin;

use crate::{
    admin::{self, AdminSite, AdminState, BindError, Listen, MetricsSite, Readiness, ReadinessSite},
    capture::{self, CaptureSettings},
    certs::{
        CertStore,
        issuer::{CaClient, CaClientSettings},
        key::DaemonKey,
        store::StoreSettings,
    },
    config::{KernelArgs, MeshConfig, NodeConfig, Ports, RunConfig, Tc},
    hbone::HboneSettings,
    kernel::{Kernel, KernelConfig, Sizes, Tcx},
    kubernetes::Published,
    mesh::{MeshSnapshot, TrustDomain},
    proxy::{Connections, ProxyContext, ProxySettings},
    shutdown::{Drained, Shutdown, termination},
    telemetry::{Live, LiveSample, Metrics, Place},
};
use anyhow::{Context, anyhow};
use cluster::OnNode;
use pods::{Condition, Pods};
use rustls_pki_types::ServerName;
use std::{collections::BTreeMap, io, sync::Arc, time::Duration};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{info, warn};

/// Events that wait for the proxy while it serves earlier ones.
const EVENTS: usize = 256;
/// How often the file of the root certificates is looked at.
const ROOT_REREAD: Duration = Duration::from_secs(10);
/// How long the release of every pod may take when Warren is uninstalled.
const LEAVE: Duration = Duration::from_secs(15);
/// How long metrics and readiness still answer after the connections have ended.
const ADMIN_GRACE: Duration = Duration::from_millis(200);

/// Runs a node's daemon until it is told to end.
///
/// # Errors
/// It cannot start, or cannot go on.
pub async fn run_node(config: NodeConfig) -> anyhow::Result<()> {
    let shutdown = Shutdown::new();
    let terminated = termination();
    let metrics = Metrics::new(place(&config.mesh));
    let readiness = Readiness::awaiting(Condition::ALL.map(Condition::awaited));
    // Taken first: a port that is in use is told before anything changes on the node.
    let mut ports = OwnPorts::bind(&config.ports)?;
    let admin_tasks = Shutdown::new();
    ports.serve_health(&metrics, &readiness, &admin_tasks)?;

    let mut terminated = std::pin::pin!(terminated);
    let (on_node, sandboxes) = match config.source.manifests {
        Some(_) => (None, None),
        None => {
            let (on_node, sandboxes) = OnNode::open(&config)?;
            (Some(on_node), Some(sandboxes))
        }
    };
    let (published, server) = tokio::select! {
        desired = source::desired_state(&config, sandboxes, &metrics, &shutdown) => desired?,
        outcome = wait(&mut terminated, &shutdown) => {
            end(&config.run, &shutdown, &admin_tasks, &readiness).await;
            return outcome;
        }
    };
    readiness.met(Condition::Snapshot.name());

    let kernel = tokio::task::spawn_blocking({
        let kernel = kernel_config(&config.kernel);
        move || Kernel::open(&kernel)
    });
    let certs = certificates(&config, &metrics, &shutdown)?;
    let kernel = Arc::new(kernel.await?.context("the kernel programs cannot be used")?);
    readiness.met(Condition::Programs.name());
    trace_log(&kernel, &shutdown);

    let context = Arc::new(ProxyContext {
        snapshot: published.snapshot.clone(),
        certs: certs.clone(),
        metrics: Arc::clone(&metrics),
        connections: Connections::default(),
        settings: proxy_settings(&config),
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
    let (capture_ended, all_released) = oneshot::channel();
    shutdown.spawn_essential("capture", {
        let (kernel, snapshot, shutdown) = (Arc::clone(&kernel), published.snapshot.clone(), shutdown.clone());
        let leave = settings.leave.clone();
        async move {
            let draining = shutdown.draining();
            match capture::reconcile(kernel, settings, snapshot, events, shutdown).await {
                Ok(()) if leave.is_cancelled() => {
                    let _ = capture_ended.send(());
                    draining.await;
                }
                Ok(()) => {}
                Err(error) => tracing::error!(error = &error as &dyn std::error::Error, "pods cannot be captured"),
            }
        }
    });
    shutdown.spawn_essential("pods", Arc::clone(&pods).serve(captured));
    shutdown.spawn(
        "metrics upkeep",
        Arc::clone(&metrics).upkeep(published.snapshot.clone(), shutdown.clone()),
    );
    shutdown.spawn(
        "snapshot metrics",
        count_snapshots(published.snapshot.clone(), Arc::clone(&metrics), shutdown.clone()),
    );
    register(&metrics, &published, &kernel, &certs, &shutdown);
    let contact = server.as_ref().map(|(contact, _)| contact.clone());
    let cluster = match (on_node, server) {
        (Some(on_node), Some((_, client))) => {
            Some(on_node.start(&config, client, &published, &pods, &metrics, &shutdown)?)
        }
        _ => None,
    };

    let state = admin_state(&config, &published, &kernel, &certs, &pods, &context)
        .api_server(move || contact.as_ref().map(source::view));
    ports.serve_admin(Some(state), &admin_tasks)?;
    info!(node = config.node_name, "the node's daemon runs");

    let outcome = wait(terminated, &shutdown).await;
    let uninstalled = match cluster {
        Some(cluster) if outcome.is_ok() && cluster.is_uninstalled().await => Some(cluster),
        Some(_) | None => None,
    };
    if let Some(cluster) = &uninstalled {
        readiness.pending(Condition::Running.name(), "being uninstalled");
        cluster.leave();
        cluster.remove_plugin();
        if tokio::time::timeout(LEAVE, all_released).await.is_err() {
            warn!("not every pod could be released in time");
        }
    }
    end(&config.run, &shutdown, &admin_tasks, &readiness).await;
    if let Some(cluster) = &uninstalled {
        cluster.remove_rest(&kernel);
    }
    outcome
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
async fn end(run: &RunConfig, shutdown: &Shutdown, admin_tasks: &Shutdown, readiness: &Readiness) {
    readiness.pending(Condition::Running.name(), "draining");
    match shutdown.drain(run.drain_deadline).await {
        Drained::Completely => info!("drained"),
        Drained::Cut { tasks } => warn!(?tasks, "ended with connections open"),
    }
    admin_tasks.drain(ADMIN_GRACE).await;
}

fn place(mesh: &MeshConfig) -> Place {
    Place {
        cluster: mesh.cluster_name.as_str().into(),
        domain: mesh.cluster_domain.as_str().into(),
    }
}

fn trust_domains(mesh: &MeshConfig) -> Vec<TrustDomain> {
    let own = std::iter::once(mesh.trust_domain.clone());
    own.chain(mesh.trust_domain_alias.iter().cloned()).collect()
}

fn kernel_config(args: &KernelArgs) -> KernelConfig {
    KernelConfig {
        pin_dir: args.pin_dir.clone(),
        cgroup: args.cgroup.clone(),
        kubepods: args.kubepods.clone(),
        sizes: Sizes {
            workloads: args.max_workloads,
            services: args.max_services,
            ranges: args.max_ranges,
            pods: args.max_pods,
            ..Sizes::default()
        },
        tcx: match args.tc {
            Tc::Auto => Tcx::Auto,
            Tc::Netlink => Tcx::Netlink,
        },
        trace: tracing::enabled!(target: "warren::kernel", tracing::Level::TRACE),
    }
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

fn proxy_settings(config: &NodeConfig) -> ProxySettings {
    ProxySettings {
        hbone: Arc::new(HboneSettings {
            ping_interval: config.hbone.hbone_ping,
            ping_timeout: config.hbone.hbone_dead_after,
            idle: config.hbone.hbone_idle,
            ..HboneSettings::default()
        }),
        connections_per_pod: usize::try_from(config.max_connections_per_pod).unwrap_or(usize::MAX),
        ..ProxySettings::default()
    }
}

/// What is read from its owners at each scrape.
fn register(metrics: &Metrics, published: &Published, kernel: &Arc<Kernel>, certs: &CertStore, shutdown: &Shutdown) {
    let counted = Arc::clone(kernel);
    metrics.register(Live::kernel_decisions(move || {
        let counters = counted.counters().unwrap_or_default().into_iter();
        counters
            .map(|(reason, count)| (reason.name().to_owned(), count))
            .collect()
    }));
    let full = Arc::clone(kernel);
    metrics.register(Live::counter(
        "kernel_map_full",
        "Entries that did not fit into a map of the kernel",
        move || {
            let maps = full.full_maps().into_iter();
            let samples = maps.map(|full| LiveSample::new([("map", full.map.to_owned())], full.refused as f64));
            samples.collect()
        },
    ));
    let certs = certs.clone();
    metrics.register(Live::certificate_expiry(move || {
        let certificates = certs.list().into_iter();
        let ends = certificates.filter_map(|certificate| Some((certificate.name, certificate.not_after?)));
        ends.collect()
    }));
    let problems = published.problems.clone();
    metrics.register(Live::manifest_errors(move || {
        let mut counts = BTreeMap::new();
        for problem in problems.borrow().iter() {
            *counts.entry(problem.finding.flaw.name()).or_default() += 1;
        }
        counts.into_iter().collect()
    }));
    metrics.register(Live::tasks(shutdown.clone()));
    metrics.register(Live::task_panics(shutdown.clone()));
}

async fn count_snapshots(mut snapshots: Snapshots, metrics: Arc<Metrics>, shutdown: Shutdown) {
    let draining = shutdown.draining();
    tokio::pin!(draining);
    loop {
        metrics.gauges.snapshot_published(snapshots.borrow_and_update().version);
        tokio::select! {
            () = &mut draining => return,
            changed = snapshots.changed() => if changed.is_err() { return },
        }
    }
}

fn admin_state(
    config: &NodeConfig,
    published: &Published,
    kernel: &Arc<Kernel>,
    certs: &CertStore,
    pods: &Arc<Pods>,
    context: &Arc<ProxyContext>,
) -> AdminState {
    let (kernel, certs, pods, context) = (Arc::clone(kernel), certs.clone(), Arc::clone(pods), Arc::clone(context));
    let (problems, journal) = (published.problems.clone(), published.journal.clone());
    AdminState::new(
        config.node_name.as_str().into(),
        config.mesh.cluster_domain.as_str().into(),
        published.snapshot.clone(),
    )
    .certificates(move || views::certificates(&certs.list()))
    .captured_pods(move || pods.list())
    .kernel_counters(move || views::kernel_counters(&kernel.counters().unwrap_or_default()))
    .problems(move || views::problems(&problems.borrow()))
    .connections(move || views::connections(&context.connections.list()))
    .publications(move || views::publications(&journal.latest()))
}

/// The sockets of the daemon's own servers, open and not yet served.
struct OwnPorts {
    admin: Vec<std::net::TcpListener>,
    metrics: Vec<std::net::TcpListener>,
    readiness: Vec<std::net::TcpListener>,
}

impl OwnPorts {
    fn bind(ports: &Ports) -> Result<Self, BindError> {
        let open = |name, port, listen: Listen| match port {
            0 => Ok(Vec::new()),
            _ => admin::bind(name, listen),
        };
        let admin = match ports.admin_address {
            Some(address) => Listen::At((address, ports.admin_port).into()),
            None => Listen::Loopback(ports.admin_port),
        };
        Ok(Self {
            admin: open("admin", ports.admin_port, admin)?,
            metrics: open("metrics", ports.metrics_port, Listen::Everywhere(ports.metrics_port))?,
            readiness: open(
                "readiness",
                ports.readiness_port,
                Listen::Everywhere(ports.readiness_port),
            )?,
        })
    }

    /// Metrics and readiness: from the start, so that a role which waits says for what.
    fn serve_health(&mut self, metrics: &Arc<Metrics>, readiness: &Readiness, tasks: &Shutdown) -> io::Result<()> {
        let site = Arc::new(MetricsSite(Arc::clone(metrics)));
        admin::serve(std::mem::take(&mut self.metrics), site, "metrics", tasks)?;
        let site = Arc::new(ReadinessSite(readiness.clone()));
        admin::serve(std::mem::take(&mut self.readiness), site, "readiness", tasks)
    }

    fn serve_admin(self, state: Option<AdminState>, tasks: &Shutdown) -> io::Result<()> {
        let site = Arc::new(AdminSite {
            state,
            logging: crate::telemetry::logging::handle(),
        });
        admin::serve(self.admin, site, "admin", tasks)
    }
}

/// Snapshots as everybody reads them.
type Snapshots = watch::Receiver<Arc<MeshSnapshot>>;

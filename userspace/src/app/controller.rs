//! The controller's wiring.

use super::{OwnPorts, end, settings::place, wait};
use crate::{
    admin::Readiness,
    config::ControllerConfig,
    controller::{self, CallerProof, Cluster, Controller, RootPlace},
    kubernetes::{IndexSettings, Source, bindings, client, manifests},
    shutdown::{Shutdown, termination},
    telemetry::{Live, LiveSample, Metrics},
};
use anyhow::Context;
use std::{net::IpAddr, path::Path, time::Duration};
use tracing::info;

/// What a node gets that wishes no lifetime, if the maximum allows it.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// What others wait for before they ask this controller.
const AUTHORITY: (&str, &str) = ("authority", "there is no certificate authority that may issue yet");
const PODS: (&str, &str) = ("pods", "the pods of the cluster are not known yet");

/// Runs the certificate authority until it is told to end.
///
/// # Errors
/// It cannot start, or cannot go on.
pub async fn run_controller(config: ControllerConfig) -> anyhow::Result<()> {
    let shutdown = Shutdown::new();
    let terminated = termination();
    let metrics = Metrics::new(place(&config.mesh));
    let readiness = Readiness::awaiting([AUTHORITY, PODS]);
    let mut ports = OwnPorts::bind(&config.ports)?;
    let admin_tasks = Shutdown::new();
    ports.serve_health(&metrics, &readiness, &admin_tasks)?;
    let (cluster, root, callers) = sources(&config, &shutdown).await?;

    let (addresses, names): (Vec<_>, Vec<_>) = config.san.iter().partition(|san| san.parse::<IpAddr>().is_ok());
    let service = controller::ControllerConfig {
        listen: config.listen,
        root,
        root_spread: config.root_spread,
        callers,
        trust_domain: config.mesh.trust_domain.clone(),
        server_names: names.into_iter().cloned().collect(),
        server_addresses: addresses.into_iter().filter_map(|san| san.parse().ok()).collect(),
        default_lifetime: config.max_svid_lifetime.min(DEFAULT_LIFETIME),
        most_lifetime: config.max_svid_lifetime,
    };
    let controller = controller::run(service, cluster, &shutdown).await?;
    register(&metrics, &controller);
    become_ready(controller, readiness.clone(), &shutdown);

    ports.serve_admin(None, &admin_tasks)?;
    info!("the controller runs");
    let outcome = wait(terminated, &shutdown).await;
    end(config.run.drain_deadline, &shutdown, &admin_tasks, &readiness).await;
    outcome
}

/// Where pods, root and the nodes' proofs come from: the API server, or a directory and files for each of the three.
async fn sources(config: &ControllerConfig, shutdown: &Shutdown) -> anyhow::Result<(Cluster, RootPlace, CallerProof)> {
    let directory = config.ca_dir.clone().map(RootPlace::Directory);
    let tokens = config.ca_tokens.clone().map(CallerProof::Tokens);
    if let Some(manifests) = &config.source.manifests {
        return Ok((
            from_manifests(manifests, config, shutdown)?,
            directory.context("--manifests needs --ca-dir")?,
            tokens.context("--manifests needs --ca-tokens")?,
        ));
    }
    let client = client::connect(config.source.kubeconfig.as_deref()).await?;
    let cluster = Cluster::Pods(bindings::follow(client.clone(), shutdown));
    let root = directory.unwrap_or_else(|| RootPlace::Cluster {
        client: client.clone(),
        namespace: config.namespace.clone(),
    });
    let callers = tokens.unwrap_or_else(|| CallerProof::Reviews {
        client,
        audience: config.token_audience.clone(),
        account: config.node_account.clone(),
    });
    Ok((cluster, root, callers))
}

fn from_manifests(directory: &Path, config: &ControllerConfig, shutdown: &Shutdown) -> anyhow::Result<Cluster> {
    let settings = IndexSettings {
        trust_domain: config.mesh.trust_domain.clone(),
        root_namespace: config.mesh.root_namespace.as_str().into(),
        extra_ranges: Vec::new(),
        source: Source::Directory,
        // No pod is ours, so no namespace is looked at.
        node_name: Some("".into()),
    };
    let published = manifests::spawn(directory, settings, shutdown)?;
    Ok(Cluster::Snapshot(published.snapshot))
}

/// Ready from the moment that requests can be decided. It stays so without the API server: what is known still counts.
fn become_ready(controller: Controller, readiness: Readiness, shutdown: &Shutdown) {
    let draining = shutdown.draining();
    shutdown.spawn("readiness", async move {
        let both = async {
            tokio::join!(
                async {
                    controller.authority_there().await;
                    readiness.met(AUTHORITY.0);
                },
                async {
                    controller.cluster_known().await;
                    readiness.met(PODS.0);
                }
            )
        };
        tokio::select! {
            _ = both => {}
            () = draining => {}
        }
    });
}

fn register(metrics: &Metrics, controller: &Controller) {
    let by_outcome = |counts: Vec<(&'static str, u64)>| {
        let samples = counts.into_iter();
        let sample = |(outcome, count): (&str, u64)| LiveSample::new([("outcome", outcome.to_owned())], count as f64);
        samples.map(sample).collect::<Vec<_>>()
    };
    let counted = controller.clone();
    metrics.register(Live::counter(
        "ca_signing_requests",
        "Requests for certificates, by outcome",
        move || by_outcome(counted.outcomes()),
    ));
    let reviewed = controller.clone();
    metrics.register(Live::counter(
        "ca_token_reviews",
        "Tokens that the API server was asked about, by outcome",
        move || {
            let counts = reviewed.reviews().unwrap_or_default();
            by_outcome(vec![
                ("accepted", counts.accepted),
                ("refused", counts.refused),
                ("unanswered", counts.unanswered),
            ])
        },
    ));
    let timed = controller.clone();
    metrics.register(Live::counter(
        "ca_token_review_seconds",
        "Time that the API server took to answer about tokens, all together",
        move || {
            let counts = timed.reviews().unwrap_or_default();
            vec![LiveSample::new([], counts.taken.as_secs_f64())]
        },
    ));
    let rooted = controller.clone();
    metrics.register(Live::gauge(
        "ca_root_expiry_timestamp_seconds",
        "When each root of the trust bundle ends, in Unix time",
        move || {
            let authority = rooted.authority();
            let roots = authority.iter().flat_map(|authority| authority.bundle().roots());
            let samples = roots.map(|root| {
                let labels = [("subject", root.subject.clone()), ("serial", root.serial.clone())];
                LiveSample::new(labels, root.not_after.as_secs() as f64)
            });
            samples.collect()
        },
    ));
    let issuing = controller.clone();
    metrics.register(Live::gauge(
        "ca_issuer_expiry_timestamp_seconds",
        "When the certificate authority that issues now ends, in Unix time",
        move || {
            let ends = issuing
                .authority()
                .map(|authority| authority.not_after().as_secs() as f64);
            ends.map(|end| LiveSample::new([], end)).into_iter().collect()
        },
    ));
}

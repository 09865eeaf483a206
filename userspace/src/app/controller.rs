//! The controller's wiring.

use super::{OwnPorts, end, place, wait};
use crate::{
    admin::Readiness,
    config::ControllerConfig,
    controller,
    kubernetes::{IndexSettings, Source, manifests},
    shutdown::{Shutdown, termination},
    telemetry::{Live, LiveSample, Metrics},
};
use anyhow::Context;
use std::{net::IpAddr, time::Duration};
use tracing::info;

/// What a node gets that wishes no lifetime, if the maximum allows it.
const DEFAULT_LIFETIME: Duration = Duration::from_secs(24 * 3600);

/// Runs the certificate authority until it is told to end.
///
/// # Errors
/// It cannot start, or cannot go on.
pub async fn run_controller(config: ControllerConfig) -> anyhow::Result<()> {
    let shutdown = Shutdown::new();
    let terminated = termination();
    let metrics = Metrics::new(place(&config.mesh));
    let readiness = Readiness::awaiting([("authority", "certificates are not served yet")]);
    let ports = OwnPorts::bind(&config.ports)?;

    let directory = config
        .source
        .manifests
        .as_deref()
        .context("no source of the desired state")?;
    let settings = IndexSettings {
        trust_domain: config.mesh.trust_domain.clone(),
        root_namespace: config.mesh.root_namespace.as_str().into(),
        extra_ranges: Vec::new(),
        source: Source::Directory,
        // No pod is ours, so no namespace is looked at.
        node_name: Some("".into()),
    };
    let published = manifests::spawn(directory, settings, &shutdown)?;
    let (addresses, names): (Vec<_>, Vec<_>) = config.san.iter().partition(|san| san.parse::<IpAddr>().is_ok());
    let service = controller::ControllerConfig {
        listen: config.listen,
        ca_dir: config.ca_dir.clone(),
        ca_tokens: config.ca_tokens.clone(),
        trust_domain: config.mesh.trust_domain.clone(),
        server_names: names.into_iter().cloned().collect(),
        server_addresses: addresses.into_iter().filter_map(|san| san.parse().ok()).collect(),
        default_lifetime: config.max_svid_lifetime.min(DEFAULT_LIFETIME),
        most_lifetime: config.max_svid_lifetime,
    };
    let controller = controller::run(service, published.snapshot.clone(), &shutdown).await?;
    metrics.register(Live::counter(
        "ca_signing_requests",
        "Requests for certificates, by outcome",
        move || {
            let outcomes = controller.outcomes().into_iter();
            let samples =
                outcomes.map(|(outcome, count)| LiveSample::new([("outcome", outcome.to_owned())], count as f64));
            samples.collect()
        },
    ));
    readiness.met("authority");

    let admin_tasks = Shutdown::new();
    ports.serve(None, &metrics, &readiness, &admin_tasks)?;
    info!("the controller runs");
    let outcome = wait(terminated, &shutdown).await;
    end(&config.run, &shutdown, &admin_tasks, &readiness).await;
    outcome
}

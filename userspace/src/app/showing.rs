//! What metrics and the admin port read from the daemon's parts, at each scrape and each dump. How it looks there is `views`'
//! matter.

use super::{Snapshots, pods::Pods, views};
use crate::{
    admin::AdminState,
    certs::CertStore,
    config::NodeConfig,
    kernel::Kernel,
    kubernetes::Published,
    proxy::ProxyContext,
    shutdown::Shutdown,
    telemetry::{Live, LiveSample, Metrics},
};
use std::{collections::BTreeMap, sync::Arc};

/// What is read from its owners at each scrape.
pub(super) fn register(
    metrics: &Metrics,
    published: &Published,
    kernel: &Arc<Kernel>,
    certs: &CertStore,
    shutdown: &Shutdown,
) {
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

pub(super) async fn count_snapshots(mut snapshots: Snapshots, metrics: Arc<Metrics>, shutdown: Shutdown) {
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

pub(super) fn admin_state(
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

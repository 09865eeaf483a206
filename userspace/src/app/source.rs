//! Where a node's daemon has its desired state from: a directory where one is named, else the API server.

use crate::{
    config::NodeConfig,
    kubernetes::{IndexSettings, NodeSandboxes, Published, Source, api, client, contact::Contact, manifests},
    shutdown::Shutdown,
    telemetry::{Live, LiveSample, Metrics, dump},
};
use anyhow::Context;
use tracing::info;

/// Returns when everything has been read once. With an API server, also what passes between it and us.
pub(super) async fn desired_state(
    config: &NodeConfig,
    sandboxes: Option<NodeSandboxes>,
    metrics: &Metrics,
    shutdown: &Shutdown,
) -> anyhow::Result<(Published, Option<(Contact, kube::Client)>)> {
    let settings = |source| IndexSettings {
        trust_domain: config.mesh.trust_domain.clone(),
        root_namespace: config.mesh.root_namespace.as_str().into(),
        extra_ranges: config.cluster_range.clone(),
        source,
        node_name: Some(config.node_name.as_str().into()),
    };
    if let Some(directory) = &config.source.manifests {
        let published = manifests::spawn(directory, settings(Source::Directory), shutdown)?;
        return Ok((published, None));
    }
    let contact = Contact::default();
    let client = client::connect_counted(config.source.kubeconfig.as_deref(), &contact).await?;
    // Before the first list: a server that does not answer is seen in them.
    register(metrics, &contact);
    info!("reading the cluster from its API server");
    let sandboxes = sandboxes.context("the node was not looked at")?;
    let published = api::spawn(client.clone(), settings(Source::ApiServer), sandboxes, shutdown)
        .await
        .context("told to end before the API server had told everything")?;
    Ok((published, Some((contact, client))))
}

/// What is asked of the API server, and how long it has been silent.
fn register(metrics: &Metrics, contact: &Contact) {
    let count = |name, help, read: fn(&Contact) -> u64| {
        let contact = contact.clone();
        metrics.register(Live::counter(name, help, move || {
            vec![LiveSample::new([], read(&contact) as f64)]
        }));
    };
    count("api_requests", "Requests to the API server", Contact::requests);
    count(
        "api_request_failures",
        "Requests that the API server did not answer, or with an error of its own",
        Contact::failures,
    );
    count("api_bytes", "Bytes of the API server's answers", Contact::bytes);
    let contact = contact.clone();
    metrics.register(Live::gauge(
        "api_silent_seconds",
        "Time since the API server last told anything about a kind; what is known of it may be so old",
        move || {
            let silences = contact.silences().into_iter();
            silences
                .map(|(kind, time)| LiveSample::new([("kind", kind.word().to_owned())], time.as_secs_f64()))
                .collect()
        },
    ));
}

pub(super) fn view(contact: &Contact) -> dump::ApiServer {
    let stalest = contact.silences().into_iter().max_by_key(|(_, silence)| *silence);
    dump::ApiServer {
        silent_seconds: stalest.map(|(_, silence)| silence.as_secs()),
        silent_about: stalest.map(|(kind, _)| kind.word().to_owned()),
        requests: contact.requests(),
        failures: contact.failures(),
        bytes: contact.bytes(),
    }
}

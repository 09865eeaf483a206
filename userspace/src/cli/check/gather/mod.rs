//! Asks the API server, and through it the daemons, for the facts. Whatever cannot be had is noted and never stops the
//! rest. What an answer means is in `read`.

mod read;
mod rights;

use super::facts::{Authority, Facts, OwnNamespace, OwnPod, Report};
use crate::cli::{
    api::{ApiError, Cluster, Resource},
    manifests::{
        CONFIG_MAPS, CONTROLLER, CUSTOM_RESOURCES, DAEMON_SETS, DEPLOYMENTS, EVENTS, NAMESPACE, NAMESPACES, NODE,
        NODES, PODS, SECRETS,
    },
};
use futures::{StreamExt, stream};
use k8s_openapi::jiff::Timestamp;
use serde_json::Value;

const DEFINITIONS: [&str; 2] = [
    "authorizationpolicies.security.istio.io",
    "peerauthentications.security.istio.io",
];
const NETWORK_POLICIES: Resource = Resource::new("networking.k8s.io/v1", "networkpolicies");
const PEER_AUTHENTICATIONS: Resource = Resource::new("security.istio.io/v1", "peerauthentications");
const FELIX: Resource = Resource::new("crd.projectcalico.org/v1", "felixconfigurations");
/// Daemons that are asked at a time.
const AT_ONCE: usize = 16;
/// Where a daemon tells its metrics and its readiness; both ports are open to the whole cluster.
const METRICS: &str = "15020/proxy/metrics";
const READINESS: &str = "15021/proxy/healthz/ready";

/// Everything that the rules want to know.
pub(crate) async fn gather(cluster: &Cluster, before_install: bool) -> Facts {
    let mut facts = Facts {
        now: Timestamp::now(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        before_install,
        ..Facts::default()
    };
    match cluster.text("/version").await {
        Ok((text, date)) => {
            facts.kubernetes = read::version(&text);
            facts.now = date.as_deref().and_then(read::http_date).unwrap_or(facts.now);
        }
        Err(error) => {
            facts.api_away = Some(with_causes(&error));
            return facts;
        }
    }
    let mut asker = Asker {
        cluster,
        unreadable: Vec::new(),
    };
    let nodes = asker.list("nodes", NODES, None, "").await;
    facts.nodes = nodes.iter().map(read::node).collect();
    asker.others(&mut facts).await;
    asker.definitions(&mut facts).await;
    facts.namespace = asker
        .get("namespaces", NAMESPACES, None, NAMESPACE)
        .await
        .map(|namespace| OwnNamespace {
            pod_security: read::label(&namespace, "pod-security.kubernetes.io/enforce"),
        });
    if !before_install {
        asker.installation(&mut facts).await;
        asker.mesh(&mut facts).await;
    }
    if before_install || facts.daemons.is_some() {
        match rights::missing(cluster, before_install).await {
            Ok(missing) => facts.missing_rights = missing,
            Err(error) => asker.note("access reviews", &error),
        }
    }
    facts.unreadable = asker.unreadable;
    facts
}

/// An error with everything behind it, in one line.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(&format!(": {cause_text}"));
        }
        next = cause.source();
    }
    text
}

/// Asks, and notes what cannot be had.
struct Asker<'c> {
    cluster: &'c Cluster,
    unreadable: Vec<(String, String)>,
}

impl Asker<'_> {
    fn note(&mut self, what: &str, error: &ApiError) {
        let note = (what.to_owned(), with_causes(error));
        if !self.unreadable.contains(&note) {
            self.unreadable.push(note);
        }
    }

    async fn get(&mut self, what: &str, resource: Resource, namespace: Option<&str>, name: &str) -> Option<Value> {
        match self.cluster.get(resource, namespace, name).await {
            Ok(found) => found,
            Err(error) => {
                self.note(what, &error);
                None
            }
        }
    }

    async fn list(&mut self, what: &str, resource: Resource, namespace: Option<&str>, query: &str) -> Vec<Value> {
        match self.cluster.list(resource, namespace, query).await {
            Ok(all) => all,
            Err(error) => {
                self.note(what, &error);
                Vec::new()
            }
        }
    }

    /// Networks and meshes that live on the same nodes.
    async fn others(&mut self, facts: &mut Facts) {
        let cilium = self.get(
            "ConfigMap kube-system/cilium-config",
            CONFIG_MAPS,
            Some("kube-system"),
            "cilium-config",
        );
        facts.others.cilium = cilium.await.as_ref().map(read::cilium);
        let felix = self.get("FelixConfiguration default", FELIX, None, "default").await;
        facts.others.calico = felix.as_ref().map(read::calico);
        let daemon_sets = self.list("daemonsets", DAEMON_SETS, None, "").await;
        facts.others.aws_policy_mode = daemon_sets.iter().find_map(read::aws_policy_mode);
        facts.others.ambient = daemon_sets.iter().filter_map(read::istio_ambient).collect();
    }

    async fn definitions(&mut self, facts: &mut Facts) {
        for name in DEFINITIONS {
            let found = self
                .get("customresourcedefinitions", CUSTOM_RESOURCES, None, name)
                .await;
            facts.definitions.push(read::definition(name, found.as_ref()));
        }
    }

    async fn installation(&mut self, facts: &mut Facts) {
        let Some(daemons) = self.get("daemonsets", DAEMON_SETS, Some(NAMESPACE), NODE).await else {
            return;
        };
        let controller = self.get("deployments", DEPLOYMENTS, Some(NAMESPACE), CONTROLLER).await;
        let events = self.list("events", EVENTS, Some(NAMESPACE), "").await;
        facts.authority.external = !read::asks_own_controller(&daemons);
        facts.daemons = Some(read::daemon_set(&daemons, &events));
        facts.controller = controller.as_ref().map(|object| read::deployment(object, &events));
        let pods = self.list("pods", PODS, Some(NAMESPACE), "").await;
        facts.own_pods = pods
            .iter()
            .filter_map(|pod| read::own_pod(pod, &events, facts.now))
            .collect();
        self.authority(&daemons, &mut facts.authority).await;
        let (cluster, own_pods) = (self.cluster, std::mem::take(&mut facts.own_pods));
        let asked = own_pods.into_iter().map(|pod| reported(cluster, pod));
        facts.own_pods = stream::iter(asked).buffered(AT_ONCE).collect().await;
    }

    async fn authority(&mut self, daemons: &Value, authority: &mut Authority) {
        let (name, key) = read::bundle_of(daemons);
        let bundle = self
            .get("ConfigMap warren-ca-root", CONFIG_MAPS, Some(NAMESPACE), &name)
            .await;
        authority.bundle = bundle.as_ref().map(|bundle| read::roots_in_config_map(bundle, &key));
        if authority.external {
            return;
        }
        for name in ["cacerts", "warren-ca"] {
            let what = format!("Secret {NAMESPACE}/{name}");
            if let Some(secret) = self.get(&what, SECRETS, Some(NAMESPACE), name).await {
                authority.secret = Some(read::secret(name, &secret));
                return;
            }
        }
    }

    async fn mesh(&mut self, facts: &mut Facts) {
        let namespaces = self.list("namespaces", NAMESPACES, None, "").await;
        facts.namespaces = namespaces.iter().map(read::namespace).collect();
        let pods = self.list("pods", PODS, None, "").await;
        let events = self
            .list("events", EVENTS, None, "&fieldSelector=involvedObject.kind%3DPod")
            .await;
        let failures = read::capture_failures(&events);
        facts.pods = pods
            .iter()
            .filter(|pod| read::namespace_of(pod) != NAMESPACE)
            .map(|pod| read::pod(pod, &facts.namespaces, &failures, facts.now))
            .collect();
        let policies = self.list("networkpolicies", NETWORK_POLICIES, None, "").await;
        facts.network_policies = policies
            .into_iter()
            .filter_map(|one| serde_json::from_value(one).ok())
            .collect();
        let strict = self.list("peerauthentications", PEER_AUTHENTICATIONS, None, "").await;
        facts.strict = strict.iter().filter_map(read::strict).collect();
    }
}

/// Asks a pod of ours for what it tells about itself. One that does not answer has no report.
async fn reported(cluster: &Cluster, mut pod: OwnPod) -> OwnPod {
    if !pod.is_daemon || pod.node.is_none() {
        return pod;
    }
    let at = |place: &str| format!("/api/v1/namespaces/{NAMESPACE}/pods/{}:{place}", pod.name);
    // Asked with the server's own moment beside it: between the two lies one round trip.
    let server = cluster
        .text("/version")
        .await
        .ok()
        .and_then(|(_, date)| read::http_date(&date?));
    let metrics = cluster.text(&at(METRICS)).await;
    let readiness = cluster.text(&at(READINESS)).await;
    let waits_for = match readiness {
        Err(ApiError::Refused { code: 503, message, .. }) => read::conditions(&message),
        Ok(_) | Err(_) => Vec::new(),
    };
    match metrics {
        Ok((text, date)) => {
            let own = date.as_deref().and_then(read::http_date);
            pod.report = Some(Report {
                clock_ahead: own
                    .zip(server)
                    .map(|(own, server)| own.as_second() - server.as_second()),
                samples: read::samples(&text),
                waits_for,
            });
        }
        Err(_) if waits_for.is_empty() => {}
        Err(_) => {
            pod.report = Some(Report {
                waits_for,
                ..Report::default()
            });
        }
    }
    pod
}

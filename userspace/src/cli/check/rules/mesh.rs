//! What must be so of the pods in the mesh, and of what others have set for them. Pure.

use super::super::{
    facts::{Facts, Labels, Pod},
    finding::{Finding, Problem},
};
use crate::kubernetes::enrolment::{DATAPLANE_MODE, Mode};
use k8s_openapi::{
    api::networking::v1::{NetworkPolicy, NetworkPolicyPort},
    apimachinery::pkg::{apis::meta::v1::LabelSelector, util::intstr::IntOrString},
};
use std::collections::BTreeMap;

const HBONE: i32 = 15008;
/// Capture takes a fraction of a second; a pod is given this long.
const CAPTURE_SECONDS: i64 = 15;
/// Pods that are named; the others are counted.
const NAMED: usize = 5;

pub(super) fn judge(facts: &Facts, findings: &mut Vec<Finding>) {
    if facts.before_install {
        return;
    }
    namespaces(facts, findings);
    pods(facts, findings);
    network_policies(facts, findings);
    plaintext(facts, findings);
}

fn namespaces(facts: &Facts, findings: &mut Vec<Finding>) {
    for namespace in &facts.namespaces {
        let label = |name: &str| namespace.labels.get(name).map(String::as_str);
        let subject = || format!("namespace {}", namespace.name);
        match label(DATAPLANE_MODE).map(|text| (text, Mode::parse(text))) {
            Some((_, Some(Mode::Ambient))) => {
                let sidecars = if label("istio-injection") == Some("enabled") {
                    "istio-injection=enabled".to_owned()
                } else if let Some(revision) = label("istio.io/rev") {
                    format!("istio.io/rev={revision}")
                } else {
                    continue;
                };
                findings.push(Finding::warning(
                    Problem::TwoModes,
                    subject(),
                    format!(
                        "it asks for sidecars ({sidecars}) and for {DATAPLANE_MODE}=ambient: pods with a sidecar are left \
                         to it, the others are captured"
                    ),
                    "take one of the two labels off",
                ));
            }
            Some((text, None)) => findings.push(Finding::warning(
                Problem::UnknownMode,
                subject(),
                format!("{DATAPLANE_MODE}={text} means nothing: ambient or none"),
                "correct the label",
            )),
            Some((_, Some(Mode::None))) | None => {}
        }
    }
}

fn pods(facts: &Facts, findings: &mut Vec<Finding>) {
    let mut late: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for pod in &facts.pods {
        let subject = format!("pod {}/{}", pod.namespace, pod.name);
        if let Some(mode) = &pod.odd_mode {
            findings.push(Finding::warning(
                Problem::UnknownMode,
                subject.clone(),
                format!("{DATAPLANE_MODE}={mode} means nothing: ambient or none"),
                "correct the label",
            ));
        }
        if !pod.wanted || pod.captured || !pod.running || pod.age_seconds < CAPTURE_SECONDS {
            continue;
        }
        if let Some(failure) = &pod.failure {
            findings.push(Finding::error(
                Problem::CaptureFailed,
                subject,
                failure.clone(),
                "as the message says; a pod that cannot be captured is kept out by the label istio.io/dataplane-mode=none",
            ));
        } else if has_daemon(facts, pod) {
            late.entry(&pod.namespace).or_default().push(&pod.name);
        }
    }
    for (namespace, names) in late {
        let more = match names.len().saturating_sub(NAMED) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        let named = names.iter().take(NAMED).copied().collect::<Vec<_>>().join(", ");
        findings.push(Finding::error(
            Problem::NotCaptured,
            format!("namespace {namespace}"),
            format!("pods that should be in the mesh are not: {named}{more}"),
            "kubectl -n warren-system logs of the daemon on the pod's node says why; `kubectl describe pod` has its Events",
        ));
    }
}

/// A node whose daemon is not ready is told as such, once.
fn has_daemon(facts: &Facts, pod: &Pod) -> bool {
    facts
        .own_pods
        .iter()
        .any(|own| own.is_daemon && own.ready && own.node == pod.node && pod.node.is_some())
}

fn network_policies(facts: &Facts, findings: &mut Vec<Finding>) {
    let mut blocked: BTreeMap<(String, Vec<&str>), Vec<&str>> = BTreeMap::new();
    for pod in facts.pods.iter().filter(|pod| pod.wanted && pod.running) {
        for (way, is_ingress) in [("into", true), ("out of", false)] {
            let selecting: Vec<&NetworkPolicy> = facts
                .network_policies
                .iter()
                .filter(|policy| is_for(policy, pod, is_ingress))
                .collect();
            if !selecting.is_empty() && !selecting.iter().any(|policy| lets_hbone(policy, is_ingress)) {
                let names = selecting
                    .iter()
                    .filter_map(|policy| policy.metadata.name.as_deref())
                    .collect();
                let place = format!("{way} pods of namespace {}", pod.namespace);
                blocked.entry((place, names)).or_default().push(&pod.name);
            }
        }
    }
    for ((place, policies), pods) in blocked {
        findings.push(Finding::error(
            Problem::HboneBlocked,
            format!("NetworkPolicy {}", policies.join(", ")),
            format!(
                "no port 15008 {place} ({} pods, such as {}): calls through the mesh time out",
                pods.len(),
                pods[0]
            ),
            "allow TCP port 15008, which carries every connection of the mesh; AuthorizationPolicies decide within it",
        ));
    }
}

fn is_for(policy: &NetworkPolicy, pod: &Pod, is_ingress: bool) -> bool {
    let Some(spec) = &policy.spec else { return false };
    let of_this_way = match &spec.policy_types {
        Some(types) => types
            .iter()
            .any(|way| way == if is_ingress { "Ingress" } else { "Egress" }),
        None => is_ingress || spec.egress.is_some(),
    };
    let selects = spec
        .pod_selector
        .as_ref()
        .is_none_or(|selector| selects(selector, &pod.labels));
    of_this_way && policy.metadata.namespace.as_deref() == Some(&pod.namespace) && selects
}

fn lets_hbone(policy: &NetworkPolicy, is_ingress: bool) -> bool {
    let Some(spec) = &policy.spec else { return false };
    if is_ingress {
        let rules = spec.ingress.as_deref().unwrap_or_default();
        rules.iter().any(|rule| has_hbone(rule.ports.as_deref()))
    } else {
        let rules = spec.egress.as_deref().unwrap_or_default();
        rules.iter().any(|rule| has_hbone(rule.ports.as_deref()))
    }
}

/// No port is every port. A port's name is the application's, never ours.
fn has_hbone(ports: Option<&[NetworkPolicyPort]>) -> bool {
    let ports = ports.unwrap_or_default();
    let is_it = |port: &NetworkPolicyPort| {
        let tcp = port.protocol.as_deref().unwrap_or("TCP") == "TCP";
        tcp && match &port.port {
            None => true,
            Some(IntOrString::Int(first)) => (*first..=port.end_port.unwrap_or(*first)).contains(&HBONE),
            Some(IntOrString::String(_)) => false,
        }
    };
    ports.is_empty() || ports.iter().any(is_it)
}

fn selects(selector: &LabelSelector, labels: &Labels) -> bool {
    let matches = selector.match_labels.iter().flatten();
    let all = matches.into_iter().all(|(key, value)| labels.get(key) == Some(value));
    let expressions = selector.match_expressions.iter().flatten();
    all && expressions.into_iter().all(|expression| {
        let found = labels.get(&expression.key);
        let among = found.is_some_and(|value| expression.values.iter().flatten().any(|one| one == value));
        match expression.operator.as_str() {
            "In" => among,
            "NotIn" => !among,
            "Exists" => found.is_some(),
            "DoesNotExist" => found.is_none(),
            _ => false,
        }
    })
}

fn plaintext(facts: &Facts, findings: &mut Vec<Finding>) {
    let Some(policy) = facts.strict.first() else { return };
    for pod in &facts.own_pods {
        let (Some(report), Some(node)) = (&pod.report, &pod.node) else {
            continue;
        };
        let refused = ["drop-strict\"", "drop-strict-from-node-address\""]
            .into_iter()
            .filter_map(|reason| report.metric("warren_kernel_decisions_total", reason))
            .sum::<f64>();
        if refused > 0.0 {
            findings.push(Finding::warning(
                Problem::PlaintextRefused,
                format!("node {node}"),
                format!(
                    "{refused:.0} connections in the clear were refused since its daemon's programs were loaded: STRICT is in force ({policy})"
                ),
                "put their clients into the mesh, or set the mode to PERMISSIVE until they are",
            ));
        }
    }
}

//! What must be so of Warren's own parts. Pure.

use super::super::{
    facts::{Facts, Node, OwnPod, Report, Root, Workload},
    finding::{Finding, Problem, Severity},
};
use crate::cli::manifests::{CONTROLLER, NAMESPACE, NODE};
use k8s_openapi::jiff::Timestamp;
use std::collections::BTreeMap;

/// So long a new pod may take to get ready.
const SETTLE_SECONDS: i64 = 30;
/// Renewing the root takes people, not minutes.
const EXPIRES_SOON_DAYS: i64 = 30;
const DAY_SECONDS: i64 = 24 * 3600;
/// Certificates are backdated by a minute, so that a clock may be late by as much.
const CLOCK_SECONDS: i64 = 30;
/// A daemon that has been restarted so often has a reason.
const RESTARTS: u64 = 3;
const STALE_SECONDS: f64 = 60.0;

pub(super) fn judge(facts: &Facts, findings: &mut Vec<Finding>) {
    if let Some(namespace) = &facts.namespace
        && matches!(namespace.pod_security.as_deref(), Some("baseline" | "restricted"))
    {
        findings.push(Finding::error(
            Problem::PodSecurity,
            format!("namespace {NAMESPACE}"),
            "Pod Security admission refuses privileged pods there, and the daemons are privileged",
            "kubectl label --overwrite namespace warren-system pod-security.kubernetes.io/enforce=privileged",
        ));
    }
    if facts.before_install {
        return;
    }
    let Some(daemons) = &facts.daemons else {
        findings.push(Finding::error(
            Problem::NotInstalled,
            format!("DaemonSet {NAMESPACE}/{NODE}"),
            "Warren is not installed in this cluster",
            "run `warren install`",
        ));
        return;
    };
    versions(facts, daemons, findings);
    for (name, workload) in [(NODE, Some(daemons)), (CONTROLLER, facts.controller.as_ref())] {
        if let Some(message) = workload.and_then(|workload| workload.cannot_create.as_ref()) {
            findings.push(Finding::error(
                Problem::PodsRefused,
                name,
                format!("Kubernetes does not make its pods: {message}"),
                "where it is a quota for critical pods (GKE), set criticalPodsQuota=true in the chart's values",
            ));
        }
    }
    facts.own_pods.iter().for_each(|pod| judge_pod(pod, findings));
    controller(facts, findings);
    without_daemon(facts, findings);
    token(facts, daemons, findings);
    authority(facts, findings);
}

/// `(1, 2)` of `1.2.3`: patches go together.
fn minor(version: &str) -> Option<(u32, u32)> {
    let mut numbers = version.trim_start_matches('v').split('.');
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn versions(facts: &Facts, daemons: &Workload, findings: &mut Vec<Finding>) {
    if minor(&daemons.version) != minor(&facts.version) {
        findings.push(Finding::warning(
            Problem::VersionSkew,
            "this command",
            format!(
                "it is version {}, and the cluster has {}",
                facts.version, daemons.version
            ),
            "use a command of the cluster's version, or `warren install` to bring the cluster to this one",
        ));
    }
    if let Some(controller) = &facts.controller
        && controller.image != daemons.image
    {
        findings.push(Finding::warning(
            Problem::VersionSkew,
            CONTROLLER,
            format!("it runs {}, and the daemons {}", controller.image, daemons.image),
            "finish the upgrade: `warren install` sets both",
        ));
    }
    for pod in facts.own_pods.iter().filter(|pod| pod.is_daemon) {
        if pod.image != daemons.image && pod.age_seconds > SETTLE_SECONDS {
            findings.push(Finding::warning(
                Problem::VersionSkew,
                subject(pod),
                format!("it runs {}, and the DaemonSet says {}", pod.image, daemons.image),
                "see `kubectl -n warren-system rollout status daemonset/warren-node` for what holds the update",
            ));
        }
    }
}

/// A daemon by its node, which is what the person knows it by.
fn subject(pod: &OwnPod) -> String {
    match (&pod.node, pod.is_daemon) {
        (Some(node), true) => format!("node {node}"),
        _ => format!("pod {NAMESPACE}/{}", pod.name),
    }
}

fn judge_pod(pod: &OwnPod, findings: &mut Vec<Finding>) {
    if let Some((reason, message)) = &pod.waiting
        && matches!(
            reason.as_str(),
            "ErrImagePull" | "ImagePullBackOff" | "ErrImageNeverPull" | "InvalidImageName"
        )
    {
        findings.push(Finding::error(
            Problem::ImageMissing,
            subject(pod),
            format!(
                "the image {} is not to be had there ({reason}{})",
                pod.image,
                behind(message)
            ),
            "push it to a registry that the nodes reach and name it with --image, or load it into the nodes \
             (`kind load image-archive`, `ctr -n k8s.io images import`)",
        ));
        return;
    }
    if !pod.is_daemon {
        return;
    }
    if !pod.ready {
        findings.push(not_yet(
            pod.age_seconds,
            Finding::error(
                Problem::DaemonNotReady,
                subject(pod),
                format!(
                    "its daemon is not ready{}; new connections of the mesh from pods of this node are refused",
                    behind(&why_not_ready(pod))
                ),
                &format!("kubectl -n {NAMESPACE} logs {}", pod.name),
            ),
        ));
    } else if pod.restarts >= RESTARTS {
        findings.push(Finding::warning(
            Problem::DaemonRestarts,
            subject(pod),
            format!(
                "its daemon was restarted {} times{}",
                pod.restarts,
                behind(pod.last_words.as_deref().unwrap_or_default())
            ),
            &format!("kubectl -n {NAMESPACE} logs --previous {}", pod.name),
        ));
    }
    if let Some(report) = &pod.report {
        judge_report(pod, report, findings);
    }
}

fn why_not_ready(pod: &OwnPod) -> String {
    let waits = pod.report.as_ref().map(|report| report.waits_for.join("; "));
    let waiting = pod
        .waiting
        .as_ref()
        .map(|(reason, message)| format!("{reason}{}", behind(message)));
    // What the daemon itself said is worth more than what Kubernetes makes of it.
    let said = [
        waits,
        pod.last_words.clone(),
        pod.unschedulable.clone(),
        pod.obstacle.clone(),
        waiting,
    ];
    said.into_iter()
        .flatten()
        .find(|text| !text.is_empty())
        .unwrap_or_default()
}

fn behind(text: &str) -> String {
    if text.is_empty() {
        String::new()
    } else {
        format!(": {text}")
    }
}

fn judge_report(pod: &OwnPod, report: &Report, findings: &mut Vec<Finding>) {
    if let Some(ahead) = report.clock_ahead.filter(|ahead| ahead.abs() > CLOCK_SECONDS) {
        let (seconds, way) = (ahead.abs(), if ahead > 0 { "ahead of" } else { "behind" });
        findings.push(Finding::error(
            Problem::ClockSkew,
            subject(pod),
            format!("its clock is {seconds} s {way} the API server's: certificates look expired, or not yet valid"),
            "set the node's clock by NTP (chrony, systemd-timesyncd)",
        ));
    }
    if report.metric("warren_cni_installed", "") == Some(0.0) {
        findings.push(Finding::error(
            Problem::CniMissing,
            subject(pod),
            "the CNI plugin warren-cni is not in its place: a new pod of the mesh runs before it is captured",
            "look for what removes it from /etc/cni/net.d or /opt/cni/bin (another CNI's agent: Cilium needs \
             cni.exclusive=false)",
        ));
    }
    if let Some(age) = report
        .metric("warren_api_silent_seconds", "")
        .filter(|age| *age > STALE_SECONDS)
    {
        findings.push(Finding::error(
            Problem::StaleState,
            subject(pod),
            format!("its daemon has not heard from the API server for {age:.0} s, and goes on by what it knew"),
            "see whether this node reaches the API server (its Service kubernetes.default)",
        ));
    }
    if let Some(refused) = report
        .metric("warren_kernel_map_full_total", "")
        .filter(|refused| *refused > 0.0)
    {
        findings.push(Finding::error(
            Problem::MapFull,
            subject(pod),
            format!("{refused:.0} entries did not fit into the kernel's tables"),
            "raise --max-workloads, --max-services, --max-ranges or --max-pods (node.extraArgs in the chart)",
        ));
    }
    if let Some(count) = report.metric("warren_manifest_errors", "").filter(|count| *count > 0.0) {
        findings.push(Finding::warning(
            Problem::ObjectsNotUnderstood,
            subject(pod),
            format!("its daemon does not understand {count:.0} objects or fields; what restricts fails closed"),
            &format!("kubectl -n {NAMESPACE} logs {} | grep -i understood", pod.name),
        ));
    }
}

fn controller(facts: &Facts, findings: &mut Vec<Finding>) {
    let Some(controller) = &facts.controller else {
        if !facts.authority.external {
            findings.push(Finding::error(
                Problem::ControllerNotReady,
                format!("Deployment {NAMESPACE}/{CONTROLLER}"),
                "it is not there, and nodes get no certificates",
                "run `warren install` again",
            ));
        }
        return;
    };
    if controller.ready > 0 {
        return;
    }
    let pod = facts.own_pods.iter().find(|pod| !pod.is_daemon);
    let placeless = pod.is_some_and(|pod| pod.unschedulable.is_some());
    let mut why = behind(&pod.map(why_not_ready).unwrap_or_default());
    if placeless {
        why += &taints(&facts.nodes);
    }
    findings.push(not_yet(
        pod.map_or(i64::MAX, |pod| pod.age_seconds),
        Finding::error(
            Problem::ControllerNotReady,
            format!("Deployment {NAMESPACE}/{CONTROLLER}"),
            format!(
                "none of {} replicas is ready, and nodes get no certificates{why}",
                controller.wanted,
            ),
            if placeless {
                "give it a node: see controller.tolerations, controller.nodeSelector and controller.resources in the \
                 chart's values"
            } else {
                "kubectl -n warren-system logs deployment/warren-controller"
            },
        ),
    ));
}

/// Which taints the nodes have, which the scheduler does not name. Empty where there are none.
fn taints(nodes: &[Node]) -> String {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for taint in nodes.iter().flat_map(|node| &node.taints) {
        *counts.entry(taint).or_default() += 1;
    }
    let counted = counts
        .iter()
        .map(|(taint, count)| format!("{taint} ({count} of {} nodes)", nodes.len()));
    let listed: Vec<String> = counted.collect();
    if listed.is_empty() {
        String::new()
    } else {
        format!(" Taints: {}", listed.join(", "))
    }
}

/// What a new pod is not yet is worth a warning.
fn not_yet(age_seconds: i64, finding: Finding) -> Finding {
    if age_seconds > SETTLE_SECONDS {
        finding
    } else {
        Finding {
            severity: Severity::Warning,
            what: format!("{} (it was started {age_seconds} s ago)", finding.what),
            ..finding
        }
    }
}

fn without_daemon(facts: &Facts, findings: &mut Vec<Finding>) {
    let ready = |node: &&Node| node.not_ready.is_none() && node.system == "linux";
    for node in facts.nodes.iter().filter(ready) {
        let is_here = |pod: &&OwnPod| pod.is_daemon && pod.node.as_ref() == Some(&node.name);
        if facts.own_pods.iter().any(|pod| is_here(&pod)) {
            continue;
        }
        findings.push(Finding::error(
            Problem::DaemonMissing,
            format!("node {}", node.name),
            "there is no daemon, and its pods are not in the mesh",
            "see node.nodeSelector, node.affinity and node.tolerations in the chart's values, and `kubectl -n \
             warren-system describe daemonset warren-node`",
        ));
    }
}

fn token(facts: &Facts, daemons: &Workload, findings: &mut Vec<Finding>) {
    let Some(controller) = &facts.controller else { return };
    if let (Some(sent), Some(taken)) = (&daemons.audience, &controller.audience)
        && sent != taken
    {
        findings.push(Finding::error(
            Problem::TokenAudience,
            format!("DaemonSet {NAMESPACE}/{NODE}"),
            format!("the daemons' tokens are for {sent:?}, and the controller takes those for {taken:?}"),
            "run `warren install` again, or set ca.tokenAudience in the chart's values for both",
        ));
    }
}

fn authority(facts: &Facts, findings: &mut Vec<Finding>) {
    let authority = &facts.authority;
    if authority.external {
        return;
    }
    let running = facts.controller.as_ref().is_some_and(|controller| controller.ready > 0);
    let Some(bundle) = &authority.bundle else {
        if running {
            findings.push(Finding::error(
                Problem::BundleMissing,
                format!("ConfigMap {NAMESPACE}/warren-ca-root"),
                "it is not there: a daemon that starts waits for it",
                "kubectl -n warren-system logs deployment/warren-controller, which writes it",
            ));
        }
        return;
    };
    let (subject, roots) = match &authority.secret {
        Some(secret) => (format!("Secret {NAMESPACE}/{}", secret.name), &secret.roots),
        None => {
            if running && !facts.unreadable.iter().any(|(what, _)| what.contains("Secret")) {
                findings.push(Finding::error(
                    Problem::RootMissing,
                    format!("Secret {NAMESPACE}/warren-ca"),
                    "the root's key is not there: a controller that restarts would make a new root, which no node trusts",
                    "restore it from a backup, or restart the controller and then the daemons for a new root",
                ));
            }
            (format!("ConfigMap {NAMESPACE}/warren-ca-root"), bundle)
        }
    };
    for root in roots {
        judge_root(&subject, root, facts.now, findings);
    }
    if let Some(secret) = &authority.secret
        && !secret
            .roots
            .iter()
            .all(|root| bundle.iter().any(|trusted| trusted.der == root.der))
    {
        findings.push(Finding::error(
            Problem::BundleMismatch,
            format!("ConfigMap {NAMESPACE}/warren-ca-root"),
            format!(
                "it lacks the root of Secret {}: nodes refuse what the controller signs",
                secret.name
            ),
            "restart the controller, which writes it: kubectl -n warren-system rollout restart \
             deployment/warren-controller",
        ));
    }
}

fn judge_root(subject: &str, root: &Root, now: Timestamp, findings: &mut Vec<Finding>) {
    let advice = "give the mesh a new root beside the old one, as docs/certificates.md says";
    let left = root.not_after.as_second() - now.as_second();
    if left <= 0 {
        findings.push(Finding::error(
            Problem::RootExpired,
            subject,
            format!(
                "the root certificate ended on {}: no certificate of the mesh is valid",
                root.not_after
            ),
            advice,
        ));
    } else if left < EXPIRES_SOON_DAYS * DAY_SECONDS {
        findings.push(Finding::warning(
            Problem::RootExpiring,
            subject,
            format!(
                "the root certificate ends in {} days, on {}",
                left / DAY_SECONDS,
                root.not_after
            ),
            advice,
        ));
    }
    if root.not_before > now {
        findings.push(Finding::error(
            Problem::RootNotYetValid,
            subject,
            format!("the root certificate begins on {} only", root.not_before),
            "look at the clock of the machine that made it",
        ));
    }
}

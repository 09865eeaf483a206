//! What the API server's answers mean. Pure: from JSON and texts to facts.

use crate::{
    cli::{
        check::facts::{Calico, Cilium, Definition, Labels, Namespace, Node, OwnPod, Pod, Root, Secret, Workload},
        manifests::{CONTROLLER, NODE},
    },
    kubernetes::enrolment::{DATAPLANE_MODE, Enrolment, Mode, PodFacts, REDIRECTION, SIDECAR_STATUS},
};
use k8s_openapi::jiff::{Timestamp, fmt::rfc2822};
use rustls_pki_types::{CertificateDer, pem::PemObject};
use serde_json::Value;
use std::collections::BTreeMap;

/// The Event reasons by which daemons tell that a pod is not captured begin so.
const CAPTURE_EVENTS: &str = "Capture";
/// What a container says at its end is shown by its last lines.
const LAST_WORDS: usize = 300;

fn text<'v>(value: &'v Value, at: &str) -> Option<&'v str> {
    value.pointer(at).and_then(Value::as_str)
}

fn owned(value: &Value, at: &str) -> String {
    text(value, at).unwrap_or_default().to_owned()
}

fn number(value: &Value, at: &str) -> u64 {
    value.pointer(at).and_then(Value::as_u64).unwrap_or(0)
}

fn list<'v>(value: &'v Value, at: &str) -> impl Iterator<Item = &'v Value> + use<'v> {
    value.pointer(at).and_then(Value::as_array).into_iter().flatten()
}

fn moment(value: &Value, at: &str) -> Option<Timestamp> {
    text(value, at)?.parse().ok()
}

/// `(1, 36)` of `/version`. A minor version may be written as `28+`.
pub(super) fn version(json: &str) -> Option<(u32, u32)> {
    let value: Value = serde_json::from_str(json).ok()?;
    let part = |key: &str| {
        let digits: String = value[key].as_str()?.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    };
    Some((part("major")?, part("minor")?))
}

/// The `Date` of an HTTP answer: `Sat, 21 Nov 2026 12:36:16 GMT`.
pub(super) fn http_date(date: &str) -> Option<Timestamp> {
    rfc2822::DateTimeParser::new().parse_timestamp(date).ok()
}

pub(super) fn label(object: &Value, name: &str) -> Option<String> {
    object["metadata"]["labels"][name].as_str().map(str::to_owned)
}

fn labels(object: &Value) -> Labels {
    let all = object["metadata"]["labels"].as_object().into_iter().flatten();
    let texts = all.filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())));
    texts.collect()
}

pub(super) fn namespace_of(object: &Value) -> &str {
    text(object, "/metadata/namespace").unwrap_or_default()
}

pub(super) fn node(object: &Value) -> Node {
    Node {
        name: owned(object, "/metadata/name"),
        kernel: owned(object, "/status/nodeInfo/kernelVersion"),
        system: owned(object, "/status/nodeInfo/operatingSystem"),
        architecture: owned(object, "/status/nodeInfo/architecture"),
        not_ready: match list(object, "/status/conditions").find(|one| one["type"] == "Ready") {
            Some(ready) => (ready["status"] != "True").then(|| owned(ready, "/message")),
            None => Some("its kubelet has not said that it is".to_owned()),
        },
        pressures: list(object, "/status/conditions")
            .filter(|one| one["status"] == "True")
            .map(|one| owned(one, "/type"))
            .filter(|kind| kind.ends_with("Pressure"))
            .collect(),
        taints: list(object, "/spec/taints")
            .filter(|taint| taint["effect"] != "PreferNoSchedule")
            .map(taint)
            .collect(),
    }
}

/// As `kubectl taint` writes it.
fn taint(object: &Value) -> String {
    let value = text(object, "/value").filter(|value| !value.is_empty());
    let value = value.map_or_else(String::new, |value| format!("={value}"));
    format!("{}{value}:{}", owned(object, "/key"), owned(object, "/effect"))
}

fn has_condition(object: &Value, kind: &str) -> bool {
    list(object, "/status/conditions").any(|one| one["type"] == kind && one["status"] == "True")
}

pub(super) fn cilium(config: &Value) -> Cilium {
    let setting = |name: &str| config["data"][name].as_str().unwrap_or_default();
    Cilium {
        // A kube-proxy that is replaced is replaced at the socket as well.
        socket_lb: setting("bpf-lb-sock") == "true" || matches!(setting("kube-proxy-replacement"), "true" | "strict"),
        host_namespace_only: setting("bpf-lb-sock-hostns-only") == "true",
        // Its own default where nothing is said.
        cni_exclusive: setting("cni-exclusive") != "false",
    }
}

pub(super) fn calico(felix: &Value) -> Calico {
    Calico {
        bpf: felix["spec"]["bpfEnabled"] == true,
        connect_time_balancing: text(felix, "/spec/bpfConnectTimeLoadBalancing")
            .unwrap_or("TCP")
            .to_owned(),
    }
}

fn containers(workload: &Value) -> impl Iterator<Item = &Value> + use<'_> {
    list(workload, "/spec/template/spec/containers")
}

pub(super) fn aws_policy_mode(daemon_set: &Value) -> Option<String> {
    if text(daemon_set, "/metadata/name") != Some("aws-node") {
        return None;
    }
    let mut variables = containers(daemon_set).flat_map(|container| list(container, "/env"));
    let mode = variables.find(|variable| variable["name"] == "NETWORK_POLICY_ENFORCING_MODE")?;
    mode["value"].as_str().map(str::to_owned)
}

/// Its name, if it is Istio's ztunnel or its CNI agent.
pub(super) fn istio_ambient(daemon_set: &Value) -> Option<String> {
    let app = text(daemon_set, "/spec/template/metadata/labels/app").unwrap_or_default();
    let k8s_app = text(daemon_set, "/spec/template/metadata/labels/k8s-app").unwrap_or_default();
    let is_istio = app == "ztunnel" || k8s_app == "istio-cni-node";
    is_istio.then(|| format!("{}/{}", namespace_of(daemon_set), owned(daemon_set, "/metadata/name")))
}

pub(super) fn definition(name: &str, found: Option<&Value>) -> Definition {
    let served = found.into_iter().flat_map(|object| list(object, "/spec/versions"));
    Definition {
        name: name.to_owned(),
        present: found.is_some(),
        served: served
            .filter(|version| version["served"] == true)
            .map(|version| owned(version, "/name"))
            .collect(),
    }
}

/// The value of `--flag=value` among a workload's arguments.
fn argument(workload: &Value, flag: &str) -> Option<String> {
    let mut arguments = containers(workload).flat_map(|container| list(container, "/args"));
    arguments.find_map(|one| {
        let value = one.as_str()?.strip_prefix(flag)?.strip_prefix('=')?;
        Some(value.to_owned())
    })
}

pub(super) fn asks_own_controller(daemon_set: &Value) -> bool {
    argument(daemon_set, "--ca-address").is_none_or(|address| address.starts_with("https://warren-controller."))
}

/// Name and key of the ConfigMap that daemons trust.
pub(super) fn bundle_of(daemon_set: &Value) -> (String, String) {
    let mut volumes = list(daemon_set, "/spec/template/spec/volumes");
    let name = volumes.find_map(|volume| text(volume, "/configMap/name"));
    let file = argument(daemon_set, "--ca-root");
    let key = file.as_deref().and_then(|path| path.rsplit('/').next());
    (
        name.unwrap_or("warren-ca-root").to_owned(),
        key.unwrap_or("root-cert.pem").to_owned(),
    )
}

fn workload(object: &Value, events: &[Value]) -> Workload {
    let container = containers(object).next();
    Workload {
        image: container.map_or_else(String::new, |container| owned(container, "/image")),
        version: label(object, "app.kubernetes.io/version").unwrap_or_default(),
        cannot_create: newest_message(events, |event| {
            event["reason"] == "FailedCreate"
                && text(event, "/involvedObject/name")
                    .is_some_and(|name| name.starts_with(&owned(object, "/metadata/name")))
        }),
        ..Workload::default()
    }
}

pub(super) fn daemon_set(object: &Value, events: &[Value]) -> Workload {
    let mut volumes = list(object, "/spec/template/spec/volumes");
    let token = volumes.find_map(|volume| {
        let mut sources = list(volume, "/projected/sources");
        sources.find_map(|source| text(source, "/serviceAccountToken/audience"))
    });
    let mut workload = workload(object, events);
    workload.wanted = number(object, "/status/desiredNumberScheduled");
    workload.ready = number(object, "/status/numberReady");
    workload.audience = token.map(str::to_owned);
    if number(object, "/status/currentNumberScheduled") >= workload.wanted {
        // What hindered it is over.
        workload.cannot_create = None;
    }
    workload
}

pub(super) fn deployment(object: &Value, events: &[Value]) -> Workload {
    let mut workload = workload(object, events);
    workload.wanted = object.pointer("/spec/replicas").and_then(Value::as_u64).unwrap_or(1);
    workload.ready = number(object, "/status/readyReplicas");
    workload.audience = argument(object, "--token-audience");
    if number(object, "/status/replicas") >= workload.wanted {
        workload.cannot_create = None;
    }
    workload
}

fn newest_message(events: &[Value], is_it: impl Fn(&Value) -> bool) -> Option<String> {
    let when = |event: &&Value| {
        moment(event, "/lastTimestamp")
            .or_else(|| moment(event, "/eventTime"))
            .unwrap_or_default()
    };
    let newest = events.iter().filter(|event| is_it(event)).max_by_key(when)?;
    Some(owned(newest, "/message"))
}

/// A pod of the daemons or the controller; others in the namespace are not ours.
pub(super) fn own_pod(object: &Value, events: &[Value], now: Timestamp) -> Option<OwnPod> {
    let component = label(object, "app.kubernetes.io/name")?;
    if component != NODE && component != CONTROLLER {
        return None;
    }
    // One that is ending has had its successor announced already.
    if object["metadata"].get("deletionTimestamp").is_some() {
        return None;
    }
    let name = owned(object, "/metadata/name");
    let status = list(object, "/status/containerStatuses").next();
    let waiting = status.and_then(|status| {
        let waiting = status.pointer("/state/waiting")?;
        let reason = owned(waiting, "/reason");
        // Every container begins so.
        (reason != "ContainerCreating").then(|| (reason, owned(waiting, "/message")))
    });
    let last_words = status.and_then(|status| {
        let states = ["/state/terminated/message", "/lastState/terminated/message"];
        states.into_iter().find_map(|at| text(status, at)).map(ending)
    });
    let unschedulable = list(object, "/status/conditions")
        .find(|one| one["type"] == "PodScheduled" && one["status"] == "False")
        .map(|one| owned(one, "/message"));
    let ready = has_condition(object, "Ready");
    let of_pod = |event: &Value| {
        event["type"] == "Warning"
            && event["reason"] != "Unhealthy"
            && text(event, "/involvedObject/name") == Some(&name)
    };
    Some(OwnPod {
        is_daemon: component == NODE,
        node: text(object, "/spec/nodeName").map(str::to_owned),
        ready,
        age_seconds: age(object, "/metadata/creationTimestamp", now),
        image: list(object, "/spec/containers")
            .next()
            .map_or_else(String::new, |one| owned(one, "/image")),
        restarts: status.map_or(0, |status| number(status, "/restartCount")),
        waiting,
        last_words,
        unschedulable,
        obstacle: newest_message(events, of_pod).filter(|_| !ready),
        report: None,
        name,
    })
}

/// The last line of what was said, which is the error.
fn ending(words: &str) -> String {
    let last = words.trim().lines().last().unwrap_or_default().trim();
    last.chars().take(LAST_WORDS).collect()
}

fn age(object: &Value, at: &str, now: Timestamp) -> i64 {
    moment(object, at).map_or(0, |begin| now.as_second() - begin.as_second())
}

/// The certificates of a PEM text. What is none of them is left out.
fn roots(pem: &[u8]) -> Vec<Root> {
    let certificates = CertificateDer::pem_slice_iter(pem).filter_map(Result::ok);
    let root = |der: CertificateDer<'_>| {
        let (_, parsed) = x509_parser::parse_x509_certificate(&der).ok()?;
        let validity = parsed.validity();
        Some(Root {
            not_before: Timestamp::from_second(validity.not_before.timestamp()).ok()?,
            not_after: Timestamp::from_second(validity.not_after.timestamp()).ok()?,
            der: der.to_vec(),
        })
    };
    certificates.filter_map(root).collect()
}

pub(super) fn roots_in_config_map(object: &Value, key: &str) -> Vec<Root> {
    roots(object["data"][key].as_str().unwrap_or_default().as_bytes())
}

/// The root of a Secret in the form of `cacerts`.
pub(super) fn secret(name: &str, object: &Value) -> Secret {
    let encoded = object["data"]["root-cert.pem"].as_str().unwrap_or_default();
    Secret {
        name: name.to_owned(),
        roots: roots(&base64(encoded).unwrap_or_default()),
    }
}

/// Standard base64, as Secrets hold it.
fn base64(text: &str) -> Option<Vec<u8>> {
    serde_json::from_value::<k8s_openapi::ByteString>(Value::String(text.to_owned()))
        .ok()
        .map(|bytes| bytes.0)
}

pub(super) fn namespace(object: &Value) -> Namespace {
    Namespace {
        name: owned(object, "/metadata/name"),
        labels: labels(object),
    }
}

/// Messages of the newest Events about capture, by the pod's UID.
pub(super) fn capture_failures(events: &[Value]) -> BTreeMap<String, String> {
    let mut newest: BTreeMap<String, (Timestamp, String)> = BTreeMap::new();
    for event in events {
        let about_capture = text(event, "/reason").is_some_and(|reason| reason.starts_with(CAPTURE_EVENTS));
        if !about_capture || event["type"] != "Warning" {
            continue;
        }
        let when = moment(event, "/lastTimestamp")
            .or_else(|| moment(event, "/eventTime"))
            .unwrap_or_default();
        let entry = newest.entry(owned(event, "/involvedObject/uid")).or_default();
        if when >= entry.0 {
            *entry = (when, owned(event, "/message"));
        }
    }
    newest.into_iter().map(|(uid, (_, message))| (uid, message)).collect()
}

pub(super) fn pod(
    object: &Value,
    namespaces: &[Namespace],
    failures: &BTreeMap<String, String>,
    now: Timestamp,
) -> Pod {
    let name = namespace_of(object);
    let of_namespace = namespaces.iter().find(|namespace| namespace.name == name);
    let mode = of_namespace.and_then(|namespace| namespace.labels.get(DATAPLANE_MODE));
    let own_mode = label(object, DATAPLANE_MODE);
    let annotation = |name: &str| object["metadata"]["annotations"][name].as_str();
    let enrolment = Enrolment::of(PodFacts {
        namespace: name,
        namespace_mode: mode.and_then(|mode| Mode::parse(mode)),
        pod_mode: own_mode.as_deref().and_then(Mode::parse),
        host_network: object.pointer("/spec/hostNetwork") == Some(&Value::Bool(true)),
        sidecar: annotation(SIDECAR_STATUS).is_some(),
    });
    Pod {
        namespace: name.to_owned(),
        name: owned(object, "/metadata/name"),
        labels: labels(object),
        node: text(object, "/spec/nodeName").map(str::to_owned),
        running: object.pointer("/status/phase") == Some(&Value::String("Running".to_owned()))
            && object["metadata"].get("deletionTimestamp").is_none(),
        age_seconds: age(object, "/status/startTime", now),
        wanted: enrolment.is_wanted(),
        captured: annotation(REDIRECTION) == Some("enabled"),
        failure: failures.get(&owned(object, "/metadata/uid")).cloned(),
        odd_mode: own_mode.filter(|mode| Mode::parse(mode).is_none()),
    }
}

/// Its name, if it says STRICT.
pub(super) fn strict(peer_authentication: &Value) -> Option<String> {
    let is_strict = |at: &str| text(peer_authentication, at) == Some("STRICT");
    let of_ports = peer_authentication
        .pointer("/spec/portLevelMtls")
        .and_then(Value::as_object);
    let any_port = of_ports.is_some_and(|ports| ports.values().any(|one| one["mode"] == "STRICT"));
    (is_strict("/spec/mtls/mode") || any_port).then(|| {
        format!(
            "{}/{}",
            namespace_of(peer_authentication),
            owned(peer_authentication, "/metadata/name")
        )
    })
}

/// The samples of a text of metrics, as name with labels, and value.
pub(super) fn samples(metrics: &str) -> Vec<(String, f64)> {
    let lines = metrics.lines().filter(|line| line.starts_with("warren_"));
    lines
        .filter_map(|line| {
            let (name, value) = line.rsplit_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        })
        .collect()
}

/// The conditions in a readiness answer, behind its first line.
pub(super) fn conditions(answer: &str) -> Vec<String> {
    let lines = answer
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && *line != "not ready");
    lines.map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_minor_version_with_a_plus_is_a_number() {
        assert_eq!(version(r#"{"major":"1","minor":"28+"}"#), Some((1, 28)));
        assert_eq!(version("no json"), None);
    }

    #[test]
    fn what_kubernetes_holds_against_a_node_is_in_its_conditions_and_taints() {
        let condition = |kind: &str, status: &str| json!({"type": kind, "status": status, "message": format!("{kind} is {status}")});
        let node = node(&json!({
            "metadata": {"name": "n1"},
            "spec": {"taints": [
                {"key": "node.kubernetes.io/disk-pressure", "effect": "NoSchedule"},
                {"key": "team", "value": "shop", "effect": "NoExecute"},
                {"key": "spot", "value": "", "effect": "PreferNoSchedule"},
            ]},
            "status": {"conditions": [
                condition("MemoryPressure", "False"),
                condition("DiskPressure", "True"),
                condition("PIDPressure", "Unknown"),
                condition("Ready", "Unknown"),
            ]},
        }));
        assert_eq!(node.not_ready.as_deref(), Some("Ready is Unknown"));
        assert_eq!(node.pressures, ["DiskPressure"]);
        assert_eq!(
            node.taints,
            ["node.kubernetes.io/disk-pressure:NoSchedule", "team=shop:NoExecute"]
        );
    }

    #[test]
    fn the_date_of_an_answer_is_a_moment() {
        let moment = http_date("Sat, 21 Nov 2026 12:36:16 GMT").unwrap();
        assert_eq!(moment.to_string(), "2026-11-21T12:36:16Z");
    }

    #[test]
    fn cilium_is_exclusive_unless_it_says_otherwise() {
        let config = json!({"data": {"kube-proxy-replacement": "true"}});
        let expected = Cilium {
            socket_lb: true,
            host_namespace_only: false,
            cni_exclusive: true,
        };
        assert_eq!(cilium(&config), expected);
        let config = json!({"data": {"bpf-lb-sock": "false", "cni-exclusive": "false"}});
        assert_eq!(cilium(&config), Cilium::default());
    }

    #[test]
    fn the_last_line_of_what_a_daemon_said_is_its_error() {
        let pod = json!({
            "metadata": {
                "name": "warren-node-x",
                "labels": {"app.kubernetes.io/name": "warren-node"},
                "creationTimestamp": "2026-11-21T12:00:00Z",
            },
            "spec": {"nodeName": "n1", "containers": [{"image": "i"}]},
            "status": {"containerStatuses": [{
                "restartCount": 4,
                "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}},
                "lastState": {"terminated": {"message": "starting\nerror: the kernel is too old\n"}},
            }]},
        });
        let pod = own_pod(&pod, &[], "2026-11-21T12:01:00Z".parse().unwrap()).unwrap();
        assert_eq!(pod.last_words.as_deref(), Some("error: the kernel is too old"));
        assert_eq!((pod.age_seconds, pod.restarts, pod.is_daemon), (60, 4, true));
    }

    #[test]
    fn a_sample_is_found_by_name_and_label() {
        let text = "# HELP x\nwarren_kernel_decisions_total{reason=\"drop-strict\"} 3\n\
                    warren_kernel_decisions_total{reason=\"drop-strict-from-node-address\"} 4\nother 1\n";
        let report = crate::cli::check::facts::Report {
            samples: samples(text),
            ..Default::default()
        };
        assert_eq!(
            report.metric("warren_kernel_decisions_total", "drop-strict\""),
            Some(3.0)
        );
        assert_eq!(report.metric("warren_kernel_decisions_total", ""), Some(7.0));
        assert_eq!(report.metric("warren_kernel", ""), None);
    }

    #[test]
    fn the_namespaces_label_makes_a_pod_wanted_and_the_annotation_captured() {
        let namespaces = [Namespace {
            name: "shop".into(),
            labels: [(DATAPLANE_MODE.to_owned(), "ambient".to_owned())].into(),
        }];
        let object = json!({
            "metadata": {"namespace": "shop", "name": "web", "uid": "u1", "annotations": {REDIRECTION: "enabled"}},
            "spec": {"nodeName": "n1"},
            "status": {"phase": "Running"},
        });
        let pod = pod(&object, &namespaces, &BTreeMap::new(), Timestamp::default());
        assert!(pod.wanted && pod.captured && pod.running);
    }

    #[test]
    fn a_bundles_name_and_key_are_those_that_the_daemons_mount() {
        let objects = crate::cli::manifests::all().unwrap();
        let daemons = objects.iter().find(|object| object.kind() == "DaemonSet").unwrap();
        assert_eq!(
            bundle_of(&daemons.value),
            ("warren-ca-root".into(), "root-cert.pem".into())
        );
        assert!(asks_own_controller(&daemons.value));
        let sent = daemon_set(&daemons.value, &[]).audience;
        let controller = objects.iter().find(|object| object.kind() == "Deployment").unwrap();
        assert_eq!(sent, deployment(&controller.value, &[]).audience);
    }
}

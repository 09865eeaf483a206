//! What `warren check` knows about a cluster. Plain values: gathered by `gather`, judged by `diagnose`.

use k8s_openapi::{api::networking::v1::NetworkPolicy, jiff::Timestamp};
use std::collections::BTreeMap;

pub(super) type Labels = BTreeMap<String, String>;

#[derive(Debug, Clone, Default)]
pub(crate) struct Facts {
    /// The clock of the API server, or this machine's where it tells none.
    pub(super) now: Timestamp,
    /// This command's.
    pub(super) version: String,
    /// Warren is about to be installed: that it is not there is no fault.
    pub(super) before_install: bool,
    /// Why the API server does not answer; then nothing else is known.
    pub(super) api_away: Option<String>,
    /// What could not be read, and why: `(what, why)`.
    pub(super) unreadable: Vec<(String, String)>,

    /// Of the API server, as `(1, 36)`.
    pub(super) kubernetes: Option<(u32, u32)>,
    pub(super) nodes: Vec<Node>,
    pub(super) others: Others,
    pub(super) definitions: Vec<Definition>,
    pub(super) missing_rights: Vec<Right>,

    pub(super) namespace: Option<OwnNamespace>,
    pub(super) controller: Option<Workload>,
    pub(super) daemons: Option<Workload>,
    pub(super) own_pods: Vec<OwnPod>,
    pub(super) authority: Authority,

    pub(super) namespaces: Vec<Namespace>,
    pub(super) pods: Vec<Pod>,
    pub(super) network_policies: Vec<NetworkPolicy>,
    /// PeerAuthentications of mode STRICT, as `namespace/name`.
    pub(super) strict: Vec<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Node {
    pub(super) name: String,
    /// As `uname -r` has it.
    pub(super) kernel: String,
    /// `linux` or `windows`.
    pub(super) system: String,
    /// `amd64`, `arm64` …
    pub(super) architecture: String,
    /// Why it is not ready, in the kubelet's or the node controller's words.
    pub(super) not_ready: Option<String>,
    /// What it is short of: `DiskPressure`, `MemoryPressure`, `PIDPressure`.
    pub(super) pressures: Vec<String>,
    /// Those that keep new pods away, as `kubectl taint` writes them: `key=value:NoSchedule`.
    pub(super) taints: Vec<String>,
}

/// Software that lives on the same nodes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Others {
    pub(super) cilium: Option<Cilium>,
    pub(super) calico: Option<Calico>,
    /// The AWS VPC plugin's `NETWORK_POLICY_ENFORCING_MODE`.
    pub(super) aws_policy_mode: Option<String>,
    /// DaemonSets of Istio's own ambient mode, as `namespace/name`.
    pub(super) ambient: Vec<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Cilium {
    /// `bpf-lb-sock`, or a replaced kube-proxy.
    pub(super) socket_lb: bool,
    /// `bpf-lb-sock-hostns-only`
    pub(super) host_namespace_only: bool,
    /// `cni-exclusive`
    pub(super) cni_exclusive: bool,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Calico {
    pub(super) bpf: bool,
    /// `bpfConnectTimeLoadBalancing`: `TCP` unless set.
    pub(super) connect_time_balancing: String,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Definition {
    pub(super) name: String,
    pub(super) present: bool,
    /// Versions that are served.
    pub(super) served: Vec<String>,
}

/// A verb that an account lacks, or the person.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Right {
    /// A service account's name; `None` for the person.
    pub(super) account: Option<String>,
    pub(super) verb: String,
    /// `pods`, `daemonsets.apps`, or with a name behind a slash.
    pub(super) resource: String,
    /// `None`: in all of them.
    pub(super) namespace: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct OwnNamespace {
    /// `pod-security.kubernetes.io/enforce`
    pub(super) pod_security: Option<String>,
}

/// The controller's Deployment, or the daemons' DaemonSet.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Workload {
    pub(super) wanted: u64,
    pub(super) ready: u64,
    pub(super) image: String,
    /// `app.kubernetes.io/version`
    pub(super) version: String,
    /// Audience of the projected token (daemons), or the one that is taken (controller).
    pub(super) audience: Option<String>,
    /// Where the controller refuses to make pods: the newest such Event's message.
    pub(super) cannot_create: Option<String>,
}

/// A pod of Warren's own.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct OwnPod {
    pub(super) name: String,
    pub(super) is_daemon: bool,
    pub(super) node: Option<String>,
    pub(super) ready: bool,
    pub(super) age_seconds: i64,
    pub(super) image: String,
    pub(super) restarts: u64,
    /// Why the container waits: `ImagePullBackOff`, `CrashLoopBackOff` …, and the message behind it.
    pub(super) waiting: Option<(String, String)>,
    /// What it said at its last end.
    pub(super) last_words: Option<String>,
    /// Why no node takes it, in the scheduler's words.
    pub(super) unschedulable: Option<String>,
    /// What its newest warning says: volumes that cannot be mounted …
    pub(super) obstacle: Option<String>,
    pub(super) report: Option<Report>,
}

/// What a daemon tells about itself.
#[derive(Debug, Clone, Default, PartialEq)]
pub(super) struct Report {
    /// How far its clock is from the API server's, in seconds.
    pub(super) clock_ahead: Option<i64>,
    /// Samples of its metrics, name and labels as they are written.
    pub(super) samples: Vec<(String, f64)>,
    /// Conditions that its readiness still waits for: a line each.
    pub(super) waits_for: Vec<String>,
}

impl Report {
    /// The sum of a metric's samples whose text has `label` in it. `None` if there is no such metric.
    pub(super) fn metric(&self, name: &str, label: &str) -> Option<f64> {
        let is_it = |text: &str| {
            let rest = text.strip_prefix(name);
            rest.is_some_and(|rest| (rest.is_empty() || rest.starts_with('{')) && rest.contains(label))
        };
        let mut values = self
            .samples
            .iter()
            .filter(|(text, _)| is_it(text))
            .map(|(_, value)| *value);
        let first = values.next()?;
        Some(values.fold(first, |sum, value| sum + value))
    }
}

/// The root of trust, as the cluster keeps it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Authority {
    /// Nodes are told to use another one than Warren's controller.
    pub(super) external: bool,
    /// Where the root is kept; `None` if there is no such Secret, or it may not be read.
    pub(super) secret: Option<Secret>,
    /// Certificates that nodes are told to trust, by their DER; `None` if there is no such ConfigMap.
    pub(super) bundle: Option<Vec<Root>>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Secret {
    pub(super) name: String,
    pub(super) roots: Vec<Root>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Root {
    pub(super) der: Vec<u8>,
    pub(super) not_before: Timestamp,
    pub(super) not_after: Timestamp,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Namespace {
    pub(super) name: String,
    pub(super) labels: Labels,
}

/// A pod that is not Warren's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Pod {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) labels: Labels,
    pub(super) node: Option<String>,
    pub(super) running: bool,
    /// Since its containers run.
    pub(super) age_seconds: i64,
    /// It should be in the mesh.
    pub(super) wanted: bool,
    /// The annotation says that it is.
    pub(super) captured: bool,
    /// What the newest Event about its capture says.
    pub(super) failure: Option<String>,
    /// What its label asks for, where that is no word of ours.
    pub(super) odd_mode: Option<String>,
}

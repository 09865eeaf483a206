//! The mesh's own state in numbers, all named `warren_…`. What others hold (kernel counters, certificates) is read at each
//! scrape through [`Live`]. A reason is a name from a closed set, never an error's text.

use crate::shutdown::Shutdown;
use parking_lot::Mutex;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabel, EncodeLabelSet, EncodeMetric, LabelSetEncoder, MetricEncoder},
    metrics::{
        MetricType,
        counter::{ConstCounter, Counter},
        family::Family,
        gauge::{ConstGauge, Gauge},
        info::Info,
    },
    registry::Registry,
};
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::{Instant, SystemTime},
};

/// Who opened an HBONE connection or tunnel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HboneSide {
    /// We dialled.
    Client,
    /// We accepted.
    Server,
}

impl HboneSide {
    fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Server => "server",
        }
    }
}

/// How a request to the certificate authority ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CaOutcome {
    Signed,
    /// The CA said no.
    Refused,
    /// The CA did not answer, or could not be reached.
    Unavailable,
    /// What it sent is no certificate that we can use.
    Unusable,
}

impl CaOutcome {
    fn name(self) -> &'static str {
        match self {
            Self::Signed => "signed",
            Self::Refused => "refused",
            Self::Unavailable => "unavailable",
            Self::Unusable => "unusable",
        }
    }
}

/// A label set of one label, with a value from a closed set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct One(&'static str, &'static str);

impl EncodeLabelSet for One {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        (self.0, self.1).encode(encoder.encode_label())
    }
}

/// Counters and gauges that the parts of the daemon set.
#[derive(Debug)]
pub struct Gauges {
    captured_pods: Gauge,
    capture_failures: Family<One, Counter>,
    ca_requests: Family<One, Counter>,
    hbone_connections: Family<One, Gauge>,
    hbone_tunnels: Family<One, Gauge>,
    snapshot_version: Gauge,
    snapshot_at: Arc<Mutex<Option<Instant>>>,
}

/// Keeps a gauge one higher for as long as it lives.
#[derive(Debug)]
#[must_use = "the gauge goes down when this is dropped"]
pub struct Open(Gauge);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.dec();
    }
}

impl Gauges {
    pub(super) fn new(registry: &mut Registry) -> Self {
        let snapshot_at: Arc<Mutex<Option<Instant>>> = Arc::default();
        let gauges = Self {
            captured_pods: Gauge::default(),
            capture_failures: Family::default(),
            ca_requests: Family::default(),
            hbone_connections: Family::default(),
            hbone_tunnels: Family::default(),
            snapshot_version: Gauge::default(),
            snapshot_at: Arc::clone(&snapshot_at),
        };
        registry.register(
            "build",
            "Which build this is",
            Info::new([("version", env!("CARGO_PKG_VERSION"))]),
        );
        registry.register(
            "captured_pods",
            "Pods of this node that are captured",
            gauges.captured_pods.clone(),
        );
        registry.register(
            "capture_failures",
            "Failed attempts to capture a pod, by reason, without those that pass as a pod starts or ends",
            gauges.capture_failures.clone(),
        );
        registry.register(
            "ca_requests",
            "Requests to the certificate authority, by outcome",
            gauges.ca_requests.clone(),
        );
        registry.register(
            "hbone_connections",
            "Open HBONE connections, by our side of them",
            gauges.hbone_connections.clone(),
        );
        registry.register(
            "hbone_tunnels",
            "Open tunnels in HBONE connections, by our side",
            gauges.hbone_tunnels.clone(),
        );
        registry.register(
            "snapshot_version",
            "Number of the published mesh snapshot",
            gauges.snapshot_version.clone(),
        );
        for side in [HboneSide::Client, HboneSide::Server] {
            drop(gauges.hbone_connections.get_or_create(&One("side", side.name())));
            drop(gauges.hbone_tunnels.get_or_create(&One("side", side.name())));
        }
        let age = Live::gauge(
            "snapshot_age_seconds",
            "Time since a mesh snapshot was last published",
            move || {
                let age = snapshot_at.lock().map(|at| at.elapsed().as_secs_f64());
                age.map(|age| LiveSample::new([], age)).into_iter().collect()
            },
        );
        registry.register_collector(Box::new(age));
        gauges
    }

    pub fn set_captured_pods(&self, pods: usize) {
        self.captured_pods.set(i64::try_from(pods).unwrap_or(i64::MAX));
    }

    pub fn capture_failed(&self, reason: &'static str) {
        self.capture_failures.get_or_create(&One("reason", reason)).inc();
    }

    pub fn ca_request(&self, outcome: CaOutcome) {
        self.ca_requests.get_or_create(&One("outcome", outcome.name())).inc();
    }

    pub fn hbone_connection(&self, side: HboneSide) -> Open {
        open(&self.hbone_connections, side)
    }

    pub fn hbone_tunnel(&self, side: HboneSide) -> Open {
        open(&self.hbone_tunnels, side)
    }

    pub fn snapshot_published(&self, version: u64) {
        self.snapshot_version.set(i64::try_from(version).unwrap_or(i64::MAX));
        *self.snapshot_at.lock() = Some(Instant::now());
    }
}

fn open(family: &Family<One, Gauge>, side: HboneSide) -> Open {
    let gauge = family.get_or_create_owned(&One("side", side.name()));
    gauge.inc();
    Open(gauge)
}

/// One value of a [`Live`] metric.
#[derive(Debug, Clone, PartialEq)]
pub struct LiveSample {
    pub labels: Vec<(&'static str, String)>,
    pub value: f64,
}

impl LiveSample {
    pub fn new<const N: usize>(labels: [(&'static str, String); N], value: f64) -> Self {
        Self {
            labels: labels.into(),
            value,
        }
    }
}

impl EncodeLabelSet for LiveSample {
    fn encode(&self, encoder: &mut LabelSetEncoder<'_>) -> Result<(), fmt::Error> {
        self.labels.as_slice().encode(encoder)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Counter,
    Gauge,
}

/// A metric whose values are asked for at each scrape. The closure must not block.
pub struct Live {
    name: &'static str,
    help: &'static str,
    kind: Kind,
    read: Box<dyn Fn() -> Vec<LiveSample> + Send + Sync>,
}

impl Live {
    pub fn counter(
        name: &'static str,
        help: &'static str,
        read: impl Fn() -> Vec<LiveSample> + Send + Sync + 'static,
    ) -> Self {
        Self {
            name,
            help,
            kind: Kind::Counter,
            read: Box::new(read),
        }
    }

    pub fn gauge(
        name: &'static str,
        help: &'static str,
        read: impl Fn() -> Vec<LiveSample> + Send + Sync + 'static,
    ) -> Self {
        Self {
            name,
            help,
            kind: Kind::Gauge,
            read: Box::new(read),
        }
    }
}

/// The metrics that are read elsewhere, by name.
impl Live {
    /// (reason, how often), over all processors.
    pub fn kernel_decisions(read: impl Fn() -> Vec<(String, u64)> + Send + Sync + 'static) -> Self {
        Self::counter(
            "kernel_decisions",
            "Decisions of the kernel programs, by reason",
            move || {
                read()
                    .into_iter()
                    .map(|(reason, n)| LiveSample::new([("reason", reason)], n as f64))
                    .collect()
            },
        )
    }

    /// (identity, when its certificate ends).
    pub fn certificate_expiry(read: impl Fn() -> Vec<(String, SystemTime)> + Send + Sync + 'static) -> Self {
        let seconds = |end: SystemTime| end.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs() as f64;
        Self::gauge(
            "certificate_expiry_timestamp_seconds",
            "When the certificate of an identity ends, in Unix time",
            move || {
                read()
                    .into_iter()
                    .map(|(id, end)| LiveSample::new([("identity", id)], seconds(end)))
                    .collect()
            },
        )
    }

    /// (name of the flaw, how many objects or fields have it now).
    pub fn manifest_errors(read: impl Fn() -> Vec<(&'static str, u64)> + Send + Sync + 'static) -> Self {
        Self::gauge(
            "manifest_errors",
            "Objects that are not understood at the moment, by flaw",
            move || {
                read()
                    .into_iter()
                    .map(|(flaw, n)| LiveSample::new([("flaw", flaw.to_owned())], n as f64))
                    .collect()
            },
        )
    }

    pub fn cni_installed(is_installed: Arc<AtomicBool>) -> Self {
        Self::gauge(
            "cni_installed",
            "1 if the CNI plugin is in its place, at the last look",
            move || vec![LiveSample::new([], f64::from(is_installed.load(Relaxed)))],
        )
    }

    pub fn tasks(shutdown: Shutdown) -> Self {
        Self::gauge("tasks", "Running tasks, by name", move || {
            let tasks = shutdown.tasks().into_iter();
            tasks
                .map(|(name, n)| LiveSample::new([("task", name.to_owned())], n as f64))
                .collect()
        })
    }

    pub fn task_panics(shutdown: Shutdown) -> Self {
        Self::counter("task_panics", "Tasks that panicked", move || {
            vec![LiveSample::new([], shutdown.panics() as f64)]
        })
    }
}

impl fmt::Debug for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Live")
            .field("name", &self.name)
            .field("kind", &self.kind)
            .finish_non_exhaustive()
    }
}

impl Live {
    fn encode_one(&self, value: f64, encoder: MetricEncoder<'_>) -> Result<(), fmt::Error> {
        match self.kind {
            Kind::Counter => ConstCounter::new(value).encode(encoder),
            Kind::Gauge => ConstGauge::new(value).encode(encoder),
        }
    }
}

impl Collector for Live {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let metric_type = match self.kind {
            Kind::Counter => MetricType::Counter,
            Kind::Gauge => MetricType::Gauge,
        };
        let mut family = encoder.encode_descriptor(self.name, self.help, None, metric_type)?;
        for sample in (self.read)() {
            if sample.labels.is_empty() {
                // It is the only one; an empty pair of braces would trouble some readers.
                return self.encode_one(sample.value, family);
            }
            self.encode_one(sample.value, family.encode_family(&sample)?)?;
        }
        Ok(())
    }
}

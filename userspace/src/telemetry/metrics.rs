//! The counters of connections, under Istio's names: interned per label set, moving while a connection is open, expiring
//! with the pods they tell of. The mesh's own state is in `gauges`; who serves the text is `admin`.

use super::{
    Gauges,
    gauges::{Live, LiveSample},
    labels::{ConnectionFacts, Place, ResponseFlags},
    logging, process,
    series::{Connections, Series},
};
use crate::{
    mesh::{MeshSnapshot, WorkloadUid},
    shutdown::Shutdown,
};
use parking_lot::RwLock;
use prometheus_client::{collector::Collector, encoding::text, registry::Registry};
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};
use tokio::sync::watch;

pub use super::series::Bounds;

/// How often series are looked at that nobody may need any more.
const SWEEP: Duration = Duration::from_secs(60);

/// Everything that is counted.
#[derive(Debug)]
pub struct Metrics {
    pub gauges: Gauges,
    registry: RwLock<Registry>,
    connections: Arc<Connections>,
}

/// The counters of one connection, opened when this is made and closed at the latest when it is dropped.
#[derive(Debug)]
pub struct ConnectionMetrics {
    series: Arc<Series>,
    sent: AtomicU64,
    received: AtomicU64,
    closed: AtomicBool,
}

impl Metrics {
    pub fn new(place: Place) -> Arc<Self> {
        Self::bounded(place, Bounds::default())
    }

    pub fn bounded(place: Place, bounds: Bounds) -> Arc<Self> {
        let connections = Arc::new(Connections::new(place, bounds));
        let mut registry = Registry::default();
        registry.register_collector(Box::new(Arc::clone(&connections)));
        let gauges = Gauges::new(registry.sub_registry_with_prefix("warren"));
        registry.register_collector(Box::new(process::Process));
        let dropped = "Lines of log and access log dropped because nobody took them in time";
        registry
            .sub_registry_with_prefix("warren")
            .register_collector(Box::new(Live::counter("log_lines_dropped", dropped, || {
                vec![LiveSample::new([], logging::dropped() as f64)]
            })));
        Arc::new(Self {
            gauges,
            registry: RwLock::new(registry),
            connections,
        })
    }

    /// Counts a connection as opened. Refused ones count as well: they are opened, and closed with the reason as flags.
    pub fn connection(&self, facts: &ConnectionFacts) -> ConnectionMetrics {
        let series = self.connections.series(facts);
        series.opened.fetch_add(1, Relaxed);
        ConnectionMetrics {
            series,
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            closed: AtomicBool::new(false),
        }
    }

    /// Everything, as OpenMetrics text.
    pub fn encode(&self) -> String {
        let mut text = String::with_capacity(16 * 1024);
        match text::encode(&mut text, &self.registry.read()) {
            Ok(()) => text,
            // Writing to a String does not fail; a collector that does has nothing more to tell.
            Err(fmt::Error) => text,
        }
    }

    /// Adds a collector that is read at each scrape, its names prefixed with `warren_`.
    pub fn register(&self, collector: impl Collector) {
        let mut registry = self.registry.write();
        registry
            .sub_registry_with_prefix("warren")
            .register_collector(Box::new(collector));
    }

    /// Forgets the series that no connection holds and whose pods are gone, for five minutes by now.
    pub fn expire(&self, now: Instant, lives: impl Fn(&WorkloadUid) -> bool) {
        self.connections.expire(now, lives);
    }

    /// Notes published snapshots and expires series until the drain begins.
    pub async fn upkeep(self: Arc<Self>, mut snapshot: watch::Receiver<Arc<MeshSnapshot>>, shutdown: Shutdown) {
        let draining = shutdown.draining();
        tokio::pin!(draining);
        let mut sweep = tokio::time::interval(SWEEP);
        sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = &mut draining => return,
                changed = snapshot.changed() => match changed {
                    Ok(()) => self.gauges.snapshot_published(snapshot.borrow_and_update().version),
                    Err(_) => return,
                },
                _ = sweep.tick() => {
                    let current = Arc::clone(&snapshot.borrow());
                    self.expire(Instant::now(), |uid| current.workloads.contains_key(uid));
                }
            }
        }
    }
}

impl ConnectionMetrics {
    /// Bytes that the server sent towards the client, whoever reports.
    pub fn sent(&self, bytes: u64) {
        self.sent.fetch_add(bytes, Relaxed);
        self.series.sent.fetch_add(bytes, Relaxed);
    }

    /// Bytes that the client sent towards the server, whoever reports.
    pub fn received(&self, bytes: u64) {
        self.received.fetch_add(bytes, Relaxed);
        self.series.received.fetch_add(bytes, Relaxed);
    }

    /// Counts the end, once; any flags but `-` also count as a failure. Without it, dropping counts an end without flags.
    pub fn closed(&self, flags: ResponseFlags) {
        if !self.closed.swap(true, Relaxed) {
            self.series.closed[flags as usize].fetch_add(1, Relaxed);
        }
    }

    /// Bytes that the server has sent so far.
    pub fn sent_bytes(&self) -> u64 {
        self.sent.load(Relaxed)
    }

    /// Bytes that the client has sent so far.
    pub fn received_bytes(&self) -> u64 {
        self.received.load(Relaxed)
    }
}

impl Drop for ConnectionMetrics {
    fn drop(&mut self) {
        self.closed(ResponseFlags::None);
        self.series.release();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::telemetry::{
        gauges::{CaOutcome, HboneSide},
        series::KEPT,
        testing,
    };

    fn metrics() -> Arc<Metrics> {
        Metrics::new(Place::default())
    }

    /// The samples of one metric, without its name.
    fn samples(metrics: &Metrics, name: &str) -> Vec<String> {
        let text = metrics.encode();
        let mut found: Vec<String> = text
            .lines()
            .filter_map(|line| {
                line.strip_prefix(name)
                    .filter(|rest| rest.starts_with(['{', ' ']))
                    .map(str::to_owned)
            })
            .collect();
        found.sort();
        found
    }

    fn value(metrics: &Metrics, name: &str, part: &str) -> Option<u64> {
        let samples = samples(metrics, name);
        let mut found = samples
            .iter()
            .filter(|s| s.contains(part))
            .map(|s| s.rsplit(' ').next().unwrap().parse().unwrap());
        let first = found.next();
        assert!(found.next().is_none(), "{name}{part} is not one series: {samples:?}");
        first
    }

    #[test]
    fn a_connection_moves_the_five_counters_with_every_label() {
        let metrics = metrics();
        let connection = metrics.connection(&testing::mesh_facts());
        connection.sent(358);
        connection.received(80);
        connection.received(4);
        let labels = |flags: &str| {
            format!(
                "{{reporter=\"source\",source_workload=\"echo-1\",source_canonical_service=\"echo-1\",\
                 source_canonical_revision=\"latest\",source_workload_namespace=\"ambient\",\
                 source_principal=\"spiffe://cluster.local/ns/ambient/sa/echo-1\",source_app=\"echo\",source_version=\"v1\",\
                 source_cluster=\"Kubernetes\",destination_service=\"echo-2.ambient.svc.cluster.local\",\
                 destination_service_namespace=\"ambient\",destination_service_name=\"echo-2\",\
                 destination_workload=\"echo-2\",destination_canonical_service=\"echo-2\",\
                 destination_canonical_revision=\"latest\",destination_workload_namespace=\"ambient\",\
                 destination_principal=\"spiffe://cluster.local/ns/ambient/sa/echo-2\",destination_app=\"echo-2\",\
                 destination_version=\"latest\",destination_cluster=\"Kubernetes\",request_protocol=\"tcp\",\
                 response_flags=\"{flags}\",connection_security_policy=\"mutual_tls\"}}"
            )
        };
        assert_eq!(
            samples(&metrics, "istio_tcp_connections_opened_total"),
            [labels("-") + " 1"]
        );
        assert_eq!(
            samples(&metrics, "istio_tcp_sent_bytes_total"),
            [labels("-") + " 358"],
            "while it is open"
        );
        assert_eq!(
            samples(&metrics, "istio_tcp_received_bytes_total"),
            [labels("-") + " 84"],
            "while it is open"
        );
        assert_eq!(
            samples(&metrics, "istio_tcp_connections_closed_total"),
            [labels("-") + " 0"]
        );
        connection.closed(ResponseFlags::None);
        drop(connection);
        assert_eq!(
            samples(&metrics, "istio_tcp_connections_closed_total"),
            [labels("-") + " 1"],
            "and once only"
        );
        assert_eq!(samples(&metrics, "istio_tcp_connections_failed_total"), [""; 0]);
        metrics.connection(&testing::mesh_facts()).closed(ResponseFlags::Deny);
        let closed = samples(&metrics, "istio_tcp_connections_closed_total");
        assert_eq!(closed, [labels("-") + " 1", labels("DENY") + " 1"]);
        assert_eq!(
            samples(&metrics, "istio_tcp_connections_failed_total"),
            [labels("DENY") + " 1"]
        );
    }

    #[test]
    fn what_is_not_known_is_said_to_be_unknown() {
        let metrics = metrics();
        drop(metrics.connection(&ConnectionFacts {
            destination: None,
            ..testing::stranger_facts()
        }));
        let samples = samples(&metrics, "istio_tcp_connections_opened_total");
        let labels = samples[0]
            .trim_matches(['{', '}'])
            .split(',')
            .filter(|label| label.contains("=\"unknown\""))
            .count();
        assert_eq!(
            labels, 20,
            "all but reporter, request_protocol and response_flags: {samples:?}"
        );
    }

    #[test]
    fn every_flag_has_istios_name() {
        let metrics = metrics();
        for flags in ResponseFlags::ALL {
            metrics.connection(&testing::mesh_facts()).closed(flags);
        }
        for name in [
            "-",
            "DENY",
            "CONNECT",
            "TLS_FAILURE",
            "H2_HANDSHAKE_FAILURE",
            "NETWORK_POLICY",
            "IDENTITY_ERROR",
        ] {
            let flag = format!("response_flags=\"{name}\"");
            assert_eq!(
                value(&metrics, "istio_tcp_connections_closed_total", &flag),
                Some(1),
                "{name}"
            );
            let failed = value(&metrics, "istio_tcp_connections_failed_total", &flag);
            assert_eq!(failed, (name != "-").then_some(1), "{name}");
        }
    }

    #[test]
    fn label_values_are_escaped() {
        let metrics = metrics();
        let mut facts = testing::mesh_facts();
        facts.source = Some(Arc::new(testing::workload("u", "p", "a", &[("app", "a\"b\\c\nd")])));
        drop(metrics.connection(&facts));
        assert!(metrics.encode().contains(r#"source_app="a\"b\\c\nd","#));
    }

    #[test]
    fn pods_of_one_owner_share_one_series() {
        let metrics = metrics();
        for uid in ["a", "b", "c"] {
            let mut facts = testing::mesh_facts();
            facts.source = Some(Arc::new(testing::workload(uid, uid, "echo-1", &[])));
            drop(metrics.connection(&facts));
        }
        assert_eq!(
            value(
                &metrics,
                "istio_tcp_connections_opened_total",
                "source_workload=\"echo-1\""
            ),
            Some(3)
        );
    }

    #[test]
    fn new_labels_of_a_pod_count_from_its_next_connection() {
        let metrics = metrics();
        for version in ["v1", "v2", "v1"] {
            let mut facts = testing::mesh_facts();
            facts.source = Some(Arc::new(testing::workload(
                "uid-1",
                "p",
                "echo-1",
                &[("version", version)],
            )));
            drop(metrics.connection(&facts));
        }
        assert_eq!(
            value(&metrics, "istio_tcp_connections_opened_total", "source_version=\"v1\""),
            Some(2)
        );
        assert_eq!(
            value(&metrics, "istio_tcp_connections_opened_total", "source_version=\"v2\""),
            Some(1)
        );
    }

    #[test]
    fn series_expire_when_their_pods_are_gone_and_nobody_is_connected() {
        let metrics = metrics();
        let begin = Instant::now();
        let all = |_: &WorkloadUid| true;
        let gone = |uid: &WorkloadUid| &*uid.0 != "uid-1";
        let there = || samples(&metrics, "istio_tcp_connections_opened_total").len();
        let connection = metrics.connection(&testing::mesh_facts());

        metrics.expire(begin, all);
        metrics.expire(begin + 100 * KEPT, all);
        assert_eq!(there(), 1, "a pair of living pods is kept, used or not");
        metrics.expire(begin + 101 * KEPT, gone);
        metrics.expire(begin + 102 * KEPT, gone);
        assert_eq!(there(), 1, "someone is still connected");
        drop(connection);
        metrics.expire(begin + 103 * KEPT, gone);
        assert_eq!(there(), 1, "the last bytes are to be seen");
        metrics.expire(begin + 104 * KEPT - Duration::from_secs(1), gone);
        assert_eq!(there(), 1);
        metrics.expire(begin + 104 * KEPT, gone);
        assert_eq!(there(), 0);
    }

    #[test]
    fn a_pair_that_is_used_again_is_kept_though_a_pod_is_not_in_the_snapshot() {
        let metrics = metrics();
        let begin = Instant::now();
        drop(metrics.connection(&testing::mesh_facts()));
        for round in 0..10 {
            drop(metrics.connection(&testing::mesh_facts()));
            metrics.expire(begin + round * KEPT, |_| false);
        }
        assert_eq!(value(&metrics, "istio_tcp_connections_opened_total", "{"), Some(11));
    }

    #[test]
    fn memory_is_bounded_whoever_connects() {
        let metrics = Metrics::bounded(Place::default(), Bounds { series: 10, pairs: 5 });
        for n in 0..1000 {
            let mut facts = testing::mesh_facts();
            facts.source = Some(Arc::new(testing::workload(
                &format!("u{n}"),
                "p",
                &format!("owner-{}", n % 20),
                &[],
            )));
            drop(metrics.connection(&facts));
        }
        assert_eq!(metrics.connections.sizes(), (10, 5));
        assert_eq!(samples(&metrics, "istio_tcp_connections_opened_total").len(), 11);
        let overflow = value(
            &metrics,
            "istio_tcp_connections_opened_total",
            "source_workload=\"unknown\"",
        );
        assert_eq!(overflow, Some(500), "none is lost");
        assert_eq!(value(&metrics, "warren_series_overflow_total", " "), Some(500));
    }

    #[test]
    fn the_meshs_own_state_is_told() {
        let metrics = metrics();
        metrics.gauges.set_captured_pods(2);
        metrics.gauges.capture_failed("map_full");
        metrics.register(Live::manifest_errors(|| vec![("missing", 2)]));
        metrics.register(Live::certificate_expiry(|| {
            vec![(testing::identity("echo-1").to_string(), *testing::NOW)]
        }));
        metrics.gauges.ca_request(CaOutcome::Signed);
        metrics.gauges.snapshot_published(7);
        let tunnel = metrics.gauges.hbone_tunnel(HboneSide::Client);
        metrics.register(Live::kernel_decisions(|| vec![("steer_mesh".into(), 5)]));
        let text = metrics.encode();
        for line in [
            "warren_captured_pods 2",
            "warren_capture_failures_total{reason=\"map_full\"} 1",
            "warren_manifest_errors{flaw=\"missing\"} 2.0",
            "warren_certificate_expiry_timestamp_seconds{identity=\"spiffe://cluster.local/ns/ambient/sa/echo-1\"} 1724254325.0",
            "warren_log_lines_dropped_total 0.0",
            "warren_ca_requests_total{outcome=\"signed\"} 1",
            "warren_snapshot_version 7",
            "warren_hbone_tunnels{side=\"client\"} 1",
            "warren_hbone_connections{side=\"server\"} 0",
            "# TYPE warren_kernel_decisions counter",
            "warren_kernel_decisions_total{reason=\"steer_mesh\"} 5.0",
            concat!("warren_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1"),
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in:\n{text}");
        }
        drop(tunnel);
        assert!(metrics.encode().contains("warren_hbone_tunnels{side=\"client\"} 0\n"));
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn the_process_tells_what_it_uses() {
        let text = metrics().encode();
        let value = |name: &str| -> f64 {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
            line.unwrap_or_else(|| panic!("{name} is not in:\n{text}"))
                .parse()
                .unwrap()
        };
        assert!(value("process_resident_memory_bytes") > 1e6);
        assert!(value("process_open_fds") >= 3.0);
        assert!(value("process_cpu_seconds_total") >= 0.0);
        assert!(value("process_start_time_seconds") > 1.7e9);
    }
}

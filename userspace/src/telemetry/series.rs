//! Series of connections: found cheaply by the pair of pods, shared by label set, and forgotten when nobody needs them.
//! What is counted in them is `metrics`' matter.

use super::labels::{ConnectionFacts, Labels, Place, Reporter, ResponseFlags, Sample, SecurityPolicy};
use crate::mesh::{SpiffeId, Workload, WorkloadUid, service::ServiceKey};
use parking_lot::RwLock;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, NoLabelSet},
    metrics::{MetricType, counter::ConstCounter},
};
use std::{
    borrow::Borrow,
    collections::{HashMap, HashSet},
    fmt,
    hash::{Hash, Hasher},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, Instant},
};

/// How long a series stays after its pods are gone and its last connection ended: the look-back of a Prometheus query,
/// so that the last bytes are seen.
pub(super) const KEPT: Duration = Duration::from_secs(5 * 60);
/// The most that is remembered, so that nobody's pods or principals can fill the memory.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Label sets. What comes later is counted under labels that are all `unknown`.
    pub series: usize,
    /// Pairs of pods whose label set is remembered. What comes later is looked up by its labels, which costs more.
    pub pairs: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            series: 10_000,
            pairs: 65_536,
        }
    }
}

#[derive(Debug)]
pub(super) struct Connections {
    place: Place,
    bounds: Bounds,
    table: RwLock<Table>,
    overflow: [Arc<Series>; 2],
    overflowed: AtomicU64,
}

#[derive(Debug, Default)]
struct Table {
    pairs: HashMap<Pair, Known>,
    series: HashSet<ByLabels>,
}

/// What tells one pair of pods from another; cheap to make of a connection's facts.
#[derive(Debug, PartialEq, Eq, Hash)]
struct Pair {
    reporter: Reporter,
    source: Option<WorkloadUid>,
    destination: Option<WorkloadUid>,
    service: Option<ServiceKey>,
    source_principal: Option<SpiffeId>,
    destination_principal: Option<SpiffeId>,
    security: SecurityPolicy,
}

#[derive(Debug)]
struct Known {
    /// Of these the labels were made: another pod object under the same UID may have other labels.
    source: Option<Arc<Workload>>,
    destination: Option<Arc<Workload>>,
    series: Arc<Series>,
    used: AtomicBool,
    last_used: Instant,
}

#[derive(Debug)]
pub(super) struct Series {
    labels: Labels,
    pub(super) opened: AtomicU64,
    pub(super) sent: AtomicU64,
    pub(super) received: AtomicU64,
    pub(super) closed: [AtomicU64; ResponseFlags::ALL.len()],
    /// Connections that hold it, and the sweep's note of when it last saw one.
    open: AtomicU64,
    unused_since: parking_lot::Mutex<Option<Instant>>,
}

impl Connections {
    pub(super) fn new(place: Place, bounds: Bounds) -> Self {
        let overflow = [Reporter::Source, Reporter::Destination].map(|r| Arc::new(Series::new(Labels::unknown(r))));
        Self {
            place,
            bounds,
            table: RwLock::default(),
            overflow,
            overflowed: AtomicU64::new(0),
        }
    }

    /// Label sets and pairs that are remembered.
    #[cfg(test)]
    pub(super) fn sizes(&self) -> (usize, usize) {
        let table = self.table.read();
        (table.series.len(), table.pairs.len())
    }

    pub(super) fn series(&self, facts: &ConnectionFacts) -> Arc<Series> {
        let pair = Pair::new(facts);
        if let Some(known) = self.table.read().pairs.get(&pair)
            && known.is_of(facts)
        {
            if !known.used.load(Relaxed) {
                known.used.store(true, Relaxed);
            }
            return known.series.hold();
        }
        let labels = Labels::new(facts, &self.place);
        let mut table = self.table.write();
        let series = match table.series.get(&labels) {
            Some(ByLabels(series)) => series.hold(),
            None if table.series.len() >= self.bounds.series => {
                self.overflowed.fetch_add(1, Relaxed);
                return self.overflow[facts.reporter as usize].hold();
            }
            None => {
                let series = Arc::new(Series::new(labels));
                table.series.insert(ByLabels(Arc::clone(&series)));
                series.hold()
            }
        };
        if table.pairs.len() < self.bounds.pairs || table.pairs.contains_key(&pair) {
            let known = Known {
                source: facts.source.clone(),
                destination: facts.destination.clone(),
                series: Arc::clone(&series),
                used: AtomicBool::new(true),
                last_used: Instant::now(),
            };
            table.pairs.insert(pair, known);
        }
        series
    }

    pub(super) fn expire(&self, now: Instant, lives: impl Fn(&WorkloadUid) -> bool) {
        let mut table = self.table.write();
        let table = &mut *table;
        table.pairs.retain(|pair, known| {
            if known.used.swap(false, Relaxed) {
                known.last_used = now;
            }
            let mut ends = [&pair.source, &pair.destination].into_iter().flatten().peekable();
            let here = ends.peek().is_some() && ends.all(&lives);
            here || now.saturating_duration_since(known.last_used) < KEPT
        });
        let held: HashSet<*const Series> = table.pairs.values().map(|known| Arc::as_ptr(&known.series)).collect();
        table.series.retain(|ByLabels(series)| {
            let used = series.open.load(Relaxed) > 0 || held.contains(&Arc::as_ptr(series));
            let mut unused_since = series.unused_since.lock();
            if used {
                *unused_since = None;
                return true;
            }
            now.saturating_duration_since(*unused_since.get_or_insert(now)) < KEPT
        });
    }
}

impl Pair {
    fn new(facts: &ConnectionFacts) -> Self {
        Self {
            reporter: facts.reporter,
            source: facts.source.as_ref().map(|w| w.uid.clone()),
            destination: facts.destination.as_ref().map(|w| w.uid.clone()),
            service: facts.service.clone(),
            source_principal: facts.source_principal.clone(),
            destination_principal: facts.destination_principal.clone(),
            security: facts.security,
        }
    }
}

impl Known {
    fn is_of(&self, facts: &ConnectionFacts) -> bool {
        let same = |a: &Option<Arc<Workload>>, b: &Option<Arc<Workload>>| match (a, b) {
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            (None, None) => true,
            (Some(_), None) | (None, Some(_)) => false,
        };
        same(&self.source, &facts.source) && same(&self.destination, &facts.destination)
    }
}

impl Series {
    fn new(labels: Labels) -> Self {
        Self {
            labels,
            opened: AtomicU64::new(0),
            sent: AtomicU64::new(0),
            received: AtomicU64::new(0),
            closed: std::array::from_fn(|_| AtomicU64::new(0)),
            open: AtomicU64::new(0),
            unused_since: parking_lot::Mutex::new(None),
        }
    }

    /// Must be called with the table locked: the sweep must not see it unheld in between.
    fn hold(self: &Arc<Self>) -> Arc<Self> {
        self.open.fetch_add(1, Relaxed);
        Arc::clone(self)
    }

    /// A connection that held it does no more.
    pub(super) fn release(&self) {
        self.open.fetch_sub(1, Relaxed);
    }

    fn closed(&self, flags: ResponseFlags) -> u64 {
        self.closed[flags as usize].load(Relaxed)
    }
}

/// A series in a set that is searched by its labels.
#[derive(Debug)]
struct ByLabels(Arc<Series>);

impl Borrow<Labels> for ByLabels {
    fn borrow(&self) -> &Labels {
        &self.0.labels
    }
}

impl Hash for ByLabels {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.labels.hash(state);
    }
}

impl PartialEq for ByLabels {
    fn eq(&self, other: &Self) -> bool {
        self.0.labels == other.0.labels
    }
}

impl Eq for ByLabels {}

impl Collector for Connections {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let mut all: Vec<Arc<Series>> = self.table.read().series.iter().map(|s| Arc::clone(&s.0)).collect();
        all.extend(
            self.overflow
                .iter()
                .filter(|s| s.opened.load(Relaxed) > 0)
                .map(Arc::clone),
        );
        let all = &all;
        let unflagged = [ResponseFlags::None].as_slice();
        let every = ResponseFlags::ALL.as_slice();
        let mut family =
            |name: &str, help: &str, flags: &[ResponseFlags], read: &dyn Fn(&Series, ResponseFlags) -> u64| {
                let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
                for series in all {
                    for &flags in flags {
                        let value = read(series, flags);
                        // A flag that never occurred has no series of its own.
                        if value > 0 || flags == ResponseFlags::None {
                            let sample = Sample {
                                labels: &series.labels,
                                flags,
                            };
                            ConstCounter::new(value).encode(family.encode_family(&sample)?)?;
                        }
                    }
                }
                Ok(())
            };
        family(
            "istio_tcp_connections_opened",
            "The total number of TCP connections opened",
            unflagged,
            &|s, _| s.opened.load(Relaxed),
        )?;
        family(
            "istio_tcp_connections_closed",
            "The total number of TCP connections closed",
            every,
            &Series::closed,
        )?;
        family(
            "istio_tcp_connections_failed",
            "The total number of TCP connections refused",
            &every[1..],
            &Series::closed,
        )?;
        family(
            "istio_tcp_sent_bytes",
            "The size of total bytes sent during response in case of a TCP connection",
            unflagged,
            &|s, _| s.sent.load(Relaxed),
        )?;
        family(
            "istio_tcp_received_bytes",
            "The size of total bytes received during request in case of a TCP connection",
            unflagged,
            &|s, _| s.received.load(Relaxed),
        )?;
        let mut overflowed = encoder.encode_descriptor(
            "warren_series_overflow",
            "Connections counted under unknown labels, because there are too many label sets",
            None,
            MetricType::Counter,
        )?;
        overflowed.encode_counter::<NoLabelSet, _, u64>(&self.overflowed.load(Relaxed), None)
    }
}

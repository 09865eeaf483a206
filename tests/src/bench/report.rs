//! What a run found, as JSON for machines and as a table for people.

use std::time::Duration;

use comfy_table::{Cell, CellAlignment, ContentArrangement, Table, presets};
use serde::Serialize;

use super::cost::Ends;
use super::row::{Reading, Row, Unit};
use super::{Lane, Options, Outcome, Path};

/// The JSON of a run.
#[derive(Debug, Serialize)]
pub struct Report {
    rows: Vec<RowReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    daemon: Option<DaemonReport>,
    settings: Settings,
}

#[derive(Debug, Serialize)]
struct RowReport {
    name: &'static str,
    path: Path,
    unit: Unit,
    #[serde(skip_serializing_if = "Option::is_none")]
    plain: Option<LaneReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    floor: Option<LaneReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    mesh: Option<LaneReport>,
    /// Mesh to plain: the median of the rounds' ratios.
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ratio_floor: Option<f64>,
    /// Floor to plain.
    #[serde(skip_serializing_if = "Option::is_none")]
    floor_ratio: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

#[derive(Debug, Serialize)]
struct LaneReport {
    #[serde(flatten)]
    value: Spread,
    #[serde(flatten)]
    latency: Option<Latency>,
    #[serde(skip_serializing_if = "Option::is_none")]
    beside_other_pod_us: Option<f64>,
    /// CPU seconds of daemons or relays, for a GB (10⁹ bytes) or 100,000 operations.
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_s: Option<EndsReport>,
}

/// Medians over the rounds.
#[derive(Debug, Serialize)]
struct Latency {
    p50_us: f64,
    p99_us: f64,
    p999_us: f64,
}

#[derive(Debug, Default, PartialEq, Serialize)]
struct DaemonReport {
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_s_per_gb: Option<EndsReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    floor_cpu_s_per_gb: Option<EndsReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_s_per_100k_connections: Option<EndsReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    floor_cpu_s_per_100k_connections: Option<EndsReport>,
    /// With 32 workers instead of one.
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu_s_per_100k_connections_32: Option<EndsReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    floor_cpu_s_per_100k_connections_32: Option<EndsReport>,
    /// The larger of the two daemons.
    #[serde(skip_serializing_if = "Option::is_none")]
    rss_mb_idle: Option<f64>,
    /// The larger of the two sides.
    #[serde(skip_serializing_if = "Option::is_none")]
    kb_per_connection: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    kb_per_connection_sides: Option<EndsReport>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ready_ms: Option<f64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
struct EndsReport {
    source: f64,
    destination: f64,
}

#[derive(Debug, Serialize)]
struct Settings {
    rounds: usize,
    seconds: f64,
    pinned: bool,
    congestion_control: &'static str,
    /// In the namespaces of the clients.
    tcp_tw_reuse: u8,
    processor: String,
    kernel: String,
}

impl Report {
    pub fn new(options: &Options, outcome: &Outcome) -> Self {
        let mut rows = Vec::new();
        for path in &options.paths {
            for row in &options.rows {
                rows.push(row_report(outcome, *path, *row));
            }
        }
        Self {
            daemon: daemon_report(&rows, outcome),
            rows,
            settings: settings(options),
        }
    }

    /// The table, followed by the daemon's figures, one line each.
    pub fn text(&self) -> String {
        let mut table = Table::new();
        table
            .load_style(presets::UTF8_FULL_CONDENSED)
            .set_content_arrangement(ContentArrangement::Dynamic);
        let header = [
            "row",
            "path",
            "unit",
            "plain",
            "floor",
            "mesh",
            "mesh/plain",
            "mesh/floor",
            "floor/plain",
        ];
        table.set_header(header);
        for column in 3..header.len() {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        for row in &self.rows {
            let lane = |lane: &Option<LaneReport>| {
                Cell::new(lane.as_ref().map(|lane| lane.text(row.unit)).unwrap_or_default())
            };
            let ratio = |ratio: Option<f64>| Cell::new(ratio.map(|ratio| format!("{ratio:.3}")).unwrap_or_default());
            table.add_row(vec![
                Cell::new(row.name),
                Cell::new(format!("{:?}", row.path).to_lowercase()),
                Cell::new(row.unit.text()),
                lane(&row.plain),
                lane(&row.floor),
                lane(&row.mesh),
                ratio(row.ratio),
                ratio(row.ratio_floor),
                ratio(row.floor_ratio),
            ]);
        }
        let Settings {
            rounds,
            seconds,
            pinned,
            congestion_control,
            processor,
            kernel,
            ..
        } = &self.settings;
        let mut text = format!("{table}\n");
        if let Some(daemon) = &self.daemon {
            text.push_str(&daemon.text());
        }
        text.push_str(&format!(
            "Medians of {rounds} rounds of {seconds} s, in brackets min and max; {}; {congestion_control}; tcp_tw_reuse=1 in the \
             clients' namespaces; {processor}, Linux {kernel}.\n",
            if *pinned { "node A on CPU 0, node B on CPU 1" } else { "not pinned" },
        ));
        text
    }
}

impl Unit {
    fn text(self) -> &'static str {
        match self {
            Self::GigabitsPerSecond => "Gbit/s",
            Self::PerSecond => "1/s",
            Self::Microseconds => "p50 µs",
        }
    }
}

impl LaneReport {
    fn new(row: Row, readings: &[Reading]) -> Option<Self> {
        let value = spread(readings.iter().map(|reading| reading.value))?;
        let latencies: Vec<_> = readings.iter().filter_map(|reading| reading.latency).collect();
        let of = |pick: fn(&crate::load::Percentiles) -> f64| median(latencies.iter().map(pick));
        let latency = of(|latency| latency.p50_us)
            .zip(of(|latency| latency.p99_us))
            .zip(of(|latency| latency.p999_us));
        Some(Self {
            value,
            latency: latency.map(|((p50_us, p99_us), p999_us)| Latency {
                p50_us,
                p99_us,
                p999_us,
            }),
            beside_other_pod_us: median(readings.iter().filter_map(|reading| reading.beside_other_pod)),
            cpu_s: row.cost_unit().and_then(|unit| cost(unit, readings)),
        })
    }

    fn text(&self, unit: Unit) -> String {
        let number = |value: f64| match unit {
            Unit::GigabitsPerSecond => format!("{value:.2}"),
            Unit::PerSecond | Unit::Microseconds => format!("{value:.0}"),
        };
        let Spread { median, min, max } = self.value;
        let mut text = format!("{} ({}–{})", number(median), number(min), number(max));
        if let Some(other) = self.beside_other_pod_us {
            text.push_str(&format!("\nother pod {other:.0} µs"));
        }
        if let Some(EndsReport { source, destination }) = self.cpu_s {
            text.push_str(&format!("\nCPU {source:.2} + {destination:.2}"));
        }
        if self.beside_other_pod_us.is_none()
            && let Some(Latency {
                p50_us,
                p99_us,
                p999_us,
            }) = self.latency
        {
            text.push_str(&format!("\n{p50_us:.0} / {p99_us:.0} / {p999_us:.0} µs"));
        }
        text
    }
}

/// CPU seconds for `unit` bytes or operations, over all rounds together.
fn cost(unit: f64, readings: &[Reading]) -> Option<EndsReport> {
    let amount: u64 = readings.iter().map(|reading| reading.amount).sum();
    let mut ends = [0.0; 2];
    for reading in readings {
        let spent = reading.spent?;
        ends = [ends[0] + spent[0], ends[1] + spent[1]];
    }
    (amount > 0).then(|| ends.map(|seconds| seconds * unit / amount as f64).into())
}

fn row_report(outcome: &Outcome, path: Path, row: Row) -> RowReport {
    let readings = |lane| {
        outcome
            .readings
            .get(&(path, row, lane))
            .map(Vec::as_slice)
            .unwrap_or_default()
    };
    let ratio = |over, under| {
        let pairs = readings(over).iter().zip(readings(under));
        row.has_ratio()
            .then(|| median(pairs.map(|(over, under): (&Reading, &Reading)| over.value / under.value)))?
    };
    RowReport {
        name: row.name(),
        path,
        unit: row.unit(),
        plain: LaneReport::new(row, readings(Lane::Plain)),
        floor: LaneReport::new(row, readings(Lane::Floor)),
        mesh: LaneReport::new(row, readings(Lane::Mesh)),
        ratio: ratio(Lane::Mesh, Lane::Plain),
        ratio_floor: ratio(Lane::Mesh, Lane::Floor),
        floor_ratio: ratio(Lane::Floor, Lane::Plain),
    }
}

fn daemon_report(rows: &[RowReport], outcome: &Outcome) -> Option<DaemonReport> {
    let cross = |wanted: Row| {
        rows.iter()
            .find(|row| row.path == Path::Cross && row.name == wanted.name())
    };
    let mesh = |row| cross(row)?.mesh.as_ref()?.cpu_s;
    let floor = |row| cross(row)?.floor.as_ref()?.cpu_s;
    let report = DaemonReport {
        cpu_s_per_gb: mesh(Row::Throughput1),
        floor_cpu_s_per_gb: floor(Row::Throughput1),
        cpu_s_per_100k_connections: mesh(Row::Connect1),
        floor_cpu_s_per_100k_connections: floor(Row::Connect1),
        cpu_s_per_100k_connections_32: mesh(Row::Connect32),
        floor_cpu_s_per_100k_connections_32: floor(Row::Connect32),
        rss_mb_idle: outcome
            .memory
            .map(|memory| memory.idle[0].max(memory.idle[1]) as f64 / 1024.0),
        kb_per_connection: outcome
            .memory
            .map(|memory| memory.per_connection[0].max(memory.per_connection[1])),
        kb_per_connection_sides: outcome.memory.map(|memory| memory.per_connection.into()),
        ready_ms: median(outcome.ready.iter().map(Duration::as_secs_f64)).map(|seconds| seconds * 1000.0),
    };
    (report != DaemonReport::default()).then_some(report)
}

impl From<Ends> for EndsReport {
    fn from([source, destination]: Ends) -> Self {
        Self { source, destination }
    }
}

impl DaemonReport {
    fn text(&self) -> String {
        let mut text = String::new();
        let pairs = [
            ("CPU seconds per GB", self.cpu_s_per_gb, self.floor_cpu_s_per_gb),
            (
                "CPU seconds per 100,000 connections, one worker",
                self.cpu_s_per_100k_connections,
                self.floor_cpu_s_per_100k_connections,
            ),
            (
                "CPU seconds per 100,000 connections, 32 workers",
                self.cpu_s_per_100k_connections_32,
                self.floor_cpu_s_per_100k_connections_32,
            ),
        ];
        for (what, mesh, floor) in pairs {
            let ends = |ends: EndsReport| format!("{:.3} + {:.3}", ends.source, ends.destination);
            let sum = |ends: EndsReport| ends.source + ends.destination;
            match (mesh, floor) {
                (Some(mesh), Some(floor)) => text.push_str(&format!(
                    "{what}: daemons {}, floor {} ({:.2} of it)\n",
                    ends(mesh),
                    ends(floor),
                    sum(mesh) / sum(floor)
                )),
                (Some(mesh), None) => text.push_str(&format!("{what}: daemons {}\n", ends(mesh))),
                (None, Some(floor)) => text.push_str(&format!("{what}: floor {}\n", ends(floor))),
                (None, None) => {}
            }
        }
        if let (Some(idle), Some(sides)) = (self.rss_mb_idle, self.kb_per_connection_sides) {
            text.push_str(&format!(
                "Resident: {idle:.1} MB idle, {:.2} + {:.2} KB an open connection\n",
                sides.source, sides.destination
            ));
        }
        if let Some(ready) = self.ready_ms {
            text.push_str(&format!("Ready after {ready:.0} ms, with two pods and no pins\n"));
        }
        text
    }
}

fn settings(options: &Options) -> Settings {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    let processor = read("/proc/cpuinfo")
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map(|(_, name)| name.to_owned());
    Settings {
        rounds: options.rounds,
        seconds: options.time.as_secs_f64(),
        pinned: options.pin,
        congestion_control: "cubic",
        tcp_tw_reuse: 1,
        processor: processor.unwrap_or_default(),
        kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
    }
}

fn spread(values: impl Iterator<Item = f64>) -> Option<Spread> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    let (min, max) = (*values.first()?, *values.last()?);
    let middle = values.len() / 2;
    let median = if values.len() % 2 == 1 {
        values[middle]
    } else {
        f64::midpoint(values[middle - 1], values[middle])
    };
    Some(Spread { median, min, max })
}

fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    spread(values).map(|spread| spread.median)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(value: f64) -> Reading {
        Reading {
            value,
            latency: None,
            beside_other_pod: None,
            amount: 1,
            spent: None,
        }
    }

    #[test]
    fn the_median_of_an_even_count_lies_between_the_middle_two() {
        assert_eq!(
            spread([4.0, 1.0, 3.0, 2.0].into_iter()),
            Some(Spread {
                median: 2.5,
                min: 1.0,
                max: 4.0
            })
        );
        assert_eq!(spread(std::iter::empty()), None);
    }

    #[test]
    fn ratios_are_taken_round_by_round() {
        let mut outcome = Outcome::default();
        // The machine was half as fast in the second round: the ratio is the same in both.
        let mut put = |lane, values: [f64; 2]| {
            outcome
                .readings
                .insert((Path::Cross, Row::Request1, lane), values.map(reading).to_vec())
        };
        put(Lane::Plain, [100.0, 50.0]);
        put(Lane::Floor, [80.0, 40.0]);
        put(Lane::Mesh, [60.0, 30.0]);
        let report = row_report(&outcome, Path::Cross, Row::Request1);
        assert_eq!(
            (report.ratio, report.ratio_floor, report.floor_ratio),
            (Some(0.6), Some(0.75), Some(0.8))
        );
    }

    #[test]
    fn the_json_has_the_agreed_names() {
        let mut outcome = Outcome::default();
        for lane in [Lane::Plain, Lane::Floor, Lane::Mesh] {
            outcome
                .readings
                .insert((Path::Same, Row::Throughput1Reverse, lane), vec![reading(2.0)]);
        }
        let json =
            serde_json::to_value(row_report(&outcome, Path::Same, Row::Throughput1Reverse)).expect("it serializes");
        assert_eq!(json["name"], "throughput-1-reverse");
        assert_eq!(json["path"], "same");
        assert_eq!(
            json["plain"],
            serde_json::json!({"median": 2.0, "min": 2.0, "max": 2.0})
        );
        assert_eq!(json["ratio"], 1.0);
        assert_eq!(json["ratio_floor"], 1.0);
    }
}

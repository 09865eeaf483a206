//! The figures: as JSON for machines, as a table for people.

use std::time::Duration;

use anyhow::Result;
use comfy_table::{Table, presets};
use serde::Serialize;

use super::change::Changed;
use super::daemon::{Daemon, Spent};
use super::objects::{PODS_PER_NODE, PODS_PER_SERVICE};

/// For so many nodes it is said what they would ask.
const NODES: u64 = 1_000;
const MIB: f64 = 1024.0 * 1024.0;

/// One size of the cluster. Times are milliseconds, memory is MiB; what has no other word for it is of the time in which
/// the cluster was changed.
#[derive(Debug, Clone, Serialize)]
pub struct Point {
    pub pods: usize,
    pub services: usize,
    pub nodes: usize,
    /// Pods of the node whose daemon is measured.
    pub own_pods: usize,
    /// Writes that the API server took a second.
    pub changes_per_s: f64,
    pub seconds: f64,
    /// Resident after the changes.
    pub rss_mb: f64,
    /// The most that ever was.
    pub rss_peak_mb: f64,
    pub cpu_cores: f64,
    pub cpu_cores_idle: f64,
    /// What one change costs beyond idling.
    pub cpu_ms_per_change: f64,
    pub change_to_snapshot_ms_p50: f64,
    pub change_to_snapshot_ms_p99: f64,
    pub change_to_snapshot_ms_max: f64,
    pub api_requests: u64,
    pub api_bytes: u64,
    pub api_requests_per_s_idle: f64,
    /// Until the daemon had read the cluster and come to rest.
    pub api_requests_initial: u64,
    pub api_bytes_initial: u64,
    /// From the daemon's start to its first snapshot.
    pub first_snapshot_ms: f64,
}

/// What a thousand daemons would ask of the API server together, by the last point.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Together {
    pub nodes: u64,
    pub requests_per_s: f64,
    pub mb_per_s: f64,
    pub initial_requests: u64,
    pub initial_mb: f64,
}

#[derive(Debug, Default, Serialize)]
pub struct Report {
    pub points: Vec<Point>,
    pub all_nodes: Together,
}

impl Point {
    /// `spent`: until it came to rest, while nothing happened, while the cluster was changed.
    pub(super) fn new(
        pods: usize,
        daemon: &Daemon,
        changed: &Changed,
        latencies: &[Duration],
        [initial, idle, spent]: [Spent; 3],
    ) -> Result<Self> {
        let (resident, most) = daemon.resident()?;
        let seconds = changed.took.as_secs_f64();
        let share = percentiles(latencies);
        Ok(Self {
            pods,
            services: pods / PODS_PER_SERVICE,
            nodes: pods / PODS_PER_NODE,
            own_pods: PODS_PER_NODE,
            changes_per_s: round(changed.writes as f64 / seconds),
            seconds: round(seconds),
            rss_mb: round(resident),
            rss_peak_mb: round(most),
            cpu_cores: round(spent.cpu.as_secs_f64() / seconds),
            cpu_cores_idle: idle.cpu.as_secs_f64(),
            cpu_ms_per_change: spent.cpu.as_secs_f64() * 1e3 / changed.writes as f64,
            change_to_snapshot_ms_p50: share(0.5),
            change_to_snapshot_ms_p99: share(0.99),
            change_to_snapshot_ms_max: share(1.0),
            api_requests: spent.api_requests,
            api_bytes: spent.api_bytes,
            api_requests_per_s_idle: idle.api_requests as f64,
            api_requests_initial: initial.api_requests,
            api_bytes_initial: initial.api_bytes,
            first_snapshot_ms: round(daemon.read_in.as_secs_f64() * 1e3),
        })
    }

    /// What was counted while nothing happened becomes what it is a second.
    pub(super) fn idle_over(mut self, time: Duration) -> Self {
        let idle = self.cpu_cores_idle / time.as_secs_f64();
        let changes = self.changes_per_s.max(1.0);
        self.cpu_ms_per_change = round((self.cpu_ms_per_change - idle * 1e3 / changes).max(0.0));
        self.cpu_cores_idle = round(idle);
        self.api_requests_per_s_idle = round(self.api_requests_per_s_idle / time.as_secs_f64());
        self
    }

    pub(super) fn line(&self) -> String {
        format!(
            "{} MiB, {} cores, p50 {} ms, p99 {} ms",
            self.rss_mb, self.cpu_cores, self.change_to_snapshot_ms_p50, self.change_to_snapshot_ms_p99
        )
    }
}

impl Report {
    pub(super) fn conclude(&mut self) {
        let Some(last) = self.points.last() else { return };
        self.all_nodes = Together {
            nodes: NODES,
            requests_per_s: round(last.api_requests as f64 / last.seconds * NODES as f64),
            mb_per_s: round(last.api_bytes as f64 / MIB / last.seconds * NODES as f64),
            initial_requests: last.api_requests_initial * NODES,
            initial_mb: round(last.api_bytes_initial as f64 / MIB * NODES as f64),
        };
    }

    pub fn text(&self) -> String {
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED).set_header([
            "pods",
            "services",
            "changes/s",
            "RSS (peak) MiB",
            "CPU cores (idle)",
            "ms of CPU a change",
            "p50 ms",
            "p99 ms",
            "API requests",
            "API MiB",
            "at start",
        ]);
        for point in &self.points {
            table.add_row([
                point.pods.to_string(),
                point.services.to_string(),
                point.changes_per_s.to_string(),
                format!("{} ({})", point.rss_mb, point.rss_peak_mb),
                format!("{} ({})", point.cpu_cores, point.cpu_cores_idle),
                point.cpu_ms_per_change.to_string(),
                point.change_to_snapshot_ms_p50.to_string(),
                point.change_to_snapshot_ms_p99.to_string(),
                point.api_requests.to_string(),
                round(point.api_bytes as f64 / MIB).to_string(),
                format!(
                    "{} requests, {} MiB, {} ms",
                    point.api_requests_initial,
                    round(point.api_bytes_initial as f64 / MIB),
                    point.first_snapshot_ms
                ),
            ]);
        }
        let Together {
            nodes,
            requests_per_s,
            mb_per_s,
            initial_requests,
            initial_mb,
        } = &self.all_nodes;
        format!(
            "{table}\n{nodes} nodes would ask for {requests_per_s} requests and {mb_per_s} MiB a second of such changes, and for \
             {initial_requests} requests and {initial_mb} MiB if all of them started at once.\n"
        )
    }
}

fn round(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}

/// The smallest of the times, in milliseconds, that a share of them does not exceed.
fn percentiles(times: &[Duration]) -> impl Fn(f64) -> f64 {
    let mut times = times.to_vec();
    times.sort();
    move |share| {
        let place = (times.len() as f64 * share).ceil() as usize;
        let time = times.get(place.saturating_sub(1)).copied().unwrap_or_default();
        round(time.as_secs_f64() * 1e3)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_known_times() {
        let times: Vec<Duration> = (1..=1_000).rev().map(Duration::from_millis).collect();
        let share = percentiles(&times);
        assert_eq!([share(0.5), share(0.99), share(1.0)], [500.0, 990.0, 1_000.0]);
        assert_eq!(percentiles(&[])(0.5), 0.0);
    }
}

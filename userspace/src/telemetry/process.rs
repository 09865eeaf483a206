//! What this process uses, under the names that every Prometheus client has, read from `/proc/self`.

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric},
    metrics::{MetricType, counter::ConstCounter, gauge::ConstGauge},
};
use std::{fmt, fs};

#[derive(Debug)]
pub(super) struct Process;

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let Some(usage) = read() else { return Ok(()) };
        let counter = encoder.encode_descriptor(
            "process_cpu_seconds",
            "User and system time spent, in seconds",
            None,
            MetricType::Counter,
        )?;
        ConstCounter::new(usage.cpu_seconds).encode(counter)?;
        for (name, help, value) in [
            ("process_resident_memory_bytes", "Resident memory", usage.resident_bytes),
            (
                "process_start_time_seconds",
                "When the process started, in Unix time",
                usage.started_seconds,
            ),
            ("process_open_fds", "Open file descriptors", usage.open_files),
        ] {
            ConstGauge::new(value).encode(encoder.encode_descriptor(name, help, None, MetricType::Gauge)?)?;
        }
        Ok(())
    }
}

struct Usage {
    cpu_seconds: f64,
    resident_bytes: f64,
    started_seconds: f64,
    open_files: f64,
}

fn read() -> Option<Usage> {
    let stat = fs::read_to_string("/proc/self/stat").ok()?;
    let boot = fs::read_to_string("/proc/stat").ok()?;
    let boot: f64 = boot
        .lines()
        .find_map(|line| line.strip_prefix("btime "))?
        .trim()
        .parse()
        .ok()?;
    // Without the entry that the count itself needs.
    let open_files = fs::read_dir("/proc/self/fd").ok()?.count().saturating_sub(1);
    let (ticks, pages, started) = fields(&stat)?;
    let hertz = per_second()?;
    Some(Usage {
        cpu_seconds: ticks / hertz,
        resident_bytes: pages * nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok()?? as f64,
        started_seconds: boot + started / hertz,
        open_files: open_files as f64,
    })
}

fn per_second() -> Option<f64> {
    Some(nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok()?? as f64)
}

/// CPU ticks, resident pages and start (ticks after boot) of `/proc/PID/stat`.
fn fields(stat: &str) -> Option<(f64, f64, f64)> {
    // The second field is the process's name, in brackets, with whatever is in it.
    let after_name: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let field = |number: usize| after_name.get(number - 3)?.parse::<f64>().ok();
    Some((field(14)? + field(15)?, field(24)?, field(22)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_brackets_and_spaces_moves_no_field() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 0 0 0 30 12 0 0 20 0 3 0 5000 1000000 256 18446744073709551615";
        assert_eq!(fields(stat), Some((42.0, 256.0, 5000.0)));
        assert_eq!(fields("7 (a"), None);
    }
}

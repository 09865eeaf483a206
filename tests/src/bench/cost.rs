//! What the daemons and the floor's relays spend: CPU time and resident memory, from `/proc`.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

use super::Lane;
use super::field::Field;
use super::row::{Reading, Row, Unit};
use crate::mesh::Mesh;
use crate::topology::Node;

/// Linux counts CPU time for user space in hundredths of a second, whatever its own clock.
const TICKS_PER_SECOND: f64 = 100.0;

/// CPU seconds at the source's and at the destination's end.
pub type Ends = [f64; 2];

/// A measurement of CPU time that has begun.
pub struct Cost {
    lane: Lane,
    before: Option<Ends>,
}

impl Cost {
    pub fn begin(field: &Field, mesh: Option<&mut Mesh>, lane: Lane) -> Result<Self> {
        Ok(Self {
            lane,
            before: cpu(field, mesh, lane)?,
        })
    }

    /// What was spent since [`Cost::begin`]; nothing for plain.
    pub fn end(self, field: &Field, mesh: Option<&mut Mesh>) -> Result<Option<Ends>> {
        let after = cpu(field, mesh, self.lane)?;
        Ok(self
            .before
            .zip(after)
            .map(|(before, after)| [after[0] - before[0], after[1] - before[1]]))
    }
}

fn cpu(field: &Field, mesh: Option<&mut Mesh>, lane: Lane) -> Result<Option<Ends>> {
    let pids = match lane {
        Lane::Plain => None,
        Lane::Floor => field.floor_pids(),
        Lane::Mesh => mesh.map(daemon_pids),
    };
    pids.map(|[source, destination]| Ok([cpu_seconds(source)?, cpu_seconds(destination)?]))
        .transpose()
}

fn daemon_pids(mesh: &mut Mesh) -> [u32; 2] {
    Node::BOTH.map(|node| mesh.daemon_mut(node).process().pid())
}

/// User and system time of a process, in seconds.
fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid} is gone"))?;
    ticks_in(&stat)
        .map(|ticks| ticks as f64 / TICKS_PER_SECOND)
        .context("parse /proc/PID/stat")
}

fn ticks_in(stat: &str) -> Option<u64> {
    // The second field, the command in parentheses, may hold anything; counting starts behind it.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let (user, system): (u64, u64) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
    Some(user + system)
}

/// Sums over a run of what one lane spent on the cross path.
#[derive(Debug, Clone, Copy, Default)]
pub struct Costs {
    bulk: Spent,
    connect_1: Spent,
    connect_32: Spent,
}

#[derive(Debug, Clone, Copy, Default)]
struct Spent {
    seconds: Ends,
    amount: u64,
}

impl Costs {
    pub fn add(&mut self, row: Row, reading: &Reading, spent: Option<Ends>) {
        let sum = match row {
            Row::Throughput1 => &mut self.bulk,
            Row::Connect1 => &mut self.connect_1,
            Row::Connect32 => &mut self.connect_32,
            Row::Throughput8 | Row::Throughput1Reverse | Row::Request1 | Row::Request32 | Row::RequestBesideBulk => {
                return;
            }
        };
        if let Some(spent) = spent {
            debug_assert!(row.unit() != Unit::Microseconds);
            sum.seconds = [sum.seconds[0] + spent[0], sum.seconds[1] + spent[1]];
            sum.amount += reading.amount;
        }
    }

    /// CPU seconds for 10⁹ bytes, one stream.
    pub fn per_gigabyte(&self) -> Option<Ends> {
        self.bulk.per(1e9)
    }

    /// CPU seconds for 100,000 connections, one worker.
    pub fn per_100k_connections(&self) -> Option<Ends> {
        self.connect_1.per(1e5)
    }

    /// CPU seconds for 100,000 connections, 32 workers.
    pub fn per_100k_connections_32(&self) -> Option<Ends> {
        self.connect_32.per(1e5)
    }
}

impl Spent {
    fn per(&self, amount: f64) -> Option<Ends> {
        (self.amount > 0).then(|| self.seconds.map(|seconds| seconds * amount / self.amount as f64))
    }
}

/// Resident memory of the two daemons.
#[derive(Debug, Clone, Copy)]
pub struct Memory {
    /// KiB, before any traffic.
    pub idle: [u64; 2],
    /// KiB an open connection adds, source and destination.
    pub per_connection: [f64; 2],
}

/// KiB of each daemon once it has stopped growing.
pub fn resident_when_settled(mesh: &mut Mesh) -> Result<[u64; 2]> {
    let mut last = resident(mesh)?;
    for _ in 0..20 {
        std::thread::sleep(Duration::from_millis(250));
        let now = resident(mesh)?;
        if now == last {
            break;
        }
        last = now;
    }
    Ok(last)
}

fn resident(mesh: &mut Mesh) -> Result<[u64; 2]> {
    let [source, destination] = daemon_pids(mesh);
    Ok([resident_kib(source)?, resident_kib(destination)?])
}

fn resident_kib(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("process {pid} is gone"))?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .context("no VmRSS")?;
    line.trim().trim_end_matches(" kB").parse().context("parse VmRSS")
}

/// Holds `count` connections open and says what each adds.
pub fn memory(field: &Field, mesh: &mut Mesh, idle: [u64; 2], count: usize) -> Result<Memory> {
    let before = resident_when_settled(mesh)?;
    let held = field.hold(count)?;
    let after = resident_when_settled(mesh)?;
    drop(held);
    let per = |end: usize| after[end].saturating_sub(before[end]) as f64 / count as f64;
    Ok(Memory {
        idle,
        per_connection: [per(0), per(1)],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_found_behind_a_command_with_spaces_and_parentheses() {
        let stat = "12 (a) b (c) S 1 12 12 0 -1 4194560 100 0 0 0 250 50 0 0 20 0 1 0 100 0 0";
        assert_eq!(ticks_in(stat), Some(300));
    }
}

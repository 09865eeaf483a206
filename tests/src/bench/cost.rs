//! What the daemons and the floor's relays spend: CPU time and resident memory, from `/proc`.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

use super::field::Field;
use super::{Lane, Path};
use crate::mesh::Mesh;
use crate::process::resident_kib;
use crate::topology::Node;

/// Linux counts CPU time for user space in hundredths of a second, whatever its own clock.
const TICKS_PER_SECOND: f64 = 100.0;

/// CPU seconds at the source's and at the destination's end.
pub type Ends = [f64; 2];

/// The processes that carry a lane's path, at each end; none for plain.
pub type Carriers = Option<[Option<u32>; 2]>;

/// Who carries a lane's path. On one node a single daemon is both ends, and counts as the source.
pub fn carriers(field: &Field, mesh: Option<&mut Mesh>, lane: Lane, path: Path) -> Carriers {
    match lane {
        Lane::Plain => None,
        Lane::Floor => Some(field.floor_pids(path)),
        Lane::Mesh => mesh.map(|mesh| {
            let [a, b] = daemon_pids(mesh);
            [Some(a), (path == Path::Cross).then_some(b)]
        }),
    }
}

/// CPU seconds that the carriers have used since they started.
pub fn spent(carriers: Carriers) -> Result<Option<Ends>> {
    let Some([source, destination]) = carriers else {
        return Ok(None);
    };
    let of = |pid: Option<u32>| pid.map_or(Ok(0.0), cpu_seconds);
    Ok(Some([of(source)?, of(destination)?]))
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

//! The benchmark: plain, floor and mesh side by side, round by round, on one machine. Measures; judges nothing.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use crate::mesh::Mesh;

pub mod cost;
pub mod field;
pub mod report;
pub mod row;

use field::Field;
use row::{Reading, Row};

/// How the client reaches the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Lane {
    /// Pod to pod, as if there were no mesh.
    Plain,
    /// Through the bare pair of relays.
    Floor,
    Mesh,
}

/// Where the server is, seen from the client.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Path {
    /// On the other node.
    Cross,
    /// On the client's own node.
    Same,
}

/// What is asked for.
#[derive(Debug, Clone)]
pub struct Options {
    /// Of the names of all namespaces: two runs with different ones do not meet, but measure each other along.
    pub prefix: String,
    pub pin: bool,
    pub rounds: usize,
    /// Length of one measurement.
    pub time: Duration,
    pub rows: Vec<Row>,
    pub lanes: Vec<Lane>,
    pub paths: Vec<Path>,
    pub memory: bool,
    pub ready: bool,
    /// Connections held open for the memory figure.
    pub held: usize,
    /// More arguments of the floor's relays and of the daemons.
    pub floor_args: Vec<String>,
    pub node_args: Vec<String>,
    /// Keep the logs of the daemons here.
    pub logs: Option<PathBuf>,
}

/// All readings of a run, in the order of the rounds.
pub type Readings = BTreeMap<(Path, Row, Lane), Vec<Reading>>;

/// What a run found.
#[derive(Debug, Default)]
pub struct Outcome {
    pub readings: Readings,
    pub memory: Option<cost::Memory>,
    pub ready: Vec<Duration>,
}

/// Runs all of it.
pub fn run(options: &Options) -> Result<Outcome> {
    let mut outcome = Outcome::default();
    let wants_mesh = options.lanes.contains(&Lane::Mesh);
    if options.ready && wants_mesh {
        outcome.ready = field::time_to_ready(options).context("measure the time to ready")?;
    }
    let field = Field::build(options)?;
    let mut mesh = wants_mesh.then(|| field.start_mesh(options)).transpose()?;
    let result = measure_all(options, &field, mesh.as_mut(), &mut outcome);
    if let Some(directory) = &options.logs {
        field.copy_logs(directory)?;
    }
    result.map(|()| outcome)
}

fn measure_all(options: &Options, field: &Field, mut mesh: Option<&mut Mesh>, outcome: &mut Outcome) -> Result<()> {
    let mut idle = None;
    if let (true, Some(mesh)) = (options.memory, mesh.as_mut()) {
        idle = Some(cost::resident_when_settled(mesh)?);
    }
    for lane in &options.lanes {
        for path in &options.paths {
            field
                .warm_up(*lane, *path)
                .with_context(|| format!("the first connection, {lane:?} {path:?}"))?;
        }
    }
    if let Some(mesh) = mesh.as_mut() {
        field.check_captured(mesh)?;
    }
    let measurements = options.rounds * options.rows.len() * options.paths.len() * options.lanes.len();
    let progress = Progress::new(measurements);
    for round in 0..options.rounds {
        for path in &options.paths {
            for row in &options.rows {
                for turn in 0..options.lanes.len() {
                    // Nobody is always first: a machine that grows warm or busy treats all alike.
                    let lane = options.lanes[(turn + round) % options.lanes.len()];
                    progress.begin(round, *path, *row, lane);
                    let carriers = cost::carriers(field, mesh.as_deref_mut(), lane, *path);
                    let before = cost::spent(carriers)?;
                    let mut reading = row
                        .measure(field, lane, *path, options.time)
                        .with_context(|| format!("measure {} ({path:?}, {lane:?})", row.name()))?;
                    let after = cost::spent(carriers)?;
                    reading.spent = before
                        .zip(after)
                        .map(|(before, after)| [after[0] - before[0], after[1] - before[1]]);
                    progress.end(&reading);
                    outcome.readings.entry((*path, *row, lane)).or_default().push(reading);
                }
            }
        }
    }
    progress.finish();
    if let (Some(idle), Some(mesh)) = (idle, mesh.as_mut()) {
        outcome.memory = Some(cost::memory(field, mesh, idle, options.held).context("measure memory")?);
    }
    Ok(())
}

/// 100,000 connections in a row to one port: each must succeed and show the client's address. One line of report a run.
pub fn hundred_thousand(options: &Options, count: u64) -> Result<()> {
    let field = Field::build(options)?;
    let mut mesh = options
        .lanes
        .contains(&Lane::Mesh)
        .then(|| field.start_mesh(options))
        .transpose()?;
    for lane in &options.lanes {
        // The floor has no client address to keep.
        if *lane == Lane::Floor {
            continue;
        }
        field.warm_up(*lane, Path::Cross)?;
        if let (Lane::Mesh, Some(mesh)) = (lane, mesh.as_mut()) {
            field.check_captured(mesh)?;
        }
        for workers in [1, 32] {
            let rate = field.connections_in_a_row(*lane, workers, count)?;
            eprintln!(
                "{lane:?}, {workers} at a time: {} connections in {:.1} s, {:.0} a second, p99.9 {:.0} µs, longest {:.1} ms, {} failed, {} from a wrong address",
                rate.rate.operations,
                rate.rate.seconds,
                rate.rate.per_second,
                rate.rate.latency.p999_us,
                rate.rate.latency.max_us / 1000.0,
                rate.errors,
                rate.wrong_address,
            );
            ensure!(
                rate.errors == 0,
                "{} of {count} connections failed: {:?}",
                rate.errors,
                rate.first_error
            );
            ensure!(
                rate.wrong_address == 0,
                "{} connections came from a wrong address",
                rate.wrong_address
            );
        }
    }
    Ok(())
}

/// What is being measured, on stderr: a bar on a terminal, lines elsewhere.
struct Progress {
    bar: ProgressBar,
}

impl Progress {
    fn new(measurements: usize) -> Self {
        let bar = ProgressBar::new(measurements as u64);
        if let Ok(style) = ProgressStyle::with_template("{bar:30} {pos}/{len} {msg} (about {eta} left)") {
            bar.set_style(style);
        }
        Self { bar }
    }

    fn begin(&self, round: usize, path: Path, row: Row, lane: Lane) {
        let text = format!("round {}: {} {path:?} {lane:?}", round + 1, row.name()).to_lowercase();
        if self.bar.is_hidden() {
            eprint!("{text} … ");
        }
        self.bar.set_message(text);
    }

    fn end(&self, reading: &Reading) {
        if self.bar.is_hidden() {
            eprintln!("{}", reading.value);
        }
        self.bar.inc(1);
    }

    fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

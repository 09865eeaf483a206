//! The benchmark's command line: which rows, lanes and rounds, and where the figures go.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use warren_tests::bench::{self, Lane, Options, Path, report::Report, row::Row};
use warren_tests::figures::Figures;
use warren_tests::leftovers;

#[derive(Parser)]
#[command(about = "Measures the mesh against plain TCP and against the floor, side by side")]
struct Arguments {
    /// Of the names of all namespaces
    #[arg(long, default_value = "warren-bench")]
    prefix: String,
    /// Node A with its pods on CPU 0, node B on CPU 1: steadier
    #[arg(long)]
    pin: bool,
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Length of one measurement
    #[arg(long, default_value_t = 3.0)]
    seconds: f64,
    #[command(flatten)]
    figures: Figures,
    /// These rows alone; `memory` and `ready` count as rows
    #[arg(long, value_delimiter = ',', value_name = "ROW,ROW")]
    only: Vec<String>,
    #[arg(long, value_delimiter = ',', default_value = "plain,floor,mesh")]
    lanes: Vec<Lane>,
    #[arg(long, value_delimiter = ',', default_value = "cross,same")]
    paths: Vec<Path>,
    /// Plain and floor alone
    #[arg(long)]
    without_mesh: bool,
    /// Instead of the benchmark: 100,000 connections in a row to one port, all of which must succeed from the client's address
    #[arg(long)]
    hundred_thousand: bool,
    /// Open connections for the memory figure
    #[arg(long, default_value_t = 10_000)]
    held: usize,
    /// One more argument of the floor's relays
    #[arg(long = "floor-arg", value_name = "ARG", allow_hyphen_values = true)]
    floor_args: Vec<String>,
    /// One more argument of the daemons
    #[arg(long = "node-arg", value_name = "ARG", allow_hyphen_values = true)]
    node_args: Vec<String>,
    /// Keep the logs of all processes here
    #[arg(long, value_name = "DIR")]
    logs: Option<PathBuf>,
}

impl Arguments {
    fn options(&self) -> Result<Options> {
        let mut lanes = self.lanes.clone();
        if self.without_mesh {
            lanes.retain(|lane| *lane != Lane::Mesh);
        }
        ensure!(
            self.rounds > 0 && !lanes.is_empty() && !self.paths.is_empty(),
            "nothing to measure"
        );
        let mut rows = Vec::new();
        for name in &self.only {
            match Row::ALL.into_iter().find(|row| row.name() == name) {
                Some(row) => rows.push(row),
                None if name == "memory" || name == "ready" => {}
                None => {
                    let known: Vec<_> = Row::ALL.iter().map(|row| row.name()).collect();
                    bail!("no row `{name}`; there are {}, memory, ready", known.join(", "));
                }
            }
        }
        let wants = |name: &str| self.only.is_empty() || self.only.iter().any(|wanted| wanted == name);
        Ok(Options {
            prefix: self.prefix.clone(),
            pin: self.pin,
            rounds: self.rounds,
            time: Duration::try_from_secs_f64(self.seconds).context("--seconds")?,
            rows: if self.only.is_empty() { Row::ALL.to_vec() } else { rows },
            lanes,
            paths: self.paths.clone(),
            memory: wants("memory"),
            ready: wants("ready"),
            held: self.held,
            floor_args: self.floor_args.clone(),
            node_args: self.node_args.clone(),
            logs: self.logs.clone(),
        })
    }
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let options = arguments.options()?;
    leftovers::clear_on_ctrl_c()?;
    warn_of_company();
    if arguments.hundred_thousand {
        return bench::hundred_thousand(&options, 100_000);
    }
    let outcome = bench::run(&options)?;
    let report = Report::new(&options, &outcome);
    arguments.figures.put(&report, &report.text())
}

/// Whoever else computes on this machine is measured along.
fn warn_of_company() {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    let load = load
        .split(' ')
        .next()
        .and_then(|load| load.parse::<f64>().ok())
        .unwrap_or_default();
    if load > 0.7 {
        eprintln!("this machine is busy (load {load}): the figures will be noisy");
    }
}

//! The command line of the measurement at scale: which sizes, how many changes, and where the figures go.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::Parser;
use warren_tests::figures::Figures;
use warren_tests::leftovers;
use warren_tests::scale::{self, Options};

#[derive(Parser)]
#[command(about = "Measures one node's daemon on a cluster that grows and changes")]
struct Arguments {
    /// Leads to an API server without anybody else who changes its objects
    #[arg(long, env = "KUBECONFIG", value_name = "FILE")]
    kubeconfig: PathBuf,
    /// Pods of each point, in thousands
    #[arg(long, value_delimiter = ',', default_value = "1000,5000,20000")]
    pods: Vec<usize>,
    /// Changes a second
    #[arg(long, default_value_t = 200)]
    rate: u32,
    /// How long the cluster is being changed at each point
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    #[command(flatten)]
    figures: Figures,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    leftovers::clear_on_ctrl_c()?;
    let options = Options {
        kubeconfig: arguments.kubeconfig,
        pods: arguments.pods,
        rate: arguments.rate,
        time: Duration::from_secs(arguments.seconds),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let report = runtime.block_on(scale::run(&options))?;
    arguments.figures.put(&report, &report.text())
}

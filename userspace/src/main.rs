//! Thin: reads the command line, builds the runtime and hands over to `app` or `cli`.

use anyhow::Context;
use clap::Parser;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use std::{future::Future, path::PathBuf, process::ExitCode, thread, time::Duration};
use tokio::runtime;
use warren::{
    app, cli,
    config::{Command, CommandLine, ConfigError, MeshConfig, RunConfig},
    telemetry::{Place, logging},
};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// What jemalloc reads at its start: freed pages go back after half a second (an idle daemon is to be small, a busy one
/// keeps its buffers), without huge pages, which would make them forty times as large.
// SAFETY: jemalloc looks for a `const char *` of this name, and this is one: a pointer to bytes that end in 0.
#[unsafe(export_name = "_rjem_malloc_conf")]
#[used]
static MALLOC_CONF: &[u8; 58] = b"dirty_decay_ms:500,muzzy_decay_ms:0,thp:never,tcache:true\0";

/// Threads for work that blocks: dumps, files, name look-ups.
const BLOCKING_THREADS: usize = 32;
/// What still runs on them when the process ends is left behind after this.
const RUNTIME_GRACE: Duration = Duration::from_secs(1);
const LOG_FLUSH: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    // Container runtimes call the plugin by its file's name, without arguments.
    let name = std::env::args_os().next().map(PathBuf::from);
    if name.is_some_and(|name| name.file_name().is_some_and(|name| name == warren::cni::TYPE)) {
        return app::run_plugin();
    }
    let result = match CommandLine::parse().command {
        Command::Node(config) => {
            let (run, mesh) = (config.run.clone(), config.mesh.clone());
            role(config.check(), &run, &mesh, || app::run_node(*config))
        }
        Command::Controller(config) => {
            let (run, mesh) = (config.run.clone(), config.mesh.clone());
            role(config.check(), &run, &mesh, || app::run_controller(*config))
        }
        Command::Cni => return app::run_plugin(),
        Command::User(command) => user(command),
    };
    result.unwrap_or_else(|error| {
        tell(&error);
        ExitCode::FAILURE
    })
}

/// Runs a role until it ends: its log to standard output, errors of the start to standard error as well.
fn role<F: Future<Output = anyhow::Result<()>>>(
    checked: Result<(), ConfigError>,
    run: &RunConfig,
    mesh: &MeshConfig,
    role: impl FnOnce() -> F,
) -> anyhow::Result<ExitCode> {
    checked?;
    let place = Place {
        cluster: mesh.cluster_name.as_str().into(),
        domain: mesh.cluster_domain.as_str().into(),
    };
    logging::start(run.log_format, &run.log_filter(), place)?;
    raise_descriptor_limit();
    let workers = run
        .workers
        .map_or_else(|| thread::available_parallelism().map_or(1, usize::from), usize::from);
    // With one worker, the thread that waits for events is the one that handles them: nothing is handed over.
    let mut builder = match workers {
        1 => runtime::Builder::new_current_thread(),
        _ => runtime::Builder::new_multi_thread(),
    };
    if workers > 1 {
        builder.worker_threads(workers);
    }
    let runtime = builder
        .thread_name("worker")
        .max_blocking_threads(BLOCKING_THREADS)
        .enable_all()
        .build()
        .context("cannot start the threads")?;
    let result = runtime.block_on(role());
    runtime.shutdown_timeout(RUNTIME_GRACE);
    if let Err(error) = &result {
        tracing::error!(error = format!("{error:#}"), "ended");
    }
    logging::flush(LOG_FLUSH);
    result.map(|()| ExitCode::SUCCESS)
}

/// Every connection takes two descriptors, and the usual soft limit is 1,024: the hard limit is what the node allows.
fn raise_descriptor_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map(|()| hard));
    match raised {
        Ok(limit) => tracing::debug!(limit, "open descriptors"),
        Err(error) => tracing::warn!(%error, "the limit of open descriptors stays as it is"),
    }
}

fn user(command: cli::Command) -> anyhow::Result<ExitCode> {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("cannot start")?;
    let code = runtime.block_on(cli::run(command));
    // A name look-up that does not end must not hold up the prompt.
    runtime.shutdown_background();
    Ok(code?)
}

/// An error for the person at the terminal: what, then each cause on a line of its own.
fn tell(error: &anyhow::Error) {
    let mut text = format!("error: {error}\n");
    for cause in error.chain().skip(1) {
        text.push_str(&format!("  because: {cause}\n"));
    }
    eprint!("{text}");
}

//! The commands of the person: they install and check a cluster, or read a running daemon through its admin port and
//! print what it holds. Not here: the roles that run for long (`app`).

mod api;
mod check;
mod client;
mod install;
mod manifests;
mod tables;
mod terminal;
mod uninstall;

pub use api::{ApiError, ClusterArgs};
pub use check::CheckArgs;
pub use client::{AdminUrl, ClientError};
pub use install::{InstallArgs, InstallError, Settings, SettingsError};
pub use manifests::ManifestError;
pub use uninstall::{UninstallArgs, UninstallError};

use crate::telemetry::dump::{Dump, Section};
use clap::{Args, Subcommand, ValueEnum};
use std::{
    io::{self, Write},
    process::ExitCode,
    time::Duration,
};

/// How long `warren version` waits for a daemon that may not be there.
const VERSION_DEADLINE: Duration = Duration::from_secs(1);

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Install Warren into a cluster, or bring it to this version
    Install(Box<InstallArgs>),
    /// Remove Warren from a cluster, with all it has left on the nodes
    Uninstall(UninstallArgs),
    /// Look for what is wrong with a cluster, and say what to do
    #[command(after_help = "Exit code: 0 if there is no error, 3 if there is one, 1 if nothing could be looked at.")]
    Check(CheckArgs),
    /// Every pod that the node's daemon knows, in the mesh or not
    Workloads(Query),
    /// Services with their addresses and endpoints
    Services(Query),
    /// AuthorizationPolicies and PeerAuthentications
    Policies(Query),
    /// Certificates that the node's daemon holds
    Certificates(Query),
    /// Open connections of the node's captured pods
    Connections(Query),
    /// The version of this command, and of the daemon if one answers
    Version(Query),
}

#[derive(Debug, Clone, Args)]
pub struct Query {
    /// The daemon's admin port
    #[arg(
        long,
        env = "WARREN_ADMIN",
        value_name = "URL",
        default_value = "http://127.0.0.1:15000"
    )]
    pub admin: AdminUrl,
    /// Form of the answer
    #[arg(long, short, value_name = "FORM", default_value = "table")]
    pub output: Output,
    /// Of this namespace alone
    #[arg(long, short, value_name = "NAMESPACE")]
    pub namespace: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Output {
    Table,
    Json,
}

/// Why a command has nothing to print.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Api(#[from] ApiError),
    #[error(transparent)]
    Install(#[from] InstallError),
    #[error(transparent)]
    Uninstall(#[from] UninstallError),
    #[error("cannot write the output")]
    Write(#[source] io::Error),
}

/// Runs a command to its end. What it prints goes to standard output, an error to the caller.
///
/// # Errors
/// No daemon answers, or its answer is not understood.
pub async fn run(command: Command) -> Result<ExitCode, CommandError> {
    let text = match &command {
        Command::Install(args) => return Ok(install::run(args).await?),
        Command::Uninstall(args) => return Ok(uninstall::run(args).await?),
        Command::Check(args) => return Ok(check::run(args).await?),
        Command::Version(query) => version(query).await,
        Command::Workloads(query) => read(query, Section::Workloads, tables::workloads).await?,
        Command::Services(query) => read(query, Section::Services, tables::services).await?,
        Command::Policies(query) => read(query, Section::Policies, tables::policies).await?,
        Command::Certificates(query) => read(query, Section::Certificates, tables::certificates).await?,
        Command::Connections(query) => read(query, Section::Connections, tables::connections).await?,
    };
    match io::stdout().lock().write_all(text.as_bytes()) {
        // `warren workloads | head` has what it wants.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(ExitCode::SUCCESS),
        Err(error) => Err(CommandError::Write(error)),
        Ok(()) => Ok(ExitCode::SUCCESS),
    }
}

async fn read(query: &Query, section: Section, table: fn(&Dump) -> String) -> Result<String, ClientError> {
    let mut dump = client::dump(&query.admin, section).await?;
    if let Some(namespace) = &query.namespace {
        of_namespace(&mut dump, namespace);
    }
    match query.output {
        Output::Table => Ok(table(&dump)),
        Output::Json => json(&query.admin, section, &dump),
    }
}

/// The section alone, as an array: what `jq '.[]'` takes.
fn json(admin: &AdminUrl, section: Section, dump: &Dump) -> Result<String, ClientError> {
    let whole = serde_json::to_value(dump);
    let part = whole.map(
        |mut dump| match dump.get_mut(section.name()).map(serde_json::Value::take) {
            Some(part) => part,
            None => serde_json::Value::Array(Vec::new()),
        },
    );
    match part.and_then(|part| serde_json::to_string_pretty(&part)) {
        Ok(text) => Ok(text + "\n"),
        Err(source) => Err(ClientError::Form {
            admin: admin.clone(),
            source,
        }),
    }
}

fn of_namespace(dump: &mut Dump, namespace: &str) {
    dump.workloads.retain(|w| w.namespace == namespace);
    dump.services.retain(|s| s.namespace == namespace);
    dump.policies.retain(|p| p.namespace == namespace);
    let below = format!("/ns/{namespace}/sa/");
    dump.certificates.retain(|c| c.name.contains(&below));
    dump.connections
        .retain(|c| c.workload.split('/').next() == Some(namespace));
}

async fn version(query: &Query) -> String {
    let own = env!("CARGO_PKG_VERSION");
    // Nobody listening is no error here: the command tells its own version everywhere.
    let daemon = tokio::time::timeout(VERSION_DEADLINE, client::dump(&query.admin, Section::CapturedPods)).await;
    let daemon = daemon.ok().and_then(Result::ok).map(|dump| dump.version);
    match (query.output, daemon) {
        (Output::Table, None) => format!("warren {own}\n"),
        (Output::Table, Some(v)) => format!(
            "warren {own}\ndaemon {} (node {}, at {})\n",
            v.warren, v.node, query.admin
        ),
        (Output::Json, daemon) => format!("{:#}\n", serde_json::json!({ "warren": own, "daemon": daemon })),
    }
}

#[cfg(test)]
mod tests;

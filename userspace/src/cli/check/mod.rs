//! `warren check`: what is wrong with a cluster, by name, and what to do about it. `gather` asks, `rules` judge, and this
//! file tells.

mod facts;
mod finding;
mod gather;
mod rules;
#[cfg(test)]
mod tests;

pub(super) use finding::{Finding, Severity};
pub(super) use gather::gather;
pub(super) use rules::diagnose;

use super::{
    api::{ApiError, Cluster, ClusterArgs},
    install::NOT_WELL,
    terminal::{Mark, Progress, below, print, tell},
};
use clap::{Args, ValueEnum};
use facts::Facts;
use serde_json::json;
use std::process::ExitCode;

#[derive(Debug, Clone, Args)]
pub struct CheckArgs {
    #[command(flatten)]
    pub cluster: ClusterArgs,
    /// Look at a cluster into which Warren is yet to be installed
    #[arg(long)]
    pub pre: bool,
    /// Form of the answer
    #[arg(long, short, value_name = "FORM", default_value = "text")]
    pub output: Form,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Form {
    Text,
    Json,
}

/// What a problem is about: a line each, in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Area {
    Api,
    Nodes,
    Network,
    Definitions,
    Permissions,
    Installation,
    Controller,
    Certificates,
    Daemons,
    Pods,
    Policies,
}

impl Area {
    const ALL: [Self; 11] = [
        Self::Api,
        Self::Nodes,
        Self::Network,
        Self::Definitions,
        Self::Permissions,
        Self::Installation,
        Self::Controller,
        Self::Certificates,
        Self::Daemons,
        Self::Pods,
        Self::Policies,
    ];

    fn title(self) -> &'static str {
        match self {
            Self::Api => "Kubernetes",
            Self::Nodes => "Nodes",
            Self::Network => "Other software",
            Self::Definitions => "Custom resources",
            Self::Permissions => "Permissions",
            Self::Installation => "Installation",
            Self::Controller => "Controller",
            Self::Certificates => "Certificates",
            Self::Daemons => "Node daemons",
            Self::Pods => "Pods",
            Self::Policies => "Policies",
        }
    }

    /// Before Warren is installed there is nothing of these.
    fn is_about_warren(self) -> bool {
        matches!(
            self,
            Self::Installation | Self::Controller | Self::Certificates | Self::Daemons | Self::Pods | Self::Policies
        )
    }

    /// What is well, in a few words.
    fn summary(self, facts: &Facts) -> String {
        let counted = |count: usize, noun: &str| format!("{count} {noun}{}", if count == 1 { "" } else { "s" });
        match self {
            Self::Api => match facts.kubernetes {
                Some((major, minor)) => format!("version {major}.{minor}"),
                None => String::new(),
            },
            Self::Nodes => counted(facts.nodes.len(), "node"),
            Self::Network => "nothing in the way".to_owned(),
            Self::Definitions => {
                let there = facts.definitions.iter().filter(|one| one.present).count();
                if there < facts.definitions.len() {
                    "to be installed".to_owned()
                } else {
                    format!("{there} there")
                }
            }
            Self::Permissions => "complete".to_owned(),
            Self::Installation => facts
                .daemons
                .as_ref()
                .map_or_else(String::new, |one| format!("version {}", one.version)),
            Self::Controller => facts.controller.as_ref().map_or_else(
                || "another certificate authority".to_owned(),
                |one| format!("{} of {} ready", one.ready, one.wanted),
            ),
            Self::Certificates => {
                let roots = facts.authority.bundle.iter().flatten();
                match roots.map(|root| root.not_after).min() {
                    Some(end) => format!("the root is valid until {}", end.strftime("%F")),
                    None => String::new(),
                }
            }
            Self::Daemons => {
                let daemons = facts.own_pods.iter().filter(|pod| pod.is_daemon);
                format!("{} ready", daemons.filter(|pod| pod.ready).count())
            }
            Self::Pods => {
                let captured = facts.pods.iter().filter(|pod| pod.captured).count();
                format!("{} in the mesh", counted(captured, "pod"))
            }
            Self::Policies => "nothing blocks the mesh".to_owned(),
        }
    }
}

/// Looks, and prints what was found.
///
/// # Errors
/// There is no cluster to look at.
pub(super) async fn run(args: &CheckArgs) -> Result<ExitCode, ApiError> {
    let cluster = Cluster::connect(&args.cluster).await?;
    if args.output == Form::Text {
        return Ok(report_on(&cluster, args.pre).await);
    }
    let findings = diagnose(&gather(&cluster, args.pre).await);
    let listed: Vec<_> = findings
        .iter()
        .map(|finding| {
            json!({
                "name": finding.problem.name(),
                "severity": match finding.severity {
                    Severity::Error => "error",
                    Severity::Warning => "warning",
                },
                "subject": finding.subject,
                "message": finding.what,
                "advice": finding.advice,
            })
        })
        .collect();
    print(&format!("{:#}\n", json!(listed)));
    Ok(verdict(&findings))
}

/// Everything that was looked at, a line each, and below it what is wrong.
pub(super) async fn report_on(cluster: &Cluster, pre: bool) -> ExitCode {
    let mut progress = Progress::new();
    progress.show("looking at the cluster");
    let facts = gather(cluster, pre).await;
    progress.clear();
    let findings = diagnose(&facts);
    let known = facts.api_away.is_none();
    let installed = !pre && facts.daemons.is_some();
    for area in Area::ALL {
        let of_it: Vec<&Finding> = findings
            .iter()
            .filter(|finding| finding.problem.area() == area)
            .collect();
        match of_it.iter().map(|finding| finding.severity).max() {
            None if !known || (area.is_about_warren() && !installed) => {}
            None => tell(Mark::Good, area.title(), &area.summary(&facts)),
            Some(worst) => {
                tell(mark(worst), area.title(), "");
                of_it.iter().for_each(|finding| print(&told(finding)));
            }
        }
    }
    print(&format!("\n{}\n", summary(&findings)));
    verdict(&findings)
}

fn mark(severity: Severity) -> Mark {
    match severity {
        Severity::Error => Mark::Bad,
        Severity::Warning => Mark::Warning,
    }
}

/// One finding: its name and subject, what is so, what to do.
pub(super) fn told(finding: &Finding) -> String {
    let head = match finding.severity {
        Severity::Error => format!("error {}", finding.problem.name()),
        Severity::Warning => format!("warning {}", finding.problem.name()),
    };
    format!(
        "{}{}{}",
        below("", &format!("{head}: {}", finding.subject)),
        below("  ", &finding.what),
        below("→ ", &finding.advice)
    )
}

fn summary(findings: &[Finding]) -> String {
    let errors = findings
        .iter()
        .filter(|finding| finding.severity == Severity::Error)
        .count();
    let warnings = findings.len() - errors;
    let counted = |count: usize, noun: &str| format!("{count} {noun}{}", if count == 1 { "" } else { "s" });
    match (errors, warnings) {
        (0, 0) => "All is well.".to_owned(),
        (0, _) => format!("{}, no error.", counted(warnings, "warning")),
        (_, 0) => format!("{}.", counted(errors, "error")),
        (_, _) => format!("{}, {}.", counted(errors, "error"), counted(warnings, "warning")),
    }
}

/// Warnings alone do not fail a pipeline.
fn verdict(findings: &[Finding]) -> ExitCode {
    match findings.iter().map(|finding| finding.severity).max() {
        Some(Severity::Error) => ExitCode::from(NOT_WELL),
        Some(Severity::Warning) | None => ExitCode::SUCCESS,
    }
}

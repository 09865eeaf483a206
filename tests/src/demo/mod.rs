//! The demo: two nodes, four pods in the mesh and one outside it, on one machine; real servers, real traffic, and
//! everything that Warren claims shown or the demo fails. This file is the order of events; `shows` has the claims.

pub mod apps;
pub mod manifests;
pub mod programs;
pub mod report;
pub mod shows;
pub mod stage;
pub mod wire;

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::leftovers;
use report::Report;
use stage::Stage;

/// What namespaces, cgroups and files of the demo are named after.
pub const PREFIX: &str = "warren";

#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub ipv6: bool,
    /// Leave everything running at the end.
    pub keep: bool,
}

/// Runs the demo. Whether everything it shows is so; an error where it could not even be shown.
pub fn run(options: Options) -> Result<bool> {
    let mut report = Report::on_terminal();
    let family = if options.ipv6 { "IPv6" } else { "IPv4" };
    report.remark(&format!(
        "Warren: two nodes, four pods in the mesh and one outside it, on {family}"
    ));
    let mut stage = Stage::set(options.ipv6, &mut report)?;
    show_all(&mut stage, &mut report)?;
    if report.has_failed() {
        match keep_logs(&stage) {
            Ok(path) => report.remark(&format!("\nThe logs of every process are in {}", path.display())),
            Err(error) => report.remark(&format!("\nThe logs are lost: {error:#}")),
        }
    }
    let all_so = report.finish();
    if options.keep {
        print_how_to_go_on(&stage);
        stage.keep();
    }
    Ok(all_so)
}

/// Removes what a run with `keep` left.
pub fn clean() -> Result<()> {
    leftovers::clear_prefix(PREFIX)
}

fn show_all(stage: &mut Stage, report: &mut Report) -> Result<()> {
    report.section("The mesh");
    shows::mesh::ready(stage, report)?;
    report.section("Traffic");
    shows::traffic::http(stage, report);
    shows::traffic::server_speaks_first(stage, report);
    shows::traffic::echo(stage, report);
    report.section("On the wire");
    shows::wire::only_tls(stage, report);
    report.section("Identity");
    shows::identity::access_log(stage, report);
    shows::identity::certificates(stage, report);
    report.section("Policy");
    shows::policy::deny_closes_an_open_connection(stage, report);
    shows::policy::permissive_and_strict(stage, report);
    report.section("A dead daemon");
    shows::failure::kill_and_recover(stage, report)?;
    report.section("What is left alone");
    shows::mesh::no_packet_filter(stage, report);
    shows::mesh::programs_are_pinned(stage, report);
    Ok(())
}

fn keep_logs(stage: &Stage) -> Result<PathBuf> {
    let kept = std::env::temp_dir().join("warren-demo-logs");
    if kept.exists() {
        std::fs::remove_dir_all(&kept).with_context(|| format!("remove {}", kept.display()))?;
    }
    std::fs::create_dir_all(&kept).with_context(|| format!("create {}", kept.display()))?;
    let copy = |from: &Path| -> Result<()> {
        let to = kept.join(from.file_name().unwrap_or_default());
        std::fs::copy(from, &to)
            .with_context(|| format!("copy {}", from.display()))
            .map(drop)
    };
    for entry in std::fs::read_dir(stage.world.log_directory())? {
        copy(&entry?.path())?;
    }
    copy(&stage.world.directory().join("wire.pcap"))?;
    Ok(kept)
}

fn print_how_to_go_on(stage: &Stage) {
    let client = stage.world.pod("client");
    let vip = stage.vip(stage::WEB);
    let mut report = Report::on_terminal();
    report.remark(&format!(
        "\nEverything runs on. To enter a pod ({pods}), as root:\n  \
         sh -c 'echo $$ > {cgroup}/cgroup.procs && exec nsenter --net={namespace} bash'\n\
         and there, for example: curl http://{vip}/\n\
         A node's daemon: nsenter --net=/run/netns/{PREFIX}-a curl http://127.0.0.1:15000/config_dump\n\
         Manifests, followed as they change: {manifests}\n\
         Logs: {logs}\n\
         To end it: cargo xtask demo --clean",
        pods = stage
            .world
            .pods()
            .iter()
            .map(|pod| pod.spec.name.as_str())
            .collect::<Vec<_>>()
            .join(", "),
        cgroup = client.cgroup.display(),
        namespace = client.namespace.path().display(),
        manifests = stage.world.manifest_directory().display(),
        logs = stage.world.log_directory().display(),
    ));
    report.finish_silently();
}

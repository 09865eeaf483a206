//! The mesh itself: ready, and touching nothing that is not its own.

use std::collections::BTreeSet;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::demo::apps::program;
use crate::demo::report::Report;
use crate::demo::stage::Stage;
use crate::topology::Node;
use crate::wait::DEADLINE;

pub fn ready(stage: &mut Stage, report: &mut Report) -> Result<()> {
    report.show(
        "a controller in a namespace of its own, and a daemon on each node, are ready",
        || {
            for node in Node::BOTH {
                stage.mesh.daemon_mut(node).wait_ready(DEADLINE)?;
            }
            Ok(String::new())
        },
    );
    Ok(())
}

pub fn no_packet_filter(stage: &Stage, report: &mut Report) {
    report.show(
        "no iptables or nftables rule in any namespace of nodes, pods and controller",
        || {
            let nft = program("nft")?;
            let world = &stage.world;
            let nodes = Node::BOTH.map(|node| world.node(node));
            let pods = world.pods().iter().map(std::ops::Deref::deref);
            let mut count = 0;
            for place in nodes.into_iter().chain([world.controller()]).chain(pods) {
                let rules = place.command(&nft).args(["list", "ruleset"]).output(DEADLINE)?;
                ensure!(rules.trim().is_empty(), "{} has rules:\n{rules}", place.name);
                count += 1;
            }
            Ok(format!("`nft list ruleset` is empty in all {count}"))
        },
    );
}

pub fn programs_are_pinned(stage: &Stage, report: &mut Report) {
    let Ok(bpftool) = program("bpftool") else {
        report.remark("  - bpftool is not installed: the loaded programs are not listed");
        return;
    };
    report.show(
        "the kernel programs carry BTF, and the links that hold them are pinned",
        || {
            let ask = |what: &str| -> Result<Vec<Value>> {
                let command = stage.world.node(Node::A).command(&bpftool);
                let listed = command.args(["-f", "-j", what, "show"]).output(DEADLINE)?;
                serde_json::from_str(&listed).with_context(|| format!("read what bpftool says: {listed}"))
            };
            let below = stage.world.directory().display().to_string();
            let links: Vec<Value> = ask("link")?
                .into_iter()
                .filter(|link| is_pinned_below(link, &below))
                .collect();
            ensure!(!links.is_empty(), "bpftool finds no link pinned below {below}");
            let programs = ask("prog")?;
            let mut names = BTreeSet::new();
            for link in &links {
                let program = programs.iter().find(|program| program["id"] == link["prog_id"]);
                let program = program.with_context(|| format!("there is no program behind {link}"))?;
                ensure!(program["btf_id"].is_u64(), "{} has no BTF", program["name"]);
                names.extend(program["name"].as_str());
            }
            let names: Vec<&str> = names.into_iter().collect();
            Ok(format!("{} links of {}", links.len(), names.join(", ")))
        },
    );
}

fn is_pinned_below(link: &Value, directory: &str) -> bool {
    let pins = link["pinned"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str);
    pins.into_iter().any(|pin| Path::new(pin).starts_with(directory))
}

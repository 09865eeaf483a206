//! The mesh itself: ready, and touching nothing that is not its own.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};

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
    report.show("the kernel programs are held by pinned links and carry BTF", || {
        let list = |what: &str| -> Result<Vec<serde_json::Value>> {
            // Listing pins means walking every bpffs that this process can see.
            let place = stage.world.node(Node::A);
            let listed = place
                .command(&bpftool)
                .args(["-f", "-j", what, "show"])
                .output(DEADLINE)?;
            serde_json::from_str(&listed).context("read what bpftool says")
        };
        let below = stage.world.directory().display().to_string();
        let is_ours = |link: &&serde_json::Value| {
            let pins = link["pinned"].as_array().into_iter().flatten();
            pins.filter_map(|pin| pin.as_str()).any(|pin| pin.starts_with(&below))
        };
        let links = list("link")?;
        let held: BTreeSet<u64> = links
            .iter()
            .filter(is_ours)
            .filter_map(|link| link["prog_id"].as_u64())
            .collect();
        ensure!(!held.is_empty(), "bpftool finds no link pinned below {below}");
        let mut programs = list("prog")?;
        programs.retain(|program| program["id"].as_u64().is_some_and(|id| held.contains(&id)));
        let without: Vec<_> = programs
            .iter()
            .filter(|program| program["btf_id"].is_null())
            .map(|one| &one["name"])
            .collect();
        ensure!(without.is_empty(), "without BTF: {without:?}");
        let mut names: Vec<_> = programs.iter().filter_map(|program| program["name"].as_str()).collect();
        names.sort_unstable();
        names.dedup();
        Ok(format!("{} programs: {}", programs.len(), names.join(", ")))
    });
}

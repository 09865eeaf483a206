//! A daemon killed with -9: its pods' new connections are refused and never sent in the clear, and it comes back.

use std::net::SocketAddr;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use super::policy::curl_reason;
use super::wire::{holds, no_plaintext_connection};
use crate::demo::apps;
use crate::demo::report::Report;
use crate::demo::stage::{Stage, WEB, marker};
use crate::topology::Node;
use crate::wait::{DEADLINE, wait_until_ok};

/// What curl says when `connect` failed; a timeout has another number.
const NO_CONNECTION: &str = "curl: (7)";

pub fn kill_and_recover(stage: &mut Stage, report: &mut Report) -> Result<()> {
    let before = stage.capture.fence(&stage.world)?;
    report.show("kill -9 of node a's daemon", || {
        stage.mesh.daemon_mut(Node::A).kill().map(|()| String::new())
    });

    let text = marker("while-dead");
    let targets = [
        ("web-2 on the other node", stage.at("web-2", apps::HTTP_PORT)),
        ("web-1 on the same node", stage.at("web-1", apps::HTTP_PORT)),
        ("the service web", stage.vip(WEB)),
    ];
    for (name, address) in targets {
        report.show(
            &format!("a new connection is refused at once: client → {name}"),
            || refused(stage, address, &text),
        );
    }
    report.show("not one byte of it on the wire", || {
        let end = stage.capture.fence(&stage.world)?;
        let packets = stage.capture.packets()?;
        let packets = packets.get(before..end).context("the capture has shrunk")?;
        ensure!(!holds(packets, &text), "{text:?} was sent in the clear");
        no_plaintext_connection(&stage.world, packets)?;
        Ok(format!("{} packets looked at", packets.len()))
    });
    report.show("traffic to outside the mesh goes on: client → outsider", || {
        let answer = apps::get(
            stage.world.pod("client"),
            stage.at("outsider", apps::HTTP_PORT),
            &marker("to-outsider"),
        )?;
        ensure!(answer.server == "outsider", "{} answered", answer.server);
        Ok(String::new())
    });
    report.show("the other node is not affected: store → web-2", || {
        apps::get(
            stage.world.pod("store"),
            stage.at("web-2", apps::HTTP_PORT),
            &marker("mesh"),
        )
        .map(|_| String::new())
    });
    report.show("started again, it serves new connections: client → web-2", || {
        let begin = Instant::now();
        stage.mesh.daemon_mut(Node::A).start()?;
        let client = stage.world.pod("client");
        wait_until_ok("the client is served", DEADLINE, || {
            apps::get(client, stage.at("web-2", apps::HTTP_PORT), &marker("mesh"))
        })?;
        Ok(format!("{} ms after it was started", begin.elapsed().as_millis()))
    });
    report.show("still not one byte in the clear, from the kill to now", || {
        let end = stage.capture.fence(&stage.world)?;
        let packets = stage.capture.packets()?;
        let packets = packets.get(before..end).context("the capture has shrunk")?;
        for text in [text.as_str(), &marker("mesh")] {
            ensure!(!holds(packets, text), "{text:?} was sent in the clear");
        }
        no_plaintext_connection(&stage.world, packets)?;
        Ok(format!("{} packets looked at", packets.len()))
    });
    Ok(())
}

/// A refusal is an answer: whoever calls must not be left waiting for a timeout.
fn refused(stage: &Stage, address: SocketAddr, text: &str) -> Result<String> {
    match apps::get(stage.world.pod("client"), address, text) {
        Ok(answer) => bail!("{} answered", answer.server),
        Err(error) => {
            let reason = curl_reason(&format!("{error:#}"));
            ensure!(reason.contains(NO_CONNECTION), "it was not refused, but: {reason}");
            Ok(reason)
        }
    }
}

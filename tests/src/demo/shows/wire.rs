//! What a packet capture between the nodes holds: TLS on 15008, and not one byte of what the pods said.

use std::collections::BTreeSet;
use std::net::IpAddr;

use anyhow::{Result, bail, ensure};

use crate::demo::apps;
use crate::demo::report::Report;
use crate::demo::stage::{Stage, marker};
use crate::demo::wire::{Packet, server_hello, stream_contains, streams, tls_records};
use crate::topology::World;

const HBONE_PORT: u16 = 15008;
/// The pods that are in the mesh.
const MEMBERS: [&str; 4] = ["client", "web-1", "web-2", "store"];

pub fn only_tls(stage: &mut Stage, report: &mut Report) {
    let control = marker("control");
    let mut captured = Vec::new();
    report.show(
        "the capture works: what a pod outside the mesh sends is there in the clear",
        || {
            // By IP to a pod that takes plaintext: the wire between the nodes carries it.
            apps::get(
                stage.world.pod("outsider"),
                stage.at("web-1", apps::HTTP_PORT),
                &control,
            )?;
            let end = stage.capture.fence(&stage.world)?;
            captured = stage.capture.packets()?;
            captured.truncate(end);
            ensure!(
                holds(&captured, &control),
                "{} packets, and the text is in none of them",
                captured.len()
            );
            Ok(format!("{} packets", captured.len()))
        },
    );
    report.show("what pods in the mesh said to each other is nowhere in it", || {
        let text = marker("mesh");
        ensure!(!holds(&captured, &text), "{text:?} was sent in the clear");
        no_plaintext_connection(&stage.world, &captured)?;
        Ok("not one packet between them but on port 15008".to_owned())
    });
    report.show("on 15008 there is TLS from the first byte to the last", || {
        tls_on_hbone(&captured)
    });
}

/// Fails if any two pods of the mesh exchanged a packet of TCP on a port other than HBONE's.
pub fn no_plaintext_connection(world: &World, packets: &[Packet]) -> Result<()> {
    let members: Vec<IpAddr> = MEMBERS
        .iter()
        .map(|name| world.pod(name))
        .flat_map(|pod| [pod.v4.into(), pod.v6.into()])
        .collect();
    for segment in packets.iter().filter_map(|packet| packet.tcp.as_ref()) {
        let between = members.contains(&segment.from.ip()) && members.contains(&segment.to.ip());
        if between && segment.from.port() != HBONE_PORT && segment.to.port() != HBONE_PORT {
            bail!("a packet went from {} to {}", segment.from, segment.to);
        }
    }
    Ok(())
}

/// Whether the text is in a packet, or in a stream across packets.
pub fn holds(packets: &[Packet], text: &str) -> bool {
    packets.iter().any(|packet| packet.contains(text))
        || streams(packets).values().any(|stream| stream_contains(stream, text))
}

fn tls_on_hbone(packets: &[Packet]) -> Result<String> {
    let mut chosen = BTreeSet::new();
    let (mut connections, mut records, mut bytes) = (0, 0, 0);
    for ((from, to), stream) in streams(packets) {
        if from.port() != HBONE_PORT && to.port() != HBONE_PORT || stream.bytes.is_empty() {
            continue;
        }
        ensure!(
            stream.is_whole,
            "the beginning of {from} → {to} is missing in the capture"
        );
        match tls_records(&stream.bytes) {
            Ok(count) => records += count,
            Err(error) => bail!("{from} → {to}: {error}"),
        }
        bytes += stream.bytes.len();
        if from.port() == HBONE_PORT {
            connections += 1;
            match server_hello(&stream.bytes) {
                Some(hello) if hello.version == 0x0304 => chosen.insert(hello.to_string()),
                Some(hello) => bail!("{from} chose {hello}"),
                None => bail!("{from} began without a ServerHello"),
            };
        }
    }
    ensure!(connections > 0, "nothing went over port {HBONE_PORT}");
    let chosen: Vec<String> = chosen.into_iter().collect();
    Ok(format!(
        "{connections} connections, {records} records, {bytes} bytes; {}",
        chosen.join("; ")
    ))
}

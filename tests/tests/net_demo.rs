//! The demo's applications and its eyes, without the mesh: if the capture cannot find plaintext where there is nothing
//! else, its silence beside the mesh means nothing.

use anyhow::{Result, ensure};
use warren_tests::demo::apps::{self, Database};
use warren_tests::demo::shows::wire::{holds, no_plaintext_connection};
use warren_tests::demo::stage::world;
use warren_tests::demo::wire::Capture;
use warren_tests::topology::Place;

const MARKER: &str = "marker-of-net-demo";

#[test]
fn without_a_mesh_the_capture_finds_the_plaintext_in_both_families() -> Result<()> {
    let world = world("wt-demo-wire")?;
    let _nginx = apps::start_nginx(&world, world.pod("web-2"))?;
    let mut capture = Capture::start(&world)?;
    for ipv6 in [false, true] {
        let before = capture.fence(&world)?;
        let address = (world.pod("web-2").ip(ipv6), apps::HTTP_PORT).into();
        let answer = apps::get(world.pod("client"), address, MARKER)?;
        ensure!(
            answer.server == "web-2" && answer.client == world.pod("client").ip(ipv6),
            "{answer:?}"
        );
        let end = capture.fence(&world)?;
        let packets = &capture.packets()?[before..end];
        ensure!(
            holds(packets, MARKER),
            "the marker is not found in {} packets",
            packets.len()
        );
        ensure!(
            no_plaintext_connection(&world, packets).is_err(),
            "the plain connection is not found"
        );
    }
    Ok(())
}

#[test]
fn the_server_that_speaks_first_greets_and_knows_its_client() -> Result<()> {
    let world = world("wt-demo-db")?;
    let store = world.pod("store");
    let database = Database::start(&world, store, |line| eprintln!("{line}"))?;
    for ipv6 in [false, true] {
        let address = (store.ip(ipv6), apps::DATABASE_PORT).into();
        let client: &Place = world.pod("client");
        let greeting = apps::greeting(client, address)?;
        if let Database::MariaDb(_) = &database {
            ensure!(greeting.contains("MariaDB"), "it greets with {greeting:?}");
            ensure!(apps::query_database(client, address)? == format!("demo@{}", client.ip(ipv6)));
        } else {
            ensure!(greeting.starts_with("SSH-2.0-"), "it greets with {greeting:?}");
        }
    }
    Ok(())
}

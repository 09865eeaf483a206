//! What goes over the wire between two nodes when connections end: the packets that a kernel sends on its own behalf, for
//! sockets that are gone, carry no socket's mark.

use std::fs;
use std::net::SocketAddr;

use anyhow::{Result, ensure};
use warren_tests::agent::{Agent, Order, Serve};
use warren_tests::demo::wire::Capture;
use warren_tests::{DEADLINE, Mesh, Node, Pod, PodSpec, World, wait_until};

const PORT: u16 = 7000;
const HBONE_PORT: u16 = 15008;

/// The client's socket is gone when the server's end arrives: the answer comes from what the kernel kept of it.
#[test]
fn the_late_end_of_a_connection_that_its_client_has_left_sends_nothing_past_the_tunnel() -> Result<()> {
    let world = World::builder("wt-late-end")
        .pod(PodSpec::new("client", Node::A))
        .pod(PodSpec::new("server", Node::B))
        .start()?;
    let _mesh = Mesh::start(&world)?;
    let mut capture = Capture::start(&world)?;
    let (client, server) = (world.pod("client"), world.pod("server"));
    let mut caller = Agent::start(client)?;
    let mut holder = Agent::start(server)?;
    let any = SocketAddr::new("::".parse()?, PORT);
    holder.order(&Order::Listen {
        name: "server".to_owned(),
        on: any,
        serve: Serve::Hold,
    })?;
    for ipv6 in [false, true] {
        let to = SocketAddr::new(server.ip(ipv6), PORT);
        let before = capture.fence(&world)?;
        ensure!(
            caller.connect("call", to, DEADLINE)?.connected(),
            "no connection to {to}"
        );
        caller.order(&Order::Close {
            name: "call".to_owned(),
            reset: false,
        })?;
        wait_until("the client's end has come to the server", DEADLINE, || {
            has_half_closed(server).then_some(())
        })?;
        wait_until("the client's socket is a remainder", DEADLINE, || {
            has_remainder(client).then_some(())
        })?;
        holder.order(&Order::Drop {
            name: "server".to_owned(),
            reset: false,
        })?;
        wait_until("the server's end has come to the client", DEADLINE, || {
            (!has_half_closed(server)).then_some(())
        })?;
        wait_until("the daemon has no connection to the client", DEADLINE, || {
            (!is_waiting(client)).then_some(())
        })?;
        let end = capture.fence(&world)?;
        let own = [client.ip(ipv6), server.ip(ipv6)];
        for segment in capture.packets()?[before..end]
            .iter()
            .filter_map(|packet| packet.tcp.as_ref())
        {
            let is_between = own.contains(&segment.from.ip()) && own.contains(&segment.to.ip());
            let is_hbone = segment.from.port() == HBONE_PORT || segment.to.port() == HBONE_PORT;
            ensure!(
                !is_between || is_hbone,
                "a packet went from {} to {}",
                segment.from,
                segment.to
            );
        }
    }
    Ok(())
}

const FIN_WAIT_2: &str = "05";
const CLOSE_WAIT: &str = "08";
const LAST_ACK: &str = "09";

/// The application's connection whose client has closed.
fn has_half_closed(pod: &Pod) -> bool {
    states_of_port(pod).iter().any(|state| state == CLOSE_WAIT)
}

/// What the kernel keeps of a socket that nobody has open any more, until the other side ends as well.
fn has_remainder(pod: &Pod) -> bool {
    states_of_port(pod).iter().any(|state| state == FIN_WAIT_2)
}

/// The daemon's end, whose last words were not acknowledged.
fn is_waiting(pod: &Pod) -> bool {
    states_of_port(pod)
        .iter()
        .any(|state| state == LAST_ACK || state == CLOSE_WAIT)
}

/// The states, as /proc/net/tcp numbers them, of the pod's sockets with our port at either end.
fn states_of_port(pod: &Pod) -> Vec<String> {
    // A dual-stack listener's IPv4 connections are in the table of IPv6.
    let table = |name| fs::read_to_string(format!("/proc/thread-self/net/{name}"));
    let read = || Ok(table("tcp")? + &table("tcp6")?);
    let text = pod.namespace.run(read).unwrap_or_default();
    let port = format!(":{PORT:04X}");
    let sockets = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    sockets
        .filter(|fields| fields.len() > 3 && (fields[1].ends_with(&port) || fields[2].ends_with(&port)))
        .map(|fields| fields[3].to_owned())
        .collect()
}

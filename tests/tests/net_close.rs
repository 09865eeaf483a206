//! What connections through the mesh leave behind when they are over: nothing that a later one could meet.

use std::net::SocketAddr;
use std::process::Command;

use anyhow::Result;
use warren_tests::agent::{Agent, Order, Outcome, Serve};
use warren_tests::{DEADLINE, Mesh, Node, PodSpec, World, wait_until};

const PORT: u16 = 7000;

/// The state that `ss` shows of the pod's sockets to or from the port, but for listeners.
fn states(pod: &warren_tests::Pod) -> Result<Vec<String>> {
    let output = pod.namespace.run(|| {
        Ok(Command::new("ss")
            .args(["-Htan", &format!("sport = :{PORT} or dport = :{PORT}")])
            .output()?)
    })?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text
        .lines()
        .filter_map(|line| line.split_whitespace().next().map(str::to_owned))
        .collect())
}

/// The kernel answers the daemon's FIN for a client that is gone. That answer must turn round on `lo`: left to the pod's
/// default route it went to the server in the clear, the daemon's socket stayed in LAST_ACK for a minute, and the next
/// connection from the client's port met it and hung.
#[test]
fn a_server_that_closes_after_its_client_is_gone_leaves_no_unacknowledged_socket_in_the_clients_pod() -> Result<()> {
    let world = World::builder("wt-close")
        .pod(PodSpec::new("client", Node::A))
        .pod(PodSpec::new("server", Node::B))
        .start()?;
    let _mesh = Mesh::start(&world)?;
    for ipv6 in [false, true] {
        let to = SocketAddr::new(world.pod("server").ip(ipv6), PORT);
        let mut server = Agent::start(world.pod("server"))?;
        let mut client = Agent::start(world.pod("client"))?;
        server.must_listen("held", to, Serve::Hold)?;
        let connected = client.connect("one", to, DEADLINE)?;
        assert!(matches!(connected, Outcome::Connected { .. }), "{connected:?}");
        wait_until("the server has the connection", DEADLINE, || {
            let accepted = server.order(&Order::Accepted { name: "held".into() }).ok()?;
            matches!(&accepted, Outcome::Accepted { peers, .. } if peers.len() == 1).then_some(())
        })?;
        let close = Order::Close {
            name: "one".into(),
            reset: false,
        };
        assert_eq!(client.order(&close)?, Outcome::Done);
        let seen = || states(world.pod("client")).unwrap_or_default();
        wait_until("the client's end is gone but for FIN_WAIT2", DEADLINE, || {
            seen().contains(&"FIN-WAIT-2".to_owned()).then_some(())
        })?;
        let drop = Order::Drop {
            name: "held".into(),
            reset: false,
        };
        assert_eq!(server.order(&drop)?, Outcome::Done);
        wait_until("the daemon's end is closed too", DEADLINE, || {
            let open = ["FIN-WAIT-2", "CLOSE-WAIT", "LAST-ACK", "ESTAB"];
            (!seen().iter().any(|state| open.contains(&state.as_str()))).then_some(())
        })?;
    }
    Ok(())
}

//! Policy by identity, acting on connections that are open already, and on clients outside the mesh.

use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};

use crate::demo::apps;
use crate::demo::report::Report;
use crate::demo::stage::{ECHO, Stage, marker};
use crate::load::talk::{Conversation, End};
use crate::topology::Node;
use crate::wait::{DEADLINE, wait_until_ok};

const DENY: &str = "deny-client.yaml";
const STRICT: &str = "strict.yaml";
/// What the load tool says of a connection that was reset before it had looked at it.
const RESET_AT_ONCE: &str = "failed ConnectionReset";
const POLICY_CHANGE: &str = "connection closed due to policy change";

pub fn deny_closes_an_open_connection(stage: &Stage, report: &mut Report) {
    let mut other = None;
    report.show(
        "a DENY by service account closes a connection that is open: client → echo",
        || {
            let mut denied = talk(stage, "client")?;
            let allowed = talk(stage, "web-1")?;
            stage.apply_policy(DENY)?;
            let begin = Instant::now();
            let end = match denied.wait_for_end(DEADLINE)? {
                End::Closed => "closed",
                End::Reset => "reset",
            };
            other = Some(allowed);
            Ok(format!(
                "{end} {} ms after the policy was written",
                begin.elapsed().as_millis()
            ))
        },
    );
    if let Ok(line) = stage.mesh.daemon(Node::B).wait_for_line(POLICY_CHANGE, DEADLINE) {
        report.quote(&line);
    }
    report.show(
        "a connection of another service account to the same port lives on: web-1 → echo",
        || {
            other
                .context("it was never opened")?
                .echo(b"after\n", DEADLINE)
                .map(|()| String::new())
        },
    );
    report.show("a new connection of the denied one fails: client → echo", || {
        let mut denied = match Conversation::open(stage.world.pod("client"), stage.vip(ECHO), DEADLINE) {
            Ok(denied) => denied,
            // The daemon may be quicker than the client, which then hears of nothing but the reset.
            Err(error) if format!("{error:#}").contains(RESET_AT_ONCE) => return Ok("reset at once".to_owned()),
            Err(error) => return Err(error),
        };
        match denied.wait_for_end(DEADLINE)? {
            End::Reset => Ok("reset".to_owned()),
            End::Closed => bail!("it was closed as if it had been let in"),
        }
    });
    report.show("with the policy removed it is let in again: client → echo", || {
        stage.remove_policy(DENY)?;
        wait_until_ok("the client is let in", DEADLINE, || talk(stage, "client")).map(|_| String::new())
    });
}

pub fn permissive_and_strict(stage: &Stage, report: &mut Report) {
    let from_outside = || {
        apps::get(
            stage.world.pod("outsider"),
            stage.at("web-1", apps::HTTP_PORT),
            &marker("outsider"),
        )
    };
    report.show(
        "PERMISSIVE, the default, lets a client outside the mesh in: outsider → web-1",
        || {
            let answer = from_outside()?;
            let own = stage.world.pod("outsider").ip(stage.ipv6);
            ensure!(answer.client == own, "web-1 saw {} instead of {own}", answer.client);
            Ok(String::new())
        },
    );
    report.show("STRICT refuses it: outsider → web-1", || {
        stage.apply_policy(STRICT)?;
        let error = wait_until_ok("it is refused", DEADLINE, || match from_outside() {
            Ok(_) => bail!("it is let in"),
            Err(error) => Ok(error),
        })?;
        Ok(curl_reason(&format!("{error:#}")))
    });
    report.show("STRICT lets the mesh in: client → web-1 and web-2", || {
        for server in ["web-1", "web-2"] {
            apps::get(
                stage.world.pod("client"),
                stage.at(server, apps::HTTP_PORT),
                &marker("mesh"),
            )?;
        }
        Ok(String::new())
    });
    report.show("without it the mode is PERMISSIVE again: outsider → web-1", || {
        stage.remove_policy(STRICT)?;
        wait_until_ok("it is let in", DEADLINE, from_outside).map(|_| String::new())
    });
}

/// A connection from the pod to the echo server, over which a line has gone and come back.
fn talk(stage: &Stage, pod: &str) -> Result<Conversation> {
    let mut conversation = Conversation::open(stage.world.pod(pod), stage.vip(ECHO), DEADLINE)?;
    conversation.echo(b"hello\n", DEADLINE)?;
    Ok(conversation)
}

/// What curl said last, without what we say around it.
pub fn curl_reason(error: &str) -> String {
    let said = error
        .lines()
        .rev()
        .find_map(|line| line.find("curl: (").map(|at| line[at..].to_owned()));
    said.unwrap_or_else(|| error.to_owned())
}

//! Applications that know nothing of the mesh talk to each other through it.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};

use crate::demo::apps::{self, Answer, Database};
use crate::demo::report::Report;
use crate::demo::stage::{DATABASE, ECHO, Stage, WEB, marker};
use crate::load::talk::Conversation;
use crate::wait::DEADLINE;

pub fn http(stage: &Stage, report: &mut Report) {
    for (server, place) in [("web-2", "other node"), ("web-1", "same node")] {
        report.show(&format!("HTTP by pod IP, {place}: client → {server}"), || {
            let answer = apps::get(
                stage.world.pod("client"),
                stage.at(server, apps::HTTP_PORT),
                &marker("mesh"),
            )?;
            ensure!(answer.server == server, "{} answered", answer.server);
            sees_the_client(stage, &answer)?;
            Ok(format!("nginx sees the client's own address, {}", answer.client))
        });
    }
    report.show(
        &format!("HTTP by service VIP: client → web {}, both nodes", stage.vip(WEB)),
        || {
            let mut served: BTreeMap<String, u32> = BTreeMap::new();
            // With two endpoints chosen at random, 60 calls that all reach one of them would be a wonder (2⁻⁵⁹).
            for _ in 0..60 {
                let answer = apps::get(stage.world.pod("client"), stage.vip(WEB), &marker("mesh"))?;
                sees_the_client(stage, &answer)?;
                *served.entry(answer.server).or_default() += 1;
                if served.len() == 2 && served.values().sum::<u32>() >= 10 {
                    break;
                }
            }
            ensure!(served.len() == 2, "only {served:?} answered");
            Ok(served
                .iter()
                .map(|(name, times)| format!("{name} answered {times} times"))
                .collect::<Vec<_>>()
                .join(", "))
        },
    );
    report.show(
        "traffic to a pod outside the mesh goes on as before: client → outsider",
        || {
            let answer = apps::get(
                stage.world.pod("client"),
                stage.at("outsider", apps::HTTP_PORT),
                &marker("to-outsider"),
            )?;
            ensure!(answer.server == "outsider", "{} answered", answer.server);
            Ok(String::new())
        },
    );
}

pub fn server_speaks_first(stage: &Stage, report: &mut Report) {
    let client = stage.world.pod("client");
    report.show(
        &format!("a server that speaks first: client → {}", stage.database.name()),
        || {
            Ok(format!(
                "it greets with {}",
                apps::greeting(client, stage.vip(DATABASE))?
            ))
        },
    );
    if let Database::MariaDb(_) = &stage.database {
        report.show("a query by service VIP: client → MariaDB", || {
            let user = apps::query_database(client, stage.vip(DATABASE))?;
            let expected = format!("demo@{}", client.ip(stage.ipv6));
            ensure!(user == expected, "SELECT USER() gave {user}, not {expected}");
            Ok(format!("SELECT USER() gives {user}"))
        });
    }
}

pub fn echo(stage: &Stage, report: &mut Report) {
    report.show("plain TCP by service VIP: client → echo", || {
        let mut conversation = Conversation::open(stage.world.pod("client"), stage.vip(ECHO), DEADLINE)?;
        let lines = 100;
        for number in 0..lines {
            conversation.echo(format!("{} {number}\n", marker("mesh")).as_bytes(), DEADLINE)?;
        }
        Ok(format!("{lines} lines there and back"))
    });
}

fn sees_the_client(stage: &Stage, answer: &Answer) -> Result<()> {
    let own = stage.world.pod("client").ip(stage.ipv6);
    ensure!(
        answer.client == own,
        "{} saw {} instead of the client's {own}",
        answer.server,
        answer.client
    );
    Ok(())
}

//! Who talked to whom, proven: the access log's identities, and the certificates behind them.

use std::collections::BTreeSet;
use std::fmt;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;

use crate::demo::report::Report;
use crate::demo::stage::Stage;
use crate::topology::Node;
use crate::wait::{DEADLINE, wait_until};

const CLIENT: &str = "spiffe://cluster.local/ns/demo/sa/client";
const WEB: &str = "spiffe://cluster.local/ns/demo/sa/web";
const STORE: &str = "spiffe://cluster.local/ns/demo/sa/store";

pub fn access_log(stage: &Stage, report: &mut Report) {
    for (node, side) in [(Node::A, "outbound"), (Node::B, "inbound")] {
        let mut seen = String::new();
        report.show(
            &format!(
                "node {} logs the connection client → web-2, {side}, with both identities",
                node.letter()
            ),
            || {
                let what = format!("an {side} line with both identities");
                seen = wait_until(&what, DEADLINE, || {
                    let log = stage.mesh.daemon(node).log();
                    let mut lines = log
                        .lines()
                        .filter(|line| names_both(line, side) && line.contains("web-2"));
                    lines.next().map(str::to_owned)
                })?;
                Ok(String::new())
            },
        );
        if !seen.is_empty() {
            report.quote(&seen);
        }
    }
}

fn names_both(line: &str, side: &str) -> bool {
    let has = |field: &str, value: &str| {
        line.contains(&format!("{field}={value}")) || line.contains(&format!("{field}=\"{value}\""))
    };
    has("src.identity", CLIENT) && has("dst.identity", WEB) && has("direction", side)
}

pub fn certificates(stage: &Stage, report: &mut Report) {
    for (node, identities) in [(Node::A, [CLIENT, WEB]), (Node::B, [STORE, WEB])] {
        let mut leaves = Vec::new();
        let claim = format!(
            "node {} holds a certificate of each identity that runs there, and of no other",
            node.letter()
        );
        report.show(&claim, || {
            leaves = leaves_in(stage.mesh.daemon(node).config_dump()?)?;
            let held: BTreeSet<&str> = leaves.iter().map(|leaf| leaf.name.as_str()).collect();
            ensure!(
                held == BTreeSet::from(identities),
                "it holds {held:?}, not {identities:?}"
            );
            ensure!(leaves.iter().all(|leaf| leaf.valid), "not all of them are valid");
            Ok(String::new())
        });
        for leaf in &leaves {
            report.quote(&leaf.to_string());
        }
    }
}

/// What the daemon tells of a certificate.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Certificate {
    name: String,
    #[serde(rename = "type")]
    kind: String,
    valid: bool,
    serial_number: Option<String>,
    not_before: Option<String>,
    not_after: Option<String>,
}

impl fmt::Display for Certificate {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let or_unknown = |text: &Option<String>| text.clone().unwrap_or_else(|| "?".to_owned());
        let [serial, from, to] = [&self.serial_number, &self.not_before, &self.not_after].map(or_unknown);
        write!(out, "{}  valid {from} to {to}, serial {serial}", self.name)
    }
}

/// The certificates of workloads in the daemon's dump, by name.
fn leaves_in(dump: Value) -> Result<Vec<Certificate>> {
    let entries = dump
        .get("certificates")
        .context("the config dump has no certificates")?;
    let mut leaves: Vec<Certificate> = serde_json::from_value(entries.clone()).context("read the certificates")?;
    leaves.retain(|certificate| certificate.kind == "Leaf");
    leaves.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(leaves)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_counts_only_with_both_identities_in_their_own_fields() {
        let line = format!("INFO access: src.identity=\"{CLIENT}\" dst.identity=\"{WEB}\" direction=\"outbound\"");
        assert!(names_both(&line, "outbound"));
        assert!(!names_both(&line, "inbound"));
        assert!(!names_both(&line.replace("dst.identity", "dst.service"), "outbound"));
    }

    #[test]
    fn the_certificates_of_workloads_are_read_from_the_dump() -> Result<()> {
        let dump = serde_json::json!({"certificates": [
            {"name": "CN=root", "type": "Root", "status": "Available", "valid": true},
            {"name": WEB, "type": "Leaf", "status": "Available", "valid": true, "serialNumber": "7",
             "notBefore": "today", "notAfter": "tomorrow"},
        ]});
        let leaves: Vec<String> = leaves_in(dump)?.iter().map(Certificate::to_string).collect();
        assert_eq!(leaves, [format!("{WEB}  valid today to tomorrow, serial 7")]);
        assert!(leaves_in(serde_json::json!({})).is_err());
        Ok(())
    }
}

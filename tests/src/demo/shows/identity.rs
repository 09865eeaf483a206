//! Who talked to whom, proven: the access log's identities, and the certificates behind them.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
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
        let mut lines = Vec::new();
        report.show(
            &format!(
                "node {} holds a certificate of each identity that runs there, and of no other",
                node.letter()
            ),
            || {
                lines = certificates_in(&stage.mesh.daemon(node).config_dump()?)?;
                let held: BTreeSet<&str> = lines.iter().filter_map(|line| line.split_whitespace().next()).collect();
                ensure!(
                    held == BTreeSet::from(identities),
                    "it holds {held:?}, not {identities:?}"
                );
                Ok(String::new())
            },
        );
        for line in &lines {
            report.quote(line);
        }
    }
}

/// One line per certificate of the daemon: its identity, then whatever else the daemon tells of it.
fn certificates_in(dump: &Value) -> Result<Vec<String>> {
    let entries = dump["certificates"]
        .as_array()
        .context("the config dump has no certificates")?;
    let mut lines = Vec::new();
    for entry in entries {
        let object = entry
            .as_object()
            .context("a certificate in the config dump is no object")?;
        let mut name = None;
        let mut rest = Vec::new();
        for (key, value) in object {
            match value {
                Value::String(text) if text.starts_with("spiffe://") => name = Some(text.clone()),
                Value::String(text) => rest.push(format!("{key} {text}")),
                Value::Number(number) => rest.push(format!("{key} {number}")),
                Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => {}
            }
        }
        lines.push(format!(
            "{}  {}",
            name.context("a certificate without an identity")?,
            rest.join(", ")
        ));
    }
    lines.sort();
    Ok(lines)
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
    fn certificates_are_listed_by_identity() -> Result<()> {
        let dump = serde_json::json!({"certificates": [{"identity": WEB, "notAfter": "tomorrow"}]});
        assert_eq!(certificates_in(&dump)?, [format!("{WEB}  notAfter tomorrow")]);
        assert!(certificates_in(&serde_json::json!({})).is_err());
        Ok(())
    }
}

//! The tables, with the columns that Istio's users know. Pure: from a dump to text.

use crate::telemetry::dump::Dump;
use std::{fmt::Display, iter};

/// What stands where there is nothing, as `istioctl` has it.
const NONE: &str = "None";
const GAP: usize = 3;

pub(super) fn workloads(dump: &Dump) -> String {
    let rows = dump.workloads.iter().map(|w| {
        [
            w.namespace.clone(),
            w.name.clone(),
            joined(&w.workload_ips),
            or_none(w.node.as_ref()),
            or_none(w.waypoint.as_ref()),
            w.protocol.clone(),
        ]
    });
    table(
        ["NAMESPACE", "POD NAME", "ADDRESS", "NODE", "WAYPOINT", "PROTOCOL"],
        rows,
    )
}

pub(super) fn services(dump: &Dump) -> String {
    let rows = dump.services.iter().map(|s| {
        let ready = s.endpoints.iter().filter(|e| e.ready).count();
        [
            s.namespace.clone(),
            s.name.clone(),
            joined(&s.vips),
            or_none(s.waypoint.as_ref()),
            format!("{ready}/{}", s.endpoints.len()),
        ]
    });
    table(
        ["NAMESPACE", "SERVICE NAME", "SERVICE VIP", "WAYPOINT", "ENDPOINTS"],
        rows,
    )
}

pub(super) fn policies(dump: &Dump) -> String {
    let rows = dump.policies.iter().map(|p| {
        let action = if p.dry_run {
            format!("{} (dry run)", p.action)
        } else {
            p.action.clone()
        };
        [p.namespace.clone(), p.name.clone(), action, p.scope.clone()]
    });
    table(["NAMESPACE", "POLICY NAME", "ACTION", "SCOPE"], rows)
}

pub(super) fn certificates(dump: &Dump) -> String {
    let rows = dump.certificates.iter().map(|c| {
        [
            c.name.clone(),
            c.kind.clone(),
            c.status.clone(),
            c.valid.to_string(),
            or_none(c.serial_number.as_ref()),
            or_none(c.not_after.as_ref()),
            or_none(c.not_before.as_ref()),
        ]
    });
    let titles = [
        "CERTIFICATE NAME",
        "TYPE",
        "STATUS",
        "VALID CERT",
        "SERIAL NUMBER",
        "NOT AFTER",
        "NOT BEFORE",
    ];
    table(titles, rows)
}

pub(super) fn connections(dump: &Dump) -> String {
    let rows = dump.connections.iter().map(|c| {
        [
            c.workload.clone(),
            c.direction.clone(),
            c.local.to_string(),
            c.remote.to_string(),
            or_none(c.remote_target.as_ref()),
            c.protocol.clone(),
        ]
    });
    table(
        ["WORKLOAD", "DIRECTION", "LOCAL", "REMOTE", "REMOTE TARGET", "PROTOCOL"],
        rows,
    )
}

fn or_none(text: Option<&String>) -> String {
    text.cloned().unwrap_or_else(|| NONE.to_owned())
}

fn joined<T: Display>(all: &[T]) -> String {
    if all.is_empty() {
        return NONE.to_owned();
    }
    all.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

/// Columns as wide as their widest cell. What a daemon sends is shown, not obeyed: control characters become `?`.
fn table<const N: usize>(titles: [&str; N], rows: impl Iterator<Item = [String; N]>) -> String {
    let rows: Vec<[String; N]> = iter::once(titles.map(str::to_owned)).chain(rows).collect();
    let rows: Vec<[String; N]> = rows
        .into_iter()
        .map(|row| row.map(|cell| cell.replace(char::is_control, "?")))
        .collect();
    let mut widths = [0; N];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let mut text = String::new();
    for row in &rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(widths) {
            line.push_str(cell);
            line.extend(iter::repeat_n(' ', width - cell.chars().count() + GAP));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

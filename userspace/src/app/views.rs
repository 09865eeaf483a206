//! The state of the parts as the admin port and the metrics show it.

use crate::{
    certs::{
        CertificateSummary,
        store::{CertificateKind, CertificateStatus},
    },
    kernel::Reason,
    kubernetes::{Problem, journal::Publication},
    proxy::Open,
    telemetry::{Reporter, dump},
};
use std::{sync::Arc, time::UNIX_EPOCH};

pub(super) fn certificates(list: &[CertificateSummary]) -> Vec<dump::Certificate> {
    let lines = list.iter().map(|certificate| dump::Certificate {
        name: certificate.name.clone(),
        kind: match certificate.kind {
            CertificateKind::Leaf => "Leaf".to_owned(),
            CertificateKind::Root => "Root".to_owned(),
        },
        status: match &certificate.status {
            CertificateStatus::Available => "Available".to_owned(),
            CertificateStatus::Initializing => "Initializing".to_owned(),
            CertificateStatus::Unavailable(why) => format!("Unavailable: {why}"),
        },
        valid: certificate.valid,
        serial_number: certificate.serial.clone(),
        not_before: certificate.not_before.map(dump::moment),
        not_after: certificate.not_after.map(dump::moment),
    });
    lines.collect()
}

pub(super) fn kernel_counters(counters: &[(Reason, u64)]) -> Vec<dump::KernelCounter> {
    let lines = counters.iter().map(|(reason, count)| dump::KernelCounter {
        reason: reason.name().to_owned(),
        count: *count,
    });
    lines.collect()
}

pub(super) fn problems(list: &[Problem]) -> Vec<dump::Problem> {
    let lines = list.iter().map(|problem| dump::Problem {
        origin: problem.origin.as_ref().map(ToString::to_string),
        object: problem.object.as_ref().map(ToString::to_string),
        field: problem.finding.field.clone(),
        problem: problem.finding.flaw.to_string(),
        advice: problem.finding.flaw.advice().to_owned(),
    });
    lines.collect()
}

pub(super) fn connections(list: &[Arc<Open>]) -> Vec<dump::Connection> {
    let lines = list.iter().map(|open| {
        let facts = &open.facts;
        let (direction, own, local, remote) = match facts.reporter {
            Reporter::Source => ("Outbound", &facts.source, open.source, open.destination),
            Reporter::Destination => ("Inbound", &facts.destination, open.destination, open.source),
        };
        dump::Connection {
            workload: own
                .as_ref()
                .map(|workload| format!("{}/{}", workload.namespace, workload.name))
                .unwrap_or_default(),
            direction: direction.to_owned(),
            local,
            remote,
            remote_target: facts.service.as_ref().map(ToString::to_string),
            protocol: if open.hbone_target.is_some() { "HBONE" } else { "TCP" }.to_owned(),
        }
    });
    lines.collect()
}

pub(super) fn publications(list: &[Publication]) -> Vec<dump::Publication> {
    let lines = list.iter().map(|publication| {
        let since_epoch = publication.at.duration_since(UNIX_EPOCH).unwrap_or_default();
        let reach = publication.reach.iter();
        dump::Publication {
            snapshot: publication.snapshot,
            published_at: u64::try_from(since_epoch.as_micros()).unwrap_or(u64::MAX),
            reach: reach
                .map(|(kind, version)| (kind.word().to_owned(), *version))
                .collect(),
        }
    });
    lines.collect()
}

//! Workloads and connections that the tests of this folder tell about.

use super::labels::{ConnectionFacts, Reporter, SecurityPolicy};
use crate::mesh::{SpiffeId, Workload, WorkloadUid, fixtures, service::ServiceKey};
use std::{
    collections::BTreeMap,
    sync::{Arc, LazyLock},
    time::{Duration, SystemTime},
};

/// 2024-08-21T15:32:05.754291Z
pub(super) static NOW: LazyLock<SystemTime> =
    LazyLock::new(|| SystemTime::UNIX_EPOCH + Duration::from_micros(1_724_254_325_754_291));

pub(super) fn workload(uid: &str, pod: &str, owner: &str, labels: &[(&str, &str)]) -> Workload {
    Workload {
        uid: WorkloadUid(uid.into()),
        name: pod.into(),
        labels: Arc::new(
            labels
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
                .collect::<BTreeMap<_, _>>(),
        ),
        ..fixtures::workload("ambient", owner, "10.77.1.11")
    }
}

pub(super) fn identity(account: &str) -> SpiffeId {
    SpiffeId::parse(&format!("spiffe://cluster.local/ns/ambient/sa/{account}")).unwrap()
}

/// echo-1 calls the service echo-2, over mutual TLS.
pub(super) fn mesh_facts() -> ConnectionFacts {
    ConnectionFacts {
        reporter: Reporter::Source,
        source: Some(Arc::new(workload(
            "uid-1",
            "echo-1-7d4c8b9f5-abc12",
            "echo-1",
            &[("app", "echo"), ("version", "v1")],
        ))),
        destination: Some(Arc::new(workload("uid-2", "echo-2-5f884b787f-8mrp4", "echo-2", &[]))),
        service: Some(ServiceKey {
            namespace: "ambient".into(),
            name: "echo-2".into(),
        }),
        source_principal: Some(identity("echo-1")),
        destination_principal: Some(identity("echo-2")),
        security: SecurityPolicy::MutualTls,
    }
}

/// Someone outside the mesh calls echo-2 in plaintext.
pub(super) fn stranger_facts() -> ConnectionFacts {
    ConnectionFacts {
        reporter: Reporter::Destination,
        source: None,
        service: None,
        source_principal: None,
        destination_principal: None,
        security: SecurityPolicy::Unknown,
        ..mesh_facts()
    }
}

//! Pods, as far as they matter.

use super::{Meta, legible};
use crate::kubernetes::{
    enrolment::{Mode, NETNS, REDIRECTION, SIDECAR_STATUS},
    field::{Field, Findings},
    problem::{Finding, Flaw},
};
use std::{collections::BTreeMap, net::IpAddr, path::PathBuf, sync::Arc, time::SystemTime};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(in crate::kubernetes) enum Phase {
    /// Pending, Unknown, or a word that nobody knows.
    NotRunning,
    /// Running, or not said.
    Running,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::kubernetes) struct Pod {
    pub(in crate::kubernetes) uid: Option<Arc<str>>,
    pub(in crate::kubernetes) created: Option<SystemTime>,
    pub(in crate::kubernetes) labels: Arc<BTreeMap<String, String>>,
    pub(in crate::kubernetes) mode: Option<Mode>,
    /// `ambient.istio.io/redirection: enabled`.
    pub(in crate::kubernetes) redirected: bool,
    pub(in crate::kubernetes) sidecar: bool,
    pub(in crate::kubernetes) netns: Option<PathBuf>,
    pub(in crate::kubernetes) service_account: Arc<str>,
    pub(in crate::kubernetes) node: Option<Arc<str>>,
    pub(in crate::kubernetes) host_network: bool,
    pub(in crate::kubernetes) runtime_class: Option<Arc<str>>,
    pub(in crate::kubernetes) addresses: Vec<IpAddr>,
    pub(in crate::kubernetes) phase: Phase,
    pub(in crate::kubernetes) owner: Arc<str>,
}

impl Pod {
    /// `None` for a pod that has ended.
    ///
    /// # Errors
    /// A field without which it is unclear what the pod is.
    pub(in crate::kubernetes) fn read(
        meta: &Meta,
        object: &Field<'_>,
        findings: &mut Findings,
    ) -> Result<Option<Self>, Finding> {
        let (spec, status) = (object.get("spec"), object.get("status"));
        let phase = match status.get("phase").text(findings) {
            Some("Succeeded" | "Failed") => return Ok(None),
            Some("Running") | None => Phase::Running,
            Some(_) => Phase::NotRunning,
        };
        let host_network = legible(&spec.get("hostNetwork"), findings, Field::flag)?.unwrap_or(false);
        let account = legible(&spec.get("serviceAccountName"), findings, Field::text)?;
        let account = account.filter(|account| !account.is_empty()).unwrap_or("default");
        let mut addresses = Vec::new();
        let listed = status.get("podIPs").list(findings);
        let fields = listed.iter().map(|entry| entry.get("ip")).chain([status.get("podIP")]);
        for address in fields.filter_map(|field| field.address(findings)) {
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
        if addresses.is_empty() && phase == Phase::Running {
            findings.add(&status.get("podIPs"), Flaw::NoAddress);
        }
        let owner = owner(meta, object, findings);
        Ok(Some(Self {
            uid: meta.uid.clone(),
            created: meta.created,
            mode: meta.mode(findings),
            redirected: meta
                .annotations
                .get(REDIRECTION)
                .is_some_and(|value| value == "enabled"),
            sidecar: meta.annotations.contains_key(SIDECAR_STATUS),
            netns: meta.annotations.get(NETNS).map(PathBuf::from),
            service_account: account.into(),
            node: spec
                .get("nodeName")
                .text(findings)
                .filter(|node| !node.is_empty())
                .map(Into::into),
            host_network,
            runtime_class: spec.get("runtimeClassName").text(findings).map(Into::into),
            addresses,
            phase,
            owner: owner.unwrap_or_else(|| Arc::clone(&meta.name)),
            labels: Arc::new(meta.labels.clone()),
        }))
    }
}

/// The name people know the workload by: the Deployment's, not its ReplicaSet's; the CronJob's, not its Job's.
fn owner(meta: &Meta, object: &Field<'_>, findings: &mut Findings) -> Option<Arc<str>> {
    let owners = object.get("metadata").get("ownerReferences").list(findings);
    let owner = owners
        .iter()
        .find(|owner| owner.get("controller").flag(findings) == Some(true))?;
    let name = owner.get("name").text(findings)?;
    let stem = match owner.get("kind").text(findings) {
        Some("ReplicaSet") => {
            let hash = meta.labels.get("pod-template-hash");
            hash.and_then(|hash| name.strip_suffix(hash.as_str()))
                .and_then(|stem| stem.strip_suffix('-'))
        }
        Some("Job") => name
            .rsplit_once('-')
            .filter(|(_, time)| (8..=10).contains(&time.len()) && time.bytes().all(|byte| byte.is_ascii_digit()))
            .map(|(stem, _)| stem),
        Some(_) | None => None,
    };
    Some(stem.filter(|stem| !stem.is_empty()).unwrap_or(name).into())
}

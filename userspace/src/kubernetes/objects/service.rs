//! Services and EndpointSlices, as far as they matter.

use super::{DISTRIBUTIONS, Meta, distribution};
use crate::kubernetes::{
    field::{Field, Findings},
    problem::{Finding, Flaw},
};
use crate::mesh::service::{Affinity, ServiceKey, ServicePort, TrafficDistribution};
use std::{net::IpAddr, sync::Arc, time::Duration, time::SystemTime};

/// Kubernetes' default for `sessionAffinityConfig.clientIP.timeoutSeconds`.
const AFFINITY_TIMEOUT: Duration = Duration::from_secs(10_800);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::kubernetes) struct Service {
    pub(in crate::kubernetes) created: Option<SystemTime>,
    pub(in crate::kubernetes) vips: Vec<IpAddr>,
    pub(in crate::kubernetes) ports: Vec<ServicePort>,
    pub(in crate::kubernetes) affinity: Affinity,
    pub(in crate::kubernetes) distribution: Option<TrafficDistribution>,
    pub(in crate::kubernetes) local_only: bool,
    pub(in crate::kubernetes) publish_not_ready: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::kubernetes) struct EndpointSlice {
    pub(in crate::kubernetes) service: ServiceKey,
    /// (name, port); a missing name is the empty one, as in the Service.
    pub(in crate::kubernetes) ports: Vec<(Box<str>, Option<u16>)>,
    pub(in crate::kubernetes) endpoints: Vec<SliceEndpoint>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::kubernetes) struct SliceEndpoint {
    pub(in crate::kubernetes) address: IpAddr,
    pub(in crate::kubernetes) ready: bool,
    pub(in crate::kubernetes) node: Option<Arc<str>>,
    pub(in crate::kubernetes) zone: Option<Arc<str>>,
    /// The pod it stands for: needed for pods that share their node's address.
    pub(in crate::kubernetes) pod: Option<Arc<str>>,
}

impl Service {
    /// `None` for one that is only a name for something outside.
    pub(in crate::kubernetes) fn read(meta: &Meta, object: &Field<'_>, findings: &mut Findings) -> Option<Self> {
        let spec = object.get("spec");
        if spec.get("type").text(findings) == Some("ExternalName") {
            return None;
        }
        let listed = spec.get("clusterIPs").list(findings);
        let mut vips = Vec::new();
        for field in listed.iter().cloned().chain([spec.get("clusterIP")]) {
            if field.is_absent() || matches!(field.text(findings), Some("None" | "")) {
                continue;
            }
            match field.address(findings) {
                Some(vip) if !vips.contains(&vip) => vips.push(vip),
                Some(_) | None => {}
            }
        }
        let mut ports = Vec::new();
        for entry in spec.get("ports").list(findings) {
            if entry.get("protocol").text(findings).unwrap_or("TCP") != "TCP" {
                continue;
            }
            let field = entry.get("port");
            if field.is_absent() {
                findings.add(&field, Flaw::Missing);
            }
            if let Some(port) = field.port(findings) {
                let name = entry
                    .get("name")
                    .text(findings)
                    .filter(|name| !name.is_empty())
                    .map(Into::into);
                ports.push(ServicePort { name, port });
            }
        }
        let affinity = match spec.get("sessionAffinity").text(findings) {
            Some("ClientIP") => {
                let seconds = object
                    .get("spec")
                    .get("sessionAffinityConfig")
                    .get("clientIP")
                    .get("timeoutSeconds");
                let timeout = seconds.number(findings).map_or(AFFINITY_TIMEOUT, Duration::from_secs);
                Affinity::ClientIp { timeout }
            }
            Some("None") | None => Affinity::None,
            Some(other) => {
                let flaw = Flaw::WrongValue {
                    value: other.to_owned(),
                    expected: "ClientIP or None; read as None",
                };
                findings.add(&spec.get("sessionAffinity"), flaw);
                Affinity::None
            }
        };
        let field = spec.get("trafficDistribution");
        let own = field.text(findings).and_then(|text| {
            let distribution = distribution(text);
            if distribution.is_none() {
                findings.add(
                    &field,
                    Flaw::WrongValue {
                        value: text.to_owned(),
                        expected: DISTRIBUTIONS,
                    },
                );
            }
            distribution
        });
        Some(Self {
            created: meta.created,
            vips,
            ports,
            affinity,
            distribution: own.or_else(|| meta.distribution(findings)),
            local_only: spec.get("internalTrafficPolicy").text(findings) == Some("Local"),
            publish_not_ready: spec.get("publishNotReadyAddresses").flag(findings).unwrap_or(false),
        })
    }
}

impl EndpointSlice {
    /// `None` for a slice of host names.
    ///
    /// # Errors
    /// A slice that does not say which service it belongs to.
    pub(in crate::kubernetes) fn read(
        meta: &Meta,
        object: &Field<'_>,
        findings: &mut Findings,
    ) -> Result<Option<Self>, Finding> {
        if object.get("addressType").text(findings) == Some("FQDN") {
            return Ok(None);
        }
        let Some(service) = meta.label("kubernetes.io/service-name") else {
            return Err(Finding::new(
                "metadata.labels.kubernetes.io/service-name",
                Flaw::Missing,
            ));
        };
        let mut ports = Vec::new();
        for entry in object.get("ports").list(findings) {
            if entry.get("protocol").text(findings).unwrap_or("TCP") == "TCP" {
                let port = entry.get("port");
                let number = port.port(findings);
                if number.is_some() || port.is_absent() {
                    ports.push((entry.get("name").text(findings).unwrap_or_default().into(), number));
                }
            }
        }
        let mut endpoints = Vec::new();
        for entry in object.get("endpoints").list(findings) {
            // All addresses of an endpoint are the same pod's; consumers take the first.
            let Some(address) = entry
                .get("addresses")
                .list(findings)
                .first()
                .and_then(|first| first.address(findings))
            else {
                if entry.get("addresses").is_absent() {
                    findings.add(&entry.get("addresses"), Flaw::Missing);
                }
                continue;
            };
            let target = entry.get("targetRef");
            let is_pod = target.get("kind").text(findings).unwrap_or("Pod") == "Pod";
            endpoints.push(SliceEndpoint {
                address,
                ready: entry.get("conditions").get("ready").flag(findings).unwrap_or(true),
                node: entry.get("nodeName").text(findings).map(Into::into),
                zone: entry.get("zone").text(findings).map(Into::into),
                pod: target.get("name").text(findings).filter(|_| is_pod).map(Into::into),
            });
        }
        Ok(Some(Self {
            service: ServiceKey {
                namespace: Arc::clone(&meta.namespace),
                name: service,
            },
            ports,
            endpoints,
        }))
    }
}

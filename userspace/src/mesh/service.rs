//! A service: addresses that stand for endpoints. A VIP is never an endpoint's IP.

use super::WorkloadUid;
use std::{fmt, net::IpAddr, sync::Arc, time::Duration};

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ServiceKey {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Which endpoints are preferred; the others serve when none of the preferred is ready.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum TrafficDistribution {
    #[default]
    Any,
    PreferSameZone,
    PreferSameNode,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Affinity {
    #[default]
    None,
    /// The same client keeps its endpoint for this long after its last connection.
    ClientIp { timeout: Duration },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServicePort {
    pub name: Option<Arc<str>>,
    pub port: u16,
}

/// One address behind a service, with the ports it serves there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Endpoint {
    pub address: IpAddr,
    /// The pod behind the address, if it is one that we know.
    pub workload: Option<WorkloadUid>,
    pub node: Option<Arc<str>>,
    pub zone: Option<Arc<str>>,
    pub ready: bool,
    /// (service port, target port)
    pub ports: Vec<(u16, u16)>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    pub key: ServiceKey,
    /// ClusterIPs of both families; empty for a headless service.
    pub vips: Vec<IpAddr>,
    pub ports: Vec<ServicePort>,
    pub endpoints: Vec<Endpoint>,
    pub affinity: Affinity,
    pub distribution: TrafficDistribution,
    /// `internalTrafficPolicy: Local`: endpoints of the caller's node alone.
    pub local_only: bool,
    pub publish_not_ready: bool,
}

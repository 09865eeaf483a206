//! What a world should consist of: nodes, pods, services, and the numbers in their addresses. Plain values.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, Ipv6Addr};

/// One of the two nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Node {
    A,
    B,
}

impl Node {
    pub const BOTH: [Self; 2] = [Self::A, Self::B];

    pub fn letter(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
        }
    }

    /// 1 or 2: the third byte of its pods' addresses.
    pub fn number(self) -> u8 {
        match self {
            Self::A => 1,
            Self::B => 2,
        }
    }

    pub(super) fn index(self) -> usize {
        usize::from(self.number() - 1)
    }

    /// Its pods' ranges, as in `spec.podCIDRs`.
    pub fn pod_ranges(self) -> [String; 2] {
        let number = self.number();
        [format!("10.77.{number}.0/24"), format!("fd77::{number}:0/112")]
    }
}

/// What a pod should be like.
#[derive(Debug, Clone)]
pub struct PodSpec {
    pub name: String,
    pub node: Node,
    /// The Kubernetes namespace.
    pub namespace: String,
    pub service_account: String,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
    /// Whether the pod is in the mesh; one that is not is still in the manifests.
    pub in_mesh: bool,
    /// The last number of its addresses; chosen from 10 on if absent.
    pub number: Option<u8>,
    /// Whether its processes run where the node's daemon sees them: below the node's cgroup.
    pub below_node_cgroup: bool,
}

impl PodSpec {
    /// A pod of the mesh, in the namespace `default`, with a service account and a label `app` of its own name.
    pub fn new(name: impl Into<String>, node: Node) -> Self {
        let name = name.into();
        Self {
            node,
            namespace: "default".to_owned(),
            service_account: name.clone(),
            labels: BTreeMap::from([("app".to_owned(), name.clone())]),
            annotations: BTreeMap::new(),
            in_mesh: true,
            number: None,
            below_node_cgroup: true,
            name,
        }
    }

    /// A pod that never joins the mesh.
    pub fn outsider(name: impl Into<String>, node: Node) -> Self {
        Self {
            in_mesh: false,
            ..Self::new(name, node)
        }
    }

    /// Out of sight of every kernel program of the mesh: what the mesh is compared with must not run them.
    #[must_use]
    pub fn beyond_node_cgroup(self) -> Self {
        Self {
            below_node_cgroup: false,
            ..self
        }
    }

    #[must_use]
    pub fn namespace(self, namespace: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            ..self
        }
    }

    #[must_use]
    pub fn service_account(self, service_account: impl Into<String>) -> Self {
        Self {
            service_account: service_account.into(),
            ..self
        }
    }

    #[must_use]
    pub fn label(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.labels.insert(key.into(), value.into());
        self
    }

    #[must_use]
    pub fn annotation(mut self, key: impl Into<String>, value: impl Into<String>) -> Self {
        self.annotations.insert(key.into(), value.into());
        self
    }

    #[must_use]
    pub fn number(self, number: u8) -> Self {
        Self {
            number: Some(number),
            ..self
        }
    }
}

/// A Service of one TCP port; its endpoints are the pods of its namespace with the label `app: APP`.
#[derive(Debug, Clone)]
pub struct ServiceSpec {
    pub name: String,
    pub namespace: String,
    pub app: String,
    pub port: u16,
    pub target_port: u16,
    /// The last number of its VIPs, 10.96.0.N and fd96::N.
    pub number: u8,
}

impl ServiceSpec {
    /// A service in the namespace `default` named as the app it selects, its target port that of the service.
    pub fn new(app: impl Into<String>, number: u8, port: u16) -> Self {
        let app = app.into();
        Self {
            name: app.clone(),
            namespace: "default".to_owned(),
            app,
            port,
            target_port: port,
            number,
        }
    }

    #[must_use]
    pub fn namespace(self, namespace: impl Into<String>) -> Self {
        Self {
            namespace: namespace.into(),
            ..self
        }
    }

    #[must_use]
    pub fn target_port(self, target_port: u16) -> Self {
        Self { target_port, ..self }
    }

    pub fn v4(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 96, 0, self.number)
    }

    pub fn v6(&self) -> Ipv6Addr {
        v6_of(format_args!("fd96::{}", self.number))
    }
}

/// Numbers are written as digits, so that fd77::1:10 belongs to 10.77.1.10.
#[track_caller]
pub(super) fn v6_of(text: std::fmt::Arguments<'_>) -> Ipv6Addr {
    match text.to_string().parse() {
        Ok(address) => address,
        Err(error) => panic!("{text}: {error}"),
    }
}

//! PeerAuthentication: whether a workload takes plaintext.

use super::Scope;
use crate::mesh::{MeshSnapshot, Workload};
use std::{collections::BTreeMap, sync::Arc, time::SystemTime};

/// One PeerAuthentication, parsed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerAuth {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    /// `creationTimestamp`: of two policies of one level the oldest wins; one without a time is younger than all.
    pub created: Option<SystemTime>,
    pub scope: Scope,
    /// `None` is UNSET: the level above decides. DISABLE counts as PERMISSIVE.
    pub mode: Option<MutualTls>,
    /// `portLevelMtls`, which counts only with a selector; `None` is UNSET: the workload's mode.
    pub ports: BTreeMap<u16, Option<MutualTls>>,
    /// It cannot be understood: what it selects is STRICT, whatever else says.
    pub unreadable: bool,
}

/// What a workload does with plaintext.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MutualTls {
    Permissive,
    Strict,
}

/// The effective mode of `workload` at `port`.
pub fn mutual_tls(snapshot: &MeshSnapshot, workload: &Workload, port: u16) -> MutualTls {
    let effective = Effective::of(snapshot, workload);
    effective
        .ports
        .and_then(|ports| ports.get(&port).copied().flatten())
        .unwrap_or(effective.mode)
}

/// The mode of `workload` at every port that `port_modes` does not name.
pub fn workload_mode(snapshot: &MeshSnapshot, workload: &Workload) -> MutualTls {
    Effective::of(snapshot, workload).mode
}

/// Ports whose mode differs from the workload's own, by number.
pub fn port_modes(snapshot: &MeshSnapshot, workload: &Workload) -> Vec<(u16, MutualTls)> {
    let effective = Effective::of(snapshot, workload);
    let ports = effective.ports.into_iter().flatten();
    ports
        .filter_map(|(port, mode)| Some((*port, (*mode)?)))
        .filter(|(_, mode)| *mode != effective.mode)
        .collect()
}

impl PeerAuth {
    /// One that sets a mode for its whole namespace, or for the mesh where that is the root namespace.
    pub fn of_namespace(namespace: Arc<str>, name: Arc<str>, mode: Option<MutualTls>) -> Self {
        Self {
            namespace,
            name,
            created: None,
            scope: Scope::Namespace,
            mode,
            ports: BTreeMap::new(),
            unreadable: false,
        }
    }

    /// What stands in for a policy that nobody can read: everything it might select is STRICT.
    pub fn unreadable(namespace: Arc<str>, name: Arc<str>) -> Self {
        Self {
            unreadable: true,
            ..Self::of_namespace(namespace, name, Some(MutualTls::Strict))
        }
    }

    fn age(&self) -> (bool, Option<SystemTime>, &str, &str) {
        (self.created.is_none(), self.created, &self.name, &self.namespace)
    }
}

struct Effective<'a> {
    mode: MutualTls,
    ports: Option<&'a BTreeMap<u16, Option<MutualTls>>>,
}

impl<'a> Effective<'a> {
    fn of(snapshot: &'a MeshSnapshot, workload: &'a Workload) -> Self {
        let (mut mesh, mut namespace, mut own): (Option<&PeerAuth>, Option<&PeerAuth>, Option<&PeerAuth>) =
            Default::default();
        for policy in snapshot.peer_auths.selecting(&snapshot.root_namespace, workload) {
            if policy.unreadable {
                return Self {
                    mode: MutualTls::Strict,
                    ports: None,
                };
            }
            let level = match policy.scope {
                Scope::Selector(_) => &mut own,
                Scope::Namespace if policy.namespace == snapshot.root_namespace => &mut mesh,
                Scope::Namespace => &mut namespace,
                Scope::Waypoint => continue,
            };
            if level.is_none_or(|oldest| policy.age() < oldest.age()) {
                *level = Some(policy);
            }
        }
        let mode = [own, namespace, mesh]
            .into_iter()
            .flatten()
            .find_map(|policy| policy.mode);
        Self {
            mode: mode.unwrap_or(MutualTls::Permissive),
            ports: own.map(|policy| &policy.ports),
        }
    }
}

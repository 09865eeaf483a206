//! Who may call whom: AuthorizationPolicy and PeerAuthentication at L4, as Istio defines them. Not here: reading them
//! from Kubernetes objects, and HTTP.

mod form;
mod peer_auth;
mod scope;
#[cfg(test)]
mod tests;

pub use form::{AccountPattern, Action, Authorization, Condition, OneOf, Operation, Pattern, Rule, Source};
pub use peer_auth::{MutualTls, PeerAuth, mutual_tls, port_modes, workload_mode};
pub use scope::{Policies, Policy, Scope};

use super::{MeshSnapshot, SpiffeId, Workload};
use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

/// A connection as policy sees it, from the destination's side.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// The client's address; the port is 0 where unknown.
    pub source: SocketAddr,
    /// Proved by mutual TLS; `None` for plaintext.
    pub peer: Option<SpiffeId>,
    /// The pod's address and port.
    pub destination: SocketAddr,
}

/// What policy says, and by which rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// No ALLOW policy selects the workload and no DENY matches.
    AllowedByDefault,
    AllowedBy {
        namespace: Arc<str>,
        name: Arc<str>,
    },
    DeniedBy {
        namespace: Arc<str>,
        name: Arc<str>,
    },
    /// ALLOW policies select the workload, and none of them matches.
    NotAllowed,
}

impl Verdict {
    pub fn allows(&self) -> bool {
        matches!(self, Self::AllowedByDefault | Self::AllowedBy { .. })
    }
}

/// Decides one connection towards `workload`.
pub fn authorize(snapshot: &MeshSnapshot, workload: &Workload, facts: &Facts) -> Verdict {
    verdict(snapshot, workload, facts, |policy| !policy.dry_run)
}

/// What `authorize` would say if the policies marked `istio.io/dry-run` were enforced; `None` where none selects the
/// workload.
pub fn dry_run(snapshot: &MeshSnapshot, workload: &Workload, facts: &Facts) -> Option<Verdict> {
    snapshot
        .authorizations
        .selecting(&snapshot.root_namespace, workload)
        .any(|policy| policy.dry_run)
        .then(|| verdict(snapshot, workload, facts, |_| true))
}

/// True if no AuthorizationPolicy selects the workload: anyone may call, whatever the daemon's state.
pub fn unrestricted(snapshot: &MeshSnapshot, workload: &Workload) -> bool {
    !snapshot
        .authorizations
        .selecting(&snapshot.root_namespace, workload)
        .any(|policy| !policy.dry_run && matches!(policy.action, Action::Allow | Action::Deny))
}

/// True if no policy changed between the two snapshots that could reach a workload of `namespace`; its labels may have.
/// Costs two look-ups, so that open connections are asked again only when it can matter.
pub fn unchanged(old: &MeshSnapshot, new: &MeshSnapshot, namespace: &str) -> bool {
    old.root_namespace == new.root_namespace
        && old
            .authorizations
            .unchanged_for(&new.authorizations, &new.root_namespace, namespace)
        && old
            .peer_auths
            .unchanged_for(&new.peer_auths, &new.root_namespace, namespace)
}

/// The addresses that no policy can speak about: they never name a peer.
pub fn is_loopback_like(address: IpAddr) -> bool {
    let address = address.to_canonical();
    address.is_loopback() || address.is_unspecified()
}

fn verdict(
    snapshot: &MeshSnapshot,
    workload: &Workload,
    facts: &Facts,
    counts: impl Fn(&Authorization) -> bool,
) -> Verdict {
    let mut allow_exists = false;
    let mut allowed_by = None;
    for policy in snapshot
        .authorizations
        .selecting(&snapshot.root_namespace, workload)
        .filter(|policy| counts(policy))
    {
        match policy.action {
            Action::Deny if policy.matches(facts) => {
                return Verdict::DeniedBy {
                    namespace: Arc::clone(&policy.namespace),
                    name: Arc::clone(&policy.name),
                };
            }
            Action::Allow => {
                allow_exists = true;
                if allowed_by.is_none() && policy.matches(facts) {
                    allowed_by = Some(policy);
                }
            }
            Action::Deny | Action::Audit | Action::Custom => {}
        }
    }
    match allowed_by {
        Some(policy) => Verdict::AllowedBy {
            namespace: Arc::clone(&policy.namespace),
            name: Arc::clone(&policy.name),
        },
        None if allow_exists => Verdict::NotAllowed,
        None => Verdict::AllowedByDefault,
    }
}

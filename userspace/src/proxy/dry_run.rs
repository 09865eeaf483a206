//! What policies marked `istio.io/dry-run` would have decided about a connection: told in the log, never enforced.

use crate::mesh::{
    MeshSnapshot, Workload,
    policy::{self, Facts, Verdict},
};
use std::fmt;
use tracing::info;

/// Says it, where a policy of that kind selects the workload.
pub(super) fn tell(snapshot: &MeshSnapshot, workload: &Workload, asked: &Facts) {
    let Some(verdict) = policy::dry_run(snapshot, workload, asked) else {
        return;
    };
    info!(
        source = %asked.source,
        identity = asked.peer.as_ref().map(tracing::field::display),
        destination = %asked.destination,
        workload = %workload.uid,
        outcome = %Outcome(&verdict),
        "policies in dry run, if they were enforced"
    );
}

struct Outcome<'a>(&'a Verdict);

impl fmt::Display for Outcome<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Verdict::AllowedByDefault => f.write_str("allowed"),
            Verdict::AllowedBy { namespace, name } => write!(f, "allowed by {namespace}/{name}"),
            Verdict::DeniedBy { namespace, name } => write!(f, "denied by {namespace}/{name}"),
            Verdict::NotAllowed => f.write_str("denied: allow policies exist, but none allows it"),
        }
    }
}

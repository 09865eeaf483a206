//! From facts to findings. Pure: each file judges one side of it.

mod cluster;
mod installation;
mod mesh;

use super::{
    facts::Facts,
    finding::{Finding, Problem},
};

/// Everything that is wrong, by area, the graver first.
pub(crate) fn diagnose(facts: &Facts) -> Vec<Finding> {
    if let Some(why) = &facts.api_away {
        let advice = "see whether the cluster is up, and which one is meant: --kubeconfig, --context";
        return vec![Finding::error(Problem::ApiAway, "API server", why.clone(), advice)];
    }
    let mut findings = Vec::new();
    cluster::judge(facts, &mut findings);
    installation::judge(facts, &mut findings);
    mesh::judge(facts, &mut findings);
    findings.sort_by(|a, b| (a.problem.area(), b.severity).cmp(&(b.problem.area(), a.severity)));
    findings
}

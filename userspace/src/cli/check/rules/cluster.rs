//! What must be so of the cluster itself, before and after Warren is installed. Pure.

use super::super::{
    facts::{Facts, Node},
    finding::{Finding, Problem},
};

/// The oldest Kubernetes that Warren is tried with.
const KUBERNETES: (u32, u32) = (1, 28);
/// `sk_lookup` tells the interface from here on.
const KERNEL: (u32, u32) = (5, 17);
const ARCHITECTURES: [&str; 2] = ["amd64", "arm64"];

pub(super) fn judge(facts: &Facts, findings: &mut Vec<Finding>) {
    for (what, why) in &facts.unreadable {
        findings.push(Finding::warning(
            Problem::NotChecked,
            what.clone(),
            format!("cannot be read ({why}), so what depends on it was not checked"),
            "run the command with the rights of a cluster-admin",
        ));
    }
    if let Some(found) = facts.kubernetes
        && found < KUBERNETES
    {
        findings.push(Finding::error(
            Problem::KubernetesTooOld,
            format!("Kubernetes {}.{}", found.0, found.1),
            format!("Warren needs {}.{} or later", KUBERNETES.0, KUBERNETES.1),
            "upgrade the cluster",
        ));
    }
    facts.nodes.iter().for_each(|node| judge_node(node, findings));
    network(facts, findings);
    definitions(facts, findings);
    rights(facts, findings);
}

fn judge_node(node: &Node, findings: &mut Vec<Finding>) {
    let subject = format!("node {}", node.name);
    if node.system != "linux" {
        // Not one of those that the daemons are for.
        return;
    }
    if !ARCHITECTURES.contains(&node.architecture.as_str()) {
        findings.push(Finding::error(
            Problem::NodeUnsupported,
            subject,
            format!(
                "its architecture is {}, and Warren is built for amd64 and arm64",
                node.architecture
            ),
            "keep the pods of the mesh on other nodes, and the daemon by node.nodeSelector",
        ));
        return;
    }
    match kernel(&node.kernel) {
        Some(found) if found < KERNEL => findings.push(Finding::error(
            Problem::KernelTooOld,
            subject.clone(),
            format!(
                "its kernel is {}; Warren needs {}.{} (6.1 among the long-term ones), whose listener search can tell \
                 from where a connection comes",
                node.kernel, KERNEL.0, KERNEL.1
            ),
            "upgrade the node's operating system, or keep the pods of the mesh on other nodes",
        )),
        Some(_) | None => {}
    }
    health(node, &subject, findings);
}

/// What Kubernetes holds against it: no new pod starts there.
fn health(node: &Node, subject: &str, findings: &mut Vec<Finding>) {
    if let Some(why) = &node.not_ready {
        findings.push(Finding::warning(
            Problem::NodeNotReady,
            subject,
            format!("Kubernetes takes it for not ready: {why}"),
            &format!("kubectl describe node {}", node.name),
        ));
    }
    for pressure in &node.pressures {
        findings.push(Finding::warning(
            Problem::NodePressure,
            subject,
            format!("its kubelet reports {pressure}: it takes no new pods and may end some of those it has"),
            &match pressure.as_str() {
                "DiskPressure" => {
                    "free space on the disks of its kubelet and its images, or give it larger ones".to_owned()
                }
                _ => format!("give it more, or take pods off it: kubectl describe node {}", node.name),
            },
        ));
    }
}

/// `(6, 1)` of `6.1.0-18-amd64`.
fn kernel(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn network(facts: &Facts, findings: &mut Vec<Finding>) {
    if let Some(cilium) = &facts.others.cilium {
        if cilium.socket_lb && !cilium.host_namespace_only {
            findings.push(Finding::error(
                Problem::CiliumSocketBalancing,
                "Cilium",
                "it rewrites a pod's connections to services inside the pod, before the mesh sees them: policies and \
                 identities of services would not apply",
                "set socketLB.hostNamespaceOnly=true in Cilium's Helm values, and restart its agents",
            ));
        }
        if cilium.cni_exclusive {
            findings.push(Finding::error(
                Problem::CiliumExclusive,
                "Cilium",
                "it removes other CNI plugins from the nodes, Warren's too: a pod would run before it is captured",
                "set cni.exclusive=false in Cilium's Helm values, and restart its agents",
            ));
        }
    }
    if let Some(calico) = &facts.others.calico
        && calico.bpf
        && calico.connect_time_balancing != "Disabled"
    {
        findings.push(Finding::error(
            Problem::CalicoConnectTimeBalancing,
            "Calico",
            "its eBPF data plane rewrites a pod's connections to services inside the pod, before the mesh sees them",
            "set bpfConnectTimeLoadBalancing: Disabled and bpfHostNetworkedNATWithoutCTLB: Enabled in FelixConfiguration \
             default",
        ));
    }
    if facts.others.aws_policy_mode.as_deref() == Some("strict") {
        findings.push(Finding::warning(
            Problem::StrictNetworkPolicy,
            "AWS VPC CNI",
            "NETWORK_POLICY_ENFORCING_MODE is strict: a new pod takes no connection until a NetworkPolicy allows it",
            "allow TCP port 15008 between the pods of the mesh by NetworkPolicy, or set the mode to standard",
        ));
    }
    for name in &facts.others.ambient {
        findings.push(Finding::error(
            Problem::SecondMesh,
            format!("DaemonSet {name}"),
            "Istio's own ambient mode is on these nodes, and would capture the same pods",
            "uninstall one of the two; the labels and policies stay as they are",
        ));
    }
}

fn definitions(facts: &Facts, findings: &mut Vec<Finding>) {
    for definition in &facts.definitions {
        if !definition.present {
            // `warren install` brings them.
            if !facts.before_install {
                findings.push(Finding::error(
                    Problem::DefinitionMissing,
                    definition.name.clone(),
                    "the cluster does not have this custom resource, so there can be no policy of the kind",
                    "run `warren install` again, or install the chart warren-crds",
                ));
            }
        } else if !definition
            .served
            .iter()
            .any(|version| version == "v1" || version == "v1beta1")
        {
            findings.push(Finding::error(
                Problem::DefinitionVersion,
                definition.name.clone(),
                format!(
                    "the cluster serves it as {} alone; Warren reads v1 and v1beta1",
                    definition.served.join(", ")
                ),
                "replace the definition by a newer one of Istio, or by that of the chart warren-crds",
            ));
        }
    }
}

fn rights(facts: &Facts, findings: &mut Vec<Finding>) {
    for right in &facts.missing_rights {
        let place = match &right.namespace {
            Some(namespace) => format!("in namespace {namespace}"),
            None => "in all namespaces".to_owned(),
        };
        let (subject, advice) = match &right.account {
            Some(account) => (
                format!("service account {account}"),
                "run `warren install` again (or `helm upgrade`): it restores the roles and their bindings",
            ),
            None => ("you".to_owned(), "ask for the rights of a cluster-admin"),
        };
        findings.push(Finding::error(
            Problem::RightMissing,
            subject,
            format!("may not {} {} {place}", right.verb, right.resource),
            advice,
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernels_version_is_its_first_two_numbers() {
        assert_eq!(kernel("6.1.0-18-amd64"), Some((6, 1)));
        assert_eq!(kernel("5.15.0-1053-aws"), Some((5, 15)));
        assert_eq!(kernel("6.18"), Some((6, 18)));
        assert_eq!(kernel("unknown"), None);
    }
}

//! What a cluster's API would say about a world, as YAML files for `--manifests`. Text only; the world decides when to write.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use crate::topology::{Node, Pod, PodSpec, ServiceSpec, World};

/// Writes `name` into `directory` so that a reader sees the old file or the whole new one.
pub fn write(directory: &Path, name: &str, yaml: &str) -> Result<()> {
    let (path, partial) = (directory.join(name), directory.join(format!(".{name}.partial")));
    fs::write(&partial, yaml).with_context(|| format!("write {}", partial.display()))?;
    fs::rename(&partial, &path).with_context(|| format!("rename to {}", path.display()))
}

/// Writes everything but the pods: nodes, ranges, namespaces, service accounts, services and their endpoints.
pub fn write_cluster(world: &World) -> Result<()> {
    let directory = world.manifest_directory();
    write(&directory, "cluster.yaml", &cluster(world))?;
    if world.services().is_empty() {
        Ok(())
    } else {
        write(&directory, "services.yaml", &services(world))
    }
}

pub fn pod_file(spec: &PodSpec) -> String {
    format!("pod-{}-{}.yaml", spec.namespace, spec.name)
}

fn cluster(world: &World) -> String {
    let mut documents = Vec::new();
    for node in Node::BOTH {
        let place = world.node(node);
        let [range4, range6] = node.pod_ranges();
        documents.push(format!(
            "apiVersion: v1\nkind: Node\nmetadata:\n  name: {name}\n  labels:\n    kubernetes.io/hostname: {name}\n    \
             topology.kubernetes.io/region: here\n    topology.kubernetes.io/zone: zone-{letter}\nspec:\n  podCIDR: {range4}\n  \
             podCIDRs:\n  - {range4}\n  - \"{range6}\"\nstatus:\n  addresses:\n  - {{type: InternalIP, address: {v4}}}\n  \
             - {{type: InternalIP, address: \"{v6}\"}}\n",
            name = place.name,
            letter = node.letter(),
            v4 = place.v4,
            v6 = place.v6,
        ));
    }
    documents.push(
        "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata:\n  name: kubernetes\nspec:\n  cidrs:\n  \
         - 10.96.0.0/16\n  - \"fd96::/112\"\n"
            .to_owned(),
    );
    let mut namespaces: Vec<&str> = world.pods().iter().map(|pod| pod.spec.namespace.as_str()).collect();
    namespaces.extend(world.services().iter().map(|service| service.namespace.as_str()));
    namespaces.sort_unstable();
    namespaces.dedup();
    for name in namespaces {
        documents.push(format!(
            "apiVersion: v1\nkind: Namespace\nmetadata:\n  name: {name}\n  labels:\n    kubernetes.io/metadata.name: {name}\n    \
             istio.io/dataplane-mode: ambient\n"
        ));
    }
    let mut accounts: Vec<(&str, &str)> = world
        .pods()
        .iter()
        .map(|pod| (pod.spec.namespace.as_str(), pod.spec.service_account.as_str()))
        .collect();
    accounts.sort_unstable();
    accounts.dedup();
    for (namespace, name) in accounts {
        documents.push(format!(
            "apiVersion: v1\nkind: ServiceAccount\nmetadata:\n  name: {name}\n  namespace: {namespace}\n"
        ));
    }
    documents.join("---\n")
}

/// The pod's manifest as its spec stands.
pub fn pod(pod: &Pod) -> String {
    let spec = &pod.spec;
    let mut text = format!(
        "apiVersion: v1\nkind: Pod\nmetadata:\n  name: {name}\n  namespace: {namespace}\n  uid: {uid}\n  labels:\n",
        name = spec.name,
        namespace = spec.namespace,
        uid = uid(pod),
    );
    for (key, value) in &spec.labels {
        text.push_str(&format!("    {key}: \"{value}\"\n"));
    }
    if !spec.in_mesh {
        text.push_str("    istio.io/dataplane-mode: none\n");
    }
    text.push_str("  annotations:\n");
    text.push_str(&format!("    warren.mesh/netns: {}\n", pod.namespace.path().display()));
    if spec.in_mesh {
        // In a cluster the capturing node writes it; a file has no such writer.
        text.push_str("    ambient.istio.io/redirection: enabled\n");
    }
    for (key, value) in &spec.annotations {
        text.push_str(&format!("    {key}: \"{value}\"\n"));
    }
    text.push_str(
        &format!(
            "spec:\n  nodeName: {node}\n  serviceAccountName: {account}\n  containers:\n  - {{name: app, image: app}}\nstatus:\n  \
             phase: Running\n  podIP: {v4}\n  podIPs:\n  - ip: {v4}\n  - ip: \"{v6}\"\n  conditions:\n  \
             - {{type: Ready, status: \"True\"}}\n",
            node = node_name(pod),
            account = spec.service_account,
            v4 = pod.v4,
            v6 = pod.v6,
        ),
    );
    text
}

fn services(world: &World) -> String {
    world
        .services()
        .iter()
        .flat_map(|spec| service_documents(world, spec))
        .collect::<Vec<_>>()
        .join("---\n")
}

fn service_documents(world: &World, service: &ServiceSpec) -> Vec<String> {
    let ServiceSpec {
        name,
        namespace,
        app,
        port,
        target_port,
        ..
    } = service;
    let mut documents = vec![format!(
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: {name}\n  namespace: {namespace}\nspec:\n  selector:\n    app: {app}\n  \
         clusterIP: {v4}\n  clusterIPs:\n  - {v4}\n  - \"{v6}\"\n  ipFamilies: [IPv4, IPv6]\n  ports:\n  \
         - {{name: tcp, protocol: TCP, port: {port}, targetPort: {target_port}}}\n",
        v4 = service.v4(),
        v6 = service.v6(),
    )];
    for (family, suffix) in [("IPv4", "v4"), ("IPv6", "v6")] {
        let mut text = format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata:\n  name: {name}-{suffix}\n  namespace: {namespace}\n  \
             labels:\n    kubernetes.io/service-name: {name}\naddressType: {family}\nports:\n\
             - {{name: tcp, protocol: TCP, port: {target_port}}}\nendpoints:\n"
        );
        let mut empty = true;
        for pod in world.pods() {
            if pod.spec.namespace != *namespace || pod.spec.labels.get("app") != Some(app) {
                continue;
            }
            empty = false;
            text.push_str(
                &format!(
                    "- addresses: [\"{ip}\"]\n  conditions: {{ready: true, serving: true, terminating: false}}\n  nodeName: {node}\n  \
                     zone: zone-{letter}\n  targetRef: {{kind: Pod, namespace: {namespace}, name: {pod_name}, uid: {uid}}}\n",
                    ip = pod.ip(family == "IPv6"),
                    node = node_name(pod),
                    letter = pod.spec.node.letter(),
                    pod_name = pod.spec.name,
                    uid = uid(pod),
                ),
            );
        }
        if empty {
            text = text.replace("endpoints:\n", "endpoints: []\n");
        }
        documents.push(text);
    }
    documents
}

/// The name of the node in the manifests is the name of its namespace.
fn node_name(pod: &Pod) -> String {
    let prefix = pod
        .name
        .strip_suffix(&format!("-{}", pod.spec.name))
        .unwrap_or(&pod.name);
    format!("{prefix}-{}", pod.spec.node.letter())
}

fn uid(pod: &Pod) -> String {
    format!(
        "00000000-0000-4000-8000-{:06x}{:06x}",
        pod.spec.node.number(),
        pod.spec.number.unwrap_or_default()
    )
}

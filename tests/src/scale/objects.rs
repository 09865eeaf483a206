//! The objects of a generated cluster, as large as real ones are. Pure: a pod's number says all about it.

use serde_json::{Value, json};

/// Pods behind a service, and pods on a node.
pub const PODS_PER_SERVICE: usize = 10;
pub const PODS_PER_NODE: usize = 20;
/// Pods come in blocks that fill their nodes, so that a cluster grows without moving any.
const BLOCK: usize = 1_000;
pub const NAMESPACES: usize = 20;
pub const POLICIES: usize = 40;
const NODES_PER_BLOCK: usize = BLOCK / PODS_PER_NODE;

/// The node whose daemon is measured: it has as many pods as any other.
pub const OWN_NODE: &str = "node-0";

pub fn namespace_of_service(service: usize) -> String {
    format!("team-{}", service % NAMESPACES)
}

pub fn namespace_of_pod(pod: usize) -> String {
    namespace_of_service(pod / PODS_PER_SERVICE)
}

pub fn pod_name(pod: usize) -> String {
    format!("svc-{}-7d9f8b6c5d-{pod:05}", pod / PODS_PER_SERVICE)
}

pub fn slice_name(service: usize) -> String {
    format!("svc-{service}-abcde")
}

/// Neighbours behind a service are on different nodes.
fn node_of_pod(pod: usize) -> usize {
    pod / BLOCK * NODES_PER_BLOCK + pod % NODES_PER_BLOCK
}

/// In its node's range. A pod's successor has another one than the pod itself.
fn address(pod: usize, generation: usize) -> String {
    let (node, place) = (node_of_pod(pod), pod % BLOCK / NODES_PER_BLOCK);
    let host = 2 + place + generation % 2 * 100;
    format!("10.{}.{}.{host}", 128 + (node >> 8), node & 255)
}

/// Every other namespace is in the mesh.
pub fn namespace(number: usize) -> Value {
    let labels = if number.is_multiple_of(2) {
        json!({"istio.io/dataplane-mode": "ambient"})
    } else {
        json!({})
    };
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": format!("team-{number}"), "labels": labels}})
}

pub fn service_account(service: usize) -> Value {
    let metadata = json!({"name": format!("svc-{service}"), "namespace": namespace_of_service(service)});
    json!({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": metadata})
}

pub fn node(number: usize) -> Value {
    let range = format!("10.{}.{}.0/24", 128 + (number >> 8), number & 255);
    let images: Vec<Value> = (0..20)
        .map(|i| {
            let digest = format!("{number:08x}{i:08x}").repeat(4);
            let names = [
                format!("registry.example.com/team/service-{i}@sha256:{digest}"),
                format!("registry.example.com/team/service-{i}:v1.{i}.0"),
            ];
            json!({"names": names, "sizeBytes": 100_000_000 + i})
        })
        .collect();
    let conditions = ["MemoryPressure", "DiskPressure", "PIDPressure", "Ready"].map(|kind| {
        json!({
            "type": kind, "status": if kind == "Ready" { "True" } else { "False" }, "reason": "KubeletHasSufficient",
            "message": "kubelet has sufficient resources available",
            "lastHeartbeatTime": "2026-01-01T00:00:00Z", "lastTransitionTime": "2026-01-01T00:00:00Z",
        })
    });
    let room = json!({"cpu": "16", "memory": "65536Mi", "pods": "110", "ephemeral-storage": "100Gi"});
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": format!("node-{number}"), "labels": {
            "kubernetes.io/hostname": format!("node-{number}"), "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64",
            "node.kubernetes.io/instance-type": "m6i.4xlarge",
            "topology.kubernetes.io/region": "r1", "topology.kubernetes.io/zone": format!("r1-{}", number % 3),
        }},
        "spec": {"podCIDR": range, "podCIDRs": [range], "providerID": format!("aws:///r1/i-{number:017x}")},
        "status": {
            "capacity": room, "allocatable": room, "conditions": conditions, "images": images,
            "addresses": [{"type": "InternalIP", "address": host(number)}],
            "nodeInfo": {
                "architecture": "amd64", "bootID": "", "containerRuntimeVersion": "containerd://2.3.7",
                "kernelVersion": "6.12.0", "kubeProxyVersion": "", "kubeletVersion": "v1.36.3", "machineID": "",
                "operatingSystem": "linux", "osImage": "Debian", "systemUUID": "",
            },
        },
    })
}

fn host(node: usize) -> String {
    format!("172.16.{}.{}", node >> 8, node & 255)
}

pub fn service(number: usize) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {
            "name": format!("svc-{number}"), "namespace": namespace_of_service(number), "labels": {"app": format!("svc-{number}")},
        },
        // Without a selector nobody but us fills its slices.
        "spec": {"ports": [{"name": "http", "port": 80, "targetPort": 8080}, {"name": "metrics", "port": 9090}]},
    })
}

/// The slice of a service whose `unready` endpoint is not ready. `generations` are those of its pods.
pub fn slice(service: usize, unready: Option<usize>, generations: impl Fn(usize) -> usize) -> Value {
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {
            "name": slice_name(service), "namespace": namespace_of_service(service),
            "labels": {
                "kubernetes.io/service-name": format!("svc-{service}"), "app": format!("svc-{service}"),
                "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
            },
        },
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}, {"name": "metrics", "port": 9090, "protocol": "TCP"}],
        "endpoints": endpoints(service, unready, generations),
    })
}

pub fn endpoints(service: usize, unready: Option<usize>, generations: impl Fn(usize) -> usize) -> Value {
    let pods = service * PODS_PER_SERVICE..(service + 1) * PODS_PER_SERVICE;
    pods.map(|pod| {
        let (node, ready) = (node_of_pod(pod), unready != Some(pod));
        json!({
            "addresses": [address(pod, generations(pod))], "nodeName": format!("node-{node}"), "zone": format!("r1-{}", node % 3),
            "conditions": {"ready": ready, "serving": ready, "terminating": false},
            "targetRef": {"kind": "Pod", "name": pod_name(pod), "namespace": namespace_of_pod(pod)},
        })
    })
    .collect()
}

/// What one creates; what kubelet reports of it is [`pod_status`].
pub fn pod(number: usize) -> Value {
    let service = number / PODS_PER_SERVICE;
    let app = format!("svc-{service}");
    let mut annotations = json!({
        "prometheus.io/scrape": "true", "prometheus.io/port": "9090", "kubectl.kubernetes.io/restartedAt": "2026-01-01T00:00:00Z",
    });
    if (service % NAMESPACES).is_multiple_of(2) && node_of_pod(number) != 0 {
        annotations["ambient.istio.io/redirection"] = json!("enabled");
    }
    let probe = |path: &str| json!({"httpGet": {"path": path, "port": 8080}, "periodSeconds": 10, "timeoutSeconds": 1});
    let environment: Vec<Value> = (0..12)
        .map(|i| json!({"name": format!("SETTING_{i}"), "value": format!("the value of setting number {i} of {app}")}))
        .collect();
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {
            "name": pod_name(number), "namespace": namespace_of_pod(number), "annotations": annotations,
            "labels": {
                "app": app, "app.kubernetes.io/name": app, "app.kubernetes.io/part-of": namespace_of_pod(number),
                "version": "v1", "pod-template-hash": "7d9f8b6c5d",
            },
            "ownerReferences": [{
                "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": format!("{app}-7d9f8b6c5d"), "controller": true,
                "uid": format!("00000000-0000-4000-8000-{service:012}"),
            }],
        },
        "spec": {
            "nodeName": format!("node-{}", node_of_pod(number)), "serviceAccountName": app, "terminationGracePeriodSeconds": 30,
            "containers": [{
                "name": "app", "image": "registry.example.com/team/service:v1.0.0", "env": environment,
                "args": ["--listen=:8080", "--metrics=:9090", "--log-format=json"],
                "ports": [{"name": "http", "containerPort": 8080}, {"name": "metrics", "containerPort": 9090}],
                "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "256Mi"}},
                "livenessProbe": probe("/healthz"), "readinessProbe": probe("/ready"),
                "volumeMounts": [{"name": "config", "mountPath": "/etc/app"}],
            }],
            "volumes": [{"name": "config", "configMap": {"name": format!("{app}-config")}}],
        },
    })
}

pub fn pod_status(number: usize, generation: usize) -> Value {
    let address = address(number, generation);
    let conditions = ["PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady", "PodScheduled"].map(
        |kind| json!({"type": kind, "status": "True", "lastProbeTime": null, "lastTransitionTime": "2026-01-01T00:00:00Z"}),
    );
    let digest = format!("{number:016x}").repeat(4);
    json!({"status": {
        "phase": "Running", "podIP": address, "podIPs": [{"ip": address}], "hostIP": host(node_of_pod(number)),
        "hostIPs": [{"ip": host(node_of_pod(number))}], "qosClass": "Burstable", "startTime": "2026-01-01T00:00:00Z",
        "conditions": conditions,
        "containerStatuses": [{
            "name": "app", "ready": true, "started": true, "restartCount": 0, "image": "registry.example.com/team/service:v1.0.0",
            "imageID": format!("registry.example.com/team/service@sha256:{digest}"),
            "containerID": format!("containerd://{digest}"), "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}},
        }],
    }})
}

/// Anyone of the own namespace may call, on ports that tell one version of the policy from the next.
pub fn policy(number: usize, version: usize) -> Value {
    let namespace = format!("team-{}", number % NAMESPACES);
    let ports = [8080.to_string(), (9_000 + version % 1_000).to_string()];
    json!({
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": format!("policy-{number}"), "namespace": namespace},
        "spec": {
            "selector": {"matchLabels": {"app": format!("svc-{number}")}}, "action": "ALLOW",
            "rules": [{"from": [{"source": {"namespaces": [namespace]}}], "to": [{"operation": {"ports": ports}}]}],
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};

    #[test]
    fn a_cluster_of_twenty_thousand_pods_is_spread_evenly_and_no_address_is_had_twice() {
        let mut addresses = BTreeSet::new();
        let mut nodes: BTreeMap<usize, usize> = BTreeMap::new();
        for pod in 0..20_000 {
            assert!(addresses.insert(address(pod, 0)) && addresses.insert(address(pod, 1)));
            *nodes.entry(node_of_pod(pod)).or_default() += 1;
        }
        assert_eq!(nodes.len(), 20_000 / PODS_PER_NODE);
        assert!(nodes.values().all(|pods| *pods == PODS_PER_NODE));
        let service = |pod: usize| (node_of_pod(pod), pod / PODS_PER_SERVICE);
        assert_eq!((0..20_000).map(service).collect::<BTreeSet<_>>().len(), 20_000);
    }

    #[test]
    fn a_slice_follows_its_pods_to_their_new_addresses() {
        let endpoints = endpoints(7, Some(73), |pod| usize::from(pod == 72));
        assert_eq!(endpoints[2]["addresses"][0], address(72, 1));
        assert_eq!(endpoints[3]["addresses"][0], address(73, 0));
        let unready = endpoints
            .as_array()
            .expect("a list")
            .iter()
            .filter(|e| e["conditions"]["ready"] == false);
        assert_eq!(unready.count(), 1);
        assert_eq!(endpoints[2]["targetRef"]["namespace"], namespace_of_service(7));
    }
}

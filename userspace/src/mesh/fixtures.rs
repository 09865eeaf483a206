//! Workloads, services and whole meshes for tests.

use super::{
    MeshSnapshot, SpiffeId, TrustDomain, Workload, WorkloadUid,
    service::{Affinity, Endpoint, Service, ServiceKey, ServicePort, TrafficDistribution},
    workload::{Locality, Protocol},
};
use std::{collections::BTreeMap, net::IpAddr, sync::Arc};

pub(crate) fn identity(namespace: &str, account: &str) -> SpiffeId {
    SpiffeId::new(&TrustDomain::new("cluster.local").unwrap(), namespace, account).unwrap()
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// In the mesh, with service account `name` and label `app: name`.
pub(crate) fn workload(namespace: &str, name: &str, address: &str) -> Workload {
    Workload {
        uid: WorkloadUid(format!("uid-{namespace}-{name}").into()),
        name: name.into(),
        namespace: namespace.into(),
        identity: identity(namespace, name),
        addresses: vec![ip(address)],
        locality: Locality::default(),
        labels: Arc::new(BTreeMap::from([("app".to_owned(), name.to_owned())])),
        owner: name.into(),
        canonical_service: name.into(),
        canonical_revision: "latest".into(),
        protocol: Protocol::Hbone,
        host_network: false,
        enrolled: true,
        netns: None,
        runtime_class: None,
    }
}

/// Port 80, to 8080 at each endpoint.
pub(crate) fn service(name: &str, vip: &str, endpoints: Vec<Endpoint>) -> Service {
    Service {
        key: ServiceKey {
            namespace: "shop".into(),
            name: name.into(),
        },
        vips: vec![ip(vip)],
        ports: vec![ServicePort { name: None, port: 80 }],
        endpoints,
        affinity: Affinity::None,
        distribution: TrafficDistribution::Any,
        local_only: false,
        publish_not_ready: false,
    }
}

pub(crate) fn endpoint(address: &str) -> Endpoint {
    Endpoint {
        address: ip(address),
        workload: None,
        node: None,
        zone: None,
        ready: true,
        ports: vec![(80, 8080)],
    }
}

pub(crate) fn snapshot(workloads: Vec<Workload>, services: Vec<Service>) -> MeshSnapshot {
    let empty = MeshSnapshot {
        root_namespace: "istio-system".into(),
        ranges: ["10.244.0.0/16", "10.96.0.0/12"]
            .map(|range| range.parse().unwrap())
            .into(),
        ..MeshSnapshot::default()
    };
    filled(empty, workloads, services)
}

fn filled(mut snapshot: MeshSnapshot, workloads: Vec<Workload>, services: Vec<Service>) -> MeshSnapshot {
    for workload in workloads {
        for address in &workload.addresses {
            snapshot.by_address.insert(*address, workload.uid.clone());
        }
        snapshot.set_workload(Arc::new(workload));
    }
    for service in services {
        for vip in &service.vips {
            snapshot.by_vip.insert(*vip, service.key.clone());
        }
        snapshot.services.insert(service.key.clone(), Arc::new(service));
    }
    snapshot
}

/// `pods` of them on nodes of ten, the first of which is `node-0`; ten of them behind each service.
pub(crate) fn large(pods: usize) -> MeshSnapshot {
    let address = |first: u8, i: usize| IpAddr::from([first, (i >> 16) as u8, (i >> 8) as u8, i as u8]);
    let workloads = (0..pods).map(|i| {
        let mut pod = workload("shop", &format!("p{i}"), &address(10, i).to_string());
        pod.locality.node = Some(format!("node-{}", i / 10).into());
        pod
    });
    let services = (0..pods / 10).map(|i| {
        let endpoints = (i * 10..i * 10 + 10).map(|i| Endpoint {
            workload: Some(WorkloadUid(format!("uid-shop-p{i}").into())),
            ..endpoint(&address(10, i).to_string())
        });
        service(&format!("s{i}"), &address(11, i).to_string(), endpoints.collect())
    });
    let empty = MeshSnapshot {
        node: Some("node-0".into()),
        version: 1,
        ..snapshot(Vec::new(), Vec::new())
    };
    filled(empty, workloads.collect(), services.collect())
}

/// The mesh of [`large`] with one more or one fewer pod in the mesh.
pub(crate) fn with_toggled(mesh: &MeshSnapshot, pod: usize) -> MeshSnapshot {
    let mut next = mesh.clone();
    let uid = WorkloadUid(format!("uid-shop-p{pod}").into());
    let mut pod = Workload::clone(mesh.workloads.get(&uid).unwrap());
    pod.protocol = match pod.protocol {
        Protocol::Hbone => Protocol::Tcp,
        Protocol::Tcp => Protocol::Hbone,
    };
    next.set_workload(Arc::new(pod));
    next.version += 1;
    next
}

//! Workloads and services for the tests of this folder.

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
    let mut snapshot = MeshSnapshot {
        root_namespace: "istio-system".into(),
        ranges: vec!["10.244.0.0/16".parse().unwrap(), "10.96.0.0/12".parse().unwrap()],
        ..MeshSnapshot::default()
    };
    for workload in workloads {
        for address in &workload.addresses {
            snapshot.by_address.insert(*address, workload.uid.clone());
        }
        snapshot.workloads.insert(workload.uid.clone(), Arc::new(workload));
    }
    for service in services {
        for vip in &service.vips {
            snapshot.by_vip.insert(*vip, service.key.clone());
        }
        snapshot.services.insert(service.key.clone(), Arc::new(service));
    }
    snapshot
}

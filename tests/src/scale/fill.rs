//! A cluster of any size, made of generated objects.

use anyhow::Result;

use super::{
    api::{Api, Kind, all},
    objects::{self, NAMESPACES, PODS_PER_NODE, PODS_PER_SERVICE, POLICIES},
};

/// Lets the cluster grow from `from` pods to `to`, with the nodes and services that belong to them.
pub async fn grow(api: &Api, from: usize, to: usize) -> Result<()> {
    let create = |kind, object| async move { api.create(kind, &object).await.map(drop) };
    if from == 0 {
        all((0..NAMESPACES).map(|i| create(Kind::Namespace, objects::namespace(i)))).await?;
        all((0..POLICIES).map(|i| create(Kind::AuthorizationPolicy, objects::policy(i, 0)))).await?;
    }
    let services = from / PODS_PER_SERVICE..to / PODS_PER_SERVICE;
    let nodes = from / PODS_PER_NODE..to / PODS_PER_NODE;
    all(services
        .clone()
        .map(|i| create(Kind::ServiceAccount, objects::service_account(i))))
    .await?;
    all(nodes.map(|i| create(Kind::Node, objects::node(i)))).await?;
    all(services.clone().map(|i| create(Kind::Service, objects::service(i)))).await?;
    all((from..to).map(|pod| async move {
        api.create(Kind::Pod, &objects::pod(pod)).await?;
        report(api, pod, 0).await
    }))
    .await?;
    all(services.map(|i| create(Kind::EndpointSlice, objects::slice(i, None, |_| 0)))).await
}

/// What kubelet would: the pod runs.
pub async fn report(api: &Api, pod: usize, generation: usize) -> Result<()> {
    let (namespace, name) = (objects::namespace_of_pod(pod), objects::pod_name(pod));
    let status = objects::pod_status(pod, generation);
    api.patch_status(Kind::Pod, &namespace, &name, &status).await.map(drop)
}

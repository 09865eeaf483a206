//! The API server as whoever fills the cluster and changes it sees it: objects as JSON, one request each.

use std::path::Path;
use std::time::SystemTime;

use anyhow::{Context, Result};
use futures::{StreamExt, TryStreamExt};
use http::{Method, Request};
use kube::{Client, Config, config::KubeConfigOptions, config::Kubeconfig};
use serde_json::Value;

/// Requests at the same time while the cluster is filled.
const AT_ONCE: usize = 48;

/// Where a kind's objects are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Namespace,
    Node,
    ServiceAccount,
    Pod,
    Service,
    EndpointSlice,
    AuthorizationPolicy,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::Namespace => "Namespace",
            Self::Node => "Node",
            Self::ServiceAccount => "ServiceAccount",
            Self::Pod => "Pod",
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::AuthorizationPolicy => "AuthorizationPolicy",
        }
    }

    /// The path of all objects of a namespace, or of the cluster.
    fn path(self, namespace: &str) -> String {
        let (group, plural) = match self {
            Self::Namespace => return "/api/v1/namespaces".to_owned(),
            Self::Node => return "/api/v1/nodes".to_owned(),
            Self::ServiceAccount => ("/api/v1", "serviceaccounts"),
            Self::Pod => ("/api/v1", "pods"),
            Self::Service => ("/api/v1", "services"),
            Self::EndpointSlice => ("/apis/discovery.k8s.io/v1", "endpointslices"),
            Self::AuthorizationPolicy => ("/apis/security.istio.io/v1", "authorizationpolicies"),
        };
        format!("{group}/namespaces/{namespace}/{plural}")
    }
}

/// A change that the API server has acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Acknowledged {
    pub kind: Kind,
    /// The object's `metadata.resourceVersion` since then.
    pub version: u64,
    pub at: SystemTime,
}

#[derive(Clone)]
pub struct Api {
    client: Client,
}

impl Api {
    pub async fn connect(kubeconfig: &Path) -> Result<Self> {
        let file = Kubeconfig::read_from(kubeconfig).with_context(|| format!("read {}", kubeconfig.display()))?;
        let config = Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
        Ok(Self {
            client: Client::try_from(config)?,
        })
    }

    pub async fn create(&self, kind: Kind, object: &Value) -> Result<Acknowledged> {
        let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default();
        self.ask(kind, Method::POST, &kind.path(namespace), Some(object)).await
    }

    /// A merge patch.
    pub async fn patch(&self, kind: Kind, namespace: &str, name: &str, patch: &Value) -> Result<Acknowledged> {
        let path = format!("{}/{name}", kind.path(namespace));
        self.ask(kind, Method::PATCH, &path, Some(patch)).await
    }

    pub async fn patch_status(&self, kind: Kind, namespace: &str, name: &str, patch: &Value) -> Result<Acknowledged> {
        let path = format!("{}/{name}/status", kind.path(namespace));
        self.ask(kind, Method::PATCH, &path, Some(patch)).await
    }

    /// At once. What is acknowledged is the object's last version, not that it is gone.
    pub async fn delete(&self, kind: Kind, namespace: &str, name: &str) -> Result<Acknowledged> {
        let path = format!("{}/{name}?gracePeriodSeconds=0", kind.path(namespace));
        self.ask(kind, Method::DELETE, &path, None).await
    }

    async fn ask(&self, kind: Kind, method: Method, path: &str, body: Option<&Value>) -> Result<Acknowledged> {
        let media = if method == Method::PATCH {
            "application/merge-patch+json"
        } else {
            "application/json"
        };
        let what = format!("{method} {path}");
        let body = body.map(serde_json::to_vec).transpose()?.unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(http::header::CONTENT_TYPE, media)
            .body(body)?;
        let answer = self.client.request_text(request).await.with_context(|| what.clone())?;
        // Taken before anything else is done with the answer.
        let at = SystemTime::now();
        let answer: Value = serde_json::from_str(&answer)?;
        let version = answer["metadata"]["resourceVersion"].as_str().unwrap_or("0");
        Ok(Acknowledged {
            kind,
            version: version.parse().with_context(|| format!("the version of {what}"))?,
            at,
        })
    }
}

/// Does many things at the same time, and all of them.
pub async fn all<F: Future<Output = Result<()>>>(work: impl Iterator<Item = F>) -> Result<()> {
    futures::stream::iter(work)
        .map(Ok)
        .try_buffer_unordered(AT_ONCE)
        .try_collect()
        .await
}

//! The person's way to the API server: a few verbs on whatever object, each with a deadline. Thin; knows no kind by heart.

use crate::kubernetes::client::{self, ClientError};
use clap::Args;
use http::{Method, Request, StatusCode, header};
use kube::Client;
use serde_json::Value;
use std::{path::PathBuf, time::Duration};
use tokio::time::timeout;

const DEADLINE: Duration = Duration::from_secs(30);
/// Lists come in pages of so many objects.
const PAGE: usize = 500;
/// Who set the fields that `warren install` sets.
const FIELD_MANAGER: &str = "warren";

/// Which cluster is meant.
#[derive(Debug, Clone, Default, Args)]
pub struct ClusterArgs {
    /// How to reach the API server [default: $KUBECONFIG, ~/.kube/config, or this pod's own cluster]
    #[arg(long, value_name = "FILE", global = true)]
    pub kubeconfig: Option<PathBuf>,
    /// The kubeconfig's context [default: its current one]
    #[arg(long, value_name = "NAME", global = true)]
    pub context: Option<String>,
}

/// Why the API server did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error("the API server cannot be reached ({doing})")]
    Away { doing: String, source: Box<kube::Error> },
    #[error("the API server does not answer within 30 s ({doing})")]
    Silent { doing: String },
    #[error("the API server refuses: {message}")]
    Refused { doing: String, code: u16, message: String },
}

/// Where the objects of one kind are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Resource {
    /// `v1`, or `group/version`.
    pub(super) api: &'static str,
    pub(super) plural: &'static str,
}

impl Resource {
    pub(super) const fn new(api: &'static str, plural: &'static str) -> Self {
        Self { api, plural }
    }

    /// The part of the API version before the slash; empty for the core group.
    pub(super) fn group(self) -> &'static str {
        self.api.split_once('/').map_or("", |(group, _)| group)
    }

    fn path(self, namespace: Option<&str>, name: Option<&str>) -> String {
        let root = if self.group().is_empty() { "api" } else { "apis" };
        let mut path = format!("/{root}/{}", self.api);
        if let Some(namespace) = namespace {
            path.push_str(&format!("/namespaces/{namespace}"));
        }
        path.push_str(&format!("/{}", self.plural));
        if let Some(name) = name {
            path.push_str(&format!("/{name}"));
        }
        path
    }
}

/// What becomes of the objects that the deleted one owns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Owned {
    /// They go by themselves, afterwards.
    Later,
    /// They go first, and the object stays visible until they have.
    First,
}

/// A cluster, with the person's rights.
#[derive(Clone)]
pub(super) struct Cluster {
    client: Client,
}

impl Cluster {
    /// Sends nothing yet.
    ///
    /// # Errors
    /// There is no kubeconfig that can be used, and this is no pod.
    pub(super) async fn connect(args: &ClusterArgs) -> Result<Self, ApiError> {
        let client = client::connect_as_person(args.kubeconfig.as_deref(), args.context.as_deref()).await?;
        Ok(Self { client })
    }

    /// `None` if there is no such object.
    pub(super) async fn get(
        &self,
        resource: Resource,
        namespace: Option<&str>,
        name: &str,
    ) -> Result<Option<Value>, ApiError> {
        let path = resource.path(namespace, Some(name));
        found(self.ask(Method::GET, &path, None).await)
    }

    /// All objects of a kind; none if there is no such kind. `query` may hold selectors.
    pub(super) async fn list(
        &self,
        resource: Resource,
        namespace: Option<&str>,
        query: &str,
    ) -> Result<Vec<Value>, ApiError> {
        let mut all = Vec::new();
        let mut from = String::new();
        loop {
            let path = format!("{}?limit={PAGE}{from}{query}", resource.path(namespace, None));
            let Some(mut page) = found(self.ask(Method::GET, &path, None).await)? else {
                return Ok(all);
            };
            if let Some(Value::Array(items)) = page.get_mut("items").map(Value::take) {
                all.extend(items);
            }
            match page.pointer("/metadata/continue").and_then(Value::as_str) {
                Some(token) if !token.is_empty() => from = format!("&continue={token}"),
                Some(_) | None => return Ok(all),
            }
        }
    }

    /// Server-side apply: what the object says becomes so, and what others have set besides stays.
    pub(super) async fn apply(&self, resource: Resource, object: &Value) -> Result<Value, ApiError> {
        let text = |at: &str| object.pointer(at).and_then(Value::as_str);
        let path = resource.path(text("/metadata/namespace"), text("/metadata/name"));
        let path = format!("{path}?fieldManager={FIELD_MANAGER}&force=true");
        self.ask(Method::PATCH, &path, Some(("application/apply-patch+yaml", object)))
            .await
    }

    /// A merge patch.
    pub(super) async fn patch(
        &self,
        resource: Resource,
        namespace: Option<&str>,
        name: &str,
        patch: &Value,
    ) -> Result<Value, ApiError> {
        let path = resource.path(namespace, Some(name));
        self.ask(Method::PATCH, &path, Some(("application/merge-patch+json", patch)))
            .await
    }

    pub(super) async fn create(
        &self,
        resource: Resource,
        namespace: Option<&str>,
        object: &Value,
    ) -> Result<Value, ApiError> {
        let path = resource.path(namespace, None);
        self.ask(Method::POST, &path, Some(("application/json", object))).await
    }

    /// False if there was nothing to delete.
    pub(super) async fn delete(
        &self,
        resource: Resource,
        namespace: Option<&str>,
        name: &str,
        owned: Owned,
    ) -> Result<bool, ApiError> {
        let path = resource.path(namespace, Some(name));
        let options = serde_json::json!({
            "propagationPolicy": match owned {
                Owned::Later => "Background",
                Owned::First => "Foreground",
            }
        });
        let gone = found(
            self.ask(Method::DELETE, &path, Some(("application/json", &options)))
                .await,
        )?;
        Ok(gone.is_some())
    }

    /// Whatever a path has, as text, and the moment at which it was sent, as its sender's clock has it.
    pub(super) async fn text(&self, path: &str) -> Result<(String, Option<String>), ApiError> {
        let doing = format!("GET {path}");
        let request = Request::get(path).body(Vec::new()).map_err(|error| ApiError::Away {
            doing: doing.clone(),
            source: Box::new(kube::Error::HttpError(error)),
        })?;
        let asked = async {
            let response = self.client.send(request.map(kube::client::Body::from)).await?;
            let status = response.status();
            let date = response.headers().get(header::DATE);
            let date = date.and_then(|date| date.to_str().ok()).map(str::to_owned);
            let body = http_body_util::BodyExt::collect(response.into_body()).await?.to_bytes();
            Ok((status, String::from_utf8_lossy(&body).into_owned(), date))
        };
        match timeout(DEADLINE, asked).await {
            Err(_) => Err(ApiError::Silent { doing }),
            Ok(Err(error)) => Err(failed(doing, error)),
            Ok(Ok((status, text, _))) if status != StatusCode::OK => Err(ApiError::Refused {
                doing,
                code: status.as_u16(),
                message: message_in(&text),
            }),
            Ok(Ok((_, text, date))) => Ok((text, date)),
        }
    }

    async fn ask(&self, method: Method, path: &str, body: Option<(&str, &Value)>) -> Result<Value, ApiError> {
        let doing = format!("{method} {}", path.split('?').next().unwrap_or(path));
        let mut request = Request::builder().method(method).uri(path);
        if let Some((media, _)) = body {
            request = request.header(header::CONTENT_TYPE, media);
        }
        let bytes = body.map_or_else(Vec::new, |(_, value)| value.to_string().into_bytes());
        let request = request.body(bytes).map_err(|error| ApiError::Away {
            doing: doing.clone(),
            source: Box::new(kube::Error::HttpError(error)),
        })?;
        match timeout(DEADLINE, self.client.request::<Value>(request)).await {
            Err(_) => Err(ApiError::Silent { doing }),
            Ok(answer) => answer.map_err(|error| failed(doing, error)),
        }
    }
}

/// The server's own words, out of a Status object where it is one.
fn message_in(text: &str) -> String {
    let status: Option<Value> = serde_json::from_str(text).ok();
    let message = status.as_ref().and_then(|status| status["message"].as_str());
    message.unwrap_or(text.trim()).chars().take(300).collect()
}

fn failed(doing: String, error: kube::Error) -> ApiError {
    if let kube::Error::Api(status) = &error {
        return ApiError::Refused {
            doing,
            code: status.code,
            message: status.message.trim().to_owned(),
        };
    }
    ApiError::Away {
        doing,
        source: Box::new(error),
    }
}

fn found(answer: Result<Value, ApiError>) -> Result<Option<Value>, ApiError> {
    match answer {
        Ok(value) => Ok(Some(value)),
        Err(ApiError::Refused { code: 404, .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_objects_path_has_its_group_its_namespace_and_its_name() {
        let pods = Resource::new("v1", "pods");
        assert_eq!(pods.path(Some("shop"), Some("web")), "/api/v1/namespaces/shop/pods/web");
        let roles = Resource::new("rbac.authorization.k8s.io/v1", "clusterroles");
        assert_eq!(
            roles.path(None, None),
            "/apis/rbac.authorization.k8s.io/v1/clusterroles"
        );
        assert_eq!(roles.group(), "rbac.authorization.k8s.io");
        assert_eq!(pods.group(), "");
    }
}

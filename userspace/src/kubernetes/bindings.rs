//! Which service accounts have a pod on which node: what the certificate authority needs of the API server, and nothing
//! else of it. A pod counts from the moment it is bound to its node, so that its certificate can be there before its first
//! container, until it has ended. Not here: what the mesh needs of pods (`index`).

use futures::{Stream, StreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client,
    core::{ApiResource, Object, ObjectMeta},
    runtime::{
        WatchStreamExt,
        watcher::{self, Event, watcher},
    },
};
use parking_lot::RwLock;
use serde::Deserialize;
use std::{collections::HashMap, sync::Arc};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::shutdown::Shutdown;

/// A watch that hears nothing for so long is begun anew, in seconds: so a half-open connection is noticed.
const WATCH_SECONDS: u32 = 30;

/// A pod as far as its certificate goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BoundPod {
    pub uid: Arc<str>,
    pub node: Arc<str>,
    pub service_account: Arc<str>,
}

type Name = (Arc<str>, Arc<str>);

/// The pods of the cluster that are bound to a node and have not ended. Pure.
#[derive(Debug, Default)]
pub struct Bindings {
    pods: HashMap<Name, BoundPod>,
    /// node → (namespace, service account) → how many pods.
    accounts: HashMap<Arc<str>, HashMap<Name, usize>>,
}

impl Bindings {
    /// The pod as it now is; `None` where it has ended, or is bound to no node yet.
    pub fn set(&mut self, namespace: &str, name: &str, pod: Option<BoundPod>) {
        let key: Name = (namespace.into(), name.into());
        let old = match pod.clone() {
            Some(pod) => self.pods.insert(key.clone(), pod),
            None => self.pods.remove(&key),
        };
        if old == pod {
            return;
        }
        if let Some(old) = old
            && let Some(accounts) = self.accounts.get_mut(&old.node)
        {
            let account = (Arc::clone(&key.0), old.service_account);
            let left = accounts.get(&account).map_or(0, |count| count.saturating_sub(1));
            if left == 0 {
                accounts.remove(&account);
            } else {
                accounts.insert(account, left);
            }
            if accounts.is_empty() {
                self.accounts.remove(&old.node);
            }
        }
        if let Some(pod) = pod {
            let accounts = self.accounts.entry(pod.node).or_default();
            *accounts.entry((key.0, pod.service_account)).or_default() += 1;
        }
    }

    /// True if a pod of this service account is bound to `node`.
    pub fn has(&self, node: &str, namespace: &str, service_account: &str) -> bool {
        let accounts = self.accounts.get(node);
        accounts.is_some_and(|accounts| accounts.contains_key(&(namespace.into(), service_account.into())))
    }

    pub fn pod(&self, namespace: &str, name: &str) -> Option<&BoundPod> {
        self.pods.get(&(namespace.into(), name.into()))
    }

    pub fn len(&self) -> usize {
        self.pods.len()
    }

    pub fn is_empty(&self) -> bool {
        self.pods.is_empty()
    }
}

/// The bindings as they are followed. Clones share them.
#[derive(Debug, Clone)]
pub struct BoundPods {
    state: Arc<RwLock<Bindings>>,
    complete: watch::Receiver<bool>,
}

impl BoundPods {
    /// Every pod that was there at the start is known. It stays so: without the API server the last state counts.
    pub fn is_complete(&self) -> bool {
        *self.complete.borrow()
    }

    /// Resolves when they are complete.
    pub async fn completed(&self) {
        let mut complete = self.complete.clone();
        if complete.wait_for(|complete| *complete).await.is_err() {
            // The watch has ended before that, so it never will be.
            std::future::pending::<()>().await;
        }
    }

    pub fn has(&self, node: &str, namespace: &str, service_account: &str) -> bool {
        self.state.read().has(node, namespace, service_account)
    }

    pub fn pod(&self, namespace: &str, name: &str) -> Option<BoundPod> {
        self.state.read().pod(namespace, name).cloned()
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    node_name: Option<String>,
    service_account_name: Option<String>,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct Status {
    phase: Option<String>,
}

type PodObject = Object<Spec, Status>;

/// `None` for a pod without a name, which the API server does not have.
fn read(pod: PodObject) -> Option<(String, String, Option<BoundPod>)> {
    let ObjectMeta {
        name, namespace, uid, ..
    } = pod.metadata;
    let phase = pod.status.and_then(|status| status.phase);
    let ended = matches!(phase.as_deref(), Some("Succeeded" | "Failed"));
    let node = pod.spec.node_name.filter(|node| !node.is_empty() && !ended);
    let account = pod.spec.service_account_name.filter(|account| !account.is_empty());
    let bound = node.map(|node| BoundPod {
        uid: uid.unwrap_or_default().into(),
        node: node.into(),
        service_account: account.as_deref().unwrap_or("default").into(),
    });
    Some((namespace?, name?, bound))
}

/// Follows the pods of the cluster until the drain begins.
pub fn follow(client: Client, shutdown: &Shutdown) -> BoundPods {
    let api: Api<PodObject> = Api::all_with(client, &ApiResource::erase::<Pod>(&()));
    let config = watcher::Config::default().timeout(WATCH_SECONDS);
    let (completing, complete) = watch::channel(false);
    let pods = BoundPods {
        state: Arc::default(),
        complete,
    };
    let (state, draining) = (Arc::clone(&pods.state), shutdown.draining());
    let events = watcher(api, config).default_backoff();
    shutdown.spawn_essential("pod bindings", async move {
        tokio::select! {
            () = take(events, &state, &completing) => {}
            () = draining => {}
        }
    });
    pods
}

async fn take(
    events: impl Stream<Item = watcher::Result<Event<PodObject>>>,
    state: &RwLock<Bindings>,
    completing: &watch::Sender<bool>,
) {
    let mut events = std::pin::pin!(events);
    // A list is taken over as a whole: nobody is refused because it is under way.
    let mut listing = Bindings::default();
    let mut away = false;
    while let Some(event) = events.next().await {
        let event = match event {
            Ok(event) => event,
            Err(error) => {
                if !std::mem::replace(&mut away, true) {
                    warn!(
                        error = &error as &dyn std::error::Error,
                        "the pods of the cluster cannot be followed; trying again"
                    );
                }
                continue;
            }
        };
        if std::mem::take(&mut away) {
            info!("the pods of the cluster are followed again");
        }
        match event {
            Event::Init => listing = Bindings::default(),
            Event::InitApply(pod) => {
                if let Some((namespace, name, bound)) = read(pod) {
                    listing.set(&namespace, &name, bound);
                }
            }
            Event::InitDone => {
                *state.write() = std::mem::take(&mut listing);
                completing.send_replace(true);
            }
            Event::Apply(pod) => {
                if let Some((namespace, name, bound)) = read(pod) {
                    state.write().set(&namespace, &name, bound);
                }
            }
            Event::Delete(pod) => {
                if let Some((namespace, name, _)) = read(pod) {
                    state.write().set(&namespace, &name, None);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn bound(node: &str, account: &str) -> Option<BoundPod> {
        Some(BoundPod {
            uid: "u".into(),
            node: node.into(),
            service_account: account.into(),
        })
    }

    fn pod(name: &str, spec: serde_json::Value, phase: &str) -> PodObject {
        let object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"namespace": "shop", "name": name, "uid": "u"},
            "spec": spec, "status": {"phase": phase},
        });
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn an_account_is_on_a_node_as_long_as_one_of_its_pods_is() {
        let mut bindings = Bindings::default();
        bindings.set("shop", "web-1", bound("a", "web"));
        bindings.set("shop", "web-2", bound("a", "web"));
        bindings.set("shop", "web-2", bound("a", "web"));
        bindings.set("shop", "db-1", bound("b", "db"));
        assert!(bindings.has("a", "shop", "web") && bindings.has("b", "shop", "db"));
        assert!(
            !bindings.has("b", "shop", "web")
                && !bindings.has("a", "store", "web")
                && !bindings.has("c", "shop", "web")
        );
        bindings.set("shop", "web-1", None);
        assert!(bindings.has("a", "shop", "web"), "one pod is left");
        bindings.set("shop", "web-2", None);
        bindings.set("shop", "web-2", None);
        assert!(!bindings.has("a", "shop", "web"));
        bindings.set("shop", "db-1", bound("a", "db"));
        assert!(bindings.has("a", "shop", "db") && !bindings.has("b", "shop", "db"));
        bindings.set("shop", "db-1", None);
        assert!(bindings.is_empty() && bindings.accounts.is_empty());
    }

    #[test]
    fn a_pod_counts_from_its_binding_until_its_end() {
        let read = |spec, phase| read(pod("web-1", spec, phase)).unwrap().2;
        let spec = json!({"nodeName": "a", "serviceAccountName": "web", "containers": []});
        assert_eq!(read(spec.clone(), "Pending"), bound("a", "web"));
        assert_eq!(read(spec.clone(), "Running"), bound("a", "web"));
        assert_eq!(read(json!({"nodeName": "a"}), "Running"), bound("a", "default"));
        assert_eq!(read(spec.clone(), "Succeeded"), None);
        assert_eq!(read(spec, "Failed"), None);
        assert_eq!(read(json!({"serviceAccountName": "web"}), "Pending"), None);
        assert_eq!(read(json!({"nodeName": ""}), "Pending"), None);
    }

    #[tokio::test]
    async fn a_list_replaces_what_was_known_and_a_broken_watch_changes_nothing() {
        let on_a = json!({"nodeName": "a", "serviceAccountName": "web"});
        let (state, (completing, complete)) = (RwLock::new(Bindings::default()), watch::channel(false));
        let first = vec![
            Ok(Event::Init),
            Ok(Event::InitApply(pod("web-1", on_a.clone(), "Running"))),
        ];
        take(futures::stream::iter(first), &state, &completing).await;
        assert!(!*complete.borrow() && state.read().is_empty(), "half a list is none");
        let whole = vec![
            Ok(Event::Init),
            Ok(Event::InitApply(pod("web-1", on_a.clone(), "Running"))),
            Ok(Event::InitDone),
            Ok(Event::Apply(pod("web-2", on_a.clone(), "Pending"))),
            Ok(Event::Delete(pod("web-1", on_a.clone(), "Running"))),
            Err(watcher::Error::NoResourceVersion),
        ];
        take(futures::stream::iter(whole), &state, &completing).await;
        assert!(*complete.borrow() && state.read().has("a", "shop", "web"));
        let other = vec![
            Ok(Event::Init),
            Ok(Event::InitApply(pod(
                "web-3",
                json!({"nodeName": "b", "serviceAccountName": "web"}),
                "Running",
            ))),
            Ok(Event::InitDone),
        ];
        take(futures::stream::iter(other), &state, &completing).await;
        assert!(!state.read().has("a", "shop", "web") && state.read().has("b", "shop", "web"));
    }
}

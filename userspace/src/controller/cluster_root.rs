//! The CA's Secret and the trust bundle's ConfigMap, read and written. What is written is the same whoever writes it, and
//! an object that changed meanwhile is never overwritten. Not here: when what is done (`root`).

use super::rotation::{self, Before, Since, fingerprint};
use crate::certs::{
    TrustBundle,
    authority::{AuthorityError, files::CaFiles},
};
use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, Secret},
};
use kube::{Api, Client, api::PostParams, core::ObjectMeta};
use rustls_pki_types::UnixTime;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::time::timeout;
use tracing::{info, warn};

/// The operator's own CA, where there is one; it has the names and the form of Istio's.
const PLUGGED_IN: &str = "cacerts";
/// The one that the controller makes.
const OWN: &str = "warren-ca";
const BUNDLE: &str = "warren-ca-root";
const BUNDLE_KEY: &str = "root-cert.pem";
/// On the bundle: since when each of its roots has been in it.
const SINCE: &str = "warren.mesh/roots-since";
const PART_OF: (&str, &str) = ("app.kubernetes.io/part-of", "warren");
const DEADLINE: Duration = Duration::from_secs(10);
/// How often a write is tried again that met another's.
const ATTEMPTS: u32 = 4;

#[derive(Debug, thiserror::Error)]
pub(super) enum ClusterRootError {
    #[error("cannot {act} {what}")]
    Api {
        act: &'static str,
        what: String,
        source: Box<kube::Error>,
    },
    #[error("the API server did not answer in time")]
    Deadline,
    #[error("a new CA cannot be made")]
    Generate(#[source] AuthorityError),
    #[error("the ConfigMap {BUNDLE} is written by somebody else all the time")]
    Contended,
}

pub(super) struct ClusterRoot {
    namespace: String,
    secrets: Api<Secret>,
    config_maps: Api<ConfigMap>,
}

impl ClusterRoot {
    pub(super) fn new(client: Client, namespace: String) -> Self {
        Self {
            secrets: Api::namespaced(client.clone(), &namespace),
            config_maps: Api::namespaced(client, &namespace),
            namespace,
        }
    }

    /// The CA's files as they are now, and where they lie. A CA is made if there is none.
    pub(super) async fn read(&self, now: UnixTime) -> Result<(CaFiles, PathBuf), ClusterRootError> {
        for name in [PLUGGED_IN, OWN] {
            if let Some(secret) = self.secret(name).await? {
                return Ok((files(secret), self.place(name)));
            }
        }
        self.make(now).await?;
        let secret = self.secret(OWN).await?.unwrap_or_default();
        Ok((files(secret), self.place(OWN)))
    }

    /// For the eyes of the operator, who looks for files at their place.
    fn place(&self, secret: &str) -> PathBuf {
        Path::new("Secret").join(&self.namespace).join(secret)
    }

    async fn secret(&self, name: &str) -> Result<Option<Secret>, ClusterRootError> {
        let found = in_time(self.secrets.get_opt(name)).await?;
        found.map_err(|source| self.failed("read", "Secret", name, source))
    }

    /// By create alone: of two controllers one makes the CA, and the other finds it.
    async fn make(&self, now: UnixTime) -> Result<(), ClusterRootError> {
        let files = CaFiles::generate(now).map_err(ClusterRootError::Generate)?;
        let secret = Secret {
            metadata: metadata(OWN),
            type_: Some("Opaque".to_owned()),
            data: Some(
                files
                    .into_files()
                    .map(|(name, text)| (name, ByteString(text)))
                    .collect(),
            ),
            ..Secret::default()
        };
        let made = in_time(self.secrets.create(&PostParams::default(), &secret)).await?;
        match made {
            Ok(_) => {
                info!(
                    namespace = self.namespace,
                    secret = OWN,
                    "new certificate authority made"
                );
                Ok(())
            }
            Err(error) if is_conflict(&error) => Ok(()),
            Err(source) => Err(self.failed("create", "Secret", OWN, source)),
        }
    }

    /// Publishes the bundle if it is not what is there, and gives since when its roots have been in it.
    pub(super) async fn publish(
        &self,
        bundle: &TrustBundle,
        roots: &[String],
        own: &Since,
        now: u64,
    ) -> Result<Since, ClusterRootError> {
        let text = bundle.to_pem();
        for _ in 0..ATTEMPTS {
            let found = in_time(self.config_maps.get_opt(BUNDLE)).await?;
            let found = found.map_err(|source| self.failed("read", "ConfigMap", BUNDLE, source))?;
            let before = Before {
                published: found.as_ref().map(published),
                own,
            };
            let since = rotation::since(roots.iter().cloned(), &before, now);
            let Some(wanted) = wanted(found.clone(), &text, &since) else {
                return Ok(since);
            };
            let parameters = PostParams::default();
            let written = match &found {
                Some(_) => in_time(self.config_maps.replace(BUNDLE, &parameters, &wanted)).await?,
                None => in_time(self.config_maps.create(&parameters, &wanted)).await?,
            };
            match written {
                Ok(_) => {
                    let roots = roots.len();
                    info!(
                        namespace = self.namespace,
                        config_map = BUNDLE,
                        roots,
                        "trust bundle published"
                    );
                    return Ok(since);
                }
                // Somebody was faster: look again.
                Err(error) if is_conflict(&error) => {}
                Err(source) => return Err(self.failed("write", "ConfigMap", BUNDLE, source)),
            }
        }
        Err(ClusterRootError::Contended)
    }

    fn failed(&self, act: &'static str, kind: &str, name: &str, source: kube::Error) -> ClusterRootError {
        ClusterRootError::Api {
            act,
            what: format!("{kind} {}/{name}", self.namespace),
            source: Box::new(source),
        }
    }
}

async fn in_time<T>(call: impl Future<Output = T>) -> Result<T, ClusterRootError> {
    timeout(DEADLINE, call).await.map_err(|_| ClusterRootError::Deadline)
}

/// It is there already, or has changed since it was read.
fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}

fn metadata(name: &str) -> ObjectMeta {
    ObjectMeta {
        name: Some(name.to_owned()),
        labels: Some(BTreeMap::from([(PART_OF.0.to_owned(), PART_OF.1.to_owned())])),
        ..ObjectMeta::default()
    }
}

fn files(secret: Secret) -> CaFiles {
    let data = secret.data.unwrap_or_default().into_iter();
    CaFiles::of(data.map(|(name, text)| (name, text.0)))
}

/// The roots of a bundle that is there, and since when each of them, as far as it says.
fn published(map: &ConfigMap) -> Vec<(String, Option<u64>)> {
    let since: Since = map
        .metadata
        .annotations
        .as_ref()
        .and_then(|annotations| annotations.get(SINCE))
        .and_then(|text| serde_json::from_str(text).ok())
        .unwrap_or_default();
    let text = map.data.as_ref().and_then(|data| data.get(BUNDLE_KEY));
    let bundle = match text.map(|text| TrustBundle::from_pem(text.as_bytes())) {
        Some(Ok(bundle)) => bundle,
        Some(Err(error)) => {
            warn!(%error, config_map = BUNDLE, "what is published is no trust bundle; it is replaced");
            return Vec::new();
        }
        None => return Vec::new(),
    };
    let roots = bundle.roots().iter().map(|root| fingerprint(&root.der));
    roots
        .map(|root| (since.get(&root).copied(), root))
        .map(|(since, root)| (root, since))
        .collect()
}

/// The ConfigMap as it should be, with everything that others put on it; `None` if it is so already.
fn wanted(found: Option<ConfigMap>, text: &str, since: &Since) -> Option<ConfigMap> {
    let mut map = found.unwrap_or_else(|| ConfigMap {
        metadata: metadata(BUNDLE),
        ..ConfigMap::default()
    });
    // Serializing a map of texts and numbers does not fail.
    let since = serde_json::to_string(since).unwrap_or_default();
    let annotations = map.metadata.annotations.get_or_insert_default();
    let said = annotations.insert(SINCE.to_owned(), since.clone());
    let data = map.data.get_or_insert_default();
    let held = data.insert(BUNDLE_KEY.to_owned(), text.to_owned());
    (said.as_deref() != Some(&since) || held.as_deref() != Some(text)).then_some(map)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::certs::Authority;

    fn bundle() -> TrustBundle {
        Authority::generate(UnixTime::now()).unwrap().bundle().clone()
    }

    #[test]
    fn a_published_bundle_is_left_alone_and_an_altered_one_repaired() {
        let text = bundle().to_pem();
        let since = Since::from([("a".to_owned(), 7)]);
        let made = wanted(None, &text, &since).unwrap();
        assert_eq!(wanted(Some(made.clone()), &text, &since), None);
        let mut altered = made.clone();
        altered
            .data
            .as_mut()
            .unwrap()
            .insert(BUNDLE_KEY.to_owned(), "x".to_owned());
        altered
            .metadata
            .labels
            .as_mut()
            .unwrap()
            .insert("team".to_owned(), "a".to_owned());
        let repaired = wanted(Some(altered), &text, &since).unwrap();
        assert_eq!(repaired.data, made.data);
        assert!(
            repaired.metadata.labels.unwrap().contains_key("team"),
            "what others put on it stays"
        );
    }

    #[test]
    fn the_age_of_a_root_is_read_back_from_the_bundle() {
        let (old, new) = (bundle(), bundle());
        let names: Vec<_> = [&old, &new].map(|bundle| fingerprint(&bundle.roots()[0].der)).into();
        let since = Since::from([(names[0].clone(), 7)]);
        let text = format!("{}{}", old.to_pem(), new.to_pem());
        let map = wanted(None, &text, &since).unwrap();
        assert_eq!(published(&map), [(names[0].clone(), Some(7)), (names[1].clone(), None)]);
        let broken = wanted(None, "garbage", &since).unwrap();
        assert_eq!(published(&broken), []);
    }
}

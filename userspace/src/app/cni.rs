//! The CNI plugin's daemon side, wired: what the container runtime says about a sandbox goes to the index, capture follows
//! from the snapshot, and the plugin hears how it went.

use super::{
    Snapshots,
    pods::{Pods, Standing},
};
use crate::{
    capture::Finder,
    cni::{
        server::Admission,
        wire::{Ask, Reply, Request, Verdict},
    },
    kubernetes::{Sandbox, asking},
    mesh::{MeshSnapshot, WorkloadUid},
};
use futures::future::BoxFuture;
use std::{path::PathBuf, sync::Arc, time::Duration};
use tokio::{sync::mpsc, time::Instant};
use tracing::{debug, info, warn};

/// How far our watch may be behind the kubelet's before the API server is asked.
const LAG: Duration = Duration::from_millis(300);

/// Answers the plugin.
pub(super) struct Admitted {
    pub(super) node: Arc<str>,
    pub(super) pods: Arc<Pods>,
    pub(super) snapshots: Snapshots,
    pub(super) finder: Arc<Finder>,
    pub(super) client: kube::Client,
    pub(super) records: Records,
    pub(super) sandboxes: mpsc::Sender<Sandbox>,
}

/// The plugin's questions, answered by what becomes of the pod.
pub(super) struct Answers(pub(super) Arc<Admitted>);

impl Admission for Answers {
    fn answer(&self, request: Request) -> BoxFuture<'static, Reply> {
        let admitted = Arc::clone(&self.0);
        Box::pin(async move {
            match request.ask {
                Ask::Add => admitted.add(request).await,
                Ask::Check => admitted.check(&request),
            }
        })
    }
}

impl Admitted {
    async fn add(&self, request: Request) -> Reply {
        let Ok(namespace) = self.finder.inode(&request.netns) else {
            return Reply::new(
                Verdict::Later,
                format!("there is no namespace at {} on the node", request.netns.display()),
            );
        };
        let begun = Instant::now();
        let mut uid: Arc<str> = request.pod.uid.as_str().into();
        if let Err(reply) = self.note(&request, &uid).await {
            return reply;
        }
        let mut snapshots = self.snapshots.clone();
        let mut is_asked = false;
        let mut told = self.pods.told();
        loop {
            let workload = snapshots
                .borrow_and_update()
                .workloads
                .get(&WorkloadUid(Arc::clone(&uid)))
                .cloned();
            told.borrow_and_update();
            match workload {
                Some(workload) if !workload.enrolled || workload.locality.node.as_deref() != Some(&*self.node) => {
                    return Reply::new(Verdict::Outside, "");
                }
                Some(workload) => match self.pods.standing(&workload.uid) {
                    Standing::Served(inode) if inode == namespace => {
                        info!(pod = %uid, took = ?begun.elapsed(), "a pod starts captured");
                        return Reply::new(Verdict::Captured, "");
                    }
                    Standing::Failed { why, is_final: true } => return Reply::new(Verdict::Failed, why),
                    // Of an earlier sandbox, or not yet.
                    Standing::Served(_) | Standing::Failed { .. } | Standing::Unknown => {}
                },
                None if !is_asked && begun.elapsed() >= LAG => {
                    is_asked = true;
                    match self.asked(&request).await {
                        Some(Asked::Outside) => return Reply::new(Verdict::Outside, ""),
                        Some(Asked::Known(known)) if known != uid => {
                            uid = known;
                            if let Err(reply) = self.note(&request, &uid).await {
                                return reply;
                            }
                        }
                        Some(Asked::Known(_)) | None => {}
                    }
                }
                None => {}
            }
            tokio::select! {
                changed = snapshots.changed() => if changed.is_err() { return going() },
                changed = told.changed() => if changed.is_err() { return going() },
                () = tokio::time::sleep(LAG) => {}
            }
        }
    }

    /// The sandbox counts from now on, for this daemon and the next.
    async fn note(&self, request: &Request, uid: &Arc<str>) -> Result<(), Reply> {
        let sandbox = Sandbox {
            namespace: request.pod.namespace.as_str().into(),
            name: request.pod.name.as_str().into(),
            uid: Arc::clone(uid),
            addresses: request.addresses.clone(),
            netns: request.netns.clone(),
        };
        if let Err(error) = self.records.write(&sandbox) {
            // Then a daemon that restarts right now finds the pod a moment later.
            warn!(%error, pod = %uid, "a sandbox cannot be recorded");
        }
        self.sandboxes.send(sandbox).await.map_err(|_| going())
    }

    /// As [`Records::tell`].
    pub(super) async fn look_again(&self) -> Vec<Sandbox> {
        self.records.tell(&self.finder, &self.sandboxes).await
    }

    async fn asked(&self, request: &Request) -> Option<Asked> {
        let pod = &request.pod;
        match asking::about(&self.client, &pod.namespace, &pod.name, &pod.uid).await {
            Ok(asking::Asked::Known { enrolment, .. }) if !enrolment.is_wanted() => Some(Asked::Outside),
            Ok(asking::Asked::Known { uid, .. }) => Some(Asked::Known(uid)),
            Ok(asking::Asked::Unknown) => None,
            Err(error) => {
                debug!(%error, "the API server does not say what a pod is");
                None
            }
        }
    }

    fn check(&self, request: &Request) -> Reply {
        let uid = WorkloadUid(request.pod.uid.as_str().into());
        match self.snapshots.borrow().workloads.get(&uid) {
            Some(workload) if workload.enrolled => match self.pods.standing(&uid) {
                Standing::Served(_) => Reply::new(Verdict::Captured, ""),
                Standing::Failed { why, .. } => Reply::new(Verdict::Failed, why),
                Standing::Unknown => Reply::new(Verdict::Later, "it is not captured yet"),
            },
            Some(_) | None => Reply::new(Verdict::Outside, ""),
        }
    }
}

enum Asked {
    Outside,
    /// By this UID.
    Known(Arc<str>),
}

fn going() -> Reply {
    Reply::new(Verdict::Later, "the daemon is about to end")
}

/// True if a snapshot has these sandboxes, as far as it has their pods.
pub(super) fn are_known(sandboxes: &[Sandbox], snapshot: &MeshSnapshot) -> bool {
    sandboxes.iter().all(|sandbox| {
        let workload = snapshot.workloads.get(&WorkloadUid(Arc::clone(&sandbox.uid)));
        workload.is_none_or(|workload| workload.netns.as_deref() == Some(sandbox.netns.as_path()))
    })
}

/// The sandboxes of the node as a daemon leaves them to the next: one file each, in a folder that a reboot empties.
#[derive(Debug, Clone)]
pub(super) struct Records {
    pub(super) folder: PathBuf,
}

impl Records {
    fn path(&self, uid: &str) -> Option<PathBuf> {
        let is_name = !uid.is_empty() && uid.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-');
        is_name.then(|| self.folder.join(uid))
    }

    fn write(&self, sandbox: &Sandbox) -> std::io::Result<()> {
        if self.path(&sandbox.uid).is_none() {
            return Err(std::io::Error::other("its UID is no name of a file"));
        }
        let text = serde_json::json!({
            "namespace": sandbox.namespace, "name": sandbox.name, "uid": sandbox.uid,
            "addresses": sandbox.addresses, "netns": sandbox.netns,
        });
        crate::cni::standing::write(&self.folder, &sandbox.uid, text.to_string().as_bytes())
    }

    /// The sandboxes as they are recorded now, which the index is told: another daemon may have heard of some since this
    /// one looked.
    pub(super) async fn tell(&self, finder: &Finder, index: &mpsc::Sender<Sandbox>) -> Vec<Sandbox> {
        let known = self.read(finder);
        for sandbox in &known {
            if index.send(sandbox.clone()).await.is_err() {
                break;
            }
        }
        known
    }

    /// Those whose namespace is still there. The others' files are removed.
    pub(super) fn read(&self, finder: &Finder) -> Vec<Sandbox> {
        let entries = std::fs::read_dir(&self.folder).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| {
                let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
                let sandbox = sandbox(&text).filter(|sandbox| finder.inode(&sandbox.netns).is_ok());
                if sandbox.is_none() {
                    let _ = std::fs::remove_file(entry.path());
                }
                sandbox
            })
            .collect()
    }
}

fn sandbox(text: &str) -> Option<Sandbox> {
    let value: serde_json::Value = serde_json::from_str(text).ok()?;
    let field = |name: &str| value[name].as_str().map(Arc::<str>::from);
    let addresses = value["addresses"].as_array()?.iter();
    Some(Sandbox {
        namespace: field("namespace")?,
        name: field("name")?,
        uid: field("uid")?,
        addresses: addresses.filter_map(|address| address.as_str()?.parse().ok()).collect(),
        netns: PathBuf::from(value["netns"].as_str()?),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    #[test]
    fn sandboxes_outlive_the_daemon_but_not_their_namespaces() {
        let directory = tempfile::tempdir().unwrap();
        let root = tempfile::tempdir().unwrap();
        std::fs::write(root.path().join("cni-1"), "").unwrap();
        let finder = Finder::new(Path::new("/proc"), root.path(), None, None).unwrap();
        let records = Records {
            folder: directory.path().join("sandboxes"),
        };
        let sandbox = |uid: &str, netns: &str| Sandbox {
            namespace: "shop".into(),
            name: "web-0".into(),
            uid: uid.into(),
            addresses: vec!["10.244.1.7".parse().unwrap(), "fd00::7".parse().unwrap()],
            netns: netns.into(),
        };
        assert!(records.read(&finder).is_empty());
        records.write(&sandbox("u-1", "/cni-1")).unwrap();
        records.write(&sandbox("u-2", "/cni-2")).unwrap();
        assert!(records.write(&sandbox("../u-3", "/cni-1")).is_err());
        std::fs::write(records.folder.join("broken"), "{").unwrap();
        assert_eq!(records.read(&finder), [sandbox("u-1", "/cni-1")]);
        assert_eq!(std::fs::read_dir(&records.folder).unwrap().count(), 1);
    }
}

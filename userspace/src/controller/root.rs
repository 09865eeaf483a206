//! The CA that issues now, followed while it changes: in a Secret of the cluster, with the trust bundle in a ConfigMap, or
//! in a directory. The bundle is published first; a CA whose root is new in it issues only once that has spread. Two
//! controllers need no leader: the Secret is made by create alone, and both publish the same bundle of it.
//! Not here: when a root has spread (`rotation`), and the objects themselves (`cluster_root`).

use super::{
    cluster_root::{ClusterRoot, ClusterRootError},
    rotation::{self, Before, Since, fingerprint},
};
use crate::certs::{
    Authority,
    authority::files::{CaDirError, CaFiles, Origin},
};
use rustls_pki_types::UnixTime;
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{sync::watch, task};
use tracing::{info, warn};

/// How often the CA's files and the bundle are looked at.
const REREAD: Duration = Duration::from_secs(5);
/// The same while there is no CA yet.
const FIRST: Duration = Duration::from_millis(500);
/// The operator hears of a CA certificate that ends within this time whenever it is read.
const EXPIRY_WARNING: Duration = Duration::from_secs(30 * 86_400);

/// Where the CA lies.
pub(super) enum Place {
    Directory(PathBuf),
    Cluster(Box<ClusterRoot>),
}

/// The CA as those who use it see it; `None` until there is one that may issue.
pub(super) type Issuing = watch::Receiver<Option<Arc<Authority>>>;

/// Follows the CA's files.
pub(super) struct Root {
    place: Place,
    spread: Duration,
    files: CaFiles,
    latest: Option<Arc<Authority>>,
    since: Since,
    issuing: watch::Sender<Option<Arc<Authority>>>,
    /// The last trouble, so that each is told once.
    trouble: Option<String>,
    waits: bool,
}

#[derive(Debug, thiserror::Error)]
enum RootError {
    #[error(transparent)]
    Files(CaDirError),
    #[error(transparent)]
    Cluster(#[from] ClusterRootError),
    #[error("the CA cannot be tried out")]
    Trial(#[source] crate::certs::authority::AuthorityError),
}

impl Root {
    /// A CA in a directory is opened at once, and made there if there is none.
    ///
    /// # Errors
    /// A directory whose files are no CA.
    pub(super) async fn open(place: Place, spread: Duration) -> Result<(Self, Issuing), CaDirError> {
        let (issuing, current) = watch::channel(None);
        let mut root = Self {
            place,
            spread,
            files: CaFiles::default(),
            latest: None,
            since: Since::new(),
            issuing,
            trouble: None,
            waits: false,
        };
        if let Place::Directory(dir) = &root.place {
            let dir = dir.clone();
            let origin = blocking({
                let dir = dir.clone();
                move || Authority::open(&dir, UnixTime::now()).map(|(_, origin)| origin)
            })
            .await?;
            if origin == Origin::Generated {
                info!(dir = %dir.display(), "new certificate authority made");
            }
            if let Err(RootError::Files(error)) = root.round(UnixTime::now()).await {
                return Err(error);
            }
        }
        Ok((root, current))
    }

    /// Works until it is dropped.
    pub(super) async fn follow(mut self) {
        loop {
            match self.round(UnixTime::now()).await {
                Ok(()) => {
                    if self.trouble.take().is_some() {
                        info!("the certificate authority is in order again");
                    }
                }
                Err(error) => {
                    let text = crate::telemetry::access::Causes(&error).to_string();
                    if self.trouble.as_ref() != Some(&text) {
                        let kept = self.issuing.borrow().is_some();
                        warn!(error = text, kept, "the certificate authority cannot be taken over");
                    }
                    self.trouble = Some(text);
                }
            }
            let pause = if self.issuing.borrow().is_some() { REREAD } else { FIRST };
            tokio::time::sleep(pause).await;
        }
    }

    /// Reads, publishes, and lets issue what may.
    async fn round(&mut self, now: UnixTime) -> Result<(), RootError> {
        let (files, place) = match &self.place {
            Place::Directory(dir) => {
                let dir = dir.clone();
                let files = blocking(move || CaFiles::read(&dir).map(|files| (files, dir))).await;
                files.map_err(RootError::Files)?
            }
            Place::Cluster(cluster) => cluster.read(now).await?,
        };
        let latest = match &self.latest {
            Some(latest) if files == self.files => Arc::clone(latest),
            Some(_) | None => self.take(files, &place, now)?,
        };
        let bundle = latest.bundle();
        let roots: Vec<String> = bundle.roots().iter().map(|root| fingerprint(&root.der)).collect();
        self.since = match &self.place {
            Place::Directory(_) => {
                let before = Before {
                    published: None,
                    own: &self.since,
                };
                rotation::since(roots.into_iter(), &before, now.as_secs())
            }
            Place::Cluster(cluster) => cluster.publish(bundle, &roots, &self.since, now.as_secs()).await?,
        };
        let vouching = latest.vouching_roots(now).map_err(RootError::Trial)?;
        let vouching: Vec<String> = vouching.iter().map(|root| fingerprint(&root.der)).collect();
        let wait = rotation::wait(vouching.iter(), &self.since, self.spread, now.as_secs());
        if wait.is_zero() {
            self.issue(latest);
        } else if !std::mem::replace(&mut self.waits, true) {
            let kept = self.issuing.borrow().is_some();
            info!(?wait, kept, "a new root is published; its CA issues once it has spread");
        }
        Ok(())
    }

    fn take(&mut self, files: CaFiles, place: &Path, now: UnixTime) -> Result<Arc<Authority>, RootError> {
        let authority = Authority::of_files(&files, place, now).map_err(RootError::Files)?;
        let roots = authority.bundle().roots().len();
        info!(place = %place.display(), roots, "certificate authority read");
        let left = authority.not_after().as_secs().saturating_sub(now.as_secs());
        if left < EXPIRY_WARNING.as_secs() {
            warn!(place = %place.display(), days_left = left / 86_400, "the CA certificate ends soon");
        }
        let authority = Arc::new(authority);
        self.files = files;
        self.latest = Some(Arc::clone(&authority));
        self.waits = false;
        Ok(authority)
    }

    fn issue(&mut self, latest: Arc<Authority>) {
        self.issuing.send_if_modified(|issuing| {
            if issuing.as_ref().is_some_and(|issuing| Arc::ptr_eq(issuing, &latest)) {
                return false;
            }
            info!("certificates are issued by the certificate authority that was read last");
            *issuing = Some(latest);
            true
        });
    }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(panicked) => std::panic::resume_unwind(panicked.into_panic()),
    }
}

//! The certificates of this node, as connections, tables and readiness see them: one per identity with a captured pod.
//! Not here: the task that fetches and renews them (`keeper`).

use super::{
    belief::TrustWatch,
    bundle::Trust,
    keeper::{ISSUE_DEADLINE, Keeper},
    key::DaemonKey,
    svid::{Svid, SvidError},
    verify::PeerRejected,
};
use crate::{
    mesh::{SpiffeId, TrustDomain},
    telemetry::{CaOutcome, Metrics},
};
use rustls_pki_types::{CertificateDer, UnixTime};
use std::{
    collections::{BTreeSet, HashMap},
    future::Future,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{sync::watch, time::timeout};

/// How long a connection waits for the certificate it needs.
const PATIENCE: Duration = Duration::from_secs(5);

/// Where certificates come from.
pub trait Issue: Send + Sync + 'static {
    type Error: std::error::Error + Send + Sync + 'static;
    /// Has `key` certified for `id`. The chain is leaf first; a root at its end does no harm.
    fn issue(
        &self,
        key: &DaemonKey,
        id: &SpiffeId,
    ) -> impl Future<Output = Result<Vec<CertificateDer<'static>>, Self::Error>> + Send;

    /// How a request that failed is counted.
    fn outcome(error: &Self::Error) -> CaOutcome;
}

#[derive(Debug, Clone)]
pub struct StoreSettings {
    /// The own trust domain first, then its aliases.
    pub trust_domains: Vec<TrustDomain>,
    /// PEM file of the mesh's root certificates, read again when it changes.
    pub ca_root: PathBuf,
    /// How often the file is looked at.
    pub reread: Duration,
    /// Where requests to the CA are counted.
    pub metrics: Option<Arc<Metrics>>,
}

/// Gives connections their certificates. Cheap to clone.
#[derive(Debug, Clone)]
pub struct CertStore {
    wanted: Arc<watch::Sender<BTreeSet<SpiffeId>>>,
    published: watch::Receiver<Published>,
    trust: watch::Receiver<Option<Arc<Trust>>>,
    patience: Duration,
}

/// Why there is no certificate for a connection.
#[derive(Debug, thiserror::Error)]
pub enum CertError {
    #[error("no captured pod of this node has the identity {id}")]
    NotWanted { id: SpiffeId },
    #[error("the certificate of {id} has not arrived yet")]
    NotYet { id: SpiffeId },
    #[error("the certificate of {id} cannot be had")]
    Unavailable { id: SpiffeId, source: Arc<FetchError> },
    #[error("the certificate store has ended")]
    Closed,
}

impl CertError {
    /// True if the CA has decided against this identity.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Unavailable { source, .. } => source.outcome() == Some(CaOutcome::Refused),
            Self::NotWanted { .. } | Self::NotYet { .. } | Self::Closed => false,
        }
    }
}

/// Why one try to get a certificate failed.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("the trust bundle {path} cannot be used", path = path.display())]
    NoTrust { path: PathBuf },
    #[error("the CA did not issue it")]
    Issue {
        outcome: CaOutcome,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("the CA did not answer within {} s", ISSUE_DEADLINE.as_secs())]
    Deadline,
    #[error("peers would refuse what the CA issued")]
    Unacceptable(#[source] PeerRejected),
    #[error("what the CA issued cannot be used")]
    Unusable(#[source] SvidError),
    #[error("the request ended unexpectedly")]
    Panicked,
}

impl FetchError {
    /// How it is counted; `None` where the CA was not asked.
    pub(super) fn outcome(&self) -> Option<CaOutcome> {
        match self {
            Self::NoTrust { .. } => None,
            Self::Issue { outcome, .. } => Some(*outcome),
            Self::Deadline => Some(CaOutcome::Unavailable),
            Self::Unacceptable(_) | Self::Unusable(_) | Self::Panicked => Some(CaOutcome::Unusable),
        }
    }
}

/// One line of the table of certificates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CertificateSummary {
    /// A SPIFFE ID, or a root's subject.
    pub name: String,
    pub kind: CertificateKind,
    pub status: CertificateStatus,
    /// Its time has begun and not ended.
    pub valid: bool,
    /// Colon-separated hexadecimal.
    pub serial: Option<String>,
    pub not_before: Option<SystemTime>,
    pub not_after: Option<SystemTime>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CertificateKind {
    Leaf,
    Root,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum CertificateStatus {
    Available,
    /// Asked for, not yet here.
    Initializing,
    /// Failed so far; the last reason.
    Unavailable(String),
}

/// What the keeper knows, for everybody to read.
#[derive(Debug, Default)]
pub(super) struct Published {
    pub(super) entries: HashMap<SpiffeId, Entry>,
}

#[derive(Debug, Default)]
pub(super) struct Entry {
    pub(super) svid: Option<Arc<Svid>>,
    /// Why the last try failed, if it did.
    pub(super) failure: Option<Arc<FetchError>>,
}

impl Published {
    fn usable(&self, id: &SpiffeId, now: SystemTime) -> Option<Arc<Svid>> {
        self.entries
            .get(id)?
            .svid
            .as_ref()
            .filter(|svid| now <= svid.not_after())
            .cloned()
    }
}

impl CertStore {
    /// A store and the task that fills it, which ends with `stop`.
    pub fn new<I: Issue>(
        issuer: I,
        key: DaemonKey,
        settings: StoreSettings,
        stop: impl Future<Output = ()> + Send,
    ) -> (Self, impl Future<Output = ()> + Send) {
        let (wanted, wants) = watch::channel(BTreeSet::new());
        let (publish, published) = watch::channel(Published::default());
        let (trusting, trust) = watch::channel(None);
        let keeper = Keeper::new(issuer, key, settings, wants, publish, trusting);
        (
            Self {
                wanted: Arc::new(wanted),
                published,
                trust,
                patience: PATIENCE,
            },
            keeper.run(stop),
        )
    }

    /// A store that holds these certificates and never changes: for tools and tests.
    pub fn fixed(svids: impl IntoIterator<Item = Svid>) -> Self {
        let entries: HashMap<_, _> = svids
            .into_iter()
            .map(|svid| {
                (
                    svid.id().clone(),
                    Entry {
                        svid: Some(Arc::new(svid)),
                        failure: None,
                    },
                )
            })
            .collect();
        let trust = entries
            .values()
            .find_map(|entry| entry.svid.as_ref())
            .map(|svid| svid.trust().clone());
        let wanted = watch::Sender::new(entries.keys().cloned().collect());
        let published = watch::Sender::new(Published { entries }).subscribe();
        let trust = watch::Sender::new(trust).subscribe();
        Self {
            wanted: Arc::new(wanted),
            published,
            trust,
            patience: Duration::ZERO,
        }
    }

    /// From now on exactly these identities are kept; certificates of others are dropped.
    pub fn want(&self, identities: BTreeSet<SpiffeId>) {
        self.wanted.send_if_modified(|wanted| {
            let changed = *wanted != identities;
            *wanted = identities;
            changed
        });
    }

    /// The current certificate of `id`. Waits at most 5 s for one that is not there yet.
    ///
    /// # Errors
    /// None in time, with the reason of the last try.
    pub async fn get(&self, id: &SpiffeId) -> Result<Arc<Svid>, CertError> {
        if let Some(svid) = self.published.borrow().usable(id, SystemTime::now()) {
            return Ok(svid);
        }
        let mut published = self.published.clone();
        let arrival = published.wait_for(|table| table.usable(id, SystemTime::now()).is_some());
        match timeout(self.patience, arrival).await {
            Ok(Ok(table)) => table
                .usable(id, SystemTime::now())
                .ok_or_else(|| CertError::NotYet { id: id.clone() }),
            Ok(Err(_)) => Err(CertError::Closed),
            Err(_) => Err(self.absence(id)),
        }
    }

    /// What every peer of this node is checked against, once it is known.
    pub fn trust(&self) -> Option<Arc<Trust>> {
        self.trust.borrow().clone()
    }

    /// The same, followed: to be taken before the handshake that it is for.
    pub fn watch_trust(&self) -> TrustWatch {
        TrustWatch::new(self.trust.clone())
    }

    /// Every certificate, leaves by name and then roots.
    pub fn list(&self) -> Vec<CertificateSummary> {
        let now = SystemTime::now();
        let published = self.published.borrow();
        let mut lines: Vec<_> = published
            .entries
            .iter()
            .map(|(id, entry)| summary(id, entry, now))
            .collect();
        lines.sort_by(|a, b| a.name.cmp(&b.name));
        let trust = self.trust.borrow();
        let roots = trust.iter().flat_map(|trust| trust.bundle.roots());
        lines.extend(roots.map(|root| {
            let (not_before, not_after) = (system_time(root.not_before), system_time(root.not_after));
            CertificateSummary {
                name: root.subject.clone(),
                kind: CertificateKind::Root,
                status: CertificateStatus::Available,
                valid: not_before <= now && now <= not_after,
                serial: Some(root.serial.clone()),
                not_before: Some(not_before),
                not_after: Some(not_after),
            }
        }));
        lines
    }

    #[cfg(test)]
    pub(crate) fn be_patient_for(&mut self, patience: Duration) {
        self.patience = patience;
    }

    fn absence(&self, id: &SpiffeId) -> CertError {
        let id = id.clone();
        match self.published.borrow().entries.get(&id) {
            None => CertError::NotWanted { id },
            Some(Entry {
                failure: Some(source), ..
            }) => CertError::Unavailable {
                id,
                source: source.clone(),
            },
            Some(Entry { failure: None, .. }) => CertError::NotYet { id },
        }
    }
}

fn summary(id: &SpiffeId, entry: &Entry, now: SystemTime) -> CertificateSummary {
    let svid = entry.svid.as_deref();
    CertificateSummary {
        name: id.to_string(),
        kind: CertificateKind::Leaf,
        status: match (svid, &entry.failure) {
            (Some(svid), _) if now <= svid.not_after() => CertificateStatus::Available,
            (_, Some(failure)) => CertificateStatus::Unavailable(with_causes(failure)),
            (_, None) => CertificateStatus::Initializing,
        },
        valid: svid.is_some_and(|svid| svid.not_before() <= now && now <= svid.not_after()),
        serial: svid.map(|svid| svid.serial().to_owned()),
        not_before: svid.map(Svid::not_before),
        not_after: svid.map(Svid::not_after),
    }
}

fn system_time(time: UnixTime) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(time.as_secs())
}

pub(super) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

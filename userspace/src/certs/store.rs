//! The certificates of this node: one per identity with a captured pod, fetched, renewed and kept. One task owns the
//! work; everybody else reads what it publishes. Not here: when (`rotation`) and from where (`issuer`).

use super::{
    bundle::{BundleError, Trust, TrustBundle},
    key::DaemonKey,
    read_bounded,
    rotation::Rotation,
    svid::{Svid, SvidError},
    verify::{PeerRejected, verify_peer},
};
use crate::mesh::{SpiffeId, TrustDomain};
use rustls_pki_types::{CertificateDer, UnixTime};
use std::{
    collections::{BTreeSet, HashMap, HashSet},
    future::Future,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{sync::watch, task::JoinSet, time::timeout};
use tracing::{debug, info, warn};

/// How long a connection waits for the certificate it needs.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long one request to the CA may take in all.
const ISSUE_DEADLINE: Duration = Duration::from_secs(15);
/// Requests to the CA at once.
const MOST_REQUESTS: usize = 16;
/// The wall clock may jump (suspend, NTP) while we sleep: look at it at least so often.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);
/// A root file beyond this is no trust bundle.
const MAX_BUNDLE_BYTES: usize = 1 << 20;

/// Where certificates come from.
pub trait Issue: Send + Sync + 'static {
    type Error: std::error::Error + Send + Sync + 'static;
    /// Has `key` certified for `id`. The chain is leaf first; a root at its end does no harm.
    fn issue(
        &self,
        key: &DaemonKey,
        id: &SpiffeId,
    ) -> impl Future<Output = Result<Vec<CertificateDer<'static>>, Self::Error>> + Send;
}

#[derive(Debug, Clone)]
pub struct StoreSettings {
    /// The own trust domain first, then its aliases.
    pub trust_domains: Vec<TrustDomain>,
    /// PEM file of the mesh's root certificates, read again when it changes.
    pub ca_root: PathBuf,
    /// How often the file is looked at.
    pub reread: Duration,
}

/// Gives connections their certificates. Cheap to clone.
#[derive(Debug, Clone)]
pub struct CertStore {
    wanted: Arc<watch::Sender<BTreeSet<SpiffeId>>>,
    published: watch::Receiver<Published>,
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

/// Why one try to get a certificate failed.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("the trust bundle {path} cannot be used", path = path.display())]
    NoTrust { path: PathBuf },
    #[error("the CA did not issue it")]
    Issue(#[source] Box<dyn std::error::Error + Send + Sync>),
    #[error("the CA did not answer within {} s", ISSUE_DEADLINE.as_secs())]
    Deadline,
    #[error("peers would refuse what the CA issued")]
    Unacceptable(#[source] PeerRejected),
    #[error("what the CA issued cannot be used")]
    Unusable(#[source] SvidError),
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

#[derive(Debug, Default)]
struct Published {
    trust: Option<Arc<Trust>>,
    entries: HashMap<SpiffeId, Entry>,
}

#[derive(Debug, Default)]
struct Entry {
    svid: Option<Arc<Svid>>,
    failure: Option<Arc<FetchError>>,
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
        let keeper = Keeper {
            issuer: Arc::new(issuer),
            key,
            settings,
            wants,
            publish,
            trust: None,
            bundle_text: Vec::new(),
            rotations: HashMap::new(),
            fetching: JoinSet::new(),
            in_flight: HashSet::new(),
        };
        (
            Self {
                wanted: Arc::new(wanted),
                published,
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
        let published = watch::Sender::new(Published { trust, entries }).subscribe();
        Self {
            wanted: Arc::new(wanted),
            published,
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
        self.published.borrow().trust.clone()
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
        let roots = published.trust.iter().flat_map(|trust| trust.bundle.roots());
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

/// Owns the work: reads the trust bundle, asks the CA, publishes.
struct Keeper<I> {
    issuer: Arc<I>,
    key: DaemonKey,
    settings: StoreSettings,
    wants: watch::Receiver<BTreeSet<SpiffeId>>,
    publish: watch::Sender<Published>,
    trust: Option<Arc<Trust>>,
    bundle_text: Vec<u8>,
    rotations: HashMap<SpiffeId, Rotation>,
    fetching: JoinSet<(SpiffeId, Result<Vec<CertificateDer<'static>>, FetchError>)>,
    in_flight: HashSet<SpiffeId>,
}

impl<I: Issue> Keeper<I> {
    async fn run(mut self, stop: impl Future<Output = ()> + Send) {
        let mut stop = std::pin::pin!(stop);
        let mut reread = tokio::time::interval(self.settings.reread);
        reread.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            self.start_due(SystemTime::now());
            let nap = self.nap(SystemTime::now());
            tokio::select! {
                () = &mut stop => return,
                changed = self.wants.changed() => match changed {
                    Ok(()) => self.follow_wants(SystemTime::now()),
                    Err(_) => return, // every CertStore is gone
                },
                Some(fetched) = self.fetching.join_next() => if let Ok((id, chain)) = fetched {
                    self.in_flight.remove(&id);
                    self.arrived(id, chain, SystemTime::now());
                },
                _ = reread.tick() => self.reread_bundle().await,
                () = tokio::time::sleep(nap) => {}
            }
        }
    }

    fn follow_wants(&mut self, now: SystemTime) {
        let wanted = self.wants.borrow_and_update().clone();
        self.rotations.retain(|id, _| wanted.contains(id));
        for id in &wanted {
            self.rotations.entry(id.clone()).or_insert_with(|| Rotation::new(now));
        }
        self.publish.send_modify(|table| {
            table.entries.retain(|id, _| wanted.contains(id));
            for id in wanted {
                table.entries.entry(id).or_default();
            }
        });
    }

    fn start_due(&mut self, now: SystemTime) {
        if self.trust.is_none() {
            return;
        }
        let room = MOST_REQUESTS.saturating_sub(self.in_flight.len());
        let due = self
            .rotations
            .iter()
            .filter(|(id, rotation)| rotation.due() <= now && !self.in_flight.contains(*id));
        for id in due.map(|(id, _)| id.clone()).take(room).collect::<Vec<_>>() {
            let (issuer, key) = (self.issuer.clone(), self.key.clone());
            self.in_flight.insert(id.clone());
            self.fetching.spawn(async move {
                let chain = match timeout(ISSUE_DEADLINE, issuer.issue(&key, &id)).await {
                    Ok(Ok(chain)) => Ok(chain),
                    Ok(Err(error)) => Err(FetchError::Issue(Box::new(error))),
                    Err(_) => Err(FetchError::Deadline),
                };
                (id, chain)
            });
        }
    }

    fn nap(&self, now: SystemTime) -> Duration {
        if self.trust.is_none() || self.in_flight.len() >= MOST_REQUESTS {
            return LONGEST_SLEEP;
        }
        let waiting = self.rotations.iter().filter(|(id, _)| !self.in_flight.contains(*id));
        let next = waiting
            .map(|(_, rotation)| rotation.due().duration_since(now).unwrap_or_default())
            .min();
        next.unwrap_or(LONGEST_SLEEP).min(LONGEST_SLEEP)
    }

    fn arrived(&mut self, id: SpiffeId, chain: Result<Vec<CertificateDer<'static>>, FetchError>, now: SystemTime) {
        let Some(rotation) = self.rotations.get_mut(&id) else {
            return; // no longer wanted
        };
        let Some(trust) = &self.trust else { return };
        let svid = chain.and_then(|chain| accept(&id, chain, &self.key, trust));
        match svid {
            Ok(svid) => {
                rotation.issued(now, svid.not_after(), rand::random());
                info!(%id, serial = svid.serial(), renewal_in = ?until(now, rotation.due()), "certificate issued");
                let entry = Entry {
                    svid: Some(Arc::new(svid)),
                    failure: None,
                };
                self.publish.send_modify(|table| drop(table.entries.insert(id, entry)));
            }
            Err(error) => {
                rotation.failed(now, rand::random());
                let (failures, retry_in) = (rotation.failures(), until(now, rotation.due()));
                if failures == 1 {
                    warn!(%id, error = with_causes(&error), ?retry_in, "no certificate; trying again");
                } else {
                    debug!(%id, error = with_causes(&error), failures, ?retry_in, "no certificate; trying again");
                }
                self.publish.send_modify(|table| {
                    table.entries.entry(id).or_default().failure = Some(Arc::new(error));
                });
            }
        }
    }

    /// A file that cannot be used changes nothing: the last good bundle stays.
    async fn reread_bundle(&mut self) {
        let path = &self.settings.ca_root;
        let text = match read_bounded(path, MAX_BUNDLE_BYTES).await {
            Ok(text) => text,
            Err(error) => {
                if self.bundle_text != error.to_string().as_bytes() {
                    warn!(path = %path.display(), %error, "cannot read the trust bundle");
                    self.bundle_text = error.to_string().into_bytes();
                }
                return self.without_trust();
            }
        };
        if text == self.bundle_text {
            return;
        }
        let bundle: Result<TrustBundle, BundleError> = TrustBundle::from_pem(&text);
        self.bundle_text = text;
        match bundle {
            Ok(bundle) => {
                info!(path = %path.display(), roots = bundle.roots().len(), "trust bundle read");
                self.adopt(Arc::new(Trust {
                    bundle,
                    domains: self.settings.trust_domains.clone(),
                }));
            }
            Err(error) => {
                warn!(path = %path.display(), %error, "the trust bundle cannot be used");
                self.without_trust();
            }
        }
    }

    /// Tells those who wait for a first certificate what is missing.
    fn without_trust(&mut self) {
        if self.trust.is_some() {
            return;
        }
        let failure = Arc::new(FetchError::NoTrust {
            path: self.settings.ca_root.clone(),
        });
        self.publish.send_modify(|table| {
            for entry in table.entries.values_mut() {
                entry.failure = Some(failure.clone());
            }
        });
    }

    fn adopt(&mut self, trust: Arc<Trust>) {
        let now = SystemTime::now();
        let rotations = &mut self.rotations;
        self.publish.send_modify(|table| {
            for (id, entry) in &mut table.entries {
                let Some(svid) = &entry.svid else { continue };
                if verify_peer(svid.chain(), &trust, Some(id), UnixTime::now()).is_err()
                    && let Some(rotation) = rotations.get_mut(id)
                {
                    rotation.hasten(now);
                }
                match svid.under(trust.clone()) {
                    Ok(svid) => entry.svid = Some(Arc::new(svid)),
                    Err(error) => entry.failure = Some(Arc::new(FetchError::Unusable(error))),
                }
            }
            table.trust = Some(trust.clone());
        });
        self.trust = Some(trust);
    }
}

/// Checks what the CA gave as a peer would, before anybody relies on it. Roots do not go on the wire.
fn accept(
    id: &SpiffeId,
    mut chain: Vec<CertificateDer<'static>>,
    key: &DaemonKey,
    trust: &Arc<Trust>,
) -> Result<Svid, FetchError> {
    chain.retain(|certificate| !trust.bundle.holds(certificate));
    verify_peer(&chain, trust, Some(id), UnixTime::now()).map_err(FetchError::Unacceptable)?;
    Svid::new(id.clone(), chain, key.signing(), trust.clone()).map_err(FetchError::Unusable)
}

fn system_time(time: UnixTime) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(time.as_secs())
}

fn until(now: SystemTime, then: SystemTime) -> Duration {
    then.duration_since(now).unwrap_or_default()
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

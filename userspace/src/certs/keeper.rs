//! The task behind the store: reads the trust bundle, asks the CA when it is time, publishes what it has. Not here: when
//! it is time (`rotation`) and how the CA is asked (`issuer`).

use super::{
    bundle::{Trust, TrustBundle},
    key::DaemonKey,
    read_bounded,
    rotation::Rotation,
    store::{Entry, FetchError, Issue, Published, StoreSettings, with_causes},
    svid::Svid,
    verify::verify_peer,
};
use crate::{mesh::SpiffeId, telemetry::CaOutcome};
use rustls_pki_types::{CertificateDer, UnixTime};
use std::{
    collections::{BTreeSet, HashMap},
    future::Future,
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{
    sync::watch,
    task::{self, JoinSet},
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tracing::{debug, info, warn};

/// How long one request to the CA may take in all.
pub(super) const ISSUE_DEADLINE: Duration = Duration::from_secs(15);
/// Requests to the CA at once.
const MOST_REQUESTS: usize = 16;
/// The wall clock may jump (suspend, NTP) while we sleep: look at it at least so often.
const LONGEST_SLEEP: Duration = Duration::from_secs(30);
/// A root file beyond this is no trust bundle.
const MAX_BUNDLE_BYTES: usize = 1 << 20;

type Chain = Vec<CertificateDer<'static>>;

pub(super) struct Keeper<I> {
    issuer: Arc<I>,
    key: DaemonKey,
    settings: StoreSettings,
    wants: watch::Receiver<BTreeSet<SpiffeId>>,
    publish: watch::Sender<Published>,
    trusting: watch::Sender<Option<Arc<Trust>>>,
    trust: Option<Arc<Trust>>,
    /// What the root file last held, or why it could not be read: each is reported once.
    seen: Option<Result<Vec<u8>, String>>,
    rotations: HashMap<SpiffeId, Rotation>,
    fetching: JoinSet<Result<Chain, FetchError>>,
    in_flight: HashMap<task::Id, SpiffeId>,
}

impl<I: Issue> Keeper<I> {
    pub(super) fn new(
        issuer: I,
        key: DaemonKey,
        settings: StoreSettings,
        wants: watch::Receiver<BTreeSet<SpiffeId>>,
        publish: watch::Sender<Published>,
        trusting: watch::Sender<Option<Arc<Trust>>>,
    ) -> Self {
        Self {
            issuer: Arc::new(issuer),
            key,
            settings,
            wants,
            publish,
            trusting,
            trust: None,
            seen: None,
            rotations: HashMap::new(),
            fetching: JoinSet::new(),
            in_flight: HashMap::new(),
        }
    }

    /// Works until `stop`, or until nobody holds the store any more.
    pub(super) async fn run(mut self, stop: impl Future<Output = ()> + Send) {
        let mut stop = std::pin::pin!(stop);
        let mut reread = interval(self.settings.reread);
        reread.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.start_due(SystemTime::now());
            let nap = self.nap(SystemTime::now());
            tokio::select! {
                () = &mut stop => return,
                changed = self.wants.changed() => match changed {
                    Ok(()) => self.follow_wants(SystemTime::now()),
                    Err(_) => return,
                },
                Some(ended) = self.fetching.join_next_with_id() => {
                    let (task, chain) = match ended {
                        Ok(ended) => ended,
                        Err(panicked) => (panicked.id(), Err(FetchError::Panicked)),
                    };
                    if let Some(id) = self.in_flight.remove(&task) {
                        self.arrived(id, chain, SystemTime::now());
                    }
                }
                _ = reread.tick() => self.reread_bundle().await,
                () = sleep(nap) => {}
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
        if self.seen.is_some() {
            self.tell_without_trust();
        }
    }

    fn start_due(&mut self, now: SystemTime) {
        if self.trust.is_none() {
            return;
        }
        let room = MOST_REQUESTS.saturating_sub(self.in_flight.len());
        let due = self.idle().filter(|(_, rotation)| rotation.due() <= now);
        for id in due.map(|(id, _)| id.clone()).take(room).collect::<Vec<_>>() {
            let (issuer, key, wanted) = (self.issuer.clone(), self.key.clone(), id.clone());
            let task = self.fetching.spawn(async move {
                match timeout(ISSUE_DEADLINE, issuer.issue(&key, &wanted)).await {
                    Ok(Ok(chain)) => Ok(chain),
                    Ok(Err(error)) => Err(FetchError::Issue {
                        outcome: I::outcome(&error),
                        source: Box::new(error),
                    }),
                    Err(_) => Err(FetchError::Deadline),
                }
            });
            self.in_flight.insert(task.id(), id);
        }
    }

    /// Those for which nobody asks the CA at the moment.
    fn idle(&self) -> impl Iterator<Item = (&SpiffeId, &Rotation)> {
        self.rotations
            .iter()
            .filter(|(id, _)| !self.in_flight.values().any(|asked| asked == *id))
    }

    fn nap(&self, now: SystemTime) -> Duration {
        if self.trust.is_none() || self.in_flight.len() >= MOST_REQUESTS {
            return LONGEST_SLEEP;
        }
        let next = self.idle().map(|(_, rotation)| until(now, rotation.due())).min();
        next.unwrap_or(LONGEST_SLEEP).min(LONGEST_SLEEP)
    }

    fn arrived(&mut self, id: SpiffeId, chain: Result<Chain, FetchError>, now: SystemTime) {
        let Some(rotation) = self.rotations.get_mut(&id) else {
            return; // no longer wanted
        };
        let Some(trust) = &self.trust else { return };
        let arrived = chain.and_then(|chain| accept(&id, chain, &self.key, trust));
        let outcome = arrived
            .as_ref()
            .map_or_else(FetchError::outcome, |_| Some(CaOutcome::Signed));
        if let (Some(metrics), Some(outcome)) = (&self.settings.metrics, outcome) {
            metrics.gauges.ca_request(outcome);
        }
        match arrived {
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
    pub(super) async fn reread_bundle(&mut self) {
        let path = self.settings.ca_root.clone();
        let read = read_bounded(&path, MAX_BUNDLE_BYTES)
            .await
            .map_err(|error| error.to_string());
        if self.seen.as_ref() == Some(&read) {
            return;
        }
        let bundle = match &read {
            Ok(text) => TrustBundle::from_pem(text).map_err(|error| error.to_string()),
            Err(error) => Err(error.clone()),
        };
        self.seen = Some(read);
        match bundle {
            Ok(bundle) => {
                info!(path = %path.display(), roots = bundle.roots().len(), "trust bundle read");
                self.adopt(
                    Arc::new(Trust {
                        bundle,
                        domains: self.settings.trust_domains.clone(),
                    }),
                    SystemTime::now(),
                );
            }
            Err(error) => {
                warn!(path = %path.display(), error, kept = self.trust.is_some(), "the trust bundle cannot be used");
                self.tell_without_trust();
            }
        }
    }

    /// Tells those who wait for a first certificate what is missing.
    fn tell_without_trust(&mut self) {
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

    /// Every certificate comes under the new bundle; one that peers with this bundle would refuse is asked for anew.
    fn adopt(&mut self, trust: Arc<Trust>, now: SystemTime) {
        let rotations = &mut self.rotations;
        self.publish.send_modify(|table| {
            for (id, entry) in &mut table.entries {
                let Some(svid) = &entry.svid else { continue };
                let believed = verify_peer(svid.chain(), &trust, Some(id), UnixTime::now()).is_ok();
                if let (false, Some(rotation)) = (believed, rotations.get_mut(id)) {
                    rotation.hasten(now);
                }
                match svid.under(trust.clone()) {
                    Ok(svid) => entry.svid = Some(Arc::new(svid)),
                    Err(error) => entry.failure = Some(Arc::new(FetchError::Unusable(error))),
                }
            }
        });
        self.trusting.send_replace(Some(trust.clone()));
        self.trust = Some(trust);
    }
}

/// Checks what the CA gave as a peer would, before anybody relies on it. Roots do not go on the wire.
fn accept(id: &SpiffeId, mut chain: Chain, key: &DaemonKey, trust: &Arc<Trust>) -> Result<Svid, FetchError> {
    chain.retain(|certificate| !trust.bundle.holds(certificate));
    verify_peer(&chain, trust, Some(id), UnixTime::now()).map_err(FetchError::Unacceptable)?;
    Svid::new(id.clone(), chain, key.signing(), trust.clone()).map_err(FetchError::Unusable)
}

fn until(now: SystemTime, then: SystemTime) -> Duration {
    then.duration_since(now).unwrap_or_default()
}

//! Asks the API server whose token it is: once for all who wait for the same answer, a few at a time, and not at all for
//! what is still remembered. Not here: how an answer is read (`review`) and for how long it counts (`cache`).

use super::{
    cache::{Cache, Digest, Remembered},
    limit::Buckets,
    review::{self, Binding, Claims, Expected, TokenRefused},
};
use aws_lc_rs::digest::{SHA256, digest};
use futures::{
    FutureExt,
    future::{BoxFuture, Shared, WeakShared},
};
use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec};
use kube::{Api, Client, api::PostParams, core::ObjectMeta};
use parking_lot::Mutex;
use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};
use tokio::{sync::Semaphore, time::timeout};
use tracing::debug;

/// Reviews under way at once, and those that wait for their turn.
const AT_ONCE: usize = 16;
const MOST_WAITING: usize = 256;
/// How long one may take in all.
const DEADLINE: Duration = Duration::from_secs(5);
/// Tokens that nobody has accepted yet, per address and second.
const UNKNOWN_PER_SECOND: u32 = 5;
const UNKNOWN_BURST: u32 = 20;
const MOST_ADDRESSES: usize = 65_536;

/// Why it is not known whose token it is.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReviewError {
    #[error("the token is refused: {0}")]
    Refused(TokenRefused),
    #[error("the API server did not say whose token it is: {0}")]
    Unanswered(Arc<str>),
    #[error("too many tokens wait to be looked at")]
    Busy,
    #[error("too many unknown tokens from one address")]
    Flood,
}

/// How reviews went so far.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ReviewCounts {
    pub accepted: u64,
    pub refused: u64,
    pub unanswered: u64,
    /// The time they took, all together.
    pub taken: Duration,
}

type Answer = Result<Binding, ReviewError>;
type Asking = BoxFuture<'static, Answer>;

/// Asks and remembers. Cheap to clone.
#[derive(Clone)]
pub(super) struct Reviews(Arc<Inner>);

struct Inner {
    api: Api<TokenReview>,
    expected: Expected,
    cache: Mutex<Cache>,
    /// Held by those who wait alone: when the last of them goes, so does the question.
    asking: Mutex<HashMap<Digest, WeakShared<Asking>>>,
    turns: Semaphore,
    waiting: AtomicUsize,
    addresses: Mutex<Buckets<IpAddr>>,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    accepted: AtomicU64,
    refused: AtomicU64,
    unanswered: AtomicU64,
    nanoseconds: AtomicU64,
}

impl Reviews {
    pub(super) fn new(client: Client, expected: Expected) -> Self {
        Self(Arc::new(Inner {
            api: Api::all(client),
            expected,
            cache: Mutex::default(),
            asking: Mutex::default(),
            turns: Semaphore::new(AT_ONCE),
            waiting: AtomicUsize::new(0),
            addresses: Mutex::new(Buckets::new(UNKNOWN_PER_SECOND, UNKNOWN_BURST, MOST_ADDRESSES)),
            counts: Counts::default(),
        }))
    }

    pub(super) fn counts(&self) -> ReviewCounts {
        let Counts {
            accepted,
            refused,
            unanswered,
            nanoseconds,
        } = &self.0.counts;
        ReviewCounts {
            accepted: accepted.load(Ordering::Relaxed),
            refused: refused.load(Ordering::Relaxed),
            unanswered: unanswered.load(Ordering::Relaxed),
            taken: Duration::from_nanos(nanoseconds.load(Ordering::Relaxed)),
        }
    }

    /// Where the bearer of `token` runs, who asks from `address`.
    ///
    /// # Errors
    /// The token opens nothing, or it cannot be said now.
    pub(super) async fn binding_of(&self, token: &str, address: Option<IpAddr>) -> Answer {
        let claims = Claims::read(token, &self.0.expected, SystemTime::now()).map_err(ReviewError::Refused)?;
        let mut key = Digest::default();
        key.copy_from_slice(digest(&SHA256, token.as_bytes()).as_ref());
        let known = match self.0.cache.lock().look(&key, Instant::now()) {
            Remembered::Accepted(binding) => return Ok(binding),
            Remembered::Refused(refused) => return Err(ReviewError::Refused(refused)),
            Remembered::Stale(binding) => Some(binding),
            Remembered::Nothing => None,
        };
        let asked = match self.ask(key, token, claims, known.is_some(), address) {
            Ok(asking) => asking.await,
            Err(error) => Err(error),
        };
        match (asked, known) {
            (Err(ReviewError::Unanswered(_) | ReviewError::Busy), Some(binding)) => Ok(binding),
            (answer, _) => answer,
        }
    }

    /// The question that is under way, or a new one.
    fn ask(
        &self,
        key: Digest,
        token: &str,
        claims: Claims,
        known: bool,
        address: Option<IpAddr>,
    ) -> Result<Shared<Asking>, ReviewError> {
        let mut asking = self.0.asking.lock();
        if let Some(running) = asking.get(&key).and_then(WeakShared::upgrade) {
            return Ok(running);
        }
        if !known
            && let Some(address) = address
            && !self.0.addresses.lock().take(address.to_canonical(), Instant::now())
        {
            return Err(ReviewError::Flood);
        }
        if asking.len() >= 2 * MOST_WAITING {
            asking.retain(|_, asking| asking.upgrade().is_some());
        }
        let new = Arc::clone(&self.0)
            .review(key, token.to_owned(), claims)
            .boxed()
            .shared();
        if let Some(weak) = new.downgrade() {
            asking.insert(key, weak);
        }
        Ok(new)
    }
}

/// One more that waits, for as long as it lives.
struct Waiting<'a>(&'a AtomicUsize);

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Inner {
    async fn review(self: Arc<Self>, key: Digest, token: String, claims: Claims) -> Answer {
        let before = self.waiting.fetch_add(1, Ordering::Relaxed);
        let _waiting = Waiting(&self.waiting);
        if before >= MOST_WAITING + AT_ONCE {
            return Err(ReviewError::Busy);
        }
        let answer = match timeout(DEADLINE, self.put(token)).await {
            Ok(answer) => answer,
            Err(_) => Err(ReviewError::Unanswered("no answer in time".into())),
        };
        let now = Instant::now();
        match &answer {
            Ok(binding) => {
                let left = claims.expires.duration_since(SystemTime::now()).unwrap_or_default();
                self.counts.accepted.fetch_add(1, Ordering::Relaxed);
                self.cache.lock().accept(key, binding.clone(), left, now);
            }
            Err(ReviewError::Refused(refused)) => {
                self.counts.refused.fetch_add(1, Ordering::Relaxed);
                self.cache.lock().refuse(key, refused.clone(), now);
            }
            Err(ReviewError::Unanswered(_) | ReviewError::Busy | ReviewError::Flood) => {
                self.counts.unanswered.fetch_add(1, Ordering::Relaxed);
            }
        }
        self.asking.lock().remove(&key);
        answer
    }

    async fn put(&self, token: String) -> Answer {
        // A closed semaphore is impossible: nobody closes it.
        let Ok(_turn) = self.turns.acquire().await else {
            return Err(ReviewError::Busy);
        };
        let question = TokenReview {
            metadata: ObjectMeta::default(),
            spec: TokenReviewSpec {
                audiences: Some(vec![self.expected.audience.clone()]),
                token,
            },
            status: None,
        };
        let begin = Instant::now();
        let answer = self.api.create(&PostParams::default(), &question).await;
        let taken = u64::try_from(begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.counts.nanoseconds.fetch_add(taken, Ordering::Relaxed);
        match answer {
            Ok(TokenReview {
                status: Some(status), ..
            }) => {
                if let Some(error) = &status.error {
                    debug!(error, "the API server on a token");
                }
                review::read(&status, &self.expected).map_err(ReviewError::Refused)
            }
            Ok(TokenReview { status: None, .. }) => Err(ReviewError::Unanswered("an answer without a status".into())),
            Err(error) => Err(ReviewError::Unanswered(error.to_string().into())),
        }
    }
}

#[cfg(test)]
#[path = "reviews_tests.rs"]
mod tests;

//! The list and watch of one kind, for ever: which version the server has, what to do when it has none, and how long to
//! wait after a failure.

use super::{Letter, kinds::Place, object::Object};
use crate::shutdown::Shutdown;
use futures::StreamExt;
use kube::{
    Api, Client,
    runtime::watcher::{self, Event},
};
use rand::Rng;
use serde_json::Value;
use std::time::Duration;
use tokio::{sync::mpsc, time::Instant};
use tracing::{debug, info, warn};

/// A watch lasts so many seconds, so that one whose connection is half open is noticed.
const WATCH_SECONDS: u32 = 30;
const PAGE: u32 = 500;
/// A server that is away is asked again after so long, at first and at most. Short: what changed meanwhile has to be
/// known within seconds of its return.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(3);
/// A kind that is not there is looked for after so long, at first and at most.
const FIRST_LOOK: Duration = Duration::from_millis(200);
const LONGEST_LOOK: Duration = Duration::from_secs(10);
/// How often in a row the server must say that it knows no such kind. Oftener where it has listed it before: what answers
/// in the place of a server that comes or goes may say the same, and policies must not be dropped for that. Whoever deletes
/// a kind deletes its objects first, which the watch tells.
const LOOKS: u32 = 2;
const LOOKS_IF_LISTED: u32 = 5;
/// Without a failure for so long, the next one is a first one.
const FORGIVEN: Duration = Duration::from_secs(60);

/// What one watch tells.
#[derive(Debug)]
pub(super) enum News {
    /// All objects follow; those that do not are gone when the list ends.
    ListBegins,
    Is(Value),
    IsGone(Value),
    ListEnds,
    /// The server knows no such kind, so there are no objects of it.
    KindIsMissing,
}

/// Why a round of watching ended.
enum Ended {
    /// In no version of the ones that were asked for.
    Missing,
    /// The list must be made anew.
    Stale,
    /// Nobody listens any more.
    Unheard,
}

/// Watches until the drain begins.
pub(super) async fn watch(client: Client, place: Place, letters: mpsc::Sender<Letter>, shutdown: Shutdown) {
    let draining = shutdown.draining();
    tokio::select! {
        () = draining => {}
        () = follow(client, place, letters) => {}
    }
}

async fn follow(client: Client, place: Place, letters: mpsc::Sender<Letter>) {
    let kind = place.kind;
    let mut pauses = Pauses::new(FIRST_PAUSE, LONGEST_PAUSE);
    let mut looks = Pauses::new(FIRST_LOOK, LONGEST_LOOK);
    let mut absence = Absence::default();
    loop {
        let mut missing = true;
        for version in &place.versions {
            let api: Api<Object> = Api::all_with(client.clone(), version);
            match one_round(api, &place, &letters, &mut pauses, &mut absence).await {
                Ended::Missing => continue,
                Ended::Stale => {}
                Ended::Unheard => return,
            }
            missing = false;
            break;
        }
        if !missing {
            looks.reset();
            continue;
        }
        debug!(kind = kind.word(), "the API server does not know this kind");
        if absence.missed() && letters.send((kind, News::KindIsMissing)).await.is_err() {
            return;
        }
        looks.wait().await;
    }
}

/// Whether a kind is missing. Pure.
#[derive(Debug, Default)]
struct Absence {
    listed: bool,
    misses: u32,
}

impl Absence {
    fn listed(&mut self) {
        *self = Self {
            listed: true,
            misses: 0,
        };
    }

    /// The server does not know the kind in any version; true if that is to be believed.
    fn missed(&mut self) -> bool {
        self.misses += 1;
        let believed = self.misses >= if self.listed { LOOKS_IF_LISTED } else { LOOKS };
        if believed {
            *self = Self::default();
            self.misses = LOOKS;
        }
        believed
    }
}

/// One list, and watches from there on for as long as they can follow each other.
async fn one_round(
    api: Api<Object>,
    place: &Place,
    letters: &mpsc::Sender<Letter>,
    pauses: &mut Pauses,
    absence: &mut Absence,
) -> Ended {
    let kind = place.kind;
    let config = watcher::Config::default().timeout(WATCH_SECONDS).page_size(PAGE);
    let mut events = std::pin::pin!(watcher::watcher(api, config));
    // The watcher says that a list begins before it asks for it.
    let mut begins = false;
    while let Some(event) = events.next().await {
        let news = match event {
            Ok(Event::Init) => {
                begins = true;
                continue;
            }
            Ok(Event::InitApply(object) | Event::Apply(object)) => News::Is(object.value),
            Ok(Event::Delete(object)) => News::IsGone(object.value),
            Ok(Event::InitDone) => {
                absence.listed();
                News::ListEnds
            }
            Err(error) => match Failure::of(&error) {
                Failure::Missing if place.may_be_missing => return Ended::Missing,
                Failure::Stale => {
                    debug!(kind = kind.word(), %error, "listing anew");
                    pauses.wait().await;
                    return Ended::Stale;
                }
                Failure::Missing | Failure::Passing => {
                    if pauses.is_first() {
                        warn!(
                            kind = kind.word(),
                            error = &error as &dyn std::error::Error,
                            "cannot be watched"
                        );
                    } else {
                        debug!(
                            kind = kind.word(),
                            error = &error as &dyn std::error::Error,
                            "cannot be watched"
                        );
                    }
                    pauses.wait().await;
                    continue;
                }
            },
        };
        if !pauses.is_first() && !matches!(news, News::Is(_)) {
            info!(kind = kind.word(), "watched again");
        }
        pauses.reset();
        if std::mem::take(&mut begins) && letters.send((kind, News::ListBegins)).await.is_err() {
            return Ended::Unheard;
        }
        if letters.send((kind, news)).await.is_err() {
            return Ended::Unheard;
        }
    }
    Ended::Stale
}

/// What a failure means for the watch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failure {
    /// The server does not have the kind in this version.
    Missing,
    /// The version that we have seen is of no use to the server.
    Stale,
    /// Try again.
    Passing,
}

impl Failure {
    fn of(error: &watcher::Error) -> Self {
        match error {
            watcher::Error::InitialListFailed(kube::Error::Api(status)) if status.code == 404 => Self::Missing,
            watcher::Error::WatchStartFailed(kube::Error::Api(status)) => match status.code {
                404 => Self::Missing,
                400 | 410 | 422 => Self::Stale,
                _ => Self::Passing,
            },
            watcher::Error::InitialListFailed(_)
            | watcher::Error::WatchError(_)
            | watcher::Error::WatchFailed(_)
            | watcher::Error::NoResourceVersion => Self::Passing,
            watcher::Error::WatchStartFailed(_) => Self::Passing,
        }
    }
}

/// How long to wait before the next try: twice as long as the last, at most `longest`, and never in step with others.
#[derive(Debug)]
struct Pauses {
    first: Duration,
    longest: Duration,
    tries: u32,
    last: Option<Instant>,
}

impl Pauses {
    fn new(first: Duration, longest: Duration) -> Self {
        Self {
            first,
            longest,
            tries: 0,
            last: None,
        }
    }

    fn is_first(&self) -> bool {
        self.tries == 0 || self.last.is_some_and(|last| last.elapsed() > FORGIVEN)
    }

    fn reset(&mut self) {
        self.tries = 0;
    }

    /// `share` of the pause that is due, between a half and all of it.
    fn next(&mut self, share: f64) -> Duration {
        if self.is_first() {
            self.tries = 0;
        }
        let due = self.first.saturating_mul(1 << self.tries.min(10)).min(self.longest);
        self.tries = self.tries.saturating_add(1);
        self.last = Some(Instant::now());
        due.mul_f64(share)
    }

    async fn wait(&mut self) {
        let share = rand::rng().random_range(0.5..=1.0);
        tokio::time::sleep(self.next(share)).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kube::core::Status;

    #[tokio::test(start_paused = true)]
    async fn pauses_double_up_to_a_bound_and_begin_anew_after_success() {
        let mut pauses = Pauses::new(FIRST_PAUSE, LONGEST_PAUSE);
        let waits: Vec<u128> = (0..7).map(|_| pauses.next(1.0).as_millis()).collect();
        assert_eq!(waits, [200, 400, 800, 1600, 3000, 3000, 3000]);
        assert_eq!(pauses.next(0.5).as_millis(), 1500);
        pauses.reset();
        assert_eq!(pauses.next(1.0).as_millis(), 200);
        pauses.next(1.0);
        tokio::time::advance(FORGIVEN * 2).await;
        assert!(pauses.is_first());
        assert_eq!(pauses.next(1.0).as_millis(), 200);
    }

    #[test]
    fn a_kind_whose_objects_were_listed_is_believed_missing_only_after_a_while() {
        let mut absence = Absence::default();
        assert_eq!(
            [absence.missed(), absence.missed(), absence.missed()],
            [false, true, true]
        );
        absence.listed();
        let believed: Vec<bool> = (0..6).map(|_| absence.missed()).collect();
        assert_eq!(believed, [false, false, false, false, true, true]);
        absence.listed();
        assert!((0..4).all(|_| !absence.missed()));
        absence.listed();
        assert!(!absence.missed(), "it was there in between");
    }

    #[test]
    fn a_kind_is_missing_by_404_alone_and_what_the_server_cannot_follow_is_listed_anew() {
        let api = |code| {
            kube::Error::Api(Box::new(Status {
                code,
                ..Status::default()
            }))
        };
        for (error, meant) in [
            (watcher::Error::InitialListFailed(api(404)), Failure::Missing),
            (watcher::Error::WatchStartFailed(api(404)), Failure::Missing),
            (watcher::Error::InitialListFailed(api(403)), Failure::Passing),
            (watcher::Error::InitialListFailed(api(503)), Failure::Passing),
            (watcher::Error::WatchStartFailed(api(410)), Failure::Stale),
            (watcher::Error::WatchStartFailed(api(429)), Failure::Passing),
            (watcher::Error::WatchStartFailed(api(504)), Failure::Passing),
            (watcher::Error::NoResourceVersion, Failure::Passing),
        ] {
            assert_eq!(Failure::of(&error), meant, "{error}");
        }
    }
}

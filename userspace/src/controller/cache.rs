//! What the API server said of tokens, remembered for a short time under the token's digest. Pure: time is an argument;
//! what is refused has room of its own, so that a flood of wrong tokens pushes out no right one.

use super::review::{Binding, TokenRefused};
use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

/// SHA-256 of a token.
pub(super) type Digest = [u8; 32];

/// An accepted token is asked for anew after this: as late may a deleted pod's token still count.
pub(super) const FRESH: Duration = Duration::from_secs(60);
/// While the API server does not answer, an accepted token counts for this long.
pub(super) const STALE: Duration = Duration::from_secs(900);
/// A refused token is refused without a question for this long.
pub(super) const REFUSED: Duration = Duration::from_secs(10);
/// Two tokens a node, 4,000 nodes.
const MOST_ACCEPTED: usize = 8192;
const MOST_REFUSED: usize = 4096;

#[derive(Debug, Default)]
pub(super) struct Cache {
    accepted: HashMap<Digest, Accepted>,
    refused: HashMap<Digest, (TokenRefused, Instant)>,
}

#[derive(Debug)]
struct Accepted {
    binding: Binding,
    fresh_until: Instant,
    /// Never beyond the token's own end.
    until: Instant,
}

/// What is remembered of a token.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Remembered {
    Accepted(Binding),
    Refused(TokenRefused),
    /// Accepted a while ago: counts if the API server does not answer.
    Stale(Binding),
    Nothing,
}

impl Cache {
    pub(super) fn look(&self, digest: &Digest, now: Instant) -> Remembered {
        if let Some(accepted) = self.accepted.get(digest) {
            if now < accepted.fresh_until {
                return Remembered::Accepted(accepted.binding.clone());
            }
            if now < accepted.until {
                return Remembered::Stale(accepted.binding.clone());
            }
        }
        match self.refused.get(digest) {
            Some((refused, until)) if now < *until => Remembered::Refused(refused.clone()),
            Some(_) | None => Remembered::Nothing,
        }
    }

    /// `left` is what is left of the token's own life.
    pub(super) fn accept(&mut self, digest: Digest, binding: Binding, left: Duration, now: Instant) {
        self.refused.remove(&digest);
        let accepted = Accepted {
            binding,
            fresh_until: now + FRESH.min(left),
            until: now + STALE.min(left),
        };
        make_room(&mut self.accepted, MOST_ACCEPTED, |accepted| accepted.until, now);
        self.accepted.insert(digest, accepted);
    }

    pub(super) fn refuse(&mut self, digest: Digest, refused: TokenRefused, now: Instant) {
        self.accepted.remove(&digest);
        make_room(&mut self.refused, MOST_REFUSED, |(_, until)| *until, now);
        self.refused.insert(digest, (refused, now + REFUSED));
    }
}

/// Forgets what has ended and, if that is not enough, the half that ends first.
fn make_room<V>(map: &mut HashMap<Digest, V>, most: usize, end: impl Fn(&V) -> Instant, now: Instant) {
    if map.len() < most {
        return;
    }
    map.retain(|_, value| now < end(value));
    if map.len() >= most {
        let mut ends: Vec<_> = map.values().map(&end).collect();
        ends.sort_unstable();
        let median = ends.get(most / 2).copied().unwrap_or(now);
        map.retain(|_, value| median < end(value));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);
    const SECOND: Duration = Duration::from_secs(1);

    fn node(name: &str) -> Binding {
        Binding::Node(name.into())
    }

    #[test]
    fn an_accepted_token_is_fresh_then_stale_then_forgotten() {
        let (mut cache, start) = (Cache::default(), Instant::now());
        cache.accept([1; 32], node("a"), HOUR, start);
        let look = |after| cache.look(&[1; 32], start + after);
        assert_eq!(look(FRESH - SECOND), Remembered::Accepted(node("a")));
        assert_eq!(look(FRESH), Remembered::Stale(node("a")));
        assert_eq!(look(STALE - SECOND), Remembered::Stale(node("a")));
        assert_eq!(look(STALE), Remembered::Nothing);
        assert_eq!(cache.look(&[2; 32], start), Remembered::Nothing);
    }

    #[test]
    fn nothing_counts_beyond_the_tokens_own_end() {
        let (mut cache, start) = (Cache::default(), Instant::now());
        cache.accept([1; 32], node("a"), 5 * SECOND, start);
        cache.accept([2; 32], node("b"), 2 * FRESH, start);
        assert_eq!(
            cache.look(&[1; 32], start + 4 * SECOND),
            Remembered::Accepted(node("a"))
        );
        assert_eq!(cache.look(&[1; 32], start + 5 * SECOND), Remembered::Nothing);
        assert_eq!(cache.look(&[2; 32], start + FRESH), Remembered::Stale(node("b")));
        assert_eq!(cache.look(&[2; 32], start + 2 * FRESH), Remembered::Nothing);
    }

    #[test]
    fn the_last_answer_counts() {
        let (mut cache, start) = (Cache::default(), Instant::now());
        cache.accept([1; 32], node("a"), HOUR, start);
        cache.refuse([1; 32], TokenRefused::Unauthenticated, start + FRESH);
        assert_eq!(
            cache.look(&[1; 32], start + FRESH),
            Remembered::Refused(TokenRefused::Unauthenticated)
        );
        assert_eq!(cache.look(&[1; 32], start + FRESH + REFUSED), Remembered::Nothing);
        cache.accept([1; 32], node("b"), HOUR, start + FRESH);
        assert_eq!(cache.look(&[1; 32], start + FRESH), Remembered::Accepted(node("b")));
    }

    #[test]
    fn a_flood_of_wrong_tokens_is_bounded_and_pushes_out_no_right_one() {
        let (mut cache, start) = (Cache::default(), Instant::now());
        let digest = |n: u32| {
            let mut digest = [9; 32];
            digest[..4].copy_from_slice(&n.to_be_bytes());
            digest
        };
        cache.accept([1; 32], node("a"), HOUR, start);
        for n in 0..50_000 {
            cache.refuse(
                digest(n),
                TokenRefused::Unauthenticated,
                start + Duration::from_micros(n.into()),
            );
            assert!(cache.refused.len() <= MOST_REFUSED);
        }
        assert_eq!(cache.look(&[1; 32], start), Remembered::Accepted(node("a")));
        for n in 0..50_000 {
            cache.accept(digest(n), node("b"), HOUR, start + Duration::from_micros(n.into()));
            assert!(cache.accepted.len() <= MOST_ACCEPTED);
        }
    }
}

//! How much one caller may ask of us: a bucket of tokens for each key. Pure: time is an argument; memory is bounded.

use std::{collections::HashMap, hash::Hash, time::Instant};

/// Buckets that fill at one rate up to one level.
#[derive(Debug)]
pub(super) struct Buckets<K> {
    per_second: f64,
    burst: f64,
    /// Keys that are remembered at once.
    most: usize,
    buckets: HashMap<K, Bucket>,
}

#[derive(Debug, Clone, Copy)]
struct Bucket {
    level: f64,
    at: Instant,
}

impl<K: Eq + Hash> Buckets<K> {
    pub(super) fn new(per_second: u32, burst: u32, most: usize) -> Self {
        Self {
            per_second: per_second.into(),
            burst: burst.into(),
            most,
            buckets: HashMap::new(),
        }
    }

    /// Takes one from the bucket of `key`; false if there is none left. A key that is new while all room is taken by
    /// others that are busy gets none.
    pub(super) fn take(&mut self, key: K, now: Instant) -> bool {
        let (rate, burst) = (self.per_second, self.burst);
        let level_now = |bucket: &Bucket| {
            let since = now.saturating_duration_since(bucket.at).as_secs_f64();
            (bucket.level + since * rate).min(burst)
        };
        if self.buckets.len() >= self.most && !self.buckets.contains_key(&key) {
            // Who has a full bucket is as if never seen.
            self.buckets.retain(|_, bucket| level_now(bucket) < burst);
            if self.buckets.len() >= self.most {
                return false;
            }
        }
        let bucket = self.buckets.entry(key).or_insert(Bucket { level: burst, at: now });
        let level = level_now(bucket);
        let enough = level >= 1.0;
        *bucket = Bucket {
            level: if enough { level - 1.0 } else { level },
            at: now,
        };
        enough
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_caller_may_burst_then_keep_to_the_rate_and_others_do_not_notice() {
        let mut buckets = Buckets::new(10, 3, 100);
        let start = Instant::now();
        let taken = |buckets: &mut Buckets<_>, key, at| (0..10).filter(|_| buckets.take(key, at)).count();
        assert_eq!(taken(&mut buckets, "a", start), 3);
        assert_eq!(taken(&mut buckets, "b", start), 3);
        assert_eq!(taken(&mut buckets, "a", start + Duration::from_millis(99)), 0);
        assert_eq!(taken(&mut buckets, "a", start + Duration::from_millis(200)), 2);
        assert_eq!(
            taken(&mut buckets, "a", start + Duration::from_secs(3600)),
            3,
            "no more than the burst"
        );
    }

    #[test]
    fn memory_is_bounded_and_the_quiet_are_forgotten_first() {
        let mut buckets = Buckets::new(10, 2, 2);
        let start = Instant::now();
        assert!(buckets.take(1, start) && buckets.take(2, start));
        assert!(!buckets.take(3, start), "no room, and nobody is quiet");
        assert!(buckets.take(1, start), "who is known goes on");
        assert!(buckets.take(3, start + Duration::from_secs(1)));
        assert!(buckets.buckets.len() <= 2);
    }
}

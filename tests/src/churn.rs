//! What a daemon holds before pods came and went, and after; and how long they waited for it. For the tests of churn, in
//! namespaces and in the cluster.

use std::time::Duration;

/// What a node's daemon holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    pub captured: u64,
    pub tasks: u64,
    pub descriptors: u64,
    pub pins: usize,
}

/// A connection to the CA, to the API server or to another node has a descriptor or two and a task, and comes and goes by
/// itself. A pod's would be there once for each of the many pods.
const PASSING: u64 = 2;

impl Held {
    /// Whether nothing of the pods that came since `before` is left. Less than before is well, too: what pods before that had
    /// may have drained meanwhile.
    pub fn is_back(&self, before: &Self) -> bool {
        self.captured == before.captured
            && self.pins <= before.pins
            && self.tasks <= before.tasks + PASSING
            && self.descriptors <= before.descriptors + PASSING
    }
}

/// How long pods are to come and go: `WARREN_CHURN_SECONDS`. Who sets it wants the speed asserted, too.
pub fn asked_time() -> Option<Duration> {
    let seconds = std::env::var("WARREN_CHURN_SECONDS").ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds))
}

/// The latency that `share` of the pods did not exceed. Sorts them; zero if there is none.
pub fn quantile(latencies: &mut [Duration], share: f64) -> Duration {
    latencies.sort_unstable();
    let last = latencies.len().saturating_sub(1);
    latencies
        .get((last as f64 * share) as usize)
        .copied()
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BEFORE: Held = Held {
        captured: 1,
        tasks: 13,
        descriptors: 50,
        pins: 2,
    };

    #[test]
    fn less_is_back_and_what_pods_left_is_not() {
        let less = Held {
            tasks: 9,
            descriptors: 48,
            pins: 1,
            ..BEFORE
        };
        assert!(BEFORE.is_back(&BEFORE) && less.is_back(&BEFORE));
        for more in [
            Held { captured: 2, ..BEFORE },
            Held { captured: 0, ..BEFORE },
            Held { pins: 3, ..BEFORE },
            Held { tasks: 23, ..BEFORE },
            Held {
                descriptors: 60,
                ..BEFORE
            },
        ] {
            assert!(!more.is_back(&BEFORE), "{more:?}");
        }
    }

    #[test]
    fn quantiles_are_of_the_sorted() {
        let mut latencies: Vec<Duration> = (1..=100).rev().map(Duration::from_millis).collect();
        assert_eq!(quantile(&mut latencies, 0.5), Duration::from_millis(50));
        assert_eq!(quantile(&mut latencies, 1.0), Duration::from_millis(100));
        assert_eq!(quantile(&mut [], 0.5), Duration::ZERO);
    }
}

//! Latencies counted in buckets of at most 1.6 % width. No allocation while counting.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Each power of two is divided into this many buckets.
const SUB_BITS: u32 = 6;
const SUB: u64 = 1 << SUB_BITS;

/// Counts of durations, from nanoseconds to centuries.
#[derive(Debug, Clone)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

/// What a histogram says, in microseconds.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Percentiles {
    pub p50_us: f64,
    pub p99_us: f64,
    pub p999_us: f64,
    pub max_us: f64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            counts: vec![0; index(u64::MAX) + 1],
            total: 0,
        }
    }
}

impl Histogram {
    pub fn record(&mut self, duration: Duration) {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.counts[index(nanos)] += 1;
        self.total += 1;
    }

    pub fn total(&self) -> u64 {
        self.total
    }

    /// The smallest bucket's upper end, in nanoseconds, that `share` (0 to 1) of the durations do not exceed; 0 if there are none.
    pub fn at(&self, share: f64) -> u64 {
        let wanted = ((self.total as f64 * share).ceil() as u64).clamp(1, self.total.max(1));
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= wanted {
                return upper_end(bucket);
            }
        }
        0
    }

    pub fn percentiles(&self) -> Percentiles {
        let micros = |share| (self.at(share) as f64 / 10.0).round() / 100.0;
        Percentiles {
            p50_us: micros(0.5),
            p99_us: micros(0.99),
            p999_us: micros(0.999),
            max_us: micros(1.0),
        }
    }
}

/// Below `2 * SUB` a bucket per value; above, the leading bit and the `SUB_BITS` after it.
fn index(value: u64) -> usize {
    let magnitude = value.max(SUB).ilog2() - SUB_BITS;
    (u64::from(magnitude) * SUB + (value >> magnitude)) as usize
}

fn upper_end(index: usize) -> u64 {
    let index = index as u64;
    if index < 2 * SUB {
        return index;
    }
    let magnitude = index / SUB - 1;
    let lower = (index - magnitude * SUB) << magnitude;
    lower + ((1 << magnitude) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lies_in_its_bucket_and_at_most_1_6_percent_below_the_upper_end() {
        let mut value = 1u64;
        while value < u64::MAX / 3 {
            for probe in [value - 1, value, value + value / 3] {
                let end = upper_end(index(probe));
                assert!(end >= probe && end - probe <= probe / 63 + 1, "{probe} {end}");
                assert!(index(probe) == 0 || upper_end(index(probe) - 1) < probe, "{probe}");
            }
            value *= 2;
        }
    }

    #[test]
    fn percentiles_of_a_thousand_known_values() {
        let mut histogram = Histogram::default();
        for micros in 1..=1000 {
            histogram.record(Duration::from_micros(micros));
        }
        let close = |share, micros: f64| (histogram.at(share) as f64 / 1000.0 / micros - 1.0).abs() < 0.016;
        assert!(close(0.5, 500.0) && close(0.99, 990.0) && close(0.999, 999.0) && close(1.0, 1000.0));
        assert_eq!(Histogram::default().at(0.5), 0);
    }
}

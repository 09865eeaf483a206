//! When a certificate is fetched, renewed and tried again. Pure: time and chance are arguments. Not here: the fetching
//! (`issuer`) and the waiting (`store`).

use std::time::{Duration, SystemTime};

/// The first wait after a failure; each further failure doubles it.
const FIRST_RETRY: Duration = Duration::from_millis(250);
/// The longest wait between tries: also how late the daemon may notice that the CA is back.
const LONGEST_RETRY: Duration = Duration::from_secs(30);
/// Renewals of certificates that were issued together are spread over this part of their lifetime.
const SPREAD: f64 = 0.1;

/// The life of one identity's certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rotation {
    due: SystemTime,
    failures: u32,
    not_after: Option<SystemTime>,
}

impl Rotation {
    /// Nothing there yet: due at once.
    pub fn new(now: SystemTime) -> Self {
        Self {
            due: now,
            failures: 0,
            not_after: None,
        }
    }

    /// A certificate arrived. Renewal comes at half of what is left of its life, up to a tenth of it earlier by
    /// `chance` (0 to 1), so that a CA outage shorter than the other half goes unnoticed. The beginning of validity is
    /// not looked at: CAs backdate it.
    pub fn issued(&mut self, now: SystemTime, not_after: SystemTime, chance: f64) {
        let left = not_after.duration_since(now).unwrap_or_default();
        let wait = left.mul_f64(0.5 - SPREAD * chance.clamp(0.0, 1.0));
        *self = Self {
            due: now + wait,
            failures: 0,
            not_after: Some(not_after),
        };
    }

    /// A try failed. The next comes after 250 ms, doubled per failure up to 30 s, of which `chance` (0 to 1) takes off
    /// up to half.
    pub fn failed(&mut self, now: SystemTime, chance: f64) {
        let doubled = FIRST_RETRY.saturating_mul(1_u32.checked_shl(self.failures).unwrap_or(u32::MAX));
        self.failures = self.failures.saturating_add(1);
        self.due = now + doubled.min(LONGEST_RETRY).mul_f64(1.0 - 0.5 * chance.clamp(0.0, 1.0));
    }

    /// Something changed that makes another try worth while now (the trust bundle).
    pub fn hasten(&mut self, now: SystemTime) {
        self.due = self.due.min(now);
    }

    /// When to try (again).
    pub fn due(&self) -> SystemTime {
        self.due
    }

    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// There is a certificate and it has not expired.
    pub fn usable(&self, now: SystemTime) -> bool {
        self.not_after.is_some_and(|not_after| now <= not_after)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: SystemTime = SystemTime::UNIX_EPOCH;
    const DAY: Duration = Duration::from_secs(86_400);

    #[test]
    fn a_certificate_is_renewed_at_half_of_its_life() {
        let mut rotation = Rotation::new(NOW);
        assert_eq!(rotation.due(), NOW);
        rotation.issued(NOW, NOW + DAY, 0.0);
        assert_eq!(rotation.due(), NOW + DAY / 2);
        rotation.issued(NOW, NOW + DAY, 1.0);
        assert_eq!(rotation.due(), NOW + DAY.mul_f64(0.4));
    }

    #[test]
    fn a_certificate_is_kept_while_it_is_valid_and_the_ca_is_away() {
        let mut rotation = Rotation::new(NOW);
        rotation.issued(NOW, NOW + DAY, 0.0);
        for _ in 0..100 {
            rotation.failed(NOW + DAY / 2, 0.0);
        }
        assert!(rotation.usable(NOW + DAY));
        assert!(!rotation.usable(NOW + DAY + Duration::from_secs(1)));
        assert_eq!(rotation.due(), NOW + DAY / 2 + LONGEST_RETRY);
    }

    #[test]
    fn retries_are_spaced_ever_wider_and_success_forgets_them() {
        let mut rotation = Rotation::new(NOW);
        let mut waits = Vec::new();
        for _ in 0..9 {
            rotation.failed(NOW, 0.0);
            waits.push(rotation.due().duration_since(NOW).unwrap().as_millis());
        }
        assert_eq!(waits, [250, 500, 1000, 2000, 4000, 8000, 16000, 30000, 30000]);
        rotation.failed(NOW, 1.0);
        assert_eq!(rotation.due(), NOW + LONGEST_RETRY / 2);
        rotation.issued(NOW, NOW + DAY, 0.0);
        rotation.failed(NOW, 0.0);
        assert_eq!(rotation.due(), NOW + FIRST_RETRY);
    }

    #[test]
    fn a_certificate_that_arrives_expired_is_due_at_once_and_never_used() {
        let mut rotation = Rotation::new(NOW);
        rotation.issued(NOW + DAY, NOW, 0.5);
        assert_eq!(rotation.due(), NOW + DAY);
        assert!(!rotation.usable(NOW + DAY));
    }
}

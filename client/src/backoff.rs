//! How long to wait before the next try. Pure but for the random generator that it is given.

use std::time::Duration;

use rand::Rng;

/// Reconnecting and repeating calls: from half a second to a minute.
pub const NETWORK: Limits = Limits { first: Duration::from_millis(500), longest: Duration::from_secs(60) };
/// Doing work again that failed for a reason that a person may have to remove.
pub const WORK: Limits = Limits { first: Duration::from_secs(2), longest: Duration::from_secs(120) };
/// Where only a person can help, and asking more often would only fill logs on both sides.
pub const REFUSED: Duration = Duration::from_secs(60);

/// Shortest and longest wait, before jitter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// After the first failure.
    pub first: Duration,
    /// However many there were.
    pub longest: Duration,
}

/// Doubles from failure to failure.
#[derive(Debug, Clone)]
pub struct Backoff {
    limits: Limits,
    failures: u32,
}

impl Backoff {
    /// No failure yet.
    pub fn new(limits: Limits) -> Self {
        Self { limits, failures: 0 }
    }

    /// The wait after one more failure: between half and all of the doubled time, so that sites which
    /// lost their aggregator together do not come back together.
    pub fn next(&mut self, generator: &mut impl Rng) -> Duration {
        // 2^20 times half a second is far above any longest wait.
        let doubled = self.limits.first.saturating_mul(1 << self.failures.min(20));
        self.failures = self.failures.saturating_add(1);
        doubled.min(self.limits.longest).mul_f64(generator.random_range(0.5..=1.0))
    }

    /// A success: the next failure is a first one again.
    pub fn reset(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn waits_double_up_to_the_longest_and_begin_anew_after_a_success() {
        let mut generator = ChaCha8Rng::seed_from_u64(1);
        let mut backoff = Backoff::new(NETWORK);
        for failure in 0..40 {
            let doubled = NETWORK.first.as_secs_f64() * 2f64.powi(failure);
            let most = doubled.min(NETWORK.longest.as_secs_f64());
            let wait = backoff.next(&mut generator).as_secs_f64();
            assert!((most / 2.0 - 1e-6..=most + 1e-6).contains(&wait), "failure {failure}: {wait} s");
        }
        backoff.reset();
        assert!(backoff.next(&mut generator) <= NETWORK.first);
    }

    #[test]
    fn two_sites_wait_differently() {
        let waits: Vec<Duration> =
            [1, 2].map(|seed| Backoff::new(NETWORK).next(&mut ChaCha8Rng::seed_from_u64(seed))).to_vec();
        assert_ne!(waits[0], waits[1]);
    }
}

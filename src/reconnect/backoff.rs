//! How long to wait before the next attempt.

use std::time::Duration;

use crate::random;

/// Exponential backoff with full jitter: before attempt `n + 1` a client waits for a random time between zero and
/// `base × 2ⁿ`, at most `max`. So clients that lose their server together do not come back together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backoff {
    /// The longest wait after the first failure. Default 100 ms: a process that is started again is back soon.
    pub base: Duration,
    /// The longest wait of all. Default 10 s: a server that is back is found again within it, and one that is not is
    /// asked 12 times a minute on average by a client that wants it.
    pub max: Duration,
    /// A session that lasted so long shows that all was well: the next attempt is a first one. One that ended sooner
    /// counts as a failed attempt. Default 10 s.
    pub reset_after: Duration,
}

impl Default for Backoff {
    fn default() -> Self {
        Backoff { base: Duration::from_millis(100), max: Duration::from_secs(10), reset_after: Duration::from_secs(10) }
    }
}

impl Backoff {
    /// The longest wait after so many failures in a row.
    pub fn ceiling(&self, failures: u32) -> Duration {
        let doublings = failures.saturating_sub(1).min(31);
        self.base.saturating_mul(1 << doublings).min(self.max)
    }

    /// A wait after so many failures in a row.
    pub(crate) fn delay(&self, failures: u32) -> Duration {
        // 53 bits: all that a float holds, evenly between zero and one.
        let part = (random::number() >> 11) as f64 / (1u64 << 53) as f64;
        self.ceiling(failures).mul_f64(part)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ceilings_double_up_to_the_longest_wait() {
        let backoff = Backoff { base: Duration::from_millis(10), max: Duration::from_millis(70), ..Backoff::default() };
        let ceilings: Vec<_> = (0..6).map(|failures| backoff.ceiling(failures).as_millis()).collect();
        assert_eq!(ceilings, [10, 10, 20, 40, 70, 70]);
        assert_eq!(backoff.ceiling(u32::MAX), backoff.max);
        let endless = Backoff { base: Duration::MAX, max: Duration::MAX, ..backoff };
        assert_eq!(endless.ceiling(40), Duration::MAX);
    }

    #[test]
    fn waits_are_anywhere_below_the_ceiling() {
        let backoff = Backoff::default();
        let waits: Vec<_> = (0..400).map(|_| backoff.delay(4)).collect();
        let ceiling = backoff.ceiling(4);
        assert!(waits.iter().all(|wait| *wait < ceiling));
        for quarter in 0..4 {
            let within = |wait: &&Duration| (ceiling * quarter / 4..ceiling * (quarter + 1) / 4).contains(*wait);
            let count = waits.iter().filter(within).count();
            assert!((50..150).contains(&count), "{count} of 400 waits are in quarter {quarter}");
        }
    }
}

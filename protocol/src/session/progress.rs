//! Whether a peer takes what is written to it. The session machine hands frames over and never learns what becomes of
//! them, so whoever writes keeps this watch and tells the machine with
//! [`Machine::handle_write_stalled`](super::Machine::handle_write_stalled). It needs no lock.

use core::time::Duration;

use super::Config;
use crate::time::Time;

/// Watches one conduit's writer. `[session.write.progress]`
///
/// While bytes wait to be written, the conduit must take the least amount within each timeout, or all that waits. A peer
/// that reads a byte now and then, so that it never looks quite dead, is as stuck as one that reads nothing.
#[derive(Debug)]
pub struct WriteWatch {
    timeout: Duration,
    /// Bytes that must be taken within the timeout.
    least: u64,
    /// Since when bytes wait without this progress, and how many had been written then.
    since: Option<(Time, u64)>,
}

impl WriteWatch {
    /// A watch by [`Config::write_timeout`] and [`Config::min_write_rate`].
    pub fn new(config: &Config) -> Self {
        let millis = u64::try_from(config.write_timeout.as_millis()).unwrap_or(u64::MAX);
        let least = u64::from(config.min_write_rate).saturating_mul(millis).checked_div(1_000).unwrap_or_default();
        WriteWatch { timeout: config.write_timeout, least: least.max(1), since: None }
    }

    /// All was written.
    #[inline]
    pub const fn clear(&mut self) {
        self.since = None;
    }

    /// Bytes wait, and `written` of them and those before were written so far.
    pub fn observe(&mut self, now: Time, written: u64) {
        match self.since {
            Some((_, before)) if written.saturating_sub(before) < self.least => {}
            _ => self.since = Some((now, written)),
        }
    }

    /// When the writer counts as stalled, if nothing changes.
    pub fn deadline(&self) -> Option<Time> {
        self.since.map(|(since, _)| since.after(self.timeout))
    }

    /// Whether the deadline has passed.
    pub fn is_stalled(&self, now: Time) -> bool {
        self.deadline().is_some_and(|deadline| deadline <= now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch(min_write_rate: u32) -> WriteWatch {
        WriteWatch::new(&Config { write_timeout: Duration::from_secs(10), min_write_rate, ..Config::default() })
    }

    fn at(seconds: u64) -> Time {
        Time::ZERO.after(Duration::from_secs(seconds))
    }

    #[test]
    fn a_writer_is_stalled_exactly_when_the_timeout_has_passed_without_progress() {
        let mut watch = watch(0);
        assert_eq!(watch.deadline(), None);
        watch.observe(at(3), 500);
        watch.observe(at(12), 500);
        assert_eq!(watch.deadline(), Some(at(13)));
        assert!(!watch.is_stalled(at(12)) && watch.is_stalled(at(13)));
        watch.observe(at(12), 501);
        assert_eq!(watch.deadline(), Some(at(22)), "without a rate one byte is progress");
        watch.clear();
        assert!(!watch.is_stalled(at(1_000)), "nothing waits");
    }

    #[test]
    fn a_byte_a_second_is_no_progress_and_the_rate_is() {
        let mut slow = watch(100);
        (0..10).for_each(|second| slow.observe(at(second), second));
        assert!(slow.is_stalled(at(10)), "9 bytes of 1,000");
        let mut steady = watch(100);
        (0..100).for_each(|second| steady.observe(at(second), 100 * second));
        assert_eq!(steady.deadline(), Some(at(100)), "the last 1,000 bytes were there at 90 s");
    }
}

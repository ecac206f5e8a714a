//! How much of the machine signature checks may take.
//!
//! A check costs some 50 µs of one core, and whoever opens a channel can ask for as many as it sends messages. Two bounds
//! hold: at most [`AT_ONCE`] checks run in this process at any time, so that sessions keep a core; and each channel, and
//! each session that opens channels, has a [`Pace`]. A turn that is not due is waited for and never refused: vouchers are
//! cumulative, those that come in meanwhile coalesce to the highest, and an honest payer loses nothing but a moment.
//! The wait holds up the task of that one channel, or that one open.

use std::num::NonZeroU32;
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::Instant;

/// Checks that run at once in this process: half of the cores, one at least.
static AT_ONCE: LazyLock<Semaphore> = LazyLock::new(|| {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    Semaphore::new((cores / 2).max(1))
});

/// Credentials that are checked for one session in a second. Each opens a connection with a deposit of its own, which
/// nobody needs so often.
pub(crate) const CREDENTIAL_RATE: NonZeroU32 = NonZeroU32::new(200).expect("not zero");

/// A steady rate with a burst: each turn moves the due time on by one interval, and may lie a burst ahead of the clock
/// (the generic cell rate algorithm of ITU-T I.371).
#[derive(Debug)]
struct Pace {
    interval: Duration,
    burst: Duration,
    due: Option<Instant>,
}

impl Pace {
    fn new(per_second: NonZeroU32, burst: u32) -> Self {
        let interval = Duration::from_secs(1) / per_second.get();
        Pace { interval, burst: interval * burst, due: None }
    }

    /// Takes the next turn, and says when it is due.
    fn take(&mut self, now: Instant) -> Instant {
        let due = self.due.map_or(now, |due| due.max(now));
        self.due = Some(due + self.interval);
        due.checked_sub(self.burst).map_or(now, |due| due.max(now))
    }
}

/// Paces the checks of one channel or of one session.
#[derive(Debug)]
pub(crate) struct CheckGate {
    pace: Mutex<Pace>,
}

impl CheckGate {
    /// At most `per_second` checks a second, after a burst of a tenth of it.
    pub(crate) fn new(per_second: NonZeroU32) -> Self {
        CheckGate { pace: Mutex::new(Pace::new(per_second, per_second.get() / 10)) }
    }

    /// Waits for a turn and for a place. Synchronous checks run while the permit is held; it is not kept over an await.
    ///
    /// # Cancel safety
    /// A dropped future has used its turn up.
    pub(super) async fn enter(&self) -> CheckPermit {
        let due = self.pace.lock().take(Instant::now());
        // Most turns are due at once, and a timer is dearer than a look at the clock.
        if due > Instant::now() {
            tokio::time::sleep_until(due).await;
        }
        // The semaphore is static and never closed.
        CheckPermit { _place: AT_ONCE.acquire().await.ok() }
    }
}

/// Room for signature checks, until it is dropped.
#[must_use]
pub(super) struct CheckPermit {
    _place: Option<SemaphorePermit<'static>>,
}

/// Counts the checks of a payee.
#[derive(Debug, Default)]
pub(super) struct CheckCount(AtomicU64);

impl CheckCount {
    pub(super) fn add(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rate(per_second: u32) -> NonZeroU32 {
        NonZeroU32::new(per_second).expect("not zero")
    }

    #[test]
    fn a_burst_passes_at_once_and_the_rest_at_the_rate() {
        let mut pace = Pace::new(rate(100), 3);
        let start = Instant::now();
        let waits: Vec<_> = (0..6).map(|_| pace.take(start).duration_since(start).as_millis()).collect();
        assert_eq!(waits, [0, 0, 0, 0, 10, 20]);
    }

    #[test]
    fn time_without_turns_brings_back_the_burst_and_no_more() {
        let mut pace = Pace::new(rate(100), 2);
        let start = Instant::now();
        for _ in 0..10 {
            pace.take(start);
        }
        let later = start + Duration::from_secs(3600);
        let waits: Vec<_> = (0..4).map(|_| pace.take(later).duration_since(later).as_millis()).collect();
        assert_eq!(waits, [0, 0, 0, 10]);
    }

    #[test]
    fn the_slowest_rate_and_the_fastest_are_sound() {
        for per_second in [1, u32::MAX] {
            let mut pace = Pace::new(rate(per_second), per_second / 10);
            let start = Instant::now();
            assert_eq!(pace.take(start), start);
            assert!(pace.take(start) >= start);
        }
    }
}

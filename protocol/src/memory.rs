//! Memory that peers may make this side hold: the budget of a session, and the pool that all sessions of a process share.
//!
//! What counts is what a peer may fill without asking again: the window of each stream that it sends, from the stream's
//! announcement until the last of its items was read, an item that passes the window, and each body from its arrival until
//! the application has taken it. An idle connection counts nothing. So the sum of all grants never exceeds the session's
//! budget, nor the sums of all sessions the pool.
//!
//! When there is no room nobody is punished, and nothing else of the session notices: a stream is stopped and a call
//! answered with AT_CAPACITY, and windows do not grow. `[session.memory.bound]`

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes in which a session borrows from its pool, so that small calls touch the shared counter rarely; and little enough
/// for ten thousand quiet sessions to keep one each.
const LOAN: u64 = 8 * 1024;

/// Memory that the sessions of a process may grant together.
#[derive(Debug)]
pub struct MemoryPool {
    limit: u64,
    lent: AtomicU64,
}

impl MemoryPool {
    /// A pool of `limit` bytes.
    pub const fn new(limit: u64) -> Self {
        MemoryPool { limit, lent: AtomicU64::new(0) }
    }

    /// Bytes that may be lent.
    pub const fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes that are lent: what sessions have granted, rounded up by at most 32 KiB for each.
    pub fn lent(&self) -> u64 {
        self.lent.load(Ordering::Relaxed)
    }

    /// Takes `bytes`, or nothing if there are fewer.
    fn try_take(&self, bytes: u64) -> bool {
        // The number guards no other memory, so no ordering is needed.
        let take = |lent: u64| lent.checked_add(bytes).filter(|&lent| lent <= self.limit);
        self.lent.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    fn give_back(&self, bytes: u64) {
        self.lent.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// What a session may make of memory; this side's own business, not told to the peer.
#[derive(Debug, Clone)]
pub struct MemoryLimits {
    /// Bytes that the peer of one session may make this side hold. Default 256 MiB: a thousand streams of 256 KiB.
    pub session: u64,
    /// What all sessions share. `None` is no bound but each session's own.
    pub pool: Option<Arc<MemoryPool>>,
    /// Bytes up to which the window of a stream grows while it is what holds the sender up. Default 4 MiB: 1 Gbit/s over
    /// 32 ms.
    pub max_stream_window: u32,
    /// The same for the window of a connection's bodies.
    pub max_body_window: u32,
}

impl Default for MemoryLimits {
    fn default() -> Self {
        MemoryLimits { session: 256 << 20, pool: None, max_stream_window: 4 << 20, max_body_window: 4 << 20 }
    }
}

/// What a session has granted, and what it has borrowed for it.
#[derive(Debug)]
pub(crate) struct Ledger {
    /// Granted and held bytes. Never above `borrowed`.
    charged: u64,
    /// Bytes that may be charged without another look at the pool.
    borrowed: u64,
    session: u64,
    pool: Option<Arc<MemoryPool>>,
}

impl Ledger {
    pub(crate) fn new(limits: &MemoryLimits) -> Self {
        Ledger { charged: 0, borrowed: 0, session: limits.session, pool: limits.pool.clone() }
    }

    pub(crate) const fn charged(&self) -> u64 {
        self.charged
    }

    /// Charges `bytes`, or nothing if there is no room.
    #[inline]
    pub(crate) fn try_charge(&mut self, bytes: u64) -> bool {
        let charged = self.charged.saturating_add(bytes);
        if charged > self.borrowed && !self.borrow_up_to(charged) {
            return false;
        }
        self.charged = charged;
        true
    }

    #[cold]
    fn borrow_up_to(&mut self, charged: u64) -> bool {
        if charged > self.session {
            return false;
        }
        // Ahead of need where there is room; else no more than is needed.
        let needed = charged.saturating_sub(self.borrowed);
        let ahead = needed.saturating_add(LOAN).min(self.session.saturating_sub(self.borrowed));
        let takes = |bytes| self.pool.as_ref().is_none_or(|pool| pool.try_take(bytes));
        let Some(taken) = [ahead, needed].into_iter().find(|&bytes| takes(bytes)) else { return false };
        self.borrowed = self.borrowed.saturating_add(taken);
        true
    }

    #[inline]
    pub(crate) fn release(&mut self, bytes: u64) {
        self.charged = self.charged.saturating_sub(bytes);
        let idle = self.borrowed.saturating_sub(self.charged);
        if idle > LOAN.saturating_mul(4) {
            self.give_back(idle.saturating_sub(LOAN));
        }
    }

    #[cold]
    fn give_back(&mut self, bytes: u64) {
        self.borrowed = self.borrowed.saturating_sub(bytes);
        if let Some(pool) = &self.pool {
            pool.give_back(bytes);
        }
    }

    /// The session has ended: what is still held is the application's own.
    pub(crate) fn close(&mut self) {
        self.give_back(self.borrowed);
        (self.charged, self.session) = (0, 0);
    }
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_session_charges_up_to_its_budget_and_not_a_byte_more() {
        let mut ledger = Ledger::new(&MemoryLimits { session: 1_000, ..Default::default() });
        assert!(ledger.try_charge(999) && !ledger.try_charge(2) && ledger.try_charge(1));
        assert!(!ledger.try_charge(u64::MAX), "no overflow");
        ledger.release(500);
        assert!(ledger.try_charge(500) && !ledger.try_charge(1));
        assert_eq!(ledger.charged(), 1_000);
    }

    #[test]
    fn sessions_share_the_pool_and_give_all_of_it_back() {
        let pool = Arc::new(MemoryPool::new(3 * LOAN));
        let limits = MemoryLimits { session: u64::MAX, pool: Some(pool.clone()), ..Default::default() };
        let (mut one, mut two) = (Ledger::new(&limits), Ledger::new(&limits));
        assert!(one.try_charge(2 * LOAN), "ahead too");
        assert_eq!(pool.lent(), 3 * LOAN);
        assert!(!two.try_charge(1), "nothing is left");
        assert!(one.try_charge(LOAN) && !one.try_charge(1));
        one.release(3 * LOAN);
        assert!(pool.lent() <= 3 * LOAN && two.try_charge(0));
        drop(one);
        assert!(two.try_charge(3 * LOAN) && !two.try_charge(1), "exactly what there is");
        two.close();
        assert!(!two.try_charge(1), "an ended session takes nothing any more");
        drop(two);
        assert_eq!(pool.lent(), 0);
    }

    #[test]
    fn an_idle_session_gives_its_loan_back() {
        let pool = Arc::new(MemoryPool::new(u64::MAX));
        let mut ledger = Ledger::new(&MemoryLimits { pool: Some(pool.clone()), ..Default::default() });
        assert!(ledger.try_charge(100 << 20));
        ledger.release(100 << 20);
        assert!(pool.lent() <= LOAN, "{}", pool.lent());
    }
}

//! Memory that peers may make this side hold: the budget of a session, and the pool that all sessions of a process share.
//!
//! What counts is what a peer may fill without asking again: the window of each stream that it sends, from the stream's
//! announcement until the last of its items was read, an item that passes the window, each body from its arrival until
//! the application has taken it, and each answer until it is written. An idle connection counts nothing. So the sum of all grants never exceeds the session's
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
    /// Where it takes from what it lends.
    within: Option<Arc<MemoryPool>>,
}

impl MemoryPool {
    /// A pool of `limit` bytes.
    pub const fn new(limit: u64) -> Self {
        MemoryPool { limit, lent: AtomicU64::new(0), within: None }
    }

    /// A pool of `limit` bytes that takes from another one what it lends.
    pub const fn within(limit: u64, pool: Arc<MemoryPool>) -> Self {
        MemoryPool { limit, lent: AtomicU64::new(0), within: Some(pool) }
    }

    /// Bytes that may be lent.
    pub const fn limit(&self) -> u64 {
        self.limit
    }

    /// Bytes that are lent: what sessions have granted, rounded up by at most 32 KiB for each.
    pub fn lent(&self) -> u64 {
        self.lent.load(Ordering::Relaxed)
    }

    /// Whether more than a `share`-th of it is lent, or of what it takes from.
    pub(crate) fn is_used_above(&self, share: u64) -> bool {
        let limit = self.limit.checked_div(share).unwrap_or_default();
        self.lent() > limit || self.within.as_ref().is_some_and(|pool| pool.is_used_above(share))
    }

    /// Takes `bytes`, or nothing if there are fewer.
    fn try_take(&self, bytes: u64) -> bool {
        // The number guards no other memory, so no ordering is needed.
        let take = |lent: u64| lent.checked_add(bytes).filter(|&lent| lent <= self.limit);
        if self.lent.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_err() {
            return false;
        }
        let taken = self.within.as_ref().is_none_or(|pool| pool.try_take(bytes));
        if !taken {
            self.lent.fetch_sub(bytes, Ordering::Relaxed);
        }
        taken
    }

    fn give_back(&self, bytes: u64) {
        self.lent.fetch_sub(bytes, Ordering::Relaxed);
        if let Some(pool) = &self.within {
            pool.give_back(bytes);
        }
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
    /// The most that was borrowed at one time.
    most: u64,
    session: u64,
    /// Bytes that are borrowed ahead of need.
    loan: u64,
    pool: Option<Arc<MemoryPool>>,
}

impl Ledger {
    pub(crate) fn new(limits: &MemoryLimits) -> Self {
        Ledger { charged: 0, borrowed: 0, most: 0, session: limits.session, loan: LOAN, pool: limits.pool.clone() }
    }

    /// One that is bounded by its pool alone, if it has one.
    pub(crate) const fn of_pool(pool: Option<Arc<MemoryPool>>) -> Self {
        Ledger { charged: 0, borrowed: 0, most: 0, session: u64::MAX, loan: LOAN, pool }
    }

    /// The same, which borrows nothing ahead: for charges that stay, of which there are too many for a loan each.
    pub(crate) const fn exactly_of_pool(pool: Option<Arc<MemoryPool>>) -> Self {
        Ledger { charged: 0, borrowed: 0, most: 0, session: u64::MAX, loan: 0, pool }
    }

    /// Whether so much of the pool is lent; see [`MemoryPool::is_used_above`].
    pub(crate) fn is_pool_used_above(&self, share: u64) -> bool {
        self.pool.as_ref().is_some_and(|pool| pool.is_used_above(share))
    }

    /// Nothing is charged for now: gives back what is borrowed ahead of need.
    pub(crate) fn rest(&mut self) {
        if self.charged == 0 && self.borrowed > 0 {
            self.give_back(self.borrowed);
        }
    }

    pub(crate) const fn charged(&self) -> u64 {
        self.charged
    }

    /// What was charged at most, rounded up to what is borrowed ahead.
    pub(crate) const fn most_charged(&self) -> u64 {
        self.most
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
        let ahead = needed.saturating_add(self.loan).min(self.session.saturating_sub(self.borrowed));
        let takes = |bytes| self.pool.as_ref().is_none_or(|pool| pool.try_take(bytes));
        let Some(taken) = [ahead, needed].into_iter().find(|&bytes| takes(bytes)) else { return false };
        self.borrowed = self.borrowed.saturating_add(taken);
        self.most = self.most.max(self.borrowed);
        true
    }

    #[inline]
    pub(crate) fn release(&mut self, bytes: u64) {
        self.charged = self.charged.saturating_sub(bytes);
        let idle = self.borrowed.saturating_sub(self.charged);
        if idle > self.loan.saturating_mul(4) {
            self.give_back(idle.saturating_sub(self.loan));
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

    #[test]
    fn a_pool_within_another_takes_from_both_or_from_none() {
        let outer = Arc::new(MemoryPool::new(100));
        let inner = MemoryPool::within(60, outer.clone());
        assert!(inner.try_take(50) && !inner.try_take(11), "its own limit");
        assert!(outer.try_take(45));
        assert!(!inner.try_take(6), "what is left of the other");
        assert_eq!((inner.lent(), outer.lent()), (50, 95));
        inner.give_back(50);
        assert_eq!((inner.lent(), outer.lent()), (0, 45));
    }

    #[test]
    fn a_ledger_at_rest_borrows_nothing() {
        let pool = Arc::new(MemoryPool::new(u64::MAX));
        let mut ledger = Ledger::of_pool(Some(pool.clone()));
        assert!(ledger.try_charge(10));
        ledger.rest();
        assert!(pool.lent() >= 10, "it is not at rest");
        ledger.release(10);
        ledger.rest();
        assert_eq!(pool.lent(), 0);
    }
}

//! The hot path's share of a channel: two numbers, held by the session under its own lock.

use super::super::Amount;
use super::LeaseCommit;

/// What the leased money still lacks for a unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{missing} base units short of what is leased")]
pub struct Short {
    /// Base units that are missing.
    pub missing: Amount,
}

/// Spends out of what is leased, without the channel and without a store: `leased ≥ spent` always.
///
/// The session charges it when a frame is taken for writing, and tells the channel later
/// ([`PaymentChannel::record_spent`](super::PaymentChannel::record_spent)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SpendGate {
    spent: Amount,
    leased: Amount,
}

impl SpendGate {
    pub(super) const fn new(spent: Amount, leased: Amount) -> Self {
        SpendGate { spent, leased }
    }

    /// Spends `cost`, or nothing.
    ///
    /// # Errors
    /// [`Short`] when less than `cost` is left of the lease; nothing is spent then.
    #[inline]
    pub fn try_spend(&mut self, cost: Amount) -> Result<(), Short> {
        let available = self.available();
        match self.spent.checked_add(cost) {
            Some(spent) if spent <= self.leased => {
                self.spent = spent;
                Ok(())
            }
            _ => Err(Short { missing: cost.saturating_sub(available) }),
        }
    }

    /// Raises the lease to the absolute `leased`; a lower number (an older answer) changes nothing.
    #[inline]
    pub fn raise(&mut self, leased: Amount) {
        self.leased = self.leased.max(leased);
    }

    /// Takes over a committed lease: the costs of committed reservations are spent in the same step, so that nothing
    /// else can spend what was leased for them.
    #[inline]
    pub fn apply(&mut self, commit: &LeaseCommit) {
        self.raise(commit.leased);
        self.spent = self.spent.saturating_add(commit.reserved_costs).min(self.leased);
    }

    /// Gives up to `amount` of the unused lease back and returns what is leased now. The caller makes that durable by
    /// [`PaymentChannel::propose_return`](super::PaymentChannel::propose_return); until then it is nobody's.
    #[inline]
    pub fn give_back(&mut self, amount: Amount) -> Amount {
        self.leased = self.leased.saturating_sub(amount.min(self.available()));
        self.leased
    }

    /// What is left of the lease, in base units.
    #[inline]
    pub const fn available(&self) -> Amount {
        self.leased.saturating_sub(self.spent)
    }

    /// The price of all that was handed to the transport, in base units.
    #[inline]
    pub const fn spent(&self) -> Amount {
        self.spent
    }

    /// Up to where spending is durable, in base units.
    #[inline]
    pub const fn leased(&self) -> Amount {
        self.leased
    }
}

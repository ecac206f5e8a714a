//! Leases and reservations: how accepted money becomes spendable.
//!
//! One lease is written at a time. It carries the costs of all reservations that were committed since the last one, so
//! that many calls share one write. What it takes counts as taken from the moment it is planned.

use super::super::Amount;
use super::record::Change;
use super::{
    ChannelClosed, LeaseError, MAX_RESERVATIONS, PaymentChannel, RecordUpdate, ReservationError, ReservationId,
    ReserveError,
};

/// A lease on its way to the store.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "a lease that is neither committed nor abandoned blocks every later one"]
pub struct LeasePlan {
    update: RecordUpdate,
    number: u64,
    costs: Amount,
    reservations: Vec<ReservationId>,
}

impl LeasePlan {
    /// What to write.
    pub const fn update(&self) -> &RecordUpdate {
        &self.update
    }
}

/// A lease that is durable.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "the session has to learn of it"]
pub struct LeaseCommit {
    /// Up to where spending is durable now, in base units (absolute).
    pub leased: Amount,
    /// Of that, what the committed reservations have spent, in base units.
    pub reserved_costs: Amount,
    /// The reservations whose costs are durable: their responses may leave.
    pub reservations: Vec<ReservationId>,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct LeaseInFlight {
    number: u64,
    /// What is leased once it is committed.
    to: Amount,
    /// What it takes beyond the lease and the reservations.
    extra: Amount,
}

impl PaymentChannel {
    /// What is neither leased nor reserved nor about to be leased, in base units.
    pub fn free(&self) -> Amount {
        let planned = self.lease_in_flight.map_or(Amount::ZERO, |lease| lease.extra);
        self.record.accepted.saturating_sub(self.record.leased).saturating_sub(self.reserved()).saturating_sub(planned)
    }

    /// Up to where the session may spend: a lease that is being given back is out of reach already.
    pub(super) fn spendable_up_to(&self) -> Amount {
        self.lease_in_flight.map_or(self.record.leased, |lease| lease.to.min(self.record.leased))
    }

    /// Plans the next lease, if less than `wanted` is left of the last one (the caller's low mark, or the unit that is
    /// short) or a committed reservation waits for its cost. It takes min(lease, what is free). `None` when there is
    /// nothing to lease, and while another lease is being written. So a crash costs the payer less than `wanted` plus
    /// one lease. `[pay.lease]`
    ///
    /// # Errors
    /// When the channel serves no more.
    pub fn propose_lease(&mut self, wanted: Amount) -> Result<Option<LeasePlan>, ChannelClosed> {
        ChannelClosed::of(&self.record.phase)?;
        if self.lease_in_flight.is_some() {
            return Ok(None);
        }
        let unused = self.record.leased.saturating_sub(self.record.spent);
        let extra = if unused < wanted { self.policy.lease.min(self.free()) } else { Amount::ZERO };
        if extra.is_zero() && !self.reservations.has_due() {
            return Ok(None);
        }
        let (reservations, costs) = self.reservations.plan();
        // Both are parts of what is accepted, so the sum is at most that.
        let to = self.record.leased.saturating_add(costs).saturating_add(extra);
        Ok(Some(self.plan_lease(to, extra, costs, reservations)))
    }

    /// Plans to give unused lease back, down to the absolute `leased` that the session has been lowered to.
    ///
    /// # Errors
    /// While another lease is being written, below what is spent, and above what is leased.
    pub fn propose_return(&mut self, leased: Amount) -> Result<LeasePlan, LeaseError> {
        if self.lease_in_flight.is_some() {
            return Err(LeaseError::Busy);
        }
        if leased < self.record.spent {
            return Err(LeaseError::BelowSpent { leased, spent: self.record.spent });
        }
        if leased > self.record.leased {
            return Err(LeaseError::AboveLeased { stated: leased, leased: self.record.leased });
        }
        Ok(self.plan_lease(leased, Amount::ZERO, Amount::ZERO, Vec::new()))
    }

    /// Plans the orderly end of spending: `leased = spent`. The session has stopped, and its last count is recorded.
    ///
    /// # Errors
    /// While another lease is being written.
    pub fn surrender_lease(&mut self) -> Result<LeasePlan, LeaseError> {
        self.propose_return(self.record.spent)
    }

    fn plan_lease(&mut self, to: Amount, extra: Amount, costs: Amount, reservations: Vec<ReservationId>) -> LeasePlan {
        let number = self.lease_plans;
        // 2^64 leases are not reached; wrapping would at worst confuse a plan with one that old.
        self.lease_plans = number.wrapping_add(1);
        self.lease_in_flight = Some(LeaseInFlight { number, to, extra });
        let update = self.update(Change::Lease { from: self.record.leased, to });
        LeasePlan { update, number, costs, reservations }
    }

    /// The lease is durable. The session's lease is raised to the result, and the costs of the
    /// reservations in it count as spent in the same step, so that nothing else spends what was leased for them.
    ///
    /// # Errors
    /// [`LeaseError::Stale`] when it is not the lease that is being written.
    pub fn commit_lease(&mut self, plan: LeasePlan) -> Result<LeaseCommit, LeaseError> {
        self.check_in_flight(&plan)?;
        self.adopt(&plan.update).map_err(|_| LeaseError::Stale)?;
        self.lease_in_flight = None;
        self.reservations.finish_planned(&plan.reservations);
        self.record.spent = self.record.spent.saturating_add(plan.costs).min(self.record.leased);
        let LeasePlan { costs, reservations, .. } = plan;
        Ok(LeaseCommit { leased: self.record.leased, reserved_costs: costs, reservations })
    }

    /// The lease was not written, for certain. (When that is not known, the channel is restored from the store.)
    ///
    /// # Errors
    /// [`LeaseError::Stale`] when it is not the lease that is being written.
    pub fn abandon_lease(&mut self, plan: LeasePlan) -> Result<(), LeaseError> {
        self.check_in_flight(&plan)?;
        self.lease_in_flight = None;
        self.reservations.unplan(&plan.reservations);
        Ok(())
    }

    fn check_in_flight(&self, plan: &LeasePlan) -> Result<(), LeaseError> {
        let same = plan.update.channel_id == self.record.channel_id
            && self.lease_in_flight.is_some_and(|lease| lease.number == plan.number);
        if same { Ok(()) } else { Err(LeaseError::Stale) }
    }

    /// Sets `maximum` aside until it is committed, released, or `expires_at_ms` has come on the caller's clock.
    ///
    /// # Errors
    /// When not enough is free (of what is accepted, or of what is not leased), and when too many are open.
    pub fn reserve(&mut self, maximum: Amount, expires_at_ms: u64) -> Result<ReservationId, ReserveError> {
        ChannelClosed::of(&self.record.phase)?;
        let uncommitted = self.record.accepted.saturating_sub(self.record.spent).saturating_sub(self.reserved());
        if maximum > uncommitted {
            return Err(ReserveError::Short { missing: maximum.saturating_sub(uncommitted) });
        }
        if maximum > self.free() {
            return Err(ReserveError::Leased { missing: maximum.saturating_sub(self.free()) });
        }
        self.reservations.hold(maximum, expires_at_ms).ok_or(ReserveError::TooMany { limit: MAX_RESERVATIONS })
    }

    /// The call has cost `cost`: that much waits for the next lease, the rest is free at once. The response may leave
    /// when the reservation is among [`LeaseCommit::reservations`].
    ///
    /// # Errors
    /// When the reservation is unknown, the cost is above it, or the channel serves no more.
    pub fn commit_reservation(&mut self, id: ReservationId, cost: Amount) -> Result<(), ReservationError> {
        ChannelClosed::of(&self.record.phase)?;
        self.reservations.make_due(id, cost)
    }

    /// The call has cost nothing. Returns what is free again.
    ///
    /// # Errors
    /// When the reservation is unknown, or committed already.
    pub fn release(&mut self, id: ReservationId) -> Result<Amount, ReservationError> {
        self.reservations.release(id)
    }

    /// Releases every reservation whose deadline has come, and names them.
    pub fn expire(&mut self, now_ms: u64) -> Vec<ReservationId> {
        self.reservations.expire(now_ms)
    }

    /// When [`PaymentChannel::expire`] has something to do next, in milliseconds of the caller's clock.
    pub fn next_expiry_ms(&self) -> Option<u64> {
        self.reservations.next_expiry_ms()
    }
}

//! The payee's payment-channel machine.
//!
//! [`PaymentChannel`] holds `deposit ≥ accepted ≥ leased + reserved`, `leased ≥ spent`, `accepted ≥ settled` and cannot be
//! put into another state: its fields are private, each method checks, a restored record is validated. `[pay.counters]`
//!
//! It does no I/O. What must be durable before it counts comes in two steps: `propose_*` yields a plan, the caller
//! writes the plan's [`RecordUpdate`] in the store's transaction, then `commit_*` makes it count. What is a fact anyway
//! (the escrow's word, an end of service) counts at once and yields an update to write before it is answered.
//!
//! The hot path holds none of this but the session's money credit, which spends what is leased. The caller tells the
//! machine what the session has spent ([`PaymentChannel::record_spent`]) before it asks for a lease, a need, a close or
//! a settlement, and raises the session's lease to [`LeaseCommit::leased`].

mod close;
mod error;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
pub(super) mod fixtures;
mod lease;
mod record;
mod reservation;
mod voucher;

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod model_tests;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod tests;

pub use close::CloseAnswer;
pub use error::{
    ChannelClosed, CloseRefusal, Disputed, LeaseError, OpenError, ReserveError, SettledAboveAccepted, SpendError,
    StaleEpoch, VoucherRefusal,
};
pub use lease::{LeaseCommit, LeasePlan};
pub use record::{BrokenRecord, ChannelPhase, ChannelSnapshot, RecordUpdate, StaleUpdate};
pub use reservation::{MAX_RESERVATIONS, ReservationError, ReservationId};
pub use voucher::{MAX_VOUCHERS_BETWEEN, StoredVouchers, VerifiedClose, VerifiedVoucher};

use super::{Amount, ChannelDescriptor, ChannelId, SignedAmount, Voucher};
use lease::LeaseInFlight;
use record::Change;
use reservation::Reservations;

/// The numbers of the terms that the machine enforces. They hold for a connection, so they are not in the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChannelPolicy {
    /// The least step from one voucher to the next, in base units; waived for the last step to the deposit.
    pub minimum_delta: Amount,
    /// What one lease makes durable ahead of use, in base units, at least 1.
    pub lease: Amount,
}

/// What a new channel is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChannelParams {
    /// The id that the payee has recomputed itself.
    pub channel_id: ChannelId,
    /// What the escrow holds, in base units.
    pub deposit: Amount,
    /// What the escrow has paid already, in base units: zero for a fresh channel.
    pub settled: Amount,
    /// The highest amount of the voucher protocol: [`Amount::MAX`] in v1, [`Amount::MAX_U96`] in v2.
    pub voucher_ceiling: Amount,
    /// The numbers of the terms.
    pub policy: ChannelPolicy,
}

impl ChannelParams {
    /// For the channel of a descriptor, with the escrow's word on it.
    pub fn new(descriptor: &ChannelDescriptor, deposit: Amount, settled: Amount, policy: ChannelPolicy) -> Self {
        ChannelParams {
            channel_id: descriptor.id(),
            deposit,
            settled,
            voucher_ceiling: descriptor.protocol.max_amount(),
            policy,
        }
    }
}

/// What the cheap checks say of a voucher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Precheck {
    /// Everything but the signature fits: verify it.
    Verify,
    /// It is the accepted voucher, byte for byte: acknowledge it once more, nothing else.
    Again,
}

/// A voucher on its way to the store. It counts when it is committed.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "the voucher counts only when it is committed"]
pub struct VoucherPlan {
    update: RecordUpdate,
}

impl VoucherPlan {
    /// What to write.
    pub const fn update(&self) -> &RecordUpdate {
        &self.update
    }
}

/// The payee's request for a higher voucher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NeedVoucher {
    /// The least cumulative amount that lets delivery go on, in base units.
    pub required: Amount,
    /// The accepted amount in base units.
    pub accepted: Amount,
    /// The price of what was handed to the transport, in base units.
    pub spent: Amount,
    /// What the payee believes the escrow holds, in base units.
    pub deposit: Amount,
}

/// One payment channel, seen from the payee.
#[derive(Debug, Clone)]
pub struct PaymentChannel {
    record: ChannelSnapshot,
    policy: ChannelPolicy,
    reservations: Reservations,
    lease_in_flight: Option<LeaseInFlight>,
    /// Numbers the lease plans, so that an old one is known.
    lease_plans: u64,
    announced: Option<NeedVoucher>,
}

impl PaymentChannel {
    /// A channel that no voucher was accepted for. The caller has made sure that the id was never used.
    ///
    /// # Errors
    /// When the lease is zero, or the escrow has paid what no voucher explains.
    pub fn open(params: ChannelParams) -> Result<Self, OpenError> {
        let record = ChannelSnapshot {
            channel_id: params.channel_id,
            voucher_ceiling: params.voucher_ceiling,
            epoch: 0,
            deposit: params.deposit,
            accepted: Amount::ZERO,
            leased: Amount::ZERO,
            spent: Amount::ZERO,
            units: 0,
            settled: params.settled,
            lost_in_flight: Amount::ZERO,
            vouchers: StoredVouchers::default(),
            phase: ChannelPhase::Open,
        };
        Self::restore(record, params.policy)
    }

    /// The channel as it was stored. What was leased counts as spent: after an orderly end that is the same number,
    /// after a crash nobody knows how much of the lease was used, and the payee may not deliver it twice unpaid.
    ///
    /// # Errors
    /// When the record breaks an invariant, or the lease is zero.
    pub fn restore(snapshot: ChannelSnapshot, policy: ChannelPolicy) -> Result<Self, OpenError> {
        snapshot.validate()?;
        if policy.lease.is_zero() {
            return Err(OpenError::NoLease);
        }
        let mut record = snapshot;
        record.spent = record.leased;
        record.vouchers.prune(record.spent);
        Ok(PaymentChannel {
            record,
            policy,
            reservations: Reservations::default(),
            lease_in_flight: None,
            lease_plans: 0,
            announced: None,
        })
    }

    /// All counters as they stand. Only what was committed is in it.
    pub fn snapshot(&self) -> ChannelSnapshot {
        self.record.clone()
    }

    /// The channel's id.
    pub const fn channel_id(&self) -> ChannelId {
        self.record.channel_id
    }

    /// The numbers of the terms.
    pub const fn policy(&self) -> ChannelPolicy {
        self.policy
    }

    /// What the escrow holds, in base units.
    pub const fn deposit(&self) -> Amount {
        self.record.deposit
    }

    /// The highest verified and durable voucher, in base units.
    pub const fn accepted(&self) -> Amount {
        self.record.accepted
    }

    /// Up to where spending is durable, in base units.
    pub const fn leased(&self) -> Amount {
        self.record.leased
    }

    /// What was spent as far as the session has reported, in base units.
    pub const fn spent(&self) -> Amount {
        self.record.spent
    }

    /// Metered bytes as far as the session has reported.
    pub const fn units(&self) -> u64 {
        self.record.units
    }

    /// What the escrow has paid, in base units.
    pub const fn settled(&self) -> Amount {
        self.record.settled
    }

    /// The sum of all reservations, in base units.
    pub const fn reserved(&self) -> Amount {
        self.reservations.total()
    }

    /// What never reached the payer, in base units, over all breaks.
    pub const fn lost_in_flight(&self) -> Amount {
        self.record.lost_in_flight
    }

    /// The owner's epoch, 0 before the first.
    pub const fn epoch(&self) -> u64 {
        self.record.epoch
    }

    /// How far the channel is from its end.
    pub const fn phase(&self) -> ChannelPhase {
        self.record.phase
    }

    /// By how much the escrow has paid more than was spent: the payer vanished and the stored vouchers had no closer
    /// fit. A state to be reported, not an error.
    pub fn settled_beyond_spent(&self) -> Option<Amount> {
        self.record.settled.checked_sub(self.record.spent).filter(|excess| !excess.is_zero())
    }

    /// The checks of a voucher that cost nothing, in their order; rate and signature are the caller's.
    ///
    /// # Errors
    /// The first check that fails.
    pub fn precheck_voucher(&self, voucher: &Voucher) -> Result<Precheck, VoucherRefusal> {
        let amount = voucher.amount;
        self.check_shape(voucher.channel_id, amount)?;
        let accepted = self.record.accepted;
        if amount <= accepted {
            let again = self.record.vouchers.highest().is_some_and(|highest| *highest == SignedAmount::from(*voucher));
            return if again { Ok(Precheck::Again) } else { Err(VoucherRefusal::NotAbove { amount, accepted }) };
        }
        self.check_step(amount).map(|()| Precheck::Verify)
    }

    fn check_shape(&self, channel_id: ChannelId, amount: Amount) -> Result<(), VoucherRefusal> {
        let ceiling = self.record.voucher_ceiling;
        if amount > ceiling {
            return Err(VoucherRefusal::OutOfRange { amount, ceiling });
        }
        if channel_id != self.record.channel_id {
            return Err(VoucherRefusal::OtherChannel { stated: channel_id, expected: self.record.channel_id });
        }
        Ok(ChannelClosed::of(&self.record.phase)?)
    }

    /// Minimum delta and deposit, for an amount above what is accepted.
    fn check_step(&self, amount: Amount) -> Result<(), VoucherRefusal> {
        let deposit = self.record.deposit;
        let least = self.record.accepted.saturating_add(self.policy.minimum_delta);
        if amount < least && amount != deposit {
            return Err(VoucherRefusal::BelowMinimumDelta { amount, least });
        }
        if amount > deposit {
            return Err(VoucherRefusal::AboveDeposit { amount, deposit });
        }
        Ok(())
    }

    /// Takes a verified voucher one step further. Everything is checked again, because the channel may have moved while
    /// the signature was verified. One at or below `accepted` has no effect and is no error, which is also the rule for
    /// the voucher of a credential: `None`.
    ///
    /// # Errors
    /// When it no longer fits.
    pub fn propose_voucher(&self, verified: &VerifiedVoucher) -> Result<Option<VoucherPlan>, VoucherRefusal> {
        self.check_shape(verified.channel_id(), verified.amount())?;
        if verified.amount() <= self.record.accepted {
            return Ok(None);
        }
        self.check_step(verified.amount())?;
        Ok(Some(VoucherPlan { update: self.update(Change::Voucher(verified.stored())) }))
    }

    /// The voucher is durable: it counts. Returns what is accepted now; that a higher one came first, or that the channel
    /// began to close meanwhile, changes nothing about a voucher that is in the store.
    ///
    /// # Errors
    /// When the plan belongs to another channel.
    pub fn commit_voucher(&mut self, plan: VoucherPlan) -> Result<Amount, StaleUpdate> {
        self.adopt(&plan.update)?;
        Ok(self.record.accepted)
    }

    /// Records what the session has spent so far. A lower number is an older one and changes nothing.
    ///
    /// # Errors
    /// Above the lease, and when the channel is closing and the number is higher: nothing is recorded then.
    pub fn record_spent(&mut self, spent: Amount) -> Result<(), SpendError> {
        if spent <= self.record.spent {
            return Ok(());
        }
        ChannelClosed::of(&self.record.phase)?;
        let leased = self.spendable_up_to();
        if spent > leased {
            return Err(SpendError::AboveLeased { spent, leased });
        }
        self.record.spent = spent;
        Ok(())
    }

    /// Records how many bytes were metered so far; a lower number changes nothing. It is no money: receipts state it, and
    /// it goes to the store with whatever is written next.
    pub fn record_units(&mut self, units: u64) {
        self.record.units = self.record.units.max(units);
    }

    /// What to ask the payer for when `cost` is wanted next: `None` when what is accepted covers it (a lease may have to
    /// be written first), and when it was asked for already.
    ///
    /// Asked once for each exhaustion: again only after a voucher, after another connection took over, or when less
    /// would do than was asked for (a reservation was released), since a payer waits in silence for what it was asked.
    ///
    /// # Errors
    /// When the channel serves no more.
    pub fn need(&mut self, cost: Amount) -> Result<Option<NeedVoucher>, ChannelClosed> {
        ChannelClosed::of(&self.record.phase)?;
        let ChannelSnapshot { accepted, spent, deposit, .. } = self.record;
        if accepted.saturating_sub(spent).saturating_sub(self.reserved()) >= cost {
            return Ok(None);
        }
        // Marks, not money: past the range the payer declines.
        let wanted = spent.saturating_add(self.reserved()).saturating_add(cost);
        let required = wanted.max(accepted.saturating_add(self.policy.minimum_delta).min(deposit));
        if self.announced.is_some_and(|asked| asked.accepted == accepted && asked.required <= required) {
            return Ok(None);
        }
        let need = NeedVoucher { required, accepted, spent, deposit };
        self.announced = Some(need);
        Ok(Some(need))
    }

    /// Sets the deposit to what the escrow says. Never added to, never lowered by an older answer; `None` when nothing
    /// changed.
    pub fn set_deposit(&mut self, deposit: Amount) -> Option<RecordUpdate> {
        if deposit <= self.record.deposit {
            return None;
        }
        self.record.deposit = deposit;
        Some(self.update(Change::Facts))
    }

    /// Sets what the escrow has paid. Never lowered by an older answer; `None` when nothing changed.
    ///
    /// # Errors
    /// When no accepted voucher can explain it: nothing changes then.
    pub fn set_settled(&mut self, settled: Amount) -> Result<Option<RecordUpdate>, SettledAboveAccepted> {
        let accepted = self.record.accepted;
        if settled > accepted {
            return Err(SettledAboveAccepted { settled, accepted });
        }
        if settled <= self.record.settled {
            return Ok(None);
        }
        self.record.settled = settled;
        Ok(Some(self.update(Change::Facts)))
    }

    /// A connection that has proved possession takes the channel over. The update must be durable before it is answered.
    ///
    /// # Errors
    /// When the epoch is not greater than the owner's.
    pub fn take_ownership(&mut self, epoch: u64) -> Result<RecordUpdate, StaleEpoch> {
        if epoch <= self.record.epoch {
            return Err(StaleEpoch { current: self.record.epoch });
        }
        self.record.epoch = epoch;
        // The new connection has not seen what the old one was asked for.
        self.announced = None;
        Ok(self.update(Change::Epoch(epoch)))
    }

    /// Compares counts when a connection resumes: what was spent and not `received` stands as lost if one break can
    /// explain it. `received` is the payer's count without losses that stand already. Returns the loss over all breaks
    /// and an update, if it grew.
    ///
    /// # Errors
    /// [`Disputed`] above the in-flight cap.
    pub fn resume(&mut self, received: Amount, cap: Amount) -> Result<(Amount, Option<RecordUpdate>), Disputed> {
        let (spent, before) = (self.record.spent, self.record.lost_in_flight);
        let total = spent.saturating_sub(received);
        let lost = total.saturating_sub(before);
        if lost > cap {
            return Err(Disputed { spent, received, lost, cap });
        }
        if lost.is_zero() {
            return Ok((before, None));
        }
        self.record.lost_in_flight = total;
        Ok((total, Some(self.update(Change::Lost(total)))))
    }

    fn update(&self, change: Change) -> RecordUpdate {
        RecordUpdate {
            channel_id: self.record.channel_id,
            epoch: self.record.epoch,
            deposit: self.record.deposit,
            spent: self.record.spent,
            units: self.record.units,
            settled: self.record.settled,
            change,
        }
    }

    /// Takes over what the store has confirmed.
    fn adopt(&mut self, update: &RecordUpdate) -> Result<(), StaleUpdate> {
        if update.channel_id != self.record.channel_id {
            return Err(StaleUpdate::OtherChannel);
        }
        let mut next = self.record.clone();
        update.apply_change(&mut next)?;
        next.validate()?;
        self.record = next;
        Ok(())
    }
}

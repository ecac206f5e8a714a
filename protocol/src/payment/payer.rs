//! The payer's side of a channel: how far it signs. Pure policy, no keys and no store.
//!
//! The payer meters itself and never signs beyond what it counted plus `max_ahead`, nor above its deposit, its budget and
//! its durable ceiling, whatever the payee claims: a claim can make it sign earlier, never more. `[pay.payer.bound]`
//!
//! *Counted* is `received + lost_in_flight`. What was lost at a break stands in both books, so it no longer counts as
//! ahead; else each break would narrow the window for ever.

use serde::{Deserialize, Serialize};

use super::{Amount, NeedVoucher};

/// What the user and the terms allow on one channel. All amounts are base units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PayerLimits {
    /// The most that this channel may ever cost.
    pub budget: Amount,
    /// Authorised at most beyond what was counted.
    pub max_ahead: Amount,
    /// The wallet signs ahead when less than this is left ahead; `None` for half of `max_ahead`.
    pub low_mark: Option<Amount>,
    /// The least step between vouchers, from the terms.
    pub minimum_delta: Amount,
    /// Top-ups go up to this deposit; at or below the present deposit there are none.
    pub deposit_limit: Amount,
    /// A top-up adds at least this much, if the limit lets it, since each costs a transaction.
    pub top_up_step: Amount,
    /// What can be lost in one break, from the terms.
    pub in_flight_cap: Amount,
    /// What may be lost on this channel over all breaks.
    pub loss_budget: Amount,
}

impl PayerLimits {
    fn low_mark(&self) -> Amount {
        self.low_mark.unwrap_or(Amount::new(self.max_ahead.units().div_ceil(2)))
    }

    /// Whether a payer with these limits can work under these terms: the dearest unit (call price and largest priced
    /// answer, an item, or a reservation's maximum) has to fit between two vouchers.
    ///
    /// # Errors
    /// [`UnworkableTerms`] when `max_ahead < dearest_unit + minimum_delta`.
    pub fn acceptable(&self, dearest_unit: Amount) -> Result<(), UnworkableTerms> {
        let PayerLimits { max_ahead, minimum_delta, .. } = *self;
        match dearest_unit.checked_add(minimum_delta) {
            Some(least) if least <= max_ahead => Ok(()),
            _ => Err(UnworkableTerms { dearest_unit, minimum_delta, max_ahead }),
        }
    }
}

/// Terms under which a channel would come to a stop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the dearest unit costs {dearest_unit} and the minimum voucher delta is {minimum_delta}: max_ahead has to be at \
     least their sum, and is {max_ahead}"
)]
pub struct UnworkableTerms {
    /// The price of the dearest unit in base units.
    pub dearest_unit: Amount,
    /// The minimum delta of the terms in base units.
    pub minimum_delta: Amount,
    /// What the wallet authorises ahead, in base units.
    pub max_ahead: Amount,
}

/// Why the payer will not sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum DeclineReason {
    /// It would exceed the budget.
    #[error("the budget")]
    Budget,
    /// It would exceed the deposit, and the deposit may not grow that far.
    #[error("the deposit limit")]
    Deposit,
    /// One unit is dearer than what the payer authorises ahead.
    #[error("what is authorised ahead")]
    MaxAhead,
    /// The payee claims to have delivered more than can be on its way.
    #[error("the payer's own count")]
    Counts,
}

/// A final no to a request for a voucher.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("{needed} base units are needed, above {reason} of {limit}")]
pub struct Decline {
    /// Which limit it is.
    pub reason: DeclineReason,
    /// What would have been needed, in base units, in the terms of that limit.
    pub needed: Amount,
    /// The limit in base units.
    pub limit: Amount,
}

/// What the payer does about a request for a voucher.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum NeedAnswer {
    /// Sign a voucher of this cumulative amount.
    Sign(Amount),
    /// Say nothing: a voucher is on its way, or the payer's own count has to catch up first.
    Silent,
    /// Raise the deposit first.
    TopUp {
        /// To this deposit in base units (absolute).
        to: Amount,
    },
    /// No, for good.
    Decline(Decline),
}

/// Why an amount may not be signed: a defect of the caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SignError {
    /// Above what is counted plus `max_ahead`, the deposit or the budget.
    #[error("{amount} is above what may be signed now, {limit}")]
    AboveLimit {
        /// The amount in base units.
        amount: Amount,
        /// What may be signed now, in base units.
        limit: Amount,
    },
    /// The ceiling is not durable yet.
    #[error("{amount} is above the durable signing ceiling {ceiling}")]
    AboveCeiling {
        /// The amount in base units.
        amount: Amount,
        /// The durable ceiling in base units.
        ceiling: Amount,
    },
}

/// Why a channel is not resumed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ResumeRefusal {
    /// The payee claims more than one break can explain, or more than was ever signed.
    #[error("the payee claims {spent} spent, {counted} counted here: above the possible {limit}")]
    Disputed {
        /// The payee's count in base units.
        spent: Amount,
        /// The payer's count in base units, with losses that stand already.
        counted: Amount,
        /// The largest count that would have stood, in base units.
        limit: Amount,
    },
    /// This break exceeds what the user is ready to lose.
    #[error("{lost} base units lost in flight are above the loss budget of {limit}")]
    LossBudget {
        /// What would be lost over all breaks, in base units.
        lost: Amount,
        /// The loss budget in base units.
        limit: Amount,
    },
}

/// The durable part of a payer's book. All amounts are base units.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PayerSnapshot {
    /// What the escrow holds.
    pub deposit: Amount,
    /// What has arrived, by the payer's own count.
    pub received: Amount,
    /// What was lost at breaks and stands.
    pub lost_in_flight: Amount,
    /// Nothing above it was ever signed.
    pub ceiling: Amount,
    /// The highest owner epoch that was sent.
    pub epoch: u64,
    /// The most that was ever authorised beyond what was counted.
    pub peak_ahead: Amount,
}

/// The payer's book of one channel.
#[derive(Debug, Clone)]
pub struct PayerBook {
    limits: PayerLimits,
    durable: PayerSnapshot,
    /// The highest voucher that may ever have been signed: the ceiling after a restart.
    signed: Amount,
    /// The highest voucher that this connection's payee has, or will have when what is under way arrives.
    sent: Amount,
    /// The request that waits for the payer's count or its deposit.
    pending: Option<NeedVoucher>,
    declined: Option<Decline>,
    /// What this payer's open calls may have reserved.
    open_reservations: Amount,
}

impl PayerBook {
    /// A book for a fresh channel with this deposit (base units).
    pub fn open(limits: PayerLimits, deposit: Amount) -> Self {
        Self::restore(limits, PayerSnapshot { deposit, ..PayerSnapshot::default() })
    }

    /// The book as stored. All up to the ceiling counts as signed, since nobody knows what was.
    pub fn restore(limits: PayerLimits, snapshot: PayerSnapshot) -> Self {
        PayerBook {
            limits,
            durable: snapshot,
            signed: snapshot.ceiling,
            sent: Amount::ZERO,
            pending: None,
            declined: None,
            open_reservations: Amount::ZERO,
        }
    }

    /// What to store: `received` at each half of the in-flight cap, the rest when it changes.
    pub const fn snapshot(&self) -> PayerSnapshot {
        self.durable
    }

    /// What has arrived, in base units.
    pub const fn received(&self) -> Amount {
        self.durable.received
    }

    /// What has arrived or stands as lost, in base units.
    pub const fn counted(&self) -> Amount {
        self.durable.received.saturating_add(self.durable.lost_in_flight)
    }

    /// The highest voucher that may have been signed, in base units.
    pub const fn signed(&self) -> Amount {
        self.signed
    }

    /// The most that was ever authorised beyond what was counted, in base units.
    pub const fn peak_ahead(&self) -> Amount {
        self.durable.peak_ahead
    }

    /// What the escrow holds, in base units.
    pub const fn deposit(&self) -> Amount {
        self.durable.deposit
    }

    /// What the book was opened with.
    pub const fn limits(&self) -> PayerLimits {
        self.limits
    }

    /// What [`received`](Self::received) must reach before [`next_voucher`](Self::next_voucher) has something to sign,
    /// in base units; [`Amount::MAX`] if it never will.
    pub fn next_mark(&self) -> Amount {
        let PayerLimits { max_ahead, minimum_delta, .. } = self.limits;
        let most = self.durable.deposit.min(self.limits.budget);
        let step = self.sent.saturating_add(minimum_delta);
        if most <= self.sent || (most < step && most < self.durable.deposit) {
            return Amount::MAX;
        }
        // Less than the low mark is ahead, and a step fits above what was sent. With no mark nothing is signed unasked.
        let low = match self.limits.low_mark() {
            Amount::ZERO => Amount::MAX,
            mark => self.sent.saturating_sub(mark).saturating_add(Amount::new(1)),
        };
        let room = step.min(most).saturating_sub(max_ahead);
        let ahead = low.max(room);
        let asked =
            self.pending.filter(|need| need.required <= most).map(|need| need.required.saturating_sub(max_ahead));
        let counted = asked.map_or(ahead, |asked| asked.max(room).min(ahead));
        counted.saturating_sub(self.durable.lost_in_flight)
    }

    /// The most that may be signed now, in base units.
    fn limit(&self) -> Amount {
        let ahead = self.counted().saturating_add(self.limits.max_ahead);
        ahead.min(self.durable.deposit).min(self.limits.budget)
    }

    /// A connection stands, and its payee has accepted this much: what is above was not received and is sent again. The
    /// claim is believed only up to what may have been signed.
    pub fn record_connected(&mut self, accepted: Amount) {
        self.sent = accepted.min(self.signed);
        self.pending = None;
        self.declined = None;
        self.open_reservations = Amount::ZERO;
    }

    /// Sets the payer's own count of what has arrived (absolute; an older count changes nothing).
    pub fn record_received(&mut self, total: Amount) {
        self.durable.received = self.durable.received.max(total);
    }

    /// Sets the deposit to what the escrow says; an older answer changes nothing.
    pub fn record_deposit(&mut self, deposit: Amount) {
        self.durable.deposit = self.durable.deposit.max(deposit);
    }

    /// Sets the sum of the maxima of the open calls that are priced by reservation: what a request may exceed
    /// `max_ahead` by for a while.
    pub fn record_open_reservations(&mut self, total: Amount) {
        self.open_reservations = total;
    }

    /// The next voucher to sign without being asked, or for a request that the payer's count has caught up with. It is
    /// signed as far as the limits let, but only when less than the low mark is ahead, and in steps of the minimum delta
    /// except for the last one to the deposit.
    pub fn next_voucher(&self) -> Option<Amount> {
        let wanted = self.pending.is_some_and(|need| need.required <= self.limit());
        let ahead = self.sent.saturating_sub(self.counted());
        if !wanted && ahead >= self.limits.low_mark() {
            return None;
        }
        self.step()
    }

    /// As far as may be signed now, if that is a step that the payee takes.
    fn step(&self) -> Option<Amount> {
        let limit = self.limit();
        let least = self.sent.saturating_add(self.limits.minimum_delta);
        (limit > self.sent && (limit >= least || limit == self.durable.deposit)).then_some(limit)
    }

    /// Answers the payee's request. What it states is a claim: `spent` only serves to say no earlier.
    pub fn handle_need(&mut self, need: NeedVoucher) -> NeedAnswer {
        // What asks for no more than was sent has crossed it: nothing is left to wait for.
        self.pending = Some(need).filter(|need| need.required > self.sent);
        if self.declined.is_none() && need.required > self.sent {
            self.declined = self.doubt(need);
        }
        self.answer(need)
    }

    /// Whether the claim cannot be true. Asked at its arrival only: later the reservations that explain it have ended,
    /// and a request that was honest when it was sent would be declined for good.
    fn doubt(&self, need: NeedVoucher) -> Option<Decline> {
        let reach = self.counted().saturating_add(self.limits.in_flight_cap);
        if need.spent > reach {
            return Some(Decline { reason: DeclineReason::Counts, needed: need.spent, limit: reach });
        }
        // Other calls' reservations are part of `required` and pass; one unit above `max_ahead` never fits.
        let (unit, limit) = (need.required.saturating_sub(need.spent), self.limits.max_ahead);
        let impossible = unit > limit.saturating_add(self.open_reservations);
        impossible.then_some(Decline { reason: DeclineReason::MaxAhead, needed: unit, limit })
    }

    /// The answer to the request that is still open, after the count, the deposit or the reservations have changed.
    /// `None` when there is none; [`NeedAnswer::Silent`] when it has to wait on.
    pub fn retry_need(&mut self) -> Option<NeedAnswer> {
        self.pending.map(|need| self.answer(need))
    }

    fn answer(&mut self, need: NeedVoucher) -> NeedAnswer {
        let answer = match self.declined {
            Some(decline) => NeedAnswer::Decline(decline),
            None => self.judge(need),
        };
        if let NeedAnswer::Decline(decline) = answer {
            self.declined = Some(decline);
        }
        answer
    }

    fn judge(&self, need: NeedVoucher) -> NeedAnswer {
        let decline = |reason, needed, limit| NeedAnswer::Decline(Decline { reason, needed, limit });
        let PayerLimits { budget, max_ahead, deposit_limit, .. } = self.limits;
        if need.required <= self.sent {
            return NeedAnswer::Silent;
        }
        // A deposit that grew since the request was sent ends the waiver of the minimum delta at the old deposit.
        let deposit = self.durable.deposit;
        let least = self.sent.saturating_add(self.limits.minimum_delta).min(deposit);
        let required = need.required.max(least);
        if required > budget {
            return decline(DeclineReason::Budget, required, budget);
        }
        // A no is said at once, as the budget's is: when the payer's own count has caught up, nobody asks again.
        if required > deposit.max(deposit_limit) {
            return decline(DeclineReason::Deposit, required, deposit_limit.max(deposit));
        }
        if required > self.counted().saturating_add(max_ahead) {
            return NeedAnswer::Silent;
        }
        if required > deposit {
            let step = deposit.saturating_add(self.limits.top_up_step);
            // Never above the budget: the rest would lie idle, and the last step to the deposit needs no minimum delta.
            return NeedAnswer::TopUp { to: step.max(required).min(deposit_limit).min(budget) };
        }
        // Less than a step is asked for by nobody who keeps to the terms.
        self.step().map_or(NeedAnswer::Silent, NeedAnswer::Sign)
    }

    /// The ceiling that must be durable before `amount` is signed, if the present one is too low. It is raised by one
    /// `max_ahead` more than needed, so that one write serves many vouchers.
    pub fn next_ceiling(&self, amount: Amount) -> Option<Amount> {
        if amount <= self.durable.ceiling {
            return None;
        }
        let ahead = amount.saturating_add(self.limits.max_ahead);
        Some(ahead.min(self.durable.deposit).min(self.limits.budget).max(amount))
    }

    /// The ceiling is durable.
    pub fn record_ceiling(&mut self, ceiling: Amount) {
        self.durable.ceiling = self.durable.ceiling.max(ceiling);
    }

    /// Books a voucher; only then is it signed and sent.
    ///
    /// # Errors
    /// When it is beyond a limit or the durable ceiling: then it must not be signed, and nothing is booked.
    pub fn record_signed(&mut self, amount: Amount) -> Result<(), SignError> {
        let (limit, ceiling) = (self.limit(), self.durable.ceiling);
        if amount > limit {
            return Err(SignError::AboveLimit { amount, limit });
        }
        if amount > ceiling {
            return Err(SignError::AboveCeiling { amount, ceiling });
        }
        self.signed = self.signed.max(amount);
        self.sent = self.sent.max(amount);
        self.durable.peak_ahead = self.durable.peak_ahead.max(amount.saturating_sub(self.counted()));
        if self.pending.is_some_and(|need| need.required <= amount) {
            self.pending = None;
        }
        Ok(())
    }

    /// The payee resumes at `spent` by its own count. What did not arrive stands as lost if one break explains it and
    /// the user is ready to lose it. Returns the loss over all breaks, in base units.
    ///
    /// # Errors
    /// When the counts differ by more than the in-flight cap, or the loss budget is exceeded; nothing is booked then.
    pub fn resume(&mut self, spent: Amount) -> Result<Amount, ResumeRefusal> {
        let counted = self.counted();
        let limit = counted.saturating_add(self.limits.in_flight_cap).min(self.signed.max(counted));
        if spent > limit {
            return Err(ResumeRefusal::Disputed { spent, counted, limit });
        }
        let lost = self.durable.lost_in_flight.saturating_add(spent.saturating_sub(counted));
        if spent > counted && lost > self.limits.loss_budget {
            return Err(ResumeRefusal::LossBudget { lost, limit: self.limits.loss_budget });
        }
        self.durable.lost_in_flight = lost;
        Ok(lost)
    }

    /// What the close voucher states: all that was counted, at least what the escrow itself says it has paid, and never
    /// more than was signed. `[pay.close.amount]`
    pub fn close_amount(&self, settled: Amount) -> Amount {
        self.counted().max(settled).min(self.signed)
    }

    /// The epoch of the next connection: above all that were sent, and above the one that the payee has named. It must
    /// be durable before it is sent. `None` where the numbers end.
    pub fn next_epoch(&mut self, current: Option<u64>) -> Option<u64> {
        let epoch = self.durable.epoch.max(current.unwrap_or(0)).checked_add(1)?;
        self.durable.epoch = epoch;
        Some(epoch)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "payer_tests.rs"]
mod tests;

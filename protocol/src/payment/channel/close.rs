//! The end of a channel: close vouchers, settlement by stored ones, finalisation.

use super::super::{Amount, ChannelId, CloseVoucher, SignedAmount};
use super::record::Change;
use super::{
    ChannelClosed, ChannelPhase, CloseRefusal, PaymentChannel, Precheck, RecordUpdate, SettledAboveAccepted,
    VerifiedClose,
};

/// What the payee answers to a close voucher. The update is durable before the answer leaves; the same voucher again
/// gives the same answer.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum CloseAnswer {
    /// It covers what was spent and is presented to the escrow.
    Taken {
        /// What is presented.
        close: CloseVoucher,
        /// What to write first.
        update: RecordUpdate,
    },
    /// It states less than was spent.
    Disputed {
        /// What the payer says it received, in base units.
        claimed: Amount,
        /// What the payee says it spent, in base units.
        spent: Amount,
        /// What to write first.
        update: RecordUpdate,
    },
}

impl PaymentChannel {
    /// The checks of a close voucher before its signature.
    ///
    /// # Errors
    /// The first check that fails.
    pub fn precheck_close(&self, channel_id: ChannelId, voucher: &CloseVoucher) -> Result<Precheck, CloseRefusal> {
        let (expected, amount) = (self.record.channel_id, voucher.amount);
        if channel_id != expected {
            return Err(CloseRefusal::OtherChannel { stated: channel_id, expected });
        }
        match self.record.phase {
            ChannelPhase::Closing { close } | ChannelPhase::Finalized { close: Some(close) } if close == *voucher => {
                return Ok(Precheck::Again);
            }
            ChannelPhase::Closing { .. } | ChannelPhase::Finalized { .. } => {
                ChannelClosed::of(&self.record.phase)?;
            }
            ChannelPhase::Open | ChannelPhase::Disputed { .. } => {}
        }
        let (settled, accepted) = (self.record.settled, self.record.accepted);
        if amount < settled {
            return Err(CloseRefusal::BelowSettled { amount, settled });
        }
        if amount > accepted {
            return Err(CloseRefusal::AboveAccepted { amount, accepted });
        }
        Ok(Precheck::Verify)
    }

    /// The payer's close voucher: taken iff it covers what was spent. Service ends here, whatever the answer: the caller
    /// has stopped the session's spending and recorded its last count, and all calls have ended.
    ///
    /// # Errors
    /// When the voucher does not fit, another closing amount stands, or calls have not ended.
    pub fn close(&mut self, voucher: &VerifiedClose) -> Result<CloseAnswer, CloseRefusal> {
        let (close, spent) = (voucher.close(), self.record.spent);
        if let Precheck::Again = self.precheck_close(voucher.channel_id(), &close)? {
            // It is taken already, whatever is spent by now: a crash since then has written the rest of a lease off as
            // spent, and that is the payee's loss, not a dispute. A finalised channel has only facts left to write.
            let change = match self.record.phase {
                ChannelPhase::Finalized { .. } => Change::Facts,
                _ => Change::Close(close),
            };
            return Ok(CloseAnswer::Taken { close, update: self.update(change) });
        }
        self.check_calls_ended()?;
        if close.amount < spent {
            let claimed = close.amount;
            self.record.phase = ChannelPhase::Disputed { claimed };
            return Ok(CloseAnswer::Disputed { claimed, spent, update: self.update(Change::Dispute { claimed }) });
        }
        self.record.phase = ChannelPhase::Closing { close };
        Ok(CloseAnswer::Taken { close, update: self.update(Change::Close(close)) })
    }

    /// The payer is gone: closes by the smallest stored voucher that covers what was spent (and settled), which is also
    /// how a dispute ends if the payee's policy is to settle. Repeated: the same voucher.
    ///
    /// # Errors
    /// When no voucher was ever accepted, the channel is finalised, or calls have not ended.
    pub fn close_without_payer(&mut self) -> Result<(CloseVoucher, RecordUpdate), CloseRefusal> {
        let close = match self.record.phase {
            ChannelPhase::Finalized { .. } => return Err(ChannelClosed::Finalized.into()),
            ChannelPhase::Closing { close } => close,
            ChannelPhase::Open | ChannelPhase::Disputed { .. } => {
                self.check_calls_ended()?;
                CloseVoucher::from(*self.payer_gone_voucher().ok_or(CloseRefusal::NoVoucher)?)
            }
        };
        self.record.phase = ChannelPhase::Closing { close };
        Ok((close, self.update(Change::Close(close))))
    }

    fn check_calls_ended(&self) -> Result<(), CloseRefusal> {
        let planned = self.lease_in_flight.is_some();
        if self.reserved().is_zero() && !planned {
            return Ok(());
        }
        Err(CloseRefusal::Busy {
            reserved: self.record.accepted.saturating_sub(self.free()).saturating_sub(self.record.leased),
        })
    }

    /// The voucher to close with when the payer is gone: the smallest stored one that covers what was spent.
    pub fn payer_gone_voucher(&self) -> Option<&SignedAmount> {
        self.record.vouchers.smallest_from(self.record.spent.max(self.record.settled))
    }

    /// The voucher to settle with in mid-session: the largest stored one of at most what was spent; `None` when that is
    /// settled already.
    pub fn settlement_voucher(&self) -> Option<&SignedAmount> {
        let settled = self.record.settled;
        self.record.vouchers.largest_up_to(self.record.spent).filter(|voucher| voucher.amount > settled)
    }

    /// The escrow has closed the channel and paid `settled` in all. Repeated: no change.
    ///
    /// # Errors
    /// When no accepted voucher can explain what was paid: nothing changes then.
    pub fn finalize(&mut self, settled: Amount) -> Result<RecordUpdate, SettledAboveAccepted> {
        let accepted = self.record.accepted;
        if settled > accepted {
            return Err(SettledAboveAccepted { settled, accepted });
        }
        self.record.settled = self.record.settled.max(settled);
        let update = self.update(Change::Finalize);
        if let ChannelPhase::Finalized { .. } = self.record.phase {
            return Ok(update);
        }
        let close = match self.record.phase {
            ChannelPhase::Closing { close } => Some(close),
            _ => None,
        };
        self.record.phase = ChannelPhase::Finalized { close };
        Ok(update)
    }
}

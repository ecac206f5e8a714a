//! The durable record of a channel and its updates. The same code changes the record in the machine and in the store's
//! transaction, so that the two cannot drift.

use serde::{Deserialize, Serialize};

use super::super::{Amount, ChannelId, CloseVoucher, SignedAmount};
use super::StoredVouchers;

/// How far a channel is from its end.
///
/// ```text
///           close voucher ≥ spent · payer gone          escrow closed
///   Open ───────────────────────────────────► Closing ───────────────► Finalized
///     │                                         ▲  ▲                      ▲  ▲
///     │ close voucher < spent                   │  └ the same again       │  └ nothing leaves it
///     └────────────────────► Disputed ──────────┘ close voucher ≥ spent   │
///     │                        │  ▲ another claim < spent                │
///     └────────────────────────┴──┴─── the payer closed at the escrow ────┘
/// ```
///
/// Only `Open` accepts vouchers, leases, reserves and spends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ChannelPhase {
    /// Serving.
    #[default]
    Open,
    /// The payer stated less than was spent. Nothing is served until the two agree, or the payee settles.
    Disputed {
        /// What the payer says it received, in base units.
        claimed: Amount,
    },
    /// The closing amount stands; the escrow has yet to confirm it. A failed settlement is driven again from here.
    Closing {
        /// What is presented to the escrow.
        close: CloseVoucher,
    },
    /// The escrow has closed the channel. Its id is never opened again.
    Finalized {
        /// What was presented, if the payee closed it.
        close: Option<CloseVoucher>,
    },
}

/// The counters of a channel, as stored. A plain value: whether it is sound is checked where it is restored.
///
/// All amounts are base units; `deposit ≥ accepted ≥ leased ≥ spent` and `accepted ≥ settled`. `[pay.counters]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelSnapshot {
    /// The channel.
    pub channel_id: ChannelId,
    /// The highest amount that the voucher protocol can express: 2^128 − 1 in v1, 2^96 − 1 in v2.
    pub voucher_ceiling: Amount,
    /// Who owns the channel: the greatest epoch that proved possession, 0 before the first.
    pub epoch: u64,
    /// What the escrow holds.
    pub deposit: Amount,
    /// The highest verified voucher.
    pub accepted: Amount,
    /// Up to where spending is durable.
    pub leased: Amount,
    /// The price of what was handed to the transport; it may lag behind in the store, never behind `leased`.
    pub spent: Amount,
    /// Metered bytes; for receipts, and behind after a crash.
    pub units: u64,
    /// What the escrow has paid out.
    pub settled: Amount,
    /// What was spent and never reached the payer, over all breaks.
    pub lost_in_flight: Amount,
    /// The vouchers kept for settlement.
    pub vouchers: StoredVouchers,
    /// How far the channel is from its end.
    pub phase: ChannelPhase,
}

/// A record that no channel can be in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BrokenRecord {
    /// More was accepted than deposited.
    #[error("accepted {accepted} is above the deposit {deposit}")]
    AcceptedAboveDeposit {
        /// Base units accepted.
        accepted: Amount,
        /// Base units deposited.
        deposit: Amount,
    },
    /// More was accepted than the voucher protocol can express.
    #[error("accepted {accepted} is above what the voucher protocol can express, {ceiling}")]
    AcceptedAboveCeiling {
        /// Base units accepted.
        accepted: Amount,
        /// The protocol's ceiling in base units.
        ceiling: Amount,
    },
    /// More is leased than was accepted.
    #[error("leased {leased} is above accepted {accepted}")]
    LeasedAboveAccepted {
        /// Base units leased.
        leased: Amount,
        /// Base units accepted.
        accepted: Amount,
    },
    /// More was spent than leased.
    #[error("spent {spent} is above leased {leased}")]
    SpentAboveLeased {
        /// Base units spent.
        spent: Amount,
        /// Base units leased.
        leased: Amount,
    },
    /// The escrow paid more than was accepted.
    #[error("settled {settled} is above accepted {accepted}")]
    SettledAboveAccepted {
        /// Base units settled.
        settled: Amount,
        /// Base units accepted.
        accepted: Amount,
    },
    /// More was lost than spent.
    #[error("lost in flight {lost} is above spent {spent}")]
    LostAboveSpent {
        /// Base units lost.
        lost: Amount,
        /// Base units spent.
        spent: Amount,
    },
    /// The stored vouchers are out of order, too many, or do not end at `accepted`.
    #[error("the stored vouchers are out of order, too many, or do not end at what was accepted")]
    Vouchers,
    /// The closing amount is above what was accepted.
    #[error("the closing amount {amount} is above accepted {accepted}")]
    CloseAboveAccepted {
        /// The closing amount in base units.
        amount: Amount,
        /// Base units accepted.
        accepted: Amount,
    },
}

impl ChannelSnapshot {
    /// Whether a channel can be in this state.
    ///
    /// # Errors
    /// The first invariant that does not hold.
    pub fn validate(&self) -> Result<(), BrokenRecord> {
        let ChannelSnapshot { deposit, accepted, leased, spent, settled, voucher_ceiling: ceiling, .. } = *self;
        if accepted > deposit {
            return Err(BrokenRecord::AcceptedAboveDeposit { accepted, deposit });
        }
        if accepted > ceiling {
            return Err(BrokenRecord::AcceptedAboveCeiling { accepted, ceiling });
        }
        if leased > accepted {
            return Err(BrokenRecord::LeasedAboveAccepted { leased, accepted });
        }
        if spent > leased {
            return Err(BrokenRecord::SpentAboveLeased { spent, leased });
        }
        if settled > accepted {
            return Err(BrokenRecord::SettledAboveAccepted { settled, accepted });
        }
        if self.lost_in_flight > spent {
            return Err(BrokenRecord::LostAboveSpent { lost: self.lost_in_flight, spent });
        }
        let highest = self.vouchers.highest().map_or(Amount::ZERO, |voucher| voucher.amount);
        if !self.vouchers.is_sound() || highest != accepted {
            return Err(BrokenRecord::Vouchers);
        }
        match self.phase {
            ChannelPhase::Closing { close } | ChannelPhase::Finalized { close: Some(close) }
                if close.amount > accepted =>
            {
                Err(BrokenRecord::CloseAboveAccepted { amount: close.amount, accepted })
            }
            _ => Ok(()),
        }
    }
}

/// Why an update does not fit the record.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StaleUpdate {
    /// It belongs to another channel.
    #[error("the update belongs to another channel")]
    OtherChannel,
    /// Another connection has taken the channel over.
    #[error("planned under epoch {planned}, the channel is owned by epoch {current}")]
    Epoch {
        /// The epoch of the update.
        planned: u64,
        /// The epoch of the record.
        current: u64,
    },
    /// What is leased has moved since: the plan was abandoned, or somebody else wrote the record.
    #[error("planned from leased {planned}, the record has {current}")]
    Lease {
        /// Base units that the plan started from.
        planned: Amount,
        /// Base units in the record.
        current: Amount,
    },
    /// The channel is on its way to the end.
    #[error(transparent)]
    Closed(#[from] super::ChannelClosed),
    /// It would break an invariant of the record.
    #[error("the update would break the record: {0}")]
    Broken(#[from] BrokenRecord),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    /// Only the facts that every update carries.
    Facts,
    Voucher(SignedAmount),
    Lease {
        from: Amount,
        to: Amount,
    },
    Epoch(u64),
    Lost(Amount),
    Dispute {
        claimed: Amount,
    },
    Close(CloseVoucher),
    Finalize,
}

/// One change of a channel's record, to be applied in the store's transaction by [`RecordUpdate::apply_to`].
///
/// Updates of one channel may reach the store in any order: each carries the counters that only rise (deposit, spent,
/// units, settled), and changes only what it is about. Applying one again changes nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "the update counts only when it is durable"]
pub struct RecordUpdate {
    pub(super) channel_id: ChannelId,
    pub(super) epoch: u64,
    pub(super) deposit: Amount,
    pub(super) spent: Amount,
    pub(super) units: u64,
    pub(super) settled: Amount,
    pub(super) change: Change,
}

impl RecordUpdate {
    /// The channel that it changes.
    pub const fn channel_id(&self) -> ChannelId {
        self.channel_id
    }

    /// Applies it to the record in the store. On an error the record is unchanged.
    ///
    /// # Errors
    /// When the record has moved on: another owner, another lease, the end. The caller restores the channel from it.
    pub fn apply_to(&self, record: &mut ChannelSnapshot) -> Result<(), StaleUpdate> {
        if self.channel_id != record.channel_id {
            return Err(StaleUpdate::OtherChannel);
        }
        self.check_owner(record)?;
        self.check_phase(record)?;
        let mut next = record.clone();
        self.apply_change(&mut next)?;
        next.validate()?;
        *record = next;
        Ok(())
    }

    /// A voucher speaks for itself and the escrow's word holds for every owner; the rest is the owner's alone.
    fn check_owner(&self, record: &ChannelSnapshot) -> Result<(), StaleUpdate> {
        let stale = StaleUpdate::Epoch { planned: self.epoch, current: record.epoch };
        match self.change {
            Change::Facts | Change::Voucher(_) | Change::Finalize => Ok(()),
            // Not even the same again: of two processes that take the same epoch, exactly one wins.
            Change::Epoch(epoch) if epoch <= record.epoch => Err(stale),
            Change::Epoch(_) => Ok(()),
            Change::Lease { .. } | Change::Lost(_) | Change::Dispute { .. } | Change::Close(_) => {
                if self.epoch == record.epoch { Ok(()) } else { Err(stale) }
            }
        }
    }

    fn check_phase(&self, record: &ChannelSnapshot) -> Result<(), StaleUpdate> {
        let closed = super::ChannelClosed::of(&record.phase);
        match (self.change, record.phase) {
            (_, ChannelPhase::Open) | (Change::Facts | Change::Finalize, _) => Ok(()),
            // Giving a lease back belongs to every orderly end.
            (Change::Lease { from, to }, _) if to <= from => Ok(()),
            (Change::Close(_) | Change::Dispute { .. }, ChannelPhase::Disputed { .. }) => Ok(()),
            (Change::Close(close), ChannelPhase::Closing { close: taken }) if close == taken => Ok(()),
            (Change::Epoch(_) | Change::Lost(_), ChannelPhase::Disputed { .. } | ChannelPhase::Closing { .. }) => {
                Ok(())
            }
            _ => closed.map_err(StaleUpdate::Closed),
        }
    }

    /// The change itself, without asking who owns the channel: what the store has confirmed is a fact to the machine.
    pub(super) fn apply_change(&self, record: &mut ChannelSnapshot) -> Result<(), StaleUpdate> {
        record.deposit = record.deposit.max(self.deposit);
        record.units = record.units.max(self.units);
        match self.change {
            Change::Facts => {}
            Change::Voucher(voucher) => {
                record.vouchers.push(voucher, record.spent);
                record.accepted = record.accepted.max(voucher.amount);
            }
            Change::Lease { from, to } => {
                // At `to` already: written before, and the answer was lost.
                if record.leased != from && record.leased != to {
                    return Err(StaleUpdate::Lease { planned: from, current: record.leased });
                }
                record.leased = to;
            }
            Change::Epoch(epoch) => record.epoch = record.epoch.max(epoch),
            Change::Lost(lost) => record.lost_in_flight = record.lost_in_flight.max(lost),
            Change::Dispute { claimed } => record.phase = ChannelPhase::Disputed { claimed },
            Change::Close(close) => record.phase = ChannelPhase::Closing { close },
            Change::Finalize => {
                let close = match record.phase {
                    ChannelPhase::Closing { close } => Some(close),
                    ChannelPhase::Finalized { close } => close,
                    ChannelPhase::Open | ChannelPhase::Disputed { .. } => None,
                };
                record.phase = ChannelPhase::Finalized { close };
            }
        }
        // The record may be a step behind the machine in what these two lean on; they follow with the next update.
        record.spent = record.spent.max(self.spent.min(record.leased));
        record.settled = record.settled.max(self.settled.min(record.accepted));
        record.vouchers.prune(record.spent);
        Ok(())
    }
}

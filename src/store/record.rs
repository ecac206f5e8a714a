//! The record of one channel, as the payee keeps it.

use serde::{Deserialize, Serialize};
use tollway_protocol::payment::{Amount, ChannelDescriptor, ChannelId};

use super::vouchers::StoredVouchers;

/// Where a channel is in its life.
///
/// ```text
///  Open ──▶ Closing{amount} ──▶ Finalized{amount}
///    └─────────────────────────────▲   the payer withdrew, or the escrow said so
/// ```
/// It never goes back. A closing channel serves nothing new; its settlement is driven until the escrow has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum ChannelState {
    /// It serves.
    Open,
    /// The settlement at this amount is decided, and not yet known to be done.
    Closing {
        /// At which the channel closes, in base units.
        amount: Amount,
    },
    /// The escrow has ended it.
    Finalized {
        /// What the payee was paid in all, in base units.
        amount: Amount,
    },
}

impl ChannelState {
    const fn rank(self) -> u8 {
        match self {
            ChannelState::Open => 0,
            ChannelState::Closing { .. } => 1,
            ChannelState::Finalized { .. } => 2,
        }
    }
}

/// A record that contradicts itself, or what was stored before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// The descriptor's id is another.
    #[error("the descriptor's id is {computed}, not {id}")]
    WrongId {
        /// Under which it was to be stored.
        id: ChannelId,
        /// Of the descriptor.
        computed: ChannelId,
    },
    /// `deposit ≥ accepted ≥ leased ≥ spent`, `accepted ≥ settled` or `spent ≥ lost_in_flight` does not hold.
    #[error("{larger} must not be below {smaller}")]
    Counters {
        /// The counter that should be the larger one.
        larger: &'static str,
        /// The counter that should not exceed it.
        smaller: &'static str,
    },
    /// The kept vouchers are out of order or too many.
    #[error("the kept vouchers are not an ascending, bounded list")]
    Vouchers,
    /// The amount of the close is not between what is settled and what is accepted.
    #[error("the close amount is not between settled and accepted")]
    CloseAmount,
    /// The descriptor is not the stored one.
    #[error("the descriptor differs from the stored one")]
    OtherDescriptor,
    /// A value that only rises would fall: the caller worked from a stale read.
    #[error("{0} would go back")]
    GoesBack(&'static str),
}

/// Everything that must survive of one channel.
///
/// Invariants, checked at each write: `deposit ≥ accepted ≥ leased ≥ spent` and `accepted ≥ settled`. That `settled` is
/// above `spent` is possible (the payer vanished) and is reported, not refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelRecord {
    /// Set by the store; what compare-and-set compares.
    pub version: u64,
    /// What the channel's id is made of.
    pub descriptor: ChannelDescriptor,
    /// What the escrow says lies there, in base units; never added to.
    pub deposit: Amount,
    /// The accepted voucher, and those between it and what is spent.
    pub vouchers: StoredVouchers,
    /// Up to where spending is durable ahead of use, in base units.
    pub leased: Amount,
    /// The price of what was handed to the transport, as last written, in base units. After a crash it restarts at
    /// `leased`.
    pub spent: Amount,
    /// What the escrow has paid out, in base units.
    pub settled: Amount,
    /// Metered bytes.
    pub units: u64,
    /// The epoch of the connection that owns the channel.
    pub owner_epoch: u64,
    /// What was spent and never received, in breaks of the transport, in base units; part of `spent`.
    pub lost_in_flight: Amount,
    /// Where the channel is in its life.
    pub state: ChannelState,
}

impl ChannelRecord {
    /// A new channel with what the escrow says of it, and nothing accepted or spent.
    pub fn new(descriptor: ChannelDescriptor, deposit: Amount) -> Self {
        ChannelRecord {
            version: 0,
            descriptor,
            deposit,
            vouchers: StoredVouchers::default(),
            leased: Amount::ZERO,
            spent: Amount::ZERO,
            settled: Amount::ZERO,
            units: 0,
            owner_epoch: 0,
            lost_in_flight: Amount::ZERO,
            state: ChannelState::Open,
        }
    }

    /// The amount of the highest verified voucher, in base units.
    pub fn accepted(&self) -> Amount {
        self.vouchers.accepted()
    }

    /// Whether the escrow has paid out more than was spent: the payer vanished, and the payee settled by the smallest
    /// voucher that covered it.
    pub fn is_overpaid(&self) -> bool {
        self.settled > self.spent
    }

    /// Checks the record in itself, for storing it under `id`.
    ///
    /// # Errors
    /// The first rule that does not hold.
    pub fn check(&self, id: ChannelId) -> Result<(), RecordError> {
        let computed = self.descriptor.id();
        if computed != id {
            return Err(RecordError::WrongId { id, computed });
        }
        if !self.vouchers.is_sound() {
            return Err(RecordError::Vouchers);
        }
        let accepted = self.accepted();
        let at_least = [
            ("deposit", self.deposit, "accepted", accepted),
            ("accepted", accepted, "leased", self.leased),
            ("leased", self.leased, "spent", self.spent),
            ("accepted", accepted, "settled", self.settled),
            ("spent", self.spent, "lost_in_flight", self.lost_in_flight),
        ];
        for (larger, more, smaller, less) in at_least {
            if more < less {
                return Err(RecordError::Counters { larger, smaller });
            }
        }
        match self.state {
            ChannelState::Closing { amount } | ChannelState::Finalized { amount }
                if amount < self.settled || amount > accepted =>
            {
                Err(RecordError::CloseAmount)
            }
            _ => Ok(()),
        }
    }

    /// Checks that this record may follow `previous`: nothing goes back that only goes forward. `leased` may: an orderly
    /// close gives back what was not used.
    ///
    /// # Errors
    /// The first value that would go back.
    pub fn check_follows(&self, previous: &ChannelRecord) -> Result<(), RecordError> {
        if self.descriptor != previous.descriptor {
            return Err(RecordError::OtherDescriptor);
        }
        let rising = [
            ("deposit", self.deposit >= previous.deposit),
            ("accepted", self.accepted() >= previous.accepted()),
            ("spent", self.spent >= previous.spent),
            ("settled", self.settled >= previous.settled),
            ("units", self.units >= previous.units),
            ("owner_epoch", self.owner_epoch >= previous.owner_epoch),
            ("lost_in_flight", self.lost_in_flight >= previous.lost_in_flight),
            ("state", self.state.rank() >= previous.state.rank()),
        ];
        if let Some((name, _)) = rising.into_iter().find(|(_, rises)| !rises) {
            return Err(RecordError::GoesBack(name));
        }
        // An ended channel has ended at one amount.
        match previous.state {
            ChannelState::Finalized { .. } if self.state != previous.state => Err(RecordError::GoesBack("state")),
            _ => Ok(()),
        }
    }
}

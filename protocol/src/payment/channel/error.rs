//! Why the payee's machine refuses. A refusal changes nothing.

use super::super::{Amount, ChannelId, VoucherError};
use super::{BrokenRecord, ChannelPhase};

/// The channel serves no more: an error of its own, never "need voucher".
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChannelClosed {
    /// Payer and payee disagree about what was delivered.
    #[error("the channel is disputed: the payer claims {claimed}")]
    Disputed {
        /// What the payer says it received, in base units.
        claimed: Amount,
    },
    /// The channel is closing.
    #[error("the channel is closing at {amount}")]
    Closing {
        /// The closing amount in base units.
        amount: Amount,
    },
    /// The escrow has closed the channel.
    #[error("the channel is finalised")]
    Finalized,
}

impl ChannelClosed {
    pub(super) fn of(phase: &ChannelPhase) -> Result<(), Self> {
        match *phase {
            ChannelPhase::Open => Ok(()),
            ChannelPhase::Disputed { claimed } => Err(ChannelClosed::Disputed { claimed }),
            ChannelPhase::Closing { close } => Err(ChannelClosed::Closing { amount: close.amount }),
            ChannelPhase::Finalized { .. } => Err(ChannelClosed::Finalized),
        }
    }
}

/// Why a voucher is refused. All but the signature is cheap and comes first. `[pay.voucher.checks]`
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VoucherRefusal {
    /// The amount is not one of this voucher protocol.
    #[error("amount {amount} is above what the voucher protocol can express, {ceiling}")]
    OutOfRange {
        /// The stated amount in base units.
        amount: Amount,
        /// The protocol's ceiling in base units.
        ceiling: Amount,
    },
    /// It is for another channel than this connection's.
    #[error("the voucher is for channel {stated}, this connection's is {expected}")]
    OtherChannel {
        /// The channel that the voucher names.
        stated: ChannelId,
        /// The channel of the connection.
        expected: ChannelId,
    },
    /// The channel takes no more vouchers.
    #[error(transparent)]
    Closed(#[from] ChannelClosed),
    /// At or below what is accepted, and not the accepted voucher itself.
    #[error("amount {amount} is not above the accepted {accepted}")]
    NotAbove {
        /// The stated amount in base units.
        amount: Amount,
        /// The accepted amount in base units.
        accepted: Amount,
    },
    /// The step is below the minimum delta, and not the last one to the deposit.
    #[error("amount {amount} is below {least}, the accepted amount plus the minimum delta")]
    BelowMinimumDelta {
        /// The stated amount in base units.
        amount: Amount,
        /// The least amount that would do, in base units.
        least: Amount,
    },
    /// Above the deposit.
    #[error("amount {amount} is above the deposit {deposit}")]
    AboveDeposit {
        /// The stated amount in base units.
        amount: Amount,
        /// The deposit in base units.
        deposit: Amount,
    },
    /// Not canonical, or not by the channel's signer.
    #[error(transparent)]
    Signature(#[from] VoucherError),
}

/// Why a close voucher is refused. A count below `spent` is no refusal but a dispute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CloseRefusal {
    /// It is for another channel than this connection's.
    #[error("the close voucher is for channel {stated}, this connection's is {expected}")]
    OtherChannel {
        /// The channel that the voucher names.
        stated: ChannelId,
        /// The channel of the connection.
        expected: ChannelId,
    },
    /// Below what the escrow has paid already.
    #[error("closing amount {amount} is below the settled {settled}")]
    BelowSettled {
        /// The stated amount in base units.
        amount: Amount,
        /// What the escrow has paid, in base units.
        settled: Amount,
    },
    /// Above what was ever authorised.
    #[error("closing amount {amount} is above the accepted {accepted}")]
    AboveAccepted {
        /// The stated amount in base units.
        amount: Amount,
        /// The accepted amount in base units.
        accepted: Amount,
    },
    /// Another closing amount stands, or the escrow has closed the channel.
    #[error(transparent)]
    Closed(#[from] ChannelClosed),
    /// Calls are not over: a reservation or a lease write is still open.
    #[error("calls of the channel have not ended: {reserved} base units are reserved or being leased")]
    Busy {
        /// Base units reserved or in a lease that is being written.
        reserved: Amount,
    },
    /// A signature is not the signer's, or v2's consent is missing.
    #[error(transparent)]
    Signature(#[from] VoucherError),
    /// There is no stored voucher to close with.
    #[error("no voucher is stored to close with")]
    NoVoucher,
}

/// Why spending is not recorded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SpendError {
    /// Above what is leased: a defect of the caller, whose credit must have held it back.
    #[error("spent {spent} is above the leased {leased}")]
    AboveLeased {
        /// The stated count in base units.
        spent: Amount,
        /// What is leased, in base units.
        leased: Amount,
    },
    /// The channel serves no more.
    #[error(transparent)]
    Closed(#[from] ChannelClosed),
}

/// Why nothing was reserved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReserveError {
    /// Not enough is accepted: the caller asks by [`PaymentChannel::need`](super::PaymentChannel::need).
    #[error("{missing} base units short of what is accepted")]
    Short {
        /// Base units that are missing.
        missing: Amount,
    },
    /// Enough is accepted, but unused leases hold it: the caller waits for the lease that is being written, or gives
    /// `missing` back.
    #[error("{missing} base units are held by unused leases")]
    Leased {
        /// Base units to give back.
        missing: Amount,
    },
    /// Too many reservations are open.
    #[error("{limit} reservations are open already")]
    TooMany {
        /// The limit.
        limit: usize,
    },
    /// The channel serves no more.
    #[error(transparent)]
    Closed(#[from] ChannelClosed),
}

/// Why a lease is not given back or committed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LeaseError {
    /// Another lease is being written.
    #[error("another lease is being written")]
    Busy,
    /// The plan is not the one that is being written: committed already, abandoned, or another channel's.
    #[error("the lease plan is not the one being written")]
    Stale,
    /// Below what is spent.
    #[error("cannot give back down to {leased}: {spent} is spent")]
    BelowSpent {
        /// The stated lease in base units.
        leased: Amount,
        /// What is spent, in base units.
        spent: Amount,
    },
    /// Above what is leased: giving back never raises a lease.
    #[error("cannot give back up to {stated}: {leased} is leased")]
    AboveLeased {
        /// The stated lease in base units.
        stated: Amount,
        /// What is leased, in base units.
        leased: Amount,
    },
}

/// A connection came with an epoch that is not greater than the owner's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the epoch is not above the current one, {current}")]
pub struct StaleEpoch {
    /// The epoch of the owner.
    pub current: u64,
}

/// The counts of payer and payee differ by more than what can have been in flight.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("spent {spent}, received {received}: {lost} lost at once is above the in-flight cap {cap}")]
pub struct Disputed {
    /// The payee's count in base units.
    pub spent: Amount,
    /// The payer's count in base units, without losses that stand already.
    pub received: Amount,
    /// What would newly be lost, in base units.
    pub lost: Amount,
    /// The in-flight cap of the terms, in base units.
    pub cap: Amount,
}

/// The escrow states what no voucher of this record can explain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the escrow has settled {settled}, above the accepted {accepted}: the record is older than its vouchers")]
pub struct SettledAboveAccepted {
    /// What the escrow has paid, in base units.
    pub settled: Amount,
    /// The accepted amount in base units.
    pub accepted: Amount,
}

/// Why a channel is not opened or restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The record breaks an invariant.
    #[error(transparent)]
    Broken(#[from] BrokenRecord),
    /// A lease of nothing could never pay for anything.
    #[error("the lease is zero base units")]
    NoLease,
}

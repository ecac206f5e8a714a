//! Where deposits lie. An escrow holds a payer's deposit and pays the payee **exactly the amount of the voucher that is
//! presented**, in settle and in close, as the deployed v1 contract does.
//!
//! [`Escrow`] is what payee and wallet talk to; [`Ledger`] has the rules of the embedded local ledger, and
//! [`LocalLedger`] is that ledger as an `Escrow` in this process; [`remote`] has its methods as messages.
//!
//! ```text
//!          open                 close (payee)
//!  absent ──────▶ open ───────────────────────────▶ finalised
//!                 │  ▲ settle, top-up                   ▲
//!                 │  └───────┐                          │
//!    request close│          │top-up cancels            │withdraw (payer), after the grace period
//!                 └──▶ close requested ─────────────────┘
//! ```
//! A finalised id is never opened again.

#[cfg(feature = "redb")]
mod file;
mod ledger;
mod local;
pub mod remote;
mod service;

#[cfg(feature = "redb")]
pub use file::LedgerFileError;
#[cfg(feature = "redb")]
pub(crate) use file::verify_file;
pub use ledger::{DEFAULT_GRACE_MS, Ledger, LedgerConfig, LedgerImbalance, MAX_DEV_CREDIT};
pub use local::LocalLedger;
pub use service::{LedgerClient, LedgerService};

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tollway_protocol::payment::ledger_messages::{Close, OpenChannel, RequestClose, Settle, Signed, TopUp, Withdraw};
use tollway_protocol::payment::{Address, Amount, ChannelDescriptor, ChannelId, Hash, Signature, VoucherProtocol};

use crate::future::BoxFuture;

/// What an escrow says of a channel. Amounts are cumulative base units.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EscrowChannel {
    /// What the channel's id is made of.
    pub descriptor: ChannelDescriptor,
    /// What was deposited in all; it stays as it was when the channel ends.
    pub deposit: Amount,
    /// What was paid out to the payee.
    pub settled: Amount,
    /// When the payer asked to withdraw: milliseconds since 1970 by the escrow's clock. The payee has the grace period
    /// from then on to settle.
    pub close_requested_at_ms: Option<u64>,
    /// Whether the channel has ended.
    pub finalized: bool,
}

impl EscrowChannel {
    /// Whether the channel has ended, or its payer has asked to withdraw: then nothing more is served on it.
    pub const fn is_ending(&self) -> bool {
        self.finalized || self.close_requested_at_ms.is_some()
    }
}

/// What came of a settle, a close or a withdrawal. The same order gives the same settlement, however often it is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settlement {
    /// Names the settlement in receipts: a transaction's hash, or the digest of the order in the local ledger.
    pub reference: Hash,
    /// What the payee had been paid in all after it, in base units.
    pub settled: Amount,
    /// What went back to the payer by it, in base units.
    pub refunded: Amount,
}

/// Why an escrow refuses. Nothing has changed.
///
/// It travels by its place in this list, so a new one comes last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[non_exhaustive]
pub enum EscrowRefusal {
    /// The order is not signed by the party that may give it.
    #[error("the order is not signed by {expected}")]
    Unauthorised {
        /// Who may give it.
        expected: Address,
    },
    /// The voucher is not the channel's, for this amount.
    #[error("the voucher is not signed by {expected} for this channel and amount")]
    BadVoucher {
        /// Who signs for the channel.
        expected: Address,
    },
    /// The order pays out and no voucher is with it.
    #[error("a voucher for {amount} is needed")]
    VoucherMissing {
        /// For how much, in base units.
        amount: Amount,
    },
    /// No channel has this id.
    #[error("no channel {0}")]
    UnknownChannel(ChannelId),
    /// The id is or was that of a channel. It is never opened again.
    #[error("the channel {0} has been opened before")]
    IdUsed(ChannelId),
    /// The channel has ended.
    #[error("the channel has ended with {settled} paid out")]
    Finalized {
        /// What was paid out in all, in base units.
        settled: Amount,
    },
    /// The order has lapsed.
    #[error("the order lapsed at {expiry_ms}, and it is {now_ms}")]
    Expired {
        /// The order's expiry, in milliseconds since 1970.
        expiry_ms: u64,
        /// The escrow's time, in milliseconds since 1970.
        now_ms: u64,
    },
    /// The payer has used this nonce or a higher one.
    #[error("the nonce {nonce} is not above {last}, the payer's last")]
    NonceUsed {
        /// The order's.
        nonce: u64,
        /// The highest one used.
        last: u64,
    },
    /// A channel needs a payer and a payee.
    #[error("the payer or the payee is the zero address")]
    NobodyPaid,
    /// A channel needs a deposit.
    #[error("a deposit of zero opens no channel")]
    ZeroDeposit,
    /// The payer's account has too little.
    #[error("{needed} is needed, and {available} is in the account")]
    InsufficientBalance {
        /// In base units.
        needed: Amount,
        /// In base units.
        available: Amount,
    },
    /// More than the deposit cannot be paid out.
    #[error("{amount} is above the deposit of {deposit}")]
    AboveDeposit {
        /// The order's amount in base units.
        amount: Amount,
        /// In base units.
        deposit: Amount,
    },
    /// A settlement pays something: its amount is above what was paid before.
    #[error("{amount} is not above {settled}, which is paid out already")]
    NotAboveSettled {
        /// The order's amount in base units.
        amount: Amount,
        /// In base units.
        settled: Amount,
    },
    /// What was paid out is not taken back.
    #[error("{amount} is below {settled}, which is paid out already")]
    BelowSettled {
        /// The order's amount in base units.
        amount: Amount,
        /// In base units.
        settled: Amount,
    },
    /// The payer has not asked to withdraw.
    #[error("no close has been requested")]
    NoCloseRequested,
    /// The payee still has time to settle.
    #[error("the grace period lasts until {until_ms}, and it is {now_ms}")]
    GracePeriod {
        /// When it ends, in milliseconds since 1970.
        until_ms: u64,
        /// The escrow's time, in milliseconds since 1970.
        now_ms: u64,
    },
    /// There is not that much money: a sum would pass 2^128.
    #[error("a sum would pass 2^128 base units")]
    TooMuch,
}

/// Why an escrow did not do as it was told.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EscrowError {
    /// The escrow said no; asking again with the same order gives the same answer.
    #[error(transparent)]
    Refused(#[from] EscrowRefusal),
    /// The escrow could not be asked, or its answer was lost. Ask again: every order may be repeated.
    #[error("the escrow is unavailable: {0}")]
    Unavailable(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Holds deposits and pays by voucher.
///
/// All orders may be repeated after a lost answer: the same order has its effect once and gives the same answer.
/// Dropping a future leaves it unknown whether the order took effect; repeat it, or read the channel.
pub trait Escrow: Send + Sync + 'static {
    /// The chain, which vouchers name.
    fn chain_id(&self) -> u64;

    /// The escrow's address, which vouchers name.
    fn address(&self) -> Address;

    /// The vouchers that it takes.
    fn protocol(&self) -> VoucherProtocol;

    /// How long a payee may still claim after a payer has asked to withdraw; `None` when the escrow does not say.
    fn grace(&self) -> Option<Duration> {
        None
    }

    /// What the escrow knows of a channel; `None` when it was never opened.
    ///
    /// # Errors
    /// [`EscrowError::Unavailable`].
    fn channel(&self, id: ChannelId) -> BoxFuture<'_, Result<Option<EscrowChannel>, EscrowError>>;

    /// Opens a channel with a deposit from the payer's account.
    ///
    /// # Errors
    /// When the escrow refuses or is unavailable.
    fn open(&self, order: Signed<OpenChannel>) -> BoxFuture<'_, Result<EscrowChannel, EscrowError>>;

    /// Raises a deposit to an amount; has no effect when it is there already. Cancels a requested close when it raises.
    ///
    /// # Errors
    /// When the escrow refuses or is unavailable.
    fn top_up(&self, order: Signed<TopUp>) -> BoxFuture<'_, Result<EscrowChannel, EscrowError>>;

    /// Pays the payee up to the voucher's amount, which is above what was paid before.
    ///
    /// # Errors
    /// When the escrow refuses or is unavailable.
    fn settle(&self, order: Signed<Settle>, voucher: Signature) -> BoxFuture<'_, Result<Settlement, EscrowError>>;

    /// Pays the payee up to the amount, returns the rest to the payer and ends the channel. A voucher is needed unless
    /// the amount is what was paid already; then the channel closes without a payout.
    ///
    /// # Errors
    /// When the escrow refuses or is unavailable.
    fn close(&self, order: Signed<Close>, voucher: Option<Signature>)
    -> BoxFuture<'_, Result<Settlement, EscrowError>>;

    /// Announces a withdrawal: the grace period begins, once.
    ///
    /// # Errors
    /// When the escrow refuses or is unavailable.
    fn request_close(&self, order: Signed<RequestClose>) -> BoxFuture<'_, Result<EscrowChannel, EscrowError>>;

    /// Returns to the payer what was not paid out, after the grace period, and ends the channel.
    ///
    /// # Errors
    /// When the escrow refuses or is unavailable.
    fn withdraw(&self, order: Signed<Withdraw>) -> BoxFuture<'_, Result<Settlement, EscrowError>>;
}

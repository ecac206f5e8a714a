//! Why a wallet does not pay.

use tollway_protocol::error::ConnectionEnd;
use tollway_protocol::payment::{Address, Amount, ChannelId, Decline, ResumeRefusal, TermsError, UnworkableTerms};

use super::signer::SignerError;
use super::wallet_store::WalletStoreError;
use crate::escrow::EscrowError;
use crate::session::OpenError;

/// Why a wallet did not pay, or stopped paying.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WalletError {
    /// The service is free: open it without a wallet.
    #[error("the service was accepted without payment; open it without a wallet")]
    NotPriced,
    /// What the peer sent as terms is none.
    #[error("the peer's quote is malformed: {0}")]
    MalformedQuote(String),
    /// The terms are not signed by the payee that is trusted, or make no sense.
    #[error("the terms are refused: {0}")]
    Terms(#[from] TermsError),
    /// The terms are of another payee than the one that is trusted. Nothing was paid.
    #[error("the payee is {found}, and only {expected} is trusted; nothing was paid")]
    PayeeMismatch {
        /// Who is trusted.
        expected: Address,
        /// Who signed the terms.
        found: Address,
    },
    /// The terms are for another service.
    #[error("the terms are for the service '{found}', not '{expected}'")]
    OtherService {
        /// What was asked for.
        expected: String,
        /// What the terms name.
        found: String,
    },
    /// The escrow is neither a local ledger nor on the trust list.
    #[error("the escrow {escrow} on chain {chain_id} is not trusted")]
    EscrowNotTrusted {
        /// The escrow.
        escrow: Address,
        /// Its chain.
        chain_id: u64,
    },
    /// The ledger at the terms' URL is not the one that the terms name.
    #[error("the ledger at {url} is not the one in the terms")]
    OtherLedger {
        /// Where the terms say that it is.
        url: String,
    },
    /// The terms ask for something that this wallet does not do.
    #[error("the terms ask for {0}, which this wallet does not do")]
    Unsupported(&'static str),
    /// One unit costs more than is authorised ahead.
    #[error(transparent)]
    Unworkable(#[from] UnworkableTerms),
    /// What had to be signed was not.
    #[error(transparent)]
    Signer(#[from] SignerError),
    /// The budget does not reach.
    #[error("the budget is too small: {needed} base units are needed, and the budget is {budget}")]
    BudgetTooSmall {
        /// What is needed in all to go on, in base units.
        needed: Amount,
        /// The budget in base units.
        budget: Amount,
    },
    /// The payer declined a voucher for another reason.
    #[error("payment was declined: {0}")]
    Declined(Decline),
    /// The escrow did not do as it was told.
    #[error("{0}")]
    Escrow(String),
    /// The escrow could not be asked, or its answer was lost: what was ordered may have been done, and may be ordered
    /// again.
    #[error("{0}")]
    EscrowUnavailable(String),
    /// The connection was not opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The payee refused a voucher or the close.
    #[error("the payee refused: {0}")]
    Refused(String),
    /// The payee says that it delivered more than was received.
    #[error("disputed: {claimed} base units were received, and the payee says that it delivered {spent}")]
    Disputed {
        /// What was received, in base units.
        claimed: Amount,
        /// The payee's count, in base units.
        spent: Amount,
    },
    /// The payee sent something that is no payment message, or is not signed as it must be.
    #[error("the payee sent a bad payment message: {0}")]
    BadMessage(String),
    /// The payee's final receipt names a settlement above what the close voucher stated.
    #[error("the channel was closed at {closed_at}, and the payee says that it was paid {settled}")]
    Overcharged {
        /// What the close voucher stated, in base units.
        closed_at: Amount,
        /// What the payee was paid, by its receipt, in base units.
        settled: Amount,
    },
    /// The payee's count after a break is not one that this wallet takes. The channel is not used any more.
    #[error("the channel is not resumed: {0}")]
    Resume(#[from] ResumeRefusal),
    /// What must be on the disk before it is sent cannot be written: nothing more is signed.
    #[error("{0}")]
    Store(String),
    /// The wallet has no such channel, or it is not in a state for that.
    #[error("the channel {id} {what}")]
    Channel {
        /// The channel.
        id: ChannelId,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The connection ended.
    #[error("the paid connection ended: {0}")]
    Ended(ConnectionEnd),
    /// The calls of the connection, or the final receipt, did not come in time.
    #[error("{0} did not come in time")]
    Timeout(&'static str),
}

impl From<EscrowError> for WalletError {
    fn from(error: EscrowError) -> Self {
        match error {
            EscrowError::Unavailable(_) => WalletError::EscrowUnavailable(error.to_string()),
            EscrowError::Refused(_) => WalletError::Escrow(error.to_string()),
        }
    }
}

impl From<WalletStoreError> for WalletError {
    fn from(error: WalletStoreError) -> Self {
        WalletError::Store(error.to_string())
    }
}

//! Paid connections: what runs beside the session of a connection that is a payment channel.
//!
//! A [`Payee`] sells a service: it quotes signed terms, checks credentials, accepts vouchers, leases and settles. A
//! [`Wallet`] buys: it deposits, meters what arrives by itself, and signs ahead within its bounds. Neither stands on a
//! frame's path: the session holds an integer credit, or a count, and tells these tasks when it matters.

mod answers;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod flood_tests;
mod funding;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod hostile_tests;
mod mailbox;
mod paid;
mod payee;
mod payee_end;
mod payee_keep;
mod payee_task;
mod payer_task;
mod reservation;
mod signer;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod thief_tests;
mod verify;
mod wallet;
mod wallet_error;
#[cfg(feature = "redb")]
mod wallet_file;
mod wallet_store;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod wallet_tests;
mod windows;

#[cfg(feature = "redb")]
pub(crate) use answers::now_ms;
pub use answers::{ANSWER_AGE, IDEMPOTENCY_KEY, MAX_ANSWER_BYTES, MAX_ANSWERS_BYTES, MAX_KEY_BYTES, MAX_KEYS};
pub(crate) use mailbox::{MAX_MESSAGES, Mailbox, PaymentEvent};
pub use paid::{ClosedChannel, KeptChannel, PaidConnection, PaymentStats};
pub(crate) use payee::OpenRequest;
pub use payee::{Payee, PayeeConfig, PayeeError};
pub use payee_keep::{KeepError, KeptUp};
pub use reservation::{AboveReservation, Reservation};
pub use signer::{Signer, SignerError};
pub(crate) use verify::{CREDENTIAL_RATE, CheckGate};
pub use wallet::{Wallet, WalletConfig, quote};
pub use wallet_error::WalletError;
#[cfg(feature = "redb")]
pub use wallet_file::RedbWallet;
#[cfg(feature = "redb")]
pub(crate) use wallet_file::verify_file;
pub use wallet_store::{
    MAX_RECEIPTS_PER_CHANNEL, MemoryWallet, StoredReceipt, WalletChannel, WalletPhase, WalletStore, WalletStoreError,
    check_save,
};

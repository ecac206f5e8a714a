//! Paid connections: what runs beside the session of a connection that is a payment channel.
//!
//! A [`Payee`] sells a service: it quotes signed terms, checks credentials, accepts vouchers, leases and settles. A
//! [`Wallet`] buys: it deposits, meters what arrives by itself, and signs ahead within its bounds. Neither stands on a
//! frame's path: the session holds an integer credit, or a count, and tells these tasks when it matters.

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod flood_tests;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod hostile_tests;
mod mailbox;
mod paid;
mod payee;
mod payee_task;
mod verify;
mod wallet;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod wallet_tests;
mod windows;

pub(crate) use mailbox::{Mailbox, PaymentEvent};
pub use paid::{ClosedChannel, PaidConnection, PaymentStats};
pub(crate) use payee::OpenRequest;
pub use payee::{Payee, PayeeConfig, PayeeError};
pub(crate) use verify::{CREDENTIAL_RATE, CheckGate};
pub use wallet::{Wallet, WalletConfig, WalletError};

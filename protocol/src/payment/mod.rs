//! The money: amounts, vouchers and what is signed around them, metering, and the payment-channel machine.

mod amount;
mod bytes;
pub mod channel;
mod metering;
mod payer;

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::arithmetic_side_effects)]
mod two_sided_tests;

pub use amount::{Amount, ParseAmountError};
pub use bytes::{Address, ChannelId, Hash, Hex, ParseHexError, SignatureBytes, parse_hex};
pub use channel::{NeedVoucher, PaymentChannel, SpendGate};
pub use metering::{CallMeter, ParseRateError, Price, Rate, Usage};
pub use payer::{
    Decline, DeclineReason, NeedAnswer, PayerBook, PayerLimits, PayerSnapshot, ResumeRefusal, SignError,
    UnworkableTerms,
};

//! The money: amounts, vouchers and what is signed around them, metering, and the payment-channel machine.

mod amount;
mod bytes;
mod metering;

pub use amount::{Amount, ParseAmountError};
pub use bytes::{Address, ChannelId, Hash, Hex, ParseHexError, parse_hex};
pub use metering::{CallMeter, ParseRateError, Price, Rate, Usage};

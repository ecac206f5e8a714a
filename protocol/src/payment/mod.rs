//! The money: amounts, vouchers and what is signed around them, metering, and the payment-channel machine.

mod amount;
mod bytes;
mod challenge;
pub mod channel;
mod credential;
mod descriptor;
pub mod eip712;
mod key;
pub mod ledger_messages;
mod message;
mod metering;
mod payer;
mod price_text;
mod receipt;
mod record;
mod signature;
mod signed;
mod signing_request;
mod terms;
mod voucher;

pub use amount::{Amount, ParseAmountError};
pub use bytes::{Address, ChannelId, Hash, Hex, ParseHexError, parse_hex};
pub use challenge::{Challenge, ChallengeError, ChallengeKey, UsedNonces};
pub use channel::{NeedVoucher, PaymentChannel};
pub use credential::{Credential, CredentialDraft, CredentialError, MAX_CREDENTIAL_BYTES, Place, SignedAmount};
pub use descriptor::{ChannelDescriptor, DescriptorError};
pub use eip712::keccak256;
pub use key::{SecretKey, SecretKeyError};
pub use ledger_messages::LedgerIdentity;
pub use message::{MAX_PAYMENT_MESSAGE_BYTES, PaymentMessage, Quote};
pub use metering::{CallMeter, IDEMPOTENCY_KEY, Price, Rate, Usage};
pub use payer::{
    Decline, DeclineReason, NeedAnswer, PayerBook, PayerLimits, PayerSnapshot, ResumeRefusal, SignError,
    UnworkableTerms,
};
pub use price_text::{ParsePriceError, ParseRateError, parse_bytes};
pub use receipt::{MAX_RECEIPT_BYTES, Receipt, ReceiptError, ReceiptStatus, SignedReceipt};
pub use record::{RecordError, VoucherRecord, VoucherVerdict, check_record};
pub use signature::{ParseSignatureError, Signature, SignatureError, Verifier};
pub use signed::CodecError;
pub use signing_request::{LedgerOrder, SigningRequest};
pub use terms::{
    Binding, Inconsistency, MAX_LEDGER_URL_BYTES, MAX_NAME_BYTES, MAX_TERMS_BYTES, MethodPrice, SignedTerms, Terms,
    TermsError,
};
pub use voucher::{
    CloseAuthorization, CloseVoucher, ParseVoucherProtocolError, Voucher, VoucherDomain, VoucherError, VoucherProtocol,
};

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::arithmetic_side_effects, clippy::indexing_slicing)]
mod tests;
#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::arithmetic_side_effects)]
mod two_sided_tests;

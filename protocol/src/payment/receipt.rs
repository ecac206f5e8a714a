//! Receipts: the payee's account of a channel, numbered, and signed where they are evidence.
//!
//! A signed receipt covers the channel's id beside the receipt: signed by EIP-712 in the domain (`Tollway`, `1`, chain id,
//! escrow) as `Receipt(bytes32 hash)`, hash = keccak256 of the postcard bytes of (channel id, receipt). Without the id
//! a receipt of one channel could be shown as that of another.

use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use super::eip712::{Domain, StructHasher, keccak256};
use super::signed::{self, CodecError};
use super::{Amount, ChannelDescriptor, ChannelId, Hash, SecretKey, Signature, SignatureError, Verifier};

static RECEIPT_TYPE: LazyLock<Hash> = LazyLock::new(|| keccak256(b"Receipt(bytes32 hash)"));

/// The largest encoding of a signed receipt's content, in bytes; a full one has some 200.
pub const MAX_RECEIPT_BYTES: usize = 512;

/// What a receipt says of the channel's life. A status that is not in the list does not decode: it is never taken for
/// success.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ReceiptStatus {
    /// The channel serves.
    Open,
    /// The channel serves, and this receipt is signed as evidence.
    Checkpoint,
    /// The channel is closing; the settlement is on its way.
    Closing,
    /// Closed at the amount of the payer's close voucher.
    Closed,
    /// Closed without the payer, at a voucher that the payee had.
    ClosedForced,
    /// The books differ by more than the in-flight cap, or the close voucher is below what was spent.
    Disputed,
}

/// The state of a channel as the payee has it. Amounts are cumulative base units.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// Rises with each receipt of a channel; an older one is never taken for news.
    pub sequence: u64,
    /// When it was made: milliseconds since 1970, by the payee's clock.
    pub time_ms: u64,
    /// The highest verified voucher.
    pub accepted: Amount,
    /// The price of what was handed to the transport.
    pub spent: Amount,
    /// Metered bytes.
    pub units: u64,
    /// What the escrow has paid out.
    pub settled: Amount,
    /// What the payee says of the channel's life.
    pub status: ReceiptStatus,
    /// The settlement that this receipt names: a transaction, or the ledger's reference.
    pub reference: Option<Hash>,
}

/// Why a receipt is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReceiptError {
    /// The signature is not the payee's.
    #[error("receipt: {0}")]
    Signature(#[from] SignatureError),
    /// The bytes are too long, or not the one encoding of a receipt.
    #[error("receipt: {0}")]
    Codec(#[from] CodecError),
    /// The receipt is of another channel of this payee.
    #[error("the receipt is of channel {found}, not {expected}")]
    OtherChannel {
        /// The channel that was asked for.
        expected: ChannelId,
        /// The channel that the receipt names.
        found: ChannelId,
    },
    /// The key that signs is not the payee's.
    #[error("the key is not that of the channel's payee")]
    WrongKey,
}

/// A receipt as it travels signed: opaque bytes and the payee's signature.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedReceipt {
    /// The postcard bytes of (channel id, [`Receipt`]).
    pub bytes: Vec<u8>,
    /// Of the payee.
    pub signature: Signature,
}

impl SignedReceipt {
    /// Signs a receipt with the payee's key.
    ///
    /// # Errors
    /// When `key` is not the payee's.
    pub fn sign(receipt: &Receipt, channel: &ChannelDescriptor, key: &SecretKey) -> Result<Self, ReceiptError> {
        if key.address() != channel.payee {
            return Err(ReceiptError::WrongKey);
        }
        let bytes = signed::encode(&(channel.id(), receipt), MAX_RECEIPT_BYTES)?;
        let signature = key.sign_digest(&digest(&bytes, channel));
        Ok(SignedReceipt { bytes, signature })
    }

    /// Verifies that the channel's payee signed this receipt for this channel, then decodes it.
    ///
    /// # Errors
    /// Everything that [`ReceiptError`] lists; nothing is decoded before the signature is verified.
    pub fn verify(&self, channel: &ChannelDescriptor) -> Result<Receipt, ReceiptError> {
        if self.bytes.len() > MAX_RECEIPT_BYTES {
            return Err(CodecError::TooLong { found: self.bytes.len(), max: MAX_RECEIPT_BYTES }.into());
        }
        Verifier::new(channel.payee).verify(&digest(&self.bytes, channel), &self.signature)?;
        let (found, receipt) = signed::decode::<(ChannelId, Receipt)>(&self.bytes, MAX_RECEIPT_BYTES)?;
        let expected = channel.id();
        if found != expected {
            return Err(ReceiptError::OtherChannel { expected, found });
        }
        Ok(receipt)
    }
}

fn digest(bytes: &[u8], channel: &ChannelDescriptor) -> Hash {
    let struct_hash = StructHasher::new(&RECEIPT_TYPE).word(&keccak256(bytes)).finish();
    Domain::tollway(channel.chain_id, channel.escrow).separator().digest(&struct_hash)
}

//! The messages of a payment channel, as the payloads of Payment frames.

use serde::{Deserialize, Serialize};

use super::signed::CodecError;
use super::{Amount, Challenge, MAX_TERMS_BYTES, Signature, SignedReceipt, SignedTerms};

/// Most bytes of one payment message: the largest, a signed receipt, is far below.
pub const MAX_PAYMENT_MESSAGE_BYTES: usize = 4 * 1024;

/// A message between payer and payee. SPEC.md, "Payment messages", has the layout.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum PaymentMessage {
    /// Payer: authorises up to `amount`, at any time.
    Voucher {
        /// The cumulative amount, in base units.
        amount: Amount,
        /// Over the voucher of this channel.
        signature: Signature,
        /// The price of all that the payer has received, in base units.
        received: Amount,
    },
    /// Payee: delivery waits for a voucher of at least `required`. Sent once for each exhaustion.
    NeedVoucher {
        /// The least amount that lets delivery go on, in base units.
        required: Amount,
        /// The highest voucher that counts, in base units.
        accepted: Amount,
        /// The price of all that was handed over, in base units.
        spent: Amount,
        /// The deposit as the payee knows it, in base units.
        deposit: Amount,
    },
    /// Payer: there will be no such voucher. Final.
    Decline {
        /// A sentence for people.
        reason: String,
    },
    /// Payer: the deposit was raised; look at the escrow.
    TopUp {
        /// What the escrow needs to be shown; empty for the local ledger.
        proof: Vec<u8>,
    },
    /// Payer: close the channel. All calls have ended.
    Close {
        /// What the payer received, in base units, or what the escrow has settled if that is more.
        amount: Amount,
        /// Over the close voucher of this channel.
        signature: Signature,
        /// As in `Voucher`.
        received: Amount,
    },
    /// Payee: how the channel stands. Signed at checkpoints and in the end.
    Receipt(SignedReceipt),
    /// Payee: a voucher or close was refused, and had no effect.
    Refused {
        /// A sentence for people.
        reason: String,
    },
    /// Payee: the close states less than was handed over. Nothing more is served.
    Disputed {
        /// What the payer stated, in base units.
        claimed: Amount,
        /// The price of all that was handed over, in base units.
        spent: Amount,
    },
}

impl PaymentMessage {
    /// The message as it is framed.
    pub fn encode(&self) -> Vec<u8> {
        // Serialising can only fail in a `Serialize` that returns an error; these are all derived or infallible.
        postcard::to_allocvec(self).expect("payment messages always encode")
    }

    /// Reads a message, all of it.
    ///
    /// # Errors
    /// When it is too long, malformed, or followed by something.
    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        super::signed::decode(bytes, MAX_PAYMENT_MESSAGE_BYTES)
    }
}

/// The payload of a Reject that asks for payment: the signed terms and a one-time challenge for the credential.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Quote {
    /// The payee's terms for the service.
    pub terms: SignedTerms,
    /// To be answered in the credential of the next Open. It carries the hash of the terms.
    pub challenge: Challenge,
}

impl Quote {
    /// The quote as it is framed.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_allocvec(self).expect("quotes always encode")
    }

    /// Reads a quote, all of it. Nothing is verified yet.
    ///
    /// # Errors
    /// When it is too long, malformed, or followed by something.
    pub fn decode(bytes: &[u8]) -> Result<Self, CodecError> {
        // The challenge, the signature and the domain fit the allowance many times.
        super::signed::decode(bytes, MAX_TERMS_BYTES.saturating_add(1024))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_comes_back_and_nothing_may_follow_it() {
        let message = PaymentMessage::NeedVoucher {
            required: Amount::MAX,
            accepted: Amount::new(1),
            spent: Amount::ZERO,
            deposit: Amount::new(u128::from(u64::MAX)),
        };
        let mut bytes = message.encode();
        assert_eq!(PaymentMessage::decode(&bytes), Ok(message));
        bytes.push(0);
        assert!(PaymentMessage::decode(&bytes).is_err());
        assert!(PaymentMessage::decode(&bytes[..5]).is_err());
        assert!(PaymentMessage::decode(&[200]).is_err());
    }
}

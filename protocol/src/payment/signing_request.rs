//! What a payer's signer is asked to sign, with all that it needs to decide whether it should.
//!
//! A signer that only saw digests could enforce nothing. A [`SigningRequest`] is the message itself, in a form that can be
//! sent to another process or another machine: who is paid, on which escrow, and how much in all. The digest is computed
//! from it, by whoever signs.

use serde::{Deserialize, Serialize};

use super::credential::Possession;
use super::ledger_messages::{LedgerMessage, OpenChannel, RequestClose, TopUp, Withdraw};
use super::{
    Address, Amount, Challenge, ChannelDescriptor, Hash, LedgerIdentity, Place, SecretKey, Signature, VoucherError,
};

/// Something that a payer's key signs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum SigningRequest {
    /// A voucher: the payee may claim up to `amount` base units of this channel in all. The channel's signer signs.
    Voucher {
        /// The channel: payer, payee, token, escrow.
        channel: ChannelDescriptor,
        /// The cumulative amount in base units.
        amount: Amount,
    },
    /// The consent to close a v2 channel at `amount` base units, by the channel's signer.
    CloseAuthorization {
        /// The channel.
        channel: ChannelDescriptor,
        /// The amount in base units.
        amount: Amount,
    },
    /// That the channel's signer itself opens a connection now. It moves no money.
    Possession {
        /// The payee's one-time challenge.
        challenge: Challenge,
        /// The channel.
        channel: ChannelDescriptor,
        /// The owner epoch.
        epoch: u64,
        /// What was received so far, in base units.
        received: Amount,
        /// The service.
        service: String,
        /// The TLS exporter, or zero.
        exporter: Hash,
    },
    /// An order to the ledger that holds the deposits. The payer signs.
    Order {
        /// The ledger.
        ledger: LedgerIdentity,
        /// The order.
        order: LedgerOrder,
    },
}

/// An order of a payer to a ledger.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum LedgerOrder {
    /// Deposits and opens a channel.
    OpenChannel(OpenChannel),
    /// Raises a deposit.
    TopUp(TopUp),
    /// Announces a withdrawal.
    RequestClose(RequestClose),
    /// Takes back what was not claimed.
    Withdraw(Withdraw),
}

impl From<OpenChannel> for LedgerOrder {
    fn from(order: OpenChannel) -> Self {
        LedgerOrder::OpenChannel(order)
    }
}

impl From<TopUp> for LedgerOrder {
    fn from(order: TopUp) -> Self {
        LedgerOrder::TopUp(order)
    }
}

impl From<RequestClose> for LedgerOrder {
    fn from(order: RequestClose) -> Self {
        LedgerOrder::RequestClose(order)
    }
}

impl From<Withdraw> for LedgerOrder {
    fn from(order: Withdraw) -> Self {
        LedgerOrder::Withdraw(order)
    }
}

impl SigningRequest {
    /// What is signed.
    ///
    /// # Errors
    /// When an amount is above what the channel's voucher protocol can state, or the protocol has no such message.
    pub fn digest(&self) -> Result<Hash, VoucherError> {
        match self {
            SigningRequest::Voucher { channel, amount } => {
                channel.voucher_domain().voucher_digest(&channel.id(), *amount)
            }
            SigningRequest::CloseAuthorization { channel, amount } => {
                channel.voucher_domain().close_digest(&channel.id(), *amount)
            }
            SigningRequest::Possession { challenge, channel, epoch, received, service, exporter } => {
                let place = Place { service, exporter: *exporter };
                Ok(Possession { challenge, descriptor: channel, epoch: *epoch, received: *received }.digest(place))
            }
            SigningRequest::Order { ledger, order } => Ok(match order {
                LedgerOrder::OpenChannel(order) => order.digest(ledger),
                LedgerOrder::TopUp(order) => order.digest(ledger),
                LedgerOrder::RequestClose(order) => order.digest(ledger),
                LedgerOrder::Withdraw(order) => order.digest(ledger),
            }),
        }
    }

    /// Who is to sign, where the request says it: all but orders about a channel that is known by its id alone.
    pub fn signer(&self) -> Option<Address> {
        match self {
            SigningRequest::Voucher { channel, .. }
            | SigningRequest::CloseAuthorization { channel, .. }
            | SigningRequest::Possession { channel, .. } => Some(channel.signer()),
            SigningRequest::Order { order: LedgerOrder::OpenChannel(order), .. } => Some(order.payer),
            SigningRequest::Order { .. } => None,
        }
    }

    /// Signs it with a key that is at hand.
    ///
    /// # Errors
    /// As [`SigningRequest::digest`].
    pub fn sign(&self, key: &SecretKey) -> Result<Signature, VoucherError> {
        Ok(key.sign_digest(&self.digest()?))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::Voucher;
    use super::super::tests::{descriptor, key};
    use super::*;

    #[test]
    fn a_request_is_signed_as_the_message_itself_and_survives_a_wire() {
        let channel = descriptor();
        let amount = Amount::new(77);
        let request = SigningRequest::Voucher { channel: channel.clone(), amount };
        let bytes = postcard::to_stdvec(&request).unwrap();
        let request: SigningRequest = postcard::from_bytes(&bytes).unwrap();
        let direct = Voucher::sign(&channel.voucher_domain(), &key(1), channel.id(), amount).unwrap();
        assert_eq!(request.sign(&key(1)).unwrap(), direct.signature);
        assert_eq!(request.signer(), Some(channel.signer()));
        let close = SigningRequest::CloseAuthorization { channel, amount };
        assert!(close.sign(&key(1)).is_err(), "v1 has no such message");
    }
}

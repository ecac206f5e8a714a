//! Vouchers: signed, cumulative promises of the payer to the payee, byte for byte those of the session intent in the
//! public drafts draft-tempo-session-00 (v1) and draft-evm-session-00 (v2).

use core::fmt;
use core::str::FromStr;
use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use super::eip712::{Domain, DomainSeparator, StructHasher, keccak256};
use super::{Address, Amount, ChannelId, Hash, SecretKey, Signature, SignatureError, SignedAmount, Verifier};

static VOUCHER_V1: LazyLock<Hash> = LazyLock::new(|| keccak256(b"Voucher(bytes32 channelId,uint128 cumulativeAmount)"));
static VOUCHER_V2: LazyLock<Hash> = LazyLock::new(|| keccak256(b"Voucher(bytes32 channelId,uint96 cumulativeAmount)"));
static CLOSE_V2: LazyLock<Hash> =
    LazyLock::new(|| keccak256(b"CloseAuthorization(bytes32 channelId,uint96 cumulativeAmount)"));

/// Which escrow contract a channel lives in, and so which vouchers it takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum VoucherProtocol {
    /// `Tempo Stream Channel`: amounts of 128 bits. The local ledger takes these too.
    V1,
    /// `TIP20 Channel Reserve`: amounts of 96 bits, an operator, and a close that the payer authorises.
    V2,
}

impl VoucherProtocol {
    /// The EIP-712 domain's name.
    pub const fn domain_name(self) -> &'static str {
        match self {
            VoucherProtocol::V1 => "Tempo Stream Channel",
            VoucherProtocol::V2 => "TIP20 Channel Reserve",
        }
    }

    /// The largest amount that a voucher can state.
    pub const fn max_amount(self) -> Amount {
        match self {
            VoucherProtocol::V1 => Amount::MAX,
            VoucherProtocol::V2 => Amount::MAX_U96,
        }
    }
}

impl fmt::Display for VoucherProtocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            VoucherProtocol::V1 => "v1",
            VoucherProtocol::V2 => "v2",
        })
    }
}

/// A text that is not `v1` or `v2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a voucher protocol is v1 or v2")]
pub struct ParseVoucherProtocolError;

impl FromStr for VoucherProtocol {
    type Err = ParseVoucherProtocolError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "v1" => Ok(VoucherProtocol::V1),
            "v2" => Ok(VoucherProtocol::V2),
            _ => Err(ParseVoucherProtocolError),
        }
    }
}

/// Why a voucher, or a close authorisation, is not one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum VoucherError {
    /// The amount does not fit the protocol's type.
    #[error("the amount {amount} is above the {max} that a {protocol} voucher can state")]
    AmountTooLarge {
        /// The amount in base units.
        amount: Amount,
        /// The largest amount in base units.
        max: Amount,
        /// The protocol that limits it.
        protocol: VoucherProtocol,
    },
    /// v1 closes by the voucher itself.
    #[error("{0} has no close authorization")]
    NoCloseAuthorization(VoucherProtocol),
    /// v2 closes by a voucher and an authorisation.
    #[error("a {0} close needs a close authorization")]
    CloseAuthorizationMissing(VoucherProtocol),
    /// The signature is malformed or another key's.
    #[error(transparent)]
    Signature(#[from] SignatureError),
}

/// The domain of one escrow's vouchers, with its separator computed: 0.9 µs for each digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VoucherDomain {
    protocol: VoucherProtocol,
    separator: DomainSeparator,
}

impl VoucherDomain {
    /// The vouchers that `escrow` on chain `chain_id` takes.
    pub fn new(protocol: VoucherProtocol, chain_id: u64, escrow: Address) -> Self {
        let domain = Domain { name: protocol.domain_name(), chain_id, verifying_contract: escrow };
        VoucherDomain { protocol, separator: domain.separator() }
    }

    /// The protocol of the vouchers.
    pub const fn protocol(&self) -> VoucherProtocol {
        self.protocol
    }

    /// The domain separator.
    pub const fn separator(&self) -> &DomainSeparator {
        &self.separator
    }

    /// EIP-712's `hashStruct` of the voucher.
    ///
    /// # Errors
    /// When the amount is above the protocol's type.
    pub fn voucher_struct_hash(&self, channel_id: &ChannelId, amount: Amount) -> Result<Hash, VoucherError> {
        match self.protocol {
            VoucherProtocol::V1 => self.struct_hash(&VOUCHER_V1, channel_id, amount),
            VoucherProtocol::V2 => self.struct_hash(&VOUCHER_V2, channel_id, amount),
        }
    }

    /// What is signed for a voucher.
    ///
    /// # Errors
    /// When the amount is above the protocol's type.
    pub fn voucher_digest(&self, channel_id: &ChannelId, amount: Amount) -> Result<Hash, VoucherError> {
        Ok(self.separator.digest(&self.voucher_struct_hash(channel_id, amount)?))
    }

    /// What is signed to authorise a close, in v2.
    ///
    /// # Errors
    /// In v1, and when the amount is above the protocol's type.
    pub fn close_digest(&self, channel_id: &ChannelId, amount: Amount) -> Result<Hash, VoucherError> {
        match self.protocol {
            VoucherProtocol::V1 => Err(VoucherError::NoCloseAuthorization(self.protocol)),
            VoucherProtocol::V2 => Ok(self.separator.digest(&self.struct_hash(&CLOSE_V2, channel_id, amount)?)),
        }
    }

    fn struct_hash(&self, type_hash: &Hash, channel_id: &ChannelId, amount: Amount) -> Result<Hash, VoucherError> {
        let max = self.protocol.max_amount();
        if amount > max {
            return Err(VoucherError::AmountTooLarge { amount, max, protocol: self.protocol });
        }
        Ok(StructHasher::new(type_hash).word(&Hash(channel_id.0)).u128(amount.units()).finish())
    }
}

/// A voucher: on `channel_id`, `amount` in all is the payee's.
///
/// Decoding one says that its signature has the canonical form and nothing else; only [`Voucher::verify`] says whose it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Voucher {
    /// The channel.
    pub channel_id: ChannelId,
    /// The cumulative amount in base units.
    pub amount: Amount,
    /// Of the channel's signer.
    pub signature: Signature,
}

impl Voucher {
    /// Signs a voucher.
    ///
    /// # Errors
    /// When the amount is above the protocol's type.
    pub fn sign(
        domain: &VoucherDomain,
        key: &SecretKey,
        channel_id: ChannelId,
        amount: Amount,
    ) -> Result<Self, VoucherError> {
        let signature = key.sign_digest(&domain.voucher_digest(&channel_id, amount)?);
        Ok(Voucher { channel_id, amount, signature })
    }

    /// Verifies that the verifier's signer signed this voucher for this domain.
    ///
    /// # Errors
    /// When the amount is above the protocol's type, or the signature is not the signer's.
    pub fn verify(&self, domain: &VoucherDomain, verifier: &Verifier) -> Result<(), VoucherError> {
        let digest = domain.voucher_digest(&self.channel_id, self.amount)?;
        Ok(verifier.verify(&digest, &self.signature)?)
    }
}

/// The payer's consent to close a v2 channel at `amount`; the v2 escrow wants it beside the voucher.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloseAuthorization {
    /// The channel.
    pub channel_id: ChannelId,
    /// The cumulative amount, in base units, at which the channel may close.
    pub amount: Amount,
    /// Of the channel's signer.
    pub signature: Signature,
}

impl CloseAuthorization {
    /// Signs a close authorisation.
    ///
    /// # Errors
    /// In v1, and when the amount is above the protocol's type.
    pub fn sign(
        domain: &VoucherDomain,
        key: &SecretKey,
        channel_id: ChannelId,
        amount: Amount,
    ) -> Result<Self, VoucherError> {
        let signature = key.sign_digest(&domain.close_digest(&channel_id, amount)?);
        Ok(CloseAuthorization { channel_id, amount, signature })
    }

    /// Verifies that the verifier's signer authorised this close.
    ///
    /// # Errors
    /// In v1, when the amount is above the protocol's type, or when the signature is not the signer's.
    pub fn verify(&self, domain: &VoucherDomain, verifier: &Verifier) -> Result<(), VoucherError> {
        let digest = domain.close_digest(&self.channel_id, self.amount)?;
        Ok(verifier.verify(&digest, &self.signature)?)
    }
}

/// What the payer lets the payee close by: a voucher of the closing amount and, in v2, its consent to close at it. The
/// channel is said elsewhere.
///
/// Without the payer there is only a stored voucher, which becomes one without consent: v1's escrow closes by it, v2's
/// settles by it and stays open until the payer withdraws.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloseVoucher {
    /// The cumulative amount, in base units, at which the channel closes.
    pub amount: Amount,
    /// Of the channel's signer, over the voucher.
    pub signature: Signature,
    /// Of the channel's signer, over the [`CloseAuthorization`]; v2 only.
    pub authorization: Option<Signature>,
}

impl CloseVoucher {
    /// Signs what the protocol's escrow wants for a close.
    ///
    /// # Errors
    /// When the amount is above the protocol's type.
    pub fn sign(
        domain: &VoucherDomain,
        key: &SecretKey,
        channel_id: ChannelId,
        amount: Amount,
    ) -> Result<Self, VoucherError> {
        let authorization = match domain.protocol() {
            VoucherProtocol::V1 => None,
            VoucherProtocol::V2 => Some(CloseAuthorization::sign(domain, key, channel_id, amount)?.signature),
        };
        let signature = Voucher::sign(domain, key, channel_id, amount)?.signature;
        Ok(CloseVoucher { amount, signature, authorization })
    }

    /// The voucher in it.
    pub const fn signed_amount(&self) -> SignedAmount {
        SignedAmount { amount: self.amount, signature: self.signature }
    }

    /// Verifies that the verifier's signer signed the voucher, and in v2 the consent, for this channel.
    ///
    /// # Errors
    /// When the amount is above the protocol's type, a signature is not the signer's, or the consent is missing in v2
    /// or there in v1.
    pub fn verify(
        &self,
        channel_id: ChannelId,
        domain: &VoucherDomain,
        verifier: &Verifier,
    ) -> Result<(), VoucherError> {
        match (domain.protocol(), self.authorization) {
            (VoucherProtocol::V1, None) => {}
            (VoucherProtocol::V2, Some(signature)) => {
                CloseAuthorization { channel_id, amount: self.amount, signature }.verify(domain, verifier)?;
            }
            (protocol @ VoucherProtocol::V1, Some(_)) => return Err(VoucherError::NoCloseAuthorization(protocol)),
            (protocol @ VoucherProtocol::V2, None) => return Err(VoucherError::CloseAuthorizationMissing(protocol)),
        }
        self.signed_amount().on(channel_id).verify(domain, verifier)
    }
}

impl From<SignedAmount> for CloseVoucher {
    fn from(SignedAmount { amount, signature }: SignedAmount) -> Self {
        CloseVoucher { amount, signature, authorization: None }
    }
}

/// The type hashes of v1 vouchers, v2 vouchers and v2 close authorisations, as the vectors state them.
#[cfg(test)]
pub(super) fn type_hashes() -> [Hash; 3] {
    [*VOUCHER_V1, *VOUCHER_V2, *CLOSE_V2]
}

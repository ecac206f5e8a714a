//! The credential: what a payer opens a priced connection with.
//!
//! It names the channel by its descriptor and proves that the sender holds the channel's key *now*: the possession
//! signature covers a one-time challenge, the channel, the service, the owner epoch, what was received, and the TLS
//! exporter where there is one. A voucher that somebody merely saw opens nothing.

use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use super::eip712::{Domain, StructHasher, keccak256};
use super::signed::{self, CodecError};
use super::{
    Amount, Challenge, ChannelDescriptor, ChannelId, DescriptorError, Hash, SecretKey, Signature, SignatureError,
    SigningRequest, Verifier, Voucher, VoucherError,
};

static POSSESSION_TYPE: LazyLock<Hash> = LazyLock::new(|| {
    keccak256(
        b"Possession(bytes32 challengeHash,bytes32 channelId,string service,uint64 epoch,uint128 received,bytes32 exporter)",
    )
});

/// The largest encoding of a credential, in bytes: it is read before anything about its sender is known.
pub const MAX_CREDENTIAL_BYTES: usize = 16 * 1024;

/// A cumulative amount with the channel's signature: a voucher whose channel is said elsewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedAmount {
    /// In base units.
    pub amount: Amount,
    /// Of the channel's signer.
    pub signature: Signature,
}

impl SignedAmount {
    /// The voucher for this channel, still unverified.
    pub const fn on(self, channel_id: ChannelId) -> Voucher {
        Voucher { channel_id, amount: self.amount, signature: self.signature }
    }
}

impl From<Voucher> for SignedAmount {
    fn from(voucher: Voucher) -> Self {
        SignedAmount { amount: voucher.amount, signature: voucher.signature }
    }
}

/// Why a credential is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CredentialError {
    /// The bytes are too long, or not the one encoding of a credential.
    #[error("credential: {0}")]
    Codec(#[from] CodecError),
    /// No channel can have this descriptor.
    #[error("credential: {0}")]
    Descriptor(#[from] DescriptorError),
    /// The possession signature is not of the channel's signer.
    #[error("possession: {0}")]
    Possession(#[source] SignatureError),
    /// The voucher is not one of this channel.
    #[error("voucher: {0}")]
    Voucher(#[from] VoucherError),
    /// The key that signs is not the channel's.
    #[error("the channel is signed for by another key")]
    WrongKey,
}

/// Where a possession signature counts, besides the channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place<'a> {
    /// The service that is opened.
    pub service: &'a str,
    /// The TLS exporter of the session, or zero when the terms bind to none.
    pub exporter: Hash,
}

/// What a payer puts into a credential before it signs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CredentialDraft {
    /// The payee's challenge.
    pub challenge: Challenge,
    /// The channel.
    pub descriptor: ChannelDescriptor,
    /// The owner epoch: 1 at first, one more with each open, durable before it is sent.
    pub epoch: u64,
    /// What the payer has received so far on this channel, in base units.
    pub received: Amount,
    /// What proves the deposit to the payee, in the escrow's own format; empty for the local ledger.
    pub proof: Vec<u8>,
    /// The highest voucher so far, when there is one.
    pub voucher: Option<SignedAmount>,
}

impl CredentialDraft {
    /// Signs possession with the channel's key.
    ///
    /// # Errors
    /// When the descriptor is none, or `key` is not the channel's signer.
    pub fn sign(self, key: &SecretKey, place: Place<'_>) -> Result<Credential, CredentialError> {
        self.descriptor.check()?;
        if key.address() != self.descriptor.signer() {
            return Err(CredentialError::WrongKey);
        }
        let possession = key.sign_digest(&self.possession_digest(place));
        Ok(self.with(possession))
    }

    /// What the channel's signer is asked to sign, where the key is not at hand.
    ///
    /// # Errors
    /// When the descriptor is none.
    pub fn request(&self, place: Place<'_>) -> Result<SigningRequest, CredentialError> {
        self.descriptor.check()?;
        Ok(SigningRequest::Possession {
            challenge: self.challenge,
            channel: self.descriptor.clone(),
            epoch: self.epoch,
            received: self.received,
            service: place.service.to_owned(),
            exporter: place.exporter,
        })
    }

    /// The credential with the signature that [`request`](Self::request) asks for.
    pub fn with(self, possession: Signature) -> Credential {
        let CredentialDraft { challenge, descriptor, epoch, received, proof, voucher } = self;
        Credential { challenge, descriptor, epoch, received, proof, voucher, possession }
    }

    fn possession_digest(&self, place: Place<'_>) -> Hash {
        let possession = Possession {
            challenge: &self.challenge,
            descriptor: &self.descriptor,
            epoch: self.epoch,
            received: self.received,
        };
        possession.digest(place)
    }
}

/// A signed credential.
///
/// Possession covers neither `proof` nor `voucher`: the escrow verifies the first, and the second has a signature of its
/// own. Who strips them in transit delays an opening and gains nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credential {
    /// The payee's challenge.
    pub challenge: Challenge,
    /// The channel.
    pub descriptor: ChannelDescriptor,
    /// The owner epoch.
    pub epoch: u64,
    /// What the payer has received so far on this channel, in base units.
    pub received: Amount,
    /// What proves the deposit, in the escrow's own format.
    pub proof: Vec<u8>,
    /// The highest voucher so far; one at or below the accepted amount has no effect and is no error.
    pub voucher: Option<SignedAmount>,
    /// Of the channel's signer.
    pub possession: Signature,
}

impl Credential {
    /// The bytes that travel.
    ///
    /// # Errors
    /// When they are above [`MAX_CREDENTIAL_BYTES`], which only a huge proof can do.
    pub fn encode(&self) -> Result<Vec<u8>, CredentialError> {
        Ok(signed::encode(self, MAX_CREDENTIAL_BYTES)?)
    }

    /// Decodes strictly. Nothing is verified yet.
    ///
    /// # Errors
    /// When the bytes are too long, not canonical, or not a credential.
    pub fn decode(bytes: &[u8]) -> Result<Self, CredentialError> {
        Ok(signed::decode(bytes, MAX_CREDENTIAL_BYTES)?)
    }

    /// Verifies the descriptor and the possession signature, and returns the channel's id, computed.
    ///
    /// `verifier` is the channel's when it is known, so that its key is cached; otherwise a new one for
    /// [`ChannelDescriptor::signer`]. The challenge itself is checked before, by [`super::ChallengeKey::verify`].
    ///
    /// # Errors
    /// When the descriptor is none, or the signature is not of the channel's signer for this very place.
    pub fn verify_possession(&self, place: Place<'_>, verifier: &Verifier) -> Result<ChannelId, CredentialError> {
        self.descriptor.check()?;
        let expected = self.descriptor.signer();
        if verifier.signer() != expected {
            return Err(CredentialError::Possession(SignatureError::WrongSigner { expected }));
        }
        let possession = Possession {
            challenge: &self.challenge,
            descriptor: &self.descriptor,
            epoch: self.epoch,
            received: self.received,
        };
        verifier.verify(&possession.digest(place), &self.possession).map_err(CredentialError::Possession)?;
        Ok(self.descriptor.id())
    }

    /// Verifies the voucher, when there is one.
    ///
    /// # Errors
    /// When it is not the channel's, or its amount is above the protocol's type.
    pub fn verify_voucher(&self, verifier: &Verifier) -> Result<Option<Voucher>, CredentialError> {
        let Some(signed) = self.voucher else { return Ok(None) };
        let expected = self.descriptor.signer();
        if verifier.signer() != expected {
            return Err(VoucherError::from(SignatureError::WrongSigner { expected }).into());
        }
        let voucher = signed.on(self.descriptor.id());
        voucher.verify(&self.descriptor.voucher_domain(), verifier)?;
        Ok(Some(voucher))
    }
}

/// The struct `Possession` of EIP-712.
pub(super) struct Possession<'a> {
    pub(super) challenge: &'a Challenge,
    pub(super) descriptor: &'a ChannelDescriptor,
    pub(super) epoch: u64,
    pub(super) received: Amount,
}

impl Possession<'_> {
    pub(super) fn digest(&self, place: Place<'_>) -> Hash {
        let struct_hash = StructHasher::new(&POSSESSION_TYPE)
            .word(&self.challenge.hash())
            .word(&Hash(self.descriptor.id().0))
            .text(place.service)
            .u64(self.epoch)
            .u128(self.received.units())
            .word(&place.exporter)
            .finish();
        Domain::tollway(self.descriptor.chain_id, self.descriptor.escrow).separator().digest(&struct_hash)
    }
}

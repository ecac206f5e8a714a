//! The channel descriptor: everything that makes a channel's id.
//!
//! A stated id is never believed. Whoever needs one computes it from the descriptor, as the escrow contract does.

use serde::{Deserialize, Serialize};

use super::eip712::StructHasher;
use super::{Address, ChannelId, Hash, VoucherDomain, VoucherProtocol};

/// A descriptor that no channel can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DescriptorError {
    /// A v1 descriptor with `operator` or `expiring_nonce_hash`: they are not part of its id, so one channel would have
    /// many descriptors.
    #[error("a v1 channel has no operator and no expiring nonce")]
    FieldsOfV2,
    /// Nobody deposits.
    #[error("the payer is the zero address")]
    NoPayer,
    /// Nobody is paid.
    #[error("the payee is the zero address")]
    NoPayee,
}

/// What a channel's id is made of.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct ChannelDescriptor {
    /// The voucher protocol of the escrow.
    pub protocol: VoucherProtocol,
    /// Who deposits, and gets back what is left.
    pub payer: Address,
    /// Who is paid.
    pub payee: Address,
    /// v2 only: who may act for the payee; zero for nobody, and in v1.
    pub operator: Address,
    /// The token of the deposit.
    pub token: Address,
    /// Chosen by the payer, so that it can have many channels to one payee.
    pub salt: Hash,
    /// Who signs vouchers; zero for the payer itself.
    pub authorized_signer: Address,
    /// v2 only: the hash that binds the channel to the transaction which opened it; zero in v1.
    pub expiring_nonce_hash: Hash,
    /// Where the deposit lies.
    pub escrow: Address,
    /// The chain of the escrow.
    pub chain_id: u64,
}

impl ChannelDescriptor {
    /// Checks what the id alone does not rule out.
    ///
    /// # Errors
    /// See [`DescriptorError`].
    pub fn check(&self) -> Result<(), DescriptorError> {
        let v2_fields = !self.operator.is_zero() || !self.expiring_nonce_hash.is_zero();
        if self.protocol == VoucherProtocol::V1 && v2_fields {
            return Err(DescriptorError::FieldsOfV2);
        }
        if self.payer.is_zero() {
            return Err(DescriptorError::NoPayer);
        }
        if self.payee.is_zero() {
            return Err(DescriptorError::NoPayee);
        }
        Ok(())
    }

    /// The channel's id, as the escrow contract's `computeChannelId` computes it: keccak256 of
    /// `abi.encode(payer, payee, token, salt, authorizedSigner, escrow, chainId)` in v1, with `operator` after payee
    /// and `expiringNonceHash` after authorizedSigner in v2.
    pub fn id(&self) -> ChannelId {
        let words = StructHasher::untyped().address(&self.payer).address(&self.payee);
        let words = match self.protocol {
            VoucherProtocol::V1 => words,
            VoucherProtocol::V2 => words.address(&self.operator),
        };
        let words = words.address(&self.token).word(&self.salt).address(&self.authorized_signer);
        let words = match self.protocol {
            VoucherProtocol::V1 => words,
            VoucherProtocol::V2 => words.word(&self.expiring_nonce_hash),
        };
        ChannelId(words.address(&self.escrow).u64(self.chain_id).finish().0)
    }

    /// Whose signature makes a voucher of this channel: the delegated signer, or the payer when there is none.
    pub fn signer(&self) -> Address {
        if self.authorized_signer.is_zero() { self.payer } else { self.authorized_signer }
    }

    /// The domain in which this channel's vouchers are signed.
    pub fn voucher_domain(&self) -> VoucherDomain {
        VoucherDomain::new(self.protocol, self.chain_id, self.escrow)
    }
}

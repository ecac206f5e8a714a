//! Secret keys, and the addresses that stand for them.

use core::fmt;

use k256::ecdsa::{SigningKey, VerifyingKey};

use super::eip712::keccak256;
use super::{Address, Hash, Signature};

/// Bytes that are not a secret key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SecretKeyError {
    /// Zero, or not below the order of the group.
    #[error("a secret key is a number from 1 up to the order of secp256k1")]
    OutOfRange,
}

/// A secp256k1 secret key. It is wiped from memory when dropped, and `Debug` shows its address only.
#[derive(Clone)]
pub struct SecretKey {
    key: SigningKey,
    address: Address,
}

impl SecretKey {
    /// The key with these big-endian bytes, which come from a random generator or a key file.
    ///
    /// # Errors
    /// When the number is zero or not below the group order: one in 2^128 for random bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> Result<Self, SecretKeyError> {
        let key = SigningKey::from_bytes(&bytes.into()).map_err(|_| SecretKeyError::OutOfRange)?;
        let address = address_of(key.verifying_key());
        Ok(SecretKey { key, address })
    }

    /// The 32 secret bytes, for a key file. The caller keeps them secret.
    pub fn to_bytes(&self) -> [u8; 32] {
        self.key.to_bytes().into()
    }

    /// The address of this key.
    pub const fn address(&self) -> Address {
        self.address
    }

    /// Signs a digest: RFC 6979 (the same digest always gives the same bytes), low s.
    pub fn sign_digest(&self, digest: &Hash) -> Signature {
        let (signature, recovery) = self.key.sign_prehash_recoverable(digest.as_bytes());
        Signature::from_parts(&signature, recovery)
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SecretKey").field("address", &self.address).finish_non_exhaustive()
    }
}

/// The last 20 bytes of keccak256 over the uncompressed public key without its leading 04.
pub(super) fn address_of(key: &VerifyingKey) -> Address {
    let point = key.to_sec1_point(false);
    let coordinates = point.as_bytes().get(1..).unwrap_or_default();
    let Hash(hash) = keccak256(coordinates);
    Address(hash.last_chunk().copied().unwrap_or_default())
}

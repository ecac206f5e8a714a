//! EIP-712 digests, made by hand: keccak256(0x1901 ‖ domain separator ‖ struct hash).
//!
//! The domain separator of a channel never changes, so it is computed once ([`Domain::separator`]); what is left for each
//! voucher is two short hashes, under a microsecond. Every domain of Tollway has version `"1"` and the four fields name,
//! version, chainId and verifyingContract.

use std::sync::LazyLock;

use sha3::{Digest, Keccak256};

use super::{Address, Hash};

/// The version of every domain that is used here.
const DOMAIN_VERSION: &str = "1";

static DOMAIN_TYPE: LazyLock<Hash> =
    LazyLock::new(|| keccak256(b"EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"));

/// The keccak256 of some bytes (the original Keccak padding, as in Ethereum, not that of SHA-3).
pub fn keccak256(bytes: &[u8]) -> Hash {
    Hash(Keccak256::digest(bytes).into())
}

/// What a signature is for: EIP-712's `EIP712Domain`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Domain {
    /// The name of the protocol that signs.
    pub name: &'static str,
    /// The chain on which the signature counts.
    pub chain_id: u64,
    /// The contract, or the local ledger, for which it counts.
    pub verifying_contract: Address,
}

impl Domain {
    /// The domain of everything that Tollway itself defines: terms, receipts, possession, ledger messages.
    pub const fn tollway(chain_id: u64, escrow: Address) -> Self {
        Domain { name: "Tollway", chain_id, verifying_contract: escrow }
    }

    /// The domain separator, to be kept as long as the domain is in use.
    pub fn separator(&self) -> DomainSeparator {
        DomainSeparator(
            StructHasher::new(&DOMAIN_TYPE)
                .text(self.name)
                .text(DOMAIN_VERSION)
                .u64(self.chain_id)
                .address(&self.verifying_contract)
                .finish(),
        )
    }
}

/// The hash of a [`Domain`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DomainSeparator(Hash);

impl DomainSeparator {
    /// The hash itself.
    pub const fn as_hash(&self) -> &Hash {
        &self.0
    }

    /// What is signed for a struct of this domain.
    pub fn digest(&self, struct_hash: &Hash) -> Hash {
        let mut hasher = Keccak256::new();
        hasher.update([0x19, 0x01]);
        hasher.update(self.0.as_bytes());
        hasher.update(struct_hash.as_bytes());
        Hash(hasher.finalize().into())
    }
}

/// Hashes a struct as EIP-712's `hashStruct` does: the type hash, then one 32-byte word for each field, in order.
///
/// It also serves `abi.encode` of static types, which has the same words without the type hash.
pub struct StructHasher(Keccak256);

impl StructHasher {
    /// Begins a struct whose type string has this hash.
    pub fn new(type_hash: &Hash) -> Self {
        Self::untyped().word(type_hash)
    }

    /// Begins with no type hash: `keccak256(abi.encode(…))`.
    pub fn untyped() -> Self {
        StructHasher(Keccak256::new())
    }

    /// A `bytes32`.
    pub fn word(mut self, word: &Hash) -> Self {
        self.0.update(word.as_bytes());
        self
    }

    /// An `address`, right-aligned.
    pub fn address(mut self, address: &Address) -> Self {
        self.0.update([0; 12]);
        self.0.update(address.as_bytes());
        self
    }

    /// A `uint64` or any wider type, from a `u64`.
    pub fn u64(mut self, value: u64) -> Self {
        self.0.update([0; 24]);
        self.0.update(value.to_be_bytes());
        self
    }

    /// A `uint128` or any wider type; also a narrower one, whose range the caller has checked.
    pub fn u128(mut self, value: u128) -> Self {
        self.0.update([0; 16]);
        self.0.update(value.to_be_bytes());
        self
    }

    /// A `string`: its hash stands for it.
    pub fn text(self, text: &str) -> Self {
        let hash = keccak256(text.as_bytes());
        self.word(&hash)
    }

    /// The hash of all fields.
    pub fn finish(self) -> Hash {
        Hash(self.0.finalize().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keccak_is_the_original_one_of_ethereum() {
        let empty = "0xc5d2460186f7233c927e7db2dcc703c0e500b653ca82273b7bfad8045d85a470";
        assert_eq!(keccak256(b"").to_string(), empty);
    }

    #[test]
    fn each_field_of_a_domain_changes_its_separator() {
        let domain = Domain::tollway(7, Address([1; 20]));
        let others = [
            Domain { name: "Tollwax", ..domain },
            Domain { chain_id: 8, ..domain },
            Domain { verifying_contract: Address([2; 20]), ..domain },
        ];
        for other in others {
            assert_ne!(domain.separator(), other.separator());
        }
    }
}

//! The local ledger's orders, signed by EIP-712 in the domain (`Tollway`, `1`, the ledger's chain id, its escrow address).
//!
//! A ledger's chain id lies in a range that no real chain uses and its escrow address is that of its own key, so an
//! order or a voucher for one ledger is valid nowhere else. Orders that move money in have a nonce and an expiry; those
//! of the payee carry a cumulative amount, which makes repeating them harmless.

use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use super::eip712::{Domain, StructHasher, keccak256};
use super::{
    Address, Amount, ChannelDescriptor, ChannelId, Hash, SecretKey, Signature, SignatureError, VoucherProtocol,
};

/// The first chain id of local ledgers; the range has 2^32 of them.
const RESERVED_CHAINS: u64 = 1 << 63;

/// Whether a chain id lies in the range of local ledgers: 2^63 to 2^63 + 2^32 − 1.
pub const fn is_reserved_chain(chain_id: u64) -> bool {
    chain_id >> 32 == RESERVED_CHAINS >> 32
}

/// What a local ledger is known by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LedgerIdentity {
    /// 2^63 + the low 32 bits of keccak256(the ledger's uncompressed public key, without its leading 04).
    pub chain_id: u64,
    /// The Ethereum address of the ledger's key.
    pub escrow: Address,
}

impl LedgerIdentity {
    /// The identity of the ledger with this key.
    pub fn of(key: &SecretKey) -> Self {
        Self::at(key.address())
    }

    /// The identity of the ledger with this escrow address.
    ///
    /// The address is the low 160 bits of the same hash of which the chain id takes the low 32, so it suffices.
    pub fn at(escrow: Address) -> Self {
        let low = escrow.0.last_chunk().copied().unwrap_or_default();
        LedgerIdentity { chain_id: RESERVED_CHAINS | u64::from(u32::from_be_bytes(low)), escrow }
    }

    /// Whether chain id and escrow belong together: a ledger that claims another's chain id is found out.
    pub fn is_consistent(&self) -> bool {
        *self == Self::at(self.escrow)
    }

    fn domain(&self) -> Domain {
        Domain::tollway(self.chain_id, self.escrow)
    }
}

/// An order that the local ledger takes when the right party has signed it.
pub trait LedgerMessage {
    /// EIP-712's `hashStruct`.
    fn struct_hash(&self) -> Hash;

    /// What is signed.
    fn digest(&self, ledger: &LedgerIdentity) -> Hash {
        ledger.domain().separator().digest(&self.struct_hash())
    }
}

/// An order with its signature.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signed<M> {
    /// The order.
    pub message: M,
    /// Of the party that gives it.
    pub signature: Signature,
}

impl<M: LedgerMessage> Signed<M> {
    /// Signs an order for this ledger.
    pub fn sign(message: M, ledger: &LedgerIdentity, key: &SecretKey) -> Self {
        let signature = key.sign_digest(&message.digest(ledger));
        Signed { message, signature }
    }

    /// Verifies that `signer` gave this order to this ledger.
    ///
    /// # Errors
    /// When another key did, or nobody can have.
    pub fn verify(&self, ledger: &LedgerIdentity, signer: Address) -> Result<(), SignatureError> {
        if self.signature.recover(&self.message.digest(ledger))? != signer {
            return Err(SignatureError::WrongSigner { expected: signer });
        }
        Ok(())
    }
}

static OPEN_CHANNEL: LazyLock<Hash> = LazyLock::new(|| {
    keccak256(b"OpenChannel(address payer,address payee,address token,bytes32 salt,address authorizedSigner,uint128 deposit,uint64 nonce,uint64 expiry)")
});
static TOP_UP: LazyLock<Hash> =
    LazyLock::new(|| keccak256(b"TopUp(bytes32 channelId,uint128 deposit,uint64 nonce,uint64 expiry)"));
static SETTLE: LazyLock<Hash> = LazyLock::new(|| keccak256(b"Settle(bytes32 channelId,uint128 cumulativeAmount)"));
static CLOSE: LazyLock<Hash> = LazyLock::new(|| keccak256(b"Close(bytes32 channelId,uint128 cumulativeAmount)"));
static REQUEST_CLOSE: LazyLock<Hash> =
    LazyLock::new(|| keccak256(b"RequestClose(bytes32 channelId,uint64 nonce,uint64 expiry)"));
static WITHDRAW: LazyLock<Hash> =
    LazyLock::new(|| keccak256(b"Withdraw(bytes32 channelId,uint64 nonce,uint64 expiry)"));
static FUND: LazyLock<Hash> =
    LazyLock::new(|| keccak256(b"Fund(address holder,address token,uint128 amount,uint64 nonce,uint64 expiry)"));
static TRANSFER: LazyLock<Hash> = LazyLock::new(|| {
    keccak256(b"Transfer(address from,address to,address token,uint128 amount,uint64 nonce,uint64 expiry)")
});

/// Opens a channel with a deposit out of the payer's account. Signed by the payer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenChannel {
    /// Who deposits.
    pub payer: Address,
    /// Who is paid.
    pub payee: Address,
    /// The token.
    pub token: Address,
    /// Chosen by the payer.
    pub salt: Hash,
    /// Who signs vouchers; zero for the payer.
    pub authorized_signer: Address,
    /// The deposit in base units.
    pub deposit: Amount,
    /// Used once for each payer.
    pub nonce: u64,
    /// When the order lapses: milliseconds since 1970 by the ledger's clock; 0 for never.
    pub expiry: u64,
}

impl OpenChannel {
    /// The descriptor of the channel that this opens.
    pub const fn descriptor(&self, ledger: &LedgerIdentity) -> ChannelDescriptor {
        ChannelDescriptor {
            protocol: VoucherProtocol::V1,
            payer: self.payer,
            payee: self.payee,
            operator: Address::ZERO,
            token: self.token,
            salt: self.salt,
            authorized_signer: self.authorized_signer,
            expiring_nonce_hash: Hash::ZERO,
            escrow: ledger.escrow,
            chain_id: ledger.chain_id,
        }
    }
}

impl LedgerMessage for OpenChannel {
    fn struct_hash(&self) -> Hash {
        StructHasher::new(&OPEN_CHANNEL)
            .address(&self.payer)
            .address(&self.payee)
            .address(&self.token)
            .word(&self.salt)
            .address(&self.authorized_signer)
            .u128(self.deposit.units())
            .u64(self.nonce)
            .u64(self.expiry)
            .finish()
    }
}

/// Raises a channel's deposit **to** an amount, so that a repetition after a lost answer has no effect. Signed by the payer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TopUp {
    /// The channel.
    pub channel_id: ChannelId,
    /// The whole deposit afterwards, in base units.
    pub deposit: Amount,
    /// Used once for each payer.
    pub nonce: u64,
    /// When the order lapses: milliseconds since 1970 by the ledger's clock; 0 for never.
    pub expiry: u64,
}

impl LedgerMessage for TopUp {
    fn struct_hash(&self) -> Hash {
        StructHasher::new(&TOP_UP)
            .word(&Hash(self.channel_id.0))
            .u128(self.deposit.units())
            .u64(self.nonce)
            .u64(self.expiry)
            .finish()
    }
}

/// Pays out up to a voucher's amount and leaves the channel open. Signed by the payee.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settle {
    /// The channel.
    pub channel_id: ChannelId,
    /// The amount of the voucher that is presented, in base units.
    pub amount: Amount,
}

impl LedgerMessage for Settle {
    fn struct_hash(&self) -> Hash {
        StructHasher::new(&SETTLE).word(&Hash(self.channel_id.0)).u128(self.amount.units()).finish()
    }
}

/// Pays out up to an amount, returns the rest to the payer and ends the channel. Signed by the payee.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Close {
    /// The channel.
    pub channel_id: ChannelId,
    /// The amount at which the channel closes, in base units.
    pub amount: Amount,
}

impl LedgerMessage for Close {
    fn struct_hash(&self) -> Hash {
        StructHasher::new(&CLOSE).word(&Hash(self.channel_id.0)).u128(self.amount.units()).finish()
    }
}

/// Announces that the payer will withdraw; the grace period begins. Signed by the payer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestClose {
    /// The channel.
    pub channel_id: ChannelId,
    /// Used once for each payer.
    pub nonce: u64,
    /// When the order lapses: milliseconds since 1970 by the ledger's clock; 0 for never.
    pub expiry: u64,
}

impl LedgerMessage for RequestClose {
    fn struct_hash(&self) -> Hash {
        StructHasher::new(&REQUEST_CLOSE).word(&Hash(self.channel_id.0)).u64(self.nonce).u64(self.expiry).finish()
    }
}

/// Takes back what was not paid out, after the grace period. Signed by the payer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Withdraw {
    /// The channel.
    pub channel_id: ChannelId,
    /// Used once for each payer.
    pub nonce: u64,
    /// When the order lapses: milliseconds since 1970 by the ledger's clock; 0 for never.
    pub expiry: u64,
}

impl LedgerMessage for Withdraw {
    fn struct_hash(&self) -> Hash {
        StructHasher::new(&WITHDRAW).word(&Hash(self.channel_id.0)).u64(self.nonce).u64(self.expiry).finish()
    }
}

/// Puts new money into an account. Signed by the ledger's own key: its operator has taken the money in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fund {
    /// Whose account.
    pub holder: Address,
    /// The token.
    pub token: Address,
    /// How much is added, in base units.
    pub amount: Amount,
    /// Used once by the operator; rises.
    pub nonce: u64,
    /// When the order lapses: milliseconds since 1970 by the ledger's clock; 0 for never.
    pub expiry: u64,
}

impl LedgerMessage for Fund {
    fn struct_hash(&self) -> Hash {
        StructHasher::new(&FUND)
            .address(&self.holder)
            .address(&self.token)
            .u128(self.amount.units())
            .u64(self.nonce)
            .u64(self.expiry)
            .finish()
    }
}

/// Moves money from one account to another. Signed by whose account it leaves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transfer {
    /// Whose account it leaves.
    pub from: Address,
    /// Whose account it enters.
    pub to: Address,
    /// The token.
    pub token: Address,
    /// How much, in base units.
    pub amount: Amount,
    /// Used once for each account that pays; rises.
    pub nonce: u64,
    /// When the order lapses: milliseconds since 1970 by the ledger's clock; 0 for never.
    pub expiry: u64,
}

impl LedgerMessage for Transfer {
    fn struct_hash(&self) -> Hash {
        StructHasher::new(&TRANSFER)
            .address(&self.from)
            .address(&self.to)
            .address(&self.token)
            .u128(self.amount.units())
            .u64(self.nonce)
            .u64(self.expiry)
            .finish()
    }
}

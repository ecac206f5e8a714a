//! The payee's terms: what a service costs and where it is paid, signed by the payee's key.
//!
//! Terms are signed once for each price list, by EIP-712 in the domain (`Tollway`, `1`, chain id, escrow) as
//! `Terms(bytes32 hash)`, hash = keccak256 of the postcard bytes that travel.

use std::sync::LazyLock;

use serde::{Deserialize, Serialize};

use super::eip712::{Domain, StructHasher, keccak256};
use super::signed::{self, CodecError};
use super::{Address, Amount, Hash, Price, SecretKey, Signature, SignatureError, VoucherProtocol};

static TERMS_TYPE: LazyLock<Hash> = LazyLock::new(|| keccak256(b"Terms(bytes32 hash)"));

/// The largest encoding of terms, in bytes: room for some five hundred methods, small enough to be read before trust.
pub const MAX_TERMS_BYTES: usize = 64 * 1024;
/// The longest service or method name in a price list, in bytes.
pub const MAX_NAME_BYTES: usize = 256;
/// The longest URL of a ledger, in bytes.
pub const MAX_LEDGER_URL_BYTES: usize = 2048;

/// What one method costs, and how large its answers may become.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MethodPrice {
    /// The 64-bit method id.
    pub method_id: u64,
    /// The method's name, for people.
    pub name: String,
    /// The price.
    pub price: Price,
    /// The largest item that the payee sends, in payload bytes.
    pub max_item_bytes: u64,
    /// The largest response, in payload bytes.
    pub max_answer_bytes: u64,
}

impl MethodPrice {
    /// The most that can fall due at once for this method, in base units; `None` past 2^128.
    ///
    /// The call price falls due together with the first answering frame, be it the response or an item; so it is the
    /// call price, or the maximum that is reserved for it, and the dearer of the largest response and the largest item.
    pub fn dearest_unit(&self) -> Option<Amount> {
        let bytes = |count| self.price.bytes_out.map_or(Some(Amount::ZERO), |rate| rate.cost(count));
        let answer = bytes(self.max_answer_bytes)?;
        let item = self.price.item.checked_add(bytes(self.max_item_bytes)?)?;
        self.price.hold().checked_add(answer.max(item))
    }
}

/// Whether a possession signature is bound to the transport's TLS session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Binding {
    /// Not bound: there is no TLS, or a relay ends it. The exporter is signed as zero.
    None,
    /// Bound to the TLS exporter of the session.
    Exporter,
}

/// The terms on which a payee serves one service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    /// Who is paid, and whose key signs the terms.
    pub payee: Address,
    /// Where deposits lie.
    pub escrow: Address,
    /// The token that amounts are in.
    pub token: Address,
    /// The chain of the escrow.
    pub chain_id: u64,
    /// The voucher protocol of the escrow.
    pub protocol: VoucherProtocol,
    /// The service that is sold.
    pub service: String,
    /// The price list; a method that is not in it is free.
    pub methods: Vec<MethodPrice>,
    /// The smallest deposit that opens a channel, in base units.
    pub minimum_deposit: Amount,
    /// The deposit that the payee suggests, in base units.
    pub suggested_deposit: Amount,
    /// By how much a voucher must exceed the one before, in base units.
    pub minimum_delta: Amount,
    /// How long the payee waits for a voucher that it needs, in milliseconds.
    pub patience_ms: u64,
    /// The most, in base units, that may be lost in flight when the transport breaks.
    pub in_flight_cap: Amount,
    /// The largest lease, in base units: spending that may be durable ahead of use.
    pub lease: Amount,
    /// What the possession signature is bound to.
    pub binding: Binding,
    /// Where the local ledger is reached, when the escrow is one.
    pub ledger_url: Option<String>,
}

impl Terms {
    /// The price of a method; `None` when it is not in the list and so is free.
    pub fn method(&self, method_id: u64) -> Option<&MethodPrice> {
        self.methods.iter().find(|method| method.method_id == method_id)
    }

    /// The most that can fall due at once, over all methods, in base units; `None` past 2^128.
    pub fn dearest_unit(&self) -> Option<Amount> {
        self.methods.iter().try_fold(Amount::ZERO, |dearest, method| Some(dearest.max(method.dearest_unit()?)))
    }

    /// The smallest `max_ahead`, in base units, with which a wallet can use the service at all: with less, a pause
    /// could ask for more than the wallet may sign. `None` past 2^128.
    pub fn minimum_max_ahead(&self) -> Option<Amount> {
        self.dearest_unit()?.checked_add(self.minimum_delta)
    }

    /// Checks that the terms make sense in themselves.
    ///
    /// # Errors
    /// [`TermsError::Inconsistent`] names the first point that does not.
    pub fn check(&self) -> Result<(), TermsError> {
        let names = || self.methods.iter().map(|method| &method.name).chain([&self.service]);
        let mut ids: Vec<u64> = self.methods.iter().map(|method| method.method_id).collect();
        ids.sort_unstable();
        let reason = if names().any(|name| name.len() > MAX_NAME_BYTES) {
            Inconsistency::LongName
        } else if self.ledger_url.as_ref().is_some_and(|url| url.len() > MAX_LEDGER_URL_BYTES) {
            Inconsistency::LongLedgerUrl
        } else if !ids.is_sorted_by(|one, next| one < next) {
            Inconsistency::MethodTwice
        } else if self.minimum_deposit > self.suggested_deposit {
            Inconsistency::SuggestedBelowMinimum
        } else if self.suggested_deposit > self.protocol.max_amount() {
            Inconsistency::DepositAboveProtocol
        } else if self.methods.iter().any(|method| method.price.max.is_some_and(|max| max < method.price.call)) {
            Inconsistency::MaximumBelowCall
        } else if self.minimum_max_ahead().is_none() {
            Inconsistency::PriceTooLarge
        } else {
            return Ok(());
        };
        Err(TermsError::Inconsistent(reason))
    }
}

/// Why terms make no sense in themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Inconsistency {
    /// A name is longer than [`MAX_NAME_BYTES`].
    #[error("a service or method name is longer than {MAX_NAME_BYTES} bytes")]
    LongName,
    /// The ledger's URL is longer than [`MAX_LEDGER_URL_BYTES`].
    #[error("the ledger's URL is longer than {MAX_LEDGER_URL_BYTES} bytes")]
    LongLedgerUrl,
    /// Two prices for one method.
    #[error("a method is in the price list twice")]
    MethodTwice,
    /// The suggested deposit would not open a channel.
    #[error("the suggested deposit is below the minimum")]
    SuggestedBelowMinimum,
    /// No voucher could state the suggested deposit.
    #[error("the suggested deposit is above what a voucher can state")]
    DepositAboveProtocol,
    /// The most that a call may cost is less than what it costs at least.
    #[error("the maximum of a method is below its call price")]
    MaximumBelowCall,
    /// The dearest unit is past 2^128.
    #[error("the dearest unit is past 2^128 base units")]
    PriceTooLarge,
}

/// Why terms are refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TermsError {
    /// The signature is malformed or not the expected payee's.
    #[error("terms: {0}")]
    Signature(#[from] SignatureError),
    /// The bytes are too long, or not the one encoding of terms.
    #[error("terms: {0}")]
    Codec(#[from] CodecError),
    /// Whoever signed is not the payee that the terms name.
    #[error("the terms name the payee {payee} but are signed by {signer}")]
    NotThePayee {
        /// Whom the terms name.
        payee: Address,
        /// Who signed.
        signer: Address,
    },
    /// The chain or the escrow beside the bytes are not those in the terms.
    #[error("the terms name another chain or escrow than they were signed for")]
    OtherDomain,
    /// The key that signs is not the payee's.
    #[error("the terms name the payee {payee}, but the key is that of {signer}")]
    WrongKey {
        /// Whom the terms name.
        payee: Address,
        /// Whose key it is.
        signer: Address,
    },
    /// The terms make no sense in themselves.
    #[error("terms: {0}")]
    Inconsistent(Inconsistency),
}

/// Terms as they travel: opaque bytes, the domain that the signature is for, and the signature.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedTerms {
    /// The postcard bytes of [`Terms`].
    pub bytes: Vec<u8>,
    /// The chain of the signature's domain; must be the one in the terms.
    pub chain_id: u64,
    /// The escrow of the signature's domain; must be the one in the terms.
    pub escrow: Address,
    /// Of the payee.
    pub signature: Signature,
}

impl SignedTerms {
    /// Signs terms with the payee's key.
    ///
    /// # Errors
    /// When the terms make no sense, are too long, or name another payee.
    pub fn sign(terms: &Terms, key: &SecretKey) -> Result<Self, TermsError> {
        terms.check()?;
        if terms.payee != key.address() {
            return Err(TermsError::WrongKey { payee: terms.payee, signer: key.address() });
        }
        let bytes = signed::encode(terms, MAX_TERMS_BYTES)?;
        let signature = key.sign_digest(&digest(&bytes, terms.chain_id, terms.escrow));
        Ok(SignedTerms { bytes, chain_id: terms.chain_id, escrow: terms.escrow, signature })
    }

    /// The hash of the terms, which challenges carry: keccak256 of the bytes.
    pub fn hash(&self) -> Hash {
        keccak256(&self.bytes)
    }

    /// Verifies, then decodes. With `payee` only that payee's terms are taken; without, the terms' own.
    ///
    /// # Errors
    /// Everything that [`TermsError`] lists. Nothing is decoded before the signature has named a signer, and with a
    /// pinned payee nothing before it has named that one.
    pub fn verify(&self, payee: Option<Address>) -> Result<Terms, TermsError> {
        if self.bytes.len() > MAX_TERMS_BYTES {
            return Err(CodecError::TooLong { found: self.bytes.len(), max: MAX_TERMS_BYTES }.into());
        }
        let signer = self.signature.recover(&digest(&self.bytes, self.chain_id, self.escrow))?;
        if let Some(expected) = payee.filter(|expected| *expected != signer) {
            return Err(SignatureError::WrongSigner { expected }.into());
        }
        let terms: Terms = signed::decode(&self.bytes, MAX_TERMS_BYTES)?;
        if terms.payee != signer {
            return Err(TermsError::NotThePayee { payee: terms.payee, signer });
        }
        if (terms.chain_id, terms.escrow) != (self.chain_id, self.escrow) {
            return Err(TermsError::OtherDomain);
        }
        terms.check()?;
        Ok(terms)
    }
}

fn digest(bytes: &[u8], chain_id: u64, escrow: Address) -> Hash {
    let struct_hash = StructHasher::new(&TERMS_TYPE).word(&keccak256(bytes)).finish();
    Domain::tollway(chain_id, escrow).separator().digest(&struct_hash)
}

//! Recoverable secp256k1 signatures in the one form that every known verifier accepts, and their verification.
//!
//! A [`Signature`] is always canonical: 65 bytes r ‖ s ‖ v with v = 27 or 28 and s in the lower half of the group order.
//! Libraries normalise a high s silently, which lets one voucher have two byte forms; here [`Signature::parse`] checks
//! it and refuses. The compact 64-byte form of EIP-2098 is taken on input and becomes the 65-byte form.

use core::fmt;
use core::str::FromStr;
use std::sync::OnceLock;

use k256::ecdsa::{RecoveryId, VerifyingKey};
use k256::elliptic_curve::PrimeField;
use k256::elliptic_curve::bigint::{Encoding, U256};
use k256::elliptic_curve::ops::{Invert, MulByGeneratorVartime, Reduce};
use k256::elliptic_curve::point::AffineCoordinates;
use k256::elliptic_curve::scalar::IsHigh;
use k256::{NonZeroScalar, ProjectivePoint, Scalar};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use super::bytes::{Hex, ParseHexError, parse_hex};
use super::key::address_of;
use super::{Address, Hash};

/// v of a point R with an even y.
const V_EVEN: u8 = 27;
/// v of a point R with an odd y.
const V_ODD: u8 = 28;
/// The bit of a compact signature's s that says whether y is odd (EIP-2098).
const COMPACT_ODD: u8 = 0x80;

/// Bytes that are not a canonical signature, or one that another key made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SignatureError {
    /// Neither 65 bytes nor the 64 of the compact form.
    #[error("a signature has 65 bytes, or 64 in the compact form, not {found}")]
    Length {
        /// How many bytes there are.
        found: usize,
    },
    /// The last byte is not 27 or 28; in particular 0 and 1 are refused.
    #[error("the signature's last byte is 27 or 28, not {0}")]
    RecoveryByte(u8),
    /// r is zero or not below the group order.
    #[error("the signature's r is out of range")]
    R,
    /// s is zero or not below the group order.
    #[error("the signature's s is out of range")]
    S,
    /// s is in the upper half: the twin of a canonical signature.
    #[error("the signature's s is in the upper half of the group order")]
    HighS,
    /// No key can have made it: r is not the x coordinate of a point, or the key would be the point at infinity.
    #[error("no key can have made this signature")]
    Unrecoverable,
    /// It is well formed, but not of the expected key.
    #[error("the signature is not of {expected}")]
    WrongSigner {
        /// Whose signature was expected.
        expected: Address,
    },
}

/// A canonical signature: r ‖ s ‖ v, low s, v 27 or 28.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Signature([u8; 65]);

impl Signature {
    /// Takes the canonical 65 bytes, or the compact 64 bytes of EIP-2098.
    ///
    /// # Errors
    /// Everything that is not canonical is refused: a high s, v = 0 or 1, r or s out of range. That it parses says
    /// nothing about who signed.
    pub fn parse(bytes: &[u8]) -> Result<Self, SignatureError> {
        let length = SignatureError::Length { found: bytes.len() };
        let (r, rest) = bytes.split_first_chunk::<32>().ok_or(length)?;
        let (s, rest) = rest.split_first_chunk::<32>().ok_or(length)?;
        let (s, v) = match rest {
            [v] => (*s, *v),
            [] => {
                let [first, tail @ ..] = s;
                let mut compact = [0; 32];
                if let Some((head, rest)) = compact.split_first_mut() {
                    *head = first & !COMPACT_ODD;
                    rest.copy_from_slice(tail);
                }
                (compact, if first & COMPACT_ODD == 0 { V_EVEN } else { V_ODD })
            }
            _ => return Err(length),
        };
        if !matches!(v, V_EVEN | V_ODD) {
            return Err(SignatureError::RecoveryByte(v));
        }
        scalar(r).ok_or(SignatureError::R)?;
        if bool::from(scalar(&s).ok_or(SignatureError::S)?.is_high()) {
            return Err(SignatureError::HighS);
        }
        Ok(Self::join(r, &s, v))
    }

    /// What k256 signed; it has normalised s and flipped the recovery bit with it.
    ///
    /// That x of R is at or above the group order, which has no form here, would take 2^128 attempts to meet.
    pub(super) fn from_parts(signature: &k256::ecdsa::Signature, recovery: RecoveryId) -> Self {
        let (r, s) = signature.split_bytes();
        Self::join(&r.into(), &s.into(), if recovery.is_y_odd() { V_ODD } else { V_EVEN })
    }

    fn join(r: &[u8; 32], s: &[u8; 32], v: u8) -> Self {
        let mut bytes = [v; 65];
        let parts = r.iter().chain(s);
        bytes.iter_mut().zip(parts).for_each(|(to, from)| *to = *from);
        Signature(bytes)
    }

    /// The 65 bytes r ‖ s ‖ v.
    pub const fn as_bytes(&self) -> &[u8; 65] {
        &self.0
    }

    /// The compact 64 bytes of EIP-2098, for formats that want them. Tollway never sends them.
    pub fn to_compact(&self) -> [u8; 64] {
        let mut compact = [0; 64];
        compact.iter_mut().zip(&self.0).for_each(|(to, from)| *to = *from);
        if let Some(first_of_s) = compact.get_mut(32) {
            *first_of_s |= if self.is_y_odd() { COMPACT_ODD } else { 0 };
        }
        compact
    }

    fn is_y_odd(&self) -> bool {
        self.0.last() == Some(&V_ODD)
    }

    fn r_bytes(&self) -> [u8; 32] {
        self.0.first_chunk().copied().unwrap_or_default()
    }

    fn scalars(&self) -> Option<(NonZeroScalar, NonZeroScalar)> {
        let (r, rest) = self.0.split_first_chunk::<32>()?;
        Some((scalar(r)?, scalar(rest.first_chunk::<32>()?)?))
    }

    /// The address whose key made this signature over `digest`.
    ///
    /// # Errors
    /// [`SignatureError::Unrecoverable`] when no key can have made it.
    pub fn recover(&self, digest: &Hash) -> Result<Address, SignatureError> {
        Ok(address_of(&self.recover_key(digest)?))
    }

    fn recover_key(&self, digest: &Hash) -> Result<VerifyingKey, SignatureError> {
        let (r, s) = self.scalars().ok_or(SignatureError::Unrecoverable)?;
        let signature = k256::ecdsa::Signature::from_scalars(*r, *s).map_err(|_| SignatureError::Unrecoverable)?;
        // v = 27 or 28 says that x of R is below the group order; the other case has no form in 65 bytes.
        let recovery = RecoveryId::new(self.is_y_odd(), false);
        VerifyingKey::recover_from_prehash(digest.as_bytes(), &signature, recovery)
            .map_err(|_| SignatureError::Unrecoverable)
    }

    /// Whether `key` made this signature over `digest`, with this very v.
    ///
    /// Recovery solves `key = (s·R − z·G) / r` for the one point R that r and v name; this solves the same equation for
    /// R and compares all of it, x and the parity of y. So both give the same verdict, v included, where a plain ECDSA
    /// verification would take either v.
    fn is_by(&self, key: &VerifyingKey, digest: &Hash) -> bool {
        let Some((r, s)) = self.scalars() else { return false };
        let z = <Scalar as Reduce<U256>>::reduce(&U256::from_be_bytes(digest.0.into()));
        let s_inv = *<NonZeroScalar as Invert>::invert_vartime(&s);
        let (u1, u2) = (z.multiply(&s_inv), r.multiply(&s_inv));
        let key = ProjectivePoint::from(*key.as_affine());
        let point = ProjectivePoint::mul_by_generator_and_mul_add_vartime(&u1, &u2, &key).to_affine();
        <[u8; 32]>::from(point.x()) == self.r_bytes() && bool::from(point.y_is_odd()) == self.is_y_odd()
    }
}

fn scalar(bytes: &[u8; 32]) -> Option<NonZeroScalar> {
    Option::from(Scalar::from_repr((*bytes).into())).and_then(|scalar: Scalar| NonZeroScalar::new(scalar).into())
}

trait Multiply {
    fn multiply(&self, other: &Scalar) -> Scalar;
}

impl Multiply for Scalar {
    // Modular: it cannot overflow, which the lint against unchecked arithmetic cannot know.
    #[allow(clippy::arithmetic_side_effects)]
    fn multiply(&self, other: &Scalar) -> Scalar {
        *self * *other
    }
}

impl fmt::Display for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&Hex(&self.0), f)
    }
}

impl fmt::Debug for Signature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&Hex(&self.0), f)
    }
}

/// A text that is not a signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseSignatureError {
    /// The text is not hex of 64 or 65 bytes.
    #[error(transparent)]
    Hex(#[from] ParseHexError),
    /// The bytes are not a canonical signature.
    #[error(transparent)]
    Signature(#[from] SignatureError),
}

impl FromStr for Signature {
    type Err = ParseSignatureError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let compact_len = "0x".len().saturating_add(128);
        if text.len() == compact_len {
            return Ok(Signature::parse(&parse_hex::<64>(text)?)?);
        }
        Ok(Signature::parse(&parse_hex::<65>(text)?)?)
    }
}

impl Serialize for Signature {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            return serializer.collect_str(self);
        }
        // A tuple of bytes: fixed length, so postcard writes no length in front.
        use serde::ser::SerializeTuple;
        let mut tuple = serializer.serialize_tuple(65)?;
        for byte in &self.0 {
            tuple.serialize_element(byte)?;
        }
        tuple.end()
    }
}

struct Visitor;

impl<'de> de::Visitor<'de> for Visitor {
    type Value = Signature;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a signature of 65 bytes")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Signature, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<Signature, A::Error> {
        let mut bytes = [0; 65];
        for (index, byte) in bytes.iter_mut().enumerate() {
            *byte = seq.next_element()?.ok_or_else(|| de::Error::invalid_length(index, &self))?;
        }
        Signature::parse(&bytes).map_err(de::Error::custom)
    }
}

impl<'de> Deserialize<'de> for Signature {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            deserializer.deserialize_str(Visitor)
        } else {
            deserializer.deserialize_tuple(65, Visitor)
        }
    }
}

/// Verifies many signatures of one signer.
///
/// At first only the signer's address is known, so the key is recovered from the signature. The first success keeps the
/// key, and later verifications use it: 44 µs instead of 54. It may be shared by threads.
#[derive(Debug)]
pub struct Verifier {
    signer: Address,
    key: OnceLock<VerifyingKey>,
}

impl Verifier {
    /// A verifier for the signatures of `signer`.
    pub const fn new(signer: Address) -> Self {
        Verifier { signer, key: OnceLock::new() }
    }

    /// Whose signatures are verified.
    pub const fn signer(&self) -> Address {
        self.signer
    }

    /// Whether the signer's key is known, so that verification is the faster one.
    pub fn knows_key(&self) -> bool {
        self.key.get().is_some()
    }

    /// Verifies that `signature` is the signer's over `digest`.
    ///
    /// # Errors
    /// [`SignatureError::WrongSigner`] when it is another key's; [`SignatureError::Unrecoverable`] when it can be
    /// nobody's and the key is not known yet.
    pub fn verify(&self, digest: &Hash, signature: &Signature) -> Result<(), SignatureError> {
        let wrong = SignatureError::WrongSigner { expected: self.signer };
        if let Some(key) = self.key.get() {
            return if signature.is_by(key, digest) { Ok(()) } else { Err(wrong) };
        }
        let key = signature.recover_key(digest)?;
        if address_of(&key) != self.signer {
            return Err(wrong);
        }
        // Two threads may both have recovered it; it is the same key, so whose comes first does not matter.
        let _ = self.key.set(key);
        Ok(())
    }
}

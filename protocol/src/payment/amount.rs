//! Amounts of money in base units.
//!
//! An [`Amount`] is an unsigned 128-bit count of the token's base units. There is no arithmetic that wraps, saturates
//! silently or rounds: every operation is checked, and text is a decimal string of digits and nothing else.

use core::fmt;
use core::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// An amount of money in base units of the channel's token.
///
/// In postcard it is a `u128` varint; in human-readable formats it is a decimal string, because a JSON number loses
/// precision above 2^53.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Amount(u128);

impl Amount {
    /// No money.
    pub const ZERO: Amount = Amount(0);
    /// The largest amount that can be expressed, 2^128 − 1 base units.
    pub const MAX: Amount = Amount(u128::MAX);
    /// The largest amount of protocol v2, 2^96 − 1 base units.
    pub const MAX_U96: Amount = Amount((1 << 96) - 1);

    /// An amount of `units` base units.
    pub const fn new(units: u128) -> Self {
        Amount(units)
    }

    /// The count of base units.
    pub const fn units(self) -> u128 {
        self.0
    }

    /// Whether this is no money at all.
    pub const fn is_zero(self) -> bool {
        self.0 == 0
    }

    /// What [`FromStr`] does, for constants.
    ///
    /// # Errors
    /// When the text is not a number of decimal digits below 2^128.
    pub const fn parse(text: &str) -> Result<Self, ParseAmountError> {
        let mut digits = text.as_bytes();
        if digits.is_empty() {
            return Err(ParseAmountError::Empty);
        }
        let mut units = Some(0u128);
        while let [digit, rest @ ..] = digits {
            if !digit.is_ascii_digit() {
                return Err(ParseAmountError::NotADigit);
            }
            let digit = Amount(digit.saturating_sub(b'0') as u128);
            units = match units {
                Some(units) => match Amount(units).checked_mul(10) {
                    Some(tenfold) => match tenfold.checked_add(digit) {
                        Some(sum) => Some(sum.0),
                        None => None,
                    },
                    None => None,
                },
                None => None,
            };
            digits = rest;
        }
        match units {
            Some(units) => Ok(Amount(units)),
            None => Err(ParseAmountError::TooLarge),
        }
    }

    /// The sum, or `None` above [`Amount::MAX`].
    pub const fn checked_add(self, other: Amount) -> Option<Amount> {
        match self.0.checked_add(other.0) {
            Some(sum) => Some(Amount(sum)),
            None => None,
        }
    }

    /// The difference, or `None` below zero.
    pub const fn checked_sub(self, other: Amount) -> Option<Amount> {
        match self.0.checked_sub(other.0) {
            Some(rest) => Some(Amount(rest)),
            None => None,
        }
    }

    /// `self × count`, or `None` above [`Amount::MAX`].
    pub const fn checked_mul(self, count: u128) -> Option<Amount> {
        match self.0.checked_mul(count) {
            Some(product) => Some(Amount(product)),
            None => None,
        }
    }

    /// What is left of `self` after `other`, at least zero.
    pub const fn saturating_sub(self, other: Amount) -> Amount {
        Amount(self.0.saturating_sub(other.0))
    }

    /// The sum, at most [`Amount::MAX`]: for bounds and marks only, never for money that changes hands.
    pub const fn saturating_add(self, other: Amount) -> Amount {
        Amount(self.0.saturating_add(other.0))
    }
}

impl From<u64> for Amount {
    fn from(units: u64) -> Self {
        Amount(u128::from(units))
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Debug for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}u", self.0)
    }
}

/// A text that is not an amount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseAmountError {
    /// The text is empty.
    #[error("an amount needs at least one digit")]
    Empty,
    /// A character other than 0–9: no sign, no separator, no exponent, no white space is taken.
    #[error("an amount is written in the digits 0-9 only")]
    NotADigit,
    /// The number is above 2^128 − 1.
    #[error("an amount is at most 2^128 - 1")]
    TooLarge,
}

impl FromStr for Amount {
    type Err = ParseAmountError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Amount::parse(text)
    }
}

impl Serialize for Amount {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() { serializer.collect_str(self) } else { serializer.serialize_u128(self.0) }
    }
}

/// Takes text however the format holds it: borrowed, escaped or read from a stream. A number is refused.
struct TextVisitor;

impl de::Visitor<'_> for TextVisitor {
    type Value = Amount;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an amount as a string of decimal digits")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Amount, E> {
        text.parse().map_err(E::custom)
    }
}

impl<'de> Deserialize<'de> for Amount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        if deserializer.is_human_readable() {
            deserializer.deserialize_str(TextVisitor)
        } else {
            u128::deserialize(deserializer).map(Amount)
        }
    }
}

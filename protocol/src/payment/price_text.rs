//! Prices, rates and sizes as people write them: `25/KiB`, `call=100,item=2,bytes=25/KiB`, `64KiB`.
//!
//! The one parser for options of commands and for attributes in programs. What attributes need is `const`, so that a
//! compiler refuses what is no rate.

use core::fmt;
use core::num::NonZeroU64;
use core::str::FromStr;

use super::{Amount, ParseAmountError, Price, Rate};

const UNITS: [(&str, u64); 4] = [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("B", 1)];

/// A number of bytes: digits, a unit (`B`, `KiB`, `MiB`, `GiB`), or both; `None` for what is none, or is above 2^64 − 1.
pub const fn parse_bytes(text: &str) -> Option<u64> {
    let mut digits = 0;
    let mut rest = text.as_bytes();
    while let [byte, behind @ ..] = rest {
        if !byte.is_ascii_digit() {
            break;
        }
        (digits, rest) = (text.len().saturating_sub(behind.len()), behind);
    }
    let (number, _) = text.split_at(digits);
    let scale = match rest {
        [] => 1,
        b"B" => UNITS[3].1,
        b"KiB" => UNITS[2].1,
        b"MiB" => UNITS[1].1,
        b"GiB" => UNITS[0].1,
        _ => return None,
    };
    match Amount::parse(number) {
        Ok(number) if number.units() <= u64::MAX as u128 => (number.units() as u64).checked_mul(scale),
        Err(ParseAmountError::Empty) if !rest.is_empty() => Some(scale),
        _ => None,
    }
}

/// A text that is not a rate such as `25/KiB`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParseRateError {
    /// There is no `/`.
    #[error("a rate is AMOUNT/UNIT, such as 25/KiB")]
    NoSlash,
    /// The part before the `/` is no amount.
    #[error(transparent)]
    Amount(#[from] ParseAmountError),
    /// The part after the `/` is no unit.
    #[error("the unit of a rate is one of B, KiB, MiB, GiB, or a number of them such as 100B")]
    Unit,
}

impl Rate {
    /// What [`FromStr`] does, for constants.
    ///
    /// # Errors
    /// When the text is not an amount, a slash and a unit.
    pub const fn parse(text: &str) -> Result<Rate, ParseRateError> {
        let mut at = 0;
        let mut rest = text.as_bytes();
        while let [byte, behind @ ..] = rest {
            if *byte == b'/' {
                break;
            }
            (at, rest) = (text.len().saturating_sub(behind.len()), behind);
        }
        let [b'/', unit @ ..] = rest else { return Err(ParseRateError::NoSlash) };
        let (amount, _) = text.split_at(at);
        let (_, unit_text) = text.split_at(text.len().saturating_sub(unit.len()));
        // A bare number is no unit: 25/1024 could mean anything.
        let is_bare = matches!(unit, [.., last] if last.is_ascii_digit());
        let per_bytes = match parse_bytes(unit_text) {
            Some(bytes) if !is_bare => NonZeroU64::new(bytes),
            _ => None,
        };
        match (Amount::parse(amount), per_bytes) {
            (Ok(amount), Some(per_bytes)) => Ok(Rate { amount, per_bytes }),
            (Err(error), _) => Err(ParseRateError::Amount(error)),
            (_, None) => Err(ParseRateError::Unit),
        }
    }
}

impl FromStr for Rate {
    type Err = ParseRateError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Rate::parse(text)
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match UNITS.iter().find(|(_, bytes)| *bytes == self.per_bytes.get()) {
            Some((unit, _)) => write!(f, "{}/{unit}", self.amount),
            None => write!(f, "{}/{}B", self.amount, self.per_bytes),
        }
    }
}

/// A text that is not a price.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ParsePriceError {
    /// A part that has no name.
    #[error("a price is 0, a rate such as 25/KiB, or parts such as call=100,max=500,item=2,bytes=25/KiB; not {0:?}")]
    Part(String),
    /// A part that is there twice.
    #[error("a price has each part once: {0:?}")]
    Twice(String),
    /// The price of a call or an item.
    #[error(transparent)]
    Amount(#[from] ParseAmountError),
    /// The price of bytes.
    #[error(transparent)]
    Rate(#[from] ParseRateError),
}

impl FromStr for Price {
    type Err = ParsePriceError;

    /// `0`, a rate alone for the bytes that the payee sends, or parts `call=`, `max=` (the most that a
    /// call costs which states its cost), `item=`, `bytes=` and `bytes-in=` with commas between them.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "0" {
            return Ok(Price::default());
        }
        if !text.contains('=') {
            let rate = text.parse().map_err(|error| match error {
                ParseRateError::NoSlash => ParsePriceError::Part(text.to_owned()),
                error => error.into(),
            })?;
            return Ok(Price::per_bytes_out(rate));
        }
        let (mut call, mut max, mut item, mut bytes_out, mut bytes_in) = (None, None, None, None, None);
        for part in text.split(',') {
            let twice = match part.split_once('=') {
                Some(("call", amount)) => call.replace(amount.parse::<Amount>()?).is_some(),
                Some(("max", amount)) => max.replace(amount.parse::<Amount>()?).is_some(),
                Some(("item", amount)) => item.replace(amount.parse::<Amount>()?).is_some(),
                Some(("bytes", rate)) => bytes_out.replace(rate.parse::<Rate>()?).is_some(),
                Some(("bytes-in", rate)) => bytes_in.replace(rate.parse::<Rate>()?).is_some(),
                _ => return Err(ParsePriceError::Part(part.to_owned())),
            };
            if twice {
                return Err(ParsePriceError::Twice(part.to_owned()));
            }
        }
        Ok(Price { call: call.unwrap_or_default(), item: item.unwrap_or_default(), bytes_out, bytes_in, max })
    }
}

impl fmt::Display for Price {
    /// As it is parsed; a part that costs nothing is left out.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let amounts = [("call", self.call), ("max", self.max.unwrap_or_default()), ("item", self.item)]
            .map(|(name, amount)| (name, amount.to_string(), amount));
        let rates = [("bytes", self.bytes_out), ("bytes-in", self.bytes_in)];
        let rates = rates.map(|(name, rate)| {
            (
                name,
                rate.map_or_else(String::new, |rate| rate.to_string()),
                rate.map_or(Amount::ZERO, |rate| rate.amount),
            )
        });
        let parts: Vec<_> = amounts.into_iter().chain(rates).filter(|(_, _, amount)| !amount.is_zero()).collect();
        match &parts[..] {
            [] => f.write_str("0"),
            [("bytes", rate, _)] => f.write_str(rate),
            parts => {
                for (at, (name, value, _)) in parts.iter().enumerate() {
                    let comma = if at == 0 { "" } else { "," };
                    write!(f, "{comma}{name}={value}")?;
                }
                Ok(())
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_price_is_written_as_it_is_read() {
        for text in [
            "0",
            "25/KiB",
            "1/100B",
            "call=100",
            "item=2",
            "call=1,max=100",
            "call=100,item=2,bytes=25/KiB,bytes-in=1/B",
        ] {
            assert_eq!(text.parse::<Price>().unwrap().to_string(), text);
        }
        assert_eq!("25/4KiB".parse::<Price>().unwrap().to_string(), "25/4096B");
        assert!("0/KiB".parse::<Price>().unwrap().is_free());
        for text in
            ["", "25", "25/kb", "-1/KiB", "0.5/KiB", "25/1024", "25/0B", "call=", "call=1,call=2", "calls=1", "call=1,"]
        {
            assert!(text.parse::<Price>().is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_have_binary_units() {
        for (text, bytes) in
            [("0", 0), ("7B", 7), ("64MiB", 64 << 20), ("1GiB", 1 << 30), ("4096", 4096), ("KiB", 1024)]
        {
            assert_eq!(parse_bytes(text), Some(bytes), "{text}");
        }
        for text in ["", "1MB", "1.5MiB", "-1", "99999999999GiB", "18446744073709551616", "1 KiB"] {
            assert_eq!(parse_bytes(text), None, "{text}");
        }
    }

    #[test]
    fn a_rate_can_be_a_constant() {
        const RATE: Rate = match Rate::parse("25/KiB") {
            Ok(rate) => rate,
            Err(_) => panic!("it is a rate"),
        };
        assert_eq!(Ok(RATE), "25/KiB".parse());
    }
}

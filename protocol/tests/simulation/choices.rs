//! Where the choices of a run come from: a seed, or bytes that a fuzzer makes.

use crate::pair::Rng;

/// An endless row of choices, the same each time.
#[derive(Debug)]
#[allow(dead_code, reason = "the simulation makes the one, the fuzz target the other")]
pub(crate) enum Choices {
    /// By a seed.
    Seed(Rng),
    /// By bytes; when they are used up, the first of each choice.
    Bytes { bytes: Vec<u8>, at: usize },
}

impl Choices {
    /// A number below `end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        match self {
            Choices::Seed(rng) => rng.below(end),
            Choices::Bytes { bytes, at } => {
                let mut next = || {
                    let byte = bytes.get(*at).copied().unwrap_or_default();
                    *at += 1;
                    usize::from(byte)
                };
                let number = if end <= 256 { next() } else { next() << 8 | next() };
                number % end.max(1)
            }
        }
    }

    pub(crate) fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }

    /// Whether no choice is left that says anything.
    pub(crate) fn is_over(&self) -> bool {
        matches!(self, Choices::Bytes { bytes, at } if *at >= bytes.len())
    }
}

//! What is the same for all three processes and for who compares their books: keys, prices, limits.
//!
//! The prices make every sum exact: a byte costs one base unit, so nothing is rounded and what a frame costs is known from
//! the frame alone.

use tollway::protocol::payment::{Amount, LedgerIdentity, MethodPrice, Price, Rate, SecretKey};
use tollway::rpc::MethodId;

pub(crate) const SERVICE: &str = "shop";

/// Base units for each call.
pub(crate) const CALL_PRICE: u128 = 40;
/// Base units for each item, beside its bytes.
pub(crate) const ITEM_PRICE: u128 = 3;
/// The largest item, and the largest answer, in bytes as framed.
pub(crate) const MAX_ITEM: u64 = 1_024;
pub(crate) const MAX_ANSWER: u64 = 2_048;

/// One lease: what a payee that dies writes off at most, beside what is in flight.
pub(crate) const LEASE: u128 = 4_000;
/// The most that one break may lose.
pub(crate) const IN_FLIGHT_CAP: u128 = 50_000;
/// What the payer signs beyond what it has received.
pub(crate) const MAX_AHEAD: u128 = 12_000;
/// A deposit, and the step of a top-up: small, so that channels are topped up often.
pub(crate) const DEPOSIT: u128 = 60_000;
/// What one connection may cost.
pub(crate) const BUDGET: u128 = 400_000;
/// All money there is.
pub(crate) const FUNDED: u128 = 1_000_000_000_000;
/// What is delivered and not paid out before the payee settles in passing.
pub(crate) const SETTLE_ABOVE: u128 = 10_000;
/// A payee that was killed must be back within it to claim from a payer that withdraws, on a loaded machine, too.
pub(crate) const GRACE_MS: u64 = 120_000;

fn key(seed: u8) -> SecretKey {
    SecretKey::from_bytes([seed; 32]).expect("a small number is a key")
}

pub(crate) fn payer_key() -> SecretKey {
    key(1)
}

pub(crate) fn payee_key() -> SecretKey {
    key(2)
}

pub(crate) fn ledger_identity() -> LedgerIdentity {
    LedgerIdentity::of(&key(3))
}

/// One answer of so many bytes.
pub(crate) fn one() -> MethodId {
    MethodId::of(SERVICE, 1, "one")
}

/// So many items of so many bytes.
pub(crate) fn many() -> MethodId {
    MethodId::of(SERVICE, 1, "many")
}

pub(crate) fn prices() -> Vec<MethodPrice> {
    let bytes_out = Rate { amount: Amount::new(1), per_bytes: std::num::NonZeroU64::MIN };
    let price =
        Price { call: Amount::new(CALL_PRICE), item: Amount::new(ITEM_PRICE), ..Price::per_bytes_out(bytes_out) };
    let method = |id: MethodId, name: &str| MethodPrice {
        method_id: id.0,
        name: name.to_owned(),
        price,
        max_item_bytes: MAX_ITEM,
        max_answer_bytes: MAX_ANSWER,
    };
    vec![method(one(), "one"), method(many(), "many")]
}

/// Numbers that follow from a seed (SplitMix64), so that a plan can be made again.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Self {
        Random(seed)
    }

    pub(crate) fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `bound`, which is not 0.
    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.draw() % bound
    }

    pub(crate) fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub(crate) fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        let at = usize::try_from(self.below(from.len() as u64)).unwrap_or(0);
        &from[at]
    }
}

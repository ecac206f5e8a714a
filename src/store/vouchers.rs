//! The vouchers that a payee keeps of a channel, to settle by.
//!
//! An escrow pays exactly the amount of the voucher that is presented. To be paid what was spent, and neither more nor
//! much less, the payee needs vouchers near `spent`, not only the highest: the largest at or below `spent` for a
//! settlement while the channel lives, the smallest at or above `spent` when the payer has gone. As `spent` moves up
//! through the kept ones, they serve in turn.

use serde::{Deserialize, Serialize};
use tollway_protocol::payment::{Amount, SignedAmount};

/// How many vouchers a record keeps at most: spread over what is authorised ahead, they bring a settlement within a
/// quarter of it at worst and mostly within a tenth, and a record stays near a kilobyte and a half.
pub const MAX_STORED_VOUCHERS: usize = 16;

/// A voucher that may not be added.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a voucher of {amount} is not above the accepted {accepted}")]
pub struct VoucherOrderError {
    /// The amount of the voucher.
    pub amount: Amount,
    /// The highest amount so far.
    pub accepted: Amount,
}

/// Verified vouchers of one channel, at most [`MAX_STORED_VOUCHERS`], in ascending order.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StoredVouchers(Vec<SignedAmount>);

impl StoredVouchers {
    /// The accepted voucher: the highest.
    pub fn highest(&self) -> Option<&SignedAmount> {
        self.0.last()
    }

    /// The accepted amount in base units; zero when there is no voucher.
    pub fn accepted(&self) -> Amount {
        self.highest().map_or(Amount::ZERO, |voucher| voucher.amount)
    }

    /// Adds a verified voucher, which becomes the accepted one, and lets go of what is needed least.
    ///
    /// `spent` is what the channel has spent, in base units: it says which vouchers are of use.
    ///
    /// # Errors
    /// When the amount is not above the accepted one.
    pub fn accept(&mut self, voucher: SignedAmount, spent: Amount) -> Result<(), VoucherOrderError> {
        let accepted = self.accepted();
        if voucher.amount <= accepted && (self.highest().is_some() || !voucher.amount.is_zero()) {
            return Err(VoucherOrderError { amount: voucher.amount, accepted });
        }
        self.0.push(voucher);
        self.thin(spent);
        Ok(())
    }

    /// The voucher to settle by while the channel lives: the largest at or below `spent`.
    pub fn largest_up_to(&self, spent: Amount) -> Option<&SignedAmount> {
        self.0.iter().rev().find(|voucher| voucher.amount <= spent)
    }

    /// The voucher to close by when the payer has gone: the smallest at or above `spent`.
    pub fn smallest_covering(&self, spent: Amount) -> Option<&SignedAmount> {
        self.0.iter().find(|voucher| voucher.amount >= spent)
    }

    /// In ascending order.
    pub fn iter(&self) -> impl Iterator<Item = &SignedAmount> {
        self.0.iter()
    }

    /// How many are kept.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether none is kept.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether they are ascending and few enough, which decoding alone does not say.
    pub(super) fn is_sound(&self) -> bool {
        self.0.len() <= MAX_STORED_VOUCHERS && self.0.is_sorted_by(|one, next| one.amount < next.amount)
    }

    fn thin(&mut self, spent: Amount) {
        // Below the largest one that `spent` has passed, none will ever be chosen again: spent never goes back.
        let passed = self.0.partition_point(|voucher| voucher.amount <= spent);
        self.0.drain(..passed.saturating_sub(1));
        while self.0.len() > MAX_STORED_VOUCHERS {
            // The first serves now and the last is the accepted one; of the others goes the one whose neighbours are
            // closest to each other, so that no gap grows more than it must.
            let gaps = self.0.windows(3).map(|three| three[2].amount.saturating_sub(three[0].amount));
            let Some((least, _)) = gaps.enumerate().min_by_key(|(_, gap)| *gap) else { break };
            self.0.remove(least + 1);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;
    use tollway_protocol::payment::{Hash, SecretKey, Signature};

    use super::*;

    fn signature() -> Signature {
        SecretKey::from_bytes([1; 32]).unwrap().sign_digest(&Hash::ZERO)
    }

    fn signed(amount: u64) -> SignedAmount {
        SignedAmount { amount: Amount::from(amount), signature: signature() }
    }

    #[test]
    fn a_voucher_at_or_below_the_accepted_one_is_refused() {
        let mut vouchers = StoredVouchers::default();
        vouchers.accept(signed(0), Amount::ZERO).unwrap();
        assert!(vouchers.accept(signed(0), Amount::ZERO).is_err());
        vouchers.accept(signed(10), Amount::ZERO).unwrap();
        assert!(vouchers.accept(signed(10), Amount::ZERO).is_err());
        assert!(vouchers.accept(signed(9), Amount::ZERO).is_err());
        assert_eq!(vouchers.accepted(), Amount::from(10));
    }

    #[test]
    fn settlement_takes_the_nearest_below_and_close_the_nearest_above() {
        let mut vouchers = StoredVouchers::default();
        assert_eq!(vouchers.largest_up_to(Amount::MAX), None);
        assert_eq!(vouchers.smallest_covering(Amount::ZERO), None);
        for amount in [10, 20, 30] {
            vouchers.accept(signed(amount), Amount::ZERO).unwrap();
        }
        let below = |spent| vouchers.largest_up_to(Amount::from(spent)).map(|voucher| voucher.amount.units());
        let above = |spent| vouchers.smallest_covering(Amount::from(spent)).map(|voucher| voucher.amount.units());
        assert_eq!([below(9), below(10), below(29), below(99)], [None, Some(10), Some(20), Some(30)]);
        assert_eq!([above(0), above(10), above(11), above(31)], [Some(10), Some(10), Some(20), None]);
    }

    proptest! {
        /// Against keeping all: the accepted voucher and the best one at or below spent are always there, and never
        /// more than the bound is kept.
        #[test]
        fn what_settlement_needs_is_never_let_go(steps in prop::collection::vec((1u64..1_000, 0u64..1_200), 1..120)) {
            let one = signature();
            let (mut kept, mut all) = (StoredVouchers::default(), Vec::new());
            let (mut amount, mut spent) = (0, 0);
            for (more, use_up) in steps {
                amount += more;
                let voucher = SignedAmount { amount: Amount::from(amount), signature: one };
                kept.accept(voucher, Amount::from(spent)).unwrap();
                all.push(voucher);
                prop_assert!(kept.is_sound());
                prop_assert_eq!(kept.accepted(), Amount::from(amount));
                let now = Amount::from(spent);
                let best = all.iter().rev().find(|voucher| voucher.amount <= now);
                prop_assert_eq!(kept.largest_up_to(now), best);
                prop_assert_eq!(kept.smallest_covering(now).is_some(), true);
                spent = amount.min(spent + use_up);
            }
        }

        /// However far spent moves without a new voucher, what is kept covers it within an even share of the distance.
        #[test]
        fn the_kept_ones_are_spread(count in 20u64..200) {
            let one = signature();
            let mut kept = StoredVouchers::default();
            for step in 1..=count {
                kept.accept(SignedAmount { amount: Amount::from(step * 100), signature: one }, Amount::ZERO).unwrap();
            }
            let amounts: Vec<u128> = kept.iter().map(|voucher| voucher.amount.units()).collect();
            let largest = amounts.windows(2).map(|two| two[1] - two[0]).max().unwrap();
            prop_assert!(largest <= u128::from(count) * 100 / 4, "{amounts:?}");
        }
    }
}

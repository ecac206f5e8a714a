//! Vouchers as the payee holds them: verified ones, and the bounded set that a channel keeps.
//!
//! An escrow pays exactly the amount of the voucher that is presented. To be paid what was spent, and neither more nor
//! much less, the payee needs vouchers near `spent`, not only the highest: the largest at or below `spent` for a
//! settlement while the channel lives, the smallest at or above it when the payer has gone. As `spent` moves up through
//! the kept ones, they serve in turn.

use serde::{Deserialize, Serialize};

use super::super::{Amount, ChannelId, CloseVoucher, SignedAmount, Verifier, Voucher, VoucherDomain, VoucherError};

/// Vouchers kept between the two that must be kept (the largest at or below `spent`, and the accepted one).
///
/// They only narrow what a settlement leaves unclaimed or claims too much, so a handful suffices: sixteen split the
/// range to about a sixteenth of `max_ahead`, and cost the record 1.3 KiB.
pub const MAX_VOUCHERS_BETWEEN: usize = 16;

/// A voucher whose signature has been verified. There is no other way to make one than [`VerifiedVoucher::verify`], so
/// nothing unverified can raise what is accepted. `[pay.voucher.verified]`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerifiedVoucher {
    channel_id: ChannelId,
    voucher: SignedAmount,
}

impl VerifiedVoucher {
    /// Verifies the signature; it needs no channel at hand, so it runs off the session's task. Domain and verifier are
    /// those of the channel's descriptor.
    ///
    /// # Errors
    /// When the amount is above the protocol's type, or the signature is not the signer's.
    pub fn verify(voucher: &Voucher, domain: &VoucherDomain, verifier: &Verifier) -> Result<Self, VoucherError> {
        voucher.verify(domain, verifier)?;
        Ok(VerifiedVoucher { channel_id: voucher.channel_id, voucher: SignedAmount::from(*voucher) })
    }

    /// The channel it is for.
    pub const fn channel_id(&self) -> ChannelId {
        self.channel_id
    }

    /// Its cumulative amount in base units.
    pub const fn amount(&self) -> Amount {
        self.voucher.amount
    }

    pub(super) const fn stored(&self) -> SignedAmount {
        self.voucher
    }
}

/// A close voucher whose signatures have been verified, by [`VerifiedClose::verify`] and in no other way.
/// `[pay.voucher.verified]`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerifiedClose {
    channel_id: ChannelId,
    close: CloseVoucher,
}

impl VerifiedClose {
    /// Verifies the voucher and, in v2, the consent to close.
    ///
    /// # Errors
    /// See [`CloseVoucher::verify`].
    pub fn verify(
        channel_id: ChannelId,
        close: &CloseVoucher,
        domain: &VoucherDomain,
        verifier: &Verifier,
    ) -> Result<Self, VoucherError> {
        close.verify(channel_id, domain, verifier)?;
        Ok(VerifiedClose { channel_id, close: *close })
    }

    /// The channel it is for.
    pub const fn channel_id(&self) -> ChannelId {
        self.channel_id
    }

    /// What was verified.
    pub const fn close(&self) -> CloseVoucher {
        self.close
    }
}

/// The vouchers that a channel keeps for settlement, in rising order: the largest at or below `spent`, the accepted one,
/// and at most [`MAX_VOUCHERS_BETWEEN`] between them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StoredVouchers(Vec<SignedAmount>);

impl StoredVouchers {
    /// Entries at most: the two that must be kept, and those between.
    pub const CAPACITY: usize = MAX_VOUCHERS_BETWEEN + 2;

    /// Adds a voucher above all others and drops what the rule does not keep. One at or below the highest is ignored.
    pub fn push(&mut self, voucher: SignedAmount, spent: Amount) {
        if self.highest().is_some_and(|highest| highest.amount >= voucher.amount) {
            return;
        }
        self.0.push(voucher);
        self.prune(spent);
    }

    /// Drops every voucher below the largest at or below `spent`, and thins what is between.
    pub fn prune(&mut self, spent: Amount) {
        let at_or_below = self.0.iter().take_while(|voucher| voucher.amount <= spent).count();
        self.0.drain(..at_or_below.saturating_sub(1));
        while self.0.len() > Self::CAPACITY {
            // Remove the inner voucher whose neighbours are closest to each other: what stays is spread evenly.
            let gaps = self.0.windows(3).map(|window| match window {
                [below, _, above] => above.amount.saturating_sub(below.amount),
                _ => Amount::MAX,
            });
            let Some((index, _)) = gaps.enumerate().min_by_key(|(_, gap)| *gap) else { return };
            self.0.remove(index.saturating_add(1));
        }
    }

    /// The accepted voucher.
    pub fn highest(&self) -> Option<&SignedAmount> {
        self.0.last()
    }

    /// The largest voucher of at most `amount`.
    pub fn largest_up_to(&self, amount: Amount) -> Option<&SignedAmount> {
        self.0.iter().rev().find(|voucher| voucher.amount <= amount)
    }

    /// The smallest voucher of at least `amount`.
    pub fn smallest_from(&self, amount: Amount) -> Option<&SignedAmount> {
        self.0.iter().find(|voucher| voucher.amount >= amount)
    }

    /// All of them, in rising order.
    pub fn iter(&self) -> impl Iterator<Item = &SignedAmount> {
        self.0.iter()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the amounts rise strictly and the number is within bounds: a restored set is not believed.
    pub(super) fn is_sound(&self) -> bool {
        let rising = self.0.windows(2).all(|pair| match pair {
            [lower, higher] => lower.amount < higher.amount,
            _ => true,
        });
        rising && self.0.len() <= Self::CAPACITY
    }
}

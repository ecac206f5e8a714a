//! Vouchers as the payee holds them: verified ones, and the bounded set that a channel keeps.

use serde::{Deserialize, Serialize};

use super::super::{Amount, ChannelId, SignatureBytes};

/// Vouchers kept between the two that must be kept (the largest at or below `spent`, and the accepted one).
///
/// They only narrow what a settlement leaves unclaimed or claims too much, so a handful suffices: sixteen split the
/// range to about a sixteenth of `max_ahead`, and cost the record 1.3 KiB.
pub const MAX_VOUCHERS_BETWEEN: usize = 16;

/// Checks a voucher's signature: canonical form, and by the channel's signer.
pub trait VoucherVerifier {
    /// Whether `signature` over (`channel_id`, `amount`) is canonical and the signer's.
    fn verify(&self, channel_id: &ChannelId, amount: Amount, signature: &SignatureBytes) -> bool;
}

/// The signature is not canonical, or not by the channel's signer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the voucher's signature is not a canonical one by the channel's signer")]
pub struct BadSignature;

/// A voucher whose signature has been verified. There is no other way to make one than [`VerifiedVoucher::verify`], so
/// nothing unverified can raise what is accepted or close a channel. `[pay.voucher.verified]`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerifiedVoucher {
    channel_id: ChannelId,
    voucher: StoredVoucher,
}

impl VerifiedVoucher {
    /// Verifies the signature; it needs no channel at hand, so it runs off the session's task.
    ///
    /// # Errors
    /// [`BadSignature`] when the verifier refuses.
    pub fn verify(
        verifier: &impl VoucherVerifier,
        channel_id: ChannelId,
        amount: Amount,
        signature: SignatureBytes,
    ) -> Result<Self, BadSignature> {
        if !verifier.verify(&channel_id, amount, &signature) {
            return Err(BadSignature);
        }
        Ok(VerifiedVoucher { channel_id, voucher: StoredVoucher { amount, signature } })
    }

    /// The channel it is for.
    pub const fn channel_id(&self) -> ChannelId {
        self.channel_id
    }

    /// Its cumulative amount in base units.
    pub const fn amount(&self) -> Amount {
        self.voucher.amount
    }

    pub(super) const fn stored(&self) -> StoredVoucher {
        self.voucher
    }
}

/// A voucher in the record, verified before it came there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredVoucher {
    /// The cumulative amount in base units.
    pub amount: Amount,
    /// The signature over it.
    pub signature: SignatureBytes,
}

/// The vouchers that a channel keeps for settlement, in rising order: the largest at or below `spent`, the accepted one,
/// and at most [`MAX_VOUCHERS_BETWEEN`] between them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct StoredVouchers(Vec<StoredVoucher>);

impl StoredVouchers {
    /// Entries at most: the two that must be kept, and those between.
    pub const CAPACITY: usize = MAX_VOUCHERS_BETWEEN + 2;

    /// Adds a voucher above all others and drops what the rule does not keep. One at or below the highest is ignored.
    pub fn push(&mut self, voucher: StoredVoucher, spent: Amount) {
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
    pub fn highest(&self) -> Option<&StoredVoucher> {
        self.0.last()
    }

    /// The largest voucher of at most `amount`.
    pub fn largest_up_to(&self, amount: Amount) -> Option<&StoredVoucher> {
        self.0.iter().rev().find(|voucher| voucher.amount <= amount)
    }

    /// The smallest voucher of at least `amount`.
    pub fn smallest_from(&self, amount: Amount) -> Option<&StoredVoucher> {
        self.0.iter().find(|voucher| voucher.amount >= amount)
    }

    /// All of them, in rising order.
    pub fn iter(&self) -> impl Iterator<Item = &StoredVoucher> {
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

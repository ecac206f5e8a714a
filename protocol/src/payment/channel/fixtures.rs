//! A payer's key, what it signed, and channels to try things on.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::LazyLock;

use k256::elliptic_curve::bigint::{Encoding, U256};
use k256::elliptic_curve::ops::{Invert, Reduce};
use k256::elliptic_curve::point::AffineCoordinates;
use k256::elliptic_curve::scalar::IsHigh;
use k256::{NonZeroScalar, ProjectivePoint, Scalar};

use super::{
    ChannelParams, ChannelPolicy, LeaseCommit, PaymentChannel, StoredVouchers, VerifiedClose, VerifiedVoucher,
};
use crate::payment::{
    Address, Amount, ChannelId, CloseVoucher, Hash, SecretKey, Signature, SignedAmount, Verifier, Voucher,
    VoucherDomain, VoucherProtocol, keccak256,
};

pub(in crate::payment) const CHANNEL: ChannelId = ChannelId([7; 32]);
const PAYER: [u8; 32] = [1; 32];

static DOMAIN: LazyLock<VoucherDomain> =
    LazyLock::new(|| VoucherDomain::new(VoucherProtocol::V1, 4217, Address([0xee; 20])));
static VERIFIER: LazyLock<Verifier> = LazyLock::new(|| Verifier::new(key().address()));

pub(in crate::payment) fn key() -> SecretKey {
    SecretKey::from_bytes(PAYER).unwrap()
}

/// Signs by hand with a nonce of its own for each variant: many signatures, all valid, for the same content.
fn sign(digest: &Hash, variant: u8) -> Signature {
    let number = |bytes: [u8; 32]| <Scalar as Reduce<U256>>::reduce(&U256::from_be_bytes(bytes.into()));
    let key = number(PAYER);
    let nonce = NonZeroScalar::new(number(keccak256(&[digest.as_bytes().as_slice(), &[variant]].concat()).0)).unwrap();
    let point = (ProjectivePoint::GENERATOR * *nonce).to_affine();
    let r = number(point.x().into());
    let s = *<NonZeroScalar as Invert>::invert_vartime(&nonce) * (number(digest.0) + r * key);
    let high = bool::from(s.is_high());
    let s = if high { -s } else { s };
    let v = 27 + u8::from(bool::from(point.y_is_odd()) != high);
    Signature::parse(&[r.to_bytes().as_slice(), s.to_bytes().as_slice(), &[v]].concat()).unwrap()
}

/// A voucher of the payer; `variant` makes different signatures for the same content.
pub(in crate::payment) fn voucher(amount: u128, variant: u8) -> Voucher {
    let amount = Amount::new(amount);
    let signature = sign(&DOMAIN.voucher_digest(&CHANNEL, amount).unwrap(), variant);
    Voucher { channel_id: CHANNEL, amount, signature }
}

/// A voucher of somebody else.
pub(in crate::payment) fn forged(amount: u128) -> Voucher {
    let thief = SecretKey::from_bytes([9; 32]).unwrap();
    Voucher::sign(&DOMAIN, &thief, CHANNEL, Amount::new(amount)).unwrap()
}

pub(in crate::payment) fn verify(voucher: &Voucher) -> Result<VerifiedVoucher, crate::payment::VoucherError> {
    VerifiedVoucher::verify(voucher, &DOMAIN, &VERIFIER)
}

thread_local! {
    /// Random tests want the same few amounts again and again, and an unoptimised signature takes milliseconds.
    static VERIFIED: RefCell<BTreeMap<(u128, u8), (Voucher, VerifiedVoucher)>> = const { RefCell::new(BTreeMap::new()) };
}

pub(in crate::payment) fn verified_as(amount: u128, variant: u8) -> (Voucher, VerifiedVoucher) {
    let make = || {
        let voucher = voucher(amount, variant);
        (voucher, verify(&voucher).unwrap())
    };
    VERIFIED.with_borrow_mut(|known| *known.entry((amount, variant)).or_insert_with(make))
}

pub(in crate::payment) fn verified(amount: u128) -> VerifiedVoucher {
    verified_as(amount, 1).1
}

/// What [`verified`] signs, to close by.
pub(in crate::payment) fn verified_close(amount: u128) -> VerifiedClose {
    let close = CloseVoucher::from(SignedAmount::from(verified_as(amount, 1).0));
    VerifiedClose::verify(CHANNEL, &close, &DOMAIN, &VERIFIER).unwrap()
}

pub(in crate::payment) fn policy(minimum_delta: u128, lease: u128) -> ChannelPolicy {
    ChannelPolicy { minimum_delta: Amount::new(minimum_delta), lease: Amount::new(lease) }
}

/// A channel with this deposit, minimum delta 10 and leases of 40.
pub(in crate::payment) fn channel(deposit: u128) -> PaymentChannel {
    PaymentChannel::open(ChannelParams {
        channel_id: CHANNEL,
        deposit: Amount::new(deposit),
        settled: Amount::ZERO,
        voucher_ceiling: Amount::MAX_U96,
        policy: policy(10, 40),
    })
    .unwrap()
}

/// Accepts a voucher in one go, as if the store had written it.
pub(in crate::payment) fn accept(channel: &mut PaymentChannel, amount: u128) {
    let plan = channel.propose_voucher(&verified(amount)).unwrap().unwrap();
    channel.commit_voucher(plan).unwrap();
}

/// Leases in one go; returns what is leased.
pub(in crate::payment) fn lease(channel: &mut PaymentChannel) -> Option<u128> {
    let plan = channel.propose_lease(Amount::MAX).unwrap()?;
    Some(channel.commit_lease(plan).unwrap().leased.units())
}

/// A set of vouchers with these amounts, all with one signature: only amounts matter to a set.
pub(in crate::payment) fn stored(amounts: impl IntoIterator<Item = u128>, spent: u128) -> StoredVouchers {
    let signature = key().sign_digest(&Hash::ZERO);
    let mut vouchers = StoredVouchers::default();
    for amount in amounts {
        vouchers.push(SignedAmount { amount: Amount::new(amount), signature }, Amount::new(spent));
    }
    vouchers
}

/// Stands for the session's money credit: spends what is leased and no more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::payment) struct Spender {
    pub(in crate::payment) spent: Amount,
    pub(in crate::payment) leased: Amount,
}

impl Spender {
    /// Starts where the channel stands.
    pub(in crate::payment) fn of(channel: &PaymentChannel) -> Self {
        Spender { spent: channel.spent(), leased: channel.leased() }
    }

    /// Spends `cost`, or nothing.
    pub(in crate::payment) fn try_spend(&mut self, cost: Amount) -> bool {
        let after = self.spent.checked_add(cost).filter(|spent| *spent <= self.leased);
        self.spent = after.unwrap_or(self.spent);
        after.is_some()
    }

    pub(in crate::payment) fn raise(&mut self, leased: Amount) {
        self.leased = self.leased.max(leased);
    }

    /// The costs of committed reservations are spent in the same step as the lease that holds them comes.
    pub(in crate::payment) fn apply(&mut self, commit: &LeaseCommit) {
        self.raise(commit.leased);
        self.spent = self.spent.checked_add(commit.reserved_costs).unwrap();
        assert!(self.spent <= self.leased);
    }

    /// Gives up to `amount` of the unused lease back and returns what is leased now.
    pub(in crate::payment) fn give_back(&mut self, amount: Amount) -> Amount {
        let unused = self.leased.checked_sub(self.spent).unwrap();
        self.leased = self.leased.checked_sub(amount.min(unused)).unwrap();
        self.leased
    }
}

//! A verifier that knows its own signatures, and channels to try things on.

use super::{ChannelParams, ChannelPolicy, PaymentChannel, VerifiedVoucher, VoucherVerifier};
use crate::payment::{Amount, ChannelId, SignatureBytes};

pub(in crate::payment) const CHANNEL: ChannelId = ChannelId([7; 32]);

pub(in crate::payment) struct FakeVerifier;

impl VoucherVerifier for FakeVerifier {
    fn verify(&self, channel_id: &ChannelId, amount: Amount, signature: &SignatureBytes) -> bool {
        let amount_fits = signature.0[..16] == amount.units().to_be_bytes();
        amount_fits && signature.0[16..48] == channel_id.0 && signature.0[64] == 27
    }
}

/// A signature that the fake verifier takes; `variant` makes different bytes for the same content.
pub(in crate::payment) fn sign(amount: Amount, variant: u8) -> SignatureBytes {
    let mut bytes = [variant; 65];
    bytes[..16].copy_from_slice(&amount.units().to_be_bytes());
    bytes[16..48].copy_from_slice(&CHANNEL.0);
    bytes[64] = 27;
    SignatureBytes(bytes)
}

pub(in crate::payment) fn verified(amount: u128) -> VerifiedVoucher {
    let amount = Amount::new(amount);
    VerifiedVoucher::verify(&FakeVerifier, CHANNEL, amount, sign(amount, 1)).unwrap()
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

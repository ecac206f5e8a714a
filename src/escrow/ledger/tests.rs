//! The ledger's rules one by one, then random orders against a plain model of them.
#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use tollway_protocol::payment::{ChannelDescriptor, SecretKey};

use super::*;
use crate::escrow::{Escrow, EscrowError, LocalLedger};

const TOKEN: Address = Address([0x20; 20]);
const GRACE_MS: u64 = 1_000;
const OPERATOR: u8 = 7;

fn key(seed: u8) -> SecretKey {
    SecretKey::from_bytes([seed; 32]).unwrap()
}

fn amount(units: u64) -> Amount {
    Amount::from(units)
}

fn identity() -> LedgerIdentity {
    LedgerIdentity::of(&key(OPERATOR))
}

fn ledger() -> Ledger {
    let mut ledger = Ledger::new(identity(), LedgerConfig { grace_ms: GRACE_MS, dev: false });
    ledger.fund(key(1).address(), TOKEN, amount(1_000)).unwrap();
    ledger
}

fn open_order(deposit: u64, nonce: u64) -> OpenChannel {
    OpenChannel {
        payer: key(1).address(),
        payee: key(2).address(),
        token: TOKEN,
        salt: Hash([5; 32]),
        authorized_signer: Address::ZERO,
        deposit: amount(deposit),
        nonce,
        expiry: 0,
    }
}

fn sign<M: LedgerMessage>(message: M, signer: u8) -> Signed<M> {
    Signed::sign(message, &identity(), &key(signer))
}

fn opened(deposit: u64) -> (Ledger, ChannelDescriptor) {
    let mut ledger = ledger();
    let channel = ledger.open(&sign(open_order(deposit, 1), 1), 0).unwrap();
    (ledger, channel.descriptor)
}

fn voucher(descriptor: &ChannelDescriptor, units: u64, signer: u8) -> Signature {
    let domain = descriptor.voucher_domain();
    Voucher::sign(&domain, &key(signer), descriptor.id(), amount(units)).unwrap().signature
}

fn settle(ledger: &mut Ledger, descriptor: &ChannelDescriptor, units: u64) -> Result<Settlement, EscrowRefusal> {
    let order = Settle { channel_id: descriptor.id(), amount: amount(units) };
    ledger.settle(&sign(order, 2), &voucher(descriptor, units, 1))
}

fn close(
    ledger: &mut Ledger,
    descriptor: &ChannelDescriptor,
    units: u64,
    voucher: Option<Signature>,
) -> Result<Settlement, EscrowRefusal> {
    ledger.close(&sign(Close { channel_id: descriptor.id(), amount: amount(units) }, 2), voucher.as_ref())
}

fn balances(ledger: &Ledger) -> (u128, u128) {
    let of = |seed| ledger.balance(key(seed).address(), TOKEN).units();
    ledger.conservation().unwrap();
    (of(1), of(2))
}

/// `[pay.ledger.conserved]`
#[test]
fn settle_and_close_pay_exactly_the_signed_amounts_and_the_rest_goes_back() {
    let (mut ledger, channel) = opened(600);
    assert_eq!(balances(&ledger), (400, 0));
    settle(&mut ledger, &channel, 100).unwrap();
    assert_eq!(balances(&ledger), (400, 100));
    settle(&mut ledger, &channel, 250).unwrap();
    assert_eq!(balances(&ledger), (400, 250));
    let closed = close(&mut ledger, &channel, 300, Some(voucher(&channel, 300, 1))).unwrap();
    assert_eq!((closed.settled, closed.refunded), (amount(300), amount(300)));
    assert_eq!(balances(&ledger), (700, 300));
    assert!(ledger.channel(channel.id()).unwrap().finalized);
}

#[test]
fn a_settlement_is_only_above_what_was_settled_and_within_the_deposit() {
    let (mut ledger, channel) = opened(600);
    settle(&mut ledger, &channel, 100).unwrap();
    let refused = EscrowRefusal::NotAboveSettled { amount: amount(99), settled: amount(100) };
    assert_eq!(settle(&mut ledger, &channel, 99), Err(refused));
    assert_eq!(settle(&mut ledger, &channel, 600).map(|paid| paid.settled), Ok(amount(600)));
    let above = EscrowRefusal::AboveDeposit { amount: amount(601), deposit: amount(600) };
    assert_eq!(settle(&mut ledger, &channel, 601), Err(above));
    let nothing = EscrowRefusal::NotAboveSettled { amount: Amount::ZERO, settled: amount(600) };
    assert_eq!(settle(&mut ledger, &channel, 0), Err(nothing));
    assert_eq!(balances(&ledger), (400, 600));
}

#[test]
fn at_what_is_settled_a_channel_closes_without_a_voucher_and_without_a_payout() {
    let (mut ledger, channel) = opened(600);
    let above = EscrowRefusal::AboveDeposit { amount: amount(601), deposit: amount(600) };
    assert_eq!(close(&mut ledger, &channel, 601, Some(voucher(&channel, 601, 1))), Err(above));
    let missing = EscrowRefusal::VoucherMissing { amount: amount(1) };
    assert_eq!(close(&mut ledger, &channel, 1, None), Err(missing));
    assert_eq!(close(&mut ledger, &channel, 0, None).map(|closed| closed.refunded), Ok(amount(600)));
    assert_eq!(balances(&ledger), (1_000, 0));

    let (mut ledger, channel) = opened(600);
    settle(&mut ledger, &channel, 100).unwrap();
    let below = EscrowRefusal::BelowSettled { amount: amount(50), settled: amount(100) };
    assert_eq!(close(&mut ledger, &channel, 50, Some(voucher(&channel, 50, 1))), Err(below));
    close(&mut ledger, &channel, 100, None).unwrap();
    assert_eq!(balances(&ledger), (900, 100));
}

#[test]
fn repeated_orders_have_their_effect_once_and_the_same_answer() {
    let (mut ledger, channel) = opened(600);
    let first = ledger.channel(channel.id()).cloned().unwrap();
    assert_eq!(ledger.open(&sign(open_order(600, 1), 1), 9), Ok(first));
    let paid = settle(&mut ledger, &channel, 100).unwrap();
    assert_eq!(settle(&mut ledger, &channel, 100), Ok(paid));
    let closed = close(&mut ledger, &channel, 300, Some(voucher(&channel, 300, 1))).unwrap();
    let after = ledger.clone();
    assert_eq!(close(&mut ledger, &channel, 300, Some(voucher(&channel, 300, 1))), Ok(closed));
    assert_eq!(settle(&mut ledger, &channel, 100), Ok(paid));
    let ended = EscrowRefusal::Finalized { settled: amount(300) };
    assert_eq!(close(&mut ledger, &channel, 400, Some(voucher(&channel, 400, 1))), Err(ended));
    assert_eq!(settle(&mut ledger, &channel, 400), Err(ended));
    assert_eq!(ledger, after);
}

#[test]
fn a_stale_amount_with_a_random_signature_is_never_answered_with_success() {
    let (mut ledger, channel) = opened(600);
    settle(&mut ledger, &channel, 100).unwrap();
    let order = sign(Settle { channel_id: channel.id(), amount: amount(100) }, 2);
    let garbage = key(9).sign_digest(&Hash([1; 32]));
    assert!(matches!(ledger.settle(&order, &garbage), Err(EscrowRefusal::BadVoucher { .. })));
    assert!(matches!(close(&mut ledger, &channel, 100, Some(garbage)), Err(EscrowRefusal::BadVoucher { .. })));
}

#[test]
fn a_used_id_is_never_opened_again() {
    let (mut ledger, channel) = opened(600);
    let used = Err(EscrowRefusal::IdUsed(channel.id()));
    assert_eq!(ledger.open(&sign(open_order(600, 2), 1), 0), used);
    assert_eq!(ledger.open(&sign(open_order(100, 2), 1), 0), used);
    close(&mut ledger, &channel, 0, None).unwrap();
    assert_eq!(ledger.open(&sign(open_order(600, 1), 1), 0), used);
    assert_eq!(ledger.open(&sign(open_order(600, 3), 1), 0), used);
    assert_eq!(balances(&ledger), (1_000, 0));
}

#[test]
fn opening_needs_a_deposit_a_payee_and_the_money() {
    let mut ledger = ledger();
    let mut refused = |order| ledger.open(&sign(order, 1), 0).unwrap_err();
    assert_eq!(refused(open_order(0, 1)), EscrowRefusal::ZeroDeposit);
    assert_eq!(refused(OpenChannel { payee: Address::ZERO, ..open_order(1, 1) }), EscrowRefusal::NobodyPaid);
    let short = EscrowRefusal::InsufficientBalance { needed: amount(1_001), available: amount(1_000) };
    assert_eq!(refused(open_order(1_001, 1)), short);
    // A refused order uses up no nonce.
    assert!(ledger.open(&sign(open_order(1_000, 1), 1), 0).is_ok());
}

#[test]
fn a_top_up_raises_to_an_amount_and_may_be_repeated_in_any_order() {
    let (mut ledger, channel) = opened(100);
    let top_up =
        |deposit, nonce| sign(TopUp { channel_id: channel.id(), deposit: amount(deposit), nonce, expiry: 0 }, 1);
    assert_eq!(ledger.top_up(&top_up(300, 2), 0).unwrap().deposit, amount(300));
    assert_eq!(ledger.top_up(&top_up(300, 2), 0).unwrap().deposit, amount(300));
    assert_eq!(ledger.top_up(&top_up(500, 3), 0).unwrap().deposit, amount(500));
    assert_eq!(ledger.top_up(&top_up(300, 2), 0).unwrap().deposit, amount(500));
    assert_eq!(balances(&ledger), (500, 0));
    let short = EscrowRefusal::InsufficientBalance { needed: amount(600), available: amount(500) };
    assert_eq!(ledger.top_up(&top_up(1_100, 4), 0), Err(short));
    let stale = EscrowRefusal::NonceUsed { nonce: 3, last: 3 };
    assert_eq!(ledger.top_up(&top_up(600, 3), 0), Err(stale));
}

#[test]
fn orders_lapse_and_an_expiry_of_zero_never_does() {
    let mut ledger = ledger();
    let order = |expiry| sign(OpenChannel { expiry, ..open_order(10, 1) }, 1);
    let lapsed = EscrowRefusal::Expired { expiry_ms: 500, now_ms: 501 };
    assert_eq!(ledger.open(&order(500), 501), Err(lapsed));
    assert!(ledger.clone().open(&order(500), 500).is_ok());
    assert!(ledger.open(&order(0), u64::MAX).is_ok());
}

#[test]
fn the_payer_withdraws_after_the_grace_period_and_the_payee_can_settle_within_it() {
    let (mut ledger, channel) = opened(600);
    let id = channel.id();
    let withdraw = |nonce| sign(Withdraw { channel_id: id, nonce, expiry: 0 }, 1);
    let request = |nonce| sign(RequestClose { channel_id: id, nonce, expiry: 0 }, 1);
    assert_eq!(ledger.withdraw(&withdraw(2), 0), Err(EscrowRefusal::NoCloseRequested));
    assert_eq!(ledger.request_close(&request(2), 10).unwrap().close_requested_at_ms, Some(10));
    // Asking again does not move the date.
    assert_eq!(ledger.request_close(&request(3), 500).unwrap().close_requested_at_ms, Some(10));
    let waiting = EscrowRefusal::GracePeriod { until_ms: 1_010, now_ms: 1_009 };
    assert_eq!(ledger.withdraw(&withdraw(4), 1_009), Err(waiting));
    settle(&mut ledger, &channel, 200).unwrap();
    let withdrawn = ledger.withdraw(&withdraw(4), 1_010).unwrap();
    assert_eq!((withdrawn.settled, withdrawn.refunded), (amount(200), amount(400)));
    assert_eq!(balances(&ledger), (800, 200));
    assert_eq!(ledger.withdraw(&withdraw(4), 1_020), Ok(withdrawn));
    assert_eq!(close(&mut ledger, &channel, 200, None), Err(EscrowRefusal::Finalized { settled: amount(200) }));
    assert_eq!(settle(&mut ledger, &channel, 300), Err(EscrowRefusal::Finalized { settled: amount(200) }));
}

#[test]
fn a_top_up_cancels_a_requested_close_and_nobody_brings_it_back() {
    let (mut ledger, channel) = opened(100);
    let request = sign(RequestClose { channel_id: channel.id(), nonce: 2, expiry: 0 }, 1);
    ledger.request_close(&request, 10).unwrap();
    let top_up = TopUp { channel_id: channel.id(), deposit: amount(200), nonce: 3, expiry: 0 };
    assert_eq!(ledger.top_up(&sign(top_up, 1), 20).unwrap().close_requested_at_ms, None);
    assert_eq!(ledger.request_close(&request, 30), Err(EscrowRefusal::NonceUsed { nonce: 2, last: 3 }));
}

#[test]
fn every_order_needs_its_own_partys_signature() {
    let (mut ledger, channel) = opened(600);
    let before = ledger.clone();
    let channel_id = channel.id();
    let unauthorised = |refusal| matches!(refusal, EscrowRefusal::Unauthorised { .. });
    for stranger in [2, 3] {
        let other = OpenChannel { salt: Hash([6; 32]), ..open_order(10, 2) };
        assert!(unauthorised(ledger.open(&sign(other, stranger), 0).unwrap_err()));
        let order = TopUp { channel_id, deposit: amount(700), nonce: 2, expiry: 0 };
        assert!(unauthorised(ledger.top_up(&sign(order, stranger), 0).unwrap_err()));
        let order = RequestClose { channel_id, nonce: 2, expiry: 0 };
        assert!(unauthorised(ledger.request_close(&sign(order, stranger), 0).unwrap_err()));
        let order = Withdraw { channel_id, nonce: 2, expiry: 0 };
        assert!(unauthorised(ledger.withdraw(&sign(order, stranger), 0).unwrap_err()));
    }
    for stranger in [1, 3] {
        let order = Settle { channel_id, amount: amount(10) };
        let refused = ledger.settle(&sign(order, stranger), &voucher(&channel, 10, 1)).unwrap_err();
        assert!(unauthorised(refused));
        let order = sign(Close { channel_id, amount: Amount::ZERO }, stranger);
        assert!(unauthorised(ledger.close(&order, None).unwrap_err()));
    }
    let forged = sign(Settle { channel_id, amount: amount(10) }, 2);
    for (units, signer) in [(10, 2), (11, 1)] {
        let refused = ledger.settle(&forged, &voucher(&channel, units, signer)).unwrap_err();
        assert!(matches!(refused, EscrowRefusal::BadVoucher { .. }));
    }
    let unknown = Settle { channel_id: ChannelId([9; 32]), amount: amount(10) };
    let refused = ledger.settle(&sign(unknown, 2), &voucher(&channel, 10, 1));
    assert_eq!(refused, Err(EscrowRefusal::UnknownChannel(ChannelId([9; 32]))));
    assert_eq!(ledger, before);
}

#[test]
fn a_delegated_channel_takes_the_delegates_vouchers_only() {
    let mut ledger = ledger();
    let order = OpenChannel { authorized_signer: key(4).address(), ..open_order(600, 1) };
    let channel = ledger.open(&sign(order, 1), 0).unwrap().descriptor;
    let order = sign(Settle { channel_id: channel.id(), amount: amount(10) }, 2);
    assert!(ledger.settle(&order, &voucher(&channel, 10, 1)).is_err());
    assert!(ledger.settle(&order, &voucher(&channel, 10, 4)).is_ok());
}

#[test]
fn orders_and_vouchers_of_one_ledger_are_refused_by_another() {
    let (mut ledger, channel) = opened(600);
    let other = LedgerIdentity::of(&key(8));
    let mut theirs = Ledger::new(other, LedgerConfig { grace_ms: GRACE_MS, dev: true });
    // The deposit does not replay.
    let open = sign(open_order(600, 1), 1);
    assert!(matches!(theirs.open(&open, 0), Err(EscrowRefusal::Unauthorised { .. })));
    // Nor does a voucher, where the same parties have the same channel.
    let there = theirs.open(&Signed::sign(open_order(600, 1), &other, &key(1)), 0).unwrap().descriptor;
    assert_ne!(there.id(), channel.id());
    let order = Signed::sign(Settle { channel_id: there.id(), amount: amount(10) }, &other, &key(2));
    let refused = theirs.settle(&order, &voucher(&channel, 10, 1));
    assert!(matches!(refused, Err(EscrowRefusal::BadVoucher { .. })));
    assert!(theirs.settle(&order, &voucher(&there, 10, 1)).is_ok());
    // Nor do the payee's orders.
    let order = Signed::sign(Close { channel_id: channel.id(), amount: Amount::ZERO }, &other, &key(2));
    assert!(matches!(ledger.close(&order, None), Err(EscrowRefusal::Unauthorised { .. })));
}

#[test]
fn development_mode_credits_what_a_deposit_lacks_and_counts_it_as_funding() {
    let mut ledger = Ledger::new(identity(), LedgerConfig { grace_ms: GRACE_MS, dev: true });
    ledger.fund(key(1).address(), TOKEN, amount(40)).unwrap();
    let channel = ledger.open(&sign(open_order(100, 1), 1), 0).unwrap().descriptor;
    assert_eq!(balances(&ledger), (0, 0));
    let top_up = TopUp { channel_id: channel.id(), deposit: amount(150), nonce: 2, expiry: 0 };
    ledger.top_up(&sign(top_up, 1), 0).unwrap();
    close(&mut ledger, &channel, 0, None).unwrap();
    assert_eq!(balances(&ledger), (150, 0));
}

#[test]
fn the_largest_amounts_do_not_overflow() {
    let mut ledger = Ledger::new(identity(), LedgerConfig { grace_ms: u64::MAX, dev: true });
    ledger.fund(key(1).address(), TOKEN, Amount::MAX).unwrap();
    let everything = OpenChannel { deposit: Amount::MAX, ..open_order(0, 1) };
    let channel = ledger.open(&sign(everything, 1), 0).unwrap().descriptor;
    assert_eq!(ledger.fund(key(3).address(), TOKEN, amount(1)), Err(EscrowRefusal::TooMuch));
    let more = OpenChannel { salt: Hash([6; 32]), ..open_order(1, 2) };
    assert_eq!(ledger.open(&sign(more, 1), 0), Err(EscrowRefusal::TooMuch));
    ledger.request_close(&sign(RequestClose { channel_id: channel.id(), nonce: 2, expiry: 0 }, 1), 5).unwrap();
    let withdraw = sign(Withdraw { channel_id: channel.id(), nonce: 3, expiry: 0 }, 1);
    assert!(matches!(ledger.withdraw(&withdraw, 6), Err(EscrowRefusal::GracePeriod { .. })));
    let order = sign(Settle { channel_id: channel.id(), amount: Amount::MAX }, 2);
    let all = Voucher::sign(&channel.voucher_domain(), &key(1), channel.id(), Amount::MAX).unwrap();
    ledger.settle(&order, &all.signature).unwrap();
    assert_eq!(balances(&ledger), (0, u128::MAX));
}

#[tokio::test]
async fn the_local_ledger_serves_as_an_escrow() {
    let local = LocalLedger::with_clock(ledger(), || 77);
    let escrow: &dyn Escrow = &local;
    assert_eq!((escrow.chain_id(), escrow.address()), (identity().chain_id, identity().escrow));
    let channel = escrow.open(sign(open_order(600, 1), 1)).await.unwrap();
    let id = channel.descriptor.id();
    assert_eq!(escrow.channel(id).await.unwrap(), Some(channel.clone()));
    assert_eq!(escrow.channel(ChannelId([1; 32])).await.unwrap(), None);
    let order = sign(Settle { channel_id: id, amount: amount(10) }, 2);
    let refused = escrow.settle(order.clone(), voucher(&channel.descriptor, 11, 1)).await.unwrap_err();
    assert!(matches!(refused, EscrowError::Refused(EscrowRefusal::BadVoucher { .. })));
    escrow.settle(order, voucher(&channel.descriptor, 10, 1)).await.unwrap();
    let request = sign(RequestClose { channel_id: id, nonce: 2, expiry: 0 }, 1);
    assert_eq!(escrow.request_close(request).await.unwrap().close_requested_at_ms, Some(77));
    local.read(|ledger| ledger.conservation()).unwrap();
}

mod model;

fn fund_order(holder: u8, units: u64, nonce: u64) -> Fund {
    Fund { holder: key(holder).address(), token: TOKEN, amount: amount(units), nonce, expiry: 0 }
}

#[test]
fn funding_needs_the_operators_key_and_counts_once_for_each_order() {
    let mut ledger = ledger();
    let before = ledger.clone();
    for stranger in [1, 2] {
        let refused = ledger.fund_by(&sign(fund_order(2, 50, 1), stranger), 0);
        assert_eq!(refused, Err(EscrowRefusal::Unauthorised { expected: identity().escrow }));
    }
    assert_eq!(ledger, before);
    for _ in 0..3 {
        assert_eq!(ledger.fund_by(&sign(fund_order(2, 50, 1), OPERATOR), 0), Ok(amount(50)));
    }
    // The same nonce with another content is another order, and an older one has had its turn.
    let other = ledger.fund_by(&sign(fund_order(2, 51, 1), OPERATOR), 0);
    assert_eq!(other, Err(EscrowRefusal::NonceUsed { nonce: 1, last: 1 }));
    assert_eq!(ledger.fund_by(&sign(fund_order(2, 50, 2), OPERATOR), 0), Ok(amount(100)));
    let late = ledger.fund_by(&sign(fund_order(2, 50, 1), OPERATOR), 0);
    assert_eq!(late, Err(EscrowRefusal::NonceUsed { nonce: 1, last: 2 }));
    let lapsed = ledger.fund_by(&sign(Fund { expiry: 5, ..fund_order(2, 50, 3) }, OPERATOR), 6);
    assert_eq!(lapsed, Err(EscrowRefusal::Expired { expiry_ms: 5, now_ms: 6 }));
    ledger.conservation().unwrap();
}

#[test]
fn a_transfer_moves_what_its_signer_has_and_counts_once() {
    let mut ledger = ledger();
    let order = |units: u64, nonce: u64| Transfer {
        from: key(1).address(),
        to: key(3).address(),
        token: TOKEN,
        amount: amount(units),
        nonce,
        expiry: 0,
    };
    assert!(matches!(ledger.transfer(&sign(order(1, 1), 3), 0), Err(EscrowRefusal::Unauthorised { .. })));
    let short = EscrowRefusal::InsufficientBalance { needed: amount(1_001), available: amount(1_000) };
    assert_eq!(ledger.transfer(&sign(order(1_001, 1), 1), 0), Err(short));
    for _ in 0..3 {
        assert_eq!(ledger.transfer(&sign(order(400, 1), 1), 0), Ok(amount(600)));
    }
    let to_oneself = Transfer { to: key(1).address(), ..order(600, 2) };
    assert_eq!(ledger.transfer(&sign(to_oneself, 1), 0), Ok(amount(600)));
    assert_eq!(ledger.balance(key(3).address(), TOKEN), amount(400));
    assert_eq!(ledger.last_nonce(key(1).address()), 2);
    ledger.conservation().unwrap();
}

#[test]
fn one_huge_deposit_in_development_mode_leaves_room_for_others() {
    let mut ledger = Ledger::new(identity(), LedgerConfig { dev: true, ..LedgerConfig::default() });
    let huge = OpenChannel { deposit: Amount::MAX, ..open_order(1, 1) };
    assert!(matches!(ledger.open(&sign(huge, 1), 0), Err(EscrowRefusal::InsufficientBalance { .. })));
    let largest = OpenChannel { deposit: MAX_DEV_CREDIT, ..open_order(1, 1) };
    ledger.open(&sign(largest, 1), 0).unwrap();
    let other = OpenChannel { payer: key(3).address(), ..open_order(600, 1) };
    ledger.open(&sign(other, 3), 0).unwrap();
    ledger.conservation().unwrap();
}

//! Each rule at its limit and one over.

use proptest::prelude::*;

use super::fixtures::{
    CHANNEL, Spender, accept, channel, forged, key, lease, policy, stored, verified, verified_close, verify, voucher,
};
use super::*;
use crate::payment::{
    Address, CloseAuthorization, CloseVoucher, SignatureError, Verifier, VoucherDomain, VoucherError, VoucherProtocol,
};

fn units(amount: u128) -> Amount {
    Amount::new(amount)
}

fn precheck(channel: &PaymentChannel, amount: u128) -> Result<Precheck, VoucherRefusal> {
    channel.precheck_voucher(&voucher(amount, 1))
}

fn spend(channel: &mut PaymentChannel, total: u128) {
    channel.record_spent(units(total)).unwrap();
}

/// `[pay.voucher.checks]`
#[test]
fn a_voucher_is_at_most_the_deposit() {
    let channel = channel(100);
    assert_eq!(precheck(&channel, 100), Ok(Precheck::Verify));
    let refusal = VoucherRefusal::AboveDeposit { amount: units(101), deposit: units(100) };
    assert_eq!(precheck(&channel, 101), Err(refusal));
}

#[test]
fn a_voucher_stays_in_the_protocols_range() {
    let mut channel = channel(0);
    assert!(channel.set_deposit(Amount::MAX).is_some());
    let ceiling = Amount::MAX_U96;
    assert_eq!(precheck(&channel, ceiling.units()), Ok(Precheck::Verify));
    let amount = units(ceiling.units() + 1);
    assert_eq!(precheck(&channel, amount.units()), Err(VoucherRefusal::OutOfRange { amount, ceiling }));
}

#[test]
fn a_step_is_at_least_the_minimum_delta_except_the_last_one() {
    let mut channel = channel(105);
    accept(&mut channel, 50);
    assert_eq!(precheck(&channel, 60), Ok(Precheck::Verify));
    let refusal = VoucherRefusal::BelowMinimumDelta { amount: units(59), least: units(60) };
    assert_eq!(precheck(&channel, 59), Err(refusal));
    accept(&mut channel, 100);
    assert!(matches!(precheck(&channel, 104), Err(VoucherRefusal::BelowMinimumDelta { .. })));
    assert_eq!(precheck(&channel, 105), Ok(Precheck::Verify));
}

/// `[pay.voucher.checks]`
#[test]
fn only_the_accepted_voucher_itself_is_acknowledged_again() {
    let mut channel = channel(100);
    accept(&mut channel, 50);
    assert_eq!(precheck(&channel, 50), Ok(Precheck::Again));
    let stale = VoucherRefusal::NotAbove { amount: units(50), accepted: units(50) };
    // A forged signature on a stale amount must not read as success.
    assert_eq!(channel.precheck_voucher(&forged(50)), Err(stale));
    assert_eq!(channel.precheck_voucher(&voucher(50, 2)), Err(stale));
    assert!(matches!(precheck(&channel, 49), Err(VoucherRefusal::NotAbove { .. })));
    assert!(matches!(precheck(&channel, 0), Err(VoucherRefusal::NotAbove { .. })));
}

#[test]
fn a_voucher_of_another_channel_is_refused() {
    let channel = channel(100);
    let stated = ChannelId([8; 32]);
    let refusal = VoucherRefusal::OtherChannel { stated, expected: CHANNEL };
    assert_eq!(channel.precheck_voucher(&Voucher { channel_id: stated, ..voucher(50, 1) }), Err(refusal));
}

/// `[pay.voucher.verified]`
#[test]
fn a_bad_signature_makes_no_verified_voucher() {
    let wrong = VoucherError::Signature(SignatureError::WrongSigner { expected: key().address() });
    assert!(verify(&voucher(50, 1)).is_ok() && verify(&voucher(50, 2)).is_ok());
    assert_eq!(verify(&Voucher { amount: units(51), ..voucher(50, 1) }), Err(wrong));
    assert_eq!(verify(&Voucher { channel_id: ChannelId([8; 32]), ..voucher(50, 1) }), Err(wrong));
    assert_eq!(verify(&forged(50)), Err(wrong));
}

#[test]
fn a_v2_close_needs_the_payers_consent_to_that_amount_and_a_v1_close_has_none() {
    let [v1, v2] = [VoucherProtocol::V1, VoucherProtocol::V2]
        .map(|protocol| VoucherDomain::new(protocol, 4217, Address([0xee; 20])));
    let verify = |close: CloseVoucher, domain: &VoucherDomain| {
        VerifiedClose::verify(CHANNEL, &close, domain, &Verifier::new(key().address())).map(|close| close.close())
    };
    let plain = CloseVoucher::sign(&v1, &key(), CHANNEL, units(30)).unwrap();
    assert_eq!(verify(plain, &v1), Ok(plain));
    let consented = CloseVoucher::sign(&v2, &key(), CHANNEL, units(30)).unwrap();
    assert_eq!(verify(consented, &v2), Ok(consented));
    assert!(verify(consented, &v1).is_err() && verify(plain, &v2).is_err());
    let without = CloseVoucher { authorization: None, ..consented };
    assert_eq!(verify(without, &v2), Err(VoucherError::CloseAuthorizationMissing(VoucherProtocol::V2)));
    let other = CloseAuthorization::sign(&v2, &key(), CHANNEL, units(31)).unwrap();
    let other = CloseVoucher { authorization: Some(other.signature), ..consented };
    assert!(matches!(verify(other, &v2), Err(VoucherError::Signature(_))));
    let unneeded = CloseVoucher { authorization: consented.authorization, ..plain };
    assert_eq!(verify(unneeded, &v1), Err(VoucherError::NoCloseAuthorization(VoucherProtocol::V1)));
}

#[test]
fn a_voucher_counts_only_when_it_is_committed() {
    let mut channel = channel(100);
    let plan = channel.propose_voucher(&verified(50)).unwrap().unwrap();
    assert_eq!(channel.accepted(), Amount::ZERO);
    assert_eq!(channel.commit_voucher(plan), Ok(units(50)));
}

#[test]
fn a_higher_voucher_meanwhile_makes_a_lower_one_a_no_effect() {
    let mut channel = channel(100);
    let lower = channel.propose_voucher(&verified(50)).unwrap().unwrap();
    accept(&mut channel, 80);
    assert_eq!(channel.propose_voucher(&verified(60)), Ok(None));
    assert_eq!(channel.commit_voucher(lower), Ok(units(80)));
    assert_eq!(channel.snapshot().vouchers.len(), 1);
}

#[test]
fn updates_reach_the_store_in_any_order() {
    let mut channel = channel(50);
    let mut stored = channel.snapshot();
    // The deposit's own write is late: the voucher above the stored deposit carries it along.
    let deposit = channel.set_deposit(units(100)).unwrap();
    let plan = channel.propose_voucher(&verified(80)).unwrap().unwrap();
    assert_eq!(plan.update().apply_to(&mut stored), Ok(()));
    assert_eq!(deposit.apply_to(&mut stored), Ok(()));
    channel.commit_voucher(plan).unwrap();
    assert_eq!(stored, channel.snapshot());
}

/// `[pay.counters]`
#[test]
fn a_lease_takes_what_is_free_and_no_more() {
    let mut channel = channel(100);
    accept(&mut channel, 50);
    assert_eq!(lease(&mut channel), Some(40));
    assert_eq!(lease(&mut channel), Some(50));
    assert_eq!(lease(&mut channel), None);
}

#[test]
fn a_lease_is_planned_only_below_what_is_wanted() {
    let mut channel = channel(100);
    accept(&mut channel, 100);
    lease(&mut channel);
    assert_eq!(channel.propose_lease(units(40)), Ok(None));
    spend(&mut channel, 1);
    assert!(channel.propose_lease(units(40)).unwrap().is_some());
}

#[test]
fn one_lease_is_written_at_a_time() {
    let mut channel = channel(100);
    accept(&mut channel, 100);
    let plan = channel.propose_lease(units(1)).unwrap().unwrap();
    assert_eq!(channel.free(), units(60));
    assert_eq!(channel.propose_lease(Amount::MAX), Ok(None));
    assert_eq!(channel.surrender_lease(), Err(LeaseError::Busy));
    let again = plan.clone();
    channel.abandon_lease(plan).unwrap();
    assert_eq!(channel.free(), units(100));
    assert_eq!(channel.commit_lease(again.clone()), Err(LeaseError::Stale));
    lease(&mut channel);
    assert_eq!(channel.commit_lease(again), Err(LeaseError::Stale));
    assert_eq!(channel.leased(), units(40));
}

/// `[pay.lease]`
#[test]
fn the_store_refuses_the_lease_of_a_former_owner() {
    let mut channel = channel(100);
    accept(&mut channel, 100);
    let mut stored = channel.snapshot();
    let plan = channel.propose_lease(units(1)).unwrap().unwrap();
    let taken = channel.take_ownership(1).unwrap();
    taken.apply_to(&mut stored).unwrap();
    assert_eq!(plan.update().apply_to(&mut stored), Err(StaleUpdate::Epoch { planned: 0, current: 1 }));
    // Of two takers of the same epoch one wins.
    assert_eq!(taken.apply_to(&mut stored), Err(StaleUpdate::Epoch { planned: 1, current: 1 }));
    assert_eq!(stored.leased, Amount::ZERO);
}

/// `[pay.epoch.greater]`
#[test]
fn only_a_greater_epoch_takes_over() {
    let mut channel = channel(100);
    assert_eq!(channel.take_ownership(0), Err(StaleEpoch { current: 0 }));
    assert!(channel.take_ownership(5).is_ok());
    assert_eq!(channel.take_ownership(5), Err(StaleEpoch { current: 5 }));
    assert!(channel.take_ownership(6).is_ok());
}

#[test]
fn spending_is_recorded_up_to_the_lease() {
    let mut channel = channel(100);
    accept(&mut channel, 100);
    lease(&mut channel);
    let over = SpendError::AboveLeased { spent: units(41), leased: units(40) };
    assert_eq!(channel.record_spent(units(41)), Err(over));
    assert_eq!(channel.record_spent(units(40)), Ok(()));
    assert_eq!(channel.record_spent(units(3)), Ok(()));
    assert_eq!(channel.spent(), units(40));
}

#[test]
fn metered_bytes_go_to_the_store_with_the_next_update_and_never_fall() {
    let mut channel = channel(100);
    let mut stored = channel.snapshot();
    channel.record_units(7);
    channel.record_units(5);
    let plan = channel.propose_voucher(&verified(50)).unwrap().unwrap();
    plan.update().apply_to(&mut stored).unwrap();
    assert_eq!((channel.units(), stored.units), (7, 7));
}

/// `[pay.lease]`
#[test]
fn a_crash_counts_the_lease_as_spent_and_an_orderly_end_does_not() {
    let mut channel = channel(100);
    accept(&mut channel, 100);
    lease(&mut channel);
    spend(&mut channel, 7);
    let crashed = PaymentChannel::restore(channel.snapshot(), policy(10, 40)).unwrap();
    assert_eq!((crashed.spent(), crashed.leased()), (units(40), units(40)));
    let plan = channel.surrender_lease().unwrap();
    // Out of reach before the write is confirmed: the store may have it already.
    assert!(channel.record_spent(units(8)).is_err());
    assert_eq!(channel.commit_lease(plan).unwrap().leased, units(7));
    let ended = PaymentChannel::restore(channel.snapshot(), policy(10, 40)).unwrap();
    assert_eq!(ended.spent(), units(7));
}

#[test]
fn a_reservation_moves_its_cost_into_the_lease_and_frees_the_rest() {
    let mut channel = channel(100);
    accept(&mut channel, 100);
    let first = channel.reserve(units(60), 1000).unwrap();
    let second = channel.reserve(units(40), 1000).unwrap();
    assert_eq!(channel.reserve(units(1), 1000), Err(ReserveError::Short { missing: units(1) }));
    assert_eq!(lease(&mut channel), None);
    let above = ReservationError::AboveMaximum { cost: units(61), maximum: units(60) };
    assert_eq!(channel.commit_reservation(first, units(61)), Err(above));
    channel.commit_reservation(first, units(25)).unwrap();
    assert_eq!(channel.commit_reservation(first, units(25)), Err(ReservationError::Unknown));
    assert_eq!(channel.release(first), Err(ReservationError::Unknown));
    assert_eq!((channel.reserved(), channel.spent()), (units(65), Amount::ZERO));
    let mut gate = Spender::of(&channel);
    let plan = channel.propose_lease(Amount::ZERO).unwrap().unwrap();
    let commit = channel.commit_lease(plan).unwrap();
    assert_eq!((commit.reserved_costs, commit.reservations.as_slice()), (units(25), [first].as_slice()));
    gate.apply(&commit);
    assert_eq!(gate, Spender::of(&channel));
    assert_eq!((channel.spent(), channel.reserved()), (units(25), units(40)));
    assert_eq!(channel.release(second), Ok(units(40)));
    assert_eq!(channel.free(), units(75));
}

#[test]
fn an_abandoned_lease_keeps_its_reservations_due() {
    let mut channel = channel(100);
    accept(&mut channel, 100);
    let id = channel.reserve(units(10), 0).unwrap();
    channel.commit_reservation(id, units(10)).unwrap();
    let plan = channel.propose_lease(Amount::ZERO).unwrap().unwrap();
    channel.abandon_lease(plan).unwrap();
    // A committed cost does not expire.
    assert!(channel.expire(u64::MAX).is_empty());
    let plan = channel.propose_lease(Amount::ZERO).unwrap().unwrap();
    assert_eq!(channel.commit_lease(plan).unwrap().reservations, [id]);
}

#[test]
fn a_reservation_expires_at_its_deadline() {
    let mut channel = channel(100);
    accept(&mut channel, 100);
    let id = channel.reserve(units(60), 1000).unwrap();
    assert_eq!(channel.next_expiry_ms(), Some(1000));
    assert!(channel.expire(999).is_empty());
    assert_eq!(channel.expire(1000), [id]);
    assert_eq!((channel.reserved(), channel.next_expiry_ms()), (Amount::ZERO, None));
}

#[test]
fn reservations_have_a_limit() {
    let mut channel = channel(100);
    for _ in 0..MAX_RESERVATIONS {
        channel.reserve(Amount::ZERO, 0).unwrap();
    }
    assert_eq!(channel.reserve(Amount::ZERO, 0), Err(ReserveError::TooMany { limit: MAX_RESERVATIONS }));
}

#[test]
fn a_reservation_can_take_back_what_an_unused_lease_holds() {
    let mut channel = channel(100);
    accept(&mut channel, 40);
    lease(&mut channel);
    assert_eq!(channel.need(units(30)), Ok(None));
    assert_eq!(channel.reserve(units(30), 0), Err(ReserveError::Leased { missing: units(30) }));
    let mut gate = Spender::of(&channel);
    let lowered = gate.give_back(units(30));
    let plan = channel.propose_return(lowered).unwrap();
    let commit = channel.commit_lease(plan).unwrap();
    gate.apply(&commit);
    assert!(channel.reserve(units(30), 0).is_ok());
    assert_eq!((gate.spent, gate.leased), (units(0), units(10)));
}

#[test]
fn a_voucher_is_needed_once_for_each_exhaustion() {
    let mut channel = channel(100);
    accept(&mut channel, 40);
    lease(&mut channel);
    spend(&mut channel, 35);
    assert_eq!(channel.need(units(5)), Ok(None));
    let need = NeedVoucher { required: units(50), accepted: units(40), spent: units(35), deposit: units(100) };
    assert_eq!(channel.need(units(6)), Ok(Some(need)));
    assert_eq!(channel.need(units(6)), Ok(None));
    accept(&mut channel, 50);
    assert_eq!(channel.need(units(15)), Ok(None));
    assert_eq!(channel.need(units(30)).unwrap().unwrap().required, units(65));
    // A new connection has seen none of it.
    let _ = channel.take_ownership(1).unwrap();
    assert_eq!(channel.need(units(30)).unwrap().unwrap().required, units(65));
}

#[test]
fn a_needed_step_ends_at_the_deposit_and_a_dearer_unit_goes_beyond() {
    let mut channel = channel(45);
    accept(&mut channel, 40);
    assert_eq!(channel.need(units(41)).unwrap().unwrap().required, units(45));
    let _ = channel.take_ownership(1).unwrap();
    assert_eq!(channel.need(units(46)).unwrap().unwrap().required, units(46));
    let _ = channel.take_ownership(2).unwrap();
    assert_eq!(channel.need(Amount::MAX).unwrap().unwrap().required, Amount::MAX);
}

#[test]
fn less_is_asked_for_again_when_a_reservation_is_released() {
    let mut channel = channel(200);
    accept(&mut channel, 40);
    let id = channel.reserve(units(40), 0).unwrap();
    assert_eq!(channel.need(units(60)).unwrap().unwrap().required, units(100));
    channel.release(id).unwrap();
    assert_eq!(channel.need(units(60)).unwrap().unwrap().required, units(60));
    assert_eq!(channel.need(units(60)), Ok(None));
}

#[test]
fn the_escrows_counters_never_fall() {
    let mut channel = channel(100);
    accept(&mut channel, 50);
    assert!(channel.set_deposit(units(100)).is_none());
    assert!(channel.set_deposit(units(99)).is_none());
    assert!(channel.set_deposit(units(101)).is_some());
    assert_eq!(channel.set_settled(units(51)), Err(SettledAboveAccepted { settled: units(51), accepted: units(50) }));
    assert!(channel.set_settled(units(50)).unwrap().is_some());
    assert_eq!(channel.set_settled(units(49)), Ok(None));
    assert_eq!((channel.deposit(), channel.settled()), (units(101), units(50)));
    assert_eq!(channel.settled_beyond_spent(), Some(units(50)));
}

/// Accepted 60, spent 30, settled 20.
fn half_used() -> PaymentChannel {
    let mut channel = channel(100);
    accept(&mut channel, 20);
    accept(&mut channel, 60);
    lease(&mut channel);
    spend(&mut channel, 30);
    let _ = channel.set_settled(units(20)).unwrap();
    channel
}

#[test]
fn a_close_voucher_is_taken_from_what_was_spent_up() {
    assert!(matches!(half_used().close(&verified_close(30)), Ok(CloseAnswer::Taken { .. })));
    let disputed = half_used().close(&verified_close(29)).unwrap();
    assert!(matches!(disputed, CloseAnswer::Disputed { claimed, spent, .. }
        if claimed == units(29) && spent == units(30)));
}

#[test]
fn a_close_voucher_lies_between_settled_and_accepted() {
    assert!(matches!(half_used().close(&verified_close(60)), Ok(CloseAnswer::Taken { .. })));
    let above = CloseRefusal::AboveAccepted { amount: units(61), accepted: units(60) };
    assert_eq!(half_used().close(&verified_close(61)), Err(above));
    assert!(matches!(half_used().close(&verified_close(20)), Ok(CloseAnswer::Disputed { .. })));
    let below = CloseRefusal::BelowSettled { amount: units(19), settled: units(20) };
    assert_eq!(half_used().close(&verified_close(19)), Err(below));
}

#[test]
fn an_unused_channel_closes_at_zero() {
    let mut channel = channel(100);
    assert!(matches!(channel.close(&verified_close(0)), Ok(CloseAnswer::Taken { .. })));
}

#[test]
fn a_repeated_close_gets_the_same_answer_before_and_after_settlement() {
    let mut channel = half_used();
    let first = channel.close(&verified_close(30)).unwrap();
    assert_eq!(channel.close(&verified_close(30)).unwrap(), first);
    let other = CloseRefusal::Closed(ChannelClosed::Closing { amount: units(30) });
    assert_eq!(channel.close(&verified_close(31)), Err(other));
    let _ = channel.set_settled(units(30)).unwrap();
    assert!(
        matches!(channel.close(&verified_close(30)), Ok(CloseAnswer::Taken { close, .. }) if close.amount == units(30))
    );
    let _ = channel.finalize(units(30)).unwrap();
    assert!(
        matches!(channel.close(&verified_close(30)), Ok(CloseAnswer::Taken { close, .. }) if close.amount == units(30))
    );
    assert_eq!(channel.close(&verified_close(31)), Err(CloseRefusal::Closed(ChannelClosed::Finalized)));
}

/// A crash writes the rest of the lease off as spent: more than the close voucher that was taken before it.
#[test]
fn a_close_that_was_taken_stays_taken_after_a_crash() {
    let mut channel = half_used();
    let (leased, mut store) = (channel.leased(), channel.snapshot());
    assert!(leased > units(30), "the fixture leases ahead");
    let CloseAnswer::Taken { update, .. } = channel.close(&verified_close(30)).unwrap() else { panic!("disputed") };
    update.apply_to(&mut store).unwrap();
    let mut channel = PaymentChannel::restore(store.clone(), channel.policy()).unwrap();
    assert_eq!(channel.spent(), leased);
    let again = channel.close(&verified_close(30)).unwrap();
    assert!(matches!(&again, CloseAnswer::Taken { close, .. } if close.amount == units(30)), "{again:?}");
    let CloseAnswer::Taken { update, .. } = again else { return };
    update.apply_to(&mut store).unwrap();
    assert!(matches!(store.phase, ChannelPhase::Closing { close } if close.amount == units(30)));
}

#[test]
fn once_closing_nothing_new_is_served() {
    let mut channel = half_used();
    let _ = channel.close(&verified_close(30)).unwrap();
    let closed = ChannelClosed::Closing { amount: units(30) };
    assert_eq!(precheck(&channel, 80), Err(closed.into()));
    assert_eq!(channel.propose_voucher(&verified(80)), Err(closed.into()));
    assert_eq!(channel.propose_lease(Amount::MAX), Err(closed));
    assert_eq!(channel.need(units(1)), Err(closed));
    assert_eq!(channel.reserve(units(1), 0), Err(closed.into()));
    assert_eq!(channel.record_spent(units(31)), Err(closed.into()));
    assert!(channel.surrender_lease().is_ok());
}

#[test]
fn a_dispute_stops_service_and_ends_with_a_higher_close() {
    let mut channel = half_used();
    let first = channel.close(&verified_close(29)).unwrap();
    assert_eq!(channel.close(&verified_close(29)).unwrap(), first);
    assert_eq!(channel.need(units(1)), Err(ChannelClosed::Disputed { claimed: units(29) }));
    assert!(matches!(channel.close(&verified_close(30)), Ok(CloseAnswer::Taken { .. })));
}

#[test]
fn a_close_waits_for_open_calls() {
    let mut channel = half_used();
    let id = channel.reserve(units(20), 0).unwrap();
    assert_eq!(channel.close(&verified_close(30)), Err(CloseRefusal::Busy { reserved: units(20) }));
    channel.release(id).unwrap();
    assert!(channel.close(&verified_close(30)).is_ok());
}

#[test]
fn without_the_payer_the_smallest_voucher_that_covers_spent_is_used() {
    let mut channel = half_used();
    assert_eq!(channel.settlement_voucher(), None, "20 is settled already");
    let (close, _update) = channel.close_without_payer().unwrap();
    assert_eq!(close.amount, units(60));
    assert_eq!(channel.close_without_payer().unwrap().0, close);
    let mut unused = super::fixtures::channel(100);
    assert_eq!(unused.close_without_payer(), Err(CloseRefusal::NoVoucher));
}

#[test]
fn mid_session_settlement_uses_the_largest_voucher_up_to_spent() {
    let mut channel = channel(100);
    accept(&mut channel, 10);
    accept(&mut channel, 20);
    accept(&mut channel, 60);
    lease(&mut channel);
    spend(&mut channel, 19);
    assert_eq!(channel.settlement_voucher().unwrap().amount, units(10));
    spend(&mut channel, 20);
    assert_eq!(channel.settlement_voucher().unwrap().amount, units(20));
    assert_eq!(channel.payer_gone_voucher().unwrap().amount, units(20));
    spend(&mut channel, 21);
    assert_eq!(channel.payer_gone_voucher().unwrap().amount, units(60));
}

#[test]
fn stored_vouchers_are_bounded_and_spread_evenly() {
    let vouchers = stored(1..=1000, 5);
    assert_eq!(vouchers.len(), StoredVouchers::CAPACITY);
    assert_eq!(vouchers.largest_up_to(units(5)).unwrap().amount, units(5));
    assert_eq!(vouchers.highest().unwrap().amount, units(1000));
    let amounts: Vec<_> = vouchers.iter().map(|voucher| voucher.amount.units()).collect();
    let widest = amounts.windows(2).map(|pair| pair[1] - pair[0]).max().unwrap();
    assert!(widest <= 1000 / 16 * 3, "{amounts:?}");
}

#[test]
fn settlement_takes_the_nearest_below_and_a_payer_gone_the_nearest_above() {
    assert_eq!(stored([], 0).largest_up_to(Amount::MAX), None);
    assert_eq!(stored([], 0).smallest_from(Amount::ZERO), None);
    let vouchers = stored([10, 20, 20, 15, 30], 0);
    let below = |amount| vouchers.largest_up_to(units(amount)).map(|voucher| voucher.amount.units());
    let above = |amount| vouchers.smallest_from(units(amount)).map(|voucher| voucher.amount.units());
    assert_eq!([below(9), below(10), below(29), below(99)], [None, Some(10), Some(20), Some(30)]);
    assert_eq!([above(0), above(10), above(11), above(31)], [Some(10), Some(10), Some(20), None]);
}

proptest! {
    /// Against keeping all: the accepted voucher is always there, one at or below spent whenever there ever was, and never
    /// more than the bound is kept. When spent jumps past vouchers that were thinned out, the one below is not the best.
    #[test]
    fn what_settlement_needs_is_never_let_go(steps in prop::collection::vec((1..1_000u128, 0..1_200u128), 1..120)) {
        let (mut kept, mut all) = (StoredVouchers::default(), Vec::new());
        let one = *stored([1], 0).highest().unwrap();
        let (mut amount, mut spent) = (0, 0);
        for (more, use_up) in steps {
            amount += more;
            let voucher = SignedAmount { amount: units(amount), ..one };
            kept.push(voucher, units(spent));
            all.push(voucher);
            prop_assert!(kept.is_sound());
            prop_assert_eq!(kept.highest(), Some(&voucher));
            let best = all.iter().rev().find(|voucher| voucher.amount <= units(spent));
            let below = kept.largest_up_to(units(spent));
            prop_assert_eq!(below.is_some(), best.is_some());
            prop_assert!(below.map(|voucher| voucher.amount) <= best.map(|voucher| voucher.amount));
            prop_assert!(kept.smallest_from(units(spent)).is_some());
            spent = amount.min(spent + use_up);
        }
    }
}

#[test]
fn a_loss_stands_up_to_the_cap_of_each_break() {
    let mut channel = half_used();
    let refusal = Disputed { spent: units(30), received: units(19), lost: units(11), cap: units(10) };
    assert_eq!(channel.resume(units(19), units(10)), Err(refusal));
    assert_eq!(channel.resume(units(20), units(10)).unwrap().0, units(10));
    assert_eq!(channel.resume(units(20), units(10)).unwrap().0, units(10));
    spend(&mut channel, 40);
    // Ten of the twenty that are missing stand since the first break.
    assert_eq!(channel.resume(units(20), units(10)).unwrap().0, units(20));
    assert_eq!(channel.lost_in_flight(), units(20));
}

#[test]
fn a_broken_record_is_not_restored() {
    let sound = half_used().snapshot();
    assert_eq!(sound.validate(), Ok(()));
    let refused = |change: fn(&mut ChannelSnapshot)| {
        let mut record = sound.clone();
        change(&mut record);
        matches!(PaymentChannel::restore(record, policy(10, 40)), Err(OpenError::Broken(_)))
    };
    assert!(refused(|record| record.deposit = Amount::new(59)));
    assert!(refused(|record| record.voucher_ceiling = Amount::new(59)));
    assert!(refused(|record| record.leased = Amount::new(61)));
    assert!(refused(|record| record.spent = Amount::new(41)));
    assert!(refused(|record| record.settled = Amount::new(61)));
    assert!(refused(|record| record.accepted = Amount::new(61)));
    assert!(refused(|record| record.vouchers = StoredVouchers::default()));
    assert!(refused(|record| record.lost_in_flight = Amount::new(31)));
    let close = verified_close(61).close();
    let mut record = sound.clone();
    record.phase = ChannelPhase::Closing { close };
    assert!(PaymentChannel::restore(record, policy(10, 40)).is_err());
    assert!(matches!(PaymentChannel::restore(sound, policy(10, 0)), Err(OpenError::NoLease)));
}

#[test]
fn a_record_survives_its_encoding() {
    let mut channel = half_used();
    let _ = channel.close(&verified_close(30)).unwrap();
    let record = channel.snapshot();
    let bytes = postcard::to_stdvec(&record).unwrap();
    assert_eq!(postcard::from_bytes::<ChannelSnapshot>(&bytes).unwrap(), record);
    let text = serde_json::to_string(&record).unwrap();
    assert!(text.contains("\"accepted\":\"60\""));
}

//! The payer's policy, each rule at its limit and one over.

use super::*;

fn units(amount: u128) -> Amount {
    Amount::new(amount)
}

fn limits() -> PayerLimits {
    PayerLimits {
        budget: units(1000),
        max_ahead: units(100),
        low_mark: None,
        minimum_delta: units(10),
        deposit_limit: units(600),
        top_up_step: units(200),
        in_flight_cap: units(80),
        loss_budget: units(50),
    }
}

/// Deposit 500, one voucher of 100 signed.
fn book() -> PayerBook {
    let mut book = PayerBook::open(limits(), units(500));
    sign_next(&mut book);
    book
}

fn sign(book: &mut PayerBook, amount: Amount) {
    if let Some(ceiling) = book.next_ceiling(amount) {
        book.record_ceiling(ceiling);
    }
    book.record_signed(amount).unwrap();
}

fn sign_next(book: &mut PayerBook) {
    let amount = book.next_voucher().unwrap();
    sign(book, amount);
}

fn need(required: u128, spent: u128) -> NeedVoucher {
    NeedVoucher { required: units(required), accepted: units(spent), spent: units(spent), deposit: units(500) }
}

fn declined(answer: NeedAnswer) -> Decline {
    match answer {
        NeedAnswer::Decline(decline) => decline,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_wallet_signs_ahead_below_the_low_mark() {
    let mut book = book();
    assert_eq!(book.signed(), units(100));
    book.record_received(units(50));
    assert_eq!(book.next_voucher(), None, "50 ahead is the mark itself");
    book.record_received(units(51));
    assert_eq!(book.next_voucher(), Some(units(151)));
    assert_eq!(book.peak_ahead(), units(100));
}

#[test]
fn steps_keep_the_minimum_delta_but_for_the_last_one_to_the_deposit() {
    let mut book = PayerBook::open(PayerLimits { low_mark: Some(units(100)), ..limits() }, units(105));
    sign_next(&mut book);
    book.record_received(units(3));
    assert_eq!(book.next_voucher(), None, "103 is neither a step of 10 nor the deposit");
    book.record_received(units(5));
    assert_eq!(book.next_voucher(), Some(units(105)));
}

/// `[pay.payer.bound]`
#[test]
fn nothing_is_signed_beyond_the_limits_or_the_ceiling() {
    let mut book = book();
    book.record_ceiling(units(200));
    let over = SignError::AboveLimit { amount: units(101), limit: units(100) };
    assert_eq!(book.record_signed(units(101)), Err(over));
    book.record_received(units(101));
    let over = SignError::AboveCeiling { amount: units(201), ceiling: units(200) };
    assert_eq!(book.record_signed(units(201)), Err(over));
    assert_eq!(book.record_signed(units(200)), Ok(()));
    let mut poor = PayerBook::open(PayerLimits { budget: units(60), ..limits() }, units(500));
    assert_eq!(poor.next_voucher(), Some(units(60)));
    poor.record_ceiling(units(100));
    assert!(poor.record_signed(units(61)).is_err());
}

/// `[pay.payer.bound]`
#[test]
fn a_forged_request_never_moves_the_bound() {
    let mut book = book();
    assert_eq!(book.handle_need(need(101, 1)), NeedAnswer::Silent);
    book.record_received(units(9));
    assert_eq!(book.retry_need(), Some(NeedAnswer::Silent), "109 is not a step of 10");
    book.record_received(units(10));
    assert_eq!(book.retry_need(), Some(NeedAnswer::Sign(units(110))));
    assert_eq!(book.next_voucher(), Some(units(110)));
    assert_eq!(book.handle_need(need(100, 0)), NeedAnswer::Silent, "that voucher is on its way");
}

#[test]
fn a_request_above_the_budget_is_declined_with_both_numbers_and_for_good() {
    let mut book = PayerBook::open(PayerLimits { budget: units(100), ..limits() }, units(500));
    sign_next(&mut book);
    book.record_received(units(90));
    let decline = declined(book.handle_need(need(110, 90)));
    assert_eq!(decline, Decline { reason: DeclineReason::Budget, needed: units(110), limit: units(100) });
    assert_eq!(decline.to_string(), "110 base units are needed, above the budget of 100");
    assert_eq!(declined(book.handle_need(need(95, 90))), decline);
}

#[test]
fn a_unit_above_max_ahead_is_declined_unless_reservations_explain_it() {
    assert_eq!(book().handle_need(need(150, 50)), NeedAnswer::Silent);
    let decline = declined(book().handle_need(need(151, 50)));
    assert_eq!(decline, Decline { reason: DeclineReason::MaxAhead, needed: units(101), limit: units(100) });
    let mut reserving = book();
    reserving.record_open_reservations(units(1));
    assert_eq!(reserving.handle_need(need(151, 50)), NeedAnswer::Silent);
    // The reservation has ended since, and the request crossed with its end.
    reserving.record_open_reservations(units(0));
    assert_eq!(reserving.retry_need(), Some(NeedAnswer::Silent));
}

#[test]
fn a_count_beyond_the_in_flight_cap_is_declined() {
    let mut book = book();
    assert_eq!(book.handle_need(need(110, 80)), NeedAnswer::Silent);
    let decline = declined(book.handle_need(need(110, 81)));
    assert_eq!(decline, Decline { reason: DeclineReason::Counts, needed: units(81), limit: units(80) });
}

#[test]
fn the_deposit_is_topped_up_to_its_limit_and_only_when_the_own_count_agrees() {
    let mut book = PayerBook::open(limits(), units(120));
    sign_next(&mut book);
    assert_eq!(book.handle_need(need(130, 60)), NeedAnswer::Silent);
    book.record_received(units(60));
    assert_eq!(book.retry_need(), Some(NeedAnswer::TopUp { to: units(320) }));
    book.record_deposit(units(320));
    assert_eq!(book.retry_need(), Some(NeedAnswer::Sign(units(160))));
    sign(&mut book, units(160));
    assert_eq!(book.retry_need(), None);
    book.record_deposit(units(600));
    book.record_received(units(550));
    sign(&mut book, units(600));
    let decline = declined(book.handle_need(need(601, 550)));
    assert_eq!(decline, Decline { reason: DeclineReason::Deposit, needed: units(601), limit: units(600) });
}

/// `[pay.terms.workable]`
#[test]
fn terms_are_workable_when_the_dearest_unit_fits_between_two_vouchers() {
    assert_eq!(limits().acceptable(units(90)), Ok(()));
    let refusal = limits().acceptable(units(91)).unwrap_err();
    assert_eq!(refusal, UnworkableTerms { dearest_unit: units(91), minimum_delta: units(10), max_ahead: units(100) });
    assert!(limits().acceptable(Amount::MAX).is_err());
}

#[test]
fn a_loss_stands_within_the_cap_and_the_loss_budget() {
    let mut book = book();
    book.record_received(units(15));
    let refusal = ResumeRefusal::Disputed { spent: units(96), counted: units(15), limit: units(95) };
    assert_eq!(book.resume(units(96)), Err(refusal));
    assert_eq!(book.resume(units(66)), Err(ResumeRefusal::LossBudget { lost: units(51), limit: units(50) }));
    assert_eq!(book.resume(units(65)), Ok(units(50)));
    assert_eq!((book.received(), book.counted()), (units(15), units(65)));
    assert_eq!(book.resume(units(65)), Ok(units(50)));
    assert_eq!(book.resume(units(66)), Err(ResumeRefusal::LossBudget { lost: units(51), limit: units(50) }));
}

#[test]
fn nobody_spends_more_than_was_signed() {
    let mut book = book();
    book.record_received(units(60));
    assert!(book.resume(units(100)).is_ok());
    let refusal = ResumeRefusal::Disputed { spent: units(101), counted: units(100), limit: units(100) };
    assert_eq!(book.resume(units(101)), Err(refusal));
}

/// `[pay.close.amount]`
#[test]
fn the_close_states_what_was_counted_and_at_least_what_is_settled() {
    let mut book = book();
    book.record_received(units(40));
    book.resume(units(50)).unwrap();
    assert_eq!(book.close_amount(units(30)), units(50));
    assert_eq!(book.close_amount(units(70)), units(70));
    assert_eq!(book.close_amount(units(700)), units(100), "never above what was signed");
}

#[test]
fn a_restart_counts_the_ceiling_as_signed_and_signs_again_for_a_payee_that_has_less() {
    let book = book();
    assert_eq!(book.snapshot().ceiling, units(200));
    let mut again = PayerBook::restore(limits(), book.snapshot());
    assert_eq!(again.signed(), units(200));
    again.record_connected(units(0));
    assert_eq!(again.handle_need(need(60, 0)), NeedAnswer::Sign(units(100)));
    again.record_connected(units(700));
    assert_eq!(again.next_voucher(), None, "a claim above what was signed makes it sign less");
}

#[test]
fn an_epoch_is_above_all_that_were_sent_or_named() {
    let mut book = book();
    assert_eq!(book.next_epoch(None), Some(1));
    assert_eq!(book.next_epoch(None), Some(2));
    assert_eq!(book.next_epoch(Some(9)), Some(10));
    assert_eq!(book.next_epoch(Some(u64::MAX)), None);
    assert_eq!(book.snapshot().epoch, 10);
}

#[test]
fn a_top_up_ends_at_the_budget_so_that_all_of_it_can_be_signed() {
    let mut book = PayerBook::open(PayerLimits { budget: units(104), ..limits() }, units(100));
    sign_next(&mut book);
    book.record_received(units(95));
    assert_eq!(book.handle_need(need(102, 95)), NeedAnswer::TopUp { to: units(104) });
    book.record_deposit(units(104));
    assert_eq!(book.retry_need(), Some(NeedAnswer::Sign(units(104))));
}

#[test]
fn a_step_that_the_budget_does_not_hold_is_declined() {
    let mut book = PayerBook::open(PayerLimits { budget: units(104), ..limits() }, units(100));
    sign_next(&mut book);
    book.record_received(units(95));
    // Somebody else has raised the deposit beyond the budget: the step to it is 10 at least.
    book.record_deposit(units(200));
    let decline = declined(book.handle_need(need(102, 95)));
    assert_eq!(decline, Decline { reason: DeclineReason::Budget, needed: units(110), limit: units(104) });
}

#[test]
fn a_request_above_the_deposit_and_its_limit_is_declined_before_the_count_has_caught_up() {
    let mut book = PayerBook::open(PayerLimits { deposit_limit: units(0), ..limits() }, units(120));
    sign_next(&mut book);
    let decline = declined(book.handle_need(need(130, 60)));
    assert_eq!(decline, Decline { reason: DeclineReason::Deposit, needed: units(130), limit: units(120) });
}

/// Whoever waits for the mark is woken at it at once when it is reached already: there must be something to sign then,
/// or it is woken for ever.
#[test]
fn at_the_mark_there_is_a_voucher_to_sign() {
    let amounts = [0u128, 1, 2, 3, 7, 10, 50, 99, 100, 101, 200];
    let mut seen = 0;
    for max_ahead in [1, 2, 10, 100] {
        for minimum_delta in [0, 1, 10].into_iter().filter(|delta| *delta < max_ahead) {
            for low_mark in [None, Some(units(0)), Some(units(1)), Some(units(max_ahead))] {
                for (budget, deposit) in [(1000, 1000), (100, 200), (105, 105), (200, 105)] {
                    for (received, required) in amounts.iter().flat_map(|one| amounts.map(|two| (*one, two))) {
                        let limits = PayerLimits {
                            budget: units(budget),
                            max_ahead: units(max_ahead),
                            minimum_delta: units(minimum_delta),
                            deposit_limit: units(0),
                            low_mark,
                            ..limits()
                        };
                        let mut book = PayerBook::open(limits, units(deposit));
                        if let Some(first) = book.next_voucher() {
                            sign(&mut book, first);
                        }
                        book.record_received(units(received));
                        book.handle_need(need(required, 0));
                        // As many as there are; then nothing is due, and the mark is ahead.
                        while let Some(next) = match book.retry_need() {
                            Some(NeedAnswer::Sign(amount)) => Some(amount),
                            _ => book.next_voucher(),
                        } {
                            sign(&mut book, next);
                        }
                        let mark = book.next_mark();
                        assert!(mark > book.received(), "{mark} is reached already, and nothing is due: {book:?}");
                        if mark <= units(deposit) {
                            book.record_received(mark);
                            let asked = matches!(book.retry_need(), Some(NeedAnswer::Sign(_)));
                            assert!(asked || book.next_voucher().is_some(), "nothing is due at {mark}: {book:?}");
                            seen += 1;
                        }
                    }
                }
            }
        }
    }
    assert!(seen > 1_000, "{seen}");
}

//! Money credit: what may pass, what waits, what is held, and that both sides count the same.

use std::sync::Arc;

use tollway_protocol::error::{Reason, code};
use tollway_protocol::id::ConnectionId;
use tollway_protocol::message::{Flow, Status};
use tollway_protocol::metadata::Metadata;
use tollway_protocol::payment::{Amount, IDEMPOTENCY_KEY, Price};
use tollway_protocol::peer::Read;
use tollway_protocol::session::{
    CallKey, CallSpec, CommandError, Event, PayeeMoney, PayerMoney, PriceTable, ResponseSpec,
};
use tollway_protocol::stream::{Ending, StreamKey};

use crate::pair::{A, B, Pair};

const FREE: u64 = 0;
/// 10 for a call.
const CALL: u64 = 1;
/// 3 for an item.
const ITEM: u64 = 2;
/// 10 for a call, 3 for an item, 1 for each 10 bytes out.
const ALL: u64 = 3;
/// 1 for each 100 bytes out.
const BYTES: u64 = 4;
/// 10 at least and 100 at most for a call, as its response states, and 3 for an item.
const RESERVED: u64 = 5;

pub(crate) fn prices() -> Arc<PriceTable> {
    let price = |call, item, rate: Option<&str>| Price {
        call: Amount::new(call),
        item: Amount::new(item),
        bytes_out: rate.map(|rate| rate.parse().unwrap()),
        bytes_in: None,
        max: None,
    };
    let reserved = Price { max: Some(Amount::new(100)), ..price(10, 3, None) };
    let all = [
        (CALL, price(10, 0, None)),
        (ITEM, price(0, 3, None)),
        (ALL, price(10, 3, Some("1/10B"))),
        (BYTES, price(0, 0, Some("1/100B"))),
        (RESERVED, reserved),
    ];
    Arc::new(all.into_iter().collect())
}

fn paid(pair: &mut Pair, leased: u128) -> ConnectionId {
    let payer = PayerMoney { prices: prices(), received: Amount::ZERO, mark: Amount::MAX, hold: Amount::MAX };
    let payee = PayeeMoney { prices: prices(), spent: Amount::ZERO, leased: Amount::new(leased), low: Amount::ZERO };
    pair.connect_paid(payer, payee)
}

fn raise(pair: &mut Pair, id: ConnectionId, leased: u128) {
    pair.peers[B].session_mut().raise_money(id, Amount::new(leased));
    pair.run();
}

/// What the payee has spent and the payer has received.
fn books(pair: &Pair, id: ConnectionId) -> (u128, u128) {
    let [received, spent] = [A, B].map(|side| pair.peers[side].session().money(id).unwrap().amount.units());
    (spent, received)
}

/// What money was asked for since the last look; other events are dropped.
fn needed(pair: &mut Pair) -> Vec<u128> {
    let events = pair.take(B).into_iter();
    let cost = |event| if let Event::MoneyNeeded { cost, .. } = event { Some(cost.units()) } else { None };
    events.filter_map(cost).collect()
}

/// A call with a stream from payee to payer: the call at B, the payee's end and the payer's.
fn watch(pair: &mut Pair, id: ConnectionId, method: u64) -> (CallKey, StreamKey, StreamKey) {
    let (_, keys) = pair.call_with(A, id, method, b"", &[Flow::FromPeer]);
    pair.run();
    let call = pair.requests(B).pop().expect("its price is covered");
    (call.call, call.slots[0].stream, keys[0])
}

/// `[pay.call.hold]`: no handler starts that nobody pays for.
#[test]
fn a_call_waits_until_its_price_is_covered_and_free_methods_go_on() {
    let mut pair = Pair::one_lane();
    let id = paid(&mut pair, 15);
    pair.call(A, id, CALL, b"first");
    pair.call(A, id, CALL, b"second");
    pair.call(A, id, FREE, b"free");
    pair.call(A, id, CALL, b"third");
    pair.run();
    let events = pair.take(B);
    assert!(
        matches!(&events[..], [Event::CallRequested(first), Event::MoneyNeeded { cost, .. }, Event::CallRequested(free)]
        if first.payload == "first" && free.payload == "free" && cost.units() == 20),
        "{events:?}"
    );
    raise(&mut pair, id, 20);
    let events = pair.take(B);
    assert!(
        matches!(&events[..], [Event::CallRequested(second), Event::MoneyNeeded { .. }] if second.payload == "second")
    );
    assert_eq!(books(&pair, id), (0, 0), "held is not spent");
}

/// `[pay.gate.order]`, `[pay.gate.split]`, `[pay.gate.once]`
#[test]
fn a_batch_is_split_at_the_item_that_cannot_be_paid_and_nothing_priced_passes_it() {
    let mut pair = Pair::one_lane();
    let id = paid(&mut pair, 10);
    let (_, first, first_in) = watch(&mut pair, id, ITEM);
    let (_, second, second_in) = watch(&mut pair, id, ITEM);
    let (_, free, free_in) = watch(&mut pair, id, FREE);
    (b'0'..=b'4').for_each(|item| pair.peers[B].push(first, &[item]).unwrap());
    pair.run();
    assert_eq!(needed(&mut pair), [3]);
    for stream in [second, free] {
        (b'0'..=b'4').for_each(|item| pair.peers[B].push(stream, &[item]).unwrap());
    }
    pair.run();
    assert_eq!(needed(&mut pair), [], "said once for each exhaustion");
    assert_eq!(pair.read_all(A, first_in).0, ["0", "1", "2"]);
    assert!(pair.read_all(A, second_in).0.is_empty());
    assert_eq!(pair.read_all(A, free_in).0.len(), 5);
    assert_eq!(books(&pair, id), (9, 9));
    raise(&mut pair, id, 18);
    assert_eq!(pair.read_all(A, first_in).0, ["3", "4"], "what stood first goes first");
    assert_eq!(pair.read_all(A, second_in).0, ["0"]);
    assert_eq!(needed(&mut pair), [3]);
    raise(&mut pair, id, 1000);
    assert_eq!(pair.read_all(A, second_in).0.len(), 4);
    assert_eq!(books(&pair, id), (30, 30));
}

/// `[pay.gate.order]`: a stream in the slack of its rounding passes with what is free, not with a batch.
#[test]
fn the_slack_of_a_rounding_lets_no_batch_pass_what_waits() {
    let mut pair = Pair::one_lane();
    let id = paid(&mut pair, 12);
    let (_, bytes, bytes_in) = watch(&mut pair, id, BYTES);
    let (_, items, _) = watch(&mut pair, id, ITEM);
    pair.peers[B].push(bytes, &[0; 50]).unwrap();
    pair.run();
    assert_eq!(books(&pair, id), (1, 1), "50 of 100 bytes are paid ahead");
    (0..4).for_each(|_| pair.peers[B].push(items, b"").unwrap());
    pair.run();
    assert_eq!((needed(&mut pair), books(&pair, id)), (vec![3], (10, 10)));
    // 2 are left: 200 bytes more than the slack could be paid, but something waits already.
    (0..10).for_each(|_| pair.peers[B].push(bytes, &[0; 25]).unwrap());
    pair.run();
    assert_eq!(pair.read_all(A, bytes_in).0.len(), 3, "the 50, and two of 25 in the slack");
    assert_eq!(books(&pair, id), (10, 10));
}

/// `[pay.call.free-failure]` `[pay.gate.resume]`
#[test]
fn a_failure_releases_what_was_held_and_wakes_what_waited_for_it() {
    let mut pair = Pair::one_lane();
    let id = paid(&mut pair, 10);
    pair.call(A, id, CALL, b"fails");
    pair.call(A, id, CALL, b"waits");
    pair.run();
    let [first] = &pair.requests(B)[..] else { panic!() };
    pair.answer(B, first.call, Status::HandlerFailed, b"");
    pair.run();
    let [second] = &pair.requests(B)[..] else { panic!("the released 10 pay for the second") };
    pair.answer(B, second.call, Status::Ok, b"");
    pair.run();
    let charged: Vec<_> = pair.responses(A).iter().map(|answer| answer.charged.units()).collect();
    assert_eq!(charged, [0, 10]);
    assert_eq!(books(&pair, id), (10, 10));
}

/// `[pay.call.charged]`
#[test]
fn charged_in_response_and_done_is_what_the_payer_counted() {
    let mut pair = Pair::one_lane();
    let id = paid(&mut pair, 10_000);
    for (status, free) in [
        (Status::Ok, false),
        (Status::AppError, false),
        (Status::Cancelled, false),
        (Status::HandlerFailed, true),
        (Status::UnknownMethod, true),
        (Status::InvalidPayload, true),
        (Status::TooLarge, true),
        (Status::PaymentFailed, true),
        (Status::DeadlineExceeded, false),
        (Status::Refused, true),
    ] {
        for method in [FREE, CALL, ITEM, ALL, BYTES] {
            pair.call(A, id, method, b"");
            pair.run();
            let call = pair.requests(B)[0].call;
            pair.answer(B, call, status, &[0; 101]);
            pair.run();
            let events = pair.take(A);
            let Some(Event::CallEnded { charged, counted, .. }) = events.last() else { panic!("{events:?}") };
            assert_eq!(charged, counted, "{status:?} of method {method}");
            let expected = [0, 10, 0, 10 + 11, 2][method as usize];
            assert_eq!(charged.units(), if free { 0 } else { expected }, "{status:?} of method {method}");
            let (spent, received) = books(&pair, id);
            assert_eq!(spent, received);
        }
    }
    // With a stream: items before and after the answer, over several frames.
    let (call, stream, stream_in) = watch(&mut pair, id, ALL);
    let before = books(&pair, id).0;
    for _ in 0..7 {
        pair.peers[B].push(stream, &[0; 13]).unwrap();
        pair.run();
    }
    pair.answer(B, call, Status::Ok, &[0; 5]);
    pair.peers[B].push(stream, &[0; 13]).unwrap();
    pair.peers[B].finish(stream);
    pair.run();
    assert_eq!(pair.read_all(A, stream_in).0.len(), 8);
    let events = pair.take(A);
    let Some(Event::CallEnded { charged, counted, .. }) = events.last() else { panic!() };
    // 10 + 8 × 3 + ceil((8 × 13 + 5) / 10): rounded once. [pay.meter.rounding]
    assert_eq!((charged.units(), counted.units()), (10 + 24 + 11, 45));
    assert_eq!(books(&pair, id), (before + 45, before + 45));
}

#[test]
fn a_cancel_before_the_price_is_covered_is_free_and_ends_the_calls_streams() {
    let mut pair = Pair::one_lane();
    let id = paid(&mut pair, 0);
    let flows = [Flow::ToPeer, Flow::FromPeer];
    let (call, keys) = pair.call_with(A, id, CALL, &[0; 1000], &flows);
    pair.peers[A].push(keys[0], b"early").unwrap();
    pair.peers[A].push_with(keys[0], b"nested", &flows).unwrap();
    pair.run();
    pair.peers[A].cancel_call(call);
    pair.run();
    let events = pair.take(B);
    assert!(!events.iter().any(|event| matches!(event, Event::CallRequested(_))), "no handler saw it");
    let answer = pair.responses(A).pop().unwrap();
    assert_eq!((answer.status, answer.charged.units()), (Status::Cancelled, 0));
    assert!(matches!(pair.peers[A].read(keys[1]), Read::Ended(_)));
    assert_eq!(pair.counts(), [(1, 0, 0); 2]);
    assert_eq!(pair.peers[B].stream_ends(), (0, 0));
    // A stream that had ended before, with items that nobody will read, is forgotten too.
    let (call, keys) = pair.call_with(A, id, CALL, b"", &[Flow::ToPeer]);
    pair.peers[A].push(keys[0], b"early").unwrap();
    pair.peers[A].finish(keys[0]);
    pair.run();
    pair.peers[A].cancel_call(call);
    pair.run();
    assert_eq!(pair.peers[B].stream_ends(), (0, 0));
    // Its bytes of the body window came back, and nothing is blocked.
    for _ in 0..1100 {
        let call = pair.call(A, id, CALL, &[0; 1000]);
        pair.run();
        pair.peers[A].cancel_call(call);
        pair.run();
    }
    pair.assert_alive();
    assert_eq!(pair.counts(), [(1, 0, 0); 2]);
}

/// Items for a call's streams may come before the call is delivered. `[pay.call.streams]`
#[test]
fn items_for_a_call_that_waits_for_its_price_are_kept() {
    let mut pair = Pair::one_lane();
    let id = paid(&mut pair, 0);
    let (_, keys) = pair.call_with(A, id, CALL, b"", &[Flow::ToPeer]);
    pair.peers[A].push(keys[0], b"early").unwrap();
    pair.peers[A].finish(keys[0]);
    pair.run();
    raise(&mut pair, id, 10);
    let call = pair.requests(B).pop().unwrap();
    assert_eq!(pair.read_all(B, call.slots[0].stream).0, ["early"]);
}

/// `[pay.gate.resume]`
#[test]
fn a_stream_that_waits_for_money_can_be_stopped_and_what_waited_behind_it_goes_on() {
    let mut pair = Pair::one_lane();
    let id = paid(&mut pair, 12);
    let (served, dear, dear_in) = watch(&mut pair, id, ALL);
    let (_, cheap, cheap_in) = watch(&mut pair, id, ITEM);
    pair.peers[B].push(dear, &[0; 1000]).unwrap();
    pair.run();
    assert_eq!(needed(&mut pair), [113], "with the 10 that are held");
    pair.peers[B].push(cheap, b"").unwrap();
    pair.run();
    pair.peers[A].stop(dear_in, code::CANCELLED);
    pair.run();
    assert!(pair.read_all(A, cheap_in).0.is_empty(), "3 are not there: 10 of 12 are held");
    pair.answer(B, served, Status::HandlerFailed, b"");
    pair.run();
    assert_eq!(pair.read_all(A, cheap_in).0.len(), 1);
    assert_eq!(pair.counts()[B], (1, 1, 1));
}

/// What waits in vain ends free of charge, what can be paid goes on, and what comes later in vain ends too.
/// `[pay.decline.ends]`
#[test]
fn after_a_decline_what_cannot_be_paid_ends_and_everything_else_goes_on() {
    let mut pair = Pair::one_lane();
    let id = paid(&mut pair, 23);
    let (_, stream, reading) = watch(&mut pair, id, ITEM);
    let (waiting, answered) = (pair.call(A, id, CALL, b"a"), pair.call(A, id, CALL, b"b"));
    pair.run();
    let served = pair.requests(B);
    assert_eq!(served.len(), 2, "20 are held for both");
    let in_vain = pair.call(A, id, CALL, b"c");
    pair.peers[B].push(stream, b"one").unwrap();
    pair.run();
    assert_eq!(needed(&mut pair), [30], "for the third call, the two that are held included");
    pair.peers[B].session_mut().fail_unpaid(id);
    pair.run();
    let failed = pair.responses(A);
    assert!(matches!(&failed[..], [failed] if failed.call == in_vain && failed.status == Status::PaymentFailed));
    assert_eq!(failed[0].charged, Amount::ZERO);
    assert_eq!(pair.read_all(A, reading).0, ["one"], "3 were left, and nothing waits before it any more");
    pair.peers[B].push(stream, b"two").unwrap();
    pair.run();
    pair.run();
    assert!(pair.take(B).iter().any(
        |event| matches!(event, Event::StreamStopped { code: code::PAYMENT_ENDED, stream: which } if *which == stream)
    ));
    assert_eq!(pair.read_all(A, reading), (vec![], Some(Ending::Reset(code::PAYMENT_ENDED))));
    served.iter().for_each(|call| pair.answer(B, call.call, Status::Ok, b""));
    pair.run();
    let done: Vec<_> = pair.responses(A).iter().map(|answer| (answer.call, answer.charged.units())).collect();
    assert_eq!(done, [(waiting, 10), (answered, 10)], "what is covered is charged as ever");
    assert_eq!(books(&pair, id), (23, 23));
}

/// What the payer has no use for any more was delivered, and costs. `[pay.received.arrival]`
#[test]
fn what_arrives_counts_also_when_it_is_discarded() {
    let mut pair = Pair::one_lane();
    let id = paid(&mut pair, 100);
    let (_, stream, reading) = watch(&mut pair, id, ITEM);
    (0..4).for_each(|_| pair.peers[B].push(stream, b"item").unwrap());
    pair.write(B);
    pair.peers[A].stop(reading, code::CANCELLED);
    pair.run();
    assert_eq!(books(&pair, id), (12, 12), "four items crossed the Stop");
    let cancelled = pair.call(A, id, ALL, b"");
    pair.run();
    let served = pair.requests(B).pop().unwrap().call;
    pair.answer(B, served, Status::Ok, &[0; 100]);
    pair.write(B);
    pair.peers[A].cancel_call(cancelled);
    assert_eq!(books(&pair, id).1, 12, "the call's price counts with its first frame");
    pair.run();
    assert_eq!(books(&pair, id), (32, 32), "and with what it brings, though nobody waits for it");
}

#[test]
fn an_answer_that_waits_for_money_gives_way_to_a_cancel() {
    let mut pair = Pair::one_lane();
    let id = paid(&mut pair, 15);
    let call = pair.call(A, id, ALL, b"");
    pair.run();
    let served = pair.requests(B)[0].call;
    pair.answer_with(B, served, Status::Ok, &[0; 1000], &[Flow::ToPeer, Flow::FromPeer]);
    pair.run();
    assert_eq!(needed(&mut pair), [110], "with the 10 that are held");
    pair.peers[A].cancel_call(call);
    pair.run();
    let events = pair.take(A);
    assert!(
        matches!(&events[..], [Event::CallAnswered(answer), .., Event::CallEnded { charged, .. }]
        if answer.status == Status::Cancelled && charged.units() == 10),
        "{events:?}"
    );
    assert_eq!(pair.peers[B].stream_ends(), (0, 0));
    assert_eq!(pair.counts(), [(1, 0, 0); 2]);
}

#[test]
fn money_low_comes_once_until_it_is_raised() {
    let mut pair = Pair::one_lane();
    let payer = PayerMoney { prices: prices(), received: Amount::ZERO, mark: Amount::MAX, hold: Amount::MAX };
    let (leased, low) = (Amount::new(30), Amount::new(20));
    let id = pair.connect_paid(payer, PayeeMoney { prices: prices(), spent: Amount::ZERO, leased, low });
    let (_, stream, _) = watch(&mut pair, id, ITEM);
    let mut low_after = Vec::new();
    for item in 1..10 {
        pair.peers[B].push(stream, b"").unwrap();
        pair.run();
        if pair.take(B).iter().any(|event| matches!(event, Event::MoneyLow { .. })) {
            low_after.push(item);
            if item == 4 {
                raise(&mut pair, id, 33);
            }
        }
    }
    assert_eq!(low_after, [4, 5], "18 of 30 are left; 18 of 33 after the raise");
}

/// `[pay.received.mark]`
#[test]
fn the_payers_mark_is_said_once_until_it_is_set_anew() {
    let mut pair = Pair::one_lane();
    let payer = PayerMoney { prices: prices(), received: Amount::new(100), mark: Amount::new(105), hold: Amount::MAX };
    let (spent, leased) = (Amount::new(100), Amount::new(1000));
    let id = pair.connect_paid(payer, PayeeMoney { prices: prices(), spent, leased, low: Amount::ZERO });
    let (_, stream, _) = watch(&mut pair, id, ITEM);
    let mut marks = Vec::new();
    for _ in 0..5 {
        pair.peers[B].push(stream, b"").unwrap();
        pair.run();
        for event in pair.take(A) {
            if let Event::ReceivedMark { received, .. } = event {
                marks.push(received.units());
            }
        }
        if marks == [106] && books(&pair, id).1 == 109 {
            pair.peers[A].session_mut().set_received_mark(id, Amount::new(112));
        }
    }
    assert_eq!(marks, [106, 112]);
    pair.peers[A].session_mut().set_received_mark(id, Amount::new(110));
    assert!(matches!(&pair.take(A)[..], [Event::ReceivedMark { .. }]), "it is reached already");
}

/// `[session.close.payment-first]`
#[test]
fn payment_messages_go_out_before_their_connections_close() {
    let mut pair = Pair::one_lane();
    let id = paid(&mut pair, 0);
    for message in ["receipt", "final receipt"] {
        pair.peers[B].session_mut().send_payment(id, message.into()).unwrap();
    }
    pair.peers[B].session_mut().close(id, Reason::none());
    pair.run();
    let events = pair.take(A);
    assert!(
        matches!(&events[..], [Event::Payment { .. }, Event::Payment { message, .. }, Event::ConnectionClosed { .. }]
        if message == "final receipt"),
        "{events:?}"
    );
}

/// `[pay.close.stops]`: what was leased before is no longer for sale.
#[test]
fn a_close_stops_all_that_costs_something_once_its_calls_have_ended() {
    let mut pair = Pair::one_lane();
    let id = paid(&mut pair, 1000);
    pair.call(A, id, ALL, b"");
    pair.run();
    assert_eq!(pair.peers[B].session_mut().stop_money(id), Err(1));
    let served = pair.requests(B)[0].call;
    pair.answer(B, served, Status::Ok, &[0; 10]);
    pair.run();
    pair.take(A);
    let last = pair.peers[B].session_mut().stop_money(id).unwrap().expect("it is paid to this side");
    assert_eq!(last.amount.units(), 11);
    raise(&mut pair, id, 2000);
    for method in [CALL, ITEM, ALL, BYTES] {
        pair.call(A, id, method, b"");
        pair.run();
        assert!(pair.requests(B).is_empty(), "no handler starts");
        let answer = pair.responses(A).pop().unwrap();
        assert_eq!(answer.status, Status::PaymentFailed);
        let [spent, required] = ["spent", "required"].map(|key| answer.metadata.value(key).unwrap());
        assert_eq!(spent, b"11", "both counts can be compared");
        assert_ne!(required, b"");
    }
    pair.call(A, id, FREE, b"");
    pair.run();
    assert_eq!(pair.requests(B).len(), 1, "what is free goes on");
    assert_eq!(books(&pair, id), (11, 11));
    assert_eq!(pair.peers[A].session_mut().stop_money(id), Ok(None), "a payer has nothing to stop");
}

#[test]
fn what_is_needed_is_told_while_something_waits_and_follows_what_is_held() {
    let mut pair = Pair::one_lane();
    let id = paid(&mut pair, 25);
    let told = |pair: &Pair| pair.peers[B].session().money_needed(id).map(Amount::units);
    pair.call(A, id, CALL, b"");
    pair.call(A, id, CALL, b"");
    let waiting = pair.call(A, id, CALL, b"");
    pair.run();
    assert_eq!(told(&pair), Some(30));
    let served = pair.requests(B)[0].call;
    pair.answer(B, served, Status::Ok, b"");
    pair.run();
    assert_eq!((told(&pair), books(&pair, id).0), (Some(20), 10), "what was held is spent");
    pair.peers[A].cancel_call(waiting);
    pair.run();
    assert_eq!(told(&pair), None);
}

/// `[pay.message.max]`
#[test]
fn a_payment_message_at_the_limit_is_taken_and_one_over_is_a_violation() {
    use crate::pair::framed;
    use tollway_protocol::{frame::Lane, message::Payment, payment::MAX_PAYMENT_MESSAGE_BYTES};
    let mut pair = Pair::one_lane();
    let connection = paid(&mut pair, 0);
    let mut send = |bytes: usize| {
        let frame = framed(&Payment { connection }, &vec![0; bytes]);
        pair.peers[B].handle_frame(pair.now, Lane(0), frame);
        pair.peers[B].session().end().is_some()
    };
    assert!(!send(MAX_PAYMENT_MESSAGE_BYTES));
    assert!(send(MAX_PAYMENT_MESSAGE_BYTES + 1));
}

#[test]
fn a_payment_message_on_an_unpaid_connection_is_a_violation() {
    use crate::pair::framed;
    use tollway_protocol::{frame::Lane, message::Payment};
    let mut pair = Pair::one_lane();
    let connection = pair.connect(A);
    assert!(pair.peers[A].session_mut().send_payment(connection, "x".into()).is_err());
    pair.peers[B].handle_frame(pair.now, Lane(0), framed(&Payment { connection }, b"x"));
    assert!(pair.peers[B].session().end().is_some());
}

/// `[pay.received.held]`
#[test]
fn a_payer_whose_count_is_not_durable_grants_nothing_until_it_is() {
    let mut pair = Pair::one_lane();
    let hold = Amount::new(3 * 5);
    let payer = PayerMoney { prices: prices(), received: Amount::ZERO, mark: Amount::MAX, hold };
    let (spent, leased) = (Amount::ZERO, Amount::new(1_000));
    let id = pair.connect_paid(payer, PayeeMoney { prices: prices(), spent, leased, low: Amount::ZERO });
    let (_, stream, reading) = watch(&mut pair, id, ITEM);
    let item = vec![0; 100_000];
    let stream_window = pair.peers[A].session().limits(id).unwrap().0.stream_window;
    let at_once = u128::from(stream_window) / (100_000 + 16) + 1;
    let flow = |pair: &mut Pair| {
        for _ in 0..40 {
            // Full while nothing is granted.
            let _full = pair.peers[B].push(stream, &item);
            pair.run();
            pair.read_all(A, reading);
        }
        books(pair, id).1 / 3
    };
    let held = flow(&mut pair);
    // What was granted before the fifth item came is on its way all the same.
    assert!(held >= 5 && held <= 5 + at_once, "{held}, of which {at_once} may start at once");
    assert_eq!(flow(&mut pair), held, "nothing more was granted");
    pair.peers[A].session_mut().raise_received_hold(id, Amount::MAX);
    assert!(flow(&mut pair) > held + 20);
    pair.assert_alive();
}

fn costing(cost: u128) -> ResponseSpec<'static> {
    let (metadata, payload) = (Metadata::new(), "x".into());
    ResponseSpec {
        status: Status::Ok,
        metadata,
        payload,
        slots: &[],
        cost: Some(Amount::new(cost)),
        paid_before: Amount::ZERO,
    }
}

/// `[pay.reserve.hold]`, `[pay.reserve.commit]`
#[test]
fn the_maximum_is_held_until_the_response_states_the_cost_and_the_rest_is_free_at_once() {
    let mut pair = Pair::one_lane();
    let id = paid(&mut pair, 150);
    pair.call(A, id, RESERVED, b"first");
    pair.call(A, id, RESERVED, b"second");
    pair.run();
    let [first] = &pair.requests(B)[..] else { panic!("100 of 150 are held, so the second waits") };
    assert_eq!(pair.peers[B].session().money_needed(id).map(Amount::units), Some(200));
    pair.peers[B].respond(first.call, costing(42)).unwrap();
    pair.run();
    let [second] = &pair.requests(B)[..] else { panic!("108 are free now") };
    assert_eq!(books(&pair, id), (42, 42));
    // Less than the call price is charged as that.
    pair.peers[B].respond(second.call, costing(3)).unwrap();
    pair.run();
    let charged: Vec<_> = pair.responses(A).iter().map(|answer| answer.charged.units()).collect();
    assert_eq!((charged, books(&pair, id)), (vec![42, 10], (52, 52)));
}

/// `[pay.reserve.maximum]`
#[test]
fn the_maximum_can_be_stated_and_one_more_is_refused() {
    let mut pair = Pair::one_lane();
    let id = paid(&mut pair, 1_000);
    pair.call(A, id, RESERVED, b"");
    pair.call(A, id, CALL, b"");
    pair.run();
    let calls = pair.requests(B);
    let above = |cost, maximum| {
        let (cost, maximum) = (Amount::new(cost), Amount::new(maximum));
        Err(CommandError::CostAboveMaximum { cost, maximum })
    };
    assert_eq!(pair.peers[B].respond(calls[0].call, costing(101)), above(101, 100));
    assert_eq!(pair.peers[B].respond(calls[1].call, costing(11)), above(11, 10), "its price has no maximum");
    pair.peers[B].respond(calls[0].call, costing(100)).unwrap();
    pair.peers[B].respond(calls[1].call, costing(10)).unwrap();
    pair.run();
    assert_eq!(books(&pair, id), (110, 110));
}

/// `[pay.reserve.commit]`: a payee that states more than the terms allow is not believed by the payer.
#[test]
fn items_before_the_response_leave_its_reservation_alone_and_both_sides_count_the_same() {
    let mut pair = Pair::one_lane();
    let id = paid(&mut pair, 106);
    let (call, stream, reading) = watch(&mut pair, id, RESERVED);
    (0..3).for_each(|_| pair.peers[B].push(stream, b"x").unwrap());
    pair.run();
    assert_eq!(pair.read_all(A, reading).0.len(), 2, "the third would need what is reserved");
    assert_eq!(books(&pair, id), (16, 16), "the call price falls due with the first item");
    pair.peers[B].respond(call, costing(90)).unwrap();
    pair.run();
    assert_eq!(pair.read_all(A, reading).0.len(), 1, "10 of the reservation were not used");
    pair.peers[B].finish(stream);
    pair.run();
    let events = pair.take(A);
    let Some(Event::CallEnded { charged, counted, .. }) = events.last() else { panic!("{events:?}") };
    assert_eq!((charged.units(), counted.units()), (99, 99));
    assert_eq!(books(&pair, id), (99, 99));
}

/// `[pay.call.lost]`
#[test]
fn a_handler_whose_connection_is_lost_costs_the_call_price_unless_the_payee_ended_it() {
    let lost = |method, end: &dyn Fn(&mut Pair, ConnectionId)| {
        let mut pair = Pair::one_lane();
        let id = paid(&mut pair, 150);
        pair.call(A, id, method, b"runs");
        pair.call(A, id, RESERVED, b"waits");
        pair.run();
        end(&mut pair, id);
        let closed = pair.take(B).into_iter().find_map(|event| match event {
            Event::ConnectionClosed { money, .. } => money,
            _ => None,
        });
        closed.expect("the last count").amount.units()
    };
    let close = |side: usize, code: u32| {
        move |pair: &mut Pair, id: ConnectionId| {
            pair.peers[side].session_mut().close(id, Reason::new(code, ""));
            pair.run();
        }
    };
    let cut = |pair: &mut Pair, _: ConnectionId| pair.peers[B].session_mut().handle_conduit_lost("gone".to_owned());
    for method in [CALL, RESERVED] {
        // A second handler runs beside the first where the money for it is there.
        let expected = if method == CALL { 20 } else { 10 };
        assert_eq!(lost(method, &close(A, code::NONE)), expected, "the payer closes");
        assert_eq!(lost(method, &cut), expected, "the conduit is lost");
        assert_eq!(lost(method, &close(B, code::PAYMENT_ENDED)), expected, "the payer does not pay, or opens anew");
        assert_eq!(lost(method, &close(B, code::INTERNAL)), 0, "the payee's own failure");
    }
    assert_eq!(lost(FREE, &close(A, code::NONE)), 10);
}

/// `[pay.key.once]`: a call with a key costs nothing until it begins, and then what earlier attempts left to be paid.
#[test]
fn a_named_call_that_has_not_begun_costs_nothing_however_it_ends() {
    let mut pair = Pair::one_lane();
    let id = paid(&mut pair, 1_000);
    let name = |pair: &mut Pair, key: &'static str| {
        let metadata = Metadata::new().with(IDEMPOTENCY_KEY, key.as_bytes());
        let spec = CallSpec { connection: id, method: CALL, deadline: None, metadata, payload: "".into(), slots: &[] };
        let ours = pair.peers[A].start_call(spec).unwrap();
        pair.run();
        (ours.0, pair.requests(B).pop().expect("its price is covered").call)
    };
    let cancel = |pair: &mut Pair, (ours, theirs)| {
        pair.peers[A].session_mut().cancel_call(ours);
        pair.run();
        pair.answer(B, theirs, Status::Cancelled, b"");
        pair.run();
    };
    let waiting = name(&mut pair, "a");
    cancel(&mut pair, waiting);
    assert_eq!(books(&pair, id), (0, 0), "it waited for its turn");
    let begun = name(&mut pair, "a");
    assert!(pair.peers[B].session_mut().begin_named(begun.1, Amount::new(4)));
    cancel(&mut pair, begun);
    assert_eq!(books(&pair, id).0, 6, "4 of 10 were paid");
    let charged = |event| if let Event::CallCharged { charged, .. } = event { Some(charged.units()) } else { None };
    assert_eq!(pair.take(B).into_iter().find_map(charged), Some(6));
    assert!(!pair.peers[B].session_mut().begin_named(begun.1, Amount::ZERO), "it has ended");
    let (_, lost) = name(&mut pair, "b");
    let before = books(&pair, id).0;
    pair.peers[A].session_mut().close(id, Reason::new(code::DROPPED, ""));
    pair.run();
    let ended = |event| if let Event::ConnectionClosed { money, .. } = event { money } else { None };
    let money = pair.take(B).into_iter().find_map(ended).expect("it was paid");
    assert_eq!(money.amount.units(), before);
    assert!(!pair.peers[B].session_mut().begin_named(lost, Amount::ZERO), "nothing is executed for it");
}

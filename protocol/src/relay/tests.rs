//! What a relay lets pass, what it holds back, and whom it blames.

use bytes::Bytes;

use super::*;
use crate::error::{MAX_TEXT, Reason, code};
use crate::message::{Status, WireReason, encode_head};
use crate::metadata::{Entry as MetadataEntry, Metadata, NO_PROPAGATE};
use crate::payment::Amount;
use crate::stream::write_item;

const LEFT: ConnectionId = ConnectionId(3);
const RIGHT: ConnectionId = ConnectionId(300);

fn limits() -> ConnectionLimits {
    ConnectionLimits { max_item: 1000, max_body: 1000, window: 2000, stream_window: 1000, max_calls: 3, max_streams: 3 }
}

fn bridge_with(left_may_send: ConnectionLimits, is_paid: bool) -> Bridge {
    let left = Terms { parity: Parity::Odd, receives: limits(), may_send: left_may_send, memory: None };
    let right = Terms { parity: Parity::Even, receives: limits(), may_send: limits(), memory: None };
    Bridge::new(&left, &right, is_paid).unwrap()
}

fn bridge() -> Bridge {
    bridge_with(limits(), false)
}

fn frame<H: Header>(header: &H, payload: &[u8]) -> Bytes {
    [&encode_head(header)[..], payload].concat().into()
}

fn slot(stream: u64, flow: Flow) -> Slot {
    Slot { stream: StreamId(stream), flow }
}

fn request(call: u64, slots: Vec<Slot>) -> Request {
    let (call, metadata) = (CallId(call), Metadata::new());
    Request { connection: LEFT, call, method: 7, deadline_us: None, metadata, slots }
}

fn response(call: u64, slots: Vec<Slot>) -> Response {
    let (call, metadata, status, charged) = (CallId(call), Metadata::new(), Status::Ok, Amount::new(9));
    Response { connection: RIGHT, call, status, charged, metadata, slots }
}

fn items(connection: ConnectionId, stream: u64, lengths: &[usize]) -> Bytes {
    let mut payload = Vec::new();
    lengths.iter().for_each(|&length| write_item(&mut payload, &vec![7; length]));
    frame(&Items { connection, stream: StreamId(stream), slots: vec![] }, &payload)
}

fn credit(connection: ConnectionId, stream: u64, limit: u64) -> Bytes {
    frame(&Credit { connection, stream: StreamId(stream), limit, consumed: 1 }, b"")
}

/// The next frame for a side, whole.
fn take(bridge: &mut Bridge, to: Side) -> Option<Vec<u8>> {
    let connection = if to == Side::Left { LEFT } else { RIGHT };
    match bridge.take(to, connection, usize::MAX) {
        Relayed::Frame { head, payload } => Some([&head[..], &payload].concat()),
        Relayed::Empty => None,
        Relayed::Close(reason) => panic!("closed: {reason}"),
    }
}

#[track_caller]
fn accept(bridge: &mut Bridge, from: Side, frame: &Bytes) {
    bridge.handle_frame(from, frame).unwrap();
}

#[track_caller]
fn refuse(bridge: &mut Bridge, from: Side, frame: &Bytes) -> Violation {
    match bridge.handle_frame(from, frame) {
        Err(RelayError::Violation(violation)) => violation,
        other => panic!("{other:?}"),
    }
}

/// A call of the left's with a stream 1 to the right and a stream 3 back, which has arrived at the right.
fn with_streams() -> Bridge {
    let mut bridge = bridge();
    let slots = vec![slot(1, Flow::ToPeer), slot(3, Flow::FromPeer)];
    accept(&mut bridge, Side::Left, &frame(&request(1, slots), b"args"));
    take(&mut bridge, Side::Right).unwrap();
    bridge
}

#[test]
fn a_call_passes_with_its_ids_and_its_price_and_another_connection() {
    let mut bridge = bridge();
    let call = request(1, vec![]);
    accept(&mut bridge, Side::Left, &frame(&call, b"args"));
    assert_eq!(bridge.poll_told(), Some(Side::Right), "the right must be told");
    let other = request(3, vec![]);
    accept(&mut bridge, Side::Left, &frame(&other, b""));
    assert_eq!(bridge.poll_told(), None, "and once is enough");
    let there = Request { connection: RIGHT, ..call };
    assert_eq!(take(&mut bridge, Side::Right).unwrap(), frame(&there, b"args"));
    assert_eq!(take(&mut bridge, Side::Right).unwrap(), frame(&Request { connection: RIGHT, ..other }, b""));
    assert_eq!(take(&mut bridge, Side::Right), None);
    let answer = response(1, vec![]);
    accept(&mut bridge, Side::Right, &frame(&answer, b"result"));
    assert_eq!(bridge.poll_told(), Some(Side::Left));
    assert_eq!(take(&mut bridge, Side::Left).unwrap(), frame(&Response { connection: LEFT, ..answer }, b"result"));
    let bytes = frame(&request(1, vec![]), b"args").len() + frame(&request(3, vec![]), b"").len();
    assert_eq!(bridge.traffic_from(Side::Left), Traffic { frames: 2, bytes: bytes as u64 });
    assert_eq!(bridge.calls.len(), 1, "a call without streams ends with its answer");
}

/// `[relay.parity]`
#[test]
fn two_sides_with_the_same_half_of_the_ids_are_not_joined() {
    let terms = Terms { parity: Parity::Odd, receives: limits(), may_send: limits(), memory: None };
    assert_eq!(Bridge::new(&terms, &terms, false).err(), Some(SameParity));
}

/// `[relay.no-propagate]`
#[test]
fn private_metadata_stays_and_the_rest_passes() {
    let mut bridge = bridge();
    let mut metadata = Metadata::new().with("a", "1");
    metadata.push(MetadataEntry { key: "secret".into(), value: b"x".to_vec(), flags: NO_PROPAGATE });
    let metadata = metadata.with("b", "2");
    accept(&mut bridge, Side::Left, &frame(&Request { metadata, ..request(1, vec![slot(1, Flow::ToPeer)]) }, b"args"));
    let metadata = Metadata::new().with("a", "1").with("b", "2");
    let there = Request { metadata, connection: RIGHT, ..request(1, vec![slot(1, Flow::ToPeer)]) };
    assert_eq!(take(&mut bridge, Side::Right).unwrap(), frame(&there, b"args"));
}

#[test]
fn streams_pass_in_both_directions_and_end_with_their_call() {
    let mut bridge = with_streams();
    accept(&mut bridge, Side::Left, &items(LEFT, 1, &[5, 0, 9]));
    assert_eq!(take(&mut bridge, Side::Right).unwrap(), items(RIGHT, 1, &[5, 0, 9]));
    accept(&mut bridge, Side::Right, &items(RIGHT, 3, &[900]));
    assert_eq!(take(&mut bridge, Side::Left).unwrap(), items(LEFT, 3, &[900]));
    accept(&mut bridge, Side::Right, &frame(&response(1, vec![]), b""));
    let done = Done { connection: RIGHT, call: CallId(1), charged: Amount::ZERO };
    assert_eq!(refuse(&mut bridge, Side::Right, &frame(&done, b"")), Violation::CallEndedEarly { id: CallId(1) });
    let (end, reset) = (StreamId(1), StreamId(3));
    accept(&mut bridge, Side::Left, &frame(&StreamEnd { connection: LEFT, stream: end }, b""));
    accept(&mut bridge, Side::Right, &frame(&Reset { connection: RIGHT, stream: reset, code: 4 }, b""));
    accept(&mut bridge, Side::Right, &frame(&done, b""));
    assert!(bridge.calls.is_empty() && bridge.streams.is_empty());
    // Listed races: what crosses an end is dropped.
    let waiting = |bridge: &mut Bridge, to| core::iter::from_fn(|| take(bridge, to)).count();
    assert_eq!([waiting(&mut bridge, Side::Left), waiting(&mut bridge, Side::Right)], [3, 1]);
    accept(&mut bridge, Side::Right, &credit(RIGHT, 1, 5000));
    accept(&mut bridge, Side::Left, &frame(&Stop { connection: LEFT, stream: reset, code: 1 }, b""));
    accept(&mut bridge, Side::Left, &frame(&Cancel { connection: LEFT, call: CallId(1) }, b""));
    assert_eq!([waiting(&mut bridge, Side::Left), waiting(&mut bridge, Side::Right)], [0, 0]);
}

/// Found by simulation: a relay that took less than half of what the receiver did left the sender waiting for ever.
/// `[relay.limits]`
#[test]
fn a_relay_states_the_smaller_limits_and_at_least_half_of_a_window() {
    let receiver = ConnectionLimits { window: 2001, stream_window: 1001, ..limits() };
    let narrow =
        ConnectionLimits { max_item: 10, max_body: 10, window: 10, stream_window: 1, max_calls: 1, max_streams: 1 };
    let stated = receiver.through_relay(&narrow);
    assert_eq!(stated, ConnectionLimits { window: 1001, stream_window: 501, ..narrow });
    let roomy = ConnectionLimits { window: 1500, stream_window: 5000, ..limits() };
    assert_eq!(receiver.through_relay(&roomy), ConnectionLimits { window: 1500, stream_window: 1001, ..limits() });
    // The least that is stated is the least that makes a receiver grant.
    let mut stream = crate::stream::RecvStream::new(1001);
    assert_eq!(stream.consume(500, 1), None);
    assert!(stream.consume(1, 1).is_some());
}

/// `[relay.credit]`
#[test]
fn credit_passes_less_what_was_cut_off_and_is_never_made() {
    let told = ConnectionLimits { window: 1500, stream_window: 400, ..limits() };
    let mut bridge = bridge_with(told, false);
    accept(&mut bridge, Side::Left, &frame(&request(1, vec![slot(1, Flow::ToPeer)]), &[0; 900]));
    accept(&mut bridge, Side::Left, &items(LEFT, 1, &[384]));
    assert_eq!(refuse(&mut bridge, Side::Left, &items(LEFT, 1, &[0])), Violation::NoCredit { what: "item" });
    accept(&mut bridge, Side::Right, &credit(RIGHT, 1, 1200));
    accept(&mut bridge, Side::Right, &credit(RIGHT, 1, 1400));
    assert_eq!(take(&mut bridge, Side::Left).unwrap(), credit(LEFT, 1, 800), "the latest grant alone, 600 cut off");
    assert_eq!(take(&mut bridge, Side::Left), None);
    accept(&mut bridge, Side::Left, &items(LEFT, 1, &[384]));
    assert!(matches!(refuse(&mut bridge, Side::Left, &items(LEFT, 1, &[0])), Violation::NoCredit { .. }));
    assert!(matches!(refuse(&mut bridge, Side::Right, &credit(RIGHT, 1, 1399)), Violation::CreditWentBack { .. }));

    accept(&mut bridge, Side::Left, &frame(&request(3, vec![]), &[0; 900]));
    assert_eq!(refuse(&mut bridge, Side::Left, &frame(&request(5, vec![]), b"")), Violation::NoCredit { what: "body" });
    let window = |connection, limit| frame(&Window { connection, limit }, b"");
    accept(&mut bridge, Side::Right, &window(RIGHT, 2900));
    assert_eq!(take(&mut bridge, Side::Left).unwrap(), window(LEFT, 2400));
    assert!(matches!(refuse(&mut bridge, Side::Right, &window(RIGHT, 2899)), Violation::CreditWentBack { .. }));
}

/// What the other side's session would answer with a ProtocolError never gets there. `[relay.checks]`
#[test]
fn who_breaks_a_rule_is_blamed_and_nobody_else() {
    let ordinary = |slots| frame(&request(3, slots), b"");
    let many = (0..4).map(|n| slot(5 + 2 * n, Flow::ToPeer)).collect();
    let too_many_slots = vec![slot(5, Flow::ToPeer); MAX_SLOTS + 1];
    let two = frame(&Items { connection: LEFT, stream: StreamId(1), slots: vec![slot(5, Flow::ToPeer)] }, &[0, 0]);
    let huge = Metadata::new().with("k", vec![0; 20_000]);
    let payment = frame(&Payment { connection: LEFT }, b"voucher");
    let stop = |stream| frame(&Stop { connection: LEFT, stream: StreamId(stream), code: 0 }, b"");
    let cases = [
        ("a call id out of order", frame(&request(5, vec![]), b""), code::ID),
        ("a call id of the other half", frame(&request(2, vec![]), b""), code::ID),
        ("a body above its limit", frame(&request(3, vec![]), &[0; 1001]), code::LIMIT),
        ("metadata above its caps", frame(&Request { metadata: huge, ..request(3, vec![]) }, b""), code::LIMIT),
        ("more streams than allowed", ordinary(many), code::LIMIT),
        ("a stream id out of order", ordinary(vec![slot(7, Flow::ToPeer)]), code::ID),
        ("more slots than a frame has", ordinary(too_many_slots), code::LIMIT),
        ("an answer to nothing", frame(&Response { connection: LEFT, ..response(1, vec![]) }, b""), code::ID),
        ("a cancel of nothing", frame(&Cancel { connection: LEFT, call: CallId(3) }, b""), code::ID),
        ("items of a stream that is not", items(LEFT, 5, &[1]), code::ID),
        ("items the other way", items(LEFT, 3, &[1]), code::ID),
        ("an item above its limit", items(LEFT, 1, &[1001]), code::LIMIT),
        ("no item", items(LEFT, 1, &[]), code::MALFORMED),
        ("two items and a stream in one", two, code::MALFORMED),
        ("an end the other way", frame(&StreamEnd { connection: LEFT, stream: StreamId(3) }, b""), code::ID),
        ("a stop the other way", stop(1), code::ID),
        ("a stop of nothing", stop(9), code::ID),
        ("credit the other way", credit(LEFT, 1, 5000), code::ID),
        ("credit taken back", credit(LEFT, 3, 999), code::CREDIT),
        ("a window taken back", frame(&Window { connection: LEFT, limit: 1 }, b""), code::CREDIT),
        ("a payment that nobody asked for", payment.clone(), code::STATE),
        ("an unknown kind", Bytes::from_static(&[60, 3]), code::UNKNOWN_KIND),
        ("a cut header", Bytes::from_static(&[48, 3]), code::MALFORMED),
        ("an empty frame", Bytes::new(), code::MALFORMED),
    ];
    for (what, frame, code) in cases {
        let mut bridge = with_streams();
        assert_eq!(refuse(&mut bridge, Side::Left, &frame).code(), code, "{what}");
        assert_eq!(take(&mut bridge, Side::Right), None, "{what} got through");
    }
    let mut paid = bridge_with(limits(), true);
    accept(&mut paid, Side::Left, &payment);
    let large = frame(&Payment { connection: LEFT }, &[0; MAX_PAYMENT_MESSAGE_BYTES + 1]);
    assert_eq!(refuse(&mut paid, Side::Left, &large).code(), code::LIMIT);
}

#[test]
fn what_ends_or_answers_once_is_refused_a_second_time() {
    let mut bridge = with_streams();
    let end = frame(&StreamEnd { connection: LEFT, stream: StreamId(1) }, b"");
    accept(&mut bridge, Side::Left, &end);
    assert_eq!(refuse(&mut bridge, Side::Left, &end).code(), code::STATE);
    assert_eq!(refuse(&mut bridge, Side::Left, &items(LEFT, 1, &[1])).code(), code::STATE);
    accept(&mut bridge, Side::Right, &frame(&response(1, vec![]), b""));
    assert_eq!(refuse(&mut bridge, Side::Right, &frame(&response(1, vec![]), b"")).code(), code::STATE);
    for call in [3, 5] {
        accept(&mut bridge, Side::Left, &frame(&request(call, vec![]), b""));
    }
    assert_eq!(refuse(&mut bridge, Side::Left, &frame(&request(7, vec![]), b"")).code(), code::LIMIT, "three are open");
}

#[test]
fn what_says_nothing_more_is_not_repeated() {
    let mut bridge = with_streams();
    for _ in 0..3 {
        accept(&mut bridge, Side::Left, &frame(&Cancel { connection: LEFT, call: CallId(1) }, b""));
        accept(&mut bridge, Side::Left, &frame(&Stop { connection: LEFT, stream: StreamId(3), code: 1 }, b""));
    }
    assert_eq!(core::iter::from_fn(|| take(&mut bridge, Side::Right)).count(), 2);
}

#[test]
fn a_run_that_is_too_long_for_a_frame_is_cut_between_its_items() {
    let mut bridge = with_streams();
    accept(&mut bridge, Side::Left, &items(LEFT, 1, &[100; 8]));
    let mut lengths = Vec::new();
    loop {
        match bridge.take(Side::Right, RIGHT, 320) {
            Relayed::Frame { head, payload } => {
                assert!(head.len() + payload.len() <= 320);
                assert_eq!(head[..], items(RIGHT, 1, &[])[..]);
                lengths.push(ItemRun::parse(payload, 1000).unwrap().items());
            }
            Relayed::Empty => break,
            Relayed::Close(reason) => panic!("{reason}"),
        }
    }
    assert_eq!(lengths, [3, 3, 2]);
}

#[test]
fn what_is_behind_a_side_goes_first_and_then_its_close() {
    let mut bridge = with_streams();
    accept(&mut bridge, Side::Left, &items(LEFT, 1, &[5]));
    accept(&mut bridge, Side::Right, &items(RIGHT, 3, &[5]));
    let reason = Reason::new(2000, "enough");
    assert_eq!(
        [bridge.poll_told(), bridge.poll_told(), bridge.poll_told()],
        [Some(Side::Left), Some(Side::Right), None]
    );
    bridge.finish(Side::Left, reason.clone());
    assert_eq!(bridge.poll_told(), None, "the right knows that something waits");
    assert_eq!(take(&mut bridge, Side::Left), None, "the left has gone");
    assert!(take(&mut bridge, Side::Right).is_some());
    assert!(matches!(bridge.take(Side::Right, RIGHT, 1000), Relayed::Close(why) if why == reason));
    assert!(matches!(bridge.take(Side::Right, RIGHT, 1000), Relayed::Empty), "and that is said once");
}

#[test]
fn what_no_credit_covers_is_bounded_and_what_credit_covers_is_not_counted() {
    let wide = ConnectionLimits { stream_window: u32::MAX, max_item: 1 << 20, ..limits() };
    let terms = |parity| Terms { parity, receives: wide, may_send: wide, memory: None };
    let mut bridge = Bridge::new(&terms(Parity::Odd), &terms(Parity::Even), false).unwrap();
    accept(&mut bridge, Side::Left, &frame(&request(1, vec![slot(1, Flow::ToPeer)]), b""));
    // Items of one byte, a frame each: more memory than the bound, and all of it was granted.
    for _ in 0..MAX_UNCOVERED / 128 {
        accept(&mut bridge, Side::Left, &items(LEFT, 1, &[1]));
    }
    // Streams in items, each of which ends at once: a side that does not read could be made to hold them without end.
    let mut next = 3;
    let overrun = loop {
        let slots = vec![slot(next, Flow::ToPeer)];
        let announce = frame(&Items { connection: LEFT, stream: StreamId(1), slots }, &[0]);
        let end = frame(&StreamEnd { connection: LEFT, stream: StreamId(next) }, b"");
        if let Err(error) = bridge.handle_frame(Side::Left, &announce).and(bridge.handle_frame(Side::Left, &end)) {
            break error;
        }
        next += 2;
        assert!(next < 4_000_000, "nothing bounds this");
    };
    assert_eq!(overrun, RelayError::Overrun);
    assert!(next > 200_000, "{next}: an honest side would be cut off");
}

fn draining(connection: ConnectionId) -> Bytes {
    frame(&Draining { connection, deadline_us: Some(7), reason: Reason::new(2000, "enough").into() }, b"")
}

fn drained(connection: ConnectionId) -> Bytes {
    frame(&Drained { connection }, b"")
}

/// `[relay.draining]`
#[test]
fn draining_and_its_answer_pass_in_their_order() {
    let mut bridge = bridge();
    accept(&mut bridge, Side::Right, &draining(RIGHT));
    assert_eq!(bridge.poll_told(), Some(Side::Left));
    accept(&mut bridge, Side::Left, &frame(&request(1, vec![]), b"args"));
    accept(&mut bridge, Side::Left, &drained(LEFT));
    assert_eq!(take(&mut bridge, Side::Left).unwrap(), draining(LEFT));
    assert_eq!(take(&mut bridge, Side::Right).unwrap()[0], Request::KIND);
    assert_eq!(take(&mut bridge, Side::Right).unwrap(), drained(RIGHT));
    accept(&mut bridge, Side::Right, &frame(&response(1, vec![]), b""));
    assert_eq!(take(&mut bridge, Side::Left).unwrap()[0], Response::KIND);
    assert_eq!(take(&mut bridge, Side::Left), None, "whoever drains closes");
    assert_eq!(refuse(&mut bridge, Side::Left, &frame(&request(3, vec![]), b"")).code(), code::STATE);
    assert_eq!(refuse(&mut bridge, Side::Left, &drained(LEFT)).code(), code::STATE);
    assert_eq!(refuse(&mut bridge, Side::Right, &draining(RIGHT)).code(), code::STATE);
    assert_eq!(refuse(&mut bridge, Side::Right, &drained(RIGHT)).code(), code::STATE, "nobody has asked the right");
}

/// A session of the relay's is going away. `[relay.draining]`
#[test]
fn what_the_relay_drains_it_closes_on_both_sides_behind_what_waits() {
    let mut bridge = bridge();
    accept(&mut bridge, Side::Left, &frame(&request(1, vec![]), b"args"));
    let why = Reason::new(code::GOING_AWAY, "restart");
    bridge.drain(Side::Left, why.clone());
    bridge.drain(Side::Left, Reason::none());
    let told = Draining { connection: LEFT, deadline_us: None, reason: why.clone().into() };
    assert_eq!(take(&mut bridge, Side::Left).unwrap(), frame(&told, b""));
    assert_eq!(take(&mut bridge, Side::Left), None, "said once");
    accept(&mut bridge, Side::Left, &drained(LEFT));
    assert!(take(&mut bridge, Side::Right).is_some());
    assert_eq!(take(&mut bridge, Side::Right), None, "the right has not asked for the answer");
    accept(&mut bridge, Side::Right, &frame(&response(1, vec![]), b"result"));
    assert_eq!(bridge.poll_told(), Some(Side::Left));
    assert_eq!(take(&mut bridge, Side::Left).unwrap()[0], Response::KIND);
    for (side, connection) in [(Side::Left, LEFT), (Side::Right, RIGHT)] {
        assert!(matches!(bridge.take(side, connection, 1000), Relayed::Close(reason) if reason == why), "{side:?}");
    }
}

/// `[relay.draining]`
#[test]
fn a_side_is_told_once_by_whom_ever_and_its_answer_goes_to_all_who_asked() {
    let mut answered = bridge();
    answered.drain(Side::Left, Reason::none());
    take(&mut answered, Side::Left).unwrap();
    let call = frame(&request(1, vec![]), b"");
    accept(&mut answered, Side::Left, &call);
    accept(&mut answered, Side::Left, &drained(LEFT));
    take(&mut answered, Side::Right).unwrap();
    accept(&mut answered, Side::Right, &draining(RIGHT));
    assert_eq!(answered.poll_told(), Some(Side::Right));
    assert_eq!(take(&mut answered, Side::Left), None, "it knows");
    assert_eq!(take(&mut answered, Side::Right).unwrap(), drained(RIGHT));

    let mut asked = bridge();
    asked.drain(Side::Left, Reason::none());
    accept(&mut asked, Side::Left, &call);
    accept(&mut asked, Side::Right, &draining(RIGHT));
    accept(&mut asked, Side::Left, &drained(LEFT));
    take(&mut asked, Side::Right).unwrap();
    assert_eq!(take(&mut asked, Side::Right).unwrap(), drained(RIGHT));
}

/// Its payer has the channel closed first.
#[test]
fn a_paid_connection_that_the_relay_drains_is_left_to_its_payer() {
    let mut bridge = bridge_with(limits(), true);
    bridge.drain(Side::Left, Reason::none());
    take(&mut bridge, Side::Left).unwrap();
    accept(&mut bridge, Side::Left, &drained(LEFT));
    accept(&mut bridge, Side::Left, &frame(&Payment { connection: LEFT }, b"close"));
    assert_eq!(take(&mut bridge, Side::Right).unwrap()[0], Payment::KIND);
    assert_eq!(take(&mut bridge, Side::Right), None);
}

/// What waits for a side that does not read counts against the budget of who sent it, and comes back.
/// `[session.memory.bound]`
#[test]
fn what_waits_counts_and_comes_back_and_without_room_the_connection_ends() {
    let pool = Arc::new(MemoryPool::new(20_000));
    let terms = |parity, memory| Terms { parity, receives: limits(), may_send: limits(), memory };
    let start = || Bridge::new(&terms(Parity::Odd, Some(pool.clone())), &terms(Parity::Even, None), false).unwrap();
    let mut bridge = start();
    accept(&mut bridge, Side::Left, &frame(&request(1, vec![slot(1, Flow::ToPeer)]), &[0; 900]));
    accept(&mut bridge, Side::Left, &items(LEFT, 1, &[900]));
    assert!(pool.lent() > 1_800, "{}", pool.lent());
    accept(&mut bridge, Side::Right, &frame(&response(1, vec![]), &[0; 900]));
    while take(&mut bridge, Side::Right).is_some() {}
    assert_eq!(
        pool.lent(),
        2 * ENTRY_BYTES,
        "all but the call and its stream was taken; the right's is not counted here"
    );
    accept(&mut bridge, Side::Left, &frame(&StreamEnd { connection: LEFT, stream: StreamId(1) }, b""));
    drop(bridge);
    assert_eq!(pool.lent(), 0, "a bridge that is dropped holds nothing");
    let mut full: Vec<Bridge> = Vec::new();
    let overrun = loop {
        let mut bridge = start();
        let result = bridge.handle_frame(Side::Left, &frame(&request(1, vec![]), &[0; 900]));
        full.push(bridge);
        if let Err(error) = result {
            break error;
        }
        assert!(full.len() < 100, "nothing bounds this");
    };
    assert_eq!(overrun, RelayError::OutOfMemory);
    full.iter_mut().for_each(|bridge| bridge.finish(Side::Right, Reason::none()));
    let open: u64 = full.iter().map(|bridge| bridge.calls.len() as u64 * ENTRY_BYTES).sum();
    assert_eq!(pool.lent(), open, "what nobody takes any more is dropped");
    full.clear();
    assert_eq!(pool.lent(), 0, "and with the bridge its calls");
}

/// `[session.memory.bound]`
#[test]
fn open_calls_and_streams_count_until_they_end_and_their_tables_shrink() {
    let pool = Arc::new(MemoryPool::new(1 << 20));
    let wide = ConnectionLimits { max_streams: 1_024, window: 1 << 20, ..limits() };
    let terms = |parity, memory| Terms { parity, receives: wide, may_send: wide, memory };
    let start = || Bridge::new(&terms(Parity::Odd, Some(pool.clone())), &terms(Parity::Even, None), false).unwrap();
    let slots = || (0..1_024).map(|n| slot(1 + 2 * n, Flow::ToPeer)).collect::<Vec<_>>();
    let mut bridge = start();
    accept(&mut bridge, Side::Left, &frame(&request(1, slots()), b""));
    while take(&mut bridge, Side::Right).is_some() {}
    assert_eq!(pool.lent(), 1_025 * ENTRY_BYTES);
    for slot in slots() {
        accept(&mut bridge, Side::Left, &frame(&StreamEnd { connection: LEFT, stream: slot.stream }, b""));
    }
    accept(&mut bridge, Side::Right, &frame(&response(1, vec![]), b""));
    let done = Done { connection: RIGHT, call: CallId(1), charged: Amount::ZERO };
    accept(&mut bridge, Side::Right, &frame(&done, b""));
    while take(&mut bridge, Side::Right).is_some() {}
    assert_eq!(pool.lent(), 0, "what has ended counts no more");
    assert!(bridge.streams.capacity() < 512, "an empty table of {}", bridge.streams.capacity());

    let mut full = Vec::new();
    let refused = loop {
        let mut bridge = start();
        let result = bridge.handle_frame(Side::Left, &frame(&request(1, slots()), b""));
        while take(&mut bridge, Side::Right).is_some() {}
        full.push(bridge);
        if let Err(error) = result {
            break error;
        }
        assert!(full.len() < 100, "nothing bounds this");
    };
    assert_eq!(refused, RelayError::OutOfMemory);
    drop(full);
    assert_eq!(pool.lent(), 0);
}

/// A frame that is part of a block pins the whole of it. `[session.memory.bound]`
#[test]
fn what_waits_is_copied_out_of_large_blocks_once_much_waits() {
    const BODY: usize = 20_000;
    let pool = Arc::new(MemoryPool::new(1 << 20));
    let wide = ConnectionLimits { max_body: 1 << 20, window: 1 << 20, max_calls: 100, ..limits() };
    let terms = |parity, memory| Terms { parity, receives: wide, may_send: wide, memory };
    let mut bridge = Bridge::new(&terms(Parity::Odd, Some(pool)), &terms(Parity::Even, None), false).unwrap();
    let mut pinned = Vec::new();
    let sent: Vec<Bytes> = (0..8).map(|n| frame(&request(1 + 2 * n, vec![]), &[7; BODY])).collect();
    sent.iter().for_each(|frame| accept(&mut bridge, Side::Left, frame));
    for frame in &sent {
        let Relayed::Frame { payload, .. } = bridge.take(Side::Right, RIGHT, usize::MAX) else { panic!("too few") };
        let body = frame.slice(frame.len() - BODY..);
        assert!(payload.ends_with(&body));
        pinned.push(frame.as_ptr_range().contains(&payload.as_ptr()));
    }
    assert!(pinned[0], "what is passed on at once is not copied");
    assert!(pinned.iter().filter(|&&pinned| pinned).count() <= 4, "a sixteenth of the pool is 64 KiB: {pinned:?}");
}

/// Each of them would be answered with a ProtocolError, which ends everybody's connections. `[relay.checks]`
#[test]
fn no_frame_is_larger_than_the_other_side_takes() {
    let mut bridge = bridge();
    let text = "x".repeat(40_000);
    let long = Draining { connection: LEFT, deadline_us: Some(7), reason: WireReason { code: 2000, text } };
    accept(&mut bridge, Side::Left, &frame(&long, b""));
    let cut = Draining { connection: RIGHT, reason: Reason::new(2000, "x".repeat(MAX_TEXT)).into(), ..long };
    assert_eq!(take(&mut bridge, Side::Right).unwrap(), frame(&cut, b""));

    // All lists full, and numbers in ten bytes where two suffice.
    let long = |value: u64| -> Vec<u8> { (0..9).map(|at| (value >> (7 * at)) as u8 | 0x80).chain([0]).collect() };
    let entry = [&long(1)[..], b"k", &long(255), &[7; 255], &[0]].concat();
    let stream = |n: u64| [&long(1 + 2 * n)[..], &[0x80, 0x80, 0x80, 0x80, 0]].concat();
    let mut padded = frame(&request(1, vec![]), b"").to_vec();
    assert_eq!(padded.split_off(padded.len() - 2), [0, 0], "two empty lists are last");
    padded.extend([&[64][..], &entry.repeat(64), &[0x80, 0x08]].concat());
    (0..1_024).for_each(|n| padded.extend(stream(n)));
    padded.extend([7; 1_000]);
    let (padded, mut payload) = (Bytes::from(padded.clone()), Bytes::from(padded));
    let decoded = decode_header::<Request>(&mut payload).unwrap();
    assert_eq!((decoded.slots.len(), decoded.metadata.check(), payload.len()), (1_024, Ok(()), 1_000), "a frame");
    let wide = ConnectionLimits { max_streams: 1_024, ..limits() };
    let terms = |parity| Terms { parity, receives: wide, may_send: wide, memory: None };
    let start = || Bridge::new(&terms(Parity::Odd), &terms(Parity::Even), false).unwrap();
    assert_eq!(refuse(&mut start(), Side::Left, &padded).code(), code::LIMIT);
    // The longest that an honest side makes.
    let mut metadata = Metadata::new().with("k", vec![0; 16_383 - 63]);
    (0..63).for_each(|_| metadata.push(MetadataEntry { key: "k".into(), value: vec![], flags: 0 }));
    let slots = (0..1_024).map(|n| slot(1 + 2 * n, Flow::ToPeer)).collect();
    accept(&mut start(), Side::Left, &frame(&Request { metadata, ..request(1, slots) }, &[0; 1_000]));

    // Whatever else is too large ends this connection alone.
    let mut bridge = start();
    accept(&mut bridge, Side::Left, &frame(&request(1, vec![]), &[0; 900]));
    accept(&mut bridge, Side::Left, &frame(&request(3, vec![]), b""));
    assert!(matches!(bridge.take(Side::Right, RIGHT, 900), Relayed::Close(reason) if reason.code == code::LIMIT));
    assert!(matches!(bridge.take(Side::Right, RIGHT, 900), Relayed::Empty));
}

//! Calls: both directions, cancelling, and the limits that push back.

use tollway_protocol::error::{SessionEnd, Violation};
use tollway_protocol::frame::Lane;
use tollway_protocol::id::{CallId, ConnectionId};
use tollway_protocol::limits::ConnectionLimits;
use tollway_protocol::message::{Done, Flow, Request, Response, Status};
use tollway_protocol::metadata::Metadata;
use tollway_protocol::payment::Amount;
use tollway_protocol::session::{CommandError, Event, LaneMode};

use crate::pair::{A, B, Pair, config, framed};

fn request(connection: ConnectionId, call: u64) -> bytes::Bytes {
    let (call, metadata) = (CallId(call), Metadata::new());
    framed(&Request { connection, call, method: 1, deadline_us: None, metadata, slots: vec![] }, b"")
}

fn response(connection: ConnectionId, call: u64) -> bytes::Bytes {
    let (call, status, charged) = (CallId(call), Status::Ok, Amount::ZERO);
    framed(&Response { connection, call, status, charged, metadata: Metadata::new(), slots: vec![] }, b"")
}

fn is_violated(pair: &Pair, side: usize) -> bool {
    matches!(pair.peers[side].session().end(), Some(SessionEnd::PeerViolation(_)))
}

#[test]
fn both_ends_call_each_other_at_once_on_one_connection() {
    for lanes in [LaneMode::One, LaneMode::PerConnection] {
        let mut pair = Pair::open(config(lanes), config(lanes), 7);
        let id = pair.connect(A);
        let calls = [pair.call(A, id, 1, b"from a"), pair.call(B, id, 2, b"from b")];
        pair.run();
        for side in [A, B] {
            let [request] = &pair.requests(side)[..] else { panic!() };
            let expected = [("from b", 2), ("from a", 1)][side];
            assert_eq!((&request.payload[..], request.method), (expected.0.as_bytes(), expected.1));
            pair.answer(side, request.call, Status::Ok, b"answer");
        }
        pair.run();
        for side in [A, B] {
            let events = pair.take(side);
            assert!(matches!(&events[..], [Event::CallAnswered(got), Event::CallEnded { call, .. }]
                if got.is_end && got.payload == "answer" && got.call == calls[side] && *call == calls[side]));
        }
        assert_eq!(pair.counts(), [(1, 0, 0); 2]);
    }
}

#[test]
fn a_deadline_travels_as_the_time_that_is_left() {
    use std::time::Duration;
    use tollway_protocol::session::CallSpec;
    let mut pair = Pair::one_lane();
    let connection = pair.connect(A);
    let deadline = Some(pair.now.after(Duration::from_secs(5)));
    let (metadata, payload) = (Metadata::new(), bytes::Bytes::new());
    let spec = CallSpec { connection, method: 1, deadline, metadata, payload, slots: &[] };
    pair.peers[A].start_call(spec).unwrap();
    // It waits two seconds for its turn.
    pair.advance(Duration::ZERO);
    pair.now = pair.now.after(Duration::from_secs(2));
    pair.run();
    assert_eq!(pair.requests(B)[0].deadline, Some(Duration::from_secs(3)));
}

/// Lesson 4: a dropped call cancels, and leaves no entry.
#[test]
fn a_call_that_is_cancelled_before_its_turn_is_never_announced() {
    let mut pair = Pair::one_lane();
    let id = pair.connect(A);
    let (call, streams) = pair.call_with(A, id, 1, b"", &[Flow::ToPeer, Flow::FromPeer]);
    pair.peers[A].push(streams[0], b"item").unwrap();
    pair.peers[A].cancel_call(call);
    pair.run();
    assert!(pair.requests(B).is_empty());
    assert_eq!(pair.counts(), [(1, 0, 0); 2]);
    assert_eq!(pair.peers[A].stream_ends(), (0, 0));
    // The ids that it did not use come next.
    pair.call(A, id, 1, b"");
    pair.run();
    assert_eq!(pair.requests(B).len(), 1);
}

/// Lesson 4.
#[test]
fn a_call_that_is_cancelled_after_its_turn_reaches_the_handler_and_ends_with_its_answer() {
    let mut pair = Pair::one_lane();
    let id = pair.connect(A);
    let call = pair.call(A, id, 1, b"");
    pair.run();
    let served = pair.requests(B)[0].call;
    pair.peers[A].cancel_call(call);
    pair.peers[A].cancel_call(call);
    pair.run();
    assert_eq!(pair.pipes[A].kinds.iter().filter(|&&kind| kind == 34).count(), 1, "said once");
    assert!(matches!(&pair.take(B)[..], [Event::CallCancelled { call }] if *call == served));
    pair.answer(B, served, Status::Cancelled, b"");
    pair.run();
    assert!(matches!(&pair.take(A)[..], [Event::CallAnswered(got), Event::CallEnded { .. }]
        if got.status == Status::Cancelled));
    assert_eq!(pair.counts(), [(1, 0, 0); 2]);
}

#[test]
fn a_cancel_that_crosses_the_answer_is_dropped() {
    let mut pair = Pair::one_lane();
    let id = pair.connect(A);
    let call = pair.call(A, id, 1, b"");
    pair.run();
    let served = pair.requests(B)[0].call;
    pair.answer(B, served, Status::Ok, b"");
    pair.write(B);
    pair.peers[A].cancel_call(call);
    pair.run();
    pair.assert_alive();
    assert_eq!(pair.counts(), [(1, 0, 0); 2]);
}

/// Lesson 4: calls after close fail at once.
#[test]
fn calls_fail_with_their_connection_and_later_ones_fail_at_once() {
    let mut pair = Pair::one_lane();
    let id = pair.connect(A);
    let announced = pair.call(A, id, 1, b"");
    pair.run();
    let served = pair.requests(B)[0].call;
    let queued = pair.call(A, id, 1, b"");
    pair.close(A, id);
    let failed: Vec<_> = pair.take(A).into_iter().collect();
    for call in [announced, queued] {
        assert!(failed.iter().any(|event| matches!(event, Event::CallFailed { call: got } if *got == call)));
    }
    pair.run();
    assert!(pair.take(B).iter().any(|event| matches!(event, Event::CallFailed { call } if *call == served)));
    let spec = tollway_protocol::session::CallSpec {
        connection: id,
        method: 1,
        deadline: None,
        metadata: Metadata::new(),
        payload: bytes::Bytes::new(),
        slots: &[],
    };
    assert_eq!(pair.peers[A].start_call(spec), Err(CommandError::NoConnection(id)));
    assert_eq!(pair.counts(), [(0, 0, 0); 2]);
}

/// Lesson 13: `max_calls` is enforced, by the caller as back-pressure and by the callee as a violation.
/// `[call.max]`
#[test]
fn calls_beyond_the_limit_wait_for_a_place() {
    let mut pair = Pair::one_lane();
    let id = pair.connect_with(A, Default::default(), ConnectionLimits { max_calls: 2, ..Default::default() });
    for _ in 0..5 {
        pair.call(A, id, 1, b"");
    }
    pair.run();
    let mut served = pair.requests(B);
    assert_eq!(served.len(), 2);
    let mut total = 2;
    while let Some(call) = served.pop() {
        pair.answer(B, call.call, Status::Ok, b"");
        pair.run();
        let more = pair.requests(B);
        total += more.len();
        served.extend(more);
        assert!(served.len() <= 2);
    }
    assert_eq!(total, 5);
    for call in [11, 13, 15] {
        pair.peers[B].handle_frame(pair.now, Lane(0), request(id, call));
    }
    let end = pair.peers[B].session().end();
    assert!(
        matches!(end, Some(SessionEnd::PeerViolation(Violation::AboveLimit { what: "open calls", .. }))),
        "{end:?}"
    );
}

/// Bodies wait for the window, and a body may pass it that started below it. `[call.window.start]`
#[test]
fn bodies_wait_for_the_window_in_both_directions() {
    let mut pair = Pair::one_lane();
    let limits = ConnectionLimits { window: 100, max_body: 80, ..Default::default() };
    let id = pair.connect_with(A, limits, limits);
    for _ in 0..4 {
        pair.call(A, id, 1, &[1; 80]);
    }
    pair.run();
    let served = pair.requests(B);
    assert_eq!(served.len(), 2, "the second starts with 20 bytes of window left");
    pair.peers[B].session_mut().consume_body(id, 80);
    pair.run();
    assert_eq!(pair.requests(B).len(), 1, "20 bytes are free again: another starts");
    for call in served {
        pair.answer(B, call.call, Status::Ok, &[2; 80]);
    }
    pair.run();
    let [first, second] = &pair.responses(A)[..] else { panic!() };
    assert_eq!((first.payload.len(), second.payload.len()), (80, 80));
    pair.peers[B].handle_frame(pair.now, Lane(0), request(id, 7));
    let end = pair.peers[B].session().end();
    assert!(matches!(end, Some(SessionEnd::PeerViolation(Violation::NoCredit { what: "body" }))), "{end:?}");
}

#[test]
fn a_body_above_the_peers_limit_is_refused_here_and_a_violation_there() {
    let mut pair = Pair::one_lane();
    let limits = ConnectionLimits { max_body: 10, ..Default::default() };
    let id = pair.connect_with(A, limits, limits);
    pair.call(A, id, 1, &[0; 10]);
    pair.run();
    let served = pair.requests(B)[0].call;
    let spec = tollway_protocol::session::ResponseSpec {
        status: Status::Ok,
        metadata: Metadata::new(),
        payload: vec![0; 11].into(),
        slots: &[],
        cost: None,
        paid_before: Amount::ZERO,
    };
    assert_eq!(pair.peers[B].respond(served, spec), Err(CommandError::BodyTooLarge { bytes: 11, limit: 10 }));
    pair.answer(B, served, Status::TooLarge, b"");
    pair.run();
    assert_eq!(pair.responses(A)[0].status, Status::TooLarge);
    let mut frame = request(id, 3).to_vec();
    frame.extend_from_slice(&[0; 11]);
    pair.peers[B].handle_frame(pair.now, Lane(0), frame.into());
    assert!(is_violated(&pair, B));
}

/// Lesson 8: a call id is the next one of the caller's half; a duplicate overwrites nothing. `[call.id.next]`
#[test]
fn a_call_with_any_other_id_than_the_next_is_a_violation() {
    for (ids, bad) in [(&[1, 3][..], false), (&[2], true), (&[0], true), (&[3], true), (&[1, 1], true), (&[1, 5], true)]
    {
        let mut pair = Pair::one_lane();
        let id = pair.connect(A);
        for &call in ids {
            pair.peers[B].handle_frame(pair.now, Lane(0), request(id, call));
        }
        assert_eq!(is_violated(&pair, B), bad, "{ids:?}");
    }
}

/// `[call.end.once]`, `[call.end.last]`
#[test]
fn an_answer_to_no_call_and_a_second_answer_are_violations() {
    for answers in [&[3][..], &[2], &[1, 1]] {
        let mut pair = Pair::one_lane();
        let id = pair.connect(A);
        pair.call(A, id, 1, b"");
        pair.write(A);
        for &call in answers {
            pair.peers[A].handle_frame(pair.now, Lane(0), response(id, call));
        }
        assert!(is_violated(&pair, A), "{answers:?}");
    }
    let mut pair = Pair::one_lane();
    let connection = pair.connect(A);
    pair.call_with(A, connection, 1, b"", &[Flow::FromPeer]);
    pair.write(A);
    pair.peers[A].handle_frame(pair.now, Lane(0), response(connection, 1));
    assert!(!is_violated(&pair, A));
    let done = Done { connection, call: CallId(1), charged: Amount::ZERO };
    pair.peers[A].handle_frame(pair.now, Lane(0), framed(&done, b""));
    let end = pair.peers[A].session().end();
    assert!(matches!(end, Some(SessionEnd::PeerViolation(Violation::CallEndedEarly { .. }))), "{end:?}");
}

/// Round-robin by bytes: a small call never waits behind a bulk of another connection. `[session.fair.bytes]`
#[test]
fn connections_share_the_writer_by_bytes() {
    let mut pair = Pair::one_lane();
    let limits = ConnectionLimits { window: 1 << 26, ..Default::default() };
    let bulk = pair.connect_with(A, limits, limits);
    let small = pair.connect_with(A, limits, limits);
    for _ in 0..16 {
        pair.call(A, bulk, 1, &[0; 1 << 20]);
    }
    for _ in 0..100 {
        pair.call(A, small, 1, &[0; 100]);
    }
    let mut order = Vec::new();
    while let Some(frame) = pair.peers[A].poll_transmit(pair.now) {
        order.push(frame.payload.len());
    }
    let last_small = order.iter().rposition(|&bytes| bytes == 100).unwrap();
    let bulk_before: usize = order[..last_small].iter().filter(|&&bytes| bytes > 100).count();
    assert!(bulk_before <= 1, "{bulk_before} bulk frames went before 10 kB of small ones");
    // The same bytes on both: they alternate, whatever their frames' sizes.
    for _ in 0..64 {
        pair.call(A, bulk, 1, &[0; 16 << 10]);
    }
    for _ in 0..256 {
        pair.call(A, small, 1, &[0; 4 << 10]);
    }
    let (mut sent, mut worst) = ([0i64; 2], 0);
    while let Some(frame) = pair.peers[A].poll_transmit(pair.now) {
        let bytes = frame.payload.len();
        sent[usize::from(bytes == 4 << 10)] += bytes as i64;
        let both_have_more = sent.iter().all(|&bytes| bytes < 1 << 20);
        if both_have_more {
            worst = worst.max((sent[0] - sent[1]).abs());
        }
    }
    assert!(worst <= 128 << 10, "{worst} bytes apart");
}

#[test]
fn small_bodies_are_counted_while_they_are_fewer_bytes_than_asked_for_and_nothing_else_waits() {
    let mut pair = Pair::one_lane();
    let id = pair.connect(A);
    let small = |pair: &Pair, bytes| pair.peers[A].session().small_bodies(bytes);
    assert_eq!(small(&pair, 1_000), None, "nothing waits");
    pair.call(A, id, 1, &[0; 68]);
    assert_eq!((small(&pair, 101), small(&pair, 100)), (Some(1), None), "68 bytes, and 32 for the header");
    pair.call(A, id, 1, &[0; 68]);
    assert_eq!((small(&pair, 201), small(&pair, 200)), (Some(2), None));
    let other = pair.start_open(A, Default::default());
    assert_eq!(small(&pair, 1_000), None, "an open goes before them: {other}");
}

#[test]
fn events_are_announced_while_there_are_any() {
    let mut pair = Pair::one_lane();
    let id = pair.connect(A);
    let session = pair.peers[A].session_mut();
    assert!(!session.has_events());
    session.close(id, tollway_protocol::error::Reason::none());
    assert!(session.has_events());
    let mut events = std::collections::VecDeque::new();
    session.swap_events(&mut events);
    assert!(!session.has_events() && events.len() == 1);
}

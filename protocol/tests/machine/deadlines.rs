//! Calls end with their deadlines, wherever they are, and their streams with them.

use std::time::Duration;

use bytes::Bytes;
use tollway_protocol::error::code;
use tollway_protocol::id::ConnectionId;
use tollway_protocol::message::{Flow, Status};
use tollway_protocol::metadata::Metadata;
use tollway_protocol::session::{CallKey, CallSpec, Event};
use tollway_protocol::stream::{Ending, StreamKey};

use crate::pair::{A, B, Pair};

const SECOND: Duration = Duration::from_secs(1);

/// A call of A's that has so much time.
fn call(pair: &mut Pair, connection: ConnectionId, time: Duration, slots: &[Flow]) -> (CallKey, Vec<StreamKey>) {
    let (deadline, metadata, payload) = (Some(pair.now.after(time)), Metadata::new(), Bytes::new());
    pair.peers[A].start_call(CallSpec { connection, method: 1, deadline, metadata, payload, slots }).unwrap()
}

fn expired(events: &[Event]) -> Vec<(CallKey, bool)> {
    let expired = events.iter().filter_map(|event| match event {
        Event::CallExpired { call, sent } => Some((*call, *sent)),
        _ => None,
    });
    expired.collect()
}

/// `[call.deadline]`
#[test]
fn a_call_that_runs_ends_with_its_deadline_on_both_sides() {
    let mut pair = Pair::one_lane();
    let id = pair.connect(A);
    let (ours, _) = call(&mut pair, id, SECOND, &[]);
    pair.run();
    let served = pair.requests(B)[0].call;
    pair.advance(SECOND - Duration::from_nanos(1));
    assert_eq!((expired(&pair.take(A)), expired(&pair.take(B))), (vec![], vec![]), "not before its time");
    pair.advance(Duration::from_nanos(1));
    assert_eq!(expired(&pair.take(A)), [(ours, true)]);
    // A cancel that comes first does not hide from the callee that it is late.
    assert!(pair.take(B).iter().any(|event| matches!(event,
        Event::CallExpired { call, .. } | Event::CallCancelled { call } if *call == served)));
    pair.answer(B, served, Status::DeadlineExceeded, b"");
    pair.run();
    pair.assert_alive();
    assert_eq!(pair.counts(), [(1, 0, 0); 2]);
}

/// `[call.deadline]`
#[test]
fn the_callee_goes_by_its_own_clock() {
    let mut pair = Pair::one_lane();
    let id = pair.connect(A);
    call(&mut pair, id, SECOND, &[]);
    pair.run();
    let served = pair.requests(B)[0].call;
    // Nothing more comes from the caller, no cancel either.
    pair.pipes[A].stalled = true;
    pair.advance(SECOND);
    assert_eq!(expired(&pair.take(B)).len(), 1);
    pair.answer(B, served, Status::DeadlineExceeded, b"");
    pair.pipes[A].stalled = false;
    pair.run();
    assert_eq!(pair.counts(), [(1, 0, 0); 2]);
}

/// `[call.deadline]`
#[test]
fn a_call_whose_turn_comes_too_late_is_never_sent() {
    let mut pair = Pair::one_lane();
    let id = pair.connect(A);
    let (late, _) = call(&mut pair, id, SECOND, &[Flow::ToPeer, Flow::FromPeer]);
    let (waiting, _) = call(&mut pair, id, 3 * SECOND, &[]);
    // Its turn comes before anybody looks at the clock.
    pair.now = pair.now.after(2 * SECOND);
    pair.run();
    assert_eq!(expired(&pair.take(A)), [(late, false)]);
    let requests = pair.requests(B);
    assert_eq!((requests.len(), requests[0].deadline), (1, Some(SECOND)), "the other has what is left");
    pair.answer(B, requests[0].call, Status::Ok, b"");
    pair.advance(10 * SECOND);
    assert!(pair.take(A).iter().all(|event| !matches!(event, Event::CallExpired { call, .. } if *call == waiting)));
    assert_eq!(pair.counts(), [(1, 0, 0); 2]);
}

/// `[call.deadline]`
#[test]
fn streams_end_with_the_deadline_of_their_call() {
    let mut pair = Pair::one_lane();
    let id = pair.connect(A);
    let (_, ours) = call(&mut pair, id, SECOND, &[Flow::ToPeer, Flow::FromPeer]);
    pair.run();
    let request = pair.requests(B).remove(0);
    let inward = request.slots[0].stream;
    let outward = pair.answer_with(B, request.call, Status::Ok, b"", &[Flow::ToPeer])[0];
    pair.peers[A].push(ours[0], b"item").unwrap();
    pair.peers[B].push(outward, b"item").unwrap();
    pair.run();
    assert_eq!(pair.counts()[A].2, 3, "all are open");
    pair.advance(SECOND);
    let late = |events: Vec<Event>| events.iter().filter(|event| matches!(event, Event::StreamExpired { .. })).count();
    assert_eq!((late(pair.take(A)) > 0, late(pair.take(B)) > 0), (true, true));
    assert!(matches!(pair.read_all(B, inward).1, None | Some(Ending::Reset(code::DEADLINE))));
    pair.run();
    pair.assert_alive();
    assert_eq!(pair.counts(), [(1, 0, 0); 2], "the call has ended with its streams");
}

#[test]
fn deadlines_of_calls_that_have_ended_do_not_pile_up() {
    let mut pair = Pair::one_lane();
    let id = pair.connect(A);
    for _ in 0..1000 {
        call(&mut pair, id, 3600 * SECOND, &[]);
        pair.run();
        let served = pair.requests(B)[0].call;
        pair.answer(B, served, Status::Ok, b"");
        pair.run();
    }
    for side in [A, B] {
        assert!(
            pair.peers[side].session().deadline_count() <= 2 * 64,
            "{}",
            pair.peers[side].session().deadline_count()
        );
    }
}

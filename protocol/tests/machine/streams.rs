//! Streams: credit, endings, slots, and that one which is not read stalls nobody.

use bytes::Bytes;
use tollway_protocol::error::{SessionEnd, Violation, code};
use tollway_protocol::frame::Lane;
use tollway_protocol::id::StreamId;
use tollway_protocol::limits::{ConnectionLimits, MAX_SLOTS, SessionLimits};
use tollway_protocol::message::{Credit, End, Flow, Items, Status, Stop};
use tollway_protocol::peer::{PushError, Read};
use tollway_protocol::session::{CommandError, Config, Event, LaneMode};
use tollway_protocol::stream::{Ending, StreamKey};

use crate::pair::{A, B, Pair, config, framed};

/// A call of A's with one stream each way: the call at B, and both ends of both streams.
struct Both {
    served: tollway_protocol::session::CallKey,
    /// A sends.
    up: [StreamKey; 2],
    /// B sends.
    down: [StreamKey; 2],
    connection: tollway_protocol::id::ConnectionId,
}

fn both_ways(pair: &mut Pair, limits: ConnectionLimits) -> Both {
    let connection = pair.connect_with(A, limits, limits);
    let (_, keys) = pair.call_with(A, connection, 1, b"", &[Flow::ToPeer, Flow::FromPeer]);
    pair.run();
    let call = pair.requests(B).pop().unwrap();
    assert_eq!((call.slots[0].flow, call.slots[1].flow), (Flow::FromPeer, Flow::ToPeer), "seen from B");
    Both { served: call.call, up: [keys[0], call.slots[0].stream], down: [keys[1], call.slots[1].stream], connection }
}

#[test]
fn streams_flow_both_ways_in_order_and_the_call_ends_after_them() {
    for (lanes, seed) in [(LaneMode::One, 1), (LaneMode::PerConnection, 2)] {
        let mut pair = Pair::open(config(lanes), config(lanes), seed);
        let Both { served, up, down, .. } =
            both_ways(&mut pair, ConnectionLimits { stream_window: 500, ..Default::default() });
        let (mut got_up, mut got_down) = (Vec::new(), Vec::new());
        for number in 0..200u32 {
            pair.peers[A].push(up[A], &number.to_le_bytes()).unwrap();
            pair.peers[B].push(down[B], &number.to_be_bytes()).unwrap();
            if number % 3 == 0 {
                pair.run();
                got_up.extend(pair.read_all(B, up[B]).0);
                got_down.extend(pair.read_all(A, down[A]).0);
            }
        }
        pair.peers[A].finish(up[A]);
        pair.peers[B].finish(down[B]);
        pair.answer(B, served, Status::Ok, b"answer");
        pair.run();
        let mut endings = Vec::new();
        while endings.len() < 2 {
            let (items, ending) = pair.read_all(B, up[B]);
            got_up.extend(items);
            endings.extend(ending);
            let (items, ending) = pair.read_all(A, down[A]);
            got_down.extend(items);
            endings.extend(ending);
            pair.run();
        }
        assert_eq!(endings, [Ending::End; 2]);
        assert!(got_up.iter().map(|item| u32::from_le_bytes(item[..].try_into().unwrap())).eq(0..200));
        assert!(got_down.iter().map(|item| u32::from_be_bytes(item[..].try_into().unwrap())).eq(0..200));
        // Done only after the streams. [call.end.last]
        let events = pair.take(A);
        let [Event::CallAnswered(answer), Event::StreamEnded { .. }, Event::CallEnded { .. }] = &events[..] else {
            panic!("{events:?}")
        };
        assert!(!answer.is_end);
        assert_eq!(pair.counts(), [(1, 0, 0); 2]);
        assert_eq!([A, B].map(|side| pair.peers[side].stream_ends()), [(0, 0); 2]);
    }
}

#[test]
fn small_items_share_a_frame() {
    let mut pair = Pair::one_lane();
    let Both { up, .. } = both_ways(&mut pair, ConnectionLimits::default());
    pair.pipes[A].kinds.clear();
    (0..1000).for_each(|_| pair.peers[A].push(up[A], b"tick").unwrap());
    pair.run();
    assert_eq!(pair.pipes[A].kinds, [48]);
    assert_eq!(pair.read_all(B, up[B]).0.len(), 1000);
}

/// Lessons 10 and 14: inboxes are sized by credit, so nothing stalls and nothing is lost.
#[test]
fn a_stream_that_is_not_read_stalls_no_other_and_loses_nothing() {
    let mut pair = Pair::one_lane();
    let stuck = both_ways(&mut pair, ConnectionLimits::default());
    let live = both_ways(&mut pair, ConnectionLimits::default());
    for _ in 0..100 {
        for stream in [stuck.up[A], live.up[A]] {
            (0..10).for_each(|_| pair.peers[A].push(stream, &[7; 10_000]).unwrap());
        }
        pair.run();
        assert_eq!(pair.read_all(B, live.up[B]).0.len(), 10);
        pair.run();
    }
    // Ping, close and calls of the stuck connection itself go on too.
    pair.call(A, stuck.connection, 1, b"");
    pair.run();
    assert_eq!(pair.requests(B).len(), 1);
    assert!(pair.peers[A].buffered(stuck.up[A]).unwrap() > 8_000_000, "what has no credit stays with its sender");
    let mut items = 0;
    loop {
        let (read, _) = pair.read_all(B, stuck.up[B]);
        if read.is_empty() {
            break;
        }
        items += read.len();
        pair.run();
    }
    assert_eq!(items, 1000);
}

/// `[stream.credit.start]`, `[stream.credit.overhead]`
#[test]
fn an_item_without_credit_is_a_violation_and_empty_items_cost_credit() {
    for (items, bad) in [(7, false), (8, true)] {
        let mut pair = Pair::one_lane();
        let limits = ConnectionLimits { stream_window: 100, ..Default::default() };
        let Both { connection, .. } = both_ways(&mut pair, limits);
        let frame = framed(&Items { connection, stream: StreamId(1), slots: vec![] }, &vec![0; items]);
        pair.peers[B].handle_frame(pair.now, Lane(0), frame);
        let end = pair.peers[B].session().end();
        assert_eq!(end.is_some(), bad, "the seventh starts at 96 of 100, the eighth at 112: {end:?}");
        if bad {
            assert_eq!(end, Some(&SessionEnd::PeerViolation(Violation::NoCredit { what: "item" })));
        }
    }
}

/// `[stream.credit.monotonic]`
#[test]
fn a_credit_that_does_not_rise_is_a_violation() {
    let window = u64::from(ConnectionLimits::default().stream_window);
    for (limit, refused) in [(window - 1, true), (window, true), (window + 1, false)] {
        let mut pair = Pair::one_lane();
        let Both { connection, .. } = both_ways(&mut pair, ConnectionLimits::default());
        let credit = Credit { connection, stream: StreamId(1), limit, consumed: 0 };
        pair.peers[A].handle_frame(pair.now, Lane(0), framed(&credit, b""));
        let end = pair.peers[A].session().end();
        assert_eq!(
            matches!(end, Some(SessionEnd::PeerViolation(Violation::CreditWentBack { .. }))),
            refused,
            "{end:?}"
        );
    }
}

/// `[stream.stop.answer]`
#[test]
fn a_stopped_stream_is_reset_and_later_items_are_dropped() {
    let mut pair = Pair::one_lane();
    let Both { served, up, down, .. } = both_ways(&mut pair, ConnectionLimits::default());
    pair.peers[A].push(up[A], b"unread").unwrap();
    pair.run();
    pair.peers[B].stop(up[B], 77);
    assert_eq!(pair.peers[B].read(up[B]), Read::Closed);
    pair.peers[A].push(up[A], b"crosses the stop").unwrap();
    pair.write(A);
    pair.run();
    assert!(pair.take(A).iter().any(|event| matches!(event, Event::StreamStopped { code: 77, .. })));
    assert_eq!(pair.peers[A].push(up[A], b"late"), Err(PushError::Closed));
    pair.peers[B].finish(down[B]);
    pair.answer(B, served, Status::Ok, b"");
    pair.run();
    assert_eq!(pair.counts(), [(1, 0, 0); 2]);
}

#[test]
fn a_reset_drops_what_was_not_sent_and_what_was_sent_is_still_read() {
    let mut pair = Pair::one_lane();
    let Both { up, .. } = both_ways(&mut pair, ConnectionLimits::default());
    pair.peers[A].push(up[A], b"sent").unwrap();
    pair.run();
    pair.peers[A].push(up[A], b"dropped").unwrap();
    pair.peers[A].reset(up[A], 9);
    pair.run();
    let (items, ending) = pair.read_all(B, up[B]);
    assert_eq!((items, ending), (vec![Bytes::from_static(b"sent")], Some(Ending::Reset(9))));
}

#[test]
fn a_stop_that_crosses_the_end_is_dropped() {
    let mut pair = Pair::one_lane();
    let Both { up, down, served, .. } = both_ways(&mut pair, ConnectionLimits::default());
    pair.peers[A].finish(up[A]);
    pair.write(A);
    pair.peers[B].stop(up[B], 1);
    pair.run();
    pair.assert_alive();
    pair.peers[B].finish(down[B]);
    pair.answer(B, served, Status::Ok, b"");
    pair.run();
    assert_eq!(pair.counts(), [(1, 0, 0); 2]);
}

/// `[stream.id.next]`, `[stream.end.last]`, `[stream.end.once]`
#[test]
fn frames_for_streams_that_ended_or_never_were_are_violations() {
    type Make = fn(tollway_protocol::id::ConnectionId, StreamId) -> Bytes;
    let items: Make = |connection, stream| framed(&Items { connection, stream, slots: vec![] }, &[0]);
    let end: Make = |connection, stream| framed(&End { connection, stream }, b"");
    let stop: Make = |connection, stream| framed(&Stop { connection, stream, code: 0 }, b"");
    for (frames, alive) in [
        (&[(items, 1), (end, 1)][..], true),
        (&[(end, 1), (items, 1)], false),
        (&[(end, 1), (end, 1)], false),
        // Stream 3 flows from B to A: B takes no items of it, but a Stop.
        (&[(items, 3)], false),
        (&[(end, 3)], false),
        (&[(stop, 3)], true),
        (&[(stop, 1)], false),
        (&[(items, 5)], false),
        (&[(items, 2)], false),
        (&[(items, 0)], false),
        (&[(stop, u64::MAX)], false),
    ] {
        let mut pair = Pair::one_lane();
        let both = both_ways(&mut pair, ConnectionLimits::default());
        for (make, stream) in frames {
            pair.peers[B].handle_frame(pair.now, Lane(0), make(both.connection, StreamId(*stream)));
        }
        assert_eq!(pair.peers[B].session().end().is_none(), alive, "{:?}", pair.peers[B].session().end());
    }
}

#[test]
fn items_carry_streams_that_carry_streams() {
    for (lanes, seed) in [(LaneMode::One, 1), (LaneMode::PerConnection, 5)] {
        let mut pair = Pair::open(config(lanes), config(lanes), seed);
        let Both { up, down, served, .. } = both_ways(&mut pair, ConnectionLimits::default());
        let inner = pair.peers[A].push_with(up[A], b"outer", &[Flow::ToPeer, Flow::FromPeer]).unwrap();
        let innermost = pair.peers[A].push_with(inner[0], b"inner", &[Flow::ToPeer]).unwrap();
        pair.peers[A].push(innermost[0], b"innermost").unwrap();
        for stream in [up[A], inner[0], innermost[0]] {
            pair.peers[A].finish(stream);
        }
        pair.run();
        let Read::Item(item, slots) = pair.peers[B].read(up[B]) else { panic!() };
        assert_eq!((&item[..], slots[0].flow, slots[1].flow), (&b"outer"[..], Flow::FromPeer, Flow::ToPeer));
        pair.peers[B].push(slots[1].stream, b"back").unwrap();
        pair.peers[B].finish(slots[1].stream);
        let Read::Item(_, deeper) = pair.peers[B].read(slots[0].stream) else { panic!() };
        assert_eq!(pair.read_all(B, deeper[0].stream), (vec!["innermost".into()], Some(Ending::End)));
        pair.peers[B].finish(down[B]);
        pair.answer(B, served, Status::Ok, b"");
        pair.run();
        assert_eq!(pair.read_all(A, inner[1]), (vec!["back".into()], Some(Ending::End)));
        assert_eq!(pair.counts(), [(1, 0, 0); 2]);
    }
}

/// Streams in items that nobody reads are ended, or their call would never end. `[stream.slots.unseen]`
#[test]
fn stopping_a_stream_ends_the_streams_in_its_unread_and_later_items() {
    let mut pair = Pair::one_lane();
    let Both { up, down, served, .. } = both_ways(&mut pair, ConnectionLimits::default());
    let flows = [Flow::ToPeer, Flow::FromPeer];
    let unread = pair.peers[A].push_with(up[A], b"unread", &flows).unwrap();
    let nested = pair.peers[A].push_with(unread[0], b"nested in it", &flows).unwrap();
    pair.run();
    let crossing = pair.peers[A].push_with(up[A], b"crosses the stop", &flows).unwrap();
    pair.write(A);
    let unsent = pair.peers[A].push_with(up[A], b"never sent", &flows).unwrap();
    pair.peers[B].stop(up[B], code::CANCELLED);
    while pair.read(B) || (pair.write(B) | pair.read(A)) {}
    pair.run();
    for stream in [unread[1], nested[1], crossing[1]] {
        assert_eq!(pair.read_all(A, stream).1, Some(Ending::Reset(code::CANCELLED)));
    }
    assert_eq!(pair.peers[A].read(unsent[1]), Read::Closed);
    pair.peers[B].finish(down[B]);
    pair.answer(B, served, Status::Ok, b"");
    pair.run();
    pair.read_all(A, down[A]);
    assert_eq!(pair.counts(), [(1, 0, 0); 2]);
    assert_eq!([A, B].map(|side| pair.peers[side].stream_ends()), [(0, 0); 2]);
}

#[test]
fn a_stream_in_an_answer_outlives_it_and_holds_the_call() {
    let mut pair = Pair::one_lane();
    let id = pair.connect(A);
    pair.call(A, id, 1, b"");
    pair.run();
    let served = pair.requests(B)[0].call;
    let keys = pair.answer_with(B, served, Status::Ok, b"watch", &[Flow::ToPeer]);
    pair.peers[B].push(keys[0], b"first").unwrap();
    pair.run();
    let answer = pair.responses(A).pop().unwrap();
    assert!(!answer.is_end);
    assert_eq!(pair.read_all(A, answer.slots[0].stream).0, ["first"]);
    pair.peers[B].finish(keys[0]);
    pair.run();
    assert!(matches!(pair.take(A).last(), Some(Event::CallEnded { .. })));
    assert_eq!(pair.counts(), [(1, 0, 0); 2]);
}

/// Lesson 13. `[stream.max]`, `[stream.slots.max]`
#[test]
fn streams_beyond_the_limit_are_refused() {
    let mut pair = Pair::one_lane();
    let limits = ConnectionLimits { max_streams: 3, ..Default::default() };
    let Both { up, .. } = both_ways(&mut pair, limits);
    pair.peers[A].push_with(up[A], b"", &[Flow::ToPeer]).unwrap();
    let over = pair.peers[A].push_with(up[A], b"", &[Flow::ToPeer]);
    assert_eq!(over, Err(PushError::Slots(CommandError::AtCapacity { what: "open streams", limit: 3 })));
    pair.run();
    pair.assert_alive();
    let mut pair = Pair::one_lane();
    let Both { up, .. } =
        both_ways(&mut pair, ConnectionLimits { max_streams: u32::MAX, ..ConnectionLimits::default() });
    assert!(pair.peers[A].push_with(up[A], b"", &[Flow::ToPeer; MAX_SLOTS]).is_ok());
    assert!(pair.peers[A].push_with(up[A], b"", &[Flow::ToPeer; MAX_SLOTS + 1]).is_err());
    pair.run();
    pair.assert_alive();
}

/// `[session.frame.max]`
#[test]
fn runs_of_items_and_the_largest_item_fit_the_peers_largest_frame() {
    let limits = SessionLimits { max_frame: 33 * 1024, ..Default::default() };
    let mut pair = Pair::open(config(LaneMode::One), Config { limits, ..Config::default() }, 1);
    let peer = ConnectionLimits { max_item: 1024, max_body: 1024, ..Default::default() };
    let connection = pair.connect_with(A, ConnectionLimits::default(), peer);
    let (_, keys) = pair.call_with(A, connection, 1, &[0; 1024], &[Flow::ToPeer]);
    for (size, count) in [(1000, 200), (1024, 10), (0, 50_000)] {
        (0..count).for_each(|_| pair.peers[A].push(keys[0], &vec![1; size]).unwrap());
    }
    assert_eq!(pair.peers[A].push(keys[0], &[0; 1025]), Err(PushError::TooLarge { bytes: 1025, limit: 1024 }));
    pair.run();
    pair.assert_alive();
}

#[test]
fn streams_fail_with_their_connection() {
    let mut pair = Pair::one_lane();
    let both = both_ways(&mut pair, ConnectionLimits::default());
    pair.close(B, both.connection);
    pair.run();
    for side in [A, B] {
        let failed = pair.take(side).into_iter().filter(|event| matches!(event, Event::StreamFailed { .. }));
        assert_eq!(failed.count(), 2);
        assert_eq!(pair.peers[side].stream_ends(), (0, 0));
    }
    assert_eq!(pair.peers[A].push(both.up[A], b""), Err(PushError::Closed));
}

//! Virtual connections: their states, races, ids and limits.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tollway_protocol::error::{ConnectionEnd, Reason, SessionEnd, Violation, code};
use tollway_protocol::frame::Lane;
use tollway_protocol::id::{CallId, ConnectionId, Parity};
use tollway_protocol::limits::{ConnectionLimits, SessionLimits};
use tollway_protocol::message::{Accept, Cancel, Close, Open, Reject, Request};
use tollway_protocol::metadata::Metadata;
use tollway_protocol::payment::Amount;
use tollway_protocol::session::{CommandError, Config, Event, LaneMode, PayerMoney, StreamSource};
use tollway_protocol::stream::{StreamKey, Taken};
use tollway_protocol::time::Time;

use crate::pair::{A, B, Pair, config, framed};

fn open(connection: u64) -> Bytes {
    let connection = ConnectionId(connection);
    let limits = ConnectionLimits::default();
    framed(&Open { connection, service: "echo".into(), parity: Parity::Odd, limits, metadata: Metadata::new() }, b"")
}

fn accept(connection: ConnectionId) -> Bytes {
    framed(&Accept { connection, limits: ConnectionLimits::default(), metadata: Metadata::new() }, b"")
}

fn reject(connection: ConnectionId) -> Bytes {
    framed(&Reject { connection, reason: Reason::none().into(), metadata: Metadata::new() }, b"")
}

fn close(connection: ConnectionId) -> Bytes {
    framed(&Close { connection, reason: Reason::none().into(), metadata: Metadata::new() }, b"")
}

fn violation(pair: &Pair, side: usize) -> Option<&Violation> {
    match pair.peers[side].session().end() {
        Some(SessionEnd::PeerViolation(violation)) => Some(violation),
        None => None,
        end => panic!("{end:?}"),
    }
}

/// Lesson 15: an accept is an event that is answered whenever the application is ready.
#[test]
fn an_open_is_answered_later_and_other_work_goes_on_meanwhile() {
    let mut pair = Pair::one_lane();
    let slow = pair.start_open(A, Default::default());
    let fast = pair.connect(A);
    assert_ne!(slow, fast);
    pair.call(A, fast, 1, b"");
    pair.run();
    assert_eq!(pair.requests(B).len(), 1);
    pair.peers[B].session_mut().accept(slow, Default::default(), Metadata::new().with("v", "2"), None).unwrap();
    pair.run();
    assert!(matches!(&pair.take(A)[..], [Event::ConnectionAccepted { connection, metadata, .. }]
        if *connection == slow && metadata.value("v") == Some(b"2")));
}

#[test]
fn a_rejected_open_brings_reason_and_terms_and_leaves_nothing() {
    let mut pair = Pair::one_lane();
    let id = pair.start_open(A, Default::default());
    pair.run();
    let reason = Reason::new(code::PAYMENT_REQUIRED, "pay");
    let terms = Bytes::from_static(b"terms");
    pair.peers[B].session_mut().reject(id, reason.clone(), Metadata::new(), terms).unwrap();
    pair.run();
    assert!(matches!(&pair.take(A)[..], [Event::ConnectionRejected { reason: got, terms, .. }]
        if *got == reason && terms == "terms"));
    assert_eq!(pair.counts(), [(0, 0, 0); 2]);
}

#[test]
fn a_close_ends_both_sides_with_the_reason() {
    let mut pair = Pair::one_lane();
    let id = pair.connect(A);
    pair.peers[B].session_mut().close(id, Reason::new(code::APPLICATION, "bye"));
    pair.run();
    assert!(matches!(&pair.take(A)[..], [Event::ConnectionClosed { end: ConnectionEnd::ClosedByPeer(reason), .. }]
        if reason.text == "bye"));
    assert!(matches!(&pair.take(B)[..], [Event::ConnectionClosed { end: ConnectionEnd::ClosedByUs(_), .. }]));
    assert_eq!(pair.counts(), [(0, 0, 0); 2]);
}

/// `[session.close.crossed]`
#[test]
fn closes_that_cross_leave_nothing_behind() {
    let mut pair = Pair::one_lane();
    let id = pair.connect(A);
    pair.call(A, id, 1, b"crosses too");
    pair.write(A);
    pair.close(A, id);
    pair.close(B, id);
    pair.run();
    pair.assert_alive();
    assert_eq!(pair.counts(), [(0, 0, 0); 2]);
    assert_eq!(pair.take(A).len(), 2, "the call failed and the connection closed, once each");
}

/// Lesson 3: an abandoned open leaks on neither side, be it accepted or rejected late.
#[test]
fn a_late_answer_to_an_abandoned_open_is_consumed_and_both_sides_forget() {
    for accepts in [true, false] {
        let mut pair = Pair::one_lane();
        let id = pair.start_open(A, Default::default());
        pair.run();
        pair.close(A, id);
        let session = pair.peers[B].session_mut();
        if accepts {
            session.accept(id, Default::default(), Metadata::new(), None).unwrap();
        } else {
            session.reject(id, Reason::none(), Metadata::new(), Bytes::new()).unwrap();
        }
        pair.run();
        pair.assert_alive();
        assert_eq!(pair.counts(), [(0, 0, 0); 2]);
        let late = pair.peers[B].session_mut().accept(id, Default::default(), Metadata::new(), None);
        assert_eq!(late, Err(CommandError::NoConnection(id)));
    }
}

/// Lesson 17: no open timeout.
#[test]
fn an_open_that_nobody_answers_times_out_exactly() {
    let mut pair = Pair::one_lane();
    pair.advance(Duration::from_secs(1));
    let id = pair.start_open(A, Default::default());
    pair.run();
    pair.advance(Duration::from_nanos(29_999_999_999));
    assert!(pair.take(A).iter().all(|event| matches!(event, Event::Pong { .. })));
    pair.advance(Duration::from_nanos(1));
    let events = pair.take(A);
    assert!(events.iter().any(|event| matches!(event,
        Event::ConnectionClosed { connection, end: ConnectionEnd::OpenTimeout, .. } if *connection == id)));
    assert_eq!(pair.counts(), [(0, 0, 0); 2]);
}

/// Lesson 2: a stray Accept or Reject is a violation and changes no connection. `[session.open.answer]`
#[test]
fn an_accept_or_reject_that_answers_no_open_is_a_violation() {
    for frame in [accept, reject] {
        // On a live connection that we opened, on one that the peer opened, on one that is closing, on the root.
        for case in 0..4 {
            let mut pair = Pair::one_lane();
            let id = match case {
                0 | 2 => pair.connect(A),
                1 => pair.connect(B),
                _ => ConnectionId::ROOT,
            };
            if case == 2 {
                pair.close(A, id);
            }
            pair.peers[A].handle_frame(pair.now, Lane(0), frame(id));
            assert!(violation(&pair, A).is_some(), "case {case}");
        }
    }
}

/// Lesson 8: ids are of the opener's parity, rise, and are never used twice. `[session.open.parity]`
#[test]
fn an_open_with_any_other_id_than_the_next_is_a_violation() {
    for (ids, bad) in [(&[2][..], true), (&[3], true), (&[0], true), (&[1, 1], true), (&[1, 5], true), (&[1, 3], false)]
    {
        let mut pair = Pair::one_lane();
        for &id in ids {
            pair.peers[B].handle_frame(pair.now, Lane(0), open(id));
        }
        let expected = bad.then_some(Violation::ConnectionId { id: ConnectionId(*ids.last().unwrap()) });
        assert_eq!(violation(&pair, B), expected.as_ref(), "{ids:?}");
    }
}

/// Lessons 5 and 13. `[session.id.pending]`
#[test]
fn on_many_lanes_a_gap_is_pending_up_to_the_limit_and_the_root_is_never_opened() {
    let limits = SessionLimits { max_pending_opens: 4, ..Default::default() };
    for (ids, bad) in [
        (&[9u64][..], false),
        (&[11], true),
        (&[9, 1, 7, 3, 5], false),
        (&[9, 1, 1], true),
        (&[9, 9], true),
        (&[u64::MAX], true),
        (&[2], true),
    ] {
        let b = Config { limits, ..config(LaneMode::PerConnection) };
        let mut pair = Pair::open(config(LaneMode::PerConnection), b, 1);
        for &id in ids {
            pair.peers[B].handle_frame(pair.now, Lane(id), open(id));
        }
        assert_eq!(violation(&pair, B).is_some(), bad, "{ids:?}");
    }
    // The root is of the even half: an Open of it must not be taken for a gap.
    let even = Config { parity: Parity::Even, ..config(LaneMode::PerConnection) };
    let mut pair = Pair::open(even, config(LaneMode::PerConnection), 1);
    pair.peers[B].handle_frame(pair.now, Lane(0), open(0));
    assert_eq!(violation(&pair, B), Some(&Violation::ConnectionId { id: ConnectionId::ROOT }));
}

/// `[session.lane.own]`
#[test]
fn a_frame_on_a_lane_that_is_not_its_connections_is_a_violation() {
    let lanes = config(LaneMode::PerConnection);
    let mut pair = Pair::open(lanes.clone(), lanes.clone(), 1);
    pair.peers[B].handle_frame(pair.now, Lane(3), open(1));
    assert!(matches!(violation(&pair, B), Some(Violation::WrongLane { .. })));
    let mut pair = Pair::open(lanes.clone(), lanes, 1);
    let ping = framed(&tollway_protocol::message::Ping { nonce: 1 }, b"");
    pair.peers[B].handle_frame(pair.now, Lane(1), ping);
    assert!(matches!(violation(&pair, B), Some(Violation::WrongLane { .. })));
}

/// Lesson 5: `[session.id.known]`
#[test]
fn a_frame_for_an_id_that_was_never_opened_is_a_violation_and_one_for_a_closed_id_is_dropped() {
    let mut pair = Pair::one_lane();
    let id = pair.connect(A);
    pair.close(A, id);
    pair.run();
    let cancel = |connection| framed(&Cancel { connection, call: CallId(1) }, b"");
    pair.peers[B].handle_frame(pair.now, Lane(0), cancel(id));
    pair.peers[B].handle_frame(pair.now, Lane(0), close(id));
    assert_eq!(violation(&pair, B), None);
    for unknown in [id.0 + 2, 0, 2, u64::MAX] {
        let mut pair = Pair::one_lane();
        pair.connect(A);
        pair.peers[B].handle_frame(pair.now, Lane(0), cancel(ConnectionId(unknown)));
        assert!(matches!(violation(&pair, B), Some(Violation::UnknownConnection { .. })), "{unknown}");
    }
}

/// `[session.open.silence]`
#[test]
fn before_the_answer_only_close_may_follow_an_open() {
    let request = |connection| {
        let (call, metadata) = (CallId(1), Metadata::new());
        framed(&Request { connection, call, method: 1, deadline_us: None, metadata, slots: vec![] }, b"")
    };
    let mut pair = Pair::one_lane();
    let id = pair.start_open(A, Default::default());
    pair.run();
    pair.peers[B].handle_frame(pair.now, Lane(0), request(id));
    assert!(matches!(violation(&pair, B), Some(Violation::Unexpected { frame: "Request", .. })));
    let mut pair = Pair::one_lane();
    let id = pair.start_open(A, Default::default());
    pair.peers[A].handle_frame(pair.now, Lane(0), request(id));
    assert!(matches!(violation(&pair, A), Some(Violation::Unexpected { frame: "Request", .. })));
}

/// `[session.open.capacity]`
#[test]
fn an_excess_of_opens_is_refused_and_the_session_lives_on() {
    let limits = SessionLimits { max_connections: 3, max_pending_opens: 2, ..Default::default() };
    let mut pair = Pair::open(config(LaneMode::One), Config { limits, ..Config::default() }, 1);
    // An honest side knows the limit.
    let ids = [pair.start_open(A, Default::default()), pair.start_open(A, Default::default())];
    let now = pair.now;
    let over = pair.peers[A].session_mut().open(now, "echo", Default::default(), Metadata::new(), None);
    assert_eq!(over, Err(CommandError::AtCapacity { what: "unanswered opens", limit: 2 }));
    pair.run();
    // Another one is refused.
    pair.peers[B].handle_frame(pair.now, Lane(0), open(5));
    pair.write(B);
    assert_eq!(pair.pipes[B].kinds, [18]);
    for id in ids {
        pair.peers[B].session_mut().accept(id, Default::default(), Metadata::new(), None).unwrap();
    }
    pair.peers[B].handle_frame(pair.now, Lane(0), open(7));
    pair.peers[B].session_mut().accept(ConnectionId(7), Default::default(), Metadata::new(), None).unwrap();
    pair.peers[B].handle_frame(pair.now, Lane(0), open(9));
    pair.write(B);
    assert_eq!(pair.pipes[B].kinds, [18, 17, 17, 17, 18], "the fourth is too many");
    assert_eq!(pair.peers[B].session().end(), None);
}

/// `[session.open.pending]`: an abandoned open is unanswered until the peer's answer, so an honest opener never passes
/// the bound on pending ids, however its lanes are delayed.
#[test]
fn abandoned_opens_count_until_their_answer() {
    let limits = SessionLimits { max_pending_opens: 2, ..Default::default() };
    for seed in 0..50 {
        let a = config(LaneMode::PerConnection);
        let mut pair = Pair::open(a, Config { limits, ..config(LaneMode::PerConnection) }, seed);
        let mut opened = 0;
        for _ in 0..200 {
            let now = pair.now;
            let got = pair.peers[A].session_mut().open(now, "echo", Default::default(), Metadata::new(), None);
            if let Ok(id) = got {
                opened += 1;
                pair.close(A, id);
            }
            pair.write(A);
            if pair.rng.chance(50) {
                pair.read(B);
                pair.write(B);
                pair.read(A);
            }
        }
        pair.run();
        pair.assert_alive();
        assert!(opened > 10);
        assert_eq!(pair.counts(), [(0, 0, 0); 2]);
    }
}

/// Lesson 13: what the peer can make us say is bounded. `[session.control.bounded]`
#[test]
fn a_peer_that_makes_us_answer_without_reading_is_not_read() {
    let limits = SessionLimits { max_connections: 10, max_pending_opens: 0, ..Default::default() };
    let mut pair = Pair::open(config(LaneMode::One), Config { limits, ..Config::default() }, 1);
    let mut taken = 0;
    while pair.peers[B].session().wants_frames() {
        pair.peers[B].handle_frame(pair.now, Lane(0), open(1 + 2 * taken));
        taken += 1;
    }
    assert_eq!(taken, 8192 + 10);
    assert!(pair.peers[B].poll_transmit(pair.now).is_some());
    assert!(pair.peers[B].session().wants_frames(), "it goes on once they are written");
}

/// Lesson 11: two busy peers never both stop reading.
#[test]
fn both_sides_close_thousands_of_connections_at_once_through_a_small_pipe() {
    let mut pair = Pair::one_lane();
    let mut ids = [vec![], vec![]];
    for _ in 0..20 {
        for side in [A, B] {
            let opened: Vec<_> = (0..1000).map(|_| pair.start_open(side, Default::default())).collect();
            pair.run();
            for &id in &opened {
                pair.peers[1 - side].session_mut().accept(id, Default::default(), Metadata::new(), None).unwrap();
            }
            ids[side].extend(opened);
            pair.run();
        }
    }
    pair.pipes.iter_mut().for_each(|pipe| pipe.capacity = 1024);
    for side in [A, B] {
        for &id in &ids[side].clone() {
            pair.close(side, id);
        }
    }
    pair.run();
    pair.assert_alive();
    assert_eq!(pair.counts(), [(0, 0, 0); 2]);
}

#[test]
fn a_thousand_fast_opens_leave_no_deadlines_behind() {
    let mut pair = Pair::one_lane();
    for _ in 0..1000 {
        let id = pair.connect(A);
        pair.close(A, id);
        pair.run();
    }
    assert_eq!(pair.counts(), [(0, 0, 0); 2]);
    pair.advance(Duration::from_secs(60));
    assert!(pair.take(A).iter().all(|event| matches!(event, Event::Pong { .. } | Event::ConnectionClosed { .. })));
    pair.assert_alive();
}

#[test]
fn limits_that_contradict_themselves_are_refused_here_and_a_violation_there() {
    let mut pair = Pair::one_lane();
    let limits = ConnectionLimits { max_body: 10, window: 9, ..Default::default() };
    let now = pair.now;
    let refused = pair.peers[A].session_mut().open(now, "echo", limits, Metadata::new(), None);
    assert!(matches!(refused, Err(CommandError::Limits(_))));
    let (connection, parity) = (ConnectionId(1), Parity::Odd);
    let frame = framed(&Open { connection, service: "x".into(), parity, limits, metadata: Metadata::new() }, b"");
    pair.peers[B].handle_frame(now, Lane(0), frame);
    assert!(matches!(violation(&pair, B), Some(Violation::Limits(_))));
}

#[test]
fn a_service_name_and_metadata_hold_at_the_limit_and_are_refused_one_over() {
    let mut pair = Pair::one_lane();
    let now = pair.now;
    let mut try_open = |name: usize, value: usize| {
        let metadata = Metadata::new().with("k", vec![0; value]);
        let session = pair.peers[A].session_mut();
        let got = session.open(now, &"s".repeat(name), ConnectionLimits::default(), metadata, None);
        pair.run();
        pair.assert_alive();
        got.is_ok()
    };
    assert!(try_open(256, 16 * 1024 - 1));
    assert!(!try_open(257, 0));
    assert!(!try_open(1, 16 * 1024));
}

/// `[session.frame.max]`
#[test]
fn the_largest_credential_fits_the_peers_largest_frame_and_a_larger_one_is_refused_before_it_is_sent() {
    let limits = SessionLimits { max_frame: 40_000, ..Default::default() };
    for (bytes, fits) in [(40_000 - 32 * 1024, true), (40_001 - 32 * 1024, false)] {
        let mut pair = Pair::open(config(LaneMode::One), Config { limits, ..Config::default() }, 1);
        let now = pair.now;
        let money = PayerMoney { prices: Arc::default(), received: Amount::ZERO, mark: Amount::MAX, hold: Amount::MAX };
        let paid = Some((Bytes::from(vec![0; bytes]), money));
        // With the longest name and full metadata.
        let metadata = Metadata::new().with("k", vec![0; 16 * 1024 - 1]);
        let limits = ConnectionLimits { max_item: 1, max_body: 1, ..Default::default() };
        let opened = pair.peers[A].session_mut().open(now, &"s".repeat(256), limits, metadata, paid);
        assert_eq!(opened.is_ok(), fits, "{opened:?}");
        pair.run();
        pair.assert_alive();
        assert_eq!(pair.counts()[B].0, usize::from(fits));
    }
}

/// No stream is there.
struct NoStreams;

impl StreamSource for NoStreams {
    fn take(&mut self, _: StreamKey, _: usize, _: &dyn Fn(u64, u64) -> bool) -> Taken {
        Taken::Empty
    }
}

/// `[conduit.quic.end]`
#[test]
fn a_lane_has_ended_when_its_last_frame_was_given_out_and_never_on_a_conduit_with_one() {
    for lanes in [LaneMode::One, LaneMode::PerConnection] {
        let mut pair = Pair::open(config(lanes), config(lanes), 1);
        let closed = pair.connect(A);
        let refused = pair.start_open(A, ConnectionLimits::default());
        pair.run();
        let mut machines = pair.peers.map(|peer| (peer, Vec::new()));
        machines[A].0.session_mut().close(closed, Reason::none());
        _ = machines[B].0.session_mut().reject(refused, Reason::none(), Metadata::new(), Default::default());
        let mut none = NoStreams;
        for _ in 0..3 {
            for side in [A, B] {
                let (peer, ended) = &mut machines[side];
                let mut written = Vec::new();
                while let Some(frame) = peer.session_mut().poll_transmit(Time::ZERO, &mut none) {
                    let mut bytes = frame.head.to_vec();
                    bytes.extend_from_slice(&frame.payload);
                    written.push((frame.lane, Bytes::from(bytes)));
                }
                ended.extend(std::iter::from_fn(|| peer.session_mut().poll_ended_lane()));
                written
                    .into_iter()
                    .for_each(|(lane, frame)| machines[1 - side].0.handle_frame(Time::ZERO, lane, frame));
            }
        }
        let mut both = [A, B].map(|side| machines[side].1.clone());
        both.iter_mut().for_each(|ended| ended.sort_unstable());
        let expected = if lanes == LaneMode::One { vec![] } else { vec![Lane(closed.0), Lane(refused.0)] };
        assert_eq!(both, [expected.clone(), expected]);
    }
}

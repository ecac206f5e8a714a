//! Draining a connection: open calls run to their end, no other begins, and every caller knows what became of its call.

use std::time::Duration;

use bytes::Bytes;
use tollway_protocol::error::{ConnectionEnd, Reason, SessionEnd, Violation, code};
use tollway_protocol::frame::Lane;
use tollway_protocol::id::{CallId, ConnectionId};
use tollway_protocol::limits::ConnectionLimits;
use tollway_protocol::message::{Drained, Draining, Flow, Request, Status};
use tollway_protocol::metadata::Metadata;
use tollway_protocol::payment::Amount;
use tollway_protocol::session::{CallSpec, CommandError, Event, LaneMode, PayeeMoney, PayerMoney};

use crate::pair::{A, B, Pair, config, framed};

fn why() -> Reason {
    Reason::new(code::GOING_AWAY, "restart")
}

fn drain(pair: &mut Pair, side: usize, id: ConnectionId, grace: Option<Duration>) {
    let now = pair.now;
    pair.peers[side].session_mut().drain(now, id, why(), grace).unwrap();
}

fn refused(pair: &mut Pair, connection: ConnectionId) -> CommandError {
    let (metadata, payload) = (Metadata::new(), Bytes::new());
    let spec = CallSpec { connection, method: 1, deadline: None, metadata, payload, slots: &[] };
    pair.peers[A].start_call(spec).unwrap_err()
}

fn both_modes(test: impl Fn(Pair)) {
    for lanes in [LaneMode::One, LaneMode::PerConnection] {
        test(Pair::open(config(lanes), config(lanes), 5));
    }
}

/// The draining side closes behind all that it said, and the other side learns the reason. `[session.drain.close]`
#[test]
fn open_calls_run_to_their_end_and_then_the_connection_closes() {
    both_modes(|mut pair| {
        let id = pair.connect(A);
        pair.call(A, id, 1, b"plain");
        let (streaming, streams) = pair.call_with(A, id, 2, b"", &[Flow::ToPeer]);
        pair.run();
        let served = pair.requests(B);
        drain(&mut pair, B, id, None);
        drain(&mut pair, B, id, Some(Duration::ZERO));
        pair.run();
        assert!(matches!(&pair.take(A)[..], [Event::ConnectionDraining { connection, reason, deadline: None }]
            if *connection == id && *reason == why()));
        assert_eq!(refused(&mut pair, id), CommandError::Draining);
        pair.answer(B, served[0].call, Status::Ok, b"done");
        pair.answer(B, served[1].call, Status::Ok, b"");
        pair.run();
        assert!(pair.take(B).is_empty(), "a stream is still open");
        pair.peers[A].push(streams[0], b"last").unwrap();
        pair.peers[A].finish(streams[0]);
        pair.run();
        let reading = served[1].slots[0].stream;
        assert_eq!(pair.read_all(B, reading).0, ["last"], "what was accepted is there");
        let ends = pair.take(A);
        assert!(
            matches!(&ends[..], [
            Event::CallAnswered(first), Event::CallEnded { .. }, Event::CallAnswered(_), Event::CallEnded { call, .. },
            Event::ConnectionClosed { end: ConnectionEnd::ClosedByPeer(reason), .. }]
            if first.payload == "done" && *call == streaming && *reason == why()),
            "{ends:?}"
        );
        assert!(matches!(pair.take(B).last(),
            Some(Event::ConnectionClosed { end: ConnectionEnd::ClosedByUs(reason), .. }) if *reason == why()));
        assert_eq!(pair.counts(), [(0, 0, 0); 2]);
        pair.assert_alive();
    });
}

#[test]
fn a_connection_without_calls_closes_as_soon_as_the_peer_has_answered() {
    both_modes(|mut pair| {
        let id = pair.connect(A);
        drain(&mut pair, B, id, None);
        pair.write(B);
        assert_eq!(pair.counts()[B].0, 1, "a call may be on its way");
        pair.run();
        assert_eq!(pair.counts(), [(0, 0, 0); 2]);
        pair.assert_alive();
    });
}

/// The story: the last open call is answered while another one is on its way. Closing now would leave its caller in doubt.
/// `[session.drain.close]`
#[test]
fn the_close_waits_for_the_word_that_no_call_is_on_its_way() {
    both_modes(|mut pair| {
        let id = pair.connect(A);
        pair.call(A, id, 1, b"first");
        pair.run();
        let served = pair.requests(B)[0].call;
        drain(&mut pair, B, id, None);
        pair.call(A, id, 1, b"on its way");
        pair.write(A);
        pair.pipes[A].stalled = true;
        pair.answer(B, served, Status::Ok, b"");
        pair.run();
        assert_eq!(pair.counts()[B], (1, 0, 0), "open, although no call is");
        pair.pipes[A].stalled = false;
        pair.run();
        let statuses: Vec<_> = pair.responses(A).iter().map(|answer| answer.status).collect();
        assert_eq!(statuses, [Status::Ok, Status::Refused]);
        assert_eq!(pair.counts(), [(0, 0, 0); 2]);
        pair.assert_alive();
    });
}

/// `[session.drain.refused]`
#[test]
fn a_call_that_crosses_the_draining_is_refused_unexecuted() {
    both_modes(|mut pair| {
        let id = pair.connect(A);
        let (_, streams) = pair.call_with(A, id, 1, b"body", &[Flow::ToPeer, Flow::FromPeer]);
        pair.peers[A].push(streams[0], b"item").unwrap();
        pair.write(A);
        drain(&mut pair, B, id, None);
        pair.run();
        assert!(pair.requests(B).is_empty(), "no handler starts");
        let answers = pair.responses(A);
        assert_eq!(answers[0].status, Status::Refused);
        assert_eq!(answers[0].metadata.value("code"), Some(&b"9"[..]), "GOING_AWAY");
        assert_eq!(answers[0].metadata.value("text"), Some(&b"restart"[..]));
        // Its caller ends the stream that it sends.
        pair.peers[A].finish(streams[0]);
        pair.run();
        assert_eq!(pair.counts(), [(0, 0, 0); 2]);
        pair.assert_alive();
        assert_eq!(pair.peers[B].session().granted_bytes(), 0);
    });
}

#[test]
fn a_call_that_waits_for_its_turn_is_given_back_unsent_with_its_streams() {
    let mut pair = Pair::one_lane();
    let limits = ConnectionLimits { max_calls: 1, ..Default::default() };
    let id = pair.connect_with(A, limits, limits);
    pair.call(A, id, 1, b"");
    let (waiting, _) = pair.call_with(A, id, 1, b"", &[Flow::FromPeer, Flow::ToPeer]);
    pair.run();
    let served = pair.requests(B);
    assert_eq!(served.len(), 1);
    drain(&mut pair, B, id, None);
    pair.run();
    let events = pair.take(A);
    assert!(
        matches!(&events[..], [Event::ConnectionDraining { .. }, Event::StreamFailed { .. },
        Event::StreamFailed { .. }, Event::CallUnsent { call }] if *call == waiting),
        "{events:?}"
    );
    assert_eq!(pair.counts(), [(1, 1, 0), (1, 1, 0)]);
    pair.answer(B, served[0].call, Status::Ok, b"");
    pair.run();
    assert_eq!(pair.counts(), [(0, 0, 0); 2]);
    assert_eq!(pair.peers[A].stream_ends(), (0, 0));
}

/// `[session.drain.close]`
#[test]
fn at_the_deadline_the_connection_is_closed_whatever_is_open() {
    let mut pair = Pair::one_lane();
    let id = pair.connect(A);
    pair.call(A, id, 1, b"");
    pair.run();
    pair.requests(B);
    drain(&mut pair, B, id, Some(Duration::from_secs(2)));
    pair.run();
    let two = Some(Duration::from_secs(2));
    assert!(matches!(&pair.take(A)[..], [Event::ConnectionDraining { deadline, .. }] if *deadline == two));
    pair.advance(Duration::from_nanos(1_999_999_999));
    assert_eq!(pair.counts()[B].0, 1);
    pair.advance(Duration::from_nanos(1));
    assert!(matches!(&pair.take(A)[..], [Event::CallFailed { .. },
        Event::ConnectionClosed { end: ConnectionEnd::ClosedByPeer(reason), .. }] if reason.code == code::DEADLINE));
    assert_eq!(pair.counts(), [(0, 0, 0); 2]);
}

#[test]
fn both_sides_may_drain_at_once() {
    both_modes(|mut pair| {
        let id = pair.connect(A);
        pair.call(A, id, 1, b"");
        pair.call(B, id, 1, b"");
        pair.run();
        let served = [A, B].map(|side| pair.requests(side)[0].call);
        [A, B].into_iter().for_each(|side| drain(&mut pair, side, id, None));
        pair.run();
        assert_eq!(pair.counts(), [(1, 2, 0); 2]);
        [A, B].into_iter().for_each(|side| pair.answer(side, served[side], Status::Ok, b""));
        pair.run();
        assert_eq!(pair.counts(), [(0, 0, 0); 2]);
        pair.assert_alive();
    });
}

#[test]
fn whoever_drains_may_still_call_and_waits_for_its_own_calls_too() {
    let mut pair = Pair::one_lane();
    let id = pair.connect(A);
    pair.call(A, id, 1, b"");
    pair.run();
    let open = pair.requests(B)[0].call;
    drain(&mut pair, B, id, None);
    pair.run();
    let back = pair.call(B, id, 2, b"");
    pair.run();
    let served = pair.requests(A)[0].call;
    pair.answer(B, open, Status::Ok, b"");
    pair.run();
    assert_eq!(pair.counts()[B], (1, 1, 0));
    pair.answer(A, served, Status::Ok, b"");
    pair.run();
    assert!(matches!(&pair.take(B)[..], [Event::CallAnswered(got), Event::CallEnded { .. },
        Event::ConnectionClosed { .. }] if got.call == back));
    assert_eq!(pair.counts(), [(0, 0, 0); 2]);
}

/// Its payer has the channel closed first.
#[test]
fn a_paid_connection_is_left_to_its_payer_until_the_deadline() {
    let mut pair = Pair::one_lane();
    let payer = PayerMoney { prices: Default::default(), received: Amount::ZERO, mark: Amount::MAX, hold: Amount::MAX };
    let (spent, leased, low) = (Amount::ZERO, Amount::ZERO, Amount::ZERO);
    let payee = PayeeMoney { prices: Default::default(), spent, leased, low };
    for by_deadline in [false, true] {
        let id = pair.connect_paid(payer.clone(), payee.clone());
        drain(&mut pair, B, id, Some(Duration::from_secs(5)));
        pair.run();
        assert_eq!(refused(&mut pair, id), CommandError::Draining);
        pair.peers[A].session_mut().send_payment(id, Bytes::from_static(b"close")).unwrap();
        pair.run();
        assert!(matches!(&pair.take(B)[..], [Event::Payment { .. }]), "the channel can still be closed");
        match by_deadline {
            true => pair.advance(Duration::from_secs(5)),
            false => pair.close(A, id),
        }
        pair.run();
        assert_eq!(pair.counts(), [(0, 0, 0); 2]);
        pair.take(B);
    }
}

#[test]
fn only_an_open_connection_can_be_drained() {
    let mut pair = Pair::one_lane();
    let id = pair.start_open(A, Default::default());
    let now = pair.now;
    for id in [id, ConnectionId(8), ConnectionId::ROOT] {
        let refused = pair.peers[A].session_mut().drain(now, id, why(), None);
        assert_eq!(refused, Err(CommandError::NoConnection(id)));
    }
}

#[test]
fn a_session_that_drains_drains_what_is_open_and_what_opens_yet() {
    both_modes(|mut pair| {
        let open = pair.connect(A);
        pair.call(A, open, 1, b"");
        let theirs = pair.start_open(A, Default::default());
        let ours = pair.start_open(B, Default::default());
        pair.run();
        let served = pair.requests(B)[0].call;
        pair.peers[B].session_mut().drain_all(why());
        pair.peers[B].session_mut().accept(theirs, Default::default(), Metadata::new(), None).unwrap();
        pair.run();
        pair.peers[A].session_mut().accept(ours, Default::default(), Metadata::new(), None).unwrap();
        pair.run();
        let closed = pair.take(A).into_iter().filter(|event| matches!(event, Event::ConnectionClosed { .. })).count();
        assert_eq!((closed, pair.counts()[B].0), (2, 1), "one has a call");
        assert_eq!(refused(&mut pair, open), CommandError::Draining);
        pair.answer(B, served, Status::Ok, b"");
        pair.run();
        assert_eq!(pair.counts(), [(0, 0, 0); 2]);
        pair.assert_alive();
    });
}

/// Deadlines of connections that have ended before do not pile up.
#[test]
fn connections_drained_in_turn_leave_nothing() {
    let mut pair = Pair::one_lane();
    for _ in 0..2_000 {
        let id = pair.connect(A);
        drain(&mut pair, B, id, Some(Duration::from_secs(3600)));
        pair.run();
        pair.take(A);
        pair.take(B);
    }
    assert_eq!(pair.counts(), [(0, 0, 0); 2]);
    let left = pair.peers[B].session().deadline_count();
    assert!(left < 100, "{left}");
}

fn draining(connection: ConnectionId) -> Bytes {
    framed(&Draining { connection, deadline_us: None, reason: why().into() }, b"")
}

/// What a peer must not do. `[session.drain.once]` `[session.drain.answer]` `[session.drain.calls]`
#[test]
fn whoever_breaks_the_rules_of_draining_violates_the_protocol() {
    let drained = |connection| framed(&Drained { connection }, b"");
    let request = |connection, call| {
        let (call, metadata) = (CallId(call), Metadata::new());
        framed(&Request { connection, call, method: 1, deadline_us: None, metadata, slots: vec![] }, b"")
    };
    type Case<'a> = (&'a str, bool, &'a dyn Fn(ConnectionId) -> Vec<Bytes>, u32);
    let cases: [Case<'_>; 8] = [
        ("Draining twice", false, &|id| vec![draining(id), draining(id)], code::STATE),
        ("Drained out of nothing", false, &|id| vec![drained(id)], code::STATE),
        ("Drained twice", true, &|id| vec![request(id, 1), drained(id), drained(id)], code::STATE),
        ("a call behind Drained", true, &|id| vec![request(id, 1), drained(id), request(id, 3)], code::STATE),
        ("Draining of nothing", false, &|_| vec![draining(ConnectionId(9))], code::ID),
        ("Drained of nothing", false, &|_| vec![drained(ConnectionId(9))], code::ID),
        ("Draining of the session", false, &|_| vec![draining(ConnectionId::ROOT)], code::ID),
        ("Drained of the session", false, &|_| vec![drained(ConnectionId::ROOT)], code::ID),
    ];
    for (what, drains, frames, expected) in cases {
        let mut pair = Pair::one_lane();
        let id = pair.connect(A);
        if drains {
            pair.call(A, id, 1, b"");
            pair.run();
            drain(&mut pair, B, id, None);
        }
        let frames = frames(id);
        // The first request of the drained cases went in already.
        for frame in frames.into_iter().skip(usize::from(drains)) {
            assert_eq!(pair.peers[B].session().end(), None, "{what}");
            pair.peers[B].handle_frame(pair.now, Lane(0), frame);
        }
        match pair.peers[B].session().end() {
            Some(SessionEnd::PeerViolation(violation)) => assert_eq!(violation.code(), expected, "{what}"),
            end => panic!("{what}: {end:?}"),
        }
    }
    // Before the open is answered.
    let mut pair = Pair::one_lane();
    let id = pair.start_open(A, Default::default());
    pair.run();
    pair.peers[B].handle_frame(pair.now, Lane(0), draining(id));
    assert!(matches!(pair.peers[B].session().end(), Some(SessionEnd::PeerViolation(Violation::Unexpected { .. }))));
}

/// Race: it crossed the Close.
#[test]
fn a_draining_that_crosses_a_close_is_dropped() {
    let mut pair = Pair::one_lane();
    let id = pair.connect(A);
    pair.close(A, id);
    drain(&mut pair, B, id, None);
    pair.run();
    assert_eq!(pair.counts(), [(0, 0, 0); 2]);
    pair.assert_alive();
}

//! Frames that no honest peer sends: nothing panics, and what is malformed ends the session with a violation.

use bytes::Bytes;
use proptest::prelude::*;
use tollway_protocol::error::{Reason, SessionEnd, Violation};
use tollway_protocol::frame::Lane;
use tollway_protocol::id::{CallId, ConnectionId, Parity, StreamId};
use tollway_protocol::limits::{ConnectionLimits, SessionLimits};
use tollway_protocol::message::*;
use tollway_protocol::metadata::Metadata;
use tollway_protocol::payment::Amount;
use tollway_protocol::peer::Peer;
use tollway_protocol::session::{Config, LaneMode};
use tollway_protocol::time::Time;

use crate::pair::{A, B, Pair, config, framed};

/// One frame of every kind. Numbers are large, so that each varint has several bytes.
pub(crate) fn one_of_each() -> Vec<Bytes> {
    let (connection, call, stream) = (ConnectionId(1001), CallId(2001), StreamId(3001));
    let reason = || WireReason::from(Reason::new(1024, "why"));
    let metadata = || Metadata::new().with("k", "v");
    let slots = || vec![Slot { stream, flow: Flow::ToPeer }];
    let (limits, session) = (ConnectionLimits::default(), SessionLimits::default());
    let charged = Amount::new(1 << 100);
    vec![
        framed(
            &Hello { min_version: 1, max_version: 300, parity: Parity::Odd, limits: session, metadata: metadata() },
            b"",
        ),
        framed(&HelloAck { version: 300, limits: session, metadata: metadata() }, b""),
        framed(&Refuse { reason: reason() }, b""),
        framed(&ProtocolError { reason: reason() }, b""),
        framed(&GoAway { last: connection, reason: reason() }, b""),
        framed(&Ping { nonce: 1 << 40 }, b""),
        framed(&Pong { nonce: 1 << 40 }, b""),
        framed(&Challenge { method: "a method".into() }, b""),
        framed(&Proof { method: "a method".into() }, b""),
        framed(&Open { connection, service: "echo".into(), parity: Parity::Odd, limits, metadata: metadata() }, b""),
        framed(&Accept { connection, limits, metadata: metadata() }, b""),
        framed(&Reject { connection, reason: reason(), metadata: metadata() }, b""),
        framed(&Close { connection, reason: reason(), metadata: metadata() }, b""),
        framed(&Draining { connection, deadline_us: Some(1 << 20), reason: reason() }, b""),
        framed(&Drained { connection }, b""),
        framed(
            &Request { connection, call, method: 7, deadline_us: Some(1 << 30), metadata: metadata(), slots: slots() },
            b"",
        ),
        framed(&Response { connection, call, status: Status::Ok, charged, metadata: metadata(), slots: slots() }, b""),
        framed(&Cancel { connection, call }, b""),
        framed(&Done { connection, call, charged }, b""),
        framed(&Items { connection, stream, slots: slots() }, b""),
        framed(&End { connection, stream }, b""),
        framed(&Reset { connection, stream, code: 1024 }, b""),
        framed(&Stop { connection, stream, code: 1024 }, b""),
        framed(&Credit { connection, stream, limit: 1 << 40, consumed: 300 }, b""),
        framed(&Window { connection, limit: 1 << 40 }, b""),
        framed(&Payment { connection }, b""),
    ]
}

/// A machine in each phase, fresh.
fn phases(lanes: LaneMode) -> Vec<Peer> {
    let config = || config(lanes);
    let mut peers = vec![Peer::initiator(config(), Time::ZERO), Peer::responder(config(), Time::ZERO)];
    for step in 0..7 {
        let mut pair = Pair::open(config(), config(), 3);
        match step {
            0 => {}
            1 => _ = pair.start_open(A, ConnectionLimits::default()),
            2 => {
                pair.start_open(B, ConnectionLimits::default());
                pair.run();
            }
            3..=6 => {
                let id = pair.connect(if step % 2 == 0 { A } else { B });
                let (call, keys) = pair.call_with(A, id, 1, b"x", &[Flow::ToPeer, Flow::FromPeer]);
                pair.call_with(B, id, 1, b"x", &[Flow::ToPeer, Flow::FromPeer]);
                pair.peers[A].push(keys[0], b"item").unwrap();
                pair.run();
                match step {
                    5 => pair.peers[A].cancel_call(call),
                    6 => pair.close(A, id),
                    _ => {}
                }
            }
            _ => unreachable!(),
        }
        let [a, b] = pair.peers;
        peers.push(a);
        if step != 6 {
            peers.push(b);
        }
    }
    peers
}

/// `[session.frame.header]`
#[test]
fn every_truncation_of_every_frame_is_a_violation() {
    for whole in one_of_each() {
        for length in 0..whole.len() {
            let mut pair = Pair::one_lane();
            pair.peers[B].handle_frame(Time::ZERO, Lane(0), whole.slice(..length));
            let end = pair.peers[B].session().end();
            let expected = match length {
                0 => Violation::EmptyFrame,
                _ => Violation::MalformedHeader { kind: whole[0] },
            };
            assert_eq!(end, Some(&SessionEnd::PeerViolation(expected)), "kind {} cut to {length}", whole[0]);
        }
    }
}

/// `[session.frame.payload]`
#[test]
fn a_payload_behind_a_header_that_takes_none_is_a_violation() {
    for whole in one_of_each() {
        let mut frame = whole.to_vec();
        frame.push(0);
        let mut pair = Pair::one_lane();
        pair.peers[B].handle_frame(Time::ZERO, Lane(0), frame.into());
        let end = pair.peers[B].session().end();
        let refused = matches!(end, Some(SessionEnd::PeerViolation(Violation::UnexpectedPayload { bytes: 1, .. })));
        assert_eq!(refused, ![7, 8, 16, 17, 18, 32, 33, 48, 64].contains(&whole[0]), "kind {}: {end:?}", whole[0]);
    }
}

/// Lesson 7: `[session.frame.extension]`
#[test]
fn unknown_kinds_from_128_up_are_skipped_and_lower_ones_are_violations() {
    let known: Vec<u8> = one_of_each().iter().map(|frame| frame[0]).collect();
    for kind in 0..=255u8 {
        if known.contains(&kind) {
            continue;
        }
        let mut pair = Pair::one_lane();
        pair.peers[B].handle_frame(Time::ZERO, Lane(0), Bytes::copy_from_slice(&[kind, 1, 2, 3]));
        let expected = SessionEnd::PeerViolation(Violation::UnknownKind { kind });
        assert_eq!(pair.peers[B].session().end(), (kind < 128).then_some(&expected));
    }
}

/// Lesson 13. `[session.frame.max]`
#[test]
fn a_frame_holds_at_the_largest_size_and_is_refused_one_over() {
    for (over, refused) in [(0, false), (1, true)] {
        let limits = SessionLimits { max_frame: 40_000, ..Default::default() };
        let mut pair = Pair::open(Config::default(), Config { limits, ..Config::default() }, 1);
        pair.peers[B].handle_frame(Time::ZERO, Lane(0), vec![200; 40_000 + over].into());
        assert_eq!(pair.peers[B].session().end().is_some(), refused);
    }
}

#[test]
fn no_frame_of_any_kind_makes_any_phase_panic_and_each_end_is_said_once() {
    for lanes in [LaneMode::One, LaneMode::PerConnection] {
        for frame in one_of_each() {
            for mut peer in phases(lanes) {
                for lane in [0, 1001] {
                    peer.handle_frame(Time::ZERO, Lane(lane), frame.clone());
                }
                drain(&mut peer);
            }
        }
    }
}

/// Takes everything out; checks that ProtocolError is the last frame.
fn drain(peer: &mut Peer) {
    while peer.poll_event().is_some() {}
    let mut frames = Vec::new();
    while let Some(frame) = peer.poll_transmit(Time::ZERO) {
        frames.push(frame.head[0]);
    }
    if matches!(peer.session().end(), Some(SessionEnd::PeerViolation(_))) {
        assert_eq!(frames, [3], "[session.violation.once]");
    }
}

/// Small ids, so that frames often hit something that is there.
fn small_frame() -> impl Strategy<Value = (u64, Bytes)> {
    let kind = prop::sample::select(vec![4u8, 5, 6, 16, 17, 18, 19, 32, 33, 34, 35, 48, 49, 50, 51, 52, 53, 64]);
    (0u64..4, kind, prop::collection::vec(0u8..5, 0..24)).prop_map(|(lane, kind, rest)| {
        let mut frame = vec![kind];
        frame.extend(rest);
        (lane, frame.into())
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn no_bytes_make_any_phase_panic(frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..80), 1..4)) {
        for lanes in [LaneMode::One, LaneMode::PerConnection] {
            for mut peer in phases(lanes) {
                for frame in &frames {
                    peer.handle_frame(Time::ZERO, Lane(0), frame.clone().into());
                }
                drain(&mut peer);
            }
        }
    }

    #[test]
    fn no_frames_with_plausible_ids_make_any_phase_panic(frames in prop::collection::vec(small_frame(), 1..12)) {
        for lanes in [LaneMode::One, LaneMode::PerConnection] {
            for mut peer in phases(lanes) {
                for (lane, frame) in &frames {
                    let lane = if lanes == LaneMode::One { 0 } else { *lane };
                    peer.handle_frame(Time::ZERO, Lane(lane), frame.clone());
                }
                drain(&mut peer);
                peer.handle_timeout(Time::from_nanos(u64::MAX));
                while peer.poll_event().is_some() || peer.poll_transmit(Time::ZERO).is_some() {}
            }
        }
    }
}

/// `[session.control.bounded]`
#[test]
fn stops_that_a_peer_makes_needless_do_not_pile_up_unread() {
    let mut pair = Pair::one_lane();
    let connection = pair.connect(A);
    let mut from_a = |header_and_payload: Bytes| pair.peers[B].handle_frame(Time::ZERO, Lane(0), header_and_payload);
    let slot = |number: u64| Slot { stream: StreamId(number), flow: Flow::ToPeer };
    let (call, metadata, slots) = (CallId(1), Metadata::new(), vec![slot(1)]);
    from_a(framed(&Request { connection, call, method: 1, deadline_us: None, metadata, slots }, b""));
    let stream = pair.requests(B)[0].slots[0].stream;
    pair.peers[B].stop(stream, 7);
    // The stream is stopped, so all that its items announce is; and B writes nothing.
    let mut from_a = |header_and_payload: Bytes| pair.peers[B].handle_frame(Time::ZERO, Lane(0), header_and_payload);
    for first in (3..60_000).step_by(200) {
        let numbers = (first..first + 200).step_by(2);
        let slots = numbers.clone().map(slot).collect();
        from_a(framed(&Items { connection, stream: StreamId(1), slots }, &[0]));
        numbers.for_each(|number| from_a(framed(&End { connection, stream: StreamId(number) }, b"")));
    }
    assert_eq!(pair.peers[B].session().end(), None);
    let written = std::iter::from_fn(|| pair.peers[B].poll_transmit(Time::ZERO));
    let stops = written.filter(|frame| frame.head[0] == Stop::KIND).count();
    assert_eq!(stops, 1, "only one of the streams has not ended");
}

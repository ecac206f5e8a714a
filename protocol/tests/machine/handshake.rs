//! Handshake, keepalive, and the ends of a session.

use std::time::Duration;

use tollway_protocol::error::{Reason, SessionEnd, Violation, code};
use tollway_protocol::frame::Lane;
use tollway_protocol::id::{ConnectionId, Parity};
use tollway_protocol::limits::{AbuseLimits, Rate, SessionLimits};
use tollway_protocol::message::{Challenge, Hello, HelloAck, Ping, Pong, Proof, Refuse};
use tollway_protocol::metadata::Metadata;
use tollway_protocol::session::{Config, Event, LaneMode, Machine};
use tollway_protocol::time::Time;

use crate::pair::{A, B, Pair, config, framed};

fn hello(min_version: u16, max_version: u16) -> Hello {
    Hello { min_version, max_version, parity: Parity::Odd, limits: SessionLimits::default(), metadata: Metadata::new() }
}

#[test]
fn a_session_opens_with_complementary_parities_and_the_others_facts() {
    let a = Config { metadata: Metadata::new().with("who", "a"), parity: Parity::Even, ..Config::default() };
    let mut pair = Pair::unopened(a, Config::default(), 1);
    pair.run();
    let events = pair.take(B);
    assert!(matches!(&events[..], [Event::SessionRequested { metadata }] if metadata.value("who") == Some(b"a")));
    pair.peers[B].session_mut().accept_session(Metadata::new().with("who", "b"));
    pair.run();
    let parities = [A, B].map(|side| match &pair.take(side)[..] {
        [Event::SessionOpened { parity, .. }, ..] => *parity,
        events => panic!("{events:?}"),
    });
    assert_eq!(parities, [Parity::Even, Parity::Odd]);
    assert!(pair.peers[A].session().rtt().is_some(), "the first ping measured the round trip");
}

/// `[session.version.range]`
#[test]
fn a_version_mismatch_is_refused_with_a_text_that_names_both_ranges() {
    let mut machine = Machine::responder(Config::default(), Time::ZERO);
    machine.handle_frame(Time::ZERO, Lane(0), framed(&hello(7, 9), b""));
    let Some(SessionEnd::RefusedByUs(reason)) = machine.end() else { panic!("{:?}", machine.end()) };
    assert_eq!(reason.code, code::VERSION);
    assert!(reason.text.contains("7 to 9") && reason.text.contains("1 to 1"), "{}", reason.text);
}

#[test]
fn a_refusal_reaches_the_initiator_with_its_reason() {
    let mut pair = Pair::unopened(Config::default(), Config::default(), 1);
    pair.run();
    let reason = Reason::new(code::APPLICATION, "not you");
    pair.peers[B].session_mut().refuse_session(reason.clone());
    pair.run();
    assert_eq!(pair.peers[A].session().end(), Some(&SessionEnd::RefusedByPeer(reason)));
}

/// `[session.handshake.first]`
#[test]
fn greetings_that_come_to_the_wrong_side_or_too_late_are_violations() {
    let limits = SessionLimits::default();
    let reason = || Reason::new(code::FORBIDDEN, "no").into();
    let frames = [
        (framed(&hello(1, 1), b""), A),
        (framed(&HelloAck { version: 1, limits, metadata: Metadata::new() }, b""), B),
        (framed(&Refuse { reason: reason() }, b""), B),
    ];
    for (frame, wrong) in frames {
        let mut greeting = Pair::unopened(Config::default(), Config::default(), 1);
        greeting.peers[wrong].handle_frame(Time::ZERO, Lane(0), frame.clone());
        let end = greeting.peers[wrong].session().end();
        assert!(matches!(end, Some(SessionEnd::PeerViolation(Violation::Unexpected { .. }))), "{end:?}");
        for side in [A, B] {
            let mut open = Pair::one_lane();
            open.peers[side].handle_frame(Time::ZERO, Lane(0), frame.clone());
            let end = open.peers[side].session().end();
            assert!(matches!(end, Some(SessionEnd::PeerViolation(Violation::Unexpected { .. }))), "{end:?}");
        }
    }
}

/// Found by fuzzing: an authenticator that takes long accepted what had ended meanwhile, and the session was open again.
#[test]
fn a_session_that_has_ended_while_its_hello_waited_is_not_brought_back_by_a_late_answer() {
    for accepts in [true, false] {
        let mut pair = Pair::unopened(Config::default(), Config::default(), 1);
        pair.run();
        let session = pair.peers[B].session_mut();
        session.handle_conduit_lost("reset");
        match accepts {
            true => session.accept_session(Metadata::new()),
            false => session.refuse_session(Reason::new(code::APPLICATION, "not you")),
        }
        assert_eq!(session.end(), Some(&SessionEnd::ConduitLost("reset".into())));
        let events = pair.take(B);
        assert!(matches!(events.last(), Some(Event::SessionEnded(_))), "nothing comes behind the end: {events:?}");
        assert!(pair.peers[B].poll_transmit(Time::ZERO).is_none());
    }
}

/// `[session.handshake.first]`
#[test]
fn a_second_hello_and_a_frame_before_hello_are_violations() {
    let mut machine = Machine::responder(Config::default(), Time::ZERO);
    machine.handle_frame(Time::ZERO, Lane(0), framed(&hello(1, 1), b""));
    assert_eq!(machine.end(), None);
    machine.handle_frame(Time::ZERO, Lane(0), framed(&hello(1, 1), b""));
    assert!(matches!(machine.end(), Some(SessionEnd::PeerViolation(Violation::Unexpected { frame: "Hello", .. }))));

    let mut machine = Machine::responder(Config::default(), Time::ZERO);
    machine.handle_frame(Time::ZERO, Lane(0), framed(&Ping { nonce: 1 }, b""));
    assert!(matches!(machine.end(), Some(SessionEnd::PeerViolation(Violation::Unexpected { .. }))));

    let mut pair = Pair::one_lane();
    let ack = HelloAck { version: 1, limits: SessionLimits::default(), metadata: Metadata::new() };
    pair.peers[A].handle_frame(Time::ZERO, Lane(0), framed(&ack, b""));
    assert!(matches!(pair.peers[A].session().end(), Some(SessionEnd::PeerViolation(_))));
}

/// Lesson 17: no handshake timeout. `[session.handshake.deadline]`, `[session.end.told]`
#[test]
fn a_handshake_that_does_not_end_in_time_ends_both_sides() {
    let a = Config { handshake_timeout: Duration::from_secs(20), ..Config::default() };
    let mut pair = Pair::unopened(a, Config::default(), 1);
    assert_eq!(pair.peers[B].poll_timeout(), Some(Time::ZERO.after(Duration::from_secs(10))), "the exact deadline");
    pair.run();
    pair.advance(Duration::from_millis(9_999));
    assert_eq!(pair.peers[B].session().end(), None);
    pair.advance(Duration::from_millis(1));
    assert_eq!(pair.peers[B].session().end(), Some(&SessionEnd::HandshakeTimeout));
    let end = pair.peers[A].session().end();
    assert!(matches!(end, Some(SessionEnd::ClosedByPeer(reason)) if reason.code == code::TIMEOUT), "{end:?}");
}

/// Lesson 16: exact deadlines, and nothing wakes in between. `[session.keepalive.deadline]`
#[test]
fn a_quiet_peer_is_pinged_at_the_interval_and_its_pong_measures_the_round_trip() {
    let mut pair = Pair::one_lane();
    let interval = Duration::from_secs(15);
    assert_eq!(pair.peers[A].poll_timeout(), Some(Time::ZERO.after(interval)));
    pair.advance(interval - Duration::from_nanos(1));
    assert!(pair.pipes[A].kinds.is_empty() && pair.pipes[B].kinds.is_empty());
    pair.advance(Duration::from_nanos(1));
    assert!(pair.take(A).iter().any(|event| matches!(event, Event::Pong { rtt } if rtt.is_zero())));
    pair.advance(Duration::from_secs(3600));
    pair.assert_alive();
}

/// Lesson 16: also while a send is stuck. `[session.keepalive.deadline]`
#[test]
fn a_silent_peer_is_detected_within_interval_and_timeout_although_a_send_is_stuck() {
    let mut pair = Pair::one_lane();
    pair.pipes[A].capacity = 0;
    pair.pipes[B].stalled = true;
    pair.advance(Duration::from_millis(24_999));
    assert_eq!(pair.peers[A].session().end(), None);
    pair.advance(Duration::from_millis(1));
    assert_eq!(pair.peers[A].session().end(), Some(&SessionEnd::PeerSilent));
}

/// `[session.idle.timeout]`
#[test]
fn a_session_without_connections_ends_at_its_idle_timeout_and_one_in_use_never() {
    let idle = Config { idle_timeout: Some(Duration::from_secs(40)), ..Config::default() };
    let mut pair = Pair::open(Config::default(), idle, 1);
    let id = pair.connect(A);
    pair.advance(Duration::from_secs(500));
    pair.assert_alive();
    pair.close(A, id);
    pair.run();
    pair.advance(Duration::from_millis(39_999));
    pair.assert_alive();
    pair.advance(Duration::from_millis(1));
    assert_eq!(pair.peers[B].session().end(), Some(&SessionEnd::Idle));
    let end = pair.peers[A].session().end();
    assert!(matches!(end, Some(SessionEnd::ClosedByPeer(reason)) if reason.code == code::TIMEOUT), "{end:?}");
}

/// `[session.write.progress]`
#[test]
fn a_stalled_writer_ends_the_session_with_its_own_cause() {
    let mut pair = Pair::one_lane();
    pair.connect(A);
    pair.peers[A].session_mut().handle_write_stalled();
    pair.peers[A].session_mut().handle_write_stalled();
    assert_eq!(pair.peers[A].session().end(), Some(&SessionEnd::PeerNotReading));
    pair.run();
    let end = pair.peers[B].session().end();
    assert!(matches!(end, Some(SessionEnd::ClosedByPeer(reason)) if reason.code == code::TIMEOUT), "{end:?}");
}

#[test]
fn any_received_byte_is_life() {
    let mut pair = Pair::one_lane();
    pair.pipes[B].stalled = true;
    pair.advance(Duration::from_secs(24));
    pair.peers[A].session_mut().handle_activity(pair.now);
    pair.advance(Duration::from_secs(14));
    assert_eq!(pair.peers[A].session().end(), None, "half a frame came, and no pong");
}

/// `[session.ping.one-slot]`
#[test]
fn a_flood_of_pings_costs_one_answer() {
    let abuse = AbuseLimits { pings: Rate { burst: 20_000, per_second: 0 }, ..Default::default() };
    let mut pair = Pair::open(Config::default(), Config { abuse, ..Config::default() }, 1);
    for nonce in 0..10_000 {
        pair.peers[B].handle_frame(pair.now, Lane(0), framed(&Ping { nonce }, b""));
    }
    pair.write(B);
    assert_eq!(pair.pipes[B].kinds, [6], "one Pong, for the last");
}

#[test]
fn a_pong_that_answers_no_ping_is_a_violation() {
    let mut pair = Pair::one_lane();
    pair.peers[A].handle_frame(pair.now, Lane(0), framed(&Pong { nonce: 99 }, b""));
    assert_eq!(pair.peers[A].session().end(), Some(&SessionEnd::PeerViolation(Violation::StrayPong)));
}

/// Lessons 6 and 18: a closed root leaves no zombie, and both sides know the cause.
#[test]
fn closing_the_root_ends_both_sides_with_the_cause() {
    let mut pair = Pair::one_lane();
    let id = pair.connect(A);
    pair.call(A, id, 1, b"");
    pair.run();
    pair.requests(B);
    let reason = Reason::new(code::APPLICATION, "done for today");
    pair.peers[A].session_mut().close_session(reason.clone());
    pair.run();
    assert_eq!(pair.peers[A].session().end(), Some(&SessionEnd::ClosedByUs(reason.clone())));
    assert_eq!(pair.peers[B].session().end(), Some(&SessionEnd::ClosedByPeer(reason)));
    for side in [A, B] {
        let events = pair.take(side);
        let last = events.len() - 1;
        assert!(matches!(&events[0], Event::CallFailed { .. }), "{events:?}");
        assert!(matches!(&events[last - 1], Event::ConnectionClosed { .. }), "{events:?}");
        assert!(matches!(&events[last], Event::SessionEnded(_)), "{events:?}");
        assert_eq!(pair.peers[side].poll_timeout(), None);
    }
    assert_eq!(pair.counts(), [(0, 0, 0); 2]);
}

/// Lesson 7: a violation is answered once, both sides report it. `[session.violation.once]`
#[test]
fn a_violation_is_told_once_and_both_sides_report_it() {
    let mut pair = Pair::one_lane();
    for _ in 0..3 {
        pair.peers[B].handle_frame(pair.now, Lane(0), framed(&Pong { nonce: 99 }, b""));
    }
    pair.run();
    assert_eq!(pair.pipes[B].kinds, [3], "ProtocolError, once, and nothing else");
    assert_eq!(pair.peers[B].session().end(), Some(&SessionEnd::PeerViolation(Violation::StrayPong)));
    let Some(SessionEnd::ReportedViolation(reason)) = pair.peers[A].session().end() else { panic!() };
    assert_eq!((reason.code, reason.text.as_str()), (code::STATE, "pong with a nonce that was not pinged"));
}

/// Lesson 18: shutdown tells the peer. `[session.go-away.last]`
#[test]
fn after_go_away_old_opens_are_answered_and_new_ones_are_refused() {
    let mut pair = Pair::one_lane();
    let live = pair.connect(A);
    let waiting = pair.start_open(A, Default::default());
    pair.run();
    pair.take(B);
    pair.peers[B].session_mut().go_away(Reason::new(code::GOING_AWAY, "restart"));
    // One more crosses the GoAway.
    let crossed = pair.start_open(A, Default::default());
    pair.run();
    let events = pair.take(A);
    assert!(matches!(&events[0], Event::PeerGoingAway { last, .. } if *last == waiting), "{events:?}");
    assert!(matches!(&events[1], Event::ConnectionRejected { connection, reason, .. }
        if *connection == crossed && reason.code == code::GOING_AWAY));
    assert!(pair.take(B).is_empty(), "it was never seen by the application");
    pair.peers[B].session_mut().accept(waiting, Default::default(), Metadata::new(), None).unwrap();
    pair.run();
    assert!(matches!(&pair.take(A)[..], [Event::ConnectionAccepted { connection, .. }] if *connection == waiting));
    pair.call(A, live, 1, b"still served");
    pair.run();
    assert_eq!(pair.requests(B).len(), 1);
    let now = pair.now;
    let refused = pair.peers[A].session_mut().open(now, "echo", Default::default(), Metadata::new(), None);
    assert_eq!(refused.unwrap_err().to_string(), "the session is going away");
    pair.close(A, live);
    pair.close(B, waiting);
    pair.run();
    assert_eq!(pair.counts(), [(0, 0, 0); 2]);
}

#[test]
fn go_away_is_said_once_and_names_an_id_that_was_used() {
    use tollway_protocol::message::GoAway;
    let away = |last| framed(&GoAway { last: ConnectionId(last), reason: Reason::none().into() }, b"");
    for (frames, alive) in [(vec![0], true), (vec![1], true), (vec![3], false), (vec![2], false), (vec![1, 1], false)] {
        let mut pair = Pair::one_lane();
        pair.connect(A);
        for &last in &frames {
            pair.peers[A].handle_frame(pair.now, Lane(0), away(last));
        }
        assert_eq!(pair.peers[A].session().end().is_none(), alive, "{frames:?}");
    }
}

/// `[session.handshake.first-frame]`
#[test]
fn an_open_by_the_responder_waits_for_the_initiators_first_frame_and_its_close_stays_behind_it() {
    for seed in 0..50 {
        let lanes = config(LaneMode::PerConnection);
        let mut pair = Pair::unopened(lanes.clone(), lanes, seed);
        pair.run();
        pair.peers[B].session_mut().accept_session(Metadata::new());
        let kept = pair.start_open(B, Default::default());
        let abandoned = pair.start_open(B, Default::default());
        pair.close(B, abandoned);
        pair.run();
        pair.assert_alive();
        let asked = pair.take(A).into_iter().filter(|event| {
            matches!(event, Event::ConnectionRequested { connection, .. } if [kept, abandoned].contains(connection))
        });
        assert_eq!(asked.count(), 2);
        assert_eq!(pair.counts(), [(1, 0, 0); 2]);
    }
}

/// `[session.auth.challenge]`
#[test]
fn a_challenge_is_answered_by_one_proof_before_the_hello_is() {
    let mut pair = Pair::unopened(Config::default(), Config::default(), 1);
    pair.run();
    pair.take(B);
    let responder = pair.peers[B].session_mut();
    responder.challenge_session("a method", b"a challenge".as_slice().into()).unwrap();
    assert!(responder.challenge_session("a method", b"another".as_slice().into()).is_err(), "once");
    responder.accept_session(Metadata::new());
    assert!(!responder.is_open(), "the proof comes first");
    pair.run();
    let events = pair.take(A);
    let [Event::SessionChallenged { method, challenge }] = &events[..] else { panic!("{events:?}") };
    assert_eq!((method.as_str(), &challenge[..]), ("a method", b"a challenge".as_slice()));
    let initiator = pair.peers[A].session_mut();
    initiator.prove_session(b"a proof".as_slice().into());
    initiator.prove_session(b"another".as_slice().into());
    pair.run();
    let events = pair.take(B);
    assert!(matches!(&events[..], [Event::SessionProved { proof }] if proof == "a proof"), "{events:?}");
    pair.peers[B].session_mut().accept_session(Metadata::new());
    pair.run();
    assert!(pair.peers.iter().all(|peer| peer.session().is_open()));
    assert!(pair.peers[B].session_mut().challenge_session("a method", Default::default()).is_err());
}

/// `[session.auth.challenge]`
#[test]
fn challenges_and_proofs_that_nobody_waits_for_are_violations() {
    let challenge = framed(&Challenge { method: "m".into() }, b"c");
    let proof = |method: &str| framed(&Proof { method: method.into() }, b"p");
    let unexpected = |machine: &Machine| {
        let end = machine.end();
        assert!(matches!(end, Some(SessionEnd::PeerViolation(Violation::Unexpected { .. }))), "{end:?}");
    };
    let initiator = || Machine::initiator(Config::default(), Time::ZERO);
    let responder = || {
        let mut machine = Machine::responder(Config::default(), Time::ZERO);
        machine.handle_frame(Time::ZERO, Lane(0), framed(&hello(1, 1), b""));
        machine
    };
    let mut machine = initiator();
    machine.handle_frame(Time::ZERO, Lane(0), challenge.clone());
    assert_eq!(machine.end(), None);
    machine.handle_frame(Time::ZERO, Lane(0), challenge.clone());
    unexpected(&machine);
    for frame in [proof("m"), challenge.clone()] {
        let mut machine = responder();
        machine.handle_frame(Time::ZERO, Lane(0), frame);
        unexpected(&machine);
    }
    let mut machine = responder();
    machine.challenge_session("m", Default::default()).unwrap();
    machine.handle_frame(Time::ZERO, Lane(0), proof("n"));
    unexpected(&machine);
    // After the handshake neither may come.
    let ack = HelloAck { version: 1, limits: SessionLimits::default(), metadata: Metadata::new() };
    let mut machine = initiator();
    machine.handle_frame(Time::ZERO, Lane(0), framed(&ack, b""));
    assert!(machine.is_open());
    machine.handle_frame(Time::ZERO, Lane(0), challenge);
    unexpected(&machine);
    let mut machine = responder();
    machine.accept_session(Metadata::new());
    machine.handle_frame(Time::ZERO, Lane(0), proof("m"));
    unexpected(&machine);
}

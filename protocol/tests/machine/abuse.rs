//! Budgets: what only costs this side ends with a verdict, and what an honest peer does at full speed never does.

use bytes::Bytes;
use tollway_protocol::error::{Reason, SessionEnd, Violation, code};
use tollway_protocol::frame::Lane;
use tollway_protocol::id::{CallId, ConnectionId, Parity, StreamId};
use tollway_protocol::limits::{AbuseLimits, ConnectionLimits, LATE_FRAMES, LATE_FRAMES_EACH, Rate};
use tollway_protocol::message::*;
use tollway_protocol::metadata::Metadata;
use tollway_protocol::payment::Amount;
use tollway_protocol::session::{Config, Event, LaneMode};
use tollway_protocol::time::Time;

use crate::pair::{A, B, Pair, config, framed};

/// A million in release builds; what is slow without optimisation is shorter.
const MANY: u64 = if cfg!(debug_assertions) { 20_000 } else { 1_000_000 };

/// A pair whose side B has these budgets.
fn pair_with(abuse: AbuseLimits) -> Pair {
    Pair::open(Config::default(), Config { abuse, ..Config::default() }, 1)
}

fn few(burst: u32) -> Rate {
    Rate { burst, per_second: 10 }
}

fn open(number: u64) -> Bytes {
    let (limits, metadata) = (ConnectionLimits::default(), Metadata::new());
    let connection = ConnectionId(2 * number + 1);
    framed(&Open { connection, service: "echo".into(), parity: Parity::Odd, limits, metadata }, b"")
}

fn close(number: u64) -> Bytes {
    let connection = ConnectionId(2 * number + 1);
    framed(&Close { connection, reason: Reason::none().into(), metadata: Metadata::new() }, b"")
}

fn request(connection: ConnectionId, call: u64) -> Bytes {
    let (call, metadata) = (CallId(call), Metadata::new());
    framed(&Request { connection, call, method: 1, deadline_us: None, metadata, slots: vec![] }, b"")
}

/// Gives side B a frame of A's, now.
fn give(pair: &mut Pair, frame: Bytes) {
    let now = pair.now;
    pair.peers[B].handle_frame(now, Lane(0), frame);
}

/// The budget that B found used up.
fn verdict(pair: &Pair) -> Option<(&'static str, u32)> {
    match pair.peers[B].session().end() {
        Some(SessionEnd::PeerViolation(violation @ Violation::OverBudget { what, .. })) => {
            Some((*what, violation.code()))
        }
        Some(end) => panic!("{end}"),
        None => None,
    }
}

fn kinds_written(pair: &mut Pair) -> Vec<u8> {
    std::iter::from_fn(|| pair.peers[B].poll_transmit(Time::ZERO)).map(|frame| frame.head[0]).collect()
}

/// CVE-2023-44487. `[session.work.budget]`
#[test]
fn rapid_open_and_close_counts_until_the_work_has_ended_and_leads_to_go_away_then_a_verdict() {
    let mut pair = pair_with(AbuseLimits { unfinished_work: 100, ..Default::default() });
    for number in 0..100 {
        give(&mut pair, open(number));
        give(&mut pair, close(number));
    }
    assert_eq!(pair.peers[B].session().unfinished_work(), 100, "nobody has answered one of them");
    assert!(!kinds_written(&mut pair).contains(&GoAway::KIND));
    give(&mut pair, open(100));
    give(&mut pair, close(100));
    assert!(kinds_written(&mut pair).contains(&GoAway::KIND), "one over");
    // What comes after GoAway is never begun, so it cannot pile up.
    pair.take(B);
    for number in 101..400 {
        give(&mut pair, open(number));
        give(&mut pair, close(number));
    }
    assert!(pair.take(B).is_empty());
    assert_eq!((verdict(&pair), pair.peers[B].session().unfinished_work()), (None, 101));
}

/// Handlers that end are forgiven, in whatever way the application says it.
#[test]
fn work_that_ends_is_forgiven() {
    let mut pair = pair_with(AbuseLimits { unfinished_work: 10, ..Default::default() });
    for number in 0..1_000 {
        give(&mut pair, open(number));
        give(&mut pair, close(number));
        let id = ConnectionId(2 * number + 1);
        let session = pair.peers[B].session_mut();
        match number % 4 {
            0 => _ = session.accept(id, ConnectionLimits::default(), Metadata::new(), None),
            1 => _ = session.reject(id, Reason::none(), Metadata::new(), Bytes::new()),
            2 => session.close(id, Reason::none()),
            _ => session.finish_open(id),
        }
        kinds_written(&mut pair);
    }
    assert_eq!((verdict(&pair), pair.peers[B].session().unfinished_work()), (None, 0));
    assert!(pair.peers[A].session().is_open());
}

/// The same with calls: each Close gives up handlers that still run. `[session.work.budget]`
#[test]
fn handlers_of_closed_connections_count_until_they_answer() {
    let mut pair = pair_with(AbuseLimits { unfinished_work: 20, ..Default::default() });
    let connections: Vec<_> = (0..6).map(|_| pair.connect(A)).collect();
    let begin = |pair: &mut Pair, at: usize| {
        (0..10u64).for_each(|number| give(pair, request(connections[at], 2 * number + 1)));
        let calls = pair.requests(B);
        let connection = connections[at];
        give(pair, framed(&Close { connection, reason: Reason::none().into(), metadata: Metadata::new() }, b""));
        calls
    };
    let handlers = begin(&mut pair, 0);
    begin(&mut pair, 1);
    assert_eq!(pair.peers[B].session().unfinished_work(), 20);
    assert!(!kinds_written(&mut pair).contains(&GoAway::KIND));
    for handler in handlers {
        let answer = tollway_protocol::session::ResponseSpec {
            status: Status::Ok,
            metadata: Metadata::new(),
            payload: Bytes::new(),
            slots: &[],
            cost: None,
            paid_before: Amount::ZERO,
        };
        assert!(pair.peers[B].session_mut().respond(handler.call, answer).is_err(), "nobody waits for it");
    }
    assert_eq!(pair.peers[B].session().unfinished_work(), 10);
    begin(&mut pair, 2);
    begin(&mut pair, 3);
    assert!(kinds_written(&mut pair).contains(&GoAway::KIND), "30 handlers of 20");
    begin(&mut pair, 4);
    assert_eq!(verdict(&pair), None, "40 handlers of 20");
    begin(&mut pair, 5);
    assert_eq!(verdict(&pair), Some(("unfinished work", code::ABUSE)), "50 handlers of 20");
    assert_eq!(kinds_written(&mut pair), [ProtocolError::KIND]);
}

/// `[call.window.monotonic]`
#[test]
fn a_window_that_does_not_rise_is_a_violation() {
    for (limit, refused) in [(1 << 20, true), ((1 << 20) + 1, false)] {
        let mut pair = Pair::one_lane();
        let connection = pair.connect(A);
        give(&mut pair, framed(&Window { connection, limit }, b""));
        assert_eq!(pair.peers[B].session().end().is_some(), refused);
    }
}

/// A call whose end nobody waits for may be cancelled first; a cancelled one holds its place until its answer.
#[test]
fn a_cancelled_call_holds_its_place_until_it_is_answered() {
    let mut pair = Pair::one_lane();
    let limits = ConnectionLimits { max_calls: 3, ..Default::default() };
    let connection = pair.connect_with(A, ConnectionLimits::default(), limits);
    for number in 0..3 {
        give(&mut pair, request(connection, 2 * number + 1));
        give(&mut pair, framed(&Cancel { connection, call: CallId(2 * number + 1) }, b""));
    }
    pair.assert_alive();
    give(&mut pair, request(connection, 7));
    let end = pair.peers[B].session().end();
    assert!(
        matches!(end, Some(SessionEnd::PeerViolation(Violation::AboveLimit { what: "open calls", .. }))),
        "{end:?}"
    );
}

/// `[call.cancel.once]`, `[stream.stop.once]`
#[test]
fn a_second_cancel_and_a_second_stop_are_violations() {
    for stop in [false, true] {
        let mut pair = Pair::one_lane();
        let connection = pair.connect(A);
        let slots = vec![Slot { stream: StreamId(1), flow: Flow::FromPeer }];
        let (call, metadata) = (CallId(1), Metadata::new());
        give(&mut pair, framed(&Request { connection, call, method: 1, deadline_us: None, metadata, slots }, b""));
        let frame = match stop {
            true => framed(&Stop { connection, stream: StreamId(1), code: 7 }, b""),
            false => framed(&Cancel { connection, call }, b""),
        };
        give(&mut pair, frame.clone());
        pair.assert_alive();
        give(&mut pair, frame);
        let end = pair.peers[B].session().end();
        assert!(matches!(end, Some(SessionEnd::PeerViolation(Violation::Unexpected { .. }))), "{end:?}");
    }
}

/// CVE-2025-8671: opens that make this side refuse. `[session.refusal.budget]`
#[test]
fn refusals_lead_to_go_away_and_then_to_a_verdict() {
    let limits = tollway_protocol::limits::SessionLimits { max_pending_opens: 1, ..Default::default() };
    let abuse = AbuseLimits { refusals: few(50), ..Default::default() };
    let mut pair = Pair::open(Config::default(), Config { limits, abuse, ..Config::default() }, 1);
    (0..51).for_each(|number| give(&mut pair, open(number)));
    assert!(!kinds_written(&mut pair).contains(&GoAway::KIND), "one waits, 50 were refused");
    give(&mut pair, open(51));
    assert!(kinds_written(&mut pair).contains(&GoAway::KIND));
    (52..101).for_each(|number| give(&mut pair, open(number)));
    assert_eq!(verdict(&pair), None);
    give(&mut pair, open(101));
    assert_eq!(verdict(&pair), Some(("refused opens", code::ABUSE)));
    assert_eq!(kinds_written(&mut pair), [ProtocolError::KIND], "[session.violation.once]");
}

/// The application's own refusals count, too: opens for a service that nobody serves.
#[test]
fn refusals_by_the_application_use_the_same_budget() {
    let mut pair = pair_with(AbuseLimits { refusals: few(10), ..Default::default() });
    for number in 0..21 {
        give(&mut pair, open(number));
        if pair.take(B).iter().any(|event| matches!(event, Event::ConnectionRequested { .. })) {
            let reason = Reason::new(code::UNKNOWN_SERVICE, "no");
            pair.peers[B].session_mut().close(ConnectionId(2 * number + 1), reason);
        }
    }
    assert_eq!(verdict(&pair), Some(("refused opens", code::ABUSE)));
}

/// yamux#150: opens that nobody accepts are refused beyond the limit, and the session lives on. `[session.open.capacity]`
#[test]
fn opens_without_end_that_nobody_answers_are_refused_and_the_session_lives_on() {
    let mut pair = Pair::one_lane();
    let (mut asked, mut refused) = (0, 0);
    for number in 0..MANY {
        give(&mut pair, open(number));
        while let Some(event) = pair.peers[B].poll_event() {
            asked += usize::from(matches!(
                event,
                tollway_protocol::peer::PeerEvent::Session(Event::ConnectionRequested { .. })
            ));
        }
        refused += kinds_written(&mut pair).iter().filter(|&&kind| kind == Reject::KIND).count();
    }
    assert_eq!((verdict(&pair), asked, refused), (None, 1_024, MANY as usize - 1_024));
    assert_eq!(pair.peers[B].session().connection_count(), 1_024);
}

/// Honest churn at full speed is not abuse, however small the budgets, and leaves nothing. `[session.work.budget]`
#[test]
fn connections_opened_and_closed_in_turn_leave_nothing_and_bring_no_verdict() {
    let none = Rate { burst: 1, per_second: 0 };
    let mut pair =
        pair_with(AbuseLimits { unfinished_work: 1, refusals: none, pings: none, extensions: none, late_frames: none });
    for _ in 0..MANY {
        let id = pair.connect(A);
        pair.close(A, id);
        pair.run();
        pair.events.iter_mut().for_each(|events| events.clear());
        pair.pipes.iter_mut().for_each(|pipe| pipe.kinds.clear());
    }
    pair.assert_alive();
    assert_eq!(pair.counts(), [(0, 0, 0); 2]);
    assert_eq!(pair.peers[B].session().unfinished_work(), 0);
    assert_eq!(pair.connect(A), ConnectionId(2 * MANY + 1), "nobody was told to go away");
}

/// CVE-2019-9512. `[session.ping.budget]`
#[test]
fn pings_beyond_their_budget_are_a_verdict_and_within_their_rate_never() {
    let mut pair = pair_with(AbuseLimits { pings: few(20), ..Default::default() });
    let ping = || framed(&Ping { nonce: 7 }, b"");
    // The initiator's first ping is one of them.
    (0..19).for_each(|_| give(&mut pair, ping()));
    for _ in 0..1_000 {
        pair.now = pair.now.after(std::time::Duration::from_millis(100));
        give(&mut pair, ping());
    }
    assert_eq!(verdict(&pair), None, "ten a second are within the rate");
    give(&mut pair, ping());
    assert_eq!(verdict(&pair), Some(("pings", code::ABUSE)));
}

/// `[session.extension.budget]`
#[test]
fn frames_of_unknown_extensions_have_a_budget() {
    let mut pair = pair_with(AbuseLimits { extensions: few(30), ..Default::default() });
    (0..30).for_each(|number| give(&mut pair, vec![128 + number as u8, 1, 2].into()));
    assert_eq!(verdict(&pair), None);
    give(&mut pair, vec![200].into());
    assert_eq!(verdict(&pair), Some(("frames of unknown extensions", code::ABUSE)));
}

/// `[session.late.budget]`
#[test]
fn frames_for_closed_connections_have_a_budget() {
    for closed_by in [A, B] {
        let mut pair = pair_with(AbuseLimits { late_frames: few(30), ..Default::default() });
        let connection = pair.connect(A);
        pair.close(closed_by, connection);
        if closed_by == A {
            pair.run();
        }
        (0..30).for_each(|number| give(&mut pair, request(connection, 2 * number + 1)));
        assert_eq!(verdict(&pair), None);
        give(&mut pair, request(connection, 61));
        assert_eq!(verdict(&pair), Some(("frames for closed connections", code::ABUSE)));
    }
}

/// `[session.late.bound]`
#[test]
fn frames_for_ended_calls_are_bounded_by_the_calls_that_there_were() {
    let mut pair = Pair::one_lane();
    let connection = pair.connect(A);
    let calls = 10u64;
    for number in 0..calls {
        give(&mut pair, request(connection, 2 * number + 1));
        let call = pair.requests(B)[0].call;
        pair.answer(B, call, Status::Ok, b"");
    }
    kinds_written(&mut pair);
    let most = LATE_FRAMES + calls * LATE_FRAMES_EACH;
    let late = |pair: &mut Pair| give(pair, framed(&Cancel { connection, call: CallId(1) }, b""));
    (0..most).for_each(|_| late(&mut pair));
    pair.assert_alive();
    late(&mut pair);
    let end = pair.peers[B].session().end();
    assert!(
        matches!(end, Some(SessionEnd::PeerViolation(Violation::AboveLimit { value, limit, .. }))
        if (*value, *limit) == (most + 1, most)),
        "{end:?}"
    );
}

/// A peer that cancels every call late, at any speed, is within the bound for ever. `[session.late.bound]`
#[test]
fn late_cancels_of_honest_churn_are_no_abuse() {
    let mut pair = Pair::one_lane();
    let connection = pair.connect(A);
    for number in 0..20_000u64 {
        let call = CallId(2 * number + 1);
        give(&mut pair, request(connection, call.0));
        let key = pair.requests(B)[0].call;
        pair.answer(B, key, Status::Ok, b"");
        kinds_written(&mut pair);
        give(&mut pair, framed(&Cancel { connection, call }, b""));
    }
    pair.assert_alive();
}

/// On many lanes too: GoAway names what was seen, and what is in a gap is still answered.
#[test]
fn the_verdict_for_unfinished_work_respects_pending_ids() {
    let lanes = config(LaneMode::PerConnection);
    let abuse = AbuseLimits { unfinished_work: 1, ..Default::default() };
    let mut pair = Pair::open(lanes.clone(), Config { abuse, ..lanes }, 1);
    let now = pair.now;
    // 1 is on its way on a slow lane; 3 and 5 are opened and closed.
    for number in [1, 2] {
        let lane = Lane(2 * number + 1);
        pair.peers[B].handle_frame(now, lane, open(number));
        pair.peers[B].handle_frame(now, lane, close(number));
    }
    assert!(kinds_written(&mut pair).contains(&GoAway::KIND));
    pair.take(B);
    pair.peers[B].handle_frame(now, Lane(1), open(0));
    assert!(matches!(&pair.take(B)[..], [Event::ConnectionRequested { connection: ConnectionId(1), .. }]));
}

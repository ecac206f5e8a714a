//! What a peer can make this side hold is bounded, windows grow while they hold a sender up, and nobody is punished when
//! there is no room. `[session.memory.bound]`

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tollway_protocol::error::code;
use tollway_protocol::limits::{ConnectionLimits, ITEM_OVERHEAD};
use tollway_protocol::memory::{MemoryLimits, MemoryPool};
use tollway_protocol::message::{Flow, Status};
use tollway_protocol::metadata::Metadata;
use tollway_protocol::payment::Amount;
use tollway_protocol::peer::Read;
use tollway_protocol::session::{CallSpec, CommandError, Config, PayerMoney, ResponseSpec};
use tollway_protocol::stream::{Ending, StreamKey};

use crate::pair::{A, B, Pair};

const WINDOW: u32 = 10_000;

fn limits() -> ConnectionLimits {
    ConnectionLimits { stream_window: WINDOW, max_item: 4_000, max_body: 5_000, window: 20_000, ..Default::default() }
}

/// A pair whose side B grants at most `session` bytes.
fn pair_with(session: u64) -> Pair {
    let memory = MemoryLimits { session, ..Default::default() };
    Pair::open(Config::default(), Config { memory, ..Config::default() }, 1)
}

fn granted(pair: &Pair) -> u64 {
    pair.peers[B].session().granted_bytes()
}

/// A call with one stream to B: both ends.
fn upload(pair: &mut Pair, connection: tollway_protocol::id::ConnectionId) -> (StreamKey, StreamKey) {
    let (_, keys) = pair.call_with(A, connection, 1, b"", &[Flow::ToPeer]);
    pair.run();
    (keys[0], pair.requests(B)[0].slots[0].stream)
}

#[test]
fn an_idle_connection_counts_nothing_and_a_stream_its_window_until_it_was_read() {
    let mut pair = pair_with(1 << 20);
    let connections: Vec<_> = (0..50).map(|_| pair.connect_with(A, limits(), limits())).collect();
    assert_eq!(granted(&pair), 0);
    let (tx, rx) = upload(&mut pair, connections[0]);
    assert_eq!(granted(&pair), u64::from(WINDOW));
    pair.peers[A].push(tx, &[7; 100]).unwrap();
    pair.peers[A].finish(tx);
    pair.run();
    assert_eq!(granted(&pair), u64::from(WINDOW), "its item is still there");
    assert_eq!(pair.read_all(B, rx).1, Some(Ending::End));
    assert_eq!(granted(&pair), 0);
}

/// The story: a stream is filled and ended, so that it leaves the table; then the next one.
#[test]
fn streams_that_ended_unread_count_until_they_are_dropped() {
    let mut pair = pair_with(35_000);
    let connection = pair.connect_with(A, limits(), limits());
    let mut unread = Vec::new();
    for _ in 0..3 {
        let (tx, rx) = upload(&mut pair, connection);
        pair.peers[A].push(tx, &[7; 100]).unwrap();
        pair.peers[A].finish(tx);
        pair.run();
        unread.push(rx);
    }
    assert_eq!((granted(&pair), pair.peers[B].session().stream_count()), (30_000, 0));
    let (fourth, at_b) = upload(&mut pair, connection);
    assert_eq!(pair.peers[A].buffered(fourth), None, "it was stopped and reset");
    assert_eq!(pair.read_all(B, at_b), (vec![], Some(Ending::Reset(code::AT_CAPACITY))));
    unread.into_iter().for_each(|rx| pair.peers[B].stop(rx, 0));
    assert_eq!(granted(&pair), 0);
    upload(&mut pair, connection);
    assert_eq!(granted(&pair), u64::from(WINDOW));
    pair.assert_alive();
}

#[test]
fn a_stream_without_room_is_stopped_loses_its_items_and_never_looks_complete() {
    let mut pair = pair_with(u64::from(WINDOW));
    let connection = pair.connect_with(A, limits(), limits());
    let (first, at_b) = upload(&mut pair, connection);
    // Its items and its end are on their way before the Stop comes.
    let (_, keys) = pair.call_with(A, connection, 1, b"", &[Flow::ToPeer]);
    (0..5).for_each(|_| pair.peers[A].push(keys[0], &[1; 500]).unwrap());
    pair.peers[A].finish(keys[0]);
    pair.run();
    let refused = pair.requests(B)[0].slots[0].stream;
    assert_eq!(pair.read_all(B, refused), (vec![], Some(Ending::Reset(code::AT_CAPACITY))));
    // The one that has room goes on.
    pair.peers[A].push(first, b"here").unwrap();
    pair.run();
    assert_eq!(pair.read_all(B, at_b).0, [Bytes::from_static(b"here")]);
    pair.assert_alive();
}

/// An item that passes the window counts on its own, so what is held is never more than what is counted.
#[test]
fn the_excess_of_a_largest_item_counts_until_it_is_within_the_credit() {
    let mut pair = pair_with(20_000);
    let connection = pair.connect_with(A, limits(), limits());
    let (tx, rx) = upload(&mut pair, connection);
    // 9,936 of 10,000 are used when the last one starts.
    [3_984, 3_984, 1_920, 4_000].iter().for_each(|&bytes| pair.peers[A].push(tx, &vec![0; bytes]).unwrap());
    pair.run();
    let held = 3_984 + 3_984 + 1_920 + 4_000 + 4 * ITEM_OVERHEAD;
    assert_eq!(granted(&pair), held);
    pair.read_all(B, rx);
    assert_eq!(granted(&pair), u64::from(WINDOW), "all was read, and a window is granted again");
    // Without room for the excess the stream is stopped.
    let mut pair = pair_with(12_000);
    let connection = pair.connect_with(A, limits(), limits());
    let (tx, rx) = upload(&mut pair, connection);
    [3_984, 3_984, 1_920, 4_000].iter().for_each(|&bytes| pair.peers[A].push(tx, &vec![0; bytes]).unwrap());
    pair.run();
    assert!(granted(&pair) <= 12_000);
    assert_eq!(pair.peers[A].buffered(tx), None, "reset");
    let (items, ending) = pair.read_all(B, rx);
    assert!(items.len() < 4 && ending == Some(Ending::Reset(code::AT_CAPACITY)), "{} {ending:?}", items.len());
    assert_eq!(granted(&pair), 0);
    pair.assert_alive();
}

#[test]
fn a_refused_stream_is_bounded_by_its_credit_all_the_same() {
    use tollway_protocol::error::{SessionEnd, Violation};
    use tollway_protocol::frame::Lane;
    use tollway_protocol::id::{CallId, StreamId};
    use tollway_protocol::message::{Items, Request, Slot};
    let mut pair = pair_with(0);
    let connection = pair.connect_with(A, limits(), limits());
    let slots = vec![Slot { stream: StreamId(1), flow: Flow::ToPeer }];
    let (call, metadata) = (CallId(1), Metadata::new());
    let request = Request { connection, call, method: 1, deadline_us: None, metadata, slots };
    let now = pair.now;
    pair.peers[B].handle_frame(now, Lane(0), crate::pair::framed(&request, b""));
    let item = [[0xa0, 0x1f].as_slice(), &[0; 4_000]].concat();
    let items = crate::pair::framed(&Items { connection, stream: StreamId(1), slots: vec![] }, &item);
    // Three of 4,016 start below 10,000 and pass it; a fourth may not.
    for number in 0..4 {
        assert!(pair.peers[B].session().end().is_none(), "item {number}");
        pair.peers[B].handle_frame(now, Lane(0), items.clone());
    }
    let end = pair.peers[B].session().end();
    assert_eq!(end, Some(&SessionEnd::PeerViolation(Violation::NoCredit { what: "item" })));
}

#[test]
fn a_call_without_room_is_answered_at_capacity_and_the_next_one_is_served() {
    let mut pair = pair_with(6_000);
    let connection = pair.connect_with(A, limits(), limits());
    pair.call(A, connection, 1, &[0; 4_000]);
    pair.call(A, connection, 2, &[0; 4_000]);
    pair.run();
    let calls = pair.requests(B);
    assert_eq!((calls.len(), granted(&pair)), (1, 4_000));
    let refused = pair.responses(A);
    assert_eq!(refused.iter().map(|answer| answer.status).collect::<Vec<_>>(), [Status::AtCapacity]);
    pair.peers[B].session_mut().consume_body(connection, 4_000);
    pair.answer(B, calls[0].call, Status::Ok, b"");
    pair.call(A, connection, 3, &[0; 4_000]);
    pair.run();
    assert_eq!((pair.requests(B).len(), granted(&pair)), (1, 4_000));
    // The body's window was given back for the refused one too: ten more pass.
    pair.peers[B].session_mut().consume_body(connection, 4_000);
    for _ in 0..10 {
        pair.call(A, connection, 2, &[0; 4_000]);
        pair.run();
        assert_eq!(pair.requests(B).len(), 1);
        pair.peers[B].session_mut().consume_body(connection, 4_000);
    }
    assert_eq!(granted(&pair), 0);
}

#[test]
fn an_answer_without_room_is_dropped_and_its_call_fails() {
    let mut pair = pair_with(1_000);
    let connection = pair.connect_with(A, limits(), limits());
    pair.call(B, connection, 1, b"");
    pair.run();
    let call = pair.requests(A)[0].call;
    pair.answer(A, call, Status::Ok, &[0; 1_001]);
    pair.run();
    let answers = pair.responses(B);
    assert_eq!((answers[0].status, answers[0].payload.len()), (Status::AtCapacity, 0));
    assert_eq!(granted(&pair), 0);
}

#[test]
fn streams_of_our_own_without_room_are_refused_here() {
    let mut pair = pair_with(25_000);
    let connection = pair.connect_with(A, limits(), limits());
    let mut call = |slots: &[Flow]| {
        let (metadata, payload) = (Metadata::new(), Bytes::new());
        pair.peers[B].start_call(CallSpec { connection, method: 1, deadline: None, metadata, payload, slots }).map(drop)
    };
    assert_eq!(call(&[Flow::FromPeer; 3]), Err(CommandError::OutOfMemory { limit: 25_000 }));
    assert_eq!(call(&[Flow::FromPeer, Flow::FromPeer, Flow::ToPeer]), Ok(()));
    assert_eq!(call(&[Flow::FromPeer]), Err(CommandError::OutOfMemory { limit: 25_000 }));
}

#[test]
fn everything_comes_back_with_a_close_and_with_the_session() {
    let pool = Arc::new(MemoryPool::new(1 << 30));
    let memory = MemoryLimits { pool: Some(pool.clone()), ..Default::default() };
    let mut pair = Pair::open(Config::default(), Config { memory, ..Config::default() }, 1);
    let connection = pair.connect_with(A, limits(), limits());
    let (tx, _) = upload(&mut pair, connection);
    pair.peers[A].push(tx, b"unread").unwrap();
    pair.call(A, connection, 1, &[0; 3_000]);
    pair.run();
    assert!(granted(&pair) == 13_000 && pool.lent() >= 13_000);
    pair.close(A, connection);
    pair.run();
    assert_eq!(granted(&pair), 3_000, "a handler still has its arguments");
    pair.peers[B].session_mut().consume_body(connection, 3_000);
    assert_eq!(granted(&pair), 0);
    let connection = pair.connect_with(A, limits(), limits());
    upload(&mut pair, connection);
    pair.peers[B].session_mut().handle_conduit_lost("gone");
    assert_eq!((granted(&pair), pool.lent()), (0, 0));
}

/// Two sessions of one process: the second finds what the first has left.
#[test]
fn sessions_share_the_pool_of_their_process() {
    let pool = Arc::new(MemoryPool::new(240_000));
    let limits = || ConnectionLimits { stream_window: 200_000, ..limits() };
    let side = || {
        let memory = MemoryLimits { pool: Some(pool.clone()), ..Default::default() };
        Pair::open(Config::default(), Config { memory, ..Config::default() }, 1)
    };
    let (mut one, mut two) = (side(), side());
    let id = one.connect_with(A, limits(), limits());
    let (tx, rx) = upload(&mut one, id);
    let id = two.connect_with(A, limits(), limits());
    let (refused, _) = upload(&mut two, id);
    assert_eq!(two.peers[A].buffered(refused), None);
    one.peers[A].finish(tx);
    one.run();
    one.read_all(B, rx);
    upload(&mut two, id);
    assert!(granted(&two) == 200_000 && pool.lent() <= pool.limit(), "{}", pool.lent());
}

/// A link with a round trip of 10 ms, on which A sends as much as it may; returns the bytes read in each of them.
fn bulk(pair: &mut Pair, tx: StreamKey, rx: StreamKey, rounds: usize) -> Vec<usize> {
    let half = Duration::from_millis(5);
    (0..rounds)
        .map(|_| {
            while pair.peers[A].buffered(tx).is_some_and(|bytes| bytes < 1 << 20) {
                pair.peers[A].push(tx, &[3; 984]).unwrap();
            }
            pair.write(A);
            pair.advance_only(half);
            pair.deliver(A);
            let mut bytes = 0;
            while let Read::Item(item, _) = pair.peers[B].read(rx) {
                bytes += item.len();
            }
            pair.write(B);
            pair.advance_only(half);
            pair.deliver(B);
            bytes
        })
        .collect()
}

/// A pair whose side B has measured a round trip of 20 ms.
fn far_pair(memory: MemoryLimits) -> Pair {
    let ping_interval = Duration::from_millis(100);
    let mut pair = Pair::open(Config::default(), Config { memory, ping_interval, ..Config::default() }, 1);
    pair.advance_only(ping_interval);
    let now = pair.now;
    pair.peers[B].handle_timeout(now);
    pair.write(B);
    pair.deliver(B);
    pair.write(A);
    pair.advance_only(Duration::from_millis(20));
    pair.deliver(A);
    assert_eq!(pair.peers[B].session().rtt(), Some(Duration::from_millis(20)));
    pair.pipes[A].capacity = 16 << 20;
    pair
}

#[test]
fn a_window_that_holds_the_sender_up_doubles_up_to_its_bound() {
    let memory = MemoryLimits { max_stream_window: 75_000, ..Default::default() };
    let mut pair = far_pair(memory);
    let connection = pair.connect_with(A, limits(), limits());
    let (tx, rx) = upload(&mut pair, connection);
    let read = bulk(&mut pair, tx, rx, 12);
    assert!(read[0] <= 10_000 && read.iter().any(|&bytes| bytes >= 70_000), "{read:?}");
    assert_eq!(granted(&pair), 75_000, "the bound, and all of it is counted");
}

#[test]
fn a_window_grows_no_further_than_the_budget_and_not_for_a_slow_reader() {
    let mut pair = far_pair(MemoryLimits { session: 45_000, ..Default::default() });
    let connection = pair.connect_with(A, limits(), limits());
    let (tx, rx) = upload(&mut pair, connection);
    bulk(&mut pair, tx, rx, 12);
    assert_eq!(granted(&pair), 40_000, "doubled twice");
    pair.assert_alive();

    let mut pair = far_pair(MemoryLimits::default());
    let connection = pair.connect_with(A, limits(), limits());
    let (tx, rx) = upload(&mut pair, connection);
    for _ in 0..20 {
        pair.advance_only(Duration::from_millis(40));
        bulk(&mut pair, tx, rx, 1);
    }
    assert_eq!(granted(&pair), u64::from(WINDOW), "it lasts for more than two round trips");
}

/// What a payer lets be on its way is bounded by what it is ready to lose. `[pay.cap.windows]`
#[test]
fn a_payers_windows_do_not_grow() {
    let mut pair = far_pair(MemoryLimits::default());
    let prices = Arc::new([].into_iter().collect());
    let money = PayerMoney { prices, received: Amount::ZERO, mark: Amount::MAX, hold: Amount::MAX };
    let (now, paid) = (pair.now, Some((Bytes::from_static(b"c"), money)));
    let id = pair.peers[B].session_mut().open(now, "paid", limits(), Metadata::new(), paid).unwrap();
    pair.run();
    pair.peers[A].session_mut().accept(id, limits(), Metadata::new(), None).unwrap();
    pair.run();
    pair.take(B);
    let (tx, rx) = upload(&mut pair, id);
    bulk(&mut pair, tx, rx, 12);
    assert_eq!(granted(&pair), u64::from(WINDOW));
}

/// The window of bodies grows alike.
#[test]
fn the_window_of_bodies_doubles_up_to_its_bound() {
    let mut pair = far_pair(MemoryLimits { max_body_window: 60_000, ..Default::default() });
    let connection = pair.connect_with(A, limits(), limits());
    let mut most = 0;
    for _ in 0..12 {
        while pair.peers[A].session().open_calls(connection) < 30 {
            pair.call(A, connection, 1, &[0; 5_000]);
        }
        pair.write(A);
        pair.advance_only(Duration::from_millis(5));
        pair.deliver(A);
        let calls = pair.requests(B);
        most = most.max(calls.len());
        for call in calls {
            pair.peers[B].session_mut().consume_body(connection, 5_000);
            pair.answer(B, call.call, Status::Ok, b"");
        }
        pair.write(B);
        pair.advance_only(Duration::from_millis(5));
        pair.deliver(B);
        pair.take(A);
    }
    assert_eq!(most, 12, "60,000 bytes");
}

/// The story: a peer calls as often as it may, and gives no window back for the answers. What is beyond the budget is
/// answered with AtCapacity, and nothing that waited counts any more when it has gone. `[session.memory.bound]`
#[test]
fn answers_that_nobody_takes_are_held_within_the_budget() {
    let mut pair = pair_with(100_000);
    let connections: Vec<_> = (0..3).map(|_| pair.connect_with(A, limits(), limits())).collect();
    for &connection in &connections {
        (0..50).for_each(|_| _ = pair.call(A, connection, 1, b""));
    }
    pair.run();
    let answer = |pair: &mut Pair, call| {
        let (metadata, payload) = (Metadata::new(), Bytes::from(vec![0; 5_000]));
        pair.peers[B].respond(
            call,
            ResponseSpec { status: Status::Ok, metadata, payload, slots: &[], cost: None, paid_before: Amount::ZERO },
        )
    };
    let calls = pair.requests(B);
    assert_eq!(calls.len(), 150);
    let refused = calls.iter().filter(|call| {
        let result = answer(&mut pair, call.call);
        let is_full = matches!(result, Err(CommandError::OutOfMemory { limit: 100_000 }));
        assert!(is_full || result.is_ok());
        assert!(granted(&pair) <= 100_000);
        is_full
    });
    assert_eq!(refused.count(), 130, "twenty of 5,000 bytes fit the budget");
    let end = answer(&mut pair, calls[149].call);
    assert_eq!(end.err(), Some(CommandError::NoCall), "it was answered");
    pair.close(A, connections[2]);
    let mut statuses = Vec::new();
    loop {
        pair.run();
        let answers = pair.responses(A);
        if answers.is_empty() {
            break;
        }
        for answer in answers {
            statuses.push(answer.status);
            pair.peers[A].session_mut().consume_body(answer.connection, answer.payload.len());
        }
    }
    let full = statuses.iter().filter(|&&status| status == Status::AtCapacity).count();
    assert_eq!((statuses.len(), full), (100, 80), "those of the connection that was closed are gone");
    assert_eq!((granted(&pair), pair.counts()[B].1), (0, 0));
}

//! Opens, answers and closes that break the rules of connections.

use tollway::protocol::error::Reason;
use tollway::protocol::id::{CallId, ConnectionId, StreamId};
use tollway::protocol::limits::ConnectionLimits;
use tollway::protocol::message::*;
use tollway::protocol::metadata::Metadata;

use super::stage::*;

async fn bad_open(code: u32, text: &str, change: impl FnOnce(&mut Open)) {
    breaks(code, text, async |raw| {
        let mut open = open(0);
        change(&mut open);
        raw.send(&open, b"").await;
    })
    .await;
}

/// `[session.open.parity]`
#[tokio::test]
async fn an_open_with_an_id_of_the_servers_half() {
    bad_open(ID, "connection id 2", |open| open.connection = ConnectionId(2)).await;
}

#[tokio::test]
async fn an_open_of_the_root() {
    bad_open(ID, "connection id 0", |open| open.connection = ConnectionId(0)).await;
}

/// `[session.id.pending]`
#[tokio::test]
async fn an_open_that_leaves_a_gap() {
    bad_open(ID, "connection id 3", |open| open.connection = ConnectionId(3)).await;
}

#[tokio::test]
async fn an_open_with_the_last_id_of_all() {
    bad_open(ID, "connection id 18446744073709551615", |open| open.connection = ConnectionId(u64::MAX)).await;
}

/// `[session.id.next]`
#[tokio::test]
async fn an_open_with_an_id_that_was_used() {
    breaks_on(ID, "connection id 1", async |raw, _| raw.send(&open(0), b"").await).await;
}

#[tokio::test]
async fn an_open_with_an_id_that_was_used_and_closed() {
    breaks_on(ID, "connection id 1", async |raw, connection| {
        raw.send(&close(connection), b"").await;
        raw.expect::<Close>().await;
        raw.send(&open(0), b"").await;
    })
    .await;
}

#[tokio::test]
async fn an_open_with_too_long_a_name() {
    bad_open(LIMIT, "service name: 257", |open| open.service = "k".repeat(257)).await;
}

#[tokio::test]
async fn an_open_with_too_much_metadata() {
    bad_open(LIMIT, "metadata", |open| open.metadata = Metadata::new().with("", vec![0; 16 * 1024 + 1])).await;
}

/// `[session.limits.consistent]`
#[tokio::test]
async fn an_open_with_a_window_of_zero() {
    bad_open(LIMIT, "zero", |open| open.limits = ConnectionLimits { window: 0, max_body: 0, ..open.limits }).await;
}

#[tokio::test]
async fn an_open_with_a_stream_window_of_zero() {
    bad_open(LIMIT, "zero", |open| open.limits.stream_window = 0).await;
}

#[tokio::test]
async fn an_open_with_bodies_above_the_window() {
    bad_open(LIMIT, "max_body", |open| open.limits.max_body = open.limits.window + 1).await;
}

#[tokio::test]
async fn an_open_with_items_above_the_frame() {
    bad_open(LIMIT, "largest frame", |open| open.limits.max_item += 1).await;
}

fn draining(connection: ConnectionId) -> Draining {
    Draining { connection, deadline_us: None, reason: Reason::none().into() }
}

/// `[session.drain.once]`
#[tokio::test]
async fn a_draining_that_is_said_twice() {
    breaks_on(STATE, "Draining: it is said once", async |raw, connection| {
        // Open, so that the connection does not close.
        raw.send(&request(connection, 1, NEVER), b"").await;
        raw.send(&draining(connection), b"").await;
        raw.expect::<Drained>().await;
        raw.send(&draining(connection), b"").await;
    })
    .await;
}

#[tokio::test]
async fn a_draining_of_a_connection_that_was_never_opened() {
    breaks(ID, "Draining", async |raw| raw.send(&draining(ConnectionId(7)), b"").await).await;
}

#[tokio::test]
async fn a_draining_of_the_session_itself() {
    breaks(ID, "Draining", async |raw| raw.send(&draining(ConnectionId::ROOT), b"").await).await;
}

/// `[session.drain.answer]`
#[tokio::test]
async fn a_drained_that_answers_nothing() {
    breaks_on(STATE, "Drained", async |raw, connection| raw.send(&Drained { connection }, b"").await).await;
}

/// `[session.drain.calls]`
#[tokio::test]
async fn a_call_after_the_word_that_there_is_none() {
    breaks_on(STATE, "Request", async |raw, connection| {
        raw.send(&request(connection, 1, NEVER), b"").await;
        raw.send(&request(connection, 3, DRAIN), b"").await;
        raw.expect::<Draining>().await;
        raw.send(&Drained { connection }, b"").await;
        raw.send(&request(connection, 5, ECHO), b"").await;
    })
    .await;
}

/// Calls that come although the server takes none any more: refused one by one, as often as the peer likes.
/// `[session.drain.refused]`
#[tokio::test]
async fn calls_without_end_on_a_connection_that_drains() {
    is_tolerated(async |raw, connection| {
        raw.send(&request(connection, 1, DRAIN), b"").await;
        raw.expect::<Draining>().await;
        for call in 0..5_000 {
            raw.send(&request(connection, 3 + 2 * call, NEVER), b"").await;
            while raw.expect::<Response>().await.status != Status::Refused {}
        }
    })
    .await;
}

/// A connection drained, with its answer, and closed, again and again, leaves nothing.
#[tokio::test]
async fn connections_drained_in_turn_without_end() {
    is_tolerated(async |raw, _| {
        for number in 1..2_000 {
            let connection = raw.connect(number).await;
            raw.send(&draining(connection), b"").await;
            raw.expect::<Drained>().await;
            raw.send(&close(connection), b"").await;
        }
    })
    .await;
}

/// `[session.open.answer]`
#[tokio::test]
async fn an_accept_of_nothing() {
    breaks(ID, "Accept", async |raw| {
        let (limits, metadata) = (ConnectionLimits::default(), Metadata::new());
        raw.send(&Accept { connection: ConnectionId(2), limits, metadata }, b"").await;
    })
    .await;
}

#[tokio::test]
async fn a_reject_of_nothing() {
    breaks(ID, "Reject", async |raw| {
        let (reason, metadata) = (Reason::none().into(), Metadata::new());
        raw.send(&Reject { connection: ConnectionId(2), reason, metadata }, b"").await;
    })
    .await;
}

#[tokio::test]
async fn an_accept_of_an_open_of_its_own() {
    breaks_on(STATE, "Accept", async |raw, connection| {
        let (limits, metadata) = (ConnectionLimits::default(), Metadata::new());
        raw.send(&Accept { connection, limits, metadata }, b"").await;
    })
    .await;
}

#[tokio::test]
async fn a_reject_of_a_connection_that_is_open() {
    breaks_on(STATE, "Reject", async |raw, connection| {
        let (reason, metadata) = (Reason::none().into(), Metadata::new());
        raw.send(&Reject { connection, reason, metadata }, b"").await;
    })
    .await;
}

/// `[session.open.silence]`: in one write, so that the call comes before the open can be answered.
#[tokio::test]
async fn a_call_before_the_open_is_answered() {
    breaks(STATE, "not answered", async |raw| {
        let open = framed(&body(&open(0), b""));
        let call = framed(&body(&request(ConnectionId(1), 1, ECHO), b""));
        raw.bytes(&[open, call].concat()).await;
    })
    .await;
}

/// `[session.id.known]`
async fn unknown<H: Header>(header: H) {
    breaks_on(ID, "never opened", async |raw, _| raw.send(&header, b"").await).await;
}

#[tokio::test]
async fn a_call_on_a_connection_that_was_never_opened() {
    unknown(request(ConnectionId(9), 1, ECHO)).await;
}

#[tokio::test]
async fn a_call_on_the_root() {
    unknown(request(ConnectionId(0), 1, ECHO)).await;
}

#[tokio::test]
async fn items_on_a_connection_that_was_never_opened() {
    unknown(items(ConnectionId(3), 1)).await;
}

#[tokio::test]
async fn a_window_for_a_connection_of_the_servers_half() {
    unknown(Window { connection: ConnectionId(2), limit: 1 << 30 }).await;
}

#[tokio::test]
async fn a_close_of_a_connection_that_was_never_opened() {
    unknown(close(ConnectionId(3))).await;
}

#[tokio::test]
async fn a_payment_on_a_connection_that_was_never_opened() {
    unknown(Payment { connection: ConnectionId(3) }).await;
}

#[tokio::test]
async fn a_payment_on_a_connection_without_prices() {
    breaks_on(STATE, "not a paid one", async |raw, connection| raw.send(&Payment { connection }, b"\0").await).await;
}

/// `[session.close.crossed]`: what crosses a Close is dropped.
#[tokio::test]
async fn frames_that_follow_a_close_are_dropped() {
    is_tolerated(async |raw, connection| {
        raw.send(&close(connection), b"").await;
        raw.send(&request(connection, 1, ECHO), b"").await;
        raw.send(&items(connection, 1), b"\0").await;
        raw.send(&Window { connection, limit: 1 << 30 }, b"").await;
        raw.send(&Stop { connection, stream: StreamId(1), code: 0 }, b"").await;
        raw.send(&Cancel { connection, call: CallId(1) }, b"").await;
        raw.send(&close(connection), b"").await;
    })
    .await;
}

#[tokio::test]
async fn a_service_that_nobody_serves_is_rejected_and_the_session_lives_on() {
    is_tolerated(async |raw, _| {
        raw.send(&Open { service: "nothing".into(), ..open(1) }, b"").await;
        rejected(raw, UNKNOWN_SERVICE).await;
        raw.connect(2).await;
    })
    .await;
}

/// `[session.open.capacity]`
#[tokio::test]
async fn connections_above_the_limit_are_rejected_and_the_session_lives_on() {
    let stage = Stage::with(|config| config.session.protocol.limits.max_connections = 3).await;
    let mut raw = Raw::shaken(&stage).await;
    for number in 0..3 {
        raw.connect(number).await;
    }
    for number in 3..20 {
        raw.send(&open(number), b"").await;
        rejected(&mut raw, AT_CAPACITY).await;
    }
    raw.send(&close(ConnectionId(1)), b"").await;
    raw.expect::<Close>().await;
    raw.connect(20).await;
    stage.is_well().await;
}

/// Lesson 6: a peer that closes the root leaves no zombie.
#[tokio::test]
async fn a_close_of_the_root_ends_the_session_with_everything_in_it() {
    let stage = Stage::new().await;
    let mut raw = Raw::shaken(&stage).await;
    let connection = raw.connect(0).await;
    raw.send(&request(connection, 1, NEVER), b"").await;
    raw.send(&close(ConnectionId::ROOT), b"").await;
    raw.ends().await;
    stage.is_well().await;
}

#[tokio::test]
async fn a_protocol_error_of_the_peer_ends_the_session_without_an_answer() {
    let stage = Stage::new().await;
    let mut raw = Raw::shaken(&stage).await;
    raw.connect(0).await;
    raw.send(&ProtocolError { reason: Reason::new(STATE, "you").into() }, b"").await;
    raw.ends().await;
    stage.is_well().await;
}

//! Floods: what costs the peer little and the server much.

use std::time::Duration;

use tollway::protocol::id::{CallId, ConnectionId, StreamId};
use tollway::protocol::limits::{AbuseLimits, Rate};
use tollway::protocol::message::*;

use super::stage::*;

/// What a release build does a million times.
const MANY: u64 = if cfg!(debug_assertions) { 10_000 } else { 1_000_000 };

/// CVE-2019-9512: pings from a peer that does not read. `[session.ping.budget]`
#[tokio::test]
async fn a_flood_of_pings_that_nobody_reads() {
    breaks(ABUSE, "pings", async |raw| {
        let pings = framed(&body(&Ping { nonce: 7 }, b"")).repeat(1_000);
        for _ in 0..MANY / 1_000 {
            raw.bytes(&pings).await;
        }
    })
    .await;
}

/// `[session.extension.budget]`
#[tokio::test]
async fn a_flood_of_unknown_extensions() {
    breaks(ABUSE, "extensions", async |raw| {
        let frames = framed(&[200, 1, 2, 3]).repeat(1_000);
        for _ in 0..200 {
            raw.bytes(&frames).await;
        }
    })
    .await;
}

/// `[session.late.budget]`
#[tokio::test]
async fn a_flood_of_frames_for_a_closed_connection() {
    let few = Rate { burst: 10_000, per_second: 0 };
    let stage = Stage::with(|config| config.session.protocol.abuse.late_frames = few).await;
    let mut raw = Raw::shaken(&stage).await;
    let connection = raw.connect(0).await;
    raw.send(&close(connection), b"").await;
    let frames = framed(&body(&items(connection, 1), &[0])).repeat(10_001);
    raw.bytes(&frames).await;
    stage.is_well().await;
    raw.is_told(ABUSE, "closed connections").await;
    stage.is_well().await;
}

/// `[session.late.bound]`
#[tokio::test]
async fn a_flood_of_cancels_of_a_call_that_has_ended() {
    breaks_on(LIMIT, "cancels of calls", async |raw, connection| {
        raw.send(&request(connection, 1, ECHO), &[0]).await;
        raw.expect::<Response>().await;
        raw.bytes(&framed(&body(&Cancel { connection, call: CallId(1) }, b"")).repeat(1_024 + 9)).await;
    })
    .await;
}

#[tokio::test]
async fn a_flood_of_grants_for_a_stream_that_has_ended() {
    breaks_on(LIMIT, "grants for streams", async |raw, connection| {
        raw.send(&request(connection, 1, COUNT), b"").await;
        raw.expect::<End>().await;
        let credit = Credit { connection, stream: StreamId(2), limit: u64::MAX, consumed: 50 };
        raw.bytes(&framed(&body(&credit, b"")).repeat(1_024 + 17)).await;
    })
    .await;
}

/// CVE-2025-8671: endless opens that are refused: GoAway, and then the end. `[session.refusal.budget]`
#[tokio::test]
async fn a_flood_of_opens_for_services_that_nobody_serves() {
    let few = Rate { burst: 1_000, per_second: 0 };
    let stage = Stage::with(|config| config.session.protocol.abuse.refusals = few).await;
    let mut raw = Raw::shaken(&stage).await;
    let bad = |number| framed(&body(&Open { service: "nothing".into(), ..open(number) }, b""));
    let flood = |from: u64, to: u64| (from..to).flat_map(bad).collect::<Vec<_>>();
    raw.bytes(&flood(0, 1_001)).await;
    let away = raw.expect::<GoAway>().await;
    assert_eq!(away.reason.code, ABUSE);
    raw.answers().await;
    stage.is_well().await;
    raw.bytes(&flood(1_001, 2_100)).await;
    raw.is_told(ABUSE, "refused opens").await;
    stage.is_well().await;
}

/// Honest churn at full speed is not abuse, however little is allowed. `[session.work.budget]`
#[tokio::test]
async fn opening_and_closing_in_turn_without_end_is_no_abuse() {
    let none = Rate { burst: 1, per_second: 0 };
    let stage = Stage::with(|config| {
        let pings = Rate { burst: 10, per_second: 0 };
        // One read brings at most 1,024 frames, and what it opens is answered after it.
        let abuse = AbuseLimits { unfinished_work: 512, refusals: none, pings, extensions: none, late_frames: none };
        config.session.protocol.abuse = abuse;
    })
    .await;
    let mut raw = Raw::shaken(&stage).await;
    // A window of a hundred, so that the wire is always full.
    for number in 0..MANY + 100 {
        if number < MANY {
            let (open, connection) = (open(number), ConnectionId(2 * number + 1));
            raw.bytes(&[framed(&body(&open, b"")), framed(&body(&close(connection), b""))].concat()).await;
        }
        if number >= 100 {
            raw.expect::<Close>().await;
        }
    }
    raw.answers().await;
    raw.connect(MANY).await;
    stage.is_well().await;
}

/// CVE-2023-44487 with handlers that end when they are cancelled: each open, call and close is forgotten.
#[tokio::test]
async fn opening_calling_and_closing_without_end_leaves_no_handler_behind() {
    let stage = Stage::new().await;
    let mut raw = Raw::shaken(&stage).await;
    for number in 0..1_000 {
        let connection = raw.connect(number).await;
        let call = framed(&body(&request(connection, 1, NEVER), b""));
        raw.bytes(&[call, framed(&body(&close(connection), b""))].concat()).await;
        raw.expect::<Close>().await;
        if number % 250 == 0 {
            stage.is_well().await;
        }
    }
    raw.answers().await;
    stage.is_well().await;
}

/// CVE-2023-44487 with opens that take long to answer, as of a payee that verifies: GoAway at the budget, the end at
/// twice as much. `[session.work.budget]`
#[tokio::test]
async fn handlers_that_cannot_keep_up_with_the_closes_lead_to_go_away() {
    let stage = Stage::with(|config| config.session.protocol.abuse.unfinished_work = 8).await;
    let mut raw = Raw::shaken(&stage).await;
    for number in 0..5 {
        raw.connect(number).await;
    }
    // In one write, so that no handler runs in between: four calls on each of five connections, and all closed.
    let calls = (0..5u64).flat_map(|number| {
        let connection = ConnectionId(2 * number + 1);
        let calls = (0..4u64).map(move |call| framed(&body(&request(connection, 2 * call + 1, NEVER), b"")));
        calls.chain([framed(&body(&close(connection), b""))]).flatten().collect::<Vec<_>>()
    });
    raw.bytes(&calls.collect::<Vec<_>>()).await;
    raw.is_told(ABUSE, "unfinished work").await;
    stage.is_well().await;
}

/// Streams that are filled, ended and never read: they count until they are dropped. `[session.memory.bound]`
#[tokio::test]
async fn streams_that_fill_the_memory_budget_are_stopped_and_their_session_alone_has_no_more() {
    let stage = Stage::with(|config| config.session.protocol.memory.session = 10_000).await;
    let mut raw = Raw::shaken(&stage).await;
    // Ten connections with three streams each would be 30,000 bytes.
    for number in 0..10 {
        let connection = raw.connect(number).await;
        let slots = (0..3).map(|number| upload(2 * number + 1)).collect();
        raw.send(&Request { slots, ..request(connection, 1, HOLD) }, b"\0").await;
    }
    // HOLD keeps one of each three; the others are stopped by their drop, before or after there is no room for them.
    let mut refused = 0;
    raw.send(&Ping { nonce: 4_711 }, b"").await;
    loop {
        let (kind, mut frame) = within(raw.next()).await.expect("the session lives");
        match kind {
            Stop::KIND => {
                refused += usize::from(decode_header::<Stop>(&mut frame).unwrap().code == AT_CAPACITY);
            }
            Pong::KIND if decode_header::<Pong>(&mut frame).unwrap().nonce == 4_711 => break,
            ProtocolError::KIND => panic!("nobody broke a rule"),
            _ => {}
        }
    }
    assert!(refused > 0, "there was room for all");
    stage.is_well().await;
}

/// A call for whose body there is no room is answered, and the session lives. `[session.memory.bound]`
#[tokio::test]
async fn bodies_beyond_the_memory_budget_are_answered_at_capacity() {
    let stage = Stage::with(|config| config.session.protocol.memory.session = 1_500).await;
    let mut raw = Raw::shaken(&stage).await;
    let connection = raw.connect(0).await;
    raw.send(&request(connection, 1, NEVER), &[0; 1_000]).await;
    raw.send(&request(connection, 3, NEVER), &[0; 1_000]).await;
    let refused = raw.expect::<Response>().await;
    assert_eq!((refused.call, refused.status), (CallId(3), Status::AtCapacity));
    raw.send(&Cancel { connection, call: CallId(1) }, b"").await;
    assert_eq!(raw.expect::<Response>().await.status, Status::Cancelled);
    raw.send(&request(connection, 5, LARGE), &[0; 1_000]).await;
    assert_eq!(raw.expect::<Response>().await.status, Status::Ok);
    stage.is_well().await;
}

/// Hundreds of clients that send a byte and wait, more than may be unauthenticated at once: the honest ones get in all the
/// same.
#[tokio::test]
async fn clients_of_one_byte_keep_nobody_out() {
    let stage = Stage::with(|config| config.max_handshakes = 64).await;
    let mut crowd = Vec::new();
    for _ in 0..500 {
        let mut raw = Raw::dial(&stage).await;
        raw.bytes(b"T").await;
        crowd.push(raw);
    }
    stage.is_well().await;
    let mut late = Raw::shaken(&stage).await;
    late.connect(0).await;
    drop(crowd);
    stage.is_well().await;
}

/// Everything at once, and the honest session in between.
#[tokio::test]
async fn ten_floods_at_once_leave_a_neighbour_well() {
    let stage = std::sync::Arc::new(Stage::new().await);
    let floods: Vec<_> = (0..10u64)
        .map(|kind| {
            let stage = stage.clone();
            tokio::spawn(async move {
                let mut raw = Raw::shaken(&stage).await;
                let connection = raw.connect(0).await;
                let frame = match kind % 5 {
                    0 => body(&Ping { nonce: 7 }, b""),
                    1 => vec![200],
                    2 => body(&Cancel { connection, call: CallId(1) }, b""),
                    3 => body(&items(connection, 1), &[0; 100]),
                    _ => body(&Window { connection, limit: 0 }, b""),
                };
                let frames = framed(&frame).repeat(500);
                for _ in 0..200 {
                    raw.bytes(&frames).await;
                }
            })
        })
        .collect();
    while floods.iter().any(|flood| !flood.is_finished()) {
        stage.is_well().await;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    stage.is_well().await;
}

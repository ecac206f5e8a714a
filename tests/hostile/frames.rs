//! Frames that are no frames.

use tokio::io::AsyncWriteExt;
use tollway::protocol::error::Reason;
use tollway::protocol::id::ConnectionId;
use tollway::protocol::message::*;

use super::stage::*;

/// `[session.frame.length]`
#[tokio::test]
async fn a_frame_without_a_kind() {
    breaks(MALFORMED, "empty frame", async |raw| raw.bytes(&[0; 4]).await).await;
}

/// `[session.frame.max]`
#[tokio::test]
async fn a_frame_one_byte_above_the_limit_is_refused_by_its_length() {
    let over = (1u32 << 20) + 32 * 1024 + 1;
    breaks(LIMIT, &over.to_string(), async |raw| raw.bytes(&over.to_le_bytes()).await).await;
}

#[tokio::test]
async fn a_frame_of_four_gib_is_refused_by_its_length() {
    breaks(LIMIT, "4294967295", async |raw| raw.bytes(&[0xff; 4]).await).await;
}

/// `[session.frame.extension]`
#[tokio::test]
async fn the_lowest_unknown_kind() {
    breaks(UNKNOWN_KIND, "kind 9", async |raw| raw.frame(&[9]).await).await;
}

#[tokio::test]
async fn the_highest_kind_that_must_be_known() {
    breaks(UNKNOWN_KIND, "kind 127", async |raw| raw.frame(&[127]).await).await;
}

#[tokio::test]
async fn extensions_are_skipped() {
    is_tolerated(async |raw, _| {
        for kind in 128..=255 {
            raw.frame(&[kind, 0xff, 0xff]).await;
        }
    })
    .await;
}

/// `[session.frame.header]`
#[tokio::test]
async fn a_header_that_is_cut() {
    breaks(MALFORMED, "kind 16", async |raw| raw.frame(&body(&open(0), b"")[..4]).await).await;
}

#[tokio::test]
async fn a_varint_that_does_not_end() {
    breaks(MALFORMED, "kind 5", async |raw| raw.frame(&[[5].as_slice(), &[0xff; 10], &[1]].concat()).await).await;
}

#[tokio::test]
async fn a_varint_above_64_bits() {
    breaks(MALFORMED, "kind 5", async |raw| raw.frame(&[[5].as_slice(), &[0xff; 9], &[2]].concat()).await).await;
}

#[tokio::test]
async fn a_string_longer_than_its_frame() {
    breaks(MALFORMED, "kind 16", async |raw| raw.frame(&[16, 1, 0xff, 0xff, 0xff, 0xff, 0x0f, b'k']).await).await;
}

#[tokio::test]
async fn a_service_name_that_is_no_text() {
    breaks(MALFORMED, "kind 16", async |raw| {
        let mut open = body(&open(0), b"");
        let at = open.windows(3).position(|bytes| bytes == b"kit").unwrap();
        open[at] = 0xff;
        raw.frame(&open).await;
    })
    .await;
}

#[tokio::test]
async fn a_list_of_four_thousand_million_slots() {
    breaks_on(MALFORMED, "kind 48", async |raw, _| {
        raw.frame(&[48, 1, 1, 0xff, 0xff, 0xff, 0xff, 0x0f]).await;
    })
    .await;
}

#[tokio::test]
async fn a_status_that_does_not_exist() {
    breaks_on(MALFORMED, "kind 33", async |raw, _| raw.frame(&[33, 1, 2, 99, 0, 0, 0]).await).await;
}

/// `[session.frame.payload]`
#[tokio::test]
async fn a_payload_behind_a_ping() {
    breaks(STATE, "payload of 1", async |raw| raw.send(&Ping { nonce: 1 }, b"x").await).await;
}

#[tokio::test]
async fn a_payload_behind_a_close() {
    breaks_on(STATE, "payload of 3", async |raw, connection| raw.send(&close(connection), b"bye").await).await;
}

#[tokio::test]
async fn a_pong_that_answers_nothing() {
    breaks(STATE, "pong", async |raw| raw.send(&Pong { nonce: 99 }, b"").await).await;
}

#[tokio::test]
async fn a_second_go_away() {
    breaks(STATE, "GoAway", async |raw| {
        let away = GoAway { last: ConnectionId(0), reason: Reason::none().into() };
        raw.send(&away, b"").await;
        raw.send(&away, b"").await;
    })
    .await;
}

/// `[session.go-away.last]`
#[tokio::test]
async fn a_go_away_that_names_an_id_nobody_used() {
    breaks(ID, "GoAway", async |raw| {
        raw.send(&GoAway { last: ConnectionId(2), reason: Reason::none().into() }, b"").await;
    })
    .await;
}

#[tokio::test]
async fn a_go_away_that_names_an_id_of_its_own_half() {
    breaks_on(ID, "GoAway", async |raw, connection| {
        raw.send(&GoAway { last: connection, reason: Reason::none().into() }, b"").await;
    })
    .await;
}

/// The end inside a frame: nothing to answer, and nobody else notices.
#[tokio::test]
async fn a_conduit_that_ends_inside_a_frame() {
    let stage = Stage::new().await;
    let mut raw = Raw::shaken(&stage).await;
    raw.bytes(&[100, 0, 0, 0, 48, 1]).await;
    raw.stream.shutdown().await.unwrap();
    raw.ends().await;
    stage.is_well().await;
}

/// After a violation nothing is taken in any more. `[session.violation.once]`
#[tokio::test]
async fn a_hundred_violations_at_once_are_answered_once() {
    breaks(STATE, "pong", async |raw| {
        let pongs = framed(&body(&Pong { nonce: 99 }, b"")).repeat(100);
        raw.bytes(&pongs).await;
    })
    .await;
}

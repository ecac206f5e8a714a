//! Items, ends and credit that break the rules of streams.

use tollway::protocol::id::{ConnectionId, StreamId};
use tollway::protocol::message::*;

use super::stage::*;

/// A call that takes stream 1 and never reads it.
async fn hold(raw: &mut Raw, connection: ConnectionId) {
    raw.send(&Request { slots: vec![upload(1)], ..request(connection, 1, HOLD) }, b"\0").await;
}

/// A call whose answer brings stream 2, of numbers.
async fn count(raw: &mut Raw, connection: ConnectionId) {
    raw.send(&request(connection, 1, COUNT), b"").await;
    assert_eq!(raw.expect::<Response>().await.slots.len(), 1);
}

async fn bad_items(code: u32, text: &str, payload: &[u8]) {
    breaks_on(code, text, async |raw, connection| {
        hold(raw, connection).await;
        raw.send(&items(connection, 1), payload).await;
    })
    .await;
}

/// `[stream.items.whole]`
#[tokio::test]
async fn items_without_an_item() {
    bad_items(MALFORMED, "no item", b"").await;
}

#[tokio::test]
async fn an_item_that_is_cut() {
    bad_items(MALFORMED, "cut", &[1, 7, 5, 1, 2]).await;
}

#[tokio::test]
async fn a_length_that_is_cut() {
    bad_items(MALFORMED, "varint", &[1, 7, 0x80]).await;
}

/// `[stream.items.canonical]`
#[tokio::test]
async fn a_length_that_is_longer_than_needed() {
    bad_items(MALFORMED, "varint", &[0x81, 0x00, 7]).await;
}

#[tokio::test]
async fn a_length_above_32_bits() {
    bad_items(MALFORMED, "varint", &[0xff, 0xff, 0xff, 0xff, 0x1f, 7]).await;
}

#[tokio::test]
async fn an_item_one_byte_above_the_limit() {
    bad_items(LIMIT, "item: 501", &[[0xf5, 0x03].as_slice(), &[0; 501]].concat()).await;
}

#[tokio::test]
async fn two_items_with_slots() {
    breaks_on(MALFORMED, "travels alone", async |raw, connection| {
        hold(raw, connection).await;
        raw.send(&Items { slots: vec![upload(3)], ..items(connection, 1) }, &[0, 0]).await;
    })
    .await;
}

/// `[stream.credit.start]`
#[tokio::test]
async fn an_item_without_credit() {
    breaks_on(CREDIT, "item without credit", async |raw, connection| {
        hold(raw, connection).await;
        let item = [[0xf4, 0x03].as_slice(), &[0; 500]].concat();
        // 516 of 1,000 each: the second passes the credit, a third may not start.
        for _ in 0..3 {
            raw.send(&items(connection, 1), &item).await;
        }
    })
    .await;
}

/// h2 RUSTSEC-2026-0258: empty items are not free. `[stream.credit.overhead]`
#[tokio::test]
async fn empty_items_without_end_are_stopped_by_the_credit() {
    breaks_on(CREDIT, "item without credit", async |raw, connection| {
        hold(raw, connection).await;
        // 63 start below 1,000 at 16 each.
        let frame = framed(&body(&items(connection, 1), &[0; 9]));
        raw.bytes(&frame.repeat(7)).await;
        raw.answers().await;
        raw.send(&items(connection, 1), &[0]).await;
    })
    .await;
}

/// `[stream.end.last]`
#[tokio::test]
async fn items_after_the_end() {
    breaks_on(STATE, "has ended", async |raw, connection| {
        hold(raw, connection).await;
        raw.send(&End { connection, stream: StreamId(1) }, b"").await;
        raw.send(&items(connection, 1), &[0]).await;
    })
    .await;
}

#[tokio::test]
async fn items_after_a_reset() {
    breaks_on(STATE, "has ended", async |raw, connection| {
        hold(raw, connection).await;
        raw.send(&Reset { connection, stream: StreamId(1), code: 0 }, b"").await;
        raw.send(&items(connection, 1), &[0]).await;
    })
    .await;
}

/// `[stream.end.once]`
#[tokio::test]
async fn a_second_end() {
    breaks_on(STATE, "has ended", async |raw, connection| {
        hold(raw, connection).await;
        raw.send(&End { connection, stream: StreamId(1) }, b"").await;
        raw.send(&End { connection, stream: StreamId(1) }, b"").await;
    })
    .await;
}

#[tokio::test]
async fn a_reset_after_the_end() {
    breaks_on(STATE, "has ended", async |raw, connection| {
        hold(raw, connection).await;
        raw.send(&End { connection, stream: StreamId(1) }, b"").await;
        raw.send(&Reset { connection, stream: StreamId(1), code: 0 }, b"").await;
    })
    .await;
}

#[tokio::test]
async fn items_on_a_stream_that_was_never_announced() {
    breaks_on(ID, "Items for stream 1", async |raw, connection| raw.send(&items(connection, 1), &[0]).await).await;
}

#[tokio::test]
async fn items_on_a_stream_that_flows_the_other_way() {
    breaks_on(ID, "Items for stream 1", async |raw, connection| {
        raw.send(&Request { slots: vec![download(1)], ..request(connection, 1, NEVER) }, b"").await;
        raw.send(&items(connection, 1), &[0]).await;
    })
    .await;
}

#[tokio::test]
async fn an_end_of_a_stream_that_flows_the_other_way() {
    breaks_on(ID, "stream 1", async |raw, connection| {
        raw.send(&Request { slots: vec![download(1)], ..request(connection, 1, NEVER) }, b"").await;
        raw.send(&End { connection, stream: StreamId(1) }, b"").await;
    })
    .await;
}

#[tokio::test]
async fn credit_for_a_stream_of_its_own() {
    breaks_on(ID, "Credit for stream 1", async |raw, connection| {
        hold(raw, connection).await;
        raw.send(&Credit { connection, stream: StreamId(1), limit: 1 << 30, consumed: 0 }, b"").await;
    })
    .await;
}

#[tokio::test]
async fn a_stop_of_a_stream_of_its_own() {
    breaks_on(ID, "Stop for stream 1", async |raw, connection| {
        hold(raw, connection).await;
        raw.send(&Stop { connection, stream: StreamId(1), code: 0 }, b"").await;
    })
    .await;
}

/// `[stream.credit.monotonic]`
#[tokio::test]
async fn credit_that_goes_back() {
    breaks_on(CREDIT, "stream credit", async |raw, connection| {
        raw.send(&Request { slots: vec![download(1)], ..request(connection, 1, NEVER) }, b"").await;
        raw.send(&Credit { connection, stream: StreamId(1), limit: 5, consumed: 0 }, b"").await;
    })
    .await;
}

#[tokio::test]
async fn credit_for_a_stream_that_has_ended_is_dropped() {
    is_tolerated(async |raw, connection| {
        count(raw, connection).await;
        raw.expect::<End>().await;
        raw.send(&Credit { connection, stream: StreamId(2), limit: u64::MAX, consumed: 50 }, b"").await;
        raw.send(&Stop { connection, stream: StreamId(2), code: 0 }, b"").await;
    })
    .await;
}

/// `[stream.stop.once]`: in one write, so that the first is not yet answered.
#[tokio::test]
async fn a_second_stop() {
    breaks_on(STATE, "Stop", async |raw, connection| {
        let slots = vec![download(1)];
        let call = framed(&body(&Request { slots, ..request(connection, 1, NEVER) }, b""));
        let stop = framed(&body(&Stop { connection, stream: StreamId(1), code: 0 }, b""));
        raw.bytes(&[call, stop.clone(), stop].concat()).await;
    })
    .await;
}

#[tokio::test]
async fn a_stop_for_a_stream_that_was_never_announced() {
    breaks_on(ID, "Stop for stream 2", async |raw, connection| {
        raw.send(&Stop { connection, stream: StreamId(2), code: 0 }, b"").await;
    })
    .await;
}

/// A stream that was stopped is still bounded by its credit.
#[tokio::test]
async fn items_without_credit_on_a_stream_that_is_not_wanted() {
    breaks_on(CREDIT, "item without credit", async |raw, connection| {
        // ECHO takes no stream, so this one is stopped at once.
        raw.send(&Request { slots: vec![upload(1)], ..request(connection, 1, ECHO) }, b"\0").await;
        raw.expect::<Stop>().await;
        let item = [[0xf4, 0x03].as_slice(), &[0; 500]].concat();
        for _ in 0..3 {
            raw.send(&items(connection, 1), &item).await;
        }
    })
    .await;
}

//! Calls, answers and windows that break the rules.

use tollway::protocol::id::CallId;
use tollway::protocol::message::*;
use tollway::protocol::metadata::Metadata;
use tollway::protocol::payment::Amount;

use super::stage::*;

/// `[call.id.next]`
async fn bad_call_id(ids: &[u64]) {
    breaks_on(ID, "call id", async |raw, connection| {
        for &id in ids {
            raw.send(&request(connection, id, NEVER), b"").await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_call_id_that_leaves_a_gap() {
    bad_call_id(&[3]).await;
}

#[tokio::test]
async fn a_call_id_that_was_used() {
    bad_call_id(&[1, 1]).await;
}

#[tokio::test]
async fn a_call_id_of_the_servers_half() {
    bad_call_id(&[2]).await;
}

#[tokio::test]
async fn a_call_id_of_zero() {
    bad_call_id(&[0]).await;
}

#[tokio::test]
async fn a_body_one_byte_above_the_limit() {
    breaks_on(LIMIT, "body: 1001", async |raw, connection| {
        raw.send(&request(connection, 1, NEVER), &[0; 1_001]).await;
    })
    .await;
}

/// `[call.max]`
#[tokio::test]
async fn a_call_more_than_may_be_open() {
    breaks_on(LIMIT, "open calls: 5", async |raw, connection| {
        for number in 0..5 {
            raw.send(&request(connection, 2 * number + 1, NEVER), b"").await;
        }
    })
    .await;
}

/// Cancelling does not make room: the handler still runs. `[call.max]`
#[tokio::test]
async fn calls_that_are_cancelled_and_not_yet_answered_count() {
    breaks_on(LIMIT, "open calls: 5", async |raw, connection| {
        let frames = (0..5u64).flat_map(|number| {
            let cancel = Cancel { connection, call: CallId(2 * number + 1) };
            [framed(&body(&request(connection, 2 * number + 1, NEVER), b"")), framed(&body(&cancel, b""))]
        });
        // One write: no handler can answer in between.
        raw.bytes(&frames.collect::<Vec<_>>().concat()).await;
    })
    .await;
}

/// `[call.window.start]`
#[tokio::test]
async fn a_body_without_window() {
    breaks_on(CREDIT, "body without credit", async |raw, connection| {
        // 2,500 bytes of window: the third starts at 2,000, a fourth may not start.
        for number in 0..4 {
            raw.send(&request(connection, 2 * number + 1, NEVER), &[0; 1_000]).await;
        }
    })
    .await;
}

/// `[call.window.monotonic]`
#[tokio::test]
async fn a_window_that_goes_back() {
    breaks_on(CREDIT, "body window", async |raw, connection| raw.send(&Window { connection, limit: 5 }, b"").await)
        .await;
}

#[tokio::test]
async fn a_window_that_does_not_rise() {
    breaks_on(CREDIT, "body window", async |raw, connection| {
        raw.send(&Window { connection, limit: 1 << 20 }, b"").await;
    })
    .await;
}

#[tokio::test]
async fn a_window_of_all_there_is() {
    is_tolerated(async |raw, connection| {
        raw.send(&Window { connection, limit: u64::MAX }, b"").await;
        raw.send(&request(connection, 1, LARGE), b"").await;
        raw.expect::<Response>().await;
    })
    .await;
}

fn response(connection: tollway::protocol::id::ConnectionId, call: u64) -> Response {
    let (status, charged, metadata) = (Status::Ok, Amount::ZERO, Metadata::new());
    Response { connection, call: CallId(call), status, charged, metadata, slots: vec![] }
}

/// `[call.end.once]`
#[tokio::test]
async fn an_answer_to_a_call_that_was_never_made() {
    breaks_on(ID, "Response for call 2", async |raw, connection| raw.send(&response(connection, 2), b"").await).await;
}

#[tokio::test]
async fn an_answer_to_its_own_call() {
    breaks_on(ID, "Response for call 1", async |raw, connection| {
        raw.send(&request(connection, 1, NEVER), b"").await;
        raw.send(&response(connection, 1), b"").await;
    })
    .await;
}

/// `[call.end.done]`
#[tokio::test]
async fn a_done_for_a_call_that_was_never_made() {
    breaks_on(ID, "Done for call 2", async |raw, connection| {
        raw.send(&Done { connection, call: CallId(2), charged: Amount::ZERO }, b"").await;
    })
    .await;
}

#[tokio::test]
async fn a_cancel_of_a_call_that_was_never_made() {
    breaks_on(ID, "Cancel for call 1", async |raw, connection| {
        raw.send(&Cancel { connection, call: CallId(1) }, b"").await;
    })
    .await;
}

/// `[call.cancel.once]`: in one write, so that the first is not yet answered.
#[tokio::test]
async fn a_second_cancel() {
    breaks_on(STATE, "Cancel", async |raw, connection| {
        let cancel = framed(&body(&Cancel { connection, call: CallId(1) }, b""));
        let call = framed(&body(&request(connection, 1, NEVER), b""));
        raw.bytes(&[call, cancel.clone(), cancel].concat()).await;
    })
    .await;
}

#[tokio::test]
async fn a_cancel_that_crosses_the_answer_is_dropped() {
    is_tolerated(async |raw, connection| {
        raw.send(&request(connection, 1, LARGE), b"").await;
        raw.expect::<Response>().await;
        raw.send(&Cancel { connection, call: CallId(1) }, b"").await;
    })
    .await;
}

#[tokio::test]
async fn a_call_with_too_much_metadata() {
    breaks_on(LIMIT, "metadata", async |raw, connection| {
        let metadata = Metadata::new().with("", vec![0; 16 * 1024 + 1]);
        raw.send(&Request { metadata, ..request(connection, 1, ECHO) }, b"").await;
    })
    .await;
}

/// `[stream.slots.max]`
#[tokio::test]
async fn a_call_with_too_many_slots() {
    breaks_on(LIMIT, "slots in one frame: 1025", async |raw, connection| {
        let slots = (0..1_025).map(|number| upload(2 * number + 1)).collect();
        raw.send(&Request { slots, ..request(connection, 1, HOLD) }, b"").await;
    })
    .await;
}

/// `[stream.max]`
#[tokio::test]
async fn a_call_with_more_streams_than_may_be_open() {
    breaks_on(LIMIT, "open streams: 5", async |raw, connection| {
        let slots = (0..5).map(|number| upload(2 * number + 1)).collect();
        raw.send(&Request { slots, ..request(connection, 1, HOLD) }, b"\0").await;
    })
    .await;
}

/// `[stream.id.next]`
#[tokio::test]
async fn a_slot_with_an_id_that_leaves_a_gap() {
    breaks_on(ID, "stream id 3", async |raw, connection| {
        raw.send(&Request { slots: vec![upload(3)], ..request(connection, 1, HOLD) }, b"\0").await;
    })
    .await;
}

#[tokio::test]
async fn a_slot_with_an_id_that_was_used() {
    breaks_on(ID, "stream id 1", async |raw, connection| {
        raw.send(&Request { slots: vec![upload(1), upload(1)], ..request(connection, 1, HOLD) }, b"\0").await;
    })
    .await;
}

#[tokio::test]
async fn a_slot_with_an_id_of_the_servers_half() {
    breaks_on(ID, "stream id 2", async |raw, connection| {
        raw.send(&Request { slots: vec![download(2)], ..request(connection, 1, HOLD) }, b"\0").await;
    })
    .await;
}

#[tokio::test]
async fn a_method_that_does_not_exist_is_answered() {
    is_tolerated(async |raw, connection| {
        raw.send(&request(connection, 1, 99), b"").await;
        assert_eq!(raw.expect::<Response>().await.status, Status::UnknownMethod);
    })
    .await;
}

#[tokio::test]
async fn arguments_that_are_none_are_answered() {
    is_tolerated(async |raw, connection| {
        raw.send(&request(connection, 1, ECHO), &[0xff; 20]).await;
        assert_eq!(raw.expect::<Response>().await.status, Status::InvalidPayload);
    })
    .await;
}

/// A length in the arguments that is far beyond them must not be believed.
#[tokio::test]
async fn arguments_that_promise_gigabytes_are_answered() {
    is_tolerated(async |raw, connection| {
        raw.send(&request(connection, 1, ECHO), &[0xff, 0xff, 0xff, 0xff, 0x0f, 1]).await;
        assert_eq!(raw.expect::<Response>().await.status, Status::InvalidPayload);
    })
    .await;
}

/// A slot in the arguments that the frame does not announce.
#[tokio::test]
async fn arguments_with_a_stream_that_nobody_announced_end_the_call_alone() {
    is_tolerated(async |raw, connection| {
        raw.send(&request(connection, 1, HOLD), &[7]).await;
        raw.send(&Cancel { connection, call: CallId(1) }, b"").await;
        assert_eq!(raw.expect::<Response>().await.status, Status::Cancelled);
    })
    .await;
}

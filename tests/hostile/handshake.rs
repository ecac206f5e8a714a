//! Hellos that are wrong, twice, or missing. `[session.handshake.first]`

use tollway::protocol::error::{Reason, code};
use tollway::protocol::frame::PREFACE;
use tollway::protocol::id::ConnectionId;
use tollway::protocol::limits::SessionLimits;
use tollway::protocol::message::*;
use tollway::protocol::metadata::Metadata;

use super::stage::*;

#[tokio::test]
async fn a_ping_before_the_hello() {
    breaks_unshaken(STATE, "handshake", async |raw| raw.send(&Ping { nonce: 1 }, b"").await).await;
}

#[tokio::test]
async fn an_open_before_the_hello() {
    breaks_unshaken(STATE, "handshake", async |raw| raw.send(&open(0), b"").await).await;
}

/// `[session.frame.extension]`
#[tokio::test]
async fn an_extension_before_the_hello() {
    breaks_unshaken(STATE, "handshake", async |raw| raw.frame(&[200, 1, 2, 3]).await).await;
}

#[tokio::test]
async fn an_unknown_kind_before_the_hello() {
    breaks_unshaken(STATE, "handshake", async |raw| raw.frame(&[99]).await).await;
}

#[tokio::test]
async fn a_close_of_a_connection_before_the_hello() {
    breaks_unshaken(STATE, "handshake", async |raw| raw.send(&close(ConnectionId(5)), b"").await).await;
}

#[tokio::test]
async fn an_empty_frame_before_the_hello() {
    breaks_unshaken(MALFORMED, "empty", async |raw| raw.bytes(&[0; 4]).await).await;
}

#[tokio::test]
async fn a_hello_that_is_cut() {
    breaks_unshaken(MALFORMED, "kind 0", async |raw| raw.frame(&body(&hello(), b"")[..5]).await).await;
}

#[tokio::test]
async fn a_hello_with_a_payload() {
    breaks_unshaken(STATE, "payload", async |raw| raw.send(&hello(), b"more").await).await;
}

#[tokio::test]
async fn a_hello_with_a_third_parity() {
    breaks_unshaken(MALFORMED, "kind 0", async |raw| raw.frame(&[0, 1, 1, 2, 0, 0, 0, 0]).await).await;
}

/// `[session.metadata.caps]`
#[tokio::test]
async fn a_hello_with_one_entry_of_metadata_too_many() {
    let metadata = (0..65).fold(Metadata::new(), |metadata, number| metadata.with(number.to_string(), "v"));
    breaks_unshaken(LIMIT, "65 entries", async |raw| raw.send(&Hello { metadata, ..hello() }, b"").await).await;
}

/// `[session.metadata.caps]`
#[tokio::test]
async fn a_hello_with_one_byte_of_metadata_too_many() {
    let metadata = Metadata::new().with("k", vec![0; 16 * 1024]);
    breaks_unshaken(LIMIT, "16385 bytes", async |raw| raw.send(&Hello { metadata, ..hello() }, b"").await).await;
}

#[tokio::test]
async fn a_hello_with_metadata_at_its_caps_is_fine() {
    let stage = Stage::new().await;
    let mut raw = Raw::dial(&stage).await;
    raw.bytes(&PREFACE).await;
    let metadata = (0..63).fold(Metadata::new(), |metadata, _| metadata.with("", ""));
    let metadata = metadata.with("k", vec![0; 16 * 1024 - 1]);
    raw.send(&Hello { metadata, ..hello() }, b"").await;
    raw.read_preface().await;
    raw.expect::<HelloAck>().await;
    stage.is_well().await;
}

#[tokio::test]
async fn a_hello_of_a_side_that_takes_no_frame() {
    let limits = SessionLimits { max_frame: 32_767, ..Default::default() };
    breaks_unshaken(LIMIT, "max_frame", async |raw| raw.send(&Hello { limits, ..hello() }, b"").await).await;
}

/// `[session.version.range]`
async fn is_refused(min_version: u16, max_version: u16) {
    let stage = Stage::new().await;
    let mut raw = Raw::dial(&stage).await;
    raw.bytes(&PREFACE).await;
    raw.send(&Hello { min_version, max_version, ..hello() }, b"").await;
    raw.read_preface().await;
    let reason = raw.expect::<Refuse>().await.reason;
    assert_eq!(reason.code, code::VERSION);
    assert!(reason.text.contains(&format!("{min_version} to {max_version}")), "{}", reason.text);
    assert!(raw.next().await.is_none());
    stage.is_well().await;
}

#[tokio::test]
async fn a_hello_of_the_future_is_refused_with_both_ranges() {
    is_refused(2, 9).await;
}

#[tokio::test]
async fn a_hello_of_the_past_is_refused() {
    is_refused(0, 0).await;
}

#[tokio::test]
async fn a_hello_with_an_empty_range_is_refused() {
    is_refused(3, 1).await;
}

#[tokio::test]
async fn a_hello_ack_to_a_server() {
    breaks_unshaken(STATE, "HelloAck", async |raw| {
        let ack = HelloAck { version: 1, limits: SessionLimits::default(), metadata: Metadata::new() };
        raw.send(&ack, b"").await;
    })
    .await;
}

#[tokio::test]
async fn a_refusal_to_a_server() {
    breaks_unshaken(STATE, "Refuse", async |raw| {
        raw.send(&Refuse { reason: Reason::none().into() }, b"").await;
    })
    .await;
}

#[tokio::test]
async fn a_second_hello() {
    breaks(STATE, "Hello", async |raw| raw.send(&hello(), b"").await).await;
}

#[tokio::test]
async fn a_hello_ack_in_an_open_session() {
    breaks(STATE, "HelloAck", async |raw| {
        let ack = HelloAck { version: 1, limits: SessionLimits::default(), metadata: Metadata::new() };
        raw.send(&ack, b"").await;
    })
    .await;
}

/// Nothing is answered to a peer that ends the session. `[session.violation.once]`
#[tokio::test]
async fn a_peer_that_gives_up_before_its_hello_gets_no_answer() {
    for last in [body(&close(ConnectionId::ROOT), b""), body(&ProtocolError { reason: Reason::none().into() }, b"")] {
        let stage = Stage::new().await;
        let mut raw = Raw::dial(&stage).await;
        raw.bytes(&PREFACE).await;
        raw.frame(&last).await;
        raw.ends().await;
        stage.is_well().await;
    }
}

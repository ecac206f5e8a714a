//! The first bytes: strangers, and peers that never come to their point. `[session.preface.stranger]`

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tollway::protocol::frame::PREFACE;
use tollway::protocol::message::HelloAck;

use super::stage::*;

/// Sends bytes and returns all that comes back until the end.
async fn answer_to(bytes: &[u8]) -> Vec<u8> {
    let stage = Stage::new().await;
    let mut raw = Raw::dial(&stage).await;
    raw.bytes(bytes).await;
    stage.is_well().await;
    let mut answer = Vec::new();
    let _reset = within(raw.stream.read_to_end(&mut answer)).await;
    stage.is_well().await;
    answer
}

#[tokio::test]
async fn an_http_client_gets_an_http_answer() {
    let answer = String::from_utf8(answer_to(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await).unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("Tollway"), "{answer}");
}

#[tokio::test]
async fn an_http2_client_gets_an_http_answer() {
    let answer = answer_to(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await;
    assert!(answer.starts_with(b"HTTP/1.1 400 "));
}

#[tokio::test]
async fn a_tls_client_gets_an_alert() {
    assert_eq!(answer_to(&[0x16, 0x03, 0x01, 0x00, 0x05, 1, 2, 3, 4, 5]).await, [0x15, 3, 1, 0, 2, 2, 0x46]);
}

#[tokio::test]
async fn another_generation_is_told_ours() {
    assert_eq!(answer_to(b"TOLLWAY\x02").await, PREFACE);
}

#[tokio::test]
async fn noise_is_told_our_preface() {
    assert_eq!(answer_to(&[0xff; 64]).await, PREFACE);
}

#[tokio::test]
async fn the_first_byte_that_differs_is_answered() {
    assert_eq!(answer_to(b"TOLLX").await, PREFACE);
}

#[tokio::test]
async fn a_peer_that_leaves_in_its_preface_harms_nobody() {
    for end in 0..PREFACE.len() {
        let stage = Stage::new().await;
        let mut raw = Raw::dial(&stage).await;
        raw.bytes(&PREFACE[..end]).await;
        raw.stream.shutdown().await.unwrap();
        let mut rest = Vec::new();
        let _reset = within(raw.stream.read_to_end(&mut rest)).await;
        stage.is_well().await;
    }
}

/// `[session.preface]`: a slow peer is no stranger.
#[tokio::test]
async fn a_preface_and_a_hello_byte_by_byte_open_a_session() {
    let stage = Stage::new().await;
    let mut raw = Raw::dial(&stage).await;
    for byte in [PREFACE.as_slice(), &framed(&body(&hello(), b""))].concat() {
        raw.bytes(&[byte]).await;
        tokio::task::yield_now().await;
    }
    raw.read_preface().await;
    raw.expect::<HelloAck>().await;
    stage.is_well().await;
}

#[tokio::test]
async fn a_length_of_four_gib_before_the_hello_is_refused_at_once() {
    breaks_unshaken(LIMIT, "4294967295", async |raw| raw.bytes(&[0xff; 4]).await).await;
}

/// Before the handshake has ended a frame has at most 64 KiB. `[session.frame.max]`
#[tokio::test]
async fn a_hello_of_more_than_64_kib_is_refused_by_its_length() {
    breaks_unshaken(LIMIT, "65537", async |raw| raw.bytes(&65_537u32.to_le_bytes()).await).await;
}

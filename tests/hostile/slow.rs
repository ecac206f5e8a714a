//! Peers that are slow or silent: each deadline, with its cause.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tollway::protocol::frame::PREFACE;
use tollway::protocol::message::*;

use super::stage::*;

fn short_handshake(config: &mut tollway::ServerConfig) {
    config.session.protocol.handshake_timeout = Duration::from_secs(3);
}

/// `[session.handshake.deadline]`
#[tokio::test]
async fn a_peer_that_says_nothing_is_given_up() {
    let stage = Stage::with(short_handshake).await;
    let mut silent = Vec::new();
    for first in [&b""[..], &PREFACE[..1], &PREFACE] {
        let mut raw = Raw::dial(&stage).await;
        raw.bytes(first).await;
        silent.push(raw);
    }
    for mut raw in silent {
        let mut rest = Vec::new();
        let _reset = within(raw.stream.read_to_end(&mut rest)).await;
    }
    stage.is_well().await;
}

/// A byte now and then does not move the deadline of the handshake. `[session.handshake.deadline]`
#[tokio::test]
async fn a_hello_that_trickles_is_given_up_at_the_deadline() {
    let stage = Stage::with(short_handshake).await;
    let mut raw = Raw::dial(&stage).await;
    raw.bytes(&PREFACE).await;
    raw.bytes(&60_000u32.to_le_bytes()).await;
    let mut rest = Vec::new();
    // The server closes in the middle of it.
    let given_up = async {
        loop {
            tokio::select! {
                read = raw.stream.read_buf(&mut rest) => if matches!(read, Ok(0) | Err(_)) { return },
                () = tokio::time::sleep(Duration::from_millis(20)) => {
                    let _gone = raw.stream.write_all(&[0]).await;
                }
            }
        }
    };
    within(given_up).await;
    stage.is_well().await;
}

/// `[session.keepalive.deadline]`, `[session.end.told]`
#[tokio::test]
async fn a_peer_that_falls_silent_is_pinged_and_then_told_why_it_ends() {
    let stage = Stage::with(|config| {
        config.session.protocol.ping_interval = Duration::from_secs(1);
        config.session.protocol.pong_timeout = Duration::from_secs(3);
    })
    .await;
    let mut raw = Raw::shaken(&stage).await;
    raw.expect::<Ping>().await;
    raw.is_closed(TIMEOUT).await;
    stage.is_well().await;
}

/// CVE-2019-9511, -9517: a reader of a byte a second, or of none, that pings all the time so that it looks alive. It is
/// ended because too little of what waits for it is taken. `[session.write.progress]`
async fn reads_too_little(pause: Option<Duration>) {
    let stage = Stage::with(|config| config.session.protocol.write_timeout = Duration::from_secs(2)).await;
    let mut raw = Raw::shaken(&stage).await;
    let connection = raw.connect(0).await;
    raw.send(&request(connection, 1, FLOOD), b"").await;
    let stream = raw.expect::<Response>().await.slots[0].stream;
    raw.send(&Credit { connection, stream, limit: u64::MAX, consumed: 0 }, b"").await;
    let ended = async {
        let mut last_read = tokio::time::Instant::now();
        // Writing fails when the server has closed with what it has not read.
        while raw.stream.write_all(&framed(&body(&Ping { nonce: 7 }, b""))).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
            if pause.is_some_and(|pause| last_read.elapsed() >= pause) {
                last_read = tokio::time::Instant::now();
                let _byte = raw.stream.try_read(&mut [0]);
            }
        }
    };
    within(ended).await;
    stage.is_well().await;
}

#[tokio::test]
async fn a_peer_that_reads_a_byte_a_second_is_ended() {
    reads_too_little(Some(Duration::from_secs(1))).await;
}

#[tokio::test]
async fn a_peer_that_reads_nothing_is_ended() {
    reads_too_little(None).await;
}

/// A peer that is slow but not too slow is served.
#[tokio::test]
async fn a_peer_that_reads_slowly_is_served() {
    let stage = Stage::with(|config| config.session.protocol.write_timeout = Duration::from_secs(20)).await;
    let mut raw = Raw::shaken(&stage).await;
    let connection = raw.connect(0).await;
    for number in 0..50 {
        raw.send(&request(connection, 2 * number + 1, LARGE), b"").await;
        tokio::time::sleep(Duration::from_millis(5)).await;
        raw.expect::<Response>().await;
    }
    raw.answers().await;
    stage.is_well().await;
}

/// `[session.idle.timeout]`
#[tokio::test]
async fn a_session_in_which_nothing_is_open_is_closed_if_the_server_wants_it_so() {
    let stage = Stage::with(|config| config.session.protocol.idle_timeout = Some(Duration::from_secs(2))).await;
    let mut raw = Raw::shaken(&stage).await;
    raw.is_closed(TIMEOUT).await;
    // The honest session has a connection.
    stage.is_well().await;
}

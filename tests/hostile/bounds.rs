//! A peer that misbehaves below the API: what it makes this side hold and do is bounded, and it is told what it broke.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tollway::conduit::memory::{self, MemoryConduit};
use tollway::conduit::{Conduit, ConduitError, FrameReader, FrameWriter, Lane, Lanes, PeerInfo, Received, Transmit};
use tollway::protocol::error::{Reason, SessionEnd, code};
use tollway::protocol::id::{ConnectionId, Parity};
use tollway::protocol::limits::{ConnectionLimits, SessionLimits};
use tollway::protocol::message::{
    Accept, Close, Head, Header, Hello, HelloAck, Open, Ping, ProtocolError, decode_header, encode_head,
};
use tollway::protocol::metadata::Metadata;
use tollway::rpc::{BoxReply, IncomingCall, MethodId, Reply, Service, Services};
use tollway::{Session, SessionConfig};

struct Idle;

impl Service for Idle {
    fn name(&self) -> &str {
        "idle"
    }

    fn call(&self, _: IncomingCall) -> BoxReply {
        Reply::ok(&()).boxed()
    }
}

fn frame(header: &impl Header) -> Transmit {
    Transmit { lane: Lane::ROOT, head: encode_head(header), payload: Bytes::new() }
}

fn hello() -> Hello {
    let (limits, metadata) = (SessionLimits::default(), Metadata::new());
    Hello { min_version: 1, max_version: 1, parity: Parity::Odd, limits, metadata }
}

/// A session that serves, and the bare conduit of its peer after the handshake.
async fn bare_peer(
    config: SessionConfig,
) -> (Session, <MemoryConduit as Conduit>::Reader, <MemoryConduit as Conduit>::Writer) {
    let (near, far) = memory::pair(64 * 1024);
    let (mut reader, mut writer) = far.split();
    let shake = async {
        writer.start_send(frame(&hello()));
        writer.flush().await.expect("a hello");
        let mut frames = Vec::new();
        while frames.is_empty() {
            reader.recv(&mut frames).await.expect("an answer");
        }
        writer.start_send(frame(&Ping { nonce: 1 }));
        writer.flush().await.expect("the first frame");
    };
    let (session, ()) = tokio::join!(Session::accept(near, config), shake);
    (session.expect("a session"), reader, writer)
}

/// Opens and closes a service for ever and reads nothing.
async fn does_not_read(service: &str) {
    let mut config = SessionConfig { services: Services::new().with(Idle), ..Default::default() };
    config.protocol.limits.max_connections = 16;
    let (_session, _reader, mut writer) = bare_peer(config).await;
    let churn = async {
        for number in 0..200_000u64 {
            let (connection, service) = (ConnectionId(2 * number + 1), service.to_owned());
            let (parity, limits, metadata) = (Parity::Odd, ConnectionLimits::default(), Metadata::new());
            writer.start_send(frame(&Open { connection, service, parity, limits, metadata: metadata.clone() }));
            writer.start_send(frame(&Close { connection, reason: Reason::none().into(), metadata }));
            if writer.buffered() > 16 * 1024 {
                writer.flush().await.expect("the session lives");
            }
        }
    };
    let taken = tokio::time::timeout(Duration::from_secs(3), churn).await;
    assert!(taken.is_err(), "200,000 opens and closes were answered to a peer that read nothing");
}

#[tokio::test]
async fn a_peer_that_does_not_read_how_its_closes_are_answered_is_not_read() {
    does_not_read("idle").await;
}

#[tokio::test]
async fn a_peer_that_does_not_read_its_rejects_is_not_read() {
    does_not_read("nothing of this name").await;
}

#[tokio::test]
async fn a_frame_above_the_limit_is_answered_with_what_it_broke() {
    let mut config = SessionConfig::default();
    config.protocol.limits.max_frame = 40_000;
    config.connection_limits = ConnectionLimits { max_item: 4_096, max_body: 4_096, ..Default::default() };
    let (session, mut reader, mut writer) = bare_peer(config).await;
    writer.start_send(Transmit { lane: Lane::ROOT, head: Head::from_slice(&[200]), payload: vec![0; 50_000].into() });
    // Not all of it may be taken.
    let _cut = tokio::time::timeout(Duration::from_secs(1), writer.flush()).await;
    let told = async {
        loop {
            let mut frames = Vec::new();
            let received = reader.recv(&mut frames).await.expect("a last word");
            assert_ne!(received, Received::End, "without a last word");
            if let Some((_, last)) = frames.iter_mut().find(|(_, frame)| frame[0] == ProtocolError::KIND) {
                return decode_header::<ProtocolError>(last).expect("a reason").reason;
            }
        }
    };
    let reason = tokio::time::timeout(Duration::from_secs(5), told).await.expect("in time");
    assert_eq!(reason.code, code::LIMIT);
    assert!(reason.text.contains("50001") && reason.text.contains("40000"), "{}", reason.text);
    assert!(matches!(session.closed().await, SessionEnd::PeerViolation(_)));
}

/// A conduit whose peer accepts one connection, says that it is alive, and never reads.
struct Stuck {
    flushes: Arc<AtomicUsize>,
}

struct StuckReader {
    frames: Vec<Head>,
    alive: tokio::time::Interval,
}

struct StuckWriter {
    flushes: Arc<AtomicUsize>,
    buffered: usize,
}

impl Conduit for Stuck {
    type Reader = StuckReader;
    type Writer = StuckWriter;

    fn lanes(&self) -> Lanes {
        Lanes::One
    }

    fn peer(&self) -> PeerInfo {
        PeerInfo::new("test", "stuck")
    }

    fn split(self) -> (StuckReader, StuckWriter) {
        let (limits, metadata) = (SessionLimits::default(), Metadata::new());
        let ack = encode_head(&HelloAck { version: 1, limits, metadata: metadata.clone() });
        let accept = Accept { connection: ConnectionId(1), limits: ConnectionLimits::default(), metadata };
        let alive = tokio::time::interval(Duration::from_millis(10));
        let frames = vec![encode_head(&accept), ack];
        (StuckReader { frames, alive }, StuckWriter { flushes: self.flushes, buffered: 0 })
    }
}

impl FrameReader for StuckReader {
    fn poll_recv(
        &mut self,
        cx: &mut Context<'_>,
        frames: &mut Vec<(Lane, Bytes)>,
    ) -> Poll<Result<Received, ConduitError>> {
        if self.alive.poll_tick(cx).is_pending() {
            return Poll::Pending;
        }
        match self.frames.pop() {
            Some(head) => {
                frames.push((Lane::ROOT, Bytes::copy_from_slice(&head)));
                Poll::Ready(Ok(Received::Frames))
            }
            None => Poll::Ready(Ok(Received::Progress)),
        }
    }

    fn poll_discard(&mut self, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }

    fn set_max_frame(&mut self, _: usize) {}
}

impl FrameWriter for StuckWriter {
    fn start_send(&mut self, frame: Transmit) {
        self.buffered += frame.head.len() + frame.payload.len();
    }

    fn buffered(&self) -> usize {
        self.buffered
    }

    fn written(&self) -> u64 {
        0
    }

    fn set_max_frame(&mut self, _: usize) {}

    fn poll_flush(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ConduitError>> {
        self.flushes.fetch_add(1, Ordering::Relaxed);
        Poll::Pending
    }

    fn poll_close(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ConduitError>> {
        Poll::Pending
    }
}

#[tokio::test]
async fn a_deadline_that_passes_while_a_send_is_stuck_keeps_nobody_busy() {
    let flushes = Arc::<AtomicUsize>::default();
    let mut config = SessionConfig::default();
    // Each byte that comes moves the deadline on, so it passes only where the driver looks at an old one.
    config.protocol.ping_interval = Duration::from_millis(50);
    let session = Session::connect(Stuck { flushes: flushes.clone() }, config).await.expect("a session");
    let idle =
        tokio::time::timeout(Duration::from_secs(1), session.open("idle")).await.expect("in time").expect("idle");
    let body = vec![0u8; 500_000];
    let began = Instant::now();
    let call = idle.call::<_, ()>(MethodId(1), &body);
    assert!(tokio::time::timeout(Duration::from_millis(100), call).await.is_err(), "nobody reads it");
    let before = flushes.load(Ordering::Relaxed);
    tokio::time::sleep(Duration::from_millis(400)).await;
    let looked = flushes.load(Ordering::Relaxed) - before;
    // It is woken by the 40 bytes and by the timer, some rounds each.
    assert!(looked < 1_000, "the driver looked {looked} times in 400 ms, {:?} after the call", began.elapsed());
}

/// A conduit whose reader panics, as a bug in it would make it do.
struct Buggy;

struct BuggyReader;

impl Conduit for Buggy {
    type Reader = BuggyReader;
    type Writer = StuckWriter;

    fn lanes(&self) -> Lanes {
        Lanes::One
    }

    fn peer(&self) -> PeerInfo {
        PeerInfo::new("test", "buggy")
    }

    fn split(self) -> (BuggyReader, StuckWriter) {
        (BuggyReader, StuckWriter { flushes: Arc::default(), buffered: 0 })
    }
}

impl FrameReader for BuggyReader {
    fn poll_recv(&mut self, _: &mut Context<'_>, _: &mut Vec<(Lane, Bytes)>) -> Poll<Result<Received, ConduitError>> {
        panic!("a bug");
    }

    fn poll_discard(&mut self, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }

    fn set_max_frame(&mut self, _: usize) {}
}

/// Lesson 9: liveness follows the session's task, panics included.
#[tokio::test]
async fn a_session_whose_task_panics_has_ended_for_everybody() {
    let waits = tokio::time::timeout(Duration::from_secs(30), Session::connect(Buggy, SessionConfig::default()));
    let failed = waits.await.expect("nobody waits for ever").expect_err("a panic opens no session");
    assert!(matches!(failed.end, SessionEnd::ConduitLost(_)), "{failed}");
}

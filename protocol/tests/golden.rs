//! Golden frames: `vectors/frames.json` has frames of every kind, and the first bytes of strangers with their answers, for
//! whoever writes another implementation. Each is encoded and decoded here, both ways.
//!
//! After a deliberate change of the wire, `TOLLWAY_WRITE_VECTORS=1 cargo test -p tollway-protocol --test golden` writes the
//! file anew.
#![allow(clippy::unwrap_used)]

use std::fmt::Debug;
use std::path::Path;

use bytes::{Bytes, BytesMut};
use serde_json::{Value, json};
use tollway_protocol::error::{Reason, code};
use tollway_protocol::frame::{FrameDecoder, PREFACE, PrefaceCheck, Stranger, check_preface};
use tollway_protocol::id::{CallId, ConnectionId, Parity, StreamId};
use tollway_protocol::limits::{ConnectionLimits, SessionLimits};
use tollway_protocol::message::*;
use tollway_protocol::metadata::{Entry, Metadata, NO_PROPAGATE, SENSITIVE};
use tollway_protocol::payment::Amount;

/// A frame as it stands on a conduit of bytes: length, kind, header, payload.
struct Golden {
    name: &'static str,
    kind: u8,
    meaning: &'static str,
    bytes: Vec<u8>,
}

/// Encodes, and checks that decoding gives back what was encoded.
fn golden<H: Header + PartialEq + Debug>(meaning: &'static str, header: &H, payload: &[u8]) -> Golden {
    let body = [encode_head(header).as_slice(), payload].concat();
    let bytes = [u32::try_from(body.len()).unwrap().to_le_bytes().as_slice(), &body].concat();
    let mut buffer = BytesMut::from(bytes.as_slice());
    let mut frame = FrameDecoder::new(1 << 20).decode(&mut buffer).unwrap().unwrap();
    assert!(buffer.is_empty());
    assert_eq!(
        (frame[0], &decode_header::<H>(&mut frame).unwrap(), &frame[..]),
        (H::KIND, header, payload),
        "{meaning}"
    );
    Golden { name: H::NAME, kind: H::KIND, meaning, bytes }
}

fn reason(code: u32, text: &str) -> WireReason {
    Reason::new(code, text).into()
}

fn session_frames() -> Vec<Golden> {
    let limits = SessionLimits::default();
    let mut secret = Metadata::new().with("user-agent", "x/1");
    secret.push(Entry { key: "authorization".into(), value: b"t".to_vec(), flags: SENSITIVE | NO_PROPAGATE });
    let hello = |metadata| Hello { min_version: 1, max_version: 1, parity: Parity::Odd, limits, metadata };
    let small = SessionLimits { max_frame: 32_768, max_connections: 1, max_pending_opens: 0 };
    let small = HelloAck { version: 1, limits: small, metadata: Metadata::new() };
    let away = |last| GoAway { last: ConnectionId(last), reason: reason(code::GOING_AWAY, "restart") };
    vec![
        golden("version 1, odd half, default limits, no metadata", &hello(Metadata::new()), b""),
        golden("one plain entry, and one that is sensitive and not propagated", &hello(secret), b""),
        golden("the initiator takes the even half", &Hello { parity: Parity::Even, ..hello(Metadata::new()) }, b""),
        golden("default limits", &HelloAck { version: 1, limits, metadata: Metadata::new() }, b""),
        golden("the least frame, one connection, no unanswered open", &small, b""),
        golden("no common version", &Refuse { reason: reason(code::VERSION, "no common version") }, b""),
        golden("the peer overran a limit", &ProtocolError { reason: reason(code::LIMIT, "too many") }, b""),
        golden("connection 7 is the last that is answered", &away(7), b""),
        golden("no connection was ever seen", &away(0), b""),
        golden("nonce 300", &Ping { nonce: 300 }, b""),
        golden("the answer", &Pong { nonce: 300 }, b""),
        golden("the largest nonce", &Ping { nonce: u64::MAX }, b""),
        golden("prove it: two bytes of challenge", &Challenge { method: "token/1".into() }, &[0xc1, 0xc2]),
        golden("the proof, a byte", &Proof { method: "token/1".into() }, &[0xd1]),
        golden("an empty challenge", &Challenge { method: "x".into() }, b""),
    ]
}

fn connection_frames() -> Vec<Golden> {
    let (first, limits, metadata) = (ConnectionId(1), ConnectionLimits::default(), Metadata::new());
    let open =
        Open { connection: first, service: "echo".into(), parity: Parity::Odd, limits, metadata: metadata.clone() };
    let accept = Accept { connection: first, limits, metadata: metadata.clone() };
    let reject = |code, text| Reject { connection: first, reason: reason(code, text), metadata: Metadata::new() };
    let stale = Metadata::new().with("epoch", [7u8]);
    let stale = Reject { metadata: stale, ..reject(code::STALE_EPOCH, "stale") };
    let draining =
        |deadline_us| Draining { connection: first, deadline_us, reason: reason(code::GOING_AWAY, "restart") };
    let close = |connection, reason| Close { connection, reason, metadata: Metadata::new() };
    vec![
        golden("connection 1 to the service `echo`, unpaid", &open, b""),
        golden("the same with a credential of three bytes", &open, &[0xc0, 0xff, 0xee]),
        golden("without a receipt", &accept, b""),
        golden("with a receipt of two bytes", &accept, &[0xab, 0xcd]),
        golden("no such service", &reject(code::UNKNOWN_SERVICE, "no"), b""),
        golden("payment is required; the payload is the signed terms", &reject(code::PAYMENT_REQUIRED, ""), &[1, 2, 3]),
        golden("the epoch was used; the channel's stands in the metadata", &stale, b""),
        golden("too many opens are unanswered", &reject(code::AT_CAPACITY, "busy"), b""),
        golden("an orderly end of connection 1", &close(first, Reason::none().into()), b""),
        golden("within two seconds", &draining(Some(2_000_000)), b""),
        golden("for as long as it takes", &draining(None), b""),
        golden("no more calls", &Drained { connection: first }, b""),
        golden("the end of the session", &close(ConnectionId::ROOT, reason(code::TIMEOUT, "idle")), b""),
    ]
}

fn call_frames() -> Vec<Golden> {
    let (connection, call, metadata) = (ConnectionId(3), CallId(5), Metadata::new());
    let request = Request { connection, call, method: 7, deadline_us: None, metadata: metadata.clone(), slots: vec![] };
    let slots =
        vec![Slot { stream: StreamId(9), flow: Flow::FromPeer }, Slot { stream: StreamId(11), flow: Flow::ToPeer }];
    let with_slots = Request { deadline_us: Some(1_500_000), slots, ..request.clone() };
    let method = u64::from_le_bytes([1, 2, 3, 4, 5, 6, 7, 8]);
    let charged = Amount::new(25);
    let response = |status| Response { connection, call, status, charged, metadata: Metadata::new(), slots: vec![] };
    let statuses = [
        ("the result", Status::Ok),
        ("the method's own error", Status::AppError),
        ("no such method", Status::UnknownMethod),
        ("the payload is not the arguments", Status::InvalidPayload),
        ("cancelled", Status::Cancelled),
        ("the handler failed", Status::HandlerFailed),
        ("the answer is too large", Status::TooLarge),
        ("the payment did not come", Status::PaymentFailed),
        ("the callee has no memory for it", Status::AtCapacity),
    ];
    let mut frames = vec![
        golden("method 7, arguments `hi`", &request, b"hi"),
        golden("1.5 s are left; slot 0 is received by the caller, slot 1 sent by it", &with_slots, b"\x00\x01"),
        golden("a method's id is eight bytes, little-endian", &Request { method, ..request.clone() }, b""),
        golden("an entry of metadata", &Request { metadata: metadata.with("k", "v"), ..request }, b""),
    ];
    frames.extend(statuses.map(|(meaning, status)| golden(meaning, &response(status), b"")));
    let dear = Response { charged: Amount::new(u128::MAX), ..response(Status::Ok) };
    frames.extend([
        golden("the largest amount", &dear, b"\x2a"),
        golden("the caller has lost interest", &Cancel { connection, call }, b""),
        golden("the end of a call that had streams", &Done { connection, call, charged }, b""),
    ]);
    frames
}

fn stream_frames() -> Vec<Golden> {
    let (connection, stream) = (ConnectionId(3), StreamId(9));
    let items = Items { connection, stream, slots: vec![] };
    let with_slot = Items { slots: vec![Slot { stream: StreamId(13), flow: Flow::ToPeer }], ..items.clone() };
    let long = [[0x80, 0x01].as_slice(), &[0x61; 128]].concat();
    vec![
        golden("two items, `a` and the empty one", &items, &[1, b'a', 0]),
        golden("one item of 128 bytes: its length has two", &items, &long),
        golden("an item that brings stream 13 travels alone", &with_slot, &[1, 0]),
        golden("the last item was sent", &End { connection, stream }, b""),
        golden("the sender gives up", &Reset { connection, stream, code: code::DROPPED }, b""),
        golden("the receiver wants no more", &Stop { connection, stream, code: code::CANCELLED }, b""),
        golden(
            "1 MiB since the stream began, 300 items consumed",
            &Credit { connection, stream, limit: 1 << 20, consumed: 300 },
            b"",
        ),
        golden("2 MiB since the connection opened", &Window { connection, limit: 2 << 20 }, b""),
        golden("a payment message of two bytes", &Payment { connection }, &[2, 0]),
    ]
}

/// What a listener answers to first bytes that are not ours. `[session.preface.stranger]`
fn strangers() -> Vec<(&'static str, &'static [u8], Option<Stranger>)> {
    vec![
        ("the preface", &PREFACE, None),
        ("an HTTP/1 client", b"GET / HTTP/1.1\r\n", Some(Stranger::Http)),
        ("an HTTP/2 client", b"PRI * HTTP/2.0\r\n", Some(Stranger::Http)),
        ("a TLS client", &[0x16, 0x03, 0x01], Some(Stranger::Tls)),
        ("the next generation", b"TOLLWAY\x02", Some(Stranger::OtherGeneration(2))),
        ("something else, found out at its fifth byte", b"TOLLX", Some(Stranger::Unknown)),
    ]
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn expected() -> Value {
    let frames = [session_frames(), connection_frames(), call_frames(), stream_frames()].concat_all();
    let frames: Vec<_> = frames
        .iter()
        .map(|golden| {
            json!({ "name": golden.name, "kind": golden.kind, "hex": hex(&golden.bytes), "meaning": golden.meaning })
        })
        .collect();
    let prefaces: Vec<_> = strangers()
        .into_iter()
        .map(|(meaning, first, stranger)| {
            let check = stranger.map_or(PrefaceCheck::Ok, PrefaceCheck::Stranger);
            assert_eq!(check_preface(first), check, "{meaning}");
            json!({ "hex": hex(first), "meaning": meaning, "answer": stranger.map(|stranger| hex(stranger.reply())) })
        })
        .collect();
    json!({ "generation": 1, "version": 1, "prefaces": prefaces, "frames": frames })
}

trait ConcatAll<T> {
    fn concat_all(self) -> Vec<T>;
}

impl<T, const N: usize> ConcatAll<T> for [Vec<T>; N] {
    fn concat_all(self) -> Vec<T> {
        self.into_iter().flatten().collect()
    }
}

#[test]
fn the_golden_frames_are_what_the_encoder_writes_and_the_decoder_reads() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("vectors/frames.json");
    let expected = expected();
    if std::env::var_os("TOLLWAY_WRITE_VECTORS").is_some() {
        let text = serde_json::to_string_pretty(&expected).unwrap();
        std::fs::write(&path, text + "\n").unwrap();
    }
    let written: Value = serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    assert_eq!(written, expected);
}

#[test]
fn there_is_a_golden_frame_of_every_kind_and_status() {
    let frames = [session_frames(), connection_frames(), call_frames(), stream_frames()].concat_all();
    for kind in [0, 1, 2, 3, 4, 5, 6, 16, 17, 18, 19, 32, 33, 34, 35, 48, 49, 50, 51, 52, 53, 64] {
        assert!(frames.iter().any(|golden| golden.kind == kind), "kind {kind}");
    }
    for status in 0..=8 {
        // Length, kind, connection, call, then the status.
        let has = |golden: &Golden| golden.kind == Response::KIND && golden.bytes.get(7) == Some(&status);
        assert!(frames.iter().any(has), "status {status}");
    }
}

/// A frame that is cut anywhere is none, and its header is no other one's.
#[test]
fn no_golden_frame_can_be_cut() {
    for golden in [session_frames(), connection_frames(), call_frames(), stream_frames()].concat_all() {
        for end in 0..golden.bytes.len() {
            let mut buffer = BytesMut::from(&golden.bytes[..end]);
            let cut = FrameDecoder::new(1 << 20).decode(&mut buffer).unwrap();
            assert_eq!(cut, None::<Bytes>, "{}: {end} bytes of {}", golden.name, golden.bytes.len());
        }
    }
}

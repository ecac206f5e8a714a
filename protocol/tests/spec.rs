//! SPEC.md does not rot: its examples are what the encoder writes, its rules are cited, and citations have their rules.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::Path;

use tollway_protocol::error::{Reason, code};
use tollway_protocol::frame::PREFACE;
use tollway_protocol::id::{CallId, ConnectionId, Parity, StreamId};
use tollway_protocol::limits::{ConnectionLimits, SessionLimits};
use tollway_protocol::message::*;
use tollway_protocol::metadata::Metadata;
use tollway_protocol::payment::{Amount, PaymentMessage};

const SPEC: &str = include_str!("../SPEC.md");

fn framed<H: Header>(header: &H, payload: &[u8]) -> Vec<u8> {
    [encode_head(header).as_slice(), payload].concat()
}

fn examples() -> Vec<(&'static str, Vec<u8>)> {
    let metadata = Metadata::new;
    let (connection, stream) = (ConnectionId(3), StreamId(9));
    let ping = framed(&Ping { nonce: 300 }, b"");
    let slots = vec![Slot { stream, flow: Flow::FromPeer }];
    let request = Request { connection, call: CallId(5), method: 7, deadline_us: None, metadata: metadata(), slots };
    let (first, parity, limits) = (ConnectionId(1), Parity::Odd, ConnectionLimits::default());
    let open = Open { connection: first, service: "echo".into(), parity, limits, metadata: metadata() };
    let close = Close { connection: first, reason: Reason::none().into(), metadata: metadata() };
    let accept = Accept { connection: first, limits, metadata: metadata() };
    let reason = |code, text: &str| Reason::new(code, text).into();
    let reject = Reject { connection: first, reason: reason(code::UNKNOWN_SERVICE, "no"), metadata: metadata() };
    let (call, charged) = (CallId(5), Amount::new(25));
    let response = Response { connection, call, status: Status::Ok, charged, metadata: metadata(), slots: vec![] };
    let hello =
        Hello { min_version: 1, max_version: 1, parity, limits: SessionLimits::default(), metadata: metadata() };
    let idle = Close { connection: ConnectionId::ROOT, reason: reason(code::TIMEOUT, "idle"), metadata: metadata() };
    let draining =
        Draining { connection: first, deadline_us: Some(2_000_000), reason: reason(code::GOING_AWAY, "restart") };
    let decline = PaymentMessage::Decline { reason: "no".into() }.encode();
    vec![
        ("preface", PREFACE.to_vec()),
        ("Ping", [&(ping.len() as u32).to_le_bytes(), ping.as_slice()].concat()),
        ("Hello", framed(&hello, b"")),
        ("HelloAck", framed(&HelloAck { version: 1, limits: SessionLimits::default(), metadata: metadata() }, b"")),
        ("Refuse", framed(&Refuse { reason: reason(code::VERSION, "no common version") }, b"")),
        ("Challenge", framed(&Challenge { method: "token/1".into() }, &[0xc1, 0xc2])),
        ("Proof", framed(&Proof { method: "token/1".into() }, &[0xd1])),
        ("Request", framed(&request, b"hi")),
        ("Items", framed(&Items { connection, stream, slots: vec![] }, &[1, b'a', 0])),
        ("Open", framed(&open, b"")),
        ("Accept", framed(&accept, b"")),
        ("Reject", framed(&reject, b"")),
        ("Close", framed(&close, b"")),
        ("Draining", framed(&draining, b"")),
        ("Drained", framed(&Drained { connection: first }, b"")),
        ("Response", framed(&response, b"ok")),
        ("Cancel", framed(&Cancel { connection, call }, b"")),
        ("Done", framed(&Done { connection, call, charged }, b"")),
        ("End", framed(&End { connection, stream }, b"")),
        ("Reset", framed(&Reset { connection, stream, code: code::DROPPED }, b"")),
        ("Stop", framed(&Stop { connection, stream, code: code::CANCELLED }, b"")),
        ("Credit", framed(&Credit { connection, stream, limit: 1 << 20, consumed: 300 }, b"")),
        ("Window", framed(&Window { connection, limit: 2 << 20 }, b"")),
        ("Pong", framed(&Pong { nonce: 300 }, b"")),
        ("GoAway", framed(&GoAway { last: ConnectionId(7), reason: reason(code::GOING_AWAY, "restart") }, b"")),
        ("ProtocolError", framed(&ProtocolError { reason: reason(code::LIMIT, "too many") }, b"")),
        ("Close session", framed(&idle, b"")),
        ("Payment", framed(&Payment { connection }, &decline)),
    ]
}

#[test]
fn the_examples_are_what_the_encoder_writes() {
    let blocks: Vec<(&str, &str)> = SPEC
        .split("```hex ")
        .skip(1)
        .map(|rest| rest.split_once("\n```").unwrap().0.split_once('\n').unwrap())
        .collect();
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ");
    let expected: Vec<_> = examples().iter().map(|(name, bytes)| (*name, hex(bytes))).collect();
    let written: Vec<_> = blocks.iter().map(|(name, text)| (*name, text.replace('\n', " "))).collect();
    assert_eq!(written, expected);
}

/// The ids in brackets: words joined by dots, the first of them one of the six.
fn rules(text: &str) -> BTreeSet<String> {
    let inside = text.split('[').skip(1).filter_map(|rest| rest.split_once(']')).map(|(id, _)| id);
    let is_rule = |id: &&str| {
        let (area, rest) = id.split_once('.').unwrap_or_default();
        let plain = |c: char| c.is_ascii_lowercase() || c == '.' || c == '-';
        let areas = ["session", "call", "stream", "pay", "conduit", "relay"];
        areas.contains(&area) && !rest.is_empty() && rest.chars().all(plain)
    };
    inside.filter(is_rule).map(str::to_owned).collect()
}

/// What lines cite, and what tests do.
#[derive(Default)]
struct Citations {
    all: BTreeSet<String>,
    by_tests: BTreeSet<String>,
}

impl Citations {
    fn collect(&mut self, folder: &Path, is_test: bool) {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let is_test = is_test || path.file_stem().is_some_and(|name| name.to_string_lossy().contains("tests"));
            if path.is_dir() {
                self.collect(&path, is_test);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = std::fs::read_to_string(path).unwrap();
                // A file's own tests stand at its end.
                let tests = text.find("#[cfg(test)]\nmod tests").or(text.find("#[cfg(test)]\n#[allow"));
                let tests = if is_test { 0 } else { tests.unwrap_or(text.len()) };
                self.all.append(&mut rules(&text));
                self.by_tests.append(&mut rules(&text[tests..]));
            }
        }
    }
}

#[test]
fn every_rule_is_cited_and_every_citation_has_its_rule() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut citations = Citations::default();
    // The runtime enforces the rules that need a store, an escrow or a key.
    for (folder, is_test) in [("src", false), ("tests", true), ("../src", false), ("../tests", true)] {
        citations.collect(&root.join(folder), is_test);
    }
    let written = rules(SPEC);
    let uncited: Vec<_> = written.difference(&citations.all).collect();
    assert!(uncited.is_empty(), "rules of SPEC.md that no line and no test cites: {uncited:?}");
    let untested: Vec<_> = written.difference(&citations.by_tests).collect();
    assert!(untested.is_empty(), "rules that no test cites: {untested:?}");
    let unwritten: Vec<_> = citations.all.difference(&written).collect();
    assert!(unwritten.is_empty(), "cited rules that SPEC.md does not have: {unwritten:?}");
}

/// The table of codes has every code with its number, and the application's own begin behind them. `[session.code.space]`
#[test]
fn the_table_of_codes_has_every_code() {
    let source = include_str!("../src/error.rs");
    let codes: Vec<(&str, u32)> = source
        .lines()
        .filter_map(|line| line.trim().strip_prefix("pub const ")?.split_once(": u32 = "))
        .map(|(name, number)| (name, number.trim_end_matches(';').parse().unwrap()))
        .filter(|&(name, _)| name != "APPLICATION")
        .collect();
    assert!(codes.len() > 20);
    for (name, number) in codes {
        assert!(number < tollway_protocol::error::code::APPLICATION);
        assert_eq!(SPEC.matches(&format!("| {number} | {name} |")).count(), 1, "{name}");
    }
}

/// The table of frames names every kind once, with its number.
#[test]
fn the_frame_table_has_every_kind() {
    fn row<H: Header>() -> String {
        format!("| {} | {} |", H::KIND, H::NAME)
    }
    let rows = [
        row::<Hello>(),
        row::<HelloAck>(),
        row::<Refuse>(),
        row::<ProtocolError>(),
        row::<GoAway>(),
        row::<Ping>(),
        row::<Pong>(),
        row::<Challenge>(),
        row::<Proof>(),
        row::<Open>(),
        row::<Accept>(),
        row::<Reject>(),
        row::<Close>(),
        row::<Draining>(),
        row::<Drained>(),
        row::<Request>(),
        row::<Response>(),
        row::<Cancel>(),
        row::<Done>(),
        row::<Items>(),
        row::<End>(),
        row::<Reset>(),
        row::<Stop>(),
        row::<Credit>(),
        row::<Window>(),
        row::<Payment>(),
    ];
    for row in rows {
        assert_eq!(SPEC.matches(&row).count(), 1, "{row}");
    }
}

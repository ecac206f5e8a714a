//! SPEC.md does not rot: its examples are what the encoder writes, its rules are cited, and citations have their rules.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::path::Path;

use tollway_protocol::error::Reason;
use tollway_protocol::frame::PREFACE;
use tollway_protocol::id::{CallId, ConnectionId, Parity, StreamId};
use tollway_protocol::limits::{ConnectionLimits, SessionLimits};
use tollway_protocol::message::*;
use tollway_protocol::metadata::Metadata;

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
    vec![
        ("preface", PREFACE.to_vec()),
        ("Ping", [&(ping.len() as u32).to_le_bytes(), ping.as_slice()].concat()),
        ("HelloAck", framed(&HelloAck { version: 1, limits: SessionLimits::default(), metadata: metadata() }, b"")),
        ("Request", framed(&request, b"hi")),
        ("Items", framed(&Items { connection, stream, slots: vec![] }, &[1, b'a', 0])),
        ("Open", framed(&open, b"")),
        ("Close", framed(&close, b"")),
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

fn cited(folder: &Path, into: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            cited(&path, into);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            into.append(&mut rules(&std::fs::read_to_string(path).unwrap()));
        }
    }
}

#[test]
fn every_rule_is_cited_and_every_citation_has_its_rule() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut citations = BTreeSet::new();
    // The runtime enforces the rules that need a store, an escrow or a key.
    for folder in ["src", "tests", "../src", "../tests"] {
        cited(&root.join(folder), &mut citations);
    }
    let written = rules(SPEC);
    let uncited: Vec<_> = written.difference(&citations).collect();
    assert!(uncited.is_empty(), "rules of SPEC.md that no line and no test cites: {uncited:?}");
    let unwritten: Vec<_> = citations.difference(&written).collect();
    assert!(unwritten.is_empty(), "cited rules that SPEC.md does not have: {unwritten:?}");
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
        row::<Open>(),
        row::<Accept>(),
        row::<Reject>(),
        row::<Close>(),
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

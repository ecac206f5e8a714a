//! The parts of the hot path one by one, without I/O: what a frame, an item, a call and a voucher cost in the machines.
//!
//! `cargo bench --bench parts`, or a part of them: `cargo bench --bench parts voucher`.
#![allow(missing_docs, reason = "criterion's macros make undocumented functions")]

use std::hint::black_box;

use bytes::{Bytes, BytesMut};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tollway::protocol::frame::Transmit;
use tollway::protocol::id::{CallId, ConnectionId};
use tollway::protocol::limits::{ConnectionLimits, ITEM_OVERHEAD};
use tollway::protocol::message::{Request, Status, decode_header, encode_head};
use tollway::protocol::metadata::Metadata;
use tollway::protocol::payment::{
    Address, Amount, ChannelId, SecretKey, Verifier, Voucher, VoucherDomain, VoucherProtocol,
};
use tollway::protocol::peer::{Peer, PeerEvent};
use tollway::protocol::session::{CallSpec, Config, Event, ResponseSpec};
use tollway::protocol::stream::{ItemRun, RecvStream, SendStream, Taken, write_item};
use tollway::protocol::time::Time;

const ITEM: [u8; 64] = [7; 64];
/// Items in one run: as many small ones as the machine puts into one frame.
const ITEMS: u64 = 1000;
const METHOD: u64 = 0x0123_4567_89ab_cdef;

fn frames(c: &mut Criterion) {
    let mut group = c.benchmark_group("frame");
    let (connection, call) = (ConnectionId(3), CallId(500));
    let header =
        Request { connection, call, method: METHOD, deadline_us: None, metadata: Metadata::new(), slots: vec![] };
    group.bench_function("encode the head of a request", |b| b.iter(|| encode_head(black_box(&header))));
    let mut frame = BytesMut::from(encode_head(&header).as_slice());
    frame.extend_from_slice(&ITEM);
    let frame = frame.freeze();
    group.bench_function("decode the header of a request", |b| {
        b.iter(|| decode_header::<Request>(&mut black_box(&frame).clone()).expect("a header"));
    });
}

fn items(c: &mut Criterion) {
    let mut group = c.benchmark_group("items of 64 bytes");
    group.throughput(Throughput::Elements(ITEMS));
    let mut framed = Vec::new();
    (0..ITEMS).for_each(|_| write_item(&mut framed, &ITEM));
    let framed = Bytes::from(framed);
    group.bench_function("parse and walk a run", |b| {
        b.iter(|| {
            let mut run = ItemRun::parse(black_box(&framed).clone(), 1024).expect("items");
            while run.read_next(|item| black_box(item).len()).is_some() {}
        });
    });
    group.bench_function("push, and take as one run", |b| {
        let mut stream = SendStream::new(u64::MAX);
        b.iter(|| {
            for _ in 0..ITEMS {
                black_box(stream.push(black_box(&ITEM)));
            }
            let mut taken = 0;
            while let Taken::Run(run) = stream.take(128 * 1024, |_, _| true) {
                taken += u64::from(run.run.items());
            }
            assert_eq!(taken, ITEMS);
        });
    });
}

/// A window that is used up and granted again: what items cost in credit on both sides.
fn credit(c: &mut Criterion) {
    const WINDOW: u64 = 1 << 20;
    let mut group = c.benchmark_group("credit for items of 64 bytes");
    group.throughput(Throughput::Elements(ITEMS));
    let credit = ITEM.len() as u64 + ITEM_OVERHEAD;
    group.bench_function("consume and grant", |b| {
        let (mut receiver, mut sender) = (RecvStream::new(WINDOW), SendStream::new(WINDOW));
        b.iter(|| {
            for _ in 0..ITEMS {
                if let Some(grant) = receiver.consume(black_box(credit), 1) {
                    sender.handle_credit(grant.limit).expect("a limit that rises");
                }
            }
        });
    });
}

/// Moves frames between two peers until nothing moves. What comes out is a frame as a conduit reads it.
fn exchange(peers: &mut [Peer; 2], mut on_event: impl FnMut(&mut Peer, Event)) {
    let mut moved = true;
    while std::mem::take(&mut moved) {
        for side in [0, 1] {
            while let Some(Transmit { lane, head, payload }) = peers[side].poll_transmit(Time::ZERO) {
                let frame = Bytes::from([head.as_slice(), &payload].concat());
                peers[1 - side].handle_frame(Time::ZERO, lane, frame);
                moved = true;
            }
            while let Some(event) = peers[side].poll_event() {
                if let PeerEvent::Session(event) = event {
                    on_event(&mut peers[side], event);
                    moved = true;
                }
            }
        }
    }
}

/// Two peers in a session, with a connection.
fn connected() -> ([Peer; 2], ConnectionId) {
    let mut peers = [Peer::initiator(Config::default(), Time::ZERO), Peer::responder(Config::default(), Time::ZERO)];
    let limits = ConnectionLimits::default();
    let accept = |peer: &mut Peer, event| match event {
        Event::SessionRequested { .. } => peer.session_mut().accept_session(Metadata::new()),
        Event::ConnectionRequested { connection, .. } => {
            peer.session_mut().accept(connection, limits, Metadata::new(), None).expect("it waits");
        }
        _ => {}
    };
    exchange(&mut peers, accept);
    let connection = peers[0].session_mut().open(Time::ZERO, "bench", limits, Metadata::new(), None);
    exchange(&mut peers, accept);
    (peers, connection.expect("a connection"))
}

fn calls(c: &mut Criterion) {
    let mut group = c.benchmark_group("call of 64 bytes");
    for (name, at_once) in [("one at a time", 1), ("100 at once", 100)] {
        let (mut peers, connection) = connected();
        let payload = Bytes::from_static(&ITEM);
        group.throughput(Throughput::Elements(at_once));
        group.bench_function(name, |b| {
            b.iter(|| {
                for _ in 0..at_once {
                    let (metadata, payload) = (Metadata::new(), payload.clone());
                    let spec = CallSpec { connection, method: METHOD, deadline: None, metadata, payload, slots: &[] };
                    peers[0].start_call(spec).expect("a call");
                }
                let mut answered = 0;
                exchange(&mut peers, |peer, event| match event {
                    Event::CallRequested(call) => {
                        peer.session_mut().consume_body(connection, call.payload.len());
                        let (metadata, payload) = (Metadata::new(), call.payload);
                        let spec = ResponseSpec {
                            status: Status::Ok,
                            metadata,
                            payload,
                            slots: &[],
                            cost: None,
                            paid_before: Amount::ZERO,
                        };
                        peer.respond(call.call, spec).expect("an answer");
                    }
                    Event::CallAnswered(answer) => {
                        peer.session_mut().consume_body(connection, answer.payload.len());
                        answered += 1;
                    }
                    _ => {}
                });
                assert_eq!(answered, at_once);
            });
        });
    }
}

fn vouchers(c: &mut Criterion) {
    let mut group = c.benchmark_group("voucher");
    let key = SecretKey::from_bytes([1; 32]).expect("a key");
    let domain = VoucherDomain::new(VoucherProtocol::V1, 1, Address::ZERO);
    let (channel, amount) = (ChannelId([5; 32]), Amount::new(1_000_000));
    let digest = domain.voucher_digest(&channel, amount).expect("a digest");
    let voucher = Voucher::sign(&domain, &key, channel, amount).expect("a voucher");
    let verifier = Verifier::new(key.address());
    voucher.verify(&domain, &verifier).expect("its signer's");
    assert!(verifier.knows_key());

    group.bench_function("digest", |b| b.iter(|| domain.voucher_digest(black_box(&channel), black_box(amount))));
    group.bench_function("sign", |b| b.iter(|| Voucher::sign(&domain, &key, black_box(channel), black_box(amount))));
    group.bench_function("verify with a known key", |b| {
        b.iter(|| black_box(&voucher).verify(&domain, &verifier).expect("its signer's"));
    });
    group.bench_function("recover the signer", |b| {
        b.iter(|| black_box(&voucher.signature).recover(black_box(&digest)).expect("a signer"));
    });
}

criterion_group!(parts, frames, items, credit, calls, vouchers);
criterion_main!(parts);

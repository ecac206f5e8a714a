//! What one connection may do to another, in virtual time: the same calls over the same conduit, alone and beside others.
//!
//! The conduit carries a byte in 8 ns each way and one frame at a time; neither end takes any time. So what a call takes
//! longer than alone is what stood before it, to the nanosecond.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tollway_protocol::frame::Lane;
use tollway_protocol::id::ConnectionId;
use tollway_protocol::message::{Flow, Status};
use tollway_protocol::session::{CallKey, Event, LaneMode};
use tollway_protocol::stream::StreamKey;
use tollway_protocol::time::Time;

use crate::pair::{A, B, Pair, config};

const NANOS_A_BYTE: u64 = 8;
/// What may stand before a frame for each other connection that has data: one frame that is being written, of 64 KiB of
/// items and its header, and one more while that connection has not used up its turn of 32 KiB.
const BOUND: Duration = Duration::from_nanos(2 * (64 * 1024 + 64) * NANOS_A_BYTE);
const CALLS: u64 = 200;

/// A stream from B to A on a connection of its own.
struct Bulk {
    sender: StreamKey,
    receiver: StreamKey,
    item: Vec<u8>,
    is_read: bool,
    bytes_read: u64,
}

struct Stage {
    pair: Pair,
    quick: ConnectionId,
    bulk: Vec<Bulk>,
    /// What is being written in each direction, and when it has come.
    wires: [Option<(Time, Bytes)>; 2],
    asked: BTreeMap<CallKey, Time>,
    took: Vec<Duration>,
}

impl Stage {
    /// A connection for calls, and one for each stream, with items of so many bytes, read or not.
    fn new(streams: &[(usize, bool)]) -> Self {
        let mut pair = Pair::open(config(LaneMode::One), config(LaneMode::One), 1);
        let quick = pair.connect(A);
        let mut bulk = Vec::new();
        for &(item, is_read) in streams {
            let connection = pair.connect(A);
            let (_, keys) = pair.call_with(A, connection, 1, b"", &[Flow::FromPeer]);
            pair.run();
            let sender = pair.requests(B)[0].slots[0].stream;
            bulk.push(Bulk { sender, receiver: keys[0], item: vec![7; item], is_read, bytes_read: 0 });
        }
        let (wires, asked, took) = Default::default();
        Stage { pair, quick, bulk, wires, asked, took }
    }

    /// Goes on until this time, calling every 100 µs and a little.
    fn run(&mut self, calls: u64) {
        let mut next_call = self.pair.now.after(Duration::from_micros(100));
        let mut left = calls;
        while left > 0 || !self.asked.is_empty() {
            let due = (left > 0).then_some(next_call);
            self.pair.now =
                self.wires.iter().flatten().map(|wire| wire.0).chain(due).min().expect("calls are answered");
            if due == Some(self.pair.now) {
                let (call, _) = self.pair.call_with(A, self.quick, 2, b"argument", &[]);
                self.asked.insert(call, self.pair.now);
                // Not in step with anything else.
                next_call = next_call.after(Duration::from_nanos(100_000 + 37 * left));
                left -= 1;
            }
            for side in [A, B] {
                self.arrive(side);
            }
            self.refill();
            for side in [A, B] {
                self.write(side);
            }
        }
    }

    /// Lets a time pass without a call.
    fn rest(&mut self, time: Duration) {
        let until = self.pair.now.after(time);
        loop {
            self.refill();
            (0..2).for_each(|side| self.write(side));
            let next = self.wires.iter().flatten().map(|wire| wire.0).min().filter(|&at| at <= until);
            let Some(next) = next else { break };
            self.pair.now = next;
            (0..2).for_each(|side| self.arrive(side));
        }
        self.pair.now = until;
    }

    /// Takes in what has come from a side.
    fn arrive(&mut self, from: usize) {
        let now = self.pair.now;
        let Some((_, frame)) = self.wires[from].take_if(|(at, _)| *at <= now) else { return };
        self.pair.peers[1 - from].handle_frame(now, Lane::ROOT, frame);
        for event in self.pair.take(1 - from) {
            match event {
                Event::CallRequested(call) => self.pair.answer(B, call.call, Status::Ok, b"result"),
                Event::CallAnswered(answer) => {
                    let asked = self.asked.remove(&answer.call).expect("it was asked");
                    self.took.push(now.since(asked));
                }
                _ => {}
            }
        }
    }

    /// B has always more to send, and A reads at once what it reads at all.
    fn refill(&mut self) {
        for bulk in &mut self.bulk {
            while self.pair.peers[B].buffered(bulk.sender).is_some_and(|bytes| bytes < 256 * 1024) {
                self.pair.peers[B].push(bulk.sender, &bulk.item).unwrap();
            }
            if bulk.is_read {
                let (items, _) = self.pair.read_all(A, bulk.receiver);
                bulk.bytes_read += items.iter().map(|item| item.len() as u64).sum::<u64>();
            }
        }
    }

    fn write(&mut self, side: usize) {
        let now = self.pair.now;
        if self.wires[side].is_none()
            && let Some(frame) = self.pair.peers[side].poll_transmit(now)
        {
            let mut bytes = BytesMut::from(frame.head.as_slice());
            bytes.extend_from_slice(&frame.payload);
            let nanos = (bytes.len() as u64 + 4) * NANOS_A_BYTE;
            self.wires[side] = Some((now.after(Duration::from_nanos(nanos)), bytes.freeze()));
        }
    }
}

/// What each call took beside streams that have already been there for a while.
fn times(streams: &[(usize, bool)]) -> Vec<Duration> {
    let mut stage = Stage::new(streams);
    stage.rest(Duration::from_millis(50));
    stage.run(CALLS);
    stage.took
}

#[test]
fn streams_that_nobody_reads_delay_no_call_by_a_nanosecond() {
    let alone = times(&[]);
    assert_eq!(alone.len() as u64, CALLS);
    for count in [1, 8] {
        assert_eq!(times(&vec![(16 * 1024, false); count]), alone, "beside {count}");
    }
}

#[test]
fn a_stream_that_fills_up_delays_a_call_by_its_bound_at_most_and_only_until_it_is_full() {
    let alone = times(&[]);
    let mut stage = Stage::new(&[(16 * 1024, false)]);
    stage.run(CALLS);
    let late: Vec<usize> = (0..alone.len()).filter(|&call| stage.took[call] != alone[call]).collect();
    // 256 KiB and an item take 2.2 ms, and calls come every 0.1 ms.
    assert!(!late.is_empty() && late.iter().all(|&call| call < 25), "{late:?}");
    assert!(late.iter().all(|&call| stage.took[call] <= alone[call] + BOUND));
}

#[test]
fn a_call_waits_for_no_more_than_a_turn_of_each_connection_that_sends_without_end() {
    let alone = times(&[]);
    for count in [1, 4] {
        for item in [16, 1_000, 16 * 1024] {
            let beside = times(&vec![(item, true); count]);
            let longest = beside.iter().zip(&alone).map(|(beside, alone)| beside.saturating_sub(*alone)).max();
            let longest = longest.expect("calls were made");
            assert!(longest > Duration::ZERO, "the link was full");
            assert!(longest <= BOUND * count as u32, "{longest:?} longer beside {count} with items of {item}");
        }
    }
}

#[test]
fn connections_that_send_without_end_share_by_bytes_whatever_the_size_of_their_items() {
    let mut stage = Stage::new(&[(40, true), (1_000, true), (16 * 1024, true), (60_000, true)]);
    stage.rest(Duration::from_millis(400));
    let shares: Vec<u64> = stage.bulk.iter().map(|bulk| bulk.bytes_read).collect();
    let (least, most) = (shares.iter().min().unwrap(), shares.iter().max().unwrap());
    assert!(*least > 8_000_000, "of 50 MB: {shares:?}");
    assert!(most - least <= most / 10, "{shares:?}");
}

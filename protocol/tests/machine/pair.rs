//! Two peers back to back: virtual time, bounded pipes, and lanes that a seed reorders.
#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tollway_protocol::error::Reason;
use tollway_protocol::frame::{Lane, Transmit};
use tollway_protocol::id::ConnectionId;
use tollway_protocol::limits::ConnectionLimits;
use tollway_protocol::message::{Flow, Header, Status, encode_head};
use tollway_protocol::metadata::Metadata;
use tollway_protocol::payment::Amount;
use tollway_protocol::peer::{Peer, PeerEvent, Read};
use tollway_protocol::session::{
    CallKey, CallSpec, Config, Event, IncomingCall, IncomingResponse, LaneMode, PayeeMoney, PayerMoney, ResponseSpec,
};
use tollway_protocol::stream::{Ending, StreamKey};
use tollway_protocol::time::Time;

/// The side that opened the session, and the other one.
pub(crate) const A: usize = 0;
/// See [`A`].
pub(crate) const B: usize = 1;

/// SplitMix64: small, and the same everywhere.
#[derive(Debug, Clone)]
pub(crate) struct Rng(pub(crate) u64);

impl Rng {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `end`.
    pub(crate) fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    pub(crate) fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

/// One direction of a conduit.
#[derive(Debug)]
pub(crate) struct Pipe {
    lanes: BTreeMap<Lane, VecDeque<Bytes>>,
    /// Bytes under way.
    pub(crate) bytes: usize,
    /// A frame may start while fewer bytes than these are under way.
    pub(crate) capacity: usize,
    /// Nothing comes out.
    pub(crate) stalled: bool,
    /// Kinds of the frames that went in, in order.
    pub(crate) kinds: Vec<u8>,
}

impl Pipe {
    fn put(&mut self, frame: &Transmit) {
        self.kinds.push(frame.head[0]);
        let mut bytes = BytesMut::from(frame.head.as_slice());
        bytes.extend_from_slice(&frame.payload);
        self.bytes += bytes.len();
        self.lanes.entry(frame.lane).or_default().push_back(bytes.freeze());
    }

    fn take(&mut self, rng: &mut Rng) -> Option<(Lane, Bytes)> {
        if self.stalled || self.lanes.is_empty() {
            return None;
        }
        let lane = *self.lanes.keys().nth(rng.below(self.lanes.len())).unwrap();
        let queue = self.lanes.get_mut(&lane).unwrap();
        let frame = queue.pop_front().unwrap();
        if queue.is_empty() {
            self.lanes.remove(&lane);
        }
        self.bytes -= frame.len();
        Some((lane, frame))
    }
}

/// Two peers, the pipes between them, and what they said.
#[derive(Debug)]
pub(crate) struct Pair {
    pub(crate) now: Time,
    pub(crate) peers: [Peer; 2],
    /// `pipes[A]` carries what A sends.
    pub(crate) pipes: [Pipe; 2],
    pub(crate) events: [VecDeque<Event>; 2],
    pub(crate) rng: Rng,
}

pub(crate) fn config(lanes: LaneMode) -> Config {
    Config { lanes, ..Config::default() }
}

impl Pair {
    /// Two peers that have not exchanged a byte.
    pub(crate) fn unopened(a: Config, b: Config, seed: u64) -> Self {
        let pipe = || Pipe { lanes: BTreeMap::new(), bytes: 0, capacity: 1 << 20, stalled: false, kinds: Vec::new() };
        Pair {
            now: Time::ZERO,
            peers: [Peer::initiator(a, Time::ZERO), Peer::responder(b, Time::ZERO)],
            pipes: [pipe(), pipe()],
            events: [VecDeque::new(), VecDeque::new()],
            rng: Rng(seed),
        }
    }

    /// An open session with these configurations.
    pub(crate) fn open(a: Config, b: Config, seed: u64) -> Self {
        let mut pair = Pair::unopened(a, b, seed);
        pair.run();
        pair.peers[B].session_mut().accept_session(Metadata::new());
        pair.run();
        assert!(pair.peers.iter().all(|peer| peer.session().is_open()));
        pair.events.iter_mut().for_each(VecDeque::clear);
        pair.pipes.iter_mut().for_each(|pipe| pipe.kinds.clear());
        pair
    }

    /// An open session on one lane.
    pub(crate) fn one_lane() -> Self {
        Pair::open(config(LaneMode::One), config(LaneMode::One), 1)
    }

    /// Fills the pipe of one side. Returns whether a frame was written.
    pub(crate) fn write(&mut self, side: usize) -> bool {
        let mut wrote = false;
        while self.pipes[side].bytes < self.pipes[side].capacity {
            let Some(frame) = self.peers[side].poll_transmit(self.now) else { break };
            self.pipes[side].put(&frame);
            wrote = true;
        }
        wrote
    }

    /// Delivers one frame to a side. Returns whether there was one.
    pub(crate) fn read(&mut self, side: usize) -> bool {
        if !self.peers[side].session().wants_frames() {
            return false;
        }
        let Some((lane, frame)) = self.pipes[1 - side].take(&mut self.rng) else { return false };
        self.peers[side].handle_frame(self.now, lane, frame);
        self.collect(side);
        true
    }

    fn collect(&mut self, side: usize) {
        while let Some(event) = self.peers[side].poll_event() {
            if let PeerEvent::Session(event) = event {
                self.events[side].push_back(event);
            }
        }
    }

    /// Goes on until nothing moves.
    pub(crate) fn run(&mut self) {
        loop {
            let mut moved = false;
            for side in [A, B] {
                moved |= self.write(side);
                moved |= self.read(side);
                self.collect(side);
            }
            if !moved {
                return;
            }
        }
    }

    /// Lets time pass, whatever is due.
    pub(crate) fn advance_only(&mut self, wait: Duration) {
        self.now = self.now.after(wait);
    }

    /// Delivers all that a side has written.
    pub(crate) fn deliver(&mut self, side: usize) {
        while self.read(1 - side) {}
    }

    /// Lets time pass, deadline by deadline.
    pub(crate) fn advance(&mut self, wait: Duration) {
        let end = self.now.after(wait);
        loop {
            let next = self.peers.iter().filter_map(Peer::poll_timeout).min().filter(|&at| at <= end);
            let Some(at) = next else { break };
            self.now = self.now.max(at);
            for side in [A, B] {
                if self.peers[side].poll_timeout().is_some_and(|at| at <= self.now) {
                    self.peers[side].handle_timeout(self.now);
                    self.collect(side);
                }
            }
            self.run();
        }
        self.now = end;
    }

    /// The events of a side since the last call.
    pub(crate) fn take(&mut self, side: usize) -> Vec<Event> {
        self.collect(side);
        self.events[side].drain(..).collect()
    }

    /// Starts an open of `side` with these limits.
    pub(crate) fn start_open(&mut self, side: usize, limits: ConnectionLimits) -> ConnectionId {
        let now = self.now;
        self.peers[side].session_mut().open(now, "echo", limits, Metadata::new(), None).unwrap()
    }

    /// A connection that `side` opened, with the default limits.
    pub(crate) fn connect(&mut self, side: usize) -> ConnectionId {
        self.connect_with(side, ConnectionLimits::default(), ConnectionLimits::default())
    }

    pub(crate) fn connect_with(&mut self, side: usize, own: ConnectionLimits, peer: ConnectionLimits) -> ConnectionId {
        let id = self.start_open(side, own);
        self.run();
        self.peers[1 - side].session_mut().accept(id, peer, Metadata::new(), None).unwrap();
        self.run();
        self.events.iter_mut().for_each(VecDeque::clear);
        id
    }

    /// A connection that A opened and pays for.
    pub(crate) fn connect_paid(&mut self, payer: PayerMoney, payee: PayeeMoney) -> ConnectionId {
        let now = self.now;
        let limits = ConnectionLimits::default();
        let paid = Some((Bytes::from_static(b"credential"), payer));
        let id = self.peers[A].session_mut().open(now, "paid", limits, Metadata::new(), paid).unwrap();
        self.run();
        let paid = Some((Bytes::from_static(b"receipt"), payee));
        self.peers[B].session_mut().accept(id, limits, Metadata::new(), paid).unwrap();
        self.run();
        self.events.iter_mut().for_each(VecDeque::clear);
        id
    }

    pub(crate) fn call(&mut self, side: usize, connection: ConnectionId, method: u64, payload: &[u8]) -> CallKey {
        self.call_with(side, connection, method, payload, &[]).0
    }

    pub(crate) fn call_with(
        &mut self,
        side: usize,
        connection: ConnectionId,
        method: u64,
        payload: &[u8],
        slots: &[Flow],
    ) -> (CallKey, Vec<StreamKey>) {
        let payload = Bytes::copy_from_slice(payload);
        let spec = CallSpec { connection, method, deadline: None, metadata: Metadata::new(), payload, slots };
        self.peers[side].start_call(spec).unwrap()
    }

    pub(crate) fn answer(&mut self, side: usize, call: CallKey, status: Status, payload: &[u8]) {
        self.answer_with(side, call, status, payload, &[]);
    }

    pub(crate) fn answer_with(
        &mut self,
        side: usize,
        call: CallKey,
        status: Status,
        payload: &[u8],
        slots: &[Flow],
    ) -> Vec<StreamKey> {
        let payload = Bytes::copy_from_slice(payload);
        self.peers[side]
            .respond(
                call,
                ResponseSpec {
                    status,
                    metadata: Metadata::new(),
                    payload,
                    slots,
                    cost: None,
                    paid_before: Amount::ZERO,
                },
            )
            .unwrap()
    }

    /// The calls that came to a side; its other events are dropped.
    pub(crate) fn requests(&mut self, side: usize) -> Vec<IncomingCall> {
        let calls = self.take(side).into_iter();
        calls.filter_map(|event| if let Event::CallRequested(call) = event { Some(call) } else { None }).collect()
    }

    /// The answers that came to a side; its other events are dropped.
    pub(crate) fn responses(&mut self, side: usize) -> Vec<IncomingResponse> {
        let answers = self.take(side).into_iter();
        answers.filter_map(|event| if let Event::CallAnswered(got) = event { Some(got) } else { None }).collect()
    }

    /// Reads a stream until nothing more is there.
    pub(crate) fn read_all(&mut self, side: usize, stream: StreamKey) -> (Vec<Bytes>, Option<Ending>) {
        let mut items = Vec::new();
        loop {
            match self.peers[side].read(stream) {
                Read::Item(item, _) => items.push(item),
                Read::Ended(ending) => return (items, Some(ending)),
                Read::Pending | Read::Closed => return (items, None),
            }
        }
    }

    pub(crate) fn close(&mut self, side: usize, connection: ConnectionId) {
        self.peers[side].session_mut().close(connection, Reason::none());
    }

    /// Connections, calls and streams in both tables.
    pub(crate) fn counts(&self) -> [(usize, usize, usize); 2] {
        [A, B].map(|side| {
            let session = self.peers[side].session();
            (session.connection_count(), session.call_count(), session.stream_count())
        })
    }

    /// Panics if a side has ended.
    pub(crate) fn assert_alive(&self) {
        for peer in &self.peers {
            assert_eq!(peer.session().end(), None);
        }
    }
}

/// The bytes of a frame.
pub(crate) fn framed<H: Header>(header: &H, payload: &[u8]) -> Bytes {
    let mut frame = BytesMut::from(encode_head(header).as_slice());
    frame.extend_from_slice(payload);
    frame.freeze()
}

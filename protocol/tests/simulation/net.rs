//! Two peers, what is between them, and virtual time: one conduit, or a relay with a conduit on either side.
//!
//! A conduit carries bytes and not frames: each lane is a stream of bytes that comes in pieces of any size, lanes overtake
//! each other, and either direction may stand still.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use bytes::{BufMut, BytesMut};
use tollway_protocol::frame::{FrameDecoder, Lane, Transmit};
use tollway_protocol::metadata::Metadata;
use tollway_protocol::peer::{Peer, PeerEvent};
use tollway_protocol::session::{Event, LaneMode, Machine};
use tollway_protocol::time::Time;

use crate::choices::Choices;
use crate::pair::{A, B};
use crate::referee::Referee;
use crate::relay::RelayNode;

/// Largest frame that any side takes.
pub(crate) const MAX_FRAME: u32 = 34_000;

/// One lane of one direction.
#[derive(Debug, Default)]
struct Wire {
    under_way: VecDeque<u8>,
    /// What has come of a frame that is not whole.
    come: BytesMut,
}

/// One direction of a conduit.
#[derive(Debug)]
pub(crate) struct Pipe {
    lanes: BTreeMap<Lane, Wire>,
    /// Bytes under way.
    pub(crate) bytes: usize,
    /// A frame may start while fewer bytes than these are under way.
    pub(crate) capacity: usize,
    /// Most bytes of one read.
    pub(crate) piece: usize,
    /// Nothing comes out.
    pub(crate) stalled: bool,
    cut: bool,
}

impl Pipe {
    fn new() -> Self {
        let (lanes, capacity, piece) = (BTreeMap::new(), 1 << 20, 1 << 20);
        Pipe { lanes, bytes: 0, capacity, piece, stalled: false, cut: false }
    }

    fn put(&mut self, frame: &Transmit) {
        let wire = self.lanes.entry(frame.lane).or_default();
        let before = wire.under_way.len();
        wire.under_way.extend((frame.len() as u32).to_le_bytes());
        wire.under_way.extend(&frame.head);
        wire.under_way.extend(&frame.payload);
        self.bytes += wire.under_way.len() - before;
    }

    /// One read: some bytes of a lane come. Returns the lane.
    fn take(&mut self, choices: &mut Choices) -> Option<Lane> {
        if self.stalled || self.bytes == 0 {
            return None;
        }
        let busy = self.lanes.iter().filter(|(_, wire)| !wire.under_way.is_empty());
        let busy: Vec<Lane> = busy.map(|(lane, _)| *lane).collect();
        let lane = busy[choices.below(busy.len())];
        let wire = self.lanes.get_mut(&lane).unwrap();
        let most = wire.under_way.len().min(self.piece);
        let count = if self.piece < 1 << 20 { 1 + choices.below(most) } else { most };
        wire.come.put_slice(&wire.under_way.drain(..count).collect::<Vec<u8>>());
        self.bytes -= count;
        Some(lane)
    }
}

/// Two peers and all between them. The ends of conduits have numbers: `n` and `n ^ 1` are joined by one.
#[derive(Debug)]
pub(crate) struct Net {
    pub(crate) now: Time,
    pub(crate) peers: [Peer; 2],
    pub(crate) relay: Option<RelayNode>,
    /// `pipes[n]` carries what end `n` sends.
    pub(crate) pipes: Vec<Pipe>,
    referees: Vec<Referee>,
    events: [VecDeque<Event>; 2],
    pub(crate) choices: Choices,
}

impl Net {
    /// Opens the sessions of all.
    pub(crate) fn open(peers: [Peer; 2], relay: Option<RelayNode>, lanes: LaneMode, choices: Choices) -> Self {
        let ends = if relay.is_some() { 4 } else { 2 };
        let mut net = Net {
            now: Time::ZERO,
            peers,
            relay,
            pipes: (0..ends).map(|_| Pipe::new()).collect(),
            referees: (0..ends / 2).map(|_| Referee::new(lanes)).collect(),
            events: Default::default(),
            choices,
        };
        net.run();
        net.peers[B].session_mut().accept_session(Metadata::new());
        net.run();
        assert!(net.ends().all(|end| net.machine(end).is_open()));
        net.events.iter_mut().for_each(VecDeque::clear);
        net
    }

    pub(crate) fn ends(&self) -> std::ops::Range<usize> {
        0..self.pipes.len()
    }

    /// The peer at this end, or the relay's machine.
    fn party(&self, end: usize) -> Result<usize, usize> {
        match end {
            0 => Ok(A),
            _ if end + 1 == self.pipes.len() => Ok(B),
            _ => Err(end - 1),
        }
    }

    pub(crate) fn machine(&self, end: usize) -> &Machine {
        match self.party(end) {
            Ok(side) => self.peers[side].session(),
            Err(which) => &self.relay.as_ref().unwrap().machines[which],
        }
    }

    fn machine_mut(&mut self, end: usize) -> &mut Machine {
        match self.party(end) {
            Ok(side) => self.peers[side].session_mut(),
            Err(which) => &mut self.relay.as_mut().unwrap().machines[which],
        }
    }

    /// Lets an end write, up to the pipe's capacity. Returns whether a frame was written.
    pub(crate) fn write(&mut self, end: usize) -> bool {
        let mut wrote = false;
        while self.pipes[end].bytes < self.pipes[end].capacity && !self.pipes[end].cut {
            let frame = match self.party(end) {
                Ok(side) => self.peers[side].poll_transmit(self.now),
                Err(which) => self.relay.as_mut().unwrap().poll_transmit(self.now, which),
            };
            let Some(frame) = frame else { break };
            self.referees[end / 2].see(end % 2, &frame);
            self.pipes[end].put(&frame);
            wrote = true;
        }
        wrote
    }

    /// One read of an end. Returns whether there was something.
    pub(crate) fn read(&mut self, end: usize) -> bool {
        if !self.machine(end).wants_frames() {
            return false;
        }
        let from = end ^ 1;
        let Some(lane) = self.pipes[from].take(&mut self.choices) else { return self.read_end(end) };
        let now = self.now;
        self.machine_mut(end).handle_activity(now);
        let mut decoder = FrameDecoder::new(MAX_FRAME as usize);
        while let Some(frame) = decoder.decode(&mut self.pipes[from].lanes.get_mut(&lane).unwrap().come).unwrap() {
            match self.party(end) {
                Ok(side) => self.peers[side].handle_frame(now, lane, frame),
                Err(which) => self.relay.as_mut().unwrap().machines[which].handle_frame(now, lane, frame),
            }
            self.settle(end);
        }
        true
    }

    /// Whoever has ended and said its last word ends its direction.
    fn read_end(&mut self, end: usize) -> bool {
        let from = end ^ 1;
        let pipe = &self.pipes[from];
        let is_over = pipe.cut || (pipe.bytes == 0 && !pipe.stalled && self.machine(from).end().is_some());
        if !is_over || self.machine(end).end().is_some() {
            return false;
        }
        self.machine_mut(end).handle_conduit_lost("it has ended");
        self.settle(end);
        true
    }

    /// Cuts a conduit: what is under way is lost, and both ends learn it.
    pub(crate) fn cut(&mut self, end: usize) {
        for end in [end, end ^ 1] {
            let pipe = &mut self.pipes[end];
            (pipe.lanes, pipe.bytes, pipe.cut) = (BTreeMap::new(), 0, true);
        }
    }

    fn settle(&mut self, end: usize) {
        match self.party(end) {
            Ok(side) => self.collect(side),
            Err(_) => self.relay.as_mut().unwrap().settle(self.now),
        }
    }

    fn collect(&mut self, side: usize) {
        while let Some(event) = self.peers[side].poll_event() {
            if let PeerEvent::Session(event) = event {
                self.events[side].push_back(event);
            }
        }
    }

    /// The events of a side since the last call.
    pub(crate) fn take(&mut self, side: usize) -> Vec<Event> {
        self.collect(side);
        self.events[side].drain(..).collect()
    }

    /// Goes on until nothing moves.
    pub(crate) fn run(&mut self) {
        loop {
            let mut moved = false;
            for end in self.ends() {
                moved |= self.write(end);
                moved |= self.read(end);
                self.settle(end);
            }
            if !moved {
                return;
            }
        }
    }

    /// Lets so much time pass, without a byte that moves: what is due happens, late.
    pub(crate) fn pass(&mut self, wait: Duration) {
        self.now = self.now.after(wait);
        for end in self.ends() {
            self.handle_timeout(end);
        }
    }

    /// Lets so much time pass, deadline by deadline, while everything moves that can.
    pub(crate) fn advance(&mut self, wait: Duration) {
        let until = self.now.after(wait);
        loop {
            self.run();
            let next = self.ends().filter_map(|end| self.machine(end).poll_timeout()).min();
            let Some(at) = next.filter(|&at| at <= until) else { break };
            self.now = self.now.max(at);
            for end in self.ends() {
                self.handle_timeout(end);
            }
        }
        self.now = until;
    }

    fn handle_timeout(&mut self, end: usize) {
        let now = self.now;
        if self.machine(end).poll_timeout().is_some_and(|at| at <= now) {
            match self.party(end) {
                Ok(side) => self.peers[side].handle_timeout(now),
                Err(_) => self.machine_mut(end).handle_timeout(now),
            }
            self.settle(end);
            let again = self.machine(end).poll_timeout();
            assert!(again.is_none_or(|at| at > now), "what is due at {now:?} was due again at once, at {again:?}");
        }
    }
}

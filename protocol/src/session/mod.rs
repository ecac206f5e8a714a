//! The session machine: two peers, one conduit, any number of virtual connections.
//!
//! [`Machine`] takes frames, commands and the time, and yields events, frames and the next deadline. It does no I/O,
//! looks at no clock, runs no callback and never waits: what an application must decide comes out as an [`Event`] and
//! goes back in as a command.
//!
//! The machine owns all that is shared between streams: ids, calls, windows, fairness, money credit. The items of a
//! stream and its byte credit belong to a [`SendStream`](crate::stream::SendStream) or
//! [`RecvStream`](crate::stream::RecvStream), which a runtime keeps behind a lock of its own and lends to
//! [`Machine::poll_transmit`] through [`StreamSource`].
//!
//! Invariants: ids of each space rise by exactly 2; everything that a peer can make grow has a limit; after a violation
//! the machine sends ProtocolError once and nothing else.

mod budget;
mod call_commands;
mod commands;
mod connection;
mod deadline;
mod draining;
mod event;
#[cfg(test)]
mod exhaustion_tests;
mod grants;
mod handshake;
mod lanes;
mod money;
mod outbox;
mod progress;
mod receive;
mod receive_call;
mod relayed;
mod stats;
mod table;
mod timers;
mod transmit;
mod unpaid;

use core::time::Duration;
use std::collections::VecDeque;
use std::sync::Arc;

use rustc_hash::FxHashMap;
use slotmap::SlotMap;

pub use call_commands::{CallSpec, ResponseSpec};
pub use commands::{CommandError, OpenSpec};
pub use event::{Event, InboundSlot, IncomingCall, IncomingResponse};
pub use money::{MoneyCount, PayeeMoney, PayerMoney, PriceTable};
pub use progress::WriteWatch;
pub use stats::{ConnectionState, ConnectionStats, FrameStats, OpenStats, QueueStats, SessionStats};
pub use transmit::StreamSource;

use crate::error::{Reason, SessionEnd};
use crate::frame::{Lane, Transmit};
use crate::id::{ConnectionId, IdSequence, Parity, StreamId};
use crate::limits::{AbuseLimits, SessionLimits};
use crate::memory::{Ledger, MemoryLimits, MemoryPool};
use crate::metadata::Metadata;
use crate::stream::StreamKey;
use crate::time::Time;
use budget::Budgets;
use connection::{Call, Connection, PeerIds, StreamEntry};
use deadline::Deadlines;
use outbox::Outbox;
use timers::Timers;

/// The protocol versions that this crate speaks. `[session.version.range]`
pub const MIN_VERSION: u16 = 1;
/// See [`MIN_VERSION`].
pub const MAX_VERSION: u16 = 1;

slotmap::new_key_type! {
    /// A call inside the machine. Unlike its id it exists before the call is announced on the wire.
    pub struct CallKey;
}

/// How many ordered paths the conduit has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LaneMode {
    /// All frames come in the order in which they were sent.
    One,
    /// Each connection has a lane of its own; order holds within a lane only.
    PerConnection,
}

/// Which side of the handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Speaks first, and picks the parity.
    Initiator,
    /// Answers.
    Responder,
}

/// What a session is to be.
#[derive(Debug, Clone)]
pub struct Config {
    /// What this side receives.
    pub limits: SessionLimits,
    /// Travels in Hello or HelloAck.
    pub metadata: Metadata,
    /// The half of the connection ids that the initiator takes.
    pub parity: Parity,
    /// The conduit's lanes.
    pub lanes: LaneMode,
    /// The handshake must end within this time. Default 10 s: slow networks need 1, an attacker wants forever.
    pub handshake_timeout: Duration,
    /// An open must be answered within this time. Default 30 s: a verifying payee may ask an escrow first.
    pub open_timeout: Duration,
    /// After so long without a byte from the peer it is pinged. Default 15 s, below the idle timers of common NATs.
    pub ping_interval: Duration,
    /// A ping must bring some byte back within this time. Default 10 s.
    pub pong_timeout: Duration,
    /// While bytes wait to be written, the conduit must take some within this time. Default 20 s: below what keepalive
    /// needs, so that a peer that is alive and doesn't read gets this cause.
    pub write_timeout: Duration,
    /// Bytes a second that the conduit must take on average over [`write_timeout`](Self::write_timeout), while bytes
    /// wait. Default 1,024: the slowest links are faster, and a reader of a byte a second is none.
    pub min_write_rate: u32,
    /// What a peer may waste of this side's.
    pub abuse: AbuseLimits,
    /// What a peer may make this side hold.
    pub memory: MemoryLimits,
    /// A session in which no virtual connection was open for so long is closed. Default `None`: who opens a session
    /// keeps it.
    pub idle_timeout: Option<Duration>,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            limits: SessionLimits::default(),
            metadata: Metadata::new(),
            parity: Parity::Odd,
            lanes: LaneMode::One,
            handshake_timeout: Duration::from_secs(10),
            open_timeout: Duration::from_secs(30),
            ping_interval: Duration::from_secs(15),
            pong_timeout: Duration::from_secs(10),
            write_timeout: Duration::from_secs(20),
            min_write_rate: 1_024,
            abuse: AbuseLimits::default(),
            memory: MemoryLimits::default(),
            idle_timeout: None,
        }
    }
}

/// Where a session stands.
///
/// ```text
///   initiator: Greeting ──HelloAck──► Open ──Close, ProtocolError, loss──► Ended
///                 └──Refuse, violation, timeout────────────────────────────▲
///   responder: Greeting ──Hello, then accept──► Open …
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    /// Hello (initiator: sent; responder: awaited) is not answered.
    Greeting,
    /// Both sides may open connections.
    Open,
    /// Nothing is taken in any more; what is in the control queue is still sent.
    Ended(SessionEnd),
}

/// Where the one challenge of a handshake stands.
///
/// ```text
///   Not ──Challenge──► Asked ──Proof──► Answered
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
enum Proving {
    /// There was none.
    Not,
    /// For a proof of this method, which has not come.
    Asked(String),
    /// There will be no other.
    Answered,
}

/// The session machine; see the module's documentation.
#[derive(Debug)]
pub struct Machine {
    config: Config,
    role: Role,
    phase: Phase,
    /// What the peer receives. Its defaults stand until its hello came.
    peer_limits: SessionLimits,
    own_ids: IdSequence,
    peer_ids: PeerIds,
    /// Boxed: a table of ten thousand has nearly as many free places as taken ones, and moves all when it grows.
    connections: FxHashMap<ConnectionId, Box<Connection>>,
    /// How many of them are relayed.
    relayed: usize,
    /// Opens of ours that are not answered, and of the peer's.
    opens: OpenCounts,
    open_stats: OpenStats,
    calls: SlotMap<CallKey, Call>,
    streams: SlotMap<StreamKey, StreamEntry>,
    outbox: Outbox,
    timers: Timers,
    deadlines: Deadlines<CallKey>,
    /// When connections that drain are closed.
    drains: Deadlines<ConnectionId>,
    budgets: Budgets,
    /// What the peer may make us hold.
    ledger: Ledger,
    /// The length of the frame that is being taken in.
    frame_bytes: usize,
    /// What waits in relays; made for the first one.
    relay_pool: Option<Arc<MemoryPool>>,
    events: VecDeque<Event>,
    /// Responder: the version that the Hello led to, until the application answers it.
    hello: Option<u16>,
    /// Whether the initiator was asked for a proof.
    proving: Proving,
    /// Responder: opens, and closes of them, that wait for the initiator's first frame after HelloAck. On many lanes an Open could else
    /// overtake the HelloAck. `[session.handshake.first-frame]`
    held: Option<VecDeque<Transmit>>,
    /// Why all connections drain, once they do.
    draining: Option<Reason>,
    /// The highest connection id of the peer's that we said in GoAway, once we did.
    going_away: Option<ConnectionId>,
    /// The highest connection id of ours that the peer said in GoAway, once it did.
    peer_going_away: Option<ConnectionId>,
}

/// How many opens are unanswered, and how many connections of the peer's are live.
#[derive(Debug, Default, Clone, Copy)]
struct OpenCounts {
    ours: u32,
    ours_pending: u32,
    peers: u32,
    peers_pending: u32,
}

impl Machine {
    /// The side that speaks first. Its Hello is ready to be sent.
    pub fn initiator(config: Config, now: Time) -> Self {
        let mut machine = Machine::new(config, Role::Initiator, now);
        machine.send_hello();
        machine
    }

    /// The side that answers.
    pub fn responder(config: Config, now: Time) -> Self {
        Machine::new(config, Role::Responder, now)
    }

    fn new(config: Config, role: Role, now: Time) -> Self {
        let own = match role {
            Role::Initiator => config.parity,
            // The responder learns its parity from the Hello.
            Role::Responder => config.parity.other(),
        };
        Machine {
            timers: Timers::new(&config, now),
            budgets: Budgets::new(config.abuse, now),
            ledger: Ledger::new(&config.memory),
            peer_ids: PeerIds::new(own.other()),
            own_ids: IdSequence::new(own),
            config,
            role,
            phase: Phase::Greeting,
            peer_limits: SessionLimits::default(),
            connections: FxHashMap::default(),
            relayed: 0,
            opens: OpenCounts::default(),
            open_stats: OpenStats::default(),
            calls: SlotMap::with_key(),
            streams: SlotMap::with_key(),
            outbox: Outbox::default(),
            deadlines: Deadlines::default(),
            drains: Deadlines::default(),
            frame_bytes: 0,
            relay_pool: None,
            events: VecDeque::new(),
            hello: None,
            proving: Proving::Not,
            held: (role == Role::Responder).then(VecDeque::new),
            draining: None,
            going_away: None,
            peer_going_away: None,
        }
    }

    /// Whether both sides have said hello and the session has not ended.
    pub fn is_open(&self) -> bool {
        self.phase == Phase::Open
    }

    /// Why the session ended, once it did.
    pub const fn end(&self) -> Option<&SessionEnd> {
        match &self.phase {
            Phase::Ended(end) => Some(end),
            _ => None,
        }
    }

    /// The next event, in the order in which things happened.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// Hands all events over at once: `into` must be empty, and its memory is used for the next ones.
    pub fn swap_events(&mut self, into: &mut VecDeque<Event>) {
        debug_assert!(into.is_empty(), "events would be lost");
        core::mem::swap(&mut self.events, into);
    }

    /// When [`handle_timeout`](Self::handle_timeout) must be called, at the latest.
    pub fn poll_timeout(&self) -> Option<Time> {
        match self.phase {
            Phase::Ended(_) => None,
            _ => {
                let session = self.timers.next(self.connections.is_empty());
                session.into_iter().chain(self.deadlines.next()).chain(self.drains.next()).min()
            }
        }
    }

    /// Whether frames should be read. A peer that makes us answer without reading our answers is not read either.
    /// `[session.control.bounded]`
    pub fn wants_frames(&self) -> bool {
        self.end().is_none() && !self.outbox.is_full(self.config.limits.max_connections)
    }

    /// What the peer receives in this session.
    pub const fn peer_limits(&self) -> &SessionLimits {
        &self.peer_limits
    }

    /// The round-trip time that the last pong measured.
    pub const fn rtt(&self) -> Option<Duration> {
        self.timers.rtt()
    }

    /// Connections in the table: open, opening and closing ones.
    pub fn connection_count(&self) -> usize {
        self.connections.len()
    }

    /// Calls in the table, of both directions.
    pub fn call_count(&self) -> usize {
        self.calls.len()
    }

    /// The connection of a call that has not ended.
    pub fn call_connection(&self, call: CallKey) -> Option<ConnectionId> {
        self.calls.get(call).map(|call| call.connection)
    }

    /// Streams in the table, of both directions.
    pub fn stream_count(&self) -> usize {
        self.streams.len()
    }

    /// Whether an event waits.
    pub fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    /// The connection of a stream that has not ended.
    pub fn stream_connection(&self, stream: StreamKey) -> Option<ConnectionId> {
        self.streams.get(stream).map(|entry| entry.connection)
    }

    /// A stream's id on the wire, once it is announced there.
    pub fn stream_id(&self, stream: StreamKey) -> Option<StreamId> {
        self.streams.get(stream)?.id
    }

    /// How many requests and responses wait to be sent, if they are of about less than `bytes` in all and nothing else
    /// waits: then a driver may do well to let other tasks add theirs before it writes.
    pub fn small_bodies(&self, bytes: usize) -> Option<usize> {
        if !self.outbox.has_only_bodies() {
            return None;
        }
        let waiting = self.outbox.ring.iter().map_while(|id| self.connections.get(id)?.active.as_deref());
        let (mut sum, mut count) = (0usize, 0usize);
        for active in waiting {
            let is_stream =
                |source: &outbox::Source| matches!(source, outbox::Source::Stream(_) | outbox::Source::Relayed);
            if active.ready.iter().any(is_stream) {
                return None;
            }
            for queue in [&active.requests, &active.responses] {
                // The first body stands for its neighbours: this is asked before each write.
                let each = queue.front().map_or(0, |body| body.payload.len().saturating_add(32));
                sum = sum.saturating_add(each.saturating_mul(queue.len()));
                count = count.saturating_add(queue.len());
            }
        }
        (sum < bytes).then_some(count)
    }

    fn lane(&self, connection: ConnectionId) -> Lane {
        match self.config.lanes {
            LaneMode::One => Lane(0),
            LaneMode::PerConnection => Lane(connection.0),
        }
    }

    fn control<H: crate::message::Header>(&mut self, connection: ConnectionId, header: &H) {
        self.control_with(connection, header, bytes::Bytes::new());
    }

    fn control_with<H: crate::message::Header>(&mut self, connection: ConnectionId, header: &H, payload: bytes::Bytes) {
        let lane = self.lane(connection);
        let frame = Transmit { lane, head: crate::message::encode_head(header), payload };
        match &mut self.held {
            // While opens are held no connection is the peer's, so this is an Open of ours, or its Close behind it.
            Some(held) if self.phase == Phase::Open && !connection.is_root() => held.push_back(frame),
            _ => self.outbox.push_control(frame, false),
        }
    }

    /// A frame that the peer made us send.
    fn answer<H: crate::message::Header>(&mut self, connection: ConnectionId, header: &H) {
        self.answer_with(connection, header, bytes::Bytes::new());
    }

    fn answer_with<H: crate::message::Header>(&mut self, connection: ConnectionId, header: &H, payload: bytes::Bytes) {
        let frame = Transmit { payload, ..self.frame(connection, header) };
        self.outbox.push_control(frame, true);
    }
}

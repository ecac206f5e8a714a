//! What a session looks like from outside: counts for whoever watches over it.
//!
//! Nothing here is kept for the purpose but a few counts of opens; the rest is read from the tables when it is asked for.

use core::time::Duration;

use serde::{Deserialize, Serialize};

use super::connection::State;
use super::outbox::{MAX_ANSWERS, MAX_PAYMENTS};
use super::{Machine, Phase};
use crate::id::ConnectionId;

/// How often connections were opened, accepted and refused since the session began.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct OpenStats {
    /// Opens of this side.
    pub opened_by_us: u64,
    /// Those of them that the peer rejected.
    pub rejected_by_peer: u64,
    /// Opens of the peer.
    pub opened_by_peer: u64,
    /// Those of them that this side rejected.
    pub rejected_by_us: u64,
}

/// A session at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionStats {
    /// Both sides have said hello and neither has ended the session.
    pub is_open: bool,
    /// One of the sides takes no new connections.
    pub is_going_away: bool,
    /// The last round-trip time that was measured.
    pub rtt: Option<Duration>,
    /// Opens since the session began.
    pub opens: OpenStats,
    /// Connections in the table: open, opening and closing ones.
    pub connections: usize,
    /// Opens of the peer that this side has not answered.
    pub unanswered_opens: u32,
    /// Calls that have not ended, of both directions.
    pub calls: usize,
    /// Streams that have not ended, of both directions.
    pub streams: usize,
    /// Control frames that wait to be sent.
    pub waiting_control: usize,
    /// Payment messages that wait to be sent.
    pub waiting_payments: usize,
    /// Connections that have something to send.
    pub waiting_connections: usize,
}

/// A queue of a session at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct QueueStats {
    /// What it is.
    pub name: &'static str,
    /// Whether the numbers count bytes; else they count entries.
    pub is_bytes: bool,
    /// What it holds at most.
    pub capacity: u64,
    /// What it holds.
    pub depth: u64,
    /// What it has held at most, as far as that is kept; at least what it holds.
    pub high_water: u64,
}

impl QueueStats {
    fn of(name: &'static str, capacity: usize, (depth, high_water): (usize, usize)) -> Self {
        let high_water = high_water.max(depth) as u64;
        QueueStats { name, is_bytes: false, capacity: capacity as u64, depth: depth as u64, high_water }
    }
}

/// What one connection has carried. Frames are those of its calls and streams, grants and payments included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FrameStats {
    /// Frames that came.
    pub frames_received: u64,
    /// Their bytes, without the length in front of each.
    pub bytes_received: u64,
    /// Frames that were given out to be written.
    pub frames_sent: u64,
    /// Their bytes.
    pub bytes_sent: u64,
}

impl FrameStats {
    pub(super) fn count_received(&mut self, bytes: usize) {
        self.frames_received = self.frames_received.saturating_add(1);
        self.bytes_received = self.bytes_received.saturating_add(bytes as u64);
    }

    pub(super) fn count_sent(&mut self, bytes: usize) {
        self.frames_sent = self.frames_sent.saturating_add(1);
        self.bytes_sent = self.bytes_sent.saturating_add(bytes as u64);
    }
}

/// Where a connection stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConnectionState {
    /// Asked for, not answered.
    Opening,
    /// Calls may be made.
    Open,
    /// This side has closed it, and waits for the peer to do so.
    Closing,
}

/// A connection at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionStats {
    /// The connection.
    pub id: ConnectionId,
    /// Where it stands.
    pub state: ConnectionState,
    /// Whether this side asked for it.
    pub opened_by_us: bool,
    /// Whether its frames go to another session.
    pub is_relayed: bool,
    /// Whether it is a payment channel.
    pub is_paid: bool,
    /// Calls of this side that are on their way.
    pub calls: usize,
    /// Calls of this side that wait for their turn, the window or the peer's `max_calls`.
    pub waiting_calls: usize,
    /// Calls of the peer that have not ended.
    pub served_calls: usize,
    /// Answers of this side that wait for their turn or the window.
    pub waiting_answers: usize,
    /// Streams that have not ended, of both directions.
    pub streams: usize,
    /// Whether one of the sides takes no new calls.
    pub is_draining: bool,
    /// What it has carried.
    pub traffic: FrameStats,
    /// Bytes of bodies that were sent.
    pub body_bytes_sent: u64,
    /// Bytes of bodies that came.
    pub body_bytes_received: u64,
    /// Bytes of bodies that may be sent before the peer grants more.
    pub body_credit: u64,
    /// Bytes of bodies that the peer may send before this side grants more.
    pub body_credit_granted: u64,
}

impl Machine {
    /// The session at this moment.
    pub fn stats(&self) -> SessionStats {
        SessionStats {
            is_open: self.phase == Phase::Open,
            is_going_away: self.going_away.is_some() || self.peer_going_away.is_some(),
            rtt: self.rtt(),
            opens: self.open_stats,
            connections: self.connections.len(),
            unanswered_opens: self.opens.peers_pending,
            calls: self.calls.len(),
            streams: self.streams.len(),
            waiting_control: self.outbox.control_count(),
            waiting_payments: self.outbox.payment.len(),
            waiting_connections: self.outbox.ring.len(),
        }
    }

    /// What waits in the session as a whole, and what a peer may make of each.
    pub fn queues(&self) -> [QueueStats; 5] {
        let answers = MAX_ANSWERS.saturating_add(self.config.limits.max_connections as usize);
        let opens = self.opens.peers_pending as usize;
        let unfinished = self.unfinished_work();
        let memory = QueueStats::of("session.memory", 0, (0, 0));
        [
            QueueStats::of("session.answers", answers, self.outbox.answers()),
            QueueStats::of("session.payments", MAX_PAYMENTS, self.outbox.payments()),
            QueueStats::of("session.opens", self.config.limits.max_pending_opens as usize, (opens, opens)),
            QueueStats::of("session.work", self.config.abuse.unfinished_work as usize, (unfinished, unfinished)),
            QueueStats {
                is_bytes: true,
                capacity: self.config.memory.session,
                depth: self.ledger.charged(),
                high_water: self.ledger.most_charged(),
                ..memory
            },
        ]
    }

    /// Bytes that are held in relays: what waits for sides that do not read, and open calls and streams. And how many may be.
    pub fn relay_memory(&self) -> Option<(u64, u64)> {
        self.relay_pool.as_ref().map(|pool| (pool.lent(), pool.limit()))
    }

    /// Its connections at this moment, in the order of their ids, `most` at most.
    pub fn connection_stats(&self, most: usize) -> Vec<ConnectionStats> {
        let mut ids: Vec<ConnectionId> = self.connections.keys().copied().collect();
        ids.sort_unstable();
        ids.into_iter().take(most).filter_map(|id| self.stats_of(id)).collect()
    }

    fn stats_of(&self, id: ConnectionId) -> Option<ConnectionStats> {
        let connection = self.connections.get(&id)?;
        let active = connection.active.as_deref();
        let count = |of: fn(&super::connection::Active) -> usize| active.map_or(0, of);
        let (mut sent, mut received) = connection.first_windows();
        if let Some(active) = active {
            (sent, received) = (active.send_window, active.recv_window);
        }
        Some(ConnectionStats {
            id,
            state: match connection.state {
                State::Opening | State::Requested => ConnectionState::Opening,
                State::Open => ConnectionState::Open,
                State::Closing => ConnectionState::Closing,
            },
            opened_by_us: connection.opened_by_us,
            is_relayed: connection.relayed,
            is_paid: connection.money.is_some(),
            calls: count(|active| active.calls.len()),
            waiting_calls: count(|active| active.requests.len()),
            served_calls: count(|active| active.served.len()),
            waiting_answers: count(|active| active.responses.len()),
            streams: count(|active| active.owned.len()),
            is_draining: connection.drain.is_by_peer() || connection.drain.is_by_us(),
            traffic: active.map_or(FrameStats::default(), |active| active.traffic),
            body_bytes_sent: sent.sent,
            body_bytes_received: received.received,
            body_credit: sent.limit.saturating_sub(sent.sent),
            body_credit_granted: received.limit.saturating_sub(received.received),
        })
    }
}

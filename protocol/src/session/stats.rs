//! What a session looks like from outside: counts for whoever watches over it.
//!
//! Nothing here is kept for the purpose but a few counts of opens; the rest is read from the tables when it is asked for.

use core::time::Duration;

use serde::{Deserialize, Serialize};

use super::connection::State;
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
            body_bytes_sent: sent.sent,
            body_bytes_received: received.received,
            body_credit: sent.limit.saturating_sub(sent.sent),
            body_credit_granted: received.limit.saturating_sub(received.received),
        })
    }
}

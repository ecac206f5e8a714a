//! Lanes of a conduit that has one for each connection: which of them take nothing for now, and which have ended.

use super::Machine;
use crate::frame::{Lane, Transmit};
use crate::id::ConnectionId;
use crate::message::{Close, Header, Reject};
use crate::session::LaneMode;

impl Machine {
    /// Gives no more data of this lane's connection out, until [`release_lane`](Self::release_lane): its lane takes
    /// nothing for now, and others go on. Control, grants and payments are not held.
    pub fn hold_lane(&mut self, lane: Lane) {
        if let Some(connection) = self.connections.get_mut(&ConnectionId(lane.0)) {
            connection.held = true;
        }
    }

    /// The lane takes data again.
    pub fn release_lane(&mut self, lane: Lane) {
        let id = ConnectionId(lane.0);
        let Some(connection) = self.connections.get_mut(&id) else { return };
        connection.held = false;
        if connection.active.as_ref().is_some_and(|active| !active.ready.is_empty()) {
            self.enter_ring(id);
        }
    }

    /// A lane on which this side sends nothing any more, each once or twice: its last frame was given out by
    /// [`poll_transmit`](Self::poll_transmit), or none is due. There are none on a conduit with one lane.
    pub fn poll_ended_lane(&mut self) -> Option<Lane> {
        self.outbox.ended.pop_front()
    }

    /// The next control frame. Close and Reject are the last frames of their senders. `[conduit.quic.end]`
    pub(super) fn take_control(&mut self) -> Option<Transmit> {
        let frame = self.outbox.pop_control()?;
        let is_last = matches!(frame.head.first(), Some(&Close::KIND | &Reject::KIND));
        if self.config.lanes == LaneMode::PerConnection && is_last && frame.lane != Lane::ROOT {
            self.outbox.ended.push_back(frame.lane);
        }
        Some(frame)
    }

    /// Whoever is rejected has nothing to answer.
    pub(super) fn note_rejected(&mut self, lane: Lane) {
        if self.config.lanes == LaneMode::PerConnection {
            self.outbox.ended.push_back(lane);
        }
    }
}

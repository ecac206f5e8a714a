//! Connections whose frames are handed on instead of being understood: each is one side of a relay.
//!
//! The machine opens, answers and closes them like any other, and gives them their turns. What is in their frames is
//! checked by a [`Bridge`](crate::relay::Bridge), which knows both sides.

use std::sync::Arc;

use bytes::Bytes;

use super::connection::State;
use super::outbox::Source;
use super::{CommandError, Event, Machine, OpenSpec, StreamSource};
use crate::error::Violation;
use crate::frame::{Lane, Transmit};
use crate::id::ConnectionId;
use crate::limits::ConnectionLimits;
use crate::memory::MemoryPool;
use crate::message::{Drained, Draining, Header, Payment, Request};
use crate::metadata::Metadata;
use crate::relay::Relayed;
use crate::time::Time;

impl Machine {
    /// Asks the peer for a connection whose frames come as [`Event::Relayed`]. The answer comes as for every open.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn open_relayed(&mut self, now: Time, spec: OpenSpec<'_>) -> Result<ConnectionId, CommandError> {
        let id = self.open_as(now, spec, None)?;
        self.set_relayed(id);
        Ok(id)
    }

    /// Accepts [`Event::ConnectionRequested`] as a connection whose frames come as [`Event::Relayed`].
    ///
    /// # Errors
    /// As [`accept`](Self::accept).
    pub fn accept_relayed(
        &mut self,
        id: ConnectionId,
        limits: ConnectionLimits,
        metadata: Metadata,
        receipt: Bytes,
    ) -> Result<(), CommandError> {
        self.accept_as(id, limits, metadata, receipt, None)?;
        self.set_relayed(id);
        Ok(())
    }

    /// Where frames of this session's peer count that wait in relays, and the calls and streams that it has open there: as
    /// much as the session may be made to hold otherwise, and out of the same pool of the process.
    pub fn relay_pool(&mut self) -> Arc<MemoryPool> {
        let memory = &self.config.memory;
        let make = || match &memory.pool {
            Some(pool) => MemoryPool::within(memory.session, pool.clone()),
            None => MemoryPool::new(memory.session),
        };
        self.relay_pool.get_or_insert_with(|| Arc::new(make())).clone()
    }

    fn set_relayed(&mut self, id: ConnectionId) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.relayed = true;
            self.relayed = self.relayed.saturating_add(1);
        }
    }

    /// Something waits for the peer of a relayed connection: it is fetched by [`StreamSource::take_relayed`] when the
    /// connection's turn comes.
    pub fn relay_ready(&mut self, id: ConnectionId) {
        let connection = self.connections.get_mut(&id).filter(|connection| connection.relayed);
        if let Some(connection) = connection
            // One that is not accepted yet is scheduled when it is.
            && connection.state == State::Open
            && !core::mem::replace(&mut connection.relay_ready, true)
        {
            self.schedule(id, Source::Relayed);
        }
    }

    /// The relayed connection that a frame is for, if it is for one.
    pub(super) fn relayed_connection(&self, kind: u8, frame: &Bytes) -> Option<ConnectionId> {
        let is_passed_on = (Request::KIND..=Payment::KIND).contains(&kind);
        if self.relayed == 0 || !(is_passed_on || matches!(kind, Draining::KIND | Drained::KIND)) {
            return None;
        }
        let (id, _) = postcard::take_from_bytes::<ConnectionId>(frame.get(1..)?).ok()?;
        self.connections.get(&id).filter(|live| live.relayed && live.state == State::Open).map(|_| id)
    }

    pub(super) fn receive_relayed(
        &mut self,
        lane: Lane,
        connection: ConnectionId,
        frame: Bytes,
    ) -> Result<(), Violation> {
        self.check_lane(lane, connection)?;
        if let Some(live) = self.connections.get_mut(&connection) {
            live.active().traffic.count_received(frame.len());
        }
        self.events.push_back(Event::Relayed { connection, frame });
        Ok(())
    }

    pub(super) fn take_relayed(&mut self, id: ConnectionId, streams: &mut impl StreamSource) -> Option<Transmit> {
        let lane = self.lane(id);
        match streams.take_relayed(id, self.peer_limits.max_frame as usize) {
            Relayed::Frame { head, payload } => {
                self.schedule(id, Source::Relayed);
                Some(Transmit { lane, head, payload })
            }
            Relayed::Close(reason) => {
                self.close(id, reason);
                self.take_control()
            }
            Relayed::Empty => {
                if let Some(connection) = self.connections.get_mut(&id) {
                    connection.relay_ready = false;
                }
                None
            }
        }
    }
}

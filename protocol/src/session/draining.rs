//! Draining a connection: no new calls are taken on it, those that are open run to their end, and then it closes.
//!
//! Draining says so; its receiver answers with Drained behind its last Request. So the side that drains knows that it has
//! seen every call, and can close without leaving a caller in doubt whether its call was executed: those that crossed the
//! Draining are answered with Refused.
//!
//! ```text
//!   we drain:        Open ──drain()──► Said ──Drained──► Heard ──the last call ends──► Closing
//!                                        └──────deadline───┴─────────────────────────────▲
//!   the peer drains: Open ──Draining: what waits is given up, Drained sent──► no call of ours begins any more
//! ```
//!
//! Both may be true of one connection at once. A paid connection is not closed by its last call: its payer has the
//! channel closed first, and the deadline stands behind that too.

use core::time::Duration;

use super::connection::State;
use super::{CommandError, Event, Machine};
use crate::error::{ConnectionEnd, Reason, Violation, code};
use crate::frame::Lane;
use crate::id::ConnectionId;
use crate::message::{Drained, Draining, Header, Request};
use crate::metadata::Metadata;
use crate::time::Time;

/// Which sides of a connection take no new calls.
#[derive(Debug, Default)]
pub(super) struct Drain {
    /// Boxed, because an idle connection is one small table entry.
    ours: Option<Box<OwnDrain>>,
    /// The peer has said Draining, and we have said Drained.
    by_peer: bool,
}

/// We take no new calls.
#[derive(Debug)]
struct OwnDrain {
    reason: Reason,
    /// The peer has said Drained.
    heard: bool,
}

impl Drain {
    pub(super) const fn is_by_peer(&self) -> bool {
        self.by_peer
    }

    pub(super) const fn is_by_us(&self) -> bool {
        self.ours.is_some()
    }

    /// Why a call that came is to be refused, if it is. `[session.drain.refused]`
    pub(super) fn refuse_call(&self) -> Result<Option<Reason>, Violation> {
        match self.ours.as_deref() {
            None => Ok(None),
            Some(OwnDrain { heard: false, reason }) => Ok(Some(Reason::new(code::GOING_AWAY, reason.text.as_str()))),
            // [session.drain.calls]
            Some(OwnDrain { heard: true, .. }) => {
                Err(Violation::Unexpected { frame: Request::NAME, state: "it was to be the last one before Drained" })
            }
        }
    }
}

/// What a refused call is answered with, beside its status.
pub(super) fn refused_with(reason: &Reason) -> Metadata {
    Metadata::new().with("code", reason.code.to_string()).with("text", reason.text.as_str())
}

impl Machine {
    /// Takes no new calls of the peer's on a connection, and closes it with `reason` when those that are open have ended, or
    /// after `grace`, whatever is open then. A paid connection is closed by its payer, or after `grace`. The first drain
    /// stands.
    ///
    /// # Errors
    /// When the connection is not open, or is relayed: then it is [`Bridge::drain`](crate::relay::Bridge::drain)'s.
    pub fn drain(
        &mut self,
        now: Time,
        id: ConnectionId,
        reason: Reason,
        grace: Option<Duration>,
    ) -> Result<(), CommandError> {
        self.check_drainable(id)?;
        if self.begin_drain(id, reason, grace)
            && let Some(grace) = grace
        {
            let connections = &self.connections;
            self.drains.enter(now.after(grace), id, connections.len(), |id| connections.contains_key(&id));
        }
        Ok(())
    }

    fn check_drainable(&self, id: ConnectionId) -> Result<(), CommandError> {
        let open = self.connections.get(&id).is_some_and(|live| live.state == State::Open && !live.relayed);
        if open { Ok(()) } else { Err(CommandError::NoConnection(id)) }
    }

    /// Takes no new connections, and drains those that are open or will yet be, without a deadline. Relayed ones are left to
    /// their [`Bridge`](crate::relay::Bridge).
    pub fn drain_all(&mut self, reason: Reason) {
        self.go_away(reason.clone());
        let mut open: Vec<ConnectionId> = self.connections.keys().copied().collect();
        open.sort_unstable();
        for id in open {
            if self.check_drainable(id).is_ok() {
                self.begin_drain(id, reason.clone(), None);
            }
        }
        self.draining = Some(reason);
    }

    /// A connection has opened: while the session drains, it does too.
    pub(super) fn drain_opened(&mut self, id: ConnectionId) {
        if let Some(reason) = self.draining.clone()
            && self.check_drainable(id).is_ok()
        {
            self.begin_drain(id, reason, None);
        }
    }

    /// Says Draining. Returns whether it was not said before.
    fn begin_drain(&mut self, id: ConnectionId, reason: Reason, grace: Option<Duration>) -> bool {
        let Some(connection) = self.connections.get_mut(&id).filter(|live| live.drain.ours.is_none()) else {
            return false;
        };
        let reason = Reason::new(reason.code, reason.text);
        connection.drain.ours = Some(Box::new(OwnDrain { reason: reason.clone(), heard: false }));
        let deadline_us = grace.map(|grace| u64::try_from(grace.as_micros()).unwrap_or(u64::MAX));
        self.control(id, &Draining { connection: id, deadline_us, reason: reason.into() });
        true
    }

    pub(super) fn receive_draining(&mut self, lane: Lane, draining: Draining) -> Result<(), Violation> {
        let id = draining.connection;
        let Some(connection) = self.live(lane, id, Draining::NAME)? else { return Ok(()) };
        // [session.drain.once]
        if core::mem::replace(&mut connection.drain.by_peer, true) {
            return Err(Violation::Unexpected { frame: Draining::NAME, state: "it is said once" });
        }
        let unsent = connection.active.as_deref_mut().map(|active| core::mem::take(&mut active.requests));
        let deadline = draining.deadline_us.map(Duration::from_micros);
        self.events.push_back(Event::ConnectionDraining { connection: id, reason: draining.reason.into(), deadline });
        for body in unsent.unwrap_or_default() {
            for stream in self.streams_of(body.call, id) {
                self.fail_removed(stream);
            }
            if self.calls.remove(body.call).is_some() {
                self.events.push_back(Event::CallUnsent { call: body.call });
            }
        }
        // [session.drain.answer] Not one of the answers that are counted: there is one for each open connection at most, and
        // the answered Close that makes room for another connection is counted.
        self.control(id, &Drained { connection: id });
        self.close_if_drained(id);
        Ok(())
    }

    pub(super) fn receive_drained(&mut self, lane: Lane, drained: &Drained) -> Result<(), Violation> {
        let id = drained.connection;
        let Some(connection) = self.live(lane, id, Drained::NAME)? else { return Ok(()) };
        // [session.drain.answer]
        match connection.drain.ours.as_deref_mut().filter(|ours| !ours.heard) {
            Some(ours) => ours.heard = true,
            None => return Err(Violation::Unexpected { frame: Drained::NAME, state: "it answers one Draining" }),
        }
        self.close_if_drained(id);
        Ok(())
    }

    /// Closes a connection that drains when no call of it is left, and none will come. `[session.drain.close]`
    pub(super) fn close_if_drained(&mut self, id: ConnectionId) {
        let Some(connection) = self.connections.get(&id) else { return };
        let Some(ours) = connection.drain.ours.as_deref().filter(|ours| ours.heard) else { return };
        if connection.money.is_none() && self.open_calls(id) == 0 {
            let reason = ours.reason.clone();
            self.close_with(id, reason.clone(), ConnectionEnd::ClosedByUs(reason));
        }
    }

    /// Closes the connections that did not drain in time. `[session.drain.close]`
    pub(super) fn close_overdue(&mut self, now: Time) {
        while let Some(id) = self.drains.take_due(now) {
            if self.connections.get(&id).is_some_and(|live| live.drain.ours.is_some()) {
                let reason = Reason::new(code::DEADLINE, "the connection did not drain in time");
                self.close_with(id, reason.clone(), ConnectionEnd::ClosedByUs(reason));
            }
        }
    }
}

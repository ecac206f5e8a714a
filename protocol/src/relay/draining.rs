//! Draining through a relay: passed on from either side, or begun by the relay itself.
//!
//! A side is told once that no new calls are taken, whoever says it first: the other side, or the relay, because one of its
//! sessions is going away. It answers once. Who begins it also closes: what the other side began is closed by that, and what
//! the relay began by the relay, unless the connection is paid: then its payer closes it. `[relay.draining]`

use bytes::Bytes;

use super::{Bridge, RelayError, Side};
use crate::error::{Reason, Violation};
use crate::id::ConnectionId;
use crate::message::{Drained, Draining, Header, Request};

/// Whether a side still makes calls.
#[derive(Debug, Default)]
pub(super) struct Drain {
    /// It was told to make none.
    told: bool,
    /// It has said that it makes none.
    heard: bool,
    /// The other side has told it, and waits for that word.
    asked: bool,
    /// The relay has told it, for this reason.
    by_relay: Option<Reason>,
}

impl Drain {
    /// Whether this side may make another call. `[session.drain.calls]`
    pub(super) fn check_call(&self) -> Result<(), Violation> {
        match self.heard {
            true => {
                Err(Violation::Unexpected { frame: Request::NAME, state: "it was to be the last one before Drained" })
            }
            false => Ok(()),
        }
    }
}

impl Bridge {
    /// Tells a side that no new calls are taken, because the relay or its way to the other side is going away.
    pub fn drain(&mut self, side: Side, reason: Reason) {
        let drain = &mut self.end(side).drain;
        if core::mem::replace(&mut drain.told, true) {
            return;
        }
        drain.by_relay = Some(reason.clone());
        // The id is written when the frame is taken.
        let draining = Draining { connection: ConnectionId::ROOT, deadline_us: None, reason: reason.into() };
        // No room means that the side does not read: the connection is closed for that as soon as more comes for it.
        let _overrun = self.end(side.other()).queue.pass_with(&draining, Bytes::new(), 0);
    }

    pub(super) fn receive_draining(&mut self, from: Side, draining: Draining) -> Result<(), RelayError> {
        debug_assert!(!draining.connection.is_root(), "the root is not relayed");
        let caller = &mut self.end(from.other()).drain;
        // [session.drain.once]
        if core::mem::replace(&mut caller.asked, true) {
            return Err(Violation::Unexpected { frame: Draining::NAME, state: "it is said once" }.into());
        }
        match (core::mem::replace(&mut caller.told, true), caller.heard) {
            (false, _) => {
                // Cut: nothing else bounds it by what the other side takes. [relay.checks]
                let reason = Reason::from(draining.reason).into();
                self.end(from).queue.pass_with(&Draining { reason, ..draining }, Bytes::new(), 0)
            }
            // The answer to the relay's own answers this, too.
            (true, true) => {
                let drained = Drained { connection: ConnectionId::ROOT };
                self.end(from.other()).queue.pass_with(&drained, Bytes::new(), 0)
            }
            (true, false) => Ok(()),
        }
    }

    pub(super) fn receive_drained(&mut self, from: Side, frame: &Bytes) -> Result<(), RelayError> {
        let drain = &mut self.end(from).drain;
        // [session.drain.answer]
        if !drain.told || core::mem::replace(&mut drain.heard, true) {
            return Err(Violation::Unexpected { frame: Drained::NAME, state: "it answers one Draining" }.into());
        }
        match drain.asked {
            true => self.end(from).queue.pass(frame, 0),
            false => Ok(()),
        }
    }

    /// Closes both sides, behind all that waits for them, once what the relay has drained has no call left.
    pub(super) fn close_if_drained(&mut self) {
        if self.is_paid || !self.calls.is_empty() {
            return;
        }
        let drained =
            [&self.left.drain, &self.right.drain].into_iter().find(|drain| drain.heard && drain.by_relay.is_some());
        if let Some(reason) = drained.and_then(|drain| drain.by_relay.clone()) {
            self.left.queue.finish(reason.clone());
            self.right.queue.finish(reason);
        }
    }
}

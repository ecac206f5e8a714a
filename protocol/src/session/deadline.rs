//! Deadlines of calls: a call ends with its deadline, whether it waits, runs or streams, and on each side by its own clock.
//!
//! The caller counts from when it made the call and says what is left when the request is sent; the callee counts from
//! when it came. A call without a deadline costs nothing here.

use core::cmp::Reverse;
use std::collections::BinaryHeap;

use super::connection::CallState;
use super::money::Money;
use super::{CallKey, Event, Machine};
use crate::error::code;
use crate::message::{Flow, Status};
use crate::metadata::Metadata;
use crate::time::Time;

/// Deadlines of calls that have ended and may lie in the heap beside as many as there are calls: so cleaning up is rare.
const SPARE: usize = 64;

/// The deadlines, the next one first. One whose call has ended is dropped when its time comes, or with many others.
#[derive(Debug, Default)]
pub(super) struct Deadlines {
    heap: BinaryHeap<Reverse<(Time, CallKey)>>,
}

impl Deadlines {
    pub(super) fn next(&self) -> Option<Time> {
        self.heap.peek().map(|Reverse((at, _))| *at)
    }

    /// Takes the next one that has come.
    fn take_due(&mut self, now: Time) -> Option<CallKey> {
        self.heap.peek().filter(|Reverse((at, _))| *at <= now)?;
        self.heap.pop().map(|Reverse((_, call))| call)
    }
}

impl Machine {
    /// The call ends at this time, if it has not ended before. `[call.deadline]`
    pub(super) fn watch_deadline(&mut self, call: CallKey, at: Time) {
        let (deadlines, calls) = (&mut self.deadlines.heap, &self.calls);
        if deadlines.len() >= calls.len().saturating_mul(2).saturating_add(SPARE) {
            deadlines.retain(|Reverse((_, call))| calls.contains_key(*call));
        }
        deadlines.push(Reverse((at, call)));
    }

    /// Deadlines in the table, those of calls that have ended included.
    pub fn deadline_count(&self) -> usize {
        self.deadlines.heap.len()
    }

    /// Ends the calls whose time has come.
    pub(super) fn expire_calls(&mut self, now: Time) {
        while let Some(call) = self.deadlines.take_due(now) {
            self.expire_call(call);
        }
    }

    /// Ends a call late. The caller cancels it; the callee's handler is to be dropped, and answered for with
    /// DeadlineExceeded. Its streams end on both sides.
    pub(super) fn expire_call(&mut self, key: CallKey) {
        let Some(call) = self.calls.get(key) else { return };
        let (connection, state) = (call.connection, call.state);
        if let CallState::Running { .. } = state
            && let Some(Money::Payee(payee)) =
                self.connections.get_mut(&connection).and_then(|it| it.money.as_deref_mut())
            && let Some(at) = payee.calls.iter().position(|waiting| waiting.call == key)
        {
            // No handler has seen it, so nothing is charged.
            if let Some(waiting) = payee.calls.remove(at) {
                self.fail_unstarted(waiting, Status::DeadlineExceeded, Metadata::new());
            }
            return self.resume_paid(connection);
        }
        let sent = state != CallState::Queued;
        self.events.push_back(Event::CallExpired { call: key, sent });
        for stream in self.streams_of(key, connection) {
            self.events.push_back(Event::StreamExpired { stream });
            if self.streams.get(stream).is_some_and(|entry| entry.flow == Flow::FromPeer) {
                self.stop_stream(stream, code::DEADLINE);
            }
        }
        match state {
            CallState::Queued | CallState::Sent { .. } | CallState::Answered { .. } => self.cancel_call(key),
            CallState::Responding { .. } => self.cancel_unpaid_response(key, connection, Status::DeadlineExceeded),
            CallState::Running { .. } | CallState::Responded { .. } => {}
        }
    }
}

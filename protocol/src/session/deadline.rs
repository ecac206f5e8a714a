//! Deadlines, and those of calls above all: a call ends with its deadline, whether it waits, runs or streams, and on each side by its own clock.
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

/// Deadlines of what has ended that may lie in the heap beside as many as there are live ones: so cleaning up is rare.
const SPARE: usize = 64;

/// Deadlines of things of one kind, the next one first. One of a thing that has ended is dropped when its time comes, or
/// with many others.
#[derive(Debug)]
pub(super) struct Deadlines<K> {
    heap: BinaryHeap<Reverse<(Time, K)>>,
}

impl<K: Ord> Default for Deadlines<K> {
    fn default() -> Self {
        Deadlines { heap: BinaryHeap::new() }
    }
}

impl<K: Ord + Copy> Deadlines<K> {
    pub(super) fn next(&self) -> Option<Time> {
        self.heap.peek().map(|Reverse((at, _))| *at)
    }

    pub(super) fn len(&self) -> usize {
        self.heap.len()
    }

    /// Takes the next one that has come.
    pub(super) fn take_due(&mut self, now: Time) -> Option<K> {
        self.heap.peek().filter(|Reverse((at, _))| *at <= now)?;
        self.heap.pop().map(|Reverse((_, key))| key)
    }

    /// Enters the deadline of one of so many live things.
    pub(super) fn enter(&mut self, at: Time, key: K, live: usize, is_live: impl Fn(K) -> bool) {
        if self.heap.len() >= live.saturating_mul(2).saturating_add(SPARE) {
            self.heap.retain(|Reverse((_, key))| is_live(*key));
        }
        self.heap.push(Reverse((at, key)));
    }
}

impl Machine {
    /// The call ends at this time, if it has not ended before. `[call.deadline]`
    pub(super) fn watch_deadline(&mut self, call: CallKey, at: Time) {
        let calls = &self.calls;
        self.deadlines.enter(at, call, calls.len(), |call| calls.contains_key(call));
    }

    /// Deadlines in the table, those of calls and connections that have ended included.
    pub fn deadline_count(&self) -> usize {
        self.deadlines.len().saturating_add(self.drains.len())
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

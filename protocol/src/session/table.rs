//! How entries leave the tables, and how data sources enter the outbox.

use std::collections::VecDeque;

use super::connection::{CallState, Connection, State};
use super::money::Money;
use super::outbox::{Body, Source};
use super::{CallKey, Event, Machine};
use crate::error::{ConnectionEnd, SessionEnd, code};
use crate::id::ConnectionId;
use crate::message::Done;
use crate::payment::Usage;
use crate::stream::StreamKey;

/// Whether this side has ended a connection for a reason that is not its peer's: what its handlers had begun is free then.
fn is_fault_of_ours(end: &ConnectionEnd) -> bool {
    match end {
        ConnectionEnd::ClosedByUs(reason) => reason.code != code::PAYMENT_ENDED,
        ConnectionEnd::Session(SessionEnd::ClosedByUs(_)) => true,
        _ => false,
    }
}

impl Machine {
    /// Drops an entry that has no calls.
    pub(super) fn remove_connection(&mut self, id: ConnectionId) {
        self.forget_connection(id, None);
    }

    /// Drops an entry. `end` tells the application that it, its calls and its streams have ended.
    pub(super) fn forget_connection(&mut self, id: ConnectionId, end: Option<ConnectionEnd>) {
        let Some(mut connection) = self.connections.remove(&id) else { return };
        self.relayed = self.relayed.saturating_sub(usize::from(connection.relayed));
        if self.connections.is_empty() {
            self.timers.start_idle();
        }
        let counts = &mut self.opens;
        let (live, pending) = match connection.opened_by_us {
            true => (&mut counts.ours, &mut counts.ours_pending),
            false => (&mut counts.peers, &mut counts.peers_pending),
        };
        *live = live.saturating_sub(1);
        if connection.unanswered {
            *pending = pending.saturating_sub(1);
        }
        let was_closing = connection.state == State::Closing;
        if end.as_ref().is_some_and(|end| !is_fault_of_ours(end)) {
            self.charge_unanswered(&mut connection);
        }
        if let Some(Money::Payee(payee)) = connection.money.as_deref() {
            for waiting in &payee.calls {
                self.fail_ended_slots(waiting);
                self.ledger.release(waiting.payload.len() as u64);
            }
            self.ledger.release(waiting_bytes(&payee.responses));
        }
        if let Some(active) = connection.active {
            self.ledger.release(waiting_bytes(&active.responses));
            let queued = active.requests.iter().map(|body| body.call);
            let calls = active.calls.values().chain(active.served.values()).copied().chain(queued);
            for call in calls {
                if let Some(gone) = self.calls.remove(call) {
                    if gone.reports {
                        let charged = gone.meter.charged();
                        self.events.push_back(Event::CallCharged { call, charged });
                    }
                    self.events.push_back(Event::CallFailed { call });
                }
            }
            for stream in active.owned {
                let held = self.end_grant(stream).0;
                self.streams.remove(stream);
                self.events.push_back(Event::StreamFailed { stream, held });
            }
        }
        if let (Some(end), false) = (end, was_closing) {
            let money = connection.money.as_deref().map(Money::count);
            self.events.push_back(Event::ConnectionClosed { connection: id, end, money });
        }
    }

    /// A connection that the payer has ended, or that was lost, costs the call price of every handler that had started:
    /// computing for nothing would be a theft, too. `[pay.call.lost]`
    fn charge_unanswered(&mut self, connection: &mut Connection) {
        let (Some(Money::Payee(payee)), Some(active)) = (connection.money.as_deref_mut(), &connection.active) else {
            return;
        };
        for key in active.served.values() {
            let Some(call) = self.calls.get_mut(*key).filter(|call| call.meter.usage() == Usage::default()) else {
                continue;
            };
            let Some(held) = call.held.take() else { continue };
            let price = call.price.map(|index| payee.prices.price(index)).unwrap_or_default();
            // An answer that waits may state what was paid before; a handler that runs has not said it.
            call.meter.state_paid_before(call.paid_before);
            payee.release(held);
            // Within what was held.
            let cost = call.meter.charge(&price, Usage::default()).unwrap_or_default();
            payee.spend(cost, 0, 0);
        }
    }

    /// Forgets a stream that has ended, and its call if that was the last thing of it.
    pub(super) fn remove_stream(&mut self, key: StreamKey) {
        let Some(entry) = self.streams.remove(key) else { return };
        self.ledger.release(entry.granted.charge());
        if let Some(connection) = self.connections.get_mut(&entry.connection) {
            let active = connection.active();
            active.owned.remove(&key);
            if let Some(id) = entry.id {
                active.streams.remove(&id);
            }
            let count = if entry.opened_by_us { &mut active.own_streams } else { &mut active.peer_streams };
            *count = count.saturating_sub(1);
        }
        if let Some(call) = self.calls.get_mut(entry.call) {
            call.streams = call.streams.saturating_sub(1);
            self.end_served_call(entry.call);
        }
    }

    /// Sends Done for a call of the peer's once its response is on its way and its streams have ended.
    pub(super) fn end_served_call(&mut self, key: CallKey) {
        let Some(call) = self.calls.get(key) else { return };
        let CallState::Responded { id } = call.state else { return };
        if call.streams > 0 {
            return;
        }
        let (connection, charged, had_streams) = (call.connection, call.meter.charged(), call.had_streams);
        self.calls.remove(key);
        if let Some(live) = self.connections.get_mut(&connection) {
            live.active().served.remove(&id);
        }
        if had_streams {
            self.control(connection, &Done { connection, call: id, charged });
        }
        self.close_if_drained(connection);
    }

    pub(super) fn schedule(&mut self, id: ConnectionId, source: Source) {
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.active().ready.push_back(source);
            self.outbox.enter_ring(id, connection);
        }
    }

    pub(super) fn schedule_bodies(&mut self, id: ConnectionId) {
        if let Some(connection) = self.connections.get_mut(&id) {
            let active = connection.active();
            if active.ready_requests() | active.ready_responses() {
                self.outbox.enter_ring(id, connection);
            }
        }
    }

    pub(super) fn enter_ring(&mut self, id: ConnectionId) {
        if let Some(connection) = self.connections.get_mut(&id) {
            self.outbox.enter_ring(id, connection);
        }
    }
}

/// Bytes of answers that wait.
fn waiting_bytes(answers: &VecDeque<Body>) -> u64 {
    answers.iter().fold(0, |sum, answer| sum.saturating_add(answer.payload.len() as u64))
}

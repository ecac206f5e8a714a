//! What waits for money: when it goes on, and how it ends if the money does not come.

use bytes::Bytes;

use super::money::Money;
use super::outbox::{Body, BodyKind, Source};
use super::{CallKey, Event, IncomingCall, Machine, MoneyCount};
use crate::error::code;
use crate::id::ConnectionId;
use crate::message::Status;
use crate::metadata::Metadata;
use crate::payment::Amount;
use crate::stream::StreamKey;

impl Machine {
    /// Payee: spending up to `leased` base units is authorised and durable. What waited for money goes on.
    pub fn raise_money(&mut self, id: ConnectionId, leased: Amount) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let Some(Money::Payee(payee)) = connection.money.as_deref_mut() else { return };
        payee.raise(leased);
        self.resume_paid(id);
    }

    /// What waits for money is tried again, in its order: there is more money, or something no longer waits. What still
    /// cannot be paid says so again. `[pay.gate.resume]`
    pub(super) fn resume_paid(&mut self, id: ConnectionId) {
        let Some(connection) = self.connections.get_mut(&id) else { return };
        let Some(Money::Payee(payee)) = connection.money.as_deref_mut() else { return };
        if !payee.is_blocked() {
            return;
        }
        let (calls, responses, streams) = payee.take_waiting();
        let active = connection.active();
        // What waited stood first, and stands first again.
        responses.into_iter().rev().for_each(|body| active.responses.push_front(body));
        streams.into_iter().rev().for_each(|stream| active.ready.push_front(Source::Stream(stream)));
        let answers = !active.responses.is_empty() && !core::mem::replace(&mut active.responses_ready, true);
        if answers {
            active.ready.push_front(Source::Responses);
        }
        self.enter_ring(id);
        for incoming in calls {
            self.deliver_call(incoming, false);
        }
    }

    /// Payee: no more money will come than what is authorised. What waits for it in vain, and what will, ends with a
    /// payment error that is free; everything that can be paid goes on. `[pay.decline.ends]`
    pub fn fail_unpaid(&mut self, id: ConnectionId) {
        let money = self.connections.get_mut(&id).and_then(|live| live.money.as_deref_mut());
        if let Some(Money::Payee(payee)) = money {
            payee.give_up();
            self.resume_paid(id);
        }
    }

    /// Payee: the channel closes, so nothing more is charged, and what costs something ends with a payment error from now
    /// on. Returns the last counts; `None` when the connection is not one that is paid to this side. `[pay.close.stops]`
    ///
    /// # Errors
    /// The number of calls that have not ended. Nothing has changed then.
    pub fn stop_money(&mut self, id: ConnectionId) -> Result<Option<MoneyCount>, usize> {
        let open = self.open_calls(id);
        let money = self.connections.get_mut(&id).and_then(|live| live.money.as_deref_mut());
        let Some(Money::Payee(payee)) = money else { return Ok(None) };
        if open > 0 {
            return Err(open);
        }
        payee.stop();
        Ok(self.money(id))
    }

    /// Payee: what is needed beyond all that is spent, while something waits for money.
    pub fn money_needed(&self, id: ConnectionId) -> Option<Amount> {
        match self.connections.get(&id)?.money.as_deref()? {
            Money::Payee(payee) => payee.needed(),
            Money::Payer(_) => None,
        }
    }

    /// Answers a call that was never delivered. Its streams are unknown to the handler, so they end here.
    pub(super) fn fail_unstarted(&mut self, waiting: IncomingCall, status: Status, metadata: Metadata) {
        let (call, connection) = (waiting.call, waiting.connection);
        self.consume_body(connection, waiting.payload.len());
        self.fail_ended_slots(&waiting);
        let streams = self.streams_of(call, connection);
        self.push_response(call, status, metadata, Bytes::new(), Vec::new());
        for stream in streams {
            self.discard_stream(stream);
            // What is left of it counts until it ends, or was read.
            let held = if self.streams.contains_key(stream) { 0 } else { self.end_grant(stream).0 };
            self.events.push_back(Event::StreamFailed { stream, held });
        }
        if !waiting.slots.is_empty() {
            self.events.push_back(Event::CallFailed { call });
        }
    }

    /// A call whose streams were announced will not be delivered. Those that have ended before hold items that nobody
    /// will read.
    pub(super) fn fail_ended_slots(&mut self, waiting: &IncomingCall) {
        let ended = waiting.slots.iter().filter(|slot| !self.streams.contains_key(slot.stream));
        self.events.extend(ended.map(|slot| Event::StreamFailed { stream: slot.stream, held: 0 }));
    }

    /// An answer that waits for money which the caller no longer wants to pay gives way to one that costs no more than
    /// what was held for the call.
    pub(super) fn cancel_unpaid_response(&mut self, call: CallKey, id: ConnectionId, status: Status) {
        let money = self.connections.get_mut(&id).and_then(|live| live.money.as_deref_mut());
        if let Some(Money::Payee(payee)) = money
            && let Some(at) = payee.responses.iter().position(|waiting| waiting.call == call)
            && let Some(body) = payee.responses.remove(at)
        {
            self.replace_response(id, body, status, Metadata::new());
            self.resume_paid(id);
        }
    }

    /// Replaces an answer that cannot be paid by one that can. The streams that it would have announced fail.
    pub(super) fn replace_response(&mut self, id: ConnectionId, body: Body, status: Status, metadata: Metadata) {
        for stream in body.slots {
            self.fail_removed(stream);
        }
        if let Some(call) = self.calls.get_mut(body.call) {
            call.above_call = Amount::ZERO;
        }
        self.ledger.release(body.payload.len() as u64);
        let kind = BodyKind::Response { status };
        let replaced = Body { kind, metadata, payload: Bytes::new(), slots: Vec::new(), ..body };
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.active().responses.push_back(replaced);
        }
        self.schedule_bodies(id);
    }

    /// Ends a sending stream whose next item cannot be paid: the application resets it as if its receiver had asked.
    pub(super) fn fail_stream(&mut self, stream: StreamKey) {
        if let Some(entry) = self.streams.get_mut(stream) {
            entry.scheduled = false;
            self.events.push_back(Event::StreamStopped { stream, code: code::PAYMENT_ENDED });
        }
    }
}

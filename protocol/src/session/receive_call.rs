//! Frames in: requests, responses, cancels and the ends of calls.

use core::time::Duration;

use bytes::Bytes;

use super::connection::{Call, CallState};
use super::draining::refused_with;
use super::money::Money;
use super::receive::open_one;
use super::{CallKey, Event, IncomingCall, IncomingResponse, Machine};
use crate::error::Violation;
use crate::frame::Lane;
use crate::message::{Cancel, Done, Header, Request, Response, Status};
use crate::metadata::Metadata;
use crate::payment::{Amount, CallMeter, IDEMPOTENCY_KEY, Usage};

fn check_body(payload: &Bytes, max_body: u32) -> Result<(), Violation> {
    if payload.len() > max_body as usize {
        let (value, limit) = (payload.len() as u64, u64::from(max_body));
        return Err(Violation::AboveLimit { what: "body", value, limit });
    }
    Ok(())
}

impl Machine {
    pub(super) fn receive_request(&mut self, lane: Lane, request: Request, payload: Bytes) -> Result<(), Violation> {
        let id = request.connection;
        self.check_lane(lane, id)?;
        let Some(connection) = open_one(&mut self.connections, id) else {
            return self.drop_for_closed(lane, id, Request::NAME);
        };
        connection.active().traffic.count_received(self.frame_bytes);
        let refusal = connection.drain.refuse_call()?;
        let limits = &connection.limits;
        // [call.id.next]
        if !connection.peer_calls.expect(request.call.0) {
            return Err(Violation::CallId { id: request.call });
        }
        check_body(&payload, limits.max_body)?;
        let max_calls = limits.max_calls;
        let active = connection.active();
        active.recv_window.receive(payload.len())?;
        request.metadata.check()?;
        let served = active.served.len();
        if served >= max_calls as usize {
            let (value, limit) = (served.saturating_add(1) as u64, u64::from(max_calls));
            return Err(Violation::AboveLimit { what: "open calls", value, limit });
        }
        let price = match connection.money.as_deref() {
            Some(Money::Payee(payee)) => payee.prices.index(request.method),
            _ => None,
        };
        // It may wait for the one before it, which is charged: until it begins itself, it costs nothing. [pay.key.once]
        let is_named = price.is_some() && request.metadata.value(IDEMPOTENCY_KEY).is_some();
        let call = self.calls.insert(Call {
            connection: id,
            state: CallState::Running { id: request.call },
            streams: 0,
            had_streams: false,
            meter: CallMeter::default(),
            price,
            held: None,
            above_call: Amount::ZERO,
            paid_before: if is_named { Amount::MAX } else { Amount::ZERO },
            reports: false,
            cancelled: false,
        });
        connection.active().served.insert(request.call, call);
        let slots = self.register_slots(call, &request.slots)?;
        let time_left = request.deadline_us.map(Duration::from_micros);
        if let Some(left) = time_left {
            self.watch_deadline(call, self.timers.last_received().after(left));
        }
        let room = refusal.is_none() && self.ledger.try_charge(payload.len() as u64);
        let incoming = IncomingCall {
            connection: id,
            call,
            method: request.method,
            deadline: time_left,
            metadata: request.metadata,
            payload,
            slots,
        };
        match (refusal, room) {
            (Some(reason), _) => self.refuse_call(incoming, Status::Refused, refused_with(&reason)),
            (None, true) => self.deliver_call(incoming, true),
            (None, false) => self.refuse_call(incoming, Status::AtCapacity, Metadata::new()),
        }
        Ok(())
    }

    /// Hands a call to the application, or sets it aside until its price is covered: no handler starts that nobody
    /// pays for. `[pay.call.hold]`
    pub(super) fn deliver_call(&mut self, incoming: IncomingCall, is_new: bool) {
        let connection = incoming.connection;
        let price = self.calls.get(incoming.call).and_then(|call| call.price);
        let money = self.connections.get_mut(&connection).and_then(|live| live.money.as_deref_mut());
        if let (Some(price), Some(Money::Payee(payee))) = (price, money) {
            // The call price, or the most that its response may state. [pay.reserve.hold]
            let cost = payee.prices.price(price).hold();
            if payee.is_stopped() {
                let counts = payee.unpaid(cost);
                return self.fail_unstarted(incoming, Status::PaymentFailed, counts);
            }
            if !cost.is_zero() {
                if payee.is_blocked() || !payee.hold(cost) {
                    if payee.has_given_up() {
                        let counts = payee.unpaid(cost);
                        return self.fail_unstarted(incoming, Status::PaymentFailed, counts);
                    }
                    if is_new && !incoming.slots.is_empty() {
                        // Its items may come before it does.
                        let (call, slots) = (incoming.call, incoming.slots.clone());
                        self.events.push_back(Event::StreamsAnnounced { connection, call, slots });
                    }
                    payee.calls.push_back(incoming);
                    if let Some(cost) = payee.need(cost) {
                        self.events.push_back(Event::MoneyNeeded { connection, cost });
                    }
                    return;
                }
                if let Some(call) = self.calls.get_mut(incoming.call) {
                    call.held = Some(cost);
                }
            }
        }
        self.events.push_back(Event::CallRequested(incoming));
    }

    pub(super) fn receive_response(&mut self, lane: Lane, response: Response, payload: Bytes) -> Result<(), Violation> {
        let id = response.connection;
        self.check_lane(lane, id)?;
        let Some(connection) = open_one(&mut self.connections, id) else {
            return self.drop_for_closed(lane, id, Response::NAME);
        };
        connection.active().traffic.count_received(self.frame_bytes);
        // An answer to a call that has ended is a second one. [call.end.once]
        let key = connection.called(response.call, Response::NAME)?;
        check_body(&payload, connection.limits.max_body)?;
        connection.active().recv_window.receive(payload.len())?;
        response.metadata.check()?;
        let Some(call) = self.calls.get_mut(key) else { return Ok(()) };
        let CallState::Sent { id: call_id, cancelled } = call.state else {
            return Err(Violation::Unexpected { frame: Response::NAME, state: "the call was answered" });
        };
        call.state = CallState::Answered { id: call_id, cancelled };
        // An answer that is free, and before which nothing was counted, counts nothing. [pay.call.free-failure]
        if !(response.charged.is_zero() && call.meter.usage() == Usage::default()) {
            self.count_response(key, response.charged, payload.len() as u64)?;
        }
        let slots = self.register_slots(key, &response.slots)?;
        let Some(call) = self.calls.get(key) else { return Ok(()) };
        let is_end = !call.had_streams;
        let counted = call.meter.charged();
        let charged = response.charged;
        let (status, payload) = self.take_answer(id, response.status, payload);
        self.events.push_back(Event::CallAnswered(IncomingResponse {
            connection: id,
            call: key,
            status,
            charged,
            is_end,
            metadata: response.metadata,
            payload,
            slots,
        }));
        if is_end {
            self.end_own_call(key, charged, counted);
        }
        Ok(())
    }

    pub(super) fn receive_done(&mut self, lane: Lane, done: &Done) -> Result<(), Violation> {
        let Some(connection) = self.live(lane, done.connection, Done::NAME)? else { return Ok(()) };
        let key = connection.called(done.call, Done::NAME)?;
        let Some(call) = self.calls.get(key) else { return Ok(()) };
        // Response and streams first. [call.end.last]
        if call.streams > 0 || !matches!(call.state, CallState::Answered { .. }) {
            return Err(Violation::CallEndedEarly { id: done.call });
        }
        let counted = call.meter.charged();
        self.end_own_call(key, done.charged, counted);
        Ok(())
    }

    fn end_own_call(&mut self, key: CallKey, charged: Amount, counted: Amount) {
        let Some(call) = self.calls.remove(key) else { return };
        if let CallState::Sent { id, .. } | CallState::Answered { id, .. } = call.state
            && let Some(connection) = self.connections.get_mut(&call.connection)
        {
            let active = connection.active();
            active.calls.remove(&id);
            // A place for the next call.
            if active.ready_requests() {
                self.outbox.enter_ring(call.connection, connection);
            }
        }
        self.events.push_back(Event::CallEnded { call: key, charged, counted });
        self.close_if_drained(call.connection);
    }

    pub(super) fn receive_cancel(&mut self, lane: Lane, cancel: &Cancel) -> Result<(), Violation> {
        let Some(connection) = self.live(lane, cancel.connection, Cancel::NAME)? else { return Ok(()) };
        // Listed race: the cancel crossed the answer.
        let Some(call) = connection.served(cancel.call, Cancel::NAME)? else {
            return connection.drop_late(Cancel::NAME);
        };
        // [call.cancel.once]
        if self.calls.get_mut(call).is_some_and(|call| core::mem::replace(&mut call.cancelled, true)) {
            return Err(Violation::Unexpected { frame: Cancel::NAME, state: "it is said once" });
        }
        let money = self.connections.get_mut(&cancel.connection).and_then(|live| live.money.as_deref_mut());
        if let Some(Money::Payee(payee)) = money
            && let Some(at) = payee.calls.iter().position(|waiting| waiting.call == call)
        {
            // No handler has seen it, so nothing is charged.
            if let Some(waiting) = payee.calls.remove(at) {
                self.fail_unstarted(waiting, Status::Cancelled, Metadata::new());
            }
            self.resume_paid(cancel.connection);
            return Ok(());
        }
        self.cancel_unpaid_response(call, cancel.connection, Status::Cancelled);
        self.events.push_back(Event::CallCancelled { call });
        Ok(())
    }
}

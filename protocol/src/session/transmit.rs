//! Frames out: what is taken for writing, in which order, and what is charged for it.

use super::connection::{Active, CallState, Connection, State};
use super::money::Money;
use super::outbox::{Body, BodyKind, FRAME_TARGET, QUANTUM, Source};
use super::{CallKey, Event, Machine};
use rustc_hash::FxHashMap;

use crate::frame::Transmit;
use crate::head::{encode_request, encode_response};
use crate::id::{CallId, ConnectionId, StreamId};
use crate::limits::HEADER_ALLOWANCE;
use crate::message::{
    Credit, End, Flow, Header, Items, Open, Pong, Request, Reset, Response, Slot, Status, Stop, Window, encode_head,
};
use crate::payment::{Amount, CallMeter, Price, Usage};
use crate::relay::Relayed;
use crate::stream::{StreamKey, Taken, TakenRun};
use crate::time::Time;

/// Where the machine finds the sending streams, which do not live in it.
pub trait StreamSource {
    /// Calls [`SendStream::take`](crate::stream::SendStream::take) on the stream; [`Taken::Empty`] if it is not there.
    fn take(&mut self, stream: StreamKey, max_bytes: usize, affordable: &dyn Fn(u64, u64) -> bool) -> Taken;

    /// Calls [`Bridge::take`](crate::relay::Bridge::take) for a relayed connection. Where there are none: `Empty`.
    fn take_relayed(&mut self, connection: ConnectionId, max_frame: usize) -> Relayed {
        let _ = (connection, max_frame);
        Relayed::Empty
    }
}

/// What a frame of a priced call costs, and whether that can be paid.
struct Charge {
    price: Price,
    meter: CallMeter,
    /// Credit, with what is held for this call.
    available: Amount,
    /// What is held for this call and may be used for this frame.
    held: Amount,
    /// What stays held for its response.
    kept: Amount,
}

impl Charge {
    /// While something else waits for money only what is held for this call may be used, so that nothing passes what
    /// waits; a frame that adds no cost passes. `[pay.gate.order]`
    fn is_affordable(&self, usage: Usage, blocked: bool) -> bool {
        let most = if blocked { self.held } else { self.available };
        self.meter.quote(&self.price, usage).is_some_and(|cost| cost <= most)
    }
}

impl Machine {
    /// The next frame to write, or `None` if there is nothing that may be sent now. Ids are assigned and money is
    /// charged here: a frame that was taken counts as sent.
    ///
    /// Control goes first, then payment, then data round-robin by bytes over the connections, and by frames over what
    /// one connection has ready.
    pub fn poll_transmit(&mut self, now: Time, streams: &mut impl StreamSource) -> Option<Transmit> {
        if let Some(control) = self.take_control() {
            return Some(self.counted(control));
        }
        if self.end().is_some() {
            return None;
        }
        if let Some(nonce) = self.outbox.pong.take() {
            return Some(self.frame(ConnectionId::ROOT, &Pong { nonce }));
        }
        if let Some(frame) = self.take_stop().or_else(|| self.take_credit()) {
            return Some(self.counted(frame));
        }
        if let Some((_, payment)) = self.outbox.payment.pop_front() {
            return Some(self.counted(payment));
        }
        while let Some(&id) = self.outbox.ring.front() {
            if let Some(frame) = self.take_turn(now, id, streams) {
                return Some(frame);
            }
        }
        None
    }

    /// Counts a frame that is no data with its connection, if that is in use.
    fn counted(&mut self, frame: Transmit) -> Transmit {
        let of_connection = frame.head.first().is_some_and(|&kind| kind >= Open::KIND);
        if of_connection
            && let Ok((id, _)) = postcard::take_from_bytes::<ConnectionId>(frame.head.get(1..).unwrap_or_default())
            && let Some(active) = self.connections.get_mut(&id).and_then(|live| live.active.as_deref_mut())
        {
            active.traffic.count_sent(frame.head.len().saturating_add(frame.payload.len()));
        }
        frame
    }

    pub(super) fn frame<H: Header>(&self, connection: ConnectionId, header: &H) -> Transmit {
        Transmit { lane: self.lane(connection), head: encode_head(header), payload: bytes::Bytes::new() }
    }

    /// Stops of streams that the peer has not ended.
    fn take_stop(&mut self) -> Option<Transmit> {
        while let Some(key) = self.outbox.pop_stop() {
            let Some(entry) = self.streams.get(key) else { continue };
            if let (connection, Some(stream), Some(code)) = (entry.connection, entry.id, entry.stop) {
                return Some(self.frame(connection, &Stop { connection, stream, code }));
            }
        }
        None
    }

    /// Grants that are due, each with its latest value.
    fn take_credit(&mut self) -> Option<Transmit> {
        while let Some(key) = self.outbox.credits.pop_front() {
            let Some(entry) = self.streams.get_mut(key) else { continue };
            let connection = entry.connection;
            if let Some(payer) = withholding(&mut self.connections, connection) {
                payer.held_credits.push(key);
                continue;
            }
            // One that is not announced keeps its grant until it is.
            if let Some(stream) = entry.id
                && let Some(grant) = entry.credit.take()
            {
                let credit = Credit { connection, stream, limit: grant.limit, consumed: grant.consumed };
                return Some(self.frame(connection, &credit));
            }
        }
        while let Some(id) = self.outbox.windows.pop_front() {
            if let Some(payer) = withholding(&mut self.connections, id) {
                payer.held_window = true;
                continue;
            }
            let Some(connection) = self.connections.get_mut(&id).filter(|live| live.state == State::Open) else {
                continue;
            };
            let recv_window = &mut connection.active().recv_window;
            recv_window.announce = false;
            let limit = recv_window.limit;
            return Some(self.frame(id, &Window { connection: id, limit }));
        }
        None
    }

    /// Takes a frame from the connection at the front of the ring, or moves the ring on.
    fn take_turn(&mut self, now: Time, id: ConnectionId, streams: &mut impl StreamSource) -> Option<Transmit> {
        loop {
            let Some(connection) = self.connections.get_mut(&id) else {
                self.outbox.ring.pop_front();
                return None;
            };
            let mut active = if connection.held { None } else { connection.active.as_deref_mut() };
            if let Some(active) = &mut active
                && active.deficit <= 0
            {
                active.deficit = active.deficit.saturating_add(QUANTUM);
                self.outbox.ring.rotate_left(1);
                return None;
            }
            let Some(source) = active.and_then(Active::next) else {
                connection.in_ring = false;
                self.outbox.ring.pop_front();
                return None;
            };
            let frame = match source {
                Source::Requests => self.take_request(now, id),
                Source::Responses => self.take_response(id),
                Source::Stream(key) => self.take_stream(key, streams),
                Source::Relayed => self.take_relayed(id, streams),
            };
            if let Some(frame) = frame {
                self.charge_turn(id, source, frame.len());
                return Some(frame);
            }
        }
    }

    /// A frame of so many bytes was taken from what `source` had; it may have more.
    fn charge_turn(&mut self, id: ConnectionId, source: Source, bytes: usize) {
        let Some(connection) = self.connections.get_mut(&id) else {
            self.outbox.ring.pop_front();
            return;
        };
        // It is in the ring: a source that is ready need not enter it.
        let active = connection.active();
        active.deficit = active.deficit.saturating_sub(i64::try_from(bytes).unwrap_or(i64::MAX));
        active.traffic.count_sent(bytes);
        if matches!(source, Source::Requests | Source::Responses) {
            active.ready_requests();
        }
        if source == Source::Responses {
            active.ready_responses();
        }
    }

    /// A body may start while the window is above zero. `[call.window.start]`
    fn window_is_open(active: &Active) -> bool {
        active.send_window.sent < active.send_window.limit
    }

    fn take_request(&mut self, now: Time, id: ConnectionId) -> Option<Transmit> {
        loop {
            let connection = self.connections.get_mut(&id)?;
            let max_calls = connection.peer_limits.max_calls as usize;
            let active = connection.active.as_deref_mut()?;
            if active.calls.len() >= max_calls || !Self::window_is_open(active) {
                return None;
            }
            let body = active.requests.pop_front()?;
            let BodyKind::Request { method, deadline } = body.kind else { continue };
            let Some(call) = self.calls.get_mut(body.call) else { continue };
            // Too late to be sent: the peer would be asked for what nobody waits for. [call.deadline]
            if deadline.is_some_and(|at| at <= now) {
                self.expire_call(body.call);
                continue;
            }
            let Some(call_id) = connection.own_calls.take().map(CallId) else {
                self.calls.remove(body.call);
                self.events.push_back(Event::CallFailed { call: body.call });
                continue;
            };
            call.state = CallState::Sent { id: call_id, cancelled: false };
            active.calls.insert(call_id, body.call);
            active.send_window.sent = active.send_window.sent.saturating_add(body.payload.len() as u64);
            let slots = self.announce(id, &body.slots);
            let deadline = deadline.map(|at| u64::try_from(at.since(now).as_micros()).unwrap_or(u64::MAX));
            let request = Request {
                connection: id,
                call: call_id,
                method,
                deadline_us: deadline,
                metadata: body.metadata,
                slots,
            };
            return Some(Transmit { lane: self.lane(id), head: encode_request(&request), payload: body.payload });
        }
    }

    /// Gives the streams of a frame their ids. `[stream.id.next]`
    fn announce(&mut self, id: ConnectionId, keys: &[StreamKey]) -> Vec<Slot> {
        let mut slots = Vec::with_capacity(keys.len());
        for &key in keys {
            let Some(entry) = self.streams.get_mut(key) else { continue };
            let Some(connection) = self.connections.get_mut(&id) else { break };
            // 2^63 streams in one connection: at a million a second, 292,000 years.
            let Some(stream) = connection.own_streams.take().map(StreamId) else { break };
            entry.id = Some(stream);
            if let Some(call) = self.calls.get_mut(entry.call) {
                call.had_streams = true;
            }
            connection.active().streams.insert(stream, key);
            slots.push(Slot { stream, flow: entry.flow });
            match (entry.flow, entry.stop) {
                (Flow::ToPeer, _) => self.stream_ready(key),
                (Flow::FromPeer, Some(_)) => self.queue_stop(key),
                (Flow::FromPeer, None) if entry.credit.is_some() => self.outbox.credits.push_back(key),
                (Flow::FromPeer, None) => {}
            }
        }
        slots
    }

    fn take_response(&mut self, id: ConnectionId) -> Option<Transmit> {
        loop {
            let active = self.connections.get_mut(&id)?.active.as_deref_mut()?;
            if !Self::window_is_open(active) {
                return None;
            }
            let mut body = active.responses.pop_front()?;
            let Some(call) = self.calls.get(body.call) else {
                self.ledger.release(body.payload.len() as u64);
                continue;
            };
            let BodyKind::Response { status } = body.kind else { continue };
            if call.price.is_some() {
                let Some(charged) = self.charge_response(id, body, status) else { continue };
                body = charged;
            }
            let Some(connection) = self.connections.get_mut(&id) else { continue };
            let send_window = &mut connection.active().send_window;
            send_window.sent = send_window.sent.saturating_add(body.payload.len() as u64);
            self.ledger.release(body.payload.len() as u64);
            let slots = self.announce(id, &body.slots);
            let Some(call) = self.calls.get_mut(body.call) else { continue };
            let CallState::Responding { id: call_id } = call.state else { continue };
            call.state = CallState::Responded { id: call_id };
            let charged = call.meter.charged();
            if call.reports {
                self.events.push_back(Event::CallCharged { call: body.call, charged });
            }
            self.end_served_call(body.call);
            let response = Response { connection: id, call: call_id, status, charged, metadata: body.metadata, slots };
            return Some(Transmit { lane: self.lane(id), head: encode_response(&response), payload: body.payload });
        }
    }

    /// What charging a frame of this call needs; `None` if the call is free. A frame of items leaves what is held for the
    /// cost that the response states.
    fn charge_of(&self, id: ConnectionId, key: CallKey, is_response: bool) -> Option<Charge> {
        let call = self.calls.get(key)?;
        let index = call.price?;
        let Some(Money::Payee(payee)) = self.connections.get(&id)?.money.as_deref() else { return None };
        let price = payee.prices.price(index);
        let all = call.held.unwrap_or_default();
        let kept = if is_response { Amount::ZERO } else { all.min(price.above_call()) };
        let held = all.saturating_sub(kept);
        Some(Charge { price, meter: call.meter, available: payee.available().saturating_add(held), held, kept })
    }

    /// Charges for a response, or sets it aside and returns `None`.
    fn charge_response(&mut self, id: ConnectionId, body: Body, status: Status) -> Option<Body> {
        let Some(mut charge) = self.charge_of(id, body.call, true) else { return Some(body) };
        let unused = charge.meter.usage() == Usage::default();
        let call = self.calls.get_mut(body.call)?;
        let started = call.held.is_some() || charge.price.hold().is_zero();
        let chargeable = matches!(status, Status::Ok | Status::AppError | Status::Cancelled | Status::DeadlineExceeded);
        if unused && (!started || !chargeable) {
            // The payee's own failure, and a call that no handler saw, are free. [pay.call.free-failure]
            self.release(id, body.call, charge.held, None);
            // What was held for it may be what something else waits for.
            self.resume_paid(id);
            return Some(body);
        }
        // The rest of what was reserved is free with this charge. [pay.reserve.commit]
        call.meter.state_above_call(&charge.price, call.above_call);
        call.meter.state_paid_before(call.paid_before);
        charge.meter = call.meter;
        let usage = Usage { bytes_out: body.payload.len() as u64, ..Usage::default() };
        if charge.is_affordable(usage, self.is_blocked(id)) {
            self.spend(id, body.call, &charge, usage);
            if charge.price.max.is_some() {
                // What was reserved and not used may be what something else waits for.
                self.resume_paid(id);
            }
            return Some(body);
        }
        let cost = charge.meter.quote(&charge.price, usage).unwrap_or(Amount::MAX).saturating_sub(charge.held);
        if let Some(Money::Payee(payee)) = self.connections.get_mut(&id)?.money.as_deref_mut() {
            if payee.has_given_up() {
                let counts = payee.unpaid(cost);
                self.replace_response(id, body, Status::PaymentFailed, counts);
                return None;
            }
            payee.responses.push_back(body);
            if let Some(cost) = payee.need(cost) {
                self.events.push_back(Event::MoneyNeeded { connection: id, cost });
            }
        }
        None
    }

    /// Whether something of the connection waits for money.
    fn is_blocked(&self, id: ConnectionId) -> bool {
        match self.connections.get(&id).and_then(|connection| connection.money.as_deref()) {
            Some(Money::Payee(payee)) => payee.is_blocked(),
            _ => false,
        }
    }

    /// Gives `held` back of what is held for a call; `kept` stays.
    fn release(&mut self, id: ConnectionId, key: CallKey, held: Amount, kept: Option<Amount>) {
        let money = self.connections.get_mut(&id).and_then(|connection| connection.money.as_deref_mut());
        if let (Some(Money::Payee(payee)), Some(call)) = (money, self.calls.get_mut(key)) {
            payee.release(held);
            call.held = kept;
        }
    }

    /// Charges what was found affordable.
    fn spend(&mut self, id: ConnectionId, key: CallKey, charge: &Charge, usage: Usage) {
        self.release(id, key, charge.held, Some(charge.kept).filter(|kept| !kept.is_zero()));
        let money = self.connections.get_mut(&id).and_then(|connection| connection.money.as_deref_mut());
        if let (Some(Money::Payee(payee)), Some(call)) = (money, self.calls.get_mut(key))
            && let Some(cost) = call.meter.charge(&charge.price, usage)
            && payee.spend(cost, usage.items, usage.bytes_out)
        {
            self.events.push_back(Event::MoneyLow { connection: id });
        }
    }

    fn take_stream(&mut self, key: StreamKey, streams: &mut impl StreamSource) -> Option<Transmit> {
        let entry = self.streams.get(key)?;
        let (connection, call, stream) = (entry.connection, entry.call, entry.id?);
        let charge = self.charge_of(connection, call, false);
        // A single item with its header fits the peer's largest frame by the peer's own limits; more must fit too.
        let target = FRAME_TARGET.min(self.peer_limits.max_frame.saturating_sub(HEADER_ALLOWANCE) as usize);
        let blocked = charge.is_some() && self.is_blocked(connection);
        let taken = match &charge {
            None => streams.take(key, target, &|_, _| true),
            Some(charge) => {
                let usage = |items, bytes_out| Usage { items, bytes_out, bytes_in: 0 };
                streams.take(key, target, &|items, bytes| charge.is_affordable(usage(items, bytes), blocked))
            }
        };
        match taken {
            Taken::Run(TakenRun { run, slots, more }) => {
                if let Some(charge) = &charge {
                    let items = u64::from(run.items());
                    let usage = Usage { items, bytes_out: run.item_bytes(), bytes_in: 0 };
                    self.spend(connection, call, charge, usage);
                }
                let slots = self.announce(connection, &slots);
                self.unschedule(key);
                if more {
                    self.stream_ready(key);
                }
                let head = encode_head(&Items { connection, stream, slots });
                Some(Transmit { lane: self.lane(connection), head, payload: run.as_bytes().clone() })
            }
            Taken::Unpaid { bytes } => {
                let usage = Usage { items: 1, bytes_out: bytes, bytes_in: 0 };
                let charge = charge?;
                let cost = charge.meter.quote(&charge.price, usage).unwrap_or(Amount::MAX);
                self.set_aside(connection, key, cost.saturating_sub(charge.held));
                None
            }
            Taken::NoCredit | Taken::Empty => {
                self.unschedule(key);
                None
            }
            Taken::End => {
                self.remove_stream(key);
                Some(self.frame(connection, &End { connection, stream }))
            }
            Taken::Reset(code) => {
                self.remove_stream(key);
                Some(self.frame(connection, &Reset { connection, stream, code }))
            }
        }
    }

    fn unschedule(&mut self, key: StreamKey) {
        if let Some(entry) = self.streams.get_mut(key) {
            entry.scheduled = false;
        }
    }

    /// A stream waits for money: it stays scheduled, aside, until the credit is raised. Only the head says so.
    fn set_aside(&mut self, id: ConnectionId, key: StreamKey, cost: Amount) {
        let money = self.connections.get_mut(&id).and_then(|connection| connection.money.as_deref_mut());
        let Some(Money::Payee(payee)) = money else { return };
        if payee.has_given_up() {
            return self.fail_stream(key);
        }
        payee.streams.push(key);
        if let Some(cost) = payee.need(cost) {
            self.events.push_back(Event::MoneyNeeded { connection: id, cost });
        }
    }
}

/// The payer's money of a connection that grants nothing now. `[pay.received.held]`
fn withholding(
    connections: &mut FxHashMap<ConnectionId, Box<Connection>>,
    id: ConnectionId,
) -> Option<&mut super::money::Payer> {
    match connections.get_mut(&id)?.money.as_deref_mut()? {
        Money::Payer(payer) => Some(payer).filter(|payer| payer.withholds()),
        Money::Payee(_) => None,
    }
}

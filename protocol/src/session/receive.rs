//! Frames in: dispatch, and all that concerns sessions, connections and streams. Calls are in `receive_call`.

use bytes::Bytes;
use rustc_hash::FxHashMap;

use super::connection::{Connection, Seen, State, StreamEntry};
use super::grants::Granted;
use super::money::Money;
use super::{CallKey, Event, InboundSlot, LaneMode, Machine, Phase};
use crate::error::{ConnectionEnd, Reason, SessionEnd, Violation, code};
use crate::frame::{HANDSHAKE_MAX_FRAME, Lane};
use crate::head::{decode_request, decode_response};
use crate::id::{ConnectionId, StreamId};
use crate::limits::MAX_SLOTS;
use crate::message::{
    Accept, Cancel, Challenge, Close, Credit, Done, Drained, Draining, End, FIRST_EXTENSION_KIND, Flow, GoAway, Header,
    Hello, HelloAck, Items, Open, Payment, Ping, Pong, Proof, ProtocolError, Refuse, Reject, Request, Reset, Response,
    Slot, Stop, Window, decode_header,
};
use crate::metadata::Metadata;
use crate::payment::{Amount, MAX_PAYMENT_MESSAGE_BYTES, Usage};
use crate::stream::{Ending, ItemRun, StreamKey};
use crate::time::Time;

/// Longest service name in bytes: a reversed domain name and a path fit.
pub(super) const MAX_SERVICE_NAME: usize = 256;

impl Machine {
    /// Takes a frame in that came on `lane`. What it means comes out as events; a frame that breaks a rule ends the
    /// session.
    pub fn handle_frame(&mut self, now: Time, lane: Lane, frame: Bytes) {
        if self.end().is_some() {
            return;
        }
        self.timers.handle_activity(now);
        if let Err(violation) = self.dispatch(now, lane, frame) {
            self.handle_violation(violation);
        }
    }

    fn dispatch(&mut self, now: Time, lane: Lane, mut frame: Bytes) -> Result<(), Violation> {
        let kind = *frame.first().ok_or(Violation::EmptyFrame)?;
        self.frame_bytes = frame.len();
        // [session.frame.max]
        if frame.len() > self.config.limits.max_frame as usize {
            let (value, limit) = (frame.len() as u64, u64::from(self.config.limits.max_frame));
            return Err(Violation::AboveLimit { what: "frame", value, limit });
        }
        // The session's own frames travel on the root's lane.
        if kind <= Proof::KIND {
            self.check_lane(lane, ConnectionId::ROOT)?;
        }
        let frame = &mut frame;
        if self.phase == Phase::Greeting {
            if frame.len() > HANDSHAKE_MAX_FRAME {
                let (value, limit) = (frame.len() as u64, HANDSHAKE_MAX_FRAME as u64);
                return Err(Violation::AboveLimit { what: "frame before the handshake has ended", value, limit });
            }
            return self.dispatch_greeting(now, kind, frame);
        }
        if let Some(held) = self.held.take() {
            held.into_iter().for_each(|frame| self.outbox.push_control(frame, false));
        }
        if let Some(connection) = self.relayed_connection(kind, frame) {
            return self.receive_relayed(lane, connection, frame.split_off(0));
        }
        match kind {
            Items::KIND => self.receive_items(lane, decode_header(frame)?, frame.split_off(0)),
            Request::KIND => self.receive_request(lane, decode_request(frame)?, frame.split_off(0)),
            Response::KIND => self.receive_response(lane, decode_response(frame)?, frame.split_off(0)),
            Credit::KIND => self.receive_credit(lane, &decode_header(frame)?),
            Window::KIND => self.receive_window(lane, &decode_header(frame)?),
            End::KIND => {
                let End { connection, stream } = decode_header(frame)?;
                self.receive_ending(lane, connection, stream, Ending::End)
            }
            Reset::KIND => {
                let Reset { connection, stream, code } = decode_header(frame)?;
                self.receive_ending(lane, connection, stream, Ending::Reset(code))
            }
            Stop::KIND => self.receive_stop(lane, &decode_header(frame)?),
            Cancel::KIND => self.receive_cancel(lane, &decode_header::<Cancel>(frame)?),
            Done::KIND => self.receive_done(lane, &decode_header::<Done>(frame)?),
            Payment::KIND => self.receive_payment(lane, &decode_header(frame)?, frame.split_off(0)),
            Open::KIND => self.receive_open(lane, decode_header(frame)?, frame.split_off(0)),
            Accept::KIND => self.receive_accept(lane, decode_header(frame)?, frame.split_off(0)),
            Reject::KIND => self.receive_reject(lane, decode_header(frame)?, frame.split_off(0)),
            Close::KIND => self.receive_close(lane, decode_header(frame)?),
            Draining::KIND => self.receive_draining(lane, decode_header(frame)?),
            Drained::KIND => self.receive_drained(lane, &decode_header(frame)?),
            Ping::KIND => {
                let Ping { nonce } = decode_header(frame)?;
                self.budgets.spend_ping(now)?;
                self.outbox.pong = Some(nonce);
                Ok(())
            }
            Pong::KIND => self.receive_pong(now, decode_header(frame)?),
            GoAway::KIND => self.receive_go_away(decode_header(frame)?),
            ProtocolError::KIND => self.receive_protocol_error(decode_header(frame)?),
            Hello::KIND => self.receive_hello(decode_header(frame)?),
            HelloAck::KIND => self.receive_hello_ack(now, decode_header(frame)?),
            Refuse::KIND => self.receive_refuse(decode_header(frame)?),
            Challenge::KIND => self.receive_challenge(decode_header(frame)?, frame.split_off(0)),
            Proof::KIND => self.receive_proof(&decode_header(frame)?, frame.split_off(0)),
            FIRST_EXTENSION_KIND.. => self.budgets.spend_extension(now),
            kind => Err(Violation::UnknownKind { kind }),
        }
    }

    /// Before both hellos, only they and the end of the session may come. `[session.handshake.first]`
    fn dispatch_greeting(&mut self, now: Time, kind: u8, frame: &mut Bytes) -> Result<(), Violation> {
        match kind {
            Hello::KIND => self.receive_hello(decode_header(frame)?),
            HelloAck::KIND => self.receive_hello_ack(now, decode_header(frame)?),
            Challenge::KIND => self.receive_challenge(decode_header(frame)?, frame.split_off(0)),
            Proof::KIND => self.receive_proof(&decode_header(frame)?, frame.split_off(0)),
            Refuse::KIND => self.receive_refuse(decode_header(frame)?),
            ProtocolError::KIND => self.receive_protocol_error(decode_header(frame)?),
            Close::KIND => match decode_header::<Close>(frame)? {
                close if close.connection.is_root() => self.receive_root_close(close),
                _ => Err(Violation::Unexpected { frame: "Close", state: "the handshake has not ended" }),
            },
            FIRST_EXTENSION_KIND.. => {
                Err(Violation::Unexpected { frame: "extension", state: "the handshake has not ended" })
            }
            _ => Err(Violation::Unexpected { frame: "frame", state: "the handshake has not ended" }),
        }
    }

    fn receive_protocol_error(&mut self, error: ProtocolError) -> Result<(), Violation> {
        self.outbox.clear();
        self.finish(SessionEnd::ReportedViolation(error.reason.into()));
        Ok(())
    }

    fn receive_root_close(&mut self, close: Close) -> Result<(), Violation> {
        self.outbox.clear();
        self.finish(SessionEnd::ClosedByPeer(close.reason.into()));
        Ok(())
    }

    fn receive_go_away(&mut self, away: GoAway) -> Result<(), Violation> {
        if self.peer_going_away.is_some() {
            return Err(Violation::Unexpected { frame: "GoAway", state: "it is said once" });
        }
        // [session.go-away.last]
        if !away.last.is_root() && (self.peer_ids.is_of_half(away.last) || !self.own_ids.was_used(away.last.0)) {
            return Err(Violation::UnknownConnection { frame: "GoAway", id: away.last });
        }
        self.peer_going_away = Some(away.last);
        self.events.push_back(Event::PeerGoingAway { last: away.last, reason: away.reason.into() });
        Ok(())
    }

    /// A frame of a connection belongs on the connection's lane. `[session.lane.own]`
    pub(super) fn check_lane(&self, lane: Lane, id: ConnectionId) -> Result<(), Violation> {
        if self.config.lanes == LaneMode::PerConnection && lane != Lane(id.0) {
            return Err(Violation::WrongLane { id, lane });
        }
        Ok(())
    }

    /// Whether `id` was opened before; a frame for one that never was is a violation. `[session.id.known]`
    fn check_known(&self, id: ConnectionId, frame: &'static str) -> Result<(), Violation> {
        let known = if self.peer_ids.is_of_half(id) {
            self.peer_ids.seen(id) == Seen::Used
        } else {
            self.own_ids.was_used(id.0)
        };
        if known && !id.is_root() { Ok(()) } else { Err(Violation::UnknownConnection { frame, id }) }
    }

    /// The open connection that a frame is for; `None` if the frame crossed a Close.
    pub(super) fn live(
        &mut self,
        lane: Lane,
        id: ConnectionId,
        frame: &'static str,
    ) -> Result<Option<&mut Connection>, Violation> {
        if open_one(&mut self.connections, id).is_none() {
            return self.drop_for_closed(lane, id, frame).map(|()| None);
        }
        self.check_lane(lane, id)?;
        let bytes = self.frame_bytes;
        let Some(live) = self.connections.get_mut(&id).map(Box::as_mut) else { return Ok(None) };
        live.active().traffic.count_received(bytes);
        Ok(Some(live))
    }

    /// A frame came for a connection that is not open: it crossed a Close, or breaks a rule.
    #[cold]
    pub(super) fn drop_for_closed(
        &mut self,
        lane: Lane,
        id: ConnectionId,
        frame: &'static str,
    ) -> Result<(), Violation> {
        self.check_lane(lane, id)?;
        match self.connections.get(&id).map(|connection| connection.state) {
            Some(State::Closing) => self.drop_late(),
            // After Open only Close may be sent until the answer. [session.open.silence]
            Some(State::Requested) => Err(Violation::Unexpected { frame, state: "the open is not answered" }),
            Some(State::Opening) => Err(Violation::Unexpected { frame, state: "it has not accepted the open" }),
            None => self.check_known(id, frame).and_then(|()| self.drop_late()),
            Some(State::Open) => Ok(()),
        }
    }

    /// A frame crossed a Close. `[session.close.crossed]`
    #[cold]
    fn drop_late(&mut self) -> Result<(), Violation> {
        self.budgets.spend_late_frame(self.timers.last_received())
    }

    fn receive_open(&mut self, lane: Lane, open: Open, credential: Bytes) -> Result<(), Violation> {
        let id = open.connection;
        self.check_lane(lane, id)?;
        let max_pending = self.config.limits.max_pending_opens;
        self.peer_ids.open(id, self.config.lanes, max_pending)?;
        self.open_stats.opened_by_peer = self.open_stats.opened_by_peer.saturating_add(1);
        open.metadata.check()?;
        open.limits.check(&self.peer_limits)?;
        if open.service.len() > MAX_SERVICE_NAME {
            let (value, limit) = (open.service.len() as u64, MAX_SERVICE_NAME as u64);
            return Err(Violation::AboveLimit { what: "service name", value, limit });
        }
        // The session lives on when there are too many: the excess is refused. [session.open.capacity]
        let refusal = if self.going_away.is_some_and(|last| id > last) {
            Some(Reason::new(code::GOING_AWAY, "this side is going away"))
        } else if self.opens.peers_pending >= max_pending {
            Some(Reason::new(code::AT_CAPACITY, format!("{max_pending} opens are unanswered already")))
        } else if self.opens.peers >= self.config.limits.max_connections {
            let most = self.config.limits.max_connections;
            Some(Reason::new(code::AT_CAPACITY, format!("{most} connections are open already")))
        } else {
            None
        };
        if let Some(reason) = refusal {
            self.spend_refusal()?;
            self.open_stats.rejected_by_us = self.open_stats.rejected_by_us.saturating_add(1);
            self.answer(id, &Reject { connection: id, reason: reason.into(), metadata: Metadata::new() });
            return Ok(());
        }
        // What we receive is said in Accept; until then nothing may come.
        let connection = Connection::new(State::Requested, open.parity, Default::default(), open.limits);
        self.connections.insert(id, Box::new(connection));
        self.opens.peers = self.opens.peers.saturating_add(1);
        self.opens.peers_pending = self.opens.peers_pending.saturating_add(1);
        self.events.push_back(Event::ConnectionRequested {
            connection: id,
            service: open.service,
            metadata: open.metadata,
            limits: open.limits,
            parity: open.parity,
            credential,
        });
        Ok(())
    }

    fn receive_accept(&mut self, lane: Lane, accept: Accept, receipt: Bytes) -> Result<(), Violation> {
        let id = accept.connection;
        self.check_lane(lane, id)?;
        let peer_session = self.peer_limits;
        match self.connections.get_mut(&id) {
            Some(connection) if connection.state == State::Opening => {
                accept.metadata.check()?;
                accept.limits.check(&peer_session)?;
                (connection.state, connection.unanswered) = (State::Open, false);
                connection.set_limits(connection.limits, accept.limits);
                self.opens.ours_pending = self.opens.ours_pending.saturating_sub(1);
                self.events.push_back(Event::ConnectionAccepted {
                    connection: id,
                    metadata: accept.metadata,
                    limits: accept.limits,
                    receipt,
                });
                self.drain_opened(id);
                Ok(())
            }
            // Listed race: the accept crossed the close of an abandoned open. The peer's Close follows.
            Some(connection) if connection.state == State::Closing && connection.unanswered => {
                connection.unanswered = false;
                self.opens.ours_pending = self.opens.ours_pending.saturating_sub(1);
                Ok(())
            }
            Some(_) => Err(Violation::Unexpected { frame: "Accept", state: "it answers an open, once" }),
            None => Err(Violation::UnknownConnection { frame: "Accept", id }),
        }
    }

    fn receive_reject(&mut self, lane: Lane, reject: Reject, terms: Bytes) -> Result<(), Violation> {
        let id = reject.connection;
        self.check_lane(lane, id)?;
        match self.connections.get(&id).map(|connection| (connection.state, connection.unanswered)) {
            Some((State::Opening, _)) => {
                reject.metadata.check()?;
                self.remove_connection(id);
                self.note_rejected(lane);
                self.open_stats.rejected_by_peer = self.open_stats.rejected_by_peer.saturating_add(1);
                self.events.push_back(Event::ConnectionRejected {
                    connection: id,
                    reason: reject.reason.into(),
                    metadata: reject.metadata,
                    terms,
                });
                Ok(())
            }
            // Listed race: the reject crossed the close of an abandoned open.
            Some((State::Closing, true)) => {
                self.remove_connection(id);
                Ok(())
            }
            Some(_) => Err(Violation::Unexpected { frame: "Reject", state: "it answers an open, once" }),
            None => Err(Violation::UnknownConnection { frame: "Reject", id }),
        }
    }

    fn receive_close(&mut self, lane: Lane, close: Close) -> Result<(), Violation> {
        let id = close.connection;
        self.check_lane(lane, id)?;
        close.metadata.check()?;
        if id.is_root() {
            return self.receive_root_close(close);
        }
        match self.connections.get(&id).map(|connection| connection.state) {
            Some(State::Closing) => self.remove_connection(id),
            Some(state @ (State::Open | State::Requested)) => {
                match state {
                    State::Requested => self.abandon_open(id)?,
                    _ => self.abandon_calls(id)?,
                }
                self.answer_close(id);
                self.forget_connection(id, Some(ConnectionEnd::ClosedByPeer(close.reason.into())));
            }
            Some(State::Opening) => {
                return Err(Violation::Unexpected { frame: "Close", state: "an open is answered by Accept or Reject" });
            }
            // Listed race: both sides closed, or the close crossed our reject.
            None => self.check_known(id, "Close").and_then(|()| self.drop_late())?,
        }
        Ok(())
    }

    fn answer_close(&mut self, id: ConnectionId) {
        self.outbox.flush_payment(id);
        let close = Close { connection: id, reason: Reason::none().into(), metadata: Metadata::new() };
        match self.peer_ids.is_of_half(id) {
            true => self.answer(id, &close),
            // The peer needs our next open for the next one of these.
            false => self.control(id, &close),
        }
    }

    fn receive_payment(&mut self, lane: Lane, payment: &Payment, message: Bytes) -> Result<(), Violation> {
        let connection = payment.connection;
        let Some(live) = self.live(lane, connection, Payment::NAME)? else { return Ok(()) };
        if live.money.is_none() {
            return Err(Violation::Unexpected { frame: "Payment", state: "the connection is not a paid one" });
        }
        // They wait for a task beside the session, so what a peer can pile up there is bounded. [pay.message.max]
        if message.len() > MAX_PAYMENT_MESSAGE_BYTES {
            let (value, limit) = (message.len() as u64, MAX_PAYMENT_MESSAGE_BYTES as u64);
            return Err(Violation::AboveLimit { what: "payment message", value, limit });
        }
        self.events.push_back(Event::Payment { connection, message });
        Ok(())
    }

    fn receive_items(&mut self, lane: Lane, items: Items, payload: Bytes) -> Result<(), Violation> {
        let Some(connection) = self.live(lane, items.connection, Items::NAME)? else { return Ok(()) };
        let max_item = connection.limits.max_item;
        let Some(key) = connection.stream(items.stream, Items::NAME)? else {
            // The receiver forgets a stream only when it has ended. [stream.end.last]
            return Err(Violation::Unexpected { frame: Items::NAME, state: "the stream has ended" });
        };
        let call = self.check_flow(key, Flow::FromPeer, items.stream, Items::NAME)?;
        let run = ItemRun::parse(payload, max_item)?;
        let taken = self.take_in(key, run.credit(), max_item)?;
        if !items.slots.is_empty() && run.items() != 1 {
            return Err(Violation::Items("an item with streams in it travels alone"));
        }
        let usage = Usage { items: u64::from(run.items()), bytes_out: run.item_bytes(), bytes_in: 0 };
        self.count_received(call, usage)?;
        let slots = self.register_slots(call, &items.slots)?;
        if taken {
            self.events.push_back(Event::StreamItems { connection: items.connection, stream: key, run, slots });
        } else {
            slots.iter().for_each(|slot| self.discard_stream(slot.stream));
        }
        Ok(())
    }

    /// The stream's call, if the stream flows as the frame needs it to.
    fn check_flow(&self, key: StreamKey, flow: Flow, id: StreamId, frame: &'static str) -> Result<CallKey, Violation> {
        match self.streams.get(key) {
            Some(entry) if entry.flow == flow => Ok(entry.call),
            _ => Err(Violation::UnknownStream { frame, id }),
        }
    }

    fn receive_ending(
        &mut self,
        lane: Lane,
        id: ConnectionId,
        stream: StreamId,
        ending: Ending,
    ) -> Result<(), Violation> {
        const FRAME: &str = "End or Reset";
        let Some(connection) = self.live(lane, id, FRAME)? else { return Ok(()) };
        let Some(key) = connection.stream(stream, FRAME)? else {
            // The receiver forgets a stream only when it has ended: this is a second end. [stream.end.once]
            return Err(Violation::Unexpected { frame: FRAME, state: "the stream has ended" });
        };
        self.check_flow(key, Flow::FromPeer, stream, FRAME)?;
        let (held, refused) = self.end_grant(key);
        // One of which items were dropped never looks complete.
        let ending = if refused { Ending::Reset(code::AT_CAPACITY) } else { ending };
        self.events.push_back(Event::StreamEnded { stream: key, ending, held });
        self.remove_stream(key);
        Ok(())
    }

    fn receive_stop(&mut self, lane: Lane, stop: &Stop) -> Result<(), Violation> {
        let Some(connection) = self.live(lane, stop.connection, Stop::NAME)? else { return Ok(()) };
        // Listed race: the stop crossed the end.
        let Some(stream) = connection.stream(stop.stream, Stop::NAME)? else { return connection.drop_late(Stop::NAME) };
        self.check_flow(stream, Flow::ToPeer, stop.stream, Stop::NAME)?;
        // [stream.stop.once]
        if self.streams.get_mut(stream).is_some_and(|entry| entry.stop.replace(stop.code).is_some()) {
            return Err(Violation::Unexpected { frame: Stop::NAME, state: "it is said once" });
        }
        self.events.push_back(Event::StreamStopped { stream, code: stop.code });
        Ok(())
    }

    fn receive_credit(&mut self, lane: Lane, credit: &Credit) -> Result<(), Violation> {
        let Some(connection) = self.live(lane, credit.connection, Credit::NAME)? else { return Ok(()) };
        // Listed race: the credit crossed the end.
        let Some(stream) = connection.stream(credit.stream, Credit::NAME)? else {
            return connection.drop_late(Credit::NAME);
        };
        self.check_flow(stream, Flow::ToPeer, credit.stream, Credit::NAME)?;
        let Credit { limit, consumed, .. } = *credit;
        self.events.push_back(Event::StreamCredit { stream, limit, consumed });
        Ok(())
    }

    fn receive_window(&mut self, lane: Lane, window: &Window) -> Result<(), Violation> {
        let id = window.connection;
        let Some(connection) = self.live(lane, id, Window::NAME)? else { return Ok(()) };
        let send_window = &mut connection.active().send_window;
        let from = send_window.limit;
        // [call.window.monotonic]
        if window.limit <= from {
            return Err(Violation::CreditWentBack { what: "body window", from, to: window.limit });
        }
        send_window.limit = window.limit;
        self.schedule_bodies(id);
        Ok(())
    }

    /// Enters the streams that a frame announces. Ids rise by two and their number has a limit.
    pub(super) fn register_slots(&mut self, call: CallKey, slots: &[Slot]) -> Result<Vec<InboundSlot>, Violation> {
        // [stream.slots.max]
        if slots.len() > MAX_SLOTS {
            let (value, limit) = (slots.len() as u64, MAX_SLOTS as u64);
            return Err(Violation::AboveLimit { what: "slots in one frame", value, limit });
        }
        let mut inbound = Vec::with_capacity(slots.len());
        for slot in slots {
            let Some(entry) = self.calls.get_mut(call) else { break };
            let id = entry.connection;
            let Some(connection) = self.connections.get_mut(&id) else { break };
            let limit = connection.limits.max_streams;
            // [stream.id.next]
            if !connection.peer_streams.expect(slot.stream.0) {
                return Err(Violation::StreamId { id: slot.stream });
            }
            let window = connection.limits.stream_window;
            let active = connection.active();
            active.peer_streams = active.peer_streams.saturating_add(1);
            if active.peer_streams > limit {
                let (value, limit) = (u64::from(active.peer_streams), u64::from(limit));
                return Err(Violation::AboveLimit { what: "open streams", value, limit });
            }
            let flow = match slot.flow {
                Flow::ToPeer => Flow::FromPeer,
                Flow::FromPeer => Flow::ToPeer,
            };
            let (granted, refused) = match flow {
                Flow::ToPeer => (Granted::nothing(), false),
                Flow::FromPeer if self.ledger.try_charge(u64::from(window)) => {
                    (Granted::charged(window, self.timers.last_received()), false)
                }
                Flow::FromPeer => (Granted::refused(window), true),
            };
            let stream = self.streams.insert(StreamEntry {
                connection: id,
                call,
                id: Some(slot.stream),
                flow,
                opened_by_us: false,
                scheduled: false,
                credit: None,
                stop: None,
                granted,
            });
            active.streams.insert(slot.stream, stream);
            active.owned.insert(stream);
            entry.streams = entry.streams.saturating_add(1);
            entry.had_streams = true;
            inbound.push(InboundSlot { stream, flow });
            if refused {
                self.stop_stream(stream, code::AT_CAPACITY);
            }
        }
        Ok(inbound)
    }

    /// Payer: counts what arrived, discarded or not. `[pay.received.arrival]`
    /// Counts a response that is not free. What it states to have cost above the payer's own count is taken for the call
    /// itself, as far as the method's maximum allows. `[pay.reserve.commit]` A payee that asks for less than that, because an
    /// earlier attempt was paid, is taken at its word. `[pay.key.once]`
    pub(super) fn count_response(&mut self, key: CallKey, charged: Amount, bytes: u64) -> Result<(), Violation> {
        let usage = Usage { bytes_out: bytes, ..Usage::default() };
        let Some(call) = self.calls.get_mut(key) else { return Ok(()) };
        let money = self.connections.get(&call.connection).and_then(|live| live.money.as_deref());
        if let (Some(price), Some(Money::Payer(payer))) = (call.price, money) {
            let price = payer.prices.price(price);
            let counted = call.meter.quote(&price, usage).and_then(|cost| cost.checked_add(call.meter.charged()));
            let counted = counted.ok_or(Violation::AmountOverflow)?;
            call.meter.state_above_call(&price, charged.saturating_sub(counted));
            call.meter.state_paid_before(counted.saturating_sub(charged));
        }
        self.count_received(key, usage)
    }

    pub(super) fn count_received(&mut self, call: CallKey, usage: Usage) -> Result<(), Violation> {
        let Some(call) = self.calls.get_mut(call) else { return Ok(()) };
        let Some(price) = call.price else { return Ok(()) };
        let connection = call.connection;
        let Some(money) = self.connections.get_mut(&connection).and_then(|live| live.money.as_deref_mut()) else {
            return Ok(());
        };
        let Money::Payer(payer) = money else { return Ok(()) };
        let price = payer.prices.price(price);
        let cost = call.meter.charge(&price, usage).ok_or(Violation::AmountOverflow)?;
        let reached = payer.receive(cost, usage.items, usage.bytes_out).ok_or(Violation::AmountOverflow)?;
        if let Some(received) = reached {
            self.events.push_back(Event::ReceivedMark { connection, received });
        }
        Ok(())
    }
}

/// The connection of this id, if it is open. Not a method: a frame of a call needs the other tables beside it.
#[inline]
pub(super) fn open_one(
    connections: &mut FxHashMap<ConnectionId, Box<Connection>>,
    id: ConnectionId,
) -> Option<&mut Connection> {
    connections.get_mut(&id).map(Box::as_mut).filter(|connection| connection.state == State::Open)
}

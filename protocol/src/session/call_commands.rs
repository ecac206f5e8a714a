//! What the application does with calls and their streams.

use bytes::Bytes;

use super::connection::{Call, CallState, Connection, State, StreamEntry};
use super::grants::Granted;
use super::money::Money;
use super::outbox::{Body, BodyKind, Source};
use super::{CallKey, CommandError, Machine};
use crate::error::code;
use crate::id::ConnectionId;
use crate::limits::MAX_SLOTS;
use crate::message::{Cancel, Flow, Reset, Status};
use crate::metadata::Metadata;
use crate::payment::{Amount, CallMeter};
use crate::stream::StreamKey;
use crate::time::Time;

/// A call to be made.
#[derive(Debug)]
pub struct CallSpec<'a> {
    /// The connection.
    pub connection: ConnectionId,
    /// The method's id.
    pub method: u64,
    /// When the caller gives up.
    pub deadline: Option<Time>,
    /// The caller's metadata.
    pub metadata: Metadata,
    /// The arguments.
    pub payload: Bytes,
    /// The streams of the payload's slots, seen from this side.
    pub slots: &'a [Flow],
}

/// An answer to be given.
#[derive(Debug)]
pub struct ResponseSpec<'a> {
    /// What the payload is.
    pub status: Status,
    /// The callee's metadata.
    pub metadata: Metadata,
    /// The payload.
    pub payload: Bytes,
    /// The streams of the payload's slots, seen from this side.
    pub slots: &'a [Flow],
    /// What the call costs in place of its call price, in base units, if the method's price has a maximum. Not less than
    /// the call price is charged. Without effect where nothing is paid.
    pub cost: Option<Amount>,
    /// What earlier attempts of the same call have cost, in base units: it is taken off. Zero for a call that was not made
    /// before.
    pub paid_before: Amount,
}

impl Machine {
    /// Makes a call on an open connection. It is announced when the connection's turn comes and the peer's limit on
    /// open calls has room. The keys of its streams come in the order of `slots`.
    ///
    /// # Errors
    /// When the connection is not open, or a limit of the peer is exceeded.
    pub fn start_call(&mut self, spec: CallSpec<'_>) -> Result<(CallKey, Vec<StreamKey>), CommandError> {
        self.check_open()?;
        let id = spec.connection;
        let connection = self.check_body(id, &spec.payload, &spec.metadata)?;
        // [session.drain.calls]
        if connection.drain.is_by_peer() {
            return Err(CommandError::Draining);
        }
        // Refused while every call that waits for its turn still has an id, so that none is lost for the lack of one.
        let waiting = connection.active.as_deref().map_or(0, |active| active.requests.len());
        if connection.own_calls.left() <= waiting as u64 {
            return Err(CommandError::IdsExhausted);
        }
        let price = match connection.money.as_deref() {
            Some(Money::Payer(payer)) => payer.prices.index(spec.method),
            _ => None,
        };
        let call = self.calls.insert(Call {
            connection: id,
            state: CallState::Queued,
            streams: 0,
            had_streams: false,
            meter: CallMeter::default(),
            price,
            held: None,
            above_call: Amount::ZERO,
            paid_before: Amount::ZERO,
            reports: false,
            cancelled: false,
        });
        let slots = match self.create_streams(call, spec.slots) {
            Ok(slots) => slots,
            Err(error) => {
                self.calls.remove(call);
                return Err(error);
            }
        };
        let kind = BodyKind::Request { method: spec.method, deadline: spec.deadline };
        let body = Body { call, kind, metadata: spec.metadata, payload: spec.payload, slots: slots.clone() };
        if let Some(connection) = self.connections.get_mut(&id) {
            connection.active().requests.push_back(body);
            if connection.active().ready_requests() {
                self.outbox.enter_ring(id, connection);
            }
        }
        if let Some(deadline) = spec.deadline {
            self.watch_deadline(call, deadline);
        }
        Ok((call, slots))
    }

    fn check_body(&self, id: ConnectionId, payload: &Bytes, metadata: &Metadata) -> Result<&Connection, CommandError> {
        metadata.check()?;
        let open = self.connections.get(&id).filter(|connection| connection.state == State::Open);
        let connection = open.ok_or(CommandError::NoConnection(id))?;
        let limit = connection.peer_limits.max_body;
        if payload.len() > limit as usize {
            return Err(CommandError::BodyTooLarge { bytes: payload.len(), limit });
        }
        Ok(connection)
    }

    /// Answers a call of the peer's. The keys of the answer's streams come in the order of `slots`.
    ///
    /// # Errors
    /// When the call was answered or has ended, or the answer is above the peer's limit or states a cost above the
    /// method's maximum: then the call still waits. `[pay.reserve.maximum]` When there is no memory for the answer until the
    /// peer takes it, the call is answered with `AtCapacity` instead.
    pub fn respond(&mut self, call: CallKey, spec: ResponseSpec<'_>) -> Result<Vec<StreamKey>, CommandError> {
        let Some(entry) = self.calls.get(call) else {
            self.finish_call(call);
            return Err(CommandError::NoCall);
        };
        if !matches!(entry.state, CallState::Running { .. }) {
            return Err(CommandError::NoCall);
        }
        let connection = self.check_body(entry.connection, &spec.payload, &spec.metadata)?;
        let above_call = match (entry.price, connection.money.as_deref(), spec.cost) {
            (Some(price), Some(Money::Payee(payee)), Some(cost)) => {
                let price = payee.prices.price(price);
                let maximum = price.hold();
                if cost > maximum {
                    return Err(CommandError::CostAboveMaximum { cost, maximum });
                }
                cost.saturating_sub(price.call)
            }
            _ => Amount::ZERO,
        };
        let bytes = spec.payload.len() as u64;
        // A peer that grants no window would else have us keep as many answers as it may make calls. [session.memory.bound]
        if !self.ledger.try_charge(bytes) {
            self.push_response(call, Status::AtCapacity, Metadata::new(), Bytes::new(), Vec::new());
            return Err(CommandError::OutOfMemory { limit: self.config.memory.session });
        }
        let slots = match self.create_streams(call, spec.slots) {
            Ok(slots) => slots,
            Err(error) => {
                self.ledger.release(bytes);
                return Err(error);
            }
        };
        if let Some(entry) = self.calls.get_mut(call) {
            entry.above_call = above_call;
            // Any other end of a named call costs what its beginning left to be paid. [pay.key.once]
            if matches!(spec.status, Status::Ok | Status::AppError) {
                entry.paid_before = spec.paid_before;
            }
        }
        self.push_response(call, spec.status, spec.metadata, spec.payload, slots.clone());
        Ok(slots)
    }

    /// Begins a call of the peer's that an idempotency key names, of which earlier attempts have cost `paid_before`, in base
    /// units. From now on its cancel, deadline or lost connection costs what its price has above that; before, they cost
    /// nothing, however often the call is made. `[pay.key.once]`
    /// [`Event::CallCharged`](super::Event::CallCharged) says what it has cost when its response is taken for writing or
    /// its connection ends before that.
    ///
    /// Returns `false` when the call was cancelled, was answered or has ended: nothing is charged or reported then, and
    /// nothing is to be executed.
    #[must_use]
    pub fn begin_named(&mut self, call: CallKey, paid_before: Amount) -> bool {
        let Some(call) = self.calls.get_mut(call) else { return false };
        if call.cancelled || !matches!(call.state, CallState::Running { .. }) {
            return false;
        }
        (call.paid_before, call.reports) = (paid_before, true);
        true
    }

    pub(super) fn push_response(
        &mut self,
        call: CallKey,
        status: Status,
        metadata: Metadata,
        payload: Bytes,
        slots: Vec<StreamKey>,
    ) {
        let Some(entry) = self.calls.get_mut(call) else { return };
        let CallState::Running { id } = entry.state else { return };
        entry.state = CallState::Responding { id };
        let connection_id = entry.connection;
        let Some(connection) = self.connections.get_mut(&connection_id) else { return };
        let active = connection.active();
        active.responses.push_back(Body { call, kind: BodyKind::Response { status }, metadata, payload, slots });
        if active.ready_responses() {
            self.outbox.enter_ring(connection_id, connection);
        }
    }

    /// Creates the streams of slots of an item of a stream of the same call; returns their connection, too.
    ///
    /// # Errors
    /// When the stream has ended, or the peer's limit on open streams is exceeded.
    pub fn create_item_streams(
        &mut self,
        of: StreamKey,
        flows: &[Flow],
    ) -> Result<(ConnectionId, Vec<StreamKey>), CommandError> {
        let entry = self.streams.get(of).ok_or(CommandError::NoCall)?;
        let (connection, call) = (entry.connection, entry.call);
        Ok((connection, self.create_streams(call, flows)?))
    }

    fn create_streams(&mut self, call: CallKey, flows: &[Flow]) -> Result<Vec<StreamKey>, CommandError> {
        if flows.is_empty() {
            return Ok(Vec::new());
        }
        if flows.len() > MAX_SLOTS {
            return Err(CommandError::AtCapacity { what: "slots in one frame", limit: MAX_SLOTS as u64 });
        }
        let entry = self.calls.get_mut(call).ok_or(CommandError::NoCall)?;
        let id = entry.connection;
        let connection = self.connections.get_mut(&id).ok_or(CommandError::NoConnection(id))?;
        let limit = connection.peer_limits.max_streams;
        let (own_ids, stream_window) = (connection.own_streams, connection.limits.stream_window);
        let active = connection.active();
        let count = u32::try_from(flows.len()).unwrap_or(u32::MAX);
        let total = active.own_streams.saturating_add(count);
        if total > limit {
            return Err(CommandError::AtCapacity { what: "open streams", limit: u64::from(limit) });
        }
        // As for calls: all that were created and not announced are among these.
        if own_ids.left() < u64::from(total) {
            return Err(CommandError::IdsExhausted);
        }
        let received = flows.iter().filter(|&&flow| flow == Flow::FromPeer).count() as u64;
        if !self.ledger.try_charge(received.saturating_mul(u64::from(stream_window))) {
            return Err(CommandError::OutOfMemory { limit: self.config.memory.session });
        }
        active.own_streams = total;
        entry.streams = entry.streams.saturating_add(count);
        let window = stream_window;
        let now = self.timers.last_received();
        let create = |&flow: &Flow| {
            let granted = match flow {
                Flow::FromPeer => Granted::charged(window, now),
                Flow::ToPeer => Granted::nothing(),
            };
            self.streams.insert(StreamEntry {
                connection: id,
                call,
                id: None,
                flow,
                opened_by_us: true,
                scheduled: false,
                credit: None,
                stop: None,
                granted,
            })
        };
        let keys: Vec<StreamKey> = flows.iter().map(create).collect();
        active.owned.extend(&keys);
        Ok(keys)
    }

    /// The caller has lost interest. A call that is not announced is forgotten; any other is cancelled at the peer and
    /// stays until the peer has ended it.
    pub fn cancel_call(&mut self, key: CallKey) {
        let Some(call) = self.calls.get_mut(key) else { return };
        let connection = call.connection;
        match &mut call.state {
            CallState::Queued => {
                for stream in self.streams_of(key, connection) {
                    self.fail_removed(stream);
                }
                self.calls.remove(key);
                // Its arguments would else wait for a turn that may be long in coming.
                if let Some(live) = self.connections.get_mut(&connection) {
                    live.active().requests.retain(|body| body.call != key);
                }
                self.close_if_drained(connection);
            }
            CallState::Sent { id, cancelled } | CallState::Answered { id, cancelled } => {
                let call = *id;
                if !core::mem::replace(cancelled, true) {
                    self.control(connection, &Cancel { connection, call });
                }
            }
            _ => {}
        }
    }

    pub(super) fn streams_of(&self, call: CallKey, connection: ConnectionId) -> Vec<StreamKey> {
        let active = self.connections.get(&connection).and_then(|live| live.active.as_ref());
        let owned = active.into_iter().flat_map(|active| active.owned.iter().copied());
        owned.filter(|&key| self.streams.get(key).is_some_and(|entry| entry.call == call)).collect()
    }

    /// A sending stream has something to send: items within its credit, its end, or a reset.
    pub fn stream_ready(&mut self, stream: StreamKey) {
        let Some(entry) = self.streams.get_mut(stream) else { return };
        // One that is not announced is scheduled when it is.
        if entry.flow != Flow::ToPeer || entry.id.is_none() {
            return;
        }
        let connection = entry.connection;
        if !core::mem::replace(&mut entry.scheduled, true) {
            return self.schedule(connection, Source::Stream(stream));
        }
        // A stream that waits for money says this when it is reset, and a reset costs nothing.
        let money = self.connections.get(&connection).and_then(|live| live.money.as_deref());
        if let Some(Money::Payee(payee)) = money
            && payee.streams.contains(&stream)
        {
            self.resume_paid(connection);
        }
    }

    /// The receiver of a stream wants no more.
    pub fn stop_stream(&mut self, stream: StreamKey, code: u32) {
        let Some(entry) = self.streams.get_mut(stream) else { return };
        if entry.flow != Flow::FromPeer {
            return;
        }
        // The first code stands. One that is not announced is stopped when it is.
        if entry.stop.is_none() {
            entry.stop = Some(code);
            if entry.id.is_some() {
                self.queue_stop(stream);
            }
        }
    }

    pub(super) fn queue_stop(&mut self, stream: StreamKey) {
        let streams = &self.streams;
        self.outbox.push_stop(stream, streams.len(), |stream| streams.contains_key(stream));
    }

    /// Ends a stream that the application will not see: it was announced in an item that was dropped unread, or by a
    /// call that was cancelled before it was delivered.
    pub fn discard_stream(&mut self, key: StreamKey) {
        let Some(entry) = self.streams.get(key) else { return };
        let connection = entry.connection;
        match (entry.flow, entry.id) {
            (Flow::FromPeer, _) => self.stop_stream(key, code::CANCELLED),
            (Flow::ToPeer, Some(stream)) => {
                self.control(connection, &Reset { connection, stream, code: code::CANCELLED });
                self.remove_stream(key);
            }
            (Flow::ToPeer, None) => self.remove_stream(key),
        }
    }

    /// Forgets a stream that was created for a slot and will never be announced, because the item that carries it was
    /// dropped.
    pub fn forget_unannounced(&mut self, stream: StreamKey) {
        if self.streams.get(stream).is_some_and(|entry| entry.id.is_none()) {
            self.remove_stream(stream);
        }
    }

    /// Calls of a connection that have not ended, of both directions.
    pub fn open_calls(&self, connection: ConnectionId) -> usize {
        let active = self.connections.get(&connection).and_then(|live| live.active.as_deref());
        active.map_or(0, |active| {
            let queued = active.requests.iter().filter(|body| self.calls.contains_key(body.call)).count();
            active.calls.len().saturating_add(active.served.len()).saturating_add(queued)
        })
    }
}

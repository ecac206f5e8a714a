//! What the application does with a session.

use bytes::Bytes;

use super::connection::{Call, CallState, Connection, State, StreamEntry};
use super::grants::Granted;
use super::money::{Money, Payee, Payer};
use super::outbox::{Body, BodyKind, Source};
use super::receive::MAX_SERVICE_NAME;
use super::{CallKey, Event, Machine, MoneyCount, PayeeMoney, PayerMoney, Phase};
use crate::error::{ConnectionEnd, Reason, SessionEnd, code};
use crate::id::{ConnectionId, Parity};
use crate::limits::{ConnectionLimits, HEADER_ALLOWANCE, LimitsError, MAX_SLOTS};
use crate::message::{Accept, Cancel, Close, Flow, GoAway, Open, Payment, Reject, Reset, Status};
use crate::metadata::{Metadata, MetadataTooLarge};
use crate::payment::{Amount, CallMeter};
use crate::stream::StreamKey;
use crate::time::Time;

/// A command that cannot be carried out. Nothing has changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CommandError {
    /// The session has ended.
    #[error(transparent)]
    SessionEnded(SessionEnd),
    /// The handshake has not ended.
    #[error("the handshake has not ended")]
    NotOpen,
    /// The connection is not there (any more), or does not wait for this.
    #[error("connection {0} is closed, or does not wait for this")]
    NoConnection(ConnectionId),
    /// The call is not there (any more), or was answered.
    #[error("the call has ended or was answered")]
    NoCall,
    /// One side is going away.
    #[error("the session is going away")]
    GoingAway,
    /// More than the peer allows.
    #[error("{what}: the peer allows {limit}")]
    AtCapacity {
        /// What is limited.
        what: &'static str,
        /// The peer's limit.
        limit: u64,
    },
    /// A body above the peer's limit.
    #[error("a body of {bytes} bytes is above the peer's limit of {limit} bytes; send larger data as a stream")]
    BodyTooLarge {
        /// The body, in bytes.
        bytes: usize,
        /// The peer's limit, in bytes.
        limit: u32,
    },
    /// A credential, receipt, terms or payment message that would not fit the peer's largest frame.
    #[error("a payload of {bytes} bytes is above the {limit} bytes that fit the peer's largest frame")]
    PayloadTooLarge {
        /// The payload, in bytes.
        bytes: usize,
        /// What fits, in bytes.
        limit: u32,
    },
    /// A response that states a higher cost than is reserved for its call.
    #[error("a cost of {cost} base units is above the {maximum} that the price reserves for the call")]
    CostAboveMaximum {
        /// The stated cost, in base units.
        cost: Amount,
        /// What the price reserves, in base units.
        maximum: Amount,
    },
    /// A service name that is too long.
    #[error("a service name of {0} bytes is above {MAX_SERVICE_NAME}")]
    NameTooLong(usize),
    /// Metadata above its caps.
    #[error(transparent)]
    Metadata(#[from] MetadataTooLarge),
    /// Limits that contradict themselves.
    #[error(transparent)]
    Limits(#[from] LimitsError),
    /// The memory budget of the session, or of the process, has no room for the windows of more streams.
    #[error("no memory for more streams: the session may grant {limit} bytes, and shares what the process may")]
    OutOfMemory {
        /// What the session may grant, in bytes.
        limit: u64,
    },
    /// All ids of a space were used: those of a session's connections, or of a connection's calls or streams. What is
    /// open goes on and may end in order. `[session.id.exhausted]`
    #[error("all ids are used up; open a new session, or a new connection if it is calls or streams that ran out")]
    IdsExhausted,
}

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

/// A connection to be asked for, whatever it is for.
#[derive(Debug)]
pub struct OpenSpec<'a> {
    /// The service.
    pub service: &'a str,
    /// This side's half of the call and stream ids inside.
    pub parity: Parity,
    /// What this side receives.
    pub limits: ConnectionLimits,
    /// This side's metadata.
    pub metadata: Metadata,
    /// The credential, or empty.
    pub credential: Bytes,
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
}

impl Machine {
    fn check_open(&self) -> Result<(), CommandError> {
        match &self.phase {
            Phase::Open => Ok(()),
            Phase::Greeting => Err(CommandError::NotOpen),
            Phase::Ended(end) => Err(CommandError::SessionEnded(end.clone())),
        }
    }

    /// Asks the peer for a connection to a service. The answer is [`Event::ConnectionAccepted`],
    /// [`Event::ConnectionRejected`] or, after the open timeout, [`Event::ConnectionClosed`].
    ///
    /// `credential` and `money` come together: a connection that this side pays for.
    ///
    /// # Errors
    /// When the session does not take connections, or a limit of either side is exceeded.
    pub fn open(
        &mut self,
        now: Time,
        service: &str,
        limits: ConnectionLimits,
        metadata: Metadata,
        paid: Option<(Bytes, PayerMoney)>,
    ) -> Result<ConnectionId, CommandError> {
        let (credential, money) = paid.unzip();
        // This side takes the odd half of the ids inside; a relay passes them on unchanged.
        let (parity, credential) = (Parity::Odd, credential.unwrap_or_default());
        self.open_as(now, OpenSpec { service, parity, limits, metadata, credential }, money)
    }

    pub(super) fn open_as(
        &mut self,
        now: Time,
        spec: OpenSpec<'_>,
        money: Option<PayerMoney>,
    ) -> Result<ConnectionId, CommandError> {
        let OpenSpec { service, parity, limits, metadata, credential } = spec;
        self.check_open()?;
        limits.check(&self.config.limits)?;
        metadata.check()?;
        if service.len() > MAX_SERVICE_NAME {
            return Err(CommandError::NameTooLong(service.len()));
        }
        if self.peer_going_away.is_some() || self.going_away.is_some() {
            return Err(CommandError::GoingAway);
        }
        let most = [
            ("open connections", self.opens.ours, self.peer_limits.max_connections),
            ("unanswered opens", self.opens.ours_pending, self.peer_limits.max_pending_opens),
        ];
        if let Some(&(what, _, limit)) = most.iter().find(|(_, count, limit)| count >= limit) {
            return Err(CommandError::AtCapacity { what, limit: u64::from(limit) });
        }
        self.check_payload(&credential)?;
        let id = ConnectionId(self.own_ids.take().ok_or(CommandError::IdsExhausted)?);
        let mut connection = Connection::new(State::Opening, parity, limits, ConnectionLimits::default());
        connection.money = money.map(|money| Box::new(Money::Payer(Payer::new(money))));
        self.connections.insert(id, Box::new(connection));
        self.opens.ours = self.opens.ours.saturating_add(1);
        self.open_stats.opened_by_us = self.open_stats.opened_by_us.saturating_add(1);
        self.opens.ours_pending = self.opens.ours_pending.saturating_add(1);
        self.timers.start_open(now.after(self.config.open_timeout), id);
        let waits = |id| self.connections.get(&id).is_some_and(|open| open.state == State::Opening);
        self.timers.trim_opens(self.opens.ours_pending, waits);
        let open = Open { connection: id, service: service.to_owned(), parity, limits, metadata };
        self.control_with(id, &open, credential);
        Ok(id)
    }

    /// Accepts [`Event::ConnectionRequested`]. `money` makes it one that is paid to this side; `receipt` travels along.
    ///
    /// # Errors
    /// When the connection no longer waits, or the limits contradict the session's.
    pub fn accept(
        &mut self,
        id: ConnectionId,
        limits: ConnectionLimits,
        metadata: Metadata,
        paid: Option<(Bytes, PayeeMoney)>,
    ) -> Result<(), CommandError> {
        let (receipt, money) = paid.unzip();
        self.accept_as(id, limits, metadata, receipt.unwrap_or_default(), money)
    }

    pub(super) fn accept_as(
        &mut self,
        id: ConnectionId,
        limits: ConnectionLimits,
        metadata: Metadata,
        receipt: Bytes,
        money: Option<PayeeMoney>,
    ) -> Result<(), CommandError> {
        self.check_open()?;
        // Ended too, if the opener has closed it meanwhile.
        self.finish_open(id);
        limits.check(&self.config.limits)?;
        metadata.check()?;
        self.check_payload(&receipt)?;
        let connection = self
            .connections
            .get_mut(&id)
            .filter(|connection| connection.state == State::Requested)
            .ok_or(CommandError::NoConnection(id))?;
        (connection.state, connection.unanswered) = (State::Open, false);
        connection.set_limits(limits, connection.peer_limits);
        connection.money = money.map(|money| Box::new(Money::Payee(Payee::new(money))));
        self.opens.peers_pending = self.opens.peers_pending.saturating_sub(1);
        self.control_with(id, &Accept { connection: id, limits, metadata }, receipt);
        Ok(())
    }

    /// Rejects [`Event::ConnectionRequested`]. `terms` are the signed terms of a priced service, else empty.
    ///
    /// # Errors
    /// When the connection no longer waits.
    pub fn reject(
        &mut self,
        id: ConnectionId,
        reason: Reason,
        metadata: Metadata,
        terms: Bytes,
    ) -> Result<(), CommandError> {
        self.check_open()?;
        self.finish_open(id);
        metadata.check()?;
        self.check_payload(&terms)?;
        if self.connections.get(&id).is_none_or(|connection| connection.state != State::Requested) {
            return Err(CommandError::NoConnection(id));
        }
        self.remove_connection(id);
        self.send_reject(id, reason, metadata, terms);
        Ok(())
    }

    /// Closes a connection, in whatever state it is. Its calls and streams end now; an application that wants its
    /// answers delivered closes after they are.
    pub fn close(&mut self, id: ConnectionId, reason: Reason) {
        match self.connections.get(&id).map(|connection| connection.state) {
            None | Some(State::Closing) => self.finish_open(id),
            Some(State::Requested) => {
                self.remove_connection(id);
                self.send_reject(id, reason.clone(), Metadata::new(), Bytes::new());
                self.events.push_back(Event::ConnectionClosed {
                    connection: id,
                    end: ConnectionEnd::ClosedByUs(reason),
                    money: None,
                });
            }
            Some(State::Opening | State::Open) => {
                self.close_with(id, reason.clone(), ConnectionEnd::ClosedByUs(reason));
            }
        }
    }

    /// Sends Close and waits for the peer's; the application is told at once that the connection ended.
    pub(super) fn close_with(&mut self, id: ConnectionId, reason: Reason, end: ConnectionEnd) {
        self.send_close(id, reason);
        let Some(connection) = self.connections.get(&id) else { return };
        let mut rest =
            Connection::new(State::Closing, crate::id::Parity::Odd, connection.limits, connection.peer_limits);
        (rest.opened_by_us, rest.unanswered) = (connection.opened_by_us, connection.unanswered);
        debug_assert!(rest.opened_by_us || !rest.unanswered, "an open of the peer's is answered, not closed");
        // It still counts: an id that is closing is an entry in both tables, and an open is pending until its answer.
        let counts = self.opens;
        self.forget_connection(id, Some(end));
        self.connections.insert(id, Box::new(rest));
        self.opens = counts;
    }

    fn send_close(&mut self, id: ConnectionId, reason: Reason) {
        self.outbox.flush_payment(id);
        let close = Close { connection: id, reason: reason.into(), metadata: Metadata::new() };
        self.control(id, &close);
    }

    pub(super) fn send_reject(&mut self, id: ConnectionId, reason: Reason, metadata: Metadata, terms: Bytes) {
        self.open_stats.rejected_by_us = self.open_stats.rejected_by_us.saturating_add(1);
        // The peer made us say it, whoever says no: one that does not read its rejects is not read.
        self.answer_with(id, &Reject { connection: id, reason: reason.into(), metadata }, terms);
        if let Err(violation) = self.spend_refusal() {
            self.handle_violation(violation);
        }
    }

    /// No connection that the peer opens from now on is accepted; those that are open go on.
    pub fn go_away(&mut self, reason: Reason) {
        if self.phase == Phase::Open && self.going_away.is_none() {
            let last = self.peer_ids.highest();
            self.going_away = Some(last);
            self.control(ConnectionId::ROOT, &GoAway { last, reason: reason.into() });
        }
    }

    /// Makes a call on an open connection. It is announced when the connection's turn comes and the peer's limit on
    /// open calls has room. The keys of its streams come in the order of `slots`.
    ///
    /// # Errors
    /// When the connection is not open, or a limit of the peer is exceeded.
    pub fn start_call(&mut self, spec: CallSpec<'_>) -> Result<(CallKey, Vec<StreamKey>), CommandError> {
        self.check_open()?;
        let id = spec.connection;
        let connection = self.check_body(id, &spec.payload, &spec.metadata)?;
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

    /// What no limit of a connection covers must fit the peer's largest frame.
    fn check_payload(&self, payload: &Bytes) -> Result<(), CommandError> {
        let limit = self.peer_limits.max_frame.saturating_sub(HEADER_ALLOWANCE);
        match payload.len() > limit as usize {
            true => Err(CommandError::PayloadTooLarge { bytes: payload.len(), limit }),
            false => Ok(()),
        }
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
    /// method's maximum: then the call still waits. `[pay.reserve.maximum]`
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
        let slots = self.create_streams(call, spec.slots)?;
        if let Some(entry) = self.calls.get_mut(call) {
            entry.above_call = above_call;
        }
        self.push_response(call, spec.status, spec.metadata, spec.payload, slots.clone());
        Ok(slots)
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

    /// Sends a payment message, ahead of all data.
    ///
    /// # Errors
    /// When the connection is not an open paid one.
    pub fn send_payment(&mut self, connection: ConnectionId, message: Bytes) -> Result<(), CommandError> {
        let open = self.connections.get(&connection);
        if open.is_none_or(|open| open.state != State::Open || open.money.is_none()) {
            return Err(CommandError::NoConnection(connection));
        }
        self.check_payload(&message)?;
        let head = crate::message::encode_head(&Payment { connection });
        let lane = self.lane(connection);
        self.outbox.payment.push_back((connection, crate::frame::Transmit { lane, head, payload: message }));
        Ok(())
    }

    /// Payer: sets the count at which [`Event::ReceivedMark`] comes; at once if it is reached.
    pub fn set_received_mark(&mut self, connection: ConnectionId, mark: Amount) {
        let money = self.connections.get_mut(&connection).and_then(|live| live.money.as_deref_mut());
        if let Some(Money::Payer(payer)) = money
            && let Some(received) = payer.set_mark(mark)
        {
            self.events.push_back(Event::ReceivedMark { connection, received });
        }
    }

    /// Payer: the count is durable so far that grants may go on until it reaches `hold` (absolute, in base units; a lower
    /// one changes nothing). `[pay.received.held]`
    pub fn raise_received_hold(&mut self, connection: ConnectionId, hold: Amount) {
        let money = self.connections.get_mut(&connection).and_then(|live| live.money.as_deref_mut());
        if let Some(Money::Payer(payer)) = money
            && let Some((credits, window)) = payer.raise_hold(hold)
        {
            self.outbox.credits.extend(credits);
            if window {
                self.outbox.windows.push_back(connection);
            }
        }
    }

    /// The counts of a paid connection that is open.
    pub fn money(&self, connection: ConnectionId) -> Option<MoneyCount> {
        self.connections.get(&connection)?.money.as_deref().map(Money::count)
    }

    /// Calls of a connection that have not ended, of both directions.
    pub fn open_calls(&self, connection: ConnectionId) -> usize {
        let active = self.connections.get(&connection).and_then(|live| live.active.as_deref());
        active.map_or(0, |active| {
            let queued = active.requests.iter().filter(|body| self.calls.contains_key(body.call)).count();
            active.calls.len().saturating_add(active.served.len()).saturating_add(queued)
        })
    }

    /// The limits of an open connection: what this side receives, and what the peer does.
    pub fn limits(&self, connection: ConnectionId) -> Option<(&ConnectionLimits, &ConnectionLimits)> {
        self.connections.get(&connection).map(|live| (&live.limits, &live.peer_limits))
    }
}

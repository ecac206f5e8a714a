//! What the application does with a session and its connections. Calls and streams are in `call_commands`.

use bytes::Bytes;

use super::connection::{Connection, State};
use super::money::{Money, Payee, Payer};
use super::receive::MAX_SERVICE_NAME;
use super::{Event, Machine, MoneyCount, PayeeMoney, PayerMoney, Phase};
use crate::error::{ConnectionEnd, Reason, SessionEnd};
use crate::id::{ConnectionId, Parity};
use crate::limits::{ConnectionLimits, HEADER_ALLOWANCE, LimitsError};
use crate::message::{Accept, Close, GoAway, Open, Payment, Reject};
use crate::metadata::{Metadata, MetadataTooLarge};
use crate::payment::Amount;
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
    /// The peer takes no new calls on the connection.
    #[error("the connection is draining: it takes no new calls; open another one")]
    Draining,
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
    /// The memory budget of the session, or of the process, has no room for the windows of more streams, or for an answer:
    /// the call was answered with `AtCapacity` in its place.
    #[error("no memory: the peer of a session may make it hold {limit} bytes, and shares what the process may")]
    OutOfMemory {
        /// What the session may hold, in bytes.
        limit: u64,
    },
    /// All ids of a space were used: those of a session's connections, or of a connection's calls or streams. What is
    /// open goes on and may end in order. `[session.id.exhausted]`
    #[error("all ids are used up; open a new session, or a new connection if it is calls or streams that ran out")]
    IdsExhausted,
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

impl Machine {
    pub(super) fn check_open(&self) -> Result<(), CommandError> {
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
        self.accept_as(id, limits, metadata, receipt.unwrap_or_default(), money)?;
        self.drain_opened(id);
        Ok(())
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

    /// What no limit of a connection covers must fit the peer's largest frame.
    fn check_payload(&self, payload: &Bytes) -> Result<(), CommandError> {
        let limit = self.peer_limits.max_frame.saturating_sub(HEADER_ALLOWANCE);
        match payload.len() > limit as usize {
            true => Err(CommandError::PayloadTooLarge { bytes: payload.len(), limit }),
            false => Ok(()),
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
        self.outbox.push_payment(connection, crate::frame::Transmit { lane, head, payload: message });
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

    /// The limits of an open connection: what this side receives, and what the peer does.
    pub fn limits(&self, connection: ConnectionId) -> Option<(&ConnectionLimits, &ConnectionLimits)> {
        self.connections.get(&connection).map(|live| (&live.limits, &live.peer_limits))
    }
}

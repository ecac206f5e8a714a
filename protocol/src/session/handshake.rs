//! Hello, HelloAck, Refuse; and the ways in which a session ends.

use bytes::Bytes;

use super::{CommandError, Event, MAX_VERSION, MIN_VERSION, Machine, Phase, Proving, Role};
use crate::error::{ConnectionEnd, Reason, SessionEnd, Violation, code};
use crate::id::{ConnectionId, IdSequence};
use crate::limits::{HEADER_ALLOWANCE, SessionLimits};
use crate::message::{Challenge, Close, Header, Hello, HelloAck, Proof, ProtocolError, Refuse};
use crate::metadata::Metadata;
use crate::session::connection::PeerIds;
use crate::time::Time;

/// Bytes of a challenge with its method: what fits a frame of the handshake with room to spare.
const MAX_CHALLENGE: usize = 4_096;

/// A peer that takes frames below this size could not even be opened a connection to.
fn check_limits(limits: &SessionLimits) -> Result<(), Violation> {
    if limits.max_frame < HEADER_ALLOWANCE {
        let (value, limit) = (u64::from(limits.max_frame), u64::from(HEADER_ALLOWANCE));
        return Err(Violation::AboveLimit {
            what: "header allowance, which max_frame must cover",
            value: limit,
            limit: value,
        });
    }
    Ok(())
}

impl Machine {
    pub(super) fn send_hello(&mut self) {
        let hello = Hello {
            min_version: MIN_VERSION,
            max_version: MAX_VERSION,
            parity: self.config.parity,
            limits: self.config.limits,
            metadata: self.config.metadata.clone(),
        };
        self.control(ConnectionId::ROOT, &hello);
    }

    pub(super) fn receive_hello(&mut self, hello: Hello) -> Result<(), Violation> {
        if self.role != Role::Responder || self.phase != Phase::Greeting || self.hello.is_some() {
            return Err(Violation::Unexpected { frame: "Hello", state: "the responder takes one, first" });
        }
        hello.metadata.check()?;
        check_limits(&hello.limits)?;
        let version = hello.max_version.min(MAX_VERSION);
        if version < hello.min_version.max(MIN_VERSION) {
            let text = format!(
                "no common version: the initiator speaks {} to {}, this side {MIN_VERSION} to {MAX_VERSION}",
                hello.min_version, hello.max_version
            );
            self.refuse_session(Reason::new(code::VERSION, text));
            return Ok(());
        }
        self.hello = Some(version);
        self.peer_limits = hello.limits;
        self.own_ids = IdSequence::new(hello.parity.other());
        self.peer_ids = PeerIds::new(hello.parity);
        self.config.parity = hello.parity;
        self.events.push_back(Event::SessionRequested { metadata: hello.metadata });
        Ok(())
    }

    /// Responder: answers [`Event::SessionRequested`] with HelloAck. Without that event, while a challenge is not
    /// answered, and after the session's end, it does nothing.
    pub fn accept_session(&mut self, metadata: Metadata) {
        // The Hello may wait for an authenticator while the peer goes or its time runs out.
        if self.phase != Phase::Greeting || matches!(self.proving, Proving::Asked(_)) {
            return;
        }
        let Some(version) = self.hello.take() else { return };
        self.control(ConnectionId::ROOT, &HelloAck { version, limits: self.config.limits, metadata });
        self.open_session(Metadata::new());
    }

    /// Responder: asks for a proof before [`Event::SessionRequested`] is answered, once. The answer is
    /// [`Event::SessionProved`].
    ///
    /// # Errors
    /// When no hello waits for its answer, or there was a challenge before.
    pub fn challenge_session(&mut self, method: &str, challenge: Bytes) -> Result<(), CommandError> {
        if let Some(end) = self.end() {
            return Err(CommandError::SessionEnded(end.clone()));
        }
        if self.phase != Phase::Greeting || self.hello.is_none() || self.proving != Proving::Not {
            return Err(CommandError::NotOpen);
        }
        let limit = MAX_CHALLENGE as u32;
        if challenge.len().saturating_add(method.len()) > MAX_CHALLENGE {
            return Err(CommandError::PayloadTooLarge { bytes: challenge.len(), limit });
        }
        self.proving = Proving::Asked(method.to_owned());
        self.control_with(ConnectionId::ROOT, &Challenge { method: method.to_owned() }, challenge);
        Ok(())
    }

    /// Initiator: answers [`Event::SessionChallenged`]. Without that event it does nothing.
    pub fn prove_session(&mut self, proof: Bytes) {
        let Proving::Asked(method) = &mut self.proving else { return };
        if self.role == Role::Initiator && self.phase == Phase::Greeting {
            let method = core::mem::take(method);
            self.proving = Proving::Answered;
            self.control_with(ConnectionId::ROOT, &Proof { method }, proof);
        }
    }

    pub(super) fn receive_challenge(&mut self, challenge: Challenge, payload: Bytes) -> Result<(), Violation> {
        // [session.auth.challenge]
        if self.role != Role::Initiator || self.phase != Phase::Greeting || self.proving != Proving::Not {
            return Err(Violation::Unexpected {
                frame: Challenge::NAME,
                state: "it comes once, before the answer to Hello",
            });
        }
        let Challenge { method } = challenge;
        self.proving = Proving::Asked(method.clone());
        self.events.push_back(Event::SessionChallenged { method, challenge: payload });
        Ok(())
    }

    pub(super) fn receive_proof(&mut self, proof: &Proof, payload: Bytes) -> Result<(), Violation> {
        // [session.auth.challenge]
        let asked = matches!(&self.proving, Proving::Asked(method) if *method == proof.method);
        if self.role != Role::Responder || self.phase != Phase::Greeting || !asked {
            return Err(Violation::Unexpected { frame: Proof::NAME, state: "it answers one Challenge of its method" });
        }
        self.proving = Proving::Answered;
        self.events.push_back(Event::SessionProved { proof: payload });
        Ok(())
    }

    /// Responder: answers [`Event::SessionRequested`] with Refuse, and the session ends.
    pub fn refuse_session(&mut self, reason: Reason) {
        if self.phase == Phase::Greeting {
            self.control(ConnectionId::ROOT, &Refuse { reason: reason.clone().into() });
            self.finish(SessionEnd::RefusedByUs(reason));
        }
    }

    pub(super) fn receive_hello_ack(&mut self, now: Time, ack: HelloAck) -> Result<(), Violation> {
        if self.role != Role::Initiator || self.phase != Phase::Greeting {
            return Err(Violation::Unexpected { frame: "HelloAck", state: "it answers one Hello" });
        }
        ack.metadata.check()?;
        check_limits(&ack.limits)?;
        if !(MIN_VERSION..=MAX_VERSION).contains(&ack.version) {
            return Err(Violation::Unexpected { frame: "HelloAck", state: "its version is not of the range in Hello" });
        }
        self.peer_limits = ack.limits;
        self.open_session(ack.metadata);
        // The first frame after HelloAck, for which the responder waits, and the first round-trip time.
        self.send_ping(now);
        Ok(())
    }

    fn open_session(&mut self, metadata: Metadata) {
        self.phase = Phase::Open;
        self.timers.end_handshake();
        let parity = match self.role {
            Role::Initiator => self.config.parity,
            Role::Responder => self.config.parity.other(),
        };
        self.events.push_back(Event::SessionOpened { metadata, limits: self.peer_limits, parity });
    }

    pub(super) fn receive_refuse(&mut self, refuse: Refuse) -> Result<(), Violation> {
        if self.role != Role::Initiator || self.phase != Phase::Greeting {
            return Err(Violation::Unexpected { frame: "Refuse", state: "it answers one Hello" });
        }
        self.finish(SessionEnd::RefusedByPeer(refuse.reason.into()));
        Ok(())
    }

    /// Ends the session: Close on the root connection, which is the last frame. What was not sent is dropped; an
    /// application that wants its answers delivered closes after they are.
    pub fn close_session(&mut self, reason: Reason) {
        if self.end().is_some() {
            return;
        }
        let reason = Reason::new(reason.code, reason.text);
        self.outbox.clear();
        let close = Close { connection: ConnectionId::ROOT, reason: reason.clone().into(), metadata: Metadata::new() };
        self.control(ConnectionId::ROOT, &close);
        self.finish(SessionEnd::ClosedByUs(reason));
    }

    /// The conduit has ended or failed.
    pub fn handle_conduit_lost(&mut self, cause: impl Into<String>) {
        self.finish(SessionEnd::ConduitLost(cause.into()));
    }

    /// The peer broke a rule that is checked outside of the machine: an item without credit, a payment message that
    /// cannot be decoded.
    pub fn handle_violation(&mut self, violation: Violation) {
        if self.end().is_some() {
            return;
        }
        // The peer is told once; nothing else is sent any more. [session.violation.once]
        self.outbox.clear();
        let reason = Reason::new(violation.code(), violation.to_string());
        self.control(ConnectionId::ROOT, &ProtocolError { reason: reason.into() });
        self.finish(SessionEnd::PeerViolation(violation));
    }

    /// Every connection ends with the session's cause, then the session does.
    pub(super) fn finish(&mut self, end: SessionEnd) {
        if self.end().is_some() {
            return;
        }
        let mut open: Vec<ConnectionId> = self.connections.keys().copied().collect();
        open.sort_unstable();
        for connection in open {
            self.forget_connection(connection, Some(ConnectionEnd::Session(end.clone())));
        }
        self.ledger.close();
        self.phase = Phase::Ended(end.clone());
        self.events.push_back(Event::SessionEnded(end));
    }
}

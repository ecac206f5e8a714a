//! One table of deadlines: handshake, unanswered opens, keepalive, idleness. Nothing here polls.

use core::time::Duration;
use std::collections::VecDeque;

use super::{Config, Machine, Phase};
use crate::error::{ConnectionEnd, Reason, SessionEnd, Violation, code};
use crate::id::ConnectionId;
use crate::message::{Close, Ping, Pong};
use crate::metadata::Metadata;
use crate::session::Event;
use crate::session::connection::State;
use crate::time::Time;

/// The deadlines of a session.
#[derive(Debug)]
pub(super) struct Timers {
    handshake: Option<Time>,
    ping_interval: Duration,
    pong_timeout: Duration,
    last_received: Time,
    /// When the latest ping was sent, and its nonce.
    pinged: Option<(Time, u64)>,
    /// The nonce of the next ping; all below were pinged.
    next_nonce: u64,
    /// All nonces below were answered or overtaken.
    answered: u64,
    rtt: Option<Duration>,
    idle_timeout: Option<Duration>,
    /// Since when there is no connection, if there is none.
    idle_since: Time,
    /// Unanswered opens of ours. The timeout is the same for all, so the order is that of the deadlines.
    opens: VecDeque<(Time, ConnectionId)>,
}

impl Timers {
    pub(super) fn new(config: &Config, now: Time) -> Self {
        Timers {
            handshake: Some(now.after(config.handshake_timeout)),
            ping_interval: config.ping_interval,
            pong_timeout: config.pong_timeout,
            last_received: now,
            pinged: None,
            next_nonce: 1,
            answered: 1,
            rtt: None,
            idle_timeout: config.idle_timeout,
            idle_since: now,
            opens: VecDeque::new(),
        }
    }

    /// When the last byte came: the time of what is being taken in.
    pub(super) const fn last_received(&self) -> Time {
        self.last_received
    }

    pub(super) const fn rtt(&self) -> Option<Duration> {
        self.rtt
    }

    /// The last connection has gone.
    pub(super) fn start_idle(&mut self) {
        self.idle_since = self.last_received;
    }

    /// When a session without connections has been so for long enough. `[session.idle.timeout]`
    fn idle(&self) -> Option<Time> {
        self.idle_timeout.map(|timeout| self.idle_since.after(timeout))
    }

    pub(super) fn next(&self, is_idle: bool) -> Option<Time> {
        let keepalive = match self.handshake {
            Some(handshake) => handshake,
            None => match self.idle().filter(|_| is_idle) {
                Some(idle) => idle.min(self.keepalive()),
                None => self.keepalive(),
            },
        };
        Some(self.opens.front().map_or(keepalive, |&(deadline, _)| deadline.min(keepalive)))
    }

    /// When the next ping is due, or the last one has failed. `[session.keepalive.deadline]`
    fn keepalive(&self) -> Time {
        match self.unanswered() {
            Some(sent) => sent.after(self.pong_timeout),
            None => self.last_received.after(self.ping_interval),
        }
    }

    /// When a ping was sent since which not a byte has come.
    fn unanswered(&self) -> Option<Time> {
        self.pinged.map(|(sent, _)| sent).filter(|&sent| sent > self.last_received)
    }

    pub(super) fn handle_activity(&mut self, now: Time) {
        self.last_received = self.last_received.max(now);
    }

    pub(super) fn end_handshake(&mut self) {
        self.handshake = None;
        self.start_idle();
    }

    pub(super) fn start_open(&mut self, deadline: Time, connection: ConnectionId) {
        self.opens.push_back((deadline, connection));
    }

    /// Drops the deadlines of answered opens once they are the most, so that fast opens do not pile them up.
    pub(super) fn trim_opens(&mut self, pending: u32, waits: impl Fn(ConnectionId) -> bool) {
        let most = (pending as usize).saturating_mul(2).saturating_add(64);
        if self.opens.len() > most {
            self.opens.retain(|&(_, connection)| waits(connection));
        }
    }

    pub(super) fn ping(&mut self, now: Time) -> u64 {
        let nonce = self.next_nonce;
        self.next_nonce = nonce.wrapping_add(1);
        self.pinged = Some((now, nonce));
        nonce
    }

    /// Returns the round-trip time if the pong answers the latest ping.
    fn handle_pong(&mut self, now: Time, nonce: u64) -> Result<Option<Duration>, Violation> {
        if nonce < self.answered || nonce >= self.next_nonce {
            return Err(Violation::StrayPong);
        }
        self.answered = nonce.saturating_add(1);
        let Some((sent, _)) = self.pinged.take_if(|(_, latest)| *latest == nonce) else { return Ok(None) };
        self.rtt = Some(now.since(sent));
        Ok(self.rtt)
    }
}

impl Machine {
    /// Bytes came from the peer, whole frames or not: it is alive.
    pub fn handle_activity(&mut self, now: Time) {
        self.timers.handle_activity(now);
    }

    /// The time is `now`: what is due happens.
    pub fn handle_timeout(&mut self, now: Time) {
        match self.phase {
            Phase::Ended(_) => return,
            Phase::Greeting => {
                if self.timers.handshake.is_some_and(|deadline| deadline <= now) {
                    self.finish_late(SessionEnd::HandshakeTimeout);
                }
                return;
            }
            Phase::Open => {}
        }
        while let Some(&(deadline, connection)) = self.timers.opens.front() {
            let waits = self.connections.get(&connection).is_some_and(|open| open.state == State::Opening);
            if waits && deadline > now {
                break;
            }
            self.timers.opens.pop_front();
            if waits {
                let reason = Reason::new(code::ABANDONED, "the open was not answered in time");
                self.close_with(connection, reason, ConnectionEnd::OpenTimeout);
            }
        }
        if self.connections.is_empty() && self.timers.idle().is_some_and(|deadline| deadline <= now) {
            return self.finish_late(SessionEnd::Idle);
        }
        self.expire_calls(now);
        self.close_overdue(now);
        if self.timers.keepalive() <= now {
            if self.timers.unanswered().is_some() {
                return self.finish_late(SessionEnd::PeerSilent);
            }
            self.send_ping(now);
        }
    }

    /// A deadline of the session has passed. The peer, if it still reads, is told. `[session.end.told]`
    fn finish_late(&mut self, end: SessionEnd) {
        self.outbox.clear();
        let reason = Reason::new(code::TIMEOUT, end.to_string());
        let close = Close { connection: ConnectionId::ROOT, reason: reason.into(), metadata: Metadata::new() };
        self.control(ConnectionId::ROOT, &close);
        self.finish(end);
    }

    /// Bytes have waited to be written for too long: a [`WriteWatch`](super::WriteWatch) has run out.
    pub fn handle_write_stalled(&mut self) {
        if self.end().is_none() {
            self.finish_late(SessionEnd::PeerNotReading);
        }
    }

    pub(super) fn send_ping(&mut self, now: Time) {
        let nonce = self.timers.ping(now);
        self.control(ConnectionId::ROOT, &Ping { nonce });
    }

    pub(super) fn receive_pong(&mut self, now: Time, pong: Pong) -> Result<(), Violation> {
        if let Some(rtt) = self.timers.handle_pong(now, pong.nonce)? {
            self.events.push_back(Event::Pong { rtt });
        }
        Ok(())
    }
}

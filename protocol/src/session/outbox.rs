//! What waits to be sent, and in which order: control first, then payment, then data round-robin by bytes.

use std::collections::VecDeque;

use bytes::Bytes;

use super::CallKey;
use super::connection::Connection;
use crate::frame::{Lane, Transmit};
use crate::id::ConnectionId;
use crate::message::Status;
use crate::metadata::Metadata;
use crate::stream::StreamKey;
use crate::time::Time;

/// Answers that may wait, beside one for each connection that the peer may have, before reading stops.
///
/// Only what the peer made us say counts: refusals and answered Closes. An honest peer that does not read for a while
/// causes one of them for each unanswered open and each open connection; so two honest sides never both stop reading,
/// whatever they close at once, and only a peer that lets us answer without reading gets here.
pub(super) const MAX_ANSWERS: usize = 8_192;

/// Payment messages that may wait before reading stops: an honest payer waits for the answers to its own.
pub(super) const MAX_PAYMENTS: usize = 8_192;

/// A control frame.
#[derive(Debug)]
struct Control {
    frame: Transmit,
    is_answer: bool,
}

/// Bytes that a connection may send in its turn. One frame may pass it, and then the connection skips turns.
pub(super) const QUANTUM: i64 = 32 * 1024;

/// Most bytes of small items in one frame.
pub(super) const FRAME_TARGET: usize = 64 * 1024;

/// All that waits.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    control: VecDeque<Control>,
    /// Control frames that wait and are answers; and how many there were at most.
    answers: usize,
    most_answers: usize,
    pub(super) payment: VecDeque<(ConnectionId, Transmit)>,
    most_payments: usize,
    /// Streams with a Stop to send, each once. One that the peer ends first needs none any more.
    stops: VecDeque<StreamKey>,
    /// Streams with a Credit to send, each once.
    pub(super) credits: VecDeque<StreamKey>,
    /// Connections with a Window to send, each once.
    pub(super) windows: VecDeque<ConnectionId>,
    /// A nonce to answer: a later ping replaces an earlier one, so a flood of pings costs one slot.
    /// `[session.ping.one-slot]`
    pub(super) pong: Option<u64>,
    /// Connections with data, each once.
    pub(super) ring: VecDeque<ConnectionId>,
    /// Lanes on which nothing follows what was given out. Whoever writes takes them with each look.
    pub(super) ended: VecDeque<Lane>,
    /// How often the ring was empty when data came.
    pub(super) round: u64,
}

impl Outbox {
    /// Whether the peer, which may have `max_connections`, makes us say more than it reads.
    /// `[session.control.bounded]`
    pub(super) fn is_full(&self, max_connections: u32) -> bool {
        self.answers >= MAX_ANSWERS.saturating_add(max_connections as usize) || self.payment.len() >= MAX_PAYMENTS
    }

    pub(super) fn push_control(&mut self, frame: Transmit, is_answer: bool) {
        self.answers = self.answers.saturating_add(usize::from(is_answer));
        self.most_answers = self.most_answers.max(self.answers);
        self.control.push_back(Control { frame, is_answer });
    }

    pub(super) fn control_count(&self) -> usize {
        self.control.len()
    }

    /// Answers that wait, and how many did at most.
    pub(super) const fn answers(&self) -> (usize, usize) {
        (self.answers, self.most_answers)
    }

    /// Payment messages that wait, and how many did at most.
    pub(super) fn payments(&self) -> (usize, usize) {
        (self.payment.len(), self.most_payments)
    }

    pub(super) fn push_payment(&mut self, id: ConnectionId, frame: Transmit) {
        self.payment.push_back((id, frame));
        self.most_payments = self.most_payments.max(self.payment.len());
    }

    pub(super) fn pop_control(&mut self) -> Option<Transmit> {
        let Control { frame, is_answer } = self.control.pop_front()?;
        self.answers = self.answers.saturating_sub(usize::from(is_answer));
        Some(frame)
    }

    /// What a connection has to say about its money goes out before its Close, although control else passes it.
    /// `[session.close.payment-first]`
    pub(super) fn flush_payment(&mut self, id: ConnectionId) {
        if self.payment.iter().any(|(of, _)| *of == id) {
            for (of, frame) in core::mem::take(&mut self.payment) {
                match of == id {
                    true => self.push_control(frame, false),
                    false => self.payment.push_back((of, frame)),
                }
            }
        }
    }

    /// Queues a Stop. A peer that announces streams, has them stopped and ends them, and reads none of it, would pile
    /// them up: once most are of streams that have ended, those are dropped, so that the live ones bound the queue.
    /// `[session.control.bounded]`
    pub(super) fn push_stop(&mut self, stream: StreamKey, live: usize, is_live: impl Fn(StreamKey) -> bool) {
        self.stops.push_back(stream);
        if self.stops.len() > live.saturating_mul(2).saturating_add(64) {
            self.stops.retain(|&stream| is_live(stream));
        }
    }

    pub(super) fn pop_stop(&mut self) -> Option<StreamKey> {
        self.stops.pop_front()
    }

    /// Whether connections have data, and nothing goes before it.
    pub(super) fn has_only_bodies(&self) -> bool {
        let before = [self.control.is_empty(), self.stops.is_empty(), self.payment.is_empty(), self.credits.is_empty()];
        !self.ring.is_empty() && before == [true; 4]
    }

    /// A connection has data.
    pub(super) fn enter_ring(&mut self, id: ConnectionId, connection: &mut Connection) {
        if connection.held || core::mem::replace(&mut connection.in_ring, true) {
            return;
        }
        // When nobody waits, nobody owes anybody a turn.
        self.round = self.round.wrapping_add(u64::from(self.ring.is_empty()));
        let active = connection.active();
        if core::mem::replace(&mut active.round, self.round) != self.round {
            active.deficit = 0;
        }
        self.ring.push_back(id);
    }

    pub(super) fn clear(&mut self) {
        *self = Outbox::default();
    }
}

/// One thing of a connection that may have data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// Calls that wait to be announced.
    Requests,
    /// Answers.
    Responses,
    /// A sending stream.
    Stream(StreamKey),
    /// What waits in a relay.
    Relayed,
}

/// A request or response that waits.
#[derive(Debug)]
pub(super) struct Body {
    pub(super) call: CallKey,
    pub(super) kind: BodyKind,
    pub(super) metadata: Metadata,
    pub(super) payload: Bytes,
    pub(super) slots: Vec<StreamKey>,
}

#[derive(Debug)]
pub(super) enum BodyKind {
    Request { method: u64, deadline: Option<Time> },
    Response { status: Status },
}

#[cfg(test)]
mod tests {
    use slotmap::SlotMap;

    use super::*;

    #[test]
    fn stops_of_streams_that_have_ended_are_dropped_also_when_many_end_at_once() {
        let mut streams = SlotMap::<StreamKey, ()>::with_key();
        let mut outbox = Outbox::default();
        let keys: Vec<StreamKey> = (0..200).map(|_| streams.insert(())).collect();
        keys.iter().for_each(|&key| outbox.push_stop(key, streams.len(), |stream| streams.contains_key(stream)));
        assert_eq!(outbox.stops.len(), 200, "those of live streams stay");
        streams.clear();
        let last = streams.insert(());
        outbox.push_stop(last, streams.len(), |stream| streams.contains_key(stream));
        assert_eq!(outbox.stops, [last]);
    }
}

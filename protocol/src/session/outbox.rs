//! What waits to be sent, and in which order: control first, then payment, then data round-robin by bytes.

use std::collections::VecDeque;

use bytes::Bytes;

use super::CallKey;
use crate::frame::Transmit;
use crate::id::ConnectionId;
use crate::message::Status;
use crate::metadata::Metadata;
use crate::stream::StreamKey;
use crate::time::Time;

/// Control frames that may wait before reading stops. Honest sides stay far below it: grants are merged, one for each
/// stream, and answers are bounded by unanswered opens. Only a peer that lets us answer without reading gets here.
const MAX_CONTROL: usize = 8_192;

/// Bytes that a connection may send in its turn. One frame may pass it, and then the connection skips turns.
pub(super) const QUANTUM: i64 = 32 * 1024;

/// Most bytes of small items in one frame.
pub(super) const FRAME_TARGET: usize = 64 * 1024;

/// All that waits.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    pub(super) control: VecDeque<Transmit>,
    pub(super) payment: VecDeque<Transmit>,
    /// Streams with a Credit to send, each once.
    pub(super) credits: VecDeque<StreamKey>,
    /// Connections with a Window to send, each once.
    pub(super) windows: VecDeque<ConnectionId>,
    /// A nonce to answer: a later ping replaces an earlier one, so a flood of pings costs one slot.
    /// `[session.ping.one-slot]`
    pub(super) pong: Option<u64>,
    /// Connections with data, each once.
    pub(super) ring: VecDeque<ConnectionId>,
}

impl Outbox {
    pub(super) fn is_full(&self) -> bool {
        self.control.len() >= MAX_CONTROL || self.payment.len() >= MAX_CONTROL
    }

    /// Whether connections have data, and nothing goes before it.
    pub(super) fn has_only_bodies(&self) -> bool {
        !self.ring.is_empty() && self.control.is_empty() && self.payment.is_empty() && self.credits.is_empty()
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

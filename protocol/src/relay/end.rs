//! What one side of a relayed connection may send, and what of it waits for the other side.

use super::Terms;
use super::draining::Drain;
use super::queue::Queue;
use crate::error::Violation;
use crate::id::{CallId, IdSequence, Parity, StreamId};
use crate::limits::ConnectionLimits;
use crate::memory::Ledger;

#[derive(Debug)]
pub(super) struct End {
    parity: Parity,
    pub(super) call_ids: IdSequence,
    pub(super) stream_ids: IdSequence,
    /// What this side was told that it may send.
    pub(super) may_send: ConnectionLimits,
    /// By how much its first body window is smaller than what the other side has granted, in bytes.
    pub(super) window_cut: u64,
    /// The same for the first credit of each stream.
    pub(super) stream_cut: u64,
    /// Bytes of bodies that this side may send, and has sent, since the connection opened.
    pub(super) window: u64,
    sent: u64,
    /// A grant of this side's for the other one's bodies that waits in the queue.
    pub(super) window_grant: Option<u64>,
    pub(super) open_calls: u32,
    pub(super) open_streams: u32,
    /// What those open calls and streams count.
    pub(super) tables: Ledger,
    /// Whether this side still makes calls.
    pub(super) drain: Drain,
    /// What this side has sent and the other one has not been sent yet.
    pub(super) queue: Queue,
}

impl End {
    pub(super) fn new(own: &Terms, other: &Terms) -> Self {
        let (granted, may_send) = (other.receives, own.may_send);
        let cut = |granted: u32, told: u32| u64::from(granted.saturating_sub(told));
        End {
            parity: own.parity,
            call_ids: IdSequence::new(own.parity),
            stream_ids: IdSequence::new(own.parity),
            may_send,
            window_cut: cut(granted.window, may_send.window),
            stream_cut: cut(granted.stream_window, may_send.stream_window),
            window: u64::from(may_send.window),
            sent: 0,
            window_grant: None,
            open_calls: 0,
            open_streams: 0,
            tables: Ledger::exactly_of_pool(own.memory.clone()),
            drain: Drain::default(),
            queue: Queue::new(own.memory.clone()),
        }
    }

    /// Whether this side has ever made this call.
    pub(super) fn has_called(&self, id: CallId) -> bool {
        Parity::of(id.0) == self.parity && self.call_ids.was_used(id.0)
    }

    /// Whether this side has ever announced this stream.
    pub(super) fn has_announced(&self, id: StreamId) -> bool {
        Parity::of(id.0) == self.parity && self.stream_ids.was_used(id.0)
    }

    /// A body may start while the window is above zero. `[call.window.start]`
    pub(super) fn receive_body(&mut self, bytes: usize) -> Result<(), Violation> {
        if bytes > self.may_send.max_body as usize {
            let (value, limit) = (bytes as u64, u64::from(self.may_send.max_body));
            return Err(Violation::AboveLimit { what: "body", value, limit });
        }
        if self.sent >= self.window {
            return Err(Violation::NoCredit { what: "body" });
        }
        self.sent = self.sent.saturating_add(bytes as u64);
        Ok(())
    }
}

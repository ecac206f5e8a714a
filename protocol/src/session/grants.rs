//! What this side grants: the windows of receiving streams and of bodies, how they grow, and what they count against the
//! session's memory budget.
//!
//! A window grows while it is what holds the sender up: when all that was granted at one time was used within two round
//! trips, it doubles, up to a bound and within the budget. A slow reader takes longer, and a slow sender too. A payer's windows stay as they are: what they let be on its way is bounded by what it is
//! ready to lose. `[pay.cap.windows]`

use core::time::Duration;

use bytes::Bytes;

use super::connection::RecvWindow;
use super::money::Money;
use super::receive::open_one;
use super::{Event, IncomingCall, Machine};
use crate::error::{Violation, code};
use crate::id::ConnectionId;
use crate::limits::ITEM_OVERHEAD;
use crate::message::{Flow, Status};
use crate::metadata::Metadata;
use crate::stream::{Grant, StreamKey};
use crate::time::Time;

/// How long it takes until what was granted is used.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// The limit that was granted when the watch was started.
    limit: u64,
    since: Time,
}

impl Pace {
    pub(super) const fn new(limit: u64, since: Time) -> Self {
        Pace { limit, since }
    }

    /// How long it took to use what was granted, if that has happened.
    fn used_up(&self, now: Time, consumed: u64) -> Option<Duration> {
        (consumed >= self.limit).then(|| now.since(self.since))
    }
}

/// What is granted on one receiving stream.
#[derive(Debug, Clone, Copy)]
pub(super) struct Granted {
    /// Bytes that may be under way or unread.
    window: u64,
    /// Credit since the stream began: granted, and received.
    limit: u64,
    received: u64,
    /// Bytes by which the last item passed the limit.
    excess: u64,
    pace: Pace,
    /// There was no room: nothing is charged, and what comes is dropped.
    is_refused: bool,
}

impl Granted {
    /// That of a sending stream.
    pub(super) const fn nothing() -> Self {
        Granted { window: 0, limit: 0, received: 0, excess: 0, pace: Pace::new(0, Time::ZERO), is_refused: false }
    }

    /// A window that was charged.
    pub(super) fn charged(window: u32, now: Time) -> Self {
        let window = u64::from(window);
        Granted { window, limit: window, pace: Pace::new(window, now), ..Granted::nothing() }
    }

    /// A window for which there was no room.
    pub(super) fn refused(window: u32) -> Self {
        Granted { limit: u64::from(window), is_refused: true, ..Granted::nothing() }
    }

    /// Bytes that it counts.
    pub(super) const fn charge(&self) -> u64 {
        self.window.saturating_add(self.excess)
    }
}

impl Machine {
    /// Items came that cost `credit`. Returns whether they are taken: those of a stream for which there is no room are
    /// dropped, while it is being stopped. `[session.memory.bound]`
    pub(super) fn take_in(&mut self, key: StreamKey, credit: u64, max_item: u32) -> Result<bool, Violation> {
        let Some(entry) = self.streams.get_mut(key) else { return Ok(false) };
        let granted = &mut entry.granted;
        granted.received = granted.received.saturating_add(credit);
        if granted.received <= granted.limit && !granted.is_refused {
            return Ok(true);
        }
        self.take_excess(key, max_item)
    }

    /// The last item may pass the limit: then it counts on its own.
    #[cold]
    fn take_excess(&mut self, key: StreamKey, max_item: u32) -> Result<bool, Violation> {
        let Some(entry) = self.streams.get_mut(key) else { return Ok(false) };
        let granted = &mut entry.granted;
        let excess = granted.received.saturating_sub(granted.limit);
        // The end of the stream knows exactly which item started without credit, but never sees those of a refused one.
        if excess > u64::from(max_item).saturating_add(ITEM_OVERHEAD) {
            return Err(Violation::NoCredit { what: "item" });
        }
        if granted.is_refused {
            return Ok(false);
        }
        if self.ledger.try_charge(excess.saturating_sub(granted.excess)) {
            granted.excess = excess;
            return Ok(true);
        }
        granted.is_refused = true;
        self.stop_stream(key, code::AT_CAPACITY);
        Ok(false)
    }

    /// The receiver of a stream can take more. The window may grow on this occasion; then its new size comes back, and the
    /// receiver's end must learn it by [`RecvStream::widen`](crate::stream::RecvStream::widen) before any other frame is
    /// taken in.
    #[must_use]
    pub fn grant(&mut self, now: Time, stream: StreamKey, grant: Grant) -> Option<u64> {
        let wider = self.widen(now, stream, grant);
        let entry = self.streams.get_mut(stream)?;
        if entry.flow != Flow::FromPeer || entry.granted.is_refused {
            return None;
        }
        let granted = &mut entry.granted;
        let consumed = grant.limit.saturating_sub(granted.window);
        let grant = Grant { limit: grant.limit.saturating_add(wider.unwrap_or(0)), ..grant };
        granted.window = granted.window.saturating_add(wider.unwrap_or(0));
        granted.limit = granted.limit.max(grant.limit);
        if granted.pace.used_up(now, consumed).is_some() {
            granted.pace = Pace::new(granted.limit, now);
        }
        // What had passed the limit is within it now.
        let excess = granted.received.saturating_sub(granted.limit);
        self.ledger.release(granted.excess.saturating_sub(excess));
        granted.excess = excess;
        let window = granted.window;
        if entry.credit.replace(grant).is_none() {
            self.outbox.credits.push_back(stream);
        }
        wider.map(|_| window)
    }

    /// Charges for more window, if the stream needs it and may have it; returns by how much.
    fn widen(&mut self, now: Time, stream: StreamKey, grant: Grant) -> Option<u64> {
        let entry = self.streams.get(stream).filter(|entry| entry.flow == Flow::FromPeer)?;
        let window = entry.granted.window;
        let took = entry.granted.pace.used_up(now, grant.limit.saturating_sub(window))?;
        let more = self.growth(took, window, self.config.memory.max_stream_window)?;
        let is_payer = self.is_payer(entry.connection);
        (!is_payer && !entry.granted.is_refused && self.ledger.try_charge(more)).then_some(more)
    }

    /// By how much a window grows that was used up in so long: by itself, if that was within two round trips.
    fn growth(&self, took: Duration, window: u64, max: u32) -> Option<u64> {
        let more = window.min(u64::from(max).saturating_sub(window));
        (more > 0 && took < self.timers.rtt()?.saturating_mul(2)).then_some(more)
    }

    fn is_payer(&self, id: ConnectionId) -> bool {
        let money = self.connections.get(&id).and_then(|connection| connection.money.as_deref());
        matches!(money, Some(Money::Payer(_)))
    }

    /// The application is done with `bytes` of bodies, and the peer may send as many more. To be said for each body, also
    /// when its connection has ended. Returns whether there is a Window to send that was not before.
    pub fn consume_body(&mut self, id: ConnectionId, bytes: usize) -> bool {
        self.ledger.release(bytes as u64);
        self.return_window(id, bytes)
    }

    fn return_window(&mut self, id: ConnectionId, bytes: usize) -> bool {
        // Where no body came, none is given back.
        let active = open_one(&mut self.connections, id).and_then(|connection| connection.active.as_deref_mut());
        let Some(recv_window) = active.map(|active| &mut active.recv_window) else { return false };
        if !recv_window.consume(bytes) {
            return false;
        }
        let now = self.timers.last_received();
        let RecvWindow { window, consumed, pace, .. } = *recv_window;
        let took = pace.used_up(now, consumed);
        // Bodies are charged when they come, so a wider window counts nothing by itself.
        let grown = match took.filter(|_| !self.is_payer(id)) {
            Some(took) => self.growth(took, window, self.config.memory.max_body_window),
            None => None,
        };
        let Some(connection) = self.connections.get_mut(&id) else { return false };
        let recv_window = &mut connection.active().recv_window;
        recv_window.window = window.saturating_add(grown.unwrap_or(0));
        let due = recv_window.raise();
        if took.is_some() {
            recv_window.pace = Pace::new(recv_window.limit, now);
        }
        if due {
            self.outbox.windows.push_back(id);
        }
        due
    }

    /// A call that is not taken is answered at once, and its body dropped.
    #[cold]
    pub(super) fn refuse_call(&mut self, mut incoming: IncomingCall, status: Status, metadata: Metadata) {
        let bytes = incoming.payload.len();
        incoming.payload = Bytes::new();
        self.return_window(incoming.connection, bytes);
        self.fail_unstarted(incoming, status, metadata);
    }

    /// The status and payload of an answer: what has no room is dropped.
    pub(super) fn take_answer(&mut self, id: ConnectionId, status: Status, payload: Bytes) -> (Status, Bytes) {
        if self.ledger.try_charge(payload.len() as u64) {
            return (status, payload);
        }
        self.return_window(id, payload.len());
        (Status::AtCapacity, Bytes::new())
    }

    /// The stream ends: what it has charged goes over to whoever reads it, and comes back by [`release_stream`](Self::release_stream).
    /// The second value says whether items of it were dropped.
    pub(super) fn end_grant(&mut self, key: StreamKey) -> (u64, bool) {
        let Some(entry) = self.streams.get_mut(key) else { return (0, false) };
        let granted = core::mem::replace(&mut entry.granted, Granted::nothing());
        (granted.charge(), granted.is_refused)
    }

    /// Forgets a stream that fails and tells the application.
    pub(super) fn fail_removed(&mut self, stream: StreamKey) {
        let held = self.end_grant(stream).0;
        self.remove_stream(stream);
        self.events.push_back(Event::StreamFailed { stream, held });
    }

    /// The items of a receiving stream that has ended were read or dropped; `held` is what its end said.
    pub fn release_stream(&mut self, held: u64) {
        self.ledger.release(held);
    }

    /// Bytes that the peer may make this side hold, of those that [`Config::memory`](super::Config::memory) allows.
    pub const fn granted_bytes(&self) -> u64 {
        self.ledger.charged()
    }
}

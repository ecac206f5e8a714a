//! The tables: virtual connections, calls, streams.

use std::collections::VecDeque;

use rustc_hash::{FxHashMap, FxHashSet};

use super::draining::Drain;
use super::grants::{Granted, Pace};
use super::money::Money;
use super::outbox::{Body, Source};
use super::stats::FrameStats;
use super::{CallKey, LaneMode};
use crate::error::Violation;
use crate::id::{CallId, ConnectionId, IdSequence, Parity, StreamId};
use crate::limits::{ConnectionLimits, LATE_FRAMES, LATE_FRAMES_EACH};
use crate::message::Flow;
use crate::payment::{Amount, CallMeter};
use crate::stream::{Grant, StreamKey};
use crate::time::Time;

/// Where a connection stands.
///
/// ```text
///   ours:     Opening ──Accept──► Open ──close()──► Closing ──Close──► (forgotten)
///                │ └──Reject──► (forgotten)  │           ▲
///                └──close(), timeout─────────│───────────┘
///   theirs:   Requested ──accept()──► Open   └──Close──► (answered with Close, forgotten)
///                └──reject(), Close──► (forgotten)
/// ```
///
/// Listed races: in `Closing` every frame is tolerated; a Close ends it, and so does the Reject of an abandoned open.
/// A late Accept is consumed. A frame for an id
/// that was used and forgotten crossed a Close and is dropped. `[session.close.crossed]`
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// We sent Open and wait for the answer.
    Opening,
    /// The peer sent Open and waits for ours.
    Requested,
    /// Calls may be made.
    Open,
    /// We sent Close and wait for the peer's.
    Closing,
}

/// One virtual connection.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) state: State,
    pub(super) opened_by_us: bool,
    /// The open has no answer yet. It outlasts our Close of an abandoned open, so that the peer's bound on pending ids
    /// holds however its lanes are delayed. `[session.open.pending]`
    pub(super) unanswered: bool,
    /// What we receive.
    pub(super) limits: ConnectionLimits,
    /// What the peer receives.
    pub(super) peer_limits: ConnectionLimits,
    pub(super) own_calls: IdSequence,
    pub(super) peer_calls: IdSequence,
    pub(super) own_streams: IdSequence,
    pub(super) peer_streams: IdSequence,
    pub(super) money: Option<Box<Money>>,
    /// What only a connection in use needs: one that was opened and does nothing is one small table entry.
    pub(super) active: Option<Box<Active>>,
    pub(super) in_ring: bool,
    /// Its frames are handed on, not understood.
    pub(super) relayed: bool,
    /// A relayed one is scheduled.
    pub(super) relay_ready: bool,
    /// The lane takes no data for now, so the ring does without this connection.
    pub(super) held: bool,
    /// Frames that came for calls and streams after their end.
    pub(super) late: u64,
    /// Which sides take no new calls.
    pub(super) drain: Drain,
}

/// Calls, streams, queues and windows of a connection in use.
#[derive(Debug)]
pub(super) struct Active {
    /// Bodies: bytes sent, and up to where they may be.
    pub(super) send_window: Window,
    /// Bodies: bytes received, and up to where they may be.
    pub(super) recv_window: RecvWindow,
    /// Bytes that this connection may still send in its turn; below zero after a large frame.
    pub(super) deficit: i64,
    /// The outbox's round that `deficit` belongs to.
    pub(super) round: u64,
    /// Our calls that are announced, by id.
    pub(super) calls: FxHashMap<CallId, CallKey>,
    /// The peer's calls, by id.
    pub(super) served: FxHashMap<CallId, CallKey>,
    /// Streams that are announced, by id.
    pub(super) streams: FxHashMap<StreamId, StreamKey>,
    /// All streams, announced or not.
    pub(super) owned: FxHashSet<StreamKey>,
    /// Streams that we have opened or are about to.
    pub(super) own_streams: u32,
    /// Streams that the peer has opened.
    pub(super) peer_streams: u32,
    pub(super) requests: VecDeque<Body>,
    pub(super) responses: VecDeque<Body>,
    pub(super) requests_ready: bool,
    pub(super) responses_ready: bool,
    pub(super) ready: VecDeque<Source>,
    /// What the connection has carried.
    pub(super) traffic: FrameStats,
}

impl Active {
    /// That of a connection on which nothing was sent.
    fn new((send_window, recv_window): (Window, RecvWindow)) -> Self {
        Active {
            send_window,
            recv_window,
            deficit: 0,
            round: 0,
            calls: FxHashMap::default(),
            served: FxHashMap::default(),
            streams: FxHashMap::default(),
            owned: FxHashSet::default(),
            own_streams: 0,
            peer_streams: 0,
            requests: VecDeque::new(),
            responses: VecDeque::new(),
            requests_ready: false,
            responses_ready: false,
            ready: VecDeque::new(),
            traffic: FrameStats::default(),
        }
    }

    /// The source whose turn it is. Bodies that are left become ready again when one was taken.
    pub(super) fn next(&mut self) -> Option<Source> {
        let source = self.ready.pop_front()?;
        match source {
            Source::Requests => self.requests_ready = false,
            Source::Responses => self.responses_ready = false,
            Source::Stream(_) | Source::Relayed => {}
        }
        Some(source)
    }

    /// Makes requests that wait a source that is ready, once. Returns whether they were not.
    pub(super) fn ready_requests(&mut self) -> bool {
        let becomes = !self.requests.is_empty() && !core::mem::replace(&mut self.requests_ready, true);
        if becomes {
            self.ready.push_back(Source::Requests);
        }
        becomes
    }

    /// Makes responses that wait a source that is ready, once. Returns whether they were not.
    pub(super) fn ready_responses(&mut self) -> bool {
        let becomes = !self.responses.is_empty() && !core::mem::replace(&mut self.responses_ready, true);
        if becomes {
            self.ready.push_back(Source::Responses);
        }
        becomes
    }
}

/// The sender's view of a body window.
#[derive(Debug, Clone, Copy)]
pub(super) struct Window {
    pub(super) limit: u64,
    pub(super) sent: u64,
}

/// The receiver's view of a body window.
#[derive(Debug, Clone, Copy)]
pub(super) struct RecvWindow {
    /// Bytes that may be under way or unread; it may grow.
    pub(super) window: u64,
    pub(super) pace: Pace,
    pub(super) limit: u64,
    pub(super) received: u64,
    pub(super) consumed: u64,
    pub(super) announce: bool,
}

impl RecvWindow {
    pub(super) const fn new(window: u32) -> Self {
        let window = window as u64;
        RecvWindow {
            window,
            pace: Pace::new(window, Time::ZERO),
            limit: window,
            received: 0,
            consumed: 0,
            announce: false,
        }
    }

    /// A body came. It may start while the window is above zero. `[call.window.start]`
    pub(super) fn receive(&mut self, bytes: usize) -> Result<(), Violation> {
        if self.received >= self.limit {
            return Err(Violation::NoCredit { what: "body" });
        }
        self.received = self.received.saturating_add(bytes as u64);
        Ok(())
    }

    /// The application is done with a body. Returns whether half of the window is free again.
    pub(super) fn consume(&mut self, bytes: usize) -> bool {
        self.consumed = self.consumed.saturating_add(bytes as u64);
        let limit = self.consumed.saturating_add(self.window);
        limit.saturating_sub(self.limit).saturating_mul(2) >= self.window
    }

    /// Grants what is free. Returns whether a Window is due that was not before.
    pub(super) fn raise(&mut self) -> bool {
        self.limit = self.consumed.saturating_add(self.window);
        !core::mem::replace(&mut self.announce, true)
    }
}

impl Connection {
    pub(super) fn new(state: State, parity: Parity, limits: ConnectionLimits, peer_limits: ConnectionLimits) -> Self {
        let opened_by_us = state == State::Opening;
        let own = if opened_by_us { parity } else { parity.other() };
        Connection {
            state,
            opened_by_us,
            unanswered: matches!(state, State::Opening | State::Requested),
            own_calls: IdSequence::new(own),
            peer_calls: IdSequence::new(own.other()),
            own_streams: IdSequence::new(own),
            peer_streams: IdSequence::new(own.other()),
            limits,
            peer_limits,
            money: None,
            active: None,
            in_ring: false,
            relayed: false,
            relay_ready: false,
            held: false,
            late: 0,
            drain: Drain::default(),
        }
    }

    /// What both sides learn in the end: what they may send.
    pub(super) fn set_limits(&mut self, limits: ConnectionLimits, peer_limits: ConnectionLimits) {
        debug_assert!(self.active.is_none(), "nothing is sent before both sides have said what they receive");
        (self.limits, self.peer_limits) = (limits, peer_limits);
    }

    #[inline]
    pub(super) fn active(&mut self) -> &mut Active {
        let limits = (&self.peer_limits, &self.limits);
        self.active.get_or_insert_with(|| first_active(limits))
    }

    /// The windows of bodies, to and from the peer, before anything was sent.
    pub(super) fn first_windows(&self) -> (Window, RecvWindow) {
        first_windows((&self.peer_limits, &self.limits))
    }

    /// A frame crossed the end of its call or stream. How many can do so grows with the calls and streams that there
    /// were, so honest churn at full speed stays within it for ever. `[session.late.bound]`
    #[cold]
    pub(super) fn drop_late(&mut self, frame: &'static str) -> Result<(), Violation> {
        self.late = self.late.saturating_add(1);
        let all = [&self.own_calls, &self.peer_calls, &self.own_streams, &self.peer_streams];
        let used = all.iter().fold(0u64, |sum, ids| sum.saturating_add(ids.used()));
        let limit = LATE_FRAMES.saturating_add(used.saturating_mul(LATE_FRAMES_EACH));
        if self.late > limit {
            return Err(Violation::AboveLimit { what: late_name(frame), value: self.late, limit });
        }
        Ok(())
    }

    /// The peer's call of this id, `None` if it ended before.
    pub(super) fn served(&self, id: CallId, frame: &'static str) -> Result<Option<CallKey>, Violation> {
        let key = self.active.as_ref().and_then(|active| active.served.get(&id).copied());
        if key.is_none() && !(same_half(&self.peer_calls, id.0) && self.peer_calls.was_used(id.0)) {
            return Err(Violation::UnknownCall { frame, id });
        }
        Ok(key)
    }

    /// Our call of this id. It is forgotten when the callee has ended it, so what comes for it then is one too many.
    pub(super) fn called(&self, id: CallId, frame: &'static str) -> Result<CallKey, Violation> {
        let key = self.active.as_ref().and_then(|active| active.calls.get(&id).copied());
        key.ok_or(Violation::UnknownCall { frame, id })
    }

    /// The stream of this id, `None` if it ended before.
    pub(super) fn stream(&self, id: StreamId, frame: &'static str) -> Result<Option<StreamKey>, Violation> {
        let key = self.active.as_ref().and_then(|active| active.streams.get(&id).copied());
        let half = if same_half(&self.own_streams, id.0) { &self.own_streams } else { &self.peer_streams };
        if key.is_none() && !half.was_used(id.0) {
            return Err(Violation::UnknownStream { frame, id });
        }
        Ok(key)
    }
}

#[cold]
fn first_active(limits: (&ConnectionLimits, &ConnectionLimits)) -> Box<Active> {
    Box::new(Active::new(first_windows(limits)))
}

fn first_windows((to, from): (&ConnectionLimits, &ConnectionLimits)) -> (Window, RecvWindow) {
    (Window { limit: u64::from(to.window), sent: 0 }, RecvWindow::new(from.window))
}

fn late_name(frame: &'static str) -> &'static str {
    match frame {
        "Cancel" => "cancels of calls that have ended",
        "Stop" => "stops of streams that have ended",
        _ => "grants for streams that have ended",
    }
}

/// Whether `id` is of the half that `sequence` allocates. A used-up sequence has handed out 2^64 − 1 or − 2 last; no
/// peer gets there, so the question is answered by the next id.
fn same_half(sequence: &IdSequence, id: u64) -> bool {
    sequence.next().is_none_or(|next| Parity::of(next) == Parity::of(id))
}

/// A call of either direction.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) connection: ConnectionId,
    pub(super) state: CallState,
    /// Streams of the call that have not ended.
    pub(super) streams: u32,
    /// Whether a stream was ever announced: then Done ends the call, else its response. `[call.end.done]`
    pub(super) had_streams: bool,
    pub(super) meter: CallMeter,
    /// The method's entry in the connection's price table; `None` is free.
    pub(super) price: Option<u32>,
    /// Payee: base units that are held for the call: its price until the first charge, what its maximum is above that
    /// until its response. `None` before a handler has started and when nothing is held any more.
    pub(super) held: Option<Amount>,
    /// Payee: what the response states above the call price, in base units.
    pub(super) above_call: Amount,
    /// Payee: what earlier attempts of the same call have cost, in base units; all of a call with a key that has not begun.
    pub(super) paid_before: Amount,
    /// Payee: the application wants to know what it has cost.
    pub(super) reports: bool,
    /// Theirs: Cancel has come.
    pub(super) cancelled: bool,
}

/// Where a call stands. The two directions share nothing but the table.
///
/// ```text
///   ours:    Queued ──taken for writing──► Sent ──Response──► Answered ──Done──► (forgotten)
///               └──cancel──► (forgotten)     └──Response without streams──► (forgotten)
///   theirs:  Running ──respond()──► Responding ──taken for writing, streams ended──► (forgotten)
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CallState {
    /// Ours, not announced.
    Queued,
    /// Ours, announced, not answered.
    Sent { id: CallId, cancelled: bool },
    /// Ours, answered, with streams.
    Answered { id: CallId, cancelled: bool },
    /// Theirs, not answered.
    Running { id: CallId },
    /// Theirs, the answer is in the outbox.
    Responding { id: CallId },
    /// Theirs, the answer is on its way, with streams.
    Responded { id: CallId },
}

/// A stream of either direction.
#[derive(Debug)]
pub(super) struct StreamEntry {
    pub(super) connection: ConnectionId,
    pub(super) call: CallKey,
    /// `None` until it is announced.
    pub(super) id: Option<StreamId>,
    /// Seen from this side: `ToPeer` is one that we send.
    pub(super) flow: Flow,
    pub(super) opened_by_us: bool,
    /// In its connection's ready list, or set aside for money.
    pub(super) scheduled: bool,
    /// A Credit that waits to be sent.
    pub(super) credit: Option<Grant>,
    /// The code of its Stop: to be sent when the stream is announced, on its way, or said; for a sending stream, come.
    pub(super) stop: Option<u32>,
    /// What is granted on a stream that we receive.
    pub(super) granted: Granted,
}

/// The peer's half of the connection ids.
///
/// On one lane an id is the next one or a violation. On many lanes an Open may overtake another: a gap is *pending*
/// until its Open comes, and their number is bounded by the limit on unanswered opens. `[session.id.pending]`
#[derive(Debug)]
pub(super) struct PeerIds {
    sequence: IdSequence,
    pending: FxHashSet<u64>,
}

/// What an id of the peer's half is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seen {
    /// Opened before.
    Used,
    /// Not opened: pending, or never heard of.
    Unused,
}

impl PeerIds {
    pub(super) fn new(parity: Parity) -> Self {
        PeerIds { sequence: IdSequence::new(parity), pending: FxHashSet::default() }
    }

    /// With `next` as the peer's next id; for tests near the end of the space.
    #[cfg(test)]
    pub(super) fn starting_at(next: u64) -> Self {
        PeerIds { sequence: IdSequence::starting_at(next), pending: FxHashSet::default() }
    }

    /// The highest id that was seen, zero before the first.
    pub(super) fn highest(&self) -> ConnectionId {
        ConnectionId(self.sequence.next().map_or(u64::MAX, |next| next.saturating_sub(2)))
    }

    pub(super) fn is_of_half(&self, id: ConnectionId) -> bool {
        same_half(&self.sequence, id.0)
    }

    pub(super) fn seen(&self, id: ConnectionId) -> Seen {
        let used = self.sequence.was_used(id.0) && !self.pending.contains(&id.0);
        if used { Seen::Used } else { Seen::Unused }
    }

    /// An Open came with this id.
    pub(super) fn open(&mut self, id: ConnectionId, lanes: LaneMode, max_pending: u32) -> Result<(), Violation> {
        if self.sequence.expect(id.0) || self.pending.remove(&id.0) {
            return Ok(());
        }
        let wrong = Violation::ConnectionId { id };
        // The root is of the even half, and never opened.
        if lanes == LaneMode::One || id.is_root() || !self.is_of_half(id) || self.sequence.was_used(id.0) {
            return Err(wrong);
        }
        // Everything between is on its way on other lanes.
        let gap = self.sequence.next().map_or(0, |next| id.0.saturating_sub(next) >> 1);
        let pending = gap.saturating_add(self.pending.len() as u64);
        if pending > u64::from(max_pending) {
            let limit = u64::from(max_pending);
            return Err(Violation::AboveLimit { what: "pending connection ids", value: pending, limit });
        }
        while let Some(next) = self.sequence.take() {
            if next == id.0 {
                return Ok(());
            }
            self.pending.insert(next);
        }
        Err(wrong)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_ready_is_entered_once_and_what_is_not_never() {
        let mut active = first_active((&ConnectionLimits::DEFAULT, &ConnectionLimits::DEFAULT));
        assert!(!active.ready_requests() && !active.ready_responses());
        assert!(active.ready.is_empty());
        let body = || Body {
            call: CallKey::default(),
            kind: super::super::outbox::BodyKind::Request { method: 1, deadline: None },
            metadata: crate::metadata::Metadata::new(),
            payload: bytes::Bytes::new(),
            slots: Vec::new(),
        };
        active.requests.push_back(body());
        active.responses.push_back(body());
        assert!(active.ready_requests() && !active.ready_requests());
        assert!(active.ready_responses() && !active.ready_responses());
        assert_eq!(active.ready, [Source::Requests, Source::Responses]);
    }
}

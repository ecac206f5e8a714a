//! What both halves of a stream and the session share: one small machine behind a lock of its own.
//!
//! Lock order: session, then stream. A stream's lock is dropped before the session's is taken.

use std::sync::Arc;
use std::task::Waker;

use parking_lot::Mutex;
use rustc_hash::FxHashMap;
use smallvec::SmallVec;
use tollway_protocol::error::{Violation, code};
use tollway_protocol::limits::ConnectionLimits;
use tollway_protocol::message::Flow;
use tollway_protocol::stream::{Ending, ItemRun, RecvStream, SendStream, StreamKey, Taken};

use super::stream::StreamError;
use crate::shared::Shared;

/// Credit that may wait in a sender's outbox before `send` waits: twice what is handed to the conduit at once, so that
/// one half is being filled while the other is written.
pub(crate) const OUTBOX_BYTES: u64 = 256 * 1024;

/// What is left in the outbox when a sender that waits is woken. A wake for each frame that is taken would cost more,
/// across workers, than the frame.
const WAKE_SENDER_AT: u64 = OUTBOX_BYTES / 2;

/// Runs below this size are copied out of the block that they were read into, so that an unread stream pins what it
/// holds and not the block.
const DETACH_BELOW: usize = 16 * 1024;

/// The machine of a stream on this side.
pub(super) enum Side {
    Send(SendStream),
    Recv(RecvStream),
}

pub(super) struct CoreState {
    pub(super) side: Side,
    /// The session and the key there, once the stream is announced.
    pub(super) bound: Option<(Arc<Shared>, StreamKey)>,
    /// The half that went to the peer.
    pub(super) given: Option<Flow>,
    pub(super) failed: Option<StreamError>,
    /// Why the receiver wants no more; the sender must see it.
    pub(super) stopped: Option<u32>,
    pub(super) max_item: u32,
    pub(super) waker: Option<Waker>,
    /// What the unread items of a stream that has ended count against the session's memory.
    pub(super) held: u64,
    /// Streams that arrived inside items and were not decoded yet.
    pub(super) arrived: FxHashMap<StreamKey, InboundStream>,
}

impl CoreState {
    /// Why the sender need not go on.
    pub(super) fn sender_error(&self) -> Option<StreamError> {
        self.failed.clone().or(self.stopped.map(StreamError::stopped))
    }
}

/// What both halves and the session share of one stream.
pub(crate) struct StreamCore {
    pub(super) state: Mutex<CoreState>,
}

/// What is to be done when all locks are dropped: wakers may run anything, and so may drops.
#[derive(Default)]
pub(crate) struct Aftermath {
    wakers: SmallVec<[Waker; 4]>,
    /// Dropping one of them tells the session.
    streams: Vec<InboundStream>,
    cores: Vec<Arc<StreamCore>>,
}

impl Aftermath {
    pub(crate) fn wake(&mut self, waker: Option<Waker>) {
        self.wakers.extend(waker);
    }

    pub(crate) fn bury(&mut self, core: Option<Arc<StreamCore>>) {
        self.cores.extend(core);
    }

    pub(crate) fn bury_all(&mut self, cores: impl Iterator<Item = Arc<StreamCore>>) {
        self.cores.extend(cores);
    }

    pub(crate) fn discard(&mut self, streams: Vec<InboundStream>) {
        self.streams.extend(streams);
    }

    /// To be called without a lock.
    pub(crate) fn settle(&mut self) {
        self.wakers.drain(..).for_each(Waker::wake);
        self.streams.clear();
        self.cores.clear();
    }
}

impl StreamCore {
    /// Credit that waits in the outbox of a stream that this side sends.
    pub(crate) fn waiting(&self) -> u64 {
        match &self.state.lock().side {
            Side::Send(stream) => stream.buffered(),
            Side::Recv(_) => 0,
        }
    }

    pub(super) fn new(side: Side, bound: Option<(Arc<Shared>, StreamKey)>, max_item: u32) -> Arc<Self> {
        let state = CoreState {
            side,
            bound,
            given: None,
            failed: None,
            stopped: None,
            max_item,
            waker: None,
            held: 0,
            arrived: FxHashMap::default(),
        };
        Arc::new(StreamCore { state: Mutex::new(state) })
    }

    /// The core of a stream that the peer announced.
    pub(crate) fn inbound(
        shared: &Arc<Shared>,
        key: StreamKey,
        flow: Flow,
        (own, peer): (&ConnectionLimits, &ConnectionLimits),
    ) -> Arc<Self> {
        let side = match flow {
            Flow::ToPeer => Side::Send(SendStream::new(u64::from(peer.stream_window))),
            Flow::FromPeer => Side::Recv(RecvStream::new(u64::from(own.stream_window))),
        };
        StreamCore::new(side, Some((shared.clone(), key)), peer.max_item)
    }

    /// Binds a stream of ours to its announcement, under the session's lock. Returns a code with which the stream is to
    /// be stopped, if its receiver is gone already.
    pub(crate) fn bind(
        &self,
        shared: &Arc<Shared>,
        key: StreamKey,
        (own, peer): (&ConnectionLimits, &ConnectionLimits),
        after: &mut Aftermath,
    ) -> Option<u32> {
        let mut state = self.state.lock();
        state.bound = Some((shared.clone(), key));
        state.max_item = peer.max_item;
        after.wake(state.waker.take());
        let given = state.given;
        match (&mut state.side, given) {
            (Side::Send(send), Some(Flow::ToPeer)) => {
                send.bind(u64::from(peer.stream_window));
                None
            }
            _ => {
                let mut recv = RecvStream::new(u64::from(own.stream_window));
                let stop = state.stopped.filter(|_| recv.stop().0);
                state.side = Side::Recv(recv);
                stop
            }
        }
    }

    /// Marks the half that goes to the peer. `flow` is seen from this side: giving the receiver away makes it `ToPeer`.
    pub(super) fn give_away(&self, flow: Flow) -> Result<(), &'static str> {
        let mut state = self.state.lock();
        if state.given.is_some() || state.bound.is_some() {
            return Err("a stream travels only once");
        }
        if let (Flow::FromPeer, Side::Send(send)) = (flow, &state.side)
            && (send.buffered() > 0 || !send.is_open())
        {
            return Err("the sender was used before it was sent");
        }
        state.given = Some(flow);
        Ok(())
    }

    /// What was to announce the stream was never sent.
    pub(super) fn fail_unsent(&self) {
        let mut after = Aftermath::default();
        self.fail(StreamError::NotSent, &mut after);
        after.settle();
    }

    /// Ends both halves with an error. What was received before is still there.
    pub(crate) fn fail(&self, error: StreamError, after: &mut Aftermath) {
        let mut state = self.state.lock();
        state.failed.get_or_insert(error);
        after.wake(state.waker.take());
    }

    /// Takes items in, under the session's lock.
    pub(crate) fn handle_items(
        &self,
        run: ItemRun,
        slots: Vec<InboundStream>,
        after: &mut Aftermath,
    ) -> Result<(), Violation> {
        let run = if run.as_bytes().len() < DETACH_BELOW { run.detached() } else { run };
        let mut state = self.state.lock();
        let Side::Recv(recv) = &mut state.side else {
            after.discard(slots);
            return Ok(());
        };
        let keys = slots.iter().map(|slot| slot.key).collect();
        let result = recv.handle_items(run, keys);
        if result.is_err() || recv.is_stopped() {
            after.discard(slots);
            return result.map(drop);
        }
        state.arrived.extend(slots.into_iter().map(|slot| (slot.key, slot)));
        after.wake(state.waker.take());
        Ok(())
    }

    pub(crate) fn handle_ending(&self, ending: Ending, after: &mut Aftermath) {
        let mut state = self.state.lock();
        if let Side::Recv(recv) = &mut state.side {
            recv.handle_ending(ending);
        }
        after.wake(state.waker.take());
    }

    /// Whether this side has not given the stream up and waits for an end of it that has not come, or is none in order.
    pub(crate) fn lacks_end(&self) -> bool {
        match &self.state.lock().side {
            Side::Recv(recv) if recv.is_stopped() => false,
            Side::Recv(recv) => !recv.has_ended() || matches!(recv.ending(), Some(Ending::Reset(_))),
            Side::Send(_) => false,
        }
    }

    /// The stream has ended, and `held` bytes still count. Returns what is not held any more: all of it, unless items are
    /// still to be read.
    pub(crate) fn hold(&self, held: u64) -> u64 {
        let mut state = self.state.lock();
        let unread = matches!(&state.side, Side::Recv(recv) if recv.has_run());
        if unread {
            state.held = held;
        }
        if unread { 0 } else { held }
    }

    /// The window has grown. Called under the session's lock, so that no item for the new credit comes before.
    pub(crate) fn widen(&self, window: u64) {
        if let Side::Recv(recv) = &mut self.state.lock().side {
            recv.widen(window);
        }
    }

    /// The receiver wants no more. Returns whether the stream is ready, to send its reset, and streams that will never
    /// be announced.
    pub(crate) fn handle_stopped(&self, code: u32, after: &mut Aftermath) -> (bool, Vec<StreamKey>) {
        let mut state = self.state.lock();
        state.stopped.get_or_insert(code);
        after.wake(state.waker.take());
        match &mut state.side {
            Side::Send(send) => send.reset(code),
            Side::Recv(_) => (false, Vec::new()),
        }
    }

    /// The receiver can take more. Returns whether the stream has become ready.
    pub(crate) fn handle_credit(&self, limit: u64) -> Result<bool, Violation> {
        match &mut self.state.lock().side {
            Side::Send(send) => send.handle_credit(limit),
            Side::Recv(_) => Ok(false),
        }
    }

    /// Takes items for writing, under the session's lock.
    pub(crate) fn take(&self, max_bytes: usize, affordable: &dyn Fn(u64, u64) -> bool, after: &mut Aftermath) -> Taken {
        let mut state = self.state.lock();
        let Side::Send(send) = &mut state.side else { return Taken::Empty };
        let taken = send.take(max_bytes, affordable);
        if send.buffered() <= WAKE_SENDER_AT {
            after.wake(state.waker.take());
        }
        taken
    }

    /// The sending half is gone or finished.
    pub(super) fn close_sender(&self, how: Ending) {
        let mut state = self.state.lock();
        if state.given == Some(Flow::FromPeer) {
            return;
        }
        let Side::Send(send) = &mut state.side else { return };
        let (ready, dropped) = match how {
            Ending::End => (send.finish(), Vec::new()),
            Ending::Reset(code) if send.is_open() => send.reset(code),
            Ending::Reset(_) => return,
        };
        let bound = state.bound.clone();
        // The receiver never travelled: if it is waited on here, it waits for nothing.
        let waiting = if bound.is_none() && state.given.is_none() {
            state.failed.get_or_insert(StreamError::NotSent);
            state.waker.take()
        } else {
            None
        };
        drop(state);
        if let Some(waker) = waiting {
            waker.wake();
        }
        if let Some((shared, key)) = bound {
            shared.stream_ready(key, ready, &dropped);
        }
    }

    /// The receiving half is gone.
    pub(super) fn close_receiver(&self, code: u32) {
        let mut state = self.state.lock();
        if state.given == Some(Flow::ToPeer) {
            return;
        }
        let stop = match &mut state.side {
            // The streams of unread items are in `arrived`.
            Side::Recv(recv) => recv.stop().0,
            // Its sender is on this side too, or is about to be sent away: it will see the stop.
            Side::Send(_) => {
                state.stopped.get_or_insert(code);
                false
            }
        };
        let (bound, waker) = (state.bound.clone(), state.waker.take());
        let (arrived, held) = (std::mem::take(&mut state.arrived), std::mem::take(&mut state.held));
        drop(state);
        // Each of them is ended by its drop.
        drop(arrived);
        if let (Some((shared, _)), 1..) = (&bound, held) {
            shared.release_stream(held);
        }
        if let Some(waker) = waker {
            waker.wake();
        }
        if let (Some((shared, key)), true) = (bound, stop) {
            shared.stop_stream(key, code);
        }
    }
}

/// A stream that the peer announced, before anything decoded it. Dropped, it tells the peer that nobody is there.
pub(crate) struct InboundStream {
    core: Option<Arc<StreamCore>>,
    key: StreamKey,
    flow: Flow,
}

impl InboundStream {
    pub(crate) fn new(core: Arc<StreamCore>, key: StreamKey, flow: Flow) -> Self {
        InboundStream { core: Some(core), key, flow }
    }

    /// The half that this side got, seen from this side.
    pub(super) fn flow(&self) -> Flow {
        self.flow
    }

    pub(super) fn into_core(mut self) -> Option<Arc<StreamCore>> {
        self.core.take()
    }
}

impl Drop for InboundStream {
    fn drop(&mut self) {
        let Some(core) = self.core.take() else { return };
        match self.flow {
            Flow::ToPeer => core.close_sender(Ending::Reset(code::DROPPED)),
            Flow::FromPeer => core.close_receiver(code::DROPPED),
        }
    }
}

//! Streams of typed items: [`Tx`] sends, [`Rx`] receives.
//!
//! [`stream`] makes a pair. One half goes to the peer inside a call's arguments, a result or an item; the other stays.
//! Both ends of the wire share one small machine each ([`SendStream`] or [`RecvStream`]) behind a lock of its own, so
//! that sending and receiving items takes neither the session's lock nor its task.
//!
//! Lock order: session, then stream. A stream's lock is dropped before the session's is taken.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de, ser};
use tollway_protocol::error::code;
use tollway_protocol::message::Flow;
use tollway_protocol::stream::{Ending, Grant, ItemRun, LARGE_ITEM, MAX_PREFIX, SendStream, StreamKey, frame_in_place};

use super::codec::{self, OutboundSlots};
use super::stream_core::{InboundStream, OUTBOX_BYTES, Side, StreamCore};
use crate::shared::Shared;

/// Items between two charges to the cooperative budget of the task: each item is 15 ns, and one charge for each would
/// make the task yield 4 times as often as others are helped by.
pub(super) const ITEMS_PER_BUDGET: u32 = 8;

/// Why a stream ended before its end.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The sender gave up with this code.
    #[error("the sender gave the stream up (code {0})")]
    Reset(u32),
    /// The receiver wants no more, with this code.
    #[error("the receiver wants no more (code {0})")]
    Stopped(u32),
    /// The connection or the session ended.
    #[error("the connection of the stream has ended")]
    ConnectionEnded,
    /// The deadline of the stream's call has passed.
    #[error("the deadline of the stream's call has passed")]
    DeadlineExceeded,
    /// The call that was to carry the stream was never sent.
    #[error("the call that was to carry the stream was not sent")]
    NotSent,
    /// The stream was finished on this side.
    #[error("the stream was finished")]
    Finished,
    /// An item that cannot be encoded.
    #[error(transparent)]
    Encode(#[from] codec::EncodeError),
    /// An item that is not of the expected type.
    #[error(transparent)]
    Decode(#[from] codec::DecodeError),
    /// An item above what the receiver takes.
    #[error("an item of {bytes} bytes is above the receiver's limit of {limit} bytes")]
    ItemTooLarge {
        /// The item, in bytes.
        bytes: usize,
        /// The receiver's limit, in bytes.
        limit: u32,
    },
}

impl StreamError {
    /// What a Reset of the peer's means. Its clock may be ahead of ours.
    fn reset(code: u32) -> Self {
        if code == tollway_protocol::error::code::DEADLINE {
            StreamError::DeadlineExceeded
        } else {
            StreamError::Reset(code)
        }
    }

    /// What a Stop means.
    pub(super) fn stopped(code: u32) -> Self {
        if code == tollway_protocol::error::code::DEADLINE {
            StreamError::DeadlineExceeded
        } else {
            StreamError::Stopped(code)
        }
    }
}

/// Makes a stream. One half is to travel in a call, a result or an item; the other stays here.
///
/// ```
/// let (tx, rx) = tollway::rpc::stream::<u64>();
/// # drop((tx, rx));
/// ```
pub fn stream<T>() -> (Tx<T>, Rx<T>) {
    let core = StreamCore::new(Side::Send(SendStream::new(0)), None, u32::MAX);
    (Tx::new(core.clone()), Rx::new(core))
}

/// The sending half of a stream of `T`.
///
/// Ends with [`finish`](Self::finish). Dropped without it, items that are not on their way are dropped too, and the
/// receiver sees [`StreamError::Reset`]: a stream that broke off never looks complete.
pub struct Tx<T> {
    pub(super) core: Arc<StreamCore>,
    /// The outbox was full after the last item.
    pub(super) full: bool,
    until_budget: u32,
    /// Where items are encoded before a lock is taken: a `Serialize` may panic, be slow, or use another stream.
    scratch: Vec<u8>,
    /// `fn(T)`: a `Tx` takes values and holds none.
    items: PhantomData<fn(T)>,
}

impl<T> fmt::Debug for Tx<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tx").finish_non_exhaustive()
    }
}

impl<T> Tx<T> {
    fn new(core: Arc<StreamCore>) -> Self {
        Tx { core, full: false, until_budget: ITEMS_PER_BUDGET, scratch: Vec::new(), items: PhantomData }
    }

    /// Says that all items were sent. They are delivered before the receiver sees the end.
    pub fn finish(self) {
        self.core.close_sender(Ending::End);
    }

    /// Gives the stream up: items that are not on their way are dropped, and the receiver sees
    /// [`StreamError::Reset`] with this code.
    pub fn reset(self, code: u32) {
        self.core.close_sender(Ending::Reset(code));
    }

    /// Waits until nothing that is sent will be received any more: the receiver wants no more, the deadline of the call has
    /// passed, or the connection ended.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn stopped(&mut self) {
        let _why = std::future::poll_fn(|cx| self.poll_closed(cx)).await;
    }

    pub(super) fn poll_closed(&mut self, cx: &mut Context<'_>) -> Poll<StreamError> {
        let mut state = self.core.state.lock();
        if let Some(error) = state.sender_error() {
            return Poll::Ready(error);
        }
        state.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    /// Waits until at most `bytes` of what was sent is still in the outbox, or nobody wants it any more.
    pub(super) fn poll_taken(&mut self, cx: &mut Context<'_>, bytes: u64) -> Poll<Result<(), StreamError>> {
        let mut state = self.core.state.lock();
        if let Some(error) = state.sender_error() {
            return Poll::Ready(Err(error));
        }
        let waits = match &state.side {
            Side::Send(send) => send.buffered() > bytes,
            Side::Recv(_) => false,
        };
        if waits {
            state.waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }

    /// Waits until there is room for an item, or the stream has ended.
    pub(super) fn poll_room(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut state = self.core.state.lock();
        let full = match &state.side {
            Side::Send(send) => send.buffered() >= OUTBOX_BYTES,
            Side::Recv(_) => false,
        };
        if full && state.failed.is_none() && state.stopped.is_none() {
            state.waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        self.full = false;
        Poll::Ready(())
    }
}

impl<T: Serialize> Tx<T> {
    /// Sends an item. Returns when it is in the outbox, which is bounded: it waits while the receiver is slower.
    ///
    /// Small items share frames and writes by themselves; none is held back for others.
    ///
    /// # Errors
    /// When the receiver wants no more, the connection ended, or the item cannot be encoded or is too large.
    ///
    /// # Cancel safety
    /// A dropped future has sent its item entirely or not at all.
    pub async fn send(&mut self, item: T) -> Result<(), StreamError> {
        self.until_budget -= 1;
        if self.until_budget == 0 {
            self.until_budget = ITEMS_PER_BUDGET;
            tokio::task::consume_budget().await;
        }
        if self.full {
            std::future::poll_fn(|cx| self.poll_room(cx)).await;
        }
        self.push(&item)
    }

    #[inline]
    pub(super) fn push(&mut self, item: &T) -> Result<(), StreamError> {
        // What an item left that panicked or failed to encode goes with the one before it.
        self.scratch.resize(MAX_PREFIX, 0);
        let slots = codec::encode_into(item, &mut self.scratch)?;
        self.push_encoded(slots)
    }

    /// Sends the item in the scratch buffer, behind the room for its length.
    #[inline]
    fn push_encoded(&mut self, slots: OutboundSlots) -> Result<(), StreamError> {
        let bytes = self.scratch.len() - MAX_PREFIX;
        if !slots.is_empty() || bytes >= LARGE_ITEM {
            return self.push_large(slots);
        }
        let start = frame_in_place(&mut self.scratch);
        let (full, tell) = push_into(&self.core, bytes, |send| send.push_small(&self.scratch[start..], bytes))?;
        self.full = full;
        if let Some(bound) = tell {
            tell_session(&bound);
        }
        Ok(())
    }

    /// Sends a large item, or one with streams in it, in the buffer in which it was encoded.
    #[cold]
    fn push_large(&mut self, slots: OutboundSlots) -> Result<(), StreamError> {
        let mut scratch = std::mem::take(&mut self.scratch);
        let bytes = scratch.len() - MAX_PREFIX;
        if u32::try_from(bytes).is_err() {
            return Err(StreamError::ItemTooLarge { bytes, limit: u32::MAX });
        }
        let start = frame_in_place(&mut scratch);
        let framed = Bytes::from(scratch).slice(start..);
        let keys = self.announce(slots)?;
        let pushed = self.push_with(bytes, |send| send.push_framed(framed, keys.clone()));
        if pushed.is_err() && !keys.is_empty() {
            // Nothing will announce the streams of this item: whoever waits on them is told.
            let bound = self.core.state.lock().bound.clone();
            if let Some((shared, key)) = bound {
                shared.stream_ready(key, false, &keys);
            }
        }
        pushed
    }

    /// Creates the streams that an item carries.
    fn announce(&self, slots: OutboundSlots) -> Result<Vec<StreamKey>, StreamError> {
        if slots.is_empty() {
            return Ok(Vec::new());
        }
        let bound = self.core.state.lock().bound.clone();
        let (shared, key) = bound.ok_or(StreamError::NotSent)?;
        shared.create_item_streams(key, slots).map_err(|_| StreamError::ConnectionEnded)
    }

    /// Adds an item of so many bytes by `push`, and tells the session if it must be told.
    #[inline]
    pub(super) fn push_with(
        &mut self,
        bytes: usize,
        push: impl FnOnce(&mut SendStream) -> bool,
    ) -> Result<(), StreamError> {
        let (full, tell) = push_into(&self.core, bytes, push)?;
        self.full = full;
        if let Some(bound) = tell {
            tell_session(&bound);
        }
        Ok(())
    }
}

/// The session of a stream, and the stream's key there.
type Bound = (Arc<Shared>, StreamKey);

/// Tells the session that the stream has something to send.
#[cold]
fn tell_session((shared, key): &Bound) {
    shared.stream_ready(*key, true, &[]);
}

/// Puts an item of so many bytes into the outbox. Returns whether that is full now, and the session if it must be told.
#[inline]
fn push_into(
    core: &StreamCore,
    bytes: usize,
    push: impl FnOnce(&mut SendStream) -> bool,
) -> Result<(bool, Option<Bound>), StreamError> {
    let mut state = core.state.lock();
    if state.failed.is_some() || state.stopped.is_some() {
        return Err(state.sender_error().unwrap_or(StreamError::Finished));
    }
    if bytes > state.max_item as usize {
        return Err(StreamError::ItemTooLarge { bytes, limit: state.max_item });
    }
    let Side::Send(send) = &mut state.side else { return Err(StreamError::Finished) };
    let ready = push(send);
    let full = send.buffered() >= OUTBOX_BYTES;
    let tell = if ready { state.bound.clone() } else { None };
    Ok((full, tell))
}

impl<T> Drop for Tx<T> {
    fn drop(&mut self) {
        self.core.close_sender(Ending::Reset(code::DROPPED));
    }
}

/// The receiving half of a stream of `T`. Dropped, it tells the sender that no more is wanted.
pub struct Rx<T> {
    pub(super) core: Arc<StreamCore>,
    /// The run that is being read; it needs no lock.
    run: Option<ItemRun>,
    /// Streams of the run's single item.
    slots: Vec<InboundStream>,
    /// Credit and items of the run, given back when it is read.
    taken: (u64, u64),
    pub(super) until_budget: u32,
    /// As a `Stream` it has said its last error or its end.
    pub(super) ended: bool,
    items: PhantomData<fn() -> T>,
}

impl<T> fmt::Debug for Rx<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rx").finish_non_exhaustive()
    }
}

impl<T> Rx<T> {
    fn new(core: Arc<StreamCore>) -> Self {
        let (run, slots) = (None, Vec::new());
        Rx { core, run, slots, taken: (0, 0), until_budget: ITEMS_PER_BUDGET, ended: false, items: PhantomData }
    }

    /// Gives the credit of a run that was read back, and takes the next one.
    pub(super) fn poll_run(&mut self, cx: &mut Context<'_>) -> Poll<Result<bool, StreamError>> {
        let (credit, items) = std::mem::take(&mut self.taken);
        let mut state = self.core.state.lock();
        let mut grant: Option<Grant> = None;
        let mut next = None;
        let mut ending = None;
        if let Side::Recv(recv) = &mut state.side {
            grant = if credit > 0 { recv.consume(credit, items) } else { None };
            next = recv.take_run();
            ending = recv.ending();
        }
        let answer = match (&next, ending, &state.failed) {
            (Some(_), _, _) => Poll::Ready(Ok(true)),
            (None, Some(Ending::End), _) => Poll::Ready(Ok(false)),
            (None, Some(Ending::Reset(code)), _) => Poll::Ready(Err(StreamError::reset(code))),
            (None, None, Some(error)) => Poll::Ready(Err(error.clone())),
            (None, None, None) => {
                state.waker = Some(cx.waker().clone());
                Poll::Pending
            }
        };
        // The last item was read: nothing of a stream that has ended is held any more.
        let held = if next.is_none() { std::mem::take(&mut state.held) } else { 0 };
        let bound = if grant.is_some() || held > 0 { state.bound.clone() } else { None };
        if let Some((run, keys)) = next {
            self.taken = (run.credit(), u64::from(run.items()));
            self.run = Some(run);
            self.slots = keys.iter().filter_map(|key| state.arrived.remove(key)).collect();
        }
        drop(state);
        if let Some((shared, key)) = bound {
            match grant {
                Some(grant) => shared.grant(key, grant),
                None => shared.release_stream(held),
            }
        }
        answer
    }
}

impl<T: DeserializeOwned> Rx<T> {
    /// Receives the next item, or `None` after the last one.
    ///
    /// # Errors
    /// When the sender gave up, the connection ended, or an item is not a `T` (the stream goes on after that one).
    ///
    /// # Cancel safety
    /// A dropped future has taken nothing.
    pub async fn recv(&mut self) -> Result<Option<T>, StreamError> {
        self.until_budget -= 1;
        if self.until_budget == 0 {
            self.until_budget = ITEMS_PER_BUDGET;
            tokio::task::consume_budget().await;
        }
        loop {
            if let Some(item) = self.next_of_run() {
                return item.map(Some);
            }
            if !std::future::poll_fn(|cx| self.poll_run(cx)).await? {
                return Ok(None);
            }
        }
    }

    /// The next item of the run that is being read; it needs no lock.
    #[inline]
    pub(super) fn next_of_run(&mut self) -> Option<Result<T, StreamError>> {
        let slots = &mut self.slots;
        let decoded = self.run.as_mut()?.read_next(|item| match slots.is_empty() {
            true => codec::decode_plain(item),
            false => codec::decode(item, std::mem::take(slots)),
        });
        match decoded {
            Some(Ok(item)) => Some(Ok(item)),
            Some(Err(error)) => Some(Err(StreamError::Decode(error))),
            None => {
                self.run = None;
                None
            }
        }
    }
}

impl<T> Rx<T> {
    /// The next item of the run that is being read, as it came and uncopied.
    pub(super) fn next_encoded(&mut self) -> Option<Bytes> {
        let item = self.run.as_mut()?.next_item();
        if item.is_none() {
            self.run = None;
        }
        item
    }
}

impl<T> Drop for Rx<T> {
    fn drop(&mut self) {
        self.core.close_receiver(code::DROPPED);
    }
}

fn serialize_half<S: Serializer>(core: &Arc<StreamCore>, flow: Flow, serializer: S) -> Result<S::Ok, S::Error> {
    let index = codec::enter_slot(core, flow).map_err(ser::Error::custom)?;
    serializer.serialize_u32(index)
}

fn deserialize_half<'de, D: Deserializer<'de>>(flow: Flow, deserializer: D) -> Result<Arc<StreamCore>, D::Error> {
    let index = u32::deserialize(deserializer)?;
    let stream = codec::take_slot(index, flow).map_err(de::Error::custom)?;
    stream.into_core().ok_or_else(|| de::Error::custom("the stream has ended"))
}

impl<T> Serialize for Tx<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serialize_half(&self.core, Flow::FromPeer, serializer)
    }
}

impl<T> Serialize for Rx<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serialize_half(&self.core, Flow::ToPeer, serializer)
    }
}

impl<'de, T> Deserialize<'de> for Tx<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserialize_half(Flow::ToPeer, deserializer).map(Tx::new)
    }
}

impl<'de, T> Deserialize<'de> for Rx<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserialize_half(Flow::FromPeer, deserializer).map(Rx::new)
    }
}

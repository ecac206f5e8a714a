//! Values to payloads and back: postcard, strict on the way in.
//!
//! A [`Tx`](super::Tx) or [`Rx`](super::Rx) inside a value is written as the number of its *slot*; the streams
//! themselves travel in the frame's header. While a value is encoded or decoded, a thread-local holds the list of its
//! slots, which is the only way to get anything through serde's traits.

use std::cell::{Cell, RefCell};
use std::sync::Arc;

use bytes::Bytes;
use postcard::ser_flavors::Flavor;
use serde::{Deserialize, Serialize};
use tollway_protocol::message::Flow;

use super::stream_core::{InboundStream, StreamCore};

/// A value that cannot become a payload.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot encode the value: {0}")]
pub struct EncodeError(pub(crate) String);

/// A payload that is not a value of the expected type.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot decode the payload: {0}")]
pub struct DecodeError(pub(crate) String);

/// A stream that an encoded value carries along: the half that the peer gets decides which way it flows.
pub(crate) struct OutboundSlot {
    pub(crate) core: Arc<StreamCore>,
    pub(crate) flow: Flow,
}

/// The streams of a value that was encoded. Dropped without being sent, they fail.
#[derive(Default)]
pub(crate) struct OutboundSlots(Vec<OutboundSlot>);

impl OutboundSlots {
    pub(crate) fn flows(&self) -> Vec<Flow> {
        self.0.iter().map(|slot| slot.flow).collect()
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The streams were announced: from here they belong to the session.
    pub(crate) fn into_cores(mut self) -> Vec<Arc<StreamCore>> {
        std::mem::take(&mut self.0).into_iter().map(|slot| slot.core).collect()
    }
}

impl Drop for OutboundSlots {
    fn drop(&mut self) {
        self.0.iter().for_each(|slot| slot.core.fail_unsent());
    }
}

thread_local! {
    /// The value that is being encoded on this thread. Apart from the slots, and `Copy`, so that a value without streams
    /// costs a load and a store.
    static ENCODING: Cell<Encoding> = const { Cell::new(Encoding { within: None, end: 0 }) };
    /// The slots of the values that are being encoded, those of an inner value behind those of the values around it.
    static SLOTS: RefCell<Vec<OutboundSlot>> = const { RefCell::new(Vec::new()) };
    static DECODING: RefCell<Option<Vec<Option<InboundStream>>>> = const { RefCell::new(None) };
}

#[derive(Clone, Copy)]
struct Encoding {
    /// Where the slots of the innermost value begin; `None` outside of a value.
    within: Option<usize>,
    /// How many slots there are.
    end: usize,
}

/// The encoding of one value. Dropped early, by an error or a panic, its streams fail.
struct EncodeScope {
    outer: Encoding,
}

impl EncodeScope {
    #[inline]
    fn enter() -> Self {
        let outer = ENCODING.get();
        ENCODING.set(Encoding { within: Some(outer.end), ..outer });
        EncodeScope { outer }
    }

    /// The value's slots.
    #[inline]
    fn finish(self) -> OutboundSlots {
        let slots = self.leave();
        // There is nothing left for the drop to do, and nothing in the scope that needs one.
        std::mem::forget(self);
        slots
    }

    #[inline]
    fn leave(&self) -> OutboundSlots {
        let Encoding { end, .. } = ENCODING.replace(self.outer);
        match end > self.outer.end {
            true => OutboundSlots(SLOTS.with_borrow_mut(|slots| slots.split_off(self.outer.end))),
            false => OutboundSlots::default(),
        }
    }
}

impl Drop for EncodeScope {
    fn drop(&mut self) {
        // Outside of the borrow: the drop of a stream wakes who waits for it.
        drop(self.leave());
    }
}

/// Called by the `Serialize` of a half of a stream: the number of its slot, or why it cannot travel.
pub(super) fn enter_slot(core: &Arc<StreamCore>, flow: Flow) -> Result<u32, &'static str> {
    let encoding = ENCODING.get();
    let begin = encoding.within.ok_or("a stream travels only in a call, a result or an item")?;
    let index = u32::try_from(encoding.end - begin).map_err(|_| "too many streams in one value")?;
    core.give_away(flow)?;
    SLOTS.with_borrow_mut(|slots| slots.push(OutboundSlot { core: core.clone(), flow }));
    ENCODING.set(Encoding { end: encoding.end + 1, ..encoding });
    Ok(index)
}

/// Called by the `Deserialize` of a half of a stream: the stream of that slot.
pub(super) fn take_slot(index: u32, flow: Flow) -> Result<InboundStream, &'static str> {
    DECODING.with_borrow_mut(|slots| {
        let slots = slots.as_mut().ok_or("a stream travels only in a call, a result or an item")?;
        let slot = slots.get_mut(index as usize).ok_or("the slot of a stream is not in the frame's list")?;
        match slot {
            Some(stream) if stream.flow() == flow => slot.take().ok_or("unreachable"),
            Some(_) => Err("the stream flows the other way"),
            None => Err("the slot of a stream is used twice"),
        }
    })
}

/// Restores the outer list when a `Deserialize` panics, too.
struct Restore<T: 'static>(&'static std::thread::LocalKey<RefCell<Option<T>>>, Option<T>);

impl<T> Restore<T> {
    fn enter(key: &'static std::thread::LocalKey<RefCell<Option<T>>>, value: Option<T>) -> Self {
        Restore(key, key.replace(value))
    }

    fn leave(self) -> Option<T> {
        self.0.take()
    }
}

impl<T> Drop for Restore<T> {
    fn drop(&mut self) {
        let outer = self.1.take();
        // An inner value that is still there is dropped outside of the borrow: its drop may look at streams.
        let _inner = self.0.replace(outer);
    }
}

/// Postcard's output behind whatever is in a vector already. (Extending a `BytesMut` costs a hundred times more.)
struct Append<'a>(&'a mut Vec<u8>);

impl Flavor for Append<'_> {
    type Output = ();

    #[inline]
    fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
        self.0.push(byte);
        Ok(())
    }

    #[inline]
    fn try_extend(&mut self, bytes: &[u8]) -> postcard::Result<()> {
        // The varint of a small number, as nearly all are, is no call of memcpy.
        match bytes {
            [byte] => self.0.push(*byte),
            _ => self.0.extend_from_slice(bytes),
        }
        Ok(())
    }

    fn finalize(self) -> postcard::Result<()> {
        Ok(())
    }
}

/// Appends the value's encoding. On an error the vector is as it was.
#[inline]
pub(crate) fn encode_into<T: Serialize + ?Sized>(value: &T, into: &mut Vec<u8>) -> Result<OutboundSlots, EncodeError> {
    let before = into.len();
    let scope = EncodeScope::enter();
    match postcard::serialize_with_flavor(value, Append(into)) {
        Ok(()) => Ok(scope.finish()),
        Err(error) => {
            into.truncate(before);
            Err(unencodable(error))
        }
    }
}

#[cold]
fn unencodable(error: postcard::Error) -> EncodeError {
    EncodeError(error.to_string())
}

thread_local! {
    /// Where small values are encoded, to be copied into a buffer of their size: one allocation, and none to grow.
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Encodings from this size up keep the buffer in which they were made.
const OWN_BUFFER: usize = 4 * 1024;

/// The value's encoding in a buffer of its own.
pub(crate) fn encode<T: Serialize + ?Sized>(value: &T) -> Result<(Bytes, OutboundSlots), EncodeError> {
    // Taken, not borrowed: a `Serialize` may encode something itself.
    let mut scratch = SCRATCH.take();
    scratch.clear();
    let slots = encode_into(value, &mut scratch)?;
    let payload = if scratch.len() < OWN_BUFFER {
        let payload = Bytes::copy_from_slice(&scratch);
        SCRATCH.set(scratch);
        payload
    } else {
        Bytes::from(scratch)
    };
    Ok((payload, slots))
}

/// Decodes all of a payload. Streams that the value does not take are ended.
pub(crate) fn decode<'de, T: Deserialize<'de>>(
    payload: &'de [u8],
    slots: Vec<InboundStream>,
) -> Result<T, DecodeError> {
    // Nearly no value has streams in it, and of those that have none nothing need be known.
    let scope = (!slots.is_empty()).then(|| Restore::enter(&DECODING, Some(slots.into_iter().map(Some).collect())));
    let decoded = decode_plain(payload);
    drop(scope.map(Restore::leave));
    decoded
}

/// Decodes all of a payload that came without streams.
#[inline]
pub(super) fn decode_plain<'de, T: Deserialize<'de>>(payload: &'de [u8]) -> Result<T, DecodeError> {
    match postcard::take_from_bytes::<T>(payload) {
        Ok((value, [])) => Ok(value),
        Ok((_, rest)) => Err(left_over(rest.len())),
        Err(error) => Err(malformed(error)),
    }
}

#[cold]
fn malformed(error: postcard::Error) -> DecodeError {
    DecodeError(error.to_string())
}

#[cold]
fn left_over(bytes: usize) -> DecodeError {
    DecodeError(format!("{bytes} bytes are left over"))
}

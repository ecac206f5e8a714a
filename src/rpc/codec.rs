//! Values to payloads and back: postcard, strict on the way in.
//!
//! A [`Tx`](super::Tx) or [`Rx`](super::Rx) inside a value is written as the number of its *slot*; the streams
//! themselves travel in the frame's header. While a value is encoded or decoded, a thread-local holds the list of its
//! slots, which is the only way to get anything through serde's traits.

use std::cell::RefCell;
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
    static ENCODING: RefCell<Encoding> = const { RefCell::new(Encoding { within: None, slots: Vec::new() }) };
    static DECODING: RefCell<Option<Vec<Option<InboundStream>>>> = const { RefCell::new(None) };
}

/// The slots of the values that are being encoded on this thread.
struct Encoding {
    /// Where the slots of the innermost value begin, behind those of the values around it; `None` outside of a value.
    within: Option<usize>,
    slots: Vec<OutboundSlot>,
}

/// The encoding of one value. Dropped early, by an error or a panic, its streams fail.
struct EncodeScope {
    begin: usize,
    outer: Option<usize>,
}

impl EncodeScope {
    fn enter() -> Self {
        ENCODING.with_borrow_mut(|encoding| {
            let begin = encoding.slots.len();
            EncodeScope { begin, outer: encoding.within.replace(begin) }
        })
    }

    /// The value's slots. The scope has ended.
    fn take(&mut self) -> OutboundSlots {
        ENCODING.with_borrow_mut(|encoding| {
            encoding.within = self.outer;
            match encoding.slots.len() > self.begin {
                true => OutboundSlots(encoding.slots.split_off(self.begin)),
                false => OutboundSlots::default(),
            }
        })
    }
}

impl Drop for EncodeScope {
    fn drop(&mut self) {
        // Outside of the borrow: the drop of a stream wakes who waits for it.
        drop(self.take());
    }
}

/// Called by the `Serialize` of a half of a stream: the number of its slot, or why it cannot travel.
pub(super) fn enter_slot(core: &Arc<StreamCore>, flow: Flow) -> Result<u32, &'static str> {
    ENCODING.with_borrow_mut(|encoding| {
        let begin = encoding.within.ok_or("a stream travels only in a call, a result or an item")?;
        core.give_away(flow)?;
        let index = u32::try_from(encoding.slots.len() - begin).map_err(|_| "too many streams in one value")?;
        encoding.slots.push(OutboundSlot { core: core.clone(), flow });
        Ok(index)
    })
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

    fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
        self.0.push(byte);
        Ok(())
    }

    fn try_extend(&mut self, bytes: &[u8]) -> postcard::Result<()> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }

    fn finalize(self) -> postcard::Result<()> {
        Ok(())
    }
}

/// Appends the value's encoding. On an error the vector is as it was.
pub(crate) fn encode_into<T: Serialize + ?Sized>(value: &T, into: &mut Vec<u8>) -> Result<OutboundSlots, EncodeError> {
    let before = into.len();
    let mut scope = EncodeScope::enter();
    match postcard::serialize_with_flavor(value, Append(into)) {
        Ok(()) => Ok(scope.take()),
        Err(error) => {
            into.truncate(before);
            Err(EncodeError(error.to_string()))
        }
    }
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
    let decoded = postcard::take_from_bytes::<T>(payload).map_err(|error| DecodeError(error.to_string()));
    drop(scope.map(Restore::leave));
    let (value, rest) = decoded?;
    if !rest.is_empty() {
        return Err(DecodeError(format!("{} bytes are left over", rest.len())));
    }
    Ok(value)
}

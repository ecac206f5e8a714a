//! Streams of `Bytes` without their encoding: bytes are written from where they lie into the frame, and read from where
//! the frame lies. On the wire they are streams of `Bytes` like any other; [tunnels](crate::tunnel) stand on this.

use std::io::IoSlice;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::task::coop;
use tollway_protocol::error::code;
use tollway_protocol::stream::{Ending, MAX_PREFIX};

use super::codec::DecodeError;
use super::stream::{Rx, StreamError, Tx};
use super::stream_core::{Side, StreamCore};

/// Bytes that one item carries at most: a run of them shares its costs, and other streams have their turn in between.
const CHUNK: usize = 64 * 1024;

/// Slices that are looked at: as many as a vectored write of ours has.
const MAX_SLICES: usize = 64;

impl Tx<Bytes> {
    /// Sends the first bytes of the slices as one item and says how many. Waits while the outbox is full, and until the
    /// stream is announced, since only then the receiver's limits are known.
    pub(crate) fn poll_write(
        &mut self,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<Result<usize, StreamError>> {
        let charged = ready!(coop::poll_proceed(cx));
        if self.full {
            ready!(self.poll_room(cx));
        }
        let max_item = ready!(self.poll_announced(cx))?;
        let most = (max_item as usize).saturating_sub(MAX_PREFIX).min(CHUNK);
        let slices = &slices[..slices.len().min(MAX_SLICES)];
        let bytes = slices.iter().map(|slice| slice.len()).sum::<usize>().min(most);
        if bytes == 0 {
            let is_impossible = slices.iter().any(|slice| !slice.is_empty());
            let error = StreamError::ItemTooLarge { bytes: MAX_PREFIX + 1, limit: max_item };
            return Poll::Ready(if is_impossible { Err(error) } else { Ok(0) });
        }
        let mut prefix = [0; MAX_PREFIX];
        // As `Bytes` are encoded: their length, which is below 2^32, and they themselves.
        let prefix = &*postcard::to_slice(&(bytes as u32), &mut prefix).expect("five bytes hold the varint of a u32");
        let mut left = bytes;
        let cut = slices.iter().map(move |slice| {
            let piece = &slice[..slice.len().min(left)];
            left -= piece.len();
            piece
        });
        let pieces = std::iter::once(prefix).chain(cut);
        self.push_with(prefix.len() + bytes, |send| send.push_pieces(pieces))?;
        charged.made_progress();
        Poll::Ready(Ok(bytes))
    }

    /// The largest item that the receiver takes, of a stream that is open.
    fn poll_announced(&mut self, cx: &mut Context<'_>) -> Poll<Result<u32, StreamError>> {
        let mut state = self.core.state.lock();
        if let Some(error) = state.sender_error() {
            return Poll::Ready(Err(error));
        }
        if matches!(&state.side, Side::Send(send) if !send.is_open()) {
            return Poll::Ready(Err(StreamError::Finished));
        }
        if state.bound.is_none() {
            state.waker = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(Ok(state.max_item))
    }

    /// Says that all was sent, if `self` has not said it, and waits until the end is with the conduit: whoever closes the
    /// connection then cuts nothing off.
    pub(crate) fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        self.finish_now();
        let mut state = self.core.state.lock();
        let has_finished = matches!(&state.side, Side::Send(send) if send.has_finished());
        if has_finished && state.stopped.is_none() {
            return Poll::Ready(Ok(()));
        }
        if let Some(error) = state.sender_error() {
            return Poll::Ready(Err(error));
        }
        state.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    /// As [`finish`](Self::finish), which takes the stream away.
    pub(crate) fn finish_now(&self) {
        self.core.close_sender(Ending::End);
    }

    /// As [`reset`](Self::reset), which takes the stream away.
    pub(crate) fn reset_now(&self, code: u32) {
        self.core.close_sender(Ending::Reset(code));
    }
}

impl Rx<Bytes> {
    /// What it shares with the session.
    pub(crate) fn core(&self) -> &Arc<StreamCore> {
        &self.core
    }

    /// The next bytes, uncopied; `None` at the end.
    pub(crate) fn poll_chunk(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, StreamError>> {
        let charged = ready!(coop::poll_proceed(cx));
        loop {
            if let Some(item) = self.next_encoded() {
                charged.made_progress();
                return Poll::Ready(decode(item).map(Some).map_err(StreamError::Decode));
            }
            if !ready!(self.poll_run(cx))? {
                return Poll::Ready(Ok(None));
            }
        }
    }

    /// Tells the sender that no more is wanted.
    pub(crate) fn stop(&self) {
        self.core.close_receiver(code::DROPPED);
    }
}

/// Takes the length off the front. `[call.tunnel]`
fn decode(mut item: Bytes) -> Result<Bytes, DecodeError> {
    let (length, prefix) = match postcard::take_from_bytes::<u64>(&item) {
        Ok((length, rest)) => (length, item.len() - rest.len()),
        Err(error) => return Err(DecodeError(error.to_string())),
    };
    item.advance(prefix);
    if length != item.len() as u64 {
        return Err(DecodeError(format!("{} bytes where {length} should be", item.len())));
    }
    Ok(item)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_what_their_encoding_says_and_nothing_else() {
        for size in [0, 1, 127, 128, 70_000] {
            let bytes = Bytes::from(vec![7; size]);
            let mut encoded = Vec::new();
            super::super::codec::encode_into(&bytes, &mut encoded).expect("bytes can be encoded");
            assert_eq!(decode(encoded.clone().into()).as_ref(), Ok(&bytes));
            encoded.push(1);
            assert!(decode(encoded.into()).is_err(), "one byte more");
        }
        for bad in [&[][..], &[1], &[0x80], &[0xff; 11]] {
            assert!(decode(Bytes::copy_from_slice(bad)).is_err(), "{bad:?}");
        }
    }
}

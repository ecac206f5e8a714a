//! The conduit over any ordered stream of bytes: TCP, and whatever else reads and writes like it.
//!
//! The reader fills blocks and cuts frames out of them without copying; the writer joins small pieces and writes large
//! ones from where they are. Both sides send [`PREFACE`] before their first frame and require the peer's before its
//! first. A listener sends its own with its first frame, not earlier, so that a stranger is answered in its own
//! language and nothing else.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::io::poll_read_buf;
use tollway_protocol::frame::{FrameDecoder, PREFACE, PrefaceCheck, check_length, check_preface};

use super::outbuf::{MAX_SLICES, OutBuf};
use super::{
    Conduit, ConduitError, FrameReader, FrameWriter, HANDSHAKE_MAX_FRAME, Lane, Lanes, PeerInfo, Received, Stranger,
    Transmit,
};

/// Room in a read block beyond a power of two, for the heads of bodies and items that are a power of two themselves, as
/// many are. Without it the end of a block would cut the last of them by a few bytes, and what had come of it would have to
/// be moved to the next block: for bodies of 64 KiB that is each of them.
const HEADS: usize = 4 * 1024;

/// Bytes of a read block: large enough that a system call is shared by hundreds of small frames.
const BLOCK: usize = 64 * 1024 + HEADS;

/// Bytes of a read block while reads fill it: a bulk transfer has fewer calls, and fewer frames cut by a block's end.
const LARGE_BLOCK: usize = 256 * 1024 + HEADS;

/// Large blocks that are kept while frames in them are unread, to be filled again when those are gone: a fresh block
/// costs a page fault for each 4 KiB, which is more than copying them. So many hold a stream's whole default window.
/// The first small read, a keepalive's at the latest, gives them back.
const SPARE_BLOCKS: usize = 5;

/// Free bytes in a block below which the next read goes to a fresh one.
const MIN_SPARE: usize = 4 * 1024;

/// Bytes read in one poll, so that a fast peer leaves the driver time for its other work.
const READ_BUDGET: usize = LARGE_BLOCK;

/// Frames delivered by one poll, for the same reason, and to bound the list that holds them.
const FRAMES_PER_POLL: usize = 1024;

/// A conduit over a reader and a writer of bytes.
#[derive(Debug)]
pub struct Framed<R, W> {
    reader: R,
    writer: W,
    peer: PeerInfo,
}

impl<R, W> Framed<R, W> {
    /// A conduit that reads from `reader` and writes to `writer`.
    pub fn new(reader: R, writer: W, peer: PeerInfo) -> Self {
        Self { reader, writer, peer }
    }
}

impl<R, W> Conduit for Framed<R, W>
where
    R: AsyncRead + Unpin + Send + 'static,
    W: AsyncWrite + Unpin + Send + 'static,
{
    type Reader = FramedReader<R>;
    type Writer = FramedWriter<W>;

    fn lanes(&self) -> Lanes {
        Lanes::One
    }

    fn peer(&self) -> PeerInfo {
        self.peer.clone()
    }

    fn split(self) -> (Self::Reader, Self::Writer) {
        (FramedReader::new(self.reader), FramedWriter::new(self.writer))
    }
}

/// Makes a conduit of a type that is a [`Framed`], in its field `framed`, and what it takes to get there.
macro_rules! framed_conduit {
    ($conduit:ty, $reader:ty, $writer:ty $(, $io:ident: $bound:path)?) => {
        impl$(<$io: $bound>)? $crate::conduit::Conduit for $conduit {
            type Reader = $crate::conduit::framed::FramedReader<$reader>;
            type Writer = $crate::conduit::framed::FramedWriter<$writer>;

            fn lanes(&self) -> $crate::conduit::Lanes {
                self.framed.lanes()
            }

            fn peer(&self) -> $crate::conduit::PeerInfo {
                self.framed.peer()
            }

            fn split(self) -> (Self::Reader, Self::Writer) {
                self.framed.split()
            }
        }
    };
}
pub(super) use framed_conduit;

/// Receives frames from a stream of bytes.
#[derive(Debug)]
pub struct FramedReader<R> {
    io: R,
    /// What was read and not yet delivered. It starts with the preface or with a frame.
    buffer: BytesMut,
    decoder: FrameDecoder,
    preface_due: bool,
    /// Bytes of the next fresh block.
    block: usize,
    /// Ends of large blocks that were read full, the oldest first; each holds its block. Empty unless reads fill blocks.
    spare: VecDeque<BytesMut>,
    state: ReadState,
}

/// ```text
/// Open ──end of stream or I/O error behind frames──▶ Ending ──frames delivered──▶ End or Failed
///   └────────────────────────────────────────────────────────────────────────────▶
/// ```
#[derive(Debug)]
enum ReadState {
    Open,
    /// The stream is over, but what the buffer holds is still to be delivered. `None` is the stream's own end.
    Ending(Option<io::Error>),
    End,
    Failed,
}

impl<R: AsyncRead + Unpin> FramedReader<R> {
    fn new(io: R) -> Self {
        Self {
            io,
            buffer: BytesMut::new(),
            decoder: FrameDecoder::new(HANDSHAKE_MAX_FRAME),
            preface_due: true,
            block: BLOCK,
            spare: VecDeque::new(),
            state: ReadState::Open,
        }
    }

    /// Appends the whole frames in the buffer, up to the limit for one poll.
    fn decode(&mut self, frames: &mut Vec<(Lane, Bytes)>) -> Result<usize, ConduitError> {
        if self.preface_due {
            match check_preface(&self.buffer) {
                PrefaceCheck::NeedMore => return Ok(0),
                PrefaceCheck::Stranger(stranger) => return Err(ConduitError::Stranger(stranger)),
                PrefaceCheck::Ok => self.buffer.advance(PREFACE.len()),
            }
            self.preface_due = false;
        }
        let mut count = 0;
        while count < FRAMES_PER_POLL {
            match self.decoder.decode(&mut self.buffer) {
                Ok(Some(frame)) => frames.push((Lane::ROOT, frame)),
                // A bad length behind good frames is found again by the next poll, under the limit of that time: the
                // frames may be the handshake that raises it.
                Err(error) if count == 0 => return Err(error.into()),
                Ok(None) | Err(_) => break,
            }
            count += 1;
        }
        Ok(count)
    }

    /// Makes room for the next read: for the rest of a large frame, or a block.
    fn reserve(&mut self) {
        let missing = if self.preface_due { 0 } else { self.decoder.reserve_hint(&self.buffer) };
        let used = self.buffer.len();
        if self.buffer.capacity() - used >= missing.max(MIN_SPARE) {
            return;
        }
        let room = missing.max(self.block.saturating_sub(used)).max(MIN_SPARE);
        // The block is used again if all its frames are gone. Otherwise another one replaces it, and the part of a frame
        // moves over.
        if !self.buffer.try_reclaim(room) {
            let mut next = self.next_block(used + room);
            next.extend_from_slice(&self.buffer);
            self.buffer.clear();
            let full = std::mem::replace(&mut self.buffer, next);
            if self.block == LARGE_BLOCK {
                self.spare.push_back(full);
            }
            if self.spare.len() > SPARE_BLOCKS {
                self.spare.pop_front();
            }
        }
    }

    /// A block for so many bytes: the oldest that is spare, if its frames are gone, or a fresh one of exactly this size
    /// (`reserve` might double it).
    fn next_block(&mut self, bytes: usize) -> BytesMut {
        if self.spare.front_mut().is_some_and(|oldest| oldest.try_reclaim(bytes)) {
            return self.spare.pop_front().unwrap_or_default();
        }
        BytesMut::with_capacity(bytes)
    }

    /// Reads once, at most `limit` bytes; 0 is the stream's end.
    fn poll_read(&mut self, cx: &mut Context<'_>, limit: usize) -> Poll<io::Result<usize>> {
        self.reserve();
        let room = (self.buffer.capacity() - self.buffer.len()).min(limit);
        let read = ready!(poll_read_buf(Pin::new(&mut self.io), cx, &mut (&mut self.buffer).limit(room)))?;
        if read == room {
            self.block = LARGE_BLOCK;
        } else if read < BLOCK / 4 {
            self.block = BLOCK;
            self.spare.clear();
        }
        Poll::Ready(Ok(read))
    }

    /// The last word, when the stream is over and no frame is left.
    fn finish(&mut self, cause: Option<io::Error>) -> Result<Received, ConduitError> {
        match cause {
            Some(error) => self.fail(ConduitError::Io(error)),
            None if !self.buffer.is_empty() => self.fail(ConduitError::Truncated),
            None => {
                self.state = ReadState::End;
                Ok(Received::End)
            }
        }
    }

    fn fail(&mut self, error: ConduitError) -> Result<Received, ConduitError> {
        self.state = ReadState::Failed;
        self.buffer = BytesMut::new();
        self.spare.clear();
        Err(error)
    }
}

impl<R: AsyncRead + Unpin + Send + 'static> FrameReader for FramedReader<R> {
    fn poll_recv(
        &mut self,
        cx: &mut Context<'_>,
        frames: &mut Vec<(Lane, Bytes)>,
    ) -> Poll<Result<Received, ConduitError>> {
        let mut taken = 0;
        loop {
            match self.state {
                ReadState::End => return Poll::Ready(Ok(Received::End)),
                ReadState::Failed => return Poll::Ready(Err(ConduitError::Closed)),
                ReadState::Open | ReadState::Ending(_) => {}
            }
            // Frames first: they are there. As soon as some are, one more read may follow in the next poll, which
            // costs no system call if the last one emptied the socket.
            match self.decode(frames) {
                Ok(0) => {}
                Ok(_) => return Poll::Ready(Ok(Received::Frames)),
                Err(error) => return Poll::Ready(self.fail(error)),
            }
            if let ReadState::Ending(cause) = &mut self.state {
                let cause = cause.take();
                return Poll::Ready(self.finish(cause));
            }
            if taken >= READ_BUDGET {
                return Poll::Ready(Ok(Received::Progress));
            }
            match self.poll_read(cx, READ_BUDGET - taken) {
                Poll::Ready(Ok(0)) => self.state = ReadState::Ending(None),
                Poll::Ready(Ok(read)) => taken += read,
                Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Poll::Ready(Err(error)) => self.state = ReadState::Ending(Some(error)),
                Poll::Pending if taken > 0 => return Poll::Ready(Ok(Received::Progress)),
                Poll::Pending => return Poll::Pending,
            }
        }
    }

    fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if matches!(self.state, ReadState::End | ReadState::Ending(_)) {
            return Poll::Ready(());
        }
        // What was read belongs to no frame any more, so nothing can be received after this.
        self.state = ReadState::Failed;
        let mut taken = 0;
        while taken < READ_BUDGET {
            self.buffer.clear();
            self.buffer.reserve(MIN_SPARE);
            match ready!(poll_read_buf(Pin::new(&mut self.io), cx, &mut self.buffer)) {
                Ok(0) | Err(_) => return Poll::Ready(()),
                Ok(read) => taken += read,
            }
        }
        // A peer that never stops sending must not keep the task from its other work.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    fn set_max_frame(&mut self, bytes: usize) {
        self.decoder.set_max_frame(bytes);
    }
}

/// Sends frames into a stream of bytes.
#[derive(Debug)]
pub struct FramedWriter<W> {
    io: W,
    out: OutBuf,
    max_frame: usize,
    preface_due: bool,
    /// Whether `io` was given bytes that it may still hold in a buffer of its own.
    unflushed: bool,
    written: u64,
    state: WriteState,
}

/// ```text
/// Open ──poll_close──▶ Closing ──all written, shut down──▶ Closed
///   └───── error ─────────┴────▶ Failed(cause) ──reported──▶ Failed(none)
/// ```
#[derive(Debug)]
enum WriteState {
    Open,
    Closing,
    Closed,
    Failed(Option<ConduitError>),
}

impl<W: AsyncWrite + Unpin> FramedWriter<W> {
    fn new(io: W) -> Self {
        Self {
            io,
            out: OutBuf::default(),
            max_frame: usize::MAX,
            preface_due: true,
            unflushed: false,
            written: 0,
            state: WriteState::Open,
        }
    }

    fn fail(&mut self, error: ConduitError) {
        self.out.clear();
        self.state = WriteState::Failed(Some(error));
    }

    /// Writes once, and drops what was written.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut slices = [IoSlice::new(&[]); MAX_SLICES];
        let filled = self.out.slices(&mut slices);
        let io = Pin::new(&mut self.io);
        let written = if filled > 1 && io.is_write_vectored() {
            ready!(io.poll_write_vectored(cx, &slices[..filled]))?
        } else {
            ready!(io.poll_write(cx, &slices[0]))?
        };
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.out.advance(written);
        self.written += written as u64;
        self.unflushed = true;
        Poll::Ready(Ok(()))
    }

    /// Writes all, then makes `io` pass on what it holds.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.out.len() > 0 {
            match ready!(self.poll_write(cx)) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                other => other?,
            }
        }
        if self.unflushed {
            ready!(Pin::new(&mut self.io).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match ready!(Pin::new(&mut self.io).poll_shutdown(cx)) {
            // The peer has closed already. All is written, which is as much as a close can promise.
            Err(error) if error.kind() == io::ErrorKind::NotConnected => Poll::Ready(Ok(())),
            other => Poll::Ready(other),
        }
    }

    /// What this call reports: the cause of the failure if it is new.
    fn failure(&mut self) -> Option<ConduitError> {
        match &mut self.state {
            WriteState::Failed(cause) => Some(cause.take().unwrap_or(ConduitError::Closed)),
            _ => None,
        }
    }

    fn report(&mut self, error: io::Error) -> ConduitError {
        self.out.clear();
        self.state = WriteState::Failed(None);
        ConduitError::Io(error)
    }
}

impl<W: AsyncWrite + Unpin + Send + 'static> FrameWriter for FramedWriter<W> {
    fn start_send(&mut self, frame: Transmit) {
        if !matches!(self.state, WriteState::Open) {
            return;
        }
        let length = match check_length(frame.len(), self.max_frame) {
            Ok(length) => length,
            Err(error) => return self.fail(error.into()),
        };
        if self.preface_due {
            self.out.copy(&PREFACE);
            self.preface_due = false;
        }
        self.out.push_frame(length, &frame.head, frame.payload);
    }

    fn buffered(&self) -> usize {
        self.out.len()
    }

    fn written(&self) -> u64 {
        self.written
    }

    fn set_max_frame(&mut self, bytes: usize) {
        self.max_frame = bytes;
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConduitError>> {
        if let Some(error) = self.failure() {
            return Poll::Ready(Err(error));
        }
        if matches!(self.state, WriteState::Closed) {
            return Poll::Ready(Err(ConduitError::Closed));
        }
        let drained = ready!(self.poll_drain(cx));
        Poll::Ready(drained.map_err(|error| self.report(error)))
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConduitError>> {
        if let Some(error) = self.failure() {
            return Poll::Ready(Err(error));
        }
        if matches!(self.state, WriteState::Closed) {
            return Poll::Ready(Ok(()));
        }
        self.state = WriteState::Closing;
        let closed = match ready!(self.poll_drain(cx)) {
            Ok(()) => ready!(self.poll_shutdown(cx)),
            Err(error) => Err(error),
        };
        if closed.is_ok() {
            self.state = WriteState::Closed;
        }
        Poll::Ready(closed.map_err(|error| self.report(error)))
    }

    fn start_refusal(&mut self, stranger: Stranger) {
        if !matches!(self.state, WriteState::Open) {
            return;
        }
        self.out.clear();
        if self.written == 0 {
            self.out.copy(stranger.reply());
        }
        self.preface_due = false;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Cursor;

    use super::*;

    #[tokio::test]
    async fn blocks_whose_frames_are_kept_are_spare_within_a_bound_and_only_while_reads_are_large() {
        const FRAME: usize = 60_000;
        let mut wire = PREFACE.to_vec();
        for _ in 0..100 {
            wire.extend_from_slice(&(FRAME as u32).to_le_bytes());
            wire.resize(wire.len() + FRAME, 7);
        }
        // The frames before it end with a read that is large; this one comes alone.
        let (mut far, near) = tokio::io::duplex(16);
        let mut reader = FramedReader::new(tokio::io::AsyncReadExt::chain(Cursor::new(wire), near));
        let mut frames = Vec::new();
        let mut spare = Vec::new();
        while frames.len() < 100 {
            std::future::poll_fn(|cx| reader.poll_recv(cx, &mut frames)).await.unwrap();
            spare.push(reader.spare.len());
        }
        assert_eq!(spare.iter().max(), Some(&SPARE_BLOCKS), "{spare:?}");
        tokio::io::AsyncWriteExt::write_all(&mut far, &[1, 0, 0, 0, 7]).await.unwrap();
        std::future::poll_fn(|cx| reader.poll_recv(cx, &mut frames)).await.unwrap();
        assert_eq!((frames.len(), reader.spare.len()), (101, 0));
        assert!(frames.iter().take(100).all(|(_, frame)| frame.len() == FRAME && frame.iter().all(|byte| *byte == 7)));
    }
}

//! Conduits inside one process: [`pair`], a bounded pipe of bytes in each direction with one lane, and
//! [`reordering`], whose lanes overtake each other in an order that a seed decides.
//!
//! The second one is how the session is tested against what a conduit with many lanes may do to it.

use std::collections::VecDeque;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::io::DuplexStream;
use tollway_protocol::frame::{LENGTH_BYTES, check_length};

use super::framed::{Framed, FramedReader, FramedWriter};
use super::{
    Conduit, ConduitError, FrameReader, FrameWriter, HANDSHAKE_MAX_FRAME, Lane, Lanes, PeerInfo, Received, Transmit,
};

/// Two ends of a conduit with one lane. Each direction holds at most `capacity` bytes, at least 1.
pub fn pair(capacity: usize) -> (MemoryConduit, MemoryConduit) {
    // A duplex stream for each direction, of which one direction is used: reader and writer then share no lock with the
    // opposite direction, and dropping either is noticed by the other.
    let (left_writer, right_reader) = tokio::io::duplex(capacity.max(1));
    let (right_writer, left_reader) = tokio::io::duplex(capacity.max(1));
    let end =
        |reader, writer, name| MemoryConduit { framed: Framed::new(reader, writer, PeerInfo::new("memory", name)) };
    (end(left_reader, left_writer, "right"), end(right_reader, right_writer, "left"))
}

/// One end of what [`pair`] makes.
#[derive(Debug)]
pub struct MemoryConduit {
    framed: Framed<DuplexStream, DuplexStream>,
}

impl Conduit for MemoryConduit {
    type Reader = FramedReader<DuplexStream>;
    type Writer = FramedWriter<DuplexStream>;

    fn lanes(&self) -> Lanes {
        self.framed.lanes()
    }

    fn peer(&self) -> PeerInfo {
        self.framed.peer()
    }

    fn split(self) -> (Self::Reader, Self::Writer) {
        self.framed.split()
    }
}

/// Two ends of a conduit with many lanes: each lane keeps its order, and frames of different lanes are delivered in an
/// order that `seed` decides, given the same order of polls. Each direction holds at most `capacity` bytes, or one frame
/// that is larger.
pub fn reordering(seed: u64, capacity: usize) -> (ReorderingConduit, ReorderingConduit) {
    // Different seeds for the two directions, or both would shuffle alike.
    let right = Arc::new(Mutex::new(Pipe::new(Random::new(seed), capacity)));
    let left = Arc::new(Mutex::new(Pipe::new(Random::new(!seed), capacity)));
    (ReorderingConduit::new(left.clone(), right.clone(), "right"), ReorderingConduit::new(right, left, "left"))
}

/// One end of what [`reordering`] makes.
#[derive(Debug)]
pub struct ReorderingConduit {
    /// The halves exist from the start, so that a conduit dropped before it is split is noticed too.
    reader: ReorderingReader,
    writer: ReorderingWriter,
    name: &'static str,
}

impl ReorderingConduit {
    fn new(inbound: Arc<Mutex<Pipe>>, outbound: Arc<Mutex<Pipe>>, name: &'static str) -> Self {
        let reader = ReorderingReader { pipe: inbound, max_frame: HANDSHAKE_MAX_FRAME, failed: false };
        let writer = ReorderingWriter {
            pipe: outbound,
            queue: VecDeque::new(),
            buffered: 0,
            written: 0,
            max_frame: usize::MAX,
            state: WriteState::Open,
        };
        Self { reader, writer, name }
    }
}

impl Conduit for ReorderingConduit {
    type Reader = ReorderingReader;
    type Writer = ReorderingWriter;

    fn lanes(&self) -> Lanes {
        Lanes::PerConnection
    }

    fn peer(&self) -> PeerInfo {
        PeerInfo::new("memory", self.name)
    }

    fn split(self) -> (Self::Reader, Self::Writer) {
        (self.reader, self.writer)
    }
}

/// How often in a row the reader may hold frames back that it could deliver: enough for later lanes to overtake, and
/// few enough that nothing waits for long.
const MAX_HOLDS: u8 = 3;

/// One direction: the frames that were written and not yet delivered.
#[derive(Debug)]
struct Pipe {
    /// Lanes that have frames waiting. None of the queues is empty, so `capacity` bounds their number too.
    lanes: Vec<(Lane, VecDeque<Bytes>)>,
    /// Bytes in `lanes`, each frame with the length prefix that it would have on the wire, so that small frames count.
    bytes: usize,
    capacity: usize,
    random: Random,
    holds: u8,
    writer_gone: bool,
    reader_gone: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

impl Pipe {
    fn new(random: Random, capacity: usize) -> Self {
        Self {
            lanes: Vec::new(),
            bytes: 0,
            capacity,
            random,
            holds: 0,
            writer_gone: false,
            reader_gone: false,
            reader: None,
            writer: None,
        }
    }

    fn has_room(&self, cost: usize) -> bool {
        self.bytes == 0 || self.bytes.saturating_add(cost) <= self.capacity
    }

    fn push(&mut self, lane: Lane, frame: Bytes) {
        self.bytes += cost(&frame);
        match self.lanes.iter_mut().find(|(known, _)| *known == lane) {
            Some((_, frames)) => frames.push_back(frame),
            None => self.lanes.push((lane, VecDeque::from([frame]))),
        }
    }

    /// Whether to let the writer go on before anything is delivered, which is what makes lanes overtake each other even
    /// if the reader is always in time.
    fn holds_back(&mut self) -> bool {
        let hold = self.holds < MAX_HOLDS && self.random.below(2) == 0;
        self.holds = if hold { self.holds + 1 } else { 0 };
        hold
    }

    /// The lane whose frame comes next; `lanes` must not be empty.
    fn choose(&mut self) -> usize {
        self.random.below(self.lanes.len())
    }

    fn take(&mut self, index: usize) -> Option<(Lane, Bytes)> {
        let (lane, frames) = self.lanes.get_mut(index)?;
        let (lane, frame) = (*lane, frames.pop_front()?);
        if frames.is_empty() {
            self.lanes.swap_remove(index);
        }
        self.bytes -= cost(&frame);
        Some((lane, frame))
    }
}

fn cost(frame: &Bytes) -> usize {
    frame.len() + LENGTH_BYTES
}

/// Wakes outside the lock, since a waker may run anything.
fn wake(waker: Option<Waker>) {
    if let Some(waker) = waker {
        waker.wake();
    }
}

/// The receiving half of a [`ReorderingConduit`].
#[derive(Debug)]
pub struct ReorderingReader {
    pipe: Arc<Mutex<Pipe>>,
    max_frame: usize,
    failed: bool,
}

impl FrameReader for ReorderingReader {
    fn poll_recv(
        &mut self,
        cx: &mut Context<'_>,
        frames: &mut Vec<(Lane, Bytes)>,
    ) -> Poll<Result<Received, ConduitError>> {
        if self.failed {
            return Poll::Ready(Err(ConduitError::Closed));
        }
        let mut pipe = self.pipe.lock();
        if pipe.lanes.is_empty() {
            if pipe.writer_gone {
                return Poll::Ready(Ok(Received::End));
            }
            pipe.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        if !pipe.writer_gone && pipe.holds_back() {
            drop(pipe);
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        // Only some of what is there: the rest mixes with what the writer adds before the next poll.
        let (available, mut taken) = (pipe.bytes, 0);
        let upto = 1 + pipe.random.below(available);
        while taken < upto && !pipe.lanes.is_empty() {
            let index = pipe.choose();
            let length = pipe.lanes[index].1.front().map_or(0, Bytes::len);
            if let Err(error) = check_length(length, self.max_frame) {
                if taken > 0 {
                    break;
                }
                self.failed = true;
                return Poll::Ready(Err(error.into()));
            }
            let Some((lane, frame)) = pipe.take(index) else { break };
            taken += cost(&frame);
            frames.push((lane, frame));
        }
        let writer = pipe.writer.take();
        drop(pipe);
        wake(writer);
        Poll::Ready(Ok(Received::Frames))
    }

    fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.failed = true;
        let mut pipe = self.pipe.lock();
        pipe.lanes.clear();
        pipe.bytes = 0;
        let writer = pipe.writer.take();
        let gone = pipe.writer_gone;
        if !gone {
            pipe.reader = Some(cx.waker().clone());
        }
        drop(pipe);
        wake(writer);
        if gone { Poll::Ready(()) } else { Poll::Pending }
    }

    fn set_max_frame(&mut self, bytes: usize) {
        self.max_frame = bytes;
    }
}

impl Drop for ReorderingReader {
    fn drop(&mut self) {
        let mut pipe = self.pipe.lock();
        pipe.reader_gone = true;
        pipe.lanes.clear();
        pipe.bytes = 0;
        let writer = pipe.writer.take();
        drop(pipe);
        wake(writer);
    }
}

#[derive(Debug)]
enum WriteState {
    Open,
    Closed,
    Failed(Option<ConduitError>),
}

/// The sending half of a [`ReorderingConduit`].
#[derive(Debug)]
pub struct ReorderingWriter {
    pipe: Arc<Mutex<Pipe>>,
    queue: VecDeque<(Lane, Bytes)>,
    buffered: usize,
    written: u64,
    max_frame: usize,
    state: WriteState,
}

impl ReorderingWriter {
    fn fail(&mut self, error: Option<ConduitError>) {
        self.queue.clear();
        self.buffered = 0;
        self.state = WriteState::Failed(error);
    }

    /// Moves frames into the pipe while it has room.
    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConduitError>> {
        if let WriteState::Failed(cause) = &mut self.state {
            return Poll::Ready(Err(cause.take().unwrap_or(ConduitError::Closed)));
        }
        let mut pipe = self.pipe.lock();
        if pipe.reader_gone && !self.queue.is_empty() {
            drop(pipe);
            self.fail(None);
            return Poll::Ready(Err(ConduitError::Io(std::io::ErrorKind::BrokenPipe.into())));
        }
        let mut moved = false;
        while let Some((_, frame)) = self.queue.front()
            && pipe.has_room(cost(frame))
        {
            let Some((lane, frame)) = self.queue.pop_front() else { break };
            self.buffered -= cost(&frame);
            self.written += cost(&frame) as u64;
            pipe.push(lane, frame);
            moved = true;
        }
        if !self.queue.is_empty() {
            pipe.writer = Some(cx.waker().clone());
        }
        let reader = pipe.reader.take_if(|_| moved);
        drop(pipe);
        wake(reader);
        if self.queue.is_empty() { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    fn leave(&self) {
        let mut pipe = self.pipe.lock();
        pipe.writer_gone = true;
        let reader = pipe.reader.take();
        drop(pipe);
        wake(reader);
    }
}

impl FrameWriter for ReorderingWriter {
    fn start_send(&mut self, frame: Transmit) {
        if !matches!(self.state, WriteState::Open) {
            return;
        }
        if let Err(error) = check_length(frame.len(), self.max_frame) {
            return self.fail(Some(error.into()));
        }
        let mut body = BytesMut::with_capacity(frame.len());
        body.extend_from_slice(&frame.head);
        body.extend_from_slice(&frame.payload);
        let body = body.freeze();
        self.buffered += cost(&body);
        self.queue.push_back((frame.lane, body));
    }

    fn buffered(&self) -> usize {
        self.buffered
    }

    fn written(&self) -> u64 {
        self.written
    }

    fn set_max_frame(&mut self, bytes: usize) {
        self.max_frame = bytes;
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConduitError>> {
        match self.state {
            // Closed, but not yet flushed, still flushes.
            WriteState::Closed if self.queue.is_empty() => Poll::Ready(Err(ConduitError::Closed)),
            _ => self.poll_drain(cx),
        }
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConduitError>> {
        if matches!(self.state, WriteState::Open) {
            self.state = WriteState::Closed;
        }
        let drained = self.poll_drain(cx);
        if matches!(drained, Poll::Ready(Ok(()))) {
            self.leave();
        }
        drained
    }
}

impl Drop for ReorderingWriter {
    fn drop(&mut self) {
        self.leave();
    }
}

/// Marsaglia's xorshift64: a few shifts, good enough to shuffle, and the same on every machine and in every version,
/// so that a seed which found a fault finds it again. Not for secrets.
#[derive(Debug)]
struct Random(u64);

impl Random {
    fn new(seed: u64) -> Self {
        // Spread neighbouring seeds apart (the odd constant is 2^64 / φ); zero would stay zero for ever.
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15).max(1))
    }

    /// A number below `bound`, or 0 if that is 0.
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        // The high bits are the better ones. The remainder's bias is of no concern for shuffling.
        ((self.0 >> 16) as usize).checked_rem(bound).unwrap_or(0)
    }
}

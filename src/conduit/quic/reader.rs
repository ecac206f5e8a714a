//! The receiving half: accepts the peer's streams, and cuts frames out of all that have bytes.
//!
//! Most lanes are idle or carry small frames, so they have no buffer: bytes are read into a block that all share, and
//! only what is left of a frame stays with its lane.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use quinn::{ConnectionError, ReadError, RecvStream, SendStream, VarInt};
use rustc_hash::FxHashMap;
use tokio_util::io::poll_read_buf;
use tokio_util::sync::ReusableBoxFuture;
use tollway_protocol::error::{Reason, code};
use tollway_protocol::frame::FrameDecoder;
use tollway_protocol::id::ConnectionId;
use tollway_protocol::message::{Close, encode_head};
use tollway_protocol::metadata::Metadata;

use super::ready::{LaneWaker, ReadyLanes};
use super::shared::{self, Shared};
use super::{FIRST_STREAMS, LANE_WINDOW, MAX_CONNECTION_WINDOW, MAX_STREAMS};
use crate::conduit::{ConduitError, FrameReader, HANDSHAKE_MAX_FRAME, Lane, Received};

/// Bytes of the block that lanes share, and of a read into a lane's own buffer.
const BLOCK: usize = 64 * 1024;

/// The same for a lane whose reads are full: a bulk transfer has fewer frames cut by a block's end.
const LARGE_BLOCK: usize = 256 * 1024;

/// Free bytes below which a buffer gets more room.
const MIN_SPARE: usize = 4 * 1024;

/// Bytes read in one poll, so that a fast peer leaves the driver time for its other work.
const READ_BUDGET: usize = 256 * 1024;

/// Frames delivered by one poll, for the same reason.
const FRAMES_PER_POLL: usize = 1024;

/// Streams accepted in one poll, for the same reason.
const ACCEPTS_PER_POLL: usize = 256;

/// The longest lane number at the start of a stream.
const MAX_PREFIX: usize = 10;

type Accepted = Result<(SendStream, RecvStream), ConnectionError>;

/// Receives frames from the streams of a QUIC connection.
#[derive(Debug)]
pub struct QuicReader {
    shared: Arc<Shared>,
    accepting: ReusableBoxFuture<'static, Accepted>,
    lanes: FxHashMap<u64, LaneIn>,
    next_key: u64,
    /// Streams of the peer's that are open, and how many it may have open.
    accepted: u64,
    allowed: u64,
    ready: Arc<ReadyLanes>,
    /// Keys of lanes to look at, in turn.
    turn: VecDeque<u64>,
    block: BytesMut,
    decoder: FrameDecoder,
    state: ReadState,
}

/// ```text
/// Open ──lane 0 ends──▶ Ending ──nothing left in any lane──▶ End
///   ├──the connection is lost──▶ Lost ──nothing left──▶ End or Failed
///   └──a bad frame──▶ Failed
/// ```
#[derive(Debug)]
enum ReadState {
    Open,
    /// The peer has sent its last: what it had sent before on other lanes is here, but perhaps not looked at.
    Ending,
    /// The connection is lost; what had arrived is still delivered.
    Lost(ConnectionError),
    End,
    Failed,
}

/// The receiving half of one stream.
#[derive(Debug)]
struct LaneIn {
    recv: RecvStream,
    /// Known once the first bytes of a stream of the peer's are there.
    lane: Option<Lane>,
    /// The other half of a stream of the peer's, until it is known whose it is.
    send: Option<SendStream>,
    is_peers: bool,
    /// Whether anything came: a stream that the peer opened its own instead of carries nothing.
    is_used: bool,
    buffer: BytesMut,
    block: usize,
    waker: Waker,
}

/// What reading from one lane led to.
enum Turn {
    /// There may be more.
    More,
    /// What is in front must be delivered first.
    Later,
    /// It waits.
    Waits,
    /// It has ended, on a frame boundary or not, or was reset with a code.
    Ended {
        truncated: bool,
        reset: Option<u32>,
    },
    Lost(ConnectionError),
    Failed(ConduitError),
}

impl QuicReader {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        let accepting = ReusableBoxFuture::new(accept(shared.connection.clone()));
        Self {
            shared,
            accepting,
            lanes: FxHashMap::default(),
            next_key: 0,
            accepted: 0,
            allowed: FIRST_STREAMS,
            ready: Arc::default(),
            turn: VecDeque::new(),
            block: BytesMut::new(),
            decoder: FrameDecoder::new(HANDSHAKE_MAX_FRAME),
            state: ReadState::Open,
        }
    }

    fn insert(&mut self, recv: RecvStream, send: Option<SendStream>, lane: Option<Lane>) {
        let key = self.next_key;
        self.next_key += 1;
        let is_peers = send.is_some();
        let waker = LaneWaker::new(key, &self.ready).into();
        let buffer = BytesMut::new();
        self.lanes.insert(key, LaneIn { recv, lane, send, is_peers, is_used: false, buffer, block: BLOCK, waker });
        self.turn.push_back(key);
        // With each lane in use, up to a limit, the connection as a whole may have more on its way, so that one lane that
        // waits for a lost packet leaves the others room. [conduit.quic.windows]
        let window = (self.lanes.len() as u64 + 1) * LANE_WINDOW;
        if window <= MAX_CONNECTION_WINDOW {
            self.shared.connection.set_receive_window(varint(window));
        }
    }

    /// Takes in new streams: those that the writer has opened, and those of the peer.
    fn poll_streams(&mut self, cx: &mut Context<'_>) {
        for (lane, recv) in self.shared.take_opened(cx.waker()) {
            self.insert(recv, None, Some(lane));
        }
        for _ in 0..ACCEPTS_PER_POLL {
            if !matches!(self.state, ReadState::Open | ReadState::Ending) {
                return;
            }
            match self.accepting.poll(cx) {
                Poll::Pending => return,
                Poll::Ready(Ok((send, recv))) => {
                    self.accepting.set(accept(self.shared.connection.clone()));
                    self.accepted += 1;
                    self.insert(recv, Some(send), None);
                    self.allow_more();
                }
                Poll::Ready(Err(error)) => return self.lose(error),
            }
        }
        // There may be more, and nobody else would wake us for them.
        cx.waker().wake_by_ref();
    }

    /// The peer may have twice as many streams open as it has: the session's own limits are what bounds its connections,
    /// and each stream that may come costs memory from the start. `[conduit.quic.streams]`
    fn allow_more(&mut self) {
        if self.accepted * 2 > self.allowed && self.allowed < MAX_STREAMS {
            self.allowed = (self.allowed * 2).min(MAX_STREAMS);
            self.shared.connection.set_max_concurrent_bi_streams(varint(self.allowed));
        }
    }

    /// Looks at the lanes that have something, in turn, and returns how many bytes came.
    fn poll_lanes(&mut self, cx: &mut Context<'_>, frames: &mut Vec<(Lane, Bytes)>) -> Result<usize, ConduitError> {
        self.poll_streams(cx);
        self.ready.take(cx, &mut self.turn);
        let mut taken = 0;
        while taken < READ_BUDGET && frames.len() < FRAMES_PER_POLL {
            let Some(key) = self.turn.pop_front() else { break };
            let (turn, read) = self.read(key, frames, READ_BUDGET - taken);
            taken += read;
            match turn {
                Turn::More => self.turn.push_back(key),
                Turn::Later => {
                    self.turn.push_front(key);
                    break;
                }
                Turn::Waits => {}
                Turn::Ended { truncated, reset } => self.end_lane(key, truncated, reset, frames),
                Turn::Lost(error) => self.lose(error),
                Turn::Failed(error) => {
                    self.turn.push_front(key);
                    return Err(error);
                }
            }
        }
        Ok(taken)
    }

    fn lose(&mut self, error: ConnectionError) {
        if matches!(self.state, ReadState::Open) {
            self.state = ReadState::Lost(error);
        }
    }

    /// Gives one lane its turn.
    fn read(&mut self, key: u64, frames: &mut Vec<(Lane, Bytes)>, budget: usize) -> (Turn, usize) {
        let Some(lane) = self.lanes.get_mut(&key) else { return (Turn::Waits, 0) };
        let is_shared = lane.buffer.is_empty();
        let mut buffer = std::mem::take(if is_shared { &mut self.block } else { &mut lane.buffer });
        let (turn, read) = lane.read(&mut buffer, &self.decoder, budget);
        let decoded = decode(lane, &mut buffer, &mut self.decoder, frames);
        if let (Some(known), Some(send)) = (lane.lane, lane.send.take_if(|_| lane.lane.is_some())) {
            self.shared.put_accepted(known, send);
        }
        if is_shared {
            lane.buffer = if buffer.is_empty() { BytesMut::new() } else { BytesMut::from(&buffer[..]) };
            buffer.clear();
            self.block = buffer;
        } else {
            // An idle lane keeps no memory.
            lane.buffer = if buffer.is_empty() { BytesMut::new() } else { buffer };
        }
        match (decoded, turn) {
            (Err(error), _) => (Turn::Failed(error), read),
            // What is left to decode goes before whatever is next; an end or an error is found again.
            (Ok(true), _) => (Turn::Later, read),
            (Ok(false), Turn::Ended { reset, .. }) => (Turn::Ended { truncated: !lane.buffer.is_empty(), reset }, read),
            (Ok(false), turn) => (turn, read),
        }
    }

    /// A stream that has ended is forgotten; one that ended in the middle stands for a Close of its connection.
    fn end_lane(&mut self, key: u64, truncated: bool, reset: Option<u32>, frames: &mut Vec<(Lane, Bytes)>) {
        let Some(lane) = self.lanes.remove(&key) else { return };
        self.accepted -= u64::from(lane.is_peers);
        let broken = reset.or(truncated.then_some(code::DROPPED));
        match (lane.lane, broken) {
            // The peer has a stream of its own for this lane, or nobody knows whose it was.
            (_, Some(_)) if !lane.is_used => {}
            (None, _) => {}
            (Some(Lane::ROOT), None) => {
                if matches!(self.state, ReadState::Open) {
                    self.state = ReadState::Ending;
                    // Whatever the peer sent before has arrived: one look at each lane finds it.
                    self.turn = self.lanes.keys().copied().collect();
                }
            }
            (Some(Lane::ROOT), Some(code)) => {
                frames
                    .push((Lane::ROOT, close(Lane::ROOT, Reason::new(code, "the peer reset the session's own lane"))));
            }
            // [conduit.quic.reset]
            (Some(lane), Some(code)) => frames.push((lane, close(lane, Reason::new(code, "the peer reset the lane")))),
            (Some(_), None) => {}
        }
    }

    /// What to say when no lane has anything left.
    fn verdict(&mut self, frames: &mut Vec<(Lane, Bytes)>) -> Poll<Result<Received, ConduitError>> {
        match std::mem::replace(&mut self.state, ReadState::Failed) {
            ReadState::Ending | ReadState::End => {
                self.state = ReadState::End;
                Poll::Ready(Ok(Received::End))
            }
            ReadState::Lost(ConnectionError::ApplicationClosed(closed)) => {
                self.state = ReadState::End;
                let code = shared::code(closed.error_code);
                if code == code::NONE {
                    return Poll::Ready(Ok(Received::End));
                }
                // The last words were lost; the connection's close says the same. [conduit.quic.close]
                let reason = Reason::new(code, String::from_utf8_lossy(&closed.reason));
                frames.push((Lane::ROOT, close(Lane::ROOT, reason)));
                Poll::Ready(Ok(Received::Frames))
            }
            ReadState::Lost(error) => Poll::Ready(Err(self.shared.lost(&error))),
            state => {
                self.state = state;
                Poll::Pending
            }
        }
    }
}

impl LaneIn {
    /// Reads once into `buffer`.
    fn read(&mut self, buffer: &mut BytesMut, decoder: &FrameDecoder, budget: usize) -> (Turn, usize) {
        let missing = decoder.reserve_hint(buffer);
        let used = buffer.len();
        if buffer.capacity() - used < missing.max(MIN_SPARE) {
            let room = missing.max(self.block.saturating_sub(used)).max(MIN_SPARE);
            // The block is used again if all its frames are gone; otherwise a fresh one takes over what is left.
            if !buffer.try_reclaim(room) {
                let mut fresh = BytesMut::with_capacity(used + room);
                fresh.extend_from_slice(buffer);
                *buffer = fresh;
            }
        }
        let room = (buffer.capacity() - used).min(budget);
        let cx = &mut Context::from_waker(&self.waker);
        match poll_read_buf(Pin::new(&mut self.recv), cx, &mut (&mut *buffer).limit(room)) {
            Poll::Pending => (Turn::Waits, 0),
            Poll::Ready(Ok(0)) => (Turn::Ended { truncated: false, reset: None }, 0),
            Poll::Ready(Ok(read)) => {
                self.is_used = true;
                self.block = if read == room { LARGE_BLOCK } else { BLOCK };
                (Turn::More, read)
            }
            Poll::Ready(Err(error)) => (ended(error), 0),
        }
    }
}

fn ended(error: io::Error) -> Turn {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<ReadError>()) {
        Some(ReadError::Reset(code)) => Turn::Ended { truncated: false, reset: Some(shared::code(*code)) },
        Some(ReadError::ConnectionLost(error)) => Turn::Lost(error.clone()),
        _ => Turn::Failed(ConduitError::Io(error)),
    }
}

/// Cuts the whole frames out of the buffer; `true` when what is left must wait for the next poll.
fn decode(
    lane: &mut LaneIn,
    buffer: &mut BytesMut,
    decoder: &mut FrameDecoder,
    frames: &mut Vec<(Lane, Bytes)>,
) -> Result<bool, ConduitError> {
    let number = match lane.lane {
        Some(number) => number,
        None => match take_prefix(buffer)? {
            None => return Ok(false),
            Some(number) => *lane.lane.insert(number),
        },
    };
    while frames.len() < FRAMES_PER_POLL {
        match decoder.decode(buffer) {
            Ok(Some(frame)) => frames.push((number, frame)),
            // A bad length behind good frames is found again by the next poll, under the limit of that time.
            Err(error) if frames.is_empty() => return Err(error.into()),
            Err(_) => return Ok(true),
            Ok(None) => return Ok(false),
        }
    }
    Ok(true)
}

/// The lane number at the start of a stream. `[conduit.quic.lane]`
fn take_prefix(buffer: &mut BytesMut) -> Result<Option<Lane>, ConduitError> {
    let (mut number, mut shift) = (0_u64, 0);
    for (at, byte) in buffer.iter().take(MAX_PREFIX).enumerate() {
        let bits = u64::from(byte & 0x7f);
        let overflows = shift >= 64 || (bits << shift) >> shift != bits;
        let padded = at > 0 && *byte == 0;
        if overflows || padded {
            break;
        }
        number |= bits << shift;
        shift += 7;
        if byte & 0x80 == 0 {
            buffer.advance(at + 1);
            return Ok(Some(Lane(number)));
        }
        if at + 1 == buffer.len() && at + 1 < MAX_PREFIX {
            return Ok(None);
        }
    }
    match buffer.is_empty() {
        true => Ok(None),
        false => {
            Err(ConduitError::Io(io::Error::new(io::ErrorKind::InvalidData, "a stream begins with no lane number")))
        }
    }
}

/// A Close as the peer could have sent it.
fn close(lane: Lane, reason: Reason) -> Bytes {
    let close = Close { connection: ConnectionId(lane.0), reason: reason.into(), metadata: Metadata::new() };
    Bytes::copy_from_slice(&encode_head(&close))
}

async fn accept(connection: quinn::Connection) -> Accepted {
    connection.accept_bi().await
}

/// Our own numbers are far below the limit of QUIC's.
fn varint(number: u64) -> VarInt {
    VarInt::from_u64(number).unwrap_or(VarInt::MAX)
}

impl FrameReader for QuicReader {
    fn poll_recv(
        &mut self,
        cx: &mut Context<'_>,
        frames: &mut Vec<(Lane, Bytes)>,
    ) -> Poll<Result<Received, ConduitError>> {
        match self.state {
            ReadState::End => return Poll::Ready(Ok(Received::End)),
            ReadState::Failed => return Poll::Ready(Err(ConduitError::Closed)),
            _ => {}
        }
        let already = frames.len();
        loop {
            let was_open = matches!(self.state, ReadState::Open);
            let mut found = Vec::new();
            let polled = self.poll_lanes(cx, &mut found);
            frames.append(&mut found);
            return match polled {
                _ if frames.len() > already => Poll::Ready(Ok(Received::Frames)),
                Err(error) => {
                    self.state = ReadState::Failed;
                    Poll::Ready(Err(error))
                }
                Ok(1..) => Poll::Ready(Ok(Received::Progress)),
                Ok(0) if !self.turn.is_empty() => continue,
                // What came in while the lanes were looked at is looked for once more before all is over.
                Ok(0) if was_open && !matches!(self.state, ReadState::Open) => continue,
                Ok(0) => self.verdict(frames),
            };
        }
    }

    fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        // After an error there is nothing to wait for: unread bytes cannot destroy what was written here.
        let mut unread = Vec::new();
        loop {
            match self.poll_recv(cx, &mut unread) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(Received::End) | Err(_)) => return Poll::Ready(()),
                Poll::Ready(Ok(_)) => unread.clear(),
            }
        }
    }

    fn set_max_frame(&mut self, bytes: usize) {
        self.decoder.set_max_frame(bytes);
    }
}

//! The sending half: a queue for each lane, from which QUIC takes what its flow control lets through.
//!
//! A lane that QUIC takes nothing more from is *blocked*. What waits in it does not count as ahead of the driver, and the
//! driver asks the session for no more of its frames: so a lane that stands still delays no other, and holds little more
//! than the frame that it stands at.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker, ready};

use bytes::{Bytes, BytesMut};
use quinn::{ConnectionError, RecvStream, SendStream, WriteError};
use rustc_hash::FxHashMap;
use tollway_protocol::error::{Reason, code};
use tollway_protocol::frame::check_length;
use tollway_protocol::message::{Header, Payment};

use super::ready::{LaneWaker, ReadyLanes};
use super::shared::Shared;
use crate::conduit::outbuf::COPY_BELOW;
use crate::conduit::{ConduitError, FrameWriter, Lane, Transmit};
use crate::future::BoxFuture;

/// Chunks given to QUIC at once.
const MAX_CHUNKS: usize = 64;

/// Bytes that may wait in blocked lanes before the driver is to stop: one frame in each of hundreds of lanes. Only a peer
/// that reads none of hundreds of lanes gets there.
const MAX_BLOCKED: usize = 32 * 1024 * 1024;

/// Ended streams whose last bytes may not have arrived, which a close waits for.
const MAX_ENDED: usize = 1024;

/// Lane 0 goes before all data, and so does a lane with a payment. `[conduit.quic.priority]`
const CONTROL: i32 = 2;
const PAYMENT: i32 = 1;
const DATA: i32 = 0;

type Opened = Result<(SendStream, RecvStream), ConnectionError>;

/// Sends frames on the streams of a QUIC connection.
pub struct QuicWriter {
    shared: Arc<Shared>,
    lanes: FxHashMap<u64, LaneOut>,
    ready: Arc<ReadyLanes>,
    /// Lanes with something to write, each once.
    turn: VecDeque<u64>,
    /// Lanes that wait for a stream, in the order of their first frames.
    to_open: VecDeque<u64>,
    opening: Option<BoxFuture<'static, Opened>>,
    /// Lanes that were blocked and are empty again.
    unblocked: Vec<u64>,
    /// Streams that were ended, the oldest first.
    ended: VecDeque<SendStream>,
    buffered: usize,
    blocked: usize,
    written: u64,
    max_frame: usize,
    state: WriteState,
}

/// ```text
/// Open ──poll_close──▶ Flushing ──all written──▶ Ending ──all but lane 0 arrived──▶ Last ──lane 0 arrived──▶ Closed
///   └───── error ─────────┴────▶ Failed(cause) ──reported──▶ Failed(none)
/// ```
enum WriteState {
    Open,
    Flushing,
    Ending(Vec<BoxFuture<'static, ()>>),
    Last(BoxFuture<'static, ()>),
    Closed,
    Failed(Option<ConduitError>),
}

/// The sending half of one lane.
struct LaneOut {
    stream: Option<SendStream>,
    chunks: VecDeque<Bytes>,
    /// Small pieces, to be one chunk.
    copied: BytesMut,
    bytes: usize,
    /// QUIC has refused more, or there is no stream yet.
    is_blocked: bool,
    /// It was blocked and has not got rid of all that it held then.
    is_behind: bool,
    /// Nothing will follow.
    ends: bool,
    in_turn: bool,
    priority: i32,
    waker: Waker,
}

impl std::fmt::Debug for QuicWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("QuicWriter").field("lanes", &self.lanes.len()).field("buffered", &self.buffered).finish()
    }
}

impl QuicWriter {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            lanes: FxHashMap::default(),
            ready: Arc::default(),
            turn: VecDeque::new(),
            to_open: VecDeque::new(),
            opening: None,
            unblocked: Vec::new(),
            ended: VecDeque::new(),
            buffered: 0,
            blocked: 0,
            written: 0,
            max_frame: usize::MAX,
            state: WriteState::Open,
        }
    }

    /// The lane, which begins here if nobody has begun it.
    fn lane(&mut self, lane: Lane) -> &mut LaneOut {
        if !self.lanes.contains_key(&lane.0) {
            self.take_accepted();
        }
        if !self.lanes.contains_key(&lane.0) {
            let mut out = LaneOut::new(lane, None, &self.ready);
            put_prefix(&mut out.copied, lane.0);
            out.bytes = out.copied.len();
            (out.is_blocked, out.is_behind) = (true, true);
            self.buffered += out.bytes;
            self.blocked += out.bytes;
            self.to_open.push_back(lane.0);
            self.lanes.insert(lane.0, out);
        }
        self.lanes.get_mut(&lane.0).expect("it was found or made")
    }

    /// Takes over the streams that the peer has opened.
    fn take_accepted(&mut self) {
        for (lane, mut stream) in self.shared.take_accepted() {
            if self.lanes.contains_key(&lane.0) {
                // Both have opened it at the same time, and each sends on its own. Fails only for a connection that is
                // lost, which is noticed elsewhere.
                let _ = stream.reset(code::NONE.into());
                continue;
            }
            let _ = stream.set_priority(if lane == Lane::ROOT { CONTROL } else { DATA });
            self.lanes.insert(lane.0, LaneOut::new(lane, Some(stream), &self.ready));
        }
    }

    /// Opens streams for the lanes that wait for one.
    fn poll_open(&mut self, cx: &mut Context<'_>) -> Result<(), ConnectionError> {
        while let Some(&key) = self.to_open.front() {
            let opened = match &mut self.opening {
                Some(opening) => opening.as_mut().poll(cx),
                // As a rule the peer allows it, and then nothing is put on the heap.
                None => pin!(self.shared.connection.open_bi()).poll(&mut Context::from_waker(Waker::noop())),
            };
            let (send, recv) = match opened {
                Poll::Ready(opened) => opened?,
                Poll::Pending if self.opening.is_some() => return Ok(()),
                Poll::Pending => {
                    let connection = self.shared.connection.clone();
                    self.opening = Some(Box::pin(async move { connection.open_bi().await }));
                    continue;
                }
            };
            self.opening = None;
            self.to_open.pop_front();
            let Some(out) = self.lanes.get_mut(&key) else { continue };
            let _lost = send.set_priority(out.priority);
            out.stream = Some(send);
            self.shared.put_opened(Lane(key), recv);
            out.is_blocked = false;
            self.blocked -= out.bytes;
            schedule(&mut self.turn, out, key);
        }
        Ok(())
    }

    /// Writes what each lane that is not blocked has.
    fn poll_lanes(&mut self, cx: &mut Context<'_>) -> Result<(), ConnectionError> {
        let mut woken = Vec::new();
        self.ready.take(cx, &mut woken);
        for key in woken {
            if let Some(out) = self.lanes.get_mut(&key)
                && out.is_blocked
                && out.stream.is_some()
            {
                out.is_blocked = false;
                self.blocked -= out.bytes;
                schedule(&mut self.turn, out, key);
            }
        }
        while let Some(key) = self.turn.pop_front() {
            let Some(out) = self.lanes.get_mut(&key) else { continue };
            out.in_turn = false;
            let before = out.bytes;
            let result = out.poll_write();
            let written = before - out.bytes;
            self.buffered -= written;
            self.written += written as u64;
            match result {
                Poll::Ready(Ok(())) if out.ends => self.end(key),
                Poll::Ready(Ok(())) if out.is_behind => {
                    out.is_behind = false;
                    self.unblocked.push(key);
                }
                Poll::Ready(Ok(())) => {}
                Poll::Pending => {
                    (out.is_blocked, out.is_behind) = (true, true);
                    self.blocked += out.bytes;
                }
                Poll::Ready(Err(WriteError::ConnectionLost(error))) => return Err(error),
                Poll::Ready(Err(_stopped)) if key == Lane::ROOT.0 => return Err(ConnectionError::LocallyClosed),
                // The peer takes nothing more on this lane: what was on its way is lost as by a Close of its own.
                Poll::Ready(Err(_stopped)) => self.forget(key),
            }
        }
        Ok(())
    }

    /// The lane is empty and nothing will follow.
    fn end(&mut self, key: u64) {
        let Some(LaneOut { stream: Some(mut stream), .. }) = self.lanes.remove(&key) else { return };
        // Fails only for one that the peer has stopped.
        let _ = stream.finish();
        self.ended.push_back(stream);
        if self.ended.len() > MAX_ENDED {
            // Those that have arrived need not be waited for; of the rest the oldest are left to QUIC.
            let mut noop = Context::from_waker(Waker::noop());
            self.ended.retain(|stream| pin!(stream.stopped()).poll(&mut noop).is_pending());
            let excess = self.ended.len().saturating_sub(MAX_ENDED / 2);
            self.ended.drain(..excess);
        }
    }

    fn forget(&mut self, key: u64) {
        if let Some(out) = self.lanes.remove(&key) {
            self.buffered -= out.bytes;
            self.blocked -= if out.is_blocked { out.bytes } else { 0 };
        }
    }

    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConnectionError>> {
        self.poll_open(cx)?;
        self.poll_lanes(cx)?;
        if self.buffered == 0 { Poll::Ready(Ok(())) } else { Poll::Pending }
    }

    fn fail(&mut self, error: ConduitError) {
        self.lanes.clear();
        self.turn.clear();
        self.to_open.clear();
        (self.buffered, self.blocked) = (0, 0);
        self.state = WriteState::Failed(Some(error));
    }

    /// What this call reports: the cause of the failure if it is new.
    fn failure(&mut self) -> Option<ConduitError> {
        match &mut self.state {
            WriteState::Failed(cause) => Some(cause.take().unwrap_or(ConduitError::Closed)),
            _ => None,
        }
    }

    fn lose(&mut self, error: &ConnectionError) -> ConduitError {
        self.fail(self.shared.lost(error));
        self.failure().unwrap_or(ConduitError::Closed)
    }

    /// Ends all lanes but the session's own.
    fn end_lanes(&mut self) -> Vec<BoxFuture<'static, ()>> {
        self.take_accepted();
        let keys: Vec<u64> = self.lanes.keys().copied().filter(|key| *key != Lane::ROOT.0).collect();
        keys.into_iter().for_each(|key| self.end(key));
        self.ended.drain(..).map(arrived).collect()
    }
}

/// Resolves when all bytes of an ended stream have arrived, or nobody wants them.
fn arrived(stream: SendStream) -> BoxFuture<'static, ()> {
    let stopped = stream.stopped();
    Box::pin(async move {
        // A connection that is lost meanwhile has nothing more to wait for.
        let _ = stopped.await;
    })
}

fn schedule(turn: &mut VecDeque<u64>, out: &mut LaneOut, key: u64) {
    if !std::mem::replace(&mut out.in_turn, true) {
        turn.push_back(key);
    }
}

impl LaneOut {
    fn new(lane: Lane, stream: Option<SendStream>, ready: &Arc<ReadyLanes>) -> Self {
        Self {
            stream,
            chunks: VecDeque::new(),
            copied: BytesMut::new(),
            bytes: 0,
            is_blocked: false,
            is_behind: false,
            ends: false,
            in_turn: false,
            priority: if lane == Lane::ROOT { CONTROL } else { DATA },
            waker: LaneWaker::new(lane.0, ready).into(),
        }
    }

    fn push(&mut self, length: u32, frame: Transmit) {
        let copied = if frame.payload.len() < COPY_BELOW { frame.payload.len() } else { 0 };
        self.copied.reserve(size_of_val(&length) + frame.head.len() + copied);
        self.copied.extend_from_slice(&length.to_le_bytes());
        self.copied.extend_from_slice(&frame.head);
        if copied == frame.payload.len() {
            self.copied.extend_from_slice(&frame.payload);
        } else {
            self.chunks.push_back(self.copied.split().freeze());
            self.chunks.push_back(frame.payload);
        }
    }

    fn set_priority(&mut self, priority: i32) {
        if self.priority < CONTROL && self.priority != priority {
            self.priority = priority;
            if let Some(stream) = &self.stream {
                // Fails only for one that the peer has stopped.
                let _ = stream.set_priority(priority);
            }
        }
    }

    /// Writes all, as far as QUIC takes it.
    fn poll_write(&mut self) -> Poll<Result<(), WriteError>> {
        let Some(stream) = &mut self.stream else { return Poll::Pending };
        if !self.copied.is_empty() {
            self.chunks.push_back(self.copied.split().freeze());
        }
        let cx = &mut Context::from_waker(&self.waker);
        while !self.chunks.is_empty() {
            let (front, _) = self.chunks.as_mut_slices();
            let end = front.len().min(MAX_CHUNKS);
            let written = ready!(pin!(stream.write_chunks(&mut front[..end])).poll(cx))?;
            self.chunks.drain(..written.chunks);
            self.bytes -= written.bytes;
        }
        self.copied = BytesMut::new();
        Poll::Ready(Ok(()))
    }
}

/// The lane number at the start of a stream. `[conduit.quic.lane]`
fn put_prefix(into: &mut BytesMut, mut lane: u64) {
    while lane > 0x7f {
        into.extend_from_slice(&[lane as u8 | 0x80]);
        lane >>= 7;
    }
    into.extend_from_slice(&[lane as u8]);
}

impl FrameWriter for QuicWriter {
    fn start_send(&mut self, frame: Transmit) {
        if !matches!(self.state, WriteState::Open) {
            return;
        }
        let length = match check_length(frame.len(), self.max_frame) {
            Ok(length) => length,
            Err(error) => return self.fail(error.into()),
        };
        let key = frame.lane.0;
        let bytes = size_of_val(&length) + frame.len();
        let is_payment = frame.head.first() == Some(&Payment::KIND);
        let out = self.lane(frame.lane);
        out.set_priority(if is_payment { PAYMENT } else { DATA });
        out.push(length, frame);
        out.bytes += bytes;
        let is_blocked = out.is_blocked;
        self.buffered += bytes;
        if is_blocked {
            self.blocked += bytes;
        } else if let Some(out) = self.lanes.get_mut(&key) {
            schedule(&mut self.turn, out, key);
        }
    }

    fn buffered(&self) -> usize {
        self.buffered
    }

    fn ahead(&self) -> usize {
        if self.blocked > MAX_BLOCKED { self.buffered } else { self.buffered - self.blocked }
    }

    fn is_blocked(&self, lane: Lane) -> bool {
        self.lanes.get(&lane.0).is_some_and(|out| out.is_behind)
    }

    fn next_unblocked(&mut self) -> Option<Lane> {
        self.unblocked.pop().map(Lane)
    }

    fn end_lane(&mut self, lane: Lane) {
        if lane == Lane::ROOT || !matches!(self.state, WriteState::Open) {
            return;
        }
        // One that the peer has opened and we have never sent on may still lie with the reader.
        if !self.lanes.contains_key(&lane.0) {
            self.take_accepted();
        }
        match self.lanes.get_mut(&lane.0) {
            Some(out) if out.bytes > 0 => out.ends = true,
            Some(_) => self.end(lane.0),
            None => {}
        }
    }

    fn start_close(&mut self, reason: &Reason) {
        self.shared.set_last_word(reason.clone());
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
        Poll::Ready(drained.map_err(|error| self.lose(&error)))
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConduitError>> {
        loop {
            if let Some(error) = self.failure() {
                return Poll::Ready(Err(error));
            }
            match &mut self.state {
                WriteState::Open => {
                    // The end of lane 0 is the end of this direction, so there must be one.
                    self.lane(Lane::ROOT);
                    self.state = WriteState::Flushing;
                }
                WriteState::Flushing => {
                    if let Err(error) = ready!(self.poll_drain(cx)) {
                        return Poll::Ready(Err(self.lose(&error)));
                    }
                    self.state = WriteState::Ending(self.end_lanes());
                }
                // When lane 0 ends, everything else has arrived: its reader need not wait. [conduit.quic.end]
                WriteState::Ending(unarrived) => {
                    unarrived.retain_mut(|arrived| arrived.as_mut().poll(cx).is_pending());
                    if !unarrived.is_empty() {
                        return Poll::Pending;
                    }
                    let Some(LaneOut { stream: Some(mut root), .. }) = self.lanes.remove(&Lane::ROOT.0) else {
                        self.state = WriteState::Closed;
                        continue;
                    };
                    // Fails only for one that the peer has stopped.
                    let _ = root.finish();
                    self.state = WriteState::Last(arrived(root));
                }
                // Whoever drops the conduit now cuts nothing off.
                WriteState::Last(arrived) => {
                    ready!(Pin::new(arrived).poll(cx));
                    self.state = WriteState::Closed;
                }
                WriteState::Closed => return Poll::Ready(Ok(())),
                // Said above.
                WriteState::Failed(_) => return Poll::Ready(Err(ConduitError::Closed)),
            }
        }
    }
}

impl Drop for QuicWriter {
    /// What was not closed in order is cut off: a lane that is dropped inside a frame is reset. `[conduit.quic.reset]`
    fn drop(&mut self) {
        self.take_accepted();
        for out in self.lanes.values_mut() {
            if let (Some(stream), true) = (&mut out.stream, out.bytes > 0) {
                // Fails only for one that the peer has stopped.
                let _ = stream.reset(code::DROPPED.into());
            }
        }
    }
}

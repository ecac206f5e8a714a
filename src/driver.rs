//! The driver: one task for each session that reads, dispatches and writes.
//!
//! It is one hand-written future, so that reading, writing and time are polled side by side and none waits for
//! another. It never awaits user code: events are settled under one short lock for each read batch, handlers run in
//! tasks of their own or are polled once inline under a guard.
//!
//! Writing is batched by nature: all that is there when the conduit takes bytes goes together. Where several calls are
//! in flight and little is pending, the driver lets the other tasks run once before it writes (a *smart cork*): their
//! frames share the write. It never does so for a stream or a lone call, which would only wait.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::time::Sleep;
use tollway_protocol::error::Violation;
use tollway_protocol::frame::Lane;
use tollway_protocol::limits::ConnectionLimits;
use tollway_protocol::session::Event;
use tollway_protocol::time::Time;

use crate::admission::Admission;
use crate::conduit::{ConduitError, FrameReader, FrameWriter, PeerInfo, Received};
use crate::handler::{Handler, ServedBody, respond};
use crate::rpc::{Aftermath, IncomingCall, Reply, RunAs, Services};
use crate::settle::{PendingCall, Work, settle};
use crate::shared::{LentStreams, Shared, State};

/// Bytes that are handed to the conduit ahead of its writes. One write of this size is 20 µs on loopback.
const WRITE_AHEAD: usize = 128 * 1024;
/// With less than this pending, several calls in flight are worth a wait for their neighbours.
const CORK_BELOW: usize = 16 * 1024;
/// Rounds before the driver lets other tasks run.
const ROUNDS_PER_POLL: u32 = 32;
/// How long the last words are given to reach the peer.
const LINGER: Duration = Duration::from_secs(2);

/// What a session serves and how.
pub(crate) struct Serving {
    pub(crate) services: Services,
    pub(crate) limits: ConnectionLimits,
    pub(crate) peer: Arc<PeerInfo>,
    /// Bytes of the largest frame that this side takes, from the handshake on.
    pub(crate) max_frame: usize,
    /// Who decides about a peer that says hello; without it everybody is welcome.
    pub(crate) admission: Option<Arc<Admission>>,
}

pub(crate) struct Driver<R, W> {
    shared: Arc<Shared>,
    serving: Serving,
    reader: R,
    writer: W,
    frames: Vec<(Lane, Bytes)>,
    events: VecDeque<Event>,
    replies: Vec<(ServedBody, Reply)>,
    sleep: Pin<Box<Sleep>>,
    sleep_until: Option<Time>,
    corked: bool,
    /// The conduit has not ended or failed.
    reading: bool,
    /// What the machine said under the last lock: whether frames should be read, and its deadline. Whatever changes
    /// them kicks the driver, which asks again in the round that it is woken for.
    wants_frames: bool,
    deadline: Option<Time>,
    stage: Stage,
}

/// What a look into the outbox led to.
enum Wrote {
    /// Nothing, on purpose: other tasks should run first.
    Corked,
    /// Something was taken or written.
    Some,
    /// There was nothing to do.
    Nothing,
}

enum Stage {
    Running,
    /// The machine has ended: the last words are written, then the peer's end is awaited.
    Closing {
        written: bool,
        until: Pin<Box<Sleep>>,
    },
    Done,
}

impl<R: FrameReader + Unpin, W: FrameWriter + Unpin> Driver<R, W> {
    pub(crate) fn new(shared: Arc<Shared>, serving: Serving, mut reader: R, mut writer: W) -> Self {
        // Before our Hello is sent: the answer and a first large frame may arrive together.
        reader.set_max_frame(serving.max_frame);
        writer.set_max_frame(usize::try_from(u32::MAX).unwrap_or(usize::MAX));
        let sleep = Box::pin(tokio::time::sleep(Duration::from_secs(3600)));
        Driver {
            shared,
            serving,
            reader,
            writer,
            frames: Vec::new(),
            events: VecDeque::new(),
            replies: Vec::new(),
            sleep,
            sleep_until: None,
            corked: false,
            reading: true,
            wants_frames: true,
            deadline: None,
            stage: Stage::Running,
        }
    }

    /// Reads what is there and hands it on. Returns whether anything happened.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.reading || !self.wants_frames {
            return false;
        }
        let mut violation = None;
        let lost = match self.reader.poll_recv(cx, &mut self.frames) {
            Poll::Pending => return false,
            Poll::Ready(Ok(Received::Frames | Received::Progress)) => None,
            Poll::Ready(Ok(Received::End)) => Some("the peer closed it without a last word".to_owned()),
            Poll::Ready(Err(ConduitError::Stranger(stranger))) => {
                self.writer.start_refusal(stranger);
                Some(stranger.to_string())
            }
            Poll::Ready(Err(error)) => {
                violation = broken_rule(&error);
                Some(error.to_string())
            }
        };
        self.reading = lost.is_none();
        let now = self.shared.now();
        let mut state = self.shared.lock();
        state.machine.handle_activity(now);
        for (lane, frame) in self.frames.drain(..) {
            state.machine.handle_frame(now, lane, frame);
        }
        // The peer is told which rule it broke; for what follows, the session has ended then.
        if let Some(violation) = violation {
            state.machine.handle_violation(violation);
        }
        if let Some(lost) = lost {
            state.machine.handle_conduit_lost(lost);
        }
        let work = settle(&self.shared, &self.serving, &mut self.events, state);
        self.finish(work, cx);
        true
    }

    /// Takes frames out of the machine and writes them.
    ///
    /// # Errors
    /// When the conduit is lost; the session has ended then.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Result<Wrote, ()> {
        let mut after = Aftermath::default();
        let mut taken = false;
        let now = self.shared.now();
        let mut state = self.shared.lock();
        let State { machine, streams, .. } = &mut *state;
        let cork = !self.corked && self.writer.buffered() == 0 && machine.call_count() > 1;
        if cork && machine.has_only_small_bodies(CORK_BELOW) {
            self.corked = true;
            return Ok(Wrote::Corked);
        }
        let mut lent = LentStreams { streams, after: &mut after };
        while self.writer.buffered() < WRITE_AHEAD {
            let Some(frame) = machine.poll_transmit(now, &mut lent) else { break };
            self.writer.start_send(frame);
            taken = true;
        }
        let events = machine.has_events();
        // Asked also while the conduit takes nothing: a peer that does not read must not be read without end, nor a
        // deadline that has passed be looked at for ever.
        (self.wants_frames, self.deadline) = (machine.wants_frames(), machine.poll_timeout());
        state.unkick();
        drop(state);
        self.corked = false;
        after.settle();
        if events {
            let state = self.shared.lock();
            let work = settle(&self.shared, &self.serving, &mut self.events, state);
            self.finish(work, cx);
        }
        let before = self.writer.written();
        if self.writer.buffered() > 0
            && let Poll::Ready(Err(error)) = self.writer.poll_flush(cx)
        {
            self.lose(&error, cx);
            return Err(());
        }
        let wrote = taken || events || self.writer.written() != before;
        Ok(if wrote { Wrote::Some } else { Wrote::Nothing })
    }

    fn lose(&mut self, error: &ConduitError, cx: &mut Context<'_>) {
        let mut state = self.shared.lock();
        state.machine.handle_conduit_lost(error.to_string());
        let work = settle(&self.shared, &self.serving, &mut self.events, state);
        self.finish(work, cx);
        self.stage = Stage::Done;
    }

    fn poll_time(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(deadline) = self.deadline else { return false };
        // Every byte that comes moves the keepalive's deadline away. The timer stays where it is and finds, when it
        // fires, that it is early: setting it anew for each read would cost more than the read's own bookkeeping.
        if self.sleep_until.is_none_or(|until| deadline < until) {
            self.sleep_until = Some(deadline);
            self.sleep.as_mut().reset(self.shared.instant(deadline));
            if self.sleep.as_mut().poll(cx).is_pending() {
                return false;
            }
        } else if !self.sleep.is_elapsed() {
            return false;
        }
        self.sleep_until = None;
        let now = self.shared.now();
        if now < deadline {
            return true;
        }
        let mut state = self.shared.lock();
        state.machine.handle_timeout(now);
        let work = settle(&self.shared, &self.serving, &mut self.events, state);
        self.finish(work, cx);
        true
    }

    /// Does what must not be done under the lock: wakes, drops, user code.
    fn finish(&mut self, mut work: Work, cx: &mut Context<'_>) {
        if let (Some(admission), Some(metadata)) = (&self.serving.admission, work.greeting.take()) {
            tokio::spawn(admission.clone().admit(self.shared.clone(), metadata));
        }
        let (opens, calls) = work.tell(&self.shared);
        for request in opens {
            tokio::spawn(request.answer());
        }
        for call in calls {
            self.run_handler(call, cx);
        }
        self.send_replies();
    }

    /// Sends the replies of handlers that were done inline.
    fn send_replies(&mut self) {
        for (body, reply) in self.replies.drain(..) {
            respond(&self.shared, body, reply);
        }
    }

    fn run_handler(&mut self, pending: PendingCall, cx: &mut Context<'_>) {
        let PendingCall { entry, call, incoming, cancelled } = pending;
        let guard = entry.guard(incoming.method());
        let run_as = if entry.inline_within.is_some() { guard.decide() } else { RunAs::Spawned };
        let body = ServedBody { call, connection: incoming.connection(), bytes: incoming.payload.len() };
        let mut handler = Handler::new(self.shared.clone(), body, cancelled);
        match run_as {
            RunAs::Inline => {
                let began = Instant::now();
                let polled = handler.start_and_poll(&entry, incoming, cx);
                guard.report(polled.is_ready() && entry.is_short(began.elapsed()));
                match polled {
                    Poll::Ready(reply) => {
                        handler.disarm();
                        self.replies.push((body, reply));
                    }
                    Poll::Pending => drop(tokio::spawn(handler)),
                }
            }
            RunAs::Spawned | RunAs::Probe => {
                handler.probe = (run_as == RunAs::Probe).then_some(guard);
                // A small payload must not pin the block that it was read into for as long as its handler runs.
                let incoming = IncomingCall { payload: Bytes::copy_from_slice(&incoming.payload), ..incoming };
                tokio::spawn(async move { handler.run(entry, incoming).await });
            }
        }
    }

    /// The machine has ended: writes what is left, then waits a bounded time for the peer to close.
    fn poll_closing(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            match &mut self.stage {
                Stage::Running => {
                    let until = Box::pin(tokio::time::sleep(LINGER));
                    self.stage = Stage::Closing { written: false, until };
                    let now = self.shared.now();
                    let mut after = Aftermath::default();
                    let mut state = self.shared.lock();
                    let State { machine, streams, .. } = &mut *state;
                    let mut lent = LentStreams { streams, after: &mut after };
                    while let Some(frame) = machine.poll_transmit(now, &mut lent) {
                        self.writer.start_send(frame);
                    }
                    drop(state);
                    after.settle();
                }
                Stage::Closing { written, until } => {
                    if until.as_mut().poll(cx).is_ready() {
                        self.stage = Stage::Done;
                        continue;
                    }
                    if !*written {
                        match self.writer.poll_close(cx) {
                            Poll::Pending => return Poll::Pending,
                            Poll::Ready(Ok(())) => *written = true,
                            Poll::Ready(Err(_already_ended)) => self.stage = Stage::Done,
                        }
                        continue;
                    }
                    // Closing while unread bytes lie in the socket could destroy the last words.
                    return self.reader.poll_discard(cx);
                }
                Stage::Done => return Poll::Ready(()),
            }
        }
    }
}

/// The rule of the protocol that a reader found broken. `[session.frame.length]`
fn broken_rule(error: &ConduitError) -> Option<Violation> {
    match error {
        ConduitError::TooLarge { length, limit } => {
            Some(Violation::AboveLimit { what: "frame", value: *length as u64, limit: *limit as u64 })
        }
        ConduitError::Empty => Some(Violation::EmptyFrame),
        _ => None,
    }
}

impl<R: FrameReader + Unpin, W: FrameWriter + Unpin> Future for Driver<R, W> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        for _ in 0..ROUNDS_PER_POLL {
            if this.shared.end().is_some() || !matches!(this.stage, Stage::Running) {
                return this.poll_closing(cx);
            }
            let read = this.poll_read(cx);
            if this.shared.end().is_some() {
                continue;
            }
            let wrote = match this.poll_write(cx) {
                Ok(Wrote::Corked) => break,
                Ok(wrote) => matches!(wrote, Wrote::Some),
                Err(()) => continue,
            };
            let timed = this.poll_time(cx);
            if !read && !wrote && !timed && this.shared.end().is_none() && this.shared.park_driver(cx).is_pending() {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

impl<R, W> Drop for Driver<R, W> {
    /// However the task ends, by a panic or with its runtime too: nobody waits for it for ever.
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.machine.handle_conduit_lost("the session's task has ended");
        let work = settle(&self.shared, &self.serving, &mut self.events, state);
        // What the peer asked for last is not begun any more: dropped, it is nobody's.
        let _unbegun = work.tell(&self.shared);
    }
}

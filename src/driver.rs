//! The driver: one task for each session that reads, dispatches and writes.
//!
//! It is one hand-written future, so that reading, writing and time are polled side by side and none waits for
//! another. It never awaits user code: events are settled under one short lock for each read batch, handlers run in
//! tasks of their own or are polled once inline under a guard.
//!
//! When it writes, and what, is in [`Outgoing`].

mod outgoing;

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::time::Sleep;
use tollway_protocol::error::{Reason, SessionEnd, Violation, code};
use tollway_protocol::frame::Lane;
use tollway_protocol::limits::ConnectionLimits;
use tollway_protocol::session::{Event, Machine, Role, WriteWatch};
use tollway_protocol::time::Time;

use crate::admission::Admission;
use crate::auth::{Prover, answer_challenge};
use crate::conduit::{ConduitError, FrameReader, FrameWriter, Received};
use crate::handler::{Handler, Refused, ServedBody, start_and_poll};
use crate::rpc::{Aftermath, IncomingCall, MethodGuard, MethodId, Reply, RunAs, ServiceEntry, Services};
use crate::settle::{PendingCall, Work, settle};
use crate::shared::{LentStreams, Shared, State};
use outgoing::{Outgoing, WRITE_AHEAD};

/// Rounds before the driver lets other tasks run.
const ROUNDS_PER_POLL: u32 = 32;
/// How long the last words are given to reach the peer.
const LINGER: Duration = Duration::from_secs(2);

/// What a session serves and how.
pub(crate) struct Serving {
    pub(crate) services: Services,
    pub(crate) limits: ConnectionLimits,
    /// Bytes of the largest frame that this side takes, from the handshake on.
    pub(crate) max_frame: usize,
    /// What answers a challenge of the peer's.
    pub(crate) prover: Option<Arc<dyn Prover>>,
    /// Who decides about a peer that says hello; without it everybody is welcome.
    pub(crate) admission: Option<Arc<Admission>>,
}

pub(crate) struct Driver<R, W> {
    shared: Arc<Shared>,
    serving: Serving,
    reader: R,
    frames: Vec<(Lane, Bytes)>,
    outgoing: Outgoing<W>,
    events: VecDeque<Event>,
    /// What the last look at the session left to do. Kept for its memory, as are the lists below.
    work: Work,
    calls: Vec<PendingCall>,
    answered: Answered,
    /// Most calls are of the method of the call before.
    last: Option<LastMethod>,
    sleep: Pin<Box<Sleep>>,
    sleep_until: Option<Time>,
    /// The conduit has not ended or failed.
    reading: bool,
    /// The responder's limit on a frame, until it holds: when the session has opened.
    raise_max_frame: Option<usize>,
    stage: Stage,
}

/// What handlers that ran on the driver left to be said under the next lock.
#[derive(Default)]
struct Answered {
    replies: Vec<(ServedBody, Reply)>,
    /// Handlers to be spawned, once they can be told of a cancel.
    started: Vec<Spawn>,
    refused: Vec<Refused>,
}

/// A handler that runs in a task of its own: from its start, or because its first poll was not its last.
enum Spawn {
    Fresh(Handler, Arc<ServiceEntry>, IncomingCall),
    Polled(Handler),
}

impl Spawn {
    fn handler(&self) -> &Handler {
        match self {
            Spawn::Fresh(handler, ..) | Spawn::Polled(handler) => handler,
        }
    }
}

/// A method with what is known of it.
struct LastMethod {
    entry: Arc<ServiceEntry>,
    method: MethodId,
    guard: Arc<MethodGuard>,
}

impl LastMethod {
    /// That of `last` if it is the one, without a lock and a look at the service's methods.
    fn of<'a>(last: &'a mut Option<Self>, entry: &Arc<ServiceEntry>, method: MethodId) -> &'a Self {
        let known = last.take().filter(|last| last.method == method && Arc::ptr_eq(&last.entry, entry));
        last.insert(known.unwrap_or_else(|| LastMethod { entry: entry.clone(), method, guard: entry.guard(method) }))
    }
}

/// What a read brought.
struct Input {
    lost: Option<String>,
    violation: Option<Violation>,
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
    pub(crate) fn new(
        shared: Arc<Shared>,
        serving: Serving,
        (role, watch): (Role, WriteWatch),
        (mut reader, mut writer): (R, W),
    ) -> Self {
        let raise_max_frame = match role {
            // Before our Hello is sent: the answer and a first large frame may arrive together.
            Role::Initiator => {
                reader.set_max_frame(serving.max_frame);
                None
            }
            // Before our HelloAck is written: nobody knows before that large frames are taken. [session.frame.max]
            Role::Responder => Some(serving.max_frame),
        };
        writer.set_max_frame(usize::try_from(u32::MAX).unwrap_or(usize::MAX));
        Driver {
            shared,
            serving,
            reader,
            frames: Vec::new(),
            outgoing: Outgoing::new(writer, watch),
            events: VecDeque::new(),
            work: Work::default(),
            calls: Vec::new(),
            answered: Answered::default(),
            last: None,
            sleep: Box::pin(tokio::time::sleep(Duration::from_secs(3600))),
            sleep_until: None,
            reading: true,
            raise_max_frame,
            stage: Stage::Running,
        }
    }

    /// Reads what is there into `frames`; `None` if nothing happened.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Option<Input> {
        if !self.reading || !self.outgoing.wants_frames {
            return None;
        }
        let mut violation = None;
        let lost = match self.reader.poll_recv(cx, &mut self.frames) {
            Poll::Pending => return None,
            Poll::Ready(Ok(Received::Frames | Received::Progress)) => None,
            Poll::Ready(Ok(Received::End)) => Some("the peer closed it without a last word".to_owned()),
            Poll::Ready(Err(ConduitError::Stranger(stranger))) => {
                self.outgoing.writer.start_refusal(stranger);
                Some(stranger.to_string())
            }
            Poll::Ready(Err(error)) => {
                violation = broken_rule(&error);
                Some(error.to_string())
            }
        };
        self.reading = lost.is_none();
        Some(Input { lost, violation })
    }

    /// One look at the session: what came goes in, and what is to be sent comes out, under one lock; two if handlers
    /// are polled between them.
    fn exchange(&mut self, mut input: Option<Input>, cx: &mut Context<'_>) {
        let now = self.shared.now();
        loop {
            let Driver { shared, serving, events, work, .. } = self;
            let mut state = shared.lock();
            self.answered.tell(shared, &mut state, work);
            if let Some(input) = input.take() {
                state.machine.handle_activity(now);
                state.traffic.frames_received += self.frames.len() as u64;
                for (lane, frame) in self.frames.drain(..) {
                    state.traffic.bytes_received += frame.len() as u64;
                    state.machine.handle_frame(now, lane, frame);
                }
                // The peer is told which rule it broke; for what follows, the session has ended then.
                if let Some(violation) = input.violation {
                    state.machine.handle_violation(violation);
                }
                if let Some(lost) = input.lost {
                    state.machine.handle_conduit_lost(lost);
                }
            }
            let mut settle = |state: &mut State, work: &mut Work| settle(shared, serving, events, state, work);
            settle(&mut state, work);
            // What is polled inline now has its say in the same write.
            if work.calls.is_empty() {
                self.outgoing.take_frames(now, &mut state, (work, cx.waker()), settle);
            }
            let is_open = self.raise_max_frame.is_some() && state.machine.is_open();
            drop(state);
            if is_open && let Some(max_frame) = self.raise_max_frame.take() {
                self.reader.set_max_frame(max_frame);
            }
            self.answered.spawn(shared);
            if !self.begin_work(cx) {
                return;
            }
        }
    }

    /// Does what must not be done under the lock: wakes, drops, user code. Returns whether handlers were polled.
    fn begin_work(&mut self, cx: &mut Context<'_>) -> bool {
        if let (Some(admission), Some(metadata)) = (&self.serving.admission, self.work.greeting.take()) {
            tokio::spawn(admission.clone().admit(self.shared.clone(), self.shared.peer().clone(), metadata));
        }
        if let Some(challenge) = self.work.challenge.take() {
            let (prover, peer) = (self.serving.prover.clone(), self.shared.peer().clone());
            tokio::spawn(answer_challenge(self.shared.clone(), prover, peer, challenge));
        }
        self.work.tell(&self.shared);
        for request in self.work.opens.drain(..) {
            tokio::spawn(request.answer());
        }
        for (acceptor, open) in self.work.incoming.drain(..) {
            tokio::spawn(async move { acceptor.accept(open).await });
        }
        std::mem::swap(&mut self.calls, &mut self.work.calls);
        let mut calls = std::mem::take(&mut self.calls);
        let any = !calls.is_empty();
        if any {
            let mut clock = Instant::now();
            for call in calls.drain(..) {
                self.run_handler(call, &mut clock, cx);
            }
        }
        self.calls = calls;
        any
    }

    fn run_handler(&mut self, pending: PendingCall, clock: &mut Instant, cx: &mut Context<'_>) {
        let PendingCall { call, incoming, cancelled } = pending;
        let Some(entry) = incoming.context.cell.service.as_ref() else { return };
        let LastMethod { entry, guard, .. } = LastMethod::of(&mut self.last, entry, incoming.method());
        let run_as = match entry.inline_within.is_some() && !cancelled {
            true => guard.decide(),
            false => RunAs::Spawned,
        };
        let body = ServedBody { call, connection: incoming.context.connection, bytes: incoming.payload.len() };
        if run_as == RunAs::Inline {
            let polled = start_and_poll(entry, incoming, cx);
            let began = std::mem::replace(clock, Instant::now());
            guard.report(polled.is_ok() && entry.is_short(clock.duration_since(began)));
            match polled {
                Ok(reply) => self.answered.replies.push((body, reply)),
                Err(future) => {
                    let handler = Handler::started(self.shared.clone(), body, future);
                    self.answered.started.push(Spawn::Polled(handler));
                }
            }
            return;
        }
        let mut handler = Handler::new(self.shared.clone(), body);
        handler.probe = (run_as == RunAs::Probe).then(|| guard.clone());
        if cancelled {
            handler.cancel_flag().raise();
        }
        // A small payload must not pin the block that it was read into for as long as its handler runs.
        let incoming = IncomingCall { payload: Bytes::copy_from_slice(&incoming.payload), ..incoming };
        self.answered.started.push(Spawn::Fresh(handler, entry.clone(), incoming));
    }

    /// Writes what waits in the conduit's buffer.
    ///
    /// # Errors
    /// When the conduit is lost; the session has ended then.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Result<(), ()> {
        let writer = &mut self.outgoing.writer;
        if writer.buffered() > 0
            && let Poll::Ready(Err(error)) = writer.poll_flush(cx)
        {
            self.change(cx, |machine| machine.handle_conduit_lost(error.to_string()));
            self.stage = Stage::Done;
            return Err(());
        }
        while let Some(lane) = self.outgoing.writer.next_unblocked() {
            self.outgoing.unblocked.push(lane);
            self.outgoing.drained = false;
        }
        let Outgoing { writer, watch, .. } = &mut self.outgoing;
        match writer.buffered() {
            0 => watch.clear(),
            _ => watch.observe(self.shared.now(), writer.written()),
        }
        Ok(())
    }

    fn poll_time(&mut self, cx: &mut Context<'_>) -> bool {
        let deadlines = [self.outgoing.deadline, self.outgoing.watch.deadline()];
        let Some(deadline) = deadlines.into_iter().flatten().min() else { return false };
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
        if now >= deadline {
            let stalled = self.outgoing.watch.is_stalled(now);
            self.change(cx, |machine| match stalled {
                true => machine.handle_write_stalled(),
                false => machine.handle_timeout(now),
            });
        }
        true
    }

    /// Changes the machine and settles what follows.
    fn change(&mut self, cx: &mut Context<'_>, change: impl FnOnce(&mut Machine)) {
        let mut state = self.shared.lock();
        change(&mut state.machine);
        settle(&self.shared, &self.serving, &mut self.events, &mut state, &mut self.work);
        drop(state);
        self.outgoing.drained = false;
        self.begin_work(cx);
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
                    let State { machine, streams, relays, .. } = &mut *state;
                    let mut lent = LentStreams { relays, streams, after: &mut after };
                    while let Some(frame) = machine.poll_transmit(now, &mut lent) {
                        self.outgoing.writer.start_send(frame);
                    }
                    drop(state);
                    after.settle();
                    if let Some(end) = self.shared.end() {
                        self.outgoing.writer.start_close(&last_word(end));
                    }
                }
                Stage::Closing { written, until } => {
                    if until.as_mut().poll(cx).is_ready() {
                        self.stage = Stage::Done;
                        continue;
                    }
                    if !*written {
                        match self.outgoing.writer.poll_close(cx) {
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

impl Answered {
    /// Says it, under the session's lock.
    fn tell(&mut self, shared: &Arc<Shared>, state: &mut State, work: &mut Work) {
        for (body, reply) in self.replies.drain(..) {
            self.refused.extend(state.respond(shared, body, reply, &mut work.after).err());
        }
        for spawn in &self.started {
            state.served.insert(spawn.handler().call(), spawn.handler().cancel_flag().clone());
        }
    }

    /// Starts what was entered, without the lock.
    fn spawn(&mut self, shared: &Arc<Shared>) {
        for spawn in self.started.drain(..) {
            match spawn {
                Spawn::Fresh(handler, entry, incoming) => drop(tokio::spawn(handler.run(entry, incoming))),
                Spawn::Polled(handler) => drop(tokio::spawn(handler)),
            }
        }
        for refused in self.refused.drain(..) {
            refused.answer(shared);
        }
    }
}

/// What the peer is told of this end by a conduit that can tell it by itself. `[conduit.quic.close]`
fn last_word(end: &SessionEnd) -> Reason {
    match end {
        SessionEnd::ClosedByUs(reason) | SessionEnd::RefusedByUs(reason) => reason.clone(),
        SessionEnd::PeerViolation(violation) => Reason::new(violation.code(), violation.to_string()),
        SessionEnd::HandshakeTimeout | SessionEnd::PeerSilent => Reason::new(code::TIMEOUT, end.to_string()),
        _ => Reason::none(),
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
        // Why it was woken is not known: the first round looks at everything.
        this.outgoing.drained = false;
        for _ in 0..ROUNDS_PER_POLL {
            if this.shared.end().is_some() || !matches!(this.stage, Stage::Running) {
                return this.poll_closing(cx);
            }
            let input = this.poll_read(cx);
            let read = input.is_some();
            if read || !this.outgoing.drained {
                this.exchange(input, cx);
                if this.outgoing.corked {
                    break;
                }
                if this.shared.end().is_some() {
                    continue;
                }
            }
            if this.poll_flush(cx).is_err() {
                continue;
            }
            let timed = this.poll_time(cx);
            // What the outbox still holds waits for the conduit, unless that has just taken all it had.
            let stuck = this.outgoing.drained || this.outgoing.writer.ahead() >= WRITE_AHEAD;
            if !read && !timed && stuck && this.shared.end().is_none() {
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
        settle(&self.shared, &self.serving, &mut self.events, &mut state, &mut self.work);
        drop(state);
        self.work.tell(&self.shared);
    }
}

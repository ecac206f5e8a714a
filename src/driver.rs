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
use tollway_protocol::error::{ConnectionEnd, Reason, SessionEnd, code};
use tollway_protocol::frame::Lane;
use tollway_protocol::id::ConnectionId;
use tollway_protocol::limits::ConnectionLimits;
use tollway_protocol::message::Status;
use tollway_protocol::metadata::Metadata;
use tollway_protocol::session::{CallKey, Event, InboundSlot, IncomingResponse, MoneyCount, ResponseSpec};
use tollway_protocol::time::Time;

use crate::conduit::{ConduitError, FrameReader, FrameWriter, PeerInfo, Received, Stranger};
use crate::handler::{CancelFlag, Handler, ServedBody, respond};
use crate::payment::{OpenRequest, PaymentEvent};
use crate::rpc::{
    Aftermath, Answer, CallSlot, InboundStream, IncomingCall, MethodId, Outcome, Reply, RunAs, ServiceEntry, Services,
    StreamCore, StreamError,
};
use crate::shared::{ConnectionCell, LentStreams, OpenAnswer, Shared, State};

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
    reading: bool,
    /// A stranger knocked: the refusal is what is written last.
    stage: Stage,
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

/// A call that waits for its handler to start.
struct PendingCall {
    entry: Arc<ServiceEntry>,
    call: CallKey,
    incoming: IncomingCall,
    cancelled: Arc<CancelFlag>,
}

/// What the driver does after the lock is dropped.
#[derive(Default)]
struct Work {
    after: Aftermath,
    calls: Vec<PendingCall>,
    opens: Vec<OpenRequest>,
    ended: Vec<(Arc<ConnectionCell>, ConnectionEnd, Option<MoneyCount>)>,
    cancelled: Vec<Arc<CancelFlag>>,
    /// Calls of this side have ended.
    calls_ended: bool,
    session_end: Option<SessionEnd>,
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
            stage: Stage::Running,
        }
    }

    /// Reads what is there and hands it on. Returns whether anything happened.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> bool {
        if !self.reading {
            return false;
        }
        let lost = match self.reader.poll_recv(cx, &mut self.frames) {
            Poll::Pending => return false,
            Poll::Ready(Ok(Received::Frames | Received::Progress)) => None,
            Poll::Ready(Ok(Received::End)) => Some("the peer closed it without a last word".to_owned()),
            Poll::Ready(Err(ConduitError::Stranger(stranger))) => {
                self.refuse(stranger);
                Some(stranger.to_string())
            }
            Poll::Ready(Err(error)) => Some(error.to_string()),
        };
        self.reading = lost.is_none();
        let now = self.shared.now();
        let mut state = self.shared.lock();
        state.machine.handle_activity(now);
        for (lane, frame) in self.frames.drain(..) {
            state.machine.handle_frame(now, lane, frame);
        }
        if let Some(lost) = lost {
            state.machine.handle_conduit_lost(lost);
        }
        let work = settle(&self.shared, &self.serving, &mut self.events, state);
        self.finish(work, cx);
        true
    }

    fn refuse(&mut self, stranger: Stranger) {
        tracing::info!(peer = %self.serving.peer, %stranger, "refused a stranger");
        self.writer.start_refusal(stranger);
    }

    /// Takes frames out of the machine and writes them. Returns whether anything happened.
    fn poll_write(&mut self, cx: &mut Context<'_>) -> Result<bool, ()> {
        let mut after = Aftermath::default();
        let mut taken = false;
        let events;
        if self.writer.buffered() < WRITE_AHEAD {
            let now = self.shared.now();
            let mut state = self.shared.lock();
            let State { machine, streams, .. } = &mut *state;
            let mut lent = LentStreams { streams, after: &mut after };
            while self.writer.buffered() < WRITE_AHEAD {
                let Some(frame) = machine.poll_transmit(now, &mut lent) else { break };
                self.writer.start_send(frame);
                taken = true;
            }
            events = machine.has_events();
        } else {
            // Commands make events, too: a peer that does not read keeps none of them back.
            events = self.shared.lock().machine.has_events();
        }
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
        Ok(taken || self.writer.written() != before)
    }

    fn lose(&mut self, error: &ConduitError, cx: &mut Context<'_>) {
        let mut state = self.shared.lock();
        state.machine.handle_conduit_lost(error.to_string());
        let work = settle(&self.shared, &self.serving, &mut self.events, state);
        self.finish(work, cx);
        self.stage = Stage::Done;
    }

    /// Whether other tasks should run before the next write.
    fn should_cork(&mut self) -> bool {
        if self.corked || self.writer.buffered() > 0 {
            return false;
        }
        let state = self.shared.lock();
        state.machine.call_count() > 1 && state.machine.has_only_small_bodies(CORK_BELOW)
    }

    fn poll_time(&mut self, cx: &mut Context<'_>) -> bool {
        let deadline = self.shared.lock().machine.poll_timeout();
        let Some(deadline) = deadline else { return false };
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
    fn finish(&mut self, work: Work, cx: &mut Context<'_>) {
        let Work { after, calls, opens, ended, cancelled, calls_ended, session_end } = work;
        if calls_ended {
            self.shared.notice_calls_gone();
        }
        if !ended.is_empty() {
            self.shared.notice_gone();
        }
        for (cell, end, money) in ended {
            cell.set_end(end, money);
        }
        cancelled.iter().for_each(|flag| flag.raise());
        after.settle();
        for request in opens {
            tokio::spawn(request.answer());
        }
        for call in calls {
            self.run_handler(call, cx);
        }
        self.send_replies();
        if let Some(end) = session_end {
            self.shared.set_end(end);
        }
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
        let run_as = if entry.service.allows_inline() { guard.decide() } else { RunAs::Spawned };
        let body = ServedBody { call, connection: incoming.connection(), bytes: incoming.payload.len() };
        let mut handler = Handler::new(self.shared.clone(), body, cancelled);
        match run_as {
            RunAs::Inline => {
                let began = Instant::now();
                let polled = handler.start_and_poll(&entry, incoming, cx);
                guard.report(polled.is_ready(), began.elapsed());
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

impl<R: FrameReader + Unpin, W: FrameWriter + Unpin> Future for Driver<R, W> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        for _ in 0..ROUNDS_PER_POLL {
            if this.shared.end().is_some() || !matches!(this.stage, Stage::Running) {
                return this.poll_closing(cx);
            }
            let read = this.shared.lock().machine.wants_frames() && this.poll_read(cx);
            if this.shared.end().is_some() {
                continue;
            }
            if this.should_cork() {
                this.corked = true;
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
            this.corked = false;
            let Ok(wrote) = this.poll_write(cx) else { continue };
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
        for (cell, end, money) in work.ended {
            cell.set_end(end, money);
        }
        work.after.settle();
        if let Some(end) = work.session_end {
            self.shared.set_end(end);
        }
    }
}

/// Settles all events under the lock that is handed in, and drops it.
fn settle(
    shared: &Arc<Shared>,
    serving: &Serving,
    events: &mut VecDeque<Event>,
    mut state: parking_lot::MutexGuard<'_, State>,
) -> Work {
    let mut work = Work::default();
    // A violation found here is an event of its own.
    while state.machine.has_events() {
        state.machine.swap_events(events);
        for event in events.drain(..) {
            settle_event(shared, serving, &mut state, event, &mut work);
        }
    }
    work
}

/// Settles one event under the session's lock.
fn settle_event(shared: &Arc<Shared>, serving: &Serving, state: &mut State, event: Event, work: &mut Work) {
    match event {
        Event::SessionRequested { .. } => state.machine.accept_session(Metadata::new()),
        Event::SessionOpened { metadata, .. } => {
            if let Some(opened) = state.opened.take() {
                // Nobody waits any more if the handshake was given up; the session's end follows then.
                let _given_up = opened.send(metadata);
            }
        }
        Event::SessionEnded(end) => {
            state.opened = None;
            // Streams refer to the session: without this they would keep each other.
            work.after.bury_all(state.streams.drain().map(|(_, core)| core));
            state.announced.drain().for_each(|(_, streams)| work.after.discard(streams));
            work.session_end = Some(end);
        }
        Event::ConnectionRequested { connection, service, credential, .. } => {
            settle_open(shared, serving, state, work, (connection, service, credential));
        }
        Event::ConnectionAccepted { connection, metadata, receipt, .. } => {
            answer_open(state, connection, OpenAnswer::Accepted { metadata, receipt });
        }
        Event::ConnectionRejected { connection, reason, metadata, terms } => {
            state.connections.remove(&connection);
            state.mailboxes.remove(&connection);
            answer_open(state, connection, OpenAnswer::Rejected { reason, metadata, terms });
        }
        Event::ConnectionClosed { connection, end, money } => {
            if let Some(mailbox) = state.mailboxes.remove(&connection) {
                mailbox.post(PaymentEvent::Ended(money));
            }
            if let Some(cell) = state.connections.remove(&connection) {
                work.ended.push((cell, end.clone(), money));
            }
            answer_open(state, connection, OpenAnswer::Ended(end));
        }
        Event::StreamsAnnounced { connection, call, slots } => {
            let streams = enter_streams(shared, state, connection, &slots);
            state.announced.insert(call, streams);
        }
        Event::CallRequested(call) => settle_call(shared, serving, state, work, call),
        Event::CallCancelled { call } => work.cancelled.extend(state.served.remove(call)),
        Event::CallAnswered(answer) => {
            let connection = answer.connection;
            let streams = enter_streams(shared, state, connection, &answer.slots);
            let payload = detach(answer.payload);
            let bytes = payload.len();
            let IncomingResponse { call, status, metadata, charged, .. } = answer;
            match waiting_slot(state, call) {
                Some(slot) => {
                    let answer = Answer { status, metadata, charged, payload, streams };
                    work.after.wake(slot.settle(Outcome::Answered(answer)));
                }
                None => {
                    // The caller was dropped: its streams are ended by their drop.
                    state.machine.consume_body(connection, bytes);
                    work.after.discard(streams);
                }
            }
        }
        Event::CallEnded { call, charged, counted } => {
            work.calls_ended = true;
            if charged != counted {
                tracing::warn!(?call, %charged, %counted, "payee and payer count a call differently");
            }
        }
        Event::CallFailed { call } => {
            work.calls_ended = true;
            work.after.discard(state.announced.remove(&call).unwrap_or_default());
            work.cancelled.extend(state.served.remove(call));
            if let Some(slot) = waiting_slot(state, call) {
                work.after.wake(slot.settle(Outcome::Failed));
            }
        }
        Event::PeerGoingAway { reason, .. } => tracing::debug!(%reason, "the peer is going away"),
        Event::Pong { rtt } => tracing::trace!(?rtt, "pong"),
        Event::Payment { connection, message } => post(state, connection, PaymentEvent::Message(message)),
        Event::MoneyLow { connection } => post(state, connection, PaymentEvent::Low),
        Event::MoneyNeeded { connection, .. } => post(state, connection, PaymentEvent::Needed),
        Event::ReceivedMark { connection, received } => post(state, connection, PaymentEvent::Received(received)),
        stream_event => settle_stream(shared, state, stream_event, work),
    }
}

/// Where the caller of a call of ours waits, if it still does.
fn waiting_slot(state: &mut State, call: CallKey) -> Option<&mut CallSlot> {
    let slot = state.calls.remove(call)?;
    state.slots.get_mut(slot)
}

fn post(state: &mut State, connection: ConnectionId, event: PaymentEvent) {
    if let Some(mailbox) = state.mailboxes.get(&connection) {
        mailbox.post(event);
    }
}

fn settle_stream(shared: &Arc<Shared>, state: &mut State, event: Event, work: &mut Work) {
    match event {
        Event::StreamItems { stream, run, slots } => {
            let Some(core) = state.streams.get(stream).cloned() else {
                // Nobody will see the streams in it.
                return slots.iter().for_each(|slot| state.machine.discard_stream(slot.stream));
            };
            let connection = state.machine.stream_connection(stream);
            let streams = match connection {
                Some(connection) if !slots.is_empty() => enter_streams(shared, state, connection, &slots),
                _ => Vec::new(),
            };
            if let Err(violation) = core.handle_items(run, streams, &mut work.after) {
                state.machine.handle_violation(violation);
            }
            work.after.bury(Some(core));
        }
        Event::StreamEnded { stream, ending } => {
            if let Some(core) = state.streams.remove(stream) {
                core.handle_ending(ending, &mut work.after);
                work.after.bury(Some(core));
            }
        }
        Event::StreamStopped { stream, code } => {
            let Some(core) = state.streams.get(stream).cloned() else { return };
            let (ready, dropped) = core.handle_stopped(code, &mut work.after);
            for unannounced in dropped {
                state.machine.forget_unannounced(unannounced);
                if let Some(core) = state.streams.remove(unannounced) {
                    core.fail(StreamError::NotSent, &mut work.after);
                    work.after.bury(Some(core));
                }
            }
            if ready {
                state.machine.stream_ready(stream);
            }
        }
        Event::StreamCredit { stream, limit, .. } => {
            let Some(core) = state.streams.get(stream) else { return };
            match core.handle_credit(limit) {
                Ok(true) => state.machine.stream_ready(stream),
                Ok(false) => {}
                Err(violation) => state.machine.handle_violation(violation),
            }
        }
        Event::StreamFailed { stream } => {
            if let Some(core) = state.streams.remove(stream) {
                core.fail(StreamError::ConnectionEnded, &mut work.after);
                work.after.bury(Some(core));
            }
        }
        _ => debug_assert!(false, "every other event is settled before"),
    }
}

/// An open for an unpaid service is answered at once; one for a paid service in a task of its own.
fn settle_open(
    shared: &Arc<Shared>,
    serving: &Serving,
    state: &mut State,
    work: &mut Work,
    (connection, service, credential): (ConnectionId, String, Bytes),
) {
    let Some(entry) = serving.services.get(&service) else {
        let reason = Reason::new(code::UNKNOWN_SERVICE, format!("no service '{service}' is served here"));
        state.machine.close(connection, reason);
        return;
    };
    let cell = ConnectionCell::serving(Some(entry.clone()));
    state.connections.insert(connection, cell.clone());
    match &entry.payee {
        None => {
            let accepted = state.machine.accept(connection, serving.limits, Metadata::new(), None);
            debug_assert!(accepted.is_ok(), "the request is a moment old, and the limits were checked");
        }
        Some(payee) => work.opens.push(OpenRequest {
            shared: shared.clone(),
            payee: payee.clone(),
            cell,
            connection,
            service,
            credential,
            limits: serving.limits,
        }),
    }
}

fn answer_open(state: &mut State, connection: ConnectionId, answer: OpenAnswer) {
    if let Some(open) = state.opens.remove(&connection) {
        // An opener that was dropped has closed the connection.
        let _abandoned = open.send(answer);
    }
}

fn settle_call(
    shared: &Arc<Shared>,
    serving: &Serving,
    state: &mut State,
    work: &mut Work,
    call: tollway_protocol::session::IncomingCall,
) {
    // Those of a call that waited for its price are there, perhaps with items.
    let announced = state.announced.remove(&call.call);
    let streams = announced.unwrap_or_else(|| enter_streams(shared, state, call.connection, &call.slots));
    let entry = state.connections.get(&call.connection).and_then(|cell| cell.service.clone());
    let Some(entry) = entry else {
        // A connection on which this side serves nothing.
        work.after.discard(streams);
        let spec = ResponseSpec {
            status: Status::UnknownMethod,
            metadata: Metadata::new(),
            payload: Bytes::new(),
            slots: &[],
        };
        let answered = state.machine.respond(call.call, spec);
        debug_assert!(answered.is_ok(), "the call is a moment old");
        state.machine.consume_body(call.connection, call.payload.len());
        return;
    };
    let cancelled = Arc::new(CancelFlag::default());
    state.served.insert(call.call, cancelled.clone());
    let incoming = IncomingCall {
        method: MethodId(call.method),
        metadata: call.metadata,
        deadline: call.deadline,
        payload: call.payload,
        streams,
        connection: call.connection,
        peer: serving.peer.clone(),
    };
    work.calls.push(PendingCall { entry, call: call.call, incoming, cancelled });
}

/// Creates this side's end of the streams that the peer announced.
fn enter_streams(
    shared: &Arc<Shared>,
    state: &mut State,
    connection: ConnectionId,
    slots: &[InboundSlot],
) -> Vec<InboundStream> {
    if slots.is_empty() {
        return Vec::new();
    }
    let Some((own, peer)) = state.machine.limits(connection).map(|(own, peer)| (*own, *peer)) else {
        return Vec::new();
    };
    let mut enter = |slot: &InboundSlot| {
        let core = StreamCore::inbound(shared, slot.stream, slot.flow, (&own, &peer));
        state.streams.insert(slot.stream, core.clone());
        InboundStream::new(core, slot.stream, slot.flow)
    };
    slots.iter().map(&mut enter).collect()
}

/// A small payload is copied out of the block that it was read into.
fn detach(payload: Bytes) -> Bytes {
    const DETACH_BELOW: usize = 16 * 1024;
    if payload.len() < DETACH_BELOW { Bytes::copy_from_slice(&payload) } else { payload }
}

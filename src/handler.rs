//! A handler of one call of the peer's: run to its answer, cancelled, or contained when it panics.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use parking_lot::Mutex;
use tollway_protocol::id::ConnectionId;
use tollway_protocol::message::Status;
use tollway_protocol::session::{CallKey, CommandError};
use tracing::{Instrument, Span};

use crate::rpc::{BoxReply, IncomingCall, MethodGuard, OutboundSlots, Reply, Scope, ServiceEntry, enter_deadline};
use crate::shared::Shared;

/// Tells a handler that its caller has lost interest.
#[derive(Debug, Default)]
pub(crate) struct CancelFlag {
    raised: AtomicBool,
    /// It was the call's deadline that raised it.
    late: AtomicBool,
    waker: Mutex<Option<Waker>>,
}

impl CancelFlag {
    /// Says before it is raised that the call's deadline is what raises it.
    pub(crate) fn set_late(&self) {
        self.late.store(true, Ordering::Release);
    }

    pub(crate) fn raise(&self) {
        self.raised.store(true, Ordering::Release);
        let waker = self.waker.lock().take();
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Whether it is raised; if not, the task is woken when it is.
    fn poll_raised(&self, cx: &mut Context<'_>) -> bool {
        if self.raised.load(Ordering::Acquire) {
            return true;
        }
        *self.waker.lock() = Some(cx.waker().clone());
        // Raised in between: the waker was not seen.
        self.raised.load(Ordering::Acquire)
    }
}

/// A call of the peer's that is to be answered, and the bytes of its body, which then go back to the window.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ServedBody {
    pub(crate) call: CallKey,
    pub(crate) connection: ConnectionId,
    pub(crate) bytes: usize,
}

/// Answers a call of the peer's; an answer that cannot be sent becomes an error that says so.
fn respond(shared: &Arc<Shared>, body: ServedBody, reply: Reply) {
    if let Err(refused) = shared.respond(body, reply) {
        refused.answer(shared);
    }
}

/// An answer that was not taken, with all of it that must not be dropped under a lock.
pub(crate) struct Refused {
    pub(crate) body: ServedBody,
    pub(crate) error: CommandError,
    pub(crate) slots: OutboundSlots,
}

impl Refused {
    /// Answers with an error that says so, if anybody waits for it.
    pub(crate) fn answer(self, shared: &Arc<Shared>) {
        let failure = match &self.error {
            CommandError::NoCall | CommandError::NoConnection(_) | CommandError::SessionEnded(_) => return,
            // For the streams of an answer; for the answer itself it was said already.
            CommandError::OutOfMemory { .. } => Reply::empty(Status::AtCapacity),
            &CommandError::BodyTooLarge { bytes, limit } => Reply::too_large(bytes, limit),
            _ => Reply::failed(),
        };
        tracing::warn!(error = %self.error, "a handler's answer cannot be sent");
        // Its bytes have gone back to the window.
        let body = ServedBody { bytes: 0, ..self.body };
        drop(self.slots);
        // Fails only if the connection has ended meanwhile.
        let _ended = shared.respond(body, failure);
    }
}

/// Runs the service's own code for the first time, panics contained. A call that is not done leaves its future.
pub(crate) fn start_and_poll(
    entry: &ServiceEntry,
    incoming: IncomingCall,
    cx: &mut Context<'_>,
) -> Result<Reply, BoxReply> {
    let deadline = incoming.context.deadline;
    let span = incoming.context.cell.span(incoming.context.connection).cloned();
    let first = std::panic::AssertUnwindSafe(|| {
        let in_span = span.as_ref().map(Span::enter);
        // What a handler calls takes over its deadline; without one nothing is handed down.
        let entered = deadline.map(|_| enter_deadline(deadline));
        let mut future = entry.call(incoming);
        // One that is done is dropped in here: its drop is user code, too.
        if let Poll::Ready(reply) = future.as_mut().poll(cx) {
            return Ok(reply);
        }
        if entered.is_some() {
            future = Box::pin(Scope { deadline, trace: None }.hold(future));
        }
        drop(in_span);
        Err(match span.clone() {
            Some(span) => Box::pin(future.instrument(span)),
            None => future,
        })
    });
    std::panic::catch_unwind(first).unwrap_or_else(|_panic| Ok(Reply::empty(Status::HandlerFailed)))
}

/// A handler at work. Dropped without an answer (it panicked, or the runtime ends), it answers that it failed.
pub(crate) struct Handler {
    shared: Arc<Shared>,
    body: ServedBody,
    answered: bool,
    future: Option<BoxReply>,
    cancelled: Arc<CancelFlag>,
    pub(crate) probe: Option<Arc<MethodGuard>>,
}

impl Handler {
    pub(crate) fn new(shared: Arc<Shared>, body: ServedBody) -> Self {
        let (answered, future, cancelled, probe) = (false, None, Arc::default(), None);
        Handler { shared, body, answered, future, cancelled, probe }
    }

    /// One that was polled, and was not done.
    pub(crate) fn started(shared: Arc<Shared>, body: ServedBody, future: BoxReply) -> Self {
        let mut handler = Handler::new(shared, body);
        handler.future = Some(future);
        handler
    }

    pub(crate) fn call(&self) -> CallKey {
        self.body.call
    }

    pub(crate) fn cancel_flag(&self) -> &Arc<CancelFlag> {
        &self.cancelled
    }

    pub(crate) async fn run(mut self, entry: Arc<ServiceEntry>, incoming: IncomingCall) {
        let mut first = Some(incoming);
        let polled = std::future::poll_fn(|cx| {
            let began = Instant::now();
            let polled = first.take().map(|incoming| start_and_poll(&entry, incoming, cx));
            if let (Some(polled), Some(probe)) = (&polled, self.probe.take()) {
                probe.report(polled.is_ok() && entry.is_short(began.elapsed()));
            }
            Poll::Ready(polled)
        })
        .await;
        match polled {
            Some(Ok(reply)) => self.answer(reply),
            Some(Err(future)) => {
                self.future = Some(future);
                self.await;
            }
            None => {}
        }
    }

    fn answer(&mut self, reply: Reply) {
        if !std::mem::replace(&mut self.answered, true) {
            respond(&self.shared, self.body, reply);
        }
    }
}

impl Future for Handler {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let cancelled = self.cancelled.poll_raised(cx);
        let Some(future) = &mut self.future else { return Poll::Ready(()) };
        if cancelled {
            // Its drop is user code and may panic as its poll may.
            let future = self.future.take();
            let dropped = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(future)));
            if dropped.is_err() {
                tracing::error!("a handler panicked while it was dropped");
            }
            let late = self.cancelled.late.load(Ordering::Acquire);
            self.answer(Reply::empty(if late { Status::DeadlineExceeded } else { Status::Cancelled }));
            return Poll::Ready(());
        }
        let polled = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| future.as_mut().poll(cx)));
        let reply = match polled {
            Ok(Poll::Pending) => return Poll::Pending,
            Ok(Poll::Ready(reply)) => reply,
            Err(_panic) => Reply::empty(Status::HandlerFailed),
        };
        self.future = None;
        self.answer(reply);
        Poll::Ready(())
    }
}

impl Drop for Handler {
    fn drop(&mut self) {
        self.answer(Reply::empty(Status::HandlerFailed));
    }
}

//! What a handler hands down to the calls that it makes: how long they may take, and the trace that they belong to.
//!
//! While a handler is polled, thread-locals say until when its own caller waits and which trace it is part of, and calls
//! that are made meanwhile take both over. A task that the handler spawns is not polled with it: [`CallContext::scope`]
//! takes the scope along.
//!
//! [`CallContext::scope`]: super::CallContext::scope

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use super::middleware::TraceContext;

/// What is handed down.
#[derive(Debug, Clone, Default)]
pub(crate) struct Scope {
    pub(crate) deadline: Option<Instant>,
    /// Only where [`Tracing`](super::middleware::Tracing) is installed.
    pub(crate) trace: Option<Arc<TraceContext>>,
}

thread_local! {
    /// By itself, because every call asks for it.
    static DEADLINE: Cell<Option<Instant>> = const { Cell::new(None) };
    static TRACE: RefCell<Option<Arc<TraceContext>>> = const { RefCell::new(None) };
}

/// Restores the outer deadline, also when what runs under the inner one panics.
#[must_use]
pub(crate) struct EnteredDeadline(Option<Instant>);

impl Drop for EnteredDeadline {
    fn drop(&mut self) {
        DEADLINE.set(self.0);
    }
}

/// Makes this the deadline of what runs until the guard is dropped.
pub(crate) fn enter_deadline(deadline: Option<Instant>) -> EnteredDeadline {
    EnteredDeadline(DEADLINE.replace(deadline))
}

struct EnteredTrace(Option<Arc<TraceContext>>);

impl Drop for EnteredTrace {
    fn drop(&mut self) {
        // Dropped outside of the borrow.
        let _inner = TRACE.replace(self.0.take());
    }
}

impl Scope {
    /// The scope of the handler that is being polled on this thread.
    pub(crate) fn current() -> Self {
        Scope { deadline: DEADLINE.get(), trace: Scope::trace_of_current() }
    }

    /// Its deadline.
    pub(crate) fn deadline_of_current() -> Option<Instant> {
        DEADLINE.get()
    }

    /// Its trace.
    pub(crate) fn trace_of_current() -> Option<Arc<TraceContext>> {
        TRACE.with_borrow(Option::clone)
    }

    /// A future that is polled in this scope.
    pub(crate) fn hold<F: Future>(self, future: F) -> Scoped<F> {
        // Spans that are made in it belong to the one in which it was made.
        let span = self.trace.is_some().then(tracing::Span::current);
        Scoped { scope: self, span, future: Box::pin(future) }
    }
}

/// A future that is polled in a scope.
pub(crate) struct Scoped<F> {
    scope: Scope,
    span: Option<tracing::Span>,
    future: Pin<Box<F>>,
}

impl<F: Future> Future for Scoped<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let _deadline = enter_deadline(self.scope.deadline);
        let _trace = EnteredTrace(TRACE.replace(self.scope.trace.clone()));
        let this = &mut *self;
        let _span = this.span.as_ref().map(tracing::Span::enter);
        this.future.as_mut().poll(cx)
    }
}

//! What a handler hands down to the calls that it makes: how long they may take.
//!
//! While a handler is polled, a thread-local says until when its own caller waits, and calls that are made meanwhile take
//! over what is left. A task that the handler spawns is not polled with it: [`CallContext::scope`] takes the scope along.
//!
//! [`CallContext::scope`]: super::CallContext::scope

use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

/// What is handed down.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scope {
    pub(crate) deadline: Option<Instant>,
}

thread_local! {
    static CURRENT: Cell<Scope> = const { Cell::new(Scope { deadline: None }) };
}

/// Restores the outer scope, also when what runs in the inner one panics.
#[must_use]
pub(crate) struct Entered(Scope);

impl Drop for Entered {
    fn drop(&mut self) {
        CURRENT.set(self.0);
    }
}

impl Scope {
    /// The scope of the handler that is being polled on this thread.
    pub(crate) fn current() -> Self {
        CURRENT.get()
    }

    /// Makes this the scope of what runs until the guard is dropped.
    pub(crate) fn enter(self) -> Entered {
        Entered(CURRENT.replace(self))
    }

    /// A future that is polled in this scope.
    pub(crate) fn hold<F: Future>(self, future: F) -> Scoped<F> {
        Scoped { scope: self, future: Box::pin(future) }
    }
}

/// A future that is polled in a scope.
pub(crate) struct Scoped<F> {
    scope: Scope,
    future: Pin<Box<F>>,
}

impl<F: Future> Future for Scoped<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let _entered = self.scope.enter();
        self.future.as_mut().poll(cx)
    }
}

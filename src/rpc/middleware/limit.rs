//! A limit on calls at once, across connections and sessions.

use std::sync::Arc;

use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::timeout_at;

use super::{ClientMiddleware, NextCall, NextHandler, ServerMiddleware};
use crate::rpc::{Answer, CallError, IncomingCall, OutgoingCall, Reply};

/// Lets so many calls run at once and makes others wait, in the order in which they came: back-pressure, no errors.
///
/// Clones share the limit, so that one may be around several services, sessions or connections. On a server a call waits
/// with its arguments in memory, within the limits of its connection: `max_calls` calls and a window of bodies, whose
/// peers wait in turn. A call that waits ends when its caller cancels and at its deadline. Streams of an answer go on
/// behind it and don't count.
#[derive(Debug, Clone)]
pub struct ConcurrencyLimit {
    places: Arc<Semaphore>,
}

impl ConcurrencyLimit {
    /// At most `calls` at once; at least one.
    pub fn new(calls: usize) -> Self {
        // The semaphore has its own limit, above what any machine holds calls.
        ConcurrencyLimit { places: Arc::new(Semaphore::new(calls.clamp(1, Semaphore::MAX_PERMITS))) }
    }

    /// Calls that may begin now without waiting.
    pub fn available(&self) -> usize {
        self.places.available_permits()
    }

    async fn place(&self) -> SemaphorePermit<'_> {
        self.places.acquire().await.expect("the semaphore is never closed")
    }
}

impl ClientMiddleware for ConcurrencyLimit {
    async fn call(&self, call: OutgoingCall, next: NextCall) -> Result<Answer, CallError> {
        let _place = match call.deadline() {
            None => self.place().await,
            Some(deadline) => timeout_at(deadline.into(), self.place())
                .await
                .map_err(|_late| CallError::DeadlineExceeded { sent: false })?,
        };
        next.call(call).await
    }
}

impl ServerMiddleware for ConcurrencyLimit {
    async fn handle(&self, call: IncomingCall, next: NextHandler) -> Reply {
        let _place = self.place().await;
        next.handle(call).await
    }
}

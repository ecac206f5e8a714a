//! What drives a connection of quinn's: futures that it would give tasks of their own, kept for the task of whoever uses
//! the connection.
//!
//! A task more on the way of each call is not the cost of a task, but that of a wake: tokio runs tasks that wake each
//! other on one worker only up to a length of the chain, and behind it takes another worker, which costs 20 to 50 µs.

use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use parking_lot::Mutex;
use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime};
use smallvec::SmallVec;

type Spawned = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Drives a connection, and on the dialling side its socket, for as long as it is polled. Dropped, it goes on in tasks of
/// its own: a connection says its last words after its last handle is gone.
#[derive(Default)]
pub(super) struct Engine {
    parts: SmallVec<[Spawned; 2]>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("parts", &self.parts.len()).finish()
    }
}

impl Engine {
    /// Drives both, until the future is ready.
    pub(super) async fn drive<F: Future>(&mut self, future: F) -> F::Output {
        let mut future = pin!(future);
        poll_fn(|cx| {
            // That it is done is no answer.
            let _ = Pin::new(&mut *self).poll(cx);
            future.as_mut().poll(cx)
        })
        .await
    }
}

impl Future for Engine {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.parts.retain(|part| part.as_mut().poll(cx).is_pending());
        if self.parts.is_empty() { Poll::Ready(()) } else { Poll::Pending }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Where no runtime is left, the connection is lost with it.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            for part in self.parts.drain(..) {
                runtime.spawn(part);
            }
        }
    }
}

/// A runtime for quinn that keeps what it is to spawn.
#[derive(Debug, Default)]
pub(super) struct Catching {
    /// Held while something is done that spawns, so that it is known whose it is.
    turn: Mutex<()>,
    caught: Caught,
}

#[derive(Default)]
struct Caught(Mutex<SmallVec<[Spawned; 2]>>);

impl fmt::Debug for Caught {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Caught").finish_non_exhaustive()
    }
}

impl Catching {
    /// Does something, and returns with its result what it has spawned.
    pub(super) fn catch<T>(self: &Arc<Self>, spawns: impl FnOnce(Arc<dyn Runtime>) -> T) -> (T, Engine) {
        let _turn = self.turn.lock();
        let result = spawns(self.clone());
        (result, Engine { parts: std::mem::take(&mut *self.caught.0.lock()) })
    }
}

impl Runtime for Catching {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        TokioRuntime.new_timer(at)
    }

    fn spawn(&self, future: Spawned) {
        self.caught.0.lock().push(future);
    }

    fn wrap_udp_socket(&self, socket: std::net::UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        TokioRuntime.wrap_udp_socket(socket)
    }

    fn now(&self) -> Instant {
        TokioRuntime.now()
    }
}

impl Engine {
    /// Both in one.
    pub(super) fn with(mut self, mut other: Engine) -> Engine {
        self.parts.append(&mut other.parts);
        self
    }
}

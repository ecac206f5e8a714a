//! Any [`Stream`] as a metered one: its items are paid for as they go, and its source rests while they are not.
//!
//! What an item costs is the price of the method that returns it: per item and per byte, as it is framed. The session
//! charges it when a frame is taken for writing. This adapter asks the source for items only as far ahead of that as the
//! [`Meter`] says, so that a payee doesn't work for a payer who has stopped to pay; as soon as money comes, the session
//! takes what waits, and the source goes on.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;
use std::time::Instant;

use futures_core::Stream;
use serde::Serialize;

use super::scope::Scope;
use super::stream::{Rx, Tx, stream};
use super::stream_core::OUTBOX_BYTES;

/// How a handler's streams are metered: from [`CallContext::meter`](super::CallContext::meter).
#[derive(Debug, Clone, Copy)]
pub struct Meter {
    deadline: Option<Instant>,
    ahead: u64,
}

impl Meter {
    pub(super) const fn new(deadline: Option<Instant>) -> Self {
        Meter { deadline, ahead: OUTBOX_BYTES }
    }

    /// The source works ahead of what was paid and taken by at most so many bytes of items, and one item: 256 KiB at most,
    /// and by default, which costs nothing for small items. With 0 each item must be paid before the next is asked for.
    #[must_use]
    pub const fn ahead(mut self, bytes: u64) -> Self {
        self.ahead = if bytes < OUTBOX_BYTES { bytes } else { OUTBOX_BYTES };
        self
    }
}

/// Metering for every stream of items that can be sent.
///
/// ```
/// use tollway::rpc::{CallContext, MeterStream, Rx, Stream};
///
/// fn ticks(cx: &CallContext, source: impl Stream<Item = u64> + Send + 'static) -> Rx<u64> {
///     source.metered(&cx.meter())
/// }
/// ```
pub trait MeterStream: Stream + Sized + Send + 'static
where
    Self::Item: Serialize + Send,
{
    /// The stream as one to be returned from the handler of a call, or sent in an item. Each of its items is charged by
    /// the price of the method. It ends with its source, and the source is dropped when nobody wants it any more.
    ///
    /// # Panics
    /// Outside a tokio runtime: a task of its own feeds the stream.
    fn metered(self, meter: &Meter) -> Rx<Self::Item> {
        let (tx, rx) = stream();
        let scope = Scope { deadline: meter.deadline, ..Scope::current() };
        // The call waits for its streams, and a stream whose call has ended stops this task.
        drop(tokio::spawn(scope.hold(feed(self, tx, meter.ahead))));
        rx
    }
}

impl<S: Stream + Send + 'static> MeterStream for S where S::Item: Serialize + Send {}

/// Sends the items of a stream for as long as they are wanted, working at most `ahead` bytes ahead of what is taken.
pub(super) async fn feed<S: Stream>(items: S, mut tx: Tx<S::Item>, ahead: u64)
where
    S::Item: Serialize,
{
    let mut items = pin!(items);
    loop {
        if ahead < OUTBOX_BYTES
            && let Err(error) = poll_fn(|cx| tx.poll_taken(cx, ahead)).await
        {
            tracing::debug!(%error, "a stream ended early");
            return;
        }
        let next = poll_fn(|cx| {
            let next = items.as_mut().poll_next(cx);
            // A stream that waits for its next item ends at once when nobody wants it.
            if next.is_pending() && tx.poll_closed(cx).is_ready() {
                return Poll::Ready(None);
            }
            next
        });
        let Some(item) = next.await else { break };
        if let Err(error) = tx.send(item).await {
            tracing::debug!(%error, "a stream ended early");
            return;
        }
    }
    tx.finish();
}

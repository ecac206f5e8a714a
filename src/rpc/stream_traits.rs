//! Streams of items as the ecosystem knows them: [`Rx`] is a [`Stream`], [`Tx`] is a [`Sink`].

use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_core::Stream;
use futures_sink::Sink;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::task::coop;
use tollway_protocol::stream::Ending;

use super::stream::{ITEMS_PER_BUDGET, Rx, StreamError, Tx};

/// The items as [`recv`](Rx::recv) yields them. An item that is no `T` is an error in its place; any other error is the
/// last thing that comes.
impl<T: DeserializeOwned> Stream for Rx<T> {
    type Item = Result<T, StreamError>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        if this.ended {
            return Poll::Ready(None);
        }
        // As in `recv`: charged for every few items.
        let charged = if this.until_budget == 1 { Some(ready!(coop::poll_proceed(cx))) } else { None };
        let next = loop {
            if let Some(item) = this.next_of_run() {
                break Some(item);
            }
            match ready!(this.poll_run(cx)) {
                Ok(true) => {}
                Ok(false) => break None,
                Err(error) => {
                    this.ended = true;
                    break Some(Err(error));
                }
            }
        };
        match charged {
            Some(charged) => {
                charged.made_progress();
                this.until_budget = ITEMS_PER_BUDGET;
            }
            None => this.until_budget -= 1,
        }
        this.ended |= next.is_none();
        Poll::Ready(next)
    }
}

/// An item is sent as with [`send`](Tx::send), by itself: there is nothing to flush. Closing the sink is
/// [`finish`](Tx::finish).
impl<T: Serialize> Sink<T> for Tx<T> {
    type Error = StreamError;

    fn poll_ready(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        let this = self.get_mut();
        let charged = ready!(coop::poll_proceed(cx));
        if this.full {
            ready!(this.poll_room(cx));
        }
        charged.made_progress();
        Poll::Ready(Ok(()))
    }

    fn start_send(self: Pin<&mut Self>, item: T) -> Result<(), StreamError> {
        self.get_mut().push(&item)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Result<(), StreamError>> {
        self.core.close_sender(Ending::End);
        Poll::Ready(Ok(()))
    }
}

//! Two halves of a stream that cannot be taken apart: TLS and WebSocket keep one state for both directions.
//!
//! Each poll takes the lock for its own time; both halves belong to one task as a rule, so nobody waits for it. Whoever
//! drops the writing half ends its direction, as with the halves of a TCP stream.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Takes a stream apart.
pub(super) fn halves<S: AsyncWrite + Unpin>(stream: S) -> (ReadHalf<S>, WriteHalf<S>) {
    let stream = Arc::new(Mutex::new(stream));
    (ReadHalf { stream: stream.clone() }, WriteHalf { stream, is_shut: false })
}

/// The half that reads.
#[derive(Debug)]
pub struct ReadHalf<S> {
    stream: Arc<Mutex<S>>,
}

impl<S: AsyncRead + Unpin> AsyncRead for ReadHalf<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream.lock()).poll_read(cx, buf)
    }
}

/// The half that writes. Dropping it ends its direction as far as that goes without waiting.
#[derive(Debug)]
pub struct WriteHalf<S: AsyncWrite + Unpin> {
    stream: Arc<Mutex<S>>,
    is_shut: bool,
}

impl<S: AsyncWrite + Unpin> AsyncWrite for WriteHalf<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.stream.lock()).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.stream.lock()).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.lock().is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.stream.lock()).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut *self.stream.lock()).poll_shutdown(cx);
        self.is_shut |= shut.is_ready();
        shut
    }
}

impl<S: AsyncWrite + Unpin> Drop for WriteHalf<S> {
    fn drop(&mut self) {
        if !self.is_shut {
            // A peer that takes nothing more hears the end when the other half goes, too.
            let _ = Pin::new(&mut *self.stream.lock()).poll_shutdown(&mut Context::from_waker(Waker::noop()));
        }
    }
}

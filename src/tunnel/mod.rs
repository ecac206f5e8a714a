//! Byte tunnels: a virtual connection, or a pair of streams of bytes, as a reader and writer of bytes.
//!
//! A [`Tunnel`] reads and writes like a TCP stream: [`AsyncRead`] and [`AsyncWrite`], each direction with an end of its
//! own, and with backpressure from end to end by the credit of its streams. [`Connection::tunnel`] opens one, a
//! [`TunnelService`] takes them; every pair of a `Tx<Bytes>` and an `Rx<Bytes>` is one, too.
//!
//! A tunnel is also a [`Conduit`]: a session over it is a *nested session*. With
//! [TLS in between](crate::conduit::tls::TlsConduit::connect_over) nobody on the way can read or alter it, not even a
//! [relay](crate::proxy_connections); `examples/tunnel.rs` shows it.
//!
//! What breaks off never looks complete: a writer that is dropped without its end makes the peer read an error.
//! `[stream.tunnel.end]` The errors are `io::Error`s with a [`TunnelError`] inside.

mod service;

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use tokio::io::{AsyncBufRead, AsyncRead, AsyncWrite, ReadBuf};
use tollway_protocol::error::ConnectionEnd;

pub use self::service::{MAX_SESSION_TUNNELS, MAX_TUNNELS, METHOD, TunnelService};
use crate::conduit::framed::{Framed, FramedReader, FramedWriter};
use crate::conduit::{Conduit, Lanes, PeerInfo};
use crate::connection::Connection;
use crate::rpc::{CallError, Rx, StreamError, Tx, stream};

/// Why a tunnel broke off. [`TunnelError::of`] finds it in an `io::Error`.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TunnelError {
    /// One of the tunnel's streams has ended before its end: the peer gave it up, or takes no more.
    #[error("the tunnel broke off: {0}")]
    Stream(#[source] StreamError),
    /// The connection that carries the tunnel has ended, or its session.
    #[error("the connection of the tunnel has ended: {0}")]
    Connection(#[source] ConnectionEnd),
}

impl TunnelError {
    /// What lies in an error of a tunnel's reader or writer.
    pub fn of(error: &io::Error) -> Option<&TunnelError> {
        error.get_ref()?.downcast_ref()
    }

    fn into_io(self) -> io::Error {
        let kind = match &self {
            Self::Connection(_) | Self::Stream(StreamError::ConnectionEnded) => io::ErrorKind::ConnectionAborted,
            Self::Stream(StreamError::Reset(_)) => io::ErrorKind::ConnectionReset,
            Self::Stream(StreamError::Stopped(_) | StreamError::Finished) => io::ErrorKind::BrokenPipe,
            Self::Stream(StreamError::DeadlineExceeded) => io::ErrorKind::TimedOut,
            Self::Stream(StreamError::NotSent) => io::ErrorKind::NotConnected,
            Self::Stream(_) => io::ErrorKind::InvalidData,
        };
        io::Error::new(kind, self)
    }
}

/// Bytes in both directions.
///
/// `shutdown` ends this side's direction: the peer reads what was written, then its end, and the other direction goes on.
/// Nothing need be flushed. Dropped without it, the peer reads an error; what is still to be read is not wanted any more.
#[derive(Debug)]
pub struct Tunnel {
    reader: TunnelReader,
    writer: TunnelWriter,
}

impl Tunnel {
    /// A tunnel of two streams. One half of each has gone to the peer, or is about to: until the call that carries it is on
    /// its way, writing waits.
    ///
    /// ```
    /// use tollway::rpc::stream;
    /// use tollway::tunnel::Tunnel;
    ///
    /// let (tx, to_the_peer) = stream();
    /// let (from_the_peer, rx) = stream();
    /// let tunnel = Tunnel::new(tx, rx);
    /// // `(to_the_peer, from_the_peer)` are the arguments of a call, of which the peer makes its own end.
    /// # drop((tunnel, to_the_peer, from_the_peer));
    /// ```
    pub fn new(tx: Tx<Bytes>, rx: Rx<Bytes>) -> Self {
        Self::on(None, tx, rx)
    }

    fn on(connection: Option<Connection>, tx: Tx<Bytes>, rx: Rx<Bytes>) -> Self {
        let reader = TunnelReader { rx, chunk: Bytes::new(), connection: connection.clone() };
        Tunnel { reader, writer: TunnelWriter { tx, connection, ends_in_order: false } }
    }

    /// Takes it apart. The tunnel holds its connection until both halves are gone.
    pub fn into_split(self) -> (TunnelReader, TunnelWriter) {
        (self.reader, self.writer)
    }
}

impl Connection {
    /// Makes a tunnel to what serves this connection, such as a [`TunnelService`]. The tunnel holds the connection open; one
    /// connection may have many.
    ///
    /// # Errors
    /// Those of a call; [`CallError::UnknownMethod`] when the service takes no tunnels, [`CallError::Refused`] with code
    /// [`AT_CAPACITY`](tollway_protocol::error::code::AT_CAPACITY) when it has too many.
    ///
    /// # Cancel safety
    /// Dropping the future ends the tunnel at the peer.
    pub async fn tunnel(&self) -> Result<Tunnel, CallError> {
        let (tx, received) = stream();
        let (sent, rx) = stream();
        self.call::<_, ()>(METHOD, &(received, sent)).await?;
        Ok(Tunnel::on(Some(self.clone()), tx, rx))
    }
}

/// The reading half of a [`Tunnel`]. Dropped, it tells the peer that no more is wanted.
#[derive(Debug)]
pub struct TunnelReader {
    rx: Rx<Bytes>,
    /// What is left of the last item.
    chunk: Bytes,
    connection: Option<Connection>,
}

/// The writing half of a [`Tunnel`]. Dropped without `shutdown`, it makes the peer read an error.
#[derive(Debug)]
pub struct TunnelWriter {
    tx: Tx<Bytes>,
    connection: Option<Connection>,
    /// Below a conduit, whose own framing tells an end from a break, a drop is an end.
    ends_in_order: bool,
}

/// The error with all that is known of its cause.
fn told(error: StreamError, connection: &Option<Connection>) -> io::Error {
    let error = match (error, connection) {
        (StreamError::ConnectionEnded, Some(connection)) => {
            // Streams fail before their connection ends, but under one lock.
            drop(connection.shared().lock());
            connection
                .end()
                .map_or(TunnelError::Stream(StreamError::ConnectionEnded), |end| TunnelError::Connection(end.clone()))
        }
        (error, _) => TunnelError::Stream(error),
    };
    error.into_io()
}

/// # Cancel safety
/// A read that is not repeated has taken nothing.
impl AsyncBufRead for TunnelReader {
    fn poll_fill_buf(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        let this = self.get_mut();
        while this.chunk.is_empty() {
            match ready!(this.rx.poll_chunk(cx)) {
                Ok(Some(chunk)) => this.chunk = chunk,
                Ok(None) => break,
                Err(error) => return Poll::Ready(Err(told(error, &this.connection))),
            }
        }
        Poll::Ready(Ok(&this.chunk))
    }

    fn consume(self: Pin<&mut Self>, bytes: usize) {
        let this = self.get_mut();
        this.chunk.advance(bytes);
        if this.chunk.is_empty() {
            // An idle reader keeps no block.
            this.chunk = Bytes::new();
        }
    }
}

impl AsyncRead for TunnelReader {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let chunk = ready!(self.as_mut().poll_fill_buf(cx))?;
        let bytes = chunk.len().min(buf.remaining());
        buf.put_slice(&chunk[..bytes]);
        self.consume(bytes);
        Poll::Ready(Ok(()))
    }
}

impl TunnelReader {
    /// Tells the peer that no more is wanted, as a drop does: its writer fails.
    pub fn stop(&mut self) {
        self.rx.stop();
    }
}

impl TunnelWriter {
    /// Gives this direction up: what is not on its way is dropped, and the peer reads an error with this code.
    pub fn reset(self, code: u32) {
        self.tx.reset_now(code);
    }
}

impl AsyncWrite for TunnelWriter {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.tx.poll_write(cx, slices).map_err(|error| told(error, &this.connection))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// What was written goes its way by itself.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Ends this direction, and waits until all of it is with the conduit below.
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.tx.poll_finish(cx).map_err(|error| told(error, &this.connection))
    }
}

impl Drop for TunnelWriter {
    fn drop(&mut self) {
        if self.ends_in_order {
            self.tx.finish_now();
        }
    }
}

impl AsyncBufRead for Tunnel {
    fn poll_fill_buf(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<&[u8]>> {
        Pin::new(&mut self.get_mut().reader).poll_fill_buf(cx)
    }

    fn consume(mut self: Pin<&mut Self>, bytes: usize) {
        Pin::new(&mut self.reader).consume(bytes);
    }
}

impl AsyncRead for Tunnel {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.reader).poll_read(cx, buf)
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.writer).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.writer).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.writer).poll_shutdown(cx)
    }
}

/// Carries a nested session, on one lane. Nothing is proved about who is at the other end: the peer of the session that
/// carries the tunnel may be a relay.
impl Conduit for Tunnel {
    type Reader = FramedReader<TunnelReader>;
    type Writer = FramedWriter<TunnelWriter>;

    fn lanes(&self) -> Lanes {
        Lanes::One
    }

    fn peer(&self) -> PeerInfo {
        let address = match &self.reader.connection {
            Some(connection) => {
                format!("connection {} of {}", connection.id(), connection.shared().peer().info)
            }
            None => "streams".to_owned(),
        };
        PeerInfo::new("tunnel", address)
    }

    fn split(self) -> (Self::Reader, Self::Writer) {
        let peer = self.peer();
        let (reader, mut writer) = self.into_split();
        writer.ends_in_order = true;
        Framed::new(reader, writer, peer).split()
    }
}

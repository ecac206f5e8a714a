//! [`WsIo`]: a stream of bytes in binary messages.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes, BytesMut};
use futures_util::{Sink, Stream};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::error::ProtocolError;
use tokio_tungstenite::tungstenite::{Error, Message};

#[cfg(feature = "tls")]
use crate::conduit::tls::TlsIo;

/// Bytes of a message that is sent: as many as one write of the kernel's takes as a rule.
const CUT: usize = 64 * 1024;

/// What carries a WebSocket.
#[derive(Debug)]
pub(super) enum Link {
    Plain(TcpStream),
    #[cfg(feature = "tls")]
    Tls(Box<TlsIo>),
}

/// The same poll on either.
macro_rules! on_link {
    ($link:expr, $io:ident => $poll:expr) => {
        match &mut *$link {
            Link::Plain($io) => {
                let $io = Pin::new($io);
                $poll
            }
            #[cfg(feature = "tls")]
            Link::Tls($io) => {
                let $io = Pin::new(&mut **$io);
                $poll
            }
        }
    };
}

impl AsyncRead for Link {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        on_link!(self, io => io.poll_read(cx, buf))
    }
}

impl AsyncWrite for Link {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        on_link!(self, io => io.poll_write(cx, bytes))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_link!(self, io => io.poll_flush(cx))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        on_link!(self, io => io.poll_shutdown(cx))
    }
}

/// A stream of bytes over WebSocket.
#[derive(Debug)]
pub struct WsIo {
    socket: WebSocketStream<Link>,
    /// What is left of the last message.
    unread: Bytes,
    has_peer_ended: bool,
    has_ended: bool,
}

impl WsIo {
    pub(super) fn new(socket: WebSocketStream<Link>) -> Self {
        Self { socket, unread: Bytes::new(), has_peer_ended: false, has_ended: false }
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, message: impl FnOnce() -> Message) -> Poll<io::Result<()>> {
        // Until what was refused before is written, nothing more is taken: that bounds the buffer.
        ready!(Pin::new(&mut self.socket).poll_ready(cx)).map_err(told)?;
        Poll::Ready(Pin::new(&mut self.socket).start_send(message()).map_err(told))
    }
}

impl AsyncRead for WsIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        while self.unread.is_empty() && !self.has_peer_ended {
            match ready!(Pin::new(&mut self.socket).poll_next(cx)).transpose().map_err(told)? {
                // [conduit.ws.end]
                Some(Message::Binary(bytes)) => {
                    self.has_peer_ended = bytes.is_empty();
                    self.unread = bytes;
                }
                Some(Message::Close(_)) | None => self.has_peer_ended = true,
                Some(Message::Text(_)) => {
                    let text = "a text message: Tollway travels in binary ones";
                    return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, text)));
                }
                // Pings are answered below.
                Some(_) => {}
            }
        }
        let bytes = self.unread.len().min(buf.remaining());
        buf.put_slice(&self.unread[..bytes]);
        self.unread.advance(bytes);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for WsIo {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let bytes = slices.iter().map(|slice| slice.len()).sum::<usize>().min(CUT);
        // An empty message would be the end.
        if bytes == 0 {
            return Poll::Ready(Ok(0));
        }
        ready!(self.poll_send(cx, || {
            let mut message = BytesMut::with_capacity(bytes);
            for slice in slices {
                let rest = bytes - message.len();
                message.extend_from_slice(&slice[..slice.len().min(rest)]);
            }
            Message::Binary(message.freeze())
        }))?;
        Poll::Ready(Ok(bytes))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(cx).map_err(told)
    }

    /// Ends this direction alone. `[conduit.ws.end]`
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.has_ended {
            ready!(self.poll_send(cx, || Message::Binary(Bytes::new())))?;
            self.has_ended = true;
            if self.has_peer_ended {
                ready!(self.poll_send(cx, || Message::Close(None)))?;
            }
        }
        self.poll_flush(cx)
    }
}

/// What an error of WebSocket means, in words that help.
pub(super) fn told(error: Error) -> io::Error {
    match error {
        Error::Io(error) => error,
        Error::ConnectionClosed | Error::AlreadyClosed => io::ErrorKind::BrokenPipe.into(),
        Error::Protocol(ProtocolError::ResetWithoutClosingHandshake) => io::ErrorKind::ConnectionReset.into(),
        Error::Http(response) => {
            let text = format!(
                "the peer answers HTTP {} and not Tollway over WebSocket (subprotocol {}): check the URL",
                response.status(),
                super::SUBPROTOCOL
            );
            io::Error::new(io::ErrorKind::InvalidData, text)
        }
        Error::Protocol(error @ (ProtocolError::SecWebSocketSubProtocolError(_) | ProtocolError::HttparseError(_))) => {
            let text = format!(
                "the peer does not speak Tollway over WebSocket ({error}): use the same scheme on both sides, such as \
                 wss:// if it listens with TLS, and check host and port"
            );
            io::Error::new(io::ErrorKind::InvalidData, text)
        }
        other => io::Error::new(io::ErrorKind::InvalidData, other),
    }
}

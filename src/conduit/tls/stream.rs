//! [`TlsIo`]: a TLS stream that remembers what it failed with.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsStream;

use super::config::EXPORTER_LABEL;
use super::{CertificateDer, TlsError, TlsFailure};
use crate::conduit::{PeerIdentity, PeerInfo};

/// How long a client that was refused may take to hear why.
const LINGER: Duration = Duration::from_secs(2);

/// A TLS stream, over TCP unless something else is said.
#[derive(Debug)]
pub struct TlsIo<S = TcpStream> {
    stream: TlsStream<S>,
    failure: TlsFailure,
}

impl<S> TlsIo<S> {
    pub(super) fn new(stream: TlsStream<S>) -> Self {
        Self { stream, failure: TlsFailure::default() }
    }

    pub(in crate::conduit) fn failure(&self) -> TlsFailure {
        self.failure.clone()
    }

    /// The protocol that was agreed on.
    pub(super) fn alpn(&self) -> Option<&[u8]> {
        self.stream.get_ref().1.alpn_protocol()
    }

    /// Who is at the other end, as far as TLS has proved it.
    pub(super) fn peer(&self, kind: &'static str, address: String) -> PeerInfo {
        let session = self.stream.get_ref().1;
        let exported = match &self.stream {
            TlsStream::Client(stream) => stream.get_ref().1.export_keying_material([0; 32], EXPORTER_LABEL, None),
            TlsStream::Server(stream) => stream.get_ref().1.export_keying_material([0; 32], EXPORTER_LABEL, None),
        };
        let peer = PeerInfo::new(kind, address).with_identity(identity(session.peer_certificates()));
        match exported {
            Ok(exporter) => peer.with_exporter(exporter),
            // Only before the end of the handshake, which is behind us.
            Err(_) => peer,
        }
    }
}

/// Keeps the cause of the first failure, and puts it into words.
fn told(failure: &TlsFailure, error: io::Error) -> io::Error {
    match TlsError::of_io(&error) {
        None => error,
        Some(cause) => io::Error::new(error.kind(), failure.get_or_init(|| cause).clone()),
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsIo<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        Pin::new(&mut this.stream).poll_read(cx, buf).map_err(|error| told(&this.failure, error))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsIo<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        Pin::new(&mut this.stream).poll_write(cx, bytes).map_err(|error| told(&this.failure, error))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        Pin::new(&mut this.stream).poll_write_vectored(cx, slices).map_err(|error| told(&this.failure, error))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        Pin::new(&mut this.stream).poll_flush(cx).map_err(|error| told(&this.failure, error))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        Pin::new(&mut this.stream).poll_shutdown(cx).map_err(|error| told(&this.failure, error))
    }
}

/// What verified certificates prove.
pub(crate) fn identity(chain: Option<&[CertificateDer<'_>]>) -> PeerIdentity {
    match chain {
        None | Some([]) => PeerIdentity::Unproved,
        Some(chain) => {
            PeerIdentity::Certificate { chain: chain.iter().map(|der| Bytes::copy_from_slice(der)).collect() }
        }
    }
}

/// Lets a client hear the alert that was sent: closes this direction, and discards what comes, for a bounded time.
pub(super) async fn linger(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    let farewell = async {
        if stream.shutdown().await.is_ok() {
            let mut rest = [0; 4096];
            while stream.read(&mut rest).await.is_ok_and(|read| read > 0) {}
        }
    };
    // However it ends, there is nobody to report it to.
    let _ = tokio::time::timeout(LINGER, farewell).await;
}

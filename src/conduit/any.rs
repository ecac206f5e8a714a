//! Conduits of whichever kind a URL names: [`connect`], [`AnyListener`] and the [`AnyConduit`] that both yield.
//!
//! The kinds are an enum, so a session over any of them costs one jump for each poll and is compiled once.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use bytes::Bytes;
use tollway_protocol::error::Reason;

use super::endpoint::{Endpoint, Scheme};
use super::listen::Listener;
#[cfg(feature = "quic")]
use super::quic::{QuicConduit, QuicListener};
use super::tcp::{TcpConduit, TcpListener};
#[cfg(feature = "tls")]
use super::tls::{ClientTls, ServerTls, TlsConduit, TlsConduitError, TlsError, TlsFailure, TlsListener};
#[cfg(unix)]
use super::unix::{UnixConduit, UnixListener};
#[cfg(feature = "ws")]
use super::ws::{WsConduit, WsListener};
use super::{Conduit, ConduitError, FrameReader, FrameWriter, Lane, Lanes, PeerInfo, Received, Stranger, Transmit};
use crate::future::BoxFuture;

/// What connecting needs beside the URL. The default suits every URL whose peer has a pin or a certificate of a CA that
/// the system trusts.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct ConnectOptions {
    /// Whom to trust and what to show where there is TLS.
    #[cfg(feature = "tls")]
    pub tls: ClientTls,
}

/// What listening needs beside the URL.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct ListenOptions {
    /// What to show and whom to take where there is TLS; needed there.
    #[cfg(feature = "tls")]
    pub tls: Option<ServerTls>,
}

/// Why there is no conduit to or at a URL.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EstablishError {
    /// The network or the file system is against it.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The two sides do not come together over TLS.
    #[cfg(feature = "tls")]
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// Somebody is to listen with TLS and has nothing to show.
    #[error("{scheme}:// needs a certificate to show: give one, or have one made that signs itself")]
    NoCertificate {
        /// The scheme.
        scheme: &'static str,
    },
}

#[cfg(feature = "tls")]
impl From<TlsConduitError> for EstablishError {
    fn from(error: TlsConduitError) -> Self {
        match error {
            TlsConduitError::Io(error) => Self::Io(error),
            TlsConduitError::Tls(error) => Self::Tls(error),
        }
    }
}

/// The same thing said of each kind of an enum.
macro_rules! of_each {
    ($value:expr, $inner:ident => $do:expr) => {
        match $value {
            Self::Tcp($inner) => $do,
            #[cfg(unix)]
            Self::Unix($inner) => $do,
            #[cfg(feature = "tls")]
            Self::Tls($inner) => $do,
            #[cfg(feature = "quic")]
            Self::Quic($inner) => $do,
            #[cfg(feature = "ws")]
            Self::Ws($inner) => $do,
        }
    };
}

/// A conduit of any kind of this build.
#[derive(Debug)]
#[non_exhaustive]
pub enum AnyConduit {
    /// `tcp://`
    Tcp(TcpConduit),
    /// `unix://`
    #[cfg(unix)]
    Unix(UnixConduit),
    /// `tls://`
    #[cfg(feature = "tls")]
    Tls(TlsConduit),
    /// `quic://`
    #[cfg(feature = "quic")]
    Quic(Box<QuicConduit>),
    /// `ws://` and `wss://`
    #[cfg(feature = "ws")]
    Ws(WsConduit),
}

/// Connects to a URL. A path in it is not looked at, but for WebSocket's request.
///
/// There is no time limit but the system's: whoever opens a session bounds it together with the handshake.
///
/// # Errors
/// When nobody answers, or it is not whom it should be.
///
/// # Cancel safety
/// Dropping the future gives the attempt up.
pub async fn connect(endpoint: &Endpoint, options: &ConnectOptions) -> Result<AnyConduit, EstablishError> {
    // Without TLS there is nothing to choose.
    #[cfg(not(feature = "tls"))]
    let _ = options;
    warn_of_plain(endpoint);
    Ok(match endpoint.scheme() {
        Scheme::Tcp => AnyConduit::Tcp(TcpConduit::connect(endpoint.address()).await?),
        #[cfg(unix)]
        Scheme::Unix => AnyConduit::Unix(UnixConduit::connect(endpoint.socket().unwrap_or("".as_ref())).await?),
        #[cfg(feature = "tls")]
        Scheme::Tls => AnyConduit::Tls(TlsConduit::connect(endpoint, &options.tls).await?),
        #[cfg(feature = "quic")]
        Scheme::Quic => AnyConduit::Quic(Box::new(QuicConduit::connect(endpoint, &options.tls).await?)),
        #[cfg(feature = "ws")]
        Scheme::Ws => AnyConduit::Ws(WsConduit::connect(endpoint).await?),
        #[cfg(all(feature = "ws", feature = "tls"))]
        Scheme::Wss => AnyConduit::Ws(WsConduit::connect_tls(endpoint, &options.tls).await?),
        // No endpoint with a scheme that is not built can be parsed.
        #[allow(unreachable_patterns, reason = "which kinds there are depends on the build")]
        _ => return Err(io::Error::from(io::ErrorKind::Unsupported).into()),
    })
}

/// What is neither encrypted nor authenticated is for this machine, or for a tunnel.
pub(crate) fn warn_of_plain(endpoint: &Endpoint) {
    if !endpoint.is_local() && !endpoint.scheme().is_encrypted() {
        tracing::warn!(
            %endpoint,
            "this is not encrypted, and whoever is on the way can read and alter it: use tls:// or quic:// beyond this \
             machine, or a tunnel"
        );
    }
}

impl AnyConduit {
    /// Where to find what TLS fails with after its handshake: see [`TlsConduit::failure`].
    #[cfg(feature = "tls")]
    pub(crate) fn tls_failure(&self) -> Option<TlsFailure> {
        match self {
            Self::Tls(conduit) => Some(conduit.failure()),
            #[cfg(feature = "quic")]
            Self::Quic(conduit) => Some(conduit.failure()),
            _ => None,
        }
    }
}

impl Conduit for AnyConduit {
    type Reader = AnyReader;
    type Writer = AnyWriter;

    fn lanes(&self) -> Lanes {
        of_each!(self, conduit => conduit.lanes())
    }

    fn peer(&self) -> PeerInfo {
        of_each!(self, conduit => conduit.peer())
    }

    fn take_engine(&mut self) -> Option<BoxFuture<'static, ()>> {
        of_each!(self, conduit => conduit.take_engine())
    }

    fn split(self) -> (AnyReader, AnyWriter) {
        match self {
            Self::Tcp(conduit) => {
                let (reader, writer) = conduit.split();
                (AnyReader::Tcp(reader), AnyWriter::Tcp(writer))
            }
            #[cfg(unix)]
            Self::Unix(conduit) => {
                let (reader, writer) = conduit.split();
                (AnyReader::Unix(reader), AnyWriter::Unix(writer))
            }
            #[cfg(feature = "tls")]
            Self::Tls(conduit) => {
                let (reader, writer) = conduit.split();
                (AnyReader::Tls(reader), AnyWriter::Tls(writer))
            }
            #[cfg(feature = "quic")]
            Self::Quic(conduit) => {
                let (reader, writer) = conduit.split();
                (AnyReader::Quic(Box::new(reader)), AnyWriter::Quic(Box::new(writer)))
            }
            #[cfg(feature = "ws")]
            Self::Ws(conduit) => {
                let (reader, writer) = conduit.split();
                (AnyReader::Ws(reader), AnyWriter::Ws(writer))
            }
        }
    }
}

/// The receiving half of an [`AnyConduit`].
#[derive(Debug)]
#[non_exhaustive]
pub enum AnyReader {
    /// `tcp://`
    Tcp(<TcpConduit as Conduit>::Reader),
    /// `unix://`
    #[cfg(unix)]
    Unix(<UnixConduit as Conduit>::Reader),
    /// `tls://`
    #[cfg(feature = "tls")]
    Tls(<TlsConduit as Conduit>::Reader),
    /// `quic://`
    #[cfg(feature = "quic")]
    Quic(Box<<QuicConduit as Conduit>::Reader>),
    /// `ws://` and `wss://`
    #[cfg(feature = "ws")]
    Ws(<WsConduit as Conduit>::Reader),
}

impl FrameReader for AnyReader {
    fn poll_recv(
        &mut self,
        cx: &mut Context<'_>,
        frames: &mut Vec<(Lane, Bytes)>,
    ) -> Poll<Result<Received, ConduitError>> {
        of_each!(self, reader => reader.poll_recv(cx, frames))
    }

    fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        of_each!(self, reader => reader.poll_discard(cx))
    }

    fn set_max_frame(&mut self, bytes: usize) {
        of_each!(self, reader => reader.set_max_frame(bytes));
    }
}

/// The sending half of an [`AnyConduit`].
#[derive(Debug)]
#[non_exhaustive]
pub enum AnyWriter {
    /// `tcp://`
    Tcp(<TcpConduit as Conduit>::Writer),
    /// `unix://`
    #[cfg(unix)]
    Unix(<UnixConduit as Conduit>::Writer),
    /// `tls://`
    #[cfg(feature = "tls")]
    Tls(<TlsConduit as Conduit>::Writer),
    /// `quic://`
    #[cfg(feature = "quic")]
    Quic(Box<<QuicConduit as Conduit>::Writer>),
    /// `ws://` and `wss://`
    #[cfg(feature = "ws")]
    Ws(<WsConduit as Conduit>::Writer),
}

impl FrameWriter for AnyWriter {
    fn start_send(&mut self, frame: Transmit) {
        of_each!(self, writer => writer.start_send(frame));
    }

    fn buffered(&self) -> usize {
        of_each!(self, writer => writer.buffered())
    }

    fn ahead(&self) -> usize {
        of_each!(self, writer => writer.ahead())
    }

    fn is_blocked(&self, lane: Lane) -> bool {
        of_each!(self, writer => writer.is_blocked(lane))
    }

    fn next_unblocked(&mut self) -> Option<Lane> {
        of_each!(self, writer => writer.next_unblocked())
    }

    fn end_lane(&mut self, lane: Lane) {
        of_each!(self, writer => writer.end_lane(lane));
    }

    fn start_close(&mut self, reason: &Reason) {
        of_each!(self, writer => writer.start_close(reason));
    }

    fn written(&self) -> u64 {
        of_each!(self, writer => writer.written())
    }

    fn set_max_frame(&mut self, bytes: usize) {
        of_each!(self, writer => writer.set_max_frame(bytes));
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConduitError>> {
        of_each!(self, writer => writer.poll_flush(cx))
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConduitError>> {
        of_each!(self, writer => writer.poll_close(cx))
    }

    fn start_refusal(&mut self, stranger: Stranger) {
        of_each!(self, writer => writer.start_refusal(stranger));
    }
}

/// Listens at any number of URLs at once.
#[derive(Default)]
pub struct AnyListener {
    listening: Vec<(Endpoint, One)>,
    /// Who is asked first: in turn, so that a busy one leaves the others their share.
    turn: AtomicUsize,
}

enum One {
    Tcp(TcpListener),
    #[cfg(unix)]
    Unix(UnixListener),
    #[cfg(feature = "tls")]
    Tls(TlsListener),
    #[cfg(feature = "quic")]
    Quic(QuicListener),
    #[cfg(feature = "ws")]
    Ws(WsListener),
}

impl fmt::Debug for AnyListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.endpoints()).finish()
    }
}

impl AnyListener {
    /// Listens at one URL. Port 0 takes a free one.
    ///
    /// # Errors
    /// When it cannot be bound, or TLS has nothing to show there.
    pub async fn bind(endpoint: &Endpoint, options: &ListenOptions) -> Result<Self, EstablishError> {
        let mut listener = Self::default();
        listener.add(endpoint, options).await?;
        Ok(listener)
    }

    /// Listens at one more URL.
    ///
    /// # Errors
    /// As [`bind`](Self::bind); then it listens where it did before.
    pub async fn add(&mut self, endpoint: &Endpoint, options: &ListenOptions) -> Result<(), EstablishError> {
        warn_of_plain(endpoint);
        let mut place = endpoint.clone().without_path().with_pin(None);
        let bound = match endpoint.scheme() {
            Scheme::Tcp => One::Tcp(TcpListener::bind(endpoint.address()).await?),
            #[cfg(unix)]
            Scheme::Unix => One::Unix(UnixListener::bind(endpoint.socket().unwrap_or("".as_ref()))?),
            #[cfg(feature = "tls")]
            Scheme::Tls => One::Tls(TlsListener::bind(endpoint.address(), options.shown(endpoint)?).await?),
            #[cfg(feature = "quic")]
            Scheme::Quic => One::Quic(QuicListener::bind(endpoint.address(), options.shown(endpoint)?).await?),
            #[cfg(feature = "ws")]
            Scheme::Ws => One::Ws(WsListener::bind(endpoint.address()).await?),
            #[cfg(all(feature = "ws", feature = "tls"))]
            Scheme::Wss => One::Ws(WsListener::bind_tls(endpoint.address(), options.shown(endpoint)?).await?),
            // No endpoint with a scheme that is not built can be parsed.
            #[allow(unreachable_patterns, reason = "which kinds there are depends on the build")]
            _ => return Err(io::Error::from(io::ErrorKind::Unsupported).into()),
        };
        if let Some(address) = bound.local_addr()? {
            place = place.with_address(address);
        }
        #[cfg(feature = "tls")]
        if endpoint.scheme().is_encrypted() {
            place = place.with_pin(options.shown(endpoint)?.pin());
        }
        #[cfg(not(feature = "tls"))]
        let _ = options;
        self.listening.push((place, bound));
        Ok(())
    }

    /// Where it listens, in the order of binding: with the real ports, and with the pin of a certificate that no CA vouches
    /// for.
    pub fn endpoints(&self) -> impl Iterator<Item = &Endpoint> {
        self.listening.iter().map(|(endpoint, _)| endpoint)
    }
}

#[cfg(feature = "tls")]
impl ListenOptions {
    fn shown(&self, endpoint: &Endpoint) -> Result<&ServerTls, EstablishError> {
        self.tls.as_ref().ok_or(EstablishError::NoCertificate { scheme: endpoint.scheme().name() })
    }
}

impl One {
    /// The address that was bound, where there are addresses.
    fn local_addr(&self) -> io::Result<Option<SocketAddr>> {
        match self {
            Self::Tcp(listener) => listener.local_addr(),
            #[cfg(unix)]
            Self::Unix(_) => return Ok(None),
            #[cfg(feature = "tls")]
            Self::Tls(listener) => listener.local_addr(),
            #[cfg(feature = "quic")]
            Self::Quic(listener) => listener.local_addr(),
            #[cfg(feature = "ws")]
            Self::Ws(listener) => listener.local_addr(),
        }
        .map(Some)
    }

    async fn next(&self) -> io::Result<BoxFuture<'static, io::Result<AnyConduit>>> {
        Ok(match self {
            Self::Tcp(listener) => {
                let pending = listener.next().await?;
                Box::pin(async { pending.await.map(AnyConduit::Tcp) })
            }
            #[cfg(unix)]
            Self::Unix(listener) => {
                let pending = listener.next().await?;
                Box::pin(async { pending.await.map(AnyConduit::Unix) })
            }
            #[cfg(feature = "tls")]
            Self::Tls(listener) => {
                let pending = listener.next().await?;
                Box::pin(async { pending.await.map(AnyConduit::Tls) })
            }
            #[cfg(feature = "quic")]
            Self::Quic(listener) => {
                let pending = listener.next().await?;
                Box::pin(async { pending.await.map(|conduit| AnyConduit::Quic(Box::new(conduit))) })
            }
            #[cfg(feature = "ws")]
            Self::Ws(listener) => {
                let pending = listener.next().await?;
                Box::pin(async { pending.await.map(AnyConduit::Ws) })
            }
        })
    }
}

impl Listener for AnyListener {
    type Conduit = AnyConduit;
    type Pending = BoxFuture<'static, io::Result<AnyConduit>>;

    async fn next(&self) -> io::Result<Self::Pending> {
        if let [(_, only)] = &*self.listening {
            return only.next().await;
        }
        // Each of them may be dropped without a loss, so all but the first that is ready are.
        let mut waiting: Vec<_> = self.listening.iter().map(|(_, one)| Box::pin(one.next())).collect();
        let first = self.turn.fetch_add(1, Ordering::Relaxed) % waiting.len().max(1);
        waiting.rotate_left(first);
        poll_fn(|cx| {
            let ready = waiting.iter_mut().map(|next| next.as_mut().poll(cx)).find(Poll::is_ready);
            ready.unwrap_or(Poll::Pending)
        })
        .await
    }
}

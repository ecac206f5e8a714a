//! TLS over TCP: [`TlsConduit`] and the [`TlsListener`] that yields them.
//!
//! The frames are those of TCP, inside TLS 1.3 with the protocol name `tollway/1`. A listener accepts a TCP connection
//! and hands it out at once; its handshake is part of what is pending, so that a slow one delays nobody. TLS runs over any
//! other stream of bytes, too: inside a [tunnel](crate::tunnel) it keeps those out who carry it.

mod config;
mod error;
mod stream;
mod verify;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, ToSocketAddrs};
use tokio_rustls::{TlsAcceptor, TlsConnector};

pub use self::config::{ALPN, ClientTls, Identity, ServerTls, certificates, fingerprint};
pub use self::error::TlsError;
pub use self::stream::TlsIo;
#[cfg(feature = "quic")]
pub(crate) use self::{config::EXPORTER_LABEL, stream::identity};
pub use rustls::pki_types::CertificateDer;

use super::PeerInfo;
use super::endpoint::Endpoint;
use super::framed::{Framed, framed_conduit};
use super::halves::{ReadHalf, WriteHalf, halves};
use super::listen::Listener;
use super::tcp::{TcpListener, set_options};
use crate::future::BoxFuture;

/// Why there is no conduit over TLS.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsConduitError {
    /// The network failed below TLS.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// TLS failed.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

impl From<TlsConduitError> for io::Error {
    fn from(error: TlsConduitError) -> Self {
        match error {
            TlsConduitError::Io(error) => error,
            TlsConduitError::Tls(error) => io::Error::new(io::ErrorKind::InvalidData, error),
        }
    }
}

/// What TLS runs over: TCP, or any other stream of bytes.
pub trait Below: AsyncRead + AsyncWrite + Unpin + Send + 'static {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> Below for S {}

/// A conduit over one TLS connection. One lane.
#[derive(Debug)]
pub struct TlsConduit<S: Below = TcpStream> {
    framed: Framed<ReadHalf<TlsIo<S>>, WriteHalf<TlsIo<S>>>,
    failure: TlsFailure,
}

/// What TLS has failed with after its handshake, once it has: a listener refuses a client's certificate only then.
pub type TlsFailure = Arc<OnceLock<TlsError>>;

impl TlsConduit {
    /// Connects to a `tls://` endpoint and proves that it is the right one: by its pin if it has one, else by a CA.
    ///
    /// # Errors
    /// When it cannot be reached, or is not whom it should be.
    ///
    /// # Cancel safety
    /// Dropping the future gives the attempt up.
    pub async fn connect(endpoint: &Endpoint, tls: &ClientTls) -> Result<Self, TlsConduitError> {
        let (io, peer) = dial(endpoint, tls, ALPN, "tls").await?;
        Ok(Self::new(io, peer))
    }
}

impl<S: Below> TlsConduit<S> {
    fn new(io: TlsIo<S>, peer: PeerInfo) -> Self {
        let failure = io.failure();
        let (reader, writer) = halves(io);
        Self { framed: Framed::new(reader, writer, peer), failure }
    }

    /// Shakes hands over a stream that there is already, such as a [tunnel](crate::tunnel), and proves that the endpoint is
    /// at its other end: by its pin, or by a CA and its host. Nobody who carries the stream can read or alter it.
    ///
    /// # Errors
    /// When the other end is not whom it should be, or the stream fails.
    ///
    /// # Cancel safety
    /// Dropping the future drops the stream.
    pub async fn connect_over(stream: S, endpoint: &Endpoint, tls: &ClientTls) -> Result<Self, TlsConduitError> {
        let io = shake(stream, endpoint, tls, ALPN).await?;
        let peer = io.peer("tls", format!("{}:{}", endpoint.host(), endpoint.port()));
        Ok(Self::new(io, peer))
    }

    /// Shakes hands as a listener does, over a stream that there is already. `address` says for people where it came from.
    /// There is no time limit: whoever accepts sessions bounds it together with the handshake.
    ///
    /// # Errors
    /// When the other end does not speak TLS, does not take this side's certificate or shows none that is taken here, or
    /// the stream fails.
    ///
    /// # Cancel safety
    /// Dropping the future drops the stream.
    pub async fn accept_over(stream: S, address: impl Into<String>, tls: &ServerTls) -> Result<Self, TlsConduitError> {
        let acceptor = TlsAcceptor::from(Arc::new(tls.config(ALPN)?));
        let (io, peer) = TlsIncoming { stream, address: address.into(), acceptor }.shake("tls").await?;
        Ok(Self::new(io, peer))
    }

    /// Where to find what TLS has failed with, after the conduit was lost.
    pub fn failure(&self) -> TlsFailure {
        self.failure.clone()
    }
}

framed_conduit!(TlsConduit<S>, ReadHalf<TlsIo<S>>, WriteHalf<TlsIo<S>>, S: Below);

/// Connects and shakes hands, for `tls://` and `wss://`.
pub(super) async fn dial(
    endpoint: &Endpoint,
    tls: &ClientTls,
    alpn: &[u8],
    kind: &'static str,
) -> Result<(TlsIo, PeerInfo), TlsConduitError> {
    let stream = TcpStream::connect(endpoint.address()).await?;
    set_options(&stream)?;
    let address = stream.peer_addr()?.to_string();
    let io = shake(stream, endpoint, tls, alpn).await?;
    let peer = io.peer(kind, address);
    Ok((io, peer))
}

/// Shakes hands as a client and proves that the endpoint is at the other end.
async fn shake<S: Below>(
    stream: S,
    endpoint: &Endpoint,
    tls: &ClientTls,
    alpn: &[u8],
) -> Result<TlsIo<S>, TlsConduitError> {
    let config = tls.config(endpoint.pin(), alpn, TlsFailure::default())?;
    let connector = TlsConnector::from(Arc::new(config));
    let stream = connector.connect(server_name(endpoint)?, stream).await.map_err(told)?;
    let io = TlsIo::new(stream.into());
    match io.alpn() == Some(alpn) {
        true => Ok(io),
        // One that knows nothing of protocol names would take our frames for its own.
        false => Err(TlsError::NotTollway.into()),
    }
}

/// The name by which the peer's certificate is asked for.
pub(super) fn server_name(endpoint: &Endpoint) -> Result<ServerName<'static>, TlsError> {
    let host = endpoint.host().to_owned();
    ServerName::try_from(host.clone()).map_err(|_| TlsError::InvalidName(host))
}

/// Tells what TLS has against the peer from what the network has.
fn told(error: io::Error) -> TlsConduitError {
    match TlsError::of_io(&error) {
        Some(error) => error.into(),
        // A listener that hangs up on a handshake speaks something else.
        None if error.kind() == io::ErrorKind::UnexpectedEof => TlsError::NotTls.into(),
        None => error.into(),
    }
}

/// Accepts connections for TLS, whatever happens.
pub struct TlsListener {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl fmt::Debug for TlsListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TlsListener").field("listener", &self.listener).finish_non_exhaustive()
    }
}

impl TlsListener {
    /// Listens on the first of the addresses that can be bound.
    ///
    /// # Errors
    /// When none can be bound, or the certificate cannot be used.
    pub async fn bind(addresses: impl ToSocketAddrs, tls: &ServerTls) -> Result<Self, TlsConduitError> {
        Self::with_alpn(addresses, tls, ALPN).await
    }

    pub(super) async fn with_alpn(
        addresses: impl ToSocketAddrs,
        tls: &ServerTls,
        alpn: &[u8],
    ) -> Result<Self, TlsConduitError> {
        let acceptor = TlsAcceptor::from(Arc::new(tls.config(alpn)?));
        Ok(Self { listener: TcpListener::bind(addresses).await?, acceptor })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// If the system does not tell.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    pub(super) async fn next_stream(&self) -> io::Result<TlsIncoming> {
        let (stream, address) = self.listener.next_stream().await?;
        Ok(TlsIncoming { stream, address: address.to_string(), acceptor: self.acceptor.clone() })
    }
}

impl Listener for TlsListener {
    type Conduit = TlsConduit;
    type Pending = BoxFuture<'static, io::Result<TlsConduit>>;

    async fn next(&self) -> io::Result<Self::Pending> {
        let incoming = self.next_stream().await?;
        Ok(Box::pin(async move {
            let (io, peer) = incoming.shake("tls").await?;
            Ok(TlsConduit::new(io, peer))
        }))
    }
}

/// A client that has connected and not yet shaken hands.
pub(super) struct TlsIncoming<S = TcpStream> {
    stream: S,
    address: String,
    acceptor: TlsAcceptor,
}

impl<S: Below> TlsIncoming<S> {
    /// Shakes hands. There is no time limit here: whoever accepts sessions bounds it.
    pub(super) async fn shake(self, kind: &'static str) -> Result<(TlsIo<S>, PeerInfo), TlsConduitError> {
        match self.acceptor.accept(self.stream).into_fallible().await {
            Ok(stream) => {
                let io = TlsIo::new(stream.into());
                let peer = io.peer(kind, self.address);
                Ok((io, peer))
            }
            Err((error, stream)) => {
                // The client is to hear why. Closing while its bytes lie unread would take the alert back.
                stream::linger(stream).await;
                Err(told(error))
            }
        }
    }
}

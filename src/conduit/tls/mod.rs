//! TLS over TCP: [`TlsConduit`] and the [`TlsListener`] that yields them.
//!
//! The frames are those of TCP, inside TLS 1.3 with the protocol name `tollway/1`. A listener accepts a TCP connection
//! and hands it out at once; its handshake is part of what is pending, so that a slow one delays nobody.

mod config;
mod error;
mod stream;
mod verify;

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

use rustls::pki_types::ServerName;
use tokio::net::{TcpStream, ToSocketAddrs};
use tokio_rustls::{TlsAcceptor, TlsConnector};

pub use self::config::{ALPN, ClientTls, Identity, ServerTls, certificates, fingerprint};
pub use self::error::TlsError;
pub use self::stream::TlsIo;
#[cfg(feature = "quic")]
pub(crate) use self::{config::EXPORTER_LABEL, stream::identity};
pub use rustls::pki_types::CertificateDer;

use super::endpoint::Endpoint;
use super::framed::{Framed, FramedReader, FramedWriter};
use super::halves::{ReadHalf, WriteHalf, halves};
use super::listen::Listener;
use super::tcp::{TcpListener, set_options};
use super::{Conduit, Lanes, PeerInfo};
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

/// A conduit over one TLS connection. One lane.
#[derive(Debug)]
pub struct TlsConduit {
    framed: Framed<ReadHalf<TlsIo>, WriteHalf<TlsIo>>,
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

    fn new(io: TlsIo, peer: PeerInfo) -> Self {
        let failure = io.failure();
        let (reader, writer) = halves(io);
        Self { framed: Framed::new(reader, writer, peer), failure }
    }

    /// Where to find what TLS has failed with, after the conduit was lost.
    pub fn failure(&self) -> TlsFailure {
        self.failure.clone()
    }
}

/// Connects and shakes hands, for `tls://` and `wss://`.
pub(super) async fn dial(
    endpoint: &Endpoint,
    tls: &ClientTls,
    alpn: &[u8],
    kind: &'static str,
) -> Result<(TlsIo, PeerInfo), TlsConduitError> {
    let config = Arc::new(tls.config(endpoint.pin(), alpn, TlsFailure::default())?);
    let name = server_name(endpoint)?;
    let stream = TcpStream::connect(endpoint.address()).await?;
    set_options(&stream)?;
    let address = stream.peer_addr()?;
    let stream = TlsConnector::from(config).connect(name, stream).await.map_err(told)?;
    let io = TlsIo::new(stream.into());
    match io.alpn() == Some(alpn) {
        true => {
            let peer = io.peer(kind, address);
            Ok((io, peer))
        }
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

impl Conduit for TlsConduit {
    type Reader = FramedReader<ReadHalf<TlsIo>>;
    type Writer = FramedWriter<WriteHalf<TlsIo>>;

    fn lanes(&self) -> Lanes {
        self.framed.lanes()
    }

    fn peer(&self) -> PeerInfo {
        self.framed.peer()
    }

    fn split(self) -> (Self::Reader, Self::Writer) {
        self.framed.split()
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
        Ok(TlsIncoming { stream, address, acceptor: self.acceptor.clone() })
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
pub(super) struct TlsIncoming {
    stream: TcpStream,
    address: SocketAddr,
    acceptor: TlsAcceptor,
}

impl TlsIncoming {
    /// Shakes hands. There is no time limit here: whoever accepts sessions bounds it.
    pub(super) async fn shake(self, kind: &'static str) -> Result<(TlsIo, PeerInfo), TlsConduitError> {
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

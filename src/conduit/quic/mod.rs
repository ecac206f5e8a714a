//! QUIC: [`QuicConduit`] and the [`QuicListener`] that yields them.
//!
//! Each lane is a bidirectional QUIC stream, so what is lost on one delays no other. Whoever sends first on a lane opens
//! its stream, and puts the lane's number in front; frames follow as on any stream of bytes, without a preface: the
//! protocol name of TLS has said it. When lane 0 ends, all that was sent on others has arrived.
//!
//! Memory: a peer's stream may have [`LANE_WINDOW`] bytes on their way, all together as many for each lane in use and one more, at most
//! [`MAX_CONNECTION_WINDOW`]. That is the most that gaps in what arrives can make this side keep. Keepalive is the
//! session's: QUIC's own idle timeout and keepalive are off, and a path that changes keeps the session.

mod engine;
mod reader;
mod ready;
mod shared;
mod writer;

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use quinn::{ConnectionError, EndpointConfig, TransportConfig, VarInt};

pub use self::reader::QuicReader;
pub use self::writer::QuicWriter;

use super::endpoint::Endpoint;
use super::listen::Listener;
use super::tls::{self, ALPN, CertificateDer, ClientTls, ServerTls, TlsConduitError, TlsError, TlsFailure};
use super::{Conduit, Lanes, PeerInfo};
use crate::future::BoxFuture;
use engine::{Catching, Engine};
use shared::Shared;

/// Bytes that may be on their way on one lane: the session's own default for one stream. 1 Gbit/s over 8 ms.
pub const LANE_WINDOW: u64 = 1024 * 1024;

/// Bytes that may be on their way on all lanes of a conduit together, and that may be sent and not yet acknowledged: so
/// many lanes may wait for a lost packet at the same time without delaying another.
pub const MAX_CONNECTION_WINDOW: u64 = 8 * LANE_WINDOW;

/// Streams that the peer may have open at first: each one that may come costs some dozens of bytes. It doubles with use.
const FIRST_STREAMS: u64 = 128;

/// Streams that the peer may have open at most: above twice what a session's limit on connections is by default, so that
/// this limit is what an honest peer meets first.
const MAX_STREAMS: u64 = 1 << 18;

/// Both sides of every conduit have the same. `[conduit.quic.windows]` `[conduit.quic.idle]`
fn transport() -> Arc<TransportConfig> {
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(FIRST_STREAMS as u32))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .stream_receive_window(VarInt::from_u32(LANE_WINDOW as u32))
        .receive_window(VarInt::from_u32(2 * LANE_WINDOW as u32))
        .send_window(MAX_CONNECTION_WINDOW)
        .datagram_receive_buffer_size(None)
        .max_idle_timeout(None)
        .keep_alive_interval(None);
    Arc::new(config)
}

/// A conduit over one QUIC connection. A lane for each virtual connection.
#[derive(Debug)]
pub struct QuicConduit {
    peer: PeerInfo,
    /// The halves exist from the start, so that a conduit dropped before it is split is noticed too.
    reader: QuicReader,
    writer: QuicWriter,
    engine: Engine,
    failure: TlsFailure,
}

impl QuicConduit {
    /// Connects to a `quic://` endpoint and proves that it is the right one: by its pin if it has one, else by a CA.
    ///
    /// There is no time limit: whoever opens a session bounds it together with the handshake.
    ///
    /// # Errors
    /// When it cannot be reached, or is not whom it should be.
    ///
    /// # Cancel safety
    /// Dropping the future gives the attempt up.
    pub async fn connect(endpoint: &Endpoint, tls: &ClientTls) -> Result<Self, TlsConduitError> {
        let failure = TlsFailure::default();
        let config = tls.config(endpoint.pin(), ALPN, failure.clone())?;
        let config = QuicClientConfig::try_from(config).map_err(|error| TlsError::Config(error.to_string()))?;
        let mut config = quinn::ClientConfig::new(Arc::new(config));
        config.transport_config(transport());
        // A name is checked here, an address in the certificate by its text.
        tls::server_name(endpoint)?;
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in tokio::net::lookup_host(endpoint.address()).await? {
            let local: SocketAddr = match address.is_ipv4() {
                true => (Ipv4Addr::UNSPECIFIED, 0).into(),
                false => (Ipv6Addr::UNSPECIFIED, 0).into(),
            };
            let socket = std::net::UdpSocket::bind(local)?;
            let runtime = Arc::new(Catching::default());
            let (socket, engine) =
                runtime.catch(|runtime| quinn::Endpoint::new(EndpointConfig::default(), None, socket, runtime));
            let socket = socket?;
            let (connecting, connection) =
                runtime.catch(|_| socket.connect_with(config.clone(), address, endpoint.host()));
            let mut engine = engine.with(connection);
            match engine.drive(connecting.map_err(io::Error::other)?).await {
                Ok(connection) => return Ok(Self::new(connection, engine, failure)),
                Err(error) => match failure.get().cloned().or_else(|| tls_error(&error)) {
                    Some(error) => return Err(error.into()),
                    None => last = error.into(),
                },
            }
        }
        Err(last.into())
    }

    fn new(connection: quinn::Connection, engine: Engine, failure: TlsFailure) -> Self {
        let chain = connection.peer_identity().and_then(|chain| chain.downcast::<Vec<CertificateDer<'static>>>().ok());
        let peer = PeerInfo::new("quic", connection.remote_address().to_string());
        let mut peer = peer.with_identity(tls::identity(chain.as_ref().map(|chain| &***chain)));
        let mut exporter = [0; 32];
        // Fails only for lengths that no hash can fill.
        if connection.export_keying_material(&mut exporter, tls::EXPORTER_LABEL, b"").is_ok() {
            peer = peer.with_exporter(exporter);
        }
        let shared = Shared::new(connection, failure.clone());
        let (reader, writer) = (QuicReader::new(shared.clone()), QuicWriter::new(shared));
        Self { peer, reader, writer, engine, failure }
    }

    /// Where to find what TLS has failed with, after the conduit was lost.
    pub fn failure(&self) -> TlsFailure {
        self.failure.clone()
    }
}

/// What TLS, inside QUIC, has against the connection.
fn tls_error(error: &ConnectionError) -> Option<TlsError> {
    /// TLS alerts are QUIC's error codes from here on.
    const ALERTS: u64 = 0x100;
    let (code, reason) = match error {
        ConnectionError::TransportError(error) => (u64::from(error.code), error.reason.clone()),
        ConnectionError::ConnectionClosed(closed) => {
            (u64::from(closed.error_code), String::from_utf8_lossy(&closed.reason).into_owned())
        }
        ConnectionError::VersionMismatch => return Some(TlsError::NotTollway),
        _ => return None,
    };
    let alert = u8::try_from(code.checked_sub(ALERTS)?).ok()?;
    match TlsError::of_alert(alert.into()) {
        TlsError::Protocol(_) => Some(TlsError::Protocol(reason)),
        told => Some(told),
    }
}

impl Conduit for QuicConduit {
    type Reader = QuicReader;
    type Writer = QuicWriter;

    fn lanes(&self) -> Lanes {
        Lanes::PerConnection
    }

    fn peer(&self) -> PeerInfo {
        self.peer.clone()
    }

    fn take_engine(&mut self) -> Option<BoxFuture<'static, ()>> {
        Some(Box::pin(std::mem::take(&mut self.engine)))
    }

    fn split(self) -> (QuicReader, QuicWriter) {
        (self.reader, self.writer)
    }
}

/// Accepts QUIC connections, whatever happens.
pub struct QuicListener {
    socket: quinn::Endpoint,
    runtime: Arc<Catching>,
}

impl fmt::Debug for QuicListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("QuicListener").field("local_addr", &self.socket.local_addr()).finish()
    }
}

impl QuicListener {
    /// Listens on the first of the addresses that can be bound.
    ///
    /// # Errors
    /// When none can be bound, or the certificate cannot be used.
    pub async fn bind(addresses: impl tokio::net::ToSocketAddrs, tls: &ServerTls) -> Result<Self, TlsConduitError> {
        let config = QuicServerConfig::try_from(tls.config(ALPN)?);
        let config = config.map_err(|error| TlsError::Config(error.to_string()))?;
        let mut config = quinn::ServerConfig::with_crypto(Arc::new(config));
        // Whoever changes its network keeps its session. [conduit.quic.migration]
        config.migration(true).transport_config(transport());
        let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
        for address in tokio::net::lookup_host(addresses).await? {
            let bound = std::net::UdpSocket::bind(address).and_then(|socket| {
                let runtime = Arc::new(Catching::default());
                let (socket, engine) = runtime.catch(|runtime| {
                    quinn::Endpoint::new(EndpointConfig::default(), Some(config.clone()), socket, runtime)
                });
                // All connections share the socket, so that it has a task of its own.
                drop(engine);
                Ok(Self { socket: socket?, runtime })
            });
            match bound {
                Ok(listener) => return Ok(listener),
                Err(error) => last = error,
            }
        }
        Err(last.into())
    }

    /// Where it listens.
    ///
    /// # Errors
    /// If the system does not tell.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }
}

impl Listener for QuicListener {
    type Conduit = QuicConduit;
    type Pending = BoxFuture<'static, io::Result<QuicConduit>>;

    async fn next(&self) -> io::Result<Self::Pending> {
        let incoming = self.socket.accept().await.ok_or(io::ErrorKind::NotConnected)?;
        let runtime = self.runtime.clone();
        Ok(Box::pin(async move {
            let told = |error| match tls_error(&error) {
                Some(error) => io::Error::new(io::ErrorKind::InvalidData, error),
                None => error.into(),
            };
            let (connecting, mut engine) = runtime.catch(|_| incoming.accept());
            let connection = engine.drive(connecting.map_err(told)?).await.map_err(told)?;
            Ok(QuicConduit::new(connection, engine, TlsFailure::default()))
        }))
    }
}

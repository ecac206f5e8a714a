//! WebSocket, plain and over TLS: [`WsConduit`] and the [`WsListener`] that yields them. For networks that let nothing
//! else through.
//!
//! The stream of bytes is that of TCP, cut anywhere into binary messages. WebSocket has no way to end one direction, so an
//! empty message is the end of its sender's. The subprotocol is [`SUBPROTOCOL`]; the path of the request is not looked at.

mod stream;

use std::fmt;
use std::io;
use std::net::SocketAddr;

use tokio::net::{TcpStream, ToSocketAddrs};
use tokio_tungstenite::tungstenite::client::IntoClientRequest;
use tokio_tungstenite::tungstenite::handshake::server::{ErrorResponse, Request, Response};
use tokio_tungstenite::tungstenite::http::{HeaderMap, HeaderValue, StatusCode, header};
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::{accept_hdr_async_with_config, client_async_with_config};

pub use self::stream::WsIo;
use self::stream::{Link, told};

use super::PeerInfo;
use super::endpoint::Endpoint;
use super::framed::{Framed, framed_conduit};
use super::halves::{ReadHalf, WriteHalf, halves};
use super::listen::Listener;
use super::tcp::{TcpListener, set_options};
#[cfg(feature = "tls")]
use super::tls::{self, ClientTls, ServerTls, TlsConduitError, TlsListener};
use crate::future::BoxFuture;

/// The protocol's name inside WebSocket. `[conduit.ws.subprotocol]`
pub const SUBPROTOCOL: &str = "tollway.1";

/// The largest message that is taken: a peer may join several writes into one. `[conduit.ws.message]`
const MAX_MESSAGE: usize = 1024 * 1024;

/// The protocol's name inside TLS: WebSocket begins as HTTP.
#[cfg(feature = "tls")]
const ALPN: &[u8] = b"http/1.1";

fn config() -> WebSocketConfig {
    // Reads and writes are large already; each connection has both buffers for as long as it lives.
    WebSocketConfig::default()
        .read_buffer_size(32 * 1024)
        .write_buffer_size(64 * 1024)
        .max_message_size(Some(MAX_MESSAGE))
        .max_frame_size(Some(MAX_MESSAGE))
}

/// A conduit over one WebSocket connection. One lane.
#[derive(Debug)]
pub struct WsConduit {
    framed: Framed<ReadHalf<WsIo>, WriteHalf<WsIo>>,
}

impl WsConduit {
    /// Connects to a `ws://` endpoint.
    ///
    /// # Errors
    /// When it cannot be reached, or does not speak Tollway over WebSocket.
    ///
    /// # Cancel safety
    /// Dropping the future gives the attempt up.
    pub async fn connect(endpoint: &Endpoint) -> io::Result<Self> {
        let stream = TcpStream::connect(endpoint.address()).await?;
        set_options(&stream)?;
        let peer = PeerInfo::new("ws", stream.peer_addr()?.to_string());
        Self::dial(Link::Plain(stream), peer, endpoint).await
    }

    /// Connects to a `wss://` endpoint and proves that it is the right one: by its pin if it has one, else by a CA.
    ///
    /// # Errors
    /// When it cannot be reached, is not whom it should be, or does not speak Tollway over WebSocket.
    ///
    /// # Cancel safety
    /// Dropping the future gives the attempt up.
    #[cfg(feature = "tls")]
    pub async fn connect_tls(endpoint: &Endpoint, tls: &ClientTls) -> Result<Self, TlsConduitError> {
        let (io, peer) = tls::dial(endpoint, tls, ALPN, "wss").await?;
        let failure = io.failure();
        let dialed = Self::dial(Link::Tls(Box::new(io)), peer, endpoint).await;
        // A listener refuses a client's certificate only after the handshake of TLS.
        dialed.map_err(|error| failure.get().cloned().map_or(error.into(), Into::into))
    }

    async fn dial(link: Link, peer: PeerInfo, endpoint: &Endpoint) -> io::Result<Self> {
        let mut request = endpoint.clone().with_pin(None).to_string().into_client_request().map_err(told)?;
        request.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(SUBPROTOCOL));
        // Whoever does not agree to the subprotocol is refused here.
        let (socket, _) = client_async_with_config(request, link, Some(config())).await.map_err(told)?;
        Ok(Self::new(WsIo::new(socket), peer))
    }

    fn new(io: WsIo, peer: PeerInfo) -> Self {
        let (reader, writer) = halves(io);
        Self { framed: Framed::new(reader, writer, peer) }
    }
}

framed_conduit!(WsConduit, ReadHalf<WsIo>, WriteHalf<WsIo>);

/// Accepts connections for WebSocket, whatever happens.
pub struct WsListener {
    below: Below,
}

enum Below {
    Plain(TcpListener),
    #[cfg(feature = "tls")]
    Tls(TlsListener),
}

impl fmt::Debug for WsListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WsListener").field("local_addr", &self.local_addr()).finish()
    }
}

impl WsListener {
    /// Listens without TLS on the first of the addresses that can be bound.
    ///
    /// # Errors
    /// When none can be bound.
    pub async fn bind(addresses: impl ToSocketAddrs) -> io::Result<Self> {
        Ok(Self { below: Below::Plain(TcpListener::bind(addresses).await?) })
    }

    /// Listens with TLS on the first of the addresses that can be bound.
    ///
    /// # Errors
    /// When none can be bound, or the certificate cannot be used.
    #[cfg(feature = "tls")]
    pub async fn bind_tls(addresses: impl ToSocketAddrs, tls: &ServerTls) -> Result<Self, TlsConduitError> {
        Ok(Self { below: Below::Tls(TlsListener::with_alpn(addresses, tls, ALPN).await?) })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// If the system does not tell.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        match &self.below {
            Below::Plain(listener) => listener.local_addr(),
            #[cfg(feature = "tls")]
            Below::Tls(listener) => listener.local_addr(),
        }
    }
}

impl Listener for WsListener {
    type Conduit = WsConduit;
    type Pending = BoxFuture<'static, io::Result<WsConduit>>;

    async fn next(&self) -> io::Result<Self::Pending> {
        Ok(match &self.below {
            Below::Plain(listener) => {
                let (stream, address) = listener.next_stream().await?;
                Box::pin(accept(Link::Plain(stream), PeerInfo::new("ws", address.to_string())))
            }
            #[cfg(feature = "tls")]
            Below::Tls(listener) => {
                let incoming = listener.next_stream().await?;
                Box::pin(async move {
                    let (io, peer) = incoming.shake("wss").await?;
                    accept(Link::Tls(Box::new(io)), peer).await
                })
            }
        })
    }
}

async fn accept(link: Link, peer: PeerInfo) -> io::Result<WsConduit> {
    let socket = accept_hdr_async_with_config(link, agree, Some(config())).await.map_err(told)?;
    Ok(WsConduit::new(WsIo::new(socket), peer))
}

/// Answers a request that offers the subprotocol, and refuses every other in words.
#[allow(clippy::result_large_err, reason = "the form of the handshake's callback")]
fn agree(request: &Request, mut response: Response) -> Result<Response, ErrorResponse> {
    if offers(request.headers()) {
        response.headers_mut().insert(header::SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(SUBPROTOCOL));
        return Ok(response);
    }
    let text = format!("This port speaks Tollway: the WebSocket subprotocol must be {SUBPROTOCOL}.\n");
    let mut refusal = ErrorResponse::new(Some(text));
    *refusal.status_mut() = StatusCode::BAD_REQUEST;
    Err(refusal)
}

fn offers(headers: &HeaderMap) -> bool {
    let offered = headers.get_all(header::SEC_WEBSOCKET_PROTOCOL).iter().filter_map(|value| value.to_str().ok());
    offered.flat_map(|names| names.split(',')).any(|name| name.trim() == SUBPROTOCOL)
}

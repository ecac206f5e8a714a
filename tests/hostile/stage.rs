//! A server, an honest session on it, and a raw client that says what it likes.

use std::future::Future;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tollway::protocol::error::{Reason, code};
use tollway::protocol::frame::PREFACE;
use tollway::protocol::id::{CallId, ConnectionId, Parity, StreamId};
use tollway::protocol::limits::{ConnectionLimits, SessionLimits};
use tollway::protocol::message::*;
use tollway::protocol::metadata::Metadata;
use tollway::rpc::{BoxReply, IncomingCall, MethodId, Reply, Rx, Service, Services, stream};
use tollway::{Connection, Server, ServerConfig, Session, SessionConfig};

/// A guard against hanging; nothing takes a tenth of it.
const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) const ECHO: u64 = 1;
/// Runs until it is cancelled.
pub(crate) const NEVER: u64 = 2;
/// Answers with a stream of numbers.
pub(crate) const COUNT: u64 = 3;
/// Takes a stream, never reads it and never answers.
pub(crate) const HOLD: u64 = 4;
/// Answers with 1,000 bytes.
pub(crate) const LARGE: u64 = 5;
/// Answers with a stream that never ends.
pub(crate) const FLOOD: u64 = 6;
/// Drains its connection.
pub(crate) const DRAIN: u64 = 7;

struct Kit;

impl Service for Kit {
    fn name(&self) -> &str {
        "kit"
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        match call.method().0 {
            ECHO => Box::pin(async move {
                match call.args::<Vec<u8>>() {
                    Ok(bytes) => Reply::ok(&bytes),
                    Err(error) => Reply::invalid_payload(&error),
                }
            }),
            NEVER => Box::pin(async move {
                let _held = call;
                std::future::pending().await
            }),
            COUNT => Box::pin(async move {
                let (mut tx, numbers) = stream::<u64>();
                tokio::spawn(async move {
                    for number in 0..50 {
                        if tx.send(number).await.is_err() {
                            return;
                        }
                    }
                    tx.finish();
                });
                Reply::ok(&numbers)
            }),
            HOLD => Box::pin(async move {
                let _held = call.args::<Rx<Vec<u8>>>();
                std::future::pending().await
            }),
            FLOOD => Box::pin(async move {
                let (mut tx, items) = stream::<Vec<u8>>();
                tokio::spawn(async move { while tx.send(vec![0; 400]).await.is_ok() {} });
                Reply::ok(&items)
            }),
            DRAIN => {
                let connection = call.context().connection();
                tokio::spawn(async move { connection.drain(Reason::none(), None).await });
                Reply::ok(&()).boxed()
            }
            LARGE => Reply::ok(&vec![0u8; 1_000]).boxed(),
            _ => Reply::unknown_method().boxed(),
        }
    }
}

/// What the server receives on a connection: little, so that each limit is soon reached.
pub(crate) const LIMITS: ConnectionLimits = ConnectionLimits {
    max_item: 500,
    max_body: 1_000,
    window: 2_500,
    stream_window: 1_000,
    max_calls: 4,
    max_streams: 4,
};

/// A server with an honest guest.
pub(crate) struct Stage {
    pub(crate) address: SocketAddr,
    kit: Connection,
    _session: Session,
}

impl Stage {
    pub(crate) async fn new() -> Self {
        Stage::with(|_| {}).await
    }

    pub(crate) async fn with(configure: impl FnOnce(&mut ServerConfig)) -> Self {
        let session = SessionConfig {
            services: Services::new().with(Kit),
            connection_limits: LIMITS,
            ..SessionConfig::default()
        };
        let mut config = ServerConfig::from(session);
        configure(&mut config);
        let server = Server::bind(&"tcp://127.0.0.1:0".parse().unwrap(), config).await.unwrap();
        let endpoint = server.endpoint().clone();
        let address = SocketAddr::new(endpoint.host().parse().unwrap(), endpoint.port());
        tokio::spawn(server.run(std::future::pending(), Duration::ZERO));
        let session = within(tollway::connect(&endpoint, SessionConfig::default())).await.unwrap();
        let kit = within(session.open("kit")).await.unwrap();
        let stage = Stage { address, kit, _session: session };
        stage.is_well().await;
        stage
    }

    /// The honest session calls and streams as ever.
    pub(crate) async fn is_well(&self) {
        let body = vec![7u8; 100];
        assert_eq!(within(self.kit.call::<_, Vec<u8>>(MethodId(ECHO), &body)).await.unwrap(), body);
        let mut numbers: Rx<u64> = within(self.kit.call(MethodId(COUNT), &())).await.unwrap();
        for expected in 0..50 {
            assert_eq!(within(numbers.recv()).await.unwrap(), Some(expected));
        }
        assert_eq!(within(numbers.recv()).await.unwrap(), None);
    }
}

pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("in time")
}

/// Breaks a rule after the handshake: the peer is told so once, with this code, and nobody else notices.
pub(crate) async fn breaks(code: u32, text: &str, how: impl AsyncFnOnce(&mut Raw)) {
    let stage = Stage::new().await;
    let mut raw = Raw::shaken(&stage).await;
    within(how(&mut raw)).await;
    stage.is_well().await;
    raw.is_told(code, text).await;
    stage.is_well().await;
}

/// The same with a connection to the service.
pub(crate) async fn breaks_on(code: u32, text: &str, how: impl AsyncFnOnce(&mut Raw, ConnectionId)) {
    breaks(code, text, async |raw| {
        let connection = raw.connect(0).await;
        how(raw, connection).await;
    })
    .await;
}

/// The same before the handshake.
pub(crate) async fn breaks_unshaken(code: u32, text: &str, how: impl AsyncFnOnce(&mut Raw)) {
    let stage = Stage::new().await;
    let mut raw = Raw::dial(&stage).await;
    raw.bytes(&PREFACE).await;
    within(how(&mut raw)).await;
    stage.is_well().await;
    raw.read_preface().await;
    raw.is_told(code, text).await;
    stage.is_well().await;
}

/// Does something odd that is no violation: the session still answers after it.
pub(crate) async fn is_tolerated(how: impl AsyncFnOnce(&mut Raw, ConnectionId)) {
    let stage = Stage::new().await;
    let mut raw = Raw::shaken(&stage).await;
    let connection = raw.connect(0).await;
    within(how(&mut raw, connection)).await;
    raw.answers().await;
    stage.is_well().await;
}

pub(crate) fn hello() -> Hello {
    let (limits, metadata) = (SessionLimits::default(), Metadata::new());
    Hello { min_version: 1, max_version: 1, parity: Parity::Odd, limits, metadata }
}

/// The open of the `number`th connection.
pub(crate) fn open(number: u64) -> Open {
    Open {
        connection: ConnectionId(2 * number + 1),
        service: "kit".into(),
        parity: Parity::Odd,
        limits: ConnectionLimits::default(),
        metadata: Metadata::new(),
    }
}

pub(crate) fn close(connection: ConnectionId) -> Close {
    Close { connection, reason: Reason::none().into(), metadata: Metadata::new() }
}

pub(crate) fn request(connection: ConnectionId, call: u64, method: u64) -> Request {
    let (call, metadata) = (CallId(call), Metadata::new());
    Request { connection, call, method, deadline_us: None, metadata, slots: vec![] }
}

/// A slot of a stream that the client sends.
pub(crate) fn upload(stream: u64) -> Slot {
    Slot { stream: StreamId(stream), flow: Flow::ToPeer }
}

/// A slot of a stream that the client receives.
pub(crate) fn download(stream: u64) -> Slot {
    Slot { stream: StreamId(stream), flow: Flow::FromPeer }
}

pub(crate) fn items(connection: ConnectionId, stream: u64) -> Items {
    Items { connection, stream: StreamId(stream), slots: vec![] }
}

/// Kind, header and payload.
pub(crate) fn body<H: Header>(header: &H, payload: &[u8]) -> Vec<u8> {
    [encode_head(header).as_slice(), payload].concat()
}

/// With its length in front.
pub(crate) fn framed(body: &[u8]) -> Vec<u8> {
    [u32::try_from(body.len()).unwrap().to_le_bytes().as_slice(), body].concat()
}

/// A TCP client without a session: what it sends is as wrong as the test wants it.
pub(crate) struct Raw {
    pub(crate) stream: TcpStream,
    buffer: BytesMut,
}

impl Raw {
    pub(crate) async fn dial(stage: &Stage) -> Self {
        let stream = within(TcpStream::connect(stage.address)).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Raw { stream, buffer: BytesMut::new() }
    }

    /// After the handshake.
    pub(crate) async fn shaken(stage: &Stage) -> Self {
        let mut raw = Raw::dial(stage).await;
        raw.bytes(&PREFACE).await;
        raw.send(&hello(), b"").await;
        raw.read_preface().await;
        let (kind, _) = raw.next().await.expect("an answer");
        assert_eq!(kind, HelloAck::KIND);
        raw.send(&Ping { nonce: 1 }, b"").await;
        raw
    }

    pub(crate) async fn read_preface(&mut self) {
        let mut preface = [0; 8];
        within(self.stream.read_exact(&mut preface)).await.unwrap();
        assert_eq!(preface, PREFACE);
    }

    /// Writes bytes as they are. The server may be gone already: what it said last tells.
    pub(crate) async fn bytes(&mut self, bytes: &[u8]) {
        let _gone = within(self.stream.write_all(bytes)).await;
    }

    pub(crate) async fn frame(&mut self, body: &[u8]) {
        self.bytes(&framed(body)).await;
    }

    pub(crate) async fn send<H: Header>(&mut self, header: &H, payload: &[u8]) {
        self.frame(&body(header, payload)).await;
    }

    /// The next frame: its kind, and all of it. `None` at the server's end.
    pub(crate) async fn next(&mut self) -> Option<(u8, Bytes)> {
        loop {
            if let Some(length) = self.buffer.first_chunk::<4>() {
                let whole = 4 + u32::from_le_bytes(*length) as usize;
                if self.buffer.len() >= whole {
                    let mut frame = self.buffer.split_to(whole).freeze();
                    frame.advance(4);
                    return Some((frame[0], frame));
                }
            }
            match within(self.stream.read_buf(&mut self.buffer)).await {
                Ok(0) | Err(_) => return None,
                Ok(_) => {}
            }
        }
    }

    /// Waits for a frame of this kind; others before it are passed over.
    pub(crate) async fn expect<H: Header>(&mut self) -> H {
        loop {
            let (kind, mut frame) = self.next().await.unwrap_or_else(|| panic!("the end before {}", H::NAME));
            if kind == H::KIND {
                return decode_header(&mut frame).unwrap();
            }
            assert_ne!(kind, ProtocolError::KIND, "{:?}", decode_header::<ProtocolError>(&mut frame));
        }
    }

    /// Opens the `number`th connection to the service.
    pub(crate) async fn connect(&mut self, number: u64) -> ConnectionId {
        let open = open(number);
        self.send(&open, b"").await;
        self.expect::<Accept>().await;
        open.connection
    }

    /// The session lives: it answers a ping.
    pub(crate) async fn answers(&mut self) {
        self.send(&Ping { nonce: 4_711 }, b"").await;
        while self.expect::<Pong>().await.nonce != 4_711 {}
    }

    /// Waits for the session's last word, and that it is the last, said once. `[session.violation.once]`
    pub(crate) async fn is_told(&mut self, code: u32, text: &str) {
        let mut told = None;
        while let Some((kind, mut frame)) = self.next().await {
            assert!(told.is_none(), "kind {kind} after the last word");
            if kind == ProtocolError::KIND {
                told = Some(decode_header::<ProtocolError>(&mut frame).unwrap().reason);
            }
        }
        let told = told.expect("a last word");
        assert_eq!(told.code, code, "{}", told.text);
        assert!(told.text.contains(text), "'{text}' is not in '{}'", told.text);
    }

    /// Waits for a Close of the whole session with this code, and its end.
    pub(crate) async fn is_closed(&mut self, code: u32) {
        let close = self.expect::<Close>().await;
        assert!(close.connection.is_root());
        assert_eq!(close.reason.code, code, "{}", close.reason.text);
        assert!(self.next().await.is_none());
    }

    /// Waits for the end, without a word.
    pub(crate) async fn ends(&mut self) {
        while let Some((kind, _)) = self.next().await {
            assert_ne!(kind, ProtocolError::KIND);
        }
    }
}

/// The reason for a rejected open.
pub(crate) async fn rejected(raw: &mut Raw, code: u32) {
    let reject = raw.expect::<Reject>().await;
    assert_eq!(reject.reason.code, code, "{}", reject.reason.text);
}

/// Codes that the cases name.
pub(crate) use code::{
    ABUSE, AT_CAPACITY, CREDIT, ID, LIMIT, MALFORMED, STATE, TIMEOUT, UNKNOWN_KIND, UNKNOWN_SERVICE,
};

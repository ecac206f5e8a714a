//! Pairs of conduits to run one suite on, and what the tests need to drive them.

use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::marker::PhantomData;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
#[cfg(any(feature = "tls", feature = "quic", feature = "ws"))]
use tollway::conduit::endpoint::Endpoint;
use tollway::conduit::framed::Framed;
use tollway::conduit::listen::Listener;
use tollway::conduit::memory::{self, MemoryConduit, ReorderingConduit};
#[cfg(feature = "quic")]
use tollway::conduit::quic::{QuicConduit, QuicListener};
use tollway::conduit::tcp::{TcpConduit, TcpListener};
#[cfg(feature = "tls")]
use tollway::conduit::tls::{ClientTls, Identity, ServerTls, TlsConduit, TlsListener};
#[cfg(unix)]
use tollway::conduit::unix::{UnixConduit, UnixListener};
#[cfg(feature = "ws")]
use tollway::conduit::ws::{WsConduit, WsListener};
use tollway::conduit::{Conduit, ConduitError, FrameReader, FrameWriter, Lane, Lanes, PeerInfo, Received, Transmit};
use tollway::rpc::Services;
use tollway::tunnel::{Tunnel, TunnelReader, TunnelService, TunnelWriter};
use tollway::{Session, SessionConfig};
#[cfg(feature = "quic")]
use udp_relay::{Network, UdpRelay};

#[cfg(feature = "quic")]
#[path = "udp_relay.rs"]
#[allow(dead_code, reason = "each user takes its own part of it")]
mod udp_relay;

pub(crate) type Frames = Vec<(Lane, Bytes)>;

/// A way to make two connected conduits.
pub(crate) trait Pairs {
    type Conduit: Conduit;
    /// Bytes that no buffer below the conduit can hold, to see back-pressure with.
    const BULK: usize;
    /// Two ends with about `capacity` bytes between them, where the kind of conduit lets one choose.
    fn pair(capacity: usize) -> impl Future<Output = (Self::Conduit, Self::Conduit)>;
}

pub(crate) struct Tcp;

impl Pairs for Tcp {
    type Conduit = TcpConduit;
    const BULK: usize = 48 << 20;

    async fn pair(_: usize) -> (TcpConduit, TcpConduit) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (accepted, dialed) = tokio::join!(listener.accept(), TcpConduit::connect(address));
        (dialed.unwrap(), accepted)
    }
}

#[cfg(unix)]
pub(crate) struct Unix;

#[cfg(unix)]
impl Pairs for Unix {
    type Conduit = UnixConduit;
    const BULK: usize = 8 << 20;

    async fn pair(_: usize) -> (UnixConduit, UnixConduit) {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("tollway-pair-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        let listener = UnixListener::bind(&path).unwrap();
        let (accepted, dialed) = tokio::join!(accepted(&listener), UnixConduit::connect(&path));
        (dialed.unwrap(), accepted)
    }
}

#[cfg(feature = "tls")]
pub(crate) struct Tls;

#[cfg(feature = "tls")]
impl Pairs for Tls {
    type Conduit = TlsConduit;
    const BULK: usize = 48 << 20;

    async fn pair(_: usize) -> (TlsConduit, TlsConduit) {
        let server = ServerTls::new(Identity::self_signed(&["localhost"]).unwrap());
        let listener = TlsListener::bind("127.0.0.1:0", &server).await.unwrap();
        let endpoint: Endpoint = format!("tls://{}", listener.local_addr().unwrap()).parse().unwrap();
        let (endpoint, client) = (endpoint.with_pin(server.pin()), ClientTls::default());
        let (accepted, dialed) = tokio::join!(accepted(&listener), TlsConduit::connect(&endpoint, &client));
        (dialed.unwrap(), accepted)
    }
}

#[cfg(feature = "quic")]
pub(crate) struct Quic;

#[cfg(feature = "quic")]
impl Pairs for Quic {
    type Conduit = QuicConduit;
    const BULK: usize = 12 << 20;

    async fn pair(_: usize) -> (QuicConduit, QuicConduit) {
        let server = ServerTls::new(Identity::self_signed(&["localhost"]).unwrap());
        let listener = QuicListener::bind("127.0.0.1:0", &server).await.unwrap();
        let endpoint: Endpoint = format!("quic://{}", listener.local_addr().unwrap()).parse().unwrap();
        let (endpoint, client) = (endpoint.with_pin(server.pin()), ClientTls::default());
        let (accepted, dialed) = tokio::join!(accepted(&listener), QuicConduit::connect(&endpoint, &client));
        (dialed.unwrap(), accepted)
    }
}

#[cfg(feature = "ws")]
pub(crate) struct Ws;

#[cfg(feature = "ws")]
impl Pairs for Ws {
    type Conduit = WsConduit;
    const BULK: usize = 48 << 20;

    async fn pair(_: usize) -> (WsConduit, WsConduit) {
        let listener = WsListener::bind("127.0.0.1:0").await.unwrap();
        let endpoint: Endpoint = format!("ws://{}", listener.local_addr().unwrap()).parse().unwrap();
        let (accepted, dialed) = tokio::join!(accepted(&listener), WsConduit::connect(&endpoint));
        (dialed.unwrap(), accepted)
    }
}

#[cfg(all(feature = "ws", feature = "tls"))]
pub(crate) struct Wss;

#[cfg(all(feature = "ws", feature = "tls"))]
impl Pairs for Wss {
    type Conduit = WsConduit;
    const BULK: usize = 48 << 20;

    async fn pair(_: usize) -> (WsConduit, WsConduit) {
        let server = ServerTls::new(Identity::self_signed(&["localhost"]).unwrap());
        let listener = WsListener::bind_tls("127.0.0.1:0", &server).await.unwrap();
        let endpoint: Endpoint = format!("wss://{}", listener.local_addr().unwrap()).parse().unwrap();
        let (endpoint, client) = (endpoint.with_pin(server.pin()), ClientTls::default());
        let (accepted, dialed) = tokio::join!(accepted(&listener), WsConduit::connect_tls(&endpoint, &client));
        (dialed.unwrap(), accepted)
    }
}

/// The next conduit, with its own handshake done.
async fn accepted<L: Listener>(listener: &L) -> L::Conduit {
    listener.next().await.unwrap().await.unwrap()
}

pub(crate) struct Memory;

impl Pairs for Memory {
    type Conduit = MemoryConduit;
    const BULK: usize = 4 << 20;

    async fn pair(capacity: usize) -> (MemoryConduit, MemoryConduit) {
        memory::pair(capacity)
    }
}

pub(crate) struct Reordering;

impl Pairs for Reordering {
    type Conduit = ReorderingConduit;
    const BULK: usize = 4 << 20;

    async fn pair(capacity: usize) -> (ReorderingConduit, ReorderingConduit) {
        memory::reordering(0xC0FFEE, capacity)
    }
}

/// A byte pipe that gives one byte with each second poll, and takes at most three with each write.
pub(crate) struct Trickle;

impl Pairs for Trickle {
    type Conduit = Framed<Reluctant<DuplexStream>, Reluctant<DuplexStream>>;
    const BULK: usize = 256 << 10;

    async fn pair(capacity: usize) -> (Self::Conduit, Self::Conduit) {
        let (left_writer, right_reader) = tokio::io::duplex(capacity);
        let (right_writer, left_reader) = tokio::io::duplex(capacity);
        let end = |reader, writer| {
            Framed::new(Reluctant::new(reader), Reluctant::new(writer), PeerInfo::new("trickle", "test"))
        };
        (end(left_reader, left_writer), end(right_reader, right_writer))
    }
}

/// A tunnel in a session over another kind of conduit.
pub(crate) struct Nested<P>(PhantomData<P>);

impl<P: Pairs> Pairs for Nested<P>
where
    <P::Conduit as Conduit>::Reader: Unpin,
    <P::Conduit as Conduit>::Writer: Unpin,
{
    type Conduit = Tunnel;
    /// Above the tunnel's outbox and window, and what is below.
    const BULK: usize = 1 << 20;

    async fn pair(capacity: usize) -> (Tunnel, Tunnel) {
        let (left, right) = P::pair(capacity).await;
        let (tell, mut taken) = tokio::sync::mpsc::channel(1);
        let service = TunnelService::new("tunnel", move |tunnel, _context| {
            let tell = tell.clone();
            async move { tell.send(tunnel).await.unwrap() }
        });
        let serving = SessionConfig { services: Services::new().with(service), ..SessionConfig::default() };
        let (near, far) =
            tokio::join!(Session::connect(left, SessionConfig::default()), Session::accept(right, serving));
        let (near, far) = (near.unwrap(), far.unwrap());
        // The far side's session lives as long as the near side's, which the tunnel holds.
        tokio::spawn(async move { far.closed().await });
        let tunnel = near.open("tunnel").await.unwrap().tunnel().await.unwrap();
        (tunnel, taken.recv().await.unwrap())
    }
}

/// TLS inside such a tunnel.
#[cfg(feature = "tls")]
pub(crate) struct NestedTls;

#[cfg(feature = "tls")]
impl Pairs for NestedTls {
    type Conduit = TlsConduit<Tunnel>;
    const BULK: usize = 1 << 20;

    async fn pair(capacity: usize) -> (Self::Conduit, Self::Conduit) {
        let (near, far) = Nested::<Memory>::pair(capacity).await;
        let tls = ServerTls::new(Identity::self_signed(&["inside"]).unwrap());
        let endpoint = "tls://inside:1".parse::<Endpoint>().unwrap().with_pin(tls.pin());
        let client = ClientTls::default();
        let (near, far) = tokio::join!(
            TlsConduit::connect_over(near, &endpoint, &client),
            TlsConduit::accept_over(far, "a tunnel", &tls)
        );
        (near.unwrap(), far.unwrap())
    }
}

/// QUIC on a network on which datagrams overtake each other, so that lanes do, and some are lost.
#[cfg(feature = "quic")]
pub(crate) struct ShakenQuic;

#[cfg(feature = "quic")]
impl Pairs for ShakenQuic {
    type Conduit = QuicConduit;
    const BULK: usize = 10 << 20;

    async fn pair(_: usize) -> (QuicConduit, QuicConduit) {
        let server = ServerTls::new(Identity::self_signed(&["localhost"]).unwrap());
        let listener = QuicListener::bind("127.0.0.1:0", &server).await.unwrap();
        let network =
            Network { loss_ppm: 1_000, delay: Duration::ZERO, jitter: Duration::from_millis(1), seed: 0xC0FFEE };
        let relay = UdpRelay::start(listener.local_addr().unwrap(), network).await;
        let endpoint: Endpoint = format!("quic://{}", relay.address()).parse().unwrap();
        let (endpoint, client) = (endpoint.with_pin(server.pin()), ClientTls::default());
        let (accepted, dialed) = tokio::join!(accepted(&listener), QuicConduit::connect(&endpoint, &client));
        // It carries what the test sends until the test's runtime ends.
        std::mem::forget(relay);
        (dialed.unwrap(), accepted)
    }
}

/// The same of a tunnel: it is written in items of three bytes, and read byte by byte.
pub(crate) struct NestedTrickle;

impl Pairs for NestedTrickle {
    type Conduit = Framed<Reluctant<TunnelReader>, Reluctant<Ending<TunnelWriter>>>;
    const BULK: usize = 256 << 10;

    async fn pair(capacity: usize) -> (Self::Conduit, Self::Conduit) {
        let (near, far) = Nested::<Memory>::pair(capacity).await;
        let end = |tunnel: Tunnel| {
            let (reader, writer) = tunnel.into_split();
            let peer = PeerInfo::new("trickle", "a tunnel");
            Framed::new(Reluctant::new(reader), Reluctant::new(Ending(writer)), peer)
        };
        (end(near), end(far))
    }
}

/// Ends its direction in order when it is dropped.
pub(crate) struct Ending<W: AsyncWrite + Unpin>(W);

impl<W: AsyncWrite + Unpin> AsyncWrite for Ending<W> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

impl<W: AsyncWrite + Unpin> Drop for Ending<W> {
    fn drop(&mut self) {
        let _ended = Pin::new(&mut self.0).poll_shutdown(&mut Context::from_waker(std::task::Waker::noop()));
    }
}

pub(crate) struct Reluctant<S> {
    io: S,
    rested: bool,
}

impl<S> Reluctant<S> {
    pub(crate) fn new(io: S) -> Self {
        Self { io, rested: false }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Reluctant<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.rested = !self.rested;
        if self.rested {
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        let mut byte = [0];
        let mut one = ReadBuf::new(&mut byte);
        ready!(Pin::new(&mut self.io).poll_read(cx, &mut one))?;
        buf.put_slice(one.filled());
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Reluctant<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let end = buf.len().min(3);
        Pin::new(&mut self.io).poll_write(cx, &buf[..end])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_write(cx, bufs.iter().find(|slice| !slice.is_empty()).map_or(&[], |slice| &**slice))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

/// Fails a test that hangs. Nothing waits for this time otherwise.
pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), future).await.expect("the test hangs")
}

/// A frame whose head is `head` and whose payload are `size` bytes that follow from it.
pub(crate) fn frame(lane: u64, head: u32, size: usize) -> Transmit {
    let payload: Vec<u8> = (0..size).map(|byte| (byte as u32 ^ head) as u8).collect();
    Transmit { lane: Lane(lane), head: head.to_le_bytes().into_iter().collect(), payload: payload.into() }
}

/// What arrives for `frame`.
pub(crate) fn body(frame: &Transmit) -> Bytes {
    [&frame.head, &*frame.payload].concat().into()
}

/// Receives until the end or an error.
pub(crate) async fn receive_all(reader: &mut impl FrameReader) -> (Frames, Result<(), ConduitError>) {
    let mut frames = Frames::new();
    loop {
        // A new future for each poll: whatever state it held would be lost.
        let received = poll_fn(|cx| pin!(reader.recv(&mut frames)).poll(cx)).await;
        match received {
            Ok(Received::End) => return (frames, Ok(())),
            Ok(_) => {}
            Err(error) => return (frames, Err(error)),
        }
    }
}

/// Receives until at least one frame, the end or an error is there; the end is an error here.
pub(crate) async fn receive_some(reader: &mut impl FrameReader, frames: &mut Frames) -> Result<(), ConduitError> {
    loop {
        match reader.recv(frames).await? {
            Received::Frames => return Ok(()),
            Received::Progress => {}
            Received::End => return Err(ConduitError::Closed),
        }
    }
}

/// Polls once, without a task to wake.
pub(crate) async fn poll_once<T>(mut poll: impl FnMut(&mut Context<'_>) -> Poll<T>) -> Poll<T> {
    poll_fn(|cx| Poll::Ready(poll(cx))).await
}

/// Asserts that `received` is `sent`: whole, once, and in order within each lane, or altogether on one lane.
pub(crate) fn assert_delivered(lanes: Lanes, sent: &[Transmit], received: &Frames) {
    assert_eq!(received.len(), sent.len());
    if lanes == Lanes::One {
        assert!(received.iter().all(|(lane, _)| *lane == Lane::ROOT));
        assert!(sent.iter().zip(received).all(|(sent, (_, received))| body(sent) == *received));
        return;
    }
    for lane in sent.iter().map(|frame| frame.lane) {
        let sent = sent.iter().filter(|frame| frame.lane == lane).map(body);
        let received = received.iter().filter(|(known, _)| *known == lane).map(|(_, frame)| frame.clone());
        assert!(sent.eq(received), "{lane}");
    }
}

/// Drives a side as a session would: one task that sends, never more than `window` bytes ahead, and receives.
pub(crate) async fn exchange<C: Conduit>(side: C, frames: &[Transmit], window: usize) -> Frames {
    let (mut reader, mut writer) = side.split();
    reader.set_max_frame(1 << 20);
    let (mut received, mut next, mut closed) = (Frames::new(), frames.iter(), false);
    poll_fn(|cx| {
        while !closed {
            while writer.buffered() < window
                && let Some(frame) = next.next()
            {
                writer.start_send(frame.clone());
            }
            let sent_all = next.len() == 0;
            match if sent_all { writer.poll_close(cx) } else { writer.poll_flush(cx) } {
                Poll::Ready(result) => result.unwrap(),
                Poll::Pending => break,
            }
            closed = sent_all;
        }
        loop {
            match ready!(reader.poll_recv(cx, &mut received)).unwrap() {
                Received::End if closed => return Poll::Ready(()),
                Received::End => return Poll::Pending,
                _ => {}
            }
        }
    })
    .await;
    received
}

//! Byte tunnels: bytes both ways with an end for each direction, and sessions inside of them that nobody on the way can
//! read.
#![allow(clippy::unwrap_used)]

use std::future::{Future, poll_fn};
use std::io;
use std::num::NonZeroUsize;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWriteExt, DuplexStream, ReadBuf};
use tokio::sync::mpsc;
use tollway::conduit::framed::Framed;
use tollway::conduit::{PeerInfo, memory};
use tollway::protocol::error::{ConnectionEnd, Reason, SessionEnd, code};
use tollway::rpc::{
    BoxReply, CallError, IncomingCall, MethodId, Reply, Rx, Service, Services, StreamError, Tx, stream,
};
use tollway::tunnel::{Tunnel, TunnelError, TunnelReader, TunnelService, TunnelWriter};
use tollway::{IncomingOpen, Session, SessionConfig, proxy_connections};

/// Nothing here takes a tenth of it, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it takes too long")
}

fn serving(services: Services) -> SessionConfig {
    SessionConfig { services, ..SessionConfig::default() }
}

/// A service that hands out the tunnels that are made to it.
fn taking(name: &str) -> (Services, mpsc::Receiver<Tunnel>) {
    let (tell, taken) = mpsc::channel(16);
    let service = TunnelService::new(name, move |tunnel, _context| {
        let tell = tell.clone();
        async move {
            // A test that has ended takes no more.
            let _ended = tell.send(tunnel).await;
        }
    });
    (Services::new().with(service), taken)
}

/// Both ends of a tunnel, and the sessions that carry it.
struct Line {
    near: Tunnel,
    far: Tunnel,
    client: Session,
    server: Session,
}

async fn line_over(lanes: bool) -> Line {
    let (services, mut taken) = taking("bytes");
    let (client, server) = if lanes {
        let (left, right) = memory::reordering(11, 64 * 1024);
        tokio::join!(Session::connect(left, SessionConfig::default()), Session::accept(right, serving(services)))
    } else {
        let (left, right) = memory::pair(64 * 1024);
        tokio::join!(Session::connect(left, SessionConfig::default()), Session::accept(right, serving(services)))
    };
    let (client, server) = (client.unwrap(), server.unwrap());
    let near = client.open("bytes").await.unwrap().tunnel().await.unwrap();
    Line { near, far: taken.recv().await.unwrap(), client, server }
}

async fn line() -> Line {
    within(line_over(false)).await
}

fn pattern(bytes: usize) -> Vec<u8> {
    (0..bytes).map(|at| (at * 31 + at / 251) as u8).collect()
}

fn cause(error: &io::Error) -> TunnelError {
    TunnelError::of(error).unwrap_or_else(|| panic!("{error:?} has no cause of ours")).clone()
}

/// Writes all in pieces of odd sizes, some of many slices, and ends.
async fn write_in_pieces(writer: &mut TunnelWriter, mut bytes: &[u8]) {
    let mut size = 1;
    while !bytes.is_empty() {
        let (piece, rest) = bytes.split_at(size.min(bytes.len()));
        writer.write_all(piece).await.unwrap();
        bytes = rest;
        size = size * 7 % 100_003;
    }
    writer.shutdown().await.unwrap();
    writer.shutdown().await.unwrap();
    let error = writer.write(b"late").await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe, "{error}");
}

async fn read_all(reader: &mut TunnelReader) -> Vec<u8> {
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).await.unwrap();
    assert_eq!(reader.read(&mut [0; 8]).await.unwrap(), 0, "the end stays the end");
    bytes
}

#[tokio::test]
async fn bytes_pass_both_ways_whatever_their_pieces() {
    for lanes in [false, true] {
        let Line { near, far, client: _client, server: _server } = within(line_over(lanes)).await;
        let ((mut near_reader, mut near_writer), (mut far_reader, mut far_writer)) =
            (near.into_split(), far.into_split());
        let (there, back) = (pattern(3_000_000), pattern(1_234_567));
        let exchange = async {
            tokio::join!(
                write_in_pieces(&mut near_writer, &there),
                write_in_pieces(&mut far_writer, &back),
                read_all(&mut far_reader),
                read_all(&mut near_reader),
            )
        };
        let ((), (), at_far, at_near) = within(exchange).await;
        assert!(at_far == there && at_near == back);
    }
}

#[tokio::test]
async fn slices_are_gathered_and_lines_are_read_where_they_lie() {
    let Line { near, far, client: _client, server: _server } = line().await;
    let (mut writer, mut reader) = (near, far);
    let slices = [&b"a line"[..], b"", b" and", b" more\n", b"rest"].map(io::IoSlice::new);
    assert!(tokio::io::AsyncWrite::is_write_vectored(&writer));
    assert_eq!(within(writer.write_vectored(&slices)).await.unwrap(), 20);
    assert_eq!(writer.write(b"").await.unwrap(), 0, "nothing is sent of nothing");
    writer.shutdown().await.unwrap();
    let mut lines = String::new();
    assert_eq!(within(reader.read_line(&mut lines)).await.unwrap(), 16);
    assert_eq!(lines, "a line and more\n");
    assert_eq!(reader.read(&mut []).await.unwrap(), 0);
    within(reader.read_to_string(&mut lines)).await.unwrap();
    assert_eq!(lines, "a line and more\nrest");
}

#[tokio::test]
async fn an_end_is_of_one_direction_alone() {
    // Of either side's.
    for swapped in [false, true] {
        let Line { near, far, client: _client, server: _server } = line().await;
        let (mut one, mut other) = if swapped { (far, near) } else { (near, far) };
        one.write_all(b"question").await.unwrap();
        within(one.shutdown()).await.unwrap();
        let mut heard = String::new();
        within(other.read_to_string(&mut heard)).await.unwrap();
        assert_eq!(heard, "question");
        let answer = pattern(700_000);
        let answering = async {
            other.write_all(&answer).await.unwrap();
            other.shutdown().await.unwrap();
        };
        let mut read = Vec::new();
        let (read_to_end, ()) = within(async { tokio::join!(one.read_to_end(&mut read), answering) }).await;
        assert_eq!(read_to_end.unwrap(), answer.len());
        assert!(read == answer);
    }
}

/// Whoever has ended its direction may drop everything at once.
#[tokio::test]
async fn a_close_loses_nothing() {
    for round in 0..20 {
        let Line { near, mut far, client, server: _server } = within(line_over(round % 2 == 1)).await;
        let sent = pattern(round * 17_000);
        let closing = async {
            let mut near = near;
            near.write_all(&sent).await.unwrap();
            near.shutdown().await.unwrap();
            drop((near, client));
        };
        let mut received = Vec::new();
        let ((), read) = within(async { tokio::join!(closing, far.read_to_end(&mut received)) }).await;
        read.unwrap();
        assert!(received == sent, "round {round}");
    }
}

/// `[stream.tunnel.end]`
#[tokio::test]
async fn what_breaks_off_never_looks_complete() {
    // A writer that is gone.
    let Line { near, mut far, client: _client, server: _server } = line().await;
    let (_keep, mut writer) = near.into_split();
    writer.write_all(b"half a wo").await.unwrap();
    let mut heard = [0; 9];
    within(far.read_exact(&mut heard)).await.unwrap();
    drop(writer);
    for _ in 0..2 {
        let error = within(far.read(&mut [0; 9])).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(cause(&error), TunnelError::Stream(StreamError::Reset(code::DROPPED)));
    }

    // One that says why.
    let Line { near, mut far, client: _client, server: _server } = line().await;
    let (_keep, writer) = near.into_split();
    writer.reset(4711);
    let error = within(far.read(&mut [0; 9])).await.unwrap_err();
    assert_eq!(cause(&error), TunnelError::Stream(StreamError::Reset(4711)));

    // A reader that wants no more.
    let Line { near, far, client: _client, server: _server } = line().await;
    let (mut reader, mut writer) = (near.into_split().0, far);
    reader.stop();
    let error = within(async {
        loop {
            match writer.write(&[7; 1000]).await {
                Ok(_) => tokio::task::yield_now().await,
                Err(error) => break error,
            }
        }
    });
    let error = error.await;
    assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
    assert_eq!(cause(&error), TunnelError::Stream(StreamError::Stopped(code::DROPPED)));
    assert!(within(writer.shutdown()).await.is_err(), "not all of it arrived");
}

#[tokio::test]
async fn the_end_of_the_connection_or_the_session_is_the_cause() {
    let Line { near, mut far, client, server: _server } = line().await;
    let reason = Reason::new(2000, "that was all");
    client.close(reason.clone());
    let error = within(far.read(&mut [0; 9])).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
    let ended = |end| TunnelError::Connection(ConnectionEnd::Session(end));
    assert_eq!(cause(&error), ended(SessionEnd::ClosedByPeer(reason.clone())));
    let error = within(far.write(b"more")).await.unwrap_err();
    assert_eq!(cause(&error), ended(SessionEnd::ClosedByPeer(reason.clone())));
    let (mut reader, mut writer) = near.into_split();
    for error in [reader.read(&mut [0; 9]).await.unwrap_err(), writer.shutdown().await.unwrap_err()] {
        assert_eq!(cause(&error), ended(SessionEnd::ClosedByUs(reason.clone())));
    }
}

#[tokio::test]
async fn a_reader_that_waits_holds_the_writer_up_within_bounds() {
    let Line { near, mut far, client: _client, server: _server } = line().await;
    let (_keep, mut writer) = near.into_split();
    let piece = pattern(10_000);
    let mut written = 0;
    // It stands still when nothing has moved for many turns of all tasks.
    let mut still = 0;
    while still < 1000 {
        match poll_fn(|cx| Poll::Ready(pin!(writer.write(&piece)).poll(cx))).await {
            Poll::Ready(bytes) => (written, still) = (written + bytes.unwrap(), 0),
            Poll::Pending => {
                still += 1;
                tokio::task::yield_now().await;
            }
        }
    }
    // The window of a stream, its outbox, and what lies between.
    assert!((500_000..2_000_000).contains(&written), "{written}");
    let finish = async {
        writer.shutdown().await.unwrap();
    };
    let mut received = Vec::new();
    let ((), read) = within(async { tokio::join!(finish, far.read_to_end(&mut received)) }).await;
    read.unwrap();
    assert_eq!(received.len(), written);
    assert!(received.chunks(10_000).all(|chunk| chunk == &piece[..chunk.len()]));
}

#[tokio::test]
async fn reads_and_writes_may_be_given_up_at_any_poll() {
    let Line { near, far, client: _client, server: _server } = line().await;
    let (mut reader, (_keep, mut writer)) = (far, near.into_split());
    let sent = pattern(900_000);
    let writing = async {
        let mut rest = &sent[..];
        while !rest.is_empty() {
            // Each turn drops the future of the one before.
            let piece = &rest[..rest.len().min(4321)];
            let bytes = poll_fn(|cx| pin!(writer.write(piece)).poll(cx)).await.unwrap();
            rest = &rest[bytes..];
        }
        poll_fn(|cx| pin!(writer.shutdown()).poll(cx)).await.unwrap();
    };
    let reading = async {
        let mut received = Vec::new();
        let mut piece = [0; 1234];
        loop {
            match poll_fn(|cx| pin!(reader.read(&mut piece)).poll(cx)).await.unwrap() {
                0 => return received,
                bytes => received.extend_from_slice(&piece[..bytes]),
            }
        }
    };
    let ((), received) = within(async { tokio::join!(writing, reading) }).await;
    assert!(received == sent);
}

/// A drop of it is told.
struct Told(mpsc::UnboundedSender<()>);

impl Drop for Told {
    fn drop(&mut self) {
        // A test that has ended hears no more.
        let _ended = self.0.send(());
    }
}

/// Opening tunnels and breaking them off, again and again, keeps no more tasks than the peer's share.
#[tokio::test]
async fn who_takes_tunnels_has_bounded_work_and_none_for_a_connection_that_broke_off() {
    let (gone, mut ends) = mpsc::unbounded_channel();
    let service = TunnelService::new("slow", move |tunnel, _context| {
        let told = Told(gone.clone());
        // As who waits for a backend that does not answer.
        async move {
            let _held = (tunnel, told);
            std::future::pending().await
        }
    });
    let limit = |places| NonZeroUsize::new(places).unwrap();
    let services = Services::new().with(service.with_limits(limit(3), limit(2)));
    let session = async || {
        let (left, right) = memory::pair(64 * 1024);
        let server = Session::accept(right, serving(services.clone()));
        let (client, server) = tokio::join!(Session::connect(left, SessionConfig::default()), server);
        (client.unwrap(), server.unwrap())
    };
    let full = |made: Result<Tunnel, CallError>| match made {
        Err(error @ CallError::Refused(_)) => assert!(error.is_retryable(), "{error}"),
        made => panic!("{made:?}"),
    };
    let ((one, _one), (other, _other)) = within(async { tokio::join!(session(), session()) }).await;

    // The connection's end is the end of the work.
    for _ in 0..20 {
        let connection = within(one.open("slow")).await.unwrap();
        drop(within(connection.tunnel()).await.unwrap());
        connection.close(Reason::none());
        within(ends.recv()).await.unwrap();
    }
    // Streams that broke off, on a connection that stays, count.
    let connection = within(one.open("slow")).await.unwrap();
    for _ in 0..2 {
        drop(within(connection.tunnel()).await.unwrap());
    }
    full(within(connection.tunnel()).await);
    let another = within(one.open("slow")).await.unwrap();
    full(within(another.tunnel()).await);
    // One session leaves places for others, up to the limit of all.
    let others = within(other.open("slow")).await.unwrap();
    let _third = within(others.tunnel()).await.unwrap();
    full(within(others.tunnel()).await);
    connection.close(Reason::none());
    for _ in 0..2 {
        within(ends.recv()).await.unwrap();
    }
    assert!(ends.try_recv().is_err(), "those of other connections go on");
    within(others.tunnel()).await.unwrap();
}

/// What is complete is worked on to its end.
#[tokio::test]
async fn who_has_a_direction_to_its_end_goes_on_after_the_connection() {
    let (tell, mut told) = mpsc::unbounded_channel();
    let service = TunnelService::new("sink", move |mut tunnel, context| {
        let tell = tell.clone();
        async move {
            context.connection().closed().await;
            tokio::task::yield_now().await;
            let mut received = Vec::new();
            tunnel.read_to_end(&mut received).await.unwrap();
            // A test that has ended hears no more.
            let _ended = tell.send(received);
        }
    });
    let (left, right) = memory::pair(64 * 1024);
    let server = Session::accept(right, serving(Services::new().with(service)));
    let (client, server) =
        within(async { tokio::join!(Session::connect(left, SessionConfig::default()), server) }).await;
    let (client, _server) = (client.unwrap(), server.unwrap());
    let connection = within(client.open("sink")).await.unwrap();
    let mut tunnel = within(connection.tunnel()).await.unwrap();
    let sent = pattern(100_000);
    within(tunnel.write_all(&sent)).await.unwrap();
    within(tunnel.shutdown()).await.unwrap();
    connection.close(Reason::none());
    assert!(within(told.recv()).await.unwrap() == sent);
}

/// Takes two streams as arguments, makes a tunnel of them, and answers when it has echoed all that came.
struct Echo;

impl Service for Echo {
    fn name(&self) -> &str {
        "echo"
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        Box::pin(async move {
            let (rx, tx) = call.args::<(Rx<Bytes>, Tx<Bytes>)>().unwrap();
            let (mut reader, mut writer) = Tunnel::new(tx, rx).into_split();
            let copied = tokio::io::copy(&mut reader, &mut writer).await.unwrap();
            writer.shutdown().await.unwrap();
            Reply::ok(&copied)
        })
    }
}

/// `[call.tunnel]`
#[tokio::test]
async fn a_pair_of_streams_is_a_tunnel_and_a_service_that_takes_none_says_so() {
    let (left, right) = memory::pair(64 * 1024);
    let server = serving(Services::new().with(Echo));
    let (client, server) =
        tokio::join!(Session::connect(left, SessionConfig::default()), Session::accept(right, server));
    let (client, _server) = (client.unwrap(), server.unwrap());
    let connection = client.open("echo").await.unwrap();

    let ((tx, received), (sent, rx)) = (stream(), stream());
    let (mut reader, mut writer) = Tunnel::new(tx, rx).into_split();
    let args = (received, sent);
    let question = pattern(400_000);
    let exchange = async {
        // Writing waits for the call, and the call comes last.
        tokio::join!(write_in_pieces(&mut writer, &question), read_all(&mut reader), async {
            tokio::task::yield_now().await;
            connection.call::<_, u64>(MethodId::of("echo", 1, "echo"), &args).await
        })
    };
    let ((), echoed, copied) = within(exchange).await;
    assert!(echoed == question);
    assert_eq!(copied.unwrap(), question.len() as u64);

    // Streams that never travel are no tunnel.
    let ((tx, received), (sent, rx)) = (stream(), stream());
    let mut unsent = Tunnel::new(tx, rx);
    drop((received, sent));
    assert!(within(unsent.write(b"nobody")).await.is_err());

    struct Nothing;
    impl Service for Nothing {
        fn name(&self) -> &str {
            "nothing"
        }
        fn call(&self, _: IncomingCall) -> BoxReply {
            Reply::unknown_method().boxed()
        }
    }
    let (left, right) = memory::pair(64 * 1024);
    let server = serving(Services::new().with(Nothing));
    let (client, server) =
        tokio::join!(Session::connect(left, SessionConfig::default()), Session::accept(right, server));
    let (client, _server) = (client.unwrap(), server.unwrap());
    let refused = within(client.open("nothing").await.unwrap().tunnel()).await;
    assert_eq!(refused.unwrap_err(), CallError::UnknownMethod);
}

/// Says what it was told.
struct Parrot;

const SAY: MethodId = MethodId::of("parrot", 1, "say");

impl Service for Parrot {
    fn name(&self) -> &str {
        "parrot"
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        Box::pin(async move { Reply::ok(&call.args::<String>().unwrap()) })
    }
}

async fn parrot_says(session: &Session, words: &str) -> Result<String, CallError> {
    let parrot = within(session.open("parrot")).await.unwrap();
    within(parrot.call(SAY, words)).await
}

#[tokio::test]
async fn a_nested_session_and_the_one_around_it_end_apart() {
    let Line { near, far, client, server } = line().await;
    let inside = serving(Services::new().with(Parrot));
    let (near, far) =
        within(async { tokio::join!(Session::connect(near, SessionConfig::default()), Session::accept(far, inside)) })
            .await;
    let (near, far) = (near.unwrap(), far.unwrap());
    assert_eq!(near.peer().kind(), "tunnel");
    assert_eq!(parrot_says(&near, "hello").await.unwrap(), "hello");

    // The end of the one inside says its reason to its peer, and nothing to the one around it.
    let reason = Reason::new(3000, "enough");
    near.close(reason.clone());
    assert_eq!(within(far.closed()).await, SessionEnd::ClosedByPeer(reason));
    assert!(client.end().is_none() && server.end().is_none());
    let next = client.open("bytes").await.unwrap().tunnel().await;
    assert!(next.is_ok(), "the session around it goes on");

    // The other way round it is a lost conduit, with the cause in words.
    let Line { near, far, client, server: _server } = line().await;
    let inside = serving(Services::new().with(Parrot));
    let (near, far) =
        within(async { tokio::join!(Session::connect(near, SessionConfig::default()), Session::accept(far, inside)) })
            .await;
    let (near, far) = (near.unwrap(), far.unwrap());
    client.close(Reason::new(3001, "the house burns"));
    for session in [near, far] {
        let SessionEnd::ConduitLost(why) = within(session.closed()).await else { panic!("{:?}", session.end()) };
        assert!(why.contains("the house burns"), "{why}");
    }
}

/// Reads from a pipe, and keeps all that it has read.
struct Tap {
    io: DuplexStream,
    heard: Arc<Mutex<Vec<u8>>>,
}

impl AsyncRead for Tap {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        self.heard.lock().extend_from_slice(&buf.filled()[before..]);
        Poll::Ready(Ok(()))
    }
}

type Tapped = Framed<Tap, DuplexStream>;

/// A conduit for somebody, and the other end of it, where all is heard.
fn tapped(heard: &Arc<Mutex<Vec<u8>>>) -> (Framed<DuplexStream, DuplexStream>, Tapped) {
    let ((one, other), (back, forth)) = (tokio::io::duplex(64 * 1024), tokio::io::duplex(64 * 1024));
    let peer = PeerInfo::new("pipe", "test");
    let tap = Tap { io: other, heard: heard.clone() };
    (Framed::new(back, one, peer.clone()), Framed::new(tap, forth, peer))
}

/// A client and a server, with a relay in between that hears all: the client's session with it, and what keeps it running.
async fn relayed(server: SessionConfig, heard: &Arc<Mutex<Vec<u8>>>) -> (Session, [Session; 3]) {
    let (theirs, ours) = tapped(heard);
    let (upstream, server) =
        tokio::join!(Session::connect(ours, SessionConfig::default()), Session::accept(theirs, server));
    let (upstream, server) = (upstream.unwrap(), server.unwrap());
    let through = upstream.clone();
    let relay = move |open: IncomingOpen| {
        let through = through.clone();
        async move {
            // How it ends is the business of those who talk through it.
            let _summary = proxy_connections(open, &through).await;
        }
    };
    let (theirs, ours) = tapped(heard);
    let services = serving(Services::new().with_fallback(relay));
    let (client, relay) =
        tokio::join!(Session::connect(theirs, SessionConfig::default()), Session::accept(ours, services));
    (client.unwrap(), [upstream, server, relay.unwrap()])
}

fn contains(heard: &Mutex<Vec<u8>>, words: &str) -> bool {
    heard.lock().windows(words.len()).any(|window| window == words.as_bytes())
}

const SECRET: &str = "the combination is 4711, and do not tell the relay";

#[tokio::test]
async fn a_tunnel_passes_a_relay_which_can_read_it() {
    let (services, mut taken) = taking("vault");
    let heard = Arc::default();
    let (client, _keep) = within(relayed(serving(services), &heard)).await;
    let near = within(client.open("vault")).await.unwrap();
    let near = within(near.tunnel()).await.unwrap();
    let far = taken.recv().await.unwrap();
    let inside = serving(Services::new().with(Parrot));
    let (near, far) =
        within(async { tokio::join!(Session::connect(near, SessionConfig::default()), Session::accept(far, inside)) })
            .await;
    let (near, _far) = (near.unwrap(), far.unwrap());
    assert_eq!(parrot_says(&near, SECRET).await.unwrap(), SECRET);
    assert!(contains(&heard, SECRET), "so would anything be found that can be read");
}

#[cfg(feature = "tls")]
#[tokio::test]
async fn a_relay_can_neither_read_what_is_in_tls_nor_answer_in_place_of_the_server() {
    use tollway::conduit::PeerIdentity;
    use tollway::conduit::tls::{ClientTls, Identity, ServerTls, TlsConduit, TlsConduitError, TlsError};

    let (services, mut taken) = taking("vault");
    let heard = Arc::default();
    let (client, _keep) = within(relayed(serving(services), &heard)).await;
    let tls = ServerTls::new(Identity::self_signed(&["vault"]).unwrap());
    let endpoint: tollway::conduit::endpoint::Endpoint = "tls://vault:1".parse().unwrap();
    let known = endpoint.with_pin(tls.pin());
    let none = ClientTls::default();

    let vault = within(client.open("vault")).await.unwrap();
    let near = within(vault.tunnel()).await.unwrap();
    let far = taken.recv().await.unwrap();
    let (near, far) = within(async {
        tokio::join!(TlsConduit::connect_over(near, &known, &none), TlsConduit::accept_over(far, "a tunnel", &tls))
    })
    .await;
    let inside = serving(Services::new().with(Parrot));
    let (near, far) = within(async {
        tokio::join!(Session::connect(near.unwrap(), SessionConfig::default()), Session::accept(far.unwrap(), inside))
    })
    .await;
    let (near, far) = (near.unwrap(), far.unwrap());
    assert!(matches!(near.peer().identity(), PeerIdentity::Certificate { .. }));
    // What a signature would be bound to goes from end to end. [conduit.tls.exporter]
    assert_eq!(near.peer().exporter(), far.peer().exporter());
    assert!(near.peer().exporter().is_some());
    assert_eq!(parrot_says(&near, SECRET).await.unwrap(), SECRET);
    assert!(!contains(&heard, SECRET) && !contains(&heard, "parrot"));
    assert!(contains(&heard, "vault"), "what is around it can be read");

    // Somebody else's certificate.
    let near = within(vault.tunnel()).await.unwrap();
    let far = taken.recv().await.unwrap();
    let relays = ServerTls::new(Identity::self_signed(&["vault"]).unwrap());
    let (near, far) = within(async {
        tokio::join!(TlsConduit::connect_over(near, &known, &none), TlsConduit::accept_over(far, "a tunnel", &relays))
    })
    .await;
    let Err(TlsConduitError::Tls(error)) = near else { panic!("{near:?}") };
    assert!(matches!(error, TlsError::WrongPin { .. }), "{error}");
    assert!(far.is_err());
    assert!(client.end().is_none());
}

//! A server under what befalls servers: errors of its listener, crowds, silence, and its own end.
#![allow(clippy::unwrap_used)]

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::{Notify, mpsc, oneshot};
use tollway::conduit::listen::Listener;
use tollway::conduit::memory::{self, MemoryConduit};
use tollway::future::BoxFuture;
use tollway::protocol::error::{SessionEnd, code};
use tollway::protocol::metadata::Metadata;
use tollway::rpc::{BoxReply, IncomingCall, MethodId, Reply, Service, Services};
use tollway::{ConnectError, Server, ServerConfig, ServerHandle, Session, SessionConfig, Stopped};

/// Nothing here takes a tenth of it, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

const WAIT: MethodId = MethodId(1);
const ECHO: MethodId = MethodId(2);

/// Answers `ECHO` at once, and `WAIT` when it is told to.
#[derive(Clone, Default)]
struct Patient {
    waiting: std::sync::Arc<Notify>,
    go: std::sync::Arc<Notify>,
}

impl Service for Patient {
    fn name(&self) -> &str {
        "patient"
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        let Patient { waiting, go } = self.clone();
        Box::pin(async move {
            if call.method() == WAIT {
                waiting.notify_one();
                go.notified().await;
            }
            Reply::raw(call.payload().clone())
        })
    }
}

fn serving(service: Patient) -> SessionConfig {
    SessionConfig { services: Services::new().with(service), ..SessionConfig::default() }
}

fn config(service: Patient) -> ServerConfig {
    serving(service).into()
}

struct Running {
    handle: ServerHandle,
    stopped: oneshot::Receiver<Stopped>,
}

/// Runs a server on a free TCP port until its handle stops it.
async fn run(config: ServerConfig, grace: Duration) -> Running {
    let server = Server::bind(&"tcp://127.0.0.1:0".parse().unwrap(), config).await.unwrap();
    let (handle, (tell, stopped)) = (server.handle(), oneshot::channel());
    tokio::spawn(async move { tell.send(server.run(std::future::pending(), grace).await) });
    Running { handle, stopped }
}

impl Running {
    async fn connect(&self) -> Result<Session, ConnectError> {
        tollway::connect(self.handle.endpoint(), SessionConfig::default()).await
    }

    /// Stops the server and waits for its end.
    async fn stop(self) -> Stopped {
        self.handle.stop();
        within(self.stopped).await.unwrap()
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it takes too long")
}

/// Waits until `done` holds, which nobody announces.
async fn until(mut done: impl FnMut() -> bool) {
    within(async {
        while !done() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

async fn echo(session: &Session) {
    let patient = session.open("patient").await.unwrap();
    assert_eq!(patient.call::<_, u32>(ECHO, &7u32).await, Ok(7));
}

/// Fails in all the ways of a listener before each conduit that it hands out.
struct Failing {
    errors: Mutex<Vec<io::Error>>,
    failed: AtomicUsize,
    conduits: tokio::sync::Mutex<mpsc::Receiver<Option<MemoryConduit>>>,
}

impl Listener for Failing {
    type Conduit = MemoryConduit;
    type Pending = BoxFuture<'static, io::Result<MemoryConduit>>;

    async fn next(&self) -> io::Result<Self::Pending> {
        if let Some(error) = self.errors.lock().unwrap().pop() {
            self.failed.fetch_add(1, Ordering::Relaxed);
            return Err(error);
        }
        Ok(match self.conduits.lock().await.recv().await {
            Some(Some(conduit)) => Box::pin(std::future::ready(Ok(conduit))),
            // A TLS handshake that fails, so to say.
            Some(None) => Box::pin(std::future::ready(Err(io::Error::other("no certificate")))),
            // And one that never ends.
            None => Box::pin(std::future::pending()),
        })
    }
}

#[tokio::test]
async fn no_error_of_the_listener_or_of_a_conduit_ends_the_server() {
    let (send, conduits) = mpsc::channel(8);
    let emfile = || io::Error::from_raw_os_error(24);
    let enomem = || io::Error::from_raw_os_error(12);
    let errors = vec![emfile(), io::ErrorKind::ConnectionAborted.into(), enomem(), emfile(), io::Error::other("?")];
    let listener = Failing { errors: errors.into(), failed: AtomicUsize::new(0), conduits: conduits.into() };
    let endpoint = "tcp://127.0.0.1:1".parse().unwrap();
    let mut config = config(Patient::default());
    config.session.protocol.handshake_timeout = Duration::from_millis(50);
    let server = Server::with_listener(listener, endpoint, config);
    let handle = server.handle();
    let running = tokio::spawn(server.run(std::future::pending(), PATIENCE));

    let (ours, theirs) = memory::pair(64 * 1024);
    send.send(None).await.unwrap();
    send.send(Some(theirs)).await.unwrap();
    let session = within(Session::connect(ours, SessionConfig::default())).await.unwrap();
    echo(&session).await;
    assert_eq!(handle.session_count(), 1);
    // From here on each conduit hangs in its own handshake, and each is given up in time.
    drop(send);
    until(|| handle.handshake_count() > 10).await;
    echo(&session).await;
    drop(session);
    handle.stop();
    assert_eq!(within(running).await.unwrap().cut_off, 0);
    assert_eq!((handle.session_count(), handle.handshake_count()), (0, 0));
}

#[tokio::test]
async fn a_session_too_many_is_told_that_there_is_no_place() {
    let running = run(ServerConfig { max_sessions: 2, ..config(Patient::default()) }, PATIENCE).await;
    let (first, second) = (running.connect().await.unwrap(), running.connect().await.unwrap());
    assert_eq!(running.handle.session_count(), 2);
    let refused = running.connect().await.expect_err("two are the most");
    let ConnectError::Session(error) = refused else { panic!("{refused:?}") };
    let SessionEnd::RefusedByPeer(reason) = error.end else { panic!("{error:?}") };
    assert_eq!(reason.code, code::AT_CAPACITY);
    assert!(reason.text.contains('2'), "{reason}");
    echo(&first).await;
    echo(&second).await;

    drop(first);
    until(|| running.handle.session_count() == 1).await;
    echo(&running.connect().await.unwrap()).await;
    drop(second);
    running.stop().await;
}

#[tokio::test]
async fn a_crowd_that_says_nothing_keeps_nobody_out_and_is_bounded() {
    let running = run(ServerConfig { max_handshakes: 8, ..config(Patient::default()) }, PATIENCE).await;
    let endpoint = running.handle.endpoint().clone();
    let mut crowd = Vec::new();
    for _ in 0..64 {
        let mut stranger = tokio::net::TcpStream::connect(endpoint.address()).await.unwrap();
        stranger.write_all(b"T").await.unwrap();
        crowd.push(stranger);
    }
    until(|| running.handle.handshake_count() == 8).await;
    echo(&running.connect().await.unwrap()).await;
    assert!(running.handle.handshake_count() <= 8, "{:?}", running.handle);
    // Those that had to go were cut off, the first first.
    let mut first = crowd.remove(0);
    within(first.read_to_end(&mut Vec::new())).await.ok();
    // What says nothing does not hold up the end either.
    assert_eq!(running.stop().await.cut_off, 0);
}

#[tokio::test]
async fn what_is_under_way_when_a_server_stops_is_finished() {
    let service = Patient::default();
    let running = run(config(service.clone()), PATIENCE).await;
    let session = running.connect().await.unwrap();
    let patient = session.open("patient").await.unwrap();
    let call = tokio::spawn({
        let patient = patient.clone();
        async move { patient.call::<_, u32>(WAIT, &5u32).await }
    });
    within(service.waiting.notified()).await;
    running.handle.stop();
    // Nobody new comes in, and who is in stays until it has what it asked for.
    within(running.handle.stopping()).await;
    until(|| std::net::TcpStream::connect(running.handle.endpoint().address()).is_err()).await;
    assert_eq!(running.handle.session_count(), 1);
    service.go.notify_one();
    assert_eq!(within(call).await.unwrap(), Ok(5));
    drop(patient);
    let SessionEnd::ClosedByPeer(reason) = within(session.closed()).await else { panic!("{:?}", session.end()) };
    assert_eq!(reason.code, code::GOING_AWAY);
    assert_eq!(within(running.stopped).await.unwrap().cut_off, 0);
}

#[tokio::test]
async fn what_does_not_end_in_time_is_cut_off_with_a_word() {
    let service = Patient::default();
    let running = run(config(service.clone()), Duration::from_millis(10)).await;
    let session = running.connect().await.unwrap();
    let patient = session.open("patient").await.unwrap();
    let call = tokio::spawn({
        let patient = patient.clone();
        async move { patient.call::<_, u32>(WAIT, &5u32).await }
    });
    within(service.waiting.notified()).await;
    let end = tokio::spawn({
        let session = session.clone();
        async move { session.closed().await }
    });
    assert_eq!(running.stop().await.cut_off, 1);
    assert!(within(call).await.unwrap().is_err());
    let SessionEnd::ClosedByPeer(reason) = within(end).await.unwrap() else { panic!("{:?}", session.end()) };
    assert_eq!(reason.code, code::GOING_AWAY);
}

#[tokio::test]
async fn a_dropped_server_leaves_no_session_behind() {
    let server = Server::bind(&"tcp://127.0.0.1:0".parse().unwrap(), config(Patient::default())).await.unwrap();
    let endpoint = server.endpoint().clone();
    let task = tokio::spawn(server.run(std::future::pending(), PATIENCE));
    let session = tollway::connect(&endpoint, SessionConfig::default()).await.unwrap();
    echo(&session).await;
    task.abort();
    assert!(matches!(within(session.closed()).await, SessionEnd::ClosedByPeer(_)));
}

#[tokio::test]
async fn the_answering_side_knows_what_the_hello_said() {
    let (ours, theirs) = memory::pair(64 * 1024);
    let mut config = SessionConfig::default();
    config.protocol.metadata = Metadata::new().with("who", "a client");
    let (ours, theirs) =
        tokio::join!(Session::connect(ours, config), Session::accept(theirs, SessionConfig::default()));
    assert_eq!(theirs.unwrap().metadata().value("who"), Some(&b"a client"[..]));
    drop(ours);
}

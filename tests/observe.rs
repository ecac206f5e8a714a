//! What an operator sees of a server, beside it and from afar.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tollway::auth::{BearerToken, TokenAuthenticator};
use tollway::observe::{
    Event, Forbidden, Note, ObserveClient, ObserveError, ObserveService, Observed, Observer, Subscription,
};
use tollway::protocol::error::{Reason, code};
use tollway::protocol::session::ConnectionState;
use tollway::queue::{QueueSnapshot, Unit};
use tollway::rpc::{BoxReply, IncomingCall, MethodId, Reply, Rx, Service, Services};
use tollway::{Server, ServerConfig, ServerHandle, Session, SessionConfig};

/// Nothing here takes a tenth of it, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it takes too long")
}

#[derive(Clone, Default)]
struct Slow {
    go: Arc<Notify>,
}

impl Service for Slow {
    fn name(&self) -> &str {
        "slow"
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        let go = self.go.clone();
        Box::pin(async move {
            if call.method() == MethodId(1) {
                go.notified().await;
            }
            Reply::raw(call.payload().clone())
        })
    }
}

const OPERATOR: &str = "an-operator-has-this";
const ANYBODY: &str = "anybody-can-have-this";

async fn serve(observer: &Observer, slow: Slow) -> ServerHandle {
    let token = |text| BearerToken::new(text).unwrap();
    let tokens = TokenAuthenticator::new().with("operator", &token(OPERATOR)).with("anybody", &token(ANYBODY));
    let observe = ObserveService::new(observer.clone(), |identity| identity.name() == "operator");
    let services = Services::new().with(slow).with(observe);
    let session = SessionConfig { services, observer: Some(observer.clone()), ..SessionConfig::default() };
    let config = ServerConfig { authenticator: Some(Arc::new(tokens)), ..session.into() };
    let server = Server::bind(&"tcp://127.0.0.1:0".parse().unwrap(), config).await.unwrap();
    let handle = server.handle();
    tokio::spawn(server.run(std::future::pending(), Duration::ZERO));
    handle
}

async fn connect(server: &ServerHandle, token: &str) -> Session {
    let mut config = SessionConfig::default();
    config.protocol.metadata.push(BearerToken::new(token).unwrap().entry());
    within(tollway::connect(server.endpoint(), config)).await.unwrap()
}

async fn next(events: &mut Subscription) -> Event {
    match within(events.next()).await {
        Some(Observed::Event(event)) => (*event).clone(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn events_tell_what_happens_in_order() {
    let observer = Observer::new();
    let server = serve(&observer, Slow::default()).await;
    let mut events = observer.subscribe();
    let session = connect(&server, ANYBODY).await;
    let opened = next(&mut events).await;
    let Event::SessionOpened { session: 1, identity: Some(identity), .. } = opened else { panic!("{opened:?}") };
    assert_eq!(identity, "anybody");

    let slow = session.open("slow").await.unwrap();
    let service = Some("slow".to_owned());
    assert_eq!(next(&mut events).await, Event::ConnectionOpened { session: 1, connection: 1, service });
    assert!(session.open("nothing").await.is_err());
    let refused = next(&mut events).await;
    let Event::ConnectionRefused { session: 1, connection: 3, code, .. } = refused else { panic!("{refused:?}") };
    assert_eq!(code, code::UNKNOWN_SERVICE);
    slow.close(Reason::new(2000, "enough"));
    let closed = next(&mut events).await;
    let Event::ConnectionClosed { session: 1, connection: 1, end } = closed else { panic!("{closed:?}") };
    assert!(end.contains("enough"), "{end}");

    let refused = tollway::connect(server.endpoint(), SessionConfig::default()).await;
    assert!(refused.is_err());
    let refused = next(&mut events).await;
    assert!(matches!(refused, Event::SessionRefused { code: code::UNAUTHENTICATED, .. }), "{refused:?}");
    session.close(Reason::new(2001, "bye"));
    let closed = next(&mut events).await;
    let Event::SessionClosed { session: 1, end } = closed else { panic!("{closed:?}") };
    assert!(end.contains("bye"), "{end}");
    assert_eq!(observer.session_count(), 0);
}

#[tokio::test]
async fn a_snapshot_shows_what_is_under_way() {
    let (observer, slow) = (Observer::new(), Slow::default());
    let server = serve(&observer, slow.clone()).await;
    let session = connect(&server, ANYBODY).await;
    let connection = session.open("slow").await.unwrap();
    let calls: Vec<_> = (0..3)
        .map(|_| {
            let connection = connection.clone();
            tokio::spawn(async move { connection.call::<_, Vec<u8>>(MethodId(1), &vec![7u8; 100]).await })
        })
        .collect();
    within(async {
        while observer.snapshot().sessions[0].stats.calls < 3 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    let snapshot = observer.snapshot();
    assert_eq!(snapshot.total, 1);
    let seen = &snapshot.sessions[0];
    assert_eq!((seen.session, seen.identity.as_deref()), (1, Some("anybody")));
    assert!(seen.stats.is_open && seen.stats.opens.opened_by_peer == 1, "{seen:?}");
    assert!(seen.traffic.frames_received >= 5 && seen.traffic.bytes_received > 300, "{seen:?}");
    let [connection] = &seen.connections[..] else { panic!("{seen:?}") };
    assert_eq!((connection.state, connection.served_calls, connection.opened_by_us), (ConnectionState::Open, 3, false));
    assert_eq!(connection.body_bytes_received, 303);
    for _ in 0..3 {
        slow.go.notify_one();
    }
    for call in calls {
        assert!(within(call).await.unwrap().is_ok());
    }
    let (traffic, stats, _) = session.stats(10);
    assert!(traffic.bytes_sent > 300 && stats.rtt.is_some(), "{traffic:?} {stats:?}");
}

/// The queue of that name.
fn queue(queues: &[QueueSnapshot], name: &str) -> QueueSnapshot {
    queues.iter().find(|queue| queue.name == name).unwrap_or_else(|| panic!("{name} is not in {queues:?}")).clone()
}

#[tokio::test]
async fn a_snapshot_shows_what_waits_and_what_a_connection_has_carried() {
    let (observer, slow) = (Observer::new(), Slow::default());
    let server = serve(&observer, slow.clone()).await;
    let session = connect(&server, ANYBODY).await;
    let connection = session.open("slow").await.unwrap();
    let body = vec![7u8; 1_000];
    for _ in 0..3 {
        within(async { connection.call::<_, Vec<u8>>(MethodId(2), &body).await }).await.unwrap();
    }
    let waiting = tokio::spawn(async move { connection.call::<_, Vec<u8>>(MethodId(1), &body).await });
    within(async {
        while observer.snapshot().sessions[0].stats.calls < 1 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    let snapshot = observer.snapshot();
    let seen = &snapshot.sessions[0];
    let traffic = seen.connections[0].traffic;
    assert_eq!((traffic.frames_received, traffic.frames_sent), (4, 3), "{traffic:?}");
    assert!(traffic.bytes_received > 4_000 && traffic.bytes_sent > 3_000, "{traffic:?}");
    // What lies in a handler is held for its peer, and counted as such.
    let memory = queue(&seen.queues, "session.memory");
    assert_eq!(memory.unit, Unit::Bytes);
    assert!(memory.depth >= 1_000 && memory.high_water >= memory.depth && memory.capacity == 256 << 20, "{memory:?}");
    for name in ["session.answers", "session.payments", "session.opens", "session.work", "payment.mailbox"] {
        let queue = queue(&seen.queues, name);
        assert!(
            queue.capacity > 0 && queue.depth <= queue.high_water && queue.high_water <= queue.capacity,
            "{queue:?}"
        );
    }
    let events = observer.subscribe();
    session.close(Reason::none());
    assert!(within(waiting).await.unwrap().is_err());
    within(async {
        while observer.session_count() > 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    // There may be other observers in this process; this one's events wait for who does not listen.
    let waiting: Vec<_> =
        observer.snapshot().queues.into_iter().filter(|queue| queue.name == "observe.events").collect();
    assert!(waiting.iter().any(|queue| queue.depth >= 1 && queue.capacity == 1_024), "{waiting:?}");
    drop(events);
}

/// More sessions than an answer has room for: fetched page by page, and who takes only small answers is told how many
/// were left out instead of nothing at all.
#[tokio::test]
async fn a_snapshot_of_many_sessions_comes_in_pages() {
    let observer = Observer::new();
    let server = serve(&observer, Slow::default()).await;
    let mut sessions = Vec::new();
    for _ in 0..12 {
        let session = connect(&server, ANYBODY).await;
        let mut connections = Vec::new();
        for _ in 0..40 {
            connections.push(within(session.open("slow")).await.unwrap());
        }
        sessions.push((session, connections));
    }
    let mut config = SessionConfig::default();
    config.protocol.metadata.push(BearerToken::new(OPERATOR).unwrap().entry());
    // A page holds one or two sessions.
    config.connection_limits.max_body = 8_192;
    let operator = within(tollway::connect(server.endpoint(), config)).await.unwrap();
    let client = ObserveClient::open(&operator).await.unwrap();
    let snapshot = within(client.snapshot()).await.unwrap();
    assert_eq!((snapshot.total, snapshot.left_out), (13, 0));
    let numbers: Vec<u64> = snapshot.sessions.iter().map(|session| session.session).collect();
    assert_eq!(numbers, (1..=13).collect::<Vec<_>>());
    assert!(snapshot.sessions[..12].iter().all(|session| session.connections.len() == 40));
    let rest = observer.snapshot_after(10);
    assert_eq!((rest.total, rest.sessions.len(), rest.left_out), (13, 3, 0));

    let mut config = SessionConfig::default();
    config.protocol.metadata.push(BearerToken::new(OPERATOR).unwrap().entry());
    config.connection_limits.max_body = 1_000;
    let operator = within(tollway::connect(server.endpoint(), config)).await.unwrap();
    let client = ObserveClient::open(&operator).await.unwrap();
    let snapshot = within(client.snapshot()).await.unwrap();
    let first = &snapshot.sessions[0];
    assert!(first.connections.len() < 40 && first.stats.connections == 40, "{} are shown", first.connections.len());
    // No room for anything: that is said, too.
    let mut config = SessionConfig::default();
    config.protocol.metadata.push(BearerToken::new(OPERATOR).unwrap().entry());
    config.connection_limits.max_body = 150;
    let operator = within(tollway::connect(server.endpoint(), config)).await.unwrap();
    let client = ObserveClient::open(&operator).await.unwrap();
    let snapshot = within(client.snapshot()).await.unwrap();
    assert_eq!((snapshot.total, snapshot.left_out, snapshot.sessions.len()), (15, 15, 0));
}

#[tokio::test]
async fn an_operator_sees_it_from_afar_and_nobody_else_does() {
    let observer = Observer::new();
    let server = serve(&observer, Slow::default()).await;
    let stranger = connect(&server, ANYBODY).await;
    let refused = ObserveClient::open(&stranger).await.unwrap();
    assert_eq!(refused.snapshot().await, Err(ObserveError::Forbidden(Forbidden)));
    assert_eq!(refused.subscribe().await.err(), Some(ObserveError::Forbidden(Forbidden)));

    let operator = connect(&server, OPERATOR).await;
    let client = ObserveClient::open(&operator).await.unwrap();
    let snapshot = within(client.snapshot()).await.unwrap();
    assert_eq!(snapshot.total, 2);
    assert_eq!(snapshot.sessions[1].identity.as_deref(), Some("operator"));
    // The subscription is acknowledged: what happens from here on is told.
    let mut notes: Rx<Note> = within(client.subscribe()).await.unwrap();
    stranger.close(Reason::none());
    let mut closed = false;
    while !closed {
        let note = within(notes.recv()).await.unwrap().unwrap();
        closed = matches!(note, Note::Event(Event::SessionClosed { session: 1, .. }));
    }
    // One that is not wanted any more ends by itself, with nothing left behind.
    drop(notes);
    within(async {
        while operator.stats(10).1.streams > 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

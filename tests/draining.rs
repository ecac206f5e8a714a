//! Draining one connection, with handles on both sides, on one lane and on many, and through a relay.
#![allow(clippy::unwrap_used)]

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, Semaphore};
use tollway::conduit::memory;
use tollway::protocol::error::{ConnectionEnd, Reason, code};
use tollway::protocol::session::CommandError;
use tollway::rpc::{BoxReply, CallError, Execution, IncomingCall, MethodId, Reply, Service, Services};
use tollway::{Connection, IncomingOpen, Session, SessionConfig, proxy_connections};

/// Nothing here takes a tenth of it, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it takes too long")
}

const ECHO: MethodId = MethodId(1);
const WAIT: MethodId = MethodId(2);
const CALL_BACK: MethodId = MethodId(3);
const DRAIN: MethodId = MethodId(4);

#[derive(Clone)]
struct Kit {
    waiting: Arc<Notify>,
    go: Arc<Semaphore>,
}

impl Default for Kit {
    fn default() -> Self {
        Kit { waiting: Arc::default(), go: Arc::new(Semaphore::new(0)) }
    }
}

impl Service for Kit {
    fn name(&self) -> &str {
        "kit"
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        let Kit { waiting, go } = self.clone();
        let method = call.method();
        Box::pin(async move {
            let connection = call.context().connection();
            let number: u32 = call.args().unwrap();
            match method {
                WAIT | CALL_BACK => {
                    waiting.notify_one();
                    go.acquire().await.unwrap().forget();
                    if method == CALL_BACK {
                        return Reply::ok(&connection.call::<_, u32>(ECHO, &(number + 1)).await.unwrap());
                    }
                }
                DRAIN => {
                    let reason = Reason::new(code::GOING_AWAY, "enough of this one");
                    tokio::spawn(async move { connection.drain(reason, None).await });
                }
                _ => {}
            }
            Reply::ok(&number)
        })
    }
}

async fn sessions(client: SessionConfig, server: SessionConfig) -> (Session, Session) {
    let (near, far) = memory::pair(64 * 1024);
    let (near, far) =
        within(async { tokio::join!(Session::connect(near, client), Session::accept(far, server)) }).await;
    (near.unwrap(), far.unwrap())
}

fn serving(kit: &Kit) -> SessionConfig {
    SessionConfig { services: Services::new().with(kit.clone()), ..SessionConfig::default() }
}

async fn call(connection: &Connection, method: MethodId, number: u32) -> Result<u32, CallError> {
    within(async { connection.call(method, &number).await }).await
}

/// A call that has begun to wait in its handler.
async fn begin(
    kit: &Kit,
    connection: &Connection,
    method: MethodId,
) -> tokio::task::JoinHandle<Result<u32, CallError>> {
    let connection = connection.clone();
    let task = tokio::spawn(async move { call(&connection, method, 5).await });
    within(kit.waiting.notified()).await;
    task
}

fn assert_not_taken(result: Result<u32, CallError>) {
    let error = result.unwrap_err();
    assert_eq!(error, CallError::NotSent(CommandError::Draining));
    assert_eq!((error.execution(), error.is_retryable()), (Execution::NotExecuted, true));
}

#[tokio::test]
async fn a_server_drains_a_connection_and_the_client_opens_another() {
    let kit = Kit::default();
    let (client, _server) = sessions(SessionConfig::default(), serving(&kit)).await;
    let connection = client.open("kit").await.unwrap();
    let open = begin(&kit, &connection, WAIT).await;
    assert_eq!(connection.draining(), None);
    assert_eq!(call(&connection, DRAIN, 7).await, Ok(7));
    within(connection.until_draining()).await;
    let draining = connection.draining().unwrap();
    assert_eq!((draining.reason.text.as_str(), draining.until), ("enough of this one", None));
    assert_not_taken(call(&connection, ECHO, 1).await);
    let other = client.open("kit").await.unwrap();
    assert_eq!(call(&other, ECHO, 2).await, Ok(2));
    kit.go.add_permits(1);
    assert_eq!(within(open).await.unwrap(), Ok(5), "what was open runs to its end");
    let ConnectionEnd::ClosedByPeer(reason) = within(connection.closed()).await else { panic!() };
    assert_eq!((reason.code, reason.text.as_str()), (code::GOING_AWAY, "enough of this one"));
    assert_eq!(call(&other, ECHO, 3).await, Ok(3), "and no other connection is touched");
}

/// Whoever opened it may drain it, too: its handles call no more, and handlers at the other side still call back.
#[tokio::test]
async fn a_client_drains_its_connection_while_a_handler_calls_back() {
    let kit = Kit::default();
    let (client, _server) = sessions(SessionConfig::default(), serving(&kit)).await;
    let connection = within(client.open_serving("kit", kit.clone())).await.unwrap();
    let open = begin(&kit, &connection, WAIT).await;
    let drained = tokio::spawn({
        let connection = connection.clone();
        async move { connection.drain(Reason::new(2_000, "done"), None).await }
    });
    within(connection.until_draining()).await;
    assert_not_taken(call(&connection, ECHO, 1).await);
    assert!(!drained.is_finished());
    kit.go.add_permits(1);
    assert_eq!(within(open).await.unwrap(), Ok(5));
    assert_eq!(within(drained).await.unwrap(), ConnectionEnd::ClosedByUs(Reason::new(2_000, "done")));
}

#[tokio::test]
async fn a_handler_of_a_draining_server_still_calls_back() {
    let kit = Kit::default();
    let (client, server) = sessions(SessionConfig::default(), serving(&kit)).await;
    let connection = within(client.open_serving("kit", kit.clone())).await.unwrap();
    let open = begin(&kit, &connection, CALL_BACK).await;
    let drained = tokio::spawn(async move { server.drain(Reason::new(code::GOING_AWAY, "restart")).await });
    within(connection.until_draining()).await;
    assert_not_taken(call(&connection, ECHO, 1).await);
    kit.go.add_permits(1);
    assert_eq!(within(open).await.unwrap(), Ok(6));
    within(drained).await.unwrap();
    within(client.closed()).await;
}

#[tokio::test]
async fn at_the_end_of_its_grace_a_connection_is_closed_with_what_is_open() {
    let kit = Kit::default();
    let (client, _server) = sessions(SessionConfig::default(), serving(&kit)).await;
    let connection = client.open("kit").await.unwrap();
    let open = begin(&kit, &connection, WAIT).await;
    let end = within(connection.drain(Reason::none(), Some(Duration::from_millis(5)))).await;
    let ConnectionEnd::ClosedByUs(reason) = &end else { panic!("{end}") };
    assert_eq!(reason.code, code::DEADLINE);
    let error = within(open).await.unwrap().unwrap_err();
    assert_eq!(error, CallError::ConnectionClosed { cause: end, sent: true });
    // What has ended drains at once.
    within(connection.drain(Reason::none(), None)).await;
}

/// Calls at full speed while the connection is drained: each is executed or given back, and nobody is left in doubt.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_caller_is_left_in_doubt() {
    for _ in 0..50 {
        let kit = Kit::default();
        let (client, _server) = sessions(SessionConfig::default(), serving(&kit)).await;
        let connection = client.open("kit").await.unwrap();
        let callers: Vec<_> = (0..8)
            .map(|_| {
                let connection = connection.clone();
                tokio::spawn(async move {
                    for number in 0.. {
                        match call(&connection, ECHO, number).await {
                            Ok(answer) => assert_eq!(answer, number),
                            Err(error) => return error,
                        }
                    }
                    unreachable!("it drains before")
                })
            })
            .collect();
        assert_eq!(call(&connection, DRAIN, 0).await, Ok(0));
        for caller in callers {
            let error = within(caller).await.unwrap();
            assert_eq!(error.execution(), Execution::NotExecuted, "{error}");
        }
        within(connection.closed()).await;
    }
}

/// Client, relay and server.
async fn line(kit: &Kit) -> (Session, Session, Session) {
    let (upstream, server) = sessions(SessionConfig::default(), serving(kit)).await;
    let relay = move |open: IncomingOpen| {
        let upstream = upstream.clone();
        async move { drop(proxy_connections(open, &upstream).await) }
    };
    let relaying = SessionConfig { services: Services::new().with_fallback(relay), ..SessionConfig::default() };
    let (client, relay) = sessions(SessionConfig::default(), relaying).await;
    (client, relay, server)
}

/// `[relay.draining]`
#[tokio::test]
async fn draining_passes_a_relay() {
    let kit = Kit::default();
    let (client, _relay, _server) = line(&kit).await;
    let connection = within(client.open("kit")).await.unwrap();
    let open = begin(&kit, &connection, WAIT).await;
    assert_eq!(call(&connection, DRAIN, 7).await, Ok(7));
    within(connection.until_draining()).await;
    assert_not_taken(call(&connection, ECHO, 1).await);
    kit.go.add_permits(1);
    assert_eq!(within(open).await.unwrap(), Ok(5));
    let ConnectionEnd::ClosedByPeer(reason) = within(connection.closed()).await else { panic!() };
    assert_eq!(reason.text, "enough of this one");
}

/// A relay that goes away, or whose server does: both drain what they carry, and end when it has ended.
/// `[relay.draining]`
#[tokio::test]
async fn a_relay_or_a_server_behind_it_that_stops_finishes_what_it_carries() {
    for by_relay in [true, false] {
        let kit = Kit::default();
        let (client, relay, server) = line(&kit).await;
        let connection = within(client.open("kit")).await.unwrap();
        let open = begin(&kit, &connection, WAIT).await;
        let stopping = if by_relay { relay.clone() } else { server.clone() };
        let drained = tokio::spawn(async move { stopping.drain(Reason::new(code::GOING_AWAY, "restart")).await });
        within(connection.until_draining()).await;
        assert_eq!(connection.draining().unwrap().reason.text, "restart");
        assert_not_taken(call(&connection, ECHO, 1).await);
        assert!(!drained.is_finished());
        kit.go.add_permits(1);
        assert_eq!(within(open).await.unwrap(), Ok(5));
        within(connection.closed()).await;
        within(drained).await.unwrap();
    }
}

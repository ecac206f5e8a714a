//! Middleware on both sides, of one's own and as shipped.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::timeout;
use tollway::protocol::error::Reason;
use tollway::protocol::metadata::Metadata;
use tollway::rpc::middleware::{
    ClientMiddleware, ClientStack, ConcurrencyLimit, NextCall, NextHandler, ServerMiddleware, TraceContext, Tracing,
};
use tollway::rpc::{
    Answer, CallError, ErrorKind, Execution, IncomingCall, OutgoingCall, Reply, Service, ServiceClient, Services,
};
use tollway::{OpenError, Session, SessionConfig};

use super::support::{DeskClient, DeskServer, Host, LONG, desk, pair};

type Log = Arc<Mutex<Vec<String>>>;

/// Writes down what it sees.
struct Scribe(&'static str, Log);

impl Scribe {
    fn log(&self, what: String) {
        self.1.lock().push(format!("{}: {what}", self.0));
    }
}

impl ClientMiddleware for Scribe {
    async fn call(&self, mut call: OutgoingCall, next: NextCall) -> Result<Answer, CallError> {
        let (service, method) = (call.service().unwrap_or("?"), call.method_name().unwrap_or("?"));
        self.log(format!("{service}/{method}{}", if call.is_idempotent() { ", idempotent" } else { "" }));
        assert_eq!(next.connection().unwrap().peer().kind(), "memory");
        let metadata = std::mem::take(call.metadata_mut());
        *call.metadata_mut() = metadata.with("scribe", self.0);
        let answered = next.call(call).await;
        self.log(match &answered {
            Ok(answer) => format!("{:?}", answer.error_kind()),
            Err(error) => format!("{} {:?}", error.kind(), error.execution()),
        });
        answered
    }
}

impl ServerMiddleware for Scribe {
    async fn handle(&self, call: IncomingCall, next: NextHandler) -> Reply {
        let cx = call.context();
        let scribes: Vec<_> = cx.metadata().iter().map(|entry| String::from_utf8_lossy(&entry.value)).collect();
        self.log(format!("{}/{} from {}", cx.service(), cx.method_name().unwrap_or("?"), scribes.join("+")));
        let reply = next.handle(call).await;
        self.log(format!("{:?}", reply.error_kind()));
        reply
    }
}

async fn served(services: Services, client: SessionConfig) -> (Session, Session) {
    pair(client, SessionConfig { services, ..SessionConfig::default() }).await
}

fn with(client_middleware: ClientStack) -> SessionConfig {
    SessionConfig { client_middleware, ..SessionConfig::default() }
}

#[tokio::test]
async fn each_layer_sees_the_call_on_its_way_and_its_outcome_on_the_way_back() {
    let (log, (_clerk, server)) = (Log::default(), desk());
    let scribe = |name| Scribe(name, log.clone());
    let services = Services::new()
        .with_middleware(scribe("first"))
        .with(server.around(scribe("innermost")))
        .with_middleware(scribe("second"));
    let stack = ClientStack::new().with(scribe("outer"));
    let (client, _server) = served(services, with(stack)).await;
    let connection = client.open("desk").await.unwrap().with_middleware(scribe("inner"));
    let desk = DeskClient::from(connection);
    assert_eq!(desk.double(4).await, Ok(8));
    let seen = std::mem::take(&mut *log.lock());
    let expected = [
        "outer: desk/double",
        "inner: desk/double",
        "first: desk/double from outer+inner",
        "second: desk/double from outer+inner",
        "innermost: desk/double from outer+inner",
        "innermost: None",
        "second: None",
        "first: None",
        "inner: None",
        "outer: None",
    ];
    assert_eq!(seen, expected);

    assert_eq!(desk.fail().await, Err(CallError::App("as it should".to_owned())));
    assert_eq!(log.lock().last().unwrap(), "outer: Some(App)");
    assert_eq!(desk.panic().await, Err(CallError::HandlerFailed));
    assert_eq!(log.lock().last().unwrap(), "outer: handler_failed MaybeExecuted");
    desk.look().await.unwrap();
    assert!(log.lock().iter().any(|line| line == "inner: desk/look, idempotent"));
    // By hand a method has no name here, and one that is none has no name there.
    let connection = desk.as_ref().connection().unwrap();
    let unknown: Result<(), CallError> = connection.call(tollway::rpc::MethodId(7), &()).await;
    assert_eq!(unknown, Err(CallError::UnknownMethod));
    assert!(log.lock().iter().any(|line| line == "outer: ?/?"));
    assert!(log.lock().iter().any(|line| line.starts_with("second: desk/? from")));
}

#[tokio::test]
async fn a_layer_may_answer_instead_change_the_call_or_make_it_twice() {
    struct Twice;

    impl ClientMiddleware for Twice {
        async fn call(&self, call: OutgoingCall, next: NextCall) -> Result<Answer, CallError> {
            let again = call.try_clone().expect("it has no streams");
            next.clone().call(call).await?;
            next.call(again).await
        }
    }

    struct Closed;

    impl ServerMiddleware for Closed {
        async fn handle(&self, call: IncomingCall, next: NextHandler) -> Reply {
            match call.context().method_name() {
                Some("look") => next.handle(call).await.with_metadata(Metadata::new().with("who", "looked")),
                _ => Reply::refused(&Reason::new(7, "closed")),
            }
        }
    }

    let (clerk, server) = desk();
    let services = Services::new().with(server).with_middleware(Closed);
    let (client, _server) = served(services, with(ClientStack::new().with(Twice))).await;
    let desk: DeskClient = client.open_client().await.unwrap();
    let response = desk.look().response().await.unwrap();
    assert_eq!((response.value, clerk.executed()), (1, 2));
    assert_eq!(response.metadata.value("who"), Some(&b"looked"[..]));
    assert_eq!(desk.double(1).await, Err(CallError::Refused(Reason::new(7, "closed"))));
}

#[tokio::test]
async fn a_limit_makes_calls_wait_on_the_server_and_on_the_client() {
    for on_server in [true, false] {
        let (clerk, server) = desk();
        let limit = ConcurrencyLimit::new(2);
        let (mut services, mut stack) = (Services::new().with(server), ClientStack::new());
        match on_server {
            true => services = services.with_middleware(limit.clone()),
            false => stack = stack.with(limit.clone()),
        }
        let (client, _server) = served(services, with(stack)).await;
        let desk: DeskClient = client.open_client().await.unwrap();
        let calls: Vec<_> = (0..5)
            .map(|_| {
                let desk = desk.clone();
                tokio::spawn(async move { desk.wait().await })
            })
            .collect();
        for _ in 0..2 {
            timeout(LONG, clerk.begun.notified()).await.unwrap();
        }
        // A sixth call that may not wait ends without a place, and gives none away.
        let late = desk.double(1).with_timeout(Duration::from_millis(50)).await;
        assert_eq!(late, Err(CallError::DeadlineExceeded { sent: on_server }));
        assert_eq!((clerk.executed(), limit.available()), (2, 0), "no third one has begun");
        // Those that waited begin as places become free.
        let done = async {
            for call in calls {
                while !call.is_finished() {
                    clerk.go.notify_one();
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                call.await.unwrap().unwrap();
            }
        };
        timeout(LONG, done).await.unwrap();
        assert_eq!(limit.available(), 2, "every place was given back");
    }
}

#[tokio::test]
async fn a_call_that_is_dropped_in_its_middleware_is_cancelled_at_the_peer() {
    struct Dropped(Arc<AtomicUsize>);

    impl ServerMiddleware for Dropped {
        async fn handle(&self, call: IncomingCall, next: NextHandler) -> Reply {
            struct Guard(Arc<AtomicUsize>);
            impl Drop for Guard {
                fn drop(&mut self) {
                    self.0.fetch_add(1, Ordering::SeqCst);
                }
            }
            let _guard = Guard(self.0.clone());
            next.handle(call).await
        }
    }

    let dropped = Arc::<AtomicUsize>::default();
    let (clerk, server) = desk();
    let services = Services::new().with(server.around(Dropped(dropped.clone())));
    let (client, _server) = served(services, with(ClientStack::new().with(Tracing::new()))).await;
    let desk: DeskClient = client.open_client().await.unwrap();
    let call = tokio::spawn({
        let desk = desk.clone();
        async move { desk.wait().await }
    });
    timeout(LONG, clerk.begun.notified()).await.unwrap();
    call.abort();
    let gone = async {
        while dropped.load(Ordering::SeqCst) == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(LONG, gone).await.unwrap();
}

#[tokio::test]
async fn a_trace_goes_from_peer_to_peer_and_through_handlers() {
    let (_here, back) = desk();
    let (_there, server) = desk();
    let services = Services::new().with_middleware(Tracing::new()).with(server);
    let (client, _server) = served(services, with(ClientStack::new().with(Tracing::new()))).await;
    let connection = client.open_serving("desk", back.around(Tracing::new())).await.unwrap();
    let desk = DeskClient::from(connection);

    let traces = desk.trace(true).await.unwrap();
    let [there, back] = &*traces else { panic!("{traces:?}") };
    let [there, back]: [TraceContext; 2] = [there.parse().unwrap(), back.parse().unwrap()];
    assert_eq!(there.trace_id(), back.trace_id(), "the call back is of the same trace");
    assert_ne!(there.span_id(), back.span_id());
    assert!(!there.is_sampled(), "nobody looks at spans here");

    let other: TraceContext = desk.trace(false).await.unwrap()[0].parse().unwrap();
    assert_ne!(other.trace_id(), there.trace_id(), "each call that nobody traces begins a trace");
    let own = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let metadata = Metadata::new().with("traceparent", own);
    let traces = desk.trace(true).with_metadata(metadata).await.unwrap();
    assert_eq!(traces[0], own, "what the caller has set stands");
    let back: TraceContext = traces[1].parse().unwrap();
    assert!(back.is_sampled() && traces[1].contains("0af7651916cd43dd8448eb211c80319c"));
}

#[test]
fn kinds_of_failures_have_words_and_say_what_the_error_says() {
    let deadline = CallError::<String>::DeadlineExceeded { sent: false };
    assert_eq!((deadline.kind().as_str(), deadline.execution()), ("deadline_exceeded", Execution::NotExecuted));
    assert_eq!(CallError::App(1).kind(), ErrorKind::App);
    assert_eq!(DeskClient::NAME, DeskServer::<()>::NAME);
}

/// The desk as a client knows it that is older, or of another build.
mod older {
    #[tollway::service(name = "counter", checked)]
    pub(super) trait Counter {
        async fn count(&self, by: u32) -> u64;
    }
}

#[tollway::service(name = "counter", checked)]
trait Counter {
    async fn count(&self, by: u64) -> u64;
}

struct Plus;

impl Counter for Plus {
    async fn count(&self, by: u64) -> u64 {
        by + 1
    }
}

#[tokio::test]
async fn a_checked_service_is_opened_by_clients_with_its_own_signatures() {
    let host = Host::up(Services::new().with(CounterServer::new(Plus).around(Tracing::new())));
    let client = tollway::Client::with_dialler(host, tollway::ClientConfig::default());
    let counter: CounterClient = client.service();
    assert_eq!(counter.count(1).await, Ok(2));
    // It shares the connection, and looks for itself.
    let old: older::CounterClient = client.service();
    assert!(matches!(old.count(1).await, Err(CallError::Refused(_))));
    let session = client.session().await.unwrap();
    let opened = session.open_client::<older::CounterClient>().await;
    assert!(matches!(opened, Err(OpenError::OtherSchema { .. })), "{opened:?}");
    session.open_client::<CounterClient>().await.unwrap();
    // Who checks nothing may open it, and be told by its calls.
    session.open("counter").await.unwrap();
}

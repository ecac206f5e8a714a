//! What goes around calls: a trace that travels, a limit, and middleware of one's own, on both sides.
//!
//! `cargo run --release --example middleware`
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tollway::protocol::error::{Reason, code};
use tollway::rpc::middleware::{
    ClientMiddleware, ClientStack, ConcurrencyLimit, NextCall, NextHandler, ServerMiddleware, TraceContext, Tracing,
};
use tollway::rpc::{Answer, CallContext, CallError, IncomingCall, OutgoingCall, Reply, Services};
use tollway::{Client, ClientConfig, Server, SessionConfig};

#[tollway::service]
trait Kitchen {
    /// Cooks, and says in which trace.
    async fn cook(&self, cx: &CallContext, dish: &str) -> String;
}

/// Knows how many dishes are cooked at once.
#[derive(Default)]
struct Cook {
    now: AtomicUsize,
    most: AtomicUsize,
}

impl Kitchen for Cook {
    async fn cook(&self, cx: &CallContext, _dish: &str) -> String {
        self.most.fetch_max(self.now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
        tokio::time::sleep(Duration::from_millis(5)).await;
        self.now.fetch_sub(1, Ordering::SeqCst);
        TraceContext::from_metadata(cx.metadata()).map(|trace| trace.trace_id().to_string()).unwrap_or_default()
    }
}

/// A log of calls with their outcomes, on the client's side.
#[derive(Clone, Default)]
struct CallLog(Arc<Mutex<Vec<String>>>);

impl ClientMiddleware for CallLog {
    async fn call(&self, call: OutgoingCall, next: NextCall) -> Result<Answer, CallError> {
        let (method, began) = (call.method_name().unwrap_or("?"), Instant::now());
        let answered = next.call(call).await;
        let outcome = match &answered {
            Ok(_) => "ok".to_owned(),
            Err(error) => format!("{}, {:?}", error.kind(), error.execution()),
        };
        let mut log = self.0.lock().map_err(|_| CallError::Cancelled)?;
        log.push(format!("{method}: {outcome} in {:?}", began.elapsed()));
        answered
    }
}

/// Serves so many calls and no more, on the server's side.
struct Opening(AtomicU32);

impl ServerMiddleware for Opening {
    async fn handle(&self, call: IncomingCall, next: NextHandler) -> Reply {
        let open = self.0.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
        match open {
            Ok(_) => next.handle(call).await,
            Err(_) => Reply::refused(&Reason::new(code::AT_CAPACITY, "the kitchen is closed")),
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let cook = Arc::new(Cook::default());
    // The first is outermost: what is refused needs no place, and is in the trace all the same.
    let services = Services::new()
        .with_middleware(Tracing::new())
        .with_middleware(Opening(AtomicU32::new(20)))
        .with_middleware(ConcurrencyLimit::new(3))
        .with(KitchenServer::from(cook.clone()));
    let serving = SessionConfig { services, ..SessionConfig::default() };
    let server = Server::bind(&"tcp://127.0.0.1:0".parse()?, serving).await?;
    let endpoint = server.endpoint().clone();
    tokio::spawn(server.run(std::future::pending(), Duration::ZERO));

    let log = CallLog::default();
    let client_middleware = ClientStack::new().with(log.clone()).with(Tracing::new());
    let session = SessionConfig { client_middleware, ..SessionConfig::default() };
    let client = Client::new(endpoint, ClientConfig { session, ..ClientConfig::default() });
    let kitchen: KitchenClient = client.service();

    let mut orders = tokio::task::JoinSet::new();
    for number in 0..20 {
        let kitchen = kitchen.clone();
        orders.spawn(async move { kitchen.cook(&format!("dish {number}")).await });
    }
    let mut traces = orders.join_all().await.into_iter().collect::<Result<Vec<_>, _>>()?;
    assert_eq!(cook.most.load(Ordering::SeqCst), 3);
    println!("20 orders came at once, and all were cooked, at most 3 at a time");

    traces.sort();
    traces.dedup();
    assert!(traces.len() == 20 && traces.iter().all(|trace| trace.len() == 32));
    println!("each was in a trace of its own that began at the client, such as {}", traces[0]);

    let refused = kitchen.cook("one more").await.expect_err("it is closed");
    assert!(matches!(refused, CallError::Refused(_)) && refused.is_retryable());
    let log = log.0.lock().map_err(|_| "the log is broken")?;
    let last = log.last().ok_or("it has logged nothing")?;
    assert_eq!(log.len(), 21);
    assert!(last.starts_with("cook: refused, NotExecuted"), "{last}");
    println!("the client's log has 21 calls; the last one: {last}");
    Ok(())
}

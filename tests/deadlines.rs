//! Deadlines end to end: they end calls and streams on both sides, and shrink on the way down.

use std::time::{Duration, Instant};

use futures_util::{StreamExt, stream as streams};
use tokio::sync::mpsc;
use tollway::conduit::memory;
use tollway::rpc::{CallContext, CallError, Execution, Services, Stream, StreamError};
use tollway::{Session, SessionConfig};

/// Long enough for a loaded machine to answer within.
const LONG: Duration = Duration::from_secs(60);
/// What a test waits for.
const SHORT: Duration = Duration::from_millis(100);

#[tollway::service]
trait Clock {
    /// How much time the call has left, in microseconds.
    async fn left(&self, cx: &CallContext) -> Option<u64>;
    /// The same, of a call that this one makes: by itself, and in a task that takes the scope along.
    async fn left_below(&self, cx: &CallContext) -> [Option<u64>; 3];
    async fn forever(&self) -> u64;
    async fn ticks(&self) -> impl Stream<Item = u64>;
}

#[derive(Clone)]
struct Ticking(mpsc::UnboundedSender<&'static str>);

struct Dropped(&'static str, mpsc::UnboundedSender<&'static str>);

impl Drop for Dropped {
    fn drop(&mut self) {
        let _test_ended = self.1.send(self.0);
    }
}

impl Clock for Ticking {
    async fn left(&self, cx: &CallContext) -> Option<u64> {
        cx.time_left().map(|left| u64::try_from(left.as_micros()).unwrap_or(u64::MAX))
    }

    async fn left_below(&self, cx: &CallContext) -> [Option<u64>; 3] {
        let below = ClockClient::from(cx.connection());
        tokio::time::sleep(Duration::from_millis(5)).await;
        let own = below.left().await.unwrap_or_default();
        let scoped = tokio::spawn(cx.scope({
            let below = below.clone();
            async move { below.left().await.unwrap_or_default() }
        }));
        let alone = tokio::spawn(async move { below.left().await.unwrap_or_default() });
        [own, scoped.await.unwrap_or_default(), alone.await.unwrap_or_default()]
    }

    async fn forever(&self) -> u64 {
        let _dropped = Dropped("handler", self.0.clone());
        std::future::pending().await
    }

    async fn ticks(&self) -> impl Stream<Item = u64> {
        let dropped = Dropped("stream", self.0.clone());
        streams::iter(0..3).chain(streams::once(async move {
            let _dropped = dropped;
            std::future::pending().await
        }))
    }
}

/// A client that serves the same to its server, so that a handler can call back.
async fn setup() -> (ClockClient, mpsc::UnboundedReceiver<&'static str>) {
    let (told, dropped) = mpsc::unbounded_channel();
    let clock = Ticking(told);
    let services = Services::new().with(ClockServer::new(clock.clone()));
    let (left, right) = memory::pair(64 * 1024);
    let serving = SessionConfig { services, ..SessionConfig::default() };
    let (client, server) =
        tokio::join!(Session::connect(left, SessionConfig::default()), Session::accept(right, serving));
    let (client, server) = (client.expect("a client"), server.expect("a server"));
    tokio::spawn(async move { server.closed().await });
    let connection = client.open_serving("clock", ClockServer::new(clock)).await.expect("the service");
    (ClockClient::from(connection), dropped)
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future).await.expect("it ends in time")
}

#[tokio::test]
async fn a_call_ends_with_its_deadline_at_both_sides() {
    let (clock, mut dropped) = setup().await;
    let error = within(clock.forever().with_timeout(SHORT)).await.expect_err("it takes for ever");
    assert_eq!((&error, error.execution()), (&CallError::DeadlineExceeded { sent: true }, Execution::MaybeExecuted));
    assert!(!error.is_retryable());
    assert_eq!(within(dropped.recv()).await, Some("handler"));
    assert_eq!(clock.left().with_timeout(LONG).await.map(|left| left.is_some()), Ok(true), "the connection lives on");
}

#[tokio::test]
async fn a_call_that_is_late_already_is_not_made() {
    let (clock, mut dropped) = setup().await;
    let error = within(clock.forever().with_deadline(Instant::now())).await.expect_err("it is late");
    assert_eq!((&error, error.execution()), (&CallError::DeadlineExceeded { sent: false }, Execution::NotExecuted));
    assert_eq!(clock.left().await, Ok(None));
    assert!(dropped.try_recv().is_err(), "no handler has seen it");
}

#[tokio::test]
async fn a_deadline_shrinks_on_nested_calls() {
    let (clock, _dropped) = setup().await;
    let [own, scoped, alone] = within(clock.left_below().with_timeout(LONG)).await.expect("times");
    let whole = u64::try_from(LONG.as_micros()).expect("a minute");
    for left in [own, scoped] {
        assert!(left.is_some_and(|left| left <= whole - 5_000), "{left:?} of {whole}, after 5 ms");
    }
    assert_eq!(alone, None, "a task of its own has none");
    assert_eq!(within(clock.left_below()).await, Ok([None; 3]));
}

#[tokio::test]
async fn streams_end_with_the_deadline_of_their_call() {
    let (clock, mut dropped) = setup().await;
    let mut ticks = clock.ticks().with_timeout(Duration::from_secs(2)).await.expect("a stream");
    let mut came = 0;
    let end = within(async {
        loop {
            match ticks.recv().await {
                Ok(Some(_)) => came += 1,
                end => break end,
            }
        }
    });
    assert_eq!(end.await, Err(StreamError::DeadlineExceeded));
    assert_eq!(came, 3, "what came in time is there");
    assert_eq!(within(dropped.recv()).await, Some("stream"));
    let connection = clock.as_ref().connection().expect("it has one");
    within(async {
        while connection.open_calls() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

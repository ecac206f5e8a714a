//! `#[tollway::service]`: the typed client, the server and the price list, end to end.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures_util::{SinkExt, StreamExt, TryStreamExt, stream as streams};
use serde::{Deserialize, Serialize};
use tokio::sync::{Notify, mpsc};
use tollway::conduit::memory;
use tollway::protocol::error::Reason;
use tollway::protocol::limits::ConnectionLimits;
use tollway::protocol::metadata::Metadata;
use tollway::protocol::payment::{Amount, Price};
use tollway::rpc::{
    Body, CallContext, CallError, Execution, MethodId, NoError, Rx, ServiceClient, Services, Stream, StreamError, Tx,
    stream,
};
use tollway::{Session, SessionConfig};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("there is no {0}")]
struct Missing(String);

#[derive(Serialize, Deserialize)]
struct Nested {
    label: String,
    parts: BTreeMap<u32, Rx<u64>>,
    back: Option<Tx<String>>,
}

/// A bit of everything.
#[tollway::service(name = "test.kit", version = 3)]
trait Kit {
    /// Nothing in, nothing out.
    async fn ping(&self);
    async fn greet(&self, name: &str) -> String;
    #[price(call = 100)]
    async fn join(&self, parts: Vec<&str>, glue: Cow<'_, str>, upper: Option<&str>) -> String;
    #[price(call = 7, item = 2, bytes = "25/KiB", max_item = "1KiB", max_answer = 16)]
    fn count(&self, from: u64, to: u64) -> impl Stream<Item = u64>;
    async fn find(&self, cx: &CallContext, what: String) -> Result<Vec<u8>, Missing>;
    async fn watch(&self, what: &str) -> Result<impl Stream<Item = String>, Missing>;
    async fn endless(&self) -> impl Stream<Item = u64>;
    async fn consume(&self, nested: Nested) -> Result<u64, Missing>;
    async fn forever(&self, cx: &CallContext) -> u64;
    async fn panics(&self) -> u64;
    fn breaks(&self) -> impl Stream<Item = u64>;
    async fn large(&self, bytes: usize) -> Vec<u8>;
    async fn visits(&self, cx: &CallContext) -> u64;
    async fn ask_back(&self, cx: &CallContext) -> String;
    /// Methods may have bodies.
    async fn r#move(&self, by: i64) -> i64 {
        by + 1
    }
}

struct Shelf {
    things: Vec<String>,
    /// Told when what a call was for is dropped.
    dropped: mpsc::UnboundedSender<&'static str>,
    started: Arc<Notify>,
}

/// Says that a handler or a stream was dropped.
struct Dropped(&'static str, mpsc::UnboundedSender<&'static str>);

impl Drop for Dropped {
    fn drop(&mut self) {
        let _test_ended = self.1.send(self.0);
    }
}

struct Visits(std::sync::atomic::AtomicU64);

impl Kit for Shelf {
    async fn ping(&self) {}

    async fn greet(&self, name: &str) -> String {
        format!("Hello, {name}!")
    }

    async fn join(&self, parts: Vec<&str>, glue: Cow<'_, str>, upper: Option<&str>) -> String {
        let joined = parts.join(&glue);
        joined + upper.unwrap_or_default()
    }

    fn count(&self, from: u64, to: u64) -> impl Stream<Item = u64> {
        streams::iter(from..to)
    }

    async fn find(&self, cx: &CallContext, what: String) -> Result<Vec<u8>, Missing> {
        assert!(cx.peer().kind() == "memory" && cx.time_left().is_none());
        match cx.metadata().value("as") {
            Some(other) => Ok(other.to_vec()),
            None => self.things.iter().find(|thing| **thing == what).map(|it| it.clone().into()).ok_or(Missing(what)),
        }
    }

    async fn watch(&self, what: &str) -> Result<impl Stream<Item = String>, Missing> {
        let prefix = what.strip_suffix('*').ok_or_else(|| Missing(what.to_owned()))?;
        // It borrows from the service and from the arguments.
        Ok(streams::iter(self.things.iter().filter(move |thing| thing.starts_with(prefix)).cloned()))
    }

    async fn endless(&self) -> impl Stream<Item = u64> {
        let dropped = Dropped("endless", self.dropped.clone());
        streams::iter([7]).chain(streams::once(async move {
            std::future::pending::<()>().await;
            drop(dropped);
            0
        }))
    }

    async fn consume(&self, nested: Nested) -> Result<u64, Missing> {
        let mut sum = 0;
        for (weight, part) in nested.parts {
            let items: Vec<u64> = part.try_collect().await.map_err(|error| Missing(error.to_string()))?;
            sum += u64::from(weight) * items.iter().sum::<u64>();
        }
        if let Some(mut back) = nested.back {
            back.send(format!("{} summed", nested.label)).await.map_err(|error| Missing(error.to_string()))?;
            back.finish();
        }
        Ok(sum)
    }

    async fn forever(&self, cx: &CallContext) -> u64 {
        let dropped = Dropped("handler", self.dropped.clone());
        let (token, elsewhere) = (cx.cancellation(), Dropped("elsewhere", self.dropped.clone()));
        tokio::spawn(async move {
            token.cancelled().await;
            drop(elsewhere);
        });
        self.started.notify_one();
        std::future::pending::<()>().await;
        drop(dropped);
        0
    }

    async fn panics(&self) -> u64 {
        panic!("a handler panics")
    }

    fn breaks(&self) -> impl Stream<Item = u64> {
        streams::iter(0..3).map(|number| if number < 2 { number } else { panic!("a stream panics") })
    }

    async fn large(&self, bytes: usize) -> Vec<u8> {
        vec![7; bytes]
    }

    async fn visits(&self, cx: &CallContext) -> u64 {
        let visits = cx.data().get_or_insert_with(|| Visits(Default::default()));
        visits.0.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
    }

    async fn ask_back(&self, cx: &CallContext) -> String {
        let caller = NamesClient::from(cx.connection());
        caller.name().await.unwrap_or_else(|error| error.to_string())
    }
}

#[tollway::service]
trait Names {
    async fn name(&self) -> String;
}

struct Named(&'static str);

impl Names for Named {
    async fn name(&self) -> String {
        self.0.to_owned()
    }
}

struct Setup {
    client: Session,
    server: Session,
    kit: KitClient,
    dropped: mpsc::UnboundedReceiver<&'static str>,
    started: Arc<Notify>,
}

async fn setup() -> Setup {
    let (sender, dropped) = mpsc::unbounded_channel();
    let started = Arc::<Notify>::default();
    let things = ["hammer", "saw", "ham"].map(str::to_owned).to_vec();
    let shelf = Shelf { things, dropped: sender, started: started.clone() };
    let limits = ConnectionLimits { max_body: 64 * 1024, ..ConnectionLimits::default() };
    let services = Services::new().with(KitServer::new(shelf));
    let (left, right) = memory::pair(64 * 1024);
    let of = |services| SessionConfig { services, connection_limits: limits, ..SessionConfig::default() };
    let (client, server) =
        tokio::join!(Session::connect(left, of(Services::new())), Session::accept(right, of(services)));
    let (client, server) = (client.expect("a client"), server.expect("a server"));
    let kit = client.open_client().await.expect("the service");
    // With its last handle a session closes: as with a server, somebody holds it until it ends.
    let held = server.clone();
    tokio::spawn(async move { held.closed().await });
    Setup { client, server, kit, dropped, started }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future).await.expect("it ends in time")
}

#[tokio::test]
async fn values_go_over_and_come_back() {
    let Setup { kit, .. } = setup().await;
    assert_eq!(kit.ping().await, Ok(()));
    assert_eq!(kit.greet("world").await, Ok("Hello, world!".to_owned()));
    assert_eq!(kit.join(vec!["a", "b"], "-".into(), Some("!")).await, Ok("a-b!".to_owned()));
    assert_eq!(kit.join(vec![], Cow::Owned(String::new()), None).await, Ok(String::new()));
    assert_eq!(kit.r#move(41).await, Ok(42));
    assert_eq!(kit.find("saw".to_owned()).await, Ok(b"saw".to_vec()));
    let error = kit.find("nail".to_owned()).await.expect_err("it is not there");
    assert_eq!((error.execution(), error.is_retryable()), (Execution::Executed, false));
    assert_eq!((error.to_string(), error), ("there is no nail".to_owned(), CallError::App(Missing("nail".to_owned()))));
}

#[tokio::test]
async fn metadata_goes_along() {
    let Setup { kit, .. } = setup().await;
    let call = kit.find("nail".to_owned()).with_metadata(Metadata::new().with("as", "screw"));
    let response = call.response().await.expect("something");
    assert_eq!((response.value, response.charged), (b"screw".to_vec(), Amount::ZERO));
}

#[tokio::test]
async fn streams_are_streams_and_sinks() {
    let Setup { kit, .. } = setup().await;
    let numbers =
        within(async { kit.count(3, 50_000).await?.try_collect::<Vec<_>>().await.map_err(|_| CallError::Cancelled) });
    assert_eq!(numbers.await, Ok((3..50_000).collect()));
    let mut hams = kit.watch("ham*").await.expect("a stream");
    assert_eq!(hams.recv().await, Ok(Some("hammer".to_owned())));
    assert_eq!(hams.next().await, Some(Ok("ham".to_owned())));
    assert_eq!(hams.next().await, None);
    assert_eq!(kit.watch("ham").await.map(drop), Err(CallError::App(Missing("ham".to_owned()))));

    // In maps and options inside of arguments, both ways; fed as sinks.
    let ((one, rx_one), (two, rx_two)) = (stream(), stream());
    let (back, mut answers) = stream();
    let parts = BTreeMap::from([(1, rx_one), (10, rx_two)]);
    let consume = kit.consume(Nested { label: "all".to_owned(), parts, back: Some(back) });
    let feed = |mut tx: Tx<u64>| async move {
        tx.send_all(&mut streams::iter((1..=1000).map(Ok))).await?;
        SinkExt::close(&mut tx).await
    };
    let (sum, one, two) = within(async { tokio::join!(consume, feed(one), feed(two)) }).await;
    assert_eq!((sum, one, two), (Ok(11 * 500_500), Ok(()), Ok(())));
    assert_eq!(answers.recv().await, Ok(Some("all summed".to_owned())));
    assert_eq!(answers.recv().await, Ok(None));
}

#[tokio::test]
async fn a_stream_that_is_dropped_is_dropped_at_its_source() {
    let Setup { kit, mut dropped, .. } = setup().await;
    let mut endless = kit.endless().await.expect("a stream");
    assert_eq!(endless.recv().await, Ok(Some(7)));
    // It waits, and sends nothing by which it could notice.
    drop(endless);
    assert_eq!(within(dropped.recv()).await, Some("endless"));
    let connection = kit.as_ref().connection().expect("it has one");
    within(async {
        while connection.open_calls() > 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_call_that_is_dropped_is_dropped_at_its_handler() {
    let Setup { kit, mut dropped, started, .. } = setup().await;
    {
        let forever = kit.forever();
        tokio::select! {
            answer = forever => panic!("{answer:?}"),
            () = started.notified() => {}
        }
    }
    let mut told = [within(dropped.recv()).await, within(dropped.recv()).await];
    told.sort_unstable();
    assert_eq!(told, [Some("elsewhere"), Some("handler")], "the future is dropped, the token cancelled");
}

#[tokio::test]
async fn a_panic_is_an_error_of_its_call_alone() {
    let Setup { kit, .. } = setup().await;
    let error = kit.panics().await.expect_err("it panics");
    assert_eq!((error.execution(), &error), (Execution::MaybeExecuted, &CallError::HandlerFailed));
    let mut breaks = kit.breaks().await.expect("a stream");
    let mut last = None;
    while let Some(item) = breaks.next().await {
        last = Some(item);
    }
    assert!(
        matches!(last, Some(Err(StreamError::Reset(_)))),
        "a stream that broke off does not look complete: {last:?}"
    );
    assert_eq!(kit.ping().await, Ok(()));
}

#[tokio::test]
async fn what_is_too_large_is_named_with_its_limit() {
    let Setup { kit, .. } = setup().await;
    assert_eq!(kit.large(60_000).await.map(|bytes| bytes.len()), Ok(60_000));
    let error = kit.large(70_000).await.expect_err("it is above the caller's limit");
    assert_eq!(error, CallError::TooLarge { body: Body::Response, bytes: 70_003, limit: 65_536 });
    assert_eq!(error.execution(), Execution::Executed);
    let error = kit.greet(&"x".repeat(70_000)).await.expect_err("it is above the callee's limit");
    assert_eq!(error, CallError::TooLarge { body: Body::Request, bytes: 70_003, limit: 65_536 });
    assert_eq!(error.execution(), Execution::NotExecuted);
}

#[tokio::test]
async fn handlers_keep_data_with_their_connection() {
    let Setup { client, kit, .. } = setup().await;
    assert_eq!((kit.visits().await, kit.clone().visits().await), (Ok(0), Ok(1)));
    let other: KitClient = client.open_client().await.expect("the service");
    assert_eq!(other.visits().await, Ok(0));
}

#[tokio::test]
async fn both_ends_of_a_connection_serve_and_call() {
    let Setup { client, kit, .. } = setup().await;
    assert_eq!(kit.ask_back().await, Ok("the service has no such method, or not in this version".to_owned()));
    let connection = client.open_serving(KitClient::NAME, NamesServer::new(Named("Ada"))).await.expect("the service");
    assert_eq!(KitClient::from(connection).ask_back().await, Ok("Ada".to_owned()));
}

#[tokio::test]
async fn a_connection_that_ends_says_why_and_what_was_sent() {
    let Setup { client, server, kit, started, .. } = setup().await;
    let forever = kit.forever();
    let end = async {
        started.notified().await;
        server.close(Reason::new(4711, "enough"));
    };
    let error = within(async { tokio::join!(forever, end) }).await.0.expect_err("it ended");
    assert!(
        matches!(&error, CallError::ConnectionClosed { cause, sent: true } if cause.to_string().contains("enough"))
    );
    assert_eq!((error.execution(), error.is_retryable()), (Execution::MaybeExecuted, false));
    let error = kit.ping().await.expect_err("it ended");
    assert_eq!((error.execution(), error.is_retryable()), (Execution::NotExecuted, true));
    let opened = client.open_client::<KitClient>().await;
    let error = CallError::<NoError>::from(opened.expect_err("the session has ended"));
    assert!(matches!(error, CallError::ConnectionClosed { sent: false, .. }), "{error:?}");
}

#[test]
fn a_service_has_a_name_a_version_and_a_price_list() {
    assert_eq!(
        (KitClient::NAME, KitClient::VERSION, KitServer::NAME, KitServer::VERSION),
        ("test.kit", 3, "test.kit", 3)
    );
    assert_eq!((NamesClient::NAME, NamesClient::VERSION), ("names", 1));
    let prices = KitServer::prices();
    let [join, count] = &prices[..] else { panic!("{prices:?}") };
    assert_eq!(
        (join.method_id, &*join.name, join.price),
        (MethodId::of("test.kit", 3, "join").0, "join", Price { call: Amount::new(100), ..Price::default() })
    );
    assert_eq!(join.max_answer_bytes, 1 << 20);
    assert_eq!(Ok(count.price), "call=7,item=2,bytes=25/KiB".parse::<Price>());
    assert_eq!((count.max_item_bytes, count.max_answer_bytes), (1024, 16));
    assert!(NamesServer::prices().is_empty());
}

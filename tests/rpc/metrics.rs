//! Durations of calls, as a recorder gets them.

use std::collections::BTreeMap;
use std::sync::Arc;

use metrics::{Counter, Gauge, Histogram, HistogramFn, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use parking_lot::Mutex;
use tokio::time::timeout;
use tollway::SessionConfig;
use tollway::rpc::middleware::{CallMetrics, ClientStack};
use tollway::rpc::{CallError, MethodId, Services};

use super::support::{DeskClient, LONG, desk, pair};

/// Counts what is recorded, by name and labels.
#[derive(Default, Clone)]
struct Book {
    units: Arc<Mutex<BTreeMap<String, Unit>>>,
    counts: Arc<Mutex<BTreeMap<String, u32>>>,
}

struct Line(String, Book);

impl HistogramFn for Line {
    fn record(&self, seconds: f64) {
        assert!((0.0..60.0).contains(&seconds), "{seconds} s");
        *self.1.counts.lock().entry(self.0.clone()).or_default() += 1;
    }
}

impl Recorder for Book {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn describe_histogram(&self, key: KeyName, unit: Option<Unit>, _: SharedString) {
        self.units.lock().extend(unit.map(|unit| (key.as_str().to_owned(), unit)));
    }

    fn register_counter(&self, _: &Key, _: &Metadata<'_>) -> Counter {
        Counter::noop()
    }

    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::noop()
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        let labels: Vec<_> = key.labels().map(|label| format!("{}={}", label.key(), label.value())).collect();
        Histogram::from_arc(Arc::new(Line(format!("{} {}", key.name(), labels.join(" ")), self.clone())))
    }
}

async fn calls() {
    let metrics = CallMetrics::new();
    let (clerk, server) = desk();
    let services = Services::new().with_middleware(metrics).with(server);
    let client = SessionConfig { client_middleware: ClientStack::new().with(metrics), ..SessionConfig::default() };
    let (client, _server) = pair(client, SessionConfig { services, ..SessionConfig::default() }).await;
    let desk: DeskClient = client.open_client().await.unwrap();
    for number in 0..3 {
        desk.double(number).await.unwrap();
    }
    assert!(desk.fail().await.is_err());
    assert_eq!(desk.panic().await, Err(CallError::HandlerFailed));
    let connection = desk.as_ref().connection().unwrap();
    assert_eq!(connection.call::<_, ()>(MethodId(1), &()).await, Err(CallError::UnknownMethod));
    let dropped = tokio::spawn({
        let desk = desk.clone();
        async move { desk.wait().await }
    });
    timeout(LONG, clerk.begun.notified()).await.unwrap();
    dropped.abort();
    let ended = async {
        while connection.open_calls() > 0 {
            tokio::task::yield_now().await;
        }
    };
    timeout(LONG, ended).await.unwrap();
    // The handler's own task drops it.
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

#[test]
fn each_call_is_recorded_once_on_each_side_with_its_outcome() {
    let book = Book::default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    metrics::with_local_recorder(&book, || runtime.block_on(calls()));
    let (client, server) = ("rpc.client.call.duration", "rpc.server.call.duration");
    assert_eq!(*book.units.lock(), [client, server].map(|name| (name.to_owned(), Unit::Seconds)).into());
    // Sessions have metrics of their own.
    let counts = book.counts.lock();
    let counts: Vec<_> = counts.iter().filter(|(line, _)| line.starts_with("rpc.")).collect();
    let counts: Vec<_> = counts.iter().map(|(line, count)| format!("{count} {line}")).collect();
    let of = |method: &str, failure: &str, times: u32| {
        let failure = if failure.is_empty() { String::new() } else { format!(" error.type={failure}") };
        let labels = format!("rpc.system.name=tollway rpc.method={method}");
        let server = format!("{times} {server} {labels}{failure}");
        [format!("{times} {client} {labels} server.address=right{failure}"), server]
    };
    // Called by hand, it has no name at either side.
    let expected = [
        of("_OTHER", "unknown_method", 1),
        of("desk/double", "", 3),
        of("desk/fail", "app", 1),
        of("desk/panic", "handler_failed", 1),
        of("desk/wait", "cancelled", 1),
    ];
    let (clients, servers): (Vec<_>, Vec<_>) = expected.into_iter().map(|[client, server]| (client, server)).unzip();
    assert_eq!(counts, [clients, servers].concat());
}

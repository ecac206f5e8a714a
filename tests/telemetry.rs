//! What subscribers of `tracing` and recorders of `metrics` are told of sessions and connections.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use metrics::{Counter, CounterFn, Gauge, GaugeFn, Histogram, HistogramFn, Key, KeyName, Metadata, SharedString, Unit};
use tollway::protocol::error::Reason;
use tollway::rpc::{BoxReply, IncomingCall, MethodId, Reply, Service, Services};
use tollway::{Server, SessionConfig};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Subscriber};

/// Keeps what was recorded, by name and labels.
#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<BTreeMap<String, f64>>>);

impl Recorder {
    fn value(&self, name: &str) -> Option<f64> {
        self.0.lock().unwrap().get(name).copied()
    }
}

struct Metric(Recorder, String);

impl Metric {
    fn new(recorder: &Recorder, key: &Key) -> Arc<Self> {
        let mut labels: Vec<_> = key.labels().map(|label| format!("{}={}", label.key(), label.value())).collect();
        labels.sort();
        Arc::new(Metric(recorder.clone(), format!("{}{{{}}}", key.name(), labels.join(","))))
    }

    fn change(&self, change: impl FnOnce(f64) -> f64) {
        let mut values = self.0.0.lock().unwrap();
        let value = values.entry(self.1.clone()).or_default();
        *value = change(*value);
    }
}

impl CounterFn for Metric {
    fn increment(&self, value: u64) {
        self.change(|before| before + value as f64);
    }
    fn absolute(&self, value: u64) {
        self.change(|_| value as f64);
    }
}

impl GaugeFn for Metric {
    fn increment(&self, value: f64) {
        self.change(|before| before + value);
    }
    fn decrement(&self, value: f64) {
        self.change(|before| before - value);
    }
    fn set(&self, value: f64) {
        self.change(|_| value);
    }
}

impl HistogramFn for Metric {
    fn record(&self, _: f64) {
        self.change(|before| before + 1.0);
    }
}

impl metrics::Recorder for Recorder {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(Metric::new(self, key))
    }
    fn register_gauge(&self, key: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::from_arc(Metric::new(self, key))
    }
    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::from_arc(Metric::new(self, key))
    }
}

/// Keeps the spans that were made, and which one each thread is in.
#[derive(Clone, Default)]
struct Spans(Arc<Inner>);

#[derive(Default)]
struct Inner {
    next: AtomicU64,
    seen: Mutex<BTreeMap<u64, Seen>>,
    entered: Mutex<Vec<u64>>,
}

#[derive(Clone, Default, Debug)]
struct Seen {
    name: &'static str,
    parent: Option<u64>,
    fields: BTreeMap<&'static str, String>,
}

impl Visit for Seen {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.fields.insert(field.name(), format!("{value:?}"));
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.fields.insert(field.name(), value.to_owned());
    }
}

impl Subscriber for Spans {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.target() == "tollway::session"
    }
    fn new_span(&self, attributes: &Attributes<'_>) -> Id {
        let id = self.0.next.fetch_add(1, Ordering::Relaxed) + 1;
        let parent = attributes.parent().map(Id::into_u64);
        let mut seen = Seen { name: attributes.metadata().name(), parent, ..Seen::default() };
        attributes.record(&mut seen);
        self.0.seen.lock().unwrap().insert(id, seen);
        Id::from_u64(id)
    }
    fn record(&self, span: &Id, values: &Record<'_>) {
        values.record(self.0.seen.lock().unwrap().get_mut(&span.into_u64()).unwrap());
    }
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, _: &Event<'_>) {}
    fn enter(&self, span: &Id) {
        self.0.entered.lock().unwrap().push(span.into_u64());
    }
    fn exit(&self, span: &Id) {
        let mut entered = self.0.entered.lock().unwrap();
        let at = entered.iter().rposition(|&id| id == span.into_u64()).unwrap();
        entered.remove(at);
    }
}

struct Kit(Spans);

impl Service for Kit {
    fn name(&self) -> &str {
        "kit"
    }

    fn call(&self, _: IncomingCall) -> BoxReply {
        let spans = self.0.clone();
        Box::pin(async move {
            // Not done at once: the span is entered anew by each poll.
            tokio::task::yield_now().await;
            Reply::ok(&*spans.0.entered.lock().unwrap())
        })
    }
}

/// One test, because subscriber and recorder are the process's own.
#[tokio::test]
async fn sessions_and_connections_have_spans_and_metrics() {
    let (recorder, spans) = (Recorder::default(), Spans::default());
    metrics::set_global_recorder(recorder.clone()).unwrap();
    tracing::subscriber::set_global_default(spans.clone()).unwrap();
    tollway::observe::metrics::describe();

    let services = Services::new().with(Kit(spans.clone()));
    let session = SessionConfig { services, ..SessionConfig::default() };
    let server = Server::bind(&"tcp://127.0.0.1:0".parse().unwrap(), session).await.unwrap();
    let (endpoint, handle) = (server.endpoint().clone(), server.handle());
    let stopped = tokio::spawn(server.run(std::future::pending(), Duration::from_secs(30)));
    let session = tollway::connect(&endpoint, SessionConfig::default()).await.unwrap();
    let kit = session.open("kit").await.unwrap();
    assert!(session.open("nothing").await.is_err());
    let within: Vec<u64> = kit.call(MethodId(1), &()).await.unwrap();

    let seen = spans.0.seen.lock().unwrap().clone();
    let connection = within.iter().map(|id| &seen[id]).find(|span| span.name == "connection").unwrap();
    assert_eq!(connection.fields["rpc.system.name"], "tollway");
    assert_eq!(
        (connection.fields["rpc.service"].as_str(), connection.fields["tollway.connection.id"].as_str()),
        ("kit", "1")
    );
    let above = &seen[&connection.parent.unwrap()];
    assert_eq!((above.name, above.fields["network.transport"].as_str()), ("session", "tcp"));
    assert!(above.fields["client.address"].starts_with("127.0.0.1:"), "{above:?}");
    let ours = seen.values().find(|span| span.fields.contains_key("server.address")).unwrap();
    assert_eq!(ours.fields["network.peer.address"], format!("127.0.0.1:{}", endpoint.port()));

    // Both ends are in this process.
    assert_eq!(recorder.value("tollway.sessions{network.transport=tcp}"), Some(2.0));
    assert_eq!(recorder.value("tollway.connection.opened{}"), Some(2.0));
    assert_eq!(recorder.value("tollway.connection.refused{error.type=16}"), Some(2.0));
    assert!(recorder.value("tollway.session.rtt{}") >= Some(1.0));
    kit.close(Reason::none());
    handle.stop();
    stopped.await.unwrap();
    session.closed().await;
    assert_eq!(recorder.value("tollway.sessions{network.transport=tcp}"), Some(0.0));
    assert_eq!(recorder.value("tollway.session.opened{network.transport=tcp}"), Some(2.0));
    assert_eq!(recorder.value("tollway.session.closed{network.transport=tcp}"), Some(2.0));
    assert_eq!(recorder.value("tollway.connection.closed{}"), Some(2.0));
    for direction in ["receive", "transmit"] {
        let of = |name: &str| recorder.value(&format!("{name}{{network.io.direction={direction}}}")).unwrap();
        assert!(of("tollway.session.frames") >= 10.0 && of("tollway.session.io") >= 100.0);
    }
}

//! The spans of calls, as a subscriber of `tracing` gets them.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::sync::Arc;

use parking_lot::Mutex;
use tollway::SessionConfig;
use tollway::rpc::Services;
use tollway::rpc::middleware::{ClientStack, TraceContext, Tracing};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

use super::support::{DeskClient, desk, pair};

type Fields = BTreeMap<&'static str, String>;

/// Keeps the fields of the spans of calls.
#[derive(Clone, Default)]
struct Spans(Arc<Mutex<Vec<Fields>>>);

struct Into<'a>(&'a mut Fields);

impl Visit for Into<'_> {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.0.insert(field.name(), format!("{value:?}"));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.insert(field.name(), value.to_owned());
    }
}

impl Subscriber for Spans {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target() == "tollway::rpc"
    }

    fn new_span(&self, span: &Attributes<'_>) -> Id {
        let mut spans = self.0.lock();
        let mut fields = Fields::new();
        span.record(&mut Into(&mut fields));
        spans.push(fields);
        Id::from_u64(spans.len() as u64)
    }

    fn record(&self, span: &Id, values: &Record<'_>) {
        values.record(&mut Into(&mut self.0.lock()[span.into_u64() as usize - 1]));
    }

    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn event(&self, _: &Event<'_>) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

#[test]
fn spans_of_both_sides_are_one_trace_and_say_how_the_call_ended() {
    let spans = Spans::default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _guard = tracing::subscriber::set_default(spans.clone());
    let traced = runtime.block_on(async {
        let (_clerk, server) = desk();
        let services = Services::new().with_middleware(Tracing::new()).with(server);
        let client_middleware = ClientStack::new().with(Tracing::new());
        let client = SessionConfig { client_middleware, ..SessionConfig::default() };
        let (client, _server) = pair(client, SessionConfig { services, ..SessionConfig::default() }).await;
        let desk: DeskClient = client.open_client().await.unwrap();
        desk.panic().await.unwrap_err();
        desk.fail().await.unwrap_err();
        desk.trace(false).await.unwrap()
    });
    let traced: TraceContext = traced[0].parse().unwrap();
    assert!(traced.is_sampled(), "somebody looks");
    let spans = spans.0.lock().clone();
    let [panicked, at_server, failed, _, client, server] = &spans[..] else { panic!("{spans:#?}") };
    assert_eq!((&*panicked["otel.kind"], &*at_server["otel.kind"]), ("client", "server"));
    for span in [panicked, at_server] {
        assert_eq!((&*span["otel.name"], &*span["rpc.method"]), ("desk/panic", "desk/panic"));
        assert_eq!((&*span["error.type"], &*span["otel.status_code"]), ("handler_failed", "ERROR"));
    }
    assert_eq!(failed["error.type"], "app");
    assert!(!failed.contains_key("otel.status_code"), "whether that is a failure, the application knows");
    assert!(!client.contains_key("error.type") && !client.contains_key("parent_span_id"));
    assert_eq!(client["trace_id"], traced.trace_id().to_string());
    assert_eq!(client["span_id"], traced.span_id().to_string());
    assert_eq!((&server["trace_id"], &server["parent_span_id"]), (&client["trace_id"], &client["span_id"]));
    assert_eq!((&*client["server.address"], &*server["rpc.system.name"]), ("right", "tollway"));
}

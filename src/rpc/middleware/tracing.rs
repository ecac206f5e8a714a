//! Spans for calls, and the trace that they belong to carried from peer to peer.

use std::sync::Arc;

use tracing::field::Empty;
use tracing::{Instrument, Span};

use super::trace_context::TraceContext;
use super::{ClientMiddleware, NextCall, NextHandler, ServerMiddleware, method_label};
use crate::rpc::error::ErrorKind;
use crate::rpc::scope::Scope;
use crate::rpc::{Answer, CallError, IncomingCall, OutgoingCall, Reply};

/// A span around each call, and the trace carried along: W3C Trace Context in the call's metadata.
///
/// Install it on both sides: with [`SessionConfig`](crate::SessionConfig)'s `client_middleware` and with
/// [`Services::with_middleware`](crate::rpc::Services::with_middleware). A call that comes with a `traceparent` goes on with
/// its trace, one without begins a trace; what its handler calls, itself or through
/// [`CallContext::scope`](crate::rpc::CallContext::scope), belongs to the same trace, where this is installed for these
/// calls too. A call whose caller has set a `traceparent` by hand keeps that one.
///
/// Spans are those of the crate `tracing`, at level INFO with the target `tollway::rpc`, and need no OpenTelemetry. Their fields are
/// named as its conventions want it, so that a bridge hands them on: `otel.name`, `otel.kind`, `otel.status_code`, `rpc.system.name`,
/// `rpc.method`, `server.address` or `client.address`, and for a failure `error.type` and `rpc.response.status_code`, an
/// [`ErrorKind`] in words; and `trace_id`, `span_id` and `parent_span_id`, by which spans of several processes are
/// put together. A trace that begins here is marked as sampled if its first span is wanted by somebody.
#[derive(Debug, Clone, Copy, Default)]
#[non_exhaustive]
pub struct Tracing;

impl Tracing {
    /// Makes one. It holds nothing.
    pub fn new() -> Self {
        Tracing
    }
}

/// Both kinds of spans differ in what their peer is called.
macro_rules! span {
    ($kind:literal, $peer:literal = $address:expr, $method:expr) => {
        tracing::info_span!(
            target: "tollway::rpc",
            "call",
            "otel.name" = %$method,
            "otel.kind" = $kind,
            "otel.status_code" = Empty,
            "rpc.system.name" = "tollway",
            "rpc.method" = %$method,
            $peer = %$address,
            "error.type" = Empty,
            "rpc.response.status_code" = Empty,
            trace_id = Empty,
            span_id = Empty,
            parent_span_id = Empty,
        )
    };
}

/// The context of a span below `parent`, or of a new trace; the span is told of it.
fn enter(span: &Span, parent: Option<&TraceContext>) -> TraceContext {
    let context = match parent {
        Some(parent) => {
            span.record("parent_span_id", tracing::field::display(parent.span_id()));
            parent.child()
        }
        None => TraceContext::new(!span.is_disabled()),
    };
    span.record("trace_id", tracing::field::display(context.trace_id()));
    span.record("span_id", tracing::field::display(context.span_id()));
    context
}

/// A call that is under way. Its drop tells the span how it ended: as cancelled, unless something else was said.
struct Ending {
    span: Span,
    failure: Option<ErrorKind>,
}

impl Ending {
    fn of(span: &Span) -> Self {
        Ending { span: span.clone(), failure: Some(ErrorKind::Cancelled) }
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.failure = Some(ErrorKind::HandlerFailed);
        }
        let Some(kind) = self.failure else { return };
        self.span.record("error.type", kind.as_str());
        self.span.record("rpc.response.status_code", kind.as_str());
        // A method's own error is an answer: whether it is a failure, only the application knows.
        if kind != ErrorKind::App {
            self.span.record("otel.status_code", "ERROR");
        }
    }
}

impl ClientMiddleware for Tracing {
    async fn call(&self, mut call: OutgoingCall, next: NextCall) -> Result<Answer, CallError> {
        let method = method_label(call.service(), call.method_name());
        let span = span!("client", "server.address" = next.peer_address(), method);
        if !TraceContext::is_named_in(call.metadata()) {
            let context = enter(&span, Scope::trace_of_current().as_deref());
            context.write_to(call.metadata_mut());
        }
        let mut ending = Ending::of(&span);
        let answered = next.call(call).instrument(span).await;
        ending.failure = answered.as_ref().map_or_else(|error| Some(error.kind()), Answer::error_kind);
        answered
    }
}

impl ServerMiddleware for Tracing {
    async fn handle(&self, call: IncomingCall, next: NextHandler) -> Reply {
        let context = call.context();
        let method = method_label(Some(context.service()), context.method_name());
        let span = span!("server", "client.address" = context.peer().address(), method);
        let trace = enter(&span, TraceContext::from_metadata(context.metadata()).as_ref());
        let scope = Scope { deadline: context.deadline(), trace: Some(Arc::new(trace)) };
        // Its first poll begins the handler, within the span and the scope.
        let handled = async move { next.handle(call).await };
        let mut ending = Ending::of(&span);
        let reply = scope.hold(handled).instrument(span).await;
        ending.failure = reply.error_kind();
        reply
    }
}

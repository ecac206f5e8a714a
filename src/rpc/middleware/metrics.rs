//! Durations of calls, for the facade `metrics`.

use std::time::Instant;

use metrics::{SharedString, Unit, describe_histogram, histogram};

use super::{ClientMiddleware, NextCall, NextHandler, ServerMiddleware, method_label};
use crate::rpc::error::ErrorKind;
use crate::rpc::{Answer, CallError, IncomingCall, OutgoingCall, Reply};

const CLIENT: &str = "rpc.client.call.duration";
const SERVER: &str = "rpc.server.call.duration";

/// How long calls take: the histograms `rpc.client.call.duration` and `rpc.server.call.duration`, in seconds, for whichever
/// recorder the program has installed.
///
/// Each call is counted once, also when its caller drops it, which is `cancelled`. A client's time is that of the
/// caller: it includes waiting for a turn or a connection. Labels are those of OpenTelemetry's conventions: `rpc.system.name`,
/// `rpc.method`, for clients `server.address`, and for failures `error.type`, an [`ErrorKind`] in words. Calls of methods
/// that have no name here are `_OTHER`. Recorders keep a summary unless they are told buckets; the conventions recommend,
/// in seconds, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5 and 10.
#[derive(Debug, Clone, Copy, Default)]
#[non_exhaustive]
pub struct CallMetrics;

impl CallMetrics {
    /// Describes the metrics to the recorder that is installed now.
    pub fn new() -> Self {
        describe_histogram!(CLIENT, Unit::Seconds, "How long calls take that this side makes.");
        describe_histogram!(SERVER, Unit::Seconds, "How long calls take that this side answers.");
        CallMetrics
    }
}

/// A call that is under way. Its drop records it, as cancelled unless something else was said.
struct Timed {
    metric: &'static str,
    began: Instant,
    method: String,
    server: Option<String>,
    failure: Option<ErrorKind>,
}

impl Timed {
    fn begin(metric: &'static str, method: String, server: Option<String>) -> Self {
        Timed { metric, began: Instant::now(), method, server, failure: Some(ErrorKind::Cancelled) }
    }
}

impl Drop for Timed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.failure = Some(ErrorKind::HandlerFailed);
        }
        let mut labels: Vec<(&'static str, SharedString)> =
            vec![("rpc.system.name", "tollway".into()), ("rpc.method", std::mem::take(&mut self.method).into())];
        labels.extend(self.server.take().map(|server| ("server.address", server.into())));
        labels.extend(self.failure.map(|kind| ("error.type", kind.as_str().into())));
        histogram!(self.metric, &labels).record(self.began.elapsed().as_secs_f64());
    }
}

impl ClientMiddleware for CallMetrics {
    async fn call(&self, call: OutgoingCall, next: NextCall) -> Result<Answer, CallError> {
        let method = method_label(call.service(), call.method_name());
        let mut timed = Timed::begin(CLIENT, method, Some(next.peer_address()));
        let answered = next.call(call).await;
        timed.failure = answered.as_ref().map_or_else(|error| Some(error.kind()), Answer::error_kind);
        answered
    }
}

impl ServerMiddleware for CallMetrics {
    async fn handle(&self, call: IncomingCall, next: NextHandler) -> Reply {
        let method = method_label(Some(call.context().service()), call.context().method_name());
        let mut timed = Timed::begin(SERVER, method, None);
        let reply = next.handle(call).await;
        timed.failure = reply.error_kind();
        reply
    }
}

//! What goes around calls: tracing, metrics, limits, and whatever an application puts there.
//!
//! [`ClientMiddleware`] is around calls that are made, [`ServerMiddleware`] around calls that are answered. Each gets the
//! call, encoded, and the rest of the way, which it may take once, not at all, or later. Several make a stack, in which
//! the first is outermost. A call around which nothing is installed knows nothing of all this and costs nothing more.
//!
//! A middleware sees a call until its answer. The streams of an answer go on behind it.
//!
//! ```
//! use tollway::rpc::middleware::{ClientMiddleware, NextCall};
//! use tollway::rpc::{Answer, CallError, OutgoingCall};
//!
//! /// Sends a key along with each call.
//! struct WithKey(&'static str);
//!
//! impl ClientMiddleware for WithKey {
//!     async fn call(&self, mut call: OutgoingCall, next: NextCall) -> Result<Answer, CallError> {
//!         let metadata = std::mem::take(call.metadata_mut());
//!         *call.metadata_mut() = metadata.with("api-key", self.0);
//!         next.call(call).await
//!     }
//! }
//! ```

mod limit;
#[cfg(feature = "metrics")]
mod metrics;
#[cfg(feature = "tower")]
pub mod tower;
mod trace_context;
mod tracing;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use super::call::CallFuture;
use super::error::CallError;
use super::method::MethodId;
use super::outgoing::{Answer, OutgoingCall, Target};
use super::scope::Scope;
use super::service::{BoxReply, IncomingCall, Reply, Service};
use crate::connection::Connection;
use crate::future::BoxFuture;

pub use limit::ConcurrencyLimit;
#[cfg(feature = "metrics")]
pub use metrics::CallMetrics;
pub use trace_context::{InvalidTraceContext, SpanId, TraceContext, TraceId};
pub use tracing::Tracing;

/// Something around each call that this side makes.
pub trait ClientMiddleware: Send + Sync + 'static {
    /// Makes the call by `next`, or answers in its place.
    ///
    /// The future is dropped when the caller drops its own, which cancels the call. What waits before the call is made
    /// ends with [`OutgoingCall::deadline`]; the call itself does so anyway.
    ///
    /// # Errors
    /// Those of the call, or of the middleware's own.
    fn call(&self, call: OutgoingCall, next: NextCall) -> impl Future<Output = Result<Answer, CallError>> + Send;
}

/// Something around each call that this side answers.
pub trait ServerMiddleware: Send + Sync + 'static {
    /// Answers the call by `next`, or in its place: with [`Reply::refused`], for example.
    ///
    /// The future is dropped when the caller cancels and when the call's deadline passes.
    fn handle(&self, call: IncomingCall, next: NextHandler) -> impl Future<Output = Reply> + Send;
}

/// [`ClientMiddleware`] of any kind.
trait AnyClient: Send + Sync {
    fn call(self: Arc<Self>, call: OutgoingCall, next: NextCall) -> BoxFuture<'static, Result<Answer, CallError>>;
}

impl<M: ClientMiddleware> AnyClient for M {
    fn call(self: Arc<Self>, call: OutgoingCall, next: NextCall) -> BoxFuture<'static, Result<Answer, CallError>> {
        Box::pin(async move { ClientMiddleware::call(&*self, call, next).await })
    }
}

/// [`ServerMiddleware`] of any kind.
trait AnyServer: Send + Sync {
    fn handle(self: Arc<Self>, call: IncomingCall, next: NextHandler) -> BoxReply;
}

impl<M: ServerMiddleware> AnyServer for M {
    fn handle(self: Arc<Self>, call: IncomingCall, next: NextHandler) -> BoxReply {
        Box::pin(async move { ServerMiddleware::handle(&*self, call, next).await })
    }
}

/// A stack of [`ClientMiddleware`]. Clones share it; an empty one is nothing but a null pointer.
#[derive(Clone, Default)]
pub struct ClientStack(Option<Arc<Vec<Arc<dyn AnyClient>>>>);

impl ClientStack {
    /// Nothing.
    pub fn new() -> Self {
        ClientStack::default()
    }

    /// Adds a middleware, further in than what is there.
    #[must_use]
    pub fn with(self, middleware: impl ClientMiddleware) -> Self {
        let added: Arc<dyn AnyClient> = Arc::new(middleware);
        ClientStack(Some(Arc::new(self.layers().iter().cloned().chain([added]).collect())))
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    fn layers(&self) -> &[Arc<dyn AnyClient>] {
        self.0.as_deref().map_or(&[], Vec::as_slice)
    }
}

impl fmt::Debug for ClientStack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientStack").field("layers", &self.layers().len()).finish()
    }
}

/// A stack of [`ServerMiddleware`]. Clones share it; an empty one is nothing but a null pointer.
#[derive(Clone, Default)]
pub struct ServerStack(Option<Arc<Vec<Arc<dyn AnyServer>>>>);

impl ServerStack {
    /// Nothing.
    pub fn new() -> Self {
        ServerStack::default()
    }

    /// Adds a middleware, further in than what is there.
    #[must_use]
    pub fn with(self, middleware: impl ServerMiddleware) -> Self {
        let added: Arc<dyn AnyServer> = Arc::new(middleware);
        ServerStack(Some(Arc::new(self.layers().iter().cloned().chain([added]).collect())))
    }

    /// Whether nothing is in it.
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    fn layers(&self) -> &[Arc<dyn AnyServer>] {
        self.0.as_deref().map_or(&[], Vec::as_slice)
    }
}

impl fmt::Debug for ServerStack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerStack").field("layers", &self.layers().len()).finish()
    }
}

/// The rest of the way of a call that is made. Clones take the same way, so that a call can be made again.
#[derive(Debug, Clone)]
pub struct NextCall {
    stack: ClientStack,
    /// The layer that comes next.
    at: usize,
    target: Target,
}

impl NextCall {
    pub(crate) fn new(stack: &ClientStack, target: Target) -> Self {
        NextCall { stack: stack.clone(), at: 0, target }
    }

    /// Makes the call as the one who is polled now: it takes over what a handler hands down.
    pub(crate) fn begin(self, mut call: OutgoingCall) -> BoxFuture<'static, Result<Answer, CallError>> {
        if let Some(deadline) = Scope::deadline_of_current() {
            call.shorten_deadline(deadline);
        }
        self.call(call)
    }

    /// The connection that the call is made on, unless one has to be found for it.
    pub fn connection(&self) -> Option<&Connection> {
        match &self.target {
            Target::Connection(connection) => Some(connection),
            Target::Remote(_) => None,
        }
    }

    /// Where the peer is, in the notation of its conduit, such as `127.0.0.1:7400`.
    pub fn peer_address(&self) -> String {
        match &self.target {
            Target::Connection(connection) => connection.peer().address().to_owned(),
            Target::Remote(service) => service.address(),
        }
    }

    /// Goes on with the call.
    ///
    /// # Errors
    /// Those of the call, or of a middleware further in.
    ///
    /// # Cancel safety
    /// Dropping the future cancels the call at the peer.
    pub fn call(mut self, call: OutgoingCall) -> BoxFuture<'static, Result<Answer, CallError>> {
        if let Some(layer) = self.stack.layers().get(self.at).cloned() {
            self.at += 1;
            return layer.call(call, self);
        }
        match self.target {
            Target::Connection(connection) => {
                let connection = connection.bare();
                Box::pin(async move { CallFuture::direct(&connection, call).await })
            }
            Target::Remote(service) => Box::pin(async move { service.call(call).await }),
        }
    }
}

/// The rest of the way of a call that is answered.
#[derive(Clone)]
pub struct NextHandler {
    stack: ServerStack,
    /// The layer that comes next.
    at: usize,
    service: Arc<dyn Service>,
}

impl fmt::Debug for NextHandler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NextHandler").field("service", &self.service.name()).finish_non_exhaustive()
    }
}

impl NextHandler {
    /// Goes on with the call.
    pub fn handle(mut self, call: IncomingCall) -> BoxReply {
        match self.stack.layers().get(self.at).cloned() {
            Some(layer) => {
                self.at += 1;
                layer.handle(call, self)
            }
            None => self.service.call(call),
        }
    }
}

/// A service with middleware around its calls: see [`Service::around`].
#[derive(Clone)]
pub struct Layered {
    stack: ServerStack,
    service: Arc<dyn Service>,
}

impl Layered {
    pub(crate) fn new(service: Arc<dyn Service>, stack: ServerStack) -> Self {
        Layered { stack, service }
    }
}

impl fmt::Debug for Layered {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Layered").field("service", &self.service.name()).finish_non_exhaustive()
    }
}

impl Service for Layered {
    fn name(&self) -> &str {
        self.service.name()
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        NextHandler { stack: self.stack.clone(), at: 0, service: self.service.clone() }.handle(call)
    }

    fn inline_within(&self) -> Option<Duration> {
        self.service.inline_within()
    }

    fn schema(&self) -> Option<u64> {
        self.service.schema()
    }

    fn method_name(&self, method: MethodId) -> Option<&'static str> {
        self.service.method_name(method)
    }
}

/// The fully qualified name of a method, as OpenTelemetry wants it: bounded in number, whatever ids a peer makes up.
fn method_label(service: Option<&str>, method: Option<&str>) -> String {
    match (service, method) {
        (Some(service), Some(method)) => format!("{service}/{method}"),
        _ => "_OTHER".to_owned(),
    }
}

//! Services: who answers calls, and how they are looked up.

use std::collections::HashMap;
use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::RwLock;
use rustc_hash::FxHashMap;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tollway_protocol::error::Reason;
use tollway_protocol::message::Status;
use tollway_protocol::metadata::Metadata;
use tollway_protocol::payment::Amount;

use super::codec::{self, DecodeError, OutboundSlots};
use super::context::CallContext;
use super::error::{ErrorKind, detail};
use super::method::MethodId;
use super::middleware::{Layered, ServerMiddleware, ServerStack};
use super::stream_core::InboundStream;
use crate::incoming::Acceptor;
use crate::payment::Payee;

/// The future of a reply.
pub type BoxReply = Pin<Box<dyn Future<Output = Reply> + Send + 'static>>;

/// Something that answers calls.
///
/// ```
/// use tollway::rpc::{BoxReply, IncomingCall, MethodId, Reply, Service};
///
/// struct Doubler;
///
/// impl Service for Doubler {
///     fn name(&self) -> &str {
///         "doubler"
///     }
///
///     fn call(&self, call: IncomingCall) -> BoxReply {
///         if call.method() != MethodId::of("doubler", 1, "double") {
///             return Reply::unknown_method().boxed();
///         }
///         Box::pin(async move {
///             match call.args::<u64>() {
///                 Ok(number) => Reply::ok(&(2 * number)),
///                 Err(error) => Reply::invalid_payload(&error),
///             }
///         })
///     }
/// }
/// ```
pub trait Service: Send + Sync + 'static {
    /// The name under which the service is opened, at most 256 bytes.
    fn name(&self) -> &str;

    /// Starts a call. The future is dropped when the caller cancels; a panic in it is an error of this call alone.
    fn call(&self, call: IncomingCall) -> BoxReply;

    /// How long a handler's first poll may take to count as short. Short handlers are polled on the session's own task,
    /// which saves a task for each call; a method is only polled there once it was measured to be short. `None` gives
    /// each call a task of its own: right for handlers that block.
    ///
    /// All else on the session waits for a handler that is polled there, so a longer limit is for services whose
    /// sessions have no other work, or for machines on which everything takes longer. At most [`MAX_INLINE`] counts.
    fn inline_within(&self) -> Option<Duration> {
        Some(SHORT)
    }

    /// A fingerprint of what the methods take and return, which typed clients that have one compare with theirs when
    /// they open a connection. `None`, which is the default, is right for whatever client.
    fn schema(&self) -> Option<u64> {
        None
    }

    /// The name of a method, for logs and metrics; `None` for an id that is no method's. Services that are made by
    /// `#[tollway::service]` know it.
    fn method_name(&self, _method: MethodId) -> Option<&'static str> {
        None
    }

    /// The service with `middleware` around each of its calls; what is put around it later is further out.
    ///
    /// ```
    /// # use tollway::rpc::{Service, Services};
    /// # use tollway::rpc::middleware::ConcurrencyLimit;
    /// # fn example(service: impl Service) -> Services {
    /// Services::new().with(service.around(ConcurrencyLimit::new(32)))
    /// # }
    /// ```
    fn around<M: ServerMiddleware>(self, middleware: M) -> Layered
    where
        Self: Sized,
    {
        Layered::new(Arc::new(self), ServerStack::new().with(middleware))
    }
}

/// A call that the peer makes.
pub struct IncomingCall {
    pub(crate) context: CallContext,
    pub(crate) payload: Bytes,
    pub(crate) streams: Vec<InboundStream>,
}

impl fmt::Debug for IncomingCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IncomingCall")
            .field("context", &self.context)
            .field("bytes", &self.payload.len())
            .finish_non_exhaustive()
    }
}

impl IncomingCall {
    /// The method.
    pub fn method(&self) -> MethodId {
        self.context.method
    }

    /// What is known of the call beside its arguments.
    pub fn context(&self) -> &CallContext {
        &self.context
    }

    /// The arguments as they came, without their streams.
    pub fn payload(&self) -> &Bytes {
        &self.payload
    }

    /// Decodes the arguments, with the streams in them.
    ///
    /// # Errors
    /// When the payload is not a `T`.
    pub fn args<T: DeserializeOwned>(self) -> Result<T, DecodeError> {
        codec::decode(&self.payload, self.streams)
    }

    /// Takes the arguments out, to be decoded where the context is used, too, or as values that borrow from them.
    pub fn into_parts(self) -> (CallContext, Args) {
        (self.context, Args { payload: self.payload, streams: self.streams })
    }
}

/// The arguments of a call as they came.
pub struct Args {
    payload: Bytes,
    streams: Vec<InboundStream>,
}

impl fmt::Debug for Args {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Args").field("bytes", &self.payload.len()).finish_non_exhaustive()
    }
}

impl Args {
    /// Decodes the arguments. Strings and bytes may be borrowed; streams are taken out, so that they are there once.
    ///
    /// # Errors
    /// When the payload is not a `T`.
    pub fn decode<'de, T: Deserialize<'de>>(&'de mut self) -> Result<T, DecodeError> {
        codec::decode(&self.payload, std::mem::take(&mut self.streams))
    }
}

/// An answer to a call.
pub struct Reply {
    pub(crate) status: Status,
    pub(crate) metadata: Metadata,
    pub(crate) payload: Bytes,
    pub(crate) slots: OutboundSlots,
    pub(crate) cost: Option<Amount>,
    /// What earlier attempts of the same call have cost.
    pub(crate) paid_before: Amount,
}

impl fmt::Debug for Reply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply")
            .field("status", &self.status)
            .field("bytes", &self.payload.len())
            .finish_non_exhaustive()
    }
}

impl Reply {
    pub(crate) fn empty(status: Status) -> Self {
        let (metadata, payload, slots) = (Metadata::new(), Bytes::new(), OutboundSlots::default());
        Reply { status, metadata, payload, slots, cost: None, paid_before: Amount::ZERO }
    }

    fn encoded<T: Serialize + ?Sized>(status: Status, value: &T) -> Self {
        match codec::encode(value) {
            Ok((payload, slots)) => Reply { payload, slots, ..Reply::empty(status) },
            Err(error) => {
                tracing::error!(%error, "a handler's answer cannot be encoded");
                Reply::empty(Status::HandlerFailed)
            }
        }
    }

    /// The method's result. One that cannot be encoded becomes a failure of the handler.
    pub fn ok<T: Serialize + ?Sized>(value: &T) -> Self {
        Reply::encoded(Status::Ok, value)
    }

    /// The method's own error.
    pub fn error<E: Serialize + ?Sized>(error: &E) -> Self {
        Reply::encoded(Status::AppError, error)
    }

    /// The service has no such method.
    pub fn unknown_method() -> Self {
        Reply::empty(Status::UnknownMethod)
    }

    /// The payload was not the method's arguments.
    pub fn invalid_payload(error: &dyn std::error::Error) -> Self {
        tracing::debug!(%error, "a call's arguments cannot be decoded");
        Reply::empty(Status::InvalidPayload)
    }

    /// The call is not executed, for this reason. Free of charge.
    pub fn refused(reason: &Reason) -> Self {
        Reply::empty(Status::Refused).with_metadata(detail::of_refusal(reason))
    }

    pub(crate) fn too_large(bytes: usize, limit: u32) -> Self {
        Reply::empty(Status::TooLarge).with_metadata(detail::of_size(bytes, limit))
    }

    /// The method's result, encoded already.
    pub fn raw(payload: Bytes) -> Self {
        Reply { payload, ..Reply::empty(Status::Ok) }
    }

    /// The handler failed. Free of charge.
    pub fn failed() -> Self {
        Reply::empty(Status::HandlerFailed)
    }

    /// States what the call costs, in base units, in place of its call price: for a method whose price has a maximum,
    /// which was reserved before the handler started. Less than the call price is charged as that; more than the maximum
    /// makes the call a failure, which is free. Without effect on a connection on which nothing is paid.
    #[must_use]
    pub fn costing(mut self, cost: Amount) -> Self {
        self.cost = Some(cost);
        self
    }

    /// Adds metadata.
    pub fn with_metadata(mut self, metadata: Metadata) -> Self {
        self.metadata = metadata;
        self
    }

    /// What kind of failure it tells the caller of; `None` for a result.
    pub fn error_kind(&self) -> Option<ErrorKind> {
        ErrorKind::of_status(self.status)
    }

    /// What is sent along.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// What is sent along, to be changed.
    pub fn metadata_mut(&mut self) -> &mut Metadata {
        &mut self.metadata
    }

    /// The reply as a future that is ready.
    pub fn boxed(self) -> BoxReply {
        Box::pin(std::future::ready(self))
    }
}

/// A service in a session's list, and who takes the money if it has a price.
pub(crate) struct ServiceEntry {
    pub(crate) service: Arc<dyn Service>,
    /// The same without the list's middleware around it.
    bare: Arc<dyn Service>,
    pub(crate) payee: Option<Arc<Payee>>,
    /// What the service says of [`Service::schema`]: asked once, and not under a lock.
    pub(crate) schema: Option<u64>,
    /// What the service says of [`Service::inline_within`], within bounds.
    pub(crate) inline_within: Option<Duration>,
    /// By method id, which is a hash already.
    guards: RwLock<FxHashMap<u64, Arc<MethodGuard>>>,
}

impl ServiceEntry {
    pub(crate) fn new(service: Arc<dyn Service>, payee: Option<Arc<Payee>>) -> Self {
        ServiceEntry::around(service, payee, &ServerStack::new())
    }

    fn around(bare: Arc<dyn Service>, payee: Option<Arc<Payee>>, middleware: &ServerStack) -> Self {
        let service = match middleware.is_empty() {
            true => bare.clone(),
            false => Arc::new(Layered::new(bare.clone(), middleware.clone())),
        };
        let inline_within = service.inline_within().map(|limit| limit.min(MAX_INLINE));
        let schema = service.schema();
        ServiceEntry { service, bare, payee, schema, inline_within, guards: Default::default() }
    }

    /// Starts a call, with what its price asks for around it.
    pub(crate) fn call(&self, incoming: IncomingCall) -> BoxReply {
        match &self.payee {
            Some(payee) => payee.call(&self.service, incoming),
            None => self.service.call(incoming),
        }
    }

    /// Whether a first poll that took so long was short.
    pub(crate) fn is_short(&self, took: Duration) -> bool {
        self.inline_within.is_some_and(|limit| took <= limit)
    }

    pub(crate) fn guard(&self, method: MethodId) -> Arc<MethodGuard> {
        if let Some(guard) = self.guards.read().get(&method.0) {
            return guard.clone();
        }
        let mut guards = self.guards.write();
        if guards.len() >= MAX_GUARDS {
            // A service has fewer methods than that: these are ids that somebody makes up, and they stay unmeasured.
            return Arc::default();
        }
        guards.entry(method.0).or_default().clone()
    }
}

/// The services that a side serves, by name. Cloning is cheap.
#[derive(Clone, Default)]
pub struct Services {
    by_name: Arc<HashMap<String, Arc<ServiceEntry>>>,
    acceptors: Arc<HashMap<String, Arc<dyn Acceptor>>>,
    fallback: Option<Arc<dyn Acceptor>>,
    middleware: ServerStack,
}

impl fmt::Debug for Services {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.by_name.keys()).finish()
    }
}

impl Services {
    /// No services.
    pub fn new() -> Self {
        Services::default()
    }

    /// Adds a service that anybody may use.
    #[must_use]
    pub fn with(self, service: impl Service) -> Self {
        self.insert(Arc::new(service), None)
    }

    /// Adds a service that `payee` sells.
    #[must_use]
    pub fn with_paid(self, service: impl Service, payee: Arc<Payee>) -> Self {
        self.insert(Arc::new(service), Some(payee))
    }

    fn insert(mut self, service: Arc<dyn Service>, payee: Option<Arc<Payee>>) -> Self {
        let name = service.name().to_owned();
        let entry = ServiceEntry::around(service, payee, &self.middleware);
        // Services are listed before they are shared, so this copies nothing as a rule.
        Arc::make_mut(&mut self.by_name).insert(name, Arc::new(entry));
        self
    }

    /// Puts `middleware` around every call of every service in the list, those that are added later too. What is added
    /// first is outermost; [`Service::around`] is for one service alone, and further in.
    #[must_use]
    pub fn with_middleware(mut self, middleware: impl ServerMiddleware) -> Self {
        self.middleware = self.middleware.with(middleware);
        for entry in Arc::make_mut(&mut self.by_name).values_mut() {
            *entry = Arc::new(ServiceEntry::around(entry.bare.clone(), entry.payee.clone(), &self.middleware));
        }
        self
    }

    /// Lets `acceptor` decide about every open of this name, such as a [relay](crate::proxy_connections).
    #[must_use]
    pub fn with_acceptor(mut self, name: impl Into<String>, acceptor: impl Acceptor) -> Self {
        Arc::make_mut(&mut self.acceptors).insert(name.into(), Arc::new(acceptor));
        self
    }

    /// Lets `acceptor` decide about every open of a name that is not listed.
    #[must_use]
    pub fn with_fallback(mut self, acceptor: impl Acceptor) -> Self {
        self.fallback = Some(Arc::new(acceptor));
        self
    }

    /// Who decides about opens of this name, if it is not a service's.
    pub(crate) fn acceptor(&self, name: &str) -> Option<&Arc<dyn Acceptor>> {
        self.acceptors.get(name).or(self.fallback.as_ref().filter(|_| !self.by_name.contains_key(name)))
    }

    pub(crate) fn get(&self, name: &str) -> Option<&Arc<ServiceEntry>> {
        self.by_name.get(name)
    }
}

/// Methods of a service that are measured. An id that no method has takes a place, too, until all are taken.
const MAX_GUARDS: usize = 4_096;

/// Calls of a method for which handlers are spawned after one was found not to be short.
const SPAWN_AFTER_LONG: u32 = 512;
/// A first poll within this time is short by default: about what spawning a task costs on another core.
pub(super) const SHORT: Duration = Duration::from_micros(4);
/// The most that a service may call short: a session that is held up for so long still answers its peer's pings in time.
pub const MAX_INLINE: Duration = Duration::from_millis(100);

/// Whether the handlers of one method may be polled on the driver: never blind.
///
/// The first call of a method is spawned and timed. Was it done in its first poll and short, the next ones are polled
/// inline, each timed. One that is not makes the next 512 calls spawn, and the call after them is a probe again; after
/// 512 short ones it may have been the machine that was busy, and the next call is the probe.
#[derive(Debug)]
pub(crate) struct MethodGuard {
    /// Calls that are still to be spawned; the last of them is the probe. Zero: poll inline.
    to_spawn: AtomicU32,
    /// Short first polls since the last one that was not.
    short: AtomicU32,
}

impl Default for MethodGuard {
    fn default() -> Self {
        MethodGuard { to_spawn: AtomicU32::new(1), short: AtomicU32::new(0) }
    }
}

/// How a handler is to be run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RunAs {
    Inline,
    Spawned,
    /// Spawned, and its first poll is timed.
    Probe,
}

impl MethodGuard {
    pub(crate) fn decide(&self) -> RunAs {
        let left = self.to_spawn.load(Ordering::Relaxed);
        match left {
            0 => RunAs::Inline,
            // A probe is under way until it reports; its neighbours are spawned.
            1 => match self.to_spawn.compare_exchange(1, u32::MAX, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => RunAs::Probe,
                Err(_) => RunAs::Spawned,
            },
            u32::MAX => RunAs::Spawned,
            _ => {
                // Racing sessions may count one call twice; the figure is a rule of thumb.
                let _raced = self.to_spawn.compare_exchange(left, left - 1, Ordering::Relaxed, Ordering::Relaxed);
                RunAs::Spawned
            }
        }
    }

    /// Reports a first poll: whether it was the last, too, and short.
    pub(crate) fn report(&self, is_short: bool) {
        // Racing sessions may lose a count; the figures are rules of thumb.
        let short = self.short.load(Ordering::Relaxed);
        let (next, short) = match is_short {
            true => (0, short.saturating_add(1)),
            false if short >= SPAWN_AFTER_LONG => (1, 0),
            false => (SPAWN_AFTER_LONG, 0),
        };
        self.short.store(short, Ordering::Relaxed);
        self.to_spawn.store(next, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_method_is_never_polled_inline_blind() {
        let guard = MethodGuard::default();
        assert_eq!([guard.decide(), guard.decide()], [RunAs::Probe, RunAs::Spawned], "until the probe reports");
        guard.report(true);
        assert_eq!(guard.decide(), RunAs::Inline);
        guard.report(false);
        for _ in 0..SPAWN_AFTER_LONG - 1 {
            assert_eq!(guard.decide(), RunAs::Spawned);
        }
        assert_eq!(guard.decide(), RunAs::Probe);
        guard.report(false);
        assert_eq!(guard.decide(), RunAs::Spawned, "what was found to be long is not asked for again at once");
    }

    #[test]
    fn a_service_says_what_is_short_within_bounds() {
        struct Within(Option<Duration>);
        impl Service for Within {
            fn name(&self) -> &str {
                "within"
            }
            fn call(&self, _call: IncomingCall) -> BoxReply {
                Reply::unknown_method().boxed()
            }
            fn inline_within(&self) -> Option<Duration> {
                self.0
            }
        }
        let is_short = |limit, took| {
            let services = Services::new().with(Within(limit));
            services.get("within").expect("it was added").is_short(took)
        };
        assert!(!is_short(None, Duration::ZERO), "nothing is");
        let limit = Duration::from_micros(7);
        assert!(is_short(Some(limit), limit) && !is_short(Some(limit), limit + Duration::from_nanos(1)));
        assert!(is_short(Some(Duration::MAX), MAX_INLINE));
        assert!(!is_short(Some(Duration::MAX), MAX_INLINE + Duration::from_nanos(1)), "a session must answer pings");
    }

    #[test]
    fn one_long_poll_among_many_short_ones_costs_one_probe() {
        let guard = MethodGuard::default();
        for _ in 0..SPAWN_AFTER_LONG {
            guard.report(true);
        }
        guard.report(false);
        assert_eq!(guard.decide(), RunAs::Probe);
        guard.report(true);
        assert_eq!(guard.decide(), RunAs::Inline);
        guard.report(false);
        assert_eq!(guard.decide(), RunAs::Spawned, "a second one so soon is the method's own");
    }
}

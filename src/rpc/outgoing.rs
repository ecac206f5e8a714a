//! A call on its way out and its answer, as middleware sees them: encoded; and whom calls are made to.

use std::fmt;
use std::ops::Deref;
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use smallvec::SmallVec;
use tollway_protocol::message::Status;
use tollway_protocol::metadata::Metadata;
use tollway_protocol::payment::Amount;

use super::call::{Call, To};
use super::codec::{self, OutboundSlots};
use super::error::{CallError, ErrorKind};
use super::method::{Method, MethodId};
#[cfg(feature = "tower")]
use super::middleware::NextCall;
use super::stream_core::InboundStream;
use crate::connection::Connection;
use crate::reconnect::RemoteService;
use crate::session::OpenError;

/// A typed client: a method for each method of its service. `#[tollway::service]` makes them;
/// [`Session::open_client`](crate::Session::open_client) opens one on a session, and
/// [`Client::service`](crate::Client::service) makes one that connects when it is needed.
pub trait ServiceClient: From<Connection> + From<Caller> + AsRef<Caller> {
    /// The service's name.
    const NAME: &'static str;
    /// The version of the service that the client speaks.
    const VERSION: u32;
    /// What the service's own must be, if it has one: see [`Service::schema`](super::Service::schema).
    const SCHEMA: Option<u64>;
}

/// The key under which an Accept states the schema of its service.
const SCHEMA: &str = "tollway-schema";

/// The metadata of an Accept for a service of this schema.
pub(crate) fn accept_metadata(schema: Option<u64>) -> Metadata {
    match schema {
        Some(schema) => Metadata::new().with(SCHEMA, schema.to_be_bytes()),
        None => Metadata::new(),
    }
}

/// Compares a client's schema with what an Accept has stated. Who states nothing is taken at its word.
pub(crate) fn check_schema(ours: Option<u64>, accepted: &Metadata) -> Result<(), OpenError> {
    let theirs = accepted.value(SCHEMA).and_then(|value| value.try_into().ok()).map(u64::from_be_bytes);
    match (ours, theirs) {
        (Some(ours), Some(theirs)) if ours != theirs => Err(OpenError::OtherSchema { ours, theirs }),
        _ => Ok(()),
    }
}

/// Whom a typed client calls: the service at the other end of a connection, or one at an endpoint, to which a
/// [`Client`](crate::Client) connects when a call is made. Clones call the same.
#[derive(Debug, Clone)]
pub struct Caller(Target);

/// Whom calls are made to.
#[derive(Debug, Clone)]
pub(crate) enum Target {
    Connection(Connection),
    Remote(RemoteService),
}

impl Caller {
    /// The connection that calls are made on; `None` where one is opened when it is needed.
    pub fn connection(&self) -> Option<&Connection> {
        match &self.0 {
            Target::Connection(connection) => Some(connection),
            Target::Remote(_) => None,
        }
    }

    /// Calls a method; see [`Connection::call`].
    pub fn call<A: Serialize + ?Sized, R>(&self, method: MethodId, args: &A) -> Call<'_, R> {
        Call::new(self.to(), Named::Id(method), args)
    }

    /// Calls a method that middleware knows by name.
    #[cfg(feature = "macros")]
    pub(crate) fn call_named<A: Serialize, R, E>(&self, method: &'static Method, args: &A) -> Call<'_, R, E> {
        Call::<R>::new(self.to(), Named::Method(method), args).or_error()
    }

    /// The whole way of its calls.
    #[cfg(feature = "tower")]
    pub(super) fn next(&self) -> NextCall {
        match &self.0 {
            Target::Connection(connection) => NextCall::new(connection.around(), self.0.clone()),
            Target::Remote(service) => NextCall::new(service.around(), self.0.clone()),
        }
    }

    fn to(&self) -> To<'_> {
        match &self.0 {
            Target::Connection(connection) => To::Connection(connection),
            Target::Remote(service) => To::Remote(service),
        }
    }
}

impl From<Connection> for Caller {
    fn from(connection: Connection) -> Self {
        Caller(Target::Connection(connection))
    }
}

impl From<RemoteService> for Caller {
    fn from(service: RemoteService) -> Self {
        Caller(Target::Remote(service))
    }
}

/// A method by its id, or by all that is known of it.
pub(crate) enum Named {
    Id(MethodId),
    #[cfg_attr(not(feature = "macros"), allow(dead_code, reason = "only generated clients have names"))]
    Method(&'static Method),
}

/// A call that is to be made, with its arguments encoded.
pub struct OutgoingCall {
    pub(crate) method: MethodId,
    named: Option<&'static Method>,
    pub(crate) metadata: Metadata,
    pub(crate) deadline: Option<Instant>,
    pub(crate) payload: Bytes,
    pub(crate) slots: OutboundSlots,
}

impl fmt::Debug for OutgoingCall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("OutgoingCall")
            .field("method", &self.method)
            .field("service", &self.service())
            .field("name", &self.method_name())
            .field("metadata", &self.metadata)
            .field("bytes", &self.payload.len())
            .finish_non_exhaustive()
    }
}

impl OutgoingCall {
    pub(crate) fn new(method: Named, payload: Bytes, slots: OutboundSlots) -> Self {
        let (method, named) = match method {
            Named::Id(method) => (method, None),
            Named::Method(method) => (method.id(), Some(method)),
        };
        OutgoingCall { method, named, metadata: Metadata::new(), deadline: None, payload, slots }
    }

    /// A call of a method with arguments that are encoded already, and without streams.
    pub fn raw(method: MethodId, payload: Bytes) -> Self {
        OutgoingCall::new(Named::Id(method), payload, OutboundSlots::default())
    }

    /// The method.
    pub fn method(&self) -> MethodId {
        self.method
    }

    /// The service's name, if a generated client makes the call.
    pub fn service(&self) -> Option<&'static str> {
        self.named.map(Method::service)
    }

    /// The method's name, if a generated client makes the call.
    pub fn method_name(&self) -> Option<&'static str> {
        self.named.map(Method::name)
    }

    /// Whether the method is marked as one that may be executed twice.
    pub fn is_idempotent(&self) -> bool {
        self.named.is_some_and(Method::is_idempotent)
    }

    /// What is sent along.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// What is sent along, to be changed.
    pub fn metadata_mut(&mut self) -> &mut Metadata {
        &mut self.metadata
    }

    /// When the caller gives up: the sooner of what it has said and what the handler that makes the call has left.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// The time that is left until the deadline, zero when it has passed.
    pub fn time_left(&self) -> Option<Duration> {
        self.deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()))
    }

    /// Makes the caller give up then, if it does not sooner.
    pub fn shorten_deadline(&mut self, deadline: Instant) {
        self.deadline = Some(self.deadline.map_or(deadline, |sooner| sooner.min(deadline)));
    }

    /// The arguments as they travel.
    pub fn payload(&self) -> &Bytes {
        &self.payload
    }

    /// The same call once more, unless streams travel in it: they are there once.
    pub fn try_clone(&self) -> Option<OutgoingCall> {
        self.slots.is_empty().then(|| OutgoingCall {
            method: self.method,
            named: self.named,
            metadata: self.metadata.clone(),
            deadline: self.deadline,
            payload: self.payload.clone(),
            slots: OutboundSlots::default(),
        })
    }
}

/// What a method answered, its result or its own error, not decoded yet. Dropped like this, its streams are ended.
pub struct Answer {
    pub(crate) status: Status,
    pub(crate) metadata: Metadata,
    pub(crate) charged: Amount,
    pub(crate) payload: AnswerBytes,
    pub(crate) streams: Vec<InboundStream>,
}

/// Payloads below this many bytes are copied out of the block that they were read into, so that an answer that nobody takes
/// pins what it holds and not the block.
const DETACH_BELOW: usize = 16 * 1024;

/// The payload of an answer until its caller decodes it. A short one needs no allocation.
pub(crate) enum AnswerBytes {
    Copied(SmallVec<[u8; 96]>),
    Shared(Bytes),
}

impl AnswerBytes {
    pub(crate) fn new(read: Bytes) -> Self {
        match read.len() < DETACH_BELOW {
            true => AnswerBytes::Copied(SmallVec::from_slice(&read)),
            false => AnswerBytes::Shared(read),
        }
    }
}

impl Deref for AnswerBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            AnswerBytes::Copied(bytes) => bytes,
            AnswerBytes::Shared(bytes) => bytes,
        }
    }
}

impl fmt::Debug for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answer")
            .field("status", &self.status)
            .field("metadata", &self.metadata)
            .field("bytes", &self.payload.len())
            .finish_non_exhaustive()
    }
}

impl Answer {
    /// [`ErrorKind::App`] if it is the method's own error.
    pub fn error_kind(&self) -> Option<ErrorKind> {
        ErrorKind::of_status(self.status)
    }

    /// What the callee sent along.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// What the callee says that the call has cost when it answered, in base units.
    pub fn charged(&self) -> Amount {
        self.charged
    }

    /// The result or the error as it came, without its streams.
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// The result, or the method's own error.
    ///
    /// # Errors
    /// The method's own error; [`CallError::InvalidAnswer`] when what came is neither.
    pub fn decode<R: DeserializeOwned, E: DeserializeOwned>(self) -> Result<R, CallError<E>> {
        let Answer { status, payload, streams, .. } = self;
        if status == Status::Ok {
            return codec::decode(&payload, streams).map_err(CallError::InvalidAnswer);
        }
        Err(codec::decode(&payload, streams).map_or_else(CallError::InvalidAnswer, CallError::App))
    }
}

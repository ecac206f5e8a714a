//! Calls and streams: what a service is made of, and how values become payloads.
//!
//! A [`Service`] answers calls by method id. A method's arguments, its result and the items of its streams are any
//! serde types; a [`Tx`] or [`Rx`] anywhere in them carries a stream along. [`middleware`] goes around calls on either
//! side.

mod call;
mod codec;
mod context;
mod error;
#[doc(hidden)]
#[cfg(feature = "macros")]
pub mod generated;
mod meter;
mod method;
pub mod middleware;
mod outgoing;
mod scope;
mod service;
mod stream;
mod stream_bytes;
mod stream_core;
mod stream_traits;

pub use call::{Call, Response};
pub use codec::{DecodeError, EncodeError};
pub(crate) use context::NamedCall;
pub use context::{CallContext, ConnectionData};
pub use error::{Body, CallError, ConnectFailure, ErrorKind, Execution, NoError, UnpaidCounts};
/// What an [`Rx`] is, and what a method of a service may return.
pub use futures_core::Stream;
/// What a [`Tx`] is.
pub use futures_sink::Sink;
pub use meter::{Meter, MeterStream};
pub use method::{Method, MethodId};
pub use outgoing::{Answer, Caller, OutgoingCall, ServiceClient};
pub use service::{Args, BoxReply, IncomingCall, MAX_INLINE, Reply, Service, Services};
pub use stream::{Rx, StreamError, Tx, stream};

pub(crate) use call::{CallFuture, CallSlot, Outcome, To};
pub(crate) use codec::OutboundSlots;
pub(crate) use outgoing::{AnswerBytes, Named, accept_metadata, check_schema};
pub(crate) use scope::{Scope, enter_deadline};
pub(crate) use service::{MethodGuard, RunAs, ServiceEntry};
pub(crate) use stream_core::{Aftermath, InboundStream, OUTBOX_BYTES, StreamCore};

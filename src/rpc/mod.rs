//! Calls and streams: what a service is made of, and how values become payloads.
//!
//! A [`Service`] answers calls by method id. A method's arguments, its result and the items of its streams are any
//! serde types; a [`Tx`] or [`Rx`] anywhere in them carries a stream along.

mod call;
mod codec;
mod service;
mod stream;
mod stream_core;

pub use call::{CallError, Response};
pub use codec::{DecodeError, EncodeError};
pub use service::{BoxReply, IncomingCall, MAX_INLINE, MethodId, Reply, Service, Services};
pub use stream::{Rx, StreamError, Tx, stream};

pub(crate) use call::{CallFuture, CallSlot, Outcome};
pub(crate) use codec::{OutboundSlots, encode};
pub(crate) use service::{MethodGuard, RunAs, ServiceEntry};
pub(crate) use stream_core::{Aftermath, InboundStream, StreamCore};

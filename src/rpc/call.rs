//! One call, from the caller's side.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use serde::de::DeserializeOwned;
use tollway_protocol::error::ConnectionEnd;
use tollway_protocol::id::ConnectionId;
use tollway_protocol::message::Status;
use tollway_protocol::metadata::Metadata;
use tollway_protocol::payment::Amount;
use tollway_protocol::session::{CallKey, CommandError};

use super::codec::{self, DecodeError, EncodeError};
use super::stream_core::InboundStream;
use crate::shared::{ConnectionCell, Shared, SlotKey};

/// A call that did not bring its method's result.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CallError {
    /// The method's own error, as it was encoded; [`CallError::app`] decodes it.
    #[error("the method returned an error of its own")]
    App(Bytes),
    /// The service has no such method. Nothing was executed.
    #[error("the service has no such method")]
    UnknownMethod,
    /// The service could not decode the arguments. Nothing was executed.
    #[error("the service could not decode the arguments")]
    InvalidPayload,
    /// The call was cancelled.
    #[error("the call was cancelled")]
    Cancelled,
    /// The handler failed without an answer. It may have been executed in part.
    #[error("the handler failed without an answer")]
    HandlerFailed,
    /// The answer was larger than what this side receives in one body.
    #[error("the answer is larger than what this side receives in one body; such a method should return a stream")]
    AnswerTooLarge,
    /// The payment for the call did not come in time.
    #[error("the payment for the call did not come")]
    PaymentFailed,
    /// One of the two sides has no memory for the call, or for its answer, now. The callee did nothing if it was its side.
    #[error("there is no memory for the call or its answer now: try again, or raise the memory budget")]
    AtCapacity,
    /// The arguments cannot be encoded. Nothing was sent.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The answer is not of the expected type.
    #[error(transparent)]
    Decode(#[from] DecodeError),
    /// The call could not be made. Nothing was sent.
    #[error(transparent)]
    NotSent(CommandError),
    /// The connection ended before the answer.
    #[error("the connection ended before the answer: {0}")]
    ConnectionEnded(ConnectionEnd),
}

impl CallError {
    /// Decodes the method's own error.
    ///
    /// # Errors
    /// When this is not [`CallError::App`], or not an `E`: then it comes back.
    pub fn app<E: DeserializeOwned>(self) -> Result<E, CallError> {
        match self {
            CallError::App(payload) => codec::decode(&payload, Vec::new()).map_err(CallError::Decode),
            other => Err(other),
        }
    }
}

/// Where the answer to a call is left for its caller.
pub(crate) struct CallSlot {
    waker: Option<Waker>,
    outcome: Option<Outcome>,
}

/// How a call came out.
pub(crate) enum Outcome {
    Answered(Response),
    Failed,
}

/// The answer to a call, with what came along. Dropped undecoded, its streams are ended.
pub struct Response {
    pub(crate) status: Status,
    pub(crate) metadata: Metadata,
    pub(crate) charged: Amount,
    pub(crate) payload: Bytes,
    pub(crate) streams: Vec<InboundStream>,
}

impl fmt::Debug for Response {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Response")
            .field("status", &self.status)
            .field("charged", &self.charged)
            .field("bytes", &self.payload.len())
            .finish_non_exhaustive()
    }
}

impl CallSlot {
    pub(crate) fn waiting(waker: Waker) -> Self {
        CallSlot { waker: Some(waker), outcome: None }
    }

    /// Bytes of an answer that nobody took, which are still to go back to the window.
    pub(crate) fn untaken(&self) -> usize {
        match &self.outcome {
            Some(Outcome::Answered(answer)) => answer.payload.len(),
            _ => 0,
        }
    }

    /// Leaves the outcome. The first one stands.
    pub(crate) fn settle(&mut self, outcome: Outcome) -> Option<Waker> {
        if self.outcome.is_none() {
            self.outcome = Some(outcome);
        }
        self.waker.take()
    }
}

/// A call that is to be made, under way, or done. Dropping it cancels the call.
pub(crate) struct CallFuture<'a> {
    shared: &'a Arc<Shared>,
    cell: &'a ConnectionCell,
    connection: ConnectionId,
    stage: Stage,
}

enum Stage {
    Start { method: u64, metadata: Metadata, payload: Bytes, slots: codec::OutboundSlots },
    Waiting(CallKey, SlotKey),
    Done,
}

impl<'a> CallFuture<'a> {
    pub(crate) fn new(
        (shared, cell): (&'a Arc<Shared>, &'a ConnectionCell),
        connection: ConnectionId,
        method: u64,
        metadata: Metadata,
        (payload, slots): (Bytes, codec::OutboundSlots),
    ) -> Self {
        CallFuture { shared, cell, connection, stage: Stage::Start { method, metadata, payload, slots } }
    }

    fn start(&mut self, cx: &mut Context<'_>) -> Result<(CallKey, SlotKey), CallError> {
        let Stage::Start { method, metadata, payload, slots } = std::mem::replace(&mut self.stage, Stage::Done) else {
            unreachable!("a call starts once");
        };
        let flows = slots.flows();
        let spec = tollway_protocol::session::CallSpec {
            connection: self.connection,
            method,
            deadline: None,
            metadata,
            payload,
            slots: &flows,
        };
        self.shared.start_call(spec, slots, cx.waker().clone()).map_err(|error| match (error, self.cell.end()) {
            (_, Some(end)) => CallError::ConnectionEnded(end.clone()),
            (CommandError::SessionEnded(end), None) => CallError::ConnectionEnded(ConnectionEnd::Session(end)),
            (error, None) => CallError::NotSent(error),
        })
    }

    fn poll_outcome(&mut self, key: SlotKey, cx: &mut Context<'_>) -> Poll<Result<Response, CallError>> {
        let mut state = self.shared.lock();
        let Some(slot) = state.slots.get_mut(key) else {
            drop(state);
            self.stage = Stage::Done;
            return Poll::Ready(Err(self.ended()));
        };
        match slot.outcome.take() {
            None => {
                if slot.waker.as_ref().is_none_or(|waker| !waker.will_wake(cx.waker())) {
                    slot.waker = Some(cx.waker().clone());
                }
                Poll::Pending
            }
            Some(outcome) => {
                state.slots.remove(key);
                self.stage = Stage::Done;
                match outcome {
                    Outcome::Answered(answer) => {
                        if state.machine.consume_body(self.connection, answer.payload.len()) {
                            Shared::unlock_and_kick(state);
                        }
                        Poll::Ready(Ok(answer))
                    }
                    Outcome::Failed => {
                        drop(state);
                        Poll::Ready(Err(self.ended()))
                    }
                }
            }
        }
    }

    fn ended(&self) -> CallError {
        match (self.cell.end(), self.shared.end()) {
            (Some(end), _) => CallError::ConnectionEnded(end.clone()),
            (None, Some(end)) => CallError::ConnectionEnded(ConnectionEnd::Session(end.clone())),
            (None, None) => CallError::HandlerFailed,
        }
    }
}

impl Future for CallFuture<'_> {
    type Output = Result<Response, CallError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.stage {
            Stage::Start { .. } => match self.start(cx) {
                Ok((call, slot)) => {
                    self.stage = Stage::Waiting(call, slot);
                    Poll::Pending
                }
                Err(error) => Poll::Ready(Err(error)),
            },
            Stage::Waiting(_, slot) => self.poll_outcome(slot, cx),
            Stage::Done => Poll::Pending,
        }
    }
}

impl Drop for CallFuture<'_> {
    fn drop(&mut self) {
        if let Stage::Waiting(call, slot) = self.stage {
            self.shared.cancel_call(self.connection, call, slot);
        }
    }
}

impl Response {
    /// What the callee sent along.
    pub fn metadata(&self) -> &Metadata {
        &self.metadata
    }

    /// What the callee says that the call has cost when it answered, in base units; streams that go on cost more. Zero
    /// on an unpaid connection.
    pub fn charged(&self) -> Amount {
        self.charged
    }

    /// The result, with the streams in it.
    ///
    /// # Errors
    /// When the call was answered with an error, or the result is not an `R`.
    pub fn decode<R: DeserializeOwned>(self) -> Result<R, CallError> {
        match self.status {
            Status::Ok => Ok(codec::decode(&self.payload, self.streams)?),
            Status::AppError => Err(CallError::App(self.payload)),
            Status::UnknownMethod => Err(CallError::UnknownMethod),
            Status::InvalidPayload => Err(CallError::InvalidPayload),
            Status::Cancelled => Err(CallError::Cancelled),
            Status::TooLarge => Err(CallError::AnswerTooLarge),
            Status::PaymentFailed => Err(CallError::PaymentFailed),
            Status::AtCapacity => Err(CallError::AtCapacity),
            _ => Err(CallError::HandlerFailed),
        }
    }
}

//! One call, from the caller's side.

use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tollway_protocol::error::ConnectionEnd;
use tollway_protocol::message::Status;
use tollway_protocol::metadata::Metadata;
use tollway_protocol::payment::Amount;
use tollway_protocol::session::{CallKey, CallSpec};

use super::codec::{self, EncodeError, OutboundSlots};
use super::error::{CallError, NoError, detail};
use super::method::MethodId;
use super::scope::Scope;
use super::stream_core::InboundStream;
use crate::connection::{Connection, ConnectionInner};
use crate::shared::{Shared, SlotKey};

/// A call of a method that returns an `R`, or an `E` of its own: a future of its outcome, and what is to be told of it
/// before it is made. It is made when it is first polled; more calls than the peer takes at once wait for their turn.
///
/// # Cancel safety
/// Dropping it cancels the call at the peer; the method may have been executed.
#[must_use = "a call is made when it is awaited"]
pub struct Call<'a, R, E = NoError> {
    future: CallFuture<'a>,
    types: PhantomData<fn() -> (R, E)>,
}

impl<R, E> fmt::Debug for Call<'_, R, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Call").field("connection", &self.future.connection.id).finish_non_exhaustive()
    }
}

/// A typed client: a connection with a method for each method of its service. `#[tollway::service]` makes them;
/// [`Session::open_client`](crate::Session::open_client) opens one.
pub trait Client: From<Connection> + AsRef<Connection> {
    /// The service's name.
    const NAME: &'static str;
    /// The version of the service that the client speaks.
    const VERSION: u32;
}

/// What a method returned, with what came along.
#[derive(Debug)]
#[non_exhaustive]
pub struct Response<R> {
    /// The method's result.
    pub value: R,
    /// What the callee sent along.
    pub metadata: Metadata,
    /// What the callee says that the call has cost when it answered, in base units; streams that go on cost more. Zero on
    /// an unpaid connection.
    pub charged: Amount,
}

impl<'a, R, E> Call<'a, R, E> {
    /// Encodes the arguments.
    pub(crate) fn new<A: Serialize + ?Sized>(connection: &'a ConnectionInner, method: MethodId, args: &A) -> Self {
        let stage = match codec::encode(args) {
            Ok((payload, slots)) => {
                Stage::Start(Request { method, metadata: Metadata::new(), deadline: None, payload, slots })
            }
            Err(error) => Stage::Unencodable(error),
        };
        Call { future: CallFuture { connection, stage }, types: PhantomData }
    }

    /// Sends metadata along.
    pub fn with_metadata(mut self, metadata: Metadata) -> Self {
        if let Stage::Start(request) = &mut self.future.stage {
            request.metadata = metadata;
        }
        self
    }

    /// Gives the call time until then: what is left of it travels along, and both sides end the call when it has passed, with
    /// its streams. A call that a handler makes has at most what is left of its own.
    ///
    /// ```no_run
    /// # use std::time::{Duration, Instant};
    /// # async fn example(connection: tollway::Connection) -> Result<(), tollway::rpc::CallError> {
    /// # const SUM: tollway::rpc::MethodId = tollway::rpc::MethodId(1);
    /// let sum: u64 = connection.call(SUM, &(1, 2)).with_timeout(Duration::from_secs(1)).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn with_deadline(mut self, deadline: Instant) -> Self {
        if let Stage::Start(request) = &mut self.future.stage {
            request.deadline = Some(deadline);
        }
        self
    }

    /// Gives the call so much time, from now on; see [`with_deadline`](Self::with_deadline). One that is longer than the clock
    /// is none.
    pub fn with_timeout(self, timeout: Duration) -> Self {
        match Instant::now().checked_add(timeout) {
            Some(deadline) => self.with_deadline(deadline),
            None => self,
        }
    }

    /// Says that the method has errors of its own, of type `F`.
    pub fn or_error<F>(self) -> Call<'a, R, F> {
        Call { future: self.future, types: PhantomData }
    }

    /// Waits for the result with what the callee sent along.
    ///
    /// # Errors
    /// Those of the call itself.
    ///
    /// # Cancel safety
    /// That of the call itself.
    pub async fn response(self) -> Result<Response<R>, CallError<E>>
    where
        R: DeserializeOwned,
        E: DeserializeOwned,
    {
        let mut answer = self.future.await.map_err(CallError::widen)?;
        let (metadata, charged) = (std::mem::take(&mut answer.metadata), answer.charged);
        Ok(Response { value: answer.decode()?, metadata, charged })
    }
}

impl<R: DeserializeOwned, E: DeserializeOwned> Future for Call<'_, R, E> {
    type Output = Result<R, CallError<E>>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let answer = ready!(Pin::new(&mut self.future).poll(cx));
        Poll::Ready(answer.map_err(CallError::widen).and_then(Answer::decode))
    }
}

/// A call that is to be made, with its arguments encoded.
pub(crate) struct Request {
    method: MethodId,
    metadata: Metadata,
    deadline: Option<Instant>,
    payload: Bytes,
    slots: OutboundSlots,
}

/// The answer of a method, not decoded yet. Dropped like this, its streams are ended.
pub(crate) struct Answer {
    pub(crate) status: Status,
    pub(crate) metadata: Metadata,
    pub(crate) charged: Amount,
    pub(crate) payload: Bytes,
    pub(crate) streams: Vec<InboundStream>,
}

impl Answer {
    /// The result, or the method's own error.
    fn decode<R: DeserializeOwned, E: DeserializeOwned>(self) -> Result<R, CallError<E>> {
        let Answer { status, payload, streams, .. } = self;
        if status == Status::Ok {
            return codec::decode(&payload, streams).map_err(CallError::InvalidAnswer);
        }
        Err(codec::decode(&payload, streams).map_or_else(CallError::InvalidAnswer, CallError::App))
    }
}

/// Where the answer to a call is left for its caller.
pub(crate) struct CallSlot {
    waker: Option<Waker>,
    outcome: Option<Outcome>,
}

/// How a call came out.
pub(crate) enum Outcome {
    Answered(Answer),
    /// The deadline has passed; whether the call was on its way.
    Expired(bool),
    Failed,
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
struct CallFuture<'a> {
    connection: &'a ConnectionInner,
    stage: Stage,
}

enum Stage {
    Start(Request),
    Unencodable(EncodeError),
    Waiting(CallKey, SlotKey),
    Done,
}

impl CallFuture<'_> {
    fn start(&mut self, request: Request, cx: &mut Context<'_>) -> Result<(CallKey, SlotKey), CallError> {
        let Request { method, metadata, deadline, payload, slots } = request;
        let flows = slots.flows();
        let connection = self.connection.id;
        // The sooner of its own deadline and that of the handler that makes it.
        let deadline = deadline.into_iter().chain(Scope::current().deadline).min();
        let deadline = deadline.map(|at| self.connection.cell.shared.time_of(at));
        let spec = CallSpec { connection, method: method.0, deadline, metadata, payload, slots: &flows };
        self.connection.cell.shared.start_call(spec, slots, cx.waker().clone()).map_err(|error| {
            match self.connection.cell.end() {
                Some(end) => CallError::ConnectionClosed { cause: end.clone(), sent: false },
                None => CallError::not_sent(error),
            }
        })
    }

    fn poll_outcome(&mut self, key: SlotKey, cx: &mut Context<'_>) -> Poll<Result<Answer, CallError>> {
        let mut state = self.connection.cell.shared.lock();
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
                        if state.machine.consume_body(self.connection.id, answer.payload.len()) {
                            Shared::unlock_and_kick(state);
                        } else {
                            drop(state);
                        }
                        Poll::Ready(self.checked(answer))
                    }
                    Outcome::Expired(sent) => {
                        drop(state);
                        Poll::Ready(Err(CallError::DeadlineExceeded { sent }))
                    }
                    Outcome::Failed => {
                        drop(state);
                        Poll::Ready(Err(self.ended()))
                    }
                }
            }
        }
    }

    /// An answer of the method itself passes; what the callee's side says in its place becomes an error.
    fn checked(&self, answer: Answer) -> Result<Answer, CallError> {
        Err(match answer.status {
            Status::Ok | Status::AppError => return Ok(answer),
            Status::UnknownMethod => CallError::UnknownMethod,
            Status::InvalidPayload => CallError::InvalidPayload,
            Status::Cancelled => CallError::Cancelled,
            Status::DeadlineExceeded => CallError::DeadlineExceeded { sent: true },
            Status::TooLarge => detail::too_large(&answer.metadata),
            Status::AtCapacity => CallError::AtCapacity,
            Status::Refused => detail::refused(&answer.metadata),
            Status::PaymentFailed => {
                let count = self.connection.money();
                detail::unpaid(&answer.metadata, count.map_or(Amount::ZERO, |count| count.amount))
            }
            _ => CallError::HandlerFailed,
        })
    }

    /// Why a call that was made has no answer.
    fn ended(&self) -> CallError {
        let cell = &self.connection.cell;
        let cause = cell.end().cloned().or_else(|| cell.shared.end().cloned().map(ConnectionEnd::Session));
        cause.map_or(CallError::HandlerFailed, |cause| CallError::ConnectionClosed { cause, sent: true })
    }
}

impl Future for CallFuture<'_> {
    type Output = Result<Answer, CallError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Stage::Waiting(_, slot) = self.stage {
            return self.poll_outcome(slot, cx);
        }
        match std::mem::replace(&mut self.stage, Stage::Done) {
            Stage::Start(request) => match self.start(request, cx) {
                Ok((call, slot)) => {
                    self.stage = Stage::Waiting(call, slot);
                    Poll::Pending
                }
                Err(error) => Poll::Ready(Err(error)),
            },
            Stage::Unencodable(error) => Poll::Ready(Err(CallError::Encode(error))),
            Stage::Waiting(..) | Stage::Done => Poll::Pending,
        }
    }
}

impl Drop for CallFuture<'_> {
    fn drop(&mut self) {
        if let Stage::Waiting(call, slot) = self.stage {
            self.connection.cell.shared.cancel_call(self.connection.id, call, slot);
        }
    }
}

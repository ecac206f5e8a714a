//! One call, from the caller's side.

use std::fmt;
use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::task::{Context, Poll, Waker, ready};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use tollway_protocol::error::ConnectionEnd;
use tollway_protocol::message::Status;
use tollway_protocol::metadata::Metadata;
use tollway_protocol::payment::Amount;
use tollway_protocol::session::{CallKey, CallSpec, CommandError};

use super::codec::{self, EncodeError};
use super::error::{CallError, NoError, detail};
use super::middleware::NextCall;
use super::outgoing::{Answer, Named, OutgoingCall, Target};
use super::scope::Scope;
use crate::connection::{Connection, ConnectionInner};
use crate::future::BoxFuture;
use crate::reconnect::RemoteService;
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
        f.debug_struct("Call").field("stage", &self.future.stage.name()).finish_non_exhaustive()
    }
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
    pub(crate) fn new<A: Serialize + ?Sized>(to: To<'a>, method: Named, args: &A) -> Self {
        let stage = match codec::encode(args) {
            Ok((payload, slots)) => Stage::Start(to, OutgoingCall::new(method, payload, slots)),
            Err(error) => Stage::Unencodable(error),
        };
        Call { future: CallFuture { stage }, types: PhantomData }
    }

    /// Sends metadata along.
    pub fn with_metadata(mut self, metadata: Metadata) -> Self {
        if let Stage::Start(_, request) = &mut self.future.stage {
            request.metadata = metadata;
        }
        self
    }

    /// Gives the call of a method with a price a name, by which a paid service knows it again: made once more
    /// with the same key and arguments, after a lost connection say, it is not executed twice and costs nothing more. It is answered as the first time, or with
    /// [`ANSWER_NOT_KEPT`](tollway_protocol::error::code::ANSWER_NOT_KEPT). A payee remembers keys for
    /// [`ANSWER_AGE`](crate::payment::ANSWER_AGE), for each payment channel and method; they have at most
    /// [`MAX_KEY_BYTES`](crate::payment::MAX_KEY_BYTES). A call with a key runs to its end, also when it is cancelled.
    pub fn with_idempotency_key(mut self, key: impl Into<Vec<u8>>) -> Self {
        if let Stage::Start(_, request) = &mut self.future.stage {
            let metadata = std::mem::take(&mut request.metadata);
            request.metadata = metadata.with(crate::payment::IDEMPOTENCY_KEY, key);
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
        if let Stage::Start(_, request) = &mut self.future.stage {
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
    /// It was never sent: the peer takes no new calls on the connection.
    Unsent,
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

/// Whom a call is made to.
#[derive(Clone, Copy)]
pub(crate) enum To<'a> {
    /// A connection that is open.
    Connection(&'a Connection),
    /// A service at an endpoint, to which a connection is opened when one is needed.
    Remote(&'a RemoteService),
}

/// A call that is to be made, under way, or done. Dropping it cancels the call.
pub(crate) struct CallFuture<'a> {
    stage: Stage<'a>,
}

enum Stage<'a> {
    Start(To<'a>, OutgoingCall),
    Unencodable(EncodeError),
    Waiting(&'a ConnectionInner, CallKey, SlotKey),
    /// Middleware is around the call, or a connection has to be found for it.
    Around(BoxFuture<'static, Result<Answer, CallError>>),
    Done,
}

impl Stage<'_> {
    fn name(&self) -> &'static str {
        match self {
            Stage::Start(..) => "to be made",
            Stage::Unencodable(_) => "not encodable",
            Stage::Waiting(..) | Stage::Around(_) => "under way",
            Stage::Done => "done",
        }
    }
}

impl<'a> CallFuture<'a> {
    /// A call on a connection, with nothing around it.
    pub(crate) fn direct(connection: &'a Connection, call: OutgoingCall) -> CallFuture<'a> {
        let mut future = CallFuture { stage: Stage::Done };
        future.stage = Stage::Start(To::Connection(connection), call);
        future
    }

    fn start(
        &self,
        connection: &ConnectionInner,
        call: OutgoingCall,
        cx: &mut Context<'_>,
    ) -> Result<(CallKey, SlotKey), CallError> {
        if connection.takes_no_calls() {
            return Err(CallError::NotSent(CommandError::Draining));
        }
        let OutgoingCall { method, metadata, deadline, payload, slots, .. } = call;
        let flows = slots.flows();
        // The sooner of its own deadline and that of the handler that makes it.
        let deadline = deadline.into_iter().chain(Scope::deadline_of_current()).min();
        let deadline = deadline.map(|at| connection.cell.shared.time_of(at));
        let spec = CallSpec { connection: connection.id, method: method.0, deadline, metadata, payload, slots: &flows };
        connection.cell.shared.start_call(spec, slots, cx.waker().clone()).map_err(|error| {
            match connection.cell.end() {
                Some(end) => CallError::ConnectionClosed { cause: end.clone(), sent: false },
                None => CallError::not_sent(error),
            }
        })
    }

    fn poll_outcome(
        &mut self,
        connection: &ConnectionInner,
        key: SlotKey,
        cx: &mut Context<'_>,
    ) -> Poll<Result<Answer, CallError>> {
        let mut state = connection.cell.shared.lock();
        let Some(slot) = state.slots.get_mut(key) else {
            drop(state);
            self.stage = Stage::Done;
            return Poll::Ready(Err(ended(connection)));
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
                        if state.machine.consume_body(connection.id, answer.payload.len()) {
                            Shared::unlock_and_kick(state);
                        } else {
                            drop(state);
                        }
                        Poll::Ready(checked(connection, answer))
                    }
                    Outcome::Expired(sent) => {
                        drop(state);
                        Poll::Ready(Err(CallError::DeadlineExceeded { sent }))
                    }
                    Outcome::Unsent => {
                        drop(state);
                        Poll::Ready(Err(CallError::NotSent(CommandError::Draining)))
                    }
                    Outcome::Failed => {
                        drop(state);
                        Poll::Ready(Err(ended(connection)))
                    }
                }
            }
        }
    }
}

/// An answer of the method itself passes; what the callee's side says in its place becomes an error.
fn checked(connection: &ConnectionInner, answer: Answer) -> Result<Answer, CallError> {
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
            let count = connection.money();
            detail::unpaid(&answer.metadata, count.map_or(Amount::ZERO, |count| count.amount))
        }
        _ => CallError::HandlerFailed,
    })
}

/// Why a call that was made has no answer.
fn ended(connection: &ConnectionInner) -> CallError {
    let cell = &connection.cell;
    let cause = cell.end().cloned().or_else(|| cell.shared.end().cloned().map(ConnectionEnd::Session));
    cause.map_or(CallError::HandlerFailed, |cause| CallError::ConnectionClosed { cause, sent: true })
}

impl Future for CallFuture<'_> {
    type Output = Result<Answer, CallError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Stage::Waiting(connection, _, slot) = self.stage {
            return self.poll_outcome(connection, slot, cx);
        }
        let mut around = match std::mem::replace(&mut self.stage, Stage::Done) {
            Stage::Start(To::Connection(connection), call) => match connection.around().is_empty() {
                true => match self.start(connection.inner(), call, cx) {
                    Ok((key, slot)) => {
                        self.stage = Stage::Waiting(connection.inner(), key, slot);
                        return Poll::Pending;
                    }
                    Err(error) => return Poll::Ready(Err(error)),
                },
                false => NextCall::new(connection.around(), Target::Connection(connection.clone())).begin(call),
            },
            Stage::Start(To::Remote(service), call) => {
                NextCall::new(service.around(), Target::Remote(service.clone())).begin(call)
            }
            Stage::Unencodable(error) => return Poll::Ready(Err(CallError::Encode(error))),
            Stage::Around(around) => around,
            Stage::Waiting(..) | Stage::Done => return Poll::Pending,
        };
        let polled = around.as_mut().poll(cx);
        if polled.is_pending() {
            self.stage = Stage::Around(around);
        }
        polled
    }
}

impl Drop for CallFuture<'_> {
    fn drop(&mut self) {
        if let Stage::Waiting(connection, call, slot) = self.stage {
            connection.cell.shared.cancel_call(connection.id, call, slot);
        }
    }
}

//! Calls that did not bring their method's result: why, whether they were executed, and whether to repeat them.

use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use tollway_protocol::error::{ConnectionEnd, Reason, code};
use tollway_protocol::message::Status;
use tollway_protocol::metadata::Metadata;
use tollway_protocol::payment::Amount;
use tollway_protocol::session::CommandError;

use super::codec::{DecodeError, EncodeError};
use crate::reconnect::ClientError;
use crate::session::OpenError;

/// The error of a method that has none of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoError {}

impl Serialize for NoError {
    fn serialize<S: Serializer>(&self, _: S) -> Result<S::Ok, S::Error> {
        match *self {}
    }
}

impl<'de> Deserialize<'de> for NoError {
    fn deserialize<D: Deserializer<'de>>(_: D) -> Result<Self, D::Error> {
        Err(de::Error::custom("the method should have no errors of its own"))
    }
}

/// A body of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Body {
    /// The arguments.
    Request,
    /// The result, or the method's own error.
    Response,
}

impl fmt::Display for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Body::Request => "a request",
            Body::Response => "a response",
        })
    }
}

/// Whether the handler of a failed call was begun at the other side.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Execution {
    /// It was not: the call may be repeated without harm.
    NotExecuted,
    /// It may have been, in whole or in part.
    MaybeExecuted,
    /// It was, to its end.
    Executed,
}

/// What kind of failure a call ended in: [`CallError`] without its details, for those that count and sort them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The method's own error.
    App,
    /// [`CallError::UnknownMethod`].
    UnknownMethod,
    /// [`CallError::InvalidPayload`].
    InvalidPayload,
    /// [`CallError::TooLarge`].
    TooLarge,
    /// [`CallError::Cancelled`], or the caller lost interest.
    Cancelled,
    /// [`CallError::DeadlineExceeded`].
    DeadlineExceeded,
    /// [`CallError::HandlerFailed`].
    HandlerFailed,
    /// [`CallError::Refused`].
    Refused,
    /// [`CallError::PaymentRequired`].
    PaymentRequired,
    /// [`CallError::PaymentFailed`].
    PaymentFailed,
    /// [`CallError::ConnectionClosed`].
    ConnectionClosed,
    /// [`CallError::NoConnection`].
    NoConnection,
    /// [`CallError::AtCapacity`].
    AtCapacity,
    /// [`CallError::Encode`].
    Encode,
    /// [`CallError::InvalidAnswer`].
    InvalidAnswer,
    /// [`CallError::NotSent`].
    NotSent,
}

impl ErrorKind {
    /// A word for it in snake case, such as `deadline_exceeded`: for metrics and logs, and it does not change.
    pub const fn as_str(self) -> &'static str {
        match self {
            ErrorKind::App => "app",
            ErrorKind::UnknownMethod => "unknown_method",
            ErrorKind::InvalidPayload => "invalid_payload",
            ErrorKind::TooLarge => "too_large",
            ErrorKind::Cancelled => "cancelled",
            ErrorKind::DeadlineExceeded => "deadline_exceeded",
            ErrorKind::HandlerFailed => "handler_failed",
            ErrorKind::Refused => "refused",
            ErrorKind::PaymentRequired => "payment_required",
            ErrorKind::PaymentFailed => "payment_failed",
            ErrorKind::ConnectionClosed => "connection_closed",
            ErrorKind::NoConnection => "no_connection",
            ErrorKind::AtCapacity => "at_capacity",
            ErrorKind::Encode => "encode",
            ErrorKind::InvalidAnswer => "invalid_answer",
            ErrorKind::NotSent => "not_sent",
        }
    }

    /// What an answer's status says, unless that all went well.
    pub(crate) const fn of_status(status: Status) -> Option<Self> {
        Some(match status {
            Status::Ok => return None,
            Status::AppError => ErrorKind::App,
            Status::UnknownMethod => ErrorKind::UnknownMethod,
            Status::InvalidPayload => ErrorKind::InvalidPayload,
            Status::TooLarge => ErrorKind::TooLarge,
            Status::Cancelled => ErrorKind::Cancelled,
            Status::DeadlineExceeded => ErrorKind::DeadlineExceeded,
            Status::Refused => ErrorKind::Refused,
            Status::PaymentFailed => ErrorKind::PaymentFailed,
            Status::AtCapacity => ErrorKind::AtCapacity,
            _ => ErrorKind::HandlerFailed,
        })
    }
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A connection that a [`Client`](crate::Client) could not get, so that a call was not made. Clones share the cause.
#[derive(Debug, Clone)]
pub struct ConnectFailure(Arc<ClientError>);

impl ConnectFailure {
    pub(crate) fn new(error: ClientError) -> Self {
        ConnectFailure(Arc::new(error))
    }

    /// Why there is no connection.
    pub fn cause(&self) -> &ClientError {
        &self.0
    }
}

impl fmt::Display for ConnectFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for ConnectFailure {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source()
    }
}

impl PartialEq for ConnectFailure {
    /// Whether they are of one attempt.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for ConnectFailure {}

/// A payment that did not come: both sides' counts, in base units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnpaidCounts {
    /// The price of all that the payee counts as handed over on this channel, if it said so.
    pub spent: Option<Amount>,
    /// Up to where the payee wanted a voucher, if it said so.
    pub required: Option<Amount>,
    /// The price of all that this side, the payer, counts as received on this connection.
    pub received: Amount,
}

impl fmt::Display for UnpaidCounts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "we count {} base units as received", self.received)?;
        if let Some(spent) = self.spent {
            write!(f, ", the payee {spent} as delivered")?;
        }
        match self.required {
            Some(required) => write!(f, "; it needed a voucher of {required}"),
            None => Ok(()),
        }
    }
}

/// A call that did not bring its method's result. `E` is the method's own error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CallError<E = NoError> {
    /// The method's own error.
    #[error("{0}")]
    App(E),
    /// The service has no such method, or not in this version.
    #[error("the service has no such method, or not in this version")]
    UnknownMethod,
    /// The service could not decode the arguments.
    #[error("the service could not decode the arguments")]
    InvalidPayload,
    /// A body above what its receiver takes. Larger data belongs into a stream.
    #[error(
        "{body} of {bytes} bytes is above its receiver's limit of {limit} bytes; larger data belongs into a stream"
    )]
    TooLarge {
        /// Which one.
        body: Body,
        /// Its size in bytes.
        bytes: u64,
        /// What its receiver takes, in bytes.
        limit: u64,
    },
    /// The call was cancelled, and not by this side: a caller that cancels is not there any more.
    #[error("the peer cancelled the call")]
    Cancelled,
    /// The time that the caller gave the call has passed.
    #[error("the deadline of the call has passed")]
    DeadlineExceeded {
        /// Whether the call was on its way by then.
        sent: bool,
    },
    /// The handler failed without an answer: it panicked, or its answer could not be encoded.
    #[error("the handler failed without an answer")]
    HandlerFailed,
    /// The peer does not want to execute the call.
    #[error("the call was refused: {0}")]
    Refused(Reason),
    /// The service must be paid for: see [`Wallet`](crate::payment::Wallet).
    #[error("the service must be paid for")]
    PaymentRequired {
        /// Its signed terms as they came; nothing about them was checked.
        terms: Bytes,
    },
    /// The payment for the call did not come in time.
    #[error("the payment for the call did not come: {0}")]
    PaymentFailed(UnpaidCounts),
    /// The connection ended before the answer.
    #[error("the connection has ended: {cause}")]
    ConnectionClosed {
        /// Why it ended.
        cause: ConnectionEnd,
        /// Whether the call was on its way.
        sent: bool,
    },
    /// A [`Client`](crate::Client) has no connection for the call.
    #[error("no connection: {0}")]
    NoConnection(#[source] ConnectFailure),
    /// One of the two sides has no memory for the call, or for its answer, now.
    #[error("there is no memory for the call or its answer now: try again, or raise the memory budget")]
    AtCapacity,
    /// The arguments cannot be encoded.
    #[error(transparent)]
    Encode(EncodeError),
    /// The answer is not of the expected type.
    #[error("the answer is not of the expected type: {0}")]
    InvalidAnswer(DecodeError),
    /// The call could not be made.
    #[error(transparent)]
    NotSent(CommandError),
}

impl<E> CallError<E> {
    /// Whether the call was executed.
    pub fn execution(&self) -> Execution {
        match self {
            CallError::App(_) | CallError::InvalidAnswer(_) => Execution::Executed,
            CallError::TooLarge { body: Body::Response, .. } => Execution::Executed,
            CallError::Refused(reason) if reason.code == code::ANSWER_NOT_KEPT => Execution::Executed,
            // Which side it was is not known.
            CallError::Cancelled | CallError::HandlerFailed | CallError::AtCapacity => Execution::MaybeExecuted,
            // A response may wait for its price as well as a call.
            CallError::PaymentFailed(_) => Execution::MaybeExecuted,
            CallError::ConnectionClosed { sent: true, .. } | CallError::DeadlineExceeded { sent: true } => {
                Execution::MaybeExecuted
            }
            CallError::ConnectionClosed { sent: false, .. }
            | CallError::DeadlineExceeded { sent: false }
            | CallError::UnknownMethod
            | CallError::InvalidPayload
            | CallError::TooLarge { body: Body::Request, .. }
            | CallError::Refused(_)
            | CallError::PaymentRequired { .. }
            | CallError::NoConnection(_)
            | CallError::Encode(_)
            | CallError::NotSent(_) => Execution::NotExecuted,
        }
    }

    /// What kind of failure it is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            CallError::App(_) => ErrorKind::App,
            CallError::UnknownMethod => ErrorKind::UnknownMethod,
            CallError::InvalidPayload => ErrorKind::InvalidPayload,
            CallError::TooLarge { .. } => ErrorKind::TooLarge,
            CallError::Cancelled => ErrorKind::Cancelled,
            CallError::DeadlineExceeded { .. } => ErrorKind::DeadlineExceeded,
            CallError::HandlerFailed => ErrorKind::HandlerFailed,
            CallError::Refused(_) => ErrorKind::Refused,
            CallError::PaymentRequired { .. } => ErrorKind::PaymentRequired,
            CallError::PaymentFailed(_) => ErrorKind::PaymentFailed,
            CallError::ConnectionClosed { .. } => ErrorKind::ConnectionClosed,
            CallError::NoConnection(_) => ErrorKind::NoConnection,
            CallError::AtCapacity => ErrorKind::AtCapacity,
            CallError::Encode(_) => ErrorKind::Encode,
            CallError::InvalidAnswer(_) => ErrorKind::InvalidAnswer,
            CallError::NotSent(_) => ErrorKind::NotSent,
        }
    }

    /// Whether the same call, made again as it is, does no harm and may succeed: it was not executed, and what was in
    /// its way may pass. Where the connection has ended, it takes a new one.
    pub fn is_retryable(&self) -> bool {
        match self {
            CallError::ConnectionClosed { sent, .. } => !sent,
            CallError::NoConnection(_) => true,
            CallError::Refused(reason) => matches!(reason.code, code::GOING_AWAY | code::AT_CAPACITY),
            CallError::NotSent(error) => {
                matches!(error, CommandError::AtCapacity { .. } | CommandError::GoingAway | CommandError::Draining)
            }
            _ => false,
        }
    }

    /// Changes the method's own error.
    pub fn map_app<F>(self, map: impl FnOnce(E) -> F) -> CallError<F> {
        self.into_app().map_or_else(|error| error, |error| CallError::App(map(error)))
    }

    /// The method's own error.
    ///
    /// # Errors
    /// When this is not [`CallError::App`]: then it is the same for a method with errors of any other type.
    pub fn into_app<F>(self) -> Result<E, CallError<F>> {
        Err(match self {
            CallError::App(error) => return Ok(error),
            CallError::UnknownMethod => CallError::UnknownMethod,
            CallError::InvalidPayload => CallError::InvalidPayload,
            CallError::TooLarge { body, bytes, limit } => CallError::TooLarge { body, bytes, limit },
            CallError::Cancelled => CallError::Cancelled,
            CallError::DeadlineExceeded { sent } => CallError::DeadlineExceeded { sent },
            CallError::HandlerFailed => CallError::HandlerFailed,
            CallError::Refused(reason) => CallError::Refused(reason),
            CallError::PaymentRequired { terms } => CallError::PaymentRequired { terms },
            CallError::PaymentFailed(counts) => CallError::PaymentFailed(counts),
            CallError::ConnectionClosed { cause, sent } => CallError::ConnectionClosed { cause, sent },
            CallError::NoConnection(failure) => CallError::NoConnection(failure),
            CallError::AtCapacity => CallError::AtCapacity,
            CallError::Encode(error) => CallError::Encode(error),
            CallError::InvalidAnswer(error) => CallError::InvalidAnswer(error),
            CallError::NotSent(error) => CallError::NotSent(error),
        })
    }

    /// What a command that the session refused means for the call.
    pub(crate) fn not_sent(error: CommandError) -> Self {
        match error {
            CommandError::BodyTooLarge { bytes, limit } => {
                CallError::TooLarge { body: Body::Request, bytes: bytes as u64, limit: u64::from(limit) }
            }
            CommandError::SessionEnded(end) => {
                CallError::ConnectionClosed { cause: ConnectionEnd::Session(end), sent: false }
            }
            error => CallError::NotSent(error),
        }
    }
}

impl CallError {
    /// The same error of a method that has errors of its own.
    pub fn widen<E>(self) -> CallError<E> {
        self.into_app().map_or_else(|error| error, |never| match never {})
    }
}

/// An open that failed where a call was wanted: nothing was executed.
impl<E> From<OpenError> for CallError<E> {
    fn from(error: OpenError) -> Self {
        match error {
            OpenError::PaymentRequired { terms } => CallError::PaymentRequired { terms },
            OpenError::Rejected { reason, .. } => CallError::Refused(reason),
            OpenError::OtherSchema { .. } => CallError::Refused(Reason::new(code::UNKNOWN_SERVICE, error.to_string())),
            OpenError::NotSent(error) => CallError::not_sent(error),
            OpenError::Ended(cause) => CallError::ConnectionClosed { cause, sent: false },
        }
    }
}

/// How the details of a failure travel: in the metadata of its answer, which costs nothing.
pub(crate) mod detail {
    use super::{Amount, Body, CallError, Metadata, Reason, UnpaidCounts, code};

    const BYTES: &str = "bytes";
    const LIMIT: &str = "limit";
    const CODE: &str = "code";
    const TEXT: &str = "text";

    fn number<N: std::str::FromStr>(metadata: &Metadata, key: &str) -> Option<N> {
        std::str::from_utf8(metadata.value(key)?).ok()?.parse().ok()
    }

    /// An answer of so many bytes is above the limit.
    pub(crate) fn of_size(bytes: usize, limit: u32) -> Metadata {
        Metadata::new().with(BYTES, bytes.to_string()).with(LIMIT, limit.to_string())
    }

    /// A call is refused.
    pub(crate) fn of_refusal(reason: &Reason) -> Metadata {
        Metadata::new().with(CODE, reason.code.to_string()).with(TEXT, reason.text.as_str())
    }

    pub(crate) fn too_large<E>(metadata: &Metadata) -> CallError<E> {
        let size = |key| number(metadata, key).unwrap_or(0);
        CallError::TooLarge { body: Body::Response, bytes: size(BYTES), limit: size(LIMIT) }
    }

    pub(crate) fn refused<E>(metadata: &Metadata) -> CallError<E> {
        let text = metadata.value(TEXT).map(String::from_utf8_lossy).unwrap_or_default();
        CallError::Refused(Reason::new(number(metadata, CODE).unwrap_or(code::NONE), text))
    }

    pub(crate) fn unpaid<E>(metadata: &Metadata, received: Amount) -> CallError<E> {
        let (spent, required) = (number(metadata, "spent"), number(metadata, "required"));
        CallError::PaymentFailed(UnpaidCounts { spent, required, received })
    }
}

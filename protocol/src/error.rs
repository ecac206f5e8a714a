//! Violations by a peer, codes on the wire, and the causes for which things end.

use core::fmt;

use crate::frame::Lane;
use crate::id::{CallId, ConnectionId, StreamId};
use crate::limits::LimitsError;
use crate::metadata::MetadataTooLarge;

/// A rule of the protocol that the peer broke. It is answered once with ProtocolError and ends the session.
/// `[session.violation.once]`
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Violation {
    /// The header of a frame could not be decoded.
    #[error("frame of kind {kind} has a malformed header")]
    MalformedHeader {
        /// The frame's kind.
        kind: u8,
    },
    /// A frame without even a kind.
    #[error("empty frame")]
    EmptyFrame,
    /// A kind below 128 that this version doesn't know.
    #[error("unknown frame kind {kind}; only kinds from 128 up may be skipped")]
    UnknownKind {
        /// The frame's kind.
        kind: u8,
    },
    /// A frame that must not come in this state.
    #[error("unexpected {frame}: {state}")]
    Unexpected {
        /// The frame's name.
        frame: &'static str,
        /// The state that it came in.
        state: &'static str,
    },
    /// A payload behind a header that takes none.
    #[error("{frame} carries a payload of {bytes} bytes, but takes none")]
    UnexpectedPayload {
        /// The frame's name.
        frame: &'static str,
        /// The payload's length in bytes.
        bytes: usize,
    },
    /// A connection id that the peer may not use now.
    #[error("connection id {id} is not the next one of the peer's parity")]
    ConnectionId {
        /// The id.
        id: ConnectionId,
    },
    /// A frame for a connection that was never opened.
    #[error("{frame} for connection {id}, which was never opened")]
    UnknownConnection {
        /// The frame's name.
        frame: &'static str,
        /// The id.
        id: ConnectionId,
    },
    /// A call id that the peer may not use now.
    #[error("call id {id} is not the next one of the peer's parity")]
    CallId {
        /// The id.
        id: CallId,
    },
    /// A frame for a call that was never made.
    #[error("{frame} for call {id}, which was never made")]
    UnknownCall {
        /// The frame's name.
        frame: &'static str,
        /// The id.
        id: CallId,
    },
    /// A stream id that the peer may not use now.
    #[error("stream id {id} is not the next one of the peer's parity")]
    StreamId {
        /// The id.
        id: StreamId,
    },
    /// A frame for a stream that was never opened, or in the wrong direction.
    #[error("{frame} for stream {id}, which was never opened or flows the other way")]
    UnknownStream {
        /// The frame's name.
        frame: &'static str,
        /// The id.
        id: StreamId,
    },
    /// A frame on a lane that is not its connection's.
    #[error("frame of connection {id} on {lane:?}")]
    WrongLane {
        /// The connection.
        id: ConnectionId,
        /// The lane on which the frame came.
        lane: Lane,
    },
    /// More than a limit that this side stated.
    #[error("{what}: {value} is above the limit of {limit}")]
    AboveLimit {
        /// What is limited.
        what: &'static str,
        /// What the peer did.
        value: u64,
        /// What it was allowed.
        limit: u64,
    },
    /// An item or body was started without credit.
    #[error("{what} without credit")]
    NoCredit {
        /// What was started.
        what: &'static str,
    },
    /// A credit limit that did not rise.
    #[error("{what} limit did not rise from {from}: it is {to}")]
    CreditWentBack {
        /// Which limit.
        what: &'static str,
        /// The limit before, in bytes.
        from: u64,
        /// The limit that was stated, in bytes.
        to: u64,
    },
    /// The payload of an Items frame is not 1..n length-prefixed items.
    #[error("items frame is malformed: {0}")]
    Items(&'static str),
    /// Metadata above its caps.
    #[error(transparent)]
    Metadata(#[from] MetadataTooLarge),
    /// Limits that contradict themselves.
    #[error(transparent)]
    Limits(#[from] LimitsError),
    /// A pong that answers no ping.
    #[error("pong with a nonce that was not pinged")]
    StrayPong,
    /// The end of a call before the ends of its streams.
    #[error("call {id} ended before its streams")]
    CallEndedEarly {
        /// The call.
        id: CallId,
    },
    /// Numbers of a metered connection that leave 128 bits.
    #[error("metered amounts overflow")]
    AmountOverflow,
    /// More than this side's budget for what only costs it.
    #[error("too many {what}: the budget of {limit} is used up")]
    OverBudget {
        /// What the budget is for.
        what: &'static str,
        /// The budget.
        limit: u64,
    },
}

impl Violation {
    /// The code that ProtocolError carries for it.
    pub const fn code(&self) -> u32 {
        match self {
            Violation::MalformedHeader { .. } | Violation::EmptyFrame | Violation::Items(_) => code::MALFORMED,
            Violation::UnknownKind { .. } => code::UNKNOWN_KIND,
            Violation::AboveLimit { .. } | Violation::Metadata(_) | Violation::Limits(_) => code::LIMIT,
            Violation::NoCredit { .. } | Violation::CreditWentBack { .. } => code::CREDIT,
            Violation::OverBudget { .. } => code::ABUSE,
            Violation::ConnectionId { .. }
            | Violation::CallId { .. }
            | Violation::StreamId { .. }
            | Violation::UnknownConnection { .. }
            | Violation::UnknownCall { .. }
            | Violation::UnknownStream { .. } => code::ID,
            _ => code::STATE,
        }
    }
}

/// Codes that travel in ProtocolError, Refuse, Reject, Close, Reset, Stop and GoAway. Values from 1,024 up are the
/// application's own. `[session.code.space]`
pub mod code {
    /// No error: an orderly end.
    pub const NONE: u32 = 0;
    /// A frame that cannot be decoded.
    pub const MALFORMED: u32 = 1;
    /// A frame kind below 128 that is not known.
    pub const UNKNOWN_KIND: u32 = 2;
    /// A frame that must not come in this state.
    pub const STATE: u32 = 3;
    /// An id out of order, of the wrong parity, or never opened.
    pub const ID: u32 = 4;
    /// A stated limit was exceeded.
    pub const LIMIT: u32 = 5;
    /// Credit was overrun or withdrawn.
    pub const CREDIT: u32 = 6;
    /// No common protocol version.
    pub const VERSION: u32 = 7;
    /// A deadline of the session passed: handshake, keepalive, writing, or idleness.
    pub const TIMEOUT: u32 = 8;
    /// The side is going away.
    pub const GOING_AWAY: u32 = 9;
    /// A budget for what only costs this side is used up.
    pub const ABUSE: u32 = 10;
    /// No service of this name is served here.
    pub const UNKNOWN_SERVICE: u32 = 16;
    /// The service has a price: the Reject carries signed terms, the next Open must carry a credential.
    pub const PAYMENT_REQUIRED: u32 = 17;
    /// The credential was refused; the text says why.
    pub const PAYMENT_REFUSED: u32 = 18;
    /// The credential's epoch is not above the channel's; the metadata entry `epoch` has the current one.
    pub const STALE_EPOCH: u32 = 19;
    /// The channel of this connection was closed, or cannot pay.
    pub const PAYMENT_ENDED: u32 = 20;
    /// Too many sessions, connections or opens.
    pub const AT_CAPACITY: u32 = 21;
    /// The opener gave up before the answer.
    pub const ABANDONED: u32 = 22;
    /// The handler dropped the connection, the stream or the call without an end of its own.
    pub const DROPPED: u32 = 23;
    /// The call was cancelled.
    pub const CANCELLED: u32 = 24;
    /// An internal error of the side that sends it.
    pub const INTERNAL: u32 = 25;
    /// A relay could not reach the other side, or has lost it.
    pub const UNREACHABLE: u32 = 26;
    /// The peer has not proved who it is.
    pub const UNAUTHENTICATED: u32 = 27;
    /// It is known who the peer is, and it may not do this.
    pub const FORBIDDEN: u32 = 28;
    /// A deadline has passed: that of the stream's call, or that of a connection that drains.
    pub const DEADLINE: u32 = 29;
    /// An idempotency key was used with other arguments.
    pub const KEY_REUSED: u32 = 30;
    /// The call with this idempotency key was executed, and its answer was not kept.
    pub const ANSWER_NOT_KEPT: u32 = 31;
    /// The first code that is free for the application.
    pub const APPLICATION: u32 = 1024;
}

/// A code and a sentence, as they travel with every refusal and every end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reason {
    /// A number of [`code`], or the application's own from [`code::APPLICATION`] up.
    pub code: u32,
    /// A sentence for people; may be empty.
    pub text: String,
}

/// Bytes of a [`Reason`]'s text that travel at most; a longer one is cut at a character.
pub const MAX_TEXT: usize = 1024;

impl Reason {
    /// A reason; `text` is cut to [`MAX_TEXT`] bytes.
    pub fn new(code: u32, text: impl Into<String>) -> Self {
        let mut text = text.into();
        if text.len() > MAX_TEXT {
            let cut = (0..=MAX_TEXT).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0);
            text.truncate(cut);
        }
        Reason { code, text }
    }

    /// An orderly end.
    pub const fn none() -> Self {
        Reason { code: code::NONE, text: String::new() }
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.code, self.text.as_str()) {
            (code, "") => write!(f, "code {code}"),
            (code, text) => write!(f, "{text} (code {code})"),
        }
    }
}

/// Why a session ended. Each says who began it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SessionEnd {
    /// This side closed the session.
    #[error("we closed the session: {0}")]
    ClosedByUs(Reason),
    /// The peer closed the session.
    #[error("the peer closed the session: {0}")]
    ClosedByPeer(Reason),
    /// The peer broke a rule; we told it so.
    #[error("the peer violated the protocol: {0}")]
    PeerViolation(Violation),
    /// The peer says that we broke a rule.
    #[error("the peer reports that we violated the protocol: {0}")]
    ReportedViolation(Reason),
    /// The peer refused the handshake.
    #[error("the peer refused the session: {0}")]
    RefusedByPeer(Reason),
    /// We refused the handshake.
    #[error("we refused the session: {0}")]
    RefusedByUs(Reason),
    /// The handshake did not end in time.
    #[error("the handshake did not finish in time")]
    HandshakeTimeout,
    /// Nothing came from the peer within the ping interval and the pong timeout.
    #[error("the peer is silent: no byte came within the ping interval and the pong timeout")]
    PeerSilent,
    /// The peer did not take what was written to it within the write timeout, or too little of it.
    #[error("the peer does not read: too little of what waited was taken within the write timeout")]
    PeerNotReading,
    /// There was no virtual connection for the idle timeout. This side closed the session.
    #[error("the session was idle: no connection was open for the idle timeout")]
    Idle,
    /// The conduit ended without a Close.
    #[error("the conduit was lost: {0}")]
    ConduitLost(String),
}

/// Why a virtual connection ended, or never opened. Each says who began it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConnectionEnd {
    /// This side closed it.
    #[error("we closed the connection: {0}")]
    ClosedByUs(Reason),
    /// The peer closed it.
    #[error("the peer closed the connection: {0}")]
    ClosedByPeer(Reason),
    /// The peer did not answer the open in time.
    #[error("the peer did not answer the open in time")]
    OpenTimeout,
    /// The session ended.
    #[error("the session ended: {0}")]
    Session(#[source] SessionEnd),
}

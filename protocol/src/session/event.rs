//! What the machine tells the application.

use core::time::Duration;

use bytes::Bytes;

use super::CallKey;
use super::money::MoneyCount;
use crate::error::{ConnectionEnd, Reason, SessionEnd};
use crate::id::{ConnectionId, Parity};
use crate::limits::{ConnectionLimits, SessionLimits};
use crate::message::{Flow, Status};
use crate::metadata::Metadata;
use crate::payment::Amount;
use crate::stream::{Ending, ItemRun, StreamKey};

/// Something that happened in the session.
#[derive(Debug)]
#[non_exhaustive]
pub enum Event {
    /// Responder: the peer said hello. Answer with [`accept_session`](super::Machine::accept_session) or
    /// [`refuse_session`](super::Machine::refuse_session).
    SessionRequested {
        /// The peer's metadata.
        metadata: Metadata,
    },
    /// Initiator: the peer wants a proof. Answer with [`prove_session`](super::Machine::prove_session), or close the
    /// session.
    SessionChallenged {
        /// What kind of proof it wants.
        method: String,
        /// What is to be proved with it.
        challenge: Bytes,
    },
    /// Responder: the peer's answer to [`challenge_session`](super::Machine::challenge_session). Nothing about it was
    /// checked.
    SessionProved {
        /// The proof.
        proof: Bytes,
    },
    /// The session is open.
    SessionOpened {
        /// The peer's metadata (initiator only: the responder has seen it).
        metadata: Metadata,
        /// What the peer receives.
        limits: SessionLimits,
        /// This side's half of the connection ids.
        parity: Parity,
    },
    /// The session has ended. The last event.
    SessionEnded(SessionEnd),
    /// The peer will accept no connection above this id.
    PeerGoingAway {
        /// The highest id of ours that the peer has seen.
        last: ConnectionId,
        /// Why.
        reason: Reason,
    },
    /// The peer asks for a connection. Answer with [`accept`](super::Machine::accept) or
    /// [`reject`](super::Machine::reject), whenever ready.
    ConnectionRequested {
        /// The connection.
        connection: ConnectionId,
        /// The service's name.
        service: String,
        /// The peer's metadata.
        metadata: Metadata,
        /// What the peer receives.
        limits: ConnectionLimits,
        /// The opener's half of the ids inside the connection.
        parity: Parity,
        /// The credential, or empty.
        credential: Bytes,
    },
    /// The peer accepted our open.
    ConnectionAccepted {
        /// The connection.
        connection: ConnectionId,
        /// The peer's metadata.
        metadata: Metadata,
        /// What the peer receives.
        limits: ConnectionLimits,
        /// The signed receipt, or empty.
        receipt: Bytes,
    },
    /// The peer rejected our open.
    ConnectionRejected {
        /// The connection.
        connection: ConnectionId,
        /// Why.
        reason: Reason,
        /// More about it.
        metadata: Metadata,
        /// The signed terms, or empty.
        terms: Bytes,
    },
    /// A connection has ended, or an open was not answered in time. Its calls and streams have ended before, each by
    /// [`Event::CallFailed`] and [`Event::StreamFailed`].
    ConnectionClosed {
        /// The connection.
        connection: ConnectionId,
        /// Why.
        end: ConnectionEnd,
        /// The counts of a paid connection as they stood in the end.
        money: Option<MoneyCount>,
    },
    /// The peer takes no new calls on a connection: [`start_call`](super::Machine::start_call) fails from now on. Those that
    /// are open run to their end, and those that wait for their turn end with [`Event::CallUnsent`].
    ConnectionDraining {
        /// The connection.
        connection: ConnectionId,
        /// Why.
        reason: Reason,
        /// Time until the peer closes it, whatever is open then.
        deadline: Option<Duration>,
    },
    /// A frame of a relayed connection, for its [`Bridge`](crate::relay::Bridge).
    Relayed {
        /// The connection.
        connection: ConnectionId,
        /// The whole frame.
        frame: Bytes,
    },
    /// The peer calls.
    CallRequested(IncomingCall),
    /// Payee: the streams of a call that waits for its price. Items for them may come before its
    /// [`Event::CallRequested`], which has them again; if it ends before, the streams end with
    /// [`Event::StreamFailed`] and it does with [`Event::CallFailed`].
    StreamsAnnounced {
        /// The connection.
        connection: ConnectionId,
        /// The call.
        call: CallKey,
        /// Its streams.
        slots: Vec<InboundSlot>,
    },
    /// The peer has lost interest in its call. It must still be answered.
    CallCancelled {
        /// The call.
        call: CallKey,
    },
    /// The deadline of a call of either direction has passed. A call of ours is being cancelled; one of the peer's must
    /// still be answered, if it was not.
    CallExpired {
        /// The call.
        call: CallKey,
        /// A call of ours: whether it was on its way.
        sent: bool,
    },
    /// Our call was answered.
    CallAnswered(IncomingResponse),
    /// Our call has ended: its answer came before, and all its streams have ended.
    CallEnded {
        /// The call.
        call: CallKey,
        /// What the callee says that the call has cost, in base units.
        charged: Amount,
        /// What we counted, in base units.
        counted: Amount,
    },
    /// Our call was not announced, because the peer takes no new ones on the connection. Its streams have ended before with
    /// [`Event::StreamFailed`].
    CallUnsent {
        /// The call.
        call: CallKey,
    },
    /// A call of either direction ended with its connection, or, if its streams were announced, before it was delivered.
    /// Its handler may still run; nobody waits for it, but it counts as unfinished work until it answers or
    /// [`finish_call`](super::Machine::finish_call) says that it has ended.
    CallFailed {
        /// The call.
        call: CallKey,
    },
    /// Items for a receiving stream.
    StreamItems {
        /// The connection. It may be the only thing of all this that the machine still knows: what came with the items
        /// may have ended the stream, and those in the items.
        connection: ConnectionId,
        /// The stream.
        stream: StreamKey,
        /// The items.
        run: ItemRun,
        /// The streams of a single item's slots.
        slots: Vec<InboundSlot>,
    },
    /// The sender has ended a receiving stream.
    StreamEnded {
        /// The stream.
        stream: StreamKey,
        /// How.
        ending: Ending,
        /// Bytes that still count against the memory budget: say [`release_stream`](super::Machine::release_stream) when its items were
        /// read or dropped.
        held: u64,
    },
    /// The receiver of a sending stream wants no more: reset it.
    StreamStopped {
        /// The stream.
        stream: StreamKey,
        /// Why.
        code: u32,
    },
    /// The receiver of a sending stream can take more.
    StreamCredit {
        /// The stream.
        stream: StreamKey,
        /// Credit since the stream began, in bytes with overhead.
        limit: u64,
        /// Items that the receiver has consumed.
        consumed: u64,
    },
    /// A stream of either direction ended with its connection, or with a call that was cancelled before it was
    /// announced or delivered. What still comes for it is dropped.
    StreamFailed {
        /// The stream.
        stream: StreamKey,
        /// See [`Event::StreamEnded`].
        held: u64,
    },
    /// A stream of either direction ends with its call's deadline: a sending one is to be reset, a receiving one is being
    /// stopped.
    StreamExpired {
        /// The stream.
        stream: StreamKey,
    },
    /// A payment message.
    Payment {
        /// The connection.
        connection: ConnectionId,
        /// The message as it was framed.
        message: Bytes,
    },
    /// Payee: a call that an idempotency key names, and that was [begun](super::Machine::begin_named), has cost so much when
    /// it was answered, or when its connection ended before that.
    CallCharged {
        /// The call.
        call: CallKey,
        /// What it has cost, in base units.
        charged: Amount,
    },
    /// Payee: money credit is below the low mark. Said once until it is raised.
    MoneyLow {
        /// The connection.
        connection: ConnectionId,
    },
    /// Payee: something waits for money. Said once until it is raised.
    MoneyNeeded {
        /// The connection.
        connection: ConnectionId,
        /// What it costs and what is held for running handlers, in base units beyond all that is spent.
        cost: Amount,
    },
    /// Payer: what was received has reached the mark. Said once until the mark is set anew.
    ReceivedMark {
        /// The connection.
        connection: ConnectionId,
        /// The price of all that was received, in base units.
        received: Amount,
    },
    /// A pong came.
    Pong {
        /// The measured round-trip time.
        rtt: Duration,
    },
}

/// A call that the peer makes.
#[derive(Debug)]
pub struct IncomingCall {
    /// The connection.
    pub connection: ConnectionId,
    /// The call.
    pub call: CallKey,
    /// The method's id.
    pub method: u64,
    /// Time that is left for the call.
    pub deadline: Option<Duration>,
    /// The caller's metadata.
    pub metadata: Metadata,
    /// The arguments. They count against the window until
    /// [`consume_body`](super::Machine::consume_body) gives their bytes back.
    pub payload: Bytes,
    /// The streams of the payload's slots.
    pub slots: Vec<InboundSlot>,
}

/// The answer to a call of ours.
#[derive(Debug)]
pub struct IncomingResponse {
    /// The connection.
    pub connection: ConnectionId,
    /// The call.
    pub call: CallKey,
    /// What the payload is.
    pub status: Status,
    /// What the callee says that the call has cost so far, in base units.
    pub charged: Amount,
    /// Whether the call ended with it; else [`Event::CallEnded`] follows.
    pub is_end: bool,
    /// The callee's metadata.
    pub metadata: Metadata,
    /// The payload. It counts against the window until [`consume_body`](super::Machine::consume_body) gives its bytes
    /// back.
    pub payload: Bytes,
    /// The streams of the payload's slots.
    pub slots: Vec<InboundSlot>,
}

/// A stream that the peer announced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InboundSlot {
    /// The stream.
    pub stream: StreamKey,
    /// Which way it flows, seen from *this* side: `FromPeer` is a stream that this side receives.
    pub flow: Flow,
}

//! The frames of a session: kinds and postcard headers. A frame is its kind (one byte), its header, and a payload that
//! is the rest of it.
//!
//! The payload is neither copied nor decoded here. SPEC.md, "Frames", has the table of kinds with worked examples.

use bytes::{Buf, Bytes};
use postcard::ser_flavors::Flavor;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use smallvec::SmallVec;

use crate::error::{Reason, Violation};
use crate::id::{CallId, ConnectionId, Parity, StreamId};
use crate::limits::{ConnectionLimits, SessionLimits};
use crate::metadata::Metadata;
use crate::payment::Amount;

/// The head of a frame: kind and header. Frames of calls and streams fit it without an allocation.
pub type Head = SmallVec<[u8; INLINE]>;

/// The lowest kind that a peer skips if it doesn't know it. `[session.frame.extension]`
pub const FIRST_EXTENSION_KIND: u8 = 128;

/// A frame's header: what stands between its kind and its payload.
pub trait Header: Serialize + DeserializeOwned {
    /// The first byte of the frame.
    const KIND: u8;
    /// The frame's name in errors.
    const NAME: &'static str;
    /// Whether a payload may follow.
    const HAS_PAYLOAD: bool = false;
}

/// Bytes of a head that are kept without an allocation.
const INLINE: usize = 64;

/// Postcard's output into the bytes of a [`Head`] on the stack. (Growing a `SmallVec` or a `BytesMut` field by field costs
/// three to a hundred times more.)
struct HeadFlavor {
    bytes: [u8; INLINE],
    len: usize,
}

impl Flavor for HeadFlavor {
    type Output = Head;

    #[inline]
    fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
        *self.bytes.get_mut(self.len).ok_or(postcard::Error::SerializeBufferFull)? = byte;
        self.len = self.len.saturating_add(1);
        Ok(())
    }

    #[inline]
    fn try_extend(&mut self, bytes: &[u8]) -> postcard::Result<()> {
        // Most are the varint of a small number.
        if let [byte] = bytes {
            return self.try_push(*byte);
        }
        let end = self.len.saturating_add(bytes.len());
        self.bytes.get_mut(self.len..end).ok_or(postcard::Error::SerializeBufferFull)?.copy_from_slice(bytes);
        self.len = end;
        Ok(())
    }

    fn finalize(self) -> postcard::Result<Head> {
        let mut head = Head::from_buf(self.bytes);
        head.truncate(self.len);
        Ok(head)
    }
}

/// Postcard's output into a [`Head`] of any size.
struct LongHeadFlavor(Head);

impl Flavor for LongHeadFlavor {
    type Output = Head;

    fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
        self.0.push(byte);
        Ok(())
    }

    fn try_extend(&mut self, bytes: &[u8]) -> postcard::Result<()> {
        self.0.extend_from_slice(bytes);
        Ok(())
    }

    fn finalize(self) -> postcard::Result<Head> {
        Ok(self.0)
    }
}

/// Writes kind and header.
pub fn encode_head<H: Header>(header: &H) -> Head {
    let mut bytes = [0; INLINE];
    bytes[0] = H::KIND;
    postcard::serialize_with_flavor(header, HeadFlavor { bytes, len: 1 }).unwrap_or_else(|_full| {
        let head = LongHeadFlavor(Head::from_slice(&[H::KIND]));
        // Serialising can only fail in a `Serialize` that returns an error, and those of this module are all derived.
        postcard::serialize_with_flavor(header, head).expect("headers always encode")
    })
}

/// Reads the header of a frame whose kind was looked at, and leaves the payload in `frame`.
///
/// # Errors
/// When the header is malformed, or a payload follows where none may.
pub fn decode_header<H: Header>(frame: &mut Bytes) -> Result<H, Violation> {
    let malformed = Violation::MalformedHeader { kind: H::KIND };
    let body = frame.get(1..).ok_or_else(|| malformed.clone())?;
    let (header, rest) = postcard::take_from_bytes::<H>(body).map_err(|_| malformed)?;
    let rest = rest.len();
    if rest > 0 && !H::HAS_PAYLOAD {
        return Err(Violation::UnexpectedPayload { frame: H::NAME, bytes: rest });
    }
    // `rest` is a part of the frame, so the difference is its place.
    frame.advance(frame.len().saturating_sub(rest));
    Ok(header)
}

macro_rules! headers {
    ($($(#[$doc:meta])* $kind:literal $(+ $payload:ident)? $name:ident { $($(#[$field_doc:meta])* $field:ident: $type:ty,)* })*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
            pub struct $name { $($(#[$field_doc])* pub $field: $type,)* }

            impl Header for $name {
                const KIND: u8 = $kind;
                const NAME: &'static str = stringify!($name);
                $(const HAS_PAYLOAD: bool = stringify!($payload).len() > 0;)?
            }
        )*
    };
}

/// Which way a stream flows, seen from the side that sends the frame with the slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Flow {
    /// The side that announces the stream sends its items.
    ToPeer,
    /// The side that announces the stream receives its items.
    FromPeer,
}

/// A stream that a body or an item refers to: slot `i` of the payload is entry `i` of the frame's list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// The stream's id.
    pub stream: StreamId,
    /// Which way it flows.
    pub flow: Flow,
}

/// How a call was answered. The numbers stand on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Status {
    /// The payload is the method's result.
    Ok,
    /// The payload is the method's own error.
    AppError,
    /// The service has no such method; no handler ran.
    UnknownMethod,
    /// The payload was not the method's arguments; no handler ran.
    InvalidPayload,
    /// The call was cancelled.
    Cancelled,
    /// The handler failed without an answer. Free of charge.
    HandlerFailed,
    /// The answer is larger than what the caller receives. Metadata: `bytes` and `limit`.
    TooLarge,
    /// The payment for the call did not come. Metadata: `spent` and `required`, what the payee counts and needs.
    PaymentFailed,
    /// The callee has no memory for the call now; no handler ran. Free of charge.
    AtCapacity,
    /// The time that the caller gave the call has passed.
    DeadlineExceeded,
    /// The callee does not want to execute the call; no handler ran. Metadata: `code` and `text`, why.
    Refused,
}

headers! {
    /// Initiator to responder, first.
    0 Hello {
        /// Lowest protocol version that the initiator speaks.
        min_version: u16,
        /// Highest protocol version that the initiator speaks.
        max_version: u16,
        /// The initiator's half of the connection ids.
        parity: Parity,
        /// What the initiator receives.
        limits: SessionLimits,
        /// Authentication and other facts about the initiator.
        metadata: Metadata,
    }
    /// Responder to initiator: the session is open.
    1 HelloAck {
        /// The version that both speak from here.
        version: u16,
        /// What the responder receives.
        limits: SessionLimits,
        /// Facts about the responder.
        metadata: Metadata,
    }
    /// Responder to initiator: no session.
    2 Refuse {
        /// Why.
        reason: WireReason,
    }
    /// The peer broke a rule; the last frame that its sender sends.
    3 ProtocolError {
        /// Which one.
        reason: WireReason,
    }
    /// No connection above `last` will be accepted or executed.
    4 GoAway {
        /// The highest id of the receiver's connections that the sender has seen.
        last: ConnectionId,
        /// Why.
        reason: WireReason,
    }
    /// Are you there?
    5 Ping {
        /// Comes back in the Pong.
        nonce: u64,
    }
    /// Yes.
    6 Pong {
        /// The Ping's.
        nonce: u64,
    }
    /// Responder to initiator, between Hello and its answer, once: prove who you are. The payload is the challenge.
    7 + payload Challenge {
        /// What kind of proof is asked for.
        method: String,
    }
    /// Initiator to responder: the answer to the Challenge. The payload is the proof.
    8 + payload Proof {
        /// The kind of proof.
        method: String,
    }
    /// A virtual connection, please. The payload is the credential of a paid one, else empty.
    16 + payload Open {
        /// The next id of the opener's half.
        connection: ConnectionId,
        /// The service's name.
        service: String,
        /// The opener's half of the call and stream ids in the connection.
        parity: Parity,
        /// What the opener receives.
        limits: ConnectionLimits,
        /// The opener's metadata.
        metadata: Metadata,
    }
    /// The connection is open. The payload is the signed receipt of a paid one, else empty.
    17 + payload Accept {
        /// The connection.
        connection: ConnectionId,
        /// What the accepter receives.
        limits: ConnectionLimits,
        /// The accepter's metadata.
        metadata: Metadata,
    }
    /// No connection. The payload is the signed terms if payment is required, else empty.
    18 + payload Reject {
        /// The connection.
        connection: ConnectionId,
        /// Why.
        reason: WireReason,
        /// More about it.
        metadata: Metadata,
    }
    /// The end of a connection, or (connection 0) of the session.
    19 Close {
        /// The connection.
        connection: ConnectionId,
        /// Why.
        reason: WireReason,
        /// More about it.
        metadata: Metadata,
    }
    /// The sender takes no new calls on the connection; those that are open run to their end.
    20 Draining {
        /// The connection.
        connection: ConnectionId,
        /// Time until the sender closes it whatever is open, in microseconds from the sending of the frame.
        deadline_us: Option<u64>,
        /// Why.
        reason: WireReason,
    }
    /// The answer to Draining: its sender makes no more calls on the connection.
    21 Drained {
        /// The connection.
        connection: ConnectionId,
    }
    /// A call. The payload is the method's arguments.
    32 + payload Request {
        /// The connection.
        connection: ConnectionId,
        /// The next id of the caller's half.
        call: CallId,
        /// The method's id.
        #[serde(with = "postcard::fixint::le")]
        method: u64,
        /// Time that is left for the call, in microseconds from the sending of the frame.
        deadline_us: Option<u64>,
        /// The caller's metadata.
        metadata: Metadata,
        /// The streams of the payload's slots.
        slots: Vec<Slot>,
    }
    /// The answer to a call; its end too, unless the call has a stream. The payload is by `status`.
    33 + payload Response {
        /// The connection.
        connection: ConnectionId,
        /// The call.
        call: CallId,
        /// What the payload is.
        status: Status,
        /// What the call has cost when this frame was taken for writing, in base units; 0 on an unpaid connection.
        charged: Amount,
        /// The callee's metadata.
        metadata: Metadata,
        /// The streams of the payload's slots.
        slots: Vec<Slot>,
    }
    /// The caller has lost interest.
    34 Cancel {
        /// The connection.
        connection: ConnectionId,
        /// The call.
        call: CallId,
    }
    /// The end of a call that has a stream: response and streams have all ended.
    35 Done {
        /// The connection.
        connection: ConnectionId,
        /// The call.
        call: CallId,
        /// What the call has cost, in base units; 0 on an unpaid connection.
        charged: Amount,
    }
    /// 1..n items of a stream. The payload is n × (varint length, bytes).
    48 + payload Items {
        /// The connection.
        connection: ConnectionId,
        /// The stream.
        stream: StreamId,
        /// The streams of the item's slots: an item that has any travels alone.
        slots: Vec<Slot>,
    }
    /// The sender has sent the last item.
    49 End {
        /// The connection.
        connection: ConnectionId,
        /// The stream.
        stream: StreamId,
    }
    /// The sender gives the stream up, at an item boundary.
    50 Reset {
        /// The connection.
        connection: ConnectionId,
        /// The stream.
        stream: StreamId,
        /// Why.
        code: u32,
    }
    /// The receiver wants no more; answered by End or Reset.
    51 Stop {
        /// The connection.
        connection: ConnectionId,
        /// The stream.
        stream: StreamId,
        /// Why.
        code: u32,
    }
    /// The receiver of a stream can take more.
    52 Credit {
        /// The connection.
        connection: ConnectionId,
        /// The stream.
        stream: StreamId,
        /// Bytes, item overhead included, that may be sent since the stream began.
        limit: u64,
        /// Items that the receiver has consumed since the stream began.
        consumed: u64,
    }
    /// The receiver of bodies can take more.
    53 Window {
        /// The connection.
        connection: ConnectionId,
        /// Bytes of bodies that may be sent since the connection opened.
        limit: u64,
    }
    /// A message of the payment channel. The payload is a [`PaymentMessage`](crate::payment::PaymentMessage).
    64 + payload Payment {
        /// The connection.
        connection: ConnectionId,
    }
}

/// A [`Reason`] as it is framed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireReason {
    /// The code.
    pub code: u32,
    /// The text.
    pub text: String,
}

impl From<Reason> for WireReason {
    fn from(reason: Reason) -> Self {
        WireReason { code: reason.code, text: reason.text }
    }
}

impl From<WireReason> for Reason {
    /// The text is cut to [`MAX_TEXT`](crate::error::MAX_TEXT) bytes on this way too.
    fn from(reason: WireReason) -> Self {
        Reason::new(reason.code, reason.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn framed<H: Header>(header: &H, payload: &[u8]) -> Bytes {
        let mut frame = encode_head(header).to_vec();
        frame.extend_from_slice(payload);
        Bytes::from(frame)
    }

    #[test]
    fn a_header_comes_back_and_leaves_its_payload() {
        let request = Request {
            connection: ConnectionId(3),
            call: CallId(5),
            method: u64::MAX,
            deadline_us: Some(7),
            metadata: Metadata::new().with("a", "b"),
            slots: vec![Slot { stream: StreamId(9), flow: Flow::FromPeer }],
        };
        let mut frame = framed(&request, b"payload");
        assert_eq!(frame[0], 32);
        assert_eq!(decode_header::<Request>(&mut frame).unwrap(), request);
        assert_eq!(frame, "payload");
    }

    #[test]
    fn heads_of_calls_and_streams_stay_inline() {
        let request = Request {
            connection: ConnectionId(u64::MAX),
            call: CallId(u64::MAX),
            method: u64::MAX,
            deadline_us: Some(u64::MAX),
            metadata: Metadata::new(),
            slots: vec![],
        };
        assert!(!encode_head(&request).spilled());
    }

    #[test]
    fn a_head_is_the_same_whether_it_stays_inline_or_not() {
        for length in 0..2 * INLINE {
            let payment = ProtocolError { reason: WireReason { code: 300, text: "x".repeat(length) } };
            let head = encode_head(&payment);
            assert_eq!(head.first(), Some(&ProtocolError::KIND));
            assert_eq!(head.get(1..), postcard::to_allocvec(&payment).ok().as_deref(), "{length} bytes");
            assert_eq!(head.spilled(), head.len() > INLINE);
        }
    }

    #[test]
    fn a_payload_where_none_belongs_is_refused() {
        let mut frame = framed(&Ping { nonce: 1 }, b"x");
        assert_eq!(decode_header::<Ping>(&mut frame), Err(Violation::UnexpectedPayload { frame: "Ping", bytes: 1 }));
    }

    #[test]
    fn every_truncation_of_a_header_is_refused() {
        let open = Open {
            connection: ConnectionId(300),
            service: "echo".into(),
            parity: Parity::Odd,
            limits: ConnectionLimits::default(),
            metadata: Metadata::new().with("k", "v"),
        };
        let whole = framed(&open, b"");
        for length in 1..whole.len() {
            let mut cut = whole.slice(..length);
            assert_eq!(decode_header::<Open>(&mut cut), Err(Violation::MalformedHeader { kind: 16 }), "{length} bytes");
        }
    }

    /// `slots` and metadata are the only lists; both have elements of at least two bytes, so a short frame cannot
    /// decode to a long list.
    #[test]
    fn a_stated_length_beyond_the_frame_allocates_nothing() {
        let mut frame = vec![48, 1, 1];
        frame.extend_from_slice(&[0xff, 0xff, 0xff, 0xff, 0x0f]);
        let mut frame = Bytes::from(frame);
        assert!(decode_header::<Items>(&mut frame).is_err());
    }
}

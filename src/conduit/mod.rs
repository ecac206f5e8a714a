//! Conduits: what carries a session. (Some libraries call this a transport.)
//!
//! A [`Conduit`] moves whole frames between two peers, in order within a [`Lane`], and knows nothing of what is in
//! them. It splits into a [`FrameReader`] and a [`FrameWriter`], which the session's driver polls separately from one
//! task: reading never waits for writing, so two busy peers cannot block each other.
//!
//! The contract, proved for every conduit by one shared suite (`tests/conduit_suite.rs`):
//!
//! - Frames arrive whole, unaltered, once, and in order within their lane.
//! - All state of a partial read or write lives in the reader or writer, never in a future: a poll that is not repeated
//!   loses nothing.
//! - A frame's length is checked before anything is allocated for it.
//! - Nothing is queued without bound: a reader takes no more than a bounded number of bytes and frames with each poll,
//!   and a writer holds what its driver hands over, which [`FrameWriter::buffered`] measures.
//! - [`FrameWriter::poll_close`] loses nothing that was sent before; the peer reads [`Received::End`] after the last
//!   frame. The other direction goes on until its own writer closes.
//! - An error is reported once, with its cause; every later call says [`ConduitError::Closed`].

use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tollway_protocol::error::Reason;
use tollway_protocol::frame::FrameError;

pub use tollway_protocol::frame::{HANDSHAKE_MAX_FRAME, Lane, Stranger, Transmit};

use crate::future::BoxFuture;

pub mod any;
pub mod endpoint;
pub mod framed;
pub mod listen;
pub mod memory;
#[cfg(feature = "quic")]
pub mod quic;
pub mod tcp;
#[cfg(feature = "tls")]
pub mod tls;
#[cfg(unix)]
pub mod unix;
#[cfg(feature = "ws")]
pub mod ws;

#[cfg(any(feature = "tls", feature = "ws"))]
mod halves;
mod outbuf;

/// A path for frames between two peers.
pub trait Conduit: Send + 'static {
    /// The receiving half.
    type Reader: FrameReader;
    /// The sending half.
    type Writer: FrameWriter;

    /// Whether frames of different lanes keep their order.
    fn lanes(&self) -> Lanes;

    /// Who is at the other end.
    fn peer(&self) -> PeerInfo;

    /// What drives the conduit, if polling its halves does not: a session polls it in its own task, which saves a wake on
    /// the way of each frame. If nobody takes it, it goes on by itself.
    fn take_engine(&mut self) -> Option<BoxFuture<'static, ()>> {
        None
    }

    /// Separates receiving from sending. Dropping one half does not close the other.
    fn split(self) -> (Self::Reader, Self::Writer);
}

/// How many ordered paths a conduit has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Lanes {
    /// One: all frames arrive in the order in which they were sent, and are reported on [`Lane::ROOT`].
    One,
    /// One for each virtual connection: frames of different lanes may overtake each other.
    PerConnection,
}

/// The other end of a conduit, as far as the conduit knows it.
///
/// Kind and address are for people and logs, and prove nothing. What the conduit has proved is in
/// [`identity`](Self::identity).
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PeerInfo {
    kind: &'static str,
    address: String,
    identity: PeerIdentity,
    exporter: Option<[u8; 32]>,
}

impl PeerInfo {
    /// A peer reached over a `kind` of conduit, such as `"tcp"`, at `address`. Nothing is proved about it.
    pub fn new(kind: &'static str, address: impl Into<String>) -> Self {
        Self { kind, address: address.into(), identity: PeerIdentity::Unproved, exporter: None }
    }

    /// With what the conduit has proved about the peer.
    #[must_use]
    pub fn with_identity(self, identity: PeerIdentity) -> Self {
        Self { identity, ..self }
    }

    /// With the conduit's exporter value: see [`exporter`](Self::exporter).
    #[must_use]
    pub fn with_exporter(self, exporter: [u8; 32]) -> Self {
        Self { exporter: Some(exporter), ..self }
    }

    /// The kind of conduit, such as `"tcp"`.
    pub fn kind(&self) -> &'static str {
        self.kind
    }

    /// What carries the conduit, by OpenTelemetry's names: `tcp`, `udp`, `unix`, or `inproc` for one in this process.
    pub fn transport(&self) -> &'static str {
        match self.kind {
            "quic" => "udp",
            "unix" => "unix",
            "memory" => "inproc",
            _ => "tcp",
        }
    }

    /// The peer's address in the notation of its kind.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// What the conduit has proved about the peer.
    pub fn identity(&self) -> &PeerIdentity {
        &self.identity
    }

    /// 32 bytes that the two ends of this conduit have in common and nobody else has, such as a keying material
    /// exporter of TLS 1.3 (RFC 8446, 7.5). Whoever signs them signs for this conduit alone. `None` where the network
    /// could have put itself in between.
    pub fn exporter(&self) -> Option<&[u8; 32]> {
        self.exporter.as_ref()
    }
}

impl fmt::Display for PeerInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.kind, self.address)
    }
}

/// What a conduit has proved about who is at its other end, before the first frame.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub enum PeerIdentity {
    /// Nothing: anybody could be there.
    #[default]
    Unproved,
    /// The peer has the private key of a certificate that the conduit has verified against its trust anchors.
    Certificate {
        /// The chain as the peer sent it, each certificate as DER, its own first.
        chain: Vec<Bytes>,
    },
    /// A process on this machine, as its operating system names it.
    Process {
        /// The effective user id.
        uid: u32,
        /// The effective group id.
        gid: u32,
        /// The process id at the time of connecting, where the system tells.
        pid: Option<i32>,
    },
}

/// What one poll of a reader brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Received {
    /// At least one frame was appended.
    Frames,
    /// Bytes arrived, but no whole frame: the peer is alive.
    Progress,
    /// The peer closed its side in order, on a frame boundary. Nothing more will come.
    End,
}

/// The receiving half of a conduit.
pub trait FrameReader: Send + 'static {
    /// Appends the bodies of the frames that are there to `frames`, and never waits for a write.
    ///
    /// One call takes a bounded number of bytes and frames, so that a driver can turn to its other work in between; as
    /// usual, the waker is registered only when `Pending` is returned. Frames in front of an error or of the end are
    /// delivered first, and the error or [`Received::End`] by the next call. After the end, each call reports it again.
    ///
    /// # Errors
    /// [`ConduitError::Truncated`] for an end inside a frame, [`ConduitError::Stranger`] for a peer that does not
    /// speak Tollway (see [`refuse`]), and the other kinds as they say. After an error: [`ConduitError::Closed`].
    fn poll_recv(
        &mut self,
        cx: &mut Context<'_>,
        frames: &mut Vec<(Lane, Bytes)>,
    ) -> Poll<Result<Received, ConduitError>>;

    /// Takes in and throws away what arrives; `Ready` at the peer's end or when the conduit fails.
    ///
    /// Works after an error too. Closing a socket while unread bytes lie in it makes the system reset the connection,
    /// which can destroy what was just written: whoever says a last word and wants it heard discards until the peer has
    /// closed, for a bounded time.
    fn poll_discard(&mut self, cx: &mut Context<'_>) -> Poll<()>;

    /// Sets the largest body that is accepted, in bytes, for every frame that was not delivered yet.
    ///
    /// It is [`HANDSHAKE_MAX_FRAME`] at first. A side raises it to what its own Hello promises *before* it sends
    /// that Hello: the answer and the first large frame may arrive together.
    fn set_max_frame(&mut self, bytes: usize);

    /// Waits until frames, bytes or the end have arrived; see [`poll_recv`](Self::poll_recv).
    ///
    /// # Errors
    /// As [`poll_recv`](Self::poll_recv).
    ///
    /// # Cancel safety
    /// Dropping the future at any point loses nothing: partial frames stay in the reader, whole ones are in `frames`.
    fn recv(&mut self, frames: &mut Vec<(Lane, Bytes)>) -> impl Future<Output = Result<Received, ConduitError>> + Send
    where
        Self: Sized,
    {
        poll_fn(move |cx| self.poll_recv(cx, frames))
    }
}

/// The sending half of a conduit.
///
/// Dropping it ends the peer's direction without flushing: what was buffered is lost, and the peer may find the stream
/// truncated.
pub trait FrameWriter: Send + 'static {
    /// Takes a frame into the buffer, at once and always: the driver bounds what it hands over by
    /// [`buffered`](Self::buffered). Nothing is written before the next [`poll_flush`](Self::poll_flush).
    ///
    /// A frame that may not be sent (empty, or above the limit) is dropped and fails the writer: the next flush
    /// reports it. After [`poll_close`](Self::poll_close) was called, or after an error, frames are dropped, and a flush
    /// says [`ConduitError::Closed`].
    fn start_send(&mut self, frame: Transmit);

    /// Bytes accepted and not yet written, with all framing.
    fn buffered(&self) -> usize;

    /// Bytes that count against how far ahead of the conduit a driver may be: those of [`buffered`](Self::buffered)
    /// without what lies in blocked lanes.
    fn ahead(&self) -> usize {
        self.buffered()
    }

    /// Whether a lane takes nothing for now while others may: frames for it wait in this writer and should rather wait
    /// in the session. With one lane, [`buffered`](Self::buffered) says it all.
    fn is_blocked(&self, lane: Lane) -> bool {
        let _ = lane;
        false
    }

    /// A lane that was blocked and is not any more; each is told once.
    fn next_unblocked(&mut self) -> Option<Lane> {
        None
    }

    /// Says that no frame will follow on this lane. What was sent before still arrives.
    fn end_lane(&mut self, lane: Lane) {
        let _ = lane;
    }

    /// What the peer is to be told when the conduit closes, where the conduit itself can tell it.
    fn start_close(&mut self, reason: &Reason) {
        let _ = reason;
    }

    /// Bytes written so far, with all framing. It never falls. A value that stands still while
    /// [`buffered`](Self::buffered) is above zero means a peer that does not read.
    fn written(&self) -> u64;

    /// Sets the largest body that may be sent, in bytes: a backstop for a driver that should not exceed what the peer
    /// accepts. No limit but the length field's at first.
    fn set_max_frame(&mut self, bytes: usize);

    /// Writes as much as the peer takes; `Ready` when all is written. `Pending` may have made progress: see
    /// [`written`](Self::written).
    ///
    /// # Errors
    /// Why the conduit failed, once; then [`ConduitError::Closed`]. What was buffered is dropped.
    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConduitError>>;

    /// Flushes, then closes this direction: the peer reads all that was sent, then [`Received::End`]. The other
    /// direction stays open. Calling it again after it was `Ready` does nothing.
    ///
    /// # Errors
    /// As [`poll_flush`](Self::poll_flush).
    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConduitError>>;

    /// Replaces what was buffered by the listener's answer to a [`Stranger`], in the stranger's own language. To be
    /// followed by [`poll_close`](Self::poll_close); [`refuse`] does both. If anything was written already it answers
    /// nothing: it would not stand where the stranger looks for it. Conduits that meet no strangers ignore it.
    fn start_refusal(&mut self, stranger: Stranger) {
        let _ = stranger;
    }

    /// Waits until all is written; see [`poll_flush`](Self::poll_flush).
    ///
    /// # Errors
    /// As [`poll_flush`](Self::poll_flush).
    ///
    /// # Cancel safety
    /// Dropping the future at any point loses nothing; the next flush goes on.
    fn flush(&mut self) -> impl Future<Output = Result<(), ConduitError>> + Send
    where
        Self: Sized,
    {
        poll_fn(move |cx| self.poll_flush(cx))
    }

    /// Flushes and closes this direction; see [`poll_close`](Self::poll_close).
    ///
    /// # Errors
    /// As [`poll_flush`](Self::poll_flush).
    ///
    /// # Cancel safety
    /// Dropping the future at any point loses nothing; the next close goes on.
    fn close(&mut self) -> impl Future<Output = Result<(), ConduitError>> + Send
    where
        Self: Sized,
    {
        poll_fn(move |cx| self.poll_close(cx))
    }
}

/// Tells a [`Stranger`] that found a listener what this port speaks, and waits, for `patience` at most, until it has
/// closed, so that the answer is not lost to a reset. Only listeners call this: a dialer just closes.
///
/// # Cancel safety
/// Dropping the future closes the conduit at once; the answer may be lost.
pub async fn refuse(
    mut reader: impl FrameReader,
    mut writer: impl FrameWriter,
    stranger: Stranger,
    patience: Duration,
) {
    writer.start_refusal(stranger);
    let farewell = async {
        if writer.close().await.is_ok() {
            poll_fn(|cx| reader.poll_discard(cx)).await;
        }
    };
    // However it ends, there is no one to report it to: the stranger got its answer or did not want it.
    let _ = tokio::time::timeout(patience, farewell).await;
}

/// Why a conduit failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConduitError {
    /// Input or output failed below the conduit.
    #[error("the conduit failed: {0}")]
    Io(#[from] io::Error),
    /// A frame is longer than its receiver accepts: one from the peer when reading, one of ours when writing.
    /// Nothing was allocated for it.
    #[error("a frame of {length} bytes exceeds the limit of {limit} bytes")]
    TooLarge {
        /// Length of the frame's body, in bytes.
        length: usize,
        /// The limit on it, in bytes.
        limit: usize,
    },
    /// A frame has no body, not even a kind.
    #[error("a frame without a body")]
    Empty,
    /// The peer's stream ended inside a frame or inside the preface.
    #[error("the conduit ended inside a frame")]
    Truncated,
    /// The peer does not speak Tollway, or another generation of it.
    #[error("{0}")]
    Stranger(Stranger),
    /// This half was closed, or has failed before; the first error told why.
    #[error("the conduit is closed")]
    Closed,
}

impl From<FrameError> for ConduitError {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::TooLarge { length, limit } => Self::TooLarge { length, limit },
            FrameError::Empty => Self::Empty,
            // A kind this crate does not know yet: the frame is as unusable.
            _ => Self::Io(io::Error::new(io::ErrorKind::InvalidData, error)),
        }
    }
}

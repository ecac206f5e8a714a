//! The first bytes of a conduit, and how frames are cut out of a stream of bytes.
//!
//! ```text
//! byte stream = preface, frame*          preface = "TOLLWAY" generation        (8 bytes, sent first by both sides)
//! frame       = length body              length  = u32, little-endian, the number of bytes of the body, at least 1
//! body        = kind header payload      (opaque here)
//! ```
//!
//! Nothing is allocated for a frame whose length was not compared with the limit first, and a body is a slice of the
//! buffer that it was read into: it is never copied. A conduit with several lanes delimits frames by its own means and
//! uses [`Lane`] and [`Transmit`] alone.

use core::fmt;

use bytes::{Buf, Bytes, BytesMut};
use smallvec::SmallVec;

/// An ordered path inside a conduit. Order holds within a lane only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Lane(pub u64);

impl Lane {
    /// The lane of the root connection. A conduit with one lane carries everything on it.
    pub const ROOT: Self = Self(0);
}

impl fmt::Display for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lane {}", self.0)
    }
}

/// The wire generation, the last byte of [`PREFACE`]. It changes only if the handshake itself could not be understood
/// any more: versions within a generation are agreed on by the handshake.
pub const GENERATION: u8 = 1;

/// What both sides of a byte-stream conduit send first: seven bytes of protocol, one byte of wire generation.
/// `[session.preface]`
pub const PREFACE: [u8; 8] = *b"TOLLWAY\x01";

/// The part of [`PREFACE`] that every generation shares.
const PROTOCOL: &[u8] = b"TOLLWAY";

/// Bytes of the length in front of each frame.
pub const LENGTH_BYTES: usize = 4;

/// The largest frame body, in bytes, before the handshake has agreed on another: a stranger that has proved nothing
/// makes us hold no more than this. It holds a Hello with the largest metadata several times over.
pub const HANDSHAKE_MAX_FRAME: usize = 64 * 1024;

/// Up to this many missing bytes of a frame are reserved at once; beyond it, no more than the peer has already sent.
/// So a peer that announces a large frame and sends nothing costs a bounded reservation, which is not even touched.
const RESERVE_AT_ONCE: usize = 1024 * 1024;

/// What the first bytes of a byte stream say about who sends them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PrefaceCheck {
    /// All bytes so far belong to the preface, and more must come.
    NeedMore,
    /// The stream starts with [`PREFACE`].
    Ok,
    /// The peer speaks something else.
    Stranger(Stranger),
}

/// Compares the first bytes of a stream with [`PREFACE`]. What follows the preface is not looked at.
///
/// A stranger is found out at its first byte that differs, so that one who sends less than a preface and then waits
/// for us is answered too. `[session.preface.stranger]`
pub fn check_preface(prefix: &[u8]) -> PrefaceCheck {
    let seen = prefix.get(..PREFACE.len()).unwrap_or(prefix);
    if !PREFACE.starts_with(seen) {
        PrefaceCheck::Stranger(Stranger::classify(prefix))
    } else if seen.len() < PREFACE.len() {
        PrefaceCheck::NeedMore
    } else {
        PrefaceCheck::Ok
    }
}

/// What a peer seems to speak that does not speak this generation of Tollway.
///
/// With few bytes seen this is a guess: it chooses the words of the refusal, never whether to refuse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Stranger {
    /// An HTTP/1 or HTTP/2 client, or the answer of an HTTP server.
    Http,
    /// TLS on a conduit without it: a client's handshake, or the alert of a listener that expected one.
    Tls,
    /// Tollway, in another wire generation.
    OtherGeneration(u8),
    /// None of the above.
    Unknown,
}

/// How HTTP begins: the methods, HTTP/2's preface, and a server's status line.
const HTTP_STARTS: [&[u8]; 11] = [
    b"GET ",
    b"HEAD ",
    b"POST ",
    b"PUT ",
    b"DELETE ",
    b"CONNECT ",
    b"OPTIONS ",
    b"TRACE ",
    b"PATCH ",
    b"PRI * HTTP/2.0",
    b"HTTP/",
];

const HTTP_REPLY: &[u8] = b"HTTP/1.1 400 Bad Request\r\n\
    Connection: close\r\n\
    Content-Type: text/plain; charset=utf-8\r\n\
    Content-Length: 73\r\n\
    \r\n\
    This port speaks Tollway, not HTTP. Connect to it with a Tollway client.\n";

/// A fatal alert, protocol_version (70), in a TLS 1.0 record, which every version of TLS understands.
const TLS_REPLY: &[u8] = &[0x15, 0x03, 0x01, 0x00, 0x02, 0x02, 0x46];

impl Stranger {
    fn classify(prefix: &[u8]) -> Self {
        if let Some(&generation) = prefix.strip_prefix(PROTOCOL).and_then(<[u8]>::first) {
            return Self::OtherGeneration(generation);
        }
        // A record that carries an alert or a handshake.
        if matches!(prefix, [0x15 | 0x16] | [0x15 | 0x16, 0x03, ..]) {
            return Self::Tls;
        }
        if HTTP_STARTS.iter().any(|start| start.starts_with(prefix) || prefix.starts_with(start)) {
            return Self::Http;
        }
        Self::Unknown
    }

    /// What a listener answers before it closes, in the stranger's own language where we know it. Only a listener
    /// answers: two sides that both refuse each other must not start a conversation.
    pub fn reply(&self) -> &'static [u8] {
        match self {
            Self::Http => HTTP_REPLY,
            Self::Tls => TLS_REPLY,
            Self::OtherGeneration(_) | Self::Unknown => &PREFACE,
        }
    }
}

impl fmt::Display for Stranger {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Http => f.write_str(
                "the peer speaks HTTP, not Tollway: check the port, and that no HTTP proxy or load balancer stands between",
            ),
            Self::Tls => f.write_str(
                "the peer speaks TLS on a conduit without TLS: use the same scheme on both sides, such as tls:// instead of \
                 tcp://",
            ),
            Self::OtherGeneration(generation) => write!(
                f,
                "the peer speaks wire generation {generation} of Tollway and this side generation {GENERATION}: \
                 upgrade the older side"
            ),
            Self::Unknown => f.write_str("the peer does not speak Tollway: check the address and the port"),
        }
    }
}

/// A length that no frame may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The frame is longer than the limit. Nothing was allocated for it.
    #[error("a frame of {length} bytes exceeds the limit of {limit} bytes")]
    TooLarge {
        /// Length of the frame's body, in bytes.
        length: usize,
        /// The limit on it, in bytes.
        limit: usize,
    },
    /// The frame has no body, not even a kind.
    #[error("a frame without a body")]
    Empty,
}

/// Compares a body's length with what a frame may have. `[session.frame.length]`
///
/// # Errors
/// [`FrameError::Empty`] for 0 and [`FrameError::TooLarge`] above `limit` or `u32::MAX`.
pub fn check_length(length: usize, limit: usize) -> Result<u32, FrameError> {
    match u32::try_from(length) {
        Ok(0) => Err(FrameError::Empty),
        Ok(wire) if length <= limit => Ok(wire),
        _ => Err(FrameError::TooLarge { length, limit }),
    }
}

/// Cuts frames out of a read buffer.
///
/// The decoder keeps no partial frame of its own: all state is the caller's buffer, so a read that is given up at any
/// byte loses nothing.
#[derive(Debug, Clone)]
pub struct FrameDecoder {
    max_frame: usize,
}

impl FrameDecoder {
    /// A decoder of frames whose bodies have at most `max_frame` bytes.
    pub fn new(max_frame: usize) -> Self {
        Self { max_frame }
    }

    /// Changes the limit, in bytes, for every frame that is not yet decoded.
    pub fn set_max_frame(&mut self, max_frame: usize) {
        self.max_frame = max_frame;
    }

    /// The limit on a frame's body, in bytes.
    pub fn max_frame(&self) -> usize {
        self.max_frame
    }

    /// Takes the first frame's body out of `buffer`, as a slice of it, or `None` while it is incomplete.
    ///
    /// # Errors
    /// The length is refused as soon as its four bytes are there, and `buffer` is left as it was: under a limit that
    /// was raised meanwhile, the same bytes may decode.
    pub fn decode(&mut self, buffer: &mut BytesMut) -> Result<Option<Bytes>, FrameError> {
        let Some(length) = self.announced(buffer)? else { return Ok(None) };
        let Some(whole) = length.checked_add(LENGTH_BYTES).filter(|whole| *whole <= buffer.len()) else {
            return Ok(None);
        };
        let mut frame = buffer.split_to(whole).freeze();
        frame.advance(LENGTH_BYTES);
        Ok(Some(frame))
    }

    /// How many bytes to reserve beyond those in `buffer` to receive the rest of the frame that it starts with; 0 if
    /// that frame's length is unknown yet or refused.
    ///
    /// Never more than what is missing of a length that was checked, and for large frames never more than the peer
    /// has sent already: memory follows what was received, not what was announced.
    pub fn reserve_hint(&self, buffer: &BytesMut) -> usize {
        let Ok(Some(length)) = self.announced(buffer) else { return 0 };
        let missing = length.saturating_add(LENGTH_BYTES).saturating_sub(buffer.len());
        missing.min(buffer.len().max(RESERVE_AT_ONCE))
    }

    /// The checked length of the frame that `buffer` starts with.
    fn announced(&self, buffer: &[u8]) -> Result<Option<usize>, FrameError> {
        let Some(prefix) = buffer.first_chunk::<LENGTH_BYTES>() else { return Ok(None) };
        // On a 16-bit machine the length may not fit; the largest usize is then above any limit that can be met.
        let length = usize::try_from(u32::from_le_bytes(*prefix)).unwrap_or(usize::MAX);
        check_length(length, self.max_frame)?;
        Ok(Some(length))
    }
}

/// An outgoing frame. Its wire form is `length`, `head`, `payload`.
#[derive(Debug, Clone)]
pub struct Transmit {
    /// Where it goes. Ignored by conduits with one lane.
    pub lane: Lane,
    /// The kind byte and the encoded header. Nearly every header fits the 64 bytes inline.
    pub head: SmallVec<[u8; 64]>,
    /// What follows the header, uncopied.
    pub payload: Bytes,
}

impl Transmit {
    /// Length of the body, in bytes: head and payload, without the length prefix.
    pub fn len(&self) -> usize {
        self.head.len().saturating_add(self.payload.len())
    }

    /// Whether the body is empty, which no frame on the wire may be.
    pub fn is_empty(&self) -> bool {
        self.head.is_empty() && self.payload.is_empty()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use bytes::BufMut;
    use proptest::prelude::*;

    use super::*;

    fn wire(frames: &[Vec<u8>]) -> Vec<u8> {
        let mut wire = Vec::new();
        for frame in frames {
            wire.put_u32_le(u32::try_from(frame.len()).unwrap());
            wire.put_slice(frame);
        }
        wire
    }

    #[test]
    fn preface_is_ok_only_when_whole() {
        for end in 0..PREFACE.len() {
            assert_eq!(check_preface(PREFACE.get(..end).unwrap()), PrefaceCheck::NeedMore);
        }
        assert_eq!(check_preface(&PREFACE), PrefaceCheck::Ok);
        assert_eq!(check_preface(b"TOLLWAY\x01GET / HTTP/1.1"), PrefaceCheck::Ok);
    }

    #[test]
    fn strangers_are_told_apart_at_the_first_byte_that_differs() {
        let cases: [(&[u8], Stranger); 14] = [
            (b"G", Stranger::Http),
            (b"GET / HTTP/1.1\r\n", Stranger::Http),
            (b"POST /x", Stranger::Http),
            (b"TR", Stranger::Http),
            (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Stranger::Http),
            (b"HTTP/1.1 400 Bad Request", Stranger::Http),
            (&[0x16], Stranger::Tls),
            (&[0x16, 0x03, 0x01, 0x02, 0x00], Stranger::Tls),
            (&[0x15, 0x03, 0x03, 0x00, 0x02, 0x02, 0x0a], Stranger::Tls),
            (&[0x16, 0x04], Stranger::Unknown),
            (b"TOLLWAY\x02", Stranger::OtherGeneration(2)),
            (b"TOLLGATE", Stranger::Unknown),
            (b"SSH-2.0-x", Stranger::Unknown),
            (b"GETTING", Stranger::Unknown),
        ];
        for (bytes, stranger) in cases {
            assert_eq!(check_preface(bytes), PrefaceCheck::Stranger(stranger), "{bytes:?}");
        }
    }

    #[test]
    fn http_reply_states_its_true_length() {
        let reply = core::str::from_utf8(Stranger::Http.reply()).unwrap();
        let (headers, body) = reply.split_once("\r\n\r\n").unwrap();
        assert!(headers.starts_with("HTTP/1.1 400 Bad Request\r\n"));
        assert!(headers.contains("\r\nConnection: close\r\n"));
        let length = headers.split("Content-Length: ").nth(1).unwrap();
        assert_eq!(length.parse::<usize>().unwrap(), body.len());
        assert!(body.contains("Tollway"));
    }

    #[test]
    fn every_stranger_is_told_what_to_do() {
        for stranger in [Stranger::Http, Stranger::Tls, Stranger::OtherGeneration(9), Stranger::Unknown] {
            assert!(stranger.to_string().contains(": "), "{stranger}");
        }
        assert!(Stranger::OtherGeneration(9).to_string().contains("generation 9"));
    }

    #[test]
    fn length_at_the_limit_passes_and_one_over_is_refused_without_allocation() {
        let mut decoder = FrameDecoder::new(16);
        let mut buffer = BytesMut::from(wire(&[vec![7; 16]]).as_slice());
        assert_eq!(decoder.decode(&mut buffer), Ok(Some(Bytes::from(vec![7; 16]))));

        for length in [17, u32::MAX] {
            let mut buffer = BytesMut::from(length.to_le_bytes().as_slice());
            let capacity = buffer.capacity();
            let length = usize::try_from(length).unwrap();
            assert_eq!(decoder.decode(&mut buffer), Err(FrameError::TooLarge { length, limit: 16 }));
            assert_eq!(decoder.reserve_hint(&buffer), 0);
            assert_eq!(buffer.capacity(), capacity);
        }
    }

    #[test]
    fn empty_frame_is_refused() {
        let mut buffer = BytesMut::from([0; 4].as_slice());
        assert_eq!(FrameDecoder::new(16).decode(&mut buffer), Err(FrameError::Empty));
    }

    #[test]
    fn raised_limit_accepts_the_length_that_was_refused() {
        let mut decoder = FrameDecoder::new(1);
        let mut buffer = BytesMut::from(wire(&[vec![1, 2]]).as_slice());
        assert!(decoder.decode(&mut buffer).is_err());
        decoder.set_max_frame(2);
        assert_eq!(decoder.decode(&mut buffer), Ok(Some(Bytes::from_static(&[1, 2]))));
    }

    #[test]
    fn frames_are_slices_of_the_buffer() {
        let mut buffer = BytesMut::from(wire(&[vec![1; 100], vec![2; 100]]).as_slice());
        let start = buffer.as_ptr().addr();
        let mut decoder = FrameDecoder::new(100);
        let first = decoder.decode(&mut buffer).unwrap().unwrap();
        let second = decoder.decode(&mut buffer).unwrap().unwrap();
        assert_eq!((first.as_ptr().addr() - start, second.as_ptr().addr() - start), (4, 108));
    }

    #[test]
    fn reservation_follows_what_was_received() {
        let limit = 64 * 1024 * 1024;
        let decoder = FrameDecoder::new(limit);
        let mut buffer = BytesMut::from(100_u32.to_le_bytes().as_slice());
        assert_eq!(decoder.reserve_hint(&buffer), 100);
        buffer.put_bytes(0, 99);
        assert_eq!(decoder.reserve_hint(&buffer), 1);

        let mut buffer = BytesMut::from(u32::try_from(limit).unwrap().to_le_bytes().as_slice());
        assert_eq!(decoder.reserve_hint(&buffer), RESERVE_AT_ONCE);
        buffer.put_bytes(0, 3 * RESERVE_AT_ONCE);
        assert_eq!(decoder.reserve_hint(&buffer), buffer.len());
    }

    proptest! {
        /// `[session.frame.length]`
        #[test]
        fn any_fragmentation_gives_the_same_frames(
            frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..200), 0..20),
            cuts in prop::collection::vec(1_usize..300, 0..60),
        ) {
            let wire = wire(&frames);
            let mut decoder = FrameDecoder::new(200);
            let mut buffer = BytesMut::new();
            let mut received = Vec::new();
            let mut rest = wire.as_slice();
            let mut cuts = cuts.into_iter();
            while !rest.is_empty() {
                let (now, later) = rest.split_at(cuts.next().unwrap_or(1).min(rest.len()));
                buffer.extend_from_slice(now);
                rest = later;
                while let Some(frame) = decoder.decode(&mut buffer).unwrap() {
                    received.push(frame.to_vec());
                }
                prop_assert!(decoder.reserve_hint(&buffer) <= 204);
            }
            prop_assert!(buffer.is_empty());
            prop_assert_eq!(received, frames);
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400), limit in 0_usize..300) {
            check_preface(&bytes);
            let mut decoder = FrameDecoder::new(limit);
            let mut buffer = BytesMut::from(bytes.as_slice());
            while let Ok(Some(frame)) = decoder.decode(&mut buffer) {
                prop_assert!(!frame.is_empty() && frame.len() <= limit);
            }
        }
    }
}

//! Heads of requests and responses that are *plain*: no metadata, no streams, on one connection among many calls. Nearly
//! all are, and reading and writing them field by field by hand costs a quarter of what serde's machinery does.
//!
//! The bytes are the same either way, and whatever is not plain, or not written in the shortest form, goes the general way
//! of [`message`](crate::message): this module refuses nothing and knows no errors.

use bytes::{Buf, Bytes};

use crate::error::Violation;
use crate::id::{CallId, ConnectionId};
use crate::message::{Head, Header, Request, Response, Status, decode_header, encode_head};
use crate::metadata::Metadata;
use crate::payment::Amount;

/// Bytes of the longest plain head: kind, three varints of ten bytes, a method and three single bytes; one more than that.
const LONGEST: usize = 64;

/// The bytes of a head that is being written.
struct Writer {
    bytes: [u8; LONGEST],
    len: usize,
}

impl Writer {
    fn new(kind: u8) -> Self {
        let mut bytes = [0; LONGEST];
        bytes[0] = kind;
        Writer { bytes, len: 1 }
    }

    /// There is room: what is written is bounded by [`LONGEST`].
    #[inline]
    fn byte(&mut self, byte: u8) {
        if let Some(place) = self.bytes.get_mut(self.len) {
            *place = byte;
            self.len = self.len.saturating_add(1);
        }
    }

    #[inline]
    fn fixed(&mut self, value: u64) {
        let bytes = value.to_le_bytes();
        let end = self.len.saturating_add(bytes.len());
        if let Some(place) = self.bytes.get_mut(self.len..end) {
            place.copy_from_slice(&bytes);
            self.len = end;
        }
    }

    #[inline]
    fn varint(&mut self, mut value: u64) {
        while value > 0x7f {
            self.byte((value & 0x7f) as u8 | 0x80);
            value >>= 7;
        }
        self.byte(value as u8);
    }

    fn finish(self) -> Head {
        let mut head = Head::from_buf(self.bytes);
        head.truncate(self.len);
        head
    }
}

/// What is left of a frame whose head is being read.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    #[inline]
    fn byte(&mut self) -> Option<u8> {
        let (&byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(byte)
    }

    /// A byte that is zero: an empty list, or an option without a value.
    #[inline]
    fn nothing(&mut self) -> Option<()> {
        (self.byte()? == 0).then_some(())
    }

    /// A varint of at most 63 bits, in its shortest form.
    #[inline]
    fn varint(&mut self) -> Option<u64> {
        let (mut value, mut shift) = (0u64, 0u32);
        while shift < 63 {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return (byte != 0 || shift == 0).then_some(value);
            }
            shift = shift.saturating_add(7);
        }
        None
    }

    #[inline]
    fn fixed(&mut self) -> Option<u64> {
        let (bytes, rest) = self.0.split_first_chunk::<8>()?;
        self.0 = rest;
        Some(u64::from_le_bytes(*bytes))
    }
}

/// [`encode_head`], with less work for plain ones.
pub(crate) fn encode_request(request: &Request) -> Head {
    if !request.metadata.is_empty() || !request.slots.is_empty() {
        return encode_head(request);
    }
    let mut head = Writer::new(Request::KIND);
    head.varint(request.connection.0);
    head.varint(request.call.0);
    head.fixed(request.method);
    match request.deadline_us {
        None => head.byte(0),
        Some(left) => {
            head.byte(1);
            head.varint(left);
        }
    }
    // No metadata, no slots.
    head.byte(0);
    head.byte(0);
    head.finish()
}

/// [`encode_head`], with less work for plain ones.
pub(crate) fn encode_response(response: &Response) -> Head {
    let charged = u64::try_from(response.charged.units());
    let (Ok(charged), true) = (charged, response.metadata.is_empty() && response.slots.is_empty()) else {
        return encode_head(response);
    };
    let mut head = Writer::new(Response::KIND);
    head.varint(response.connection.0);
    head.varint(response.call.0);
    // In postcard the number of a variant.
    head.byte(response.status as u8);
    head.varint(charged);
    head.byte(0);
    head.byte(0);
    head.finish()
}

/// [`decode_header`], with less work for plain ones.
pub(crate) fn decode_request(frame: &mut Bytes) -> Result<Request, Violation> {
    match read_request(frame.get(1..).unwrap_or_default()) {
        Some((request, left)) => {
            frame.advance(frame.len().saturating_sub(left));
            Ok(request)
        }
        None => decode_header(frame),
    }
}

/// A plain request, and how many bytes follow it.
fn read_request(body: &[u8]) -> Option<(Request, usize)> {
    let mut head = Reader(body);
    let (connection, call) = (ConnectionId(head.varint()?), CallId(head.varint()?));
    let method = head.fixed()?;
    let deadline_us = match head.byte()? {
        0 => None,
        1 => Some(head.varint()?),
        _ => return None,
    };
    head.nothing()?;
    head.nothing()?;
    let request = Request { connection, call, method, deadline_us, metadata: Metadata::new(), slots: Vec::new() };
    Some((request, head.0.len()))
}

/// [`decode_header`], with less work for plain ones.
pub(crate) fn decode_response(frame: &mut Bytes) -> Result<Response, Violation> {
    match read_response(frame.get(1..).unwrap_or_default()) {
        Some((response, left)) => {
            frame.advance(frame.len().saturating_sub(left));
            Ok(response)
        }
        None => decode_header(frame),
    }
}

/// A plain response with a result or an error of the method's, and how many bytes follow it.
fn read_response(body: &[u8]) -> Option<(Response, usize)> {
    let mut head = Reader(body);
    let (connection, call) = (ConnectionId(head.varint()?), CallId(head.varint()?));
    let status = match head.byte()? {
        0 => Status::Ok,
        1 => Status::AppError,
        _ => return None,
    };
    let charged = Amount::new(u128::from(head.varint()?));
    head.nothing()?;
    head.nothing()?;
    let response = Response { connection, call, status, charged, metadata: Metadata::new(), slots: Vec::new() };
    Some((response, head.0.len()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::id::StreamId;
    use crate::message::{Flow, Slot};

    /// Numbers of every length.
    fn number() -> impl Strategy<Value = u64> {
        (any::<u64>(), 0u32..64).prop_map(|(value, shift)| value >> shift)
    }

    fn extras(which: u8) -> (Metadata, Vec<Slot>) {
        let metadata = if which & 1 != 0 { Metadata::new().with("k", "v") } else { Metadata::new() };
        let slot = Slot { stream: StreamId(3), flow: Flow::ToPeer };
        (metadata, if which & 2 != 0 { vec![slot] } else { vec![] })
    }

    fn framed(head: &[u8]) -> Bytes {
        Bytes::from([head, b"payload"].concat())
    }

    proptest! {
        #[test]
        fn a_request_is_written_and_read_as_by_serde(
            connection in number(), call in number(), method in any::<u64>(), left in prop::option::of(number()),
            which in prop_oneof![4 => Just(0u8), 1 => 1u8..4],
        ) {
            let (metadata, slots) = extras(which);
            let (connection, call) = (ConnectionId(connection), CallId(call));
            let request = Request { connection, call, method, deadline_us: left, metadata, slots };
            let head = encode_request(&request);
            prop_assert_eq!(&head, &encode_head(&request));
            let mut frame = framed(&head);
            prop_assert_eq!(decode_request(&mut frame), Ok(request));
            prop_assert_eq!(&frame[..], b"payload");
        }

        #[test]
        fn a_response_is_written_and_read_as_by_serde(
            connection in number(), call in number(), charged in any::<u128>(), shift in 0u32..128, status in 0usize..3,
            which in prop_oneof![4 => Just(0u8), 1 => 1u8..4],
        ) {
            let (metadata, slots) = extras(which);
            let (connection, call, charged) = (ConnectionId(connection), CallId(call), Amount::new(charged >> shift));
            let status = [Status::Ok, Status::AppError, Status::Refused][status];
            let response = Response { connection, call, status, charged, metadata, slots };
            let head = encode_response(&response);
            prop_assert_eq!(&head, &encode_head(&response));
            let mut frame = framed(&head);
            prop_assert_eq!(decode_response(&mut frame), Ok(response));
            prop_assert_eq!(&frame[..], b"payload");
        }

        #[test]
        fn whatever_comes_means_what_serde_says_that_it_means(bytes in prop::collection::vec(0u8..4, 0..24), high in any::<u8>()) {
            // Small bytes are often a head, and one with its high bit set among them makes odd varints.
            let mut bytes = bytes;
            if let Some(byte) = bytes.get_mut(usize::from(high) % 24) {
                *byte |= 0x80;
            }
            let frame = |kind: u8| Bytes::from([&[kind][..], &bytes].concat());
            let (mut ours, mut serdes) = (frame(Request::KIND), frame(Request::KIND));
            prop_assert_eq!(decode_request(&mut ours), decode_header(&mut serdes));
            prop_assert_eq!(ours, serdes);
            let (mut ours, mut serdes) = (frame(Response::KIND), frame(Response::KIND));
            prop_assert_eq!(decode_response(&mut ours), decode_header(&mut serdes));
            prop_assert_eq!(ours, serdes);
        }
    }

    #[test]
    fn the_longest_plain_heads_fit() {
        let (connection, call) = (ConnectionId(u64::MAX), CallId(u64::MAX));
        let (metadata, slots) = extras(0);
        let request = Request { connection, call, method: u64::MAX, deadline_us: Some(u64::MAX), metadata, slots };
        assert_eq!(encode_request(&request), encode_head(&request));
        let (metadata, slots) = extras(0);
        let charged = Amount::new(u128::from(u64::MAX));
        let response = Response { connection, call, status: Status::Refused, charged, metadata, slots };
        assert_eq!(encode_response(&response), encode_head(&response));
    }
}

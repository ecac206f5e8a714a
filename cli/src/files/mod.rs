//! The file service: `tollway.files`, one method.
//!
//! `get(name) -> { size, chunks }` answers with the size of the file and a stream of its bytes. A fetch is one call, so
//! that its price is rounded once. The stream's items are chunks of [`CHUNK`] bytes, the last one shorter: whoever knows
//! the size and the price knows what the whole file costs before it comes.

mod receive;
mod serve;
mod shelf;
mod sink;

pub(crate) use receive::{Incoming, Received, TransferError, request};
pub(crate) use serve::FileService;
pub(crate) use shelf::Shelf;
pub(crate) use sink::{Hashing, Sink, SinkError, check_target};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tollway::rpc::{CallContext, MethodId, Rx, ServiceClient};
use tollway_protocol::payment::{MethodPrice, Price, Usage};

/// The service's name.
pub(crate) const SERVICE: &str = FilesClient::NAME;
/// The service's only method.
const METHOD: &str = "get";
/// Bytes in each chunk but the last: enough that a frame's cost disappears, a sixteenth of what may be on its way.
pub(crate) const CHUNK: usize = 64 * 1024;
/// The longest name: that of the longest path on common systems, in bytes.
const MAX_NAME: usize = 4096;

/// Codes with which a stream of chunks breaks off. `[session.code.space]`
mod code {
    /// The file could not be read further.
    pub(super) const UNREADABLE: u32 = 1024;
    /// The file became shorter than its announced size.
    pub(super) const SHRUNK: u32 = 1025;
}

#[tollway::service(name = "tollway.files")]
pub(crate) trait Files {
    /// A file by its name.
    async fn get(&self, cx: &CallContext, name: String) -> Result<FileReply, FileError>;
}

/// The answer to `get`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct FileReply {
    /// The file's size in bytes. So many come, or the stream breaks off.
    size: u64,
    /// The file's bytes.
    chunks: Rx<Bytes>,
}

/// Why a file is not served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub(crate) enum FileError {
    /// There is no such file.
    #[error("there is no such file")]
    NotFound,
    /// The name leads out of what is served.
    #[error("the name leads out of the directory that is served")]
    Forbidden,
    /// The name is empty, too long, or has a NUL in it.
    #[error("the name is empty, too long, or not a file name")]
    InvalidName,
    /// It is a directory, a device or something else that has no size.
    #[error("it is not a regular file")]
    NotAFile,
    /// The payee cannot read it.
    #[error("the payee cannot read it")]
    Unreadable,
}

/// The id of `get`.
pub(crate) fn method() -> MethodId {
    MethodId::of(SERVICE, FilesClient::VERSION, METHOD)
}

/// The price list of a file service with this price for a fetch.
pub(crate) fn prices(price: Price) -> Vec<MethodPrice> {
    let max_item_bytes = item_bytes(CHUNK);
    vec![MethodPrice {
        method_id: method().0,
        name: METHOD.to_owned(),
        price,
        max_item_bytes,
        max_answer_bytes: reply_bytes(u64::MAX),
    }]
}

/// What a whole fetch is metered as: payload bytes as framed, with the few that the encoding adds.
pub(crate) fn usage(name: &str, size: u64) -> Usage {
    let chunk = CHUNK as u64;
    let (whole, last) = (size / chunk, size % chunk);
    let mut bytes_out = reply_bytes(size) + whole * item_bytes(CHUNK);
    if last > 0 {
        bytes_out += last + varint_bytes(last);
    }
    Usage {
        items: whole + u64::from(last > 0),
        bytes_out,
        bytes_in: name.len() as u64 + varint_bytes(name.len() as u64),
    }
}

/// The answer's payload: the size and the number of the stream's slot, which is 0.
fn reply_bytes(size: u64) -> u64 {
    varint_bytes(size) + 1
}

/// A chunk as an item: its length and its bytes.
fn item_bytes(chunk: usize) -> u64 {
    varint_bytes(chunk as u64) + chunk as u64
}

/// The length of a number in the encoding: seven bits to a byte.
fn varint_bytes(number: u64) -> u64 {
    u64::from((u64::BITS - number.leading_zeros()).div_ceil(7).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn varints_grow_every_seven_bits() {
        for (number, bytes) in [(0, 1), (127, 1), (128, 2), (16_383, 2), (16_384, 3), (65_536, 3), (u64::MAX, 10)] {
            assert_eq!(varint_bytes(number), bytes, "{number}");
        }
    }

    #[test]
    fn usage_counts_each_chunk_with_its_length() {
        let empty = usage("a", 0);
        assert_eq!((empty.items, empty.bytes_out, empty.bytes_in), (0, 2, 2));
        let one_and_a_bit = usage("abc", CHUNK as u64 + 1);
        assert_eq!(one_and_a_bit.items, 2);
        assert_eq!(one_and_a_bit.bytes_out, (3 + 1) + (65_536 + 3) + (1 + 1));
    }
}

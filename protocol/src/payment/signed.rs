//! Objects that travel as opaque signed bytes: verify first, then decode strictly.
//!
//! The signature is over the hash of the bytes as they came, so nothing of an unverified object is ever interpreted.
//! postcard ignores bytes after the object and takes integers in longer forms than it writes; so the remainder must be
//! empty and the object must encode to the very bytes that were signed. One object has one form.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Bytes that are not the one encoding of an object.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// More bytes than the object may have.
    #[error("{found} bytes are above the limit of {max}")]
    TooLong {
        /// How many bytes there are.
        found: usize,
        /// How many there may be.
        max: usize,
    },
    /// Not an encoding of the object.
    #[error("not decodable: {0}")]
    Postcard(#[from] postcard::Error),
    /// Bytes follow the object.
    #[error("{0} bytes follow the object")]
    Trailing(usize),
    /// A longer encoding of the same object.
    #[error("not the shortest encoding")]
    NotCanonical,
}

/// Encodes an object of at most `max` bytes.
pub(crate) fn encode<T: Serialize>(object: &T, max: usize) -> Result<Vec<u8>, CodecError> {
    let bytes = postcard::to_stdvec(object)?;
    if bytes.len() > max {
        return Err(CodecError::TooLong { found: bytes.len(), max });
    }
    Ok(bytes)
}

/// Decodes the one encoding of an object of at most `max` bytes.
pub(crate) fn decode<T: Serialize + DeserializeOwned>(bytes: &[u8], max: usize) -> Result<T, CodecError> {
    if bytes.len() > max {
        return Err(CodecError::TooLong { found: bytes.len(), max });
    }
    let (object, rest) = postcard::take_from_bytes::<T>(bytes)?;
    if !rest.is_empty() {
        return Err(CodecError::Trailing(rest.len()));
    }
    if postcard::to_stdvec(&object)? != bytes {
        return Err(CodecError::NotCanonical);
    }
    Ok(object)
}

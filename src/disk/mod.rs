//! Files that survive the process: what the durable store, wallet and ledger stand on.
//!
//! A `Disk` is one redb file and one thread that writes it. Changes are handed to the thread through a bounded queue;
//! what has come in while a commit was being written shares the next one, so many channels share one fsync and nobody
//! waits for a timer. A change is answered when it is durable, and not before.
//!
//! After the first failure (a full disk, a broken one) a file takes and shows nothing any more until it is opened again:
//! it is not known what of the last group was written, and what is not known to be durable is not served.
//!
//! All tables are bytes to bytes. A value begins with the number of its format.

mod error;
mod file;
mod writer;

pub use error::DiskError;
pub(crate) use file::{FileKind, for_each_row, format_of, make_file, open_backend, open_file};
pub use redb::StorageBackend;
pub(crate) use writer::{Disk, Effect};

use serde::Serialize;
use serde::de::DeserializeOwned;

/// A table of a file.
pub(crate) type Table = redb::TableDefinition<'static, &'static [u8], &'static [u8]>;

/// The format of the values that this version writes, and the only one that there has been.
pub(crate) const VALUE_FORMAT: u8 = 1;

/// A value as it is stored: its format, then postcard.
pub(crate) fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, DiskError> {
    postcard::to_extend(value, vec![VALUE_FORMAT]).map_err(|error| DiskError::Corrupt(error.to_string()))
}

/// Reads a stored value, all of it.
pub(crate) fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, DiskError> {
    match bytes.split_first() {
        Some((&VALUE_FORMAT, bytes)) => match postcard::take_from_bytes(bytes) {
            Ok((value, [])) => Ok(value),
            Ok(_) => Err(DiskError::Corrupt("bytes follow a value".to_owned())),
            Err(error) => Err(DiskError::Corrupt(error.to_string())),
        },
        Some((&found, _)) => Err(DiskError::OtherFormat { found: u32::from(found), known: u32::from(VALUE_FORMAT) }),
        None => Err(DiskError::Corrupt("an empty value".to_owned())),
    }
}

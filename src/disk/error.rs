//! What can be wrong with a file.

use std::io;
use std::sync::Arc;

/// Why a file of a store, a wallet or a ledger cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum DiskError {
    /// Another process, or another part of this one, has the file open.
    #[error("the file is in use by another process")]
    InUse,
    /// There is no file.
    #[error("there is no such file")]
    Missing,
    /// The file is not one of ours, or has another use.
    #[error("it is {found}, not {expected}")]
    OtherKind {
        /// What was looked for.
        expected: &'static str,
        /// What the file says that it is.
        found: String,
    },
    /// A later version wrote it.
    #[error("it has the format {found}, and this version knows {known}")]
    OtherFormat {
        /// The format in the file.
        found: u32,
        /// The latest format that is known.
        known: u32,
    },
    /// No space is left: nothing is written until there is some and the file is opened again.
    #[error("the disk is full")]
    Full,
    /// Something in the file is not what was written there.
    #[error("the file is damaged: {0}")]
    Corrupt(String),
    /// The system failed to read or write.
    #[error("{0}")]
    Io(#[source] Arc<redb::Error>),
    /// It has failed before. It is unknown what of the last changes is durable, so nothing is read or written until the
    /// file is opened again.
    #[error("the file has failed before and must be opened again: {0}")]
    Failed(#[source] Arc<DiskError>),
}

impl From<redb::Error> for DiskError {
    fn from(error: redb::Error) -> Self {
        match error {
            redb::Error::DatabaseAlreadyOpen | redb::Error::LockProtocolMismatch => DiskError::InUse,
            redb::Error::Corrupted(what) => DiskError::Corrupt(what),
            redb::Error::UpgradeRequired(found) => DiskError::OtherKind {
                expected: "a file of this version",
                found: format!("a database of format {found}"),
            },
            redb::Error::Io(error) if is_full(&error) => DiskError::Full,
            redb::Error::Io(error) if error.kind() == io::ErrorKind::NotFound => DiskError::Missing,
            redb::Error::Io(error) if error.kind() == io::ErrorKind::InvalidData => {
                DiskError::OtherKind { expected: "a database", found: "another kind of file".to_owned() }
            }
            other => DiskError::Io(Arc::new(other)),
        }
    }
}

fn is_full(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

impl From<io::Error> for DiskError {
    fn from(error: io::Error) -> Self {
        redb::Error::Io(error).into()
    }
}

macro_rules! from_redb {
    ($($error:ident),+) => {
        $(impl From<redb::$error> for DiskError {
            fn from(error: redb::$error) -> Self {
                redb::Error::from(error).into()
            }
        })+
    };
}

from_redb!(StorageError, TableError, TransactionError, CommitError, DatabaseError, CompactionError);

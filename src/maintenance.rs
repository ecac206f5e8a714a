//! What an operator does to a file that nobody has open: check it, copy it, and make it small again.

use std::path::Path;

use redb::{Database, ReadableDatabase, TableHandle};

use crate::disk::{DiskError, FileKind, format_of, make_file};
use crate::{escrow, payment, store};

/// Rows that are copied in one transaction, so that a copy of a large file needs little memory.
const COPY_ROWS: usize = 4096;

/// What a file was found to be.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Verified {
    /// What it is for: the store of a payee, the wallet of a payer, or a ledger.
    pub kind: String,
    /// Channels in it.
    pub channels: u64,
    /// Records in it that cannot be read or contradict themselves, each with what is wrong.
    pub broken: Vec<String>,
    /// Whether the pages of the file are sound: `false` when it had to be repaired, as after a crash.
    pub clean: bool,
}

fn open_any(path: &Path) -> Result<(Database, FileKind), DiskError> {
    if !path.exists() {
        return Err(DiskError::Missing);
    }
    let database = Database::open(path)?;
    let found = format_of(&database)?.map_or_else(|| "a database of something else".to_owned(), |(kind, _)| kind);
    let kind = FileKind::ALL.into_iter().find(|kind| kind.name() == found);
    let kind = kind.ok_or(DiskError::OtherKind { expected: "a store, a wallet or a ledger", found })?;
    Ok((database, kind))
}

/// Checks every page of a file by its checksum, and every record in it.
///
/// # Errors
/// When it is not there, in use, or not one of ours. What is broken in it is no error but a result.
pub fn verify(path: &Path) -> Result<Verified, DiskError> {
    let (mut database, kind) = open_any(path)?;
    let clean = database.check_integrity()?;
    let mut broken = Vec::new();
    let channels = match kind {
        FileKind::Payee => store::verify_file(&database, &mut broken)?,
        FileKind::Wallet => payment::verify_file(&database, &mut broken)?,
        FileKind::Ledger => escrow::verify_file(&database, &mut broken)?,
    };
    Ok(Verified { kind: kind.name().to_owned(), channels, broken, clean })
}

/// Copies a file to a new one, which is whole or absent, and has no dead pages. Returns its size in bytes.
///
/// A copy is for a disk that broke. Of a payee's store or a wallet never use one that is older than what it replaces has
/// signed or accepted since: it forgets what is owed.
///
/// # Errors
/// When the file cannot be read, or there is something at `to` already.
pub fn backup(from: &Path, to: &Path) -> Result<u64, DiskError> {
    if to.exists() {
        return Err(std::io::Error::from(std::io::ErrorKind::AlreadyExists).into());
    }
    let (database, _) = open_any(from)?;
    make_file(to, |copy| copy_tables(&database, copy))?;
    Ok(std::fs::metadata(to)?.len())
}

fn copy_tables(from: &Database, to: &Database) -> Result<(), DiskError> {
    let source = from.begin_read()?;
    let names: Vec<String> = source.list_tables()?.map(|table| table.name().to_owned()).collect();
    for name in &names {
        let definition = redb::TableDefinition::<&[u8], &[u8]>::new(name);
        let mut rows = source.open_table(definition)?.range::<&[u8]>(..)?.peekable();
        while rows.peek().is_some() {
            let transaction = to.begin_write()?;
            {
                let mut target = transaction.open_table(definition)?;
                for row in rows.by_ref().take(COPY_ROWS) {
                    let (key, value) = row?;
                    target.insert(key.value(), value.value())?;
                }
            }
            transaction.commit()?;
        }
    }
    Ok(())
}

/// Gives the pages of a file that hold nothing back to the file system. Returns the sizes before and after, in bytes.
///
/// # Errors
/// When the file cannot be opened or written.
pub fn compact(path: &Path) -> Result<(u64, u64), DiskError> {
    let before = std::fs::metadata(path)?.len();
    let (mut database, _) = open_any(path)?;
    while database.compact()? {}
    database.close()?;
    Ok((before, std::fs::metadata(path)?.len()))
}

//! The ledger in a file: what an order has changed is durable before the order is answered.
//!
//! The books are in memory, and each row that changes is written. Orders are carried out on the file's thread, one after
//! the other, and those that have come in meanwhile share a commit; reads go the same way, so that nobody learns of what a
//! crash could take back. If the disk fails, memory may be ahead of it, so nothing is answered any more.

use std::path::Path;

use redb::{Database, WriteTransaction};
use serde::de::DeserializeOwned;
use tollway_protocol::payment::ledger_messages::LedgerIdentity;
use tollway_protocol::payment::{Address, ChannelId};

use super::ledger::{Content, Entry, Row};
use super::{EscrowError, EscrowRefusal, Ledger, LedgerConfig, LedgerImbalance};
use crate::disk::{self, Disk, DiskError, Effect, FileKind, StorageBackend, Table, for_each_row};

const IDENTITY: Table = Table::new("identity");
const BALANCES: Table = Table::new("balances");
const FUNDED: Table = Table::new("funded");
const LAST_ORDERS: Table = Table::new("last-orders");
const CHANNELS: Table = Table::new("channels");

/// Why a ledger's file cannot be used.
#[derive(Debug, Clone, thiserror::Error)]
#[non_exhaustive]
pub enum LedgerFileError {
    /// The file cannot be read or written.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// It is the ledger of another key: what was signed for it says nothing here.
    #[error("it is the ledger {found}, not {expected}")]
    OtherLedger {
        /// Whose key was given.
        expected: Address,
        /// Whose ledger it is.
        found: Address,
    },
    /// Its books do not balance, so they are not those that were written.
    #[error(transparent)]
    Imbalance(#[from] LedgerImbalance),
}

/// The file of a ledger.
#[derive(Debug)]
pub(super) struct LedgerFile {
    disk: Disk,
}

impl LedgerFile {
    pub(super) fn open(
        path: &Path,
        identity: LedgerIdentity,
        config: LedgerConfig,
    ) -> Result<(Ledger, Self), LedgerFileError> {
        Self::start(disk::open_file(path, FileKind::Ledger, true)?, identity, config)
    }

    pub(super) fn on(
        backend: impl StorageBackend,
        identity: LedgerIdentity,
        config: LedgerConfig,
    ) -> Result<(Ledger, Self), LedgerFileError> {
        Self::start(disk::open_backend(backend, FileKind::Ledger)?, identity, config)
    }

    fn start(
        database: Database,
        identity: LedgerIdentity,
        config: LedgerConfig,
    ) -> Result<(Ledger, Self), LedgerFileError> {
        match stored_identity(&database)? {
            None => claim(&database, identity)?,
            Some(found) if found == identity => {}
            Some(found) => {
                return Err(LedgerFileError::OtherLedger { expected: identity.escrow, found: found.escrow });
            }
        }
        let ledger = load(&database, identity, config)?;
        ledger.conservation()?;
        Ok((ledger, LedgerFile { disk: Disk::start(database, "tollway-ledger")? }))
    }

    /// Carries an order out on the file's thread and answers when what it has changed is durable.
    pub(super) async fn write<T: Send + 'static>(
        &self,
        act: impl FnOnce() -> (Result<T, EscrowRefusal>, Vec<(Row, Content)>) + Send + 'static,
    ) -> Result<Result<T, EscrowRefusal>, EscrowError> {
        let write = move |transaction: &WriteTransaction| {
            let (result, rows) = act();
            let effect = if rows.is_empty() { Effect::Nothing } else { Effect::Written };
            for (row, content) in rows {
                put(transaction, row, &content)?;
            }
            Ok((result, effect))
        };
        self.disk.write(write, |_| {}).await.map_err(|error| EscrowError::Unavailable(Box::new(error)))
    }
}

fn put(transaction: &WriteTransaction, row: Row, content: &Content) -> Result<(), DiskError> {
    let (table, key) = place(row);
    let value = match content {
        Content::Amount(amount) => disk::encode(amount)?,
        Content::LastOrder(last) => disk::encode(last)?,
        Content::Entry(entry) => disk::encode(&**entry)?,
    };
    transaction.open_table(table)?.insert(key.as_slice(), value.as_slice())?;
    Ok(())
}

fn place(row: Row) -> (Table, Vec<u8>) {
    match row {
        Row::Balance(holder, token) => (BALANCES, [holder.0, token.0].concat()),
        Row::Funded(token) => (FUNDED, token.0.to_vec()),
        Row::LastOrder(giver) => (LAST_ORDERS, giver.0.to_vec()),
        Row::Channel(id) => (CHANNELS, id.0.to_vec()),
    }
}

fn stored_identity(database: &Database) -> Result<Option<LedgerIdentity>, DiskError> {
    let mut found = None;
    for_each_row(database, IDENTITY, |_, row| disk::decode(row).map(|identity| found = Some(identity)))?;
    Ok(found)
}

/// A new file is this ledger's from now on.
fn claim(database: &Database, identity: LedgerIdentity) -> Result<(), DiskError> {
    let transaction = database.begin_write()?;
    transaction.open_table(IDENTITY)?.insert([].as_slice(), disk::encode(&identity)?.as_slice())?;
    Ok(transaction.commit()?)
}

fn load(database: &Database, identity: LedgerIdentity, config: LedgerConfig) -> Result<Ledger, DiskError> {
    let mut ledger = Ledger::new(identity, config);
    let address = |key: &[u8]| key.try_into().map(Address).map_err(|_| bad_key());
    rows(database, BALANCES, &mut ledger, Content::Amount, |key| match key.split_at_checked(20) {
        Some((holder, token)) => Ok(Row::Balance(address(holder)?, address(token)?)),
        None => Err(bad_key()),
    })?;
    rows(database, FUNDED, &mut ledger, Content::Amount, |key| address(key).map(Row::Funded))?;
    rows(database, LAST_ORDERS, &mut ledger, Content::LastOrder, |key| address(key).map(Row::LastOrder))?;
    rows(
        database,
        CHANNELS,
        &mut ledger,
        |entry: Entry| Content::Entry(Box::new(entry)),
        |key| key.try_into().map(|id| Row::Channel(ChannelId(id))).map_err(|_| bad_key()),
    )?;
    Ok(ledger)
}

fn bad_key() -> DiskError {
    DiskError::Corrupt("a key of the ledger has another length".to_owned())
}

fn rows<T: DeserializeOwned>(
    database: &Database,
    table: Table,
    ledger: &mut Ledger,
    content: impl Fn(T) -> Content,
    row: impl Fn(&[u8]) -> Result<Row, DiskError>,
) -> Result<(), DiskError> {
    for_each_row(database, table, |key, value| {
        let restored = ledger.restore(row(key)?, content(disk::decode(value)?));
        restored.map_err(|(row, _)| DiskError::Corrupt(format!("what is stored for {row:?} is another row's")))
    })
}

/// Checks every row of a file, and that its books balance. Returns how many channels there are.
pub(crate) fn verify_file(database: &Database, broken: &mut Vec<String>) -> Result<u64, DiskError> {
    let Some(identity) = stored_identity(database)? else {
        broken.push("the ledger has no identity".to_owned());
        return Ok(0);
    };
    let ledger = match load(database, identity, LedgerConfig::default()) {
        Ok(ledger) => ledger,
        Err(error @ (DiskError::Corrupt(_) | DiskError::OtherFormat { .. })) => {
            broken.push(error.to_string());
            return Ok(0);
        }
        Err(error) => return Err(error),
    };
    if let Err(imbalance) = ledger.conservation() {
        broken.push(imbalance.to_string());
    }
    Ok(u64::try_from(ledger.channel_count()).unwrap_or(u64::MAX))
}

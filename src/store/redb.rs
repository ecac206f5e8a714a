//! A store in a file of the embedded database redb: what was answered survives the process, the kernel and the power.

use std::collections::HashMap;
use std::fmt;
use std::ops::Bound;
use std::path::Path;
use std::sync::Arc;

use parking_lot::Mutex;
use redb::{ReadableTable, ReadableTableMetadata, WriteTransaction};
use tollway_protocol::payment::{ChannelId, Hash};

use super::{ChannelRecord, ChannelStore, ChannelWatch, KeptAnswer, StoreError, Watchers, check_evict, check_update};
use crate::disk::{self, Disk, DiskError, Effect, FileKind, StorageBackend, Table, for_each_row};
use crate::future::BoxFuture;
use crate::payment::{ANSWER_AGE, MAX_KEYS, now_ms};

/// Records by channel id.
const CHANNELS: Table = Table::new("channels");
/// What became of calls with an idempotency key, by the hash that names them.
const ANSWERS: Table = Table::new("answers");
/// One row: the last version that was given to a record, over the whole store.
const LAST_VERSION: Table = Table::new("last-version");

/// Records that are kept in memory as they were last written, so that whoever serves a channel reads it without a disk.
/// At about 1.5 KiB each, this is 6 MiB; beyond it the file's own cache answers.
const KEPT_RECORDS: usize = 4096;

/// Channels in a file. Only one process can have it open.
///
/// Updates of many channels share one commit and one fsync. If the disk is full or fails, every call fails from then on
/// with [`StoreError::Backend`], whose source is a [`DiskError`]; a payee serves nothing more, and goes on from what is
/// durable when the file has been opened again.
///
/// Dropping it waits for what is being written, at most one commit.
pub struct RedbStore {
    disk: Disk,
    kept: Arc<Mutex<Kept>>,
    watchers: Arc<Watchers>,
}

impl fmt::Debug for RedbStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedbStore").finish_non_exhaustive()
    }
}

/// Records as they were last written. Filled and emptied by the file's thread alone, in the order of its commits, so
/// that no read that comes late puts an older one back.
#[derive(Default)]
struct Kept(HashMap<ChannelId, ChannelRecord>);

impl Kept {
    fn keep(&mut self, id: ChannelId, record: ChannelRecord) {
        if self.0.len() >= KEPT_RECORDS && !self.0.contains_key(&id) {
            // Those that are in use come back with their next update.
            self.0.clear();
        }
        self.0.insert(id, record);
    }
}

impl RedbStore {
    /// Opens the store in a file, and makes the file if there is none. After a crash it is brought back to its last
    /// commit, which takes time in proportion to the file.
    ///
    /// # Errors
    /// When another process has it open, it is no payee's store, or it cannot be read or written.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, DiskError> {
        Self::start(disk::open_file(path.as_ref(), FileKind::Payee, true)?)
    }

    /// Opens the store in a file that is there.
    ///
    /// # Errors
    /// As [`RedbStore::open`], and when there is no file.
    pub fn open_existing(path: impl AsRef<Path>) -> Result<Self, DiskError> {
        Self::start(disk::open_file(path.as_ref(), FileKind::Payee, false)?)
    }

    /// Opens the store on a backend of its own kind, which may be empty.
    ///
    /// # Errors
    /// When the backend fails, or has something else on it.
    pub fn on(backend: impl StorageBackend) -> Result<Self, DiskError> {
        Self::start(disk::open_backend(backend, FileKind::Payee)?)
    }

    fn start(database: redb::Database) -> Result<Self, DiskError> {
        let disk = Disk::start(database, "tollway-store")?;
        Ok(RedbStore { disk, kept: Arc::default(), watchers: Arc::default() })
    }

    /// The record as the last commit has it.
    async fn find(&self, id: ChannelId) -> Result<Option<ChannelRecord>, DiskError> {
        self.disk.check()?;
        if let Some(record) = self.kept.lock().0.get(&id) {
            return Ok(Some(record.clone()));
        }
        let read = move |transaction: &redb::ReadTransaction| match transaction.open_table(CHANNELS) {
            Ok(channels) => {
                let row = channels.get(id.0.as_slice())?;
                row.map(|row| disk::decode(row.value())).transpose()
            }
            Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
            Err(error) => Err(error.into()),
        };
        self.disk.read(read).await
    }

    async fn write(&self, id: ChannelId, expected: Option<u64>, record: ChannelRecord) -> Result<u64, StoreError> {
        let (kept, watchers) = (self.kept.clone(), self.watchers.clone());
        let written = move |result: &Result<ChannelRecord, StoreError>| {
            if let Ok(record) = result {
                let version = record.version;
                kept.lock().keep(id, record.clone());
                watchers.notify(id, version);
            }
        };
        let written = self.disk.write(move |transaction| put(transaction, id, expected, record), written).await;
        Ok(written.map_err(backend)??.version)
    }

    async fn forget(&self, id: ChannelId, expected: u64) -> Result<(), StoreError> {
        let (kept, watchers) = (self.kept.clone(), self.watchers.clone());
        let forgotten = move |result: &Result<u64, StoreError>| {
            if let Ok(version) = result {
                kept.lock().0.remove(&id);
                watchers.notify(id, *version);
            }
        };
        let forgotten = self.disk.write(move |transaction| remove(transaction, id, expected), forgotten).await;
        forgotten.map_err(backend)?.map(drop)
    }
}

fn backend(error: DiskError) -> StoreError {
    StoreError::Backend(Box::new(error))
}

type Changed<T> = Result<(Result<T, StoreError>, Effect), DiskError>;

/// A refused change has written nothing, and those in its group go on.
fn put(
    transaction: &WriteTransaction,
    id: ChannelId,
    expected: Option<u64>,
    mut record: ChannelRecord,
) -> Changed<ChannelRecord> {
    let mut channels = transaction.open_table(CHANNELS)?;
    let current: Option<ChannelRecord> =
        channels.get(id.0.as_slice())?.map(|row| disk::decode(row.value())).transpose()?;
    if let Err(refusal) = check_update(id, current.as_ref(), expected, &record) {
        return Ok((Err(refusal), Effect::Nothing));
    }
    record.version = next_version(transaction)?;
    channels.insert(id.0.as_slice(), disk::encode(&record)?.as_slice())?;
    Ok((Ok(record), Effect::Written))
}

fn remove(transaction: &WriteTransaction, id: ChannelId, expected: u64) -> Changed<u64> {
    let mut channels = transaction.open_table(CHANNELS)?;
    let current: Option<ChannelRecord> =
        channels.get(id.0.as_slice())?.map(|row| disk::decode(row.value())).transpose()?;
    if let Err(refusal) = check_evict(current.as_ref(), expected) {
        return Ok((Err(refusal), Effect::Nothing));
    }
    channels.remove(id.0.as_slice())?;
    Ok((Ok(next_version(transaction)?), Effect::Written))
}

/// Beyond the bound those are forgotten that are too old, and of younger ones only as many of the oldest as must be, and
/// some more, so that looking for them is rare.
fn keep_answer(
    transaction: &WriteTransaction,
    id: Hash,
    answer: Option<&KeptAnswer>,
    now_ms: u64,
) -> Result<((), Effect), DiskError> {
    let mut answers = transaction.open_table(ANSWERS)?;
    match answer {
        Some(answer) => drop(answers.insert(id.0.as_slice(), disk::encode(answer)?.as_slice())?),
        None => drop(answers.remove(id.0.as_slice())?),
    }
    if answers.len()? > MAX_KEYS as u64 {
        forget_old(&mut answers, now_ms)?;
    }
    Ok(((), Effect::Written))
}

fn forget_old(answers: &mut redb::Table<'_, &[u8], &[u8]>, now_ms: u64) -> Result<(), DiskError> {
    let still_counts = now_ms.saturating_sub(u64::try_from(ANSWER_AGE.as_millis()).unwrap_or(u64::MAX));
    // One that cannot be read is of no use.
    let made_ms = |row: &[u8]| disk::decode::<KeptAnswer>(row).map_or(0, |kept| kept.made_ms);
    answers.retain(|_, row| made_ms(row) > still_counts)?;
    if answers.len()? > MAX_KEYS as u64 {
        let mut ages = Vec::with_capacity(MAX_KEYS);
        for row in answers.iter()? {
            ages.push(made_ms(row?.1.value()));
        }
        ages.sort_unstable();
        let oldest_that_stays = ages.get(MAX_KEYS / 16).copied().unwrap_or_default();
        answers.retain(|_, row| made_ms(row) >= oldest_that_stays)?;
    }
    Ok(())
}

fn next_version(transaction: &WriteTransaction) -> Result<u64, DiskError> {
    let mut table = transaction.open_table(LAST_VERSION)?;
    let last = version_in(table.get([].as_slice())?.as_ref().map(redb::AccessGuard::value))?;
    // At a thousand million updates a second it would take 584 years to get there.
    let next = last.checked_add(1).ok_or_else(|| DiskError::Corrupt("the last version is 2^64".to_owned()))?;
    table.insert([].as_slice(), next.to_le_bytes().as_slice())?;
    Ok(next)
}

fn version_in(row: Option<&[u8]>) -> Result<u64, DiskError> {
    let bytes = row.map_or(Ok([0; 8]), TryInto::try_into);
    bytes.map(u64::from_le_bytes).map_err(|_| DiskError::Corrupt("the last version is no number".to_owned()))
}

/// Checks every record of a file. Returns how many there are.
pub(crate) fn verify_file(database: &redb::Database, broken: &mut Vec<String>) -> Result<u64, DiskError> {
    let (mut channels, mut last) = (0, 0);
    for_each_row(database, LAST_VERSION, |_, row| version_in(Some(row)).map(|version| last = version))?;
    for_each_row(database, CHANNELS, |key, row| {
        channels += 1;
        let id = key.try_into().map(ChannelId);
        let checked = id.map_err(|_| "its key is no channel id".to_owned()).and_then(|id| {
            let record: ChannelRecord = disk::decode(row).map_err(|error| error.to_string())?;
            record.check(id).map_err(|error| error.to_string())?;
            if record.version > last { Err("its version is above the store's last".to_owned()) } else { Ok(()) }
        });
        if let Err(what) = checked {
            broken.push(format!("record {}: {what}", tollway_protocol::payment::Hex(key)));
        }
        Ok(())
    })?;
    Ok(channels)
}

impl ChannelStore for RedbStore {
    fn load(&self, id: ChannelId) -> BoxFuture<'_, Result<Option<ChannelRecord>, StoreError>> {
        Box::pin(async move { self.find(id).await.map_err(backend) })
    }

    fn update(
        &self,
        id: ChannelId,
        expected_version: Option<u64>,
        record: ChannelRecord,
    ) -> BoxFuture<'_, Result<u64, StoreError>> {
        Box::pin(self.write(id, expected_version, record))
    }

    fn evict(&self, id: ChannelId, expected_version: u64) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(self.forget(id, expected_version))
    }

    fn watch(&self, id: ChannelId) -> ChannelWatch {
        self.watchers.subscribe(id)
    }

    fn list(&self, after: Option<ChannelId>, limit: usize) -> BoxFuture<'_, Result<Vec<ChannelId>, StoreError>> {
        let read = move |transaction: &redb::ReadTransaction| {
            let channels = match transaction.open_table(CHANNELS) {
                Ok(channels) => channels,
                Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
                Err(error) => return Err(error.into()),
            };
            let above = after.as_ref().map_or(Bound::Unbounded, |id| Bound::Excluded(id.0.as_slice()));
            let mut ids = Vec::new();
            for row in channels.range::<&[u8]>((above, Bound::Unbounded))?.take(limit) {
                let (key, _) = row?;
                let id = key.value().try_into().map(ChannelId);
                ids.push(id.map_err(|_| DiskError::Corrupt("a key is no channel id".to_owned()))?);
            }
            Ok(ids)
        };
        Box::pin(async move { self.disk.read(read).await.map_err(backend) })
    }

    fn load_answer(&self, id: Hash) -> BoxFuture<'_, Result<Option<KeptAnswer>, StoreError>> {
        let read = move |transaction: &redb::ReadTransaction| match transaction.open_table(ANSWERS) {
            Ok(answers) => answers.get(id.0.as_slice())?.map(|row| disk::decode(row.value())).transpose(),
            Err(redb::TableError::TableDoesNotExist(_)) => Ok(None),
            Err(error) => Err(error.into()),
        };
        Box::pin(async move { self.disk.read(read).await.map_err(backend) })
    }

    fn keep_answer(&self, id: Hash, answer: Option<KeptAnswer>) -> BoxFuture<'_, Result<(), StoreError>> {
        let write = move |transaction: &WriteTransaction| keep_answer(transaction, id, answer.as_ref(), now_ms());
        Box::pin(async move { self.disk.write(write, |()| ()).await.map_err(backend) })
    }

    fn survives_restart(&self) -> bool {
        true
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use redb::ReadableDatabase;

    use super::*;

    /// `[pay.key.once]`: a key that is forgotten while it counts would be charged twice.
    #[test]
    fn answers_that_are_too_old_are_forgotten_before_any_that_counts() {
        let database = redb::Database::builder().create_with_backend(redb::backends::InMemoryBackend::new()).unwrap();
        let (young, now) = (10_000_000, 10_000_000 + ANSWER_AGE.as_millis() as u64 - 1);
        let keep = |transaction: &WriteTransaction, number: usize, made_ms| {
            let id = tollway_protocol::payment::keccak256(&number.to_be_bytes());
            let answer = KeptAnswer { args: id, made_ms, body: None, charged: None };
            keep_answer(transaction, id, Some(&answer), now).unwrap();
        };
        let count = || database.begin_read().unwrap().open_table(ANSWERS).unwrap().len().unwrap() as usize;
        let transaction = database.begin_write().unwrap();
        (0..100).for_each(|number| keep(&transaction, number, young - 1));
        (100..=MAX_KEYS).for_each(|number| keep(&transaction, number, young + number as u64));
        transaction.commit().unwrap();
        assert_eq!(count(), MAX_KEYS - 99, "none but those that are too old");
        let transaction = database.begin_write().unwrap();
        (MAX_KEYS + 1..=MAX_KEYS + 100).for_each(|number| keep(&transaction, number, young + number as u64));
        transaction.commit().unwrap();
        assert_eq!(count(), MAX_KEYS + 1 - MAX_KEYS / 16, "of those that count, the oldest");
    }
}

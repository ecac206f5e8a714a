//! A wallet's channels in a file: what a payer has signed, and what it has received, survives the process.

use std::fmt;
use std::path::Path;

use redb::{ReadTransaction, ReadableTable, WriteTransaction};
use tollway_protocol::payment::{ChannelId, Hex, SignedReceipt};

use super::wallet_store::{
    MAX_RECEIPTS_PER_CHANNEL, StoredReceipt, WalletChannel, WalletStore, WalletStoreError, check_save, stored,
};
use crate::disk::{self, Disk, DiskError, Effect, FileKind, StorageBackend, Table, for_each_row};
use crate::failpoint::failpoint;
use crate::future::BoxFuture;

/// Records by channel id.
const CHANNELS: Table = Table::new("channels");
/// Signed receipts by channel id and number, big-endian, so that they lie in their order.
const RECEIPTS: Table = Table::new("receipts");

/// A wallet's channels in a file. Only one process can have it open: two would sign twice for one state.
///
/// Channels that are paid from at the same time share their fsyncs. If the disk is full or fails, nothing more is signed
/// until the file has been opened again.
pub struct RedbWallet {
    disk: Disk,
}

impl fmt::Debug for RedbWallet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RedbWallet").finish_non_exhaustive()
    }
}

impl RedbWallet {
    /// Opens the wallet in a file, and makes the file if there is none.
    ///
    /// # Errors
    /// When another process has it open, it is no wallet, or it cannot be read or written.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, DiskError> {
        Self::start(disk::open_file(path.as_ref(), FileKind::Wallet, true)?)
    }

    /// Opens the wallet in a file that is there.
    ///
    /// # Errors
    /// As [`RedbWallet::open`], and when there is no file.
    pub fn open_existing(path: impl AsRef<Path>) -> Result<Self, DiskError> {
        Self::start(disk::open_file(path.as_ref(), FileKind::Wallet, false)?)
    }

    /// Opens the wallet on a backend of its own kind, which may be empty.
    ///
    /// # Errors
    /// When the backend fails, or has something else on it.
    pub fn on(backend: impl StorageBackend) -> Result<Self, DiskError> {
        Self::start(disk::open_backend(backend, FileKind::Wallet)?)
    }

    fn start(database: redb::Database) -> Result<Self, DiskError> {
        Ok(RedbWallet { disk: Disk::start(database, "tollway-wallet")? })
    }
}

fn backend(error: DiskError) -> WalletStoreError {
    WalletStoreError::Backend(Box::new(error))
}

type Saved = Result<(Result<(), WalletStoreError>, Effect), DiskError>;

fn put(transaction: &WriteTransaction, channel: &WalletChannel, receipt: Option<SignedReceipt>) -> Saved {
    let id = channel.id();
    let mut channels = transaction.open_table(CHANNELS)?;
    let before: Option<WalletChannel> =
        channels.get(id.0.as_slice())?.map(|row| disk::decode(row.value())).transpose()?;
    if let Err(refusal) = check_save(before.as_ref(), channel) {
        return Ok((Err(refusal), Effect::Nothing));
    }
    channels.insert(id.0.as_slice(), disk::encode(channel)?.as_slice())?;
    if let Some(receipt) = receipt {
        let mut receipts = transaction.open_table(RECEIPTS)?;
        receipts.insert(receipt_key(id, channel.last_receipt).as_slice(), disk::encode(&receipt)?.as_slice())?;
        let (first, last) = (receipt_key(id, 0), receipt_key(id, u64::MAX));
        let kept: Vec<Vec<u8>> = receipts
            .range(first.as_slice()..=last.as_slice())?
            .map(|row| row.map(|(key, _)| key.value().to_vec()))
            .collect::<Result<_, _>>()?;
        let excess = kept.len().saturating_sub(MAX_RECEIPTS_PER_CHANNEL);
        for key in &kept[..excess] {
            receipts.remove(key.as_slice())?;
        }
    }
    Ok((Ok(()), Effect::Written))
}

fn receipt_key(id: ChannelId, number: u64) -> Vec<u8> {
    [id.0.as_slice(), &number.to_be_bytes()].concat()
}

fn all_channels(transaction: &ReadTransaction) -> Result<Vec<WalletChannel>, DiskError> {
    match transaction.open_table(CHANNELS) {
        Ok(channels) => channels.iter()?.map(|row| disk::decode(row?.1.value())).collect(),
        Err(redb::TableError::TableDoesNotExist(_)) => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
}

fn all_receipts(transaction: &ReadTransaction) -> Result<Vec<StoredReceipt>, DiskError> {
    let receipts = match transaction.open_table(RECEIPTS) {
        Ok(receipts) => receipts,
        Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
        Err(error) => return Err(error.into()),
    };
    let mut found = Vec::new();
    for channel in all_channels(transaction)? {
        let (first, last) = (receipt_key(channel.id(), 0), receipt_key(channel.id(), u64::MAX));
        for row in receipts.range(first.as_slice()..=last.as_slice())? {
            found.extend(stored(&channel, disk::decode(row?.1.value())?));
        }
    }
    Ok(found)
}

impl WalletStore for RedbWallet {
    fn save(
        &self,
        channel: WalletChannel,
        receipt: Option<SignedReceipt>,
    ) -> BoxFuture<'_, Result<(), WalletStoreError>> {
        Box::pin(async move {
            failpoint!("wallet.before-save");
            let saved = self.disk.write(move |transaction| put(transaction, &channel, receipt), |_| {}).await;
            saved.map_err(backend)??;
            failpoint!("wallet.after-save");
            Ok(())
        })
    }

    fn channels(&self) -> BoxFuture<'_, Result<Vec<WalletChannel>, WalletStoreError>> {
        Box::pin(async move { self.disk.read(all_channels).await.map_err(backend) })
    }

    fn receipts(&self) -> BoxFuture<'_, Result<Vec<StoredReceipt>, WalletStoreError>> {
        Box::pin(async move { self.disk.read(all_receipts).await.map_err(backend) })
    }

    fn survives_restart(&self) -> bool {
        true
    }
}

/// Checks every record of a file. Returns how many channels there are.
pub(crate) fn verify_file(database: &redb::Database, broken: &mut Vec<String>) -> Result<u64, DiskError> {
    let mut channels = 0;
    for_each_row(database, CHANNELS, |key, row| {
        channels += 1;
        let what = match disk::decode::<WalletChannel>(row) {
            Ok(channel) if channel.id().0.as_slice() == key => return Ok(()),
            Ok(_) => "it is another channel's".to_owned(),
            Err(error) => error.to_string(),
        };
        broken.push(format!("record {}: {what}", Hex(key)));
        Ok(())
    })?;
    for_each_row(database, RECEIPTS, |key, row| {
        if let Err(error) = disk::decode::<SignedReceipt>(row) {
            broken.push(format!("receipt {}: {error}", Hex(key)));
        }
        Ok(())
    })?;
    Ok(channels)
}

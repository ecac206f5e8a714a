//! What the store in a file promises beyond what every store does: durability, group commit, and an honest failure.
#![cfg(feature = "redb")]
#![allow(clippy::unwrap_used)]

#[path = "support/disks.rs"]
mod disks;

use std::collections::BTreeMap;
use std::sync::Arc;

use disks::{CrashDisk, FullDisk, Promises, Seeded, disk_with};
use parking_lot::Mutex;
use redb::ReadableTable;
use tollway::disk::DiskError;
use tollway::maintenance;
use tollway::store::{ChannelRecord, ChannelStore, RedbStore, StoreError};
use tollway_protocol::payment::channel::{ChannelParams, ChannelPhase, ChannelPolicy};
use tollway_protocol::payment::{Address, Amount, ChannelDescriptor, ChannelId, Hash, PaymentChannel, VoucherProtocol};

fn record(salt: u8) -> (ChannelId, ChannelRecord) {
    let descriptor = ChannelDescriptor {
        protocol: VoucherProtocol::V1,
        payer: Address([1; 20]),
        payee: Address([2; 20]),
        operator: Address::ZERO,
        token: Address([3; 20]),
        salt: Hash([salt; 32]),
        authorized_signer: Address::ZERO,
        expiring_nonce_hash: Hash::ZERO,
        escrow: Address([4; 20]),
        chain_id: 1,
    };
    let policy = ChannelPolicy { minimum_delta: Amount::new(1), lease: Amount::new(100) };
    let params = ChannelParams::new(&descriptor, Amount::new(1_000), Amount::ZERO, policy);
    let snapshot = PaymentChannel::open(params).unwrap().snapshot();
    (descriptor.id(), ChannelRecord::new(descriptor, snapshot))
}

fn metered(record: &ChannelRecord, units: u64) -> ChannelRecord {
    let mut record = record.clone();
    record.snapshot.units = units;
    record
}

/// The cause that a store gives for a failure.
fn cause(error: &StoreError) -> &DiskError {
    match error {
        StoreError::Backend(source) => source.downcast_ref().unwrap(),
        other => panic!("{other}"),
    }
}

#[tokio::test]
async fn what_was_answered_is_there_after_the_store_is_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("payee.redb");
    let (id, record) = record(1);
    let version = {
        let store = RedbStore::open(&path).unwrap();
        let first = store.update(id, None, record.clone()).await.unwrap();
        assert!(matches!(RedbStore::open(&path), Err(DiskError::InUse)));
        store.update(id, Some(first), metered(&record, 7)).await.unwrap()
    };
    let store = RedbStore::open_existing(&path).unwrap();
    assert_eq!(store.load(id).await.unwrap(), Some(ChannelRecord { version, ..metered(&record, 7) }));
    assert!(store.survives_restart());
    // Versions go on where they were: one that was seen is never given to something else.
    assert!(store.update(id, Some(version), metered(&record, 8)).await.unwrap() > version);
}

#[tokio::test]
async fn versions_go_on_after_an_eviction_and_a_restart() {
    let disk = FullDisk::new();
    let (id, mut record) = record(1);
    record.snapshot.phase = ChannelPhase::Finalized { close: None };
    let version = {
        let store = RedbStore::on(disk.clone()).unwrap();
        let version = store.update(id, None, record.clone()).await.unwrap();
        store.evict(id, version).await.unwrap();
        version
    };
    let store = RedbStore::on(disk).unwrap();
    assert_eq!(store.load(id).await.unwrap(), None);
    assert!(store.update(id, None, record).await.unwrap() > version);
}

#[test]
fn a_file_of_another_kind_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    assert!(matches!(RedbStore::open_existing(&path), Err(DiskError::Missing)));
    for content in ["", "something that somebody wrote\n"] {
        std::fs::write(&path, content).unwrap();
        assert!(matches!(RedbStore::open(&path), Err(DiskError::OtherKind { .. })), "{content:?}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), content);
    }
    std::fs::remove_file(&path).unwrap();
    drop(redb::Database::create(&path).unwrap());
    assert!(matches!(RedbStore::open(&path), Err(DiskError::OtherKind { .. })));
}

#[cfg(unix)]
#[test]
fn only_its_owner_can_read_a_store() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("payee.redb");
    drop(RedbStore::open(&path).unwrap());
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
}

/// A sync counts as one write and one sync at most, whatever the group.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn updates_of_many_channels_share_their_syncs() {
    let promises: Promises<u8> = Arc::default();
    let disk = CrashDisk::new(promises);
    let store = Arc::new(RedbStore::on(disk.clone()).unwrap());
    disk.rewind();
    let writers: Vec<_> = (0..200)
        .map(|salt| {
            let store = store.clone();
            tokio::spawn(async move {
                let (id, record) = record(salt);
                store.update(id, None, record).await.unwrap();
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    assert_eq!(store.list(None, 1_000).await.unwrap().len(), 200);
    let syncs = disk.points().len();
    assert!(syncs < 100, "{syncs} syncs for 200 channels");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_answers_no_update_shows_nothing_more_and_loses_nothing_that_was_answered() {
    let mut failed_at = Vec::new();
    for operations in 0..40 {
        let disk = FullDisk::new();
        let store = RedbStore::on(disk.clone()).unwrap();
        let (id, record) = record(1);
        let mut version = store.update(id, None, record.clone()).await.unwrap();
        disk.fail_after(operations);
        let mut answered = 0;
        let error = loop {
            assert!(answered < 100, "the disk is never full");
            match store.update(id, Some(version), metered(&record, answered + 1)).await {
                Ok(next) => (version, answered) = (next, answered + 1),
                Err(error) => break error,
            }
        };
        failed_at.push(answered);
        assert!(error.to_string().contains("the disk is full"), "{error}");
        // What nobody knows to be durable is not shown, and nothing is taken on top of it.
        for error in [store.load(id).await.unwrap_err(), store.list(None, 1).await.unwrap_err()] {
            assert!(matches!(cause(&error), DiskError::Failed(_)), "{error}");
        }
        let (other, fresh) = self::record(2);
        assert!(store.update(other, None, fresh).await.is_err());
        let room = disk.with_room();
        drop(store);
        let store = RedbStore::on(room).unwrap();
        let found = store.load(id).await.unwrap().unwrap().snapshot.units;
        // One more may have been written whose answer was an error.
        assert!((answered..=answered + 1).contains(&found), "{found} after {answered}");
    }
    assert!(failed_at.iter().any(|&answered| answered > 1), "{failed_at:?}");
}

/// The file as a crash leaves it before each of its syncs: with none, some or all of what had not been synced.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_answered_survives_a_crash_at_every_sync() {
    let promises: Promises<ChannelId> = Arc::new(Mutex::new(BTreeMap::new()));
    let disk = CrashDisk::new(promises.clone());
    let store = Arc::new(RedbStore::on(disk.clone()).unwrap());
    disk.rewind();
    let writers: Vec<_> = (0..4)
        .map(|salt| {
            let (store, promises) = (store.clone(), promises.clone());
            tokio::spawn(async move {
                let (id, record) = record(salt);
                let mut version = store.update(id, None, record.clone()).await.unwrap();
                for units in 1..=12 {
                    version = store.update(id, Some(version), metered(&record, units)).await.unwrap();
                    promises.lock().insert(id, units);
                }
            })
        })
        .collect();
    for writer in writers {
        writer.await.unwrap();
    }
    let points = disk.points();
    assert!(points.len() >= 13, "{} syncs", points.len());
    let (mut checked, mut seeded) = (0u64, Seeded::new(1));
    for (at, point) in points.iter().enumerate() {
        for percent in [0, 20, 50, 80, 100] {
            let image = point.image(|| seeded.below(100) < percent);
            let store =
                RedbStore::on(disk_with(image)).unwrap_or_else(|error| panic!("sync {at}, {percent} %: {error}"));
            for (id, promised) in &point.promised {
                let found = store.load(*id).await.unwrap().map_or(0, |record| record.snapshot.units);
                assert!(found >= *promised, "sync {at}, {percent} %: {found} of {promised} is there");
                checked += 1;
            }
            for id in store.list(None, 100).await.unwrap() {
                store.load(id).await.unwrap().unwrap().check(id).unwrap();
            }
        }
    }
    assert!(checked > 100, "{checked} promises were compared");
}

#[tokio::test]
async fn a_file_is_verified_copied_and_made_small() {
    let dir = tempfile::tempdir().unwrap();
    let (path, copy) = (dir.path().join("payee.redb"), dir.path().join("copy.redb"));
    assert!(matches!(maintenance::verify(&path), Err(DiskError::Missing)));
    {
        let store = RedbStore::open(&path).unwrap();
        for salt in 0..100 {
            let (id, record) = record(salt);
            store.update(id, None, record).await.unwrap();
        }
        assert!(matches!(maintenance::verify(&path), Err(DiskError::InUse)));
    }
    let found = maintenance::verify(&path).unwrap();
    assert_eq!((found.channels, found.broken.len()), (100, 0));
    maintenance::backup(&path, &copy).unwrap();
    assert!(maintenance::backup(&path, &copy).is_err());
    let (before, after) = maintenance::compact(&path).unwrap();
    assert!(after <= before);
    for path in [&path, &copy] {
        assert_eq!(maintenance::verify(path).unwrap().channels, 100);
        let store = RedbStore::open_existing(path).unwrap();
        assert_eq!(store.list(None, 1_000).await.unwrap().len(), 100);
        let (id, record) = record(42);
        let stored = store.load(id).await.unwrap().unwrap();
        assert_eq!(stored.snapshot, record.snapshot);
    }
}

#[tokio::test]
async fn a_record_that_was_damaged_is_found() {
    const CHANNELS: redb::TableDefinition<'_, &[u8], &[u8]> = redb::TableDefinition::new("channels");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("payee.redb");
    let ids: Vec<_> = {
        let store = RedbStore::open(&path).unwrap();
        for salt in 0..3 {
            let (id, record) = record(salt);
            store.update(id, None, record).await.unwrap();
        }
        store.list(None, 3).await.unwrap()
    };
    {
        let database = redb::Database::open(&path).unwrap();
        let transaction = database.begin_write().unwrap();
        {
            let mut channels = transaction.open_table(CHANNELS).unwrap();
            let other = channels.get(ids[1].0.as_slice()).unwrap().unwrap().value().to_vec();
            channels.insert(ids[0].0.as_slice(), other.as_slice()).unwrap();
            channels.insert(ids[2].0.as_slice(), [9u8, 9, 9].as_slice()).unwrap();
        }
        transaction.commit().unwrap();
    }
    let found = maintenance::verify(&path).unwrap();
    assert_eq!((found.channels, found.broken.len()), (3, 2), "{found:?}");
    let store = RedbStore::open_existing(&path).unwrap();
    let error = store.load(ids[2]).await.unwrap_err();
    assert!(matches!(cause(&error), DiskError::OtherFormat { found: 9, .. }), "{error}");
}

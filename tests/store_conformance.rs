//! What every [`ChannelStore`] must do. A new store adds one line at the end.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use tollway::store::{ChannelRecord, ChannelState, ChannelStore, MemoryStore, RecordError, StoreError};
use tollway_protocol::payment::{
    Address, Amount, ChannelDescriptor, ChannelId, Hash, SecretKey, SignedAmount, Voucher, VoucherProtocol,
};

type Store = Arc<dyn ChannelStore>;

fn key() -> SecretKey {
    SecretKey::from_bytes([1; 32]).unwrap()
}

fn record(salt: u8) -> (ChannelId, ChannelRecord) {
    let descriptor = ChannelDescriptor {
        protocol: VoucherProtocol::V1,
        payer: key().address(),
        payee: Address([2; 20]),
        operator: Address::ZERO,
        token: Address([3; 20]),
        salt: Hash([salt; 32]),
        authorized_signer: Address::ZERO,
        expiring_nonce_hash: Hash::ZERO,
        escrow: Address([4; 20]),
        chain_id: 1,
    };
    (descriptor.id(), ChannelRecord::new(descriptor, Amount::from(1_000)))
}

fn accept(record: &mut ChannelRecord, amount: u64) {
    let domain = record.descriptor.voucher_domain();
    let voucher = Voucher::sign(&domain, &key(), record.descriptor.id(), Amount::from(amount)).unwrap();
    record.vouchers.accept(SignedAmount::from(voucher), record.spent).unwrap();
}

/// A record with something in every counter.
fn busy(salt: u8) -> (ChannelId, ChannelRecord) {
    let (id, mut record) = record(salt);
    accept(&mut record, 500);
    record.leased = Amount::from(300);
    record.spent = Amount::from(200);
    record.settled = Amount::from(100);
    record.lost_in_flight = Amount::from(10);
    (record.units, record.owner_epoch) = (4_096, 3);
    (id, record)
}

async fn what_is_written_is_read_back(store: Store) {
    let (id, record) = busy(1);
    assert_eq!(store.load(id).await.unwrap(), None);
    let version = store.update(id, None, record.clone()).await.unwrap();
    assert_eq!(store.load(id).await.unwrap(), Some(ChannelRecord { version, ..record }));
}

async fn a_stale_version_is_a_conflict_and_changes_nothing(store: Store) {
    let (id, record) = busy(1);
    let absent = store.update(id, Some(1), record.clone()).await;
    assert!(matches!(absent, Err(StoreError::Conflict { expected: Some(1), current: None })), "{absent:?}");
    let first = store.update(id, None, record.clone()).await.unwrap();
    let again = store.update(id, None, record.clone()).await;
    assert!(matches!(again, Err(StoreError::Conflict { expected: None, current }) if current == Some(first)));
    let next = ChannelRecord { units: 5_000, ..record.clone() };
    let second = store.update(id, Some(first), next.clone()).await.unwrap();
    assert!(second > first);
    let stale = store.update(id, Some(first), ChannelRecord { units: 9_000, ..record }).await;
    assert!(matches!(stale, Err(StoreError::Conflict { .. })));
    assert_eq!(store.load(id).await.unwrap(), Some(ChannelRecord { version: second, ..next }));
}

async fn of_64_racing_writers_exactly_one_wins(store: Store) {
    let (id, record) = busy(1);
    let mut version = store.update(id, None, record.clone()).await.unwrap();
    for round in 1..=8 {
        let barrier = Arc::new(tokio::sync::Barrier::new(64));
        let tasks: Vec<_> = (0..64u64)
            .map(|writer| {
                let (store, barrier) = (store.clone(), barrier.clone());
                let record = ChannelRecord { units: 4_096 + round * 100 + writer, ..record.clone() };
                tokio::spawn(async move {
                    barrier.wait().await;
                    (record.units, store.update(id, Some(version), record).await)
                })
            })
            .collect();
        let mut won = Vec::new();
        for task in tasks {
            match task.await.unwrap() {
                (units, Ok(version)) => won.push((units, version)),
                (_, Err(error)) => assert!(matches!(error, StoreError::Conflict { .. }), "{error}"),
            }
        }
        assert_eq!(won.len(), 1);
        let stored = store.load(id).await.unwrap().unwrap();
        assert_eq!((stored.units, stored.version), won[0]);
        version = stored.version;
    }
}

async fn increments_by_compare_and_set_are_never_lost(store: Store) {
    let (id, record) = record(1);
    store.update(id, None, record).await.unwrap();
    let tasks: Vec<_> = (0..16)
        .map(|_| {
            let store = store.clone();
            tokio::spawn(async move {
                for _ in 0..25 {
                    loop {
                        let mut record = store.load(id).await.unwrap().unwrap();
                        record.units += 1;
                        match store.update(id, Some(record.version), record).await {
                            Ok(_) => break,
                            Err(StoreError::Conflict { .. }) => tokio::task::yield_now().await,
                            Err(error) => panic!("{error}"),
                        }
                    }
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(store.load(id).await.unwrap().unwrap().units, 400);
}

async fn a_record_that_contradicts_itself_is_refused(store: Store) {
    let (id, good) = busy(1);
    let edits: &[fn(&mut ChannelRecord)] = &[
        |record| record.deposit = Amount::from(499),
        |record| record.leased = Amount::from(501),
        |record| record.spent = Amount::from(301),
        |record| record.settled = Amount::from(501),
        |record| record.lost_in_flight = Amount::from(201),
        |record| record.state = ChannelState::Closing { amount: Amount::from(501) },
        |record| record.state = ChannelState::Finalized { amount: Amount::from(99) },
        |record| record.descriptor.salt = Hash([9; 32]),
    ];
    for edit in edits {
        let mut bad = good.clone();
        edit(&mut bad);
        assert!(matches!(store.update(id, None, bad).await, Err(StoreError::Record(_))));
        assert_eq!(store.load(id).await.unwrap(), None);
    }
    // Paid out more than was spent is possible, and stored.
    let overpaid = ChannelRecord { settled: Amount::from(400), ..good };
    assert!(overpaid.is_overpaid());
    store.update(id, None, overpaid).await.unwrap();
}

async fn nothing_goes_back(store: Store) {
    let (id, record) = busy(1);
    let record = ChannelRecord { state: ChannelState::Closing { amount: Amount::from(300) }, ..record };
    let version = store.update(id, None, record.clone()).await.unwrap();
    type Edit = (&'static str, fn(&mut ChannelRecord));
    let edits: &[Edit] = &[
        ("deposit", |record| record.deposit = Amount::from(999)),
        ("accepted", |record| {
            record.vouchers = Default::default();
            accept(record, 499);
        }),
        ("spent", |record| record.spent = Amount::from(199)),
        ("settled", |record| record.settled = Amount::from(99)),
        ("units", |record| record.units -= 1),
        ("owner_epoch", |record| record.owner_epoch -= 1),
        ("lost_in_flight", |record| record.lost_in_flight = Amount::from(9)),
        ("state", |record| record.state = ChannelState::Open),
    ];
    for (name, edit) in edits {
        let mut bad = record.clone();
        edit(&mut bad);
        let refused = store.update(id, Some(version), bad).await;
        assert!(
            matches!(refused, Err(StoreError::Record(RecordError::GoesBack(field))) if field == *name),
            "{refused:?}"
        );
    }
    assert_eq!(store.load(id).await.unwrap().unwrap().version, version);
    // A lease may be given back.
    store.update(id, Some(version), ChannelRecord { leased: record.spent, ..record }).await.unwrap();
}

async fn only_finalised_records_are_evicted_and_a_late_writer_resurrects_none(store: Store) {
    let (id, open) = busy(1);
    let first = store.update(id, None, open.clone()).await.unwrap();
    assert!(matches!(store.evict(id, first).await, Err(StoreError::NotFinalized)));
    let ended = ChannelRecord { state: ChannelState::Finalized { amount: Amount::from(200) }, ..open.clone() };
    let second = store.update(id, Some(first), ended.clone()).await.unwrap();
    let other_end = ChannelRecord { state: ChannelState::Finalized { amount: Amount::from(300) }, ..open.clone() };
    assert!(matches!(store.update(id, Some(second), other_end).await, Err(StoreError::Record(_))));
    assert!(matches!(store.evict(id, first).await, Err(StoreError::Conflict { .. })));
    store.evict(id, second).await.unwrap();
    assert_eq!(store.load(id).await.unwrap(), None);
    assert!(matches!(store.evict(id, second).await, Err(StoreError::Conflict { current: None, .. })));
    for version in [first, second] {
        let late = store.update(id, Some(version), ended.clone()).await;
        assert!(matches!(late, Err(StoreError::Conflict { current: None, .. })));
    }
    // Should the id come back, no version is one that a late writer may hold.
    let third = store.update(id, None, open).await.unwrap();
    assert!(third > second);
}

async fn eviction_racing_updates_leaves_no_stale_record(store: Store) {
    for salt in 1..=32 {
        let (id, open) = busy(salt);
        let ended = ChannelRecord { state: ChannelState::Finalized { amount: Amount::from(200) }, ..open };
        let version = store.update(id, None, ended.clone()).await.unwrap();
        let (evicting, updating) = (store.clone(), store.clone());
        let evict = tokio::spawn(async move { evicting.evict(id, version).await });
        let more = ChannelRecord { units: 9_999, ..ended };
        let update = tokio::spawn(async move { updating.update(id, Some(version), more).await });
        let (evict, update) = (evict.await.unwrap(), update.await.unwrap());
        assert_ne!(evict.is_ok(), update.is_ok());
        assert_eq!(store.load(id).await.unwrap().is_none(), evict.is_ok());
    }
}

async fn a_change_between_two_waits_is_never_lost(store: Store) {
    let (id, record) = busy(1);
    let mut watch = store.watch(id);
    let soon = Duration::from_secs(5);
    let mut version = store.update(id, None, record.clone()).await.unwrap();
    // Written before the wait began.
    assert_eq!(tokio::time::timeout(soon, watch.changed()).await.unwrap(), Ok(version));
    for round in 1..=100 {
        let next = ChannelRecord { units: 5_000 + round, ..record.clone() };
        version = store.update(id, Some(version), next).await.unwrap();
        assert_eq!(tokio::time::timeout(soon, watch.changed()).await.unwrap(), Ok(version));
    }
    // A cancelled wait takes no permit with it.
    let nothing = tokio::time::timeout(Duration::from_millis(5), watch.changed()).await;
    assert!(nothing.is_err());
    let next = ChannelRecord { units: 9_000, ..record.clone() };
    version = store.update(id, Some(version), next).await.unwrap();
    assert_eq!(tokio::time::timeout(soon, watch.changed()).await.unwrap(), Ok(version));
    // A refused update is no change.
    assert!(store.update(id, None, record).await.is_err());
    assert!(tokio::time::timeout(Duration::from_millis(5), watch.changed()).await.is_err());
}

async fn every_watcher_wakes_and_for_its_channel_only(store: Store) {
    let (id, record) = busy(1);
    let (other, _) = busy(2);
    let mut watchers: Vec<_> = (0..8).map(|_| store.watch(id)).collect();
    let mut unrelated = store.watch(other);
    let waiting: Vec<_> =
        watchers.drain(..).map(|mut watch| tokio::spawn(async move { watch.changed().await })).collect();
    tokio::task::yield_now().await;
    let version = store.update(id, None, record).await.unwrap();
    for task in waiting {
        assert_eq!(tokio::time::timeout(Duration::from_secs(5), task).await.unwrap().unwrap(), Ok(version));
    }
    assert!(tokio::time::timeout(Duration::from_millis(5), unrelated.changed()).await.is_err());
    // Watching thousands of channels that nobody watches any more costs nothing in the end.
    for salt in 0..=255 {
        drop(store.watch(busy(salt).0));
    }
}

async fn ids_are_listed_in_order_and_in_pages(store: Store) {
    assert_eq!(store.list(None, 10).await.unwrap(), []);
    let mut ids = Vec::new();
    for salt in 0..7 {
        let (id, record) = record(salt);
        store.update(id, None, record).await.unwrap();
        ids.push(id);
    }
    ids.sort();
    assert_eq!(store.list(None, 100).await.unwrap(), ids);
    let first = store.list(None, 3).await.unwrap();
    assert_eq!(first, ids[..3]);
    assert_eq!(store.list(first.last().copied(), 3).await.unwrap(), ids[3..6]);
    assert_eq!(store.list(Some(ids[6]), 3).await.unwrap(), []);
    assert_eq!(store.list(None, 0).await.unwrap(), []);
}

macro_rules! conformance {
    ($module:ident, $factory:expr) => {
        conformance!($module, $factory;
            what_is_written_is_read_back,
            a_stale_version_is_a_conflict_and_changes_nothing,
            of_64_racing_writers_exactly_one_wins,
            increments_by_compare_and_set_are_never_lost,
            a_record_that_contradicts_itself_is_refused,
            nothing_goes_back,
            only_finalised_records_are_evicted_and_a_late_writer_resurrects_none,
            eviction_racing_updates_leaves_no_stale_record,
            a_change_between_two_waits_is_never_lost,
            every_watcher_wakes_and_for_its_channel_only,
            ids_are_listed_in_order_and_in_pages,
        );
    };
    ($module:ident, $factory:expr; $($test:ident),+ $(,)?) => {
        mod $module {
            use super::*;
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
                async fn $test() {
                    super::$test(Arc::new($factory)).await;
                }
            )+
        }
    };
}

conformance!(memory, MemoryStore::new());

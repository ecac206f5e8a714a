//! What every [`ChannelStore`] must do. A new store adds one line at the end.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::time::Duration;

use tollway::store::{ApplyError, ChannelRecord, ChannelStore, MemoryStore, RecordError, StoreError, apply};
use tollway_protocol::payment::channel::{
    ChannelParams, ChannelPhase, ChannelPolicy, ChannelSnapshot, StaleUpdate, VerifiedVoucher, VoucherPlan,
};
use tollway_protocol::payment::{
    Address, Amount, ChannelDescriptor, ChannelId, CloseVoucher, Hash, PaymentChannel, SecretKey, SignedAmount,
    Verifier, Voucher, VoucherProtocol,
};

type Store = Arc<dyn ChannelStore>;

fn key() -> SecretKey {
    SecretKey::from_bytes([1; 32]).unwrap()
}

fn amount(units: u64) -> Amount {
    Amount::from(units)
}

fn fresh(salt: u8) -> (ChannelDescriptor, PaymentChannel) {
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
    let policy = ChannelPolicy { minimum_delta: amount(1), lease: amount(100) };
    let params = ChannelParams::new(&descriptor, amount(1_000), Amount::ZERO, policy);
    (descriptor, PaymentChannel::open(params).unwrap())
}

fn record(salt: u8) -> (ChannelId, ChannelRecord) {
    let (descriptor, channel) = fresh(salt);
    (descriptor.id(), ChannelRecord::new(descriptor, channel.snapshot()))
}

fn voucher(descriptor: &ChannelDescriptor, units: u64) -> Voucher {
    Voucher::sign(&descriptor.voucher_domain(), &key(), descriptor.id(), amount(units)).unwrap()
}

fn accept(record: &mut ChannelRecord, units: u64) {
    let voucher = SignedAmount::from(voucher(&record.descriptor, units));
    record.snapshot.vouchers.push(voucher, record.snapshot.spent);
    record.snapshot.accepted = voucher.amount;
}

fn close_at(record: &ChannelRecord, units: u64) -> CloseVoucher {
    SignedAmount::from(voucher(&record.descriptor, units)).into()
}

/// A record with something in every counter.
fn busy(salt: u8) -> (ChannelId, ChannelRecord) {
    let (id, mut record) = record(salt);
    accept(&mut record, 500);
    let snapshot = &mut record.snapshot;
    (snapshot.leased, snapshot.spent, snapshot.settled) = (amount(300), amount(200), amount(100));
    (snapshot.lost_in_flight, snapshot.units, snapshot.epoch) = (amount(10), 4_096, 3);
    (id, record)
}

fn with(record: &ChannelRecord, edit: impl FnOnce(&mut ChannelSnapshot)) -> ChannelRecord {
    let mut edited = record.clone();
    edit(&mut edited.snapshot);
    edited
}

fn metered(record: &ChannelRecord, units: u64) -> ChannelRecord {
    with(record, |snapshot| snapshot.units = units)
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
    let next = metered(&record, 5_000);
    let second = store.update(id, Some(first), next.clone()).await.unwrap();
    assert!(second > first);
    let stale = store.update(id, Some(first), metered(&record, 9_000)).await;
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
                let record = metered(&record, 4_096 + round * 100 + writer);
                tokio::spawn(async move {
                    barrier.wait().await;
                    (record.snapshot.units, store.update(id, Some(version), record).await)
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
        assert_eq!((stored.snapshot.units, stored.version), won[0]);
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
                        record.snapshot.units += 1;
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
    assert_eq!(store.load(id).await.unwrap().unwrap().snapshot.units, 400);
}

async fn a_record_that_contradicts_itself_is_refused(store: Store) {
    let (id, good) = busy(1);
    let edits: &[fn(&mut ChannelRecord)] = &[
        |record| record.snapshot.deposit = amount(499),
        |record| record.snapshot.accepted = amount(501),
        |record| record.snapshot.leased = amount(501),
        |record| record.snapshot.spent = amount(301),
        |record| record.snapshot.settled = amount(501),
        |record| record.snapshot.lost_in_flight = amount(201),
        |record| record.snapshot.vouchers = Default::default(),
        |record| record.snapshot.phase = ChannelPhase::Closing { close: close_at(record, 501) },
        |record| record.snapshot.phase = ChannelPhase::Finalized { close: Some(close_at(record, 501)) },
        |record| record.snapshot.voucher_ceiling = Amount::MAX_U96,
        |record| record.snapshot.channel_id = ChannelId([9; 32]),
        |record| record.descriptor.salt = Hash([9; 32]),
    ];
    for edit in edits {
        let mut bad = good.clone();
        edit(&mut bad);
        assert!(matches!(store.update(id, None, bad).await, Err(StoreError::Record(_))));
        assert_eq!(store.load(id).await.unwrap(), None);
    }
    // Paid out more than was spent is possible, and stored.
    store.update(id, None, with(&good, |snapshot| snapshot.settled = amount(400))).await.unwrap();
}

async fn nothing_goes_back(store: Store) {
    let (id, record) = busy(1);
    let close = close_at(&record, 300);
    let record = with(&record, |snapshot| snapshot.phase = ChannelPhase::Closing { close });
    let version = store.update(id, None, record.clone()).await.unwrap();
    type Edit = (&'static str, fn(&mut ChannelRecord));
    let edits: &[Edit] = &[
        ("deposit", |record| record.snapshot.deposit = amount(999)),
        ("accepted", |record| {
            record.snapshot.vouchers = Default::default();
            accept(record, 499);
        }),
        ("spent", |record| record.snapshot.spent = amount(199)),
        ("settled", |record| record.snapshot.settled = amount(99)),
        ("units", |record| record.snapshot.units -= 1),
        ("epoch", |record| record.snapshot.epoch -= 1),
        ("lost_in_flight", |record| record.snapshot.lost_in_flight = amount(9)),
        ("phase", |record| record.snapshot.phase = ChannelPhase::Open),
        ("phase", |record| record.snapshot.phase = ChannelPhase::Disputed { claimed: amount(1) }),
        ("phase", |record| record.snapshot.phase = ChannelPhase::Closing { close: close_at(record, 301) }),
        ("phase", |record| record.snapshot.phase = ChannelPhase::Finalized { close: None }),
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
    store.update(id, Some(version), with(&record, |snapshot| snapshot.leased = snapshot.spent)).await.unwrap();
}

async fn only_finalised_records_are_evicted_and_a_late_writer_resurrects_none(store: Store) {
    let (id, open) = busy(1);
    let first = store.update(id, None, open.clone()).await.unwrap();
    assert!(matches!(store.evict(id, first).await, Err(StoreError::NotFinalized)));
    let ended = with(&open, |snapshot| snapshot.phase = ChannelPhase::Finalized { close: None });
    let second = store.update(id, Some(first), ended.clone()).await.unwrap();
    let close = Some(close_at(&open, 300));
    let other_end = with(&open, |snapshot| snapshot.phase = ChannelPhase::Finalized { close });
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
        let ended = with(&open, |snapshot| snapshot.phase = ChannelPhase::Finalized { close: None });
        let version = store.update(id, None, ended.clone()).await.unwrap();
        let (evicting, updating) = (store.clone(), store.clone());
        let evict = tokio::spawn(async move { evicting.evict(id, version).await });
        let more = metered(&ended, 9_999);
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
        let next = metered(&record, 5_000 + round);
        version = store.update(id, Some(version), next).await.unwrap();
        assert_eq!(tokio::time::timeout(soon, watch.changed()).await.unwrap(), Ok(version));
    }
    // A cancelled wait takes no permit with it.
    let nothing = tokio::time::timeout(Duration::from_millis(5), watch.changed()).await;
    assert!(nothing.is_err());
    let next = metered(&record, 9_000);
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

fn plan(descriptor: &ChannelDescriptor, channel: &PaymentChannel, units: u64) -> VoucherPlan {
    let verifier = Verifier::new(descriptor.signer());
    let voucher = voucher(descriptor, units);
    let verified = VerifiedVoucher::verify(&voucher, &descriptor.voucher_domain(), &verifier).unwrap();
    channel.propose_voucher(&verified).unwrap().unwrap()
}

async fn updates_of_one_channel_all_arrive_whoever_writes_first(store: Store) {
    let (descriptor, channel) = fresh(1);
    let id = descriptor.id();
    store.update(id, None, ChannelRecord::new(descriptor.clone(), channel.snapshot())).await.unwrap();
    let tasks: Vec<_> = (1..=16)
        .map(|at| {
            let (store, plan) = (store.clone(), plan(&descriptor, &channel, at * 10));
            tokio::spawn(async move { apply(&*store, plan.update()).await.unwrap() })
        })
        .collect();
    for (at, task) in tasks.into_iter().enumerate() {
        let record = task.await.unwrap();
        assert!(record.snapshot.accepted >= amount((at as u64 + 1) * 10));
    }
    let stored = store.load(id).await.unwrap().unwrap();
    assert_eq!(stored.snapshot.accepted, amount(160));
    assert_eq!(stored.snapshot.validate(), Ok(()));
    // What is there already is not written again.
    let again = apply(&*store, plan(&descriptor, &channel, 160).update()).await.unwrap();
    assert_eq!(again, stored);
}

async fn an_update_that_no_longer_fits_changes_nothing(store: Store) {
    let (descriptor, mut channel) = fresh(1);
    let id = descriptor.id();
    let late = plan(&descriptor, &channel, 10);
    let missing = apply(&*store, late.update()).await;
    assert!(matches!(missing, Err(ApplyError::NoRecord(unknown)) if unknown == id));
    store.update(id, None, ChannelRecord::new(descriptor, channel.snapshot())).await.unwrap();
    let taken = channel.take_ownership(1).unwrap();
    apply(&*store, &taken).await.unwrap();
    // Of two that take the same epoch one wins.
    let second = apply(&*store, &taken).await;
    assert!(matches!(second, Err(ApplyError::Stale(StaleUpdate::Epoch { .. }))));
    apply(&*store, &channel.finalize(Amount::ZERO).unwrap()).await.unwrap();
    let ended = store.load(id).await.unwrap();
    assert!(matches!(apply(&*store, late.update()).await, Err(ApplyError::Stale(StaleUpdate::Closed(_)))));
    assert_eq!(store.load(id).await.unwrap(), ended);
}

/// What a store on a disk writes.
#[test]
fn a_record_survives_its_encoding() {
    let (_, record) = busy(1);
    let close = close_at(&record, 300);
    let record = with(&record, |snapshot| snapshot.phase = ChannelPhase::Closing { close });
    let bytes = postcard::to_stdvec(&record).unwrap();
    assert_eq!(postcard::from_bytes::<ChannelRecord>(&bytes).unwrap(), record);
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
            updates_of_one_channel_all_arrive_whoever_writes_first,
            an_update_that_no_longer_fits_changes_nothing,
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
#[cfg(feature = "redb")]
conformance!(redb_file, {
    // On a real file system, so that it is the system's fsync that commits are grouped around.
    let file = tempfile::tempfile().unwrap();
    tollway::store::RedbStore::on(redb::backends::FileBackend::new(file).unwrap()).unwrap()
});

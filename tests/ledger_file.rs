//! The ledger in a file: what it has answered survives, and nothing appears or vanishes whatever dies.
#![cfg(feature = "redb")]
#![allow(clippy::unwrap_used)]

#[path = "support/disks.rs"]
#[allow(dead_code)]
mod disks;

use std::collections::BTreeMap;
use std::sync::Arc;

use disks::{CrashDisk, FullDisk, Promises, Seeded, disk_with};
use parking_lot::Mutex;
use tollway::escrow::{Escrow, EscrowError, EscrowRefusal, Ledger, LedgerConfig, LedgerFileError, LocalLedger};
use tollway::maintenance;
use tollway_protocol::payment::ledger_messages::{
    Close, Fund, LedgerIdentity, LedgerMessage, OpenChannel, RequestClose, Settle, Signed, TopUp, Transfer, Withdraw,
};
use tollway_protocol::payment::{Address, Amount, ChannelId, Hash, SecretKey, Signature, Voucher, VoucherDomain};

const TOKEN: Address = Address([0x20; 20]);
const OPERATOR: u8 = 7;

fn key(seed: u8) -> SecretKey {
    SecretKey::from_bytes([seed; 32]).unwrap()
}

fn address(seed: u8) -> Address {
    key(seed).address()
}

fn units(amount: u64) -> Amount {
    Amount::from(amount)
}

fn identity() -> LedgerIdentity {
    LedgerIdentity::of(&key(OPERATOR))
}

fn config() -> LedgerConfig {
    LedgerConfig { grace_ms: 0, dev: false }
}

fn sign<M: LedgerMessage>(message: M, signer: u8) -> Signed<M> {
    Signed::sign(message, &identity(), &key(signer))
}

fn fund(holder: u8, amount: u64, nonce: u64) -> Signed<Fund> {
    sign(Fund { holder: address(holder), token: TOKEN, amount: units(amount), nonce, expiry: 0 }, OPERATOR)
}

fn transfer(from: u8, to: u8, amount: u64, nonce: u64) -> Signed<Transfer> {
    let (from_address, to) = (address(from), address(to));
    sign(Transfer { from: from_address, to, token: TOKEN, amount: units(amount), nonce, expiry: 0 }, from)
}

fn open(salt: u8, deposit: u64, nonce: u64) -> Signed<OpenChannel> {
    let order = OpenChannel {
        payer: address(1),
        payee: address(2),
        token: TOKEN,
        salt: Hash([salt; 32]),
        authorized_signer: Address::ZERO,
        deposit: units(deposit),
        nonce,
        expiry: 0,
    };
    sign(order, 1)
}

fn channel_id(order: &Signed<OpenChannel>) -> ChannelId {
    order.message.descriptor(&identity()).id()
}

fn voucher(channel_id: ChannelId, amount: u64) -> Signature {
    let LedgerIdentity { chain_id, escrow } = identity();
    let domain = VoucherDomain::new(tollway_protocol::payment::VoucherProtocol::V1, chain_id, escrow);
    Voucher::sign(&domain, &key(1), channel_id, units(amount)).unwrap().signature
}

#[tokio::test]
async fn every_order_is_there_after_the_file_is_opened_again_and_repeated_has_no_effect() {
    let disk = FullDisk::new();
    let reopen = || LocalLedger::open_on(disk.clone(), identity(), config()).unwrap();
    let (first, second) = (open(1, 600, 1), open(2, 300, 2));
    let (closed, withdrawn) = (channel_id(&first), channel_id(&second));
    let more = sign(TopUp { channel_id: closed, deposit: units(650), nonce: 3, expiry: 0 }, 1);
    let settle = sign(Settle { channel_id: closed, amount: units(100) }, 2);
    let close = sign(Close { channel_id: closed, amount: units(200) }, 2);
    let request = sign(RequestClose { channel_id: withdrawn, nonce: 4, expiry: 0 }, 1);
    let withdraw = sign(Withdraw { channel_id: withdrawn, nonce: 5, expiry: 0 }, 1);
    let mut answers = Vec::new();
    assert_eq!(reopen().fund_by(fund(1, 1_000, 1)).await.unwrap(), units(1_000));
    assert_eq!(reopen().fund_by(fund(1, 1_000, 1)).await.unwrap(), units(1_000));
    for _ in 0..2 {
        assert_eq!(reopen().open(first.clone()).await.unwrap().deposit, units(600));
        assert_eq!(reopen().open(second.clone()).await.unwrap().deposit, units(300));
    }
    for _ in 0..2 {
        assert_eq!(reopen().top_up(more.clone()).await.unwrap().deposit, units(650));
        assert!(reopen().request_close(request.clone()).await.unwrap().close_requested_at_ms.is_some());
    }
    // The second round repeats each order to a process that has not seen the first.
    for _round in 0..2 {
        let settled = reopen().settle(settle.clone(), voucher(closed, 100)).await.unwrap();
        let ended = reopen().close(close.clone(), Some(voucher(closed, 200))).await.unwrap();
        let back = reopen().withdraw(withdraw.clone()).await.unwrap();
        let ledger = reopen();
        let balances = [1, 2].map(|seed| ledger.read(|ledger| ledger.balance(address(seed), TOKEN)));
        ledger.read(Ledger::conservation).unwrap();
        answers.push((settled, ended, back, balances));
    }
    assert_eq!(answers[0], answers[1]);
    let ledger = reopen();
    assert_eq!(ledger.balance(address(2), TOKEN).await.unwrap(), units(200));
    assert_eq!(ledger.balance(address(1), TOKEN).await.unwrap(), units(800));
    // A used id stays known, and money moves once for each order.
    let again = ledger.open(first).await;
    assert!(matches!(again, Err(EscrowError::Refused(EscrowRefusal::IdUsed(_)))), "{again:?}");
    let order = transfer(2, 3, 50, 1);
    for _ in 0..2 {
        assert_eq!(reopen_after(&disk, order.clone()).await, units(150));
    }
}

async fn reopen_after(disk: &FullDisk, order: Signed<Transfer>) -> Amount {
    LocalLedger::open_on(disk.clone(), identity(), config()).unwrap().transfer(order).await.unwrap()
}

#[tokio::test]
async fn a_ledger_is_opened_with_its_own_key_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.redb");
    let ledger = LocalLedger::open(&path, identity(), config()).unwrap();
    ledger.fund(address(1), TOKEN, units(5)).await.unwrap();
    assert!(matches!(LocalLedger::open(&path, identity(), config()), Err(LedgerFileError::Disk(_))));
    drop(ledger);
    let other = LedgerIdentity::of(&key(8));
    match LocalLedger::open(&path, other, config()) {
        Err(LedgerFileError::OtherLedger { expected, found }) => {
            assert_eq!((expected, found), (other.escrow, identity().escrow));
        }
        other => panic!("{other:?}"),
    }
    let found = maintenance::verify(&path).unwrap();
    assert_eq!((found.kind.as_str(), found.broken.len()), ("a ledger", 0));
    assert!(tollway::store::RedbStore::open(&path).is_err());
}

#[tokio::test]
async fn books_that_do_not_balance_are_found_and_not_opened() {
    const BALANCES: redb::TableDefinition<'_, &[u8], &[u8]> = redb::TableDefinition::new("balances");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("ledger.redb");
    let ledger = LocalLedger::open(&path, identity(), config()).unwrap();
    ledger.fund(address(1), TOKEN, units(5)).await.unwrap();
    drop(ledger);
    let database = redb::Database::open(&path).unwrap();
    let transaction = database.begin_write().unwrap();
    {
        let account = [address(3).0, TOKEN.0].concat();
        transaction.open_table(BALANCES).unwrap().insert(account.as_slice(), [1u8, 9].as_slice()).unwrap();
    }
    transaction.commit().unwrap();
    drop(database);
    assert_eq!(maintenance::verify(&path).unwrap().broken.len(), 1);
    assert!(matches!(LocalLedger::open(&path, identity(), config()), Err(LedgerFileError::Imbalance(_))));
}

#[tokio::test]
async fn a_full_disk_answers_no_order_and_tells_nobody_of_what_may_be_lost() {
    for operations in 0..12 {
        let disk = FullDisk::new();
        let ledger = LocalLedger::open_on(disk.clone(), identity(), config()).unwrap();
        ledger.fund_by(fund(1, 1_000, 1)).await.unwrap();
        disk.fail_after(operations);
        let mut moved = 0;
        let error = loop {
            assert!(moved < 100, "the disk is never full");
            match ledger.transfer(transfer(1, 2, 1, moved + 1)).await {
                Ok(_) => moved += 1,
                Err(error) => break error,
            }
        };
        assert!(matches!(&error, EscrowError::Unavailable(why) if why.to_string().contains("disk is full")), "{error}");
        assert!(ledger.balance(address(2), TOKEN).await.is_err());
        assert!(ledger.channel(ChannelId::ZERO).await.is_err());
        drop(ledger);
        let ledger = LocalLedger::open_on(disk.with_room(), identity(), config()).unwrap();
        let found = ledger.balance(address(2), TOKEN).await.unwrap();
        assert!(found == units(moved) || found == units(moved + 1), "{found} after {moved}");
        // The order whose answer was lost is sent again, and moves the money once.
        ledger.transfer(transfer(1, 2, 1, moved + 1)).await.unwrap();
        assert_eq!(ledger.balance(address(2), TOKEN).await.unwrap(), units(moved + 1));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_answered_survives_a_crash_at_every_sync_and_money_is_conserved() {
    let promises: Promises<u8> = Arc::new(Mutex::new(BTreeMap::new()));
    let disk = CrashDisk::new(promises.clone());
    let ledger = LocalLedger::open_on(disk.clone(), identity(), config()).unwrap();
    disk.rewind();
    ledger.fund_by(fund(1, 10_000, 1)).await.unwrap();
    let movers: Vec<_> = (2..6u8)
        .map(|to| {
            let (ledger, promises) = (ledger.clone(), promises.clone());
            tokio::spawn(async move {
                ledger.fund(address(10 + to), TOKEN, units(100)).await.unwrap();
                for step in 1..=8 {
                    ledger.transfer(transfer(10 + to, to, 5, step)).await.unwrap();
                    promises.lock().insert(to, 5 * step);
                }
            })
        })
        .collect();
    for mover in movers {
        mover.await.unwrap();
    }
    let (mut checked, mut seeded) = (0, Seeded::new(2));
    let points = disk.points();
    assert!(points.len() >= 8, "{}", points.len());
    for point in points {
        for percent in [0, 30, 70, 100] {
            let image = disk_with(point.image(|| seeded.below(100) < percent));
            // It opens only if its books balance.
            let ledger = LocalLedger::open_on(image, identity(), config()).unwrap();
            for (to, promised) in &point.promised {
                let found = ledger.balance(address(*to), TOKEN).await.unwrap();
                assert!(found >= units(*promised), "{found} of {promised}");
                checked += 1;
            }
        }
    }
    assert!(checked > 50, "{checked}");
}

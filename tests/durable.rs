//! Paid connections on disks that fail and crash: nothing is delivered or signed that is not durable.
#![cfg(feature = "redb")]
#![allow(clippy::unwrap_used)]

#[path = "support/disks.rs"]
#[allow(dead_code)]
mod disks;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use disks::{CrashDisk, FullDisk, Promises, Seeded, disk_with};
use parking_lot::Mutex;
use tollway::conduit::endpoint::Endpoint;
use tollway::escrow::{Ledger, LedgerConfig, LedgerService, LocalLedger};
use tollway::payment::{
    PaidConnection, Payee, PayeeConfig, RedbWallet, Wallet, WalletChannel, WalletConfig, WalletError, WalletPhase,
    WalletStore,
};
use tollway::protocol::payment::{
    Address, Amount, ChannelDescriptor, Hash, LedgerIdentity, MethodPrice, PayerSnapshot, Price, SecretKey,
    VoucherProtocol,
};
use tollway::rpc::{BoxReply, IncomingCall, MethodId, Reply, Rx, Service, Services, stream};
use tollway::store::{ChannelRecord, ChannelStore, MemoryStore, RedbStore};
use tollway::{Server, SessionConfig};

struct Shop;

fn method() -> MethodId {
    MethodId::of("shop", 1, "stream")
}

impl Service for Shop {
    fn name(&self) -> &str {
        "shop"
    }

    fn call(&self, _call: IncomingCall) -> BoxReply {
        Box::pin(async move {
            let (mut tx, rx) = stream::<Bytes>();
            tokio::spawn(async move { while tx.send(Bytes::from(vec![7; 1000])).await.is_ok() {} });
            Reply::ok(&rx)
        })
    }
}

fn key(seed: u8) -> SecretKey {
    SecretKey::from_bytes([seed; 32]).unwrap()
}

fn units(amount: u128) -> Amount {
    Amount::new(amount)
}

/// A payee with this store, and where it is.
async fn payee(store: Arc<dyn ChannelStore>) -> Endpoint {
    let config = LedgerConfig { dev: true, ..LedgerConfig::default() };
    let ledger = LocalLedger::new(Ledger::new(LedgerIdentity::of(&key(9)), config));
    let any = "tcp://127.0.0.1:0".parse().unwrap();
    let mut server = Server::bind(&any, SessionConfig::default()).await.unwrap();
    let endpoint = server.endpoint().clone();
    let prices = vec![MethodPrice {
        method_id: method().0,
        name: "stream".to_owned(),
        price: Price::per_bytes_out("25/KiB".parse().unwrap()),
        max_item_bytes: 1100,
        max_answer_bytes: 100,
    }];
    let mut config = PayeeConfig::new(key(2), Arc::new(ledger.clone()), store, "shop", prices);
    (config.lease, config.in_flight_cap) = (units(500), units(8_000));
    config.ledger_url = Some(endpoint.to_string());
    let services = Services::new().with_paid(Shop, Payee::new(config).unwrap()).with(LedgerService::new(ledger));
    server.set_config(SessionConfig { services, ..SessionConfig::default() });
    tokio::spawn(server.run(std::future::pending(), Duration::ZERO));
    endpoint
}

async fn open(endpoint: &Endpoint, store: Option<Arc<dyn WalletStore>>) -> PaidConnection {
    let mut config = WalletConfig::new(key(1), units(10_000_000));
    (config.payee, config.max_ahead) = (Some(key(2).address()), Some(units(2_000)));
    if let Some(store) = store {
        config.store = store;
    }
    let session = tollway::connect(endpoint, SessionConfig::default()).await.unwrap();
    Wallet::new(config).open(&session, "shop").await.unwrap()
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), future).await.expect("it ends in time")
}

async fn only_record(store: &dyn ChannelStore) -> ChannelRecord {
    let ids = store.list(None, 2).await.unwrap();
    assert_eq!(ids.len(), 1);
    store.load(ids[0]).await.unwrap().unwrap()
}

/// Reads until the stream breaks off, and fails the disk on the way.
async fn read_until_it_fails(paid: &PaidConnection, disk: &FullDisk, operations: u64) {
    let mut items: Rx<Bytes> = paid.connection().call(method(), &()).await.unwrap();
    for _ in 0..200 {
        items.recv().await.unwrap().unwrap();
    }
    disk.fail_after(operations);
    while let Ok(Some(_)) = items.recv().await {}
}

/// `[pay.lease]`
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_stops_delivery_with_its_cause_and_what_came_was_durable_before() {
    for operations in [0, 1, 5, 17] {
        within(async {
            let disk = FullDisk::new();
            let endpoint = payee(Arc::new(RedbStore::on(disk.clone()).unwrap())).await;
            let paid = open(&endpoint, None).await;
            read_until_it_fails(&paid, &disk, operations).await;
            let end = paid.connection().closed().await;
            assert!(end.to_string().contains("store failed"), "{end}");
            let received = paid.stats().received;
            // As it is on the disk when the process is gone.
            let store = RedbStore::on(disk.with_room()).unwrap();
            let snapshot = only_record(&store).await.snapshot;
            assert!(received > units(4_000) && received <= snapshot.leased, "{received} of {snapshot:?}");
            assert!(snapshot.leased <= snapshot.accepted);
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wallet_whose_disk_is_full_signs_nothing_above_what_is_written() {
    for operations in [0, 1, 5, 17] {
        within(async {
            let (disk, store) = (FullDisk::new(), Arc::new(MemoryStore::new()));
            let endpoint = payee(store.clone()).await;
            let wallet = Arc::new(RedbWallet::on(disk.clone()).unwrap());
            let paid = open(&endpoint, Some(wallet)).await;
            let reading = async {
                read_until_it_fails(&paid, &disk, operations).await;
                std::future::pending::<()>().await;
            };
            let failure = tokio::select! {
                () = reading => unreachable!("it waits for ever"),
                failure = paid.failed() => failure,
            };
            assert!(matches!(&failure, WalletError::Store(why) if why.contains("disk is full")), "{failure}");
            let wallet = RedbWallet::on(disk.with_room()).unwrap();
            let channel = wallet.channels().await.unwrap().remove(0);
            let accepted = only_record(&*store).await.snapshot.accepted;
            assert!(accepted > units(4_000) && accepted <= channel.book.ceiling, "{accepted} of {channel:?}");
            assert!(paid.stats().signed <= channel.book.ceiling, "{:?}", paid.stats());
        })
        .await;
    }
}

fn wallet_channel(salt: u8) -> WalletChannel {
    let descriptor = ChannelDescriptor {
        protocol: VoucherProtocol::V1,
        payer: key(1).address(),
        payee: key(2).address(),
        operator: Address::ZERO,
        token: Address::ZERO,
        salt: Hash([salt; 32]),
        authorized_signer: Address::ZERO,
        expiring_nonce_hash: Hash::ZERO,
        escrow: Address([4; 20]),
        chain_id: 1,
    };
    WalletChannel {
        descriptor,
        service: "shop".to_owned(),
        ledger_url: None,
        payee_url: None,
        book: PayerSnapshot::default(),
        phase: WalletPhase::Open,
        last_receipt: 0,
        made_ms: 0,
    }
}

fn at_ceiling(salt: u8, ceiling: u64) -> WalletChannel {
    let mut channel = wallet_channel(salt);
    channel.book.ceiling = Amount::from(ceiling);
    channel.book.epoch = ceiling;
    channel
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wallets_ceilings_and_epochs_survive_a_crash_at_every_sync() {
    let promises: Promises<u8> = Arc::new(Mutex::new(BTreeMap::new()));
    let disk = CrashDisk::new(promises.clone());
    let wallet = Arc::new(RedbWallet::on(disk.clone()).unwrap());
    disk.rewind();
    let signers: Vec<_> = (0..3)
        .map(|salt| {
            let (wallet, promises) = (wallet.clone(), promises.clone());
            tokio::spawn(async move {
                for ceiling in 1..=10 {
                    wallet.save(at_ceiling(salt, ceiling), None).await.unwrap();
                    promises.lock().insert(salt, ceiling);
                }
            })
        })
        .collect();
    for signer in signers {
        signer.await.unwrap();
    }
    let (mut checked, mut seeded) = (0, Seeded::new(3));
    for point in disk.points() {
        for percent in [0, 30, 70, 100] {
            let wallet = RedbWallet::on(disk_with(point.image(|| seeded.below(100) < percent))).unwrap();
            let found = wallet.channels().await.unwrap();
            for (salt, promised) in &point.promised {
                let id = wallet_channel(*salt).id();
                let channel = found.iter().find(|channel| channel.id() == id).expect("it was answered");
                assert!(channel.book.ceiling >= Amount::from(*promised) && channel.book.epoch >= *promised);
                checked += 1;
            }
        }
    }
    assert!(checked > 50, "{checked}");
}

#[tokio::test]
async fn what_a_wallet_has_signed_up_to_never_goes_back() {
    let wallet = RedbWallet::on(FullDisk::new()).unwrap();
    wallet.save(at_ceiling(1, 5), None).await.unwrap();
    let back = wallet.save(at_ceiling(1, 4), None).await;
    assert!(matches!(back, Err(tollway::payment::WalletStoreError::GoesBack("ceiling"))), "{back:?}");
    assert_eq!(wallet.channels().await.unwrap(), [at_ceiling(1, 5)]);
}

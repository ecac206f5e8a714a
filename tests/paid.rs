//! Paid connections end to end: a ledger, a payee and payers, each on a session of its own over loopback TCP.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tollway::conduit::endpoint::Endpoint;
use tollway::escrow::{Escrow, Ledger, LedgerConfig, LedgerService, LocalLedger};
use tollway::payment::{PaidConnection, Payee, PayeeConfig, Wallet, WalletConfig, WalletError};
use tollway::protocol::payment::{Address, Amount, LedgerIdentity, MethodPrice, Price, ReceiptStatus, SecretKey};
use tollway::rpc::{BoxReply, CallError, IncomingCall, MethodId, Reply, Rx, Service, Services, StreamError, stream};
use tollway::store::{ChannelStore, MemoryStore};
use tollway::{OpenError, Server, Session, SessionConfig};

const ITEM: usize = 1000;

struct Shop;

fn method(name: &str) -> MethodId {
    MethodId::of("shop", 1, name)
}

impl Service for Shop {
    fn name(&self) -> &str {
        "shop"
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        let id = call.method();
        if id == method("free") {
            Box::pin(async move { Reply::ok(&call.args::<u64>().expect("a number")) })
        } else if id == method("answer") {
            Box::pin(async { Reply::ok(&42u64) })
        } else if id == method("fail") {
            Box::pin(async { Reply::failed() })
        } else if id == method("stream") {
            Box::pin(async move {
                let count = call.args::<u64>().expect("a number");
                let (mut tx, rx) = stream::<Bytes>();
                tokio::spawn(async move {
                    for _ in 0..count {
                        if tx.send(Bytes::from(vec![7; ITEM])).await.is_err() {
                            return;
                        }
                    }
                    tx.finish();
                });
                Reply::ok(&rx)
            })
        } else {
            Reply::unknown_method().boxed()
        }
    }
}

fn prices() -> Vec<MethodPrice> {
    let priced = |name: &str, price| MethodPrice {
        method_id: method(name).0,
        name: name.to_owned(),
        price,
        max_item_bytes: 1100,
        max_answer_bytes: 100,
    };
    let call = Price { call: Amount::new(100), ..Price::default() };
    vec![
        priced("answer", call),
        priced("fail", call),
        priced("stream", Price::per_bytes_out("25/KiB".parse().expect("a rate"))),
    ]
}

fn key(seed: u8) -> SecretKey {
    SecretKey::from_bytes([seed; 32]).expect("a key")
}

struct World {
    ledger: LocalLedger,
    payee: Arc<Payee>,
    store: Arc<MemoryStore>,
    endpoint: Endpoint,
}

async fn world(change: impl FnOnce(&mut PayeeConfig)) -> World {
    let config = LedgerConfig { dev: true, ..LedgerConfig::default() };
    let ledger = LocalLedger::new(Ledger::new(LedgerIdentity::of(&key(9)), config));
    let any = "tcp://127.0.0.1:0".parse().expect("an endpoint");
    let mut server = Server::bind(&any, SessionConfig::default()).await.expect("a port");
    let endpoint = server.endpoint().clone();
    let store = Arc::new(MemoryStore::new());
    let mut config = PayeeConfig::new(key(2), Arc::new(ledger.clone()), store.clone(), "shop", prices());
    config.ledger_url = Some(endpoint.to_string());
    change(&mut config);
    let payee = Payee::new(config).expect("terms");
    let services = Services::new().with_paid(Shop, payee.clone()).with(LedgerService::new(ledger.clone()));
    server.set_config(SessionConfig { services, ..SessionConfig::default() });
    tokio::spawn(server.run(std::future::pending(), Duration::ZERO));
    World { ledger, payee, store, endpoint }
}

impl World {
    async fn connect(&self) -> Session {
        tollway::connect(&self.endpoint, SessionConfig::default()).await.expect("a session")
    }

    fn wallet(&self, budget: u128, max_ahead: u128) -> Wallet {
        let mut config = WalletConfig::new(key(1), Amount::new(budget));
        config.payee = Some(self.payee.address());
        config.max_ahead = Some(Amount::new(max_ahead));
        Wallet::new(config)
    }

    async fn open(&self, budget: u128, max_ahead: u128) -> PaidConnection {
        let session = self.connect().await;
        self.wallet(budget, max_ahead).open(&session, "shop").await.expect("a paid connection")
    }

    fn balance(&self, holder: Address) -> Amount {
        self.ledger.read(|ledger| ledger.balance(holder, Address::ZERO))
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(30), future).await.expect("it ends in time")
}

async fn read(paid: &PaidConnection, count: u64) -> Result<u64, StreamError> {
    let mut items: Rx<Bytes> = paid.connection().call(method("stream"), &count).await.expect("a stream");
    let mut read = 0;
    while let Some(item) = items.recv().await? {
        assert_eq!(item.len(), ITEM);
        read += 1;
    }
    Ok(read)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_paid_stream_is_delivered_and_settled_to_the_unit() {
    within(async {
        let world = world(|_| {}).await;
        let paid = world.open(1_000_000, 5_000).await;
        assert_eq!(read(&paid, 2_000).await, Ok(2_000));
        let closed = paid.close().await.expect("a receipt");
        // 2,000 items of 1,002 bytes as framed (the bytes and their own length), and the one byte of the answer.
        let metered = 2_000 * 1_002 + 1;
        let price = Amount::new((u128::from(metered) * 25).div_ceil(1024));
        assert_eq!(closed.stats.bytes, metered);
        assert_eq!(closed.stats.received, price);
        assert_eq!((closed.receipt.spent, closed.receipt.settled), (price, price));
        assert_eq!(closed.receipt.status, ReceiptStatus::Closed);
        assert!(closed.stats.peak_ahead <= Amount::new(5_000), "{:?}", closed.stats);
        assert!(closed.stats.vouchers > 5, "{:?}", closed.stats);
        assert_eq!(world.balance(key(2).address()), price);
        let held = world.ledger.channel(closed.channel_id).await.expect("the ledger").expect("the channel");
        assert!(held.finalized);
        assert_eq!(held.settled, price);
        world.ledger.read(Ledger::conservation).expect("conserved");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_budget_that_is_too_small_stops_delivery_and_settles_what_was_delivered() {
    within(async {
        let world = world(|_| {}).await;
        let paid = world.open(10_000, 2_000).await;
        let end = read(&paid, 2_000).await;
        assert!(matches!(end, Err(StreamError::Reset(_))), "{end:?}");
        match paid.failed().await {
            WalletError::BudgetTooSmall { needed, budget } => {
                assert!(needed > budget && budget == Amount::new(10_000), "{needed} {budget}");
            }
            other => panic!("{other}"),
        }
        let received = paid.stats().received;
        let closed = paid.close().await.expect("a receipt");
        assert!(received > Amount::new(9_900) && received <= Amount::new(10_000), "{received}");
        assert_eq!((closed.receipt.spent, closed.receipt.settled), (received, received));
        assert_eq!(world.balance(key(2).address()), received);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn priced_calls_cost_their_price_and_failures_are_free() {
    within(async {
        let world = world(|_| {}).await;
        let paid = world.open(100_000, 1_000).await;
        for number in 0..50u64 {
            assert_eq!(paid.connection().call::<_, u64>(method("answer"), &()).await, Ok(42));
            assert_eq!(paid.connection().call::<_, u64>(method("free"), &number).await, Ok(number));
            assert_eq!(paid.connection().call::<_, u64>(method("fail"), &()).await, Err(CallError::HandlerFailed));
        }
        let closed = paid.close().await.expect("a receipt");
        assert_eq!(closed.stats.received, Amount::new(5_000));
        assert_eq!((closed.receipt.spent, closed.receipt.settled), (Amount::new(5_000), Amount::new(5_000)));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_payee_is_refused_before_anything_is_paid() {
    within(async {
        let world = world(|_| {}).await;
        let mut config = WalletConfig::new(key(1), Amount::new(10_000));
        config.payee = Some(key(3).address());
        let session = world.connect().await;
        match Wallet::new(config).open(&session, "shop").await {
            Err(WalletError::PayeeMismatch { expected, found }) => {
                assert_eq!((expected, found), (key(3).address(), key(2).address()));
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(world.store.list(None, 10).await.expect("a list"), []);
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_payer_who_vanishes_owes_what_was_delivered_and_not_more_than_was_signed() {
    within(async {
        let world = world(|config| config.abandon_after = Duration::from_millis(50)).await;
        let paid = world.open(100_000, 3_000).await;
        assert_eq!(read(&paid, 300).await, Ok(300));
        let stats = paid.stats();
        drop(paid);
        world.payee.idle().await;
        let settled = world.balance(key(2).address());
        assert!(settled >= stats.received && settled <= stats.signed, "{settled} {stats:?}");
        world.ledger.read(Ledger::conservation).expect("conserved");
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_unused_channel_closes_at_zero_and_the_deposit_goes_back() {
    within(async {
        let world = world(|_| {}).await;
        let paid = world.open(10_000, 2_000).await;
        let closed = paid.close().await.expect("a receipt");
        assert_eq!((closed.receipt.spent, closed.receipt.settled), (Amount::ZERO, Amount::ZERO));
        assert_eq!(world.balance(key(1).address()), Amount::new(10_000));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn terms_that_do_not_fit_what_is_authorised_ahead_are_refused_by_name() {
    within(async {
        let world = world(|_| {}).await;
        let session = world.connect().await;
        match world.wallet(10_000, 50).open(&session, "shop").await {
            Err(WalletError::Unworkable(error)) => {
                assert!(error.to_string().contains("max_ahead"), "{error}");
                assert_eq!(error.max_ahead, Amount::new(50));
            }
            other => panic!("{other:?}"),
        }
        match world.wallet(10, 5_000).open(&session, "shop").await {
            Err(WalletError::BudgetTooSmall { budget, .. }) => assert_eq!(budget, Amount::new(10)),
            other => panic!("{other:?}"),
        }
        assert!(matches!(session.open("shop").await, Err(OpenError::PaymentRequired { .. })));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_paid_connections_share_one_session_and_keep_their_own_books() {
    within(async {
        let world = Arc::new(world(|_| {}).await);
        let session = world.connect().await;
        let mut tasks = tokio::task::JoinSet::new();
        for index in 1..=8u64 {
            let (world, session) = (world.clone(), session.clone());
            tasks.spawn(async move {
                let paid = world.wallet(1_000_000, 4_000).open(&session, "shop").await.expect("a paid connection");
                assert_eq!(read(&paid, index * 50).await, Ok(index * 50));
                let closed = paid.close().await.expect("a receipt");
                let price = Amount::new((u128::from(index * 50 * 1_002 + 1) * 25).div_ceil(1024));
                assert_eq!((closed.stats.received, closed.receipt.settled), (price, price));
                price
            });
        }
        let mut sum = Amount::ZERO;
        while let Some(price) = tasks.join_next().await {
            sum = sum.checked_add(price.expect("no task fails")).expect("a sum");
        }
        assert_eq!(world.balance(key(2).address()), sum);
    })
    .await;
}

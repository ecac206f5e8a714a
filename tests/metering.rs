//! What calls cost by the way they end, reservations, and streams that are metered as they go.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::stream::unfold;
use tokio::sync::Semaphore;
use tollway::conduit::endpoint::Endpoint;
use tollway::escrow::{Ledger, LedgerConfig, LedgerService, LocalLedger};
use tollway::payment::{AboveReservation, PaidConnection, Payee, PayeeConfig, Wallet, WalletConfig, WalletError};
use tollway::protocol::error::code;
use tollway::protocol::payment::{Amount, LedgerIdentity, MethodPrice, Price, SecretKey};
use tollway::rpc::{
    BoxReply, CallError, IncomingCall, MeterStream, MethodId, Reply, Rx, Service, Services, StreamError,
};
use tollway::store::{ChannelStore, MemoryStore};
use tollway::{Server, SessionConfig};

fn method(name: &str) -> MethodId {
    MethodId::of("model", 1, name)
}

/// A service whose handlers learn what their work costs.
#[derive(Clone)]
struct Model {
    started: Arc<Semaphore>,
    asked: Arc<AtomicU64>,
    /// Lets handlers of `slow` end.
    gate: Arc<Semaphore>,
}

impl Service for Model {
    fn name(&self) -> &str {
        "model"
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        let this = self.clone();
        let name = call.method();
        if name == method("ticks") {
            let asked = this.asked;
            let source = unfold(0u64, move |tick| {
                asked.fetch_add(1, Ordering::Relaxed);
                async move { Some((tick, tick + 1)) }
            });
            let metered: Rx<u64> = source.metered(&call.context().meter().ahead(0));
            return Reply::ok(&metered).boxed();
        }
        Box::pin(async move {
            let (context, mut args) = call.into_parts();
            let tokens: u64 = args.decode().expect("a number");
            let reservation = context.reservation().expect("the price has a maximum").clone();
            this.started.add_permits(1);
            let cost = Amount::from(tokens);
            if name == method("slow") {
                this.gate.acquire().await.expect("open").forget();
            }
            if name == method("answer") || name == method("slow") {
                match reservation.commit(cost) {
                    Ok(()) => Reply::ok(&tokens),
                    Err(AboveReservation { maximum, .. }) => Reply::error(&maximum.to_string()),
                }
            } else if name == method("reply") {
                Reply::ok(&tokens).costing(cost)
            } else {
                std::future::pending().await
            }
        })
    }
}

struct World {
    ledger: LocalLedger,
    payee: Arc<Payee>,
    store: Arc<MemoryStore>,
    endpoint: Endpoint,
    model: Model,
}

fn key(seed: u8) -> SecretKey {
    SecretKey::from_bytes([seed; 32]).expect("a key")
}

async fn world(change: impl FnOnce(&mut PayeeConfig)) -> World {
    let config = LedgerConfig { dev: true, ..LedgerConfig::default() };
    world_on(LocalLedger::new(Ledger::new(LedgerIdentity::of(&key(9)), config)), change).await
}

async fn world_on(ledger: LocalLedger, change: impl FnOnce(&mut PayeeConfig)) -> World {
    let any = "tcp://127.0.0.1:0".parse().expect("an endpoint");
    let mut server = Server::bind(&any, SessionConfig::default()).await.expect("a port");
    let endpoint = server.endpoint().clone();
    let store = Arc::new(MemoryStore::new());
    let priced = |name: &str, price: &str| MethodPrice {
        method_id: method(name).0,
        name: name.to_owned(),
        price: price.parse::<Price>().expect("a price"),
        max_item_bytes: 16,
        max_answer_bytes: 100,
    };
    let reserved = ["answer", "reply", "forever", "slow"].map(|name| priced(name, "call=10,max=1000"));
    let prices = reserved.into_iter().chain([priced("ticks", "item=3")]).collect();
    let mut config = PayeeConfig::new(key(2), Arc::new(ledger.clone()), store.clone(), "model", prices);
    config.ledger_url = Some(endpoint.to_string());
    change(&mut config);
    let payee = Payee::new(config).expect("terms");
    let model =
        Model { started: Arc::new(Semaphore::new(0)), asked: Arc::default(), gate: Arc::new(Semaphore::new(0)) };
    let services = Services::new().with_paid(model.clone(), payee.clone()).with(LedgerService::new(ledger.clone()));
    server.set_config(SessionConfig { services, ..SessionConfig::default() });
    tokio::spawn(server.run(std::future::pending(), Duration::ZERO));
    World { ledger, payee, store, endpoint, model }
}

impl World {
    fn wallet(&self, budget: u128, max_ahead: u128) -> Wallet {
        let mut config = WalletConfig::new(key(1), Amount::new(budget));
        config.payee = Some(self.payee.address());
        config.max_ahead = Some(Amount::new(max_ahead));
        Wallet::new(config)
    }

    async fn open(&self, wallet: &Wallet) -> PaidConnection {
        let session = tollway::connect(&self.endpoint, SessionConfig::default()).await.expect("a session");
        wallet.open(&session, "model").await.expect("a paid connection")
    }

    /// Up to where the payee has made the one channel's spending durable: what is spent, when its connection has ended.
    async fn leased(&self) -> Amount {
        let id = self.store.list(None, 1).await.expect("a list")[0];
        self.store.load(id).await.expect("a record").expect("a record").snapshot.leased
    }
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), future).await.expect("it ends in time")
}

/// `[pay.reserve.commit]`
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_costs_what_its_handler_commits_and_neither_less_than_its_price_nor_more_than_its_maximum() {
    within(async {
        let world = world(|_| {}).await;
        let paid = world.open(&world.wallet(1_000_000, 5_000)).await;
        let ask = |name, tokens: u64| paid.connection().call::<_, u64>(method(name), &tokens);
        for (name, tokens, cost) in [("answer", 700, 700), ("reply", 20, 20), ("answer", 1, 10), ("reply", 1000, 1000)]
        {
            let response = ask(name, tokens).response().await.expect("an answer");
            assert_eq!((response.value, response.charged), (tokens, Amount::new(cost)), "{name}");
        }
        assert_eq!(ask("reply", 1001).await, Err(CallError::HandlerFailed), "it is free: the maximum is the payer's");
        let refused =
            paid.connection().call::<_, u64>(method("answer"), &1001u64).or_error::<String>().response().await;
        assert!(matches!(refused, Err(CallError::App(maximum)) if maximum == "1000"));
        let closed = paid.close().await.expect("a receipt");
        let cost = Amount::new(700 + 20 + 10 + 1000 + 10);
        assert_eq!((closed.stats.received, closed.receipt.spent, closed.receipt.settled), (cost, cost, cost));
    })
    .await;
}

/// `[pay.call.free-failure]`, `[pay.call.lost]`: as the table in the specification has it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cancel_a_deadline_and_a_lost_connection_cost_the_call_price_and_an_expired_reservation_nothing() {
    within(async {
        let world = world(|config| config.reservation_expiry = Duration::from_millis(300)).await;
        let wallet = world.wallet(1_000_000, 5_000);
        let paid = world.open(&wallet).await;
        let forever = || paid.connection().call::<_, u64>(method("forever"), &0u64);
        assert_eq!(forever().await, Err(CallError::HandlerFailed), "the reservation expired");
        world.model.started.acquire().await.expect("open").forget();
        let late = forever().with_timeout(Duration::from_millis(50)).await;
        assert!(matches!(late, Err(CallError::DeadlineExceeded { .. })), "{late:?}");
        world.model.started.acquire().await.expect("open").forget();
        tokio::select! {
            _ = forever() => panic!("it has no answer"),
            started = world.model.started.acquire() => started.expect("open").forget(),
        }
        let next = paid.connection().call::<_, u64>(method("answer"), &11u64).await;
        assert_eq!(next, Ok(11));
        // The handlers are tasks: the answer to the cancel may come after that of the next call.
        let all = Amount::new(10 + 10 + 11);
        while paid.stats().received < all {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(paid.stats().received, all);
        world.model.started.acquire().await.expect("open").forget();
        tokio::select! {
            _ = forever() => panic!("it has no answer"),
            started = world.model.started.acquire() => started.expect("open").forget(),
        }
        drop(paid);
        while world.leased().await > Amount::new(1_000) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        assert_eq!(world.leased().await, Amount::new(41));
        let paid = world.open(&wallet).await;
        let closed = paid.close().await.expect("a receipt");
        assert_eq!(closed.receipt.spent, Amount::new(41), "the call that was cut off is in both books");
        assert_eq!(closed.receipt.settled, Amount::new(41));
    })
    .await;
}

/// The source of a metered stream works for nobody who does not pay, and goes on where it stood.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_metered_stream_rests_while_it_is_not_paid_and_goes_on_when_it_is() {
    within(async {
        let world = world(|config| config.minimum_deposit = Amount::new(30)).await;
        let read = async |paid: &PaidConnection, count: u64| {
            let mut ticks: Rx<u64> = paid.connection().call(method("ticks"), &()).await.expect("a stream");
            for tick in 0..count {
                match ticks.recv().await {
                    Ok(Some(item)) => assert_eq!(item, tick),
                    other => return Err((tick, other)),
                }
            }
            Ok(())
        };
        let paid = world.open(&world.wallet(1_000_000, 2_000)).await;
        read(&paid, 2_000).await.expect("all of them");
        let asked = world.model.asked.load(Ordering::Relaxed);
        let received = paid.close().await.expect("a receipt").stats.items;
        assert!(received >= 2_000 && asked <= received + 1, "{asked} of {received}");
        // A budget for so many: the source is not asked for more than one beyond it.
        world.model.asked.store(0, Ordering::Relaxed);
        let paid = world.open(&world.wallet(3_000, 2_000)).await;
        let (read, end) = read(&paid, 2_000).await.expect_err("the budget ends");
        assert!(matches!(end, Err(StreamError::Reset(_))), "{end:?}");
        assert!(matches!(paid.failed().await, WalletError::BudgetTooSmall { .. }));
        assert!(read <= 1_000 && world.model.asked.load(Ordering::Relaxed) <= read + 1, "{read}");
    })
    .await;
}

/// `[pay.cap.calls]`: what open calls hold can be lost if the payee dies, so it is within a quarter of the in-flight cap.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_more_calls_run_at_once_than_their_maximum_leaves_room_for_in_the_cap() {
    within(async {
        let world = world(|config| {
            (config.lease, config.in_flight_cap) = (Amount::new(4_000), Amount::new(40_000));
        });
        let world = world.await;
        let paid = Arc::new(world.open(&world.wallet(1_000_000, 100_000)).await);
        let mut calls = tokio::task::JoinSet::new();
        for _ in 0..12 {
            let paid = paid.clone();
            calls.spawn(async move { paid.connection().call::<_, u64>(method("forever"), &0u64).await });
        }
        // 40,000 / 2 − 4,000, of which half is for calls that hold 1,000 each.
        world.model.started.acquire_many(8).await.expect("open").forget();
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert_eq!(world.model.started.available_permits(), 0, "the others wait for their turn");
    })
    .await;
}

/// `[pay.key.once]`, `[pay.key.arguments]`
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_is_repeated_with_its_key_is_neither_executed_nor_charged_again() {
    within(async {
        let world = world(|_| {}).await;
        let wallet = world.wallet(1_000_000, 5_000);
        let paid = world.open(&wallet).await;
        let ask = |paid: &PaidConnection, name, tokens: u64, key: &'static str| {
            let connection = paid.connection().clone();
            async move { connection.call::<_, u64>(method(name), &tokens).with_idempotency_key(key).response().await }
        };
        for charged in [700, 0, 0] {
            let response = ask(&paid, "answer", 700, "one").await.expect("an answer");
            assert_eq!((response.value, response.charged), (700, Amount::new(charged)));
        }
        assert_eq!(world.model.started.available_permits(), 1, "it was executed once");
        let reused = ask(&paid, "answer", 701, "one").await;
        assert!(matches!(reused, Err(CallError::Refused(reason)) if reason.code == code::KEY_REUSED));
        let other = ask(&paid, "reply", 20, "one").await.expect("another method has keys of its own");
        assert_eq!(other.charged, Amount::new(20));
        // What the payee's own failure ends is free, and may be tried again.
        for _ in 0..2 {
            assert!(matches!(ask(&paid, "reply", 1001, "bad").await, Err(CallError::HandlerFailed)));
        }
        let too_long: String = "k".repeat(129);
        let long = paid.connection().call::<_, u64>(method("answer"), &1u64).with_idempotency_key(too_long).await;
        assert!(matches!(long, Err(CallError::Refused(_))));
        let closed = paid.close().await.expect("a receipt");
        assert_eq!((closed.stats.received, closed.receipt.settled), (Amount::new(720), Amount::new(720)));
    })
    .await;
}

/// `[pay.key.once]`: the connection breaks while the handler runs; both attempts together cost what the call costs.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_answer_that_was_lost_with_its_connection_is_given_to_who_asks_again() {
    within(async {
        let world = world(|_| {}).await;
        let wallet = world.wallet(1_000_000, 5_000);
        let paid = world.open(&wallet).await;
        let slow = |paid: &PaidConnection| {
            let connection = paid.connection().clone();
            async move { connection.call::<_, u64>(method("slow"), &500u64).with_idempotency_key("lost").response().await }
        };
        let first = tokio::spawn(slow(&paid));
        world.model.started.acquire().await.expect("open").forget();
        // It ends with its session, and the handler runs on.
        drop(paid);
        first.abort();
        let paid = world.open(&wallet).await;
        world.model.gate.add_permits(1);
        let response = slow(&paid).await.expect("an answer");
        assert_eq!((response.value, response.charged), (500, Amount::new(490)), "10 were paid when it was lost");
        assert_eq!(slow(&paid).await.expect("an answer").charged, Amount::ZERO);
        assert_eq!(world.model.started.available_permits(), 0, "it was executed once");
        let closed = paid.close().await.expect("a receipt");
        assert_eq!((closed.receipt.spent, closed.receipt.settled), (Amount::new(500), Amount::new(500)));
    })
    .await;
}

/// `[pay.key.once]`: who is impatient makes its call again while it runs, and gives that up again; it pays once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attempts_that_wait_for_an_earlier_one_cost_nothing_when_they_are_given_up() {
    within(async {
        let world = world(|_| {}).await;
        let paid = world.open(&world.wallet(1_000_000, 5_000)).await;
        let connection = paid.connection().clone();
        let slow = || {
            let connection = paid.connection().clone();
            async move { connection.call::<_, u64>(method("slow"), &500u64).with_idempotency_key("again").response().await }
        };
        let seen = || async { connection.call::<_, u64>(method("reply"), &10u64).await.expect("an answer") };
        let first = tokio::spawn(slow());
        world.model.started.acquire().await.expect("open").forget();
        for _ in 0..3 {
            let waiting = tokio::spawn(slow());
            tokio::task::yield_now().await;
            // Whatever was sent before an answered call has come.
            seen().await;
            waiting.abort();
            assert!(waiting.await.expect_err("it waits").is_cancelled());
            seen().await;
        }
        world.model.gate.add_permits(1);
        assert_eq!(first.await.expect("no panic").expect("an answer").charged, Amount::new(500));
        let closed = paid.close().await.expect("a receipt");
        assert_eq!((closed.receipt.spent, closed.receipt.settled), (Amount::new(560), Amount::new(560)));
    })
    .await;
}

/// `[pay.key.once]`: a call that comes together with the end of its connection gives no answer away, and costs once.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_ends_as_it_begins_is_still_paid_by_who_asks_again() {
    within(async {
        let world = world(|_| {}).await;
        let wallet = world.wallet(1_000_000, 5_000);
        for round in 0..20u64 {
            let key = round.to_string();
            let ask = |paid: &PaidConnection| {
                let (connection, key) = (paid.connection().clone(), key.clone());
                async move {
                    connection.call::<_, u64>(method("answer"), &700u64).with_idempotency_key(key).response().await
                }
            };
            let paid = world.open(&wallet).await;
            let mut lost = Box::pin(ask(&paid));
            assert!(lost.as_mut().now_or_never().is_none());
            paid.connection().close(tollway::protocol::error::Reason::new(code::DROPPED, "gone"));
            drop((lost, paid));
            let again = world.open(&wallet).await;
            assert_eq!(ask(&again).await.expect("an answer").value, 700);
            assert_eq!(world.model.started.available_permits() as u64, round + 1, "it was executed once");
            let closed = again.close().await.expect("a receipt");
            assert_eq!(closed.receipt.spent, Amount::new(700), "round {round}");
        }
    })
    .await;
}

/// `[pay.key.once]`: a record that survives the process has the answer, and of a call that was cut off that it was made.
#[cfg(feature = "redb")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_in_a_durable_store_outlive_the_payee() {
    use tollway::protocol::payment::{ChannelId, keccak256};
    use tollway::store::{KeptAnswer, RedbStore};
    within(async {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("payee.redb");
        let reopened = || Arc::new(RedbStore::open(&file).expect("a store"));
        let durable = |store: Arc<RedbStore>| move |config: &mut PayeeConfig| config.store = store;
        let first_store = reopened();
        let first = world(durable(first_store.clone())).await;
        let wallet = first.wallet(1_000_000, 5_000);
        let ask = |paid: &PaidConnection, name, key: &'static str| {
            let connection = paid.connection().clone();
            async move { connection.call::<_, u64>(method(name), &700u64).with_idempotency_key(key).response().await }
        };
        let paid = first.open(&wallet).await;
        assert_eq!(ask(&paid, "answer", "kept").await.expect("an answer").charged, Amount::new(700));
        let key_of = |channel: ChannelId, key: &[u8]| {
            keccak256(&[channel.0.as_slice(), &method("answer").0.to_be_bytes(), key].concat())
        };
        let id = key_of(paid.channel_id(), b"kept");
        // It is known what it has cost when the response is on its way, and noted then.
        let store = first_store.clone();
        while store.load_answer(id).await.expect("a row").and_then(|kept| kept.charged) != Some(Amount::new(700)) {
            tokio::task::yield_now().await;
        }
        let cut = tokio::spawn(ask(&paid, "slow", "cut off"));
        first.model.started.acquire_many(2).await.expect("open").forget();
        let ledger = first.ledger.clone();
        // The process is gone: nothing of it answers any more, and the file is as a crash leaves it.
        let copy = dir.path().join("copy.redb");
        std::fs::copy(&file, &copy).expect("a copy");
        let paid_from = paid.channel_id();
        drop(paid);
        cut.abort();
        let store = Arc::new(RedbStore::open(&copy).expect("a store"));
        // As if the process had died before it was known what this had cost.
        let kept = store.load_answer(id).await.expect("a row").expect("an answer");
        let unknown = key_of(paid_from, b"unknown");
        store.keep_answer(unknown, Some(KeptAnswer { charged: None, ..kept })).await.expect("a write");
        let second = world_on(ledger, durable(store)).await;
        let paid = second.open(&wallet).await;
        let again = ask(&paid, "answer", "kept").await.expect("an answer");
        assert_eq!((again.value, again.charged), (700, Amount::ZERO));
        let lost = ask(&paid, "slow", "cut off").await;
        assert!(matches!(lost, Err(CallError::Refused(reason)) if reason.code == code::ANSWER_NOT_KEPT));
        let unknown = ask(&paid, "answer", "unknown").await;
        assert!(matches!(unknown, Err(CallError::Refused(reason)) if reason.code == code::ANSWER_NOT_KEPT));
        assert_eq!(second.model.started.available_permits(), 0, "nothing was executed again");
    })
    .await;
}

//! What an honest wallet loses to a payee and a ledger that do not keep to the rules: nothing. Over loopback TCP, since it
//! connects to the ledger by URL.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::Notify;
use tollway_protocol::limits::ConnectionLimits;
use tollway_protocol::payment::{
    Address, Amount, ChannelDescriptor, Hash, PaymentMessage, Receipt, ReceiptStatus, ResumeRefusal, SignedReceipt,
};

use super::hostile_tests::{PAYEE, PAYER, Raw, Shop, World, key, method, price_of, read, units, world};
use super::wallet::accepted_by;
use super::{
    MemoryWallet, PayeeConfig, StoredReceipt, Wallet, WalletChannel, WalletConfig, WalletError, WalletPhase,
    WalletStore, WalletStoreError,
};
use crate::escrow::{EscrowChannel, LedgerService};
use crate::future::BoxFuture;
use crate::rpc::{BoxReply, CallError, IncomingCall, MethodId, Reply, Service, Services};
use crate::session::{OpenError, Session, SessionConfig};

/// A ledger that answers an order to open with somebody else's channel.
struct LyingLedger {
    honest: LedgerService,
    lie: Arc<Mutex<Option<EscrowChannel>>>,
    /// Top-ups that get no answer.
    deaf: Arc<AtomicU32>,
}

impl Service for LyingLedger {
    fn name(&self) -> &str {
        self.honest.name()
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        let lie = self.lie.lock().clone();
        let is_top_up = call.method() == MethodId::of(self.name(), 1, "top_up");
        if is_top_up && self.deaf.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
        {
            return Box::pin(async { Reply::failed() });
        }
        match lie {
            Some(lie) if call.method() == MethodId::of(self.name(), 1, "open") => {
                Box::pin(async move { Reply::ok(&lie) })
            }
            _ => self.honest.call(call),
        }
    }
}

struct Market {
    world: World,
    session: Session,
    lie: Arc<Mutex<Option<EscrowChannel>>>,
    deaf: Arc<AtomicU32>,
}

async fn market(change: impl FnOnce(&mut PayeeConfig)) -> Market {
    let any = "tcp://127.0.0.1:0".parse().unwrap();
    let mut server = crate::Server::bind(&any, SessionConfig::default()).await.unwrap();
    let endpoint = server.endpoint().clone();
    let world = world(|config| {
        config.ledger_url = Some(endpoint.to_string());
        change(config);
    });
    let (lie, deaf) = (Arc::default(), Arc::<AtomicU32>::default());
    let honest = LedgerService::new(world.faulty.ledger.clone());
    let ledger = LyingLedger { honest, lie: Arc::clone(&lie), deaf: deaf.clone() };
    let services = Services::new().with_paid(Shop, world.payee.clone()).with(ledger);
    server.set_config(SessionConfig { services, ..SessionConfig::default() });
    tokio::spawn(server.run(std::future::pending(), Duration::ZERO));
    let session = crate::connect(&endpoint, SessionConfig::default()).await.unwrap();
    Market { world, session, lie, deaf }
}

fn config(budget: u128, max_ahead: u128) -> WalletConfig {
    let mut config = WalletConfig::new(key(PAYER), units(budget));
    config.payee = Some(key(PAYEE).address());
    config.max_ahead = Some(units(max_ahead));
    config
}

fn wallet(budget: u128, max_ahead: u128) -> Wallet {
    Wallet::new(config(budget, max_ahead))
}

/// Whoever accepts must have shown that it can sign for the payee: else nothing is authorised. `[pay.receipt.accept]`
#[tokio::test]
async fn an_accept_without_a_fresh_receipt_of_the_channel_is_none() {
    let world = world(|_| {});
    let channel = world.deposit(1_000).await;
    let receipt = |sequence, status| Receipt {
        sequence,
        time_ms: 0,
        accepted: Amount::ZERO,
        spent: Amount::ZERO,
        units: 0,
        settled: Amount::ZERO,
        status,
        reference: None,
    };
    let message = |receipt: &Receipt, channel: &ChannelDescriptor, signer| {
        PaymentMessage::Receipt(SignedReceipt::sign(receipt, channel, &key(signer)).unwrap()).encode()
    };
    let good = message(&receipt(5, ReceiptStatus::Open), &channel, PAYEE);
    assert_eq!(accepted_by(&good, &channel, 4).unwrap().1.sequence, 5);
    let twin = ChannelDescriptor { salt: Hash([7; 32]), ..channel.clone() };
    let thief = ChannelDescriptor { payee: key(PAYER).address(), ..channel.clone() };
    let mut altered = good.clone();
    *altered.last_mut().unwrap() ^= 1;
    let cases = [
        ("nothing", Vec::new(), 4),
        ("another message", PaymentMessage::Decline { reason: String::new() }.encode(), 4),
        ("an old one", good, 5),
        ("one of another channel", message(&receipt(5, ReceiptStatus::Open), &twin, PAYEE), 4),
        ("one that somebody else has signed", message(&receipt(5, ReceiptStatus::Open), &thief, PAYER), 4),
        ("one that was altered", altered, 4),
        ("one of a channel that has closed", message(&receipt(5, ReceiptStatus::Closed), &channel, PAYEE), 4),
    ];
    for (what, message, last) in cases {
        assert!(matches!(accepted_by(&message, &channel, last), Err(WalletError::BadMessage(_))), "{what}");
    }
}

/// What a wallet signs names the channel that it has ordered, whatever a ledger calls it: else a ledger could have it
/// sign for a deposit on a real chain.
#[tokio::test]
async fn a_wallet_signs_for_no_channel_that_a_ledger_makes_up() {
    let market = market(|_| {}).await;
    let honest = market.world.deposit(1_000).await;
    let escrow = Address([0xee; 20]);
    let descriptor = ChannelDescriptor { chain_id: 1, escrow, ..honest };
    let deposit = units(1_000_000);
    *market.lie.lock() = Some(EscrowChannel {
        descriptor,
        deposit,
        settled: Amount::ZERO,
        close_requested_at_ms: None,
        finalized: false,
    });
    match wallet(1_000_000, 5_000).open(&market.session, "shop").await {
        Err(WalletError::Escrow(error)) => assert!(error.contains("another channel"), "{error}"),
        other => panic!("{other:?}"),
    }
}

/// While a close waits for the calls to end, they are paid.
#[tokio::test]
async fn a_close_pays_for_the_calls_that_it_waits_for() {
    let market = market(|_| {}).await;
    let paid = wallet(1_000_000, 5_000).open(&market.session, "shop").await.unwrap();
    let connection = paid.connection().clone();
    let reading = tokio::spawn(async move { read(&connection, 200).await });
    while paid.stats().received.is_zero() {
        tokio::task::yield_now().await;
    }
    let closed = tokio::time::timeout(Duration::from_secs(10), paid.close()).await.unwrap().unwrap();
    assert_eq!(reading.await.unwrap(), Ok(200));
    assert_eq!((closed.receipt.status, closed.receipt.settled), (ReceiptStatus::Closed, price_of(200)));
}

/// More calls at once than are authorised ahead wait for each other; none is declined.
#[tokio::test]
async fn calls_beyond_what_is_authorised_ahead_wait_for_those_before_them() {
    let market = market(|_| {}).await;
    let paid = wallet(1_000_000, 1_300).open(&market.session, "shop").await.unwrap();
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..60 {
        let connection = paid.connection().clone();
        calls.spawn(async move { connection.call::<_, ()>(method("slow"), &30u64).await });
    }
    while let Some(answer) = calls.join_next().await {
        assert_eq!(answer.unwrap(), Ok::<(), CallError>(()), "{:?}", paid.failure());
    }
    let closed = paid.close().await.unwrap();
    assert_eq!(closed.receipt.settled, units(6_000));
    assert!(closed.stats.peak_ahead <= units(1_300), "{:?}", closed.stats);
}

/// A deposit below the budget that does not reach is said at once, and by name.
#[tokio::test]
async fn a_deposit_that_is_too_small_is_declined_while_calls_run() {
    let market = market(|config| config.suggested_deposit = units(2_500)).await;
    let mut config = config(1_000_000, 1_300);
    config.deposit_limit = Some(units(2_500));
    let paid = Wallet::new(config).open(&market.session, "shop").await.unwrap();
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..40 {
        let connection = paid.connection().clone();
        calls.spawn(async move { connection.call::<_, ()>(method("slow"), &30u64).await });
    }
    let answers = async { while calls.join_next().await.is_some() {} };
    tokio::time::timeout(Duration::from_secs(10), answers).await.expect("what cannot be paid is told so");
    assert!(matches!(paid.failure(), Some(WalletError::Declined(_))), "{:?}", paid.failure());
    assert_eq!(paid.close().await.unwrap().receipt.settled, units(2_500));
}

/// A deposit that is below what is wanted grows by itself, up to the limit, and delivery goes on.
#[tokio::test]
async fn a_deposit_is_topped_up_while_calls_run_and_never_above_its_limit() {
    let market = market(|config| config.suggested_deposit = units(2_500)).await;
    let paid = wallet(10_000, 1_300).open(&market.session, "shop").await.unwrap();
    assert_eq!(paid.stats().deposit, units(2_500));
    for _ in 0..50 {
        let called = paid.connection().call::<_, ()>(method("slow"), &1u64);
        let called = tokio::time::timeout(Duration::from_secs(30), called).await.unwrap();
        assert_eq!(called, Ok(()), "{:?}", paid.failure());
    }
    let deposit = paid.stats().deposit;
    assert!(deposit >= units(5_000) && deposit <= units(10_000), "{deposit}");
    let id = paid.channel_id();
    assert_eq!(paid.close().await.unwrap().receipt.settled, units(5_000));
    market.world.faulty.ledger.read(|ledger| assert_eq!(ledger.channel(id).unwrap().deposit, deposit));
}

/// A ledger that is away for a moment ends nothing: the deposit is raised when it is back.
#[tokio::test]
async fn a_top_up_whose_ledger_is_away_is_ordered_again() {
    let market = market(|config| config.suggested_deposit = units(2_500)).await;
    let paid = wallet(10_000, 1_300).open(&market.session, "shop").await.unwrap();
    market.deaf.store(2, Ordering::Relaxed);
    for _ in 0..30 {
        let called = paid.connection().call::<_, ()>(method("slow"), &1u64);
        let called = tokio::time::timeout(Duration::from_secs(30), called).await.unwrap();
        assert_eq!(called, Ok(()), "{:?}", paid.failure());
    }
    assert_eq!(market.deaf.load(Ordering::Relaxed), 0, "it was asked in vain");
    assert!(paid.stats().deposit > units(2_500));
    assert_eq!(paid.close().await.unwrap().receipt.settled, units(3_000));
}

/// A payee that names a settlement above what the close voucher stated is named itself, with both amounts.
#[tokio::test]
async fn a_payee_that_claims_more_than_the_close_states_is_found_out() {
    let market = market(|_| {}).await;
    let paid = wallet(1_000_000, 5_000).open(&market.session, "shop").await.unwrap();
    assert_eq!(read(paid.connection(), 3).await, Ok(3));
    market.world.faulty.greedy.store(1, Ordering::Relaxed);
    let (closed_at, settled) = (price_of(3), price_of(3).saturating_add(units(1)));
    match paid.close().await {
        Err(error) => assert_eq!(error, WalletError::Overcharged { closed_at, settled }),
        Ok(closed) => panic!("{closed:?}"),
    }
    // What the ledger has really paid is what the voucher says.
    assert_eq!(market.world.earned(), closed_at);
}

/// What is kept is paid from again, with the counts as they stood; nothing is deposited twice.
#[tokio::test]
async fn a_channel_that_is_kept_is_resumed_with_its_counts() {
    let market = market(|config| config.abandon_after = Duration::from_secs(600)).await;
    let wallet = wallet(100_000, 5_000);
    let mut before = Amount::ZERO;
    let mut channel = None;
    for _ in 0..3 {
        let paid = wallet.open(&market.session, "shop").await.unwrap();
        assert_eq!(paid.stats().received, before);
        assert_eq!(*channel.get_or_insert(paid.channel_id()), paid.channel_id());
        assert_eq!(read(paid.connection(), 50).await, Ok(50));
        let kept = paid.keep().await.unwrap();
        assert!(kept.stats.received > before);
        before = kept.stats.received;
    }
    let closed = wallet.open(&market.session, "shop").await.unwrap().close().await.unwrap();
    assert_eq!((closed.receipt.spent, closed.receipt.settled), (before, before));
    let channels = wallet.channels().await.unwrap();
    assert_eq!(channels.len(), 1);
    assert_eq!(channels[0].phase, WalletPhase::Ended { settled: before });
    // One receipt for each opening, and the final one; their numbers rise.
    let numbers: Vec<_> = wallet.receipts().await.unwrap().iter().map(|kept| kept.receipt.sequence).collect();
    assert_eq!(numbers.len(), 5);
    assert!(numbers.is_sorted_by(|one, next| one < next), "{numbers:?}");
}

/// A wallet's store that answers once with what it had a while ago.
#[derive(Default)]
struct SlowWallet {
    wallet: MemoryWallet,
    /// Whether the next list is held back until `go`.
    slow: AtomicBool,
    read: Notify,
    go: Notify,
}

impl WalletStore for SlowWallet {
    fn save(
        &self,
        channel: WalletChannel,
        receipt: Option<SignedReceipt>,
    ) -> BoxFuture<'_, Result<(), WalletStoreError>> {
        self.wallet.save(channel, receipt)
    }

    fn channels(&self) -> BoxFuture<'_, Result<Vec<WalletChannel>, WalletStoreError>> {
        Box::pin(async {
            let channels = self.wallet.channels().await;
            if self.slow.swap(false, Ordering::Relaxed) {
                self.read.notify_one();
                self.go.notified().await;
            }
            channels
        })
    }

    fn receipts(&self) -> BoxFuture<'_, Result<Vec<StoredReceipt>, WalletStoreError>> {
        self.wallet.receipts()
    }
}

/// A channel that was in use when the list of channels was read, and is free when it is taken, is resumed as it is then.
#[tokio::test]
async fn a_channel_that_is_taken_is_as_its_last_user_left_it() {
    let market = market(|config| config.abandon_after = Duration::from_secs(600)).await;
    let store = Arc::new(SlowWallet::default());
    let wallet = Wallet::new(WalletConfig { store: store.clone(), ..config(100_000, 5_000) });
    let paid = wallet.open(&market.session, "shop").await.unwrap();
    store.slow.store(true, Ordering::Relaxed);
    let opening = tokio::spawn({
        let (wallet, session) = (wallet.clone(), market.session.clone());
        async move { wallet.open(&session, "shop").await }
    });
    store.read.notified().await;
    assert_eq!(read(paid.connection(), 20).await, Ok(20));
    let kept = paid.keep().await.unwrap();
    store.go.notify_one();
    let next = tokio::time::timeout(Duration::from_secs(30), opening).await.unwrap().unwrap().unwrap();
    assert_eq!((next.channel_id(), next.stats().received), (kept.channel_id, kept.stats.received));
}

/// Two connections at once are two channels; one that is free again is taken before another is made.
#[tokio::test]
async fn connections_at_the_same_time_have_channels_of_their_own() {
    let market = market(|config| config.abandon_after = Duration::from_secs(600)).await;
    let wallet = wallet(100_000, 5_000);
    let first = wallet.open(&market.session, "shop").await.unwrap();
    let second = wallet.open(&market.session, "shop").await.unwrap();
    assert_ne!(first.channel_id(), second.channel_id());
    let kept = first.keep().await.unwrap().channel_id;
    // The task of a kept connection lets go of its channel as it ends.
    let third = loop {
        let third = wallet.open(&market.session, "shop").await.unwrap();
        if third.channel_id() == kept {
            break third;
        }
        third.close().await.unwrap();
    };
    third.close().await.unwrap();
    second.close().await.unwrap();
}

/// Withdrawn without the payee: announced, waited for, taken back.
#[tokio::test]
async fn a_channel_is_withdrawn_without_its_payee_after_the_grace_period() {
    let market = market(|config| config.abandon_after = Duration::from_secs(600)).await;
    let wallet = wallet(100_000, 5_000);
    let paid = wallet.open(&market.session, "shop").await.unwrap();
    let id = paid.keep().await.unwrap().channel_id;
    let find = async || wallet.channels().await.unwrap().into_iter().find(|channel| channel.id() == id).unwrap();
    let asked = wallet.request_close(find().await).await.unwrap();
    assert_eq!(asked.phase, WalletPhase::Withdrawing);
    match wallet.withdraw(asked).await {
        Err(WalletError::Escrow(error)) => assert!(error.contains("grace period"), "{error}"),
        other => panic!("{other:?}"),
    }
    // A crash between the record and the order: the order is made up for.
    let lost = wallet.open(&market.session, "shop").await.unwrap().keep().await.unwrap().channel_id;
    assert_ne!(lost, id);
    let known = wallet.channels().await.unwrap();
    let mut record = known.into_iter().find(|channel| channel.id() == lost).unwrap();
    record.phase = WalletPhase::Withdrawing;
    wallet.store().save(record.clone(), None).await.unwrap();
    match wallet.withdraw(record).await {
        Err(WalletError::Escrow(error)) => assert!(error.contains("grace period"), "{error}"),
        other => panic!("{other:?}"),
    }
    // A channel that is being withdrawn is not paid from.
    let other = wallet.open(&market.session, "shop").await.unwrap();
    assert_ne!(other.channel_id(), id);
    other.close().await.unwrap();
}

/// `[pay.open.limits]`
#[tokio::test]
async fn a_payer_that_takes_no_full_answer_is_refused() {
    let market = market(|_| {}).await;
    let deposit = market.world.deposit(100_000).await;
    let tiny = ConnectionLimits { max_body: 1, ..ConnectionLimits::default() };
    let world = &market.world;
    match Raw::open_limited(world, &market.session, &deposit, (1, 0), ("shop", tiny)).await {
        Err(OpenError::Rejected { reason, .. }) => {
            assert!(reason.text.contains("takes answers of 1 bytes"), "{reason}")
        }
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("what it is too small for would be free"),
    }
    assert!(Raw::open(world, &market.session, &deposit, 2, 0).await.is_ok());
}

/// What a payee has not been paid is capped: with an escrow that does not answer it stops, and with one that does it goes
/// on, paid as it goes.
#[tokio::test]
async fn what_is_unclaimed_is_settled_in_passing_and_capped_while_the_escrow_is_away() {
    let cap = 2_000;
    let market = market(|config| {
        (config.lease, config.in_flight_cap) = (units(1_100), units(8_000));
        (config.settle_above, config.exposure_cap) = (units(1_000), units(cap));
        config.settle_retry = Duration::from_millis(20);
    })
    .await;
    let deaf = &market.world.faulty.deaf;
    deaf.store(u32::MAX, Ordering::Relaxed);
    let paid = wallet(100_000, 1_300).open(&market.session, "shop").await.unwrap();
    let id = paid.channel_id();
    let connection = paid.connection().clone();
    let calls = tokio::spawn(async move {
        for _ in 0..60 {
            connection.call::<_, ()>(method("slow"), &0u64).await.unwrap();
        }
    });
    // 60 calls of 100 are wanted; no more is delivered than may be unclaimed, with the lease that was under way.
    while paid.stats().received < units(cap - 400) {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!calls.is_finished());
    assert!(paid.stats().received <= units(cap + 1_100), "{:?}", paid.stats());
    assert_eq!(paid.failure(), None);
    deaf.store(0, Ordering::Relaxed);
    tokio::time::timeout(Duration::from_secs(30), calls).await.unwrap().unwrap();
    let settled = market.world.faulty.ledger.read(|ledger| ledger.channel(id).unwrap().settled);
    assert!(settled > units(cap) && settled <= units(6_000), "{settled}");
    assert_eq!(paid.close().await.unwrap().receipt.settled, units(6_000));
}

/// A payee that breaks off for a living: what it takes by that is bounded by the loss budget, and then it is left.
#[tokio::test]
async fn a_payee_that_breaks_off_again_and_again_gets_no_more_than_the_loss_budget() {
    let market = market(|config| {
        (config.lease, config.in_flight_cap) = (units(1_100), units(8_000));
        config.abandon_after = Duration::from_secs(600);
    })
    .await;
    let mut config = config(1_000_000, 1_300);
    config.loss_budget = Some(units(1_000));
    let wallet = Wallet::new(config.clone());
    let mut rounds = 0;
    let (lost, limit) = loop {
        let paid = match wallet.open(&market.session, "shop").await {
            Ok(paid) => paid,
            Err(WalletError::Resume(ResumeRefusal::LossBudget { lost, limit })) => break (lost, limit),
            Err(other) => panic!("{other}"),
        };
        let id = paid.channel_id();
        paid.connection().call::<_, ()>(method("slow"), &0u64).await.unwrap();
        paid.keep().await.unwrap();
        rounds += 1;
        assert!(rounds < 100, "it is never left");
        // It claims to have delivered 300 more, which were signed for and never came.
        market.world.claim(id, 300).await;
    };
    assert!(rounds >= 3 && lost > limit && limit <= units(1_000), "{rounds} rounds, {lost} of {limit}");
    let channels = wallet.channels().await.unwrap();
    assert!(channels.iter().all(|channel| channel.phase == WalletPhase::Withdrawing), "{channels:?}");
    let booked = channels.iter().map(|channel| channel.book.lost_in_flight.units()).sum::<u128>();
    assert!(booked <= 1_000, "{booked}");
    // Nor is another channel opened with it.
    match wallet.open(&market.session, "shop").await {
        Err(WalletError::Resume(ResumeRefusal::LossBudget { .. })) => {}
        other => panic!("{other:?}"),
    }
}

//! What a payer who does not keep to the rules gains: nothing. And what a payee loses to a store or an escrow that fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tollway_protocol::error::{ConnectionEnd, Reason, code};
use tollway_protocol::limits::ConnectionLimits;
use tollway_protocol::payment::channel::ChannelPhase;
use tollway_protocol::payment::ledger_messages::{
    Close, LedgerIdentity, LedgerMessage, OpenChannel, RequestClose, Settle, Signed, TopUp, Withdraw,
};
use tollway_protocol::payment::{
    Address, Amount, ChannelDescriptor, ChannelId, CloseVoucher, CredentialDraft, Hash, MethodPrice, PaymentMessage,
    Place, Price, Quote, SecretKey, Signature, Voucher, VoucherProtocol,
};
use tollway_protocol::session::PayerMoney;

use super::{Mailbox, Payee, PayeeConfig};
use crate::connection::Connection;
use crate::escrow::{Escrow, EscrowChannel, EscrowError, Ledger, LedgerConfig, LocalLedger, Settlement};
use crate::future::BoxFuture;
use crate::rpc::{BoxReply, IncomingCall, MethodId, Reply, Rx, Service, Services, StreamError, stream};
use crate::session::{OpenError, Session, SessionConfig};
use crate::shared::{Opening, Shared};
use crate::store::{ChannelRecord, ChannelStore, ChannelWatch, MemoryStore, StoreError};

pub(super) const PAYER: u8 = 1;
pub(super) const PAYEE: u8 = 2;
const LEDGER: u8 = 9;
const ITEM: usize = 1000;

pub(super) fn key(seed: u8) -> SecretKey {
    SecretKey::from_bytes([seed; 32]).unwrap()
}

pub(super) fn units(amount: u128) -> Amount {
    Amount::new(amount)
}

pub(super) fn method(name: &str) -> MethodId {
    MethodId::of("shop", 1, name)
}

pub(super) struct Shop;

impl Service for Shop {
    fn name(&self) -> &str {
        "shop"
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        if call.method() == method("slow") {
            return Box::pin(async move {
                tokio::time::sleep(Duration::from_millis(call.args().unwrap())).await;
                Reply::ok(&())
            });
        }
        Box::pin(async move {
            let (mut tx, rx) = stream::<Bytes>();
            let count = call.args::<u64>().unwrap();
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
    }
}

/// 100 for a slow call; 1 for each byte of a stream.
fn prices() -> Vec<MethodPrice> {
    let priced = |name: &str, price| MethodPrice {
        method_id: method(name).0,
        name: name.to_owned(),
        price,
        max_item_bytes: 1100,
        max_answer_bytes: 100,
    };
    vec![
        priced("slow", Price { call: units(100), ..Price::default() }),
        priced("stream", Price::per_bytes_out("1/B".parse().unwrap())),
    ]
}

/// The price of a call to "stream" that brings so many items: with their own lengths, and the byte of the answer.
pub(super) fn price_of(items: u128) -> Amount {
    units(items * (ITEM as u128 + 2) + 1)
}

/// A ledger and a store that fail when they are told to.
#[derive(Clone)]
pub(super) struct Faulty {
    pub(super) ledger: LocalLedger,
    store: Arc<MemoryStore>,
    /// Orders to settle or close that are not answered.
    pub(super) deaf: Arc<AtomicU32>,
    /// Closes that it claims to have paid one base unit more for.
    pub(super) greedy: Arc<AtomicU32>,
    /// Writes that fail.
    broken: Arc<AtomicU32>,
}

fn take_one(count: &AtomicU32) -> bool {
    count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
}

impl Escrow for Faulty {
    fn chain_id(&self) -> u64 {
        self.ledger.chain_id()
    }

    fn address(&self) -> Address {
        self.ledger.address()
    }

    fn protocol(&self) -> VoucherProtocol {
        self.ledger.protocol()
    }

    fn channel(&self, id: ChannelId) -> BoxFuture<'_, Result<Option<EscrowChannel>, EscrowError>> {
        self.ledger.channel(id)
    }

    fn open(&self, order: Signed<OpenChannel>) -> BoxFuture<'_, Result<EscrowChannel, EscrowError>> {
        Escrow::open(&self.ledger, order)
    }

    fn top_up(&self, order: Signed<TopUp>) -> BoxFuture<'_, Result<EscrowChannel, EscrowError>> {
        self.ledger.top_up(order)
    }

    fn settle(&self, order: Signed<Settle>, voucher: Signature) -> BoxFuture<'_, Result<Settlement, EscrowError>> {
        if take_one(&self.deaf) {
            return Box::pin(async { Err(EscrowError::Unavailable("nobody listens".into())) });
        }
        self.ledger.settle(order, voucher)
    }

    fn close(
        &self,
        order: Signed<Close>,
        voucher: Option<Signature>,
    ) -> BoxFuture<'_, Result<Settlement, EscrowError>> {
        if take_one(&self.deaf) {
            return Box::pin(async { Err(EscrowError::Unavailable("nobody listens".into())) });
        }
        Box::pin(async move {
            let mut settlement = self.ledger.close(order, voucher).await?;
            if take_one(&self.greedy) {
                settlement.settled = settlement.settled.saturating_add(units(1));
            }
            Ok(settlement)
        })
    }

    fn request_close(&self, order: Signed<RequestClose>) -> BoxFuture<'_, Result<EscrowChannel, EscrowError>> {
        self.ledger.request_close(order)
    }

    fn withdraw(&self, order: Signed<Withdraw>) -> BoxFuture<'_, Result<Settlement, EscrowError>> {
        self.ledger.withdraw(order)
    }
}

impl ChannelStore for Faulty {
    fn load(&self, id: ChannelId) -> BoxFuture<'_, Result<Option<ChannelRecord>, StoreError>> {
        self.store.load(id)
    }

    fn update(
        &self,
        id: ChannelId,
        expected_version: Option<u64>,
        record: ChannelRecord,
    ) -> BoxFuture<'_, Result<u64, StoreError>> {
        if take_one(&self.broken) {
            return Box::pin(async { Err(StoreError::Backend("the disk is full".into())) });
        }
        self.store.update(id, expected_version, record)
    }

    fn evict(&self, id: ChannelId, expected_version: u64) -> BoxFuture<'_, Result<(), StoreError>> {
        self.store.evict(id, expected_version)
    }

    fn watch(&self, id: ChannelId) -> ChannelWatch {
        self.store.watch(id)
    }

    fn list(&self, after: Option<ChannelId>, limit: usize) -> BoxFuture<'_, Result<Vec<ChannelId>, StoreError>> {
        self.store.list(after, limit)
    }
}

/// A payee that serves over pipes in memory.
pub(super) struct World {
    pub(super) faulty: Faulty,
    pub(super) payee: Arc<Payee>,
}

pub(super) fn world(change: impl FnOnce(&mut PayeeConfig)) -> World {
    let config = LedgerConfig { dev: true, ..LedgerConfig::default() };
    let faulty = Faulty {
        ledger: LocalLedger::new(Ledger::new(LedgerIdentity::of(&key(LEDGER)), config)),
        store: Arc::new(MemoryStore::new()),
        deaf: Arc::default(),
        greedy: Arc::default(),
        broken: Arc::default(),
    };
    let mut config = PayeeConfig::new(key(PAYEE), Arc::new(faulty.clone()), Arc::new(faulty.clone()), "shop", prices());
    config.abandon_after = Duration::from_millis(20);
    change(&mut config);
    World { faulty, payee: Payee::new(config).unwrap() }
}

impl World {
    pub(super) async fn connect(&self) -> Session {
        let (ours, theirs) = crate::conduit::memory::pair(64 * 1024);
        let services = Services::new().with_paid(Shop, self.payee.clone());
        let config = SessionConfig { services, ..SessionConfig::default() };
        let (ours, theirs) =
            tokio::join!(Session::connect(ours, SessionConfig::default()), Session::accept(theirs, config));
        let theirs = theirs.unwrap();
        tokio::spawn(async move { theirs.closed().await });
        ours.unwrap()
    }

    pub(super) fn order<M: LedgerMessage>(&self, message: M) -> Signed<M> {
        Signed::sign(message, &LedgerIdentity::of(&key(LEDGER)), &key(PAYER))
    }

    pub(super) async fn deposit(&self, deposit: u128) -> ChannelDescriptor {
        let order = OpenChannel {
            payer: key(PAYER).address(),
            payee: key(PAYEE).address(),
            token: Address::ZERO,
            salt: Hash([5; 32]),
            authorized_signer: Address::ZERO,
            deposit: units(deposit),
            nonce: 1,
            expiry: 0,
        };
        Escrow::open(&self.faulty.ledger, self.order(order)).await.unwrap().descriptor
    }

    /// Books so much more as delivered than was, once nobody is connected: a payee that lies, or has crashed in a lease.
    pub(super) async fn claim(&self, id: ChannelId, more: u128) {
        let store = &self.faulty.store;
        loop {
            let mut record = store.load(id).await.unwrap().unwrap();
            let snapshot = &mut record.snapshot;
            let given_back = snapshot.leased == snapshot.spent;
            snapshot.leased = snapshot.spent.saturating_add(units(more)).min(snapshot.accepted);
            snapshot.spent = snapshot.leased;
            let version = record.version;
            if given_back && store.update(id, Some(version), record).await.is_ok() {
                return;
            }
            tokio::task::yield_now().await;
        }
    }

    pub(super) fn earned(&self) -> Amount {
        self.faulty.ledger.read(|ledger| ledger.balance(key(PAYEE).address(), Address::ZERO))
    }

    /// Ends the session on both sides: what is left has only tokio's clock, which a test may stop.
    async fn end(&self, session: Session, payer: Raw) {
        drop(payer);
        session.close(Reason::none());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }

    /// Waits until the payee has let go of all channels.
    pub(super) async fn settled(&self) -> Amount {
        let mut running = self.payee.running.subscribe();
        running.wait_for(|&count| count == 0).await.unwrap();
        self.earned()
    }
}

/// A payer that says what it likes.
pub(super) struct Raw {
    pub(super) connection: Connection,
    mailbox: Arc<Mailbox>,
    descriptor: ChannelDescriptor,
}

impl Raw {
    pub(super) async fn open(
        world: &World,
        session: &Session,
        descriptor: &ChannelDescriptor,
        epoch: u64,
        received: u128,
    ) -> Result<Raw, OpenError> {
        Raw::open_signed(world, session, descriptor, (epoch, received), "shop").await
    }

    pub(super) async fn open_signed(
        world: &World,
        session: &Session,
        descriptor: &ChannelDescriptor,
        counts: (u64, u128),
        signed_for: &str,
    ) -> Result<Raw, OpenError> {
        Raw::open_limited(world, session, descriptor, counts, (signed_for, ConnectionLimits::default())).await
    }

    pub(super) async fn open_limited(
        world: &World,
        session: &Session,
        descriptor: &ChannelDescriptor,
        (epoch, received): (u64, u128),
        (signed_for, limits): (&str, ConnectionLimits),
    ) -> Result<Raw, OpenError> {
        let Err(OpenError::PaymentRequired { terms }) = session.open("shop").await else { panic!("it has a price") };
        let draft = CredentialDraft {
            challenge: Quote::decode(&terms).unwrap().challenge,
            descriptor: descriptor.clone(),
            epoch,
            received: units(received),
            proof: Vec::new(),
            voucher: None,
        };
        let place = Place { service: signed_for, exporter: Hash::ZERO };
        let credential = draft.sign(&key(PAYER), place).unwrap().encode().unwrap();
        let prices = world.payee.prices.clone();
        let money = PayerMoney { prices, received: units(received), mark: Amount::MAX, hold: Amount::MAX };
        let mailbox = Arc::new(Mailbox::default());
        let paid = (Bytes::from(credential), money, mailbox.clone());
        let opened = session.open_with(Opening { paid: Some(paid), ..Opening::of("shop", limits) }).await;
        Ok(Raw { connection: opened?.0, mailbox, descriptor: descriptor.clone() })
    }

    pub(super) fn shared(&self) -> &Arc<Shared> {
        self.connection.shared()
    }

    pub(super) fn send(&self, message: &PaymentMessage) {
        self.shared().send_payment(self.connection.id(), message.encode().into()).unwrap();
    }

    pub(super) fn pay(&self, amount: u128) {
        self.send(&self.voucher(amount));
    }

    pub(super) fn voucher(&self, amount: u128) -> PaymentMessage {
        let domain = self.descriptor.voucher_domain();
        let voucher = Voucher::sign(&domain, &key(PAYER), self.descriptor.id(), units(amount)).unwrap();
        PaymentMessage::Voucher { amount: units(amount), signature: voucher.signature, received: units(0) }
    }

    pub(super) fn close_message(&self, amount: Amount) -> PaymentMessage {
        let domain = self.descriptor.voucher_domain();
        let voucher = CloseVoucher::sign(&domain, &key(PAYER), self.descriptor.id(), amount).unwrap();
        PaymentMessage::Close { voucher, received: amount }
    }

    /// The next message of the payee's.
    pub(super) async fn next(&self) -> PaymentMessage {
        let letters = self.mailbox.take().await;
        PaymentMessage::decode(letters.messages.front().expect("a message")).unwrap()
    }

    pub(super) fn received(&self) -> Amount {
        self.connection.money().unwrap().amount
    }

    pub(super) async fn read(&self, count: u64) -> Result<u64, StreamError> {
        read(&self.connection, count).await
    }
}

pub(super) async fn read(connection: &Connection, count: u64) -> Result<u64, StreamError> {
    let mut items: Rx<Bytes> = match connection.call(method("stream"), &count).await {
        Ok(items) => items,
        Err(_) => return Ok(0),
    };
    let mut read = 0;
    while items.recv().await?.is_some() {
        read += 1;
    }
    Ok(read)
}

pub(super) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("it ends in time")
}

/// A close ends the service: what was leased before is no longer for sale.
#[tokio::test]
async fn nothing_is_delivered_once_the_close_is_taken() {
    within(async {
        let world = world(|_| {});
        let descriptor = world.deposit(1_000_000).await;
        let session = world.connect().await;
        let payer = Raw::open(&world, &session, &descriptor, 1, 0).await.unwrap();
        payer.pay(50_000);
        assert_eq!(payer.read(5).await, Ok(5));
        payer.send(&payer.close_message(price_of(5)));
        loop {
            if let PaymentMessage::Receipt(_) = payer.next().await {
                break;
            }
        }
        let _refused = payer.read(20).await;
        assert_eq!(payer.received(), price_of(5));
        assert_eq!(world.earned(), price_of(5));
    })
    .await;
}

/// A close and the end of the connection arrive together: the close is compared with all that was spent.
#[tokio::test]
async fn a_close_that_comes_with_the_end_of_the_connection_does_not_hide_what_was_spent() {
    within(async {
        let world = world(|config| config.lease = units(40_000));
        let descriptor = world.deposit(1_000_000).await;
        let session = world.connect().await;
        let payer = Raw::open(&world, &session, &descriptor, 1, 0).await.unwrap();
        payer.pay(50_000);
        // Above the low mark: the payee's task has no reason to look at the count.
        assert_eq!(payer.read(15).await, Ok(15));
        let close = payer.close_message(Amount::ZERO).encode();
        {
            let mut state = payer.shared().lock();
            state.machine.send_payment(payer.connection.id(), close.into()).unwrap();
            state.machine.close(payer.connection.id(), Reason::none());
            Shared::unlock_and_kick(state);
        }
        assert!(world.settled().await >= price_of(15), "{}", world.earned());
    })
    .await;
}

/// Whoever takes a channel over and is refused leaves it to its owner, who is paid.
#[tokio::test]
async fn a_takeover_that_is_refused_does_not_cheat_the_owner_of_its_settlement() {
    within(async {
        let world = world(|config| (config.in_flight_cap, config.lease) = (units(5_000), units(2_000)));
        let descriptor = world.deposit(1_000_000).await;
        let session = world.connect().await;
        let payer = Raw::open(&world, &session, &descriptor, 1, 0).await.unwrap();
        payer.pay(50_000);
        assert_eq!(payer.read(20).await, Ok(20));
        match Raw::open(&world, &session, &descriptor, 2, 0).await {
            Err(OpenError::Rejected { reason, .. }) => assert_eq!(reason.code, code::PAYMENT_REFUSED, "{reason}"),
            other => panic!("{:?}", other.map(|_| ())),
        }
        assert_eq!(world.settled().await, units(50_000), "the smallest voucher that covers what was spent");
    })
    .await;
}

/// A takeover that succeeds has the channel alone. `[pay.epoch.greater]`
#[tokio::test]
async fn a_takeover_that_succeeds_resumes_the_count_and_settles_once() {
    within(async {
        let world = world(|_| {});
        let descriptor = world.deposit(1_000_000).await;
        let first_session = world.connect().await;
        let first = Raw::open(&world, &first_session, &descriptor, 1, 0).await.unwrap();
        first.pay(50_000);
        assert_eq!(first.read(5).await, Ok(5));
        let session = world.connect().await;
        let second = Raw::open(&world, &session, &descriptor, 2, price_of(5).units()).await.unwrap();
        assert!(matches!(first.connection.closed().await, tollway_protocol::error::ConnectionEnd::ClosedByPeer(_)));
        match Raw::open(&world, &first_session, &descriptor, 2, price_of(5).units()).await {
            Err(OpenError::Rejected { reason, .. }) => assert_eq!(reason.code, code::STALE_EPOCH, "{reason}"),
            other => panic!("{:?}", other.map(|_| ())),
        }
        assert_eq!(second.read(7).await, Ok(7));
        let total = price_of(5).checked_add(price_of(7)).unwrap();
        second.send(&second.close_message(total));
        while !matches!(second.next().await, PaymentMessage::Receipt(_)) {}
        drop(second);
        assert_eq!(world.settled().await, total);
    })
    .await;
}

/// A signature costs the payee a verification and must cost its forger something, too. `[pay.voucher.forged]`
#[tokio::test]
async fn a_forged_voucher_counts_for_nothing_and_ends_the_connection() {
    within(async {
        let world = world(|_| {});
        let descriptor = world.deposit(1_000_000).await;
        let session = world.connect().await;
        let payer = Raw::open(&world, &session, &descriptor, 1, 0).await.unwrap();
        let domain = descriptor.voucher_domain();
        let forged = Voucher::sign(&domain, &key(99), descriptor.id(), units(50_000)).unwrap();
        let (amount, signature) = (forged.amount, forged.signature);
        payer.send(&PaymentMessage::Voucher { amount, signature, received: units(0) });
        let end = payer.connection.closed().await;
        assert!(matches!(&end, ConnectionEnd::ClosedByPeer(reason) if reason.code == code::PAYMENT_ENDED), "{end}");
        assert_eq!(world.settled().await, Amount::ZERO);
    })
    .await;
}

/// Signed ahead is not owed.
#[tokio::test]
async fn a_payer_who_vanishes_before_anything_was_delivered_owes_nothing() {
    within(async {
        let world = world(|_| {});
        let descriptor = world.deposit(1_000_000).await;
        let session = world.connect().await;
        let payer = Raw::open(&world, &session, &descriptor, 1, 0).await.unwrap();
        payer.pay(50_000);
        // The voucher counts before the connection ends.
        let id = descriptor.id();
        while world.faulty.store.load(id).await.unwrap().unwrap().snapshot.accepted.is_zero() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        drop(payer);
        assert_eq!(world.settled().await, Amount::ZERO);
        assert!(world.faulty.ledger.channel(id).await.unwrap().unwrap().finalized);
    })
    .await;
}

/// An escrow that does not answer for a while is asked until it does.
#[tokio::test]
async fn a_settlement_is_driven_for_as_long_as_the_escrow_is_away() {
    let world = world(|_| {});
    let descriptor = world.deposit(1_000_000).await;
    let session = world.connect().await;
    let payer = Raw::open(&world, &session, &descriptor, 1, 0).await.unwrap();
    payer.pay(50_000);
    assert_eq!(payer.read(5).await, Ok(5));
    world.faulty.deaf.store(20, Ordering::Relaxed);
    world.end(session, payer).await;
    tokio::time::pause();
    assert_eq!(world.settled().await, units(50_000));
}

/// ... and a server that ends gives it a bounded number of tries.
#[tokio::test]
async fn a_server_that_ends_does_not_wait_for_ever_for_an_escrow_that_is_away() {
    let world = world(|_| {});
    let descriptor = world.deposit(1_000_000).await;
    let session = world.connect().await;
    let payer = Raw::open(&world, &session, &descriptor, 1, 0).await.unwrap();
    payer.pay(50_000);
    assert_eq!(payer.read(5).await, Ok(5));
    world.faulty.deaf.store(u32::MAX, Ordering::Relaxed);
    world.end(session, payer).await;
    tokio::time::pause();
    tokio::time::sleep(Duration::from_secs(600)).await;
    world.payee.idle().await;
    let record = world.faulty.store.load(descriptor.id()).await.unwrap().unwrap();
    assert!(matches!(record.snapshot.phase, ChannelPhase::Closing { .. }), "{record:?}");
}

/// A store that fails once stops the service, and not the settlement of what was served.
#[tokio::test]
async fn what_was_served_before_the_store_failed_is_settled() {
    within(async {
        let world = world(|_| {});
        let descriptor = world.deposit(1_000_000).await;
        let session = world.connect().await;
        let payer = Raw::open(&world, &session, &descriptor, 1, 0).await.unwrap();
        payer.pay(50_000);
        assert_eq!(payer.read(5).await, Ok(5));
        world.faulty.broken.store(1, Ordering::Relaxed);
        payer.pay(90_000);
        payer.connection.closed().await;
        assert_eq!(world.settled().await, units(50_000));
    })
    .await;
}

/// A payer that withdraws while it is served is served no more, and pays what it had.
#[tokio::test]
async fn a_payer_that_withdraws_while_it_is_served_is_settled_within_the_grace_period() {
    within(async {
        let world = world(|config| config.watch_escrow = Duration::from_millis(50));
        let descriptor = world.deposit(1_000_000).await;
        let session = world.connect().await;
        let payer = Raw::open(&world, &session, &descriptor, 1, 0).await.unwrap();
        payer.pay(50_000);
        assert_eq!(payer.read(5).await, Ok(5));
        let request = RequestClose { channel_id: descriptor.id(), nonce: 2, expiry: 0 };
        world.faulty.ledger.request_close(world.order(request)).await.unwrap();
        let ended = tokio::time::timeout(Duration::from_secs(5), payer.connection.closed()).await;
        assert!(ended.is_ok(), "the payee goes on serving");
        assert_eq!(world.settled().await, units(50_000));
    })
    .await;
}

/// A channel without a deposit costs the payee no memory: its challenge is not remembered.
#[tokio::test]
async fn credentials_without_a_deposit_do_not_use_up_the_memory_for_challenges() {
    within(async {
        let world = world(|_| {});
        let mut descriptor = world.deposit(1_000_000).await;
        descriptor.salt = Hash([6; 32]);
        let session = world.connect().await;
        assert!(Raw::open(&world, &session, &descriptor, 1, 0).await.is_err());
        assert!(world.payee.used.lock().is_empty());
    })
    .await;
}

/// What waited for money and was cancelled leaves no clock ticking.
#[tokio::test]
async fn patience_ends_with_what_it_was_for() {
    within(async {
        let world = world(|config| config.patience = Duration::from_millis(300));
        let descriptor = world.deposit(1_000_000).await;
        let session = world.connect().await;
        let payer = Raw::open(&world, &session, &descriptor, 1, 0).await.unwrap();
        payer.pay(150);
        let connection = payer.connection.clone();
        let running = tokio::spawn(async move { connection.call::<_, ()>(method("slow"), &900u64).await });
        tokio::time::sleep(Duration::from_millis(50)).await;
        let waiting = payer.connection.call::<_, ()>(method("slow"), &0u64);
        assert!(tokio::time::timeout(Duration::from_millis(50), waiting).await.is_err(), "50 do not pay for it");
        assert_eq!(running.await.unwrap(), Ok(()), "nothing waits for money any more");
        assert_eq!(payer.received(), units(100));
    })
    .await;
}

/// ... and what waits next is given its own.
#[tokio::test]
async fn what_waits_in_vain_ends_after_the_patience_though_nothing_new_is_asked_for() {
    within(async {
        let world = world(|config| config.patience = Duration::from_millis(100));
        let descriptor = world.deposit(1_000_000).await;
        let session = world.connect().await;
        let payer = Raw::open(&world, &session, &descriptor, 1, 0).await.unwrap();
        for _ in 0..2 {
            let waiting = payer.connection.call::<_, ()>(method("slow"), &0u64);
            assert!(tokio::time::timeout(Duration::from_millis(20), waiting).await.is_err());
            tokio::time::sleep(Duration::from_millis(300)).await;
            assert_eq!(payer.connection.end(), None);
        }
        let waiting = payer.connection.call::<_, ()>(method("slow"), &0u64);
        assert!(tokio::time::timeout(Duration::from_secs(2), waiting).await.unwrap().is_err());
    })
    .await;
}

/// A call that is dropped before it was announced is one less to wait for.
#[tokio::test]
async fn who_waits_for_the_ends_of_calls_hears_of_one_that_was_never_sent() {
    within(async {
        let world = world(|_| {});
        let descriptor = world.deposit(1_000_000).await;
        let session = world.connect().await;
        let payer = Raw::open(&world, &session, &descriptor, 1, 0).await.unwrap();
        let mut call = Box::pin(payer.connection.call::<_, ()>(method("slow"), &0u64));
        let mut ended = std::pin::pin!(payer.shared().calls_ended(payer.connection.id()));
        // Both are polled before the session has its turn.
        tokio::select! {
            biased;
            _ = &mut call => panic!("nobody has answered"),
            () = &mut ended => panic!("it is there"),
            () = std::future::ready(()) => {}
        }
        drop(call);
        assert!(tokio::time::timeout(Duration::from_secs(5), ended).await.is_ok());
    })
    .await;
}

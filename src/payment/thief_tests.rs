//! What can be stolen with somebody else's words, with many hands at once, or at the end of a channel: nothing.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::task::JoinSet;
use tollway_protocol::error::code;
use tollway_protocol::limits::ConnectionLimits;
use tollway_protocol::payment::channel::ChannelPhase;
use tollway_protocol::payment::ledger_messages::{LedgerIdentity, OpenChannel, RequestClose, Signed};
use tollway_protocol::payment::{
    Address, Amount, Credential, CredentialDraft, Hash, PaymentMessage, Place, Quote, SignedAmount, Voucher,
};
use tollway_protocol::session::PayerMoney;

use super::hostile_tests::{PAYEE, PAYER, Raw, World, key, price_of, units, within, world};
use super::{KeptUp, Mailbox};
use crate::connection::Connection;
use crate::escrow::{Escrow, Ledger, LedgerConfig, LocalLedger};
use crate::session::{OpenError, Session};
use crate::shared::Opening;

/// Of 64 that open one channel at once, one after the other may have it, and all of them together get what was
/// authorised: not a base unit more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_64_racing_opens_one_owns_the_channel_and_what_was_authorised_is_spent_once() {
    within(async {
        const AUTHORISED: u128 = 100_200;
        let world = Arc::new(world(|config| {
            (config.lease, config.in_flight_cap) = (units(3_000), units(1_000_000));
            config.patience = Duration::from_millis(50);
            config.abandon_after = Duration::from_secs(3_600);
        }));
        let descriptor = world.deposit(1_000_000).await;
        let mut racing = JoinSet::new();
        for epoch in 1..=64 {
            let (world, descriptor) = (world.clone(), descriptor.clone());
            racing.spawn(async move {
                let session = world.connect().await;
                let payer = Raw::open(&world, &session, &descriptor, epoch, 0).await;
                let Ok(payer) = payer else { return (0, payer.map(|_| epoch), session) };
                // It may have been superseded already.
                let voucher = payer.voucher(AUTHORISED).encode();
                let _superseded = payer.shared().send_payment(payer.connection.id(), voucher.into());
                // Until it is superseded, or nothing is left.
                while payer.connection.end().is_none() && matches!(payer.read(7).await, Ok(1..)) {}
                (payer.received().units(), Ok(epoch), session)
            });
        }
        let (mut received, mut owners, mut sessions) = (0, Vec::new(), Vec::new());
        while let Some(raced) = racing.join_next().await {
            let (got, outcome, session) = raced.unwrap();
            received += got;
            sessions.push(session);
            match outcome {
                Ok(epoch) => owners.push(epoch),
                Err(OpenError::Rejected { reason, .. }) => assert_eq!(reason.code, code::STALE_EPOCH, "{reason}"),
                Err(other) => panic!("{other}"),
            }
        }
        let record = world.payee.config.store.load(descriptor.id()).await.unwrap().unwrap().snapshot;
        assert!(owners.contains(&64) && record.epoch == 64, "{owners:?} and {record:?}");
        assert_eq!(record.accepted, units(AUTHORISED));
        assert!(record.spent <= record.accepted && received <= record.spent.units(), "{received} of {record:?}");
        // What is left does not pay for one more item.
        assert!(record.accepted.saturating_sub(record.spent) < price_of(1), "{record:?}");
    })
    .await;
}

/// Opens with a credential as it is: the way of somebody in the middle.
async fn present(world: &World, session: &Session, credential: &Credential) -> Result<Connection, OpenError> {
    let prices = world.payee.prices.clone();
    let money = PayerMoney { prices, received: Amount::ZERO, mark: Amount::MAX, hold: Amount::MAX };
    let paid = (Bytes::from(credential.encode().unwrap()), money, Arc::new(Mailbox::default()));
    let opening = Opening { paid: Some(paid), ..Opening::of("shop", ConnectionLimits::default()) };
    session.open_with(opening).await.map(|(connection, _)| connection)
}

async fn quote(session: &Session) -> Quote {
    let Err(OpenError::PaymentRequired { terms }) = session.open("shop").await else { panic!("it has a price") };
    Quote::decode(&terms).unwrap()
}

/// Who has seen the payer's credential and vouchers, and has keys of its own, opens nothing with them and takes nothing
/// over; the owner is served on.
#[tokio::test]
async fn stolen_credentials_and_vouchers_open_nothing_and_take_nothing_over() {
    within(async {
        let world = world(|_| {});
        let descriptor = world.deposit(1_000_000).await;
        let session = world.connect().await;
        let id = descriptor.id();
        let voucher = Voucher::sign(&descriptor.voucher_domain(), &key(PAYER), id, units(50_000)).unwrap();
        let draft = CredentialDraft {
            challenge: quote(&session).await.challenge,
            descriptor: descriptor.clone(),
            epoch: 1,
            received: Amount::ZERO,
            proof: Vec::new(),
            voucher: Some(SignedAmount::from(voucher)),
        };
        let place = Place { service: "shop", exporter: Hash::ZERO };
        let stolen = draft.clone().sign(&key(PAYER), place).unwrap();
        let owner = present(&world, &session, &stolen).await.unwrap();
        assert_eq!(super::hostile_tests::read(&owner, 3).await, Ok(3));

        let thief = world.connect().await;
        let fresh = quote(&thief).await.challenge;
        let again = stolen.clone();
        let newer = Credential { epoch: 2, ..stolen.clone() };
        let elsewhere = Credential { challenge: fresh, epoch: 2, ..stolen.clone() };
        // Signed anew, with the thief's own key, for the payer's channel.
        let mut signed = stolen.clone();
        let mut own = descriptor.clone();
        own.payer = key(7).address();
        let drafted = CredentialDraft { challenge: fresh, descriptor: own, epoch: 2, ..draft };
        signed.possession = drafted.clone().sign(&key(7), place).unwrap().possession;
        (signed.challenge, signed.epoch) = (drafted.challenge, 2);
        // And for a channel of the thief's, which the voucher is not for and nobody has deposited on.
        let own = drafted.sign(&key(7), place).unwrap();
        for (what, credential) in
            [("again", again), ("newer", newer), ("elsewhere", elsewhere), ("signed", signed), ("own", own)]
        {
            match present(&world, &thief, &credential).await {
                Err(OpenError::Rejected { reason, .. }) => assert_eq!(reason.code, code::PAYMENT_REFUSED, "{what}"),
                other => panic!("{what}: {:?}", other.map(|_| ())),
            }
        }
        assert_eq!(owner.end(), None);
        assert_eq!(super::hostile_tests::read(&owner, 3).await, Ok(3));
        let record = world.payee.config.store.load(id).await.unwrap().unwrap().snapshot;
        assert_eq!((record.epoch, record.accepted), (1, units(50_000)));
    })
    .await;
}

/// A deposit on one ledger opens nothing at a payee of another, whatever the credential calls it.
#[tokio::test]
async fn a_deposit_on_a_second_ledger_opens_nothing() {
    within(async {
        let world = world(|_| {});
        let second = LedgerIdentity::of(&key(8));
        let ledger = LocalLedger::new(Ledger::new(second, LedgerConfig { dev: true, ..LedgerConfig::default() }));
        let order = OpenChannel {
            payer: key(PAYER).address(),
            payee: key(PAYEE).address(),
            token: Address::ZERO,
            salt: Hash([5; 32]),
            authorized_signer: Address::ZERO,
            deposit: units(1_000_000),
            nonce: 1,
            expiry: 0,
        };
        let held = Escrow::open(&ledger, Signed::sign(order.clone(), &second, &key(PAYER))).await.unwrap();
        let session = world.connect().await;
        let first = LedgerIdentity { chain_id: world.faulty.chain_id(), escrow: world.faulty.address() };
        let named_there = held.descriptor.clone();
        let named_here = order.descriptor(&first);
        for (descriptor, why) in [(named_there, "escrow"), (named_here, "knows no channel")] {
            match Raw::open(&world, &session, &descriptor, 1, 0).await {
                Err(OpenError::Rejected { reason, .. }) => {
                    assert!(reason.code == code::PAYMENT_REFUSED && reason.text.contains(why), "{reason}");
                }
                other => panic!("{:?}", other.map(|_| ())),
            }
        }
        // Nor does the order itself, sent to the ledger of this payee: it is signed for the other.
        let replayed = Escrow::open(&world.faulty.ledger, Signed::sign(order, &second, &key(PAYER))).await;
        assert!(replayed.is_err(), "{replayed:?}");
    })
    .await;
}

/// A payee that was away while its payer asked to withdraw claims what it delivered when it is back, within the grace
/// period.
#[tokio::test]
async fn a_payee_that_was_away_claims_from_a_payer_that_withdraws() {
    within(async {
        let world = world(|config| config.abandon_after = Duration::from_secs(3_600));
        let descriptor = world.deposit(1_000_000).await;
        let session = world.connect().await;
        let payer = Raw::open(&world, &session, &descriptor, 1, 0).await.unwrap();
        payer.pay(50_000);
        assert_eq!(payer.read(5).await, Ok(5));
        let request = RequestClose { channel_id: descriptor.id(), nonce: 2, expiry: 0 };
        world.faulty.ledger.request_close(world.order(request)).await.unwrap();
        // The process dies, and another one opens the same store.
        let id = descriptor.id();
        let record = world.payee.config.store.load(id).await.unwrap().unwrap();
        assert!(record.snapshot.leased >= price_of(5));
        let payee = super::Payee::new(world.payee.config.clone()).unwrap();
        assert_eq!(payee.look_after(id).await.unwrap(), KeptUp::Closed { settled: units(50_000) });
        let record = world.payee.config.store.load(id).await.unwrap().unwrap();
        assert!(matches!(record.snapshot.phase, ChannelPhase::Finalized { .. }), "{record:?}");
        assert_eq!(world.earned(), units(50_000));
        assert!(matches!(payee.look_after(id).await, Ok(KeptUp::Nothing)), "it is claimed once");
    })
    .await;
}

/// However seldom it was told to, a payee looks for withdrawals well within the escrow's grace period.
#[tokio::test]
async fn the_escrow_is_watched_well_within_its_grace_period() {
    let watch = |grace_ms, watch_escrow| {
        let ledger = Ledger::new(LedgerIdentity::of(&key(9)), LedgerConfig { grace_ms, dev: true });
        let mut config = world(|_| {}).payee.config.clone();
        config.escrow = Arc::new(LocalLedger::new(ledger));
        (config.watch_escrow, config.abandon_after) = (watch_escrow, watch_escrow);
        let payee = super::Payee::new(config).unwrap();
        (payee.config.watch_escrow, payee.config.abandon_after)
    };
    let seconds = Duration::from_secs;
    assert_eq!(watch(8_000, seconds(60)), (seconds(2), seconds(2)));
    assert_eq!(watch(8_000, seconds(1)), (seconds(1), seconds(1)));
    assert_eq!(watch(0, seconds(60)), (Duration::from_millis(100), Duration::from_millis(100)));
}

/// Dust opens nothing, and leaves nothing behind: at the minimum a channel opens, one base unit below it none does.
#[tokio::test]
async fn a_deposit_below_the_minimum_opens_nothing_and_is_not_remembered() {
    within(async {
        for (deposit, opens) in [(5_000, true), (4_999, false)] {
            let world = world(|config| config.minimum_deposit = units(5_000));
            let descriptor = world.deposit(deposit).await;
            let session = world.connect().await;
            let opened = Raw::open(&world, &session, &descriptor, 1, 0).await;
            let records = world.payee.config.store.list(None, 10).await.unwrap().len();
            assert_eq!((opened.is_ok(), records), (opens, usize::from(opens)));
            if let Err(OpenError::Rejected { reason, .. }) = opened {
                assert!(reason.code == code::PAYMENT_REFUSED && reason.text.contains("minimum"), "{reason}");
                assert!(world.payee.used.lock().is_empty());
            }
        }
    })
    .await;
}

/// After a close was taken, no message of the payer's is worth anything more: not a higher voucher, not a lower close.
#[tokio::test]
async fn a_close_stands_whatever_is_sent_behind_it() {
    within(async {
        let world = world(|_| {});
        let descriptor = world.deposit(1_000_000).await;
        let session = world.connect().await;
        let payer = Raw::open(&world, &session, &descriptor, 1, 0).await.unwrap();
        payer.pay(50_000);
        assert_eq!(payer.read(5).await, Ok(5));
        payer.send(&payer.close_message(price_of(5)));
        payer.send(&payer.close_message(price_of(4)));
        payer.pay(60_000);
        while !matches!(payer.next().await, PaymentMessage::Receipt(_)) {}
        assert_eq!(world.earned(), price_of(5));
    })
    .await;
}

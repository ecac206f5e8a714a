//! What a payer who floods its payee with signatures costs: no more checks than the rate allows, and nobody else's time.

use std::num::NonZeroU32;
use std::time::Instant;

use tollway_protocol::error::{ConnectionEnd, code};
use tollway_protocol::payment::PaymentMessage;
use tollway_protocol::payment::{CloseVoucher, SecretKey};

use super::CREDENTIAL_RATE;
use super::hostile_tests::{Raw, key, price_of, units, within, world};
use crate::session::OpenError;

/// `[pay.voucher.pace]` `[pay.voucher.coalesce]`
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_vouchers_is_checked_at_the_rate_and_the_highest_counts() {
    within(async {
        let rate = 20;
        let world = world(|config| {
            config.check_rate = NonZeroU32::new(rate).unwrap();
            config.minimum_delta = units(1);
        });
        let descriptor = world.deposit(1_000_000).await;
        let session = world.connect().await;
        let payer = Raw::open(&world, &session, &descriptor, 1, 0).await.unwrap();
        let (before, start) = (world.payee.checks(), Instant::now());
        for amount in 1..=500 {
            payer.pay(amount);
            tokio::task::yield_now().await;
        }
        payer.pay(50_000);
        assert_eq!(payer.read(5).await, Ok(5), "the highest voucher is looked at in its turn and pays");
        let elapsed_ms = u64::try_from(start.elapsed().as_millis()).unwrap();
        let checks = world.payee.checks() - before;
        let allowed = u64::from(rate / 10) + 1 + elapsed_ms * u64::from(rate) / 1000;
        assert!(checks <= allowed, "{checks} checks in {elapsed_ms} ms, where {allowed} are allowed");
        assert_eq!(payer.received(), price_of(5));
    })
    .await;
}

/// `[pay.voucher.forged]`
#[tokio::test]
async fn a_forged_close_counts_for_nothing_and_ends_the_connection() {
    within(async {
        let world = world(|_| {});
        let descriptor = world.deposit(1_000_000).await;
        let session = world.connect().await;
        let payer = Raw::open(&world, &session, &descriptor, 1, 0).await.unwrap();
        payer.pay(50_000);
        assert_eq!(payer.read(5).await, Ok(5));
        let stranger: SecretKey = key(99);
        let domain = descriptor.voucher_domain();
        let voucher = CloseVoucher::sign(&domain, &stranger, descriptor.id(), units(0)).unwrap();
        payer.send(&PaymentMessage::Close { voucher, received: units(0) });
        match payer.connection.closed().await {
            ConnectionEnd::ClosedByPeer(reason) => assert_eq!(reason.code, code::PAYMENT_ENDED, "{reason}"),
            other => panic!("{other}"),
        }
        assert!(world.settled().await >= price_of(5), "what was delivered is paid by a stored voucher");
    })
    .await;
}

/// A credential that proves nothing costs a check, too. `[pay.possession.pace]`
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flood_of_credentials_is_checked_at_the_rate_of_its_session() {
    within(async {
        let world = world(|_| {});
        let descriptor = world.deposit(1_000_000).await;
        let (flooding, honest) = (world.connect().await, world.connect().await);
        let start = Instant::now();
        for _ in 0..100 {
            match Raw::open_signed(&world, &flooding, &descriptor, (1, 0), "another shop").await {
                Err(OpenError::Rejected { reason, .. }) => assert_eq!(reason.code, code::PAYMENT_REFUSED, "{reason}"),
                other => panic!("{:?}", other.map(|_| ())),
            }
        }
        let elapsed_ms = u64::try_from(start.elapsed().as_millis()).unwrap();
        let (checks, rate) = (world.payee.checks(), u64::from(CREDENTIAL_RATE.get()));
        assert_eq!(checks, 100);
        let allowed = rate / 10 + 1 + elapsed_ms * rate / 1000;
        assert!(checks <= allowed, "{checks} checks in {elapsed_ms} ms, where {allowed} are allowed");
        let payer = Raw::open(&world, &honest, &descriptor, 1, 0).await.unwrap();
        payer.pay(50_000);
        assert_eq!(payer.read(3).await, Ok(3), "another session has a pace of its own");
    })
    .await;
}

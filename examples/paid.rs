//! A priced stream, bought and paid for: a ledger, a payee and a payer in one process.
//!
//! `cargo run --release --example paid`
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tollway::escrow::{Ledger, LedgerConfig, LedgerService, LocalLedger};
use tollway::payment::{Payee, PayeeConfig, Wallet, WalletConfig};
use tollway::protocol::payment::{Address, Amount, LedgerIdentity, MethodPrice, Price, SecretKey};
use tollway::rpc::{BoxReply, IncomingCall, MethodId, Reply, Rx, Service, Services, StreamError, stream};
use tollway::store::MemoryStore;
use tollway::{Server, SessionConfig};

const ITEM: usize = 16 * 1024;
const ITEMS: u64 = 256;

struct Shop;

fn download() -> MethodId {
    MethodId::of("shop", 1, "download")
}

impl Service for Shop {
    fn name(&self) -> &str {
        "shop"
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        if call.method() != download() {
            return Reply::unknown_method().boxed();
        }
        // The service knows nothing of money: what it sends is metered and paid as it goes.
        let (mut tx, items) = stream::<Bytes>();
        tokio::spawn(async move {
            for _ in 0..ITEMS {
                tx.send(Bytes::from_static(&[7; ITEM])).await?;
            }
            tx.finish();
            Ok::<_, StreamError>(())
        });
        Reply::ok(&items).boxed()
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    // Fixed keys, and a ledger that funds a payer's account as it deposits: play money.
    let [payer, payee, operator] = [1, 2, 3].map(|seed| SecretKey::from_bytes([seed; 32]));
    let config = LedgerConfig { dev: true, ..LedgerConfig::default() };
    let ledger = LocalLedger::new(Ledger::new(LedgerIdentity::of(&operator?), config));

    let mut server = Server::bind(&"tcp://127.0.0.1:0".parse()?, SessionConfig::default()).await?;
    let endpoint = server.endpoint().clone();
    let price = MethodPrice {
        method_id: download().0,
        name: "download".to_owned(),
        price: Price::per_bytes_out("25/KiB".parse()?),
        max_item_bytes: ITEM as u64 + 8,
        max_answer_bytes: 64,
    };
    let (escrow, store) = (Arc::new(ledger.clone()), Arc::new(MemoryStore::new()));
    let mut selling = PayeeConfig::new(payee?, escrow, store, "shop", vec![price]);
    selling.ledger_url = Some(endpoint.to_string());
    let payee = Payee::new(selling)?;
    let services = Services::new().with_paid(Shop, payee.clone()).with(LedgerService::new(ledger.clone()));
    server.set_config(SessionConfig { services, ..SessionConfig::default() });
    tokio::spawn(server.run(std::future::pending(), Duration::ZERO));

    // One payee is trusted, a budget bounds the whole, `max_ahead` what a dishonest payee could take.
    let mut buying = WalletConfig::new(payer?, Amount::new(1_000_000));
    buying.payee = Some(payee.address());
    buying.max_ahead = Some(Amount::new(20_000));
    let wallet = Wallet::new(buying);
    let session = tollway::connect(&endpoint, SessionConfig::default()).await?;
    let paid = wallet.open(&session, "shop").await?;
    let mut items: Rx<Bytes> = paid.connection().call(download(), &()).await?;
    let mut bytes = 0;
    while let Some(item) = items.recv().await? {
        bytes += item.len();
    }
    let closed = paid.close().await?;
    let (stats, receipt) = (closed.stats, closed.receipt);
    let balance = |of: Address| ledger.read(|ledger| ledger.balance(of, Address::ZERO));
    let (earned, refunded) = (balance(payee.address()), balance(wallet.address()));
    println!("{bytes} bytes in {ITEMS} items, {} bytes metered", stats.bytes);
    println!("spent {} in {} vouchers, at most {} ahead", receipt.spent, stats.vouchers, stats.peak_ahead);
    println!("settled {}, refunded {refunded} of a deposit of {}", receipt.settled, stats.deposit);

    let cost = Amount::new(u128::from(stats.bytes * 25).div_ceil(1024));
    assert_eq!(bytes, ITEM * ITEMS as usize);
    assert_eq!([stats.received, receipt.spent, receipt.settled, earned], [cost; 4]);
    assert_eq!(refunded, stats.deposit.saturating_sub(cost));
    assert!(stats.peak_ahead <= stats.max_ahead && stats.vouchers > 1);
    Ok(ledger.read(Ledger::conservation)?)
}

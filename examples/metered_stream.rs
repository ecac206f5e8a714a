//! Any stream, metered: each item is paid before its source is asked for the next one.
//!
//! `cargo run --release --example metered_stream`
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures_util::stream::unfold;
use tollway::escrow::{Ledger, LedgerConfig, LedgerService, LocalLedger};
use tollway::payment::{Payee, PayeeConfig, Wallet, WalletConfig};
use tollway::protocol::payment::{Address, Amount, LedgerIdentity, MethodPrice, Price, SecretKey};
use tollway::rpc::{BoxReply, IncomingCall, MeterStream, MethodId, Reply, Rx, Service, Services};
use tollway::store::{ChannelStore, MemoryStore};
use tollway::{Server, SessionConfig};

const PRICE: u128 = 5;
const WANTED: u64 = 400;

fn primes() -> MethodId {
    MethodId::of("mathematics", 1, "primes")
}

/// Sells prime numbers, which are work to find.
struct Mathematics {
    found: Arc<AtomicU64>,
    books: Arc<MemoryStore>,
}

impl Mathematics {
    /// What the payer had authorised when it was asked for one more, at least pays for all that were found before.
    async fn find(&self, above: u64) -> u64 {
        let channels = self.books.list(None, 1).await.expect("the store is in memory");
        let record = self.books.load(channels[0]).await.expect("the store is in memory").expect("one channel");
        let found = self.found.fetch_add(1, Ordering::Relaxed);
        assert!(record.snapshot.accepted >= Amount::new(u128::from(found) * PRICE), "worked for nothing: {found}");
        (above + 1..).find(|&number| (2..number).all(|divisor| number % divisor != 0)).expect("there are more")
    }
}

impl Service for Mathematics {
    fn name(&self) -> &str {
        "mathematics"
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        if call.method() != primes() {
            return Reply::unknown_method().boxed();
        }
        let finder = Mathematics { found: self.found.clone(), books: self.books.clone() };
        let numbers = unfold((finder, 1), |(finder, last)| async move {
            let next = finder.find(last).await;
            Some((next, (finder, next)))
        });
        // Endless; it rests while nobody pays, and is dropped when nobody wants it.
        let metered: Rx<u64> = Box::pin(numbers).metered(&call.context().meter().ahead(0));
        Reply::ok(&metered).boxed()
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
        method_id: primes().0,
        name: "primes".to_owned(),
        price: Price { item: Amount::new(PRICE), ..Price::default() },
        max_item_bytes: 10,
        max_answer_bytes: 64,
    };
    let books = Arc::new(MemoryStore::new());
    let found = Arc::new(AtomicU64::new(0));
    let mut selling = PayeeConfig::new(payee?, Arc::new(ledger.clone()), books.clone(), "mathematics", vec![price]);
    selling.ledger_url = Some(endpoint.to_string());
    let payee = Payee::new(selling)?;
    let service = Mathematics { found: found.clone(), books };
    let services = Services::new().with_paid(service, payee.clone()).with(LedgerService::new(ledger.clone()));
    server.set_config(SessionConfig { services, ..SessionConfig::default() });
    tokio::spawn(server.run(std::future::pending(), Duration::ZERO));

    // At most four numbers are paid ahead: the payer pays for the next ones when it has read these.
    let mut buying = WalletConfig::new(payer?, Amount::new(1_000_000));
    buying.payee = Some(payee.address());
    buying.max_ahead = Some(Amount::new(4 * PRICE));
    let wallet = Wallet::new(buying);
    let session = tollway::connect(&endpoint, SessionConfig::default()).await?;
    let paid = wallet.open(&session, "mathematics").await?;
    let mut numbers: Rx<u64> = paid.connection().call(primes(), &()).await?;
    let mut last = 0;
    for _ in 0..WANTED {
        last = numbers.recv().await?.ok_or("it is endless")?;
    }
    drop(numbers);
    let closed = paid.close().await?;
    let (received, found) = (closed.stats.items, found.load(Ordering::Relaxed));
    println!(
        "{WANTED} primes up to {last}, paid with {} vouchers, at most {} ahead",
        closed.stats.vouchers, closed.stats.peak_ahead
    );
    println!("{received} came, {found} were searched for; settled {}", closed.receipt.settled);
    assert!(found <= received + 1, "no more than one that nobody has paid for");
    assert_eq!(closed.receipt.settled, Amount::new(u128::from(received) * PRICE));
    assert_eq!(ledger.read(|ledger| ledger.balance(payee.address(), Address::ZERO)), closed.receipt.settled);
    Ok(())
}

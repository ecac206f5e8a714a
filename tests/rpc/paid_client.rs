//! A client that pays: its channel outlives its sessions.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::timeout;
use tollway::escrow::{Ledger, LedgerConfig, LedgerService, LocalLedger};
use tollway::payment::{MemoryWallet, Payee, PayeeConfig, Wallet, WalletConfig};
use tollway::protocol::error::Reason;
use tollway::protocol::payment::{Address, Amount, LedgerIdentity, SecretKey};
use tollway::reconnect::Backoff;
use tollway::rpc::{CallContext, CallError, ServiceClient, Services};
use tollway::store::MemoryStore;
use tollway::{Client, ClientConfig, Server, ServerHandle, SessionConfig};

use super::support::{Host, LONG};

#[tollway::service]
trait Press {
    #[price(call = 10, max_answer = "1KiB")]
    async fn print(&self, text: &str) -> String;
    /// Costs what it finds, and at least 1.
    #[price(call = 1, max = 50, with = per_letter, max_answer = "1KiB")]
    async fn set(&self, text: &str, times: Vec<u32>) -> Result<String, String>;
    /// Begins to drain its connection, and waits until it is let go.
    #[price(call = 10, max_answer = "1KiB")]
    async fn bind(&self, cx: &CallContext) -> String;
}

/// Two for each letter.
fn per_letter(_text: &str, times: &[u32], set: &str) -> u64 {
    assert_eq!(times.len(), 1);
    2 * set.len() as u64
}

#[derive(Default)]
struct Printer {
    go: Notify,
}

impl Press for Printer {
    async fn print(&self, text: &str) -> String {
        text.to_uppercase()
    }

    async fn set(&self, text: &str, times: Vec<u32>) -> Result<String, String> {
        match times[..] {
            [0] => Err("nothing to set".to_owned()),
            [times] => Ok(text.repeat(times as usize)),
            _ => Err("how often?".to_owned()),
        }
    }

    async fn bind(&self, cx: &CallContext) -> String {
        let connection = cx.connection();
        tokio::spawn(async move { connection.drain(Reason::none(), None).await });
        self.go.notified().await;
        "bound".to_owned()
    }
}

fn key(seed: u8) -> SecretKey {
    SecretKey::from_bytes([seed; 32]).unwrap()
}

/// A seller whose sessions can be ended, and whose ledger lives as long as the test.
async fn seller(ledger: &LocalLedger) -> (Arc<Payee>, ServerHandle) {
    let mut server = Server::bind(&"tcp://127.0.0.1:0".parse().unwrap(), SessionConfig::default()).await.unwrap();
    let handle = server.handle();
    let (escrow, store) = (Arc::new(ledger.clone()), Arc::new(MemoryStore::new()));
    let mut selling = PayeeConfig::new(key(2), escrow, store, PressClient::NAME, PressServer::prices());
    selling.ledger_url = Some(handle.endpoint().to_string());
    let payee = Payee::new(selling).unwrap();
    let services = Services::new().with_paid(PressServer::new(Printer::default()), payee.clone());
    let services = services.with(LedgerService::new(ledger.clone()));
    server.set_config(SessionConfig { services, ..SessionConfig::default() });
    tokio::spawn(server.run(std::future::pending(), Duration::ZERO));
    (payee, handle)
}

#[tokio::test]
async fn a_lost_session_costs_no_second_deposit() {
    let config = LedgerConfig { dev: true, ..LedgerConfig::default() };
    let ledger = LocalLedger::new(Ledger::new(LedgerIdentity::of(&key(3)), config));
    let (payee, server) = seller(&ledger).await;
    let mut buying = WalletConfig::new(key(1), Amount::new(1_000));
    buying.payee = Some(payee.address());
    buying.store = Arc::new(MemoryWallet::new());
    let wallet = Wallet::new(buying);
    let short = Duration::from_millis(2);
    let config = ClientConfig {
        wallet: Some(wallet.clone()),
        backoff: Backoff { base: short, max: short, reset_after: Duration::ZERO },
        ..ClientConfig::default()
    };
    let client = Client::new(server.endpoint().clone(), config);
    let press: PressClient = client.service();
    assert_eq!(press.print("one").await.as_deref(), Ok("ONE"));
    let first = wallet.channels().await.unwrap();

    for round in 0..2 {
        // As if the network had broken: the payee keeps its channel.
        client.session().await.unwrap().close(Reason::none());
        let printed = async {
            loop {
                // A call that meets the end of the session is not repeated by itself.
                match press.print("again").await {
                    Err(CallError::ConnectionClosed { .. }) => tokio::task::yield_now().await,
                    printed => break printed,
                }
            }
        };
        assert_eq!(timeout(LONG, printed).await.unwrap().as_deref(), Ok("AGAIN"), "round {round}");
    }
    let channels = wallet.channels().await.unwrap();
    assert_eq!((channels.len(), channels[0].id()), (1, first[0].id()), "it is the same channel");

    client.close().await;
    let balance = |of: Address| ledger.read(|ledger| ledger.balance(of, Address::ZERO));
    assert_eq!(balance(payee.address()), Amount::new(30), "three calls, settled");
    ledger.read(Ledger::conservation).unwrap();
}

/// What a call waits for that gives up is waited for by the next one too.
#[tokio::test]
async fn a_call_that_gives_up_while_a_connection_is_left_costs_no_second_deposit() {
    let config = LedgerConfig { dev: true, ..LedgerConfig::default() };
    let ledger = LocalLedger::new(Ledger::new(LedgerIdentity::of(&key(3)), config));
    let (payee, _server) = seller(&ledger).await;
    let printer = Arc::new(Printer::default());
    let host = Host::up(Services::new().with_paid(PressServer::from(printer.clone()), payee.clone()));
    let mut buying = WalletConfig::new(key(1), Amount::new(1_000));
    buying.payee = Some(payee.address());
    let wallet = Wallet::new(buying);
    let config = ClientConfig { wallet: Some(wallet.clone()), grace: LONG, ..ClientConfig::default() };
    let client = Client::with_dialler(host, config);
    let press: PressClient = client.service();
    assert_eq!(press.print("one").await.as_deref(), Ok("ONE"));
    let first = wallet.channels().await.unwrap();

    let long = tokio::spawn({
        let press = press.clone();
        async move { press.bind().await }
    });
    // Those that come before the client knows that the connection drains are refused or answered. One gives up as it waits,
    // and the next ones would be answered if they did not wait as well.
    let given_up = Err(CallError::DeadlineExceeded { sent: false });
    let patience = Duration::from_millis(100);
    let first_wait = async { while press.print("two").with_timeout(patience).await != given_up {} };
    timeout(LONG, first_wait).await.unwrap();
    for _ in 0..3 {
        assert_eq!(press.print("three").with_timeout(patience).await, given_up);
    }
    assert!(!long.is_finished(), "the channel is in use");
    printer.go.notify_one();
    assert_eq!(timeout(LONG, press.print("four")).await.unwrap().as_deref(), Ok("FOUR"));
    assert_eq!(timeout(LONG, long).await.unwrap().unwrap().as_deref(), Ok("bound"));
    let channels = wallet.channels().await.unwrap();
    assert_eq!((channels.len(), channels[0].id()), (1, first[0].id()), "it is the same channel");
    client.close().await;
}

#[tokio::test]
async fn a_call_costs_what_a_function_says_and_never_more_than_the_maximum() {
    let config = LedgerConfig { dev: true, ..LedgerConfig::default() };
    let ledger = LocalLedger::new(Ledger::new(LedgerIdentity::of(&key(3)), config));
    let (payee, server) = seller(&ledger).await;
    let mut buying = WalletConfig::new(key(1), Amount::new(1_000));
    buying.payee = Some(payee.address());
    let config = ClientConfig { wallet: Some(Wallet::new(buying)), ..ClientConfig::default() };
    let client = Client::new(server.endpoint().clone(), config);
    let press: PressClient = client.service();
    let charged = async |times| press.set("abc", vec![times]).response().await.map(|answer| answer.charged);
    assert_eq!(charged(4).await, Ok(Amount::new(24)));
    assert_eq!(charged(8).await, Ok(Amount::new(48)));
    assert_eq!(charged(9).await, Err(CallError::HandlerFailed), "54 are above the maximum: free");
    assert_eq!(charged(0).await, Err(CallError::App("nothing to set".to_owned())), "the least");
    client.close().await;
    let earned = ledger.read(|ledger| ledger.balance(payee.address(), Address::ZERO));
    assert_eq!(earned, Amount::new(24 + 48 + 1));
    let prices = PressServer::prices();
    assert_eq!((prices[1].price.call, prices[1].price.max), (Amount::new(1), Some(Amount::new(50))));
}

#[tokio::test]
async fn without_a_wallet_a_priced_service_says_what_it_wants() {
    let config = LedgerConfig { dev: true, ..LedgerConfig::default() };
    let ledger = LocalLedger::new(Ledger::new(LedgerIdentity::of(&key(3)), config));
    let (_payee, server) = seller(&ledger).await;
    let press: PressClient = Client::new(server.endpoint().clone(), ClientConfig::default()).service();
    assert!(matches!(press.print("one").await, Err(CallError::PaymentRequired { .. })));
}

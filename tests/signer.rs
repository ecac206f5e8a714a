//! Wallets whose keys are elsewhere: a signer behind a pipe that holds its own bounds, and delegated session keys.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tollway::conduit::endpoint::Endpoint;
use tollway::escrow::{Escrow, Ledger, LedgerConfig, LedgerService, LocalLedger};
use tollway::future::BoxFuture;
use tollway::payment::{PaidConnection, Payee, PayeeConfig, Signer, SignerError, Wallet, WalletConfig, WalletError};
use tollway::protocol::payment::{
    Address, Amount, LedgerIdentity, MethodPrice, Price, SecretKey, Signature, SigningRequest,
};
use tollway::rpc::{BoxReply, IncomingCall, MethodId, Reply, Rx, Service, Services, StreamError, stream};
use tollway::store::MemoryStore;
use tollway::{Server, SessionConfig};

struct Shop;

fn download() -> MethodId {
    MethodId::of("shop", 1, "download")
}

impl Service for Shop {
    fn name(&self) -> &str {
        "shop"
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        let (mut tx, items) = stream::<Bytes>();
        tokio::spawn(async move {
            for _ in 0..call.args::<u64>().expect("a number") {
                tx.send(Bytes::from_static(&[7; 100])).await?;
            }
            tx.finish();
            Ok::<_, StreamError>(())
        });
        Reply::ok(&items).boxed()
    }
}

fn key(seed: u8) -> SecretKey {
    SecretKey::from_bytes([seed; 32]).expect("a key")
}

async fn world() -> (LocalLedger, Arc<Payee>, Endpoint) {
    let config = LedgerConfig { dev: true, ..LedgerConfig::default() };
    let ledger = LocalLedger::new(Ledger::new(LedgerIdentity::of(&key(9)), config));
    let any = "tcp://127.0.0.1:0".parse().expect("an endpoint");
    let mut server = Server::bind(&any, SessionConfig::default()).await.expect("a port");
    let endpoint = server.endpoint().clone();
    let price = MethodPrice {
        method_id: download().0,
        name: "download".to_owned(),
        price: Price { item: Amount::new(10), ..Price::default() },
        max_item_bytes: 128,
        max_answer_bytes: 64,
    };
    let (escrow, store) = (Arc::new(ledger.clone()), Arc::new(MemoryStore::new()));
    let mut config = PayeeConfig::new(key(2), escrow, store, "shop", vec![price]);
    config.ledger_url = Some(endpoint.to_string());
    let payee = Payee::new(config).expect("terms");
    let services = Services::new().with_paid(Shop, payee.clone()).with(LedgerService::new(ledger.clone()));
    server.set_config(SessionConfig { services, ..SessionConfig::default() });
    tokio::spawn(server.run(std::future::pending(), Duration::ZERO));
    (ledger, payee, endpoint)
}

async fn open(wallet: &Wallet, endpoint: &Endpoint) -> Result<PaidConnection, WalletError> {
    let session = tollway::connect(endpoint, SessionConfig::default()).await.expect("a session");
    wallet.open(&session, "shop").await
}

fn config(signer: impl Signer, payee: &Payee) -> WalletConfig {
    let mut config = WalletConfig::new(signer, Amount::new(100_000));
    (config.payee, config.max_ahead) = (Some(payee.address()), Some(Amount::new(500)));
    config
}

async fn read(paid: &PaidConnection, count: u64) -> Result<u64, StreamError> {
    let mut items: Rx<Bytes> = paid.connection().call(download(), &count).await.expect("a stream");
    let mut read = 0;
    while items.recv().await?.is_some() {
        read += 1;
    }
    Ok(read)
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), future).await.expect("it ends in time")
}

/// Asks a signer at the other end of a pipe: a length and a request there, a signature or nothing back.
#[derive(Debug)]
struct Remote {
    address: Address,
    pipe: tokio::sync::Mutex<DuplexStream>,
}

impl Signer for Remote {
    fn address(&self) -> Address {
        self.address
    }

    fn sign(&self, request: SigningRequest) -> BoxFuture<'_, Result<Signature, SignerError>> {
        Box::pin(async move {
            let gone = |error: std::io::Error| SignerError::Unreachable(error.to_string());
            let request = postcard::to_stdvec(&request).expect("it can be encoded");
            let mut pipe = self.pipe.lock().await;
            pipe.write_u32(u32::try_from(request.len()).expect("it is short")).await.map_err(gone)?;
            pipe.write_all(&request).await.map_err(gone)?;
            let mut answer = vec![0; pipe.read_u32().await.map_err(gone)? as usize];
            pipe.read_exact(&mut answer).await.map_err(gone)?;
            let answer: Result<Signature, String> = postcard::from_bytes(&answer).expect("an answer");
            answer.map_err(SignerError::Refused)
        })
    }
}

/// The process with the key: it signs for one payee, and no more than `most` on a channel.
async fn keep_key(mut pipe: DuplexStream, key: SecretKey, payee: Address, most: Amount) -> std::io::Result<()> {
    loop {
        let mut request = vec![0; pipe.read_u32().await? as usize];
        pipe.read_exact(&mut request).await?;
        let request: SigningRequest = postcard::from_bytes(&request).expect("a request");
        let answer = match &request {
            SigningRequest::Voucher { channel, amount } if channel.payee != payee || *amount > most => {
                Err(format!("{amount} for {} is beyond the bounds", channel.payee))
            }
            _ => Ok(request.sign(&key).expect("it is a message")),
        };
        let answer = postcard::to_stdvec(&answer).expect("it can be encoded");
        pipe.write_u32(u32::try_from(answer.len()).expect("it is short")).await?;
        pipe.write_all(&answer).await?;
    }
}

fn remote(payee: Address, most: u128) -> Remote {
    let (here, there) = tokio::io::duplex(4096);
    tokio::spawn(keep_key(there, key(1), payee, Amount::new(most)));
    Remote { address: key(1).address(), pipe: tokio::sync::Mutex::new(here) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signer_behind_a_pipe_pays_and_its_own_bounds_hold_whatever_the_wallet_would_do() {
    within(async {
        let (ledger, payee, endpoint) = world().await;
        let paid = open(&Wallet::new(config(remote(payee.address(), 50_000), &payee)), &endpoint).await;
        let paid = paid.expect("a paid connection");
        assert_eq!(read(&paid, 300).await, Ok(300));
        assert_eq!(paid.close().await.expect("a receipt").receipt.settled, Amount::new(3_000));
        // The wallet's budget is 100,000; its signer stops at 1,000.
        let bounded = Wallet::new(config(remote(payee.address(), 1_000), &payee));
        let paid = open(&bounded, &endpoint).await.expect("a paid connection");
        assert!(read(&paid, 300).await.is_err());
        let failed = paid.failed().await;
        assert!(
            matches!(&failed, WalletError::Signer(SignerError::Refused(why)) if why.contains("bounds")),
            "{failed}"
        );
        let received = paid.stats().received;
        assert!(received <= Amount::new(1_000), "nothing was delivered beyond what was signed: {received}");
        // A signer that is gone is an error with its name, and nothing hangs.
        let (here, _) = tokio::io::duplex(64);
        let gone = Remote { address: key(1).address(), pipe: tokio::sync::Mutex::new(here) };
        let opened = open(&Wallet::new(config(gone, &payee)), &endpoint).await;
        assert!(matches!(opened, Err(WalletError::Signer(SignerError::Unreachable(_)))), "{opened:?}");
        ledger.read(Ledger::conservation).expect("conserved");
    })
    .await;
}

/// Notes what it was asked for.
#[derive(Debug, Clone)]
struct Noting {
    key: SecretKey,
    asked: Arc<Mutex<Vec<&'static str>>>,
}

impl Noting {
    fn new(seed: u8) -> Self {
        Noting { key: key(seed), asked: Arc::default() }
    }
}

impl Signer for Noting {
    fn address(&self) -> Address {
        self.key.address()
    }

    fn sign(&self, request: SigningRequest) -> BoxFuture<'_, Result<Signature, SignerError>> {
        self.asked.lock().push(match &request {
            SigningRequest::Voucher { .. } => "voucher",
            SigningRequest::Possession { .. } => "possession",
            SigningRequest::Order { .. } => "order",
            _ => "other",
        });
        Signer::sign(&self.key, request)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_key_signs_vouchers_and_the_payers_key_nothing_but_orders() {
    within(async {
        let (ledger, payee, endpoint) = world().await;
        let (payer, session) = (Noting::new(1), Noting::new(5));
        let mut delegating = config(payer.clone(), &payee);
        delegating.session_signer = Some(Arc::new(session.clone()));
        let paid = open(&Wallet::new(delegating.clone()), &endpoint).await.expect("a paid connection");
        assert_eq!(read(&paid, 300).await, Ok(300));
        let kept = paid.keep().await.expect("it stays");
        let held = ledger.channel(kept.channel_id).await.expect("the ledger").expect("the channel");
        assert_eq!(held.descriptor.payer, key(1).address());
        assert_eq!(held.descriptor.signer(), key(5).address());
        // A wallet with another session key leaves it alone; the one that has it goes on with it.
        let other = WalletConfig { session_signer: Some(Arc::new(key(6))), ..delegating.clone() };
        let stranger = open(&Wallet::new(other), &endpoint).await.expect("a channel of its own");
        let settled = stranger.close().await.expect("a receipt").receipt;
        assert_eq!(settled.spent, Amount::ZERO);
        let paid = open(&Wallet::new(delegating), &endpoint).await.expect("the channel again");
        let closed = paid.close().await.expect("a receipt");
        assert_eq!((closed.channel_id, closed.receipt.settled), (kept.channel_id, Amount::new(3_000)));
        assert!(payer.asked.lock().iter().all(|asked| *asked == "order"), "{:?}", payer.asked);
        let asked = session.asked.lock();
        assert!(asked.contains(&"voucher") && asked.contains(&"possession") && !asked.contains(&"order"), "{asked:?}");
        // What is left of the deposit goes to the payer.
        let left = ledger.read(|ledger| ledger.balance(key(1).address(), Address::ZERO));
        assert!(left > Amount::ZERO && ledger.read(|ledger| ledger.balance(key(5).address(), Address::ZERO)).is_zero());
        ledger.read(Ledger::conservation).expect("conserved");
    })
    .await;
}

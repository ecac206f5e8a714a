//! The three processes that are killed: a ledger, a payee and a payer, each on its file.
//!
//! They are built on the library as any application is. A process says `ready ADDRESS` when it can be used, takes orders by
//! lines on its standard input, and ends when that is closed.

use std::error::Error;
use std::io::{BufRead, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use clap::{Args, ValueEnum};
use rustix::process::{Resource, Rlimit, setrlimit};
use tokio::sync::watch;
use tollway::conduit::endpoint::Endpoint;
use tollway::disk::DiskError;
use tollway::escrow::{LedgerClient, LedgerConfig, LedgerService, LocalLedger};
use tollway::payment::{Payee, PayeeConfig, RedbWallet};
use tollway::protocol::payment::{Address, Amount};
use tollway::rpc::{BoxReply, IncomingCall, Reply, Service, Services, StreamError, stream};
use tollway::store::RedbStore;
use tollway::{Server, SessionConfig};

use crate::payer;
use crate::power::PowerDisk;
use crate::scene::{self, FUNDED, GRACE_MS, IN_FLIGHT_CAP, LEASE, SERVICE, SETTLE_ABOVE};

pub(crate) type Failure = Box<dyn Error + Send + Sync>;

/// One of the three.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Role {
    Ledger,
    Payee,
    Payer,
}

impl Role {
    pub(crate) const ALL: [Role; 3] = [Role::Ledger, Role::Payee, Role::Payer];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Role::Ledger => "ledger",
            Role::Payee => "payee",
            Role::Payer => "payer",
        }
    }

    pub(crate) fn file(self, directory: &Path) -> PathBuf {
        directory.join(self.name()).with_extension("redb")
    }

    /// The points at which it can be made to die, around store, sign, send, deliver and settle, and how often it passes
    /// them: the most passes that are worth waiting for.
    pub(crate) const fn failpoints(self) -> &'static [(&'static str, u64)] {
        match self {
            Role::Ledger => &[("disk.before-commit", 6), ("disk.after-commit", 6)],
            Role::Payee => &[
                ("disk.before-commit", 30),
                ("disk.after-commit", 30),
                ("payee.before-accept", 8),
                ("payee.accepted", 8),
                ("payee.leased", 8),
                ("payee.before-settle", 3),
                ("payee.settled", 3),
            ],
            Role::Payer => &[
                ("disk.before-commit", 20),
                ("disk.after-commit", 20),
                ("wallet.before-save", 20),
                ("wallet.after-save", 20),
                ("wallet.before-order", 1),
                ("wallet.ordered", 1),
                ("wallet.before-sign", 8),
                ("wallet.before-send", 8),
                ("wallet.before-close", 1),
            ],
        }
    }
}

/// What a process is told when it is started.
#[derive(Debug, Clone, Args)]
pub(crate) struct RoleArguments {
    pub(crate) role: Role,
    /// Where its file is.
    #[arg(long)]
    pub(crate) directory: PathBuf,
    /// Where the others reach the ledger, and the payee.
    #[arg(long)]
    pub(crate) ledger: Option<SocketAddr>,
    #[arg(long)]
    pub(crate) payee: Option<SocketAddr>,
    /// What the workload follows from.
    #[arg(long)]
    pub(crate) seed: u64,
    /// The file is on a disk that loses power with the process; what survives of unsynced writes follows from this.
    #[arg(long)]
    pub(crate) power: Option<u64>,
}

/// Runs a process until it is killed.
pub(crate) async fn run(arguments: RoleArguments) -> Result<(), Failure> {
    // An abort at a failpoint leaves no image of its memory behind.
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    let finish = watch::Sender::new(false);
    listen_to_orders(finish.clone())?;
    match arguments.role {
        Role::Ledger => run_ledger(&arguments).await,
        Role::Payee => run_payee(&arguments).await,
        Role::Payer => {
            say("ready");
            payer::run(&arguments, finish.subscribe()).await
        }
    }
}

/// Tells the harness something, in a line that survives this process.
#[allow(clippy::print_stdout)]
pub(crate) fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    // Nobody to tell it to: the harness has gone, and this process is about to.
    let _gone = writeln!(out, "{line}").and_then(|()| out.flush());
}

fn listen_to_orders(finish: watch::Sender<bool>) -> Result<(), Failure> {
    let listen = move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            match line.split(' ').collect::<Vec<_>>()[..] {
                ["arm", name, passes] => tollway::failpoint::arm(name, passes.parse().unwrap_or(1)),
                ["finish"] => drop(finish.send_replace(true)),
                _ => {}
            }
        }
        // The harness has gone.
        std::process::exit(0);
    };
    std::thread::Builder::new().name("orders".to_owned()).spawn(listen)?;
    Ok(())
}

fn local() -> Endpoint {
    "tcp://127.0.0.1:0".parse().expect("it is a URL")
}

fn url(address: Option<SocketAddr>) -> Result<Endpoint, Failure> {
    Ok(format!("tcp://{}", address.ok_or("an address is missing")?).parse()?)
}

/// The file of a role as its process opens it.
fn power_disk(arguments: &RoleArguments) -> Result<Option<PowerDisk>, Failure> {
    let file = arguments.role.file(&arguments.directory);
    Ok(arguments.power.map(|seed| PowerDisk::open(&file, seed)).transpose()?)
}

async fn run_ledger(arguments: &RoleArguments) -> Result<(), Failure> {
    let config = LedgerConfig { grace_ms: GRACE_MS, dev: false };
    let identity = scene::ledger_identity();
    let ledger = match power_disk(arguments)? {
        Some(disk) => LocalLedger::open_on(disk, identity, config)?,
        None => LocalLedger::open(Role::Ledger.file(&arguments.directory), identity, config)?,
    };
    let payer = scene::payer_key().address();
    if ledger.read(|ledger| ledger.channel_count() == 0 && ledger.balance(payer, Address::ZERO).is_zero()) {
        ledger.fund(payer, Address::ZERO, Amount::new(FUNDED)).await?;
    }
    serve(Services::new().with(LedgerService::new(ledger))).await
}

async fn serve(services: Services) -> Result<(), Failure> {
    let server = Server::bind(&local(), SessionConfig { services, ..SessionConfig::default() }).await?;
    let (host, port) = server.endpoint().address();
    say(&format!("ready {host}:{port}"));
    server.run(std::future::pending(), Duration::ZERO).await;
    Ok(())
}

async fn run_payee(arguments: &RoleArguments) -> Result<(), Failure> {
    let store = match power_disk(arguments)? {
        Some(disk) => RedbStore::on(disk),
        None => RedbStore::open(Role::Payee.file(&arguments.directory)),
    };
    let ledger_url = url(arguments.ledger)?;
    let escrow = Arc::new(LedgerClient::connect(&ledger_url).await?);
    let mut config = PayeeConfig::new(scene::payee_key(), escrow, Arc::new(store?), SERVICE, scene::prices());
    config.ledger_url = Some(ledger_url.to_string());
    (config.lease, config.in_flight_cap) = (Amount::new(LEASE), Amount::new(IN_FLIGHT_CAP));
    config.suggested_deposit = Amount::new(scene::DEPOSIT);
    config.settle_above = Amount::new(SETTLE_ABOVE);
    config.settle_every = Duration::from_millis(200);
    config.settle_retry = Duration::from_millis(50);
    config.watch_escrow = Duration::from_millis(100);
    let payee = Payee::new(config)?;
    tokio::spawn(payee.clone().keep());
    serve(Services::new().with_paid(Shop, payee)).await
}

/// What the payee sells: bytes.
struct Shop;

impl Service for Shop {
    fn name(&self) -> &str {
        SERVICE
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        let method = call.method();
        let (count, bytes) = match call.args::<(u32, u32)>() {
            Ok(arguments) => arguments,
            Err(error) => return Reply::invalid_payload(&error).boxed(),
        };
        let item = Bytes::from(vec![7; usize::try_from(bytes).unwrap_or(0)]);
        if method == scene::one() {
            return Reply::ok(&item).boxed();
        }
        let (mut tx, items) = stream::<Bytes>();
        tokio::spawn(async move {
            for _ in 0..count {
                tx.send(item.clone()).await?;
            }
            tx.finish();
            Ok::<_, StreamError>(())
        });
        Reply::ok(&items).boxed()
    }
}

/// The wallet in its file, as the payer opens it.
pub(crate) fn open_wallet(arguments: &RoleArguments) -> Result<RedbWallet, Failure> {
    let opened: Result<_, DiskError> = match power_disk(arguments)? {
        Some(disk) => RedbWallet::on(disk),
        None => RedbWallet::open(Role::Payer.file(&arguments.directory)),
    };
    Ok(opened?)
}

//! `tollway serve`: sells the files of a directory.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use tollway::auth::{Authenticator, Identity};
use tollway::conduit::any::{AnyListener, EstablishError};
use tollway::conduit::endpoint::Endpoint;
use tollway::escrow::{Escrow, LedgerClient, LedgerService};
use tollway::observe::{ObserveService, Observer};
use tollway::payment::{Payee, PayeeConfig};
use tollway::rpc::Services;
use tollway::store::{ChannelStore, MemoryStore, RedbStore};
use tollway::{Server, ServerConfig, SessionConfig};
use tollway_protocol::payment::{Address, Price};

use crate::failure::Failure;
use crate::files::{self, FileService, Shelf};
use crate::interrupt::Interrupts;
use crate::ledger::dev_ledger;
use crate::store::StoreError;
use crate::tls::ServerArguments;
use crate::tokens::Operator;
use crate::units::Place;
use crate::{keys, output, tokens};

/// Sells the files of a directory, or gives them away with --price 0.
///
/// A name in a URL is a path below the directory; none leads out of it.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    tollway serve --listen tcp://127.0.0.1:7400 --dir DIR --price 25/KiB --key payee.key --dev-ledger\n  \
    tollway serve --listen tcp://127.0.0.1:7400 --dir DIR --price 25/KiB --key payee.key \\\n    \
    --ledger tcp://127.0.0.1:7300\n  \
    tollway serve --listen quic://0.0.0.0:7400 --listen unix:///run/tollway.sock --dir DIR --price 0\n  \
    tollway serve --listen tcp://127.0.0.1:7400 --dir DIR --price 0")]
pub(crate) struct Arguments {
    /// Where to listen, as often as wanted: tcp://, tls://, quic://, ws:// or wss:// with HOST:PORT, where port 0 takes
    /// a free one, or unix:///PATH.
    #[arg(long, value_name = "URL", required = true)]
    listen: Vec<Place>,
    /// The directory whose files are served.
    #[arg(long)]
    dir: PathBuf,
    /// Base units for the bytes that are sent: AMOUNT/B, /KiB, /MiB or /GiB, or 0 for nothing; or parts such as
    /// call=100,bytes=25/KiB.
    #[arg(long)]
    price: Price,
    /// The payee's key, to which the money goes.
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// The ledger where payers deposit.
    #[arg(long, value_name = "URL", conflicts_with = "dev_ledger")]
    ledger: Option<Place>,
    /// Serve a ledger for trying out beside the files: in memory, and with credit for everybody.
    #[arg(long)]
    dev_ledger: bool,
    /// Where channels are kept, so that they survive this process; made if it is not there. Without it they are in memory
    /// and are closed at the end.
    #[arg(long, value_name = "FILE", conflicts_with = "dev_ledger")]
    store: Option<PathBuf>,
    /// Let in only who has one of the tokens in this file: a line each with NAME TOKEN, and `operator` behind it for who
    /// may look at the server with `tollway inspect`.
    #[arg(long, value_name = "FILE", conflicts_with = "dev_ledger")]
    token_file: Option<PathBuf>,
    /// How payers reach this server, if not by the address that it listens on.
    #[arg(long, value_name = "URL")]
    advertise: Option<Place>,
    /// Seconds that transfers may go on after the first Ctrl-C.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    grace: u64,
    /// Print the line that says that it is ready as a JSON object.
    #[arg(long)]
    json: bool,
    /// End when standard input is closed, so that it never outlives who started it.
    #[arg(long)]
    exit_with_stdin: bool,
    #[command(flatten)]
    tls: ServerArguments,
}

/// Why nothing can be served.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error("cannot serve the directory {}: {source}", .path.display())]
    Directory { path: PathBuf, source: io::Error },
    #[error("files with a price need a payee: add --key FILE (`tollway keygen FILE` makes one), or use --price 0")]
    NoKey,
    #[error("files with a price need a ledger: add --ledger URL, or --dev-ledger for trying out")]
    NoLedger,
    #[error("cannot use the ledger {url}: {source}. Is it running? `tollway ledger serve --help` tells how")]
    Ledger { url: Endpoint, source: tollway::escrow::EscrowError },
    #[error(
        "payers cannot reach the ledger at {0}: add --advertise tcp://HOST:PORT with an address that they can reach"
    )]
    NotReachable(Endpoint),
}

/// A place where nobody can listen.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen on {endpoint}: {source}{}", if *.is_taken { "; port 0 takes a free one" } else { "" })]
pub(crate) struct ListenError {
    endpoint: Endpoint,
    is_taken: bool,
    source: EstablishError,
}

#[derive(Serialize)]
struct Ready {
    event: &'static str,
    /// The first of `urls`, or what it is advertised as.
    url: String,
    urls: Vec<String>,
    price: String,
    payee: Option<Address>,
    ledger: Option<String>,
}

pub(crate) async fn run(arguments: Arguments, interrupts: Interrupts) -> Result<(), Failure> {
    let shelf =
        Shelf::open(&arguments.dir).map_err(|source| ServeError::Directory { path: arguments.dir.clone(), source })?;
    let listener = bind(&arguments.listen, &arguments.tls, arguments.key.as_deref()).await?;
    let urls = listener.endpoints().map(ToString::to_string).collect();
    let tokens = arguments.token_file.as_deref().map(tokens::server).transpose()?;
    let authenticator = tokens.map(|tokens| Arc::new(tokens) as Arc<dyn Authenticator>);
    let observer = authenticator.is_some().then(Observer::new);
    let mut server = server(listener, ServerConfig { authenticator, ..ServerConfig::default() })?;
    let files = FileService::new(shelf);
    let mut ready = Ready {
        event: "ready",
        url: advertised(&arguments, server.endpoint()).to_string(),
        urls,
        price: arguments.price.to_string(),
        payee: None,
        ledger: None,
    };
    let (services, payee) = match arguments.price.is_free() {
        true => (Services::new().with(files), None),
        false => {
            let (services, payee, ledger) = sell(&arguments, server.endpoint()).await?;
            (ready.payee, ready.ledger) = (Some(payee.address()), Some(ledger.to_string()));
            (services.with_paid(files, payee.clone()), Some(payee))
        }
    };
    let services = match &observer {
        // Without tokens nobody is known to be an operator.
        None => services,
        Some(observer) => {
            let is_operator = |identity: &Identity| identity.data::<Operator>().is_some();
            services.with(ObserveService::new(observer.clone(), is_operator))
        }
    };
    server.set_config(SessionConfig { services, observer, ..SessionConfig::default() });
    announce(&ready, &arguments)?;

    let grace = Duration::from_secs(arguments.grace);
    // What was delivered before, or to payers that are away, is claimed in time.
    let keeper = payee.clone().filter(|_| arguments.store.is_some()).map(|payee| tokio::spawn(payee.keep()));
    server.run(shutdown(interrupts, arguments.exit_with_stdin), grace).await;
    if let Some(keeper) = keeper {
        keeper.abort();
    }
    if let Some(payee) = payee {
        // Channels whose payer is gone are settled now. A ledger that does not answer must not hold the process for ever.
        if tokio::time::timeout(grace, payee.idle()).await.is_err() {
            tracing::warn!("some channels are not settled");
        }
    }
    Ok(())
}

/// Makes the payee, with the ledger beside it if that is to be served too.
async fn sell(arguments: &Arguments, bound: &Endpoint) -> Result<(Services, Arc<Payee>, Endpoint), Failure> {
    let key = keys::load(arguments.key.as_ref().ok_or(ServeError::NoKey)?)?;
    let mut services = Services::new();
    let (escrow, url): (Arc<dyn Escrow>, Endpoint) = match &arguments.ledger {
        Some(Place(url)) => {
            let client = LedgerClient::connect(url).await;
            (Arc::new(client.map_err(|source| ServeError::Ledger { url: url.clone(), source })?), url.clone())
        }
        None if arguments.dev_ledger => {
            let url = advertised(arguments, bound);
            if url.host() == "0.0.0.0" || url.host() == "::" {
                return Err(ServeError::NotReachable(url.clone()).into());
            }
            // Nobody has seen this ledger before, nor will see it again: so its key is as new, and kept nowhere.
            let ledger = dev_ledger(&keys::generate()?);
            services = services.with(LedgerService::new(ledger.clone()));
            (Arc::new(ledger), url.clone())
        }
        None => return Err(ServeError::NoLedger.into()),
    };
    let store: Arc<dyn ChannelStore> = match &arguments.store {
        Some(path) => Arc::new(RedbStore::open(path).map_err(StoreError::at(path))?),
        None => Arc::new(MemoryStore::new()),
    };
    let mut config = PayeeConfig::new(key, escrow, store, files::SERVICE, files::prices(arguments.price));
    config.ledger_url = Some(url.to_string());
    Ok((services, Payee::new(config)?, url))
}

fn advertised<'a>(arguments: &'a Arguments, bound: &'a Endpoint) -> &'a Endpoint {
    arguments.advertise.as_ref().map_or(bound, |place| &place.0)
}

fn announce(ready: &Ready, arguments: &Arguments) -> Result<(), Failure> {
    if arguments.json {
        output::json(ready)?;
        return Ok(());
    }
    let mut text = format!("ready: {}", ready.url);
    // The first one may be advertised by another name.
    ready.urls.iter().skip(1).for_each(|url| text.push_str(&format!(", {url}")));
    text.push_str(&format!(", price {}", ready.price));
    if let (Some(payee), Some(ledger)) = (&ready.payee, &ready.ledger) {
        text.push_str(&format!(", payee {payee}, ledger {ledger}"));
    }
    output::line(&text)?;
    Ok(())
}

/// Binds all places, and says what is wrong with one that cannot be bound. `key` is the server's key file.
///
/// # Errors
/// When one cannot be bound, or there is no certificate for it.
pub(crate) async fn bind(places: &[Place], tls: &ServerArguments, key: Option<&Path>) -> Result<AnyListener, Failure> {
    let places: Vec<Endpoint> = places.iter().map(|place| place.0.clone()).collect();
    let options = tls.options(&places, key)?;
    let mut listener = AnyListener::default();
    for endpoint in places {
        if let Err(source) = listener.add(&endpoint, &options).await {
            let taken = |error: &io::Error| error.kind() == io::ErrorKind::AddrInUse && endpoint.socket().is_none();
            let is_taken = matches!(&source, EstablishError::Io(error) if taken(error));
            return Err(ListenError { endpoint, is_taken, source }.into());
        }
    }
    Ok(listener)
}

/// A server at these places, known by the first.
///
/// # Errors
/// When there is no place.
pub(crate) fn server(listener: AnyListener, config: ServerConfig) -> Result<Server, Failure> {
    let first = listener.endpoints().next().cloned().ok_or(io::ErrorKind::AddrNotAvailable);
    let first = first.map_err(io::Error::from)?;
    Ok(Server::with_listener(listener, first, config))
}

/// Resolves when a server is to end: after Ctrl-C, or when standard input ends, if it was started so.
pub(crate) async fn shutdown(interrupts: Interrupts, with_stdin: bool) {
    let (tell, told) = tokio::sync::oneshot::channel::<()>();
    let interrupted = async {
        interrupts.first().await;
        output::note("Ending: what is under way may finish; Ctrl-C again ends it at once.");
    };
    if !with_stdin {
        return interrupted.await;
    }
    // A thread of its own, which the end of the process need not wait for.
    std::thread::spawn(move || {
        // An input that fails has ended as well.
        let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
        drop(tell);
    });
    tokio::select! {
        _ended = told => {}
        () = interrupted => {}
    }
}

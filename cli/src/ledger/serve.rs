//! `tollway ledger serve`: a ledger of its own process.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use tollway::conduit::endpoint::Endpoint;
use tollway::escrow::{DEFAULT_GRACE_MS, Ledger, LedgerConfig, LedgerFileError, LedgerService, LocalLedger};
use tollway::rpc::Services;
use tollway::{ServerConfig, SessionConfig};
use tollway_protocol::payment::{Address, LedgerIdentity};

use crate::failure::Failure;
use crate::interrupt::Interrupts;
use crate::serve::{bind, server, shutdown};
use crate::tls::ServerArguments;
use crate::units::Place;
use crate::{keys, output};

/// Sessions with a ledger are short; what is left after this time has no order under way.
const GRACE: Duration = Duration::from_secs(5);

/// Runs a ledger: it holds deposits and pays them out by voucher. Who runs it holds the money.
///
/// With --store every order is in the file before it is answered. With --dev it credits any payer what a deposit needs,
/// and without a file it keeps everything in memory, for trying things out.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    tollway keygen ledger.key\n  \
    tollway ledger serve --store ledger.redb --listen tcp://127.0.0.1:7300 --key ledger.key\n  \
    tollway ledger serve --dev --listen tcp://127.0.0.1:7300 --key ledger.key")]
pub(crate) struct Arguments {
    /// The file with the books; made if it is not there.
    #[arg(long, value_name = "FILE", required_unless_present = "dev")]
    store: Option<PathBuf>,
    /// For trying out: credit for everybody.
    #[arg(long)]
    dev: bool,
    /// Where to listen, as often as wanted: tcp://, tls://, quic://, ws:// or wss:// with HOST:PORT, where port 0 takes
    /// a free one, or unix:///PATH.
    #[arg(long, value_name = "URL", required = true)]
    listen: Vec<Place>,
    /// The ledger's key, which is what it is known by.
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// Seconds that a payee may still settle after the payer has asked to withdraw.
    #[arg(long, value_name = "SECONDS", default_value_t = DEFAULT_GRACE_MS / 1_000)]
    withdrawal_grace: u64,
    /// Print the line that says that it is ready as a JSON object.
    #[arg(long)]
    json: bool,
    /// End when standard input is closed, so that it never outlives who started it.
    #[arg(long)]
    exit_with_stdin: bool,
    #[command(flatten)]
    tls: ServerArguments,
}

/// What a ledger cannot be.
#[derive(Debug, thiserror::Error)]
#[error("cannot use the ledger in {}: {source}", .path.display())]
struct Unusable {
    path: PathBuf,
    source: LedgerFileError,
}

#[derive(Serialize)]
struct Ready<'a> {
    event: &'a str,
    url: String,
    escrow: Address,
    /// As text: it is above what a JSON number can say exactly.
    chain_id: String,
    dev: bool,
    grace_ms: u64,
}

pub(super) async fn run(arguments: Arguments, interrupts: Interrupts) -> Result<(), Failure> {
    let identity = LedgerIdentity::of(&keys::load(&arguments.key)?);
    let config = LedgerConfig { grace_ms: arguments.withdrawal_grace.saturating_mul(1_000), dev: arguments.dev };
    let ledger = match &arguments.store {
        Some(path) => {
            LocalLedger::open(path, identity, config).map_err(|source| Unusable { path: path.clone(), source })?
        }
        None => LocalLedger::new(Ledger::new(identity, config)),
    };
    let services = Services::new().with(LedgerService::new(ledger));
    let mut server =
        server(bind(&arguments.listen, &arguments.tls, Some(&arguments.key)).await?, ServerConfig::default())?;
    server.set_config(SessionConfig { services, ..SessionConfig::default() });
    announce(server.endpoint(), identity, config, arguments.json)?;
    server.run(shutdown(interrupts, arguments.exit_with_stdin), GRACE).await;
    Ok(())
}

fn announce(url: &Endpoint, identity: LedgerIdentity, config: LedgerConfig, json: bool) -> Result<(), Failure> {
    let LedgerIdentity { chain_id, escrow } = identity;
    let LedgerConfig { grace_ms, dev } = config;
    let (url, chain_id) = (url.to_string(), chain_id.to_string());
    if json {
        output::json(&Ready { event: "ready", url, escrow, chain_id, dev, grace_ms })?;
    } else {
        let what = if dev { "ledger for trying out" } else { "ledger" };
        output::line(&format!("ready: {what} at {url}, escrow {escrow}, chain {chain_id}"))?;
    }
    Ok(())
}

//! `tollway ledger serve`: a ledger of its own process.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use tollway::SessionConfig;
use tollway::conduit::endpoint::Endpoint;
use tollway::escrow::{DEFAULT_GRACE_MS, Ledger, LedgerConfig, LedgerService, LocalLedger};
use tollway::rpc::Services;
use tollway_protocol::payment::{Address, LedgerIdentity, SecretKey};

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
/// With --dev it credits any payer what a deposit needs and keeps everything in memory, for trying things out.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  \
    tollway keygen ledger.key\n  \
    tollway ledger serve --dev --listen tcp://127.0.0.1:7300 --key ledger.key")]
pub(crate) struct Arguments {
    /// For trying out: in memory, and with credit for everybody.
    #[arg(long)]
    dev: bool,
    /// Where to listen, as often as wanted: tcp://, tls://, quic://, ws:// or wss:// with HOST:PORT, where port 0 takes
    /// a free one, or unix:///PATH.
    #[arg(long, value_name = "URL", required = true)]
    listen: Vec<Place>,
    /// The ledger's key, which is what it is known by.
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
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
enum LedgerError {
    #[error(
        "a ledger that keeps its books on disk is not there yet: add --dev for one in memory that credits any payer, for \
         trying out"
    )]
    NotDurable,
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

pub(crate) async fn run(arguments: Arguments, interrupts: Interrupts) -> Result<(), Failure> {
    if !arguments.dev {
        return Err(LedgerError::NotDurable.into());
    }
    let ledger = dev_ledger(&keys::load(&arguments.key)?);
    let services = Services::new().with(LedgerService::new(ledger.clone()));
    let mut server = server(bind(&arguments.listen, &arguments.tls, Some(&arguments.key)).await?)?;
    server.set_config(SessionConfig { services, ..SessionConfig::default() });
    announce(server.endpoint(), ledger.identity(), arguments.json)?;
    server.run(shutdown(interrupts, arguments.exit_with_stdin), GRACE).await;
    Ok(())
}

/// A ledger in memory that credits any payer.
pub(crate) fn dev_ledger(key: &SecretKey) -> LocalLedger {
    LocalLedger::new(Ledger::new(LedgerIdentity::of(key), LedgerConfig { dev: true, ..LedgerConfig::default() }))
}

fn announce(url: &Endpoint, LedgerIdentity { chain_id, escrow }: LedgerIdentity, json: bool) -> Result<(), Failure> {
    let (url, chain_id) = (url.to_string(), chain_id.to_string());
    if json {
        let grace_ms = DEFAULT_GRACE_MS;
        output::json(&Ready { event: "ready", url, escrow, chain_id, dev: true, grace_ms })?;
    } else {
        output::line(&format!("ready: ledger for trying out at {url}, escrow {escrow}, chain {chain_id}"))?;
    }
    Ok(())
}

//! `tollway fetch`: fetches a file, and pays for it as it comes.
//!
//! However it ends, the file is complete or absent, and the channel is closed, or kept in the wallet for the next time.

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use serde::Serialize;
use tollway::payment::{RedbWallet, Wallet, WalletConfig, WalletError};
use tollway::{OpenError, Session, SessionConfig};
use tollway_protocol::error::Reason;
use tollway_protocol::payment::{Address, Amount, ChannelId, SecretKey, Terms, parse_hex};

use crate::access::{Access, Ended, Kept, Money, open_free, open_paid, unless_interrupted};
use crate::failure::Failure;
use crate::files::{self, Hashing, Received, SinkError, check_target};
use crate::interrupt::Interrupts;
use crate::store::StoreError;
use crate::tls::ClientArguments;
use crate::units::FileUrl;
use crate::{keys, output, tokens};

/// How long a goodbye may take.
const FAREWELL: Duration = Duration::from_secs(1);

/// Fetches a file and pays for it as it comes, at most the budget.
///
/// The file is complete or absent. Without --wallet the channel is closed at the end, and what was not spent comes back;
/// with --wallet it stays open for the next fetch, unless --close is given. The same holds after Ctrl-C.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  \
    tollway fetch tcp://127.0.0.1:7400/NAME -o OUT --key payer.key --payee 0x… --budget 1000000\n\n\
    Without --payee it shows whom it would pay and asks. In NAME, write %20 for a space and %25 for a %.")]
pub(crate) struct Arguments {
    /// The file: tcp://host:port/NAME, the same with tls, quic, ws or wss, or unix:///SOCKET:/NAME.
    #[arg(value_name = "URL")]
    url: FileUrl,
    /// Where to write it; by default under its own name into the current directory.
    #[arg(short, long, value_name = "OUT")]
    output: Option<PathBuf>,
    /// The payer's key, which signs the vouchers.
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// The address of the payee: another one gets nothing.
    #[arg(long, value_name = "ADDRESS")]
    payee: Option<Address>,
    /// The most to spend, in base units.
    #[arg(long, value_name = "AMOUNT")]
    budget: Option<Amount>,
    /// The most to sign ahead of what has come, in base units: what a dishonest payee could take.
    #[arg(long, value_name = "AMOUNT")]
    max_ahead: Option<Amount>,
    /// Remember the channel in this file, made if it is not there, and keep it open for the next fetch from this payee.
    /// What was signed survives a crash there.
    #[arg(long, value_name = "FILE")]
    wallet: Option<PathBuf>,
    /// Close the channel at the end all the same.
    #[arg(long, requires = "wallet")]
    close: bool,
    /// The most that all channels of the wallet may cost together, in base units.
    #[arg(long, value_name = "AMOUNT", requires = "wallet")]
    total_budget: Option<Amount>,
    /// The most that the payee may cost by breaking off, in base units.
    #[arg(long, value_name = "AMOUNT", requires = "wallet")]
    loss_budget: Option<Amount>,
    /// The file with the token for a server that asks for one.
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Compute the file's SHA-256; with a value, keep the file only if it is that.
    #[arg(long, value_name = "HEX", num_args = 0..=1, require_equals = true)]
    sha256: Option<Option<Sha256>>,
    /// Print a JSON object, also when the fetch fails.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    tls: ClientArguments,
}

/// A hash as `sha256sum` shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sha256([u8; 32]);

impl FromStr for Sha256 {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse_hex(&format!("0x{text}")).map(Sha256).map_err(|_| "a SHA-256 has 64 hex digits")
    }
}

/// Why nothing was fetched, beside what the transfer says.
#[derive(Debug, thiserror::Error)]
enum FetchFailure {
    #[error("the URL names no file that could be written here: say with -o where to write it")]
    NoOutput,
    #[error("{0} serves no files: {1}")]
    NoService(String, OpenError),
    #[error("the files at {0} have a price: add --key FILE (`tollway keygen FILE` makes one) and --budget AMOUNT")]
    NotPaid(String),
    #[error("nobody is there to confirm the payee {0}: add --payee {0} if you trust it")]
    NotConfirmed(Address),
    #[error("the payee {0} was not confirmed; nothing was paid")]
    Declined(Address),
    #[error("the payee {0} has changed its prices since they were shown; nothing was fetched")]
    OtherPrices(Address),
    #[error("the file has another SHA-256: {found}, not {expected}; it was not kept")]
    WrongHash { expected: String, found: String },
    #[error(
        "{}the channel could not be closed: {error}. The payee can still take what it delivered; the rest of the deposit is \
         the payer's",
        if *.complete { "the file is complete, but " } else { "" }
    )]
    NotClosed { complete: bool, error: WalletError },
}

/// What `--json` prints. Sums are decimal strings.
#[derive(Debug, Default, Serialize)]
struct Report {
    ok: bool,
    error: Option<String>,
    /// The file, if it was kept.
    out: Option<PathBuf>,
    bytes: u64,
    items: u64,
    metered_bytes: u64,
    sha256: Option<String>,
    elapsed_ms: Option<f64>,
    payee: Option<Address>,
    channel_id: Option<ChannelId>,
    price: Option<String>,
    budget: Option<Amount>,
    #[serde(flatten)]
    money: Option<Money>,
    #[serde(flatten)]
    kept: Option<Kept>,
}

pub(crate) async fn run(arguments: Arguments, interrupts: Interrupts) -> Result<(), Failure> {
    let mut report = Report::default();
    let result = fetch(&arguments, &interrupts, &mut report).await;
    if arguments.json {
        report.ok = result.is_ok();
        report.error = result.as_ref().err().map(ToString::to_string);
        output::json(&report)?;
    } else if result.is_ok() {
        output::line(&summary(&report))?;
    } else if let Some(money) = &report.money {
        output::note(&format!("The channel is closed: {}.", settled(money)));
    }
    result
}

async fn fetch(arguments: &Arguments, interrupts: &Interrupts, report: &mut Report) -> Result<(), Failure> {
    // Everything that can be wrong on this side is found out before anybody is paid.
    let target = target(arguments)?;
    check_target(&target)?;
    if target.parent().is_some_and(|parent| !parent.as_os_str().is_empty() && !parent.is_dir()) {
        let source = std::io::ErrorKind::NotADirectory.into();
        return Err(SinkError::Write { path: target, source }.into());
    }
    let key = arguments.key.as_deref().map(keys::load).transpose()?;

    let endpoint = &arguments.url.endpoint;
    let options = arguments.tls.options()?;
    let mut config = SessionConfig::default();
    if let Some(path) = &arguments.token_file {
        config.protocol.metadata.push(tokens::client(path)?);
    }
    let connecting = tollway::connect_with(endpoint, config, &options);
    let session = unless_interrupted(interrupts, connecting).await??;
    let result = in_session(&session, key, &target, arguments, interrupts, report).await;
    session.close(Reason::none());
    // Whether the peer still hears it changes nothing.
    let _ = tokio::time::timeout(FAREWELL, session.closed()).await;
    result
}

async fn in_session(
    session: &Session,
    key: Option<SecretKey>,
    target: &Path,
    arguments: &Arguments,
    interrupts: &Interrupts,
    report: &mut Report,
) -> Result<(), Failure> {
    let access = open(session, key, arguments, interrupts).await?;
    if let Some(terms) = access.terms() {
        report.payee = Some(terms.payee);
        report.price = terms.method(files::method().0).map(|method| output::price(&method.price));
        report.budget = arguments.budget;
    }
    let hashing = if arguments.sha256.is_some() { Hashing::Sha256 } else { Hashing::No };
    let fetched = access.fetch(&arguments.url.name, target, hashing, !arguments.json);
    let fetched = match unless_interrupted(interrupts, fetched).await {
        Ok(received) => received.map_err(Failure::from).and_then(|received| keep(received, arguments, target, report)),
        Err(interrupted) => Err(interrupted),
    };
    if let Some(metered) = access.metered_bytes() {
        report.metered_bytes = metered;
    }
    let keeps = arguments.wallet.is_some() && !arguments.close;
    if fetched.is_err() && access.terms().is_some() && !arguments.json && !keeps {
        output::note("Closing the channel …");
    }
    match if keeps { access.keep().await } else { access.close().await } {
        Ok(ended) => {
            match ended {
                Ended::Free => {}
                Ended::Closed(id, money) => (report.channel_id, report.money) = (Some(id), Some(money)),
                Ended::Kept(id, kept) => (report.channel_id, report.kept) = (Some(id), Some(kept)),
            }
            fetched
        }
        // That the file did not come is the first thing to know.
        Err(error) => match fetched {
            Ok(()) => Err(FetchFailure::NotClosed { complete: true, error }.into()),
            Err(failure) => {
                output::note(&format!("tollway: {}", FetchFailure::NotClosed { complete: false, error }));
                Err(failure)
            }
        },
    }
}

/// Opens the service: free if it is, else paid, once it is clear who is paid.
async fn open(
    session: &Session,
    key: Option<SecretKey>,
    arguments: &Arguments,
    interrupts: &Interrupts,
) -> Result<Access, Failure> {
    let place = || arguments.url.endpoint.clone().without_path().with_pin(None).to_string();
    let free = unless_interrupted(interrupts, open_free(session)).await?;
    if let Some(connection) = free.map_err(|error| FetchFailure::NoService(place(), error))? {
        return Ok(Access::Free(connection));
    }
    let (Some(key), Some(budget)) = (key, arguments.budget) else {
        return Err(FetchFailure::NotPaid(place()).into());
    };
    let mut config = WalletConfig::new(key, budget);
    config.max_ahead = arguments.max_ahead;
    (config.total_budget, config.loss_budget) = (arguments.total_budget, arguments.loss_budget);
    config.payee_url = Some(place());
    if let Some(path) = &arguments.wallet {
        config.store = Arc::new(RedbWallet::open(path).map_err(StoreError::at(path))?);
    }
    let shown = match arguments.payee {
        Some(_) => None,
        None => Some(confirm(session, config.clone(), interrupts).await?),
    };
    config.payee = arguments.payee.or_else(|| shown.as_ref().map(|terms| terms.payee));
    // An interrupt waits for this: a deposit that has been made is to be closed, not left behind.
    let access = open_paid(session, config).await?;
    if let (Some(shown), Some(terms)) = (shown, access.terms())
        && (&shown.methods, shown.token, shown.escrow) != (&terms.methods, terms.token, terms.escrow)
    {
        match arguments.wallet {
            Some(_) => access.keep().await?,
            None => access.close().await?,
        };
        return Err(FetchFailure::OtherPrices(shown.payee).into());
    }
    Ok(access)
}

/// Shows whom the money would go to, and asks.
async fn confirm(session: &Session, config: WalletConfig, interrupts: &Interrupts) -> Result<Terms, Failure> {
    let wallet = Wallet::new(config);
    let terms = unless_interrupted(interrupts, wallet.quote(session, files::SERVICE)).await??;
    let payee = terms.payee;
    output::note(&output::terms(&terms));
    // A thread of its own: one that waits for the terminal cannot be stopped, and must not be waited for.
    let (answer, answered) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let said = output::ask(&format!("Pay {payee}?"));
        // Nobody waits any more after an interrupt.
        let _ = answer.send(said);
    });
    match unless_interrupted(interrupts, answered).await? {
        Ok(Some(said)) => match said? {
            true => Ok(terms),
            false => Err(FetchFailure::Declined(payee).into()),
        },
        Ok(None) | Err(_) => Err(FetchFailure::NotConfirmed(payee).into()),
    }
}

/// Gives the file its name, if it is what was wanted.
fn keep(received: Received, arguments: &Arguments, target: &Path, report: &mut Report) -> Result<(), Failure> {
    let Received { file, elapsed, usage, size } = received;
    report.sha256 = file.sha256.map(|found| output::hex(&found));
    if let (Some(Some(Sha256(expected))), Some(found)) = (arguments.sha256, file.sha256)
        && expected != found
    {
        let (expected, found) = (output::hex(&expected), output::hex(&found));
        return Err(FetchFailure::WrongHash { expected, found }.into());
    }
    file.keep()?;
    report.out = Some(target.to_owned());
    (report.bytes, report.items, report.metered_bytes) = (size, usage.items, usage.bytes_out);
    report.elapsed_ms = Some(output::millis(elapsed));
    Ok(())
}

fn target(arguments: &Arguments) -> Result<PathBuf, FetchFailure> {
    let by_name = || Path::new(&arguments.url.name).file_name().map(PathBuf::from);
    arguments.output.clone().or_else(by_name).ok_or(FetchFailure::NoOutput)
}

fn summary(report: &Report) -> String {
    let out = report.out.as_deref().unwrap_or(Path::new("")).display();
    let mut text = format!("{out}: {} bytes", output::grouped(u128::from(report.bytes)));
    if let Some(ms) = report.elapsed_ms {
        text.push_str(&format!(" in {ms:.0} ms"));
    }
    if let Some(sha256) = &report.sha256 {
        text.push_str(&format!(", sha256 {sha256}"));
    }
    if let Some(money) = &report.money {
        text.push_str(&format!("; {}", settled(money)));
    }
    if let Some(kept) = &report.kept {
        let [paid, deposit] = [kept.payer_metered, kept.deposit].map(output::amount);
        text.push_str(&format!("; {paid} paid so far out of a deposit of {deposit}, the channel is kept"));
    }
    text
}

fn settled(money: &Money) -> String {
    let [settled, deposit, refunded] = [money.settled, money.deposit, money.refunded].map(output::amount);
    format!("{settled} paid out of a deposit of {deposit}, {refunded} returned")
}

//! `tollway demo`: ledger and payee as processes of their own, the payer in this one, and every sum checked.

mod child;
mod source;

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;
use tollway::conduit::endpoint::Endpoint;
use tollway::escrow::{Escrow, LedgerClient};
use tollway::payment::{Wallet, WalletConfig};
use tollway::{Session, SessionConfig};
use tollway_protocol::payment::{Address, Amount, ChannelId, Price, SecretKey, Usage};

use crate::access::{Access, Ended, Money, open_free, open_paid, unless_interrupted};
use crate::failure::Failure;
use crate::files::{self, Hashing, Received};
use crate::interrupt::Interrupts;
use crate::units::Size;
use crate::{keys, output};
use child::Child;
use source::Source;

/// Fetches a file from a payee on this machine, pays for it through a ledger on this machine, and checks every sum.
///
/// Payee and ledger are processes of their own; keys and files live in a temporary directory.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    tollway demo\n  \
    tollway demo --size 1GiB --price 3/KiB --json\n  \
    tollway demo --file PATH --max-ahead 100000")]
pub(crate) struct Arguments {
    /// The file to fetch; by default one is made.
    #[arg(long, value_name = "PATH", conflicts_with_all = ["size", "seed"])]
    file: Option<PathBuf>,
    /// The size of the file that is made: a number of bytes, KiB, MiB or GiB.
    #[arg(long, default_value_t = Size(64 << 20))]
    size: Size,
    /// The seed of the file that is made: the same seed makes the same file.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// The price of the file, or 0 to fetch without payment.
    #[arg(long, default_value = "25/KiB")]
    price: Price,
    /// The most to sign ahead of what has come, in base units.
    #[arg(long, value_name = "AMOUNT")]
    max_ahead: Option<Amount>,
    /// What carries the session with the payee.
    #[arg(long, value_enum, default_value_t = Conduit::Tcp)]
    conduit: Conduit,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
}

/// What can carry a session on this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Conduit {
    Tcp,
    Tls,
    Quic,
    Ws,
    #[cfg(unix)]
    Unix,
}

impl Conduit {
    /// Where the payee listens: at whatever port of loopback is free, or at a socket in `dir`.
    fn place(self, dir: &Path) -> PathBuf {
        match self {
            Conduit::Tcp => ANY_PORT.into(),
            Conduit::Tls => "tls://127.0.0.1:0".into(),
            Conduit::Quic => "quic://127.0.0.1:0".into(),
            Conduit::Ws => "ws://127.0.0.1:0".into(),
            #[cfg(unix)]
            Conduit::Unix => format!("unix://{}/payee.sock", dir.display()).into(),
        }
    }
}

/// What can be wrong with a demo, beside what its parts say.
#[derive(Debug, thiserror::Error)]
enum DemoError {
    #[error("cannot use the file {}: {source}", .path.display())]
    File { path: PathBuf, source: std::io::Error },
    #[error("the file costs more than 2^128 base units: choose a lower --price")]
    TooExpensive,
    #[error("the payee did not say what it is needed for: {0}")]
    Ready(&'static str),
    #[error("the ledger does not know the channel {0}")]
    UnknownChannel(ChannelId),
    #[error("not all checks passed:\n  {}", .0.join("\n  "))]
    Checks(Vec<String>),
}

/// What the servers print when they are ready, as far as the demo needs it.
#[derive(Debug, Deserialize)]
struct Ready {
    url: String,
    payee: Option<Address>,
}

/// What `--json` prints. Sums are decimal strings.
#[derive(Debug, Serialize)]
struct Report {
    conduit: String,
    bytes: u64,
    metered_bytes: u64,
    sha256: String,
    sha256_ok: bool,
    items: u64,
    price: String,
    /// `vouchers`, `accepted`, `spent`, `payer_metered`, `peak_ahead`, `max_ahead`, `settled`, `refunded`, `deposit`.
    #[serde(flatten)]
    money: Money,
    elapsed_ms: f64,
}

pub(crate) async fn run(arguments: Arguments, interrupts: Interrupts) -> Result<(), Failure> {
    let dir = tempfile::Builder::new().prefix("tollway-demo-").tempdir()?;
    let source = unless_interrupted(&interrupts, source(&arguments, dir.path())).await??;
    // Declared before the session: they end after it.
    let ledger = match arguments.price.is_free() {
        false => Some(unless_interrupted(&interrupts, start_ledger(dir.path())).await??),
        true => None,
    };
    let ledger_url = ledger.as_ref().map(|(_, url)| url);
    let payee = start_payee(dir.path(), &source, &arguments, ledger_url);
    let (payee, ready) = unless_interrupted(&interrupts, payee).await??;

    let report = fetch(&arguments, &source, &ready, ledger_url, &dir.path().join("fetched"), &interrupts).await;
    payee.stop().await;
    if let Some((ledger, _)) = ledger {
        ledger.stop().await;
    }
    let (report, channel_ended) = report?;

    let failures = failures(&report, &source, &arguments.price, channel_ended);
    if arguments.json {
        output::json(&report)?;
    } else {
        output::line(&summary(&report))?;
    }
    if failures.is_empty() { Ok(()) } else { Err(DemoError::Checks(failures).into()) }
}

async fn source(arguments: &Arguments, dir: &Path) -> Result<Source, Failure> {
    let (file, dir, size, seed) = (arguments.file.clone(), dir.to_owned(), arguments.size.0, arguments.seed);
    let path = file.clone().unwrap_or_else(|| dir.clone());
    let source = spawn_blocking(move || match file {
        Some(file) => Source::of(&file),
        None => Source::make(&dir, size, seed),
    });
    Ok(source.await?.map_err(|source| DemoError::File { path, source })?)
}

async fn start_ledger(dir: &Path) -> Result<(Child, Endpoint), Failure> {
    let key = dir.join("ledger.key");
    keys::create(&key)?;
    let mut arguments: Vec<PathBuf> =
        ["ledger", "serve", "--dev", "--listen", ANY_PORT, "--key"].map(PathBuf::from).into();
    arguments.push(key);
    let (child, ready) = Child::start::<Ready>("the ledger", arguments).await?;
    Ok((child, ready.url.parse()?))
}

async fn start_payee(
    dir: &Path,
    source: &Source,
    demo: &Arguments,
    ledger: Option<&Endpoint>,
) -> Result<(Child, Ready), Failure> {
    let mut arguments: Vec<PathBuf> = ["serve", "--dir"].map(PathBuf::from).into();
    arguments.extend([source.dir.clone(), "--price".into(), demo.price.to_string().into()]);
    arguments.extend(["--listen".into(), demo.conduit.place(dir), "--tls-self".into(), dir.join("payee.tls")]);
    if let Some(ledger) = ledger {
        let key = dir.join("payee.key");
        keys::create(&key)?;
        arguments.extend(["--key".into(), key, "--ledger".into(), ledger.to_string().into()]);
    }
    Ok(Child::start("the payee", arguments).await?)
}

/// Loopback, and whatever port is free.
const ANY_PORT: &str = "tcp://127.0.0.1:0";

/// Fetches the file, and returns what is to be reported and whether the channel has ended by the ledger's account.
async fn fetch(
    arguments: &Arguments,
    source: &Source,
    ready: &Ready,
    ledger: Option<&Endpoint>,
    out: &Path,
    interrupts: &Interrupts,
) -> Result<(Report, bool), Failure> {
    let endpoint: Endpoint = ready.url.parse()?;
    let payer = keys::generate()?;
    let session = unless_interrupted(interrupts, tollway::connect(&endpoint, SessionConfig::default())).await??;
    let access = match arguments.price.is_free() {
        true => Access::Free(open_free(&session).await?.ok_or(DemoError::Ready("it asks for payment"))?),
        false => open(&session, &payer, arguments, source, ready).await?,
    };
    let token = access.terms().map(|terms| terms.token);

    let fetched = access.fetch(&source.name, out, Hashing::No, !arguments.json);
    let fetched = unless_interrupted(interrupts, fetched).await;
    let metered = access.metered_bytes();
    // Closed in any case: what was not spent goes back.
    let closed = access.close().await;
    let Received { file, size, elapsed, usage } = fetched??;
    let closed = closed?;
    file.keep()?;
    // Hashed as it lies on the disk, and after the clock was stopped.
    let out = out.to_owned();
    let (_, sha256) = spawn_blocking(move || source::hash(&out)).await??;

    let (closed, mut money) = match closed {
        Ended::Closed(id, money) => (Some(id), money),
        Ended::Free | Ended::Kept(..) => (None, Money::default()),
    };
    let mut ended = true;
    if let (Some(id), Some(ledger), Some(token)) = (closed, ledger, token) {
        // Not what payee or payer say, but what the ledger has in its books.
        let ledger = LedgerClient::connect(ledger).await?;
        let channel = Escrow::channel(&ledger, id).await?.ok_or(DemoError::UnknownChannel(id))?;
        money.settled = channel.settled;
        // The payer's account is as new as its key: all that is in it came back from this channel.
        money.refunded = ledger.balance(payer.address(), token).await?;
        ended = channel.finalized;
    }
    let report = Report {
        conduit: endpoint.scheme().name().to_owned(),
        bytes: size,
        metered_bytes: metered.unwrap_or(usage.bytes_out),
        sha256: output::hex(&sha256),
        sha256_ok: sha256 == source.sha256,
        items: usage.items,
        price: arguments.price.to_string(),
        money,
        elapsed_ms: output::millis(elapsed),
    };
    Ok((report, ended))
}

/// Opens a channel with a budget of twice what the file costs, so that there is something to return.
async fn open(
    session: &Session,
    payer: &SecretKey,
    arguments: &Arguments,
    source: &Source,
    ready: &Ready,
) -> Result<Access, Failure> {
    let payee = ready.payee.ok_or(DemoError::Ready("its address"))?;
    let usage = files::usage(&source.name, source.size);
    let needed = arguments.price.cost(usage).and_then(|cost| cost.checked_mul(2));
    let mut config = WalletConfig::new(payer.clone(), needed.ok_or(DemoError::TooExpensive)?);
    config.payee = Some(payee);
    config.max_ahead = arguments.max_ahead;
    let terms = Wallet::new(config.clone()).quote(session, files::SERVICE).await?;
    config.budget = config.budget.max(terms.minimum_deposit);
    Ok(open_paid(session, config).await?)
}

/// What does not add up.
fn failures(report: &Report, source: &Source, price: &Price, channel_ended: bool) -> Vec<String> {
    let Report { money, metered_bytes, .. } = report;
    // What the payer has metered is the price's to say; the demo asks for one call.
    let usage = Usage { items: report.items, bytes_out: *metered_bytes, bytes_in: 0 };
    let price = price.cost(usage).unwrap_or(Amount::MAX);
    let returned = money.settled.checked_add(money.refunded).unwrap_or(Amount::MAX);
    let checks = [
        (report.sha256_ok, format!("sha256 {}: the file is not the one that was served", report.sha256)),
        (report.bytes == source.size, format!("{} bytes came, and the file has {}", report.bytes, source.size)),
        (money.spent == price, format!("spent {}, and the metered bytes cost {price}", money.spent)),
        (
            money.payer_metered == money.spent,
            format!("the payer counted {}, the payee {}", money.payer_metered, money.spent),
        ),
        (money.settled == money.spent, format!("settled {}, spent {}", money.settled, money.spent)),
        (
            returned == money.deposit,
            format!("settled {} + refunded {}, deposit {}", money.settled, money.refunded, money.deposit),
        ),
        (
            money.peak_ahead <= money.max_ahead,
            format!("{} was signed ahead, {} is allowed", money.peak_ahead, money.max_ahead),
        ),
        (channel_ended, "the ledger still has the channel open".to_owned()),
    ];
    checks.into_iter().filter(|(passed, _)| !passed).map(|(_, what)| what).collect()
}

fn summary(report: &Report) -> String {
    let Report { money, .. } = report;
    let seconds = report.elapsed_ms / 1e3;
    let rate = report.bytes as f64 / (1 << 20) as f64 / seconds.max(1e-9);
    let ok = if report.sha256_ok { "as served" } else { "NOT as served" };
    let number = |number: u64| output::grouped(u128::from(number));
    let mut rows = vec![
        (
            "fetched",
            format!(
                "{} bytes over {} in {:.0} ms, {rate:.0} MiB/s",
                number(report.bytes),
                report.conduit,
                report.elapsed_ms
            ),
        ),
        ("sha256", format!("{} {ok}", report.sha256)),
        (
            "price",
            format!(
                "{} for {} metered bytes in {} items",
                report.price,
                number(report.metered_bytes),
                number(report.items)
            ),
        ),
    ];
    if report.price != "0" {
        let [deposit, accepted, spent, metered, peak, max, settled, refunded] = [
            money.deposit,
            money.accepted,
            money.spent,
            money.payer_metered,
            money.peak_ahead,
            money.max_ahead,
            money.settled,
            money.refunded,
        ]
        .map(output::amount);
        rows.extend([
            ("spent", format!("{spent} by the payee's receipt, {metered} by the payer's count")),
            ("vouchers", format!("{}, the last one for {accepted}", number(money.vouchers))),
            ("ahead", format!("{peak} at most, {max} allowed")),
            ("ledger", format!("{settled} settled + {refunded} refunded = {deposit} deposited")),
        ]);
    }
    output::table(&rows)
}

//! The `tollway` command.

mod access;
mod bench;
mod channels;
mod demo;
mod failure;
mod fetch;
mod files;
mod inspect;
mod interrupt;
mod key;
mod keygen;
mod keys;
mod ledger;
mod output;
mod quote;
mod receipts;
mod serve;
mod store;
mod tls;
mod tokens;
mod units;
mod voucher;

use std::future::Future;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Parser, Subcommand};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use failure::Failure;
use interrupt::Interrupts;

/// Metered RPC: keys, a local ledger, and paid file transfer.
#[derive(Parser)]
#[command(name = "tollway", version, after_help = HELP)]
struct Arguments {
    /// A file, for its owner alone, whose first line is the passphrase of encrypted key files. Without it the passphrase is
    /// asked for on the terminal.
    #[arg(long, global = true, value_name = "FILE", env = "TOLLWAY_PASSPHRASE_FILE")]
    passphrase_file: Option<std::path::PathBuf>,
    #[command(subcommand)]
    command: Command,
}

const HELP: &str = "\
Try it out:
  tollway demo

Or step by step, the last line in another terminal:
  tollway keygen payee.key
  tollway keygen payer.key
  tollway serve --listen tcp://127.0.0.1:7400 --dir . --price 25/KiB --key payee.key --dev-ledger
  tollway fetch tcp://127.0.0.1:7400/NAME -o OUT --key payer.key --budget 1000000

Amounts are whole numbers of the token's base units. RUST_LOG, such as RUST_LOG=info or
RUST_LOG=tollway=debug, chooses what is logged to standard error.

Exit codes: 0 success, 1 failure, 2 wrong usage, 130 interrupted. The first Ctrl-C ends a command in
order, with open channels closed; the second ends it at once.";

#[derive(Subcommand)]
enum Command {
    /// Make a plain key in a new file and print its address: `key new --plain`.
    Keygen(keygen::Arguments),
    /// Make keys, encrypted with a passphrase, and look at them.
    #[command(subcommand)]
    Key(key::Command),
    /// Run a local ledger, which holds deposits, and give orders to one.
    #[command(subcommand)]
    Ledger(ledger::Command),
    /// Sell the files of a directory.
    Serve(serve::Arguments),
    /// Fetch a file and pay for it as it comes.
    Fetch(fetch::Arguments),
    /// Print what a service costs, and who has signed that.
    Quote(quote::Arguments),
    /// Look at payment channels and bring them to an end, as payer or as payee.
    #[command(subcommand)]
    Channels(channels::Command),
    /// Print the receipts that payees have signed.
    Receipts(receipts::Arguments),
    /// Look at a running server: its sessions, its connections, and what happens to them.
    Inspect(inspect::Arguments),
    /// Run ledger, payee and payer on this machine, and check every sum.
    Demo(demo::Arguments),
    /// Look after the file of a payee, a payer or a ledger.
    #[command(subcommand)]
    Store(store::Command),
    /// Measure what a link carries: calls, items, opens, and whether one connection slows another.
    Bench(bench::Arguments),
    /// Work with vouchers that are written down.
    #[command(subcommand)]
    Voucher(VoucherCommand),
}

#[derive(Subcommand)]
enum VoucherCommand {
    /// Check each voucher of a JSON file and print one JSON line for each.
    #[command(after_help = "Example:\n  tollway voucher check protocol/vectors/vouchers.json")]
    Check {
        /// A file in the format of `protocol/vectors/vouchers.json`.
        file: std::path::PathBuf,
    },
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    log();
    if let Some(path) = arguments.passphrase_file {
        keys::set_passphrase_file(path);
    }
    let result = match arguments.command {
        Command::Keygen(arguments) => keygen::run(&arguments),
        Command::Key(command) => key::run(command),
        Command::Ledger(command) => in_runtime(|i| ledger::run(command, i)),
        Command::Serve(arguments) => in_runtime(|i| serve::run(arguments, i)),
        Command::Fetch(arguments) => in_runtime(|i| fetch::run(arguments, i)),
        Command::Quote(arguments) => in_runtime(|i| until_interrupted(quote::run(arguments), i)),
        Command::Channels(command) => in_runtime(|i| until_interrupted(channels::run(command), i)),
        Command::Receipts(arguments) => in_runtime(|i| until_interrupted(receipts::run(arguments), i)),
        Command::Inspect(arguments) => in_runtime(|i| inspect::run(arguments, i)),
        Command::Demo(arguments) => in_runtime(|i| demo::run(arguments, i)),
        Command::Store(command) => store::run(command),
        Command::Bench(arguments) => in_runtime(|i| bench::run(arguments, i)),
        Command::Voucher(VoucherCommand::Check { file }) => {
            voucher::check(&file, &mut std::io::stdout().lock()).map_err(Failure::from)
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::note(&format!("tollway: {failure}"));
            failure.exit_code()
        }
    }
}

/// Logs to standard error what `RUST_LOG` asks for, warnings by default.
fn log() {
    let wanted = std::env::var("RUST_LOG").unwrap_or_default();
    let targets = wanted.parse::<Targets>().ok().filter(|_| !wanted.is_empty());
    let targets = targets.unwrap_or_else(|| Targets::new().with_default(tracing::Level::WARN));
    let to_stderr = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    tracing_subscriber::registry().with(to_stderr).with(targets).init();
}

/// For a command that holds nothing which the first interrupt would have to bring to an end.
async fn until_interrupted(
    command: impl Future<Output = Result<(), Failure>>,
    interrupts: Interrupts,
) -> Result<(), Failure> {
    access::unless_interrupted(&interrupts, command).await?
}

/// Runs a command to its end. A second interrupt drops it where it stands, so that what it holds is cleaned up: partial
/// files are deleted and child processes are ended.
fn in_runtime<F: Future<Output = Result<(), Failure>>>(command: impl FnOnce(Interrupts) -> F) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(async {
        let interrupts = Interrupts::install()?;
        tokio::select! {
            result = command(interrupts.clone()) => result,
            () = interrupts.second() => Err(Failure::Interrupted),
        }
    });
    // A thread that reads a disk or waits for an answer on the terminal is not waited for.
    runtime.shutdown_timeout(Duration::from_millis(200));
    result
}

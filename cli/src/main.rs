//! The `tollway` command.

mod voucher;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Metered RPC: keys, a local ledger, and paid file transfer.
#[derive(Parser)]
#[command(name = "tollway", version)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Work with vouchers that are written down.
    #[command(subcommand)]
    Voucher(VoucherCommand),
}

#[derive(Subcommand)]
enum VoucherCommand {
    /// Check each voucher of a JSON file and print one JSON line for each.
    Check {
        /// A file in the format of `protocol/vectors/vouchers.json`.
        file: PathBuf,
    },
}

fn main() -> ExitCode {
    let Command::Voucher(VoucherCommand::Check { file }) = Arguments::parse().command;
    match voucher::check(&file, &mut std::io::stdout().lock()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // The one place of the command that speaks to people on standard error.
            #[allow(clippy::print_stderr)]
            {
                eprintln!("tollway: {error}");
            }
            ExitCode::FAILURE
        }
    }
}

//! `tollway ledger`: a ledger of its own process, and what its operator and its users tell it.

mod orders;
mod serve;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde::Serialize;
use tollway::escrow::{Ledger, LedgerConfig, LocalLedger};
use tollway_protocol::payment::{Address, LedgerIdentity, SecretKey};

use crate::failure::Failure;
use crate::interrupt::Interrupts;
use crate::{keys, output};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve a ledger.
    Serve(serve::Arguments),
    /// Print the address and the chain id of the ledger with a key.
    Address(AddressArguments),
    /// Put new money into an account. Needs the ledger's own key.
    Fund(orders::FundArguments),
    /// Print what is in an account.
    Balance(orders::BalanceArguments),
    /// Move money to another account.
    Transfer(orders::TransferArguments),
}

pub(crate) async fn run(command: Command, interrupts: Interrupts) -> Result<(), Failure> {
    match command {
        Command::Serve(arguments) => serve::run(arguments, interrupts).await,
        Command::Address(arguments) => address(&arguments),
        Command::Fund(arguments) => orders::fund(arguments).await,
        Command::Balance(arguments) => orders::balance(arguments).await,
        Command::Transfer(arguments) => orders::transfer(arguments).await,
    }
}

/// What a ledger is known by follows from its key alone.
#[derive(Debug, Args)]
pub(crate) struct AddressArguments {
    /// The ledger's key.
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Known {
    escrow: Address,
    /// As text: it is above what a JSON number can say exactly.
    chain_id: String,
}

fn address(arguments: &AddressArguments) -> Result<(), Failure> {
    let LedgerIdentity { chain_id, escrow } = LedgerIdentity::of(&keys::load(&arguments.key)?);
    let chain_id = chain_id.to_string();
    if arguments.json {
        output::json(&Known { escrow, chain_id })?;
    } else {
        output::line(&format!("{escrow} on chain {chain_id}"))?;
    }
    Ok(())
}

/// A ledger in memory that credits any payer.
pub(crate) fn dev_ledger(key: &SecretKey) -> LocalLedger {
    LocalLedger::new(Ledger::new(LedgerIdentity::of(key), LedgerConfig { dev: true, ..LedgerConfig::default() }))
}

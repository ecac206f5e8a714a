//! `tollway key`: keys in files, plain or encrypted with a passphrase.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use serde::Serialize;
use tollway_protocol::payment::{Address, SecretKey};

use crate::failure::Failure;
use crate::keys::{self, Protection};
use crate::output;

/// What can be done with keys.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a key in a new file, encrypted with a passphrase unless `--plain` is said.
    #[command(
        after_help = "Examples:\n  tollway key new payer.json --passphrase-file secret.txt\n  tollway key new dev.key --plain"
    )]
    New(New),
    /// Print the address of a key file.
    #[command(after_help = "Example:\n  tollway key show payer.json")]
    Show(Show),
    /// Take the key of one file into a new, encrypted one: a plain key, or a keystore of another Ethereum program.
    #[command(after_help = "Example:\n  tollway key import payer.key payer.json")]
    Import(Copy),
    /// Write the key of one file into a new, plain one, which only its owner can read.
    #[command(after_help = "Example:\n  tollway key export payer.json payer.key")]
    Export(Copy),
}

#[derive(Debug, Args)]
pub(crate) struct New {
    /// The file to make, with mode 0600.
    file: PathBuf,
    /// Write the key as it is, for development: who reads the file can spend.
    #[arg(long)]
    plain: bool,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Show {
    /// The key file.
    file: PathBuf,
    /// Decrypt the key and check that the address is its own; else an encrypted file is taken at its word.
    #[arg(long)]
    verify: bool,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct Copy {
    /// The file that has the key.
    from: PathBuf,
    /// The file to make, with mode 0600.
    to: PathBuf,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Told {
    address: Address,
    file: PathBuf,
    encrypted: bool,
    /// Whether the key itself was looked at.
    verified: bool,
}

pub(crate) fn run(command: Command) -> Result<(), Failure> {
    let (told, json) = match command {
        Command::New(New { file, plain, json }) => {
            let protection = if plain { Protection::Plain } else { keys::new_passphrase()? };
            (written(&keys::generate()?, file, &protection)?, json)
        }
        Command::Show(Show { file, verify, json }) => {
            let (address, encrypted, verified) = match keys::stated_address(&file)? {
                Some(address) if !verify => (address, true, false),
                stated => (keys::load(&file)?.address(), stated.is_some(), true),
            };
            (Told { address, file, encrypted, verified }, json)
        }
        Command::Import(Copy { from, to, json }) => {
            let key = keys::load(&from)?;
            (written(&key, to, &keys::new_passphrase()?)?, json)
        }
        Command::Export(Copy { from, to, json }) => (written(&keys::load(&from)?, to, &Protection::Plain)?, json),
    };
    if json {
        return Ok(output::json(&told)?);
    }
    Ok(output::line(&told.address.to_string())?)
}

fn written(key: &SecretKey, file: PathBuf, protection: &Protection) -> Result<Told, Failure> {
    keys::write(key, &file, protection)?;
    let encrypted = matches!(protection, Protection::Passphrase(_));
    Ok(Told { address: key.address(), file, encrypted, verified: true })
}

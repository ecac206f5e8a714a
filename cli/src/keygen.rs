//! `tollway keygen`: a new key in a new file.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use tollway_protocol::payment::Address;

use crate::failure::Failure;
use crate::{keys, output};

/// The key stays in the file: it is not printed, and a file that exists is not overwritten.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  tollway keygen payer.key")]
pub(crate) struct Arguments {
    /// The file to make, with mode 0600.
    file: PathBuf,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Made<'a> {
    address: Address,
    file: &'a PathBuf,
}

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    let address = keys::create(&arguments.file)?;
    if arguments.json {
        output::json(&Made { address, file: &arguments.file })?;
    } else {
        output::line(&address.to_string())?;
    }
    Ok(())
}

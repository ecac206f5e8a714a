//! `tollway store`: what an operator does to the file of a payee, a payer or a ledger that nobody has open.

use std::path::{Path, PathBuf};

use clap::Subcommand;
use serde::Serialize;
use tollway::disk::DiskError;
use tollway::maintenance::{self, Verified};

use crate::failure::Failure;
use crate::output;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Check every page and every record of a file.
    Verify {
        /// The file: of a payee, a payer or a ledger. Whoever uses it must have ended.
        file: PathBuf,
        /// Print a JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Copy a file to a new one, which is whole or absent.
    ///
    /// A copy is for a disk that broke. One that is older than the file it replaces has forgotten what was signed or
    /// accepted since.
    Backup {
        /// The file.
        file: PathBuf,
        /// The copy; it must not exist.
        to: PathBuf,
    },
    /// Give the space of a file that holds nothing back to the file system.
    Compact {
        /// The file.
        file: PathBuf,
    },
}

/// What a file cannot be used for.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// The file cannot be used at all.
    #[error("cannot use {}: {source}", .path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: DiskError,
    },
    /// Records in it are broken.
    #[error("{broken} of the records in {} are broken; `tollway store verify --json` names them", .path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// How many.
        broken: usize,
    },
}

impl StoreError {
    /// With the file's name.
    pub(crate) fn at(path: &Path) -> impl FnOnce(DiskError) -> StoreError {
        let path = path.to_owned();
        move |source| StoreError::Unusable { path, source }
    }
}

#[derive(Serialize)]
struct Report<'a> {
    file: &'a Path,
    kind: &'a str,
    channels: u64,
    clean: bool,
    broken: &'a [String],
}

pub(crate) fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::Verify { file, json } => verify(&file, json),
        Command::Backup { file, to } => {
            let bytes = maintenance::backup(&file, &to).map_err(StoreError::at(&file))?;
            Ok(output::line(&format!("{}: {} bytes", to.display(), output::grouped(u128::from(bytes))))?)
        }
        Command::Compact { file } => {
            let (before, after) = maintenance::compact(&file).map_err(StoreError::at(&file))?;
            let [before, after] = [before, after].map(|bytes| output::grouped(u128::from(bytes)));
            Ok(output::line(&format!("{}: {before} bytes, now {after}", file.display()))?)
        }
    }
}

fn verify(file: &Path, json: bool) -> Result<(), Failure> {
    let Verified { kind, channels, broken, clean, .. } = maintenance::verify(file).map_err(StoreError::at(file))?;
    if json {
        output::json(&Report { file, kind: &kind, channels, clean, broken: &broken })?;
    } else {
        let pages = if clean { "sound" } else { "repaired" };
        let count = output::grouped(u128::from(channels));
        output::line(&format!("{}: {kind}, {count} channels, pages {pages}", file.display()))?;
        broken.iter().for_each(|what| output::note(&format!("  {what}")));
    }
    match broken.len() {
        0 => Ok(()),
        broken => Err(StoreError::Broken { path: file.to_owned(), broken }.into()),
    }
}

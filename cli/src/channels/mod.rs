//! `tollway channels`: what is open, of a payer or of a payee, and how it is brought to an end by hand.

mod payee;
mod payer;

use std::path::PathBuf;

use clap::{Args, Subcommand};
use tollway_protocol::payment::{Address, Amount, ChannelId};

use crate::failure::Failure;
use crate::output;
use crate::tls::ClientArguments;
use crate::units::Place;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List the channels of a wallet or of a payee's store.
    List(ListArguments),
    /// Show one channel with all that is recorded of it.
    Show(ShowArguments),
    /// Claim what a payee is owed so far, and leave the channel open.
    Settle(SettleArguments),
    /// Close a channel, as its payer or as its payee.
    #[command(after_help = "Examples:\n  \
        tollway channels close 0x… --wallet payer.redb --key payer.key\n  \
        tollway channels close 0x… --wallet payer.redb --key payer.key --force\n  \
        tollway channels close 0x… --store payee.redb --key payee.key --ledger tcp://127.0.0.1:7300\n\n\
        With --force a payer does without the payee: it asks the ledger to withdraw, and takes back what is left when\n\
        the grace period is over and the command is given again.")]
    Close(CloseArguments),
}

/// Whose channels. Whoever uses the file must have ended.
#[derive(Debug, Clone, Args)]
#[group(required = true, multiple = false)]
pub(crate) struct Whose {
    /// A payer's wallet.
    #[arg(long, value_name = "FILE")]
    wallet: Option<PathBuf>,
    /// A payee's store.
    #[arg(long, value_name = "FILE")]
    store: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct ListArguments {
    #[command(flatten)]
    whose: Whose,
    /// Also those that have ended.
    #[arg(long)]
    all: bool,
    /// Print one JSON object for each.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct ShowArguments {
    /// The channel.
    id: ChannelId,
    #[command(flatten)]
    whose: Whose,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct SettleArguments {
    /// The channel; without it, all that are open.
    id: Option<ChannelId>,
    /// The payee's store.
    #[arg(long, value_name = "FILE")]
    store: PathBuf,
    /// The payee's key.
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// The ledger where the deposits lie.
    #[arg(long, value_name = "URL")]
    ledger: Place,
    /// Print a JSON object for each.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct CloseArguments {
    /// The channel.
    id: ChannelId,
    #[command(flatten)]
    whose: Whose,
    /// The key of the payer or payee.
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// Payer: where the payee is, if not where it was.
    #[arg(long, value_name = "URL")]
    payee_at: Option<Place>,
    /// Payer: without the payee.
    #[arg(long, conflicts_with = "store")]
    force: bool,
    /// Payee: the ledger where the deposit lies.
    #[arg(long, value_name = "URL", required_unless_present = "wallet")]
    ledger: Option<Place>,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    tls: ClientArguments,
}

/// Why nothing was done about a channel.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ChannelsError {
    /// It is not in the file.
    #[error("there is no channel {0} in the file; `tollway channels list --all` lists those that there are")]
    Unknown(ChannelId),
    /// Nobody knows where the payee is.
    #[error("it is not known where the payee of {0} is: add --payee-at URL, or --force to do without it")]
    NoPlace(ChannelId),
    /// Nothing is left to be done.
    #[error("the channel {0} has ended")]
    Ended(ChannelId),
}

pub(crate) async fn run(command: Command) -> Result<(), Failure> {
    match command {
        Command::List(ListArguments { whose, all, json }) => match (&whose.wallet, &whose.store) {
            (Some(wallet), _) => payer::list(wallet, all, json).await,
            (_, Some(store)) => payee::list(store, all, json).await,
            (None, None) => Ok(()),
        },
        Command::Show(ShowArguments { id, whose, json }) => match (&whose.wallet, &whose.store) {
            (Some(wallet), _) => payer::show(wallet, id, json).await,
            (_, Some(store)) => payee::show(store, id, json).await,
            (None, None) => Ok(()),
        },
        Command::Settle(arguments) => payee::settle(arguments).await,
        Command::Close(arguments) => match (arguments.whose.wallet.clone(), arguments.whose.store.clone()) {
            (Some(wallet), _) => payer::close(&wallet, arguments).await,
            (_, Some(store)) => payee::close(&store, arguments).await,
            (None, None) => Ok(()),
        },
    }
}

/// A row of the list, of either side.
struct Row {
    id: ChannelId,
    other: Address,
    phase: &'static str,
    deposit: Amount,
    used: Amount,
    settled: Amount,
}

/// Prints the list as a table.
fn table(rows: &[Row], [other, used, settled]: [&str; 3]) -> std::io::Result<()> {
    let header = ["channel", other, "state", "deposit", used, settled].map(str::to_owned).to_vec();
    let cells = rows.iter().map(|row| {
        let sums = [row.deposit, row.used, row.settled].map(output::amount);
        [vec![row.id.to_string(), row.other.to_string(), row.phase.to_owned()], sums.to_vec()].concat()
    });
    output::line(&output::columns(&[vec![header], cells.collect()].concat()))
}

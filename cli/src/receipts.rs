//! `tollway receipts`: what payees have signed, for the books and as evidence.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;
use tollway::payment::{RedbWallet, StoredReceipt, WalletStore};
use tollway_protocol::payment::{Address, Amount, ChannelId, Hash, Hex, ReceiptStatus};

use crate::failure::Failure;
use crate::output;
use crate::store::StoreError;

/// Prints the receipts that payees have given to a wallet, by channel and in their order.
#[derive(Debug, Args)]
pub(crate) struct Arguments {
    /// The payer's wallet. Whoever uses it must have ended.
    #[arg(long, value_name = "FILE")]
    wallet: PathBuf,
    /// Only those of this channel.
    #[arg(long, value_name = "ID")]
    channel: Option<ChannelId>,
    /// Print one JSON object for each, with the signed bytes and the signature.
    #[arg(long, conflicts_with = "csv")]
    json: bool,
    /// Print comma-separated values with a header.
    #[arg(long)]
    csv: bool,
}

/// A receipt. Sums are decimal strings.
#[derive(Serialize)]
struct Shown {
    channel_id: ChannelId,
    payee: Address,
    sequence: u64,
    time_ms: u64,
    status: ReceiptStatus,
    accepted: Amount,
    spent: Amount,
    metered_bytes: u64,
    settled: Amount,
    reference: Option<Hash>,
    /// What is signed, and the signature: anybody can verify it.
    signed: String,
    signature: String,
}

impl From<StoredReceipt> for Shown {
    fn from(stored: StoredReceipt) -> Self {
        let StoredReceipt { channel_id, payee, receipt, signed } = stored;
        Shown {
            channel_id,
            payee,
            sequence: receipt.sequence,
            time_ms: receipt.time_ms,
            status: receipt.status,
            accepted: receipt.accepted,
            spent: receipt.spent,
            metered_bytes: receipt.units,
            settled: receipt.settled,
            reference: receipt.reference,
            signed: Hex(&signed.bytes).to_string(),
            signature: Hex(signed.signature.as_bytes()).to_string(),
        }
    }
}

impl Shown {
    const HEADER: [&str; 10] = [
        "channel_id",
        "payee",
        "sequence",
        "time_ms",
        "status",
        "accepted",
        "spent",
        "metered_bytes",
        "settled",
        "reference",
    ];

    /// No cell needs quotes: addresses, numbers and words without a comma.
    fn cells(&self) -> Vec<String> {
        let status = serde_json::to_value(self.status).ok().and_then(|value| value.as_str().map(str::to_owned));
        vec![
            self.channel_id.to_string(),
            self.payee.to_string(),
            self.sequence.to_string(),
            self.time_ms.to_string(),
            status.unwrap_or_default(),
            self.accepted.to_string(),
            self.spent.to_string(),
            self.metered_bytes.to_string(),
            self.settled.to_string(),
            self.reference.map_or_else(String::new, |reference| reference.to_string()),
        ]
    }
}

pub(crate) async fn run(arguments: Arguments) -> Result<(), Failure> {
    let Arguments { wallet, channel, json, csv } = arguments;
    let store = RedbWallet::open_existing(&wallet).map_err(StoreError::at(&wallet))?;
    let mut receipts = store.receipts().await?;
    receipts.retain(|receipt| channel.is_none_or(|channel| channel == receipt.channel_id));
    let shown: Vec<Shown> = receipts.into_iter().map(Shown::from).collect();
    if json {
        return shown.iter().try_for_each(|receipt| Ok(output::json(receipt)?));
    }
    let header = Shown::HEADER.map(str::to_owned).to_vec();
    let rows: Vec<Vec<String>> = std::iter::once(header).chain(shown.iter().map(Shown::cells)).collect();
    if csv {
        return rows.iter().try_for_each(|row| Ok(output::line(&row.join(","))?));
    }
    Ok(output::line(&output::columns(&rows))?)
}

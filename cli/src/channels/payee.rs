//! A payee's channels.

use std::path::Path;
use std::sync::Arc;

use serde::Serialize;
use tollway::escrow::LedgerClient;
use tollway::payment::{KeptUp, Payee, PayeeConfig};
use tollway::store::{ChannelRecord, ChannelStore, RedbStore};
use tollway_protocol::payment::channel::ChannelPhase;
use tollway_protocol::payment::{Address, Amount, ChannelId, Price, Rate};

use super::{ChannelsError, CloseArguments, Row, SettleArguments, table};
use crate::failure::Failure;
use crate::files;
use crate::store::StoreError;
use crate::units::Place;
use crate::{keys, output};

/// Channels that are read at once.
const PAGE: usize = 256;

/// What `--json` prints of a channel. Sums are decimal strings.
#[derive(Serialize)]
struct Shown {
    channel_id: ChannelId,
    payer: Address,
    payee: Address,
    token: Address,
    escrow: Address,
    chain_id: String,
    state: &'static str,
    deposit: Amount,
    accepted: Amount,
    leased: Amount,
    spent: Amount,
    settled: Amount,
    lost_in_flight: Amount,
    metered_bytes: u64,
    vouchers: usize,
    epoch: u64,
}

fn state(phase: &ChannelPhase) -> &'static str {
    match phase {
        ChannelPhase::Open => "open",
        ChannelPhase::Disputed { .. } => "disputed",
        ChannelPhase::Closing { .. } => "closing",
        ChannelPhase::Finalized { .. } => "ended",
        _ => "unknown",
    }
}

impl Shown {
    fn of(record: &ChannelRecord) -> Self {
        let (descriptor, snapshot) = (&record.descriptor, &record.snapshot);
        Shown {
            channel_id: descriptor.id(),
            payer: descriptor.payer,
            payee: descriptor.payee,
            token: descriptor.token,
            escrow: descriptor.escrow,
            chain_id: descriptor.chain_id.to_string(),
            state: state(&snapshot.phase),
            deposit: snapshot.deposit,
            accepted: snapshot.accepted,
            leased: snapshot.leased,
            spent: snapshot.spent,
            settled: snapshot.settled,
            lost_in_flight: snapshot.lost_in_flight,
            metered_bytes: snapshot.units,
            vouchers: snapshot.vouchers.len(),
            epoch: snapshot.epoch,
        }
    }

    fn rows(&self) -> Vec<(&'static str, String)> {
        vec![
            ("channel", self.channel_id.to_string()),
            ("state", self.state.to_owned()),
            ("payer", self.payer.to_string()),
            ("deposit", output::amount(self.deposit)),
            ("accepted", output::amount(self.accepted)),
            ("leased", output::amount(self.leased)),
            ("spent", output::amount(self.spent)),
            ("settled", output::amount(self.settled)),
            ("lost in flight", output::amount(self.lost_in_flight)),
            ("metered bytes", output::grouped(u128::from(self.metered_bytes))),
            ("token", self.token.to_string()),
            ("escrow", format!("{} on chain {}", self.escrow, self.chain_id)),
        ]
    }
}

async fn read(store: &RedbStore) -> Result<Vec<ChannelRecord>, Failure> {
    let (mut records, mut after) = (Vec::new(), None);
    loop {
        let page = store.list(after, PAGE).await?;
        let Some(last) = page.last().copied() else { return Ok(records) };
        for id in page {
            records.extend(store.load(id).await?);
        }
        after = Some(last);
    }
}

fn open(store: &Path) -> Result<RedbStore, StoreError> {
    RedbStore::open_existing(store).map_err(StoreError::at(store))
}

pub(super) async fn list(store: &Path, all: bool, json: bool) -> Result<(), Failure> {
    let mut records = read(&open(store)?).await?;
    records.retain(|record| all || !matches!(record.snapshot.phase, ChannelPhase::Finalized { .. }));
    if json {
        return records.iter().try_for_each(|record| Ok(output::json(&Shown::of(record))?));
    }
    let row = |record: &ChannelRecord| Row {
        id: record.descriptor.id(),
        other: record.descriptor.payer,
        phase: state(&record.snapshot.phase),
        deposit: record.snapshot.deposit,
        used: record.snapshot.spent,
        settled: record.snapshot.settled,
    };
    let rows: Vec<Row> = records.iter().map(row).collect();
    Ok(table(&rows, ["payer", "spent", "settled"])?)
}

pub(super) async fn show(store: &Path, id: ChannelId, json: bool) -> Result<(), Failure> {
    tell(&open(store)?, id, json).await
}

async fn tell(store: &RedbStore, id: ChannelId, json: bool) -> Result<(), Failure> {
    let record = store.load(id).await?.ok_or(ChannelsError::Unknown(id))?;
    let shown = Shown::of(&record);
    if json {
        output::json(&shown)?;
    } else {
        output::line(&output::table(&shown.rows()))?;
    }
    Ok(())
}

/// The payee of a store, which sells nothing: it only claims.
async fn payee(store: Arc<RedbStore>, key: &Path, ledger: &Place) -> Result<Arc<Payee>, Failure> {
    let escrow = Arc::new(LedgerClient::connect(&ledger.0).await?);
    let any_price: Rate = "1/KiB".parse()?;
    let config = PayeeConfig::new(
        keys::load(key)?,
        escrow,
        store,
        files::SERVICE,
        files::prices(Price::per_bytes_out(any_price)),
    );
    Ok(Payee::new(config)?)
}

pub(super) async fn settle(arguments: SettleArguments) -> Result<(), Failure> {
    let SettleArguments { id, store, key, ledger, json } = arguments;
    let store = Arc::new(open(&store)?);
    let payee = payee(store.clone(), &key, &ledger).await?;
    let ids = match id {
        Some(id) => vec![id],
        None => {
            let open = |record: &ChannelRecord| record.snapshot.phase == ChannelPhase::Open;
            read(&store).await?.iter().filter(|record| open(record)).map(|record| record.descriptor.id()).collect()
        }
    };
    for id in ids {
        if let KeptUp::Settled(settlement) = payee.settle(id).await? {
            output::note(&format!("{id}: {} paid out in all.", output::amount(settlement.settled)));
        }
        tell(&store, id, json).await?;
    }
    Ok(())
}

pub(super) async fn close(store: &Path, arguments: CloseArguments) -> Result<(), Failure> {
    let CloseArguments { id, key, ledger, json, .. } = arguments;
    let store = Arc::new(open(store)?);
    let record = store.load(id).await?.ok_or(ChannelsError::Unknown(id))?;
    if matches!(record.snapshot.phase, ChannelPhase::Finalized { .. }) {
        return Err(ChannelsError::Ended(id).into());
    }
    let ledger = ledger.ok_or(ChannelsError::NoPlace(id))?;
    payee(store.clone(), &key, &ledger).await?.close(id).await?;
    tell(&store, id, json).await
}

//! The books of the three processes as a crash leaves them: copies of their files, opened as after a restart.

use std::collections::BTreeMap;
use std::path::Path;

use tokio::runtime::Handle;
use tollway::escrow::{EscrowChannel, LedgerConfig, LocalLedger};
use tollway::payment::{RedbWallet, WalletChannel, WalletStore};
use tollway::protocol::payment::{Address, ChannelId};
use tollway::store::{ChannelRecord, ChannelStore, RedbStore};

use crate::roles::{Failure, Role};
use crate::scene::{self, GRACE_MS};

/// Channels of a run at most: more than any has.
const MOST_CHANNELS: usize = 1 << 20;

/// What stands in the three files.
#[derive(Debug)]
pub(crate) struct Books {
    pub(crate) wallet: BTreeMap<ChannelId, WalletChannel>,
    pub(crate) payee: BTreeMap<ChannelId, ChannelRecord>,
    pub(crate) ledger: BTreeMap<ChannelId, EscrowChannel>,
    /// How many channels the ledger has, also those that nobody else knows.
    pub(crate) ledger_channels: usize,
    pub(crate) payer_balance: u128,
    pub(crate) payee_balance: u128,
}

/// A file that cannot be used as a crash has left it.
#[derive(Debug, thiserror::Error)]
#[error("the {}'s file cannot be opened: {why}", .role.name())]
pub(crate) struct Unreadable {
    pub(crate) role: Role,
    pub(crate) why: Failure,
}

impl Books {
    /// Copies the files of processes that don't run, into `images`, and reads the copies.
    pub(crate) fn read(directory: &Path, images: &Path, runtime: &Handle) -> Result<Books, Unreadable> {
        let copy = |role: Role| {
            let image = role.file(images);
            std::fs::copy(role.file(directory), &image).map_err(Failure::from)?;
            Ok::<_, Failure>(image)
        };
        let failed = |role| move |why| Unreadable { role, why };
        let wallet = copy(Role::Payer).and_then(|image| {
            let wallet = RedbWallet::open_existing(image)?;
            let channels = runtime.block_on(wallet.channels())?;
            Ok(channels.into_iter().map(|channel| (channel.id(), channel)).collect::<BTreeMap<_, _>>())
        });
        let wallet = wallet.map_err(failed(Role::Payer))?;
        let payee = copy(Role::Payee).and_then(|image| runtime.block_on(records(&RedbStore::open_existing(image)?)));
        let payee = payee.map_err(failed(Role::Payee))?;
        let ledger = copy(Role::Ledger).and_then(|image| {
            let config = LedgerConfig { grace_ms: GRACE_MS, dev: false };
            Ok(LocalLedger::open(image, scene::ledger_identity(), config)?)
        });
        let ledger = ledger.map_err(failed(Role::Ledger))?;
        let balance = |holder| ledger.read(|ledger| ledger.balance(holder, Address::ZERO).units());
        let known = wallet.keys().chain(payee.keys()).copied();
        let found = |id| Some((id, ledger.read(|ledger| ledger.channel(id).cloned())?));
        Ok(Books {
            ledger: known.filter_map(found).collect(),
            ledger_channels: ledger.read(tollway::escrow::Ledger::channel_count),
            payer_balance: balance(scene::payer_key().address()),
            payee_balance: balance(scene::payee_key().address()),
            wallet,
            payee,
        })
    }
}

async fn records(store: &RedbStore) -> Result<BTreeMap<ChannelId, ChannelRecord>, Failure> {
    let mut records = BTreeMap::new();
    for id in store.list(None, MOST_CHANNELS).await? {
        let record = store.load(id).await?.ok_or("a record that is listed is not there")?;
        record.check(id)?;
        records.insert(id, record);
    }
    Ok(records)
}

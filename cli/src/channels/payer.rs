//! A payer's channels.

use std::path::Path;
use std::sync::Arc;

use serde::Serialize;
use tollway::SessionConfig;
use tollway::payment::{RedbWallet, Wallet, WalletChannel, WalletConfig, WalletError, WalletPhase, WalletStore};
use tollway_protocol::error::Reason;
use tollway_protocol::payment::{Address, Amount, ChannelId};

use super::{ChannelsError, CloseArguments, Row, table};
use crate::failure::Failure;
use crate::store::StoreError;
use crate::{keys, output};

/// What `--json` prints of a channel. Sums are decimal strings.
#[derive(Serialize)]
struct Shown<'a> {
    channel_id: ChannelId,
    payee: Address,
    payer: Address,
    token: Address,
    escrow: Address,
    chain_id: String,
    service: &'a str,
    state: &'static str,
    deposit: Amount,
    received: Amount,
    lost_in_flight: Amount,
    /// Nothing above it was ever signed.
    signing_ceiling: Amount,
    settled: Option<Amount>,
    epoch: u64,
    ledger: Option<&'a str>,
    payee_at: Option<&'a str>,
    made_ms: u64,
}

impl<'a> Shown<'a> {
    fn of(channel: &'a WalletChannel) -> Self {
        let (descriptor, book) = (&channel.descriptor, &channel.book);
        Shown {
            channel_id: channel.id(),
            payee: descriptor.payee,
            payer: descriptor.payer,
            token: descriptor.token,
            escrow: descriptor.escrow,
            chain_id: descriptor.chain_id.to_string(),
            service: &channel.service,
            state: channel.phase.name(),
            deposit: book.deposit,
            received: book.received,
            lost_in_flight: book.lost_in_flight,
            signing_ceiling: book.ceiling,
            settled: settled(channel),
            epoch: book.epoch,
            ledger: channel.ledger_url.as_deref(),
            payee_at: channel.payee_url.as_deref(),
            made_ms: channel.made_ms,
        }
    }

    fn rows(&self) -> Vec<(&'static str, String)> {
        let or_none = |text: Option<&str>| text.unwrap_or("unknown").to_owned();
        vec![
            ("channel", self.channel_id.to_string()),
            ("state", self.state.to_owned()),
            ("payee", self.payee.to_string()),
            ("service", self.service.to_owned()),
            ("deposit", output::amount(self.deposit)),
            ("received", output::amount(self.received)),
            ("lost in flight", output::amount(self.lost_in_flight)),
            ("signing ceiling", output::amount(self.signing_ceiling)),
            ("paid to the payee", self.settled.map_or_else(|| "not known".to_owned(), output::amount)),
            ("token", self.token.to_string()),
            ("escrow", format!("{} on chain {}", self.escrow, self.chain_id)),
            ("ledger", or_none(self.ledger)),
            ("payee at", or_none(self.payee_at)),
        ]
    }
}

fn settled(channel: &WalletChannel) -> Option<Amount> {
    match channel.phase {
        WalletPhase::Ended { settled } => Some(settled),
        _ => None,
    }
}

async fn read(wallet: &Path) -> Result<Vec<WalletChannel>, Failure> {
    let wallet = RedbWallet::open_existing(wallet).map_err(StoreError::at(wallet))?;
    Ok(wallet.channels().await?)
}

pub(super) async fn list(wallet: &Path, all: bool, json: bool) -> Result<(), Failure> {
    let mut channels = read(wallet).await?;
    channels.retain(|channel| all || settled(channel).is_none());
    if json {
        return channels.iter().try_for_each(|channel| Ok(output::json(&Shown::of(channel))?));
    }
    let row = |channel: &WalletChannel| Row {
        id: channel.id(),
        other: channel.descriptor.payee,
        phase: channel.phase.name(),
        deposit: channel.book.deposit,
        used: channel.counted(),
        settled: settled(channel).unwrap_or_default(),
    };
    let rows: Vec<Row> = channels.iter().map(row).collect();
    Ok(table(&rows, ["payee", "received", "paid"])?)
}

pub(super) async fn show(wallet: &Path, id: ChannelId, json: bool) -> Result<(), Failure> {
    let channels = read(wallet).await?;
    let channel = channels.iter().find(|channel| channel.id() == id).ok_or(ChannelsError::Unknown(id))?;
    tell(channel, json)
}

fn tell(channel: &WalletChannel, json: bool) -> Result<(), Failure> {
    let shown = Shown::of(channel);
    if json {
        output::json(&shown)?;
    } else {
        output::line(&output::table(&shown.rows()))?;
    }
    Ok(())
}

pub(super) async fn close(file: &Path, arguments: CloseArguments) -> Result<(), Failure> {
    let CloseArguments { id, key, payee_at, force, json, tls, .. } = arguments;
    let store = Arc::new(RedbWallet::open_existing(file).map_err(StoreError::at(file))?);
    // Nothing is bought: the close states what was received before.
    let mut config = WalletConfig::new(keys::load(&key)?, Amount::MAX);
    config.store = store.clone();
    let find = async || {
        let channels = store.channels().await?;
        Ok::<_, Failure>(channels.into_iter().find(|channel| channel.id() == id).ok_or(ChannelsError::Unknown(id))?)
    };
    let channel = find().await?;
    config.payee = Some(channel.descriptor.payee);
    let wallet = Wallet::new(config);
    // What the ledger says comes first: the payee may have closed it.
    let channel = wallet.refresh(channel).await?;
    match (&channel.phase, force) {
        (WalletPhase::Ended { .. }, _) => {}
        (WalletPhase::Withdrawing, _) => withdraw(&wallet, channel).await?,
        (_, true) => {
            let asked = wallet.request_close(channel).await?;
            withdraw(&wallet, asked).await?;
        }
        (WalletPhase::Open | WalletPhase::Opening { .. }, false) => {
            let known = channel.payee_url.as_deref().and_then(|url| url.parse().ok());
            let endpoint = payee_at.map(|place| place.0).or(known).ok_or(ChannelsError::NoPlace(id))?;
            let session = tollway::connect_with(&endpoint, SessionConfig::default(), &tls.options()?).await?;
            wallet.resume(&session, &channel.service, id).await?.close().await?;
            session.close(Reason::none());
        }
        // A close voucher is with the payee, which has not settled it.
        _ => return Err(WalletError::Timeout("the payee's settlement; add --force to do without it").into()),
    }
    tell(&find().await?, json)
}

/// Takes back what is left, or says when that will be possible.
async fn withdraw(wallet: &Wallet, channel: WalletChannel) -> Result<(), Failure> {
    match wallet.withdraw(channel).await {
        Ok((_, refunded)) => {
            output::note(&format!("{} came back.", output::amount(refunded)));
            Ok(())
        }
        // The grace period lasts on: the record says "withdrawing", and the command is given again.
        Err(WalletError::Escrow(why)) => {
            output::note(&format!("The withdrawal is announced: {why}. Give the command again then."));
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

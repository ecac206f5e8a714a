//! A wallet's store that can be made to forget one thing. With every guard in its place it is the store behind it.

use std::collections::HashMap;

use parking_lot::Mutex;
use tollway::failpoint::is_broken;
use tollway::future::BoxFuture;
use tollway::payment::{RedbWallet, StoredReceipt, WalletChannel, WalletPhase, WalletStore, WalletStoreError};
use tollway::protocol::payment::{Amount, ChannelId, SignedReceipt};

#[derive(Debug)]
pub(crate) struct BrokenWallet {
    wallet: RedbWallet,
    /// What the process knows of each channel, and the broken store does not write; `None` with a sound one.
    known: Option<Mutex<HashMap<ChannelId, WalletChannel>>>,
}

impl BrokenWallet {
    pub(crate) fn new(wallet: RedbWallet) -> Self {
        let forgets = std::env::var("TOLLWAY_BREAK").is_ok_and(|guard| guard.starts_with("wallet.forget-"));
        BrokenWallet { wallet, known: forgets.then(Mutex::default) }
    }
}

/// What a store without one of its guards writes of a record, if it writes it at all.
fn forget(mut channel: WalletChannel) -> Option<WalletChannel> {
    if is_broken("wallet.forget-ceiling") {
        channel.book.ceiling = Amount::ZERO;
    }
    if is_broken("wallet.forget-epoch") {
        channel.book.epoch = 0;
    }
    if is_broken("wallet.forget-received") {
        channel.book.received = Amount::ZERO;
    }
    if is_broken("wallet.forget-order") && matches!(channel.phase, WalletPhase::Opening { .. }) {
        return None;
    }
    Some(channel)
}

impl WalletStore for BrokenWallet {
    fn save(
        &self,
        channel: WalletChannel,
        receipt: Option<SignedReceipt>,
    ) -> BoxFuture<'_, Result<(), WalletStoreError>> {
        if let Some(known) = &self.known {
            known.lock().insert(channel.id(), channel.clone());
        }
        match forget(channel) {
            Some(channel) => self.wallet.save(channel, receipt),
            None => Box::pin(async { Ok(()) }),
        }
    }

    fn channels(&self) -> BoxFuture<'_, Result<Vec<WalletChannel>, WalletStoreError>> {
        Box::pin(async {
            let stored = self.wallet.channels().await?;
            let Some(known) = &self.known else { return Ok(stored) };
            let mut channels: HashMap<_, _> = stored.into_iter().map(|channel| (channel.id(), channel)).collect();
            channels.extend(known.lock().iter().map(|(id, channel)| (*id, channel.clone())));
            let mut channels: Vec<_> = channels.into_values().collect();
            channels.sort_by_key(WalletChannel::id);
            Ok(channels)
        })
    }

    fn receipts(&self) -> BoxFuture<'_, Result<Vec<StoredReceipt>, WalletStoreError>> {
        self.wallet.receipts()
    }

    fn survives_restart(&self) -> bool {
        true
    }
}

//! A wallet's store that can be made to forget one thing. With `TOLLWAY_BREAK` unset it is the store behind it.

use std::collections::HashMap;

use parking_lot::Mutex;
use tollway::failpoint::is_broken;
use tollway::future::BoxFuture;
use tollway::payment::{RedbWallet, StoredReceipt, WalletChannel, WalletPhase, WalletStore, WalletStoreError};
use tollway::protocol::payment::{Amount, ChannelId, SignedReceipt};

#[derive(Debug)]
pub(crate) struct BrokenWallet {
    wallet: RedbWallet,
    /// What the process knows of each channel, and a broken store does not write.
    known: Mutex<HashMap<ChannelId, WalletChannel>>,
}

impl BrokenWallet {
    pub(crate) fn new(wallet: RedbWallet) -> Self {
        BrokenWallet { wallet, known: Mutex::default() }
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
        self.known.lock().insert(channel.id(), channel.clone());
        match forget(channel) {
            Some(channel) => self.wallet.save(channel, receipt),
            None => Box::pin(async { Ok(()) }),
        }
    }

    fn channels(&self) -> BoxFuture<'_, Result<Vec<WalletChannel>, WalletStoreError>> {
        Box::pin(async {
            let mut channels: HashMap<_, _> =
                self.wallet.channels().await?.into_iter().map(|channel| (channel.id(), channel)).collect();
            channels.extend(self.known.lock().iter().map(|(id, channel)| (*id, channel.clone())));
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

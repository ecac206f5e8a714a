//! What a payer keeps of its channels: one record for each, and the receipts that it was given.
//!
//! The wallet is the only writer. It writes before it acts: the order before the deposit, the epoch before the credential,
//! the signing ceiling before a voucher, the close voucher before it is sent. What is stored never goes back, so a
//! record that was put back from an old copy is found out when it is written.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tollway_protocol::payment::ledger_messages::{OpenChannel, Signed};
use tollway_protocol::payment::{
    Address, Amount, ChannelDescriptor, ChannelId, CloseVoucher, PayerSnapshot, Receipt, SignedReceipt,
};

use crate::future::BoxFuture;

/// Receipts that are kept of one channel; the oldest make room. A channel gets one with each opening and one at its end, so
/// these are the last 60 openings or so, at 200 bytes each.
pub const MAX_RECEIPTS_PER_CHANNEL: usize = 64;

/// How far a payer's channel is.
///
/// ```text
///  Opening ──ledger has it──► Open ──close voucher signed──► Closing ──final receipt──► Ended
///     │ never deposited         │ └──────withdrawal asked for──┐ │                       ▲
///     └──────────► Ended        └─► Withdrawing ◄──────────────┴─┘──after the grace──────┘
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum WalletPhase {
    /// The order to deposit is signed; whether the ledger has it is not known. It is sent again before anything else.
    Opening {
        /// The order.
        order: Signed<OpenChannel>,
    },
    /// It can be paid from.
    Open,
    /// A close voucher is signed: the payee may settle at it at any time, and nothing more is signed.
    Closing {
        /// What the payee was sent.
        close: CloseVoucher,
    },
    /// The ledger was told that the payer withdraws. The payee has the grace period to claim what it delivered.
    Withdrawing,
    /// The escrow has closed it.
    Ended {
        /// What the payee got in all, in base units.
        settled: Amount,
    },
}

impl WalletPhase {
    /// For people and programs.
    pub const fn name(&self) -> &'static str {
        match self {
            WalletPhase::Opening { .. } => "opening",
            WalletPhase::Open => "open",
            WalletPhase::Closing { .. } => "closing",
            WalletPhase::Withdrawing => "withdrawing",
            WalletPhase::Ended { .. } => "ended",
        }
    }

    const fn rank(&self) -> u8 {
        match self {
            WalletPhase::Opening { .. } => 0,
            WalletPhase::Open => 1,
            WalletPhase::Closing { .. } => 2,
            WalletPhase::Withdrawing => 3,
            WalletPhase::Ended { .. } => 4,
        }
    }
}

/// A payer's record of one channel. All amounts are base units.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WalletChannel {
    /// What the channel's id is made of.
    pub descriptor: ChannelDescriptor,
    /// The service that it was opened for. Others of the payee may be paid from it, too.
    pub service: String,
    /// Where the ledger is.
    pub ledger_url: Option<String>,
    /// Where the payee was, if the wallet was told.
    pub payee_url: Option<String>,
    /// The counts, the signing ceiling and the epoch.
    pub book: PayerSnapshot,
    /// How far it is.
    pub phase: WalletPhase,
    /// The number of the latest receipt.
    pub last_receipt: u64,
    /// When it was made, in milliseconds since 1970.
    pub made_ms: u64,
}

impl WalletChannel {
    /// The channel's id.
    pub fn id(&self) -> ChannelId {
        self.descriptor.id()
    }

    /// What was received or stands as lost, in base units.
    pub fn counted(&self) -> Amount {
        self.book.received.saturating_add(self.book.lost_in_flight)
    }

    /// What of the budget it has used up: what was counted, or what the payee got if that is more.
    pub fn cost(&self) -> Amount {
        match self.phase {
            WalletPhase::Ended { settled } => settled,
            _ => self.counted(),
        }
    }

    /// What the payee has got, or may get, beyond what was received: the loss that counts against a loss budget.
    pub fn loss(&self) -> Amount {
        let PayerSnapshot { received, lost_in_flight, ceiling, .. } = self.book;
        match self.phase {
            WalletPhase::Ended { settled } => settled.saturating_sub(received),
            // The payee may claim whatever was signed.
            WalletPhase::Withdrawing => ceiling.saturating_sub(received),
            _ => lost_in_flight,
        }
    }

    fn check_follows(&self, before: &WalletChannel) -> Result<(), WalletStoreError> {
        let (next, last) = (&self.book, &before.book);
        let rising = [
            ("descriptor", self.descriptor == before.descriptor),
            ("deposit", next.deposit >= last.deposit),
            ("received", next.received >= last.received),
            ("lost_in_flight", next.lost_in_flight >= last.lost_in_flight),
            ("ceiling", next.ceiling >= last.ceiling),
            ("epoch", next.epoch >= last.epoch),
            ("last_receipt", self.last_receipt >= before.last_receipt),
            ("phase", self.phase.rank() >= before.phase.rank()),
        ];
        match rising.into_iter().find(|(_, rises)| !rises) {
            Some((name, _)) => Err(WalletStoreError::GoesBack(name)),
            None => Ok(()),
        }
    }
}

/// A receipt as it was given, with what it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StoredReceipt {
    /// The channel.
    pub channel_id: ChannelId,
    /// Who signed it.
    pub payee: Address,
    /// What it says.
    pub receipt: Receipt,
    /// The evidence.
    pub signed: SignedReceipt,
}

/// Why a wallet's store did not do as it was told. The wallet then signs nothing more.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WalletStoreError {
    /// A value that only rises would fall: two wallets use one key, or the file was put back from an old copy.
    #[error("{0} would go back")]
    GoesBack(&'static str),
    /// The store itself failed; whether the change took effect is unknown.
    #[error("the wallet's store failed: {0}")]
    Backend(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Where a wallet keeps its channels. What was answered with `Ok` is durable, as far as the store is.
pub trait WalletStore: Send + Sync + 'static {
    /// Writes a channel's record, and a receipt of it if there is a new one.
    ///
    /// # Errors
    /// [`WalletStoreError`]; after `Backend` it is unknown whether it was written.
    fn save(
        &self,
        channel: WalletChannel,
        receipt: Option<SignedReceipt>,
    ) -> BoxFuture<'_, Result<(), WalletStoreError>>;

    /// All channels, in the order of their ids.
    ///
    /// # Errors
    /// [`WalletStoreError::Backend`].
    fn channels(&self) -> BoxFuture<'_, Result<Vec<WalletChannel>, WalletStoreError>>;

    /// The receipts that are kept, by channel and then by number.
    ///
    /// # Errors
    /// [`WalletStoreError::Backend`].
    fn receipts(&self) -> BoxFuture<'_, Result<Vec<StoredReceipt>, WalletStoreError>>;

    /// Whether what is stored is there after the process has ended. If not, channels are not kept for the next time.
    fn survives_restart(&self) -> bool {
        false
    }
}

/// What every store checks before it writes.
///
/// # Errors
/// [`WalletStoreError::GoesBack`].
pub fn check_save(before: Option<&WalletChannel>, next: &WalletChannel) -> Result<(), WalletStoreError> {
    before.map_or(Ok(()), |before| next.check_follows(before))
}

/// Reads a receipt of a channel whose signature was verified when it came.
pub(super) fn stored(channel: &WalletChannel, signed: SignedReceipt) -> Option<StoredReceipt> {
    let receipt = signed.verify(&channel.descriptor).ok()?;
    Some(StoredReceipt { channel_id: channel.id(), payee: channel.descriptor.payee, receipt, signed })
}

/// A wallet's channels in memory: they end with the process, so they are closed before it does.
#[derive(Debug, Default)]
pub struct MemoryWallet {
    channels: Mutex<BTreeMap<ChannelId, (WalletChannel, Vec<SignedReceipt>)>>,
}

impl MemoryWallet {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }
}

impl WalletStore for MemoryWallet {
    fn save(
        &self,
        channel: WalletChannel,
        receipt: Option<SignedReceipt>,
    ) -> BoxFuture<'_, Result<(), WalletStoreError>> {
        Box::pin(async move {
            let (id, mut channels) = (channel.id(), self.channels.lock());
            check_save(channels.get(&id).map(|(before, _)| before), &channel)?;
            let (kept, receipts) = channels.entry(id).or_insert_with(|| (channel.clone(), Vec::new()));
            *kept = channel;
            receipts.extend(receipt);
            let excess = receipts.len().saturating_sub(MAX_RECEIPTS_PER_CHANNEL);
            receipts.drain(..excess);
            Ok(())
        })
    }

    fn channels(&self) -> BoxFuture<'_, Result<Vec<WalletChannel>, WalletStoreError>> {
        Box::pin(async move { Ok(self.channels.lock().values().map(|(channel, _)| channel.clone()).collect()) })
    }

    fn receipts(&self) -> BoxFuture<'_, Result<Vec<StoredReceipt>, WalletStoreError>> {
        Box::pin(async move {
            let kept: Vec<_> = self.channels.lock().values().cloned().collect();
            let of = |(channel, receipts): (WalletChannel, Vec<SignedReceipt>)| {
                receipts.into_iter().filter_map(move |receipt| stored(&channel, receipt)).collect::<Vec<_>>()
            };
            Ok(kept.into_iter().flat_map(of).collect())
        })
    }
}

//! Channels that nobody is connected on: settled, watched for withdrawals, and closed when they must be.
//!
//! What a payee has delivered is owed to it by vouchers in its store. While the payer is away somebody has to present
//! them in time: [`Payee::keep`] does, for a store that survives the process. All that it orders may be repeated, and
//! what it writes is compared with the owner's epoch, so it never disturbs a connection that takes a channel over.

use std::sync::Arc;

use tollway_protocol::payment::channel::{ChannelPhase, ChannelPolicy, CloseRefusal, OpenError};
use tollway_protocol::payment::ledger_messages::{Close, LedgerIdentity, Settle, Signed};
use tollway_protocol::payment::{Amount, ChannelId, CloseVoucher, PaymentChannel, SignedAmount};

use super::payee::{ESCROW_TIMEOUT, Payee};
use crate::escrow::{EscrowChannel, EscrowError, Settlement};
use crate::failpoint::failpoint;
use crate::store::{self, ApplyError, ChannelRecord, StoreError};

/// Channels that are read from the store at once.
const PAGE: usize = 256;

/// Why a channel that nobody is connected on could not be looked after.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeepError {
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The store did not take a change.
    #[error(transparent)]
    Apply(#[from] ApplyError),
    /// The escrow refused, or did not answer.
    #[error(transparent)]
    Escrow(#[from] EscrowError),
    /// The record contradicts itself.
    #[error("the record is broken: {0}")]
    Record(#[from] OpenError),
    /// No voucher covers what was delivered.
    #[error("it cannot be closed: {0}")]
    Close(#[from] CloseRefusal),
    /// The escrow has no such channel, or has paid more than was ever signed.
    #[error("the escrow's account of it is impossible: {0}")]
    Impossible(&'static str),
    /// A connection serves it now.
    #[error("a connection serves it now")]
    InUse,
    /// There is no record of it.
    #[error("the store has no channel {0}")]
    Unknown(ChannelId),
}

/// What was done about a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeptUp {
    /// There was nothing to do.
    Nothing,
    /// It was settled, and stays open.
    Settled(Settlement),
    /// It was closed.
    Closed {
        /// What the payee was paid in all, in base units.
        settled: Amount,
    },
}

impl Payee {
    /// Looks after the channels that nobody is connected on, for ever: drives closes that were begun, settles what is
    /// unclaimed, and claims what is owed when a payer withdraws. To be run beside the server if the store survives the
    /// process; with another there is nothing for it to do, since such channels are closed before they are forgotten.
    ///
    /// # Cancel safety
    /// Dropping the future leaves each channel as it was or as it was to be.
    pub async fn keep(self: Arc<Self>) {
        loop {
            if let Err(error) = self.look_after_idle().await {
                tracing::error!(%error, "the store cannot be looked through; nothing is settled from it");
            }
            tokio::time::sleep(self.config.watch_escrow).await;
        }
    }

    /// Looks once after each channel that nobody is connected on.
    pub(super) async fn look_after_idle(&self) -> Result<(), StoreError> {
        let mut after = None;
        loop {
            let page = self.config.store.list(after, PAGE).await?;
            let Some(last) = page.last().copied() else { return Ok(()) };
            for id in page {
                match self.look_after(id).await {
                    Ok(KeptUp::Nothing) | Err(KeepError::InUse) => {}
                    Ok(done) => tracing::info!(channel = %id, ?done, "looked after an idle channel"),
                    Err(error) => tracing::warn!(channel = %id, %error, "an idle channel cannot be looked after yet"),
                }
            }
            after = Some(last);
        }
    }

    /// Does what is due for a channel that nobody is connected on: finishes a close that was begun, claims what is owed
    /// if the payer withdraws, and settles what is unclaimed.
    ///
    /// # Errors
    /// [`KeepError`]; it may be tried again.
    pub async fn look_after(&self, id: ChannelId) -> Result<KeptUp, KeepError> {
        let Some(record) = self.idle_record(id).await? else { return Ok(KeptUp::Nothing) };
        let held = self.look(id).await?.ok_or(KeepError::Impossible("it knows no such channel"))?;
        let closing = !matches!(record.snapshot.phase, ChannelPhase::Open);
        if held.finalized || held.is_ending() || closing {
            return self.end(record, held).await;
        }
        self.settle_idle(record, &held).await
    }

    /// Presents the largest voucher of at most what was delivered, and leaves the channel open.
    ///
    /// # Errors
    /// [`KeepError`]; it may be tried again.
    pub async fn settle(&self, id: ChannelId) -> Result<KeptUp, KeepError> {
        let record = self.idle_record(id).await?.ok_or(KeepError::Unknown(id))?;
        let held = self.look(id).await?.ok_or(KeepError::Impossible("it knows no such channel"))?;
        self.settle_idle(record, &held).await
    }

    /// Closes a channel without its payer, at the smallest voucher that covers what was delivered.
    ///
    /// # Errors
    /// [`KeepError`]; it may be tried again.
    pub async fn close(&self, id: ChannelId) -> Result<KeptUp, KeepError> {
        let record = self.idle_record(id).await?.ok_or(KeepError::Unknown(id))?;
        let held = self.look(id).await?.ok_or(KeepError::Impossible("it knows no such channel"))?;
        self.end(record, held).await
    }

    /// The record of a channel of this payee that has not ended and that no connection serves.
    async fn idle_record(&self, id: ChannelId) -> Result<Option<ChannelRecord>, KeepError> {
        if self.is_owned(id) {
            return Err(KeepError::InUse);
        }
        let record = self.config.store.load(id).await?;
        let ours = |record: &ChannelRecord| {
            record.descriptor.payee == self.address()
                && record.descriptor.escrow == self.config.escrow.address()
                && record.descriptor.chain_id == self.config.escrow.chain_id()
        };
        let ended = |record: &ChannelRecord| matches!(record.snapshot.phase, ChannelPhase::Finalized { .. });
        Ok(record.filter(|record| ours(record) && !ended(record)))
    }

    fn restore(&self, record: ChannelRecord) -> Result<PaymentChannel, KeepError> {
        let policy = ChannelPolicy { minimum_delta: self.config.minimum_delta, lease: self.config.lease };
        Ok(PaymentChannel::restore(record.snapshot, policy)?)
    }

    async fn settle_idle(&self, record: ChannelRecord, held: &EscrowChannel) -> Result<KeptUp, KeepError> {
        let id = record.descriptor.id();
        let mut channel = self.restore(record)?;
        self.note_settled(&mut channel, held.settled).await?;
        let Some(voucher) = channel.settlement_voucher().copied() else { return Ok(KeptUp::Nothing) };
        let settlement = self.order_settlement(id, voucher).await?;
        self.note_settled(&mut channel, settlement.settled).await?;
        Ok(KeptUp::Settled(settlement))
    }

    async fn note_settled(&self, channel: &mut PaymentChannel, settled: Amount) -> Result<(), KeepError> {
        let noted =
            channel.set_settled(settled).map_err(|_| KeepError::Impossible("it paid more than was accepted"))?;
        if let Some(update) = noted {
            store::apply(&*self.config.store, &update).await?;
        }
        Ok(())
    }

    /// Ends a channel by a voucher in the store, or at what the escrow has paid already.
    async fn end(&self, record: ChannelRecord, held: EscrowChannel) -> Result<KeptUp, KeepError> {
        let id = record.descriptor.id();
        let mut channel = self.restore(record)?;
        let settled = if held.finalized {
            held.settled
        } else {
            self.note_settled(&mut channel, held.settled).await?;
            let owes_nothing = channel.spent() <= channel.settled();
            let close = match channel.phase() {
                ChannelPhase::Open | ChannelPhase::Disputed { .. } if owes_nothing => None,
                _ => {
                    let (close, update) = channel.close_without_payer()?;
                    // Compared with the epoch: a connection that has taken the channel over meanwhile keeps it.
                    store::apply(&*self.config.store, &update).await?;
                    Some(close)
                }
            };
            self.order_close(id, close, channel.settled()).await?.settled
        };
        let ended = channel.finalize(settled).map_err(|_| KeepError::Impossible("it paid more than was accepted"))?;
        store::apply(&*self.config.store, &ended).await?;
        Ok(KeptUp::Closed { settled })
    }

    fn ledger_identity(&self) -> LedgerIdentity {
        LedgerIdentity { chain_id: self.config.escrow.chain_id(), escrow: self.config.escrow.address() }
    }

    /// Has the escrow pay up to a stored voucher. Repeated, it pays once.
    pub(super) async fn order_settlement(
        &self,
        channel_id: ChannelId,
        voucher: SignedAmount,
    ) -> Result<Settlement, EscrowError> {
        failpoint!("payee.before-settle");
        let settle = Settle { channel_id, amount: voucher.amount };
        let order = Signed::sign(settle, &self.ledger_identity(), &self.config.key);
        let answer = tokio::time::timeout(ESCROW_TIMEOUT, self.config.escrow.settle(order, voucher.signature)).await;
        failpoint!("payee.settled");
        answer.unwrap_or_else(|elapsed| Err(EscrowError::Unavailable(elapsed.into())))
    }

    /// Has the escrow close a channel by a voucher, or at what it has settled. Repeated, it has the same answer.
    pub(super) async fn order_close(
        &self,
        channel_id: ChannelId,
        close: Option<CloseVoucher>,
        settled: Amount,
    ) -> Result<Settlement, EscrowError> {
        let amount = close.map_or(settled, |close| close.amount);
        // At what is settled already the escrow closes without a payout, and needs no voucher. [pay.close.amount]
        let voucher = close.filter(|close| close.amount > settled).map(|close| close.signature);
        let order = Signed::sign(Close { channel_id, amount }, &self.ledger_identity(), &self.config.key);
        let answer = tokio::time::timeout(ESCROW_TIMEOUT, self.config.escrow.close(order, voucher)).await;
        answer.unwrap_or_else(|elapsed| Err(EscrowError::Unavailable(elapsed.into())))
    }
}

//! What a payee claims, and how a channel ends: settlements in passing, closes, and payers that are gone.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::task::JoinError;
use tollway_protocol::payment::channel::{ChannelPhase, StaleUpdate};
use tollway_protocol::payment::{
    Amount, ChannelId, CloseVoucher, Hash, PaymentMessage, Receipt, ReceiptStatus, SignedReceipt,
};

use super::payee::Payee;
use super::payee_task::{PayeeTask, Stop};
use crate::escrow::{EscrowError, Settlement};
use crate::failpoint::failpoint;
use crate::store::ApplyError;

/// The wait after a settlement that the escrow did not answer doubles from the first to the second of these.
const SETTLE_BACKOFF: Duration = Duration::from_millis(250);
const MAX_SETTLE_BACKOFF: Duration = Duration::from_secs(60);
/// Tries that are left to a settlement when its server ends.
const LAST_SETTLE_TRIES: u32 = 6;
/// Numbers of receipts for each connection of a channel: it sends a handful.
const RECEIPTS_PER_EPOCH: u64 = 1 << 32;

impl PayeeTask {
    /// What was delivered and is not paid out.
    fn unclaimed(&self) -> Amount {
        self.channel.spent().saturating_sub(self.channel.settled())
    }

    /// Whether so much is unclaimed that no more is leased until some of it is settled.
    pub(super) fn is_exposed(&self) -> bool {
        let leased = self.channel.leased().saturating_sub(self.channel.settled());
        leased >= self.payee.config.exposure_cap && self.channel.settlement_voucher().is_some()
    }

    /// Settles what is unclaimed beside the service, if it is more than `above` and a voucher is there for it.
    pub(super) fn settle_in_passing(&mut self, above: Amount) {
        if self.settling.is_some() || self.unclaimed() <= above || self.channel.phase() != ChannelPhase::Open {
            return;
        }
        let Some(voucher) = self.channel.settlement_voucher().copied() else { return };
        let (payee, id) = (self.payee.clone(), self.channel.channel_id());
        self.settling = Some(tokio::spawn(async move { payee.order_settlement(id, voucher).await }));
    }

    /// Books a settlement, and leases what has waited for it.
    pub(super) async fn take_settlement(
        &mut self,
        settled: Result<Result<Settlement, EscrowError>, JoinError>,
    ) -> Result<(), Stop> {
        self.settling = None;
        match settled {
            Ok(Ok(settlement)) => match self.channel.set_settled(settlement.settled) {
                Ok(Some(update)) => self.apply(&update).await.map_err(Stop::Store)?,
                Ok(None) => {}
                Err(error) => tracing::error!(%error, "the escrow paid more than was accepted"),
            },
            Ok(Err(error)) => {
                tracing::warn!(%error, channel = %self.channel.channel_id(), "a channel is not settled in passing");
                // Not at once: an escrow that is away is asked again after a while.
                self.settle_at = tokio::time::Instant::now() + self.payee.config.settle_retry;
                return Ok(());
            }
            Err(_panicked) => return Ok(()),
        }
        self.sync();
        self.lease().await.map_err(Stop::Store)
    }

    /// The connection has gone and the channel stays: what can be claimed is claimed once; the rest is `Payee::keep`'s.
    async fn settle_once(&mut self) {
        if self.unclaimed() <= self.payee.config.settle_above {
            return;
        }
        self.settle_in_passing(Amount::ZERO);
        if let Some(settling) = self.settling.take() {
            let settled = settling.await;
            // A store that failed has said so.
            let _stop = self.take_settlement(settled).await;
        }
    }

    /// Has the escrow close the channel by this voucher, or at what it has settled; the final receipt names the
    /// settlement. Driven again until the escrow answers, or until a server that ends has waited long enough.
    pub(super) async fn settle(
        &mut self,
        close: Option<CloseVoucher>,
        status: ReceiptStatus,
    ) -> Result<(), ApplyError> {
        let (payee, id, settled) = (self.payee.clone(), self.channel.channel_id(), self.channel.settled());
        failpoint!("payee.before-settle");
        let mut hurry = payee.hurry.subscribe();
        let (mut backoff, mut last_tries, mut is_first) = (SETTLE_BACKOFF, LAST_SETTLE_TRIES, true);
        loop {
            match payee.order_close(id, close, settled).await {
                Ok(settlement) => {
                    failpoint!("payee.settled");
                    self.settlement = Some(settlement);
                    match self.channel.finalize(settlement.settled) {
                        Ok(update) => self.apply(&update).await?,
                        Err(error) => tracing::error!(%error, "the escrow paid more than was accepted"),
                    }
                    self.send_receipt(status);
                    return Ok(());
                }
                Err(EscrowError::Refused(refusal)) => {
                    tracing::error!(%refusal, channel = %self.channel.channel_id(), "the escrow refuses the close");
                    self.send(&PaymentMessage::Refused { reason: refusal.to_string() });
                    return Ok(());
                }
                Err(error) => tracing::warn!(%error, "the escrow does not settle"),
            }
            if std::mem::take(&mut is_first) {
                self.send_receipt(ReceiptStatus::Closing);
            }
            let ends = *hurry.borrow();
            last_tries -= u32::from(ends);
            if last_tries == 0 {
                break;
            }
            tokio::select! {
                () = tokio::time::sleep(backoff) => backoff = (2 * backoff).min(MAX_SETTLE_BACKOFF),
                _ = hurry.wait_for(|hurry| *hurry), if !ends => backoff = SETTLE_BACKOFF,
            }
        }
        tracing::error!(channel = %self.channel.channel_id(), "the channel is not settled; its vouchers are in the store");
        Ok(())
    }

    pub(super) fn receipt(&mut self, status: ReceiptStatus) -> Option<SignedReceipt> {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.receipts += 1;
        let receipt = Receipt {
            // The epoch is durable and rises with each connection, so receipts rise over crashes without a write of their
            // own. A payer that skips epochs to the end of the numbers has its receipts all alike.
            sequence: self.channel.epoch().saturating_mul(RECEIPTS_PER_EPOCH).saturating_add(self.receipts),
            time_ms: u64::try_from(since_1970.as_millis()).unwrap_or(u64::MAX),
            accepted: self.channel.accepted(),
            spent: self.channel.spent(),
            units: self.channel.units(),
            settled: self.channel.settled(),
            status,
            reference: self.settlement.map(|settlement| settlement.reference).filter(|hash| *hash != Hash::ZERO),
        };
        match SignedReceipt::sign(&receipt, &self.descriptor, &self.payee.config.key) {
            Ok(signed) => Some(signed),
            Err(error) => {
                tracing::error!(%error, "a receipt cannot be signed");
                None
            }
        }
    }

    pub(super) fn send_receipt(&mut self, status: ReceiptStatus) {
        if let Some(signed) = self.receipt(status) {
            self.send(&PaymentMessage::Receipt(signed));
        }
    }

    /// The connection has ended. What was not spent of the lease is given back. A channel that was not closed is kept if
    /// the store survives the process; else it is settled without the payer, unless a newer connection takes it over first.
    pub(super) async fn wind_up(mut self) {
        if let Some(count) = self.cell.final_money() {
            self.record(count);
        }
        if self.channel.phase() == ChannelPhase::Open {
            match self.surrender().await {
                Ok(()) => {}
                Err(ApplyError::Stale(StaleUpdate::Epoch { .. })) => return,
                // What was spent is owed all the same.
                Err(error) => tracing::error!(%error, "the lease cannot be given back"),
            }
            if self.payee.config.store.survives_restart() && !self.withdraws {
                // The payer may come back whenever it likes; `Payee::keep` settles and watches meanwhile.
                return self.settle_once().await;
            }
            self.turn = None;
            self.wait_for_payer().await;
            self.turn = Some(self.claim.turn.clone().lock_owned().await);
            if *self.claim.taken.borrow() {
                return;
            }
        }
        let owes_nothing = self.channel.spent() <= self.channel.settled();
        let close = match self.channel.phase() {
            ChannelPhase::Finalized { .. } => return,
            // Signed ahead is not owed: the rest of the deposit goes back at once.
            ChannelPhase::Open | ChannelPhase::Disputed { .. } if owes_nothing => None,
            _ => match self.channel.close_without_payer() {
                Ok((close, update)) => match self.apply(&update).await {
                    Ok(()) => Some(close),
                    Err(error) => return tracing::error!(%error, "an abandoned channel cannot be closed"),
                },
                Err(refusal) => return tracing::error!(%refusal, "no voucher covers what was spent"),
            },
        };
        if let Err(error) = self.settle(close, ReceiptStatus::ClosedForced).await {
            tracing::error!(%error, "a settlement cannot be stored");
        }
    }

    async fn surrender(&mut self) -> Result<(), ApplyError> {
        if let Ok(plan) = self.channel.surrender_lease() {
            let plan = self.write_lease(plan).await?;
            // The plan is a moment old and the only one.
            let committed = self.channel.commit_lease(plan);
            debug_assert!(committed.is_ok());
        }
        Ok(())
    }

    /// Gives the payer time to come back, by a newer connection that takes the channel over.
    async fn wait_for_payer(&self) {
        let mut taken = self.claim.taken.subscribe();
        let mut hurry = self.payee.hurry.subscribe();
        tokio::select! {
            // Both senders outlive this task.
            _ = taken.wait_for(|taken| *taken) => {}
            _ = hurry.wait_for(|hurry| *hurry) => {}
            () = tokio::time::sleep(self.payee.config.abandon_after) => {}
        }
    }
}

/// Waits until the escrow says that the channel ends without the payee: its payer withdraws, and what was delivered has
/// to be claimed within the grace period.
pub(super) async fn withdrawal(payee: Arc<Payee>, id: ChannelId) {
    loop {
        tokio::time::sleep(payee.config.watch_escrow).await;
        match payee.look(id).await {
            Ok(Some(held)) if held.is_ending() => return,
            Ok(_) => {}
            Err(error) => tracing::warn!(%error, channel = %id, "the escrow cannot be watched"),
        }
    }
}

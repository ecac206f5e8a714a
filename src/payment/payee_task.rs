//! The task that runs one payment channel for the payee, beside the session.
//!
//! Order of durability: a voucher is in the store before it counts; a lease is in the store before the session may
//! spend it; the close is in the store before the escrow is asked. If the store fails, nothing more is served.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use tokio::sync::watch;
use tokio::time::Instant;
use tollway_protocol::error::{Reason, code};
use tollway_protocol::id::ConnectionId;
use tollway_protocol::limits::ConnectionLimits;
use tollway_protocol::metadata::Metadata;
use tollway_protocol::payment::channel::{
    ChannelPhase, CloseAnswer, Precheck, RecordUpdate, VerifiedClose, VerifiedVoucher,
};
use tollway_protocol::payment::ledger_messages::{Close, LedgerIdentity, Signed};
use tollway_protocol::payment::{
    Amount, ChannelDescriptor, CloseVoucher, Hash, PaymentChannel, PaymentMessage, Receipt, ReceiptStatus,
    SignedAmount, SignedReceipt, Verifier, Voucher, VoucherDomain,
};
use tollway_protocol::session::{MoneyCount, PayeeMoney};

use super::mailbox::{Letters, Mailbox};
use super::payee::Payee;
use crate::escrow::{EscrowError, Settlement};
use crate::shared::{ConnectionCell, Shared};
use crate::store::{self, ApplyError};

/// Tries of a settlement that the escrow does not answer, and the wait before the second one, which doubles.
const SETTLE_TRIES: u32 = 6;
const SETTLE_BACKOFF: Duration = Duration::from_millis(250);

pub(super) struct PayeeTask {
    shared: Arc<Shared>,
    id: ConnectionId,
    cell: Arc<ConnectionCell>,
    payee: Arc<Payee>,
    channel: PaymentChannel,
    descriptor: ChannelDescriptor,
    domain: VoucherDomain,
    verifier: Verifier,
    mailbox: Arc<Mailbox>,
    superseded: Arc<watch::Sender<bool>>,
    /// What was spent and metered before this connection.
    units_before: u64,
    receipts: u64,
    /// What the session waits for, in base units beyond what is spent.
    needed: Option<Amount>,
    /// When the payer's patience ends.
    patience: Option<Instant>,
    settlement: Option<Settlement>,
}

/// Why a channel is served no more.
enum Stop {
    /// The connection has ended, with these counts.
    Ended(Option<MoneyCount>),
    /// The store failed: nothing is durable any more.
    Store(ApplyError),
}

impl PayeeTask {
    pub(super) fn new(
        (shared, id, cell): (Arc<Shared>, ConnectionId, Arc<ConnectionCell>),
        payee: Arc<Payee>,
        channel: PaymentChannel,
        (descriptor, verifier): (ChannelDescriptor, Verifier),
        mailbox: Arc<Mailbox>,
        superseded: Arc<watch::Sender<bool>>,
    ) -> Self {
        PayeeTask {
            units_before: channel.units(),
            domain: descriptor.voucher_domain(),
            shared,
            id,
            cell,
            payee,
            channel,
            descriptor,
            verifier,
            mailbox,
            superseded,
            receipts: 0,
            needed: None,
            patience: None,
            settlement: None,
        }
    }

    /// Takes the voucher of the credential in. One at or below what is accepted has no effect and is no error.
    pub(super) async fn accept_first(&mut self, voucher: SignedAmount) -> Result<(), ApplyError> {
        if voucher.amount > self.channel.accepted() {
            self.handle_voucher(voucher).await?;
        }
        Ok(())
    }

    /// Accepts the connection: from here the session charges.
    pub(super) fn accept(&mut self, limits: ConnectionLimits) {
        let receipt = self.receipt(ReceiptStatus::Open);
        let receipt = receipt.map_or(Bytes::new(), |signed| PaymentMessage::Receipt(signed).encode().into());
        let money = PayeeMoney {
            prices: self.payee.prices.clone(),
            spent: self.channel.spent(),
            leased: self.channel.leased(),
            low: self.low_mark(),
        };
        // Fails when the opener has given up; then the mailbox stays empty and the cell has the cause.
        self.shared.accept_paid(self.id, limits, Metadata::new(), (receipt, money), self.mailbox.clone());
    }

    /// Half a lease: there is time to write the next one while the other half is spent.
    fn low_mark(&self) -> Amount {
        Amount::new(self.channel.policy().lease.units() / 2)
    }

    pub(super) async fn run(mut self) {
        let stop = loop {
            let patience = self.patience;
            let wait = async {
                match patience {
                    Some(until) => tokio::time::sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            let handled = tokio::select! {
                letters = self.mailbox.take() => self.handle(letters).await,
                // An open that was given up before it was accepted has no mailbox in the session.
                _ = self.cell.closed(), if !self.shared.has_mailbox(self.id) => Err(Stop::Ended(None)),
                () = wait => {
                    self.patience = None;
                    let reason = Reason::new(code::PAYMENT_ENDED, "the voucher that was needed did not come in time");
                    self.shared.fail_unpaid(self.id);
                    self.shared.close_connection(self.id, reason);
                    Ok(())
                }
            };
            if let Err(stop) = handled {
                break stop;
            }
        };
        match stop {
            Stop::Ended(money) => self.wind_up(money).await,
            Stop::Store(error) => {
                tracing::error!(%error, channel = %self.channel.channel_id(), "the store failed; the channel is served no more");
                let reason = Reason::new(code::INTERNAL, "the payee's store failed; nothing more is served");
                self.shared.close_connection(self.id, reason);
            }
        }
    }

    async fn handle(&mut self, letters: Letters) -> Result<(), Stop> {
        self.sync();
        let mut highest: Option<SignedAmount> = None;
        let mut rest = Vec::new();
        for message in letters.messages {
            match PaymentMessage::decode(&message) {
                // Only the highest pending voucher of a channel is verified. [pay.voucher.coalesce]
                Ok(PaymentMessage::Voucher { amount, signature, received: _ }) => {
                    if highest.is_none_or(|highest| amount > highest.amount) {
                        highest = Some(SignedAmount { amount, signature });
                    }
                }
                Ok(other) => rest.push(other),
                Err(error) => return Err(self.bad_message(&error.to_string())),
            }
        }
        if let Some(voucher) = highest {
            self.handle_voucher(voucher).await.map_err(Stop::Store)?;
        }
        for message in rest {
            self.handle_message(message).await?;
        }
        if let Some(money) = letters.ended {
            return Err(Stop::Ended(money));
        }
        if letters.needed.is_some() {
            self.needed = letters.needed;
        }
        // The event may be older than the lease that has met the need, or than the end of what waited.
        if self.needed.is_some() && !self.shared.waits_for_money(self.id) {
            (self.needed, self.patience) = (None, None);
        }
        if letters.low || self.needed.is_some() || highest.is_some() {
            self.lease().await.map_err(Stop::Store)?;
        }
        Ok(())
    }

    /// What the session has spent since.
    fn sync(&mut self) {
        if let Some(count) = self.shared.open_money(self.id) {
            self.record(count);
        }
    }

    fn record(&mut self, count: MoneyCount) {
        if let Err(error) = self.channel.record_spent(count.amount) {
            // The session spends within the lease, and stops when the channel closes.
            tracing::error!(%error, "the session's count contradicts the channel's");
        }
        self.channel.record_units(self.units_before.saturating_add(count.bytes));
    }

    async fn apply(&self, update: &RecordUpdate) -> Result<(), ApplyError> {
        store::apply(&*self.payee.config.store, update).await.map(drop)
    }

    /// Checks a voucher, cheap first; it counts when it is durable.
    async fn handle_voucher(&mut self, signed: SignedAmount) -> Result<(), ApplyError> {
        let voucher: Voucher = signed.on(self.channel.channel_id());
        let refusal = match self.channel.precheck_voucher(&voucher) {
            Ok(Precheck::Again) => None,
            Ok(_) => match VerifiedVoucher::verify(&voucher, &self.domain, &self.verifier) {
                Err(error) => Some(error.to_string()),
                Ok(verified) => match self.channel.propose_voucher(&verified) {
                    Err(refusal) => Some(refusal.to_string()),
                    Ok(None) => None,
                    Ok(Some(plan)) => {
                        self.apply(plan.update()).await?;
                        self.channel.commit_voucher(plan)?;
                        None
                    }
                },
            },
            Err(refusal) => Some(refusal.to_string()),
        };
        if let Some(reason) = refusal {
            tracing::info!(%reason, channel = %voucher.channel_id, "refused a voucher");
            self.send(&PaymentMessage::Refused { reason });
        }
        Ok(())
    }

    /// Leases what is needed, or as far ahead as is due; asks for a voucher if there is too little.
    async fn lease(&mut self) -> Result<(), ApplyError> {
        let wanted = self.needed.unwrap_or_default().max(self.low_mark());
        while let Ok(Some(plan)) = self.channel.propose_lease(wanted) {
            self.apply(plan.update()).await?;
            if let Err(error) = self.channel.commit_lease(plan) {
                tracing::error!(%error, "a lease that is durable cannot be used");
                return Ok(());
            }
            let unused = self.channel.leased().saturating_sub(self.channel.spent());
            if unused >= wanted {
                break;
            }
        }
        let unused = self.channel.leased().saturating_sub(self.channel.spent());
        let Some(needed) = self.needed else {
            self.shared.raise_money(self.id, self.channel.leased());
            return Ok(());
        };
        if unused >= needed {
            (self.needed, self.patience) = (None, None);
            self.shared.raise_money(self.id, self.channel.leased());
            return Ok(());
        }
        // Nothing waits for money that a closing channel will not have.
        if let Ok(Some(need)) = self.channel.need(needed) {
            let tollway_protocol::payment::NeedVoucher { required, accepted, spent, deposit } = need;
            self.send(&PaymentMessage::NeedVoucher { required, accepted, spent, deposit });
            self.patience.get_or_insert(Instant::now() + self.payee.config.patience);
        }
        Ok(())
    }

    async fn handle_message(&mut self, message: PaymentMessage) -> Result<(), Stop> {
        match message {
            PaymentMessage::Decline { reason } => {
                tracing::info!(%reason, channel = %self.channel.channel_id(), "the payer declines");
                (self.needed, self.patience) = (None, None);
                self.shared.fail_unpaid(self.id);
                Ok(())
            }
            PaymentMessage::TopUp { .. } => self.look_at_deposit().await,
            PaymentMessage::Close { voucher, received: _ } => self.handle_close(voucher).await,
            _ => Err(self.bad_message("a message that only a payee sends")),
        }
    }

    /// The deposit becomes what the escrow says, however often it is asked.
    async fn look_at_deposit(&mut self) -> Result<(), Stop> {
        match self.payee.config.escrow.channel(self.channel.channel_id()).await {
            Ok(Some(held)) => match self.channel.set_deposit(held.deposit) {
                Some(update) => self.apply(&update).await.map_err(Stop::Store),
                None => Ok(()),
            },
            Ok(None) => Ok(()),
            Err(error) => {
                tracing::warn!(%error, "a top-up cannot be looked at");
                Ok(())
            }
        }
    }

    async fn handle_close(&mut self, close: CloseVoucher) -> Result<(), Stop> {
        let open = self.shared.open_calls(self.id);
        if open > 0 {
            self.send(&PaymentMessage::Refused { reason: format!("{open} calls have not ended") });
            return Ok(());
        }
        self.sync();
        let id = self.channel.channel_id();
        let verified = match self.channel.precheck_close(id, &close) {
            Ok(_) => VerifiedClose::verify(id, &close, &self.domain, &self.verifier).map_err(|error| error.to_string()),
            Err(refusal) => Err(refusal.to_string()),
        };
        let answer = match verified {
            Ok(verified) => self.channel.close(&verified).map_err(|refusal| refusal.to_string()),
            Err(reason) => Err(reason),
        };
        match answer {
            Ok(CloseAnswer::Taken { close, update }) => {
                self.apply(&update).await.map_err(Stop::Store)?;
                self.settle(Some(close), ReceiptStatus::Closed).await.map_err(Stop::Store)
            }
            Ok(CloseAnswer::Disputed { claimed, spent, update }) => {
                self.apply(&update).await.map_err(Stop::Store)?;
                tracing::warn!(channel = %id, %claimed, %spent, "the payer disputes");
                self.send(&PaymentMessage::Disputed { claimed, spent });
                Ok(())
            }
            Ok(_) => Ok(()),
            Err(reason) => {
                self.send(&PaymentMessage::Refused { reason });
                Ok(())
            }
        }
    }

    /// Has the escrow close the channel by this voucher, or at what it has settled; the final receipt names the
    /// settlement. Driven again while the escrow does not answer.
    async fn settle(&mut self, close: Option<CloseVoucher>, status: ReceiptStatus) -> Result<(), ApplyError> {
        let settled = self.channel.settled();
        let amount = close.map_or(settled, |close| close.amount);
        // At what is settled already the escrow closes without a payout, and needs no voucher. [pay.close.amount]
        let voucher = close.filter(|close| close.amount > settled).map(|close| close.signature);
        let payee = self.payee.clone();
        let config = &payee.config;
        let ledger = LedgerIdentity { chain_id: self.descriptor.chain_id, escrow: self.descriptor.escrow };
        let order = Signed::sign(Close { channel_id: self.channel.channel_id(), amount }, &ledger, &config.key);
        let mut backoff = SETTLE_BACKOFF;
        for attempt in 1..=SETTLE_TRIES {
            match config.escrow.close(order.clone(), voucher).await {
                Ok(settlement) => {
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
                Err(error) => tracing::warn!(%error, attempt, "the escrow does not settle"),
            }
            if attempt == 1 {
                self.send_receipt(ReceiptStatus::Closing);
            }
            tokio::time::sleep(backoff).await;
            backoff *= 2;
        }
        tracing::error!(channel = %self.channel.channel_id(), "the channel is not settled; its vouchers are in the store");
        Ok(())
    }

    fn receipt(&mut self, status: ReceiptStatus) -> Option<SignedReceipt> {
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        self.receipts += 1;
        let receipt = Receipt {
            sequence: self.receipts,
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

    fn send_receipt(&mut self, status: ReceiptStatus) {
        if let Some(signed) = self.receipt(status) {
            self.send(&PaymentMessage::Receipt(signed));
        }
    }

    fn send(&self, message: &PaymentMessage) {
        // Fails only when the connection has ended, which the mailbox says too.
        let _ended = self.shared.send_payment(self.id, Bytes::from(message.encode()));
    }

    fn bad_message(&self, what: &str) -> Stop {
        let reason = Reason::new(code::PAYMENT_ENDED, format!("bad payment message: {what}"));
        self.shared.close_connection(self.id, reason);
        Stop::Ended(None)
    }

    /// The connection has ended. What was not spent of the lease is given back; a channel that was not closed is
    /// settled without the payer, unless a newer connection takes it over first.
    async fn wind_up(mut self, money: Option<MoneyCount>) {
        if let Some(count) = money.or_else(|| self.cell.final_money()) {
            self.record(count);
        }
        if self.channel.phase() == ChannelPhase::Open {
            if let Err(error) = self.surrender().await {
                tracing::error!(%error, "the lease cannot be given back");
                return;
            }
            if !self.is_abandoned().await {
                return;
            }
        }
        if matches!(self.channel.phase(), ChannelPhase::Finalized { .. }) {
            return;
        }
        let close = match self.channel.close_without_payer() {
            Ok((close, update)) => match self.apply(&update).await {
                Ok(()) => Some(close),
                Err(error) => return tracing::error!(%error, "an abandoned channel cannot be closed"),
            },
            // Nothing was spent, so nothing is claimed: the deposit goes back at once.
            Err(_) if self.channel.spent() <= self.channel.settled() => None,
            Err(refusal) => return tracing::error!(%refusal, "no voucher covers what was spent"),
        };
        if let Err(error) = self.settle(close, ReceiptStatus::ClosedForced).await {
            tracing::error!(%error, "a settlement cannot be stored");
        }
    }

    async fn surrender(&mut self) -> Result<(), ApplyError> {
        if let Ok(plan) = self.channel.surrender_lease() {
            self.apply(plan.update()).await?;
            // The plan is a moment old and the only one.
            let committed = self.channel.commit_lease(plan);
            debug_assert!(committed.is_ok());
        }
        Ok(())
    }

    /// Waits for the payer to come back. Returns whether the channel is this task's to settle.
    async fn is_abandoned(&self) -> bool {
        let mut superseded = self.superseded.subscribe();
        let mut hurry = self.payee.hurry.subscribe();
        tokio::select! {
            biased;
            // Both senders outlive this task.
            _ = superseded.wait_for(|superseded| *superseded) => false,
            _ = hurry.wait_for(|hurry| *hurry) => true,
            () = tokio::time::sleep(self.payee.config.abandon_after) => !*self.superseded.borrow(),
        }
    }
}

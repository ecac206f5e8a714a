//! The task that runs one payment channel for the payee, beside the session.
//!
//! Order of durability: a voucher is in the store before it counts; a lease is in the store before the session may
//! spend it; the close is in the store before the escrow is asked. If the store fails, nothing more is served.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::OwnedMutexGuard;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tollway_protocol::error::{Reason, code};
use tollway_protocol::id::ConnectionId;
use tollway_protocol::limits::ConnectionLimits;
use tollway_protocol::payment::channel::{
    CloseAnswer, LeasePlan, Precheck, RecordUpdate, VerifiedClose, VerifiedVoucher,
};
use tollway_protocol::payment::{
    Amount, ChannelDescriptor, CloseVoucher, NeedVoucher, PaymentChannel, PaymentMessage, ReceiptStatus, SignedAmount,
    Verifier, Voucher, VoucherDomain, VoucherError,
};
use tollway_protocol::session::{MoneyCount, PayeeMoney};

use super::mailbox::{Letters, Mailbox};
use super::payee::{Claim, ESCROW_TIMEOUT, Payee};
use super::payee_end::withdrawal;
use super::verify::CheckGate;
use crate::escrow::{EscrowError, Settlement};
use crate::failpoint::{broken, failpoint};
use crate::shared::{ConnectionCell, Shared};
use crate::store::{self, ApplyError};

/// The wait before an escrow is asked again about a top-up: a ledger that is started again is back in about as much.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

pub(super) struct PayeeTask {
    pub(super) shared: Arc<Shared>,
    pub(super) id: ConnectionId,
    pub(super) cell: Arc<ConnectionCell>,
    pub(super) payee: Arc<Payee>,
    pub(super) channel: PaymentChannel,
    pub(super) descriptor: ChannelDescriptor,
    pub(super) domain: VoucherDomain,
    pub(super) verifier: Verifier,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) claim: Claim,
    /// Held while this task serves or settles.
    pub(super) turn: Option<OwnedMutexGuard<()>>,
    /// What was spent and metered before this connection.
    pub(super) units_before: u64,
    pub(super) receipts: u64,
    /// What the session waits for, in base units beyond what is spent, as it was when this task looked.
    pub(super) needed: Option<Amount>,
    /// When the payer's patience ends.
    pub(super) patience: Option<Instant>,
    pub(super) settlement: Option<Settlement>,
    pub(super) gate: CheckGate,
    /// A settlement in mid-session, which nothing waits for but more exposure.
    pub(super) settling: Option<JoinHandle<Result<Settlement, EscrowError>>>,
    /// When unclaimed money is settled next, however little it is.
    pub(super) settle_at: Instant,
    /// The payer withdraws: what was delivered is claimed now.
    pub(super) withdraws: bool,
}

/// Why a channel is served no more.
pub(super) enum Stop {
    /// The connection has ended.
    Ended,
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
        (claim, turn): (Claim, OwnedMutexGuard<()>),
    ) -> Self {
        PayeeTask {
            gate: CheckGate::new(payee.config.check_rate),
            settling: None,
            settle_at: Instant::now() + payee.config.settle_every,
            withdraws: false,
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
            claim,
            turn: Some(turn),
            receipts: 0,
            needed: None,
            patience: None,
            settlement: None,
        }
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
        self.shared.accept_paid(self.id, limits, (receipt, money), self.mailbox.clone());
    }

    /// Half a lease: there is time to write the next one while the other half is spent.
    fn low_mark(&self) -> Amount {
        Amount::new(self.channel.policy().lease.units() / 2)
    }

    pub(super) async fn run(mut self) {
        let mut withdrawal = pin!(withdrawal(self.payee.clone(), self.channel.channel_id()));
        let stop = loop {
            let patience = self.patience;
            let wait = async {
                match patience {
                    Some(until) => tokio::time::sleep_until(until).await,
                    None => std::future::pending().await,
                }
            };
            let settled = async {
                match &mut self.settling {
                    Some(settling) => settling.await,
                    None => std::future::pending().await,
                }
            };
            // In this order: no flood of messages keeps the clocks back, and what came before the end is taken in.
            let handled = tokio::select! {
                biased;
                () = wait => {
                    self.end_patience();
                    Ok(())
                }
                () = &mut withdrawal, if !self.withdraws => {
                    self.withdraws = true;
                    self.close_connection("the payer withdraws");
                    Ok(())
                }
                () = tokio::time::sleep_until(self.settle_at) => {
                    self.settle_at = Instant::now() + self.payee.config.settle_every;
                    self.sync();
                    self.settle_in_passing(Amount::ZERO);
                    Ok(())
                }
                settled = settled => self.take_settlement(settled).await,
                letters = self.mailbox.take() => self.handle(letters).await,
                // An open that was given up before it was accepted has no mailbox in the session.
                _ = self.cell.closed(), if !self.shared.has_mailbox(self.id) => Err(Stop::Ended),
            };
            if let Err(stop) = handled {
                break stop;
            }
        };
        if let Stop::Store(error) = stop {
            tracing::error!(%error, channel = %self.channel.channel_id(), "the store failed; the channel is served no more");
            let reason = Reason::new(code::INTERNAL, "the payee's store failed; nothing more is served");
            self.shared.close_connection(self.id, reason);
            self.cell.closed().await;
        }
        self.wind_up().await;
    }

    /// The payer's time is up, if what waited for it still does.
    fn end_patience(&mut self) {
        self.sync();
        if self.needed.is_some() {
            self.patience = None;
            self.shared.fail_unpaid(self.id);
            self.close_connection("the voucher that was needed did not come in time");
        }
    }

    /// Serves no more. The last count follows, with the end of the connection.
    pub(super) fn close_connection(&self, reason: &str) {
        self.shared.close_connection(self.id, Reason::new(code::PAYMENT_ENDED, reason));
    }

    async fn handle(&mut self, letters: Letters) -> Result<(), Stop> {
        match letters.ended {
            // What came with it is judged by the last count.
            Some(money) => money.into_iter().for_each(|count| self.record(count)),
            None => self.sync(),
        }
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
                Err(error) => self.refuse_message(&error.to_string()),
            }
        }
        // The deposit first: a voucher behind a top-up may need it.
        let (top_ups, rest): (Vec<_>, Vec<_>) =
            rest.into_iter().partition(|message| matches!(message, PaymentMessage::TopUp { .. }));
        if !top_ups.is_empty() {
            self.look_at_deposit().await?;
        }
        if let Some(voucher) = highest {
            self.handle_voucher(voucher).await.map_err(Stop::Store)?;
        }
        for message in rest {
            self.handle_message(message).await?;
        }
        if letters.ended.is_some() {
            return Err(Stop::Ended);
        }
        if letters.low || letters.needed || self.needed.is_some() || highest.is_some() || !top_ups.is_empty() {
            self.lease().await.map_err(Stop::Store)?;
            self.settle_in_passing(self.payee.config.settle_above);
        }
        Ok(())
    }

    /// What the session has spent since, and what it waits for now.
    pub(super) fn sync(&mut self) {
        let (count, needed) = self.shared.payee_money(self.id);
        if let Some(count) = count {
            self.record(count);
        }
        self.needed = needed;
        if needed.is_none() {
            self.patience = None;
        }
    }

    pub(super) fn record(&mut self, count: MoneyCount) {
        if let Err(error) = self.channel.record_spent(count.amount) {
            // The session spends within the lease, and stops when the channel closes.
            tracing::error!(%error, "the session's count contradicts the channel's");
        }
        self.channel.record_units(self.units_before.saturating_add(count.bytes));
    }

    pub(super) async fn apply(&self, update: &RecordUpdate) -> Result<(), ApplyError> {
        store::apply(&*self.payee.config.store, update).await.map(drop)
    }

    /// Checks a voucher, cheap first; it counts when it is durable.
    async fn handle_voucher(&mut self, signed: SignedAmount) -> Result<(), ApplyError> {
        let voucher: Voucher = signed.on(self.channel.channel_id());
        let refusal = match self.channel.precheck_voucher(&voucher) {
            Ok(Precheck::Again) => None,
            Ok(_) => match self.verify(&voucher).await {
                // No honest payer signs wrongly, and a look at a signature is dear: the next one costs a new connection.
                Err(error) => {
                    self.refuse_message(&error.to_string());
                    None
                }
                Ok(verified) => match self.channel.propose_voucher(&verified) {
                    Err(refusal) => Some(refusal.to_string()),
                    Ok(None) => None,
                    Ok(Some(plan)) => {
                        failpoint!("payee.before-accept");
                        self.apply(plan.update()).await?;
                        failpoint!("payee.accepted");
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

    /// Looks at the signature when its turn has come. `[pay.voucher.pace]`
    async fn verify(&self, voucher: &Voucher) -> Result<VerifiedVoucher, VoucherError> {
        let _checking = self.gate.enter().await;
        self.payee.checks.add();
        VerifiedVoucher::verify(voucher, &self.domain, &self.verifier)
    }

    /// Leases what is needed, or as far ahead as is due; asks for a voucher if there is too little.
    pub(super) async fn lease(&mut self) -> Result<(), ApplyError> {
        if broken!("payee.deliver-first") {
            self.shared.raise_money(self.id, self.channel.accepted());
        }
        if broken!("payee.deliver-unpaid") {
            self.shared.raise_money(self.id, self.channel.deposit());
        }
        let wanted = self.needed.unwrap_or_default().max(self.low_mark());
        if self.is_exposed() {
            // What is leased may be spent; more waits for the settlement, which is no fault of the payer's.
            self.settle_in_passing(Amount::ZERO);
            if self.settling.is_some() {
                return Ok(());
            }
        }
        while let Ok(Some(plan)) = self.channel.propose_lease(wanted) {
            let plan = self.write_lease(plan).await?;
            failpoint!("payee.leased");
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
        if let Ok(need) = self.channel.need(needed) {
            // What was asked for before and has not come is waited for all the same.
            self.patience.get_or_insert(Instant::now() + self.payee.config.patience);
            if let Some(NeedVoucher { required, accepted, spent, deposit }) = need {
                self.send(&PaymentMessage::NeedVoucher { required, accepted, spent, deposit });
            }
        }
        Ok(())
    }

    /// Makes a lease durable, or gives it up.
    pub(super) async fn write_lease(&mut self, plan: LeasePlan) -> Result<LeasePlan, ApplyError> {
        match self.apply(plan.update()).await {
            Ok(()) => Ok(plan),
            Err(error) => {
                // The plan is a moment old and the only one.
                let abandoned = self.channel.abandon_lease(plan);
                debug_assert!(abandoned.is_ok());
                Err(error)
            }
        }
    }

    async fn handle_message(&mut self, message: PaymentMessage) -> Result<(), Stop> {
        match message {
            PaymentMessage::Decline { reason } => {
                tracing::info!(%reason, channel = %self.channel.channel_id(), "the payer declines");
                (self.needed, self.patience) = (None, None);
                self.shared.fail_unpaid(self.id);
                Ok(())
            }
            PaymentMessage::Close { voucher, received: _ } => self.handle_close(voucher).await,
            _ => {
                self.refuse_message("a message that only a payee sends");
                Ok(())
            }
        }
    }

    /// The deposit becomes what the escrow says, however often it is asked. An escrow that is away for a moment is asked
    /// again: the payer has raised its deposit there, and the voucher that comes next is refused for want of it.
    async fn look_at_deposit(&mut self) -> Result<(), Stop> {
        let (payee, id) = (self.payee.clone(), self.channel.channel_id());
        let look = async {
            loop {
                match payee.look(id).await {
                    Ok(held) => return held,
                    Err(error) => tracing::warn!(%error, channel = %id, "a top-up cannot be looked at yet"),
                }
                tokio::time::sleep(LOOK_AGAIN).await;
            }
        };
        let Ok(Some(held)) = tokio::time::timeout(ESCROW_TIMEOUT, look).await else { return Ok(()) };
        match self.channel.set_deposit(held.deposit) {
            Some(update) => self.apply(&update).await.map_err(Stop::Store),
            None => Ok(()),
        }
    }

    async fn handle_close(&mut self, close: CloseVoucher) -> Result<(), Stop> {
        let id = self.channel.channel_id();
        let verified = match self.channel.precheck_close(id, &close) {
            Ok(_) => match self.verify_close(&close).await {
                Ok(verified) => Ok(verified),
                Err(error) => {
                    self.refuse_message(&error.to_string());
                    return Ok(());
                }
            },
            Err(refusal) => Err(refusal.to_string()),
        };
        let answer = match verified {
            Ok(verified) => self
                .stop_money()
                .await
                .and_then(|()| self.channel.close(&verified).map_err(|refusal| refusal.to_string())),
            Err(reason) => Err(reason),
        };
        match answer {
            Ok(CloseAnswer::Taken { close, update }) => {
                self.apply(&update).await.map_err(Stop::Store)?;
                let close = if broken!("payee.claim-all") {
                    self.channel.snapshot().vouchers.highest().copied().map_or(close, CloseVoucher::from)
                } else {
                    close
                };
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

    /// Looks at the signatures of a close when its turn has come. `[pay.voucher.pace]`
    async fn verify_close(&self, close: &CloseVoucher) -> Result<VerifiedClose, VoucherError> {
        let _checking = self.gate.enter().await;
        self.payee.checks.add();
        VerifiedClose::verify(self.channel.channel_id(), close, &self.domain, &self.verifier)
    }

    /// Ends the session's spending and records its last count, in one step with the look at the open calls: what the
    /// payer sends behind its close finds nothing for sale.
    async fn stop_money(&mut self) -> Result<(), String> {
        let last = match self.shared.stop_money(self.id) {
            Err(open) => return Err(format!("{open} calls have not ended")),
            Ok(Some(count)) => Some(count),
            Ok(None) => {
                // The connection has ended, and says so at once.
                self.cell.closed().await;
                self.cell.final_money()
            }
        };
        last.into_iter().for_each(|count| self.record(count));
        Ok(())
    }

    pub(super) fn send(&self, message: &PaymentMessage) {
        // Fails only when the connection has ended, which the mailbox says too.
        let _ended = self.shared.send_payment(self.id, Bytes::from(message.encode()));
    }

    fn refuse_message(&self, what: &str) {
        self.close_connection(&format!("bad payment message: {what}"));
    }
}

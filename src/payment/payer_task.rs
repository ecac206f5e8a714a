//! The task that pays for one connection.
//!
//! It signs vouchers off the session's task: the session counts the price of what arrives and says when the count has
//! reached a mark; the task signs the next voucher and sets the next mark. What may be signed is decided by
//! [`PayerBook`] alone, whatever the payee claims.
//!
//! Order of durability: the signing ceiling is in the store before a voucher up to it leaves; what was received is in the
//! store at each half of the in-flight cap, and until it is the session grants nothing; the close voucher is in the store
//! before it is sent. If the store fails, nothing more is signed.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use tollway_protocol::error::{Reason, code};
use tollway_protocol::id::ConnectionId;
use tollway_protocol::payment::{
    Amount, CloseVoucher, Decline, DeclineReason, NeedAnswer, NeedVoucher, PayerBook, PaymentMessage, Receipt,
    ReceiptStatus, SignedReceipt, SigningRequest, Terms, VoucherProtocol,
};

use super::funding::ledger_of;
use super::mailbox::{Letters, Mailbox};
use super::paid::{CLOSE_TIMEOUT, ClosedChannel, KeptChannel, Order, PayerState, stats};
use super::wallet::{InUse, Wallet};
use super::wallet_error::WalletError;
use super::wallet_store::{WalletChannel, WalletPhase};
use crate::connection::Connection;
use crate::escrow::Escrow;
use crate::failpoint::{broken, failpoint};
use crate::shared::Shared;

/// How long a close waits for what the escrow says of the channel. Without an answer the payer states its own count alone.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);
/// The wait before a top-up whose ledger was not there is ordered again doubles from the first to the second of these,
/// for as long as the payee is patient.
const TOP_UP_BACKOFF: Duration = Duration::from_millis(100);
const MAX_TOP_UP_BACKOFF: Duration = Duration::from_secs(5);
/// No payee's patience is counted on for longer than this, an hour.
const MAX_PATIENCE_MS: u64 = 3_600_000;

/// How far what was received may be ahead of the store before nothing more is granted: half of the in-flight cap.
/// `[pay.received.held]`
pub(super) fn checkpoint_room(terms: &Terms) -> Amount {
    Amount::new((terms.in_flight_cap.units() / 2).max(1))
}

/// What a paid connection is made of once the payee has accepted it.
pub(super) struct Opened {
    pub(super) wallet: Wallet,
    pub(super) in_use: InUse,
    pub(super) connection: Connection,
    pub(super) terms: Terms,
    /// As it is in the store.
    pub(super) channel: WalletChannel,
    pub(super) book: PayerBook,
    pub(super) mailbox: Arc<Mailbox>,
}

/// Pays for one connection.
pub(super) struct PayerTask {
    shared: Arc<Shared>,
    id: ConnectionId,
    wallet: Wallet,
    /// Nobody else pays from the channel as long as this task runs.
    _in_use: InUse,
    mailbox: Arc<Mailbox>,
    state: Arc<Mutex<PayerState>>,
    /// As it is in the store.
    channel: WalletChannel,
    /// How far what was received may be ahead of the store.
    room: Amount,
    /// How long the payee waits for a voucher.
    patience: Duration,
    fail: watch::Sender<Option<WalletError>>,
    /// A close that waits for the ends of all calls, which are paid until then, and for how long.
    ordered: Option<(Order, Instant)>,
    /// A close that waits for the final receipt, or for the end of the connection.
    closing: Option<Order>,
    topping_up: Option<AbortOnDropHandle<Result<Amount, WalletError>>>,
}

impl PayerTask {
    pub(super) fn new(opened: Opened, state: Arc<Mutex<PayerState>>, fail: watch::Sender<Option<WalletError>>) -> Self {
        let Opened { wallet, in_use, connection, terms, channel, mailbox, .. } = opened;
        PayerTask {
            shared: connection.shared().clone(),
            id: connection.id(),
            wallet,
            _in_use: in_use,
            mailbox,
            state,
            channel,
            room: checkpoint_room(&terms),
            patience: Duration::from_millis(terms.patience_ms.min(MAX_PATIENCE_MS)),
            fail,
            ordered: None,
            closing: None,
            topping_up: None,
        }
    }

    pub(super) async fn run(mut self, mut orders: mpsc::Receiver<Order>) {
        self.pay().await;
        let mut handle_lives = true;
        loop {
            let deadline = self.ordered.as_ref().map(|(_, deadline)| *deadline);
            let calls_ended = async {
                match deadline {
                    Some(deadline) => tokio::time::timeout_at(deadline, self.shared.calls_ended(self.id)).await,
                    None => std::future::pending().await,
                }
            };
            let topped_up = async {
                match &mut self.topping_up {
                    Some(top_up) => top_up.await.unwrap_or(Err(WalletError::Timeout("the top-up"))),
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                letters = self.mailbox.take() => {
                    if !self.handle(letters).await {
                        return;
                    }
                }
                held = topped_up => {
                    self.topping_up = None;
                    self.take_top_up(held).await;
                }
                ended = calls_ended => self.start_close(ended.is_ok()).await,
                // The handle goes with its order, so that there is one.
                order = orders.recv(), if handle_lives => match order {
                    Some(order) => self.ordered = Some((order, Instant::now() + CLOSE_TIMEOUT)),
                    // The handle was dropped: the connection goes with it, and the mailbox says so.
                    None => {
                        handle_lives = false;
                        if self.closing.is_none() {
                            self.close_connection(Reason::new(code::DROPPED, "the payer has gone"));
                        }
                    }
                },
            }
        }
    }

    fn close_connection(&self, reason: Reason) {
        self.shared.close_connection(self.id, reason);
    }

    /// Works the mailbox off. Returns whether the connection goes on.
    async fn handle(&mut self, letters: Letters) -> bool {
        if let Some(received) = letters.received {
            self.state.lock().book.record_received(received);
        }
        for message in letters.messages {
            match PaymentMessage::decode(&message) {
                Ok(message) => self.handle_message(message).await,
                Err(error) => self.stop(WalletError::BadMessage(error.to_string())),
            }
        }
        if let Some(money) = letters.ended {
            if let Some(count) = money {
                self.state.lock().book.record_received(count.amount);
            }
            self.end().await;
            return false;
        }
        self.checkpoint().await;
        self.pay().await;
        true
    }

    /// The connection has ended: what was received is durable before anybody is told.
    async fn end(&mut self) {
        let saved = self.persist(None, None).await;
        if let Some(Order::Keep(order)) = self.closing.take() {
            let stats = stats(&self.state.lock(), None);
            let kept = KeptChannel { channel_id: self.channel.id(), stats };
            let failed = || self.fail.borrow().clone().unwrap_or(WalletError::Timeout("the wallet's store"));
            // Whoever keeps has dropped the future if it does not listen.
            let _dropped = order.send(if saved { Ok(kept) } else { Err(failed()) });
        }
    }

    /// Writes the book as it is, with a higher ceiling or a receipt. Nothing is signed or granted on what is not written.
    async fn persist(&mut self, ceiling: Option<Amount>, receipt: Option<SignedReceipt>) -> bool {
        let mut channel = self.channel.clone();
        channel.book = self.state.lock().book.snapshot();
        channel.book.ceiling = channel.book.ceiling.max(ceiling.unwrap_or_default());
        if channel == self.channel && receipt.is_none() {
            return true;
        }
        if let Err(error) = self.wallet.store().save(channel.clone(), receipt).await {
            self.stop(error.into());
            return false;
        }
        self.channel = channel;
        self.state.lock().book.record_ceiling(self.channel.book.ceiling);
        self.shared.raise_received_hold(self.id, self.channel.book.received.saturating_add(self.room));
        true
    }

    /// Makes what was received durable when half of what may be ahead of the store is used up, so that grants go on.
    async fn checkpoint(&mut self) {
        let received = self.state.lock().book.received();
        if received >= self.next_checkpoint() {
            self.persist(None, None).await;
        }
    }

    fn next_checkpoint(&self) -> Amount {
        self.channel.book.received.saturating_add(Amount::new(self.room.units().div_ceil(2)))
    }

    /// Signs what is due, and says when the next voucher or checkpoint will be.
    async fn pay(&mut self) {
        if self.closing.is_some() || self.fail.borrow().is_some() {
            return;
        }
        let due = {
            let mut state = self.state.lock();
            match state.book.retry_need() {
                Some(NeedAnswer::Sign(amount)) => Some(amount),
                Some(NeedAnswer::TopUp { to }) => {
                    drop(state);
                    self.top_up(to);
                    None
                }
                _ => state.book.next_voucher(),
            }
        };
        if let Some(amount) = due {
            self.sign(amount).await;
        }
        let mark = self.state.lock().book.next_mark().min(self.next_checkpoint());
        self.shared.set_received_mark(self.id, mark);
    }

    /// Makes the ceiling durable, books, signs and sends a voucher.
    async fn sign(&mut self, amount: Amount) {
        let amount = if broken!("wallet.sign-all") { self.state.lock().book.deposit() } else { amount };
        let ceiling = self.state.lock().book.next_ceiling(amount);
        let sign_first = broken!("wallet.sign-first");
        if sign_first {
            self.state.lock().book.record_ceiling(ceiling.unwrap_or_default());
        } else if ceiling.is_some() && !self.persist(ceiling, None).await {
            return;
        }
        let received = {
            let mut state = self.state.lock();
            if let Err(error) = state.book.record_signed(amount)
                && !broken!("wallet.sign-all")
            {
                drop(state);
                return self.stop(WalletError::BadMessage(error.to_string()));
            }
            state.vouchers += 1;
            state.book.received()
        };
        failpoint!("wallet.before-sign");
        let request = SigningRequest::Voucher { channel: self.channel.descriptor.clone(), amount };
        match self.wallet.sign(request).await {
            Ok(signature) => {
                failpoint!("wallet.before-send");
                self.send(&PaymentMessage::Voucher { amount, signature, received });
                if sign_first {
                    tokio::task::yield_now().await;
                    self.persist(ceiling, None).await;
                }
            }
            // There will be no such voucher, so the payee need not wait for it.
            Err(error) => {
                self.send(&PaymentMessage::Decline { reason: "the signer does not sign".to_owned() });
                self.stop(error);
            }
        }
    }

    /// Signs what the escrow wants for a close.
    async fn sign_close(&self, amount: Amount) -> Result<CloseVoucher, WalletError> {
        let channel = self.channel.descriptor.clone();
        let authorization = match channel.protocol {
            VoucherProtocol::V2 => {
                let request = SigningRequest::CloseAuthorization { channel: channel.clone(), amount };
                Some(self.wallet.sign(request).await?)
            }
            _ => None,
        };
        let signature = self.wallet.sign(SigningRequest::Voucher { channel, amount }).await?;
        Ok(CloseVoucher { amount, signature, authorization })
    }

    /// Raises the deposit beside everything else. A ledger that is away is asked again while the payee waits; the order
    /// states the deposit that is wanted, so it does no harm twice.
    fn top_up(&mut self, to: Amount) {
        if self.topping_up.is_some() {
            return;
        }
        let (wallet, channel) = (self.wallet.clone(), self.channel.clone());
        let until = Instant::now() + self.patience;
        let order = async move {
            let mut backoff = TOP_UP_BACKOFF;
            loop {
                match wallet.top_up(&channel, to).await {
                    Err(WalletError::EscrowUnavailable(_)) if Instant::now() + backoff < until => {
                        tokio::time::sleep(backoff).await;
                        backoff = (2 * backoff).min(MAX_TOP_UP_BACKOFF);
                    }
                    answer => return answer,
                }
            }
        };
        self.topping_up = Some(AbortOnDropHandle::new(tokio::spawn(order)));
    }

    async fn take_top_up(&mut self, held: Result<Amount, WalletError>) {
        match held {
            Ok(deposit) => {
                self.state.lock().book.record_deposit(deposit);
                if self.persist(None, None).await {
                    self.send(&PaymentMessage::TopUp { proof: Vec::new() });
                    self.pay().await;
                }
            }
            // Nothing more can be paid, so the payee need not wait for it.
            Err(error) => {
                self.send(&PaymentMessage::Decline { reason: "the deposit could not be raised".to_owned() });
                self.stop(error);
            }
        }
    }

    fn send(&self, message: &PaymentMessage) {
        // Fails only when the connection has ended, which the mailbox says too.
        let _ended = self.shared.send_payment(self.id, Bytes::from(message.encode()));
    }

    /// Payment stops. The first reason stands.
    fn stop(&mut self, error: WalletError) {
        match self.closing.take() {
            // Whoever closes has dropped the future if it does not listen.
            Some(Order::Close(order)) => drop(order.send(Err(error.clone()))),
            keep => self.closing = keep,
        }
        self.fail.send_if_modified(|failed| failed.is_none() && failed.replace(error).is_none());
    }

    async fn handle_message(&mut self, message: PaymentMessage) {
        match message {
            // It crossed our Close: all calls have ended, and nothing waits any more.
            PaymentMessage::NeedVoucher { .. } if self.closing.is_some() => {}
            PaymentMessage::NeedVoucher { required, accepted, spent, deposit } => {
                self.handle_need(NeedVoucher { required, accepted, spent, deposit }).await;
            }
            PaymentMessage::Receipt(signed) => match signed.verify(&self.channel.descriptor) {
                Ok(receipt) => self.handle_receipt(signed, receipt).await,
                Err(error) => self.stop(WalletError::BadMessage(error.to_string())),
            },
            PaymentMessage::Refused { reason } => self.stop(WalletError::Refused(reason)),
            PaymentMessage::Disputed { claimed, spent } => self.stop(WalletError::Disputed { claimed, spent }),
            _ => self.stop(WalletError::BadMessage("a message that only a payer sends".to_owned())),
        }
    }

    async fn handle_need(&mut self, need: NeedVoucher) {
        let answer = {
            let mut state = self.state.lock();
            // The session may have counted more than its last mark said.
            if let Some(count) = self.shared.open_money(self.id) {
                state.book.record_received(count.amount);
            }
            state.book.handle_need(need)
        };
        match answer {
            NeedAnswer::Sign(amount) => self.sign(amount).await,
            NeedAnswer::TopUp { to } => self.top_up(to),
            NeedAnswer::Decline(decline) => self.decline(decline),
            _ => {}
        }
    }

    fn decline(&mut self, decline: Decline) {
        self.send(&PaymentMessage::Decline { reason: decline.to_string() });
        let budget = self.state.lock().book.limits().budget;
        self.stop(match decline.reason {
            // A deposit of the whole budget is the budget's limit, too.
            DeclineReason::Budget | DeclineReason::Deposit if decline.limit >= budget => {
                WalletError::BudgetTooSmall { needed: decline.needed, budget }
            }
            _ => WalletError::Declined(decline),
        });
    }

    /// An older receipt is no news. A receipt that the settlement is on its way leaves the order waiting for the one that
    /// names it.
    async fn handle_receipt(&mut self, signed: SignedReceipt, receipt: Receipt) {
        if receipt.sequence <= self.channel.last_receipt {
            return;
        }
        self.channel.last_receipt = receipt.sequence;
        if !matches!(receipt.status, ReceiptStatus::Closed | ReceiptStatus::ClosedForced) {
            return;
        }
        let settled = receipt.settled;
        if let WalletPhase::Closing { close } = &self.channel.phase
            && settled > close.amount
        {
            let closed_at = close.amount;
            return self.stop(WalletError::Overcharged { closed_at, settled });
        }
        let Some(Order::Close(order)) = self.closing.take() else { return };
        self.channel.phase = WalletPhase::Ended { settled };
        let saved = self.wallet.store().save(self.channel.clone(), Some(signed)).await;
        let count = self.shared.open_money(self.id);
        let stats = stats(&self.state.lock(), count);
        let closed = ClosedChannel { channel_id: self.channel.id(), receipt, stats };
        let _dropped = order.send(saved.map(|()| closed).map_err(WalletError::from));
    }

    /// Sends the close voucher, or closes the connection that is kept, if all calls have ended in time.
    async fn start_close(&mut self, calls_ended: bool) {
        let Some((order, _)) = self.ordered.take() else { return };
        let order = match order {
            Order::Close(order) => order,
            Order::Keep(order) if calls_ended => {
                self.closing = Some(Order::Keep(order));
                return self.close_connection(Reason::new(code::NONE, "the channel is kept"));
            }
            Order::Keep(order) => return drop(order.send(Err(WalletError::Timeout("the end of all calls")))),
        };
        if !calls_ended {
            return drop(order.send(Err(WalletError::Timeout("the end of all calls"))));
        }
        let settled = self.look_at_settled().await;
        let (amount, received) = {
            let mut state = self.state.lock();
            if let Some(count) = self.shared.open_money(self.id) {
                state.book.record_received(count.amount);
            }
            (state.book.close_amount(settled), state.book.received())
        };
        match self.sign_close(amount).await {
            Ok(close) => {
                self.channel.phase = WalletPhase::Closing { close };
                // From here nothing else is signed; a store that fails has stopped everything.
                let written = self.wallet.store().save(self.closing_record(), None).await;
                if let Err(error) = written {
                    return drop(order.send(Err(error.into())));
                }
                self.channel = self.closing_record();
                self.closing = Some(Order::Close(order));
                failpoint!("wallet.before-close");
                self.send(&PaymentMessage::Close { voucher: close, received });
            }
            Err(error) => drop(order.send(Err(error))),
        }
    }

    fn closing_record(&self) -> WalletChannel {
        WalletChannel { book: self.state.lock().book.snapshot(), ..self.channel.clone() }
    }

    /// What the escrow has paid out: a close states at least that.
    async fn look_at_settled(&self) -> Amount {
        let look = async { ledger_of(&self.channel).await.ok()?.channel(self.channel.id()).await.ok()? };
        let held = tokio::time::timeout(LOOK_TIMEOUT, look).await.ok().flatten();
        held.map_or(Amount::ZERO, |held| held.settled)
    }
}

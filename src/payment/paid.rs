//! A paid connection as its payer holds it, and the task that pays for it.
//!
//! The task signs vouchers off the session's task: the session counts the price of what arrives and says when the count
//! has reached a mark; the task signs the next voucher and sets the next mark. What may be signed is decided by
//! [`PayerBook`] alone, whatever the payee claims.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use tollway_protocol::error::{Reason, code};
use tollway_protocol::id::ConnectionId;
use tollway_protocol::payment::{
    Amount, ChannelDescriptor, ChannelId, CloseVoucher, Decline, DeclineReason, NeedAnswer, NeedVoucher, PayerBook,
    PayerLimits, PaymentMessage, Receipt, ReceiptStatus, SecretKey, Terms, Voucher, VoucherDomain,
};
use tollway_protocol::session::MoneyCount;

use super::mailbox::{Letters, Mailbox};
use super::wallet::WalletError;
use crate::connection::Connection;
use crate::shared::Shared;

/// How long a close waits for the calls of its connection to end, and then for the payee's final receipt.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(30);

/// How a paid connection stands. All amounts are cumulative base units.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PaymentStats {
    /// What the escrow holds.
    pub deposit: Amount,
    /// The highest voucher that was signed.
    pub signed: Amount,
    /// The price of what arrived, by the payer's own count.
    pub received: Amount,
    /// Vouchers that were signed.
    pub vouchers: u64,
    /// The most that was ever signed beyond what was received.
    pub peak_ahead: Amount,
    /// What may be signed beyond what was received.
    pub max_ahead: Amount,
    /// What the connection may cost.
    pub budget: Amount,
    /// Metered bytes that arrived.
    pub bytes: u64,
    /// Metered items that arrived.
    pub items: u64,
}

/// How a channel ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClosedChannel {
    /// The channel.
    pub channel_id: ChannelId,
    /// The payee's final receipt, verified.
    pub receipt: Receipt,
    /// The payer's own account.
    pub stats: PaymentStats,
}

/// A connection that is paid for as it is used. Close it with [`close`](Self::close): dropped, it leaves the settlement
/// to the payee.
pub struct PaidConnection {
    connection: Connection,
    terms: Terms,
    state: Arc<Mutex<PayerState>>,
    failed: watch::Receiver<Option<WalletError>>,
    close: mpsc::Sender<CloseOrder>,
}

impl fmt::Debug for PaidConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PaidConnection").field("connection", &self.connection).finish_non_exhaustive()
    }
}

type CloseOrder = oneshot::Sender<Result<ClosedChannel, WalletError>>;

/// What handle and task share.
struct PayerState {
    book: PayerBook,
    vouchers: u64,
}

/// What a paid connection is made of once the payee has accepted it.
pub(super) struct Opened {
    pub(super) connection: Connection,
    pub(super) terms: Terms,
    pub(super) descriptor: ChannelDescriptor,
    pub(super) book: PayerBook,
    pub(super) mailbox: Arc<Mailbox>,
    pub(super) key: Arc<SecretKey>,
}

impl PaidConnection {
    pub(super) fn start(opened: Opened) -> Self {
        let Opened { connection, terms, descriptor, book, mailbox, key } = opened;
        let limits = book.limits();
        let state = Arc::new(Mutex::new(PayerState { book, vouchers: 0 }));
        let (fail, failed) = watch::channel(None);
        let (close, orders) = mpsc::channel(1);
        let task = PayerTask {
            shared: connection.inner().session.shared.clone(),
            id: connection.id(),
            channel_id: descriptor.id(),
            domain: descriptor.voucher_domain(),
            descriptor,
            mailbox,
            key,
            state: state.clone(),
            limits,
            fail,
            ordered: None,
            closing: None,
        };
        let paid = PaidConnection { connection, terms, state, failed, close };
        tokio::spawn(task.run(orders));
        paid
    }

    /// The connection, to call on.
    pub fn connection(&self) -> &Connection {
        &self.connection
    }

    /// The terms under which it was opened.
    pub fn terms(&self) -> &Terms {
        &self.terms
    }

    /// How it stands.
    pub fn stats(&self) -> PaymentStats {
        let count = self.connection.money();
        let state = self.state.lock();
        stats(&state, count)
    }

    /// Why payment stopped, once it did: calls then fail for want of it.
    pub fn failure(&self) -> Option<WalletError> {
        self.failed.borrow().clone()
    }

    /// Waits until payment stops.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn failed(&self) -> WalletError {
        let mut failed = self.failed.clone();
        match failed.wait_for(Option::is_some).await {
            Ok(error) => error.clone().unwrap_or(WalletError::Timeout("the payment task")),
            // The task has ended without an error: with the connection.
            Err(_) => WalletError::Ended(self.connection.closed().await),
        }
    }

    /// Waits for all calls to end, states what was received in a close voucher, and waits for the payee's final
    /// receipt. Then the connection is closed.
    ///
    /// # Errors
    /// When the payee disputes or does not answer; what it can settle by then is bounded by the vouchers that it has.
    ///
    /// # Cancel safety
    /// A dropped future may have closed the channel.
    pub async fn close(self) -> Result<ClosedChannel, WalletError> {
        let (order, answer) = oneshot::channel();
        if self.close.send(order).await.is_err() {
            return Err(self.failure().unwrap_or(WalletError::Timeout("the payment task")));
        }
        let closed = match tokio::time::timeout(2 * CLOSE_TIMEOUT, answer).await {
            Ok(Ok(closed)) => closed,
            Ok(Err(_ended)) => Err(match self.connection.end() {
                Some(end) => WalletError::Ended(end.clone()),
                None => self.failure().unwrap_or(WalletError::Timeout("the payment task")),
            }),
            Err(_elapsed) => Err(WalletError::Timeout("the payee's final receipt")),
        };
        self.connection.close(Reason::new(code::NONE, "the channel is closed"));
        closed
    }
}

fn stats(state: &PayerState, count: Option<MoneyCount>) -> PaymentStats {
    let limits = state.book.limits();
    let received = count.map_or(state.book.received(), |count| count.amount);
    PaymentStats {
        deposit: state.book.deposit(),
        signed: state.book.signed(),
        received,
        vouchers: state.vouchers,
        peak_ahead: state.book.peak_ahead(),
        max_ahead: limits.max_ahead,
        budget: limits.budget,
        bytes: count.map_or(0, |count| count.bytes),
        items: count.map_or(0, |count| count.items),
    }
}

/// Pays for one connection.
struct PayerTask {
    shared: Arc<Shared>,
    id: ConnectionId,
    channel_id: ChannelId,
    descriptor: ChannelDescriptor,
    domain: VoucherDomain,
    mailbox: Arc<Mailbox>,
    key: Arc<SecretKey>,
    state: Arc<Mutex<PayerState>>,
    limits: PayerLimits,
    fail: watch::Sender<Option<WalletError>>,
    /// A close that waits for the ends of all calls, which are paid until then, and for how long.
    ordered: Option<(CloseOrder, Instant)>,
    /// A close that waits for the final receipt.
    closing: Option<CloseOrder>,
}

impl PayerTask {
    async fn run(mut self, mut orders: mpsc::Receiver<CloseOrder>) {
        self.pay();
        let mut handle_lives = true;
        loop {
            let deadline = self.ordered.as_ref().map(|(_, deadline)| *deadline);
            let calls_ended = async {
                match deadline {
                    Some(deadline) => tokio::time::timeout_at(deadline, self.shared.calls_ended(self.id)).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                letters = self.mailbox.take() => {
                    if !self.handle(letters) {
                        return;
                    }
                }
                ended = calls_ended => self.start_close(ended.is_ok()),
                // The handle goes with its order, so that there is one.
                order = orders.recv(), if handle_lives => match order {
                    Some(order) => self.ordered = Some((order, Instant::now() + CLOSE_TIMEOUT)),
                    // The handle was dropped: the connection goes with it, and the mailbox says so.
                    None => {
                        handle_lives = false;
                        self.shared.close_connection(self.id, Reason::new(code::DROPPED, "the payer has gone"));
                    }
                },
            }
        }
    }

    /// Works the mailbox off. Returns whether the connection goes on.
    fn handle(&mut self, letters: Letters) -> bool {
        if let Some(received) = letters.received {
            self.state.lock().book.record_received(received);
        }
        for message in letters.messages {
            match PaymentMessage::decode(&message) {
                Ok(message) => self.handle_message(message),
                Err(error) => self.stop(WalletError::BadMessage(error.to_string())),
            }
        }
        if let Some(money) = letters.ended {
            if let Some(count) = money {
                self.state.lock().book.record_received(count.amount);
            }
            return false;
        }
        self.pay();
        true
    }

    /// Signs what is due, and says when the next voucher will be.
    fn pay(&mut self) {
        if self.closing.is_some() {
            return;
        }
        let (due, mark) = {
            let mut state = self.state.lock();
            let due = match state.book.retry_need() {
                Some(NeedAnswer::Sign(amount)) => Some(amount),
                _ => state.book.next_voucher(),
            };
            (due, state.book.next_mark())
        };
        match due {
            Some(amount) => self.sign(amount),
            None => self.shared.set_received_mark(self.id, mark),
        }
    }

    /// Books, signs and sends a voucher.
    fn sign(&mut self, amount: Amount) {
        let mut state = self.state.lock();
        if let Some(ceiling) = state.book.next_ceiling(amount) {
            // Without a durable wallet the ceiling lives as long as the channel: it is never resumed.
            state.book.record_ceiling(ceiling);
        }
        if let Err(error) = state.book.record_signed(amount) {
            drop(state);
            return self.stop(WalletError::BadMessage(error.to_string()));
        }
        state.vouchers += 1;
        let (received, mark) = (state.book.received(), state.book.next_mark());
        drop(state);
        match Voucher::sign(&self.domain, &self.key, self.channel_id, amount) {
            Ok(voucher) => self.send(&PaymentMessage::Voucher { amount, signature: voucher.signature, received }),
            Err(error) => self.stop(WalletError::BadMessage(error.to_string())),
        }
        self.shared.set_received_mark(self.id, mark);
    }

    fn send(&self, message: &PaymentMessage) {
        // Fails only when the connection has ended, which the mailbox says too.
        let _ended = self.shared.send_payment(self.id, Bytes::from(message.encode()));
    }

    /// Payment stops. The first reason stands.
    fn stop(&mut self, error: WalletError) {
        if let Some(order) = self.closing.take() {
            // Whoever closes has dropped the future if it does not listen.
            let _dropped = order.send(Err(error.clone()));
        }
        self.fail.send_if_modified(|failed| failed.is_none() && failed.replace(error).is_none());
    }

    fn handle_message(&mut self, message: PaymentMessage) {
        match message {
            // It crossed our Close: all calls have ended, and nothing waits any more.
            PaymentMessage::NeedVoucher { .. } if self.closing.is_some() => {}
            PaymentMessage::NeedVoucher { required, accepted, spent, deposit } => {
                let need = NeedVoucher { required, accepted, spent, deposit };
                let answer = {
                    let mut state = self.state.lock();
                    // The session may have counted more than its last mark said.
                    if let Some(count) = self.shared.open_money(self.id) {
                        state.book.record_received(count.amount);
                    }
                    state.book.handle_need(need)
                };
                match answer {
                    NeedAnswer::Sign(amount) => self.sign(amount),
                    NeedAnswer::Decline(decline) => self.decline(decline),
                    // The deposit limit is zero, so that no top-up is ever asked for.
                    _ => {}
                }
            }
            PaymentMessage::Receipt(signed) => match signed.verify(&self.descriptor) {
                Ok(receipt) => self.handle_receipt(receipt),
                Err(error) => self.stop(WalletError::BadMessage(error.to_string())),
            },
            PaymentMessage::Refused { reason } => self.stop(WalletError::Refused(reason)),
            PaymentMessage::Disputed { claimed, spent } => self.stop(WalletError::Disputed { claimed, spent }),
            _ => self.stop(WalletError::BadMessage("a message that only a payer sends".to_owned())),
        }
    }

    fn decline(&mut self, decline: Decline) {
        self.send(&PaymentMessage::Decline { reason: decline.to_string() });
        let budget = self.limits.budget;
        self.stop(match decline.reason {
            // A deposit of the whole budget is the budget's limit, too.
            DeclineReason::Budget | DeclineReason::Deposit if decline.limit >= budget => {
                WalletError::BudgetTooSmall { needed: decline.needed, budget }
            }
            _ => WalletError::Declined(decline),
        });
    }

    fn handle_receipt(&mut self, receipt: Receipt) {
        let is_final = matches!(receipt.status, ReceiptStatus::Closed | ReceiptStatus::ClosedForced);
        // A receipt that the settlement is on its way leaves the order waiting for the one that names it.
        if is_final && let Some(order) = self.closing.take() {
            let count = self.shared.open_money(self.id);
            let state = self.state.lock();
            let stats = stats(&state, count);
            drop(state);
            let _dropped = order.send(Ok(ClosedChannel { channel_id: self.channel_id, receipt, stats }));
        }
    }

    /// Sends the close voucher, if all calls have ended in time.
    fn start_close(&mut self, calls_ended: bool) {
        let Some((order, _)) = self.ordered.take() else { return };
        if !calls_ended {
            let _dropped = order.send(Err(WalletError::Timeout("the end of all calls")));
            return;
        }
        let (amount, received) = {
            let mut state = self.state.lock();
            if let Some(count) = self.shared.open_money(self.id) {
                state.book.record_received(count.amount);
            }
            (state.book.close_amount(Amount::ZERO), state.book.received())
        };
        match CloseVoucher::sign(&self.domain, &self.key, self.channel_id, amount) {
            Ok(voucher) => {
                self.closing = Some(order);
                self.send(&PaymentMessage::Close { voucher, received });
            }
            Err(error) => {
                let _dropped = order.send(Err(WalletError::BadMessage(error.to_string())));
            }
        }
    }
}

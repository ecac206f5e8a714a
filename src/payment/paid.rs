//! A paid connection as its payer holds it. The task that pays for it is in `payer_task.rs`.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{mpsc, oneshot, watch};
use tollway_protocol::error::{Reason, code};
use tollway_protocol::payment::{Amount, ChannelId, PayerBook, Receipt, Terms};
use tollway_protocol::session::MoneyCount;

use super::payer_task::{Opened, PayerTask};
use super::wallet_error::WalletError;
use crate::connection::Connection;

/// How long a close waits for the calls of its connection to end, and then for the payee's final receipt.
pub(super) const CLOSE_TIMEOUT: Duration = Duration::from_secs(30);

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

/// A connection that is paid for as it is used. Close its channel with [`close`](Self::close), or [`keep`](Self::keep) it
/// for the next time. Dropped, it leaves the settlement to the payee, and the channel in the wallet's store.
pub struct PaidConnection {
    connection: Connection,
    terms: Terms,
    channel_id: ChannelId,
    state: Arc<Mutex<PayerState>>,
    failed: watch::Receiver<Option<WalletError>>,
    close: mpsc::Sender<Order>,
}

impl fmt::Debug for PaidConnection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PaidConnection").field("connection", &self.connection).finish_non_exhaustive()
    }
}

/// What the handle asks of the task in the end.
pub(super) enum Order {
    /// Close the channel with its payee.
    Close(oneshot::Sender<Result<ClosedChannel, WalletError>>),
    /// Close the connection and keep the channel.
    Keep(oneshot::Sender<Result<KeptChannel, WalletError>>),
}

/// A channel that stays open for the next time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeptChannel {
    /// The channel.
    pub channel_id: ChannelId,
    /// The payer's own account.
    pub stats: PaymentStats,
}

/// What handle and task share.
pub(super) struct PayerState {
    pub(super) book: PayerBook,
    pub(super) vouchers: u64,
}

impl PaidConnection {
    pub(super) fn start(opened: Opened) -> Self {
        let state = Arc::new(Mutex::new(PayerState { book: opened.book.clone(), vouchers: 0 }));
        let (fail, failed) = watch::channel(None);
        let (close, orders) = mpsc::channel(1);
        let (connection, terms) = (opened.connection.clone(), opened.terms.clone());
        let channel_id = opened.channel.id();
        let task = PayerTask::new(opened, state.clone(), fail);
        let paid = PaidConnection { connection, terms, channel_id, state, failed, close };
        tokio::spawn(task.run(orders));
        paid
    }

    /// The channel that is paid from.
    pub fn channel_id(&self) -> ChannelId {
        self.channel_id
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

    /// Waits until its task has ended, which it does after its connection: then the channel may be paid from again.
    pub(crate) async fn released(&self) {
        let mut failed = self.failed.clone();
        while failed.changed().await.is_ok() {}
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
        let closed = self.ask(Order::Close(order), answer, "the payee's final receipt").await;
        self.connection.close(Reason::new(code::NONE, "the channel is closed"));
        closed
    }

    /// Waits for all calls to end, closes the connection, and keeps the channel in the wallet's store for the next time.
    /// Nothing is settled by it; what was received is durable when this returns.
    ///
    /// # Errors
    /// When the calls do not end in time, or the store fails.
    ///
    /// # Cancel safety
    /// A dropped future may have closed the connection; the channel stays as it is.
    pub async fn keep(self) -> Result<KeptChannel, WalletError> {
        let (order, answer) = oneshot::channel();
        self.ask(Order::Keep(order), answer, "the end of the connection").await
    }

    async fn ask<T>(
        &self,
        order: Order,
        answer: oneshot::Receiver<Result<T, WalletError>>,
        what: &'static str,
    ) -> Result<T, WalletError> {
        if self.close.send(order).await.is_err() {
            return Err(self.failure().unwrap_or(WalletError::Timeout("the payment task")));
        }
        match tokio::time::timeout(2 * CLOSE_TIMEOUT, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_ended)) => Err(match self.connection.end() {
                Some(end) => WalletError::Ended(end.clone()),
                None => self.failure().unwrap_or(WalletError::Timeout("the payment task")),
            }),
            Err(_elapsed) => Err(WalletError::Timeout(what)),
        }
    }
}

pub(super) fn stats(state: &PayerState, count: Option<MoneyCount>) -> PaymentStats {
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

//! A connection to a file service, free or paid, and what a fetch over it costs.

use std::path::Path;
use std::pin::pin;

use serde::Serialize;
use tollway::payment::{ClosedChannel, KeptChannel, PaidConnection, PaymentStats, Wallet, WalletConfig, WalletError};
use tollway::{Connection, OpenError, Session};
use tollway_protocol::error::Reason;
use tollway_protocol::payment::{Amount, ChannelId, Terms};

use crate::files::{self, Hashing, Incoming, Received, Sink, TransferError};
use crate::interrupt::Interrupts;
use crate::output;

/// A connection to a file service.
#[derive(Debug)]
pub(crate) enum Access {
    /// The files cost nothing.
    Free(Connection),
    /// The connection is a payment channel.
    Paid(Box<PaidConnection>),
}

/// Why a fetch failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    /// Known before the payee has sent more than the file's size.
    #[error(
        "the budget is too small: {name:?} has {} bytes and costs {needed}, and the budget is {budget}; raise --budget to \
         at least {needed}",
        output::grouped(u128::from(*.size))
    )]
    TooExpensive {
        /// The file.
        name: String,
        /// Its size in bytes.
        size: u64,
        /// What it costs, in base units.
        needed: Amount,
        /// What may be spent, in base units.
        budget: Amount,
    },
    /// The payment stopped.
    #[error(transparent)]
    Payment(#[from] WalletError),
    /// The transfer failed, and not for want of money.
    #[error(transparent)]
    Transfer(#[from] TransferError),
}

/// The sums of a channel. In JSON each is a decimal string.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Money {
    /// What was deposited.
    pub(crate) deposit: Amount,
    /// Vouchers that were signed.
    pub(crate) vouchers: u64,
    /// The highest one that the payee has accepted.
    pub(crate) accepted: Amount,
    /// What the payee charged, by its signed final receipt.
    pub(crate) spent: Amount,
    /// What the payer counted by itself.
    pub(crate) payer_metered: Amount,
    /// The most that was signed ahead of what had come.
    pub(crate) peak_ahead: Amount,
    /// The most that may be.
    pub(crate) max_ahead: Amount,
    /// What the payee got.
    pub(crate) settled: Amount,
    /// What went back to the payer.
    pub(crate) refunded: Amount,
}

impl Money {
    /// As the final receipt has it.
    pub(crate) fn of(closed: &ClosedChannel) -> Self {
        let (stats, receipt) = (&closed.stats, &closed.receipt);
        Money {
            deposit: stats.deposit,
            vouchers: stats.vouchers,
            accepted: receipt.accepted,
            spent: receipt.spent,
            payer_metered: stats.received,
            peak_ahead: stats.peak_ahead,
            max_ahead: stats.max_ahead,
            settled: receipt.settled,
            refunded: stats.deposit.saturating_sub(receipt.settled),
        }
    }
}

/// A channel that was kept for the next time. In JSON each sum is a decimal string.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub(crate) struct Kept {
    /// Always true.
    pub(crate) kept: bool,
    /// What was deposited.
    pub(crate) deposit: Amount,
    /// Vouchers that were signed this time.
    pub(crate) vouchers: u64,
    /// What the payer counted by itself, over all times.
    pub(crate) payer_metered: Amount,
    /// The most that was signed ahead of what had come.
    pub(crate) peak_ahead: Amount,
    /// The most that may be.
    pub(crate) max_ahead: Amount,
}

impl Kept {
    fn of(channel: &KeptChannel) -> Self {
        let PaymentStats { deposit, vouchers, received, peak_ahead, max_ahead, .. } = channel.stats;
        Kept { kept: true, deposit, vouchers, payer_metered: received, peak_ahead, max_ahead }
    }
}

/// How an access came to its end.
#[derive(Debug)]
pub(crate) enum Ended {
    /// Nothing was paid.
    Free,
    /// The channel is closed.
    Closed(ChannelId, Money),
    /// The channel is there for the next time.
    Kept(ChannelId, Kept),
}

/// Opens the file service if it costs nothing; `None` when it must be paid for.
///
/// # Errors
/// When the peer serves no files, or does not answer.
pub(crate) async fn open_free(session: &Session) -> Result<Option<Connection>, OpenError> {
    match session.open(files::SERVICE).await {
        Ok(connection) => Ok(Some(connection)),
        Err(OpenError::PaymentRequired { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Opens a payment channel to the file service.
///
/// # Errors
/// When the terms are not to the wallet's liking, or the escrow or the payee refuse.
pub(crate) async fn open_paid(session: &Session, config: WalletConfig) -> Result<Access, WalletError> {
    let paid = Wallet::new(config).open(session, files::SERVICE).await?;
    Ok(Access::Paid(Box::new(paid)))
}

impl Access {
    fn connection(&self) -> &Connection {
        match self {
            Access::Free(connection) => connection,
            Access::Paid(paid) => paid.connection(),
        }
    }

    /// The terms of a paid connection.
    pub(crate) fn terms(&self) -> Option<&Terms> {
        match self {
            Access::Free(_) => None,
            Access::Paid(paid) => Some(paid.terms()),
        }
    }

    /// Bytes that were metered so far; `None` when nothing is.
    pub(crate) fn metered_bytes(&self) -> Option<u64> {
        match self {
            Access::Free(_) => None,
            Access::Paid(paid) => Some(paid.stats().bytes),
        }
    }

    /// What was paid for and what is left of the budget; empty when nothing is paid.
    fn paid_and_left(&self) -> String {
        let Access::Paid(paid) = self else { return String::new() };
        let stats = paid.stats();
        let left = stats.budget.saturating_sub(stats.received);
        format!("paid {} left {}", output::amount(stats.received), output::amount(left))
    }

    /// Fetches a file to the disk. It has not got its name yet.
    ///
    /// # Errors
    /// When the file does not come, or the money does not suffice: then the payment is the cause that is told.
    ///
    /// # Cancel safety
    /// Dropping the future stops the payee and deletes what was written. The channel stays open.
    pub(crate) async fn fetch(
        &self,
        name: &str,
        target: &Path,
        hashing: Hashing,
        show_progress: bool,
    ) -> Result<Received, FetchError> {
        let result = self.transfer(name, target, hashing, show_progress).await;
        match (result, self) {
            // What broke the transfer off is what the wallet says, not how the transfer noticed.
            (Err(FetchError::Transfer(error)), Access::Paid(paid)) => {
                Err(paid.failure().map_or(error.into(), Into::into))
            }
            (result, _) => result,
        }
    }

    async fn transfer(
        &self,
        name: &str,
        target: &Path,
        hashing: Hashing,
        show_progress: bool,
    ) -> Result<Received, FetchError> {
        let before = match self {
            Access::Free(_) => Amount::ZERO,
            Access::Paid(paid) => paid.stats().received,
        };
        let incoming = files::request(self.connection(), name).await?;
        let needed = self.affordable(name, &incoming, before)?;
        let sink = Sink::create(target, hashing).map_err(TransferError::from)?;
        let mut progress = output::Progress::new(incoming.size, show_progress);
        let mut saved = pin!(incoming.save(sink, |bytes| progress.advance(bytes, || self.paid_and_left())));
        let Access::Paid(paid) = self else { return Ok(saved.await?) };
        tokio::select! {
            biased;
            received = &mut saved => Ok(received?),
            // What is signed for still comes. For more the payee would wait, with patience and in vain.
            failure = paid.failed() => match paid.stats().signed >= needed {
                true => Ok(saved.await?),
                false => Err(failure.into()),
            },
        }
    }

    /// What the channel will have cost with the whole file, where it has cost `before`: a file that cannot be paid for to
    /// its end is not begun.
    fn affordable(&self, name: &str, incoming: &Incoming, before: Amount) -> Result<Amount, FetchError> {
        let Access::Paid(paid) = self else { return Ok(Amount::ZERO) };
        let price = paid.terms().method(files::method().0).map(|method| method.price).unwrap_or_default();
        let needed = price.cost(incoming.usage(name)).unwrap_or(Amount::MAX);
        // A channel that is used again has cost something before.
        let (stats, size) = (paid.stats(), incoming.size);
        let budget = stats.budget.saturating_sub(before);
        if needed > budget {
            return Err(FetchError::TooExpensive { name: name.to_owned(), size, needed, budget });
        }
        Ok(before.saturating_add(needed))
    }

    /// Closes the connection, and the channel if it is one.
    ///
    /// # Errors
    /// When the channel could not be closed.
    pub(crate) async fn close(self) -> Result<Ended, WalletError> {
        match self {
            Access::Free(connection) => {
                connection.close(Reason::none());
                Ok(Ended::Free)
            }
            Access::Paid(paid) => {
                let closed = paid.close().await?;
                Ok(Ended::Closed(closed.channel_id, Money::of(&closed)))
            }
        }
    }

    /// Closes the connection, and keeps the channel if it is one.
    ///
    /// # Errors
    /// When what was received could not be recorded.
    pub(crate) async fn keep(self) -> Result<Ended, WalletError> {
        match self {
            Access::Free(_) => self.close().await,
            Access::Paid(paid) => {
                let kept = paid.keep().await?;
                Ok(Ended::Kept(kept.channel_id, Kept::of(&kept)))
            }
        }
    }
}

/// Awaits `work` until the first interrupt, which drops it.
///
/// # Errors
/// [`crate::failure::Failure::Interrupted`].
pub(crate) async fn unless_interrupted<T>(
    interrupts: &Interrupts,
    work: impl Future<Output = T>,
) -> Result<T, crate::failure::Failure> {
    tokio::select! {
        biased;
        () = interrupts.first() => Err(crate::failure::Failure::Interrupted),
        result = work => Ok(result),
    }
}

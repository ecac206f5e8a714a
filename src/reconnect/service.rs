//! One service of a client's server: the connection to it, and the calls on it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::OwnedMutexGuard;
use tokio::time::{sleep, timeout, timeout_at};
use tollway_protocol::error::{Reason, code};

use super::{ClientError, Handle, Retry};
use crate::connection::Connection;
use crate::payment::{PaidConnection, WalletError};
use crate::rpc::middleware::ClientStack;
use crate::rpc::{Answer, CallError, CallFuture, ConnectFailure, ErrorKind, OutgoingCall, check_schema};
use crate::session::{OpenError, Session};

/// A service that a [`Client`](super::Client) reaches. Clones share its connection.
#[derive(Clone)]
pub struct RemoteService {
    inner: Arc<Inner>,
}

struct Inner {
    client: Arc<Handle>,
    slot: Arc<Slot>,
    name: String,
    schema: Option<u64>,
}

/// The place of a service's connection.
#[derive(Default)]
pub(super) struct Slot {
    open: Mutex<Option<Arc<Open>>>,
    /// Who opens: one at a time, and nobody while a paid connection is being left.
    opening: Arc<tokio::sync::Mutex<()>>,
}

/// What somebody has who wants a connection.
enum Turn {
    /// There is one.
    Usable(Arc<Open>),
    /// It is to open one; the others wait until the guard is dropped.
    Open(OwnedMutexGuard<()>),
}

impl Slot {
    pub(super) fn take(&self) -> Option<Arc<Open>> {
        self.open.lock().take()
    }

    /// Leaves a connection that cannot be called on any more.
    pub(super) async fn clear(&self, grace: Duration) {
        let _turn = self.turn(grace).await;
    }

    /// Waits for the turn to open, if there is no connection that can be called on. One that cannot be is left first. What is
    /// paid from a channel must be over before the channel can be paid from again, or the next one to open would deposit anew:
    /// so the task that leaves a paid connection holds the turn until it is done.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped: what is being left stays with its task, and so does the turn.
    async fn turn(&self, grace: Duration) -> Turn {
        loop {
            let turn = self.opening.clone().lock_owned().await;
            // Somebody may have been faster.
            if let Some(open) = self.usable() {
                return Turn::Usable(open);
            }
            let Some(old) = self.take() else { return Turn::Open(turn) };
            let held = old.is_paid.then_some(turn);
            tokio::spawn(async move {
                old.leave(grace, true).await;
                drop(held);
            });
        }
    }

    /// The connection, if it can be called on.
    fn usable(&self) -> Option<Arc<Open>> {
        self.open.lock().as_ref().filter(|open| open.is_usable()).cloned()
    }
}

/// A connection that is open.
pub(super) struct Open {
    session: Session,
    connection: Connection,
    /// Taken out when it is closed.
    paid: Mutex<Option<PaidConnection>>,
    is_paid: bool,
}

impl Open {
    fn is_usable(&self) -> bool {
        self.connection.end().is_none() && self.connection.draining().is_none() && !self.session.is_peer_leaving()
    }

    /// Closes the connection when its calls have ended, or after the grace period.
    pub(super) async fn leave(&self, grace: Duration, keep_channel: bool) {
        if timeout(grace, self.connection.calls_ended()).await.is_err() {
            tracing::debug!("calls did not end within the grace period");
        }
        let paid = self.paid.lock().take();
        let ended = match paid {
            // Its task has the store up to date when it ends.
            Some(paid) if self.connection.end().is_some() => {
                paid.released().await;
                Ok(())
            }
            Some(paid) if keep_channel => paid.keep().await.map(drop),
            Some(paid) => paid.close().await.map(drop),
            None => Ok(()),
        };
        if let Err(error) = ended {
            tracing::warn!(%error, "a channel was not closed in order; the wallet's store has it");
        }
        self.connection.close(Reason::new(code::NONE, "the client has left"));
    }
}

impl fmt::Debug for RemoteService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteService").field("name", &self.inner.name).field("address", &self.address()).finish()
    }
}

impl RemoteService {
    pub(super) fn new(client: Arc<Handle>, name: &str, schema: Option<u64>) -> Self {
        let slot = client.core.slot(name);
        RemoteService { inner: Arc::new(Inner { client, slot, name: name.to_owned(), schema }) }
    }

    pub(crate) fn around(&self) -> &ClientStack {
        &self.inner.client.around
    }

    pub(crate) fn address(&self) -> String {
        self.inner.client.core.dial.address()
    }

    /// Makes a call, on whatever connection there is or can be had.
    pub(crate) async fn call(&self, call: OutgoingCall) -> Result<Answer, CallError> {
        let most = match self.inner.client.core.config.retry {
            Retry::Never => return self.call_once(call).await.map_err(|(error, _)| error),
            Retry::NotExecuted(times) | Retry::Idempotent(times) => times.get(),
        };
        let (deadline, is_idempotent) = (call.deadline(), call.is_idempotent());
        let mut next = Some(call);
        let mut made = 0;
        loop {
            let call = next.take().expect("a call is made again only if there is a copy");
            next = call.try_clone();
            let (error, is_paid) = match self.call_once(call).await {
                Ok(answer) => return Ok(answer),
                Err(failed) => failed,
            };
            made += 1;
            if made >= most || next.is_none() || !self.may_repeat(&error, is_idempotent, is_paid) {
                return Err(error);
            }
            let pause = sleep(self.inner.client.core.config.backoff.delay(made));
            match deadline {
                None => pause.await,
                // The failure says more than that the time is over.
                Some(deadline) => timeout_at(deadline.into(), pause).await.map_err(|_late| error)?,
            }
        }
    }

    fn may_repeat(&self, error: &CallError, is_idempotent: bool, is_paid: bool) -> bool {
        let is_lost = || error.kind() == ErrorKind::ConnectionClosed;
        let idempotent =
            || matches!(self.inner.client.core.config.retry, Retry::Idempotent(_)) && is_idempotent && !is_paid;
        // Who has waited for a connection in vain has waited long enough.
        error.kind() != ErrorKind::NoConnection && (error.is_retryable() || is_lost() && idempotent())
    }

    /// Makes a call once. A failure says whether the connection is paid.
    async fn call_once(&self, call: OutgoingCall) -> Result<Answer, (CallError, bool)> {
        let open = match call.deadline() {
            None => self.connection().await,
            Some(deadline) => timeout_at(deadline.into(), self.connection())
                .await
                .unwrap_or(Err(CallError::DeadlineExceeded { sent: false })),
        };
        let open = open.map_err(|error| (error, false))?;
        // Clients of other builds may share the connection, so each looks for itself.
        check_schema(self.inner.schema, open.connection.metadata()).map_err(|error| (error.into(), open.is_paid))?;
        CallFuture::direct(&open.connection, call).await.map_err(|error| (error, open.is_paid))
    }

    /// The connection, opened if there is none.
    async fn connection(&self) -> Result<Arc<Open>, CallError> {
        if let Some(open) = self.inner.slot.usable() {
            return Ok(open);
        }
        let _turn = match self.inner.slot.turn(self.inner.client.core.config.grace).await {
            Turn::Usable(open) => return Ok(open),
            Turn::Open(turn) => turn,
        };
        let failed = |error| CallError::NoConnection(ConnectFailure::new(error));
        let session = self.inner.client.core.session().await.map_err(failed)?;
        let open = Arc::new(self.open(session).await?);
        *self.inner.slot.open.lock() = Some(open.clone());
        Ok(open)
    }

    async fn open(&self, session: Session) -> Result<Open, CallError> {
        let unpaid = |connection| (connection, None);
        let (connection, paid) = match (session.open(&self.inner.name).await, &self.inner.client.core.config.wallet) {
            (Err(OpenError::PaymentRequired { .. }), Some(wallet)) => {
                let paid = wallet.open(&session, &self.inner.name).await.map_err(|error| match error {
                    WalletError::Open(error) => CallError::from(error),
                    error => CallError::NoConnection(ConnectFailure::new(ClientError::Wallet(error))),
                })?;
                (paid.connection().clone(), Some(paid))
            }
            (opened, _) => opened.map(unpaid)?,
        };
        Ok(Open { session, connection, is_paid: paid.is_some(), paid: Mutex::new(paid) })
    }
}

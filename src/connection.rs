//! The handle of a virtual connection.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Serialize;
use tollway_protocol::error::{ConnectionEnd, Reason, code};
use tollway_protocol::id::ConnectionId;
use tollway_protocol::metadata::Metadata;
use tollway_protocol::session::MoneyCount;

use crate::conduit::PeerInfo;
use crate::rpc::middleware::{ClientMiddleware, ClientStack};
use crate::rpc::{Call, MethodId, Named, To};
use crate::session::SessionInner;
use crate::shared::{ConnectionCell, Shared};

/// That a side takes no new calls on a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Draining {
    /// Why.
    pub reason: Reason,
    /// When it closes the connection, whatever is open then; without it, with the last call.
    pub until: Option<Instant>,
}

/// A virtual connection to one service of the peer's. Clones share it; the last one dropped closes it, unless it came
/// from a [`CallContext`](crate::rpc::CallContext): then the connection is its opener's.
#[derive(Clone)]
pub struct Connection {
    inner: Arc<ConnectionInner>,
    /// What is around the calls that are made with this handle.
    around: ClientStack,
}

pub(crate) struct ConnectionInner {
    /// Keeps the session open, for the side that opened the connection.
    opener: Option<Arc<SessionInner>>,
    pub(crate) id: ConnectionId,
    pub(crate) cell: Arc<ConnectionCell>,
    metadata: Metadata,
}

impl Connection {
    pub(crate) fn new(
        session: Arc<SessionInner>,
        id: ConnectionId,
        cell: Arc<ConnectionCell>,
        metadata: Metadata,
    ) -> Self {
        let around = session.middleware().clone();
        Connection { inner: Arc::new(ConnectionInner { opener: Some(session), id, cell, metadata }), around }
    }

    /// A handle for the side that serves the connection, which does not close it.
    pub(crate) fn served(cell: Arc<ConnectionCell>, id: ConnectionId) -> Self {
        let inner = Arc::new(ConnectionInner { opener: None, id, cell, metadata: Metadata::new() });
        Connection { inner, around: ClientStack::new() }
    }

    /// The same connection with `middleware` around the calls that are made with this handle and its clones, further in
    /// than what is there already. A session's own is set in [`SessionConfig`](crate::SessionConfig).
    #[must_use]
    pub fn with_middleware(mut self, middleware: impl ClientMiddleware) -> Self {
        self.around = self.around.with(middleware);
        self
    }

    /// The same connection with nothing around its calls.
    pub(crate) fn bare(&self) -> Self {
        Connection { inner: self.inner.clone(), around: ClientStack::new() }
    }

    pub(crate) fn around(&self) -> &ClientStack {
        &self.around
    }

    pub(crate) fn inner(&self) -> &ConnectionInner {
        &self.inner
    }

    /// The other end of the conduit.
    pub fn peer(&self) -> &PeerInfo {
        &self.inner.cell.peer().info
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.inner.cell.shared
    }

    /// The id in the session.
    pub fn id(&self) -> ConnectionId {
        self.inner.id
    }

    /// What the peer said when it accepted; nothing for the side that serves.
    pub fn metadata(&self) -> &Metadata {
        &self.inner.metadata
    }

    /// Why the connection ended, once it did.
    pub fn end(&self) -> Option<&ConnectionEnd> {
        self.inner.cell.end()
    }

    /// Waits for the end of the connection.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn closed(&self) -> ConnectionEnd {
        self.inner.cell.closed().await
    }

    /// Closes the connection now. Calls and streams that are open end; wait for them first to lose nothing.
    pub fn close(&self, reason: Reason) {
        self.shared().close_connection(self.inner.id, reason);
    }

    /// Waits until no call is open, of either direction. New ones may begin meanwhile.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn calls_ended(&self) {
        self.shared().calls_ended(self.inner.id).await;
    }

    /// Takes no new calls on the connection, lets those that are open run to their end, and closes it then with `reason`; or
    /// after `grace`, with code [`DEADLINE`](code::DEADLINE), whatever is open then. Returns its end.
    ///
    /// Calls of the peer's that were on their way are refused, unexecuted. The handles of the side that opened the connection
    /// make no calls any more either; handlers that are at work may still call back, and are waited for. A paid
    /// connection does not close with its last call: its payer does, with [`PaidConnection::close`], or `grace` does.
    ///
    /// The first drain of a side stands; another one waits with it.
    ///
    /// # Cancel safety
    /// The connection drains from the first poll on, whether or not the future is dropped.
    ///
    /// [`PaidConnection::close`]: crate::payment::PaidConnection::close
    pub async fn drain(&self, reason: Reason, grace: Option<Duration>) -> ConnectionEnd {
        let until = grace.and_then(|grace| Instant::now().checked_add(grace));
        self.inner.cell.set_draining(Draining { reason: reason.clone(), until });
        self.shared().drain_connection(self.inner.id, reason, grace);
        self.closed().await
    }

    /// That a side takes no new calls: then calls fail with [`CommandError::Draining`], unexecuted, and belong on another
    /// connection.
    ///
    /// [`CommandError::Draining`]: tollway_protocol::session::CommandError::Draining
    pub fn draining(&self) -> Option<&Draining> {
        self.inner.cell.draining()
    }

    /// Waits until a side takes no new calls or the connection has ended: until it is time for another connection.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn until_draining(&self) {
        self.inner.cell.until_draining().await;
    }

    /// The counts of a paid connection, also after its end; `None` for an unpaid one.
    pub fn money(&self) -> Option<MoneyCount> {
        self.inner.money()
    }

    /// Calls that have not ended, of both directions. A call with streams ends after them.
    pub fn open_calls(&self) -> usize {
        self.shared().open_calls(self.inner.id)
    }

    /// Calls a method, whose arguments are a tuple or one value. What the call returns is an `R`; a method with errors of
    /// its own is called with [`or_error`](Call::or_error). The client of a `#[tollway::service]` has a method for each.
    pub fn call<A: Serialize + ?Sized, R>(&self, method: MethodId, args: &A) -> Call<'_, R> {
        Call::new(To::Connection(self), Named::Id(method), args)
    }
}

impl ConnectionInner {
    /// A handle of the opener's makes no calls while the connection drains, whichever side has begun it. Those of handlers
    /// do, until the peer drains.
    pub(crate) fn takes_no_calls(&self) -> bool {
        self.opener.is_some() && self.cell.draining().is_some() && self.cell.end().is_none()
    }

    pub(crate) fn money(&self) -> Option<MoneyCount> {
        self.cell.shared.money(self.id, &self.cell)
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("id", &self.inner.id).field("end", &self.end()).finish_non_exhaustive()
    }
}

impl Drop for ConnectionInner {
    fn drop(&mut self) {
        if self.opener.is_some() && self.cell.end().is_none() {
            self.cell.shared.close_connection(self.id, Reason::new(code::NONE, ""));
        }
    }
}

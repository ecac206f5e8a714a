//! The handle of a virtual connection.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;
use tollway_protocol::error::{ConnectionEnd, Reason, code};
use tollway_protocol::id::ConnectionId;
use tollway_protocol::metadata::Metadata;
use tollway_protocol::session::MoneyCount;

use crate::rpc::{Call, MethodId};
use crate::session::SessionInner;
use crate::shared::{ConnectionCell, Shared};

/// A virtual connection to one service of the peer's. Clones share it; the last one dropped closes it, unless it came
/// from a [`CallContext`](crate::rpc::CallContext): then the connection is its opener's.
#[derive(Clone)]
pub struct Connection {
    inner: Arc<ConnectionInner>,
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
        Connection { inner: Arc::new(ConnectionInner { opener: Some(session), id, cell, metadata }) }
    }

    /// A handle for the side that serves the connection, which does not close it.
    pub(crate) fn served(cell: Arc<ConnectionCell>, id: ConnectionId) -> Self {
        Connection { inner: Arc::new(ConnectionInner { opener: None, id, cell, metadata: Metadata::new() }) }
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
        Call::new(&self.inner, method, args)
    }
}

impl ConnectionInner {
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

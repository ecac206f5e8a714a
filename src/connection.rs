//! The handle of a virtual connection.

use std::fmt;
use std::sync::Arc;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tollway_protocol::error::{ConnectionEnd, Reason, code};
use tollway_protocol::id::ConnectionId;
use tollway_protocol::metadata::Metadata;
use tollway_protocol::session::MoneyCount;

use crate::rpc::{CallError, CallFuture, MethodId, Response, encode};
use crate::session::SessionInner;
use crate::shared::ConnectionCell;

/// A virtual connection to one service of the peer's. Clones share it; the last one dropped closes it.
#[derive(Clone)]
pub struct Connection {
    inner: Arc<ConnectionInner>,
}

pub(crate) struct ConnectionInner {
    /// Keeps the session open.
    pub(crate) session: Arc<SessionInner>,
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
        Connection { inner: Arc::new(ConnectionInner { session, id, cell, metadata }) }
    }

    pub(crate) fn inner(&self) -> &ConnectionInner {
        &self.inner
    }

    /// The id in the session.
    pub fn id(&self) -> ConnectionId {
        self.inner.id
    }

    /// What the peer said when it accepted.
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
        self.inner.session.shared.close_connection(self.inner.id, reason);
    }

    /// The counts of a paid connection, also after its end; `None` for an unpaid one.
    pub fn money(&self) -> Option<MoneyCount> {
        self.inner.session.shared.money(self.inner.id, &self.inner.cell)
    }

    /// Calls that have not ended, of both directions. A call with streams ends after them.
    pub fn open_calls(&self) -> usize {
        self.inner.session.shared.open_calls(self.inner.id)
    }

    /// Calls a method. More calls than the peer takes at once wait for their turn.
    ///
    /// # Errors
    /// When the arguments cannot be encoded, the call was answered with an error or not at all, or the answer is not an
    /// `R`.
    ///
    /// # Cancel safety
    /// Dropping the future cancels the call; the method may have been executed.
    pub async fn call<A, R>(&self, method: MethodId, args: &A) -> Result<R, CallError>
    where
        A: Serialize + ?Sized,
        R: DeserializeOwned,
    {
        self.request(method, Metadata::new(), args).await?.decode()
    }

    /// Calls a method with metadata, and returns the answer with what came along.
    ///
    /// # Errors
    /// When the arguments cannot be encoded, or no answer comes. An answer that is an error is one for
    /// [`Response::decode`] to tell.
    ///
    /// # Cancel safety
    /// Dropping the future cancels the call; the method may have been executed.
    pub async fn request<A: Serialize + ?Sized>(
        &self,
        method: MethodId,
        metadata: Metadata,
        args: &A,
    ) -> Result<Response, CallError> {
        let encoded = encode(args)?;
        let ConnectionInner { session, id, cell, .. } = &*self.inner;
        CallFuture::new((&session.shared, cell), *id, method.0, metadata, encoded).await
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("id", &self.inner.id).field("end", &self.end()).finish_non_exhaustive()
    }
}

impl Drop for ConnectionInner {
    fn drop(&mut self) {
        if self.cell.end().is_none() {
            self.session.shared.close_connection(self.id, Reason::new(code::NONE, ""));
        }
    }
}

//! Opens of the peer's that the application answers itself.

use std::fmt;
use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use tollway_protocol::error::{Reason, code};
use tollway_protocol::id::{ConnectionId, Parity};
use tollway_protocol::limits::ConnectionLimits;
use tollway_protocol::metadata::Metadata;

use crate::auth::{Identity, SessionPeer};
use crate::conduit::PeerInfo;
use crate::future::BoxFuture;
use crate::shared::Shared;

/// Decides what becomes of an open, in a task of its own: for as long as it likes, while the session goes on.
///
/// A function from an [`IncomingOpen`] to a future is one.
pub trait Acceptor: Send + Sync + 'static {
    /// Answers the open, and goes on with what it leads to. An open that is dropped is rejected.
    fn accept(&self, open: IncomingOpen) -> BoxFuture<'static, ()>;
}

impl<F, Fut> Acceptor for F
where
    F: Fn(IncomingOpen) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = ()> + Send + 'static,
{
    fn accept(&self, open: IncomingOpen) -> BoxFuture<'static, ()> {
        Box::pin(self(open))
    }
}

/// A connection that the peer asks for. Dropped without an answer, it is rejected with `DROPPED`.
pub struct IncomingOpen {
    pub(crate) shared: Arc<Shared>,
    pub(crate) connection: ConnectionId,
    pub(crate) request: OpenDetails,
    /// What this side receives on connections that it accepts.
    pub(crate) own_limits: ConnectionLimits,
    pub(crate) peer: Arc<SessionPeer>,
    pub(crate) answered: bool,
}

/// What an Open says.
#[derive(Debug)]
pub(crate) struct OpenDetails {
    pub(crate) service: String,
    pub(crate) metadata: Metadata,
    pub(crate) limits: ConnectionLimits,
    pub(crate) parity: Parity,
    pub(crate) credential: Bytes,
}

impl fmt::Debug for IncomingOpen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IncomingOpen")
            .field("connection", &self.connection)
            .field("service", &self.request.service)
            .field("peer", &self.peer.info)
            .finish_non_exhaustive()
    }
}

impl IncomingOpen {
    /// The id in the session.
    pub fn connection(&self) -> ConnectionId {
        self.connection
    }

    /// The service that is asked for.
    pub fn service(&self) -> &str {
        &self.request.service
    }

    /// The opener's metadata.
    pub fn metadata(&self) -> &Metadata {
        &self.request.metadata
    }

    /// What the opener receives.
    pub fn limits(&self) -> &ConnectionLimits {
        &self.request.limits
    }

    /// The other end of the conduit.
    pub fn peer(&self) -> &PeerInfo {
        &self.peer.info
    }

    /// Who the peer has proved to be, if an [`Authenticator`](crate::auth::Authenticator) has decided about it.
    pub fn identity(&self) -> Option<&Identity> {
        self.peer.identity.get()
    }

    /// Says no.
    pub fn reject(self, reason: Reason) {
        self.reject_with(reason, Metadata::new(), Bytes::new());
    }

    pub(crate) fn reject_with(mut self, reason: Reason, metadata: Metadata, terms: Bytes) {
        self.answered = true;
        self.shared.reject(self.connection, reason, metadata, terms);
    }
}

impl Drop for IncomingOpen {
    fn drop(&mut self) {
        if !self.answered {
            let reason = Reason::new(code::DROPPED, "nobody answered the open");
            self.shared.reject(self.connection, reason, Metadata::new(), Bytes::new());
        }
    }
}

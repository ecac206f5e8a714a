//! What the handles of one connection share with its handlers: its service, its end, and what handlers keep with it.

use std::sync::{Arc, OnceLock};

use tokio::sync::Notify;
use tollway_protocol::error::ConnectionEnd;
use tollway_protocol::id::ConnectionId;
use tollway_protocol::session::MoneyCount;
use tracing::Span;

use super::Shared;
use crate::auth::SessionPeer;
use crate::connection::Draining;
use crate::rpc::{ConnectionData, ServiceEntry};

/// What the handles of one connection share, and its handlers.
pub(crate) struct ConnectionCell {
    /// The session's tables hold the cell until the connection ends, and so each other.
    pub(crate) shared: Arc<Shared>,
    /// Boxed, because most cells are those of connections that are open.
    end: OnceLock<Box<(ConnectionEnd, Option<MoneyCount>)>>,
    /// One side takes no new calls.
    draining: OnceLock<Box<Draining>>,
    /// Notified when it begins to drain, and when it ends.
    ended: Notify,
    /// The service that this side serves on it.
    pub(crate) service: Option<Arc<ServiceEntry>>,
    /// Made for the first handler, if anybody wants it.
    span: OnceLock<Option<Box<Span>>>,
    /// Made for the first handler that keeps something: an idle connection is a small entry.
    data: OnceLock<Box<ConnectionData>>,
}

impl ConnectionCell {
    pub(crate) fn new(shared: &Arc<Shared>, service: Option<Arc<ServiceEntry>>) -> Arc<Self> {
        let (end, draining, ended, span, data) = Default::default();
        Arc::new(ConnectionCell { shared: shared.clone(), end, draining, ended, service, span, data })
    }

    /// The other end of the conduit.
    pub(crate) fn peer(&self) -> &SessionPeer {
        &self.shared.peer
    }

    /// The connection's span, in which its handlers run: `None` if nobody wants it. To be called without a lock, since a
    /// subscriber is user code.
    pub(crate) fn span(&self, id: ConnectionId) -> Option<&Span> {
        let make = || {
            let span = tracing::info_span!(
                target: "tollway::session",
                parent: &self.shared.span,
                "connection",
                "rpc.system.name" = "tollway",
                "rpc.service" = self.service.as_ref().map(|entry| entry.service.name()),
                "tollway.connection.id" = id.0,
            );
            (!span.is_disabled()).then(|| Box::new(span))
        };
        self.span.get_or_init(make).as_deref()
    }

    /// What handlers keep with the connection.
    pub(crate) fn data(&self) -> &ConnectionData {
        self.data.get_or_init(Box::default)
    }

    pub(crate) fn set_end(&self, end: ConnectionEnd, money: Option<MoneyCount>) {
        if self.end.set(Box::new((end, money))).is_ok() {
            self.ended.notify_waiters();
        }
    }

    pub(crate) fn end(&self) -> Option<&ConnectionEnd> {
        self.end.get().map(|end| &end.0)
    }

    /// The first to say it stands.
    pub(crate) fn set_draining(&self, draining: Draining) {
        if self.draining.set(Box::new(draining)).is_ok() {
            self.ended.notify_waiters();
        }
    }

    pub(crate) fn draining(&self) -> Option<&Draining> {
        self.draining.get().map(Box::as_ref)
    }

    /// Waits until a side takes no new calls, or the connection ends.
    pub(crate) async fn until_draining(&self) {
        loop {
            let changed = self.ended.notified();
            if self.draining().is_some() || self.end().is_some() {
                return;
            }
            changed.await;
        }
    }

    /// The counts of a paid connection as they stood in the end.
    pub(crate) fn final_money(&self) -> Option<MoneyCount> {
        self.end.get().and_then(|end| end.1)
    }

    pub(crate) async fn closed(&self) -> ConnectionEnd {
        loop {
            let ended = self.ended.notified();
            if let Some(end) = self.end() {
                return end.clone();
            }
            ended.await;
        }
    }
}

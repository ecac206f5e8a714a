//! What the handles of one connection share with its handlers: its service, its end, and what handlers keep with it.

use std::sync::{Arc, OnceLock};

use tokio::sync::Notify;
use tollway_protocol::error::ConnectionEnd;
use tollway_protocol::session::MoneyCount;

use super::Shared;
use crate::auth::SessionPeer;
use crate::rpc::{ConnectionData, ServiceEntry};

/// What the handles of one connection share, and its handlers.
pub(crate) struct ConnectionCell {
    /// The session's tables hold the cell until the connection ends, and so each other.
    pub(crate) shared: Arc<Shared>,
    /// Boxed, because most cells are those of connections that are open.
    end: OnceLock<Box<(ConnectionEnd, Option<MoneyCount>)>>,
    ended: Notify,
    /// The service that this side serves on it.
    pub(crate) service: Option<Arc<ServiceEntry>>,
    /// Made for the first handler that keeps something: an idle connection is a small entry.
    data: OnceLock<Box<ConnectionData>>,
}

impl ConnectionCell {
    pub(crate) fn new(shared: &Arc<Shared>, service: Option<Arc<ServiceEntry>>) -> Arc<Self> {
        let (end, ended, data) = Default::default();
        Arc::new(ConnectionCell { shared: shared.clone(), end, ended, service, data })
    }

    /// The other end of the conduit.
    pub(crate) fn peer(&self) -> &SessionPeer {
        &self.shared.peer
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

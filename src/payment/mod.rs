//! Paid connections: what runs beside the session of a connection that is a payment channel.

mod mailbox;

pub(crate) use mailbox::{Mailbox, PaymentEvent};

use crate::shared::{ConnectionCell, Shared};
use bytes::Bytes;
use std::sync::Arc;
use tollway_protocol::id::ConnectionId;
use tollway_protocol::limits::ConnectionLimits;
use tollway_protocol::metadata::Metadata;

/// Payee
#[derive(Debug)]
pub struct Payee {}

pub(crate) struct OpenRequest {
    pub(crate) shared: Arc<Shared>,
    pub(crate) payee: Arc<Payee>,
    pub(crate) cell: Arc<ConnectionCell>,
    pub(crate) connection: ConnectionId,
    pub(crate) service: String,
    pub(crate) metadata: Metadata,
    pub(crate) credential: Bytes,
    pub(crate) limits: ConnectionLimits,
}
impl OpenRequest {
    pub(crate) async fn answer(self) {}
}

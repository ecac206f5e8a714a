//! What is reserved for a call whose cost its handler learns while it works: a model's tokens, the pages of a search.
//!
//! The session holds the maximum of the method's price before the handler starts, out of what is leased, so it is
//! authorised and durable. The handler [commits](Reservation::commit) what the call costs; with the response that much is
//! charged, and the rest is free again. Every other end releases it: a failure costs nothing, a cancel, a deadline and a
//! lost connection cost the call price. A handler that has not answered when the reservation expires is dropped, and
//! has failed: a payer's money is not held for ever.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tollway_protocol::payment::Amount;

use crate::rpc::{BoxReply, Reply};

/// The money that is held for a call, as its handler sees it.
#[derive(Debug)]
pub struct Reservation {
    maximum: Amount,
    committed: Mutex<Option<Amount>>,
}

/// A cost above what is reserved. Nothing has changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a cost of {cost} base units is above the {maximum} that are reserved for the call")]
pub struct AboveReservation {
    /// The cost, in base units.
    pub cost: Amount,
    /// What is reserved, in base units.
    pub maximum: Amount,
}

impl Reservation {
    pub(super) fn new(maximum: Amount) -> Self {
        Reservation { maximum, committed: Mutex::new(None) }
    }

    /// The most that the call may cost, in base units.
    pub fn maximum(&self) -> Amount {
        self.maximum
    }

    /// States what the call costs, in base units; the last statement counts. It is charged with the answer, and never less
    /// than the call price; [`Reply::costing`] does the same for services that are written by hand.
    ///
    /// # Errors
    /// When it is above the maximum. What was stated before stands.
    pub fn commit(&self, cost: Amount) -> Result<(), AboveReservation> {
        if cost > self.maximum {
            return Err(AboveReservation { cost, maximum: self.maximum });
        }
        *self.committed.lock() = Some(cost);
        Ok(())
    }

    /// What was stated.
    pub fn committed(&self) -> Option<Amount> {
        *self.committed.lock()
    }
}

/// Runs a handler until its reservation expires, and puts into its answer what it has committed.
pub(super) fn hold(reservation: Arc<Reservation>, expires_in: Duration, handler: BoxReply) -> BoxReply {
    Box::pin(async move {
        let Ok(mut reply) = tokio::time::timeout(expires_in, handler).await else {
            tracing::warn!(?expires_in, maximum = %reservation.maximum, "a reservation expired before its handler had answered");
            return Reply::failed();
        };
        reply.cost = reply.cost.or(reservation.committed());
        reply
    })
}

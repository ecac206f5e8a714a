//! The record of one channel, as the payee keeps it.

use serde::{Deserialize, Serialize};
use tollway_protocol::payment::channel::{BrokenRecord, ChannelPhase, ChannelSnapshot};
use tollway_protocol::payment::{ChannelDescriptor, ChannelId};

/// A record that contradicts itself, or what was stored before.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// The descriptor or the counters are those of another channel.
    #[error("the record is that of channel {found}, not {id}")]
    WrongId {
        /// Under which it was to be stored.
        id: ChannelId,
        /// Of the descriptor or the counters.
        found: ChannelId,
    },
    /// The ceiling of the counters is not that of the descriptor's voucher protocol.
    #[error("the voucher ceiling is not that of the descriptor's protocol")]
    WrongCeiling,
    /// No channel can have these counters.
    #[error(transparent)]
    Broken(#[from] BrokenRecord),
    /// The descriptor is not the stored one.
    #[error("the descriptor differs from the stored one")]
    OtherDescriptor,
    /// A value that only rises would fall: the caller worked from a stale read.
    #[error("{0} would go back")]
    GoesBack(&'static str),
}

/// Everything that must survive of one channel: what its id is made of, and the counters of its
/// [`PaymentChannel`](tollway_protocol::payment::PaymentChannel).
///
/// Whoever serves a channel changes the counters by [`apply`](super::apply) and in no other way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChannelRecord {
    /// Set by the store; what compare-and-set compares.
    pub version: u64,
    /// What the channel's id is made of.
    pub descriptor: ChannelDescriptor,
    /// The counters, the vouchers and the phase.
    pub snapshot: ChannelSnapshot,
}

impl ChannelRecord {
    /// The record of a channel that was not stored before.
    pub const fn new(descriptor: ChannelDescriptor, snapshot: ChannelSnapshot) -> Self {
        ChannelRecord { version: 0, descriptor, snapshot }
    }

    /// Checks the record in itself, for storing it under `id`.
    ///
    /// # Errors
    /// The first rule that does not hold.
    pub fn check(&self, id: ChannelId) -> Result<(), RecordError> {
        for found in [self.descriptor.id(), self.snapshot.channel_id] {
            if found != id {
                return Err(RecordError::WrongId { id, found });
            }
        }
        if self.snapshot.voucher_ceiling != self.descriptor.protocol.max_amount() {
            return Err(RecordError::WrongCeiling);
        }
        Ok(self.snapshot.validate()?)
    }

    /// Checks that this record may follow `previous`: nothing goes back that only goes forward. `leased` may: an orderly
    /// close gives back what was not used.
    ///
    /// # Errors
    /// The first value that would go back.
    pub fn check_follows(&self, previous: &ChannelRecord) -> Result<(), RecordError> {
        if self.descriptor != previous.descriptor {
            return Err(RecordError::OtherDescriptor);
        }
        let (next, before) = (&self.snapshot, &previous.snapshot);
        let rising = [
            ("deposit", next.deposit >= before.deposit),
            ("accepted", next.accepted >= before.accepted),
            ("spent", next.spent >= before.spent),
            ("units", next.units >= before.units),
            ("settled", next.settled >= before.settled),
            ("epoch", next.epoch >= before.epoch),
            ("lost_in_flight", next.lost_in_flight >= before.lost_in_flight),
            ("phase", phase_follows(next.phase, before.phase)),
        ];
        match rising.into_iter().find(|(_, rises)| !rises) {
            Some((name, _)) => Err(RecordError::GoesBack(name)),
            None => Ok(()),
        }
    }
}

/// A channel moves towards its end, and what it closes by stands from the first.
fn phase_follows(next: ChannelPhase, before: ChannelPhase) -> bool {
    match (before, next) {
        (ChannelPhase::Open, _) => true,
        (ChannelPhase::Disputed { .. }, next) => next != ChannelPhase::Open,
        (ChannelPhase::Closing { close }, next) => {
            next == before || next == ChannelPhase::Finalized { close: Some(close) }
        }
        (ended, next) => next == ended,
    }
}

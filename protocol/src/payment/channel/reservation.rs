//! Reservations: money set aside for calls whose cost is known afterwards. In memory only; a crash releases them.
//!
//! ```text
//!  reserve ──► Held ──commit(cost)──► Due ──lease planned──► Planned ──lease durable──► gone: part of leased and spent
//!               │                      ▲                        │
//!               └ release · expiry     └──── lease abandoned ───┘
//! ```

use std::collections::BTreeMap;

use super::super::Amount;

/// Reservations of one channel at most. Each belongs to an open call, and calls have a limit of their own; this one
/// holds where that limit was raised without thought, at about 64 bytes each.
pub const MAX_RESERVATIONS: usize = 4096;

/// Names one reservation of one channel; never used again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ReservationId(u64);

/// Why a reservation was not committed or released.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ReservationError {
    /// It was never made, was released, has expired or is committed already.
    #[error("there is no such reservation: released, expired or committed already")]
    Unknown,
    /// The cost is above what was reserved.
    #[error("a cost of {cost} is above the {maximum} reserved for it")]
    AboveMaximum {
        /// The stated cost in base units.
        cost: Amount,
        /// What was reserved, in base units.
        maximum: Amount,
    },
    /// The channel is closing: nothing is charged any more.
    #[error(transparent)]
    Closed(#[from] super::ChannelClosed),
}

#[derive(Debug, Clone, Copy)]
enum Reservation {
    Held { maximum: Amount, expires_at_ms: u64 },
    Due { cost: Amount },
    Planned { cost: Amount },
}

/// All reservations of a channel and their sum.
#[derive(Debug, Clone, Default)]
pub(super) struct Reservations {
    entries: BTreeMap<ReservationId, Reservation>,
    next_id: u64,
    total: Amount,
}

impl Reservations {
    /// The sum of what is held, due and planned.
    pub(super) const fn total(&self) -> Amount {
        self.total
    }

    /// Holds `maximum`; the caller has checked that it is free. `None` when there are too many, or the sum overflows.
    pub(super) fn hold(&mut self, maximum: Amount, expires_at_ms: u64) -> Option<ReservationId> {
        if self.entries.len() >= MAX_RESERVATIONS {
            return None;
        }
        let total = self.total.checked_add(maximum)?;
        let id = ReservationId(self.next_id);
        self.next_id = self.next_id.checked_add(1)?;
        self.entries.insert(id, Reservation::Held { maximum, expires_at_ms });
        self.total = total;
        Some(id)
    }

    /// Turns a held reservation into a due cost; the rest is free at once.
    pub(super) fn make_due(&mut self, id: ReservationId, cost: Amount) -> Result<(), ReservationError> {
        let Some(Reservation::Held { maximum, .. }) = self.entries.get(&id).copied() else {
            return Err(ReservationError::Unknown);
        };
        let rest = maximum.checked_sub(cost).ok_or(ReservationError::AboveMaximum { cost, maximum })?;
        self.entries.insert(id, Reservation::Due { cost });
        self.total = self.total.saturating_sub(rest);
        Ok(())
    }

    /// Releases a held reservation and returns what it held.
    pub(super) fn release(&mut self, id: ReservationId) -> Result<Amount, ReservationError> {
        let Some(Reservation::Held { maximum, .. }) = self.entries.get(&id).copied() else {
            return Err(ReservationError::Unknown);
        };
        self.entries.remove(&id);
        self.total = self.total.saturating_sub(maximum);
        Ok(maximum)
    }

    /// Releases every held reservation whose deadline has come.
    pub(super) fn expire(&mut self, now_ms: u64) -> Vec<ReservationId> {
        let due = |reservation: &Reservation| match reservation {
            Reservation::Held { expires_at_ms, .. } => *expires_at_ms <= now_ms,
            Reservation::Due { .. } | Reservation::Planned { .. } => false,
        };
        let expired: Vec<_> = self.entries.iter().filter(|(_, entry)| due(entry)).map(|(id, _)| *id).collect();
        expired.into_iter().filter(|id| self.release(*id).is_ok()).collect()
    }

    /// When the next held reservation expires, in milliseconds of the caller's clock.
    pub(super) fn next_expiry_ms(&self) -> Option<u64> {
        self.entries
            .values()
            .filter_map(|reservation| match reservation {
                Reservation::Held { expires_at_ms, .. } => Some(*expires_at_ms),
                Reservation::Due { .. } | Reservation::Planned { .. } => None,
            })
            .min()
    }

    /// Whether a cost waits for a lease.
    pub(super) fn has_due(&self) -> bool {
        self.entries.values().any(|entry| matches!(entry, Reservation::Due { .. }))
    }

    /// Marks every due cost as part of the lease that is being planned; returns them and their sum.
    pub(super) fn plan(&mut self) -> (Vec<ReservationId>, Amount) {
        let (mut ids, mut sum) = (Vec::new(), Amount::ZERO);
        for (id, entry) in &mut self.entries {
            if let Reservation::Due { cost } = *entry {
                *entry = Reservation::Planned { cost };
                ids.push(*id);
                sum = sum.saturating_add(cost);
            }
        }
        (ids, sum)
    }

    /// The planned costs are in the lease now.
    pub(super) fn finish_planned(&mut self, ids: &[ReservationId]) {
        for id in ids {
            if let Some(Reservation::Planned { cost }) = self.entries.remove(id) {
                self.total = self.total.saturating_sub(cost);
            }
        }
    }

    /// The planned costs are due again: the lease was not written.
    pub(super) fn unplan(&mut self, ids: &[ReservationId]) {
        for id in ids {
            if let Some(entry) = self.entries.get_mut(id)
                && let Reservation::Planned { cost } = *entry
            {
                *entry = Reservation::Due { cost };
            }
        }
    }
}

//! What the tables of calls and streams take of memory.

use std::hash::{BuildHasher, Hash};

use std::collections::HashMap;

use super::RelayError;
use super::end::End;

/// What a call or a stream that has not ended counts against the budget of who began it: its entry, about 65 bytes, and as
/// much again for places that are free because tables double.
pub(super) const ENTRY_BYTES: u64 = 128;

/// Entries for which a table that was larger keeps room, so that a few calls at a time don't make it grow and shrink.
const KEPT: usize = 64;

impl End {
    /// Charges entries of the tables. `[session.memory.bound]`
    pub(super) fn charge_tables(&mut self, entries: usize) -> Result<(), RelayError> {
        match self.tables.try_charge((entries as u64).saturating_mul(ENTRY_BYTES)) {
            true => Ok(()),
            false => Err(RelayError::OutOfMemory),
        }
    }
}

/// Gives back what a table has grown by, once three quarters are free: those who fill one only to empty it again would
/// be charged nothing for it. Half of the room stays free, so that this is as rare as growing is.
pub(super) fn shrink<K: Eq + Hash, V, S: BuildHasher>(table: &mut HashMap<K, V, S>) {
    let (entries, room) = (table.len().max(KEPT), table.capacity());
    if entries < room / 4 {
        table.shrink_to(entries.saturating_mul(2));
    }
}

//! The bridge from the channel machine to the store: one update of the machine, written by compare-and-set.

use tollway_protocol::payment::ChannelId;
use tollway_protocol::payment::channel::{RecordUpdate, StaleUpdate};

use super::{ChannelRecord, ChannelStore, StoreError};

/// How often an update is tried against other writers of its channel. Each lost try means that another one succeeded, and
/// a channel has few writers at once: its connection, a settlement, a top-up, and one that takes over.
pub const MAX_APPLY_ATTEMPTS: usize = 64;

/// Why an update was not written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ApplyError {
    /// The channel has no record: it was never stored, or is evicted.
    #[error("the channel {0} has no record")]
    NoRecord(ChannelId),
    /// The record has moved on in a way that rules the update out: the channel is restored from it, or given up.
    #[error(transparent)]
    Stale(#[from] StaleUpdate),
    /// Others wrote first each time.
    #[error("other writers were first {MAX_APPLY_ATTEMPTS} times")]
    Contended,
    /// The store refused or failed. After [`StoreError::Backend`] it is unknown whether the update was written.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// Applies an update of a channel to its record, whoever else writes it meanwhile. When this returns `Ok`, the update is
/// durable, and the record is the one that has it.
///
/// An update that the record has already is not written again.
///
/// # Errors
/// See [`ApplyError`]. Nothing is written then, but for [`StoreError::Backend`].
///
/// # Cancel safety
/// Dropping the future leaves it unknown whether the update was written; restore the channel from the store.
pub async fn apply(store: &dyn ChannelStore, update: &RecordUpdate) -> Result<ChannelRecord, ApplyError> {
    let id = update.channel_id();
    for _ in 0..MAX_APPLY_ATTEMPTS {
        let before = store.load(id).await?.ok_or(ApplyError::NoRecord(id))?;
        let mut next = before.clone();
        update.apply_to(&mut next.snapshot)?;
        if next == before {
            return Ok(before);
        }
        match store.update(id, Some(before.version), next.clone()).await {
            Ok(version) => return Ok(ChannelRecord { version, ..next }),
            Err(StoreError::Conflict { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(ApplyError::Contended)
}

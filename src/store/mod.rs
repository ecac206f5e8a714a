//! Where channels survive a restart: one record for each channel, written atomically.
//!
//! A store is a map from channel id to [`ChannelRecord`] with compare-and-set. There is one record and one write for all
//! that must agree (voucher, spending, owner epoch, phase), so that no two places can drift. The channel machine plans,
//! [`apply()`] writes, the machine commits. All stores share [`check_update`], so they refuse the same things, and all pass
//! `tests/store_conformance.rs`. [`MemoryStore`] ends with the process; `RedbStore`, behind the feature `redb`, does not.
//!
//! ```text
//!            update(None)          update(Some(version))
//!  absent ───────────────▶ stored ──────────────────────▶ stored
//!     ▲                      │
//!     └──── evict(version) ──┘   finalised records only
//! ```

mod apply;
mod memory;
mod record;
#[cfg(feature = "redb")]
mod redb;
mod watch;

pub use apply::{ApplyError, MAX_APPLY_ATTEMPTS, apply};
pub use memory::MemoryStore;
pub use record::{ChannelRecord, RecordError};
#[cfg(feature = "redb")]
pub use redb::RedbStore;
#[cfg(feature = "redb")]
pub(crate) use redb::verify_file;
pub use watch::{ChannelWatch, WatchClosed, Watchers};

use serde::{Deserialize, Serialize};
use tollway_protocol::metadata::Metadata;
use tollway_protocol::payment::channel::ChannelPhase;
use tollway_protocol::payment::{Amount, ChannelId, Hash};

use crate::future::BoxFuture;

/// Why a store did not do as it was told.
///
/// None of them means "need a voucher": a failing store is an error of its own, never a reason to ask for money.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The record is not at the expected version: somebody else wrote first. Load, decide again, update again.
    #[error("the record is at version {current:?}, not at {expected:?}")]
    Conflict {
        /// The version that the caller had seen; `None` for "there is no record".
        expected: Option<u64>,
        /// The version that the store has; `None` when there is no record.
        current: Option<u64>,
    },
    /// The record contradicts itself, its id, or what the store holds.
    #[error("the record is refused: {0}")]
    Record(#[from] RecordError),
    /// Only finalised channels are evicted.
    #[error("the channel is not finalised")]
    NotFinalized,
    /// The store itself failed; whether an update took effect is unknown until it is loaded again.
    #[error("the store failed: {0}")]
    Backend(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// A durable map of channel records.
///
/// Every method takes effect when its future is polled. An update that returned `Ok` is durable, as far as the store
/// is; one whose future was dropped may or may not have taken effect.
pub trait ChannelStore: Send + Sync + 'static {
    /// The record of a channel, or `None` when there is none.
    ///
    /// That there is none says nothing of the channel: an unknown id always consults the escrow.
    ///
    /// # Errors
    /// [`StoreError::Backend`].
    fn load(&self, id: ChannelId) -> BoxFuture<'_, Result<Option<ChannelRecord>, StoreError>>;

    /// Writes `record` if the channel's record is still at `expected_version` (`None`: if there is none), and returns
    /// the new version. [`ChannelRecord::version`] of the argument is ignored.
    ///
    /// Versions rise over the whole store and are never used again, so that a version which was seen once names one
    /// content for ever, also across an eviction.
    ///
    /// # Errors
    /// [`StoreError::Conflict`] when somebody else wrote first, [`StoreError::Record`] for a record that must not be
    /// stored, [`StoreError::Backend`].
    fn update(
        &self,
        id: ChannelId,
        expected_version: Option<u64>,
        record: ChannelRecord,
    ) -> BoxFuture<'_, Result<u64, StoreError>>;

    /// Forgets the record of a finalised channel, if it is still at `expected_version`.
    ///
    /// # Errors
    /// [`StoreError::Conflict`], [`StoreError::NotFinalized`], [`StoreError::Backend`].
    fn evict(&self, id: ChannelId, expected_version: u64) -> BoxFuture<'_, Result<(), StoreError>>;

    /// Watches a channel for changes, whether or not it has a record.
    ///
    /// First watch, then load: every change after the call of `watch` wakes the watcher.
    fn watch(&self, id: ChannelId) -> ChannelWatch;

    /// Up to `limit` ids in ascending order, of those above `after`.
    ///
    /// # Errors
    /// [`StoreError::Backend`].
    fn list(&self, after: Option<ChannelId>, limit: usize) -> BoxFuture<'_, Result<Vec<ChannelId>, StoreError>>;

    /// What became of a call with an idempotency key, if it was kept. A store that does not survive the process keeps none:
    /// the payee remembers them itself.
    ///
    /// # Errors
    /// [`StoreError::Backend`].
    fn load_answer(&self, id: Hash) -> BoxFuture<'_, Result<Option<KeptAnswer>, StoreError>> {
        let _ = id;
        Box::pin(std::future::ready(Ok(None)))
    }

    /// Keeps what became of a call with an idempotency key, or with `None` forgets it. It is durable when it returns. The
    /// oldest are forgotten when there are more than [`MAX_KEYS`](crate::payment::MAX_KEYS).
    ///
    /// # Errors
    /// [`StoreError::Backend`].
    fn keep_answer(&self, id: Hash, answer: Option<KeptAnswer>) -> BoxFuture<'_, Result<(), StoreError>> {
        let _ = (id, answer);
        Box::pin(std::future::ready(Ok(())))
    }

    /// Whether what is stored is there after the process has ended. If it is not, channels are closed before a payee
    /// stops; if it is, they stay open for payers that come back.
    fn survives_restart(&self) -> bool {
        false
    }
}

/// What became of a call with an idempotency key.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptAnswer {
    /// The keccak256 of its arguments.
    pub args: Hash,
    /// When it was noted, in milliseconds since the Unix epoch.
    pub made_ms: u64,
    /// The answer; `None` for one that was not kept, or of a call that may have been executed.
    pub body: Option<AnswerBody>,
    /// What all attempts have cost, in base units; `None` while one is under way. After a crash then, the answer is given
    /// to nobody: neither free nor charged twice.
    pub charged: Option<Amount>,
}

/// An answer as it was given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnswerBody {
    /// Whether it is the method's own error.
    pub is_error: bool,
    /// What was sent along.
    pub metadata: Metadata,
    /// The payload.
    pub payload: Vec<u8>,
    /// The cost that it stated, in base units.
    pub cost: Option<Amount>,
}

/// What every store checks before it writes, inside the transaction that writes: the version, the record in itself,
/// and that nothing goes back which only goes forward.
///
/// # Errors
/// [`StoreError::Conflict`] or [`StoreError::Record`].
pub fn check_update(
    id: ChannelId,
    current: Option<&ChannelRecord>,
    expected_version: Option<u64>,
    next: &ChannelRecord,
) -> Result<(), StoreError> {
    let version = current.map(|record| record.version);
    if version != expected_version {
        return Err(StoreError::Conflict { expected: expected_version, current: version });
    }
    next.check(id)?;
    if let Some(current) = current {
        next.check_follows(current)?;
    }
    Ok(())
}

/// What every store checks before it evicts, inside the transaction that does.
///
/// # Errors
/// [`StoreError::Conflict`] or [`StoreError::NotFinalized`].
pub fn check_evict(current: Option<&ChannelRecord>, expected_version: u64) -> Result<(), StoreError> {
    match current {
        Some(record) if record.version == expected_version => match record.snapshot.phase {
            ChannelPhase::Finalized { .. } => Ok(()),
            _ => Err(StoreError::NotFinalized),
        },
        _ => Err(StoreError::Conflict {
            expected: Some(expected_version),
            current: current.map(|record| record.version),
        }),
    }
}

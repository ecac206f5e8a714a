//! A store that lives as long as the process: for tests, and for payees who settle before they stop.

use std::collections::BTreeMap;
use std::ops::Bound;

use parking_lot::Mutex;
use tollway_protocol::payment::ChannelId;

use super::{ChannelRecord, ChannelStore, ChannelWatch, StoreError, Watchers, check_evict, check_update};
use crate::future::BoxFuture;

/// Records in memory. Nothing survives the process.
#[derive(Debug, Default)]
pub struct MemoryStore {
    state: Mutex<State>,
    watchers: Watchers,
}

#[derive(Debug, Default)]
struct State {
    records: BTreeMap<ChannelId, ChannelRecord>,
    last_version: u64,
}

impl State {
    fn next_version(&mut self) -> u64 {
        // At a thousand million updates a second it would take 584 years to get there.
        self.last_version = self.last_version.checked_add(1).expect("2^64 updates are never reached");
        self.last_version
    }
}

impl MemoryStore {
    /// An empty store.
    pub fn new() -> Self {
        Self::default()
    }

    fn write(&self, id: ChannelId, expected: Option<u64>, mut record: ChannelRecord) -> Result<u64, StoreError> {
        let version = {
            let mut state = self.state.lock();
            check_update(id, state.records.get(&id), expected, &record)?;
            record.version = state.next_version();
            let version = record.version;
            state.records.insert(id, record);
            version
        };
        self.watchers.notify(id, version);
        Ok(version)
    }

    fn forget(&self, id: ChannelId, expected_version: u64) -> Result<(), StoreError> {
        let version = {
            let mut state = self.state.lock();
            check_evict(state.records.get(&id), expected_version)?;
            state.records.remove(&id);
            state.next_version()
        };
        self.watchers.notify(id, version);
        Ok(())
    }
}

impl ChannelStore for MemoryStore {
    fn load(&self, id: ChannelId) -> BoxFuture<'_, Result<Option<ChannelRecord>, StoreError>> {
        Box::pin(async move { Ok(self.state.lock().records.get(&id).cloned()) })
    }

    fn update(
        &self,
        id: ChannelId,
        expected_version: Option<u64>,
        record: ChannelRecord,
    ) -> BoxFuture<'_, Result<u64, StoreError>> {
        Box::pin(async move { self.write(id, expected_version, record) })
    }

    fn evict(&self, id: ChannelId, expected_version: u64) -> BoxFuture<'_, Result<(), StoreError>> {
        Box::pin(async move { self.forget(id, expected_version) })
    }

    fn watch(&self, id: ChannelId) -> ChannelWatch {
        self.watchers.subscribe(id)
    }

    fn list(&self, after: Option<ChannelId>, limit: usize) -> BoxFuture<'_, Result<Vec<ChannelId>, StoreError>> {
        Box::pin(async move {
            let above = after.map_or(Bound::Unbounded, Bound::Excluded);
            let state = self.state.lock();
            Ok(state.records.range((above, Bound::Unbounded)).map(|(id, _)| *id).take(limit).collect())
        })
    }
}

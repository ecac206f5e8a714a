//! Waking those who wait for a channel to change, with a stored permit: a change between two waits is never lost.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use tokio::sync::watch;
use tollway_protocol::payment::ChannelId;

/// The store was dropped: nothing will change any more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the store has been dropped")]
pub struct WatchClosed;

/// Sees the changes of one channel.
#[derive(Debug)]
pub struct ChannelWatch(watch::Receiver<u64>);

impl ChannelWatch {
    /// Waits until the channel has changed since the last time this returned (or since the watch began), and returns
    /// the version of the latest change. Returns at once when it already has.
    ///
    /// # Errors
    /// When the store has been dropped.
    ///
    /// # Cancel safety
    /// Dropping the future loses no change: the next call returns at once.
    pub async fn changed(&mut self) -> Result<u64, WatchClosed> {
        self.0.changed().await.map_err(|_| WatchClosed)?;
        Ok(*self.0.borrow_and_update())
    }
}

/// The watchers of a store: every implementation has one, and tells it each change after it is durable.
#[derive(Debug)]
pub struct Watchers {
    channels: Mutex<Channels>,
}

#[derive(Debug)]
struct Channels {
    senders: BTreeMap<ChannelId, watch::Sender<u64>>,
    /// At this size the entries that nobody watches any more are swept out, so that the map stays within twice the
    /// channels that are watched.
    sweep_at: usize,
}

/// The smallest size at which a sweep is worth its walk.
const SWEEP_AT_LEAST: usize = 64;

impl Default for Watchers {
    fn default() -> Self {
        Watchers { channels: Mutex::new(Channels { senders: BTreeMap::new(), sweep_at: SWEEP_AT_LEAST }) }
    }
}

impl Watchers {
    /// Begins to watch a channel.
    pub fn subscribe(&self, id: ChannelId) -> ChannelWatch {
        let mut channels = self.channels.lock();
        if channels.senders.len() >= channels.sweep_at {
            channels.senders.retain(|_, sender| sender.receiver_count() > 0);
            channels.sweep_at = SWEEP_AT_LEAST.max(channels.senders.len() * 2);
        }
        let sender = channels.senders.entry(id).or_insert_with(|| watch::Sender::new(0));
        ChannelWatch(sender.subscribe())
    }

    /// Wakes the watchers of a channel that is now at `version`.
    pub fn notify(&self, id: ChannelId, version: u64) {
        let mut channels = self.channels.lock();
        if let Some(sender) = channels.senders.get(&id) {
            // Two writers may come here in the other order than they wrote: the version stays the latest, and both wake.
            sender.send_modify(|latest| *latest = version.max(*latest));
            if sender.receiver_count() == 0 {
                channels.senders.remove(&id);
            }
        }
    }
}

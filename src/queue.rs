//! Queues: the places of this process where something waits, each with a name, a bound, and how full it is and was.
//!
//! A queue of the process itself, such as that of a file's thread, is a `channel` or has a `Gauge`, and enters the
//! registry under its name; [`snapshot`] lists those that live. What waits in a session is counted where it lies, by the
//! machine; a [`SessionSnapshot`](crate::observe::SessionSnapshot) lists it in the same form. So an operator whose system
//! stands still sees where.
//!
//! Invariant: nothing here is on the way of a call or an item. A gauge is a few atomic counters.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

/// What is counted in a queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Unit {
    /// Things, whatever their size.
    Entries,
    /// Their bytes.
    Bytes,
}

/// A queue at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct QueueSnapshot {
    /// What it is, such as `session.payments`. Several may have one name: they are listed one by one.
    pub name: String,
    /// What the numbers count.
    pub unit: Unit,
    /// What it holds at most.
    pub capacity: u64,
    /// What it holds.
    pub depth: u64,
    /// What it has held at most.
    pub high_water: u64,
    /// For how long nothing has left it, although something is in it; `None` if it is empty, or where that is not measured.
    pub stalled: Option<Duration>,
}

impl QueueSnapshot {
    /// One that is counted by who owns it.
    pub(crate) fn new(name: &str, unit: Unit, capacity: u64, depth: u64, high_water: u64) -> Self {
        let high_water = high_water.max(depth);
        QueueSnapshot { name: name.to_owned(), unit, capacity, depth, high_water, stalled: None }
    }
}

/// The gauges of the process. Those of queues that are gone are forgotten by the next one that enters.
static REGISTRY: Mutex<Vec<Weak<Gauge>>> = Mutex::new(Vec::new());

/// The origin of the times that gauges keep.
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// The queues of this process that belong to no session, in the order of their names.
pub fn snapshot() -> Vec<QueueSnapshot> {
    let gauges: Vec<Arc<Gauge>> = REGISTRY.lock().iter().filter_map(Weak::upgrade).collect();
    let mut queues: Vec<QueueSnapshot> = gauges.iter().map(|gauge| gauge.snapshot()).collect();
    queues.sort_by(|one, other| one.name.cmp(&other.name));
    queues
}

/// Counts what is in a queue, for as long as it lives.
#[derive(Debug)]
pub(crate) struct Gauge {
    name: String,
    capacity: u64,
    depth: AtomicU64,
    high_water: AtomicU64,
    /// Nanoseconds since [`START`] at which something left it last, or came when it was empty.
    moved: AtomicU64,
}

impl Gauge {
    /// Enters the registry.
    pub(crate) fn register(name: impl Into<String>, capacity: usize) -> Arc<Self> {
        let (depth, high_water, moved) = Default::default();
        let gauge = Arc::new(Gauge { name: name.into(), capacity: capacity as u64, depth, high_water, moved });
        let mut registry = REGISTRY.lock();
        registry.retain(|known| known.strong_count() > 0);
        registry.push(Arc::downgrade(&gauge));
        gauge
    }

    fn now() -> u64 {
        u64::try_from(START.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Something is in the queue until the result is dropped.
    pub(crate) fn enter(self: &Arc<Self>) -> Inside {
        // No other memory is guarded by the counters, so no ordering is needed.
        let before = self.depth.fetch_add(1, Ordering::Relaxed);
        self.high_water.fetch_max(before + 1, Ordering::Relaxed);
        if before == 0 {
            self.moved.store(Gauge::now(), Ordering::Relaxed);
        }
        Inside(self.clone())
    }

    /// So much is in the queue, whose own count is the right one.
    pub(crate) fn set(&self, depth: usize) {
        self.depth.store(depth as u64, Ordering::Relaxed);
        self.high_water.fetch_max(depth as u64, Ordering::Relaxed);
    }

    fn snapshot(&self) -> QueueSnapshot {
        let (depth, high_water) = (self.depth.load(Ordering::Relaxed), self.high_water.load(Ordering::Relaxed));
        let moved = self.moved.load(Ordering::Relaxed);
        let stalled = (depth > 0 && moved > 0).then(|| Duration::from_nanos(Gauge::now().saturating_sub(moved)));
        let queue = QueueSnapshot::new(&self.name, Unit::Entries, self.capacity, depth, high_water);
        QueueSnapshot { stalled, ..queue }
    }
}

/// Something in a queue with a [`Gauge`].
#[derive(Debug)]
pub(crate) struct Inside(Arc<Gauge>);

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.depth.fetch_sub(1, Ordering::Relaxed);
        self.0.moved.store(Gauge::now(), Ordering::Relaxed);
    }
}

/// A bounded channel with a name.
#[cfg(feature = "redb")]
pub(crate) fn channel<T>(name: impl Into<String>, capacity: usize) -> (Sender<T>, Receiver<T>) {
    let (sender, receiver) = tokio::sync::mpsc::channel(capacity);
    let gauge = Gauge::register(name, capacity);
    (Sender { sender, gauge }, Receiver { receiver, batch: Vec::new() })
}

/// The way into a [`channel`].
#[cfg(feature = "redb")]
pub(crate) struct Sender<T> {
    sender: tokio::sync::mpsc::Sender<(T, Inside)>,
    gauge: Arc<Gauge>,
}

#[cfg(feature = "redb")]
impl<T> std::fmt::Debug for Sender<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sender").field("gauge", &self.gauge).finish_non_exhaustive()
    }
}

#[cfg(feature = "redb")]
impl<T> Sender<T> {
    /// Waits for a place, in the order of coming. `false` if nobody takes anything out any more.
    ///
    /// # Cancel safety
    /// A dropped future has sent nothing.
    pub(crate) async fn send(&self, value: T) -> bool {
        let Ok(place) = self.sender.reserve().await else { return false };
        place.send((value, self.gauge.enter()));
        true
    }
}

/// The way out of a [`channel`].
#[cfg(feature = "redb")]
pub(crate) struct Receiver<T> {
    receiver: tokio::sync::mpsc::Receiver<(T, Inside)>,
    batch: Vec<(T, Inside)>,
}

#[cfg(feature = "redb")]
impl<T> Receiver<T> {
    /// Blocks for the next ones, `most` at most. Returns how many there were: none when all senders are gone.
    pub(crate) fn blocking_recv_many(&mut self, into: &mut Vec<T>, most: usize) -> usize {
        let count = self.receiver.blocking_recv_many(&mut self.batch, most);
        into.extend(self.batch.drain(..).map(|(value, _inside)| value));
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(name: &str) -> Vec<QueueSnapshot> {
        snapshot().into_iter().filter(|queue| queue.name == name).collect()
    }

    #[test]
    fn a_gauge_tells_how_full_its_queue_is_and_was_and_goes_with_it() {
        let gauge = Gauge::register("test.gauge", 10);
        assert_eq!(seen("test.gauge"), [QueueSnapshot::new("test.gauge", Unit::Entries, 10, 0, 0)]);
        let mut inside: Vec<_> = (0..3).map(|_| gauge.enter()).collect();
        inside.pop();
        let [queue] = &seen("test.gauge")[..] else { panic!() };
        assert_eq!((queue.depth, queue.high_water), (2, 3));
        assert!(queue.stalled.is_some(), "something waits");
        drop(inside);
        let [queue] = &seen("test.gauge")[..] else { panic!() };
        assert_eq!((queue.depth, queue.high_water, queue.stalled), (0, 3, None));
        gauge.set(7);
        assert_eq!((seen("test.gauge")[0].depth, seen("test.gauge")[0].high_water), (7, 7));
        let twin = Gauge::register("test.gauge", 10);
        assert_eq!(seen("test.gauge").len(), 2, "one name, two queues");
        drop((gauge, twin));
        assert!(seen("test.gauge").is_empty());
    }

    #[cfg(feature = "redb")]
    #[test]
    fn a_channel_is_bounded_and_counts_what_waits_in_it() {
        let (sender, mut receiver) = channel("test.channel", 2);
        let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
        runtime.block_on(async {
            assert!(sender.send(1).await && sender.send(2).await);
            let mut third = std::pin::pin!(sender.send(3));
            let waits = std::future::poll_fn(|cx| std::task::Poll::Ready(third.as_mut().poll(cx).is_pending())).await;
            assert!(waits, "it is full");
        });
        assert_eq!((seen("test.channel")[0].depth, seen("test.channel")[0].capacity), (2, 2));
        let mut taken = Vec::new();
        assert_eq!((receiver.blocking_recv_many(&mut taken, 10), &taken[..]), (2, &[1, 2][..]));
        assert_eq!((seen("test.channel")[0].depth, seen("test.channel")[0].high_water), (0, 2));
        drop(receiver);
        assert!(!runtime.block_on(sender.send(4)));
    }
}

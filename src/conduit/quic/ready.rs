//! Which lanes have something to do: a waker for each lane and a queue of those that were woken, so that a poll costs
//! what happened and not what there is.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Wake, Waker};

use parking_lot::Mutex;

/// The lanes of one half that were woken.
#[derive(Debug, Default)]
pub(super) struct ReadyLanes {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Each at most once, so the lanes bound it.
    woken: Vec<Arc<LaneWaker>>,
    /// The task that polls this half.
    task: Option<Waker>,
}

/// Wakes one lane, which is known by its key.
#[derive(Debug)]
pub(super) struct LaneWaker {
    key: u64,
    queued: AtomicBool,
    ready: Arc<ReadyLanes>,
}

impl LaneWaker {
    pub(super) fn new(key: u64, ready: &Arc<ReadyLanes>) -> Arc<Self> {
        Arc::new(Self { key, queued: AtomicBool::new(false), ready: ready.clone() })
    }
}

impl Wake for LaneWaker {
    fn wake(self: Arc<Self>) {
        if self.queued.swap(true, Ordering::AcqRel) {
            return;
        }
        let mut state = self.ready.state.lock();
        let task = state.task.take();
        state.woken.push(self.clone());
        drop(state);
        if let Some(task) = task {
            task.wake();
        }
    }
}

impl ReadyLanes {
    /// Remembers whom to wake, and appends the keys of the lanes that were woken since the last time.
    pub(super) fn take(&self, cx: &Context<'_>, keys: &mut impl Extend<u64>) {
        let mut state = self.state.lock();
        if !state.task.as_ref().is_some_and(|task| task.will_wake(cx.waker())) {
            state.task = Some(cx.waker().clone());
        }
        keys.extend(state.woken.drain(..).map(|lane| {
            // From here on it may be woken again.
            lane.queued.store(false, Ordering::Release);
            lane.key
        }));
    }
}

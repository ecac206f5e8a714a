//! A session's driver and its conduit's [engine](crate::conduit::Conduit::take_engine) in one task.
//!
//! Each has a bell for a waker. A bell that is rung while the task is being polled only leaves a mark, and the loop finds
//! it: so what the two have to say to each other costs no wake. From outside it wakes the task.
//!
//! ```text
//! bell:  mark, then look whether the task is inside       task:  leave, then look for marks
//! ```
//!
//! Both orders are sequentially consistent, so one of the two sees the other.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::task::{Context, Poll, Wake, Waker};

use parking_lot::Mutex;

use crate::future::BoxFuture;

/// Turns of both before other tasks of the worker have theirs.
const TURNS: usize = 16;

/// Polls both until the driver is ready. Then the engine is dropped.
pub(crate) struct Together<D> {
    engine: Option<BoxFuture<'static, ()>>,
    driver: D,
    house: Arc<House>,
    /// The engine's and the driver's.
    bells: [(Arc<Bell>, Waker); 2],
}

#[derive(Default)]
struct House {
    /// The task is being polled.
    inside: AtomicBool,
    task: Mutex<Option<Waker>>,
}

struct Bell {
    rung: AtomicBool,
    house: Arc<House>,
}

impl Wake for Bell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        // Who rang before has woken the task, or left it to the loop.
        if !self.rung.swap(true, SeqCst) && !self.house.inside.load(SeqCst) {
            let task = self.house.task.lock().clone();
            if let Some(task) = task {
                task.wake();
            }
        }
    }
}

impl House {
    fn enter(&self, waker: &Waker) {
        self.inside.store(true, SeqCst);
        let mut task = self.task.lock();
        if !task.as_ref().is_some_and(|task| task.will_wake(waker)) {
            *task = Some(waker.clone());
        }
    }
}

impl<D: Future<Output = ()> + Unpin> Together<D> {
    pub(crate) fn new(engine: BoxFuture<'static, ()>, driver: D) -> Self {
        let house = Arc::<House>::default();
        let bell = || {
            let bell = Arc::new(Bell { rung: AtomicBool::new(true), house: house.clone() });
            (bell.clone(), Waker::from(bell))
        };
        let bells = [bell(), bell()];
        Together { engine: Some(engine), driver, house, bells }
    }

    /// Gives each that was rung for its turn. `None` if none was.
    fn turn(&mut self) -> Option<Poll<()>> {
        let [(engine_bell, engine_waker), (driver_bell, driver_waker)] = &self.bells;
        let engine_rung = engine_bell.rung.swap(false, SeqCst);
        if engine_rung
            && let Some(engine) = &mut self.engine
            && engine.as_mut().poll(&mut Context::from_waker(engine_waker)).is_ready()
        {
            self.engine = None;
        }
        let driver_rung = driver_bell.rung.swap(false, SeqCst);
        if driver_rung && Pin::new(&mut self.driver).poll(&mut Context::from_waker(driver_waker)).is_ready() {
            return Some(Poll::Ready(()));
        }
        (engine_rung || driver_rung).then_some(Poll::Pending)
    }

    fn is_rung(&self) -> bool {
        self.bells.iter().any(|(bell, _)| bell.rung.load(SeqCst))
    }
}

impl<D: Future<Output = ()> + Unpin> Future for Together<D> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.get_mut();
        this.house.enter(cx.waker());
        for _ in 0..TURNS {
            match this.turn() {
                Some(Poll::Ready(())) => return Poll::Ready(()),
                Some(Poll::Pending) => {}
                None => {
                    this.house.inside.store(false, SeqCst);
                    if !this.is_rung() {
                        return Poll::Pending;
                    }
                    this.house.inside.store(true, SeqCst);
                }
            }
        }
        this.house.inside.store(false, SeqCst);
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::future::poll_fn;
    use std::sync::atomic::AtomicUsize;
    use std::time::Duration;

    use super::*;

    type Slot = Arc<Mutex<Option<Waker>>>;

    /// Adds one whenever the other is not behind, wakes the other, and waits, until it has come so far.
    fn player(
        (own, other): (Arc<AtomicUsize>, Arc<AtomicUsize>),
        (wait, wake): (Slot, Slot),
        until: usize,
    ) -> impl Future<Output = ()> {
        poll_fn(move |cx| {
            *wait.lock() = Some(cx.waker().clone());
            let count = own.load(SeqCst);
            if other.load(SeqCst) >= count {
                own.store(count + 1, SeqCst);
            }
            let woken = wake.lock().clone();
            if let Some(other) = woken {
                other.wake();
            }
            if own.load(SeqCst) == until { Poll::Ready(()) } else { Poll::Pending }
        })
    }

    #[tokio::test]
    async fn what_the_two_say_to_each_other_is_never_lost() {
        const UNTIL: usize = 10_000;
        let (left, right) = (Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
        let (left_waker, right_waker) = (Arc::default(), Arc::default());
        let engine = player((left.clone(), right.clone()), (Arc::clone(&left_waker), Arc::clone(&right_waker)), UNTIL);
        let driver = player((right.clone(), left.clone()), (right_waker, left_waker), UNTIL);
        let both = Together::new(Box::pin(engine), Box::pin(driver));
        tokio::time::timeout(Duration::from_secs(60), both).await.unwrap();
        assert_eq!(right.load(SeqCst), UNTIL);
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_comes_from_outside_is_never_lost() {
        let (items, mut taken) = tokio::sync::mpsc::channel::<usize>(1);
        let (pass, mut passed) = tokio::sync::mpsc::channel::<usize>(1);
        let engine = async move {
            while let Some(item) = taken.recv().await {
                pass.send(item).await.unwrap();
            }
        };
        let driver = async move {
            let mut expected = 0;
            while let Some(item) = passed.recv().await {
                assert_eq!(item, expected);
                expected += 1;
            }
            assert_eq!(expected, 20_000);
        };
        let both = tokio::spawn(Together::new(Box::pin(engine), Box::pin(driver)));
        for item in 0..20_000 {
            items.send(item).await.unwrap();
        }
        drop(items);
        tokio::time::timeout(Duration::from_secs(60), both).await.unwrap().unwrap();
    }
}

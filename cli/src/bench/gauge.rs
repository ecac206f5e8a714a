//! Counting: workers keep the link busy and say what came, and a [`Stage`] says from when and for how long it counts.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use tokio::task::JoinSet;

use super::BenchError;
use crate::failure::Failure;
use crate::interrupt::Interrupts;
use crate::output::Progress;

/// What is counted from is a link in its stride: connections are open, buffers have grown, methods are measured.
pub(super) const WARM_UP: Duration = Duration::from_millis(500);
/// Workers that count at the same place wait for each other; this is more than there are cores to run them, mostly.
const SHARDS: usize = 16;
/// The longest time that is told from longer ones, in nanoseconds: the longest measurement.
const LONGEST_NS: u64 = 3_600_000_000_000;
/// Times are told apart to a thousandth.
const DIGITS: u8 = 3;
/// How often the bar moves.
const TICK: Duration = Duration::from_millis(100);

/// Why a measurement ended before its time. What was counted until then stands.
#[derive(Debug)]
pub(super) enum Early {
    /// Somebody pressed Ctrl-C.
    Interrupted,
    /// The link failed.
    Failed(BenchError),
}

impl From<BenchError> for Early {
    fn from(error: BenchError) -> Self {
        Early::Failed(error)
    }
}

impl From<Early> for Failure {
    fn from(early: Early) -> Self {
        match early {
            Early::Interrupted => Failure::Interrupted,
            Early::Failed(error) => Failure::from(error),
        }
    }
}

/// Whether it counts. First it does not, for the warm-up; then it does, until the end.
#[derive(Debug, Default)]
pub(super) struct Stage {
    counting: AtomicBool,
    began: OnceLock<Instant>,
}

impl Stage {
    /// Runs the workers, which have no end of their own: an early one is a failure. They are dropped where they stand
    /// in the end. Returns for how long it counted.
    pub(super) async fn run(
        &self,
        mut workers: JoinSet<BenchError>,
        measured: Duration,
        interrupts: &Interrupts,
        message: impl Fn(Duration) -> String,
    ) -> (Duration, Result<(), Early>) {
        let ended = tokio::select! {
            biased;
            () = interrupts.first() => Err(Early::Interrupted),
            Some(failed) = workers.join_next() => Err(Early::Failed(failed.unwrap_or_else(BenchError::from))),
            () = self.pass(measured, message) => Ok(()),
        };
        self.counting.store(false, Ordering::Relaxed);
        let elapsed = self.elapsed();
        workers.shutdown().await;
        (elapsed, ended)
    }

    /// Warms up, counts for so long, and shows on the terminal how far it is.
    async fn pass(&self, measured: Duration, message: impl Fn(Duration) -> String) {
        tokio::time::sleep(WARM_UP).await;
        let began = *self.began.get_or_init(Instant::now);
        self.counting.store(true, Ordering::Relaxed);
        let mut progress = Progress::over(measured);
        while let Some(left) = measured.checked_sub(began.elapsed()).filter(|left| !left.is_zero()) {
            tokio::time::sleep(left.min(TICK)).await;
            progress.reach(began.elapsed(), || message(began.elapsed()));
            tracing::debug!("{}", message(began.elapsed()));
        }
    }

    fn elapsed(&self) -> Duration {
        self.began.get().map_or(Duration::ZERO, Instant::elapsed)
    }
}

/// What workers of one kind count.
#[derive(Debug)]
pub(super) struct Tally {
    stage: Arc<Stage>,
    shards: Vec<Shard>,
}

/// On cache lines of its own.
#[derive(Debug)]
#[repr(align(128))]
struct Shard {
    units: AtomicU64,
    errors: AtomicU64,
    times_ns: Mutex<Histogram<u64>>,
}

fn histogram() -> Histogram<u64> {
    Histogram::new_with_bounds(1, LONGEST_NS, DIGITS).expect("the bounds of the histogram are in order")
}

impl Tally {
    pub(super) fn new(stage: &Arc<Stage>) -> Arc<Self> {
        let shard = || Shard { units: AtomicU64::new(0), errors: AtomicU64::new(0), times_ns: Mutex::new(histogram()) };
        Arc::new(Tally { stage: stage.clone(), shards: std::iter::repeat_with(shard).take(SHARDS).collect() })
    }

    /// Where a worker counts.
    pub(super) fn counter(self: &Arc<Self>, worker: usize) -> Counter {
        Counter { tally: self.clone(), shard: worker % SHARDS }
    }

    /// How many came.
    pub(super) fn units(&self) -> u64 {
        self.shards.iter().map(|shard| shard.units.load(Ordering::Relaxed)).sum()
    }

    /// How many did not come as they should.
    pub(super) fn errors(&self) -> u64 {
        self.shards.iter().map(|shard| shard.errors.load(Ordering::Relaxed)).sum()
    }

    /// How long each took, in nanoseconds.
    pub(super) fn times_ns(&self) -> Histogram<u64> {
        let mut all = histogram();
        for shard in &self.shards {
            // A histogram is whole at any time: a count is one addition.
            all += &*shard.times_ns.lock().unwrap_or_else(PoisonError::into_inner);
        }
        all
    }
}

/// What one worker counts with.
#[derive(Debug)]
pub(super) struct Counter {
    tally: Arc<Tally>,
    shard: usize,
}

impl Counter {
    fn shard(&self) -> Option<&Shard> {
        let counting = self.tally.stage.counting.load(Ordering::Relaxed);
        self.tally.shards.get(self.shard).filter(|_| counting)
    }

    /// One came.
    pub(super) fn one(&self) {
        if let Some(shard) = self.shard() {
            shard.units.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// One came that was asked for at this time.
    pub(super) fn one_since(&self, asked: Instant) {
        if let Some(shard) = self.shard() {
            let took_ns = u64::try_from(asked.elapsed().as_nanos()).unwrap_or(u64::MAX);
            shard.units.fetch_add(1, Ordering::Relaxed);
            shard.times_ns.lock().unwrap_or_else(PoisonError::into_inner).saturating_record(took_ns);
        }
    }

    /// One came out wrong.
    pub(super) fn error(&self) {
        if let Some(shard) = self.shard() {
            shard.errors.fetch_add(1, Ordering::Relaxed);
        }
    }
}

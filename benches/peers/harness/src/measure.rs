//! How each workload is measured: one round of one contender, in a runtime and on connections of its own.
//!
//! All work runs on the workers of the runtime, never on the thread that waits for it. A part of the round's time is
//! spent before anything is measured, so that windows, buffers and branch predictors have seen the workload.

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::{TimeVal, TimeValLike};
use tokio::runtime::{Builder, Runtime};
use tokio::task::{JoinHandle, JoinSet};

use crate::memory::Count;
use crate::peer::{Ends, Opens, Order, Peer, Result, Streams, Tally, ensure};
use crate::workload::{Kind, Reading, answers, beside};

/// A round that takes so much longer than what is measured hangs.
const PATIENCE: Duration = Duration::from_secs(30);
/// The share of a round's time that goes by before anything is measured.
const WARM_UP: u32 = 4;
/// Items of the streams that nobody reads, in bytes.
const UNREAD_ITEM: usize = 4 << 10;
/// Until the senders of unread streams have run into whatever stops them.
const SETTLE: Duration = Duration::from_millis(100);
/// An echo that has not come after this is none.
const NO_ANSWER: Duration = Duration::from_secs(1);

/// How a round is measured.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Setting {
    /// The time that is measured, for each contender and round.
    pub(crate) time: Duration,
    /// Client and server have a runtime each, with one worker; else they share one with two.
    pub(crate) split: bool,
}

impl Setting {
    fn warm_up(&self) -> Duration {
        self.time / WARM_UP
    }
}

type Part = fn(Setting, Kind) -> Result<Vec<Reading>>;

/// Something that takes part in some workloads.
#[derive(Debug, Clone)]
pub struct Contender {
    pub(crate) name: &'static str,
    sequential: Part,
    in_flight: Option<Part>,
    items: Option<Part>,
    opens: Option<Part>,
    isolation: Option<Part>,
}

impl Contender {
    /// How it is measured, if it takes part.
    pub(crate) fn part(&self, kind: Kind) -> Option<Part> {
        match kind {
            Kind::Sequential { .. } => Some(self.sequential),
            Kind::InFlight { .. } => self.in_flight,
            Kind::Items { .. } => self.items,
            Kind::Open { .. } => self.opens,
            Kind::Isolation => self.isolation,
        }
    }
}

/// Puts a peer on the list, with the workloads that it takes part in.
#[derive(Debug)]
pub struct Entry<P> {
    contender: Contender,
    peer: PhantomData<fn() -> P>,
}

impl<P: Peer> Entry<P> {
    /// With the sequential echo.
    pub fn sequential() -> Self {
        let contender = Contender {
            name: P::NAME,
            sequential: |setting, kind| on_stage(setting, move |ends| sequential::<P>(ends, setting, kind)),
            in_flight: None,
            items: None,
            opens: None,
            isolation: None,
        };
        Entry { contender, peer: PhantomData }
    }

    /// With many calls in flight, too.
    #[must_use]
    pub fn in_flight(mut self) -> Self {
        self.contender.in_flight =
            Some(|setting, kind| on_stage(setting, move |ends| in_flight::<P>(ends, setting, kind)));
        self
    }

    /// With streams of items, too.
    #[must_use]
    pub fn streams(mut self) -> Self
    where
        P: Streams,
    {
        self.contender.items = Some(|setting, kind| on_stage(setting, move |ends| items::<P>(ends, setting, kind)));
        self
    }

    /// With streams that nobody reads, too.
    #[must_use]
    pub fn isolation(mut self) -> Self
    where
        P: Streams,
    {
        self.contender.isolation = Some(|setting, _kind| on_stage(setting, move |ends| isolation::<P>(ends, setting)));
        self
    }

    /// With many streams or connections open and idle, too.
    #[must_use]
    pub fn opens(mut self) -> Self
    where
        P: Opens,
    {
        self.contender.opens = Some(|setting, kind| on_stage(setting, move |ends| opens::<P>(ends, setting, kind)));
        self
    }

    /// The entry.
    pub fn build(self) -> Contender {
        self.contender
    }
}

fn runtime(workers: usize) -> Result<Runtime> {
    Ok(Builder::new_multi_thread().worker_threads(workers).enable_all().build()?)
}

/// Runs the work on a runtime that nothing ran on before, and ends what it left behind.
fn on_stage<F>(setting: Setting, work: impl FnOnce(Ends) -> F) -> Result<Vec<Reading>>
where
    F: Future<Output = Result<Vec<Reading>>> + Send + 'static,
{
    let client = runtime(if setting.split { 1 } else { 2 })?;
    let server = if setting.split { Some(runtime(1)?) } else { None };
    let ends = Ends::new(server.as_ref().unwrap_or(&client).handle().clone());
    let work = client.spawn(work(ends));
    let limit = PATIENCE + 4 * setting.time;
    let result = client.block_on(async { tokio::time::timeout(limit, work).await });
    for runtime in [Some(client), server].into_iter().flatten() {
        runtime.shutdown_timeout(NO_ANSWER);
    }
    result.map_err(|_| format!("not done within {limit:?}"))??
}

async fn sequential<P: Peer>(ends: Ends, setting: Setting, kind: Kind) -> Result<Vec<Reading>> {
    let Kind::Sequential { bytes } = kind else { return Err("not sequential".into()) };
    let peer = P::start(ends).await?;
    let mut caller = peer.caller().await?;
    echo_for::<P>(&mut caller, bytes, setting.warm_up()).await?;
    let [p50, p99] = echo_for::<P>(&mut caller, bytes, setting.time).await?;
    Ok(vec![Reading::new("p50", "µs", p50), Reading::new("p99", "µs", p99)])
}

/// Calls one after the other: median and 99th percentile in µs.
async fn echo_for<P: Peer>(caller: &mut P::Caller, bytes: usize, time: Duration) -> Result<[f64; 2]> {
    let payload = payload(bytes, 0);
    let mut latencies = Vec::with_capacity(1 << 18);
    let began = Instant::now();
    let mut before = began;
    while before.duration_since(began) < time || latencies.is_empty() {
        echo::<P>(caller, &payload).await?;
        let now = Instant::now();
        latencies.push(now.duration_since(before));
        before = now;
    }
    latencies.sort_unstable();
    Ok([50, 99].map(|percent| percentile(&latencies, percent).as_secs_f64() * 1e6))
}

async fn echo<P: Peer>(caller: &mut P::Caller, payload: &Bytes) -> Result<()> {
    let answer = P::echo(caller, payload.clone()).await?;
    ensure(answer == *payload, || format!("{} bytes were answered that are not the caller's own", answer.len()))
}

/// A payload of which every caller has another.
fn payload(bytes: usize, caller: usize) -> Bytes {
    // Even bytes differ by the low byte of the caller's number, odd ones by the high byte.
    (0..bytes).map(|at| (at * 31 + (caller >> (at % 2 * 8))) as u8).collect()
}

/// By the nearest rank, of what is sorted and not empty.
fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    let rank = (sorted.len() * percent).div_ceil(100).max(1);
    sorted[rank - 1]
}

async fn in_flight<P: Peer>(ends: Ends, setting: Setting, kind: Kind) -> Result<Vec<Reading>> {
    let Kind::InFlight { callers, bytes } = kind else { return Err("not in flight".into()) };
    let peer = P::start(ends).await?;
    let mut all = Vec::with_capacity(callers);
    for caller in 0..callers {
        all.push((peer.caller().await?, payload(bytes, caller)));
    }
    let (all, _calls) = call_for::<P>(all, setting.warm_up()).await?;
    let (began, cpu_before) = (Instant::now(), cpu_time()?);
    let (_all, calls) = call_for::<P>(all, setting.time).await?;
    let (took, cpu) = (began.elapsed(), cpu_time()? - cpu_before);
    let calls = calls as f64;
    Ok(vec![
        Reading::new("rate", "kcalls/s", calls / took.as_secs_f64() / 1e3),
        Reading::new("cpu", "µs/call", cpu.as_secs_f64() * 1e6 / calls),
    ])
}

type Callers<P> = Vec<(<P as Peer>::Caller, Bytes)>;

/// All callers call at once, each one call after the other. Returns them with the number of calls, all of them answered.
async fn call_for<P: Peer>(callers: Callers<P>, time: Duration) -> Result<(Callers<P>, u64)> {
    let enough = Arc::new(AtomicBool::new(false));
    let mut tasks: JoinSet<Result<_>> = JoinSet::new();
    for (mut caller, payload) in callers {
        let enough = enough.clone();
        tasks.spawn(async move {
            let mut calls = 0u64;
            while !enough.load(Ordering::Relaxed) {
                echo::<P>(&mut caller, &payload).await?;
                calls += 1;
            }
            Ok((caller, payload, calls))
        });
    }
    tokio::time::sleep(time).await;
    enough.store(true, Ordering::Relaxed);
    let (mut callers, mut sum) = (Vec::with_capacity(tasks.len()), 0);
    while let Some(done) = tasks.join_next().await {
        let (caller, payload, calls) = done??;
        callers.push((caller, payload));
        sum += calls;
    }
    Ok((callers, sum))
}

/// CPU time of the process so far: user and system, both ends of every peer.
fn cpu_time() -> Result<Duration> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let micros = |time: TimeVal| time.num_microseconds().unsigned_abs();
    Ok(Duration::from_micros(micros(usage.user_time()) + micros(usage.system_time())))
}

async fn items<P: Streams>(ends: Ends, setting: Setting, kind: Kind) -> Result<Vec<Reading>> {
    let Kind::Items { bytes } = kind else { return Err("no items".into()) };
    let peer = P::start(ends).await?;
    // As many items as fit the time: found out while warming up.
    let mut order = Order { bytes, count: ((256 << 10) / bytes).max(16) as u64, apart: false };
    let mut took = download(&peer, order).await?;
    while took < setting.warm_up() {
        order.count = order.count.saturating_mul(4);
        took = download(&peer, order).await?;
    }
    let rate = order.count as f64 / took.as_secs_f64();
    order.count = ((rate * setting.time.as_secs_f64()) as u64).max(1);
    let took = download(&peer, order).await?;
    let rate = order.count as f64 / took.as_secs_f64();
    Ok(vec![Reading::new("rate", "items/s", rate), Reading::new("throughput", "MB/s", rate * bytes as f64 / 1e6)])
}

/// From the call to its last item.
async fn download<P: Streams>(peer: &P, order: Order) -> Result<Duration> {
    let mut tally = Tally::new(order);
    let began = Instant::now();
    let download = peer.download(order).await?;
    P::receive(download, &mut tally).await?;
    let took = began.elapsed();
    tally.check_complete()?;
    Ok(took)
}

async fn opens<P: Opens>(ends: Ends, setting: Setting, kind: Kind) -> Result<Vec<Reading>> {
    let Kind::Open { streams, openers } = kind else { return Err("nothing to open".into()) };
    let peer = Arc::new(P::start(ends).await?);
    let mut caller = peer.caller().await?;
    echo_for::<P>(&mut caller, 64, setting.warm_up()).await?;
    let _first = peer.open().await?;

    let heap = Count::start();
    let began = Instant::now();
    let next = Arc::new(AtomicUsize::new(0));
    let mut tasks: JoinSet<Result<_>> = JoinSet::new();
    for _ in 0..openers {
        let (peer, next) = (peer.clone(), next.clone());
        tasks.spawn(async move {
            let mut open = Vec::new();
            while next.fetch_add(1, Ordering::Relaxed) < streams {
                open.push(peer.open().await?);
            }
            Ok(open)
        });
    }
    let mut open = Vec::with_capacity(streams);
    while let Some(opened) = tasks.join_next().await {
        open.extend(opened??);
    }
    let took = began.elapsed();
    // Tasks and buffers that only opening needed are gone after a while.
    tokio::time::sleep(SETTLE).await;
    let live = heap.live();
    drop(heap);
    ensure(open.len() == streams, || format!("{} of {streams} were opened", open.len()))?;
    let [p50, _p99] = echo_for::<P>(&mut caller, 64, setting.time).await?;
    drop(open);
    Ok(vec![
        Reading::new("rate", "opens/s", streams as f64 / took.as_secs_f64()),
        Reading::new("memory", "B/open", live as f64 / streams as f64),
        Reading::new("echo-p50", "µs", p50),
    ])
}

async fn isolation<P: Streams>(ends: Ends, setting: Setting) -> Result<Vec<Reading>> {
    let peer = P::start(ends).await?;
    let mut caller = Some(peer.caller().await?);
    let (mut unread, mut readings) = (Vec::new(), Vec::new());
    for streams in [0, 1, 8] {
        while unread.len() < streams {
            // The first is on the connection of the echo, the others are on some of their own.
            let order = Order { bytes: UNREAD_ITEM, count: u64::MAX, apart: !unread.is_empty() };
            let download = tokio::time::timeout(NO_ANSWER, peer.download(order)).await;
            unread.push(download.ok().transpose()?);
        }
        tokio::time::sleep(SETTLE).await;
        let mut answered = None;
        if let Some(mut calling) = caller.take() {
            let time = setting.time / 3;
            let calls: JoinHandle<Result<_>> = tokio::spawn(async move {
                echo_for::<P>(&mut calling, 64, time / WARM_UP).await?;
                Ok((echo_for::<P>(&mut calling, 64, time).await?, calling))
            });
            let abort = calls.abort_handle();
            match tokio::time::timeout(2 * time + NO_ANSWER, calls).await {
                Ok(done) => {
                    let (latencies, calling) = done??;
                    (answered, caller) = (Some(latencies), Some(calling));
                }
                Err(_elapsed) => abort.abort(),
            }
        }
        readings.push(Reading::new(answers(streams), "1=yes", if answered.is_some() { 1.0 } else { 0.0 }));
        for (metric, value) in beside(streams).into_iter().zip(answered.into_iter().flatten()) {
            readings.push(Reading::new(metric, "µs", value));
        }
    }
    Ok(readings)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_of_the_nearest_rank() {
        let sorted: Vec<_> = (1..=200).map(Duration::from_micros).collect();
        assert_eq!([50, 99, 100].map(|percent| percentile(&sorted, percent).as_micros()), [100, 198, 200]);
        assert_eq!(percentile(&sorted[..1], 50).as_micros(), 1);
    }

    #[test]
    fn callers_have_payloads_of_their_own() {
        let all: std::collections::HashSet<_> = (0..512).map(|caller| payload(64, caller)).collect();
        assert_eq!(all.len(), 512);
    }
}

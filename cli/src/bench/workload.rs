//! What keeps the link busy: workers that call, receive or open again as soon as they can.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::task::JoinSet;
use tollway::rpc::{CallError, Rx};
use tollway::{OpenError, Session};
use tollway_protocol::error::code;
use tollway_protocol::limits::ConnectionLimits;

use super::gauge::{Counter, Early, Stage, Tally};
use super::report::{Beside, Calls, Isolation, Items, Opens, Results, per_second};
use super::service::BenchClient;
use super::{BenchError, Plan, Workload, farewell};
use crate::access::unless_interrupted;
use crate::interrupt::Interrupts;
use crate::output::grouped;

/// Bytes of the items of the streams beside which `isolation` measures calls: large enough to fill a link.
const BULK_ITEM: u32 = 16 * 1024;

/// Does what is to be measured, and says how that ended.
pub(super) async fn run(session: &Session, plan: &Plan, interrupts: &Interrupts) -> (Results, Result<(), Early>) {
    match plan.workload {
        Workload::Unary => unary(session, plan, interrupts).await,
        Workload::Stream => streams(session, plan, interrupts).await,
        Workload::Open => opens(session, plan, interrupts).await,
        Workload::Isolation => {
            let mut results = Box::<Isolation>::default();
            let ended = isolation(session, plan, interrupts, &mut results).await;
            (Results::Isolation(results), ended)
        }
    }
}

/// Opens the service, or says who should serve it.
async fn open(session: &Session) -> Result<BenchClient, BenchError> {
    session.open_client().await.map_err(|error| match error {
        OpenError::Rejected { reason, .. } if reason.code == code::UNKNOWN_SERVICE => {
            BenchError::NoService(session.peer().to_string())
        }
        error => BenchError::Open(error),
    })
}

async fn unary(session: &Session, plan: &Plan, interrupts: &Interrupts) -> (Results, Result<(), Early>) {
    let connection = match unless_early(interrupts, open(session)).await {
        Ok(connection) => connection,
        Err(early) => return (Results::Unary(Calls::default()), Err(early)),
    };
    let stage = Arc::new(Stage::default());
    let tally = Tally::new(&stage);
    let mut workers = JoinSet::new();
    for worker in 0..usize::from(plan.in_flight) {
        workers.spawn(call(connection.clone(), plan.size, tally.counter(worker)));
    }
    let rate = |elapsed| rate(tally.units(), elapsed, "calls/s");
    let (elapsed, ended) = stage.run(workers, plan.measured, interrupts, rate).await;
    (Results::Unary(Calls::new(&tally, elapsed)), ended)
}

async fn streams(session: &Session, plan: &Plan, interrupts: &Interrupts) -> (Results, Result<(), Early>) {
    let connection = match unless_early(interrupts, open(session)).await {
        Ok(connection) => connection,
        Err(early) => return (Results::Stream(Items::default()), Err(early)),
    };
    let stage = Arc::new(Stage::default());
    let tally = Tally::new(&stage);
    let mut workers = JoinSet::new();
    for worker in 0..usize::from(plan.in_flight) {
        workers.spawn(receive(connection.clone(), plan.size, tally.counter(worker)));
    }
    let rate = |elapsed| rate(tally.units(), elapsed, "items/s");
    let (elapsed, ended) = stage.run(workers, plan.measured, interrupts, rate).await;
    (Results::Stream(Items::new(&tally, plan.size, elapsed)), ended)
}

async fn opens(session: &Session, plan: &Plan, interrupts: &Interrupts) -> (Results, Result<(), Early>) {
    let stage = Arc::new(Stage::default());
    let tally = Tally::new(&stage);
    let mut workers = JoinSet::new();
    for worker in 0..usize::from(plan.in_flight) {
        workers.spawn(reopen(session.clone(), tally.counter(worker)));
    }
    let rate = |elapsed| rate(tally.units(), elapsed, "opens/s");
    let (elapsed, ended) = stage.run(workers, plan.measured, interrupts, rate).await;
    // All have closed when the session has none any more.
    let left_open = farewell(session).await;
    (Results::Open(Opens::new(&tally, left_open, elapsed)), ended)
}

/// Measures calls one after the other: alone, beside unread streams, and beside one that is read. Each stream is on a
/// connection of its own.
async fn isolation(
    session: &Session,
    plan: &Plan,
    interrupts: &Interrupts,
    results: &mut Isolation,
) -> Result<(), Early> {
    let connection = unless_early(interrupts, open(session)).await?;
    let (calls, _, ended) = calls_beside(&connection, plan, interrupts, None).await;
    results.alone = calls;
    ended?;

    let unread = unless_early(interrupts, open_unread(session, plan.in_flight)).await?;
    let (calls, _, ended) = calls_beside(&connection, plan, interrupts, None).await;
    results.beside_unread = Some(Beside { streams: plan.in_flight, received: None, calls });
    ended?;
    drop(unread);

    let bulk = unless_early(interrupts, open(session)).await?;
    let (calls, items, ended) = calls_beside(&connection, plan, interrupts, Some(bulk)).await;
    results.beside_bulk = Some(Beside { streams: 1, received: Some(items), calls });
    ended
}

/// Opens connections, each with a stream on it that will not be read.
async fn open_unread(session: &Session, count: u16) -> Result<Vec<(BenchClient, Rx<Bytes>)>, BenchError> {
    let mut unread = Vec::new();
    for _ in 0..count {
        let bench = open(session).await?;
        let stream = bench.items(BULK_ITEM).await.map_err(not_sent)?;
        unread.push((bench, stream));
    }
    Ok(unread)
}

/// What is prepared while nothing is counted, or that it was interrupted.
async fn unless_early<T>(
    interrupts: &Interrupts,
    work: impl Future<Output = Result<T, BenchError>>,
) -> Result<T, Early> {
    let done = unless_interrupted(interrupts, work).await;
    Ok(done.map_err(|_| Early::Interrupted)??)
}

/// Makes calls one after the other, and receives all that comes on a stream of another connection, if there is one.
async fn calls_beside(
    bench: &BenchClient,
    plan: &Plan,
    interrupts: &Interrupts,
    bulk: Option<BenchClient>,
) -> (Calls, Items, Result<(), Early>) {
    let stage = Arc::new(Stage::default());
    let (calls, items) = (Tally::new(&stage), Tally::new(&stage));
    let mut workers = JoinSet::new();
    workers.spawn(call(bench.clone(), plan.size, calls.counter(0)));
    if let Some(bulk) = bulk {
        workers.spawn(receive(bulk, BULK_ITEM, items.counter(0)));
    }
    let rate = |elapsed| rate(calls.units(), elapsed, "calls/s");
    let (elapsed, ended) = stage.run(workers, plan.measured, interrupts, rate).await;
    (Calls::new(&calls, elapsed), Items::new(&items, BULK_ITEM, elapsed), ended)
}

/// Calls again and again. Calls that fail by themselves are counted; what all others would meet, too, ends it.
async fn call(bench: BenchClient, size: u32, counter: Counter) -> BenchError {
    let argument = Bytes::from(vec![7; size as usize]);
    loop {
        let asked = Instant::now();
        match bench.echo(argument.clone()).await {
            Ok(answer) if answer.len() == argument.len() => counter.one_since(asked),
            Ok(_) | Err(CallError::HandlerFailed | CallError::Cancelled) => counter.error(),
            Err(error) => return error.into(),
        }
    }
}

/// Receives items for ever.
async fn receive(bench: BenchClient, size: u32, counter: Counter) -> BenchError {
    let mut stream = match bench.items(size).await {
        Ok(stream) => stream,
        Err(error) => return not_sent(error),
    };
    loop {
        match stream.recv().await {
            Ok(Some(item)) if item.len() == size as usize => counter.one(),
            Ok(Some(_)) => counter.error(),
            Ok(None) => return BenchError::StreamEnded,
            Err(error) => return error.into(),
        }
    }
}

/// Why there are no items.
fn not_sent(error: CallError<u32>) -> BenchError {
    let limit = u64::from(ConnectionLimits::default().max_item);
    error.into_app().map_or_else(BenchError::from, |size| BenchError::ItemTooLarge { size: u64::from(size), limit })
}

/// Opens a connection and closes it, again and again.
async fn reopen(session: Session, counter: Counter) -> BenchError {
    loop {
        let asked = Instant::now();
        match open(&session).await {
            Ok(connection) => {
                counter.one_since(asked);
                drop(connection);
            }
            Err(error) => return error,
        }
    }
}

fn rate(units: u64, elapsed: Duration, what: &str) -> String {
    format!("{} {what}", grouped(per_second(units, elapsed) as u128))
}

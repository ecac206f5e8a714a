//! What is counted: a client and a server of one process, on one thread, over loopback TCP, with a hand-written
//! [`Service`].
//!
//! Two programs run it: `tollway-counts-work` below valgrind, which counts instructions, and
//! `tollway-counts-allocations` with an allocator that counts. `tollway-counts` runs both and compares. Everything is
//! warmed up before the counted part: tables and buffers have their size, and the methods were measured to be short,
//! so that the counted calls take the way that calls take in a service under load.

use std::cell::Cell;
use std::io;
use std::time::Duration;

use bytes::Bytes;
use clap::ValueEnum;
use tokio::runtime::Runtime;
use tokio::task::{Id, JoinError, JoinSet};
use tollway::conduit::endpoint::EndpointError;
use tollway::rpc::{
    BoxReply, CallError, IncomingCall, MAX_INLINE, MethodId, Reply, Rx, Service, Services, StreamError, Tx, stream,
};
use tollway::{ConnectError, Connection, OpenError, Server, SessionConfig};

/// Bytes of a call's argument, of its answer, and of an item.
const SIZE: usize = 64;
/// Calls that are in flight at once in [`Workload::InFlight`].
const IN_FLIGHT: u64 = 64;
/// Units before the counted ones. The first call of a method is its probe, and after some hundred no table grows.
const WARM_UP: u64 = 640;

/// What is done over and over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Workload {
    /// Unary calls of 64 bytes that are answered with as much, one after the other.
    Unary,
    /// The same with 64 of them in flight, each of 64 tasks making one after the other.
    InFlight,
    /// Items of 64 bytes that the callee sends one by one on a stream of one call.
    Stream,
}

impl Workload {
    /// All of them.
    pub const ALL: [Workload; 3] = [Workload::Unary, Workload::InFlight, Workload::Stream];

    /// The name that the command takes and the record uses.
    pub fn name(self) -> &'static str {
        match self {
            Workload::Unary => "unary",
            Workload::InFlight => "in-flight",
            Workload::Stream => "stream",
        }
    }

    /// Units that are enough for what happens once, such as opening the stream, to vanish in the count for each.
    pub fn units(self) -> u64 {
        match self {
            Workload::Unary => 2_000,
            Workload::InFlight => 100 * IN_FLIGHT,
            Workload::Stream => 100_000,
        }
    }
}

/// Why nothing was counted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkError {
    /// No socket, or no runtime.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The address of the server is none.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The client cannot reach the server.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The service was not opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A call failed.
    #[error(transparent)]
    Call(#[from] CallError),
    /// A stream broke off.
    #[error(transparent)]
    Stream(#[from] StreamError),
    /// A task of the client's panicked.
    #[error(transparent)]
    Task(#[from] JoinError),
    /// Something came back that was not sent.
    #[error("{got} came back, and {sent} was sent")]
    Wrong {
        /// What was sent.
        sent: u64,
        /// What came.
        got: u64,
    },
    /// Handlers got tasks of their own: the machine stood still while one ran, so that it did not look short.
    #[error("{0} handlers were not polled on the session's task, which the count is about: run it again")]
    Spawned(u64),
}

thread_local! {
    /// The task on which the last handler ran, and how often it was another one than before. All is on one thread.
    static HANDLER_TASK: Cell<(Option<Id>, u64)> = const { Cell::new((None, 0)) };
}

struct Subject {
    echo: MethodId,
    items: MethodId,
}

fn method(name: &str) -> MethodId {
    MethodId::of("subject", 1, name)
}

impl Service for Subject {
    fn name(&self) -> &str {
        "subject"
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        let (last, changes) = HANDLER_TASK.get();
        let task = tokio::task::try_id();
        HANDLER_TASK.set((task, changes + u64::from(task != last)));
        let method = call.method();
        if method == self.echo {
            Box::pin(async move {
                match call.args::<Bytes>() {
                    Ok(bytes) => Reply::ok(&bytes),
                    Err(error) => Reply::invalid_payload(&error),
                }
            })
        } else if method == self.items {
            match call.args::<u64>() {
                Ok(count) => {
                    let (tx, rx) = stream();
                    tokio::spawn(send(tx, count));
                    Reply::ok(&rx).boxed()
                }
                Err(error) => Reply::invalid_payload(&error).boxed(),
            }
        } else {
            Reply::unknown_method().boxed()
        }
    }

    /// Below valgrind everything takes fifty times as long: the echo, which is short, must still count as short.
    fn inline_within(&self) -> Option<Duration> {
        Some(MAX_INLINE)
    }
}

async fn send(mut tx: Tx<Bytes>, count: u64) {
    let item = Bytes::from_static(&[7; SIZE]);
    for _ in 0..count {
        if tx.send(item.clone()).await.is_err() {
            // The receiver counts what it got.
            return;
        }
    }
    tx.finish();
}

/// Prepares a workload, does it some hundred times, and then hands its work of so many units to `counted`, which calls
/// it once.
///
/// # Errors
/// When the work cannot be done, or was not what is to be counted.
pub fn run<T>(workload: Workload, units: u64, counted: impl FnOnce(&mut dyn FnMut()) -> T) -> Result<T, WorkError> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let connection = runtime.block_on(connect())?;
    work(&runtime, &connection, workload, WARM_UP)?;
    let (_, before) = HANDLER_TASK.get();
    let mut result = Ok(());
    let answer = counted(&mut || result = work(&runtime, &connection, workload, units));
    result?;
    let (_, after) = HANDLER_TASK.get();
    // A stream is one call: whoever runs its handler does not matter.
    if after != before && workload != Workload::Stream {
        return Err(WorkError::Spawned(after - before));
    }
    Ok(answer)
}

/// Starts the server, and a session with it.
async fn connect() -> Result<Connection, WorkError> {
    let subject = Subject { echo: method("echo"), items: method("items") };
    let serving = SessionConfig { services: Services::new().with(subject), ..SessionConfig::default() };
    let server = Server::bind(&"tcp://127.0.0.1:0".parse()?, serving).await?;
    let endpoint = server.endpoint().clone();
    tokio::spawn(server.run(std::future::pending(), Duration::ZERO));
    let session = tollway::connect(&endpoint, SessionConfig::default()).await?;
    Ok(session.open("subject").await?)
}

fn work(runtime: &Runtime, connection: &Connection, workload: Workload, units: u64) -> Result<(), WorkError> {
    match workload {
        Workload::Unary => runtime.block_on(calls(connection, method("echo"), units)),
        Workload::InFlight => runtime.block_on(calls_at_once(connection, units)),
        Workload::Stream => runtime.block_on(items(connection, units)),
    }
}

async fn calls(connection: &Connection, echo: MethodId, count: u64) -> Result<(), WorkError> {
    let sent = Bytes::from_static(&[7; SIZE]);
    for _ in 0..count {
        let got: Bytes = connection.call(echo, &sent).await?;
        if got.len() != SIZE {
            return Err(WorkError::Wrong { sent: SIZE as u64, got: got.len() as u64 });
        }
    }
    Ok(())
}

async fn calls_at_once(connection: &Connection, count: u64) -> Result<(), WorkError> {
    let echo = method("echo");
    let mut tasks = JoinSet::new();
    for _ in 0..IN_FLIGHT {
        let connection = connection.clone();
        tasks.spawn(async move { calls(&connection, echo, count / IN_FLIGHT).await });
    }
    while let Some(done) = tasks.join_next().await {
        done??;
    }
    Ok(())
}

async fn items(connection: &Connection, count: u64) -> Result<(), WorkError> {
    let mut rx: Rx<Bytes> = connection.call(method("items"), &count).await?;
    let mut got = 0;
    while rx.recv().await?.is_some() {
        got += 1;
    }
    if got == count { Ok(()) } else { Err(WorkError::Wrong { sent: count, got }) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_workload_does_its_work_once() {
        for workload in Workload::ALL {
            let mut counted = 0;
            run(workload, 2 * IN_FLIGHT, |work| {
                work();
                counted += 1;
            })
            .expect("it works");
            assert_eq!(counted, 1);
        }
    }
}

//! `tollway bench`: what a link of one's own carries.
//!
//! One client, one session, one service ([`service`]): in this process over loopback, or between two. [`gauge`] counts
//! while the workers of a [`workload`] keep the link busy, and [`report`] is what comes out.

mod gauge;
mod report;
mod service;
mod workload;

use std::time::Duration;

use clap::{Args, ValueEnum};
use serde::Serialize;
use tollway::conduit::endpoint::Endpoint;
use tollway::rpc::{CallError, Services, StreamError};
use tollway::{OpenError, Server, ServerConfig, Session, SessionConfig};
use tollway_protocol::error::Reason;
use tollway_protocol::limits::ConnectionLimits;

use crate::access::unless_interrupted;
use crate::failure::Failure;
use crate::interrupt::Interrupts;
use crate::output;
use crate::serve::{bind, server, shutdown};
use crate::tls::ServerArguments;
use crate::units::{Place, Size};
use report::Report;
use service::{BenchServer, Source};

/// How long connections may take to close in the end, and sessions of a server that is to end.
const FAREWELL: Duration = Duration::from_secs(5);
/// The length that stands before the bytes of an argument or an item, at most.
const LENGTH_BYTES: u64 = 5;
/// Calls, streams or openers at once: a little less than what a peer with default limits takes.
const MAX_IN_FLIGHT: u16 = 1_000;
/// Unread streams at once. Each holds up to its window here, 1 MiB by default.
const MAX_UNREAD: u16 = 100;

/// Measures what a link carries: calls, items, opens, and whether one connection slows another.
///
/// Without --to and --serve, client and server are both in this process, over loopback. Half a second of warm-up is not
/// counted. Ctrl-C ends a measurement early, with what was measured so far.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    tollway bench unary\n  \
    tollway bench stream --size 4KiB --in-flight 8 --seconds 10 --json\n\n\
    Between two machines, the first line on the one and the second on the other:\n  \
    tollway bench --serve tcp://0.0.0.0:7500\n  \
    tollway bench unary --to tcp://HOST:7500\n\n\
    With TLS the server prints a URL with the #sha256=… of its certificate, and --to takes it as it is.\n\
    A server takes all the load that anybody who can reach it sends: end it after the measurement.")]
pub(crate) struct Arguments {
    /// What to measure.
    #[arg(value_enum, default_value_t = Workload::Unary)]
    workload: Workload,
    /// The bytes of a call's argument and answer, or of an item: a number of bytes, KiB or MiB.
    #[arg(long, default_value_t = Size(64), conflicts_with = "serve")]
    size: Size,
    /// Calls, streams or openers at once, or the unread streams of `isolation`. By default 64, 1, 64 and 8.
    #[arg(long, value_name = "N", conflicts_with = "serve")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=i64::from(MAX_IN_FLIGHT)))]
    in_flight: Option<u16>,
    /// How long to measure, in seconds; `isolation` measures three times as long.
    #[arg(long, value_name = "N", default_value_t = 5, conflicts_with = "serve")]
    #[arg(value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// Measure the link to a server that `tollway bench --serve` started there: the URL that it printed.
    #[arg(long, value_name = "URL")]
    to: Option<Place>,
    /// Serve what is measured, until Ctrl-C: at tcp://, tls://, quic://, ws:// or wss:// with HOST:PORT, where port 0 takes
    /// a free one, or at unix:///PATH.
    #[arg(long, value_name = "URL", conflicts_with = "to")]
    serve: Option<Place>,
    /// Print a JSON object.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    tls: ServerArguments,
}

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Workload {
    /// Calls that are answered with their argument: their rate, and how long each takes.
    Unary,
    /// Items that the server sends on streams: their rate.
    Stream,
    /// Opening virtual connections, and closing them: the rate, and how long an open takes.
    Open,
    /// How long a call takes alone, beside streams that nobody reads, and beside one that takes all that comes.
    Isolation,
}

impl Workload {
    fn default_in_flight(self) -> u16 {
        match self {
            Workload::Unary | Workload::Open => 64,
            Workload::Stream => 1,
            Workload::Isolation => 8,
        }
    }
}

/// What is to be measured, within bounds.
#[derive(Debug, Clone, Copy)]
struct Plan {
    workload: Workload,
    size: u32,
    in_flight: u16,
    measured: Duration,
}

/// Why nothing is measured, or not to the end.
#[derive(Debug, thiserror::Error)]
enum BenchError {
    #[error(
        "a call of {size} bytes is larger than one body may be, which holds {limit}: larger data goes as a stream, and \
         `tollway bench stream` measures it"
    )]
    CallTooLarge { size: u64, limit: u64 },
    #[error("an item of {size} bytes is larger than one may be, which holds {limit}: more and smaller ones do as well")]
    ItemTooLarge { size: u64, limit: u64 },
    #[error("{streams} unread streams are too many: each fills its window in memory, and {MAX_UNREAD} are the limit")]
    TooManyUnread { streams: u16 },
    #[error("{0} does not serve what is measured: start `tollway bench --serve URL` there")]
    NoService(String),
    #[error("no connection was opened: {0}")]
    Open(OpenError),
    #[error("a call failed: {0}")]
    Call(#[from] CallError),
    #[error("a stream broke off: {0}")]
    Stream(#[from] StreamError),
    #[error("the server ended a stream that has no end")]
    StreamEnded,
    #[error(
        "{option} is for a server: give --serve URL, too. (--to takes the URL with the #sha256=… that the server prints, \
         and without both nothing leaves this process)"
    )]
    ServerOption { option: &'static str },
    #[error("a part of the measurement panicked: {0}")]
    Worker(#[from] tokio::task::JoinError),
}

#[derive(Serialize)]
struct Ready {
    event: &'static str,
    url: String,
}

pub(crate) async fn run(arguments: Arguments, interrupts: Interrupts) -> Result<(), Failure> {
    if let Some(place) = &arguments.serve {
        return serve(place, &arguments.tls, arguments.json, interrupts).await;
    }
    if let Some(option) = arguments.tls.first_given() {
        return Err(BenchError::ServerOption { option }.into());
    }
    let plan = plan(&arguments)?;
    let endpoint = match &arguments.to {
        Some(Place(endpoint)) => endpoint.clone(),
        None => serve_here().await?,
    };
    let connecting = tollway::connect(&endpoint, SessionConfig::default());
    let session = unless_interrupted(&interrupts, connecting).await??;
    let (results, ended) = workload::run(&session, &plan, &interrupts).await;
    farewell(&session).await;
    let failure = ended.err().map(Failure::from);
    let to = arguments.to.map(|place| place.0.to_string());
    let report = Report::new(&plan, to, results, failure.as_ref());
    if arguments.json {
        output::json(&report)?;
    } else if report.has_results() {
        output::line(&report.to_string())?;
    }
    failure.map_or(Ok(()), Err)
}

fn plan(arguments: &Arguments) -> Result<Plan, BenchError> {
    let workload = arguments.workload;
    let (size, limits) = (arguments.size.0, ConnectionLimits::default());
    let holds = |limit: u32| u64::from(limit) - LENGTH_BYTES;
    let fits = |limit: u32| u32::try_from(size).ok().filter(|_| size <= holds(limit));
    let size = match workload {
        Workload::Stream => {
            fits(limits.max_item).ok_or(BenchError::ItemTooLarge { size, limit: holds(limits.max_item) })?
        }
        Workload::Unary | Workload::Open | Workload::Isolation => {
            fits(limits.max_body).ok_or(BenchError::CallTooLarge { size, limit: holds(limits.max_body) })?
        }
    };
    let in_flight = arguments.in_flight.unwrap_or(workload.default_in_flight());
    if workload == Workload::Isolation && in_flight > MAX_UNREAD {
        return Err(BenchError::TooManyUnread { streams: in_flight });
    }
    Ok(Plan { workload, size, in_flight, measured: Duration::from_secs(arguments.seconds) })
}

fn serving() -> SessionConfig {
    SessionConfig { services: Services::new().with(BenchServer::new(Source)), ..SessionConfig::default() }
}

/// Serves in this process, for as long as it runs.
async fn serve_here() -> Result<Endpoint, Failure> {
    let server = Server::bind(&"tcp://127.0.0.1:0".parse()?, serving()).await?;
    let endpoint = server.endpoint().clone();
    tokio::spawn(server.run(std::future::pending(), Duration::ZERO));
    Ok(endpoint)
}

async fn serve(place: &Place, tls: &ServerArguments, json: bool, interrupts: Interrupts) -> Result<(), Failure> {
    let listener = bind(std::slice::from_ref(place), tls, None).await?;
    let mut server = server(listener, ServerConfig::default())?;
    server.set_config(serving());
    let url = server.endpoint().to_string();
    if json {
        output::json(&Ready { event: "ready", url })?;
    } else {
        output::line(&format!("ready: {url}, for `tollway bench unary|stream|open|isolation --to {url}`"))?;
    }
    server.run(shutdown(interrupts, false), FAREWELL).await;
    Ok(())
}

/// Waits until all connections have closed, and says how many did not in time.
async fn farewell(session: &Session) -> usize {
    match tokio::time::timeout(FAREWELL, session.drain(Reason::none())).await {
        Ok(()) => 0,
        Err(_late) => session.connection_count(),
    }
}

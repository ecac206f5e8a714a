//! What lanes are worth: small calls on one connection beside a bulk stream on another, over QUIC on a network that loses
//! and delays, with a lane for each connection and with everything on one lane.
//!
//! `cargo bench --features quic --bench lanes`; up to four minutes, nearly all of it waiting for the network. A word behind
//! `--` takes only the networks with that word in their names.
#![allow(clippy::print_stdout, clippy::unwrap_used)]

#[path = "../tests/support/udp_relay.rs"]
#[allow(dead_code, reason = "each user takes its own part of it")]
mod udp_relay;

use std::future::pending;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tollway::conduit::endpoint::Endpoint;
use tollway::conduit::listen::Listener;
use tollway::conduit::quic::{QuicConduit, QuicListener, QuicReader, QuicWriter};
use tollway::conduit::tls::{ClientTls, Identity, ServerTls};
use tollway::conduit::{Conduit, ConduitError, FrameWriter, Lane, Lanes, PeerInfo, Transmit};
use tollway::future::BoxFuture;
use tollway::rpc::{BoxReply, IncomingCall, MethodId, Reply, Rx, Service, Services, StreamError, stream};
use tollway::{Server, Session, SessionConfig};
use udp_relay::{Network, UdpRelay};

const LOSS_PPM: u32 = 10_000;
const DELAY: Duration = Duration::from_millis(20);
/// Small calls, one after the other: so many, or as many as fit into the time.
const CALLS: usize = 400;
const AT_MOST: Duration = Duration::from_secs(40);

/// A QUIC conduit whose frames all travel on lane 0: what a session over one ordered stream would be.
struct OneLane(QuicConduit);

struct OneLaneWriter(QuicWriter);

impl Conduit for OneLane {
    type Reader = QuicReader;
    type Writer = OneLaneWriter;

    fn lanes(&self) -> Lanes {
        Lanes::One
    }

    fn peer(&self) -> PeerInfo {
        self.0.peer()
    }

    fn take_engine(&mut self) -> Option<BoxFuture<'static, ()>> {
        self.0.take_engine()
    }

    fn split(self) -> (QuicReader, OneLaneWriter) {
        let (reader, writer) = self.0.split();
        (reader, OneLaneWriter(writer))
    }
}

impl FrameWriter for OneLaneWriter {
    fn start_send(&mut self, frame: Transmit) {
        self.0.start_send(Transmit { lane: Lane::ROOT, ..frame });
    }

    fn buffered(&self) -> usize {
        self.0.buffered()
    }

    fn written(&self) -> u64 {
        self.0.written()
    }

    fn set_max_frame(&mut self, bytes: usize) {
        self.0.set_max_frame(bytes);
    }

    fn poll_flush(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConduitError>> {
        self.0.poll_flush(cx)
    }

    fn poll_close(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ConduitError>> {
        self.0.poll_close(cx)
    }
}

struct OneLaneListener(QuicListener);

impl Listener for OneLaneListener {
    type Conduit = OneLane;
    type Pending = BoxFuture<'static, io::Result<OneLane>>;

    async fn next(&self) -> io::Result<Self::Pending> {
        let pending = self.0.next().await?;
        Ok(Box::pin(async { pending.await.map(OneLane) }))
    }
}

struct Load;

fn method(name: &str) -> MethodId {
    MethodId::of("load", 1, name)
}

impl Service for Load {
    fn name(&self) -> &str {
        "load"
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        if call.method() == method("bulk") {
            let (mut tx, items) = stream::<Bytes>();
            let item = Bytes::from(vec![7; 16 * 1024]);
            tokio::spawn(async move {
                loop {
                    // Until nobody reads any more.
                    tx.send(item.clone()).await?;
                }
                #[allow(unreachable_code, reason = "names the error of the block")]
                Ok::<(), StreamError>(())
            });
            return Reply::ok(&items).boxed();
        }
        Box::pin(async move {
            match call.args::<Bytes>() {
                Ok(bytes) => Reply::ok(&bytes),
                Err(error) => Reply::invalid_payload(&error),
            }
        })
    }
}

struct Row {
    calls: usize,
    p50: Duration,
    p99: Duration,
    /// Of the bulk stream, in MB/s.
    rate: f64,
}

async fn small_calls(session: &Session, bulk: bool) -> Row {
    let received = Arc::new(AtomicU64::new(0));
    let reading = if bulk {
        let connection = session.open("load").await.unwrap();
        let mut items: Rx<Bytes> = connection.call(method("bulk"), &()).await.unwrap();
        let received = received.clone();
        Some(tokio::spawn(async move {
            let _open = connection;
            while let Ok(Some(item)) = items.recv().await {
                received.fetch_add(item.len() as u64, Ordering::Relaxed);
            }
        }))
    } else {
        None
    };
    let small = session.open("load").await.unwrap();
    let payload = Bytes::from_static(&[7; 64]);
    let mut times = Vec::with_capacity(CALLS);
    let (began, before) = (Instant::now(), received.load(Ordering::Relaxed));
    while times.len() < CALLS && began.elapsed() < AT_MOST {
        let call = Instant::now();
        let _echo: Bytes = small.call(method("echo"), &payload).await.unwrap();
        times.push(call.elapsed());
    }
    let bytes = received.load(Ordering::Relaxed) - before;
    let rate = bytes as f64 / began.elapsed().as_secs_f64() / 1e6;
    if let Some(reading) = reading {
        reading.abort();
    }
    times.sort_unstable();
    let calls = times.len();
    Row { calls, p50: times[calls / 2], p99: times[calls * 99 / 100], rate }
}

/// A session through a relay, by a way to listen and a way to dial.
async fn measure<L: Listener, C: Conduit>(
    listener: impl FnOnce(QuicListener) -> L,
    dialed: impl FnOnce(QuicConduit) -> C,
    (loss_ppm, bulk): (u32, bool),
) -> Row
where
    <L::Conduit as Conduit>::Reader: Unpin,
    <L::Conduit as Conduit>::Writer: Unpin,
    C::Reader: Unpin,
    C::Writer: Unpin,
{
    let tls = ServerTls::new(Identity::self_signed(&["localhost"]).unwrap());
    let quic = QuicListener::bind("127.0.0.1:0", &tls).await.unwrap();
    let server = quic.local_addr().unwrap();
    let endpoint: Endpoint = format!("quic://{server}").parse().unwrap();
    let serving = SessionConfig { services: Services::new().with(Load), ..SessionConfig::default() };
    let serving = Server::with_listener(listener(quic), endpoint.clone(), serving);
    let serving = tokio::spawn(serving.run(pending(), Duration::ZERO));
    let network = Network { loss_ppm, delay: DELAY, jitter: Duration::ZERO, seed: 42 };
    let relay = UdpRelay::start(server, network).await;
    let endpoint = endpoint.with_address(relay.address()).with_pin(tls.pin());
    let conduit = QuicConduit::connect(&endpoint, &ClientTls::default()).await.unwrap();
    let session = Session::connect(dialed(conduit), SessionConfig::default()).await.unwrap();
    let row = small_calls(&session, bulk).await;
    serving.abort();
    row
}

fn show(name: &str, network: &str, row: &Row) {
    let millis = |time: Duration| time.as_secs_f64() * 1e3;
    let (p50, p99) = (millis(row.p50), millis(row.p99));
    println!("{name:24} {network:22} {:>6} {p50:>9.1} {p99:>9.1} {:>10.2}", row.calls, row.rate);
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    println!("calls of 64 B, one after the other; {} ms each way", DELAY.as_millis());
    println!("{:24} {:22} {:>6} {:>9} {:>9} {:>10}", "", "", "calls", "p50 ms", "p99 ms", "bulk MB/s");
    // Cargo adds an option of its own.
    let wanted = std::env::args().skip(1).find(|word| !word.starts_with("--")).unwrap_or_default();
    let networks =
        [("no loss, no bulk", 0, false), ("1 % loss, no bulk", LOSS_PPM, false), ("1 % loss, bulk", LOSS_PPM, true)];
    runtime.block_on(async {
        for (network, loss, bulk) in networks.into_iter().filter(|(network, ..)| network.contains(&wanted)) {
            let lanes = measure(|listener| listener, |conduit| conduit, (loss, bulk)).await;
            show("a lane per connection", network, &lanes);
            let one = measure(OneLaneListener, OneLane, (loss, bulk)).await;
            show("everything on one lane", network, &one);
        }
    });
}

//! The tokio runtime end to end: calls and streams of a hand-written service over every conduit there is.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use tollway::conduit::{memory, tcp};
use tollway::protocol::error::{ConnectionEnd, Reason, SessionEnd};
use tollway::rpc::{
    BoxReply, CallError, IncomingCall, MethodId, Reply, Rx, Service, Services, StreamError, Tx, stream,
};
use tollway::{OpenError, Session, SessionConfig};

struct Kit;

fn method(name: &str) -> MethodId {
    MethodId::of("kit", 1, name)
}

#[derive(Serialize, Deserialize)]
struct Sum {
    numbers: Rx<u64>,
}

#[derive(Serialize, Deserialize)]
struct Counting {
    count: u64,
    numbers: Rx<u64>,
}

impl Service for Kit {
    fn name(&self) -> &str {
        "kit"
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        let id = call.method();
        if id == method("echo") {
            Box::pin(async move { Reply::ok(&call.args::<Vec<u8>>().expect("bytes")) })
        } else if id == method("sum") {
            Box::pin(async move {
                let mut sum = 0;
                let Sum { mut numbers } = call.args().expect("a stream");
                while let Some(number) = numbers.recv().await.expect("numbers") {
                    sum += number;
                }
                Reply::ok(&sum)
            })
        } else if id == method("count") {
            Box::pin(async move {
                let count = call.args::<u64>().expect("a number");
                let (mut tx, numbers) = stream();
                tokio::spawn(async move {
                    for number in 0..count {
                        if tx.send(number).await.is_err() {
                            return;
                        }
                    }
                    tx.finish();
                });
                Reply::ok(&Counting { count, numbers })
            })
        } else if id == method("double") {
            Box::pin(async move {
                let (mut numbers, mut doubled) = call.args::<(Rx<u64>, Tx<u64>)>().expect("streams");
                while let Ok(Some(number)) = numbers.recv().await {
                    doubled.send(2 * number).await.expect("somebody listens");
                }
                doubled.finish();
                Reply::ok(&())
            })
        } else if id == method("panic") {
            Box::pin(async move { panic!("a handler panics") })
        } else if id == method("never") {
            Box::pin(std::future::pending())
        } else if id == method("break") {
            Box::pin(async move {
                let (mut tx, numbers) = stream();
                tx.send(1u64).await.expect("room");
                drop(tx);
                Reply::ok(&numbers)
            })
        } else {
            Reply::unknown_method().boxed()
        }
    }
}

fn serving() -> SessionConfig {
    SessionConfig { services: Services::new().with(Kit), ..Default::default() }
}

async fn over_memory() -> (Session, Session) {
    let (left, right) = memory::pair(64 * 1024);
    let (client, server) =
        tokio::join!(Session::connect(left, SessionConfig::default()), Session::accept(right, serving()));
    (client.expect("a client"), server.expect("a server"))
}

async fn over_lanes(seed: u64) -> (Session, Session) {
    let (left, right) = memory::reordering(seed, 64 * 1024);
    let (client, server) =
        tokio::join!(Session::connect(left, SessionConfig::default()), Session::accept(right, serving()));
    (client.expect("a client"), server.expect("a server"))
}

async fn over_tcp() -> (Session, Session) {
    let listener = tcp::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let server = async { Session::accept(listener.accept().await, serving()).await };
    let client = async {
        Session::connect(tcp::TcpConduit::connect(address).await.expect("tcp"), SessionConfig::default()).await
    };
    let (client, server) = tokio::join!(client, server);
    (client.expect("a client"), server.expect("a server"))
}

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), future).await.expect("it ends in time")
}

async fn use_everything((client, server): (Session, Session)) {
    let kit = client.open("kit").await.expect("a connection");
    for size in [0, 1, 64, 4096, 100_000, 1_000_000] {
        let bytes = vec![7u8; size];
        assert_eq!(kit.call::<_, Vec<u8>>(method("echo"), &bytes).await, Ok(bytes));
    }

    let (mut tx, numbers) = stream();
    let args = Sum { numbers };
    let sum = kit.call::<_, u64>(method("sum"), &args);
    let (sum, ()) = tokio::join!(sum, async {
        for number in 0..100_000u64 {
            tx.send(number).await.expect("somebody sums");
        }
        tx.finish();
    });
    assert_eq!(sum, Ok(4_999_950_000));

    let mut counting: Counting = kit.call(method("count"), &50_000u64).await.expect("a stream");
    for expected in 0..counting.count {
        assert_eq!(counting.numbers.recv().await, Ok(Some(expected)));
    }
    assert_eq!(counting.numbers.recv().await, Ok(None));

    let (mut to, numbers) = stream::<u64>();
    let (doubled, mut from) = stream::<u64>();
    let args = (numbers, doubled);
    let call = kit.call::<_, ()>(method("double"), &args);
    let feed = async {
        for number in 0..1000 {
            to.send(number).await.expect("somebody doubles");
        }
        to.finish();
    };
    let read = async {
        for number in 0..1000 {
            assert_eq!(from.recv().await, Ok(Some(2 * number)));
        }
        assert_eq!(from.recv().await, Ok(None));
    };
    assert_eq!(tokio::join!(call, feed, read).0, Ok(()));

    let mut broken: Rx<u64> = kit.call(method("break"), &()).await.expect("a stream");
    let end = loop {
        match broken.recv().await {
            Ok(Some(number)) => assert_eq!(number, 1),
            end => break end,
        }
    };
    assert!(matches!(end, Err(StreamError::Reset(_))), "a stream that broke off never looks complete");

    assert_eq!(kit.call::<_, ()>(method("nothing"), &()).await, Err(CallError::UnknownMethod));
    assert_eq!(kit.call::<_, ()>(method("panic"), &()).await, Err(CallError::HandlerFailed));
    assert!(matches!(client.open("nobody").await, Err(OpenError::Rejected { .. })));

    // A call that was dropped is cancelled at the peer and leaves nothing behind.
    let never = tokio::time::timeout(Duration::from_millis(20), kit.call::<_, ()>(method("never"), &()));
    assert!(never.await.is_err());
    while kit.open_calls() > 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }

    client.close(Reason::new(4711, "enough"));
    assert_eq!(server.closed().await, SessionEnd::ClosedByPeer(Reason::new(4711, "enough")));
    assert_eq!(kit.closed().await, ConnectionEnd::Session(client.closed().await));
    assert!(matches!(
        kit.call::<_, ()>(method("echo"), &()).await,
        Err(CallError::ConnectionClosed { cause: ConnectionEnd::Session(_), sent: false })
    ));
}

#[tokio::test]
async fn everything_works_in_memory() {
    within(async { use_everything(over_memory().await).await }).await;
}

#[tokio::test]
async fn everything_works_on_lanes_that_overtake_each_other() {
    for seed in 0..5 {
        within(async { use_everything(over_lanes(seed).await).await }).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_works_over_tcp() {
    within(async { use_everything(over_tcp().await).await }).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn five_hundred_calls_in_flight_are_all_answered() {
    within(async {
        let (client, _server) = over_tcp().await;
        let kit = client.open("kit").await.expect("a connection");
        let mut tasks = tokio::task::JoinSet::new();
        for task in 0..500u32 {
            let kit = kit.clone();
            tasks.spawn(async move {
                for round in 0..20u32 {
                    let bytes = (task * 1000 + round).to_be_bytes().to_vec();
                    assert_eq!(kit.call::<_, Vec<u8>>(method("echo"), &bytes).await, Ok(bytes));
                }
            });
        }
        while let Some(joined) = tasks.join_next().await {
            joined.expect("no task fails");
        }
    })
    .await;
}

#[tokio::test]
async fn an_unread_stream_delays_nobody_and_holds_bounded_memory() {
    within(async {
        let (client, _server) = over_memory().await;
        let kit = client.open("kit").await.expect("a connection");
        let mut unread = Vec::new();
        for _ in 0..8 {
            unread.push(kit.call::<_, Counting>(method("count"), &10_000_000u64).await.expect("a stream"));
        }
        for _ in 0..100 {
            assert_eq!(kit.call::<_, Vec<u8>>(method("echo"), &vec![1u8]).await, Ok(vec![1]));
        }
        // Dropping them stops the senders and ends the calls.
        drop(unread);
        while kit.open_calls() > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn the_last_handle_closes_the_session() {
    within(async {
        let (client, server) = over_memory().await;
        let kit = client.open("kit").await.expect("a connection");
        drop(client);
        assert_eq!(kit.call::<_, Vec<u8>>(method("echo"), &vec![1u8]).await, Ok(vec![1]), "a connection keeps it open");
        drop(kit);
        assert!(matches!(server.closed().await, SessionEnd::ClosedByPeer(_)));
    })
    .await;
}

#[tokio::test]
async fn a_stream_outside_of_a_call_or_sent_twice_is_a_typed_error() {
    within(async {
        let (client, _server) = over_memory().await;
        let kit = client.open("kit").await.expect("a connection");
        let (tx, rx) = stream::<u64>();
        assert!(postcard::to_allocvec(&rx).is_err(), "outside of a call");
        let twice = kit.call::<_, ()>(method("double"), &(&rx, &rx)).await;
        assert!(matches!(twice, Err(CallError::Encode(_))), "{twice:?}");
        drop(tx);
    })
    .await;
}

/// A peer that does not read keeps back what it is sent, and not what this side does.
#[tokio::test]
async fn a_connection_is_closed_at_once_though_the_peer_does_not_read() {
    let (left, right) = memory::pair(64 * 1024);
    let (thaw, frozen) = tokio::sync::oneshot::channel::<()>();
    // The peer's session stands still with its runtime, once its first connection is there.
    let peer = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        let server = runtime.block_on(async {
            let server = Session::accept(right, serving()).await.expect("a session");
            while server.connection_count() == 0 {
                tokio::task::yield_now().await;
            }
            // The answer is written.
            tokio::time::sleep(Duration::from_millis(50)).await;
            server
        });
        let _thawed = frozen.blocking_recv();
        drop((server, runtime));
    });
    let client = Session::connect(left, SessionConfig::default()).await.expect("a session");
    let connection = client.open("kit").await.expect("a connection");
    tokio::time::sleep(Duration::from_millis(200)).await;
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let connection = connection.clone();
        calls.spawn(async move { connection.call::<_, Vec<u8>>(method("echo"), &vec![7u8; 200_000]).await });
    }
    tokio::time::sleep(Duration::from_millis(100)).await;
    connection.close(Reason::none());
    let closed = tokio::time::timeout(Duration::from_secs(5), connection.closed()).await;
    assert!(matches!(closed, Ok(ConnectionEnd::ClosedByUs(_))), "{closed:?}");
    let _peer_waits = thaw.send(());
    peer.join().expect("the peer");
}

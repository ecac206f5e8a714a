//! Relays: a connection of one session carried on to another, with everything on it, and nobody else hurt.
#![allow(clippy::unwrap_used)]

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::mpsc;
use tollway::conduit::{Conduit, FrameReader, FrameWriter, Lane, Received, Transmit, memory};
use tollway::escrow::{Ledger, LedgerConfig, LedgerService, LocalLedger};
use tollway::payment::{Payee, PayeeConfig, Wallet, WalletConfig};
use tollway::protocol::error::{ConnectionEnd, Reason, SessionEnd, code};
use tollway::protocol::id::{ConnectionId, Parity, StreamId};
use tollway::protocol::limits::{ConnectionLimits, SessionLimits};
use tollway::protocol::message::{Accept, End, Header, Hello, Open, Ping, ProtocolError, decode_header, encode_head};
use tollway::protocol::metadata::{Entry, Metadata, NO_PROPAGATE};
use tollway::protocol::payment::{Address, Amount, LedgerIdentity, MethodPrice, Price, SecretKey};
use tollway::relay::{ProxyError, RelaySummary, Side};
use tollway::rpc::{
    BoxReply, CallError, IncomingCall, MethodId, Reply, Rx, Service, Services, StreamError, Tx, stream,
};
use tollway::store::MemoryStore;
use tollway::{IncomingOpen, OpenError, Session, SessionConfig, proxy_connections};

/// Nothing here takes a tenth of it, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it takes too long")
}

struct Kit;

fn method(name: &str) -> MethodId {
    MethodId::of("kit", 1, name)
}

fn count_to(count: u64) -> Rx<u64> {
    let (mut tx, rx) = stream();
    tokio::spawn(async move {
        for number in 0..count {
            if tx.send(number).await.is_err() {
                return;
            }
        }
        tx.finish();
    });
    rx
}

async fn sum_of(mut numbers: Rx<u64>) -> Result<u64, StreamError> {
    let mut sum = 0;
    while let Some(number) = numbers.recv().await? {
        sum += number;
    }
    Ok(sum)
}

impl Service for Kit {
    fn name(&self) -> &str {
        "kit"
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        let id = call.method();
        Box::pin(async move {
            if id == method("echo") {
                let metadata = call.context().metadata().clone();
                Reply::raw(call.payload().clone()).with_metadata(metadata)
            } else if id == method("count") {
                Reply::ok(&count_to(call.args().unwrap()))
            } else if id == method("sum") {
                Reply::ok(&sum_of(call.args().unwrap()).await.unwrap())
            } else if id == method("sums") {
                // Streams that arrive in the items of a stream.
                let mut lists: Rx<Rx<u64>> = call.args().unwrap();
                let mut sums = Vec::new();
                while let Some(list) = lists.recv().await.unwrap() {
                    sums.push(sum_of(list).await.unwrap());
                }
                Reply::ok(&sums)
            } else if id == method("double") {
                let (mut numbers, mut doubled) = call.args::<(Rx<u64>, Tx<u64>)>().unwrap();
                while let Ok(Some(number)) = numbers.recv().await {
                    if doubled.send(2 * number).await.is_err() {
                        break;
                    }
                }
                doubled.finish();
                Reply::ok(&())
            } else if id == method("wait") {
                std::future::pending().await
            } else {
                Reply::unknown_method()
            }
        })
    }
}

fn serving(services: Services) -> SessionConfig {
    SessionConfig { services, ..SessionConfig::default() }
}

/// A session between two sides over a pipe of so many bytes: who connects, who accepts.
async fn session(capacity: usize, near: SessionConfig, far: SessionConfig) -> (Session, Session) {
    let (ours, theirs) = memory::pair(capacity);
    let (near, far) = within(async { tokio::join!(Session::connect(ours, near), Session::accept(theirs, far)) }).await;
    (near.unwrap(), far.unwrap())
}

type Ends = mpsc::Receiver<Result<RelaySummary, ProxyError>>;

/// What a relay serves that passes everything on to a session, and how each connection ended.
fn relaying_to(upstream: &Session) -> (Services, Ends) {
    let (tell, ends) = mpsc::channel(16);
    let upstream = upstream.clone();
    let relay = move |open: IncomingOpen| {
        let (upstream, tell) = (upstream.clone(), tell.clone());
        async move {
            let end = proxy_connections(open, &upstream).await;
            // Most tests do not ask.
            let _full = tell.try_send(end);
        }
    };
    (Services::new().with_fallback(relay), ends)
}

/// Client, relay and server, each pipe with so many bytes.
struct Line {
    client: Session,
    /// The relay's session with the client.
    relay: Session,
    /// The relay's session with the server.
    upstream: Session,
    server: Session,
    ends: Ends,
}

async fn line_with(capacity: usize, server: SessionConfig) -> Line {
    let (upstream, server) = session(capacity, SessionConfig::default(), server).await;
    let (services, ends) = relaying_to(&upstream);
    let (client, relay) = session(capacity, SessionConfig::default(), serving(services)).await;
    Line { client, relay, upstream, server, ends }
}

async fn line() -> Line {
    line_with(64 * 1024, serving(Services::new().with(Kit))).await
}

#[tokio::test]
async fn calls_and_streams_pass() {
    within(async {
        let mut line = line().await;
        let kit = line.client.open("kit").await.unwrap();
        assert_eq!(kit.call::<_, String>(method("echo"), "hello").await, Ok("hello".to_owned()));
        assert_eq!(kit.call::<_, u64>(method("nothing"), &()).await, Err(CallError::UnknownMethod));
        let large = vec![7u8; 900_000];
        assert_eq!(kit.call::<_, Vec<u8>>(method("echo"), &large).await, Ok(large));

        let numbers: Rx<u64> = kit.call(method("count"), &100_000u64).await.unwrap();
        assert_eq!(sum_of(numbers).await, Ok(4_999_950_000));
        assert_eq!(kit.call(method("sum"), &count_to(100_000)).await, Ok(4_999_950_000u64));

        let calls = (0..100u64).map(|number| {
            let kit = kit.clone();
            tokio::spawn(async move { (number, kit.call::<_, u64>(method("echo"), &number).await) })
        });
        for call in calls.collect::<Vec<_>>() {
            let (number, answer) = call.await.unwrap();
            assert_eq!(answer, Ok(number));
        }
        kit.close(Reason::new(2000, "that was all"));
        let summary = line.ends.recv().await.unwrap().unwrap();
        assert_eq!(summary.ended_by, Side::Left);
        assert_eq!(summary.end, ConnectionEnd::ClosedByPeer(Reason::new(2000, "that was all")));
        assert!(summary.left_to_right.frames > 100 && summary.left_to_right.bytes > 900_000, "{summary:?}");
        assert!(summary.right_to_left.frames > 100 && summary.right_to_left.bytes > 900_000, "{summary:?}");
    })
    .await;
}

async fn sums(client: &Session) {
    let kit = client.open("kit").await.unwrap();
    let (mut lists, receiver) = stream::<Rx<u64>>();
    let sums = kit.call::<_, Vec<u64>>(method("sums"), &receiver);
    let send = async {
        for count in [10, 20_000, 3] {
            lists.send(count_to(count)).await.unwrap();
        }
        // Its end may arrive together with the items and the ends of the streams in them.
        lists.finish();
    };
    assert_eq!(tokio::join!(sums, send).0, Ok(vec![45, 199_990_000, 3]));
}

#[tokio::test]
async fn streams_in_the_items_of_a_stream_arrive_with_a_relay_and_without() {
    within(async {
        let (client, _server) = session(64 * 1024, SessionConfig::default(), serving(Services::new().with(Kit))).await;
        sums(&client).await;
        sums(&line().await.client).await;
    })
    .await;
}

/// `[relay.no-propagate]`
#[tokio::test]
async fn metadata_passes_but_what_is_private_stays() {
    within(async {
        let line = line().await;
        let kit = line.client.open("kit").await.unwrap();
        let mut metadata = Metadata::new().with("trace", "1");
        metadata.push(Entry { key: "token".into(), value: b"secret".to_vec(), flags: NO_PROPAGATE });
        let answer = kit.call::<_, u8>(method("echo"), &1u8).with_metadata(metadata).response().await.unwrap();
        let entries: Vec<_> = answer.metadata.iter().map(|entry| entry.key.clone()).collect();
        assert_eq!(entries, ["trace"], "what the server saw comes back");
    })
    .await;
}

#[tokio::test]
async fn a_reject_passes_and_so_do_the_limits_of_the_other_side() {
    within(async {
        let mut config = serving(Services::new().with(Kit));
        config.connection_limits = ConnectionLimits { max_body: 1000, ..ConnectionLimits::default() };
        let mut line = line_with(64 * 1024, config).await;
        let rejected = line.client.open("nobody").await.unwrap_err();
        let OpenError::Rejected { reason, .. } = rejected else { panic!("{rejected:?}") };
        assert_eq!(reason.code, code::UNKNOWN_SERVICE);
        assert!(matches!(line.ends.recv().await, Some(Err(ProxyError::Rejected(_)))));

        let kit = line.client.open("kit").await.unwrap();
        assert_eq!(kit.call(method("echo"), &Bytes::from(vec![1; 900])).await, Ok(Bytes::from(vec![1; 900])));
        let error = kit.call::<_, Bytes>(method("echo"), &Bytes::from(vec![1; 1001])).await.unwrap_err();
        assert!(error.to_string().contains("1000"), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_session_that_is_lost_on_one_side_is_told_on_the_other() {
    within(async {
        let mut line = line().await;
        let kit = line.client.open("kit").await.unwrap();
        let waiting = tokio::spawn({
            let kit = kit.clone();
            async move { kit.call::<_, ()>(method("wait"), &()).await }
        });
        let numbers: Rx<u64> = kit.call(method("count"), &u64::MAX).await.unwrap();
        line.server.close(Reason::new(2001, "the shop is closed"));
        let end = ConnectionEnd::ClosedByPeer(Reason::new(2001, "the shop is closed"));
        assert_eq!(kit.closed().await, end);
        assert!(waiting.await.unwrap().is_err());
        assert!(sum_of(numbers).await.is_err(), "a stream that broke off never looks complete");
        let summary = line.ends.recv().await.unwrap().unwrap();
        assert_eq!((summary.ended_by, line.client.end()), (Side::Right, None));
        // The relay has nowhere to go now, and says so.
        let rejected = line.client.open("kit").await.unwrap_err();
        let OpenError::Rejected { reason, .. } = rejected else { panic!("{rejected:?}") };
        assert_eq!(reason.code, code::UNREACHABLE);
        drop((line.relay, line.upstream));
    })
    .await;
}

/// Two relays in a row; the second one gives up.
#[tokio::test]
async fn closes_and_their_codes_pass_in_both_directions() {
    within(async {
        let (upstream, _server) =
            session(64 * 1024, SessionConfig::default(), serving(Services::new().with(Kit))).await;
        let (tell, mut relays) = mpsc::channel(4);
        let second = move |open: IncomingOpen| {
            let (upstream, tell) = (upstream.clone(), tell.clone());
            async move {
                let relay = tokio::spawn(async move { proxy_connections(open, &upstream).await });
                tell.send(relay).await.unwrap();
            }
        };
        let services = Services::new().with_acceptor("kit", second);
        let (middle, _second) = session(64 * 1024, SessionConfig::default(), serving(services)).await;
        let (services, mut ends) = relaying_to(&middle);
        let (client, _first) = session(64 * 1024, SessionConfig::default(), serving(services)).await;

        let kit = client.open("kit").await.unwrap();
        assert_eq!(kit.call::<_, u64>(method("echo"), &5u64).await, Ok(5));
        relays.recv().await.unwrap().abort();
        let ConnectionEnd::ClosedByPeer(reason) = kit.closed().await else { panic!("{:?}", kit.end()) };
        assert_eq!(reason.code, code::ABANDONED);
        assert_eq!(ends.recv().await.unwrap().unwrap().ended_by, Side::Right);

        let kit = client.open("kit").await.unwrap();
        let relay = relays.recv().await.unwrap();
        kit.close(Reason::new(2002, "bye"));
        let end = ConnectionEnd::ClosedByPeer(Reason::new(2002, "bye"));
        assert_eq!(ends.recv().await.unwrap().unwrap().end, end);
        assert_eq!(relay.await.unwrap().unwrap().end, end, "the code went through both");
        assert!(client.open("else").await.is_err(), "and nothing else is relayed");
        assert_eq!(client.end(), None);
    })
    .await;
}

async fn flood(client: Session) {
    const COUNT: u64 = 60_000;
    let kit = client.open("kit").await.unwrap();
    let (mut doubled, receiver) = stream::<u64>();
    let (sender, mut answers) = stream::<u64>();
    let streams = (receiver, sender);
    let call = kit.call::<_, ()>(method("double"), &streams);
    let send = async {
        for number in 0..COUNT {
            doubled.send(number).await.unwrap();
        }
        doubled.finish();
    };
    let receive = async {
        let mut next = 0;
        while let Some(number) = answers.recv().await.unwrap() {
            assert_eq!(number, 2 * next);
            next += 1;
        }
        assert_eq!(next, COUNT);
    };
    let calls = async {
        let body = vec![1u8; 3000];
        for _ in 0..50 {
            assert_eq!(kit.call::<_, Vec<u8>>(method("echo"), &body).await, Ok(body.clone()));
        }
    };
    let (call, (), (), ()) = tokio::join!(call, send, receive, calls);
    call.unwrap();
}

#[tokio::test]
async fn two_floods_through_a_narrow_pipe_make_progress() {
    let services = || serving(Services::new().with(Kit));
    let (client, server) = session(1024, SessionConfig::default(), services()).await;
    within(flood(client)).await;
    drop(server);
    // And with a relay in the middle, where each pipe is full in both directions.
    let line = line_with(1024, services()).await;
    within(flood(line.client.clone())).await;
    drop(line);
}

#[tokio::test]
async fn what_nobody_reads_delays_no_other_connection() {
    within(async {
        let line = line().await;
        let (unread, kit) = (line.client.open("kit").await.unwrap(), line.client.open("kit").await.unwrap());
        // Both ends of the first connection are as full as they get.
        let _unread: Rx<u64> = unread.call(method("count"), &u64::MAX).await.unwrap();
        let stuck = tokio::spawn({
            let unread = unread.clone();
            async move {
                let (never, _nobody) = (count_to(u64::MAX), unread.clone());
                let (tx, _rx) = stream::<u64>();
                unread.call::<_, ()>(method("double"), &(never, tx)).await
            }
        });
        for number in 0..200u64 {
            assert_eq!(kit.call::<_, u64>(method("echo"), &number).await, Ok(number));
        }
        let numbers: Rx<u64> = kit.call(method("count"), &100_000u64).await.unwrap();
        assert_eq!(sum_of(numbers).await, Ok(4_999_950_000));
        stuck.abort();
    })
    .await;
}

fn frame(header: &impl Header) -> Transmit {
    Transmit { lane: Lane::ROOT, head: encode_head(header), payload: Bytes::new() }
}

/// `[relay.checks]`
#[tokio::test]
async fn a_client_that_breaks_a_rule_loses_its_own_session_and_nobody_elses() {
    within(async {
        let line = line().await;
        let (services, _ends) = relaying_to(&line.upstream);
        let (near, far) = memory::pair(64 * 1024);
        let (mut reader, mut writer) = far.split();
        let hostile = tokio::spawn(async move {
            let (limits, metadata) = (SessionLimits::default(), Metadata::new());
            let parity = Parity::Odd;
            let hello = Hello { min_version: 1, max_version: 1, parity, limits, metadata: metadata.clone() };
            writer.start_send(frame(&hello));
            writer.flush().await.unwrap();
            let mut frames = Vec::new();
            while frames.is_empty() {
                reader.recv(&mut frames).await.unwrap();
            }
            writer.start_send(frame(&Ping { nonce: 1 }));
            let (connection, service, limits) = (ConnectionId(1), "kit".into(), ConnectionLimits::default());
            writer.start_send(frame(&Open { connection, service, parity, limits, metadata }));
            writer.flush().await.unwrap();
            let mut accepted = false;
            loop {
                let mut frames = Vec::new();
                assert_ne!(reader.recv(&mut frames).await.unwrap(), Received::End, "without a word");
                for (_, mut frame_of) in frames {
                    if frame_of[0] == Accept::KIND && !std::mem::replace(&mut accepted, true) {
                        // The end of a stream that never was: whoever gets that must end the session it came by.
                        writer.start_send(frame(&End { connection, stream: StreamId(1) }));
                        writer.flush().await.unwrap();
                    }
                    if frame_of[0] == ProtocolError::KIND {
                        return decode_header::<ProtocolError>(&mut frame_of).unwrap().reason.code;
                    }
                }
            }
        });
        let session = Session::accept(near, serving(services)).await.unwrap();
        assert_eq!(hostile.await.unwrap(), code::ID);
        assert!(matches!(session.closed().await, SessionEnd::PeerViolation(_)));
        let kit = line.client.open("kit").await.unwrap();
        assert_eq!(kit.call::<_, u64>(method("echo"), &5u64).await, Ok(5));
        assert_eq!((line.upstream.end(), line.server.end()), (None, None));
    })
    .await;
}

fn key(seed: u8) -> SecretKey {
    SecretKey::from_bytes([seed; 32]).unwrap()
}

#[tokio::test]
async fn a_paid_connection_passes_and_is_settled_to_the_unit() {
    within(async {
        let config = LedgerConfig { dev: true, ..LedgerConfig::default() };
        let ledger = LocalLedger::new(Ledger::new(LedgerIdentity::of(&key(9)), config));
        // The ledger is a service of its own; payer and payee reach it as they like.
        let ledger_config = serving(Services::new().with(LedgerService::new(ledger.clone())));
        let any = "tcp://127.0.0.1:0".parse().unwrap();
        let ledger_server = tollway::Server::bind(&any, ledger_config).await.unwrap();
        let ledger_url = ledger_server.endpoint().to_string();
        tokio::spawn(ledger_server.run(std::future::pending(), Duration::ZERO));

        let price = MethodPrice {
            method_id: method("count").0,
            name: "count".to_owned(),
            price: Price { item: Amount::new(3), ..Price::default() },
            max_item_bytes: 10,
            max_answer_bytes: 100,
        };
        let store = Arc::new(MemoryStore::new());
        let mut selling = PayeeConfig::new(key(2), Arc::new(ledger.clone()), store, "kit", vec![price]);
        selling.ledger_url = Some(ledger_url);
        let payee = Payee::new(selling).unwrap();
        let line = line_with(64 * 1024, serving(Services::new().with_paid(Kit, payee.clone()))).await;

        let mut buying = WalletConfig::new(key(1), Amount::new(1_000_000));
        buying.payee = Some(payee.address());
        buying.max_ahead = Some(Amount::new(2_000));
        let paid = Wallet::new(buying).open(&line.client, "kit").await.unwrap();
        let numbers: Rx<u64> = paid.connection().call(method("count"), &20_000u64).await.unwrap();
        assert_eq!(sum_of(numbers).await, Ok(199_990_000));
        let closed = paid.close().await.unwrap();
        assert_eq!(closed.receipt.settled, Amount::new(60_000), "{closed:?}");
        let balance = ledger.read(|ledger| ledger.balance(payee.address(), Address::ZERO));
        assert_eq!(balance, Amount::new(60_000));
    })
    .await;
}

#[tokio::test]
async fn nothing_is_left_of_a_relay_when_it_is_over() {
    within(async {
        let mut line = line().await;
        for round in 0..50u64 {
            let kit = line.client.open("kit").await.unwrap();
            assert_eq!(kit.call::<_, u64>(method("echo"), &round).await, Ok(round));
            drop(kit);
            line.ends.recv().await.unwrap().unwrap();
        }
        let opened = line.client.open("kit");
        tokio::select! {
            biased;
            _ = opened => panic!("it cannot be open yet"),
            () = std::future::ready(()) => {}
        }
        // Whichever way the abandoned one ended, it ended.
        let _either = line.ends.recv().await.unwrap();
        while line.relay.connection_count() + line.upstream.connection_count() > 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

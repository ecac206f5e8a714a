//! Relays and login by key over conduits with TLS, and with a lane for each connection.
#![allow(clippy::unwrap_used)]

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Mutex, mpsc, oneshot};
use tollway::auth::{Authenticator, Greeting, Identity as Who, KeyAuthenticator, KeyProver, Prover, Refusal};
use tollway::conduit::PeerInfo;
use tollway::conduit::any::{AnyListener, ListenOptions};
use tollway::conduit::endpoint::Endpoint;
use tollway::conduit::tls::{Identity, ServerTls};
use tollway::future::BoxFuture;
use tollway::protocol::error::{ConnectionEnd, Reason, SessionEnd, code};
use tollway::protocol::login::LOGIN_METHOD;
use tollway::protocol::payment::SecretKey;
use tollway::rpc::{BoxReply, CallError, IncomingCall, MethodId, Reply, Rx, Service, Services, Tx, stream};
use tollway::{
    ConnectError, IncomingOpen, OpenError, Server, ServerConfig, ServerHandle, Session, SessionConfig,
    proxy_connections,
};

/// Nothing here takes a tenth of it, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(120);

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it takes too long")
}

const ECHO: MethodId = MethodId(1);
const DOUBLE: MethodId = MethodId(2);
const COUNT: MethodId = MethodId(3);

struct Kit;

impl Service for Kit {
    fn name(&self) -> &str {
        "kit"
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        Box::pin(async move {
            match call.method() {
                DOUBLE => {
                    let (mut numbers, mut doubled) = call.args::<(Rx<u64>, Tx<u64>)>().unwrap();
                    while let Ok(Some(number)) = numbers.recv().await {
                        if doubled.send(2 * number).await.is_err() {
                            break;
                        }
                    }
                    doubled.finish();
                    Reply::ok(&())
                }
                COUNT => {
                    let (mut tx, items) = stream::<(u64, Bytes)>();
                    tokio::spawn(async move {
                        for number in 0..100 {
                            if tx.send((number, Bytes::from(vec![7; 20_000]))).await.is_err() {
                                return;
                            }
                        }
                        tx.finish();
                    });
                    Reply::ok(&items)
                }
                _ => Reply::raw(call.payload().clone()),
            }
        })
    }
}

async fn serve(scheme: &str, config: impl Into<ServerConfig>) -> ServerHandle {
    let mut options = ListenOptions::default();
    options.tls = Some(ServerTls::new(Identity::self_signed(&["localhost"]).unwrap()));
    let listener = AnyListener::bind(&format!("{scheme}://127.0.0.1:0").parse().unwrap(), &options).await.unwrap();
    let endpoint = listener.endpoints().next().unwrap().clone();
    let server = Server::with_listener(listener, endpoint, config);
    let handle = server.handle();
    tokio::spawn(server.run(std::future::pending(), PATIENCE));
    handle
}

async fn connect(endpoint: &Endpoint, config: SessionConfig) -> Result<Session, ConnectError> {
    within(tollway::connect(endpoint, config)).await
}

/// A server and a relay before it, and a session with the relay.
async fn line(near: &str, far: &str) -> (Session, ServerHandle, ServerHandle) {
    let services = Services::new().with(Kit);
    let server = serve(far, SessionConfig { services, ..SessionConfig::default() }).await;
    let upstream = connect(server.endpoint(), SessionConfig::default()).await.unwrap();
    let relay = move |open: IncomingOpen| {
        let upstream = upstream.clone();
        async move { drop(proxy_connections(open, &upstream).await) }
    };
    let services = Services::new().with_fallback(relay);
    let relay = serve(near, SessionConfig { services, ..SessionConfig::default() }).await;
    (connect(relay.endpoint(), SessionConfig::default()).await.unwrap(), relay, server)
}

const LINES: [(&str, &str); 4] = [("quic", "quic"), ("quic", "tls"), ("tls", "quic"), ("tls", "tls")];

/// The lanes of the two sides of a relay are numbered by themselves: ids of connections differ, ids inside do not.
#[tokio::test]
async fn calls_and_streams_pass_a_relay_between_lanes() {
    for (near, far) in LINES {
        let (client, _relay, _server) = line(near, far).await;
        // So that the two sides count differently.
        let rejected = within(client.open("nothing")).await.unwrap_err();
        assert!(matches!(rejected, OpenError::Rejected { reason, .. } if reason.code == code::UNKNOWN_SERVICE));
        let users = (0..8u64).map(|user| {
            let client = client.clone();
            tokio::spawn(async move {
                let kit = client.open("kit").await.unwrap();
                let bulk: Rx<(u64, Bytes)> = kit.call(COUNT, &()).await.unwrap();
                let (mut numbers, to) = stream::<u64>();
                let (from, mut doubled) = stream::<u64>();
                let call = kit.call::<_, ()>(DOUBLE, &(to, from));
                let talk = async {
                    for number in user..user + 50 {
                        numbers.send(number).await.unwrap();
                        assert_eq!(doubled.recv().await.unwrap(), Some(2 * number));
                    }
                    numbers.finish();
                    assert_eq!(doubled.recv().await.unwrap(), None);
                };
                let read = async {
                    let mut bulk = bulk;
                    let mut next = 0;
                    while let Some((number, bytes)) = bulk.recv().await.unwrap() {
                        assert_eq!((number, bytes.len()), (next, 20_000));
                        next += 1;
                    }
                    assert_eq!(next, 100);
                };
                let (answer, (), ()) = tokio::join!(call, talk, read);
                answer.unwrap();
            })
        });
        for user in users.collect::<Vec<_>>() {
            within(user).await.unwrap();
        }
    }
}

/// More connections, one after the other and at once, than QUIC lets be open at first; and nothing is left of them.
#[tokio::test]
async fn lanes_of_relayed_connections_come_and_go() {
    let (client, _relay, server) = line("quic", "quic").await;
    for _ in 0..2 {
        let opens = (0..150u32).map(|number| {
            let client = client.clone();
            tokio::spawn(async move {
                let kit = client.open("kit").await.unwrap();
                assert_eq!(kit.call::<_, u32>(ECHO, &number).await, Ok(number));
                kit.close(Reason::new(2_000, "done"));
            })
        });
        for open in opens.collect::<Vec<_>>() {
            within(open).await.unwrap();
        }
    }
    within(async {
        while client.connection_count() > 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
    assert_eq!(server.session_count(), 1);
}

/// A server, or the relay before it, stops while a call is under way: it ends in order, whatever lies between.
#[tokio::test]
async fn a_server_with_relayed_connections_stops_in_order() {
    for (near, far) in LINES {
        for by_relay in [true, false] {
            let (client, relay, server) = line(near, far).await;
            let kit = within(client.open("kit")).await.unwrap();
            let (mut numbers, to) = stream::<u64>();
            let (from, mut doubled) = stream::<u64>();
            let call = tokio::spawn({
                let kit = kit.clone();
                async move { kit.call::<_, ()>(DOUBLE, &(to, from)).await }
            });
            numbers.send(1).await.unwrap();
            assert_eq!(within(doubled.recv()).await.unwrap(), Some(2));
            if by_relay {
                relay.stop()
            } else {
                server.stop()
            }
            within(kit.until_draining()).await;
            let late = within(async { kit.call::<_, u32>(ECHO, &1u32).await }).await.unwrap_err();
            assert!(late.is_retryable(), "{late}");
            // What is under way goes on.
            numbers.send(2).await.unwrap();
            assert_eq!(within(doubled.recv()).await.unwrap(), Some(4));
            numbers.finish();
            assert_eq!(within(call).await.unwrap(), Ok(()));
            let end = within(kit.closed()).await;
            assert!(matches!(&end, ConnectionEnd::ClosedByPeer(reason) if reason.code == code::GOING_AWAY), "{end}");
        }
    }
}

const AUDIENCE: &str = "files";

fn key(seed: u8) -> SecretKey {
    SecretKey::from_bytes([seed; 32]).unwrap()
}

fn signing(prover: impl Prover) -> SessionConfig {
    SessionConfig { prover: Some(Arc::new(prover)), ..SessionConfig::default() }
}

fn letting_in(authenticator: impl Authenticator) -> ServerConfig {
    let session = SessionConfig { services: Services::new().with(Kit), ..SessionConfig::default() };
    ServerConfig { authenticator: Some(Arc::new(authenticator)), ..session.into() }
}

#[tokio::test]
async fn a_key_signs_in_over_every_conduit() {
    for scheme in ["tcp", "tls", "quic", "ws", "wss"] {
        let known = KeyAuthenticator::known(AUDIENCE).with(key(1).address(), "the payer");
        let server = serve(scheme, letting_in(known)).await;
        let session = connect(server.endpoint(), signing(KeyProver::new(key(1), AUDIENCE))).await.unwrap();
        let kit = within(session.open("kit")).await.unwrap();
        assert_eq!(within(async { kit.call::<_, u32>(ECHO, &5u32).await }).await, Ok(5));
        let stranger = connect(server.endpoint(), signing(KeyProver::new(key(2), AUDIENCE))).await;
        assert_eq!(refusal(stranger).code, code::FORBIDDEN, "{scheme}");
    }
}

#[track_caller]
fn refusal(result: Result<Session, ConnectError>) -> Reason {
    match result {
        Err(ConnectError::Session(error)) => match error.end {
            SessionEnd::RefusedByPeer(reason) => reason,
            end => panic!("{end}"),
        },
        other => panic!("{other:?}"),
    }
}

/// A challenge on its way to somebody who can answer it.
type Passed = (Bytes, oneshot::Sender<Bytes>);

/// Lets whoever comes to the thief answer the challenge that the thief was given.
#[derive(Debug)]
struct Thief(Mutex<mpsc::Receiver<Passed>>);

impl Authenticator for Thief {
    fn authenticate<'a>(&'a self, greeting: &'a mut Greeting) -> BoxFuture<'a, Result<Who, Refusal>> {
        Box::pin(async move {
            let (challenge, answer) = self.0.lock().await.recv().await.unwrap();
            let proof = greeting.challenge(LOGIN_METHOD, challenge).await?;
            answer.send(proof).unwrap();
            Ok(Who::new("the victim", "stolen"))
        })
    }
}

/// The thief's other half, which passes the victim's proof off as its own.
#[derive(Debug)]
struct Passing(mpsc::Sender<Passed>);

impl Prover for Passing {
    fn prove<'a>(&'a self, _: &'a str, challenge: Bytes, _: &'a PeerInfo) -> BoxFuture<'a, Result<Bytes, Refusal>> {
        Box::pin(async move {
            let (answer, proof) = oneshot::channel();
            self.0.send((challenge, answer)).await.unwrap();
            Ok(proof.await.unwrap())
        })
    }
}

/// Over TLS a proof is bound to the conduit: whoever stands in between, with a certificate that the victim takes, cannot
/// pass it on. Without TLS nothing is in its way. `[session.auth.exporter]` `[conduit.tls.exporter]`
#[tokio::test]
async fn a_proof_cannot_be_passed_on_over_tls() {
    for (scheme, passes) in [("tls", false), ("quic", false), ("wss", false), ("tcp", true)] {
        let known = KeyAuthenticator::known(AUDIENCE).with(key(1).address(), "the payer");
        let honest = serve(scheme, letting_in(known)).await;
        let (pass, passed) = mpsc::channel(1);
        let thief = serve(scheme, letting_in(Thief(Mutex::new(passed)))).await;
        let victim = connect(thief.endpoint(), signing(KeyProver::new(key(1), AUDIENCE)));
        let stolen = connect(honest.endpoint(), signing(Passing(pass)));
        let (_deceived, stolen) = tokio::join!(victim, stolen);
        match passes {
            true => assert!(stolen.is_ok()),
            false => assert_eq!(refusal(stolen).code, code::UNAUTHENTICATED, "{scheme}"),
        }
    }
}

/// What fails is told apart: [`CallError`] of a relayed call is that of a direct one.
#[tokio::test]
async fn an_error_passes_a_relay_unchanged() {
    for (near, far) in LINES {
        let (client, _relay, _server) = line(near, far).await;
        let kit = within(client.open("kit")).await.unwrap();
        let huge = vec![0u8; 2 << 20];
        let error = within(async { kit.call::<_, Vec<u8>>(ECHO, &huge).await }).await.unwrap_err();
        assert!(matches!(error, CallError::TooLarge { limit: 1_048_576, .. }), "{error}");
    }
}

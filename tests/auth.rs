//! Who gets a session on a server: tokens, keys, what a conduit proves; and what is tried instead.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::Mutex;
use std::time::Duration;

use bytes::Bytes;
use tollway::auth::{
    Authenticator, BearerToken, Greeting, Identity, KeyAuthenticator, KeyProver, Prover, Refusal, TokenAuthenticator,
};
use tollway::conduit::PeerInfo;
use tollway::future::BoxFuture;
use tollway::protocol::error::{Reason, SessionEnd, code};
use tollway::protocol::login::LOGIN_METHOD;
use tollway::protocol::payment::SecretKey;
use tollway::rpc::{BoxReply, IncomingCall, MethodId, Reply, Service, Services};
use tollway::{ConnectError, Server, ServerConfig, ServerHandle, Session, SessionConfig};

/// Nothing here takes a tenth of it, even on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it takes too long")
}

/// Tells a caller who it is.
struct Mirror;

impl Service for Mirror {
    fn name(&self) -> &str {
        "mirror"
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        let identity = call.context().identity();
        let shown = identity.map(|who| (who.name().to_owned(), who.method().to_owned(), who.data::<u32>().copied()));
        Reply::ok(&shown).boxed()
    }
}

async fn serve(authenticator: impl Authenticator) -> ServerHandle {
    let session = SessionConfig { services: Services::new().with(Mirror), ..SessionConfig::default() };
    let config = ServerConfig { authenticator: Some(Arc::new(authenticator)), ..session.into() };
    let server = Server::bind(&"tcp://127.0.0.1:0".parse().unwrap(), config).await.unwrap();
    let handle = server.handle();
    tokio::spawn(server.run(std::future::pending(), Duration::ZERO));
    handle
}

async fn connect(server: &ServerHandle, config: SessionConfig) -> Result<Session, SessionEnd> {
    match within(tollway::connect(server.endpoint(), config)).await {
        Ok(session) => Ok(session),
        Err(ConnectError::Session(error)) => Err(error.end),
        Err(error) => panic!("{error}"),
    }
}

type Shown = Option<(String, String, Option<u32>)>;

async fn mirrored(session: &Session) -> Shown {
    let mirror = session.open("mirror").await.unwrap();
    within(mirror.call(MethodId(1), &())).await.unwrap()
}

#[track_caller]
fn refused(end: Result<Session, SessionEnd>) -> Reason {
    match end {
        Err(SessionEnd::RefusedByPeer(reason)) => reason,
        other => panic!("{other:?}"),
    }
}

fn bearing(token: &str) -> SessionConfig {
    let mut config = SessionConfig::default();
    config.protocol.metadata.push(BearerToken::new(token).unwrap().entry());
    config
}

fn signing(prover: impl Prover) -> SessionConfig {
    SessionConfig { prover: Some(Arc::new(prover)), ..SessionConfig::default() }
}

fn key(seed: u8) -> SecretKey {
    SecretKey::from_bytes([seed; 32]).unwrap()
}

#[tokio::test]
async fn a_token_says_who_its_bearer_is_and_without_one_there_is_no_session() {
    let token = |text| BearerToken::new(text).unwrap();
    let admin = Identity::new("admin", "token").with_data(7u32);
    let tokens = TokenAuthenticator::new()
        .with("alice", &token("alice-has-this-token"))
        .with_identity(admin, &token("admin-has-this-token"));
    let server = serve(tokens).await;
    let session = connect(&server, bearing("alice-has-this-token")).await.unwrap();
    assert_eq!(mirrored(&session).await, Some(("alice".into(), "token".into(), None)));
    let session = connect(&server, bearing("admin-has-this-token")).await.unwrap();
    assert_eq!(mirrored(&session).await, Some(("admin".into(), "token".into(), Some(7))));

    for config in [SessionConfig::default(), bearing("nobody-has-this-token")] {
        let reason = refused(connect(&server, config).await);
        assert_eq!(reason.code, code::UNAUTHENTICATED);
        assert!(!reason.text.contains("has-this-token"), "{reason}");
    }
    assert_eq!(server.session_count(), 2);
}

#[tokio::test]
async fn without_an_authenticator_nobody_is_anybody() {
    let session = SessionConfig { services: Services::new().with(Mirror), ..SessionConfig::default() };
    let server = Server::bind(&"tcp://127.0.0.1:0".parse().unwrap(), session).await.unwrap();
    let handle = server.handle();
    tokio::spawn(server.run(std::future::pending(), Duration::ZERO));
    assert_eq!(mirrored(&connect(&handle, bearing("alice-has-this-token")).await.unwrap()).await, None);
}

#[tokio::test]
async fn a_key_signs_in_where_it_is_known_and_means_it() {
    let server = serve(KeyAuthenticator::known("files").with(key(1).address(), "the payer")).await;
    let session = connect(&server, signing(KeyProver::new(key(1), "files"))).await.unwrap();
    assert_eq!(mirrored(&session).await, Some(("the payer".into(), "key".into(), None)));
    let reason = refused(connect(&server, signing(KeyProver::new(key(2), "files"))).await);
    assert_eq!(reason.code, code::FORBIDDEN, "{reason}");
    // A proof for another server, which a dishonest one could pass on. [session.auth.audience]
    let reason = refused(connect(&server, signing(KeyProver::new(key(1), "other"))).await);
    assert_eq!(reason.code, code::UNAUTHENTICATED, "{reason}");
    // One without a key says so itself.
    let Err(SessionEnd::ClosedByUs(reason)) = connect(&server, SessionConfig::default()).await else { panic!() };
    assert_eq!(reason.code, code::UNAUTHENTICATED);

    let anybody = serve(KeyAuthenticator::any("files")).await;
    let session = connect(&anybody, signing(KeyProver::new(key(2), "files"))).await.unwrap();
    assert_eq!(mirrored(&session).await, Some((key(2).address().to_string(), "key".into(), None)));
}

/// Keeps what an honest prover says.
#[derive(Debug)]
struct Recorder {
    honest: KeyProver,
    heard: Arc<Mutex<Vec<Bytes>>>,
}

impl Prover for Recorder {
    fn prove<'a>(
        &'a self,
        method: &'a str,
        challenge: Bytes,
        peer: &'a PeerInfo,
    ) -> BoxFuture<'a, Result<Bytes, Refusal>> {
        Box::pin(async move {
            let proof = self.honest.prove(method, challenge, peer).await?;
            self.heard.lock().unwrap().push(proof.clone());
            Ok(proof)
        })
    }
}

/// Says what was heard.
#[derive(Debug)]
struct Replay(Bytes);

impl Prover for Replay {
    fn prove<'a>(&'a self, method: &'a str, _: Bytes, _: &'a PeerInfo) -> BoxFuture<'a, Result<Bytes, Refusal>> {
        assert_eq!(method, LOGIN_METHOD);
        Box::pin(std::future::ready(Ok(self.0.clone())))
    }
}

/// `[session.auth.fresh]`
#[tokio::test]
async fn a_recorded_proof_is_of_no_use() {
    for authenticator in [KeyAuthenticator::any("files"), KeyAuthenticator::known("files").with(key(1).address(), "a")]
    {
        let server = serve(authenticator).await;
        let heard = Arc::<Mutex<Vec<Bytes>>>::default();
        let recorder = Recorder { honest: KeyProver::new(key(1), "files"), heard: heard.clone() };
        connect(&server, signing(recorder)).await.unwrap();
        let proof = heard.lock().unwrap().pop().unwrap();
        for proof in [proof.clone(), proof.slice(1..), Bytes::new()] {
            let reason = refused(connect(&server, signing(Replay(proof))).await);
            assert_eq!(reason.code, code::UNAUTHENTICATED, "{reason}");
        }
        assert_eq!(server.session_count(), 0, "the honest session is over, and there is no other");
    }
}

/// Does as the name in the hello says.
#[derive(Debug)]
struct Odd;

impl Authenticator for Odd {
    fn authenticate<'a>(&'a self, greeting: &'a mut Greeting) -> BoxFuture<'a, Result<Identity, Refusal>> {
        Box::pin(async move {
            match greeting.metadata().value("do") {
                Some(b"panic") => panic!("an authenticator's own fault"),
                Some(b"own code") => Err(Refusal::new(4242, "not on Sundays")),
                Some(b"twice") => {
                    greeting.challenge(LOGIN_METHOD, vec![0; 32].into()).await?;
                    greeting.challenge(LOGIN_METHOD, vec![0; 32].into()).await?;
                    Ok(Identity::new("nobody", "odd"))
                }
                Some(b"never") => std::future::pending().await,
                _ => Ok(Identity::new(greeting.peer().kind(), "odd")),
            }
        })
    }
}

fn doing(what: &str) -> SessionConfig {
    let mut config = signing(KeyProver::new(key(1), "files"));
    config.protocol.metadata = std::mem::take(&mut config.protocol.metadata).with("do", what);
    config
}

#[tokio::test]
async fn whatever_an_authenticator_does_the_peer_is_told_and_the_server_goes_on() {
    let server = serve(Odd).await;
    assert_eq!(refused(connect(&server, doing("panic")).await).code, code::INTERNAL);
    assert_eq!(refused(connect(&server, doing("own code")).await), Reason::new(4242, "not on Sundays"));
    assert_eq!(refused(connect(&server, doing("twice")).await).code, code::INTERNAL);
    // One that waits for ever holds up nobody else, and its peer can go.
    let hung = tokio::spawn({
        let server = server.clone();
        async move { connect(&server, doing("never")).await }
    });
    while server.handshake_count() == 0 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let session = connect(&server, doing("nothing")).await.unwrap();
    assert_eq!(mirrored(&session).await, Some(("tcp".into(), "odd".into(), None)));
    hung.abort();
    within(async {
        while server.handshake_count() > 0 {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn an_authentication_that_takes_too_long_ends_with_the_handshake() {
    let mut session = SessionConfig { services: Services::new().with(Mirror), ..SessionConfig::default() };
    session.protocol.handshake_timeout = Duration::from_millis(100);
    let config = ServerConfig { authenticator: Some(Arc::new(Odd)), ..session.into() };
    let server = Server::bind(&"tcp://127.0.0.1:0".parse().unwrap(), config).await.unwrap();
    let handle = server.handle();
    tokio::spawn(server.run(std::future::pending(), Duration::ZERO));
    let Err(SessionEnd::ClosedByPeer(reason)) = connect(&handle, doing("never")).await else { panic!() };
    assert_eq!(reason.code, code::TIMEOUT);
}

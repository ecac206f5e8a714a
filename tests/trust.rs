//! Who trusts whom over TLS, and what each side is told when it does not: one table for every conduit that has TLS.
#![allow(clippy::print_stdout, reason = "what each side is told, to be read by people: --nocapture")]
#![allow(clippy::unwrap_used)]

use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, date_time_ymd};
use tollway::conduit::any::{AnyListener, ConnectOptions, EstablishError, ListenOptions};
use tollway::conduit::endpoint::{Endpoint, Fingerprint};
use tollway::conduit::listen::Listener;
use tollway::conduit::tls::{ClientTls, Identity, ServerTls, TlsError, certificates};
use tollway::conduit::{Conduit, FrameReader, PeerIdentity, Received};
use tollway::{ConnectError, Server, Session, SessionConfig, connect_with};
use tollway_protocol::frame::PREFACE;

/// The conduits with TLS.
const SCHEMES: [&str; 3] = ["tls", "quic", "wss"];

/// A CA of a test's own.
struct Ca(CertifiedIssuer<'static, KeyPair>);

impl Ca {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Ca(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn root(&self) -> Vec<tollway::conduit::tls::CertificateDer<'static>> {
        certificates(self.0.pem().as_bytes()).unwrap()
    }

    fn issue(&self, name: &str) -> Identity {
        self.issue_with(name, |_| {})
    }

    fn issue_with(&self, name: &str, change: impl FnOnce(&mut CertificateParams)) -> Identity {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        Identity::from_pem(certificate.pem().as_bytes(), key.serialize_pem().as_bytes()).unwrap()
    }
}

/// Serves nothing on loopback with this certificate, until the runtime ends.
async fn serve(scheme: &str, tls: ServerTls) -> Endpoint {
    let mut options = ListenOptions::default();
    options.tls = Some(tls);
    let place = format!("{scheme}://127.0.0.1:0").parse().unwrap();
    let listener = AnyListener::bind(&place, &options).await.unwrap();
    let endpoint = listener.endpoints().next().unwrap().clone();
    let server = Server::with_listener(listener, endpoint.clone(), SessionConfig::default());
    tokio::spawn(server.run(std::future::pending(), Duration::ZERO));
    endpoint
}

/// The same place by the name that certificates are for.
fn by_name(endpoint: &Endpoint) -> Endpoint {
    format!("{}://localhost:{}", endpoint.scheme().name(), endpoint.port()).parse().unwrap()
}

async fn connect(endpoint: &Endpoint, tls: ClientTls) -> Result<Session, ConnectError> {
    let mut options = ConnectOptions::default();
    options.tls = tls;
    let connecting = connect_with(endpoint, SessionConfig::default(), &options);
    tokio::time::timeout(Duration::from_secs(60), connecting).await.expect("connecting hangs")
}

/// The error of a connection that must fail, with a text that names what to do.
#[track_caller]
fn told(result: Result<Session, ConnectError>, remedy: &str) -> TlsError {
    let error = result.expect_err("there is a session");
    println!("{error}");
    assert!(error.to_string().contains(remedy), "{error}");
    match error {
        ConnectError::Tls { source, .. } => source,
        other => panic!("{other:?}"),
    }
}

fn trusting(ca: &Ca) -> ClientTls {
    ClientTls::default().with_roots(ca.root())
}

#[tokio::test]
async fn a_pin_is_all_that_a_client_needs() {
    for scheme in SCHEMES {
        let endpoint = serve(scheme, ServerTls::new(Identity::self_signed(&["elsewhere"]).unwrap())).await;
        assert!(endpoint.pin().is_some(), "{endpoint}");
        let session = connect(&endpoint, ClientTls::default()).await.unwrap();
        let PeerIdentity::Certificate { chain } = session.peer().identity() else { panic!("{:?}", session.peer()) };
        assert_eq!(chain.len(), 1);
        // [conduit.tls.exporter]
        assert!(session.peer().exporter().is_some());
        assert_eq!(session.peer().kind(), scheme);
    }
}

/// `[conduit.tls.pin]`
#[tokio::test]
async fn another_certificate_than_the_pinned_one_is_refused() {
    for scheme in SCHEMES {
        let endpoint = serve(scheme, ServerTls::new(Identity::self_signed(&["localhost"]).unwrap())).await;
        let (found, expected) = (endpoint.pin().unwrap(), Fingerprint([7; 32]));
        // Not even one that a CA vouches for.
        let result = connect(&endpoint.with_pin(Some(expected)), ClientTls::default()).await;
        assert_eq!(told(result, "Ask its owner"), TlsError::WrongPin { expected, found });
    }
}

#[tokio::test]
async fn a_ca_vouches_for_the_names_in_a_certificate_and_for_no_others() {
    for scheme in SCHEMES {
        let ca = Ca::new();
        let endpoint = serve(scheme, ServerTls::new(ca.issue("localhost"))).await;
        assert_eq!(endpoint.pin(), None, "a CA vouches for it");
        connect(&by_name(&endpoint), trusting(&ca)).await.unwrap();
        let result = connect(&endpoint, trusting(&ca)).await;
        assert_eq!(told(result, "use a name that it is for"), TlsError::WrongHost { host: "127.0.0.1".to_owned() });
    }
}

#[tokio::test]
async fn a_certificate_of_nobody_that_is_trusted_is_refused_with_its_fingerprint() {
    for scheme in SCHEMES {
        let trusted = Ca::new();
        let made = Identity::self_signed(&["localhost"]).unwrap();
        for identity in [made, Ca::new().issue("localhost")] {
            let fingerprint = identity.fingerprint();
            let endpoint = serve(scheme, ServerTls::new(identity)).await;
            let result = connect(&by_name(&endpoint), trusting(&trusted)).await;
            let remedy = format!("write #sha256={fingerprint} behind the URL");
            assert_eq!(told(result, &remedy), TlsError::UnknownIssuer { fingerprint });
        }
    }
}

#[tokio::test]
async fn a_certificate_out_of_its_time_is_refused() {
    for scheme in SCHEMES {
        let ca = Ca::new();
        let expired = ca.issue_with("localhost", |params| params.not_after = date_time_ymd(2001, 1, 1));
        let endpoint = serve(scheme, ServerTls::new(expired)).await;
        assert_eq!(told(connect(&by_name(&endpoint), trusting(&ca)).await, "renewed"), TlsError::Expired);
        let future = ca.issue_with("localhost", |params| params.not_before = date_time_ymd(4000, 1, 1));
        let endpoint = serve(scheme, ServerTls::new(future)).await;
        assert_eq!(told(connect(&by_name(&endpoint), trusting(&ca)).await, "clocks"), TlsError::NotYetValid);
    }
}

#[tokio::test]
async fn a_client_proves_itself_by_a_certificate_of_the_listeners_ca() {
    for scheme in SCHEMES {
        let (ca, clients) = (Ca::new(), Ca::new());
        let tls = ServerTls::new(ca.issue("localhost")).with_client_roots(clients.root());
        let endpoint = by_name(&serve(scheme, tls).await);
        connect(&endpoint, trusting(&ca).with_identity(clients.issue("client"))).await.unwrap();

        let none = connect(&endpoint, trusting(&ca)).await;
        assert_eq!(told(none, "give one that its CA has issued"), TlsError::CertificateRequired);
        let other = connect(&endpoint, trusting(&ca).with_identity(Ca::new().issue("client"))).await;
        assert!(matches!(told(other, "use one that it trusts"), TlsError::CertificateRefused(_)));
        let expired = clients.issue_with("client", |params| params.not_after = date_time_ymd(2001, 1, 1));
        let expired = connect(&endpoint, trusting(&ca).with_identity(expired)).await;
        assert!(matches!(told(expired, "still valid"), TlsError::CertificateRefused(_)));
    }
}

/// A listener with TLS that does not know us.
async fn stranger(alpn: &'static [u8]) -> (Endpoint, tokio::task::JoinHandle<()>) {
    use tokio::io::AsyncReadExt;
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let key = tokio_rustls::rustls::pki_types::PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let provider = std::sync::Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let mut config = tokio_rustls::rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())
        .unwrap();
    config.alpn_protocols = if alpn.is_empty() { Vec::new() } else { vec![alpn.to_vec()] };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let pin = tollway::conduit::tls::fingerprint(made.cert.der());
    let endpoint: Endpoint = format!("tls://{}", listener.local_addr().unwrap()).parse().unwrap();
    let task = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(std::sync::Arc::new(config));
        if let Ok(mut stream) = acceptor.accept(stream).await {
            let mut bytes = Vec::new();
            let _ = stream.read_to_end(&mut bytes).await;
            assert_eq!(bytes, b"", "frames were sent to a stranger");
        }
    });
    (endpoint.with_pin(Some(pin)), task)
}

/// `[conduit.tls.alpn]`
#[tokio::test]
async fn a_listener_that_speaks_something_else_over_tls_is_sent_nothing() {
    for alpn in [&b"http/1.1"[..], b""] {
        let (endpoint, listener) = stranger(alpn).await;
        assert_eq!(told(connect(&endpoint, ClientTls::default()).await, "check the host"), TlsError::NotTollway);
        listener.await.unwrap();
    }
}

/// QUIC of another kind.
#[tokio::test]
async fn quic_that_speaks_something_else_is_sent_nothing() {
    let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let pin = tollway::conduit::tls::fingerprint(made.cert.der());
    let key = tokio_rustls::rustls::pki_types::PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
    let provider = std::sync::Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let mut config = tokio_rustls::rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&tokio_rustls::rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key.into())
        .unwrap();
    config.alpn_protocols = vec![b"h3".to_vec()];
    let config = quinn::crypto::rustls::QuicServerConfig::try_from(config).unwrap();
    let config = quinn::ServerConfig::with_crypto(std::sync::Arc::new(config));
    let listener = quinn::Endpoint::server(config, "127.0.0.1:0".parse().unwrap()).unwrap();
    let endpoint: Endpoint = format!("quic://{}", listener.local_addr().unwrap()).parse().unwrap();
    let accepting = async { listener.accept().await.unwrap().await.is_err() };
    let endpoint = endpoint.with_pin(Some(pin));
    let (result, refused) = tokio::join!(connect(&endpoint, ClientTls::default()), accepting);
    assert_eq!(told(result, "check the host"), TlsError::NotTollway);
    assert!(refused);
}

/// Who listens, who dials there, and what the dialling side is told to do.
#[tokio::test]
async fn whoever_takes_the_wrong_scheme_is_told_so() {
    const SAME: &str = "use the same scheme on both sides, such as";
    for (listens, dials, remedies) in [
        ("tls", "tcp", [SAME, "tls://"]),
        ("tcp", "tls", [SAME, "tcp://"]),
        ("wss", "tcp", [SAME, "tls://"]),
        ("tls", "ws", [SAME, "wss://"]),
        ("wss", "ws", [SAME, "wss://"]),
        ("ws", "wss", [SAME, "tcp://"]),
        ("tls", "wss", ["check the host", "port"]),
        ("wss", "tls", ["check the host", "port"]),
        ("quic", "tcp", ["cannot reach", "refused"]),
        ("tcp", "quic", ["nobody answers over UDP", "check host and port"]),
    ] {
        let mut options = ListenOptions::default();
        options.tls = Some(ServerTls::new(Identity::self_signed(&["localhost"]).unwrap()));
        let place = format!("{listens}://127.0.0.1:0").parse().unwrap();
        let listener = AnyListener::bind(&place, &options).await.unwrap();
        let endpoint = listener.endpoints().next().unwrap().clone();
        let server = Server::with_listener(listener, endpoint.clone(), SessionConfig::default());
        tokio::spawn(server.run(std::future::pending(), Duration::ZERO));
        let wrong: Endpoint = format!("{dials}://127.0.0.1:{}", endpoint.port()).parse().unwrap();
        let pin = endpoint.pin().or(Some(Fingerprint([1; 32])));
        let mut config = SessionConfig::default();
        // UDP that nobody listens for is silent, and takes all of it.
        config.protocol.handshake_timeout = Duration::from_secs(if dials == "quic" { 1 } else { 30 });
        let connected = connect_with(&wrong.with_pin(pin), config, &ConnectOptions::default()).await;
        let error = connected.expect_err("there is a session").to_string();
        println!("{dials}:// to {listens}://: {error}");
        assert!(remedies.iter().all(|remedy| error.contains(remedy)), "{dials}:// to {listens}://: {error}");
    }
}

/// `[conduit.ws.subprotocol]`
#[tokio::test]
async fn a_websocket_of_another_kind_is_refused_in_words() {
    let listener = AnyListener::bind(&"ws://127.0.0.1:0".parse().unwrap(), &ListenOptions::default()).await.unwrap();
    let endpoint = listener.endpoints().next().unwrap().clone();
    let server = Server::with_listener(listener, endpoint.clone(), SessionConfig::default());
    tokio::spawn(server.run(std::future::pending(), Duration::ZERO));
    let stream = tokio::net::TcpStream::connect(endpoint.address()).await.unwrap();
    let refused = tokio_tungstenite::client_async(endpoint.to_string(), stream).await.unwrap_err();
    let tokio_tungstenite::tungstenite::Error::Http(response) = refused else { panic!("{refused}") };
    let text = String::from_utf8(response.into_body().unwrap()).unwrap();
    assert!(text.contains("tollway.1"), "{text}");

    // One that speaks WebSocket and knows nothing of us.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint: Endpoint = format!("ws://{}", listener.local_addr().unwrap()).parse().unwrap();
    tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let _other = tokio_tungstenite::accept_async(stream).await;
    });
    let error = connect(&endpoint, ClientTls::default()).await.unwrap_err().to_string();
    assert!(error.contains("does not speak Tollway over WebSocket"), "{error}");
}

/// A message of 1 MiB is taken, and one of a byte more is not. `[conduit.ws.message]`
#[tokio::test]
async fn a_websocket_message_has_a_largest_size() {
    use futures_util::SinkExt;
    use tokio_tungstenite::tungstenite::{Message, client::IntoClientRequest};
    let listener = AnyListener::bind(&"ws://127.0.0.1:0".parse().unwrap(), &ListenOptions::default()).await.unwrap();
    let endpoint = listener.endpoints().next().unwrap().clone();
    for (size, taken) in [(1024 * 1024, true), (1024 * 1024 + 1, false)] {
        let stream = tokio::net::TcpStream::connect(endpoint.address()).await.unwrap();
        let accepted = async { listener.next().await.unwrap().await.unwrap() };
        let mut request = endpoint.to_string().into_client_request().unwrap();
        request.headers_mut().insert("Sec-WebSocket-Protocol", "tollway.1".parse().unwrap());
        let (conduit, client) = tokio::join!(accepted, tokio_tungstenite::client_async(request, stream));
        let (mut client, _) = client.unwrap();
        let (mut reader, _writer) = conduit.split();
        reader.set_max_frame(2 << 20);
        // The preface, and one frame that fills the rest.
        let mut message = PREFACE.to_vec();
        message.extend(u32::try_from(size - PREFACE.len() - 4).unwrap().to_le_bytes());
        message.resize(size, 200);
        let received = async {
            let mut frames = Vec::new();
            while frames.is_empty() {
                if reader.recv(&mut frames).await? == Received::End {
                    break;
                }
            }
            Ok::<_, tollway::conduit::ConduitError>(frames.len())
        };
        // Whoever refuses it does not read all of it.
        let sent = async {
            let _refused = client.send(Message::binary(message)).await;
            std::future::pending::<()>().await;
        };
        let received = tokio::select! {
            received = received => received,
            () = sent => unreachable!("it waits"),
        };
        assert_eq!(received.is_ok_and(|frames| frames == 1), taken, "{size} bytes");
    }
}

#[tokio::test]
async fn a_listener_without_a_certificate_says_what_it_lacks() {
    for scheme in SCHEMES {
        let place = format!("{scheme}://127.0.0.1:0").parse().unwrap();
        let error = AnyListener::bind(&place, &ListenOptions::default()).await.unwrap_err();
        assert!(matches!(error, EstablishError::NoCertificate { .. }), "{error}");
    }
}

//! A session inside a session: TLS from end to end through a relay that one need not trust.
//!
//! `cargo run --release --example tunnel --features tls`
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::future::pending;
use std::time::Duration;

use tollway::conduit::endpoint::Endpoint;
use tollway::conduit::tls::{ClientTls, Identity, ServerTls, TlsConduit};
use tollway::rpc::{CallContext, Services};
use tollway::tunnel::{Tunnel, TunnelService};
use tollway::{IncomingOpen, Server, Session, SessionConfig, proxy_connections};

#[tollway::service]
trait Greeter {
    async fn greet(&self, name: &str) -> String;
}

struct Polite;

impl Greeter for Polite {
    async fn greet(&self, name: &str) -> String {
        format!("Hello, {name}!")
    }
}

fn serving(services: Services) -> SessionConfig {
    SessionConfig { services, ..SessionConfig::default() }
}

/// Serves the greeter inside of each tunnel, behind a certificate.
async fn serve_inside(tunnel: Tunnel, tls: ServerTls, context: CallContext) {
    let from = context.peer().to_string();
    match TlsConduit::accept_over(tunnel, from, &tls).await {
        Ok(conduit) => {
            match Session::accept(conduit, serving(Services::new().with(GreeterServer::new(Polite)))).await {
                Ok(session) => println!("inner session: {}", session.closed().await),
                Err(error) => println!("no inner session: {error}"),
            }
        }
        Err(error) => println!("no TLS: {error}"),
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let any: Endpoint = "tcp://127.0.0.1:0".parse()?;

    // The server takes tunnels. Whoever carries them, inside it shows this certificate.
    let tls = ServerTls::new(Identity::self_signed(&["greeter"])?);
    let greeter = Endpoint::with_pin("tls://greeter:1".parse()?, tls.pin());
    let tunnels = TunnelService::new("tunnel", move |tunnel, context| serve_inside(tunnel, tls.clone(), context));
    let server = Server::bind(&any, serving(Services::new().with(tunnels))).await?;
    let endpoint = server.endpoint().clone();
    tokio::spawn(server.run(pending(), Duration::ZERO));

    // The relay passes on what it cannot read.
    let upstream = tollway::connect(&endpoint, SessionConfig::default()).await?;
    let relay = move |open: IncomingOpen| {
        let upstream = upstream.clone();
        async move {
            match proxy_connections(open, &upstream).await {
                Ok(relayed) => println!("relayed {} bytes there", relayed.left_to_right.bytes),
                Err(error) => println!("not relayed: {error}"),
            }
        }
    };
    let relay = Server::bind(&any, serving(Services::new().with_fallback(relay))).await?;
    let endpoint = relay.endpoint().clone();
    tokio::spawn(relay.run(pending(), Duration::ZERO));

    // The client knows the greeter by its pin. A relay that answered in its place would be found out.
    let outer = tollway::connect(&endpoint, SessionConfig::default()).await?;
    let tunnel = outer.open("tunnel").await?.tunnel().await?;
    let conduit = TlsConduit::connect_over(tunnel, &greeter, &ClientTls::default()).await?;
    let inner = Session::connect(conduit, SessionConfig::default()).await?;
    assert!(inner.peer().exporter().is_some(), "the two ends share what no relay has");

    let client: GreeterClient = inner.open_client().await?;
    let greeting = client.greet("end to end").await?;
    assert_eq!(greeting, "Hello, end to end!");
    println!("{greeting} ({}, inside {})", inner.peer(), outer.peer());
    drop((client, inner));
    outer.drain(tollway::protocol::error::Reason::none()).await;
    Ok(())
}

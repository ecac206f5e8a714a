//! A relay in thirty lines: what is opened at it, it opens at a server, and carries everything in between.
//!
//! `cargo run --release --example relay`
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::time::Duration;

use tollway::rpc::{BoxReply, IncomingCall, MethodId, Reply, Service, Services};
use tollway::{IncomingOpen, Server, SessionConfig, proxy_connections};

struct Greeter;

impl Service for Greeter {
    fn name(&self) -> &str {
        "greeter"
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        Box::pin(async move {
            match call.args::<String>() {
                Ok(name) => Reply::ok(&format!("Hello, {name}!")),
                Err(error) => Reply::invalid_payload(&error),
            }
        })
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let any = "tcp://127.0.0.1:0".parse()?;
    let serving = |services| SessionConfig { services, ..SessionConfig::default() };
    let server = Server::bind(&any, serving(Services::new().with(Greeter))).await?;
    let endpoint = server.endpoint().clone();
    tokio::spawn(server.run(std::future::pending(), Duration::ZERO));
    let upstream = tollway::connect(&endpoint, SessionConfig::default()).await?;

    // The relay. It knows no service, and reads none of what passes.
    let (tell, mut told) = tokio::sync::mpsc::channel(1);
    let relay = move |open: IncomingOpen| {
        let (upstream, tell) = (upstream.clone(), tell.clone());
        async move {
            let summary = proxy_connections(open, &upstream).await;
            // The receiver waits for the first connection alone.
            let _more = tell.try_send(summary);
        }
    };
    let relay = Server::bind(&any, serving(Services::new().with_fallback(relay))).await?;
    let (endpoint, handle) = (relay.endpoint().clone(), relay.handle());
    let relay = tokio::spawn(relay.run(std::future::pending(), Duration::from_secs(5)));

    let session = tollway::connect(&endpoint, SessionConfig::default()).await?;
    let greeter = session.open("greeter").await?;
    let greeting: String = greeter.call(MethodId::of("greeter", 1, "greet"), "world").await?;
    assert_eq!(greeting, "Hello, world!");
    drop((greeter, session));

    let summary = told.recv().await.ok_or("the relay is gone")??;
    println!("{greeting} ({} bytes there, {} back)", summary.left_to_right.bytes, summary.right_to_left.bytes);
    handle.stop();
    relay.await?;
    Ok(())
}

//! A service over WebSocket, for networks that let nothing else through: the code of any other conduit with another URL.
//! `wss://` would be the same with a certificate in `ListenOptions`.

#![allow(clippy::print_stdout)]

use std::time::Duration;

use tollway::conduit::endpoint::Endpoint;
use tollway::rpc::{BoxReply, IncomingCall, MethodId, Reply, Service, Services};
use tollway::{Server, SessionConfig};

struct Echo;

impl Service for Echo {
    fn name(&self) -> &str {
        "echo"
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        if call.method() != MethodId::of("echo", 1, "echo") {
            return Reply::unknown_method().boxed();
        }
        Box::pin(async move {
            match call.args::<String>() {
                Ok(text) => Reply::ok(&text),
                Err(error) => Reply::invalid_payload(&error),
            }
        })
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let config = SessionConfig { services: Services::new().with(Echo), ..SessionConfig::default() };
    let server = Server::bind(&"ws://127.0.0.1:0".parse()?, config).await?;
    let bound = server.endpoint().clone();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn(server.run(async { drop(stopped.await) }, Duration::from_secs(5)));

    // A path chooses what a proxy in front does with it; a Tollway listener takes any.
    let endpoint: Endpoint = format!("{bound}/tollway").parse()?;
    let session = tollway::connect(&endpoint, SessionConfig::default()).await?;
    assert_eq!(session.peer().kind(), "ws");
    let echo = session.open("echo").await?;
    let text = "a".repeat(100_000);
    let answer: String = echo.call(MethodId::of("echo", 1, "echo"), &text).await?;
    assert_eq!(answer, text);
    println!("{} bytes came back over {}", answer.len(), session.peer());
    drop((echo, session));

    drop(stop);
    serving.await?;
    Ok(())
}

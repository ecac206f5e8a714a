//! A service and its client over loopback TCP: calls one after the other, calls at once, and an error that is the
//! method's own.
//!
//! `cargo run --release --example echo`
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::time::{Duration, Instant};

use tollway::rpc::{BoxReply, CallError, IncomingCall, MethodId, Reply, Service, Services};
use tollway::{OpenError, Server, SessionConfig};

/// The ids of methods follow from the service's name and version.
fn method(name: &str) -> MethodId {
    MethodId::of("echo", 1, name)
}

struct Echo;

impl Service for Echo {
    fn name(&self) -> &str {
        "echo"
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        let id = call.method();
        Box::pin(async move {
            // Arguments come from the network: what is none is answered, not unwrapped.
            let text = match call.args::<String>() {
                Ok(text) => text,
                Err(error) => return Reply::invalid_payload(&error),
            };
            if id == method("echo") {
                Reply::ok(&text)
            } else if id == method("number") {
                match text.parse::<i64>() {
                    Ok(number) => Reply::ok(&number),
                    Err(_) => Reply::error(&format!("'{text}' is no number")),
                }
            } else {
                Reply::unknown_method()
            }
        })
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let serving = SessionConfig { services: Services::new().with(Echo), ..SessionConfig::default() };
    let server = Server::bind(&"tcp://127.0.0.1:0".parse()?, serving).await?;
    let endpoint = server.endpoint().clone();
    tokio::spawn(server.run(std::future::pending(), Duration::ZERO));

    let session = tollway::connect(&endpoint, SessionConfig::default()).await?;
    let echo = session.open("echo").await?;

    let answer: String = echo.call(method("echo"), "hello").await?;
    assert_eq!(answer, "hello");
    println!("a call came back over {endpoint}: {answer}");

    // One connection carries many calls at once, and each answer finds its caller.
    let began = Instant::now();
    let mut calls = tokio::task::JoinSet::new();
    for number in 0..10_000i64 {
        let echo = echo.clone();
        calls.spawn(async move { (number, echo.call::<_, i64>(method("number"), &number.to_string()).await) });
    }
    while let Some(done) = calls.join_next().await {
        let (number, answer) = done?;
        assert_eq!(answer, Ok(number));
    }
    println!("10000 calls at once were each answered with their own number, in {:?}", began.elapsed());

    // A method's own error is a value of its own type; every other failure has a name.
    let error = echo.call::<_, i64>(method("number"), "ten").or_error::<String>().await;
    let error = error.expect_err("'ten' is no number");
    assert_eq!(error, CallError::App("'ten' is no number".to_owned()));
    assert_eq!(echo.call::<_, ()>(method("shout"), "hello").await, Err(CallError::UnknownMethod));
    assert_eq!(echo.call::<_, ()>(method("echo"), &7u8).await, Err(CallError::InvalidPayload));
    assert!(matches!(session.open("nobody").await, Err(OpenError::Rejected { .. })));
    println!("errors came as what they are: {error}; no such method; no such arguments; no such service");
    Ok(())
}

//! A service of a trait, and its client: calls one after the other, calls at once, and errors that are the method's own.
//!
//! `cargo run --release --example unary`
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tollway::rpc::{CallError, Execution, MethodId, Services};
use tollway::{Client, Server, SessionConfig};

#[derive(Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("'{0}' is no number")]
struct NoNumber(String);

#[tollway::service]
trait Echo {
    /// Says it again.
    async fn echo(&self, text: &str) -> String;
    /// Reads a number.
    async fn number(&self, text: &str) -> Result<i64, NoNumber>;
}

struct Canyon;

impl Echo for Canyon {
    async fn echo(&self, text: &str) -> String {
        text.to_owned()
    }

    async fn number(&self, text: &str) -> Result<i64, NoNumber> {
        text.parse().map_err(|_| NoNumber(text.to_owned()))
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let serving = SessionConfig { services: Services::new().with(EchoServer::new(Canyon)), ..SessionConfig::default() };
    let server = Server::bind(&"tcp://127.0.0.1:0".parse()?, serving).await?;
    let url = server.endpoint().to_string();
    tokio::spawn(server.run(std::future::pending(), Duration::ZERO));

    // It connects with the first call.
    let client = Client::connect(&url)?;
    let echo: EchoClient = client.service();
    assert_eq!(echo.echo("hello").await?, "hello");
    println!("a call came back over {url}");

    // One connection carries many calls at once, and each answer finds its caller.
    let began = Instant::now();
    let mut calls = tokio::task::JoinSet::new();
    for number in 0..10_000i64 {
        let echo = echo.clone();
        calls.spawn(async move { (number, echo.number(&number.to_string()).await) });
    }
    while let Some(done) = calls.join_next().await {
        let (number, answer) = done?;
        assert_eq!(answer, Ok(number));
    }
    println!("10000 calls at once were each answered with their own number, in {:?}", began.elapsed());

    // A method's own error is a value of its own type; every other failure has a name, and says what became of the call.
    let error = echo.number("ten").await.expect_err("'ten' is no number");
    assert_eq!(error, CallError::App(NoNumber("ten".to_owned())));
    assert_eq!(error.execution(), Execution::Executed);
    let by_hand = client.caller("echo");
    let unknown: CallError = by_hand.call::<_, ()>(MethodId::of("echo", 1, "shout"), &()).await.expect_err("no method");
    assert_eq!((&unknown, unknown.execution()), (&CallError::UnknownMethod, Execution::NotExecuted));
    let nobody: CallError = client.caller("nobody").call::<_, ()>(MethodId(1), &()).await.expect_err("no service");
    assert!(matches!(nobody, CallError::Refused(_)));
    println!("errors came as what they are: {error}; {unknown}; {nobody}");
    Ok(())
}

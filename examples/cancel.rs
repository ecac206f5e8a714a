//! Who calls may change its mind: a dropped call is cancelled at the peer, and a deadline ends it on both sides, with what
//! its handler calls itself.
//!
//! `cargo run --release --example cancel`
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::time::Duration;

use tokio::sync::mpsc;
use tollway::rpc::{CallContext, CallError, Execution, Services};
use tollway::{Client, Server, SessionConfig};

/// A guard against hanging.
const LONG: Duration = Duration::from_secs(30);

#[tollway::service]
trait Oracle {
    /// Thinks for ever.
    async fn ask(&self, cx: &CallContext, question: &str) -> String;
}

/// Says what becomes of its thoughts.
struct Slow {
    fate: mpsc::UnboundedSender<String>,
}

struct Thought(String, mpsc::UnboundedSender<String>);

impl Drop for Thought {
    fn drop(&mut self) {
        // Nobody listens any more when the example has ended.
        let _ended = self.1.send(format!("'{}' was given up", self.0));
    }
}

impl Oracle for Slow {
    async fn ask(&self, cx: &CallContext, question: &str) -> String {
        // Dropped with the handler: when the caller cancels, and when the deadline passes.
        let _thought = Thought(question.to_owned(), self.fate.clone());
        // What runs elsewhere is told.
        let (cancelled, fate) = (cx.cancellation(), self.fate.clone());
        tokio::spawn(async move {
            cancelled.cancelled().await;
            fate.send("and so was what it had begun elsewhere".to_owned())
        });
        let left = cx.time_left().map_or("all the time".to_owned(), |left| format!("{} ms", left.as_millis()));
        let _begun = self.fate.send(format!("'{question}' has {left}"));
        std::future::pending().await
    }
}

/// Asks somebody else, who is slower than its own caller can wait.
#[tollway::service]
trait Clerk {
    async fn pass_on(&self, question: &str) -> Result<String, String>;
}

struct Asking(OracleClient);

impl Clerk for Asking {
    async fn pass_on(&self, question: &str) -> Result<String, String> {
        // The call has at most what is left of the handler's own deadline, though it asks for an hour.
        let call = self.0.ask(question).with_timeout(Duration::from_secs(3600));
        call.await.map_err(|error| error.to_string())
    }
}

async fn serve(services: Services) -> Result<String, Box<dyn Error>> {
    let serving = SessionConfig { services, ..SessionConfig::default() };
    let server = Server::bind(&"tcp://127.0.0.1:0".parse()?, serving).await?;
    let url = server.endpoint().to_string();
    tokio::spawn(server.run(std::future::pending(), Duration::ZERO));
    Ok(url)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let (fate, mut fates) = mpsc::unbounded_channel();
    let oracle = serve(Services::new().with(OracleServer::new(Slow { fate }))).await?;
    let clerk = ClerkServer::new(Asking(Client::connect(&oracle)?.service()));
    let clerk: ClerkClient = Client::connect(&serve(Services::new().with(clerk)).await?)?.service();
    let oracle: OracleClient = Client::connect(&oracle)?.service();
    let mut next = async || tokio::time::timeout(LONG, fates.recv()).await?.ok_or(Box::<dyn Error>::from("no fate"));

    // Dropping the future of a call cancels it.
    let call = tokio::spawn(async move { oracle.ask("why").await });
    println!("{}", next().await?);
    call.abort();
    let mut told = [next().await?, next().await?];
    told.sort();
    assert_eq!(told, ["'why' was given up", "and so was what it had begun elsewhere"]);
    println!("dropped: {}, {}", told[0], told[1]);

    // A deadline travels as the time that is left, and on to what the handler calls.
    let timeout = Duration::from_millis(300);
    let error = clerk.pass_on("when").with_timeout(timeout).await.expect_err("nobody answers");
    assert!(matches!(error, CallError::DeadlineExceeded { sent: true }), "{error}");
    assert_eq!(error.execution(), Execution::MaybeExecuted);
    let left = next().await?;
    let left_ms: u64 = left.split(' ').nth(2).and_then(|left| left.parse().ok()).ok_or("it has a deadline")?;
    assert!(left_ms <= 300, "{left}");
    let mut told = [next().await?, next().await?];
    told.sort();
    assert_eq!(told[0], "'when' was given up");
    println!("of {timeout:?} the second server saw what was left: {left}; then: {error}, {}", told[0]);
    Ok(())
}

//! Streams are values: they travel in arguments and results, both ways at once, and each side can end them.
//!
//! `cargo run --release --example streams`
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::time::Duration;

use tokio::sync::mpsc;
use tollway::rpc::{BoxReply, IncomingCall, MethodId, Reply, Rx, Service, Services, StreamError, Tx, stream};
use tollway::{Server, SessionConfig};

const ITEMS: u64 = 100_000;

fn method(name: &str) -> MethodId {
    MethodId::of("numbers", 1, name)
}

/// Says how many items were sent when a receiver was dropped, and what the sender saw.
struct Numbers {
    stopped: mpsc::Sender<(u64, StreamError)>,
}

/// Sends the squares of what comes.
async fn square(mut numbers: Rx<u64>, mut squares: Tx<u64>) -> Result<(), StreamError> {
    while let Some(number) = numbers.recv().await? {
        squares.send(number * number).await?;
    }
    squares.finish();
    Ok(())
}

/// Sends numbers for as long as somebody wants them.
async fn count(mut tx: Tx<u64>) -> (u64, StreamError) {
    let mut sent = 0;
    loop {
        if let Err(why) = tx.send(sent).await {
            return (sent, why);
        }
        sent += 1;
    }
}

impl Service for Numbers {
    fn name(&self) -> &str {
        "numbers"
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        // Streams may outlive the answer: whoever feeds them is a task of its own, and the call ends with the last one.
        if call.method() == method("square") {
            match call.args() {
                Ok((numbers, squares)) => drop(tokio::spawn(square(numbers, squares))),
                Err(error) => return Reply::invalid_payload(&error).boxed(),
            }
            Reply::ok(&()).boxed()
        } else if call.method() == method("count") {
            let ((tx, numbers), stopped) = (stream(), self.stopped.clone());
            tokio::spawn(async move { stopped.send(count(tx).await).await });
            Reply::ok(&numbers).boxed()
        } else {
            Reply::unknown_method().boxed()
        }
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let (stopped, mut stops) = mpsc::channel(1);
    let serving = SessionConfig { services: Services::new().with(Numbers { stopped }), ..SessionConfig::default() };
    let server = Server::bind(&"tcp://127.0.0.1:0".parse()?, serving).await?;
    let endpoint = server.endpoint().clone();
    tokio::spawn(server.run(std::future::pending(), Duration::ZERO));
    let session = tollway::connect(&endpoint, SessionConfig::default()).await?;
    let service = session.open("numbers").await?;
    // Both ways at once: one half of each stream stays here, the call carries the other halves over.
    let ((mut to, numbers), (squares, mut from)) = (stream::<u64>(), stream::<u64>());
    service.call::<_, ()>(method("square"), &(numbers, squares)).await?;
    tokio::spawn(async move {
        for number in 0..ITEMS {
            to.send(number).await.expect("somebody squares");
        }
        to.finish();
    });
    for number in 0..ITEMS {
        assert_eq!(from.recv().await?, Some(number * number));
    }
    assert_eq!(from.recv().await?, None);
    println!("{ITEMS} numbers went over and {ITEMS} squares came back, in order, at the same time");

    // An endless stream is sent no further than its receiver's credit, and ends when the receiver is dropped.
    let mut counting: Rx<u64> = service.call(method("count"), &()).await?;
    assert_eq!((counting.recv().await?, counting.recv().await?), (Some(0), Some(1)));
    drop(counting);
    let (sent, why) = tokio::time::timeout(Duration::from_secs(10), stops.recv()).await?.ok_or("no sender")?;
    assert!(matches!(why, StreamError::Stopped(_)), "{why}");
    println!("the endless stream was stopped after {sent} items: {why}");
    Ok(())
}

//! Streams are values: they travel in arguments and results, both ways at once, and each side can end them.
//!
//! `cargo run --release --example streams`
#![allow(clippy::print_stdout)]

use std::error::Error;
use std::time::Duration;

use futures_util::stream as streams;
use tokio::sync::mpsc;
use tollway::rpc::{Rx, Services, Stream, StreamError, Tx, stream};
use tollway::{Client, Server, SessionConfig};

const ITEMS: u64 = 100_000;

#[tollway::service]
trait Numbers {
    /// Sends the squares of what comes, for as long as it comes.
    async fn square(&self, numbers: Rx<u64>, squares: Tx<u64>);
    /// Counts up to a number.
    fn count(&self, to: u64) -> impl Stream<Item = u64>;
    /// Counts for as long as somebody listens.
    async fn endless(&self) -> Rx<u64>;
}

/// Tells how far the endless stream came, and why it stopped.
struct Mathematician {
    stopped: mpsc::Sender<(u64, StreamError)>,
}

impl Numbers for Mathematician {
    async fn square(&self, mut numbers: Rx<u64>, mut squares: Tx<u64>) {
        // Streams may outlive the answer: the call ends with the last of them.
        tokio::spawn(async move {
            while let Some(number) = numbers.recv().await? {
                squares.send(number * number).await?;
            }
            squares.finish();
            Ok::<_, StreamError>(())
        });
    }

    fn count(&self, to: u64) -> impl Stream<Item = u64> {
        streams::iter(0..to)
    }

    async fn endless(&self) -> Rx<u64> {
        let ((mut tx, numbers), stopped) = (stream(), self.stopped.clone());
        tokio::spawn(async move {
            let mut sent = 0;
            loop {
                if let Err(why) = tx.send(sent).await {
                    return stopped.send((sent, why)).await;
                }
                sent += 1;
            }
        });
        numbers
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let (stopped, mut stops) = mpsc::channel(1);
    let services = Services::new().with(NumbersServer::new(Mathematician { stopped }));
    let serving = SessionConfig { services, ..SessionConfig::default() };
    let server = Server::bind(&"tcp://127.0.0.1:0".parse()?, serving).await?;
    let url = server.endpoint().to_string();
    tokio::spawn(server.run(std::future::pending(), Duration::ZERO));
    let service: NumbersClient = Client::connect(&url)?.service();

    // Both ways at once: one half of each stream stays here, the call carries the other halves over.
    let ((mut to, numbers), (squares, mut from)) = (stream::<u64>(), stream::<u64>());
    service.square(numbers, squares).await?;
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

    // A method that returns a stream, as any stream.
    let mut sum = 0;
    let mut counted = service.count(ITEMS).await?;
    while let Some(number) = counted.recv().await? {
        sum += number;
    }
    assert_eq!(sum, ITEMS * (ITEMS - 1) / 2);
    println!("{ITEMS} items came one by one, and their sum is {sum}");

    // An endless stream is sent no further than its receiver's credit, and ends when the receiver is dropped.
    let mut counting = service.endless().await?;
    assert_eq!((counting.recv().await?, counting.recv().await?), (Some(0), Some(1)));
    drop(counting);
    let (sent, why) = tokio::time::timeout(Duration::from_secs(10), stops.recv()).await?.ok_or("no sender")?;
    assert!(matches!(why, StreamError::Stopped(_)), "{why}");
    println!("the endless stream was stopped after {sent} items: {why}");
    Ok(())
}

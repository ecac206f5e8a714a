//! Whatever is given up half-way ends, gives back what it held, and whoever waits is told.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tollway::conduit::memory;
use tollway::protocol::error::Reason;
use tollway::protocol::limits::ConnectionLimits;
use tollway::protocol::metadata::Metadata;
use tollway::rpc::{BoxReply, CallError, IncomingCall, MethodId, Reply, Rx, Service, Services, StreamError, stream};
use tollway::{OpenError, Session, SessionConfig};

const ECHO: MethodId = MethodId(1);
const LABELLED: MethodId = MethodId(2);
const TAKE: MethodId = MethodId(3);

struct Kit {
    taken: Arc<Notify>,
}

impl Service for Kit {
    fn name(&self) -> &str {
        "kit"
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        match call.method() {
            ECHO => Reply::ok(&call.args::<Vec<u8>>().expect("bytes")).boxed(),
            LABELLED => Reply::ok(&()).with_metadata(Metadata::new().with("label", "x".repeat(20_000))).boxed(),
            TAKE => {
                let taken = self.taken.clone();
                Box::pin(async move {
                    let _items = call.args::<Rx<(Vec<u8>, Rx<u8>)>>().expect("a stream");
                    taken.notified().await;
                    Reply::ok(&())
                })
            }
            _ => Reply::unknown_method().boxed(),
        }
    }
}

async fn pair(limits: ConnectionLimits) -> (Session, Session) {
    let serving = |kit| SessionConfig {
        services: Services::new().with(kit),
        connection_limits: limits,
        ..SessionConfig::default()
    };
    let (left, right) = memory::pair(1 << 20);
    let taken = Arc::<Notify>::default();
    let (client, server) = tokio::join!(
        Session::connect(left, serving(Kit { taken: taken.clone() })),
        Session::accept(right, serving(Kit { taken }))
    );
    (client.expect("a client"), server.expect("a server"))
}

/// Well below the ping interval, which would wake a sleeping driver.
async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(5), future).await.expect("it ends in time")
}

#[tokio::test]
async fn answers_that_fill_the_window_do_not_wait_for_the_next_ping() {
    let (client, _server) = pair(ConnectionLimits::default()).await;
    let kit = client.open("kit").await.expect("a connection");
    let body = vec![7u8; 1_000_000];
    let echo = || kit.call::<_, Vec<u8>>(ECHO, &body);
    for _ in 0..3 {
        let answers = within(async { tokio::join!(echo(), echo(), echo(), echo()) }).await;
        assert!(answers.0.is_ok() && answers.1.is_ok() && answers.2.is_ok() && answers.3.is_ok());
    }
}

#[tokio::test]
async fn an_answer_that_nobody_takes_goes_back_to_the_window() {
    let (client, _server) = pair(ConnectionLimits::default()).await;
    let kit = client.open("kit").await.expect("a connection");
    let body = vec![7u8; 600_000];
    for _ in 0..3 {
        {
            let mut call = Box::pin(kit.call::<_, Vec<u8>>(ECHO, &body));
            let first = std::future::poll_fn(|cx| std::task::Poll::Ready(call.as_mut().poll(cx))).await;
            assert!(first.is_pending());
            // The answer comes, and its caller leaves without a look.
            while kit.open_calls() > 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        assert_eq!(within(kit.call::<_, Vec<u8>>(ECHO, &vec![1u8])).await, Ok(vec![1]));
    }
}

#[tokio::test]
async fn an_answer_that_cannot_be_sent_fails_its_call() {
    let (client, _server) = pair(ConnectionLimits::default()).await;
    let kit = client.open("kit").await.expect("a connection");
    let answer = within(kit.call::<_, ()>(LABELLED, &())).await;
    assert_eq!(answer, Err(CallError::HandlerFailed), "its metadata is above the cap");
}

#[tokio::test]
async fn an_item_that_cannot_be_sent_fails_the_streams_in_it() {
    let limits = ConnectionLimits { max_item: 1_000, ..Default::default() };
    let (client, _server) = pair(limits).await;
    let kit = client.open("kit").await.expect("a connection");
    let (mut tx, rx) = stream::<(Vec<u8>, Rx<u8>)>();
    let call = kit.call::<_, ()>(TAKE, &rx);
    let send = async {
        tokio::time::sleep(Duration::from_millis(50)).await;
        let (mut inner, travels) = stream::<u8>();
        let sent = tx.send((vec![0; 2_000], travels)).await;
        assert!(matches!(sent, Err(StreamError::ItemTooLarge { .. })), "{sent:?}");
        assert_eq!(inner.send(1).await, Err(StreamError::NotSent));
    };
    within(async {
        tokio::select! {
            answer = call => panic!("the handler waits: {answer:?}"),
            () = send => {}
        }
    })
    .await;
}

#[tokio::test]
async fn a_receiver_whose_sender_never_travelled_is_told() {
    let (tx, mut rx) = stream::<u8>();
    let dropped = async {
        tokio::task::yield_now().await;
        drop(tx);
    };
    let (received, ()) = within(async { tokio::join!(rx.recv(), dropped) }).await;
    assert_eq!(received, Err(StreamError::NotSent));
    let (tx, mut rx) = stream::<u8>();
    tx.finish();
    assert_eq!(within(rx.recv()).await, Err(StreamError::NotSent));
}

#[tokio::test]
async fn a_drain_sees_a_rejected_open_go() {
    let (client, server) = pair(ConnectionLimits::default()).await;
    within(async {
        // Polled in this order: the open is on its way when the drain begins.
        let (opened, ()) = tokio::join!(biased; server.open("nothing of this name"), server.drain(Reason::none()));
        assert!(matches!(opened, Err(OpenError::Rejected { .. })), "{opened:?}");
    })
    .await;
    drop(client);
}

//! Nothing stays in a session's tables after what it was for has ended.

use std::time::Duration;

use tollway_protocol::error::Reason;

use crate::conduit::memory;
use crate::rpc::{BoxReply, IncomingCall, MethodId, Reply, Rx, Service, Services, Tx, stream};
use crate::{Session, SessionConfig};

struct Kit;

const ECHO: MethodId = MethodId(1);
const PANIC: MethodId = MethodId(2);
const NEVER: MethodId = MethodId(3);
const COUNT: MethodId = MethodId(4);
const DOUBLE: MethodId = MethodId(5);
const NEST: MethodId = MethodId(6);

impl Service for Kit {
    fn name(&self) -> &str {
        "kit"
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        match call.method() {
            ECHO => Box::pin(async move { Reply::ok(&call.args::<u64>().unwrap_or_default()) }),
            PANIC => Box::pin(async move { panic!("a handler panics") }),
            NEVER => Box::pin(std::future::pending()),
            COUNT => Box::pin(async move {
                let (mut tx, numbers) = stream::<u64>();
                tokio::spawn(async move {
                    for number in 0..10_000 {
                        if tx.send(number).await.is_err() {
                            return;
                        }
                    }
                    tx.finish();
                });
                Reply::ok(&numbers)
            }),
            DOUBLE => Box::pin(async move {
                let Ok((mut numbers, mut doubled)) = call.args::<(Rx<u64>, Tx<u64>)>() else { return Reply::failed() };
                while let Ok(Some(number)) = numbers.recv().await {
                    if doubled.send(2 * number).await.is_err() {
                        break;
                    }
                }
                doubled.finish();
                Reply::ok(&())
            }),
            NEST => Box::pin(async move {
                let (mut tx, streams) = stream::<Rx<u64>>();
                tokio::spawn(async move {
                    for number in 0..50 {
                        let (mut inner, numbers) = stream::<u64>();
                        if tx.send(numbers).await.is_err() || inner.send(number).await.is_err() {
                            return;
                        }
                        inner.finish();
                    }
                    tx.finish();
                });
                Reply::ok(&streams)
            }),
            _ => Reply::unknown_method().boxed(),
        }
    }
}

/// Calls and streams that end in every way there is, chosen by `number`.
async fn one(session: &Session, number: u64) {
    let Ok(kit) = session.open("kit").await else { return };
    let patience = Duration::from_micros(number * 7919 % 3_000);
    let work = async {
        match number % 7 {
            0 => drop(kit.call::<_, u64>(ECHO, &number).await),
            1 => drop(kit.call::<_, u64>(PANIC, &()).await),
            2 => drop(kit.call::<_, u64>(NEVER, &()).await),
            3 => {
                let Ok(mut numbers) = kit.call::<_, Rx<u64>>(COUNT, &()).await else { return };
                for _ in 0..number % 5_000 {
                    let _item = numbers.recv().await;
                }
            }
            4 => {
                let (mut tx, numbers) = stream::<u64>();
                let (doubled, mut rx) = stream::<u64>();
                let args = (numbers, doubled);
                let send = async {
                    for number in 0..number % 2_000 {
                        if tx.send(number).await.is_err() {
                            break;
                        }
                    }
                    if number.is_multiple_of(2) { tx.finish() } else { drop(tx) }
                };
                let receive = async { while let Ok(Some(_)) = rx.recv().await {} };
                drop(tokio::join!(kit.call::<_, ()>(DOUBLE, &args), send, receive));
            }
            5 => {
                let Ok(mut streams) = kit.call::<_, Rx<Rx<u64>>>(NEST, &()).await else { return };
                for _ in 0..number % 60 {
                    if let Ok(Some(mut inner)) = streams.recv().await
                        && number.is_multiple_of(3)
                    {
                        while let Ok(Some(_)) = inner.recv().await {}
                    }
                }
            }
            _ => drop(kit.call::<_, u64>(COUNT, &()).await),
        }
    };
    let _given_up = tokio::time::timeout(patience, work).await;
    if number.is_multiple_of(4) {
        kit.close(Reason::none());
    }
}

async fn sessions(lanes: bool) -> (Session, Session) {
    let serving = || SessionConfig { services: Services::new().with(Kit), ..SessionConfig::default() };
    let pair = if lanes {
        let (left, right) = memory::reordering(7, 64 * 1024);
        tokio::join!(Session::connect(left, serving()), Session::accept(right, serving()))
    } else {
        let (left, right) = memory::pair(64 * 1024);
        tokio::join!(Session::connect(left, serving()), Session::accept(right, serving()))
    };
    (pair.0.expect("a client"), pair.1.expect("a server"))
}

async fn settles(session: &Session) {
    for _ in 0..500 {
        if session.tables().iter().all(|(_, entries)| *entries == 0) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("entries are left: {:?}", session.tables());
}

async fn all_tables_empty(lanes: bool) {
    let (client, server) = sessions(lanes).await;
    for round in 0..10 {
        let both = (0..60).flat_map(|number| [(client.clone(), number), (server.clone(), number)]);
        let tasks: Vec<_> = both
            .map(|(session, number)| tokio::spawn(async move { one(&session, 60 * round + number).await }))
            .collect();
        for task in tasks {
            task.await.expect("it ends");
        }
    }
    settles(&client).await;
    settles(&server).await;
    let weak = [client.shared(), server.shared()];
    drop((client, server));
    for _ in 0..500 {
        if weak.iter().all(|weak| weak.strong_count() == 0) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    panic!("sessions are kept: {:?}", weak.map(|weak| weak.strong_count()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_left_when_all_has_ended() {
    all_tables_empty(false).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_left_on_lanes_that_overtake_each_other() {
    all_tables_empty(true).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_left_of_a_session_that_ends_in_the_middle() {
    for round in 0..20 {
        let (client, server) = sessions(false).await;
        let tasks: Vec<_> = (0..60)
            .map(|number| {
                let client = client.clone();
                tokio::spawn(async move { one(&client, number).await })
            })
            .collect();
        tokio::time::sleep(Duration::from_micros(150 * round)).await;
        server.close(Reason::none());
        for task in tasks {
            tokio::time::timeout(Duration::from_secs(10), task).await.expect("in time").expect("it ends");
        }
        settles(&client).await;
        settles(&server).await;
        let weak = [client.shared(), server.shared()];
        drop((client, server));
        let gone = async {
            while weak.iter().any(|weak| weak.strong_count() > 0) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let gone = tokio::time::timeout(Duration::from_secs(5), gone).await;
        assert!(gone.is_ok(), "sessions are kept: {:?}", weak.map(|weak| weak.strong_count()));
    }
}

//! A client that connects when it is wanted.

use std::num::NonZeroU32;
use std::time::Duration;

use tokio::time::timeout;
use tollway::protocol::error::Reason;
use tollway::reconnect::{Backoff, ClientError, Health, Retry, WhenDown};
use tollway::rpc::{CallError, Execution, MethodId, Services};
use tollway::{Client, ClientConfig};

use super::support::{Clerk, DeskClient, Host, LONG, desk};

/// Hardly any waiting between attempts.
fn eager() -> ClientConfig {
    let short = Duration::from_millis(2);
    ClientConfig {
        backoff: Backoff { base: short, max: short, reset_after: Duration::ZERO },
        ..ClientConfig::default()
    }
}

fn up() -> (std::sync::Arc<Clerk>, Host) {
    let (clerk, server) = desk();
    (clerk, Host::up(Services::new().with(server)))
}

fn why<T: std::fmt::Debug>(result: Result<T, CallError>) -> CallError {
    result.expect_err("it has no connection")
}

#[tokio::test]
async fn many_calls_at_once_share_one_attempt_and_one_connection() {
    let (_clerk, host) = up();
    let client = Client::with_dialler(host.clone(), eager());
    assert!(matches!(client.health(), Health::Idle) && host.dialled() == 0, "nobody has wanted it yet");
    let desk: DeskClient = client.service();
    let mut calls = tokio::task::JoinSet::new();
    for _ in 0..100 {
        let desk = desk.clone();
        calls.spawn(async move { desk.connection().await.unwrap() });
    }
    let connections = timeout(LONG, calls.join_all()).await.unwrap();
    assert!(connections.iter().all(|connection| *connection == connections[0]));
    assert_eq!(host.dialled(), 1);
    assert!(matches!(client.health(), Health::Ready));
}

#[tokio::test]
async fn a_server_that_dies_and_returns_is_found_again_when_a_call_wants_it() {
    let (clerk, host) = up();
    let client = Client::with_dialler(host.clone(), eager());
    let desk: DeskClient = client.service();
    assert_eq!(desk.double(1).await, Ok(2));
    let mut health = client.watch();
    assert!(matches!(health.current(), Health::Ready));
    host.die();
    while !matches!(timeout(LONG, health.changed()).await.unwrap(), Health::Idle) {}
    assert_eq!(host.dialled(), 1, "nobody wants it");

    let waiting = tokio::spawn({
        let desk = desk.clone();
        async move { desk.double(2).await }
    });
    // A few attempts find nobody, and the call waits.
    while host.dialled() < 4 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    host.rise(Services::new().with(super::support::DeskServer::from(clerk.clone())));
    assert_eq!(timeout(LONG, waiting).await.unwrap().unwrap(), Ok(4));
    assert_eq!(clerk.executed(), 2);
}

#[tokio::test]
async fn a_call_that_may_have_been_executed_is_repeated_only_if_that_was_allowed() {
    let three = NonZeroU32::new(3).unwrap();
    for (retry, idempotent, times) in [
        (Retry::Never, true, 1),
        (Retry::NotExecuted(three), true, 1),
        (Retry::Idempotent(three), false, 1),
        (Retry::Idempotent(three), true, 2),
    ] {
        let (clerk, host) = up();
        let client = Client::with_dialler(host.clone(), ClientConfig { retry, ..eager() });
        let desk: DeskClient = client.service();
        let call = tokio::spawn(async move {
            match idempotent {
                true => desk.wait_idempotently().await,
                false => desk.wait().await,
            }
        });
        timeout(LONG, clerk.begun.notified()).await.unwrap();
        host.drop_sessions();
        if times > 1 {
            timeout(LONG, clerk.begun.notified()).await.unwrap();
        }
        clerk.go.notify_one();
        let answer = timeout(LONG, call).await.unwrap().unwrap();
        assert_eq!(clerk.executed(), times, "{retry:?}, idempotent: {idempotent}");
        match times {
            1 => assert_eq!(answer.expect_err("it was lost").execution(), Execution::MaybeExecuted),
            _ => assert_eq!(answer, Ok(2)),
        }
    }
}

#[tokio::test]
async fn a_call_that_was_refused_for_now_is_repeated_if_that_was_allowed() {
    use tollway::rpc::middleware::{NextHandler, ServerMiddleware};
    use tollway::rpc::{IncomingCall, Reply};

    /// Refuses each first call.
    #[derive(Default)]
    struct Busy(std::sync::atomic::AtomicBool);

    impl ServerMiddleware for Busy {
        async fn handle(&self, call: IncomingCall, next: NextHandler) -> Reply {
            let again = self.0.fetch_xor(true, std::sync::atomic::Ordering::SeqCst);
            match again {
                true => next.handle(call).await,
                false => Reply::refused(&Reason::new(tollway::protocol::error::code::AT_CAPACITY, "busy")),
            }
        }
    }

    for retry in [Retry::Never, Retry::NotExecuted(NonZeroU32::new(2).unwrap())] {
        let (clerk, server) = desk();
        let host = Host::up(Services::new().with_middleware(Busy::default()).with(server));
        let desk: DeskClient = Client::with_dialler(host, ClientConfig { retry, ..eager() }).service();
        let answer = desk.double(3).await;
        match retry {
            Retry::Never => assert!(matches!(answer, Err(CallError::Refused(_))), "{answer:?}"),
            _ => assert_eq!(answer, Ok(6)),
        }
        assert_eq!(clerk.executed(), u32::from(retry != Retry::Never));
    }
}

#[tokio::test(start_paused = true)]
async fn without_a_server_a_call_fails_fast_or_waits_as_long_as_it_is_told() {
    let host = Host::default();
    let fast = ClientConfig { when_down: WhenDown::FailFast, ..ClientConfig::default() };
    let client = Client::with_dialler(host.clone(), fast);
    let desk: DeskClient = client.service();
    for _ in 0..3 {
        let CallError::NoConnection(failure) = why(desk.double(1).await) else { panic!("it has no connection") };
        assert!(matches!(failure.cause(), ClientError::Down { failures: 1, .. }), "{failure}");
    }
    assert_eq!(host.dialled(), 1, "a backoff is not cut short");
    assert!(matches!(client.health(), Health::Backoff { failures: 1, .. }));

    let patience = Duration::from_secs(20);
    let waits = ClientConfig { when_down: WhenDown::WaitUpTo(patience), ..ClientConfig::default() };
    let client = Client::with_dialler(Host::default(), waits);
    let desk: DeskClient = client.service();
    let began = tokio::time::Instant::now();
    let error = why(desk.double(1).await);
    assert_eq!(began.elapsed(), patience);
    assert_eq!(error.execution(), Execution::NotExecuted);
    assert!(error.is_retryable(), "{error}");
}

#[tokio::test(start_paused = true)]
async fn attempts_are_rarer_and_rarer_up_to_the_longest_wait() {
    let host = Host::default();
    let patience = Duration::from_secs(600);
    let config = ClientConfig { when_down: WhenDown::WaitUpTo(patience), ..ClientConfig::default() };
    let desk: DeskClient = Client::with_dialler(host.clone(), config).service();
    why(desk.double(1).await);
    // Waits of 5 s on average at the ceiling of 10 s: about 120, and a handful on the way there.
    assert!((80..200).contains(&host.dialled()), "{} attempts", host.dialled());
}

#[tokio::test(start_paused = true)]
async fn a_deadline_ends_the_wait_for_a_connection() {
    let desk: DeskClient = Client::with_dialler(Host::default(), ClientConfig::default()).service();
    let error = why(desk.double(1).with_timeout(Duration::from_secs(3)).await);
    assert_eq!(error, CallError::DeadlineExceeded { sent: false });
}

#[tokio::test]
async fn close_lets_calls_end_and_takes_no_new_ones() {
    let (clerk, host) = up();
    let client = Client::with_dialler(host.clone(), eager());
    let desk: DeskClient = client.service();
    let under_way = tokio::spawn({
        let desk = desk.clone();
        async move { desk.wait().await }
    });
    timeout(LONG, clerk.begun.notified()).await.unwrap();
    let server = host.session();
    let closing = tokio::spawn({
        let client = client.clone();
        async move { client.close().await }
    });
    let mut health = client.watch();
    while !matches!(health.current(), Health::Closed) {
        timeout(LONG, health.changed()).await.unwrap();
    }
    let CallError::NoConnection(failure) = why(desk.double(1).await) else { panic!("it is closed") };
    assert!(matches!(failure.cause(), ClientError::Closed) && !failure.cause().is_temporary());
    clerk.go.notify_one();
    assert_eq!(timeout(LONG, under_way).await.unwrap().unwrap(), Ok(1));
    timeout(LONG, closing).await.unwrap().unwrap();
    timeout(LONG, server.closed()).await.unwrap();
}

#[tokio::test]
async fn the_last_handle_ends_the_client() {
    let (_clerk, host) = up();
    let client = Client::with_dialler(host.clone(), eager());
    let desk: DeskClient = client.service();
    drop(client);
    assert_eq!(desk.double(1).await, Ok(2), "a typed client is a handle");
    let server = host.session();
    drop(desk);
    timeout(LONG, server.closed()).await.unwrap();
}

#[tokio::test]
async fn a_server_that_leaves_keeps_its_calls_and_new_ones_go_elsewhere() {
    let (clerk, host) = up();
    let desk: DeskClient = Client::with_dialler(host.clone(), eager()).service();
    let under_way = tokio::spawn({
        let desk = desk.clone();
        async move { desk.wait().await }
    });
    timeout(LONG, clerk.begun.notified()).await.unwrap();
    let leaving = host.session();
    let drained = tokio::spawn(async move { leaving.drain(Reason::new(0, "a new version is installed")).await });
    while timeout(LONG, desk.double(1)).await.unwrap().is_err() || host.dialled() == 1 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    clerk.go.notify_one();
    assert_eq!(timeout(LONG, under_way).await.unwrap().unwrap(), Ok(1));
    timeout(LONG, drained).await.unwrap().unwrap();
}

#[tokio::test]
async fn who_calls_by_hand_may_do_so_on_a_client_too() {
    let (_clerk, host) = up();
    let caller = Client::with_dialler(host, eager()).caller("desk");
    assert!(caller.connection().is_none());
    assert_eq!(caller.call(MethodId::of("desk", 1, "double"), &(4u64,)).await, Ok(8u64));
    assert_eq!(caller.call::<_, u64>(MethodId::of("desk", 1, "halve"), &()).await, Err(CallError::UnknownMethod));
}

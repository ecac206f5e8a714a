//! Layers of `tower` around calls on either side, and a client as its service.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};

use tollway::SessionConfig;
use tollway::protocol::error::Reason;
use tollway::rpc::middleware::ClientStack;
use tollway::rpc::middleware::tower::{ClientLayer, HandlerLayer, error_or_cancelled};
use tollway::rpc::{CallError, Caller, MethodId, OutgoingCall, Reply, Service as _, Services};
use tower_layer::{Layer, layer_fn};
use tower_service::Service;

use super::support::{DeskClient, desk, pair};

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Lets so many requests through, all its clones together, and fails the others before they go on.
#[derive(Clone)]
struct Quota<S> {
    inner: S,
    left: Arc<AtomicU32>,
}

impl<S, R> Service<R> for Quota<S>
where
    S: Service<R, Error: Into<BoxError>>,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = futures_util::future::MapErr<S::Future, fn(S::Error) -> BoxError>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        if self.left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_err() {
            return Poll::Ready(Err("the quota is used up".into()));
        }
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: R) -> Self::Future {
        futures_util::TryFutureExt::map_err(self.inner.call(request), Into::into)
    }
}

fn quota<S>(requests: u32) -> impl Layer<S, Service = Quota<S>> {
    layer_fn(move |inner| Quota { inner, left: Arc::new(AtomicU32::new(requests)) })
}

#[tokio::test]
async fn a_layer_is_around_the_calls_of_a_client_and_shared_between_them() {
    let (clerk, server) = desk();
    let middleware = ClientStack::new().with(ClientLayer::new(quota(2), error_or_cancelled));
    let client = SessionConfig { client_middleware: middleware, ..SessionConfig::default() };
    let services = Services::new().with(server);
    let (client, _server) = pair(client, SessionConfig { services, ..SessionConfig::default() }).await;
    let desk: DeskClient = client.open_client().await.unwrap();
    assert_eq!(desk.double(1).await, Ok(2));
    assert_eq!(desk.fail().await, Err(CallError::App("as it should".to_owned())));
    assert_eq!(desk.double(3).await, Err(CallError::Cancelled));
    assert_eq!(clerk.executed(), 1);
}

#[tokio::test]
async fn a_layer_is_around_handlers() {
    let (_clerk, server) = desk();
    let refuse = |error: BoxError| Reply::refused(&Reason::new(7, error.to_string()));
    let services = Services::new().with(server.around(HandlerLayer::new(quota(1), refuse)));
    let serving = SessionConfig { services, ..SessionConfig::default() };
    let (client, _server) = pair(SessionConfig::default(), serving).await;
    let desk: DeskClient = client.open_client().await.unwrap();
    assert_eq!(desk.double(1).await, Ok(2));
    assert_eq!(desk.double(2).await, Err(CallError::Refused(Reason::new(7, "the quota is used up"))));
}

#[tokio::test]
async fn a_client_is_a_service() {
    let (_clerk, server) = desk();
    let services = Services::new().with(server);
    let serving = SessionConfig { services, ..SessionConfig::default() };
    let (client, _server) = pair(SessionConfig::default(), serving).await;
    let mut service = quota(1).layer(Caller::from(client.open("desk").await.unwrap()));
    poll_fn(|cx| Service::<OutgoingCall>::poll_ready(&mut service, cx)).await.unwrap();
    // The one argument, a number below 128, is one byte.
    let call = OutgoingCall::raw(MethodId::of("desk", 1, "double"), vec![21].into());
    let answer = service.call(call).await.unwrap();
    assert_eq!(answer.decode::<u64, String>(), Ok(42));
    assert!(poll_fn(|cx| Service::<OutgoingCall>::poll_ready(&mut service, cx)).await.is_err());
}

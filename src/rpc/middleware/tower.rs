//! Bridges to `tower`, with the feature of that name.
//!
//! - A [`Caller`] is a `tower::Service` of [`OutgoingCall`]s, to be put into whatever takes one.
//! - [`ClientLayer`] makes middleware of a `tower::Layer` for the calls of typed clients, [`HandlerLayer`] for those of
//!   handlers.
//!
//! A layer is applied once, to a service at whose end each request finds its own way on, so that what it shares between
//! calls, such as a rate, is shared. For each call the service that it makes is cloned, waited for until it is ready, and
//! called.

use std::convert::Infallible;
use std::fmt;
use std::future::poll_fn;
use std::task::{Context, Poll};

use tower_layer::Layer;
use tower_service::Service;

use super::{ClientMiddleware, NextCall, NextHandler, ServerMiddleware};
use crate::future::BoxFuture;
use crate::rpc::{Answer, CallError, Caller, IncomingCall, OutgoingCall, Reply};

impl Service<OutgoingCall> for Caller {
    type Response = Answer;
    type Error = CallError;
    type Future = BoxFuture<'static, Result<Answer, CallError>>;

    /// Always: more calls than the peer takes at once wait for their turn.
    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), CallError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, call: OutgoingCall) -> Self::Future {
        self.next().begin(call)
    }
}

/// A call that a client makes, and its way on.
#[derive(Debug)]
pub struct ClientRequest {
    /// The call.
    pub call: OutgoingCall,
    next: NextCall,
}

impl ClientRequest {
    /// The same call once more, for a layer that repeats it, unless streams travel in it. Look first whether it
    /// [may be repeated](CallError::execution).
    pub fn try_clone(&self) -> Option<Self> {
        Some(ClientRequest { call: self.call.try_clone()?, next: self.next.clone() })
    }
}

/// The service at the end of a [`ClientLayer`]: makes the call.
#[derive(Debug, Clone, Copy, Default)]
pub struct MakeCall(());

impl Service<ClientRequest> for MakeCall {
    type Response = Answer;
    type Error = CallError;
    type Future = BoxFuture<'static, Result<Answer, CallError>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), CallError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: ClientRequest) -> Self::Future {
        request.next.call(request.call)
    }
}

/// Middleware for clients that is made of a `tower::Layer`; `S` is the service that the layer makes.
#[derive(Clone)]
pub struct ClientLayer<S, F> {
    service: S,
    into_error: F,
}

impl<S, F> ClientLayer<S, F> {
    /// Applies the layer. `into_error` says what its errors mean for a call; those of calls themselves are in it, as the
    /// layer hands them on.
    pub fn new<L: Layer<MakeCall, Service = S>>(layer: L, into_error: F) -> Self {
        ClientLayer { service: layer.layer(MakeCall::default()), into_error }
    }
}

impl<S, F> fmt::Debug for ClientLayer<S, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientLayer").finish_non_exhaustive()
    }
}

impl<S, F> ClientMiddleware for ClientLayer<S, F>
where
    S: Service<ClientRequest, Response = Answer> + Clone + Send + Sync + 'static,
    S::Future: Send,
    S::Error: Send,
    F: Fn(S::Error) -> CallError + Send + Sync + 'static,
{
    async fn call(&self, call: OutgoingCall, next: NextCall) -> Result<Answer, CallError> {
        let mut service = self.service.clone();
        poll_fn(|cx| service.poll_ready(cx)).await.map_err(&self.into_error)?;
        service.call(ClientRequest { call, next }).await.map_err(&self.into_error)
    }
}

/// What a layer's boxed error means for a call: the call's own error if it is one, else [`CallError::Cancelled`], which
/// claims nothing about whether it was executed. Of a layer that sheds load more can be said than that.
pub fn error_or_cancelled(error: Box<dyn std::error::Error + Send + Sync>) -> CallError {
    error.downcast::<CallError>().map_or_else(
        |error| {
            tracing::debug!(%error, "a layer of tower ended a call");
            CallError::Cancelled
        },
        |error| *error,
    )
}

/// A call that is to be answered, and its way on.
#[derive(Debug)]
pub struct HandlerRequest {
    /// The call.
    pub call: IncomingCall,
    next: NextHandler,
}

/// The service at the end of a [`HandlerLayer`]: runs the handler.
#[derive(Debug, Clone, Copy, Default)]
pub struct RunHandler(());

impl Service<HandlerRequest> for RunHandler {
    type Response = Reply;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Reply, Infallible>>;

    fn poll_ready(&mut self, _cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: HandlerRequest) -> Self::Future {
        Box::pin(async move { Ok(request.next.handle(request.call).await) })
    }
}

/// Middleware for handlers that is made of a `tower::Layer`; `S` is the service that the layer makes.
#[derive(Clone)]
pub struct HandlerLayer<S, F> {
    service: S,
    into_reply: F,
}

impl<S, F> HandlerLayer<S, F> {
    /// Applies the layer. `into_reply` answers for it when it fails: with [`Reply::refused`] if it has not gone on.
    pub fn new<L: Layer<RunHandler, Service = S>>(layer: L, into_reply: F) -> Self {
        HandlerLayer { service: layer.layer(RunHandler::default()), into_reply }
    }
}

impl<S, F> fmt::Debug for HandlerLayer<S, F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HandlerLayer").finish_non_exhaustive()
    }
}

impl<S, F> ServerMiddleware for HandlerLayer<S, F>
where
    S: Service<HandlerRequest, Response = Reply> + Clone + Send + Sync + 'static,
    S::Future: Send,
    S::Error: Send,
    F: Fn(S::Error) -> Reply + Send + Sync + 'static,
{
    async fn handle(&self, call: IncomingCall, next: NextHandler) -> Reply {
        let mut service = self.service.clone();
        let answered = async {
            poll_fn(|cx| service.poll_ready(cx)).await?;
            service.call(HandlerRequest { call, next }).await
        };
        answered.await.unwrap_or_else(&self.into_reply)
    }
}

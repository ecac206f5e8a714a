//! A server: accepts conduits at an endpoint and holds a session on each.
//!
//! One task accepts and does nothing else. Each conduit has a task of its own from there on: what is left of the
//! conduit's own handshake, then the hello, then the session until its last word is said. A conduit that has not ended
//! its handshake holds a place in a bounded gate, and a session holds one of a bounded number of places.

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::AbortHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tollway_protocol::error::{Reason, SessionEnd, code};
use tollway_protocol::session::Role;

use crate::admission::{Admission, Gate, GatePlace, Places};
use crate::auth::Authenticator;
use crate::conduit::Conduit;
use crate::conduit::any::{self, AnyListener, EstablishError, ListenOptions};
use crate::conduit::endpoint::{Endpoint, Scheme};
use crate::conduit::listen::{self, Listener};
use crate::conduit::tcp::TcpListener;
use crate::future::BoxFuture;
use crate::session::{Session, SessionConfig};

/// What a server is to be.
#[derive(Debug, Clone)]
pub struct ServerConfig {
    /// What each session is to be. Its `handshake_timeout` counts from the accepting of the conduit: a TLS handshake and
    /// the hello share it.
    pub session: SessionConfig,
    /// Sessions at once; a peer that comes when there are so many is refused with `AT_CAPACITY`. Default 10,000: each
    /// has a file descriptor and some tens of KiB.
    pub max_sessions: usize,
    /// Conduits at once whose handshake has not ended. Default 1,024: an honest handshake takes a few round trips, so
    /// this is thousands of newcomers a second. One more takes the place of the oldest, which is cut off.
    pub max_handshakes: usize,
    /// Who decides which peers get a session. Default nobody: all do.
    pub authenticator: Option<Arc<dyn Authenticator>>,
}

impl Default for ServerConfig {
    fn default() -> Self {
        ServerConfig {
            session: SessionConfig::default(),
            max_sessions: 10_000,
            max_handshakes: 1_024,
            authenticator: None,
        }
    }
}

impl From<SessionConfig> for ServerConfig {
    fn from(session: SessionConfig) -> Self {
        ServerConfig { session, ..ServerConfig::default() }
    }
}

/// Listens at an endpoint. Nothing is accepted before [`run`](Self::run).
pub struct Server {
    listening: Box<dyn Accepting>,
    session: SessionConfig,
    handle: ServerHandle,
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Server").field("endpoint", &self.handle.endpoint).finish_non_exhaustive()
    }
}

/// How a server has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stopped {
    /// Sessions whose connections did not end within the grace period, and that were closed with what was open in
    /// them.
    pub cut_off: usize,
}

impl Server {
    /// Binds an endpoint. Port 0 takes a free one, which [`endpoint`](Self::endpoint) names.
    ///
    /// # Errors
    /// When the address cannot be bound.
    pub async fn bind(endpoint: &Endpoint, config: impl Into<ServerConfig>) -> io::Result<Server> {
        if endpoint.scheme() == Scheme::Tcp {
            // The kind that is counted in nanoseconds gets a driver of its own.
            any::warn_of_plain(endpoint);
            let listener = TcpListener::bind(endpoint.address()).await?;
            let bound = endpoint.clone().without_path().with_address(listener.local_addr()?);
            return Ok(Server::with_listener(listener, bound, config));
        }
        let failed = |error| match error {
            EstablishError::Io(error) => error,
            other => io::Error::other(other),
        };
        let listener = AnyListener::bind(endpoint, &ListenOptions::default()).await.map_err(failed)?;
        let bound = listener.endpoints().next().unwrap_or(endpoint).clone();
        Ok(Server::with_listener(listener, bound, config))
    }

    /// A server on a listener of any kind. `endpoint` is what [`endpoint`](Self::endpoint) names.
    pub fn with_listener<L: Listener>(listener: L, endpoint: Endpoint, config: impl Into<ServerConfig>) -> Server
    where
        <L::Conduit as Conduit>::Reader: Unpin,
        <L::Conduit as Conduit>::Writer: Unpin,
    {
        let ServerConfig { session, max_sessions, max_handshakes, authenticator } = config.into();
        let core = Core {
            stop: CancellationToken::new(),
            cut: CancellationToken::new(),
            tasks: TaskTracker::new(),
            gate: Gate::new(max_handshakes),
            places: Places::new(max_sessions),
            authenticator,
        };
        Server {
            listening: Box::new(Listening(listener)),
            session,
            handle: ServerHandle { core: Arc::new(core), endpoint: Arc::new(endpoint) },
        }
    }

    /// Where the server listens, with the real port.
    pub fn endpoint(&self) -> &Endpoint {
        &self.handle.endpoint
    }

    /// What outlives the call of [`run`](Self::run): where the server listens, how many sessions it has, and how to stop
    /// it.
    pub fn handle(&self) -> ServerHandle {
        self.handle.clone()
    }

    /// Changes what is served, for a service that must know the server's own endpoint.
    pub fn set_config(&mut self, session: SessionConfig) {
        self.session = session;
    }

    /// Holds a session on each conduit that comes, until `shutdown` is ready or [`ServerHandle::stop`] is called. Then it
    /// accepts no more, says so to every peer, and waits for their connections to end, at most for `grace`; what is left
    /// is closed. When it returns, every session has said its last word and no task of the server is left.
    ///
    /// No error of one conduit ends it, nor one of the listener, such as a lack of file descriptors.
    ///
    /// # Cancel safety
    /// Dropping the future closes all sessions.
    pub async fn run(self, shutdown: impl Future<Output = ()> + Send, grace: Duration) -> Stopped {
        let Server { listening, session, handle } = self;
        let core = handle.core;
        // However this future ends, nothing of the server goes on.
        let _guards = (core.stop.clone().drop_guard(), core.cut.clone().drop_guard());
        tokio::select! {
            () = shutdown => {}
            () = core.stop.cancelled() => {}
            () = listening.accept_all(core.clone(), session) => {}
        }
        // The listener is closed by now.
        core.stop.cancel();
        core.tasks.close();
        let mut cut_off = 0;
        if tokio::time::timeout(grace, core.tasks.wait()).await.is_err() {
            cut_off = core.places.taken();
            tracing::warn!(sessions = cut_off, "sessions did not end within the grace period");
            core.cut.cancel();
            // The last words are given a bounded time by each session's own task.
            core.tasks.wait().await;
        }
        Stopped { cut_off }
    }
}

/// A handle of a running server.
#[derive(Clone)]
pub struct ServerHandle {
    core: Arc<Core>,
    endpoint: Arc<Endpoint>,
}

impl fmt::Debug for ServerHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerHandle")
            .field("endpoint", &self.endpoint)
            .field("sessions", &self.session_count())
            .field("handshakes", &self.handshake_count())
            .finish_non_exhaustive()
    }
}

impl ServerHandle {
    /// Where the server listens, with the real port.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Sessions that are open, or whose last words are on their way.
    pub fn session_count(&self) -> usize {
        self.core.places.taken()
    }

    /// Conduits whose handshake has not ended.
    pub fn handshake_count(&self) -> usize {
        self.core.gate.count()
    }

    /// Makes [`Server::run`] end as if its `shutdown` were ready. May be called at any time, and more than once.
    pub fn stop(&self) {
        self.core.stop.cancel();
    }

    /// Waits until the server has begun to stop.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn stopping(&self) {
        self.core.stop.cancelled().await;
    }
}

/// What the tasks of a server share.
struct Core {
    /// No conduit is accepted any more, and sessions drain.
    stop: CancellationToken,
    /// The grace period is over.
    cut: CancellationToken,
    tasks: TaskTracker,
    gate: Arc<Gate>,
    places: Arc<Places>,
    authenticator: Option<Arc<dyn Authenticator>>,
}

/// A listener of any kind.
trait Accepting: Send + Sync {
    fn accept_all(self: Box<Self>, core: Arc<Core>, session: SessionConfig) -> BoxFuture<'static, ()>;
}

struct Listening<L>(L);

impl<L: Listener> Accepting for Listening<L>
where
    <L::Conduit as Conduit>::Reader: Unpin,
    <L::Conduit as Conduit>::Writer: Unpin,
{
    fn accept_all(self: Box<Self>, core: Arc<Core>, session: SessionConfig) -> BoxFuture<'static, ()> {
        Box::pin(async move {
            loop {
                let pending = listen::accept(&self.0).await;
                let place = core.gate.enter().await;
                core.tasks.spawn(serve(core.clone(), pending, session.clone(), place));
            }
        })
    }
}

/// Holds a session on one conduit.
async fn serve<C: Conduit>(
    core: Arc<Core>,
    pending: impl Future<Output = io::Result<C>> + Send,
    config: SessionConfig,
    place: GatePlace,
) where
    C::Reader: Unpin,
    C::Writer: Unpin,
{
    // A handshake is cut off without a word: it has no claim to anything yet.
    let opened = tokio::select! {
        opened = handshake(&core, pending, config) => opened,
        () = place.given_up() => {
            tracing::debug!("a handshake gave its place to a newcomer");
            None
        }
        () = core.stop.cancelled() => None,
    };
    drop(place);
    let Some((session, task)) = opened else { return };
    tracing::debug!(peer = %session.peer(), "session opened");
    hold(&core, &session).await;
    drop(session);
    if let Err(error) = task.await {
        tracing::error!(%error, "a session's task has panicked");
    }
}

/// From an accepted conduit to a session, within one deadline.
async fn handshake<C: Conduit>(
    core: &Core,
    pending: impl Future<Output = io::Result<C>> + Send,
    mut config: SessionConfig,
) -> Option<(Session, tokio::task::JoinHandle<()>)>
where
    C::Reader: Unpin,
    C::Writer: Unpin,
{
    let deadline = Instant::now() + config.protocol.handshake_timeout;
    let conduit = match tokio::time::timeout_at(deadline, pending).await {
        Ok(Ok(conduit)) => conduit,
        Ok(Err(error)) => {
            tracing::debug!(%error, "a conduit was lost in its own handshake");
            return None;
        }
        Err(_late) => {
            tracing::debug!("a conduit did not end its own handshake in time");
            return None;
        }
    };
    config.protocol.handshake_timeout = deadline.saturating_duration_since(Instant::now());
    let admission = Admission::new(core.places.clone(), core.authenticator.clone(), config.observer.clone());
    let beginning = Session::begin(conduit, config, Role::Responder, Some(admission));
    let mut cut = CutOff(Some(beginning.abort_handle()));
    let (opened, task) = beginning.opened().await;
    match opened {
        Ok(session) => {
            cut.0 = None;
            Some((session, task))
        }
        Err(error) => {
            tracing::debug!(%error, "no session");
            // Its refusal is on its way; until it is said the place is taken.
            if let Err(error) = task.await {
                tracing::error!(%error, "a session's task has panicked");
            }
            None
        }
    }
}

/// Ends the task of a handshake that is dropped.
struct CutOff(Option<AbortHandle>);

impl Drop for CutOff {
    fn drop(&mut self) {
        if let Some(task) = self.0.take() {
            task.abort();
        }
    }
}

/// Waits for the end of a session, and drains it when the server stops.
async fn hold(core: &Core, session: &Session) {
    tokio::select! {
        end = session.closed() => {
            match end {
                SessionEnd::PeerViolation(_) | SessionEnd::ReportedViolation(_) => {
                    tracing::warn!(peer = %session.peer(), %end, "session ended");
                }
                _ => tracing::debug!(peer = %session.peer(), %end, "session ended"),
            }
            return;
        }
        () = core.stop.cancelled() => {}
    }
    let reason = Reason::new(code::GOING_AWAY, "the server is shutting down");
    tokio::select! {
        () = session.drain(reason.clone()) => {}
        () = core.cut.cancelled() => session.close(reason),
    }
}

//! [`Client`]: a server at a URL, to which a session is held for as long as it is wanted.
//!
//! A client connects when the first call wants it, one attempt at a time however many calls wait, and again after a loss
//! when the next call wants it. Attempts that fail are followed by a [`Backoff`]. One task (`keeper`) does all this and is the only
//! one that changes the client's state; calls ask it and watch. A connection to each service is opened with its first call
//! and shared (`service`).
//!
//! A session whose server is going away is given up at once for new calls; those that are under way end on it. When the last
//! handle is dropped, or on [`Client::close`], calls that are under way may end within [`ClientConfig::grace`], paid channels are
//! closed or kept, and the session is drained.
//!
//! **What is repeated.** By default nothing. With [`Retry`] a client repeats calls that were certainly not executed, and, if
//! it is told so, those that may have been executed of methods that are marked as idempotent. A call that carries streams is
//! never repeated: they are there once. Nor is one repeated on a paid connection that may have been executed: it
//! could be paid for twice.

mod backoff;
mod keeper;
mod service;

use std::fmt;
use std::num::NonZeroU32;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::client::{ConnectError, connect_with};
use crate::conduit::any::ConnectOptions;
use crate::conduit::endpoint::{Endpoint, EndpointError};
use crate::future::BoxFuture;
use crate::payment::{Wallet, WalletError};
use crate::rpc::middleware::ClientStack;
use crate::rpc::{Caller, ServiceClient};
use crate::session::{Session, SessionConfig};

pub use backoff::Backoff;
pub use service::RemoteService;

use keeper::{Core, State};

/// What a client is to be.
#[derive(Debug, Clone)]
pub struct ClientConfig {
    /// What each session is to be. Its `client_middleware` is around each call once, however often it is repeated.
    pub session: SessionConfig,
    /// Trust and certificates, for URLs with TLS.
    pub options: ConnectOptions,
    /// How long to wait between attempts to connect.
    pub backoff: Backoff,
    /// What a call does that finds no session.
    pub when_down: WhenDown,
    /// Which calls are made again.
    pub retry: Retry,
    /// Who pays for services that have a price, and within which bounds. Default nobody: such services are
    /// [`PaymentRequired`](crate::rpc::CallError::PaymentRequired).
    pub wallet: Option<Wallet>,
    /// Leave channels in the wallet's store for the next client instead of closing them in the end. Default `false`: the
    /// deposit comes back.
    pub keep_channels: bool,
    /// How long calls that are under way may take in the end, and then the closing of channels. Default 30 s.
    pub grace: Duration,
}

impl Default for ClientConfig {
    fn default() -> Self {
        ClientConfig {
            session: SessionConfig::default(),
            options: ConnectOptions::default(),
            backoff: Backoff::default(),
            when_down: WhenDown::default(),
            retry: Retry::default(),
            wallet: None,
            keep_channels: false,
            grace: Duration::from_secs(30),
        }
    }
}

/// What a call does that finds no session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WhenDown {
    /// Waits for the attempt that is under way or due, and fails with it. During a backoff it fails at once.
    FailFast,
    /// Waits until there is a session, attempt after attempt, at most for so long and until the call's deadline.
    WaitUpTo(Duration),
}

impl Default for WhenDown {
    /// Waits up to 30 s: over the restart of a server.
    fn default() -> Self {
        WhenDown::WaitUpTo(Duration::from_secs(30))
    }
}

/// Which calls a client makes again by itself. Each is made at most so many times in all, within its deadline, with a
/// [`Backoff`] in between.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Retry {
    /// None.
    #[default]
    Never,
    /// Those that were certainly not executed, and whose failure may pass: see
    /// [`CallError::is_retryable`](crate::rpc::CallError::is_retryable).
    NotExecuted(NonZeroU32),
    /// These, and calls of methods that are marked `#[idempotent]` if the connection was lost, on connections that are
    /// not paid.
    Idempotent(NonZeroU32),
}

/// How a client stands with its server.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Health {
    /// There is no session, and nobody has wanted one since.
    Idle,
    /// An attempt to connect is under way.
    Connecting,
    /// There is a session.
    Ready,
    /// The last attempt failed, and the next one waits.
    Backoff {
        /// Attempts that failed in a row.
        failures: u32,
        /// How long the wait is, from its beginning.
        delay: Duration,
        /// Why the last one failed.
        error: Arc<ConnectError>,
    },
    /// The client was closed.
    Closed,
}

/// Why a client has no connection for a call, which was not made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ClientError {
    /// The last attempt to connect failed, and the client waits before the next one.
    #[error("{error} ({failures} attempts have failed; the next one is within {delay:?})")]
    Down {
        /// Attempts that failed in a row.
        failures: u32,
        /// How long the client waits before the next one.
        delay: Duration,
        /// Why the last one failed.
        error: Arc<ConnectError>,
    },
    /// There was no session in the time that a call waits for one.
    #[error("there was no session within {waited:?}{}", match last { Some(error) => format!(": {error}"), None => String::new() })]
    NotInTime {
        /// How long it waited.
        waited: Duration,
        /// Why the last attempt failed, if one did.
        last: Option<Arc<ConnectError>>,
    },
    /// The service's price cannot be paid.
    #[error(transparent)]
    Wallet(#[from] WalletError),
    /// The client was closed.
    #[error("the client was closed")]
    Closed,
}

impl ClientError {
    /// Whether it may pass by itself.
    pub fn is_temporary(&self) -> bool {
        matches!(self, ClientError::Down { .. } | ClientError::NotInTime { .. })
    }
}

/// Makes sessions for a [`Client`]: by default over a conduit to a URL.
pub trait Dial: Send + Sync + 'static {
    /// Makes one attempt.
    fn dial(&self, config: SessionConfig) -> BoxFuture<'static, Result<Session, ConnectError>>;

    /// Whom it reaches, for logs and metrics.
    fn address(&self) -> String;
}

struct Url {
    endpoint: Endpoint,
    options: ConnectOptions,
}

impl Dial for Url {
    fn dial(&self, config: SessionConfig) -> BoxFuture<'static, Result<Session, ConnectError>> {
        let (endpoint, options) = (self.endpoint.clone(), self.options.clone());
        Box::pin(async move { connect_with(&endpoint, config, &options).await })
    }

    fn address(&self) -> String {
        match self.endpoint.socket() {
            Some(path) => path.display().to_string(),
            None => format!("{}:{}", self.endpoint.host(), self.endpoint.port()),
        }
    }
}

/// A server at a URL: connects when it is wanted, and again after a loss. Clones share all of it; the last one dropped,
/// with the last typed client, closes it.
///
/// ```no_run
/// # #[tollway::service]
/// # trait Greeter {
/// #     async fn greet(&self, name: &str) -> String;
/// # }
/// # async fn example() -> Result<(), Box<dyn std::error::Error>> {
/// let client = tollway::Client::connect("tcp://127.0.0.1:7400")?;
/// let greeter: GreeterClient = client.service();
/// // Connects with the first call, and again if the server was started anew in between.
/// println!("{}", greeter.greet("world").await?);
/// # Ok(())
/// # }
/// ```
#[derive(Clone)]
pub struct Client {
    handle: Arc<Handle>,
}

/// What all handles of a client share. Its drop begins the client's end.
pub(crate) struct Handle {
    core: Arc<Core>,
    around: ClientStack,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.core.closing.cancel();
    }
}

impl Client {
    /// A client of the server at a URL, as by default. Nothing is sent yet.
    ///
    /// # Errors
    /// When it is no URL.
    ///
    /// # Panics
    /// Outside of a tokio runtime, on which the client's task runs.
    pub fn connect(url: &str) -> Result<Client, EndpointError> {
        Ok(Client::new(url.parse()?, ClientConfig::default()))
    }

    /// A client of the server at an endpoint. Nothing is sent yet.
    ///
    /// # Panics
    /// Outside of a tokio runtime, on which the client's task runs.
    pub fn new(endpoint: Endpoint, config: ClientConfig) -> Client {
        let options = config.options.clone();
        Client::with_dialler(Url { endpoint, options }, config)
    }

    /// A client of whatever `dial` reaches.
    ///
    /// # Panics
    /// Outside of a tokio runtime, on which the client's task runs.
    pub fn with_dialler(dial: impl Dial, mut config: ClientConfig) -> Client {
        let around = std::mem::take(&mut config.session.client_middleware);
        let core = Core::start(Box::new(dial), config);
        Client { handle: Arc::new(Handle { core, around }) }
    }

    /// A typed client of a service there.
    pub fn service<C: ServiceClient>(&self) -> C {
        C::from(Caller::from(RemoteService::new(self.handle.clone(), C::NAME, C::SCHEMA)))
    }

    /// Whom a client by hand calls: the service of that name.
    pub fn caller(&self, service: &str) -> Caller {
        Caller::from(RemoteService::new(self.handle.clone(), service, None))
    }

    /// Connects, as a call would, and waits until there is a session.
    ///
    /// # Errors
    /// When there is none in the time that a call waits for one.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn session(&self) -> Result<Session, ClientError> {
        self.handle.core.session().await
    }

    /// How it stands.
    pub fn health(&self) -> Health {
        self.handle.core.state().health()
    }

    /// To be told when that changes.
    pub fn watch(&self) -> HealthWatch {
        HealthWatch { states: self.handle.core.watch() }
    }

    /// Ends the client: new calls fail, those that are under way may end within the grace period, channels are closed
    /// or kept, and the session is closed.
    ///
    /// # Cancel safety
    /// The client ends also when the future is dropped.
    pub async fn close(&self) {
        self.handle.core.closing.cancel();
        self.handle.core.ended.cancelled().await;
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let core = &self.handle.core;
        f.debug_struct("Client").field("address", &core.dial.address()).field("health", &self.health()).finish()
    }
}

/// Tells how a [`Client`] stands whenever that changes.
pub struct HealthWatch {
    states: watch::Receiver<State>,
}

impl HealthWatch {
    /// How it stands now; [`changed`](Self::changed) waits for what is other than that.
    pub fn current(&mut self) -> Health {
        self.states.borrow_and_update().health()
    }

    /// Waits for a change. Of changes in quick succession the last one counts. Once the client is closed nothing
    /// changes any more.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn changed(&mut self) -> Health {
        match self.states.changed().await {
            Ok(()) => self.current(),
            // The client's task has ended.
            Err(_) => Health::Closed,
        }
    }
}

impl fmt::Debug for HealthWatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HealthWatch").field("health", &self.states.borrow().health()).finish()
    }
}

/// A token that is cancelled when its holder ends, however that is.
struct CancelOnDrop(CancellationToken);

impl Drop for CancelOnDrop {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

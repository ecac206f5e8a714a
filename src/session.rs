//! The handle of a session: connect or accept over a conduit, open virtual connections.

use std::fmt;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;
use tokio::task::{AbortHandle, JoinHandle};
use tollway_protocol::error::{ConnectionEnd, Reason, SessionEnd, code};
use tollway_protocol::id::ConnectionId;
use tollway_protocol::limits::ConnectionLimits;
use tollway_protocol::memory::MemoryPool;
use tollway_protocol::metadata::Metadata;
use tollway_protocol::session::{
    CommandError, Config, ConnectionStats, LaneMode, Machine, Role, SessionStats, WriteWatch,
};
use tracing::field::Empty;
use tracing::{Instrument, Span};

use crate::admission::Admission;
use crate::auth::{Identity, Prover, SessionPeer};
use crate::conduit::{Conduit, FrameReader, FrameWriter, Lanes, PeerInfo};
use crate::connection::Connection;
use crate::driver::{Driver, Serving};
use crate::observe::{Observer, Traffic};
use crate::rpc::middleware::ClientStack;
use crate::rpc::{Service, ServiceClient, ServiceEntry, Services, check_schema};
use crate::shared::{ConnectionCell, OpenAnswer, Opening, Shared};
use crate::together::Together;

/// Bytes that the sessions of a process may grant together, unless their configuration names another pool: four sessions
/// that use up the budget of a session. What is granted is not yet used, so it may be a large part of the memory.
pub const PROCESS_MEMORY: u64 = 1 << 30;

/// The pool of sessions whose configuration names none.
pub fn process_memory() -> Arc<MemoryPool> {
    static POOL: OnceLock<Arc<MemoryPool>> = OnceLock::new();
    POOL.get_or_init(|| Arc::new(MemoryPool::new(PROCESS_MEMORY))).clone()
}

/// What a session is to be.
#[derive(Debug, Clone, Default)]
pub struct SessionConfig {
    /// Limits, timeouts and metadata of the session. Its lane mode is set from the conduit.
    pub protocol: Config,
    /// What this side receives on each connection that it accepts.
    pub connection_limits: ConnectionLimits,
    /// What this side serves to the peer: both sides may.
    pub services: Services,
    /// What proves to a server that asks who this side is, such as a [`KeyProver`](crate::auth::KeyProver).
    pub prover: Option<Arc<dyn Prover>>,
    /// Who watches over the session.
    pub observer: Option<Observer>,
    /// What is around each call that this side makes on connections that it opens.
    pub client_middleware: ClientStack,
}

/// A session that could not be established.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no session with {peer}: {end}")]
pub struct SessionError {
    /// The other end.
    pub peer: String,
    /// Why.
    pub end: SessionEnd,
}

/// An open that did not lead to a connection.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The service has a price, and these are its signed terms: see [`Wallet`](crate::payment::Wallet).
    #[error("the service must be paid for")]
    PaymentRequired {
        /// The terms as they came; nothing about them was checked.
        terms: Bytes,
    },
    /// The peer rejected it.
    #[error("the peer rejected the connection: {reason}")]
    Rejected {
        /// Why.
        reason: Reason,
        /// More about it.
        metadata: Metadata,
    },
    /// The service's methods take or return other types than those of the client: one of the two is older.
    #[error(
        "the service has other methods than the client: schema {theirs:016x} there, {ours:016x} here; \
         what changes a service gives it a new version"
    )]
    OtherSchema {
        /// The client's.
        ours: u64,
        /// The service's.
        theirs: u64,
    },
    /// It could not be asked for.
    #[error(transparent)]
    NotSent(#[from] CommandError),
    /// The connection or the session ended before the answer.
    #[error("no answer: {0}")]
    Ended(ConnectionEnd),
}

/// A session with a peer. Clones share it; with the last clone and the last of its connections it closes.
#[derive(Clone)]
pub struct Session {
    inner: Arc<SessionInner>,
}

pub(crate) struct SessionInner {
    pub(crate) shared: Arc<Shared>,
    peer: Arc<SessionPeer>,
    metadata: Metadata,
    limits: ConnectionLimits,
    middleware: ClientStack,
}

impl SessionInner {
    /// What is around the calls that are made on its connections.
    pub(crate) fn middleware(&self) -> &ClientStack {
        &self.middleware
    }
}

impl Session {
    /// Starts a session as the side that speaks first.
    ///
    /// # Errors
    /// When the peer does not speak Tollway, refuses, or does not answer in time.
    ///
    /// # Cancel safety
    /// Dropping the future ends the conduit.
    pub async fn connect<C: Conduit>(conduit: C, config: SessionConfig) -> Result<Session, SessionError>
    where
        C::Reader: Unpin,
        C::Writer: Unpin,
    {
        Session::start(conduit, config, Role::Initiator).await
    }

    /// Starts a session as the side that answers.
    ///
    /// # Errors
    /// When the peer does not speak Tollway, or does not finish its hello in time.
    ///
    /// # Cancel safety
    /// Dropping the future ends the conduit.
    pub async fn accept<C: Conduit>(conduit: C, config: SessionConfig) -> Result<Session, SessionError>
    where
        C::Reader: Unpin,
        C::Writer: Unpin,
    {
        Session::start(conduit, config, Role::Responder).await
    }

    async fn start<C: Conduit>(conduit: C, config: SessionConfig, role: Role) -> Result<Session, SessionError>
    where
        C::Reader: FrameReader + Unpin,
        C::Writer: FrameWriter + Unpin,
    {
        let (opened, _driver) = Session::begin(conduit, config, role, None).opened().await;
        opened
    }

    /// Starts the session's task. `admission` decides about a peer that says hello; without it everybody is welcome.
    pub(crate) fn begin<C: Conduit>(
        mut conduit: C,
        config: SessionConfig,
        role: Role,
        admission: Option<Arc<Admission>>,
    ) -> Beginning
    where
        C::Reader: FrameReader + Unpin,
        C::Writer: FrameWriter + Unpin,
    {
        let peer = SessionPeer::new(conduit.peer());
        let mut protocol = config.protocol;
        protocol.lanes = match conduit.lanes() {
            Lanes::PerConnection => LaneMode::PerConnection,
            Lanes::One => LaneMode::One,
        };
        protocol.memory.pool.get_or_insert_with(process_memory);
        let watch = WriteWatch::new(&protocol);
        let max_frame = protocol.limits.max_frame as usize;
        let (opened, answer) = oneshot::channel();
        let shared = Shared::new(
            |now| match role {
                Role::Initiator => Machine::initiator(protocol, now),
                Role::Responder => Machine::responder(protocol, now),
            },
            peer.clone(),
            session_span(&peer.info, role),
            opened,
        );
        let limits = config.connection_limits;
        let (services, prover, observer) = (config.services, config.prover, config.observer);
        let serving = Serving { services, limits, max_frame, prover, admission };
        let engine = conduit.take_engine();
        let span = shared.span().clone();
        let driver = Driver::new(shared.clone(), serving, (role, watch), conduit.split());
        let driver = match engine {
            Some(engine) => tokio::spawn(Together::new(engine, driver).instrument(span)),
            None => tokio::spawn(driver.instrument(span)),
        };
        let middleware = config.client_middleware;
        let inner = SessionInner { shared, peer, metadata: Metadata::new(), limits, middleware };
        Beginning { inner, answer, driver, observer }
    }

    /// The other end of the conduit.
    pub fn peer(&self) -> &PeerInfo {
        &self.inner.peer.info
    }

    /// Who the peer has proved to be, if an [`Authenticator`](crate::auth::Authenticator) has decided about it.
    pub fn identity(&self) -> Option<&Identity> {
        self.inner.peer.identity.get()
    }

    /// What the peer said in its hello.
    pub fn metadata(&self) -> &Metadata {
        &self.inner.metadata
    }

    /// Opens a connection to an unpaid service.
    ///
    /// # Errors
    /// When the peer rejects it, asks for payment, or does not answer in time.
    ///
    /// # Cancel safety
    /// Dropping the future closes the connection on both sides, even if it is accepted later.
    pub async fn open(&self, service: &str) -> Result<Connection, OpenError> {
        Ok(self.open_with(Opening::of(service, self.inner.limits)).await?.0)
    }

    /// Opens a connection to an unpaid service, and serves one to the peer on the same connection: the peer's handlers call
    /// it by [`CallContext::connection`](crate::rpc::CallContext::connection).
    ///
    /// # Errors
    /// Those of [`open`](Self::open).
    ///
    /// # Cancel safety
    /// That of [`open`](Self::open).
    pub async fn open_serving(&self, service: &str, serves: impl Service) -> Result<Connection, OpenError> {
        let serves = Some(Arc::new(ServiceEntry::new(Arc::new(serves), None)));
        Ok(self.open_with(Opening { serves, ..Opening::of(service, self.inner.limits) }).await?.0)
    }

    /// Opens a connection to an unpaid service, for its typed client.
    ///
    /// # Errors
    /// Those of [`open`](Self::open).
    ///
    /// # Cancel safety
    /// That of [`open`](Self::open).
    pub async fn open_client<C: ServiceClient>(&self) -> Result<C, OpenError> {
        let connection = self.open(C::NAME).await?;
        check_schema(C::SCHEMA, connection.metadata())?;
        Ok(C::from(connection))
    }

    /// Opens a connection; the second value is the receipt of a paid one.
    pub(crate) async fn open_with(&self, spec: Opening<'_>) -> Result<(Connection, Bytes), OpenError> {
        let shared = &self.inner.shared;
        let (id, cell, answer) = shared.open(spec)?;
        // From here a drop closes: before the answer, too.
        let abandon = Abandon { shared, id, cell: &cell, armed: true };
        match answer.await {
            Ok(OpenAnswer::Accepted { metadata, receipt }) => {
                abandon.disarm();
                Ok((Connection::new(self.inner.clone(), id, cell, metadata), receipt))
            }
            Ok(OpenAnswer::Rejected { reason, terms, .. }) if reason.code == code::PAYMENT_REQUIRED => {
                abandon.disarm();
                Err(OpenError::PaymentRequired { terms })
            }
            Ok(OpenAnswer::Rejected { reason, metadata, .. }) => {
                abandon.disarm();
                Err(OpenError::Rejected { reason, metadata })
            }
            Ok(OpenAnswer::Ended(end)) => Err(OpenError::Ended(end)),
            Err(_ended) => Err(OpenError::Ended(ConnectionEnd::Session(shared.closed().await))),
        }
    }

    /// What a relay needs of it.
    pub(crate) fn relay_parts(&self) -> (&Arc<Shared>, ConnectionLimits) {
        (&self.inner.shared, self.inner.limits)
    }

    /// What the session has carried, its counts, and those of its connections, `most` at most.
    pub fn stats(&self, most: usize) -> (Traffic, SessionStats, Vec<ConnectionStats>) {
        self.inner.shared.observe(most)
    }

    /// The last measured round-trip time.
    pub fn rtt(&self) -> Option<Duration> {
        self.inner.shared.lock().machine.rtt()
    }

    /// Why the session ended, once it did.
    pub fn end(&self) -> Option<&SessionEnd> {
        self.inner.shared.end()
    }

    /// Waits for the end of the session.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn closed(&self) -> SessionEnd {
        self.inner.shared.closed().await
    }

    /// Whether the peer takes no new connections any more: it drains the session, or the session has ended.
    pub fn is_peer_leaving(&self) -> bool {
        self.inner.shared.is_leaving()
    }

    /// Waits until the peer takes no new connections any more: until it drains the session, or the session ends. What is
    /// open goes on while it drains.
    ///
    /// # Cancel safety
    /// Nothing is lost when the future is dropped.
    pub async fn peer_leaving(&self) {
        self.inner.shared.peer_leaving().await;
    }

    /// Closes the session now, with everything in it. What is not on its way is dropped: close after the answers that
    /// you want delivered.
    pub fn close(&self, reason: Reason) {
        self.inner.shared.close_session(reason);
    }

    /// Takes no new connections and no new calls, and says so to the peer; waits until those that are open have ended, and
    /// closes the session. Each connection closes with its last call, a paid one when its payer closes it; see
    /// [`Connection::drain`]. A session without connections closes at once.
    ///
    /// # Cancel safety
    /// A dropped future leaves the session open, without new connections and calls.
    pub async fn drain(&self, reason: Reason) {
        let shared = &self.inner.shared;
        shared.drain_session(&reason);
        tokio::select! {
            () = shared.emptied() => {}
            _ended = shared.closed() => {}
        }
        shared.close_session(reason);
    }

    /// What is in the session's tables.
    #[cfg(test)]
    pub(crate) fn tables(&self) -> [(&'static str, usize); 11] {
        let state = self.inner.shared.lock();
        [
            ("connections of the machine", state.machine.connection_count()),
            ("calls of the machine", state.machine.call_count()),
            ("streams of the machine", state.machine.stream_count()),
            ("slots", state.slots.len()),
            ("calls", state.calls.len()),
            ("served", state.served.len()),
            ("streams", state.streams.len()),
            ("announced", state.announced.len()),
            ("opens", state.opens.len()),
            ("connections", state.connections.len()),
            ("mailboxes", state.mailboxes.len()),
        ]
    }

    /// What must go with the last handle.
    #[cfg(test)]
    pub(crate) fn shared(&self) -> std::sync::Weak<Shared> {
        Arc::downgrade(&self.inner.shared)
    }

    /// Connections that are open, opening or closing.
    pub fn connection_count(&self) -> usize {
        self.inner.shared.lock().machine.connection_count()
    }
}

/// A session whose handshake has not ended. Dropped, it closes like a session of which the last handle is dropped.
pub(crate) struct Beginning {
    inner: SessionInner,
    answer: oneshot::Receiver<Metadata>,
    driver: JoinHandle<()>,
    observer: Option<Observer>,
}

impl Beginning {
    /// Ends the session's task at once when it is aborted, with its conduit and without a last word.
    pub(crate) fn abort_handle(&self) -> AbortHandle {
        self.driver.abort_handle()
    }

    /// Waits for the end of the handshake. The second value is the session's task, which ends when the last words are
    /// said.
    pub(crate) async fn opened(self) -> (Result<Session, SessionError>, JoinHandle<()>) {
        let Beginning { mut inner, answer, driver, observer } = self;
        let opened = match answer.await {
            Ok(metadata) => {
                inner.metadata = metadata;
                #[cfg(feature = "metrics")]
                inner.shared.count();
                if let Some(observer) = observer {
                    observer.enter(&inner.shared, &inner.peer);
                }
                Ok(Session { inner: Arc::new(inner) })
            }
            Err(_ended) => Err(SessionError { peer: inner.peer.info.to_string(), end: inner.shared.closed().await }),
        };
        (opened, driver)
    }
}

/// The span of a session's task, below which are those of its connections. Its fields have OpenTelemetry's names.
fn session_span(peer: &PeerInfo, role: Role) -> Span {
    let span = tracing::info_span!(
        target: "tollway::session",
        parent: None,
        "session",
        "rpc.system.name" = "tollway",
        "network.protocol.name" = peer.kind(),
        "network.transport" = peer.transport(),
        "network.peer.address" = peer.address(),
        "server.address" = Empty,
        "client.address" = Empty,
    );
    // The other end of the conduit is the server's for who has dialled.
    span.record(if role == Role::Initiator { "server.address" } else { "client.address" }, peer.address());
    span
}

impl fmt::Debug for Session {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Session").field("peer", &self.inner.peer.info).field("end", &self.end()).finish_non_exhaustive()
    }
}

impl Drop for SessionInner {
    fn drop(&mut self) {
        if self.shared.end().is_none() {
            self.shared.close_session(Reason::none());
        }
    }
}

/// An open that is given up by a drop is closed: the late answer is consumed, and both sides forget the id.
struct Abandon<'a> {
    shared: &'a Shared,
    id: ConnectionId,
    cell: &'a ConnectionCell,
    armed: bool,
}

impl Abandon<'_> {
    fn disarm(mut self) {
        self.armed = false;
    }
}

impl Drop for Abandon<'_> {
    fn drop(&mut self) {
        if self.armed && self.cell.end().is_none() {
            self.shared.close_connection(self.id, Reason::new(code::ABANDONED, "the opener gave up"));
        }
    }
}

//! Relays: two connections of two sessions joined into one.
//!
//! Frames pass without being decoded, their ids unchanged, in the order in which they came. What the frames of one side
//! are checked against, and what waits for the other, is in a [`Bridge`] behind a small lock of its own, which comes
//! after a session's. Each session's driver puts what it reads into the bridge and takes what it writes out of it: so
//! each direction is pumped by the session that it leads to, and none waits for the other.
//!
//! Credit passes from end to end, so a relay holds no more than the two ends have granted each other. Whoever can be
//! heard by a relay can be read and altered by it: it is for relays that both ends trust.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;
use tollway_protocol::error::{ConnectionEnd, Reason, SessionEnd, code};
use tollway_protocol::id::ConnectionId;
use tollway_protocol::limits::ConnectionLimits;
use tollway_protocol::memory::MemoryPool;
use tollway_protocol::metadata::Metadata;
use tollway_protocol::relay::{Bridge, RelayError, Relayed, Terms};
pub use tollway_protocol::relay::{Side, Traffic};
use tollway_protocol::session::{CommandError, OpenSpec};

use crate::incoming::IncomingOpen;
use crate::observe::Happened;
use crate::session::Session;
use crate::shared::{OpenAnswer, Shared};

/// What a relayed connection carried, and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RelaySummary {
    /// What came from the left.
    pub left_to_right: Traffic,
    /// What came from the right.
    pub right_to_left: Traffic,
    /// From the joining to the end of both sides.
    pub duration: Duration,
    /// The side that ended first.
    pub ended_by: Side,
    /// Why it did.
    pub end: ConnectionEnd,
}

/// A connection that could not be relayed. The left side was told the same.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProxyError {
    /// The right side said no.
    #[error("the right side rejected the connection: {0}")]
    Rejected(Reason),
    /// The right side could not be asked.
    #[error("the right side could not be asked: {0}")]
    NotSent(#[from] CommandError),
    /// The right side ended before it had answered.
    #[error("the right side gave no answer: {0}")]
    NoAnswer(ConnectionEnd),
    /// The left side has given up meanwhile.
    #[error("the left side has given up")]
    Abandoned,
}

/// Accepts a connection, and passes everything on it to another one and back, until both have ended.
///
/// The right side decides whether the connection is accepted, and its answer goes to the left unchanged: limits (at
/// most what this side receives), metadata, signed terms and receipts. Closes and their codes pass in both directions
/// after what was sent before them, and so does the draining of a connection, into which also the going away of a session is
/// turned; of a side that is lost the other is told with code `UNREACHABLE`. Metadata with
/// `NO_PROPAGATE` stays here. Paid connections pass like any other, if their terms do not bind them to the conduit.
///
/// # Errors
/// When the right side does not accept, or the left one has given up.
///
/// # Cancel safety
/// Dropping the future closes both sides.
pub async fn proxy_connections(left: IncomingOpen, right: &Session) -> Result<RelaySummary, ProxyError> {
    let (shared, from_right) = right.relay_parts();
    let relay = Relay::new(&left, from_right);
    let guard = CloseBoth(&relay);
    if !left.shared.enter_relay(left.connection, &relay, Side::Left) {
        return Err(ProxyError::Abandoned);
    }
    let spec = OpenSpec {
        service: &left.request.service,
        parity: left.request.parity,
        limits: left.request.limits.through_relay(&from_right),
        metadata: left.request.metadata.propagated().unwrap_or_else(|| left.request.metadata.clone()),
        credential: left.request.credential.clone(),
    };
    let answer = match shared.open_relayed(spec, &relay) {
        Ok(answer) => answer,
        Err(error) => {
            let code = match error {
                CommandError::GoingAway => code::GOING_AWAY,
                CommandError::AtCapacity { .. } => code::AT_CAPACITY,
                _ => code::UNREACHABLE,
            };
            left.reject(Reason::new(code, error.to_string()));
            return Err(error.into());
        }
    };
    let answer = tokio::select! {
        answer = answer => answer,
        () = relay.side_ended(Side::Left) => return Err(ProxyError::Abandoned),
    };
    let propagated = |metadata: Metadata| metadata.propagated().unwrap_or(metadata);
    match answer {
        Ok(OpenAnswer::Accepted { metadata, receipt }) => {
            relay.accept_left(left, propagated(metadata), receipt)?;
        }
        Ok(OpenAnswer::Rejected { reason, metadata, terms }) => {
            left.reject_with(reason.clone(), propagated(metadata), terms);
            return Err(ProxyError::Rejected(reason));
        }
        Ok(OpenAnswer::Ended(end)) => {
            left.reject(passed_on(&end));
            return Err(ProxyError::NoAnswer(end));
        }
        Err(_ended) => {
            let end = ConnectionEnd::Session(right.closed().await);
            left.reject(passed_on(&end));
            return Err(ProxyError::NoAnswer(end));
        }
    }
    let summary = relay.ended().await;
    drop(guard);
    Ok(summary)
}

/// What the other side is told about the end of one.
fn passed_on(end: &ConnectionEnd) -> Reason {
    match end {
        ConnectionEnd::ClosedByPeer(reason)
        | ConnectionEnd::ClosedByUs(reason)
        | ConnectionEnd::Session(SessionEnd::ClosedByPeer(reason) | SessionEnd::ClosedByUs(reason)) => reason.clone(),
        other => Reason::new(code::UNREACHABLE, other.to_string()),
    }
}

/// A connection of a session.
#[derive(Clone)]
pub(crate) struct Endpoint {
    shared: Arc<Shared>,
    connection: ConnectionId,
}

impl Endpoint {
    /// Something waits for this side. To be called without a lock.
    pub(crate) fn tell(&self) {
        self.shared.relay_ready(self.connection);
    }
}

/// The sides that are to be told that something waits for them, mostly none or one.
pub(crate) type Told = [Option<Endpoint>; 2];

/// One relayed connection, of which each of the two sessions holds one end.
pub(crate) struct Relay {
    began: Instant,
    state: Mutex<RelayState>,
    changed: Notify,
}

struct RelayState {
    /// What the left side said, until both sides are known.
    left: Terms,
    /// What this side receives from the right.
    from_right: ConnectionLimits,
    has_credential: bool,
    bridge: Option<Bridge>,
    ends: [End; 2],
    first_end: Option<(Side, ConnectionEnd)>,
}

/// One end of a relay.
#[derive(Default)]
struct End {
    /// Once it takes part.
    endpoint: Option<Endpoint>,
    /// Where what came from it and waits is counted.
    memory: Option<Arc<MemoryPool>>,
    ended: bool,
}

impl Relay {
    fn new(left: &IncomingOpen, from_right: ConnectionLimits) -> Arc<Self> {
        let IncomingOpen { request, own_limits, .. } = left;
        let state = RelayState {
            left: Terms { parity: request.parity, receives: request.limits, may_send: *own_limits, memory: None },
            from_right,
            has_credential: !request.credential.is_empty(),
            bridge: None,
            ends: Default::default(),
            first_end: None,
        };
        Arc::new(Relay { began: Instant::now(), state: Mutex::new(state), changed: Notify::new() })
    }

    /// An end takes part from now on.
    pub(crate) fn enter(&self, side: Side, shared: &Arc<Shared>, connection: ConnectionId, memory: Arc<MemoryPool>) {
        let mut state = self.state.lock();
        let end = state.end(side);
        end.endpoint = Some(Endpoint { shared: shared.clone(), connection });
        end.memory = Some(memory);
    }

    /// The right side has accepted, and receives this much.
    pub(crate) fn join(&self, receives: ConnectionLimits, has_receipt: bool) {
        let mut state = self.state.lock();
        let [from_left, from_right] = [&state.ends[0], &state.ends[1]].map(|end| end.memory.clone());
        let may_send = receives.through_relay(&state.left.may_send);
        let left = Terms { may_send, memory: from_left, ..state.left.clone() };
        let may_send = left.receives.through_relay(&state.from_right);
        let right = Terms { parity: left.parity.other(), receives, may_send, memory: from_right };
        state.left.may_send = left.may_send;
        let is_paid = state.has_credential && has_receipt;
        state.bridge = Some(Bridge::new(&left, &right, is_paid).expect("the halves were chosen to be opposite ones"));
    }

    /// Takes in a frame, under the lock of its session. Returns who is to be told of it, without a lock.
    pub(crate) fn handle_frame(&self, from: Side, frame: &Bytes) -> Result<Told, RelayError> {
        let mut state = self.state.lock();
        if let Some(bridge) = &mut state.bridge {
            bridge.handle_frame(from, frame)?;
        }
        Ok(state.told())
    }

    /// Tells a side that no new calls are taken. May be called under the lock of a session; returns who is to be told of it,
    /// without a lock.
    pub(crate) fn drain(&self, side: Side, reason: Reason) -> Told {
        let mut state = self.state.lock();
        if let Some(bridge) = &mut state.bridge {
            bridge.drain(side, reason);
        }
        state.told()
    }

    /// The next frame for a side, under the lock of its session.
    pub(crate) fn take(&self, to: Side, connection: ConnectionId, max_frame: usize) -> Relayed {
        match &mut self.state.lock().bridge {
            Some(bridge) => bridge.take(to, connection, max_frame),
            None => Relayed::Empty,
        }
    }

    /// A side has ended. Tells the other one. To be called without a lock.
    pub(crate) fn handle_end(&self, side: Side, end: ConnectionEnd) {
        let told = {
            let mut state = self.state.lock();
            state.end(side).ended = true;
            let reason = passed_on(&end);
            state.first_end.get_or_insert((side, end));
            if let Some(bridge) = &mut state.bridge {
                bridge.finish(side, reason);
            }
            state.told()
        };
        told.into_iter().flatten().for_each(|endpoint| endpoint.tell());
        self.changed.notify_waiters();
    }

    async fn side_ended(&self, side: Side) {
        loop {
            let changed = self.changed.notified();
            if self.state.lock().end(side).ended {
                return;
            }
            changed.await;
        }
    }

    async fn ended(&self) -> RelaySummary {
        self.side_ended(Side::Left).await;
        self.side_ended(Side::Right).await;
        let state = self.state.lock();
        let traffic = |side| state.bridge.as_ref().map_or(Traffic::default(), |bridge| bridge.traffic_from(side));
        let (ended_by, end) = state.first_end.clone().expect("a side that has ended said why");
        RelaySummary {
            left_to_right: traffic(Side::Left),
            right_to_left: traffic(Side::Right),
            duration: self.began.elapsed(),
            ended_by,
            end,
        }
    }

    /// Accepts the left side's open with what the right side receives.
    fn accept_left(&self, mut left: IncomingOpen, metadata: Metadata, receipt: Bytes) -> Result<(), ProxyError> {
        let limits = self.state.lock().left.may_send;
        left.answered = true;
        if left.shared.is_watched() {
            left.shared.tell(Happened::Opened(left.connection, Some(left.request.service.clone())));
        }
        match left.shared.accept_relayed(left.connection, limits, metadata, receipt) {
            Err(CommandError::NoConnection(_) | CommandError::SessionEnded(_)) => Err(ProxyError::Abandoned),
            result => Ok(result?),
        }
    }
}

impl RelayState {
    fn end(&mut self, side: Side) -> &mut End {
        let [left, right] = &mut self.ends;
        match side {
            Side::Left => left,
            Side::Right => right,
        }
    }

    /// One that has not ended.
    fn open_end(&mut self, side: Side) -> Option<Endpoint> {
        let end = self.end(side);
        if end.ended { None } else { end.endpoint.clone() }
    }

    fn told(&mut self) -> Told {
        let mut told = Told::default();
        for endpoint in &mut told {
            let side = self.bridge.as_mut().and_then(Bridge::poll_told);
            *endpoint = side.and_then(|side| self.open_end(side));
        }
        told
    }
}

/// Closes what is left of a relay when nobody waits for it any more.
struct CloseBoth<'a>(&'a Relay);

impl Drop for CloseBoth<'_> {
    fn drop(&mut self) {
        let open: Vec<Endpoint> = {
            let mut state = self.0.state.lock();
            [Side::Left, Side::Right].into_iter().filter_map(|side| state.open_end(side)).collect()
        };
        for Endpoint { shared, connection } in open {
            shared.close_connection(connection, Reason::new(code::ABANDONED, "the relay gave up"));
        }
    }
}

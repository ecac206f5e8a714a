//! Observation from afar: a service for operators.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tollway_protocol::message::Status;

use super::{Event, Observed, Observer, SNAPSHOT_SESSIONS, Snapshot};
use crate::auth::Identity;
use crate::connection::Connection;
use crate::rpc::{BoxReply, CallError, IncomingCall, MethodId, Reply, Rx, Service, stream};
use crate::session::{OpenError, Session};

/// Bytes of a page of a snapshot, 256 KiB: an answer that takes no more than a stream's window of memory.
const PAGE_BYTES: usize = 256 * 1024;

/// The name of the service.
pub const OBSERVE_SERVICE: &str = "tollway.observe";

fn method(name: &str) -> MethodId {
    MethodId::of(OBSERVE_SERVICE, 1, name)
}

/// What a subscriber at the other end of a session is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Note {
    /// Something happened.
    Event(Event),
    /// So many events are lost to this subscriber, because it was too slow.
    Missed(u64),
}

/// Who asked may not know. The service's own error on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[error("this is for operators, and you are none")]
pub struct Forbidden;

/// Why an operator learns nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ObserveError {
    /// The server does not take this side for an operator.
    #[error(transparent)]
    Forbidden(#[from] Forbidden),
    /// The server does not offer it, or is gone.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The question was not answered.
    #[error(transparent)]
    Call(CallError),
}

/// Lets operators see what an [`Observer`] sees.
pub struct ObserveService {
    observer: Observer,
    is_operator: Arc<dyn Fn(&Identity) -> bool + Send + Sync>,
}

impl fmt::Debug for ObserveService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ObserveService").field("observer", &self.observer).finish_non_exhaustive()
    }
}

impl ObserveService {
    /// Offers it to the identities that `is_operator` picks. A peer that has proved nothing is none.
    pub fn new(observer: Observer, is_operator: impl Fn(&Identity) -> bool + Send + Sync + 'static) -> Self {
        ObserveService { observer, is_operator: Arc::new(is_operator) }
    }
}

impl Service for ObserveService {
    fn name(&self) -> &str {
        OBSERVE_SERVICE
    }

    fn call(&self, call: IncomingCall) -> BoxReply {
        if !call.context().identity().is_some_and(|identity| (self.is_operator)(identity)) {
            return Reply::error(&Forbidden).boxed();
        }
        if call.method() == method("snapshot") {
            // What the rest of the answer takes is a few bytes.
            let room = (call.context().max_answer() as usize).min(PAGE_BYTES).saturating_sub(64);
            let Ok(after) = call.args::<u64>() else { return Reply::empty(Status::InvalidPayload).boxed() };
            return Reply::ok(&self.observer.page(after, room)).boxed();
        }
        if call.method() != method("subscribe") {
            return Reply::unknown_method().boxed();
        }
        // The answer acknowledges the subscription: whatever happens after it is in the stream.
        let mut subscription = self.observer.subscribe();
        let (mut notes, receiver) = stream::<Note>();
        tokio::spawn(async move {
            loop {
                let observed = tokio::select! {
                    observed = subscription.next() => observed,
                    () = notes.stopped() => return,
                };
                let note = match observed {
                    Some(Observed::Event(event)) => Note::Event((*event).clone()),
                    Some(Observed::Missed(missed)) => Note::Missed(missed),
                    None => return notes.finish(),
                };
                if notes.send(note).await.is_err() {
                    return;
                }
            }
        });
        Reply::ok(&receiver).boxed()
    }
}

/// An operator's view of a server.
#[derive(Debug, Clone)]
pub struct ObserveClient {
    connection: Connection,
}

impl ObserveClient {
    /// Opens the service.
    ///
    /// # Errors
    /// When the peer does not offer it.
    pub async fn open(session: &Session) -> Result<Self, ObserveError> {
        Ok(ObserveClient { connection: session.open(OBSERVE_SERVICE).await? })
    }

    /// All sessions of the server as they are now, a thousand at most. It is fetched in pages, each of its own moment.
    ///
    /// # Errors
    /// When this side is no operator, or the session is lost.
    pub async fn snapshot(&self) -> Result<Snapshot, ObserveError> {
        let mut all = self.page(0).await?;
        while all.left_out > 0
            && all.sessions.len() < SNAPSHOT_SESSIONS
            && let Some(last) = all.sessions.last().map(|session| session.session)
        {
            let Snapshot { total, sessions, left_out, queues } = self.page(last).await?;
            if sessions.is_empty() {
                break;
            }
            (all.total, all.left_out, all.queues) = (total, left_out, queues);
            all.sessions.extend(sessions);
        }
        Ok(all)
    }

    async fn page(&self, after: u64) -> Result<Snapshot, ObserveError> {
        self.connection.call(method("snapshot"), &after).or_error().await.map_err(failed)
    }

    /// Every event from now on: when this returns, the server has begun to keep them.
    ///
    /// # Errors
    /// When this side is no operator, or the session is lost.
    pub async fn subscribe(&self) -> Result<Rx<Note>, ObserveError> {
        self.connection.call(method("subscribe"), &()).or_error().await.map_err(failed)
    }
}

fn failed(error: CallError<Forbidden>) -> ObserveError {
    error.into_app().map_or_else(ObserveError::Call, ObserveError::Forbidden)
}

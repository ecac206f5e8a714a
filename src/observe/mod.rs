//! Observation: what sessions and connections there are, what they have waiting, and what happens to them.
//!
//! An [`Observer`] in a [`SessionConfig`](crate::SessionConfig) knows the sessions that were made with it.
//! [`snapshot`](Observer::snapshot) reads their tables when it is asked; nothing is counted for it on the way of a call or
//! an item but frames and bytes, once for each read and write. [`subscribe`](Observer::subscribe) tells what happens from
//! then on, over a bounded queue: who reads too slowly is told how much it missed.
//!
//! [`ObserveService`] offers both to an operator at the other end of a session.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::sync::broadcast;
use tollway_protocol::error::{Reason, SessionEnd};
use tollway_protocol::id::ConnectionId;
use tollway_protocol::session::{ConnectionStats, SessionStats};

use crate::auth::SessionPeer;
use crate::queue::{self, Gauge, QueueSnapshot};
use crate::shared::Shared;

#[cfg(feature = "metrics")]
pub mod metrics;
mod service;

pub use service::{Forbidden, Note, OBSERVE_SERVICE, ObserveClient, ObserveError, ObserveService};

/// Events that wait for the slowest subscriber, 1,024: a second of a busy server, and some 200 KiB.
const EVENTS: usize = 1_024;

/// Sessions in a snapshot at most, 1,000, and connections of each, 100: what a person can look through.
const SNAPSHOT_SESSIONS: usize = 1_000;
/// See [`SNAPSHOT_SESSIONS`].
const SNAPSHOT_CONNECTIONS: usize = 100;

/// Something that happened. Sessions have numbers that the observer gave them, from 1 and never twice.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub enum Event {
    /// A session is open.
    SessionOpened {
        /// Its number.
        session: u64,
        /// The other end of the conduit.
        peer: String,
        /// Who the peer has proved to be.
        identity: Option<String>,
    },
    /// A server refused a peer in its handshake.
    SessionRefused {
        /// The other end of the conduit.
        peer: String,
        /// The code that it was told.
        code: u32,
        /// The text that it was told.
        text: String,
    },
    /// A session has ended.
    SessionClosed {
        /// Its number.
        session: u64,
        /// Why.
        end: String,
    },
    /// A connection is open.
    ConnectionOpened {
        /// The session.
        session: u64,
        /// The connection's id in it.
        connection: u64,
        /// The service, where the peer has asked for it.
        service: Option<String>,
    },
    /// A connection was asked for, and rejected.
    ConnectionRefused {
        /// The session.
        session: u64,
        /// The connection's id in it.
        connection: u64,
        /// The code.
        code: u32,
        /// The text.
        text: String,
    },
    /// A connection has ended.
    ConnectionClosed {
        /// The session.
        session: u64,
        /// The connection's id in it.
        connection: u64,
        /// Why.
        end: String,
    },
}

/// What a subscriber is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Observed {
    /// Something happened.
    Event(Arc<Event>),
    /// So many events are lost to this subscriber, because it was too slow.
    Missed(u64),
}

/// The events from the subscription on.
#[derive(Debug)]
pub struct Subscription {
    events: broadcast::Receiver<Arc<Event>>,
}

impl Subscription {
    /// Waits for the next event; `None` when the observer is gone.
    ///
    /// # Cancel safety
    /// A dropped future has taken nothing.
    pub async fn next(&mut self) -> Option<Observed> {
        match self.events.recv().await {
            Ok(event) => Some(Observed::Event(event)),
            Err(broadcast::error::RecvError::Lagged(missed)) => Some(Observed::Missed(missed)),
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

/// Frames and bytes that a session has carried. Bytes are those of frames, without the conduit's own framing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Traffic {
    /// Frames that came.
    pub frames_received: u64,
    /// Their bytes.
    pub bytes_received: u64,
    /// Frames that were handed to the conduit.
    pub frames_sent: u64,
    /// Their bytes.
    pub bytes_sent: u64,
}

/// A session at one moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionSnapshot {
    /// Its number.
    pub session: u64,
    /// The other end of the conduit.
    pub peer: String,
    /// Who the peer has proved to be.
    pub identity: Option<String>,
    /// How long it has been open.
    pub age: Duration,
    /// What it has carried.
    pub traffic: Traffic,
    /// Its counts.
    pub stats: SessionStats,
    /// What waits in it. Of queues that each stream or connection has, the fullest.
    pub queues: Vec<QueueSnapshot>,
    /// Its connections, a hundred at most; `stats` has their number.
    pub connections: Vec<ConnectionStats>,
}

/// All sessions of an observer at one moment, or nearly: each is looked at by itself.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Snapshot {
    /// How many there are.
    pub total: u64,
    /// A thousand of them at most, the oldest first.
    pub sessions: Vec<SessionSnapshot>,
    /// How many come after these and were left out: [`Observer::snapshot_after`] shows them.
    pub left_out: u64,
    /// What waits in the process, beside the sessions.
    pub queues: Vec<QueueSnapshot>,
}

/// Watches over the sessions whose configuration has it. Clones share everything.
#[derive(Debug, Clone)]
pub struct Observer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    events: broadcast::Sender<Arc<Event>>,
    /// Events that wait for the slowest subscriber.
    waiting: Arc<Gauge>,
    sessions: Mutex<Sessions>,
}

#[derive(Debug, Default)]
struct Sessions {
    last: u64,
    open: BTreeMap<u64, Watched>,
}

#[derive(Debug, Clone)]
struct Watched {
    shared: Weak<Shared>,
    peer: Arc<SessionPeer>,
    since: Instant,
}

impl Default for Observer {
    fn default() -> Self {
        Observer::new()
    }
}

impl Observer {
    /// An observer of no session yet.
    pub fn new() -> Self {
        let (events, _nobody_yet) = broadcast::channel(EVENTS);
        let waiting = Gauge::register("observe.events", EVENTS);
        Observer { inner: Arc::new(Inner { events, waiting, sessions: Mutex::default() }) }
    }

    /// Every event from now on.
    pub fn subscribe(&self) -> Subscription {
        Subscription { events: self.inner.events.subscribe() }
    }

    /// Sessions that are open.
    pub fn session_count(&self) -> usize {
        self.inner.sessions.lock().open.len()
    }

    /// All sessions as they are now.
    pub fn snapshot(&self) -> Snapshot {
        self.snapshot_after(0)
    }

    /// The sessions whose numbers are above this one.
    pub fn snapshot_after(&self, session: u64) -> Snapshot {
        self.page(session, usize::MAX)
    }

    /// As [`snapshot_after`](Self::snapshot_after), in about so many encoded bytes at most: of a session that does not fit by
    /// itself connections are left out, too.
    fn page(&self, after: u64, max_bytes: usize) -> Snapshot {
        let (total, behind, watched) = {
            let sessions = self.inner.sessions.lock();
            let rest = sessions.open.range(after.saturating_add(1)..);
            let page = rest.clone().take(SNAPSHOT_SESSIONS).map(|(&number, watched)| (number, watched.clone()));
            (sessions.open.len() as u64, rest.count() as u64, page.collect::<Vec<_>>())
        };
        self.inner.waiting.set(self.inner.events.len());
        let mut queues = queue::snapshot();
        if encoded(&queues) > max_bytes {
            queues.clear();
        }
        let (mut left_out, mut sessions) = (behind, Vec::new());
        let mut room = max_bytes.saturating_sub(encoded(&queues));
        for (session, watched) in watched {
            // One that has ended meanwhile is not left out.
            let Some(mut seen) = look(session, &watched) else {
                left_out -= 1;
                continue;
            };
            let mut bytes = encoded(&seen);
            while bytes > room && sessions.is_empty() && !seen.connections.is_empty() {
                seen.connections.truncate(seen.connections.len() / 2);
                bytes = encoded(&seen);
            }
            if bytes > room {
                break;
            }
            room -= bytes;
            left_out -= 1;
            sessions.push(seen);
        }
        Snapshot { total, sessions, left_out, queues }
    }

    fn is_watched(&self) -> bool {
        self.inner.events.receiver_count() > 0
    }

    fn tell(&self, event: Event) {
        // Nobody may have subscribed.
        let _unheard = self.inner.events.send(Arc::new(event));
        self.inner.waiting.set(self.inner.events.len());
    }

    /// A session is open.
    pub(crate) fn enter(&self, shared: &Arc<Shared>, peer: &Arc<SessionPeer>) {
        let session = {
            let mut sessions = self.inner.sessions.lock();
            sessions.last += 1;
            let number = sessions.last;
            let watched = Watched { shared: Arc::downgrade(shared), peer: peer.clone(), since: Instant::now() };
            sessions.open.insert(number, watched);
            number
        };
        let identity = peer.identity.get().map(|identity| identity.name().to_owned());
        self.tell(Event::SessionOpened { session, peer: peer.info.to_string(), identity });
        shared.set_observed(ObservedSession { observer: self.clone(), session });
    }

    /// A server has refused a peer.
    pub(crate) fn refused(&self, peer: &SessionPeer, reason: &Reason) {
        let (peer, code, text) = (peer.info.to_string(), reason.code, reason.text.clone());
        self.tell(Event::SessionRefused { peer, code, text });
    }
}

/// What a session knows of its observer.
#[derive(Debug)]
pub(crate) struct ObservedSession {
    observer: Observer,
    session: u64,
}

impl Traffic {
    /// What came on top of `before`.
    #[cfg(feature = "metrics")]
    pub(crate) fn since(&self, before: &Traffic) -> Traffic {
        Traffic {
            frames_received: self.frames_received - before.frames_received,
            bytes_received: self.bytes_received - before.bytes_received,
            frames_sent: self.frames_sent - before.frames_sent,
            bytes_sent: self.bytes_sent - before.bytes_sent,
        }
    }
}

impl ObservedSession {
    pub(crate) fn is_watched(&self) -> bool {
        self.observer.is_watched()
    }

    pub(crate) fn tell(&self, happened: Happened) {
        let session = self.session;
        self.observer.tell(match happened {
            Happened::Opened(ConnectionId(connection), service) => {
                Event::ConnectionOpened { session, connection, service }
            }
            Happened::Refused(ConnectionId(connection), Reason { code, text }) => {
                Event::ConnectionRefused { session, connection, code, text }
            }
            Happened::Closed(ConnectionId(connection), end) => Event::ConnectionClosed { session, connection, end },
        });
    }

    /// The session has ended. Told once.
    pub(crate) fn ended(&self, end: &SessionEnd) {
        if self.observer.inner.sessions.lock().open.remove(&self.session).is_some() {
            self.observer.tell(Event::SessionClosed { session: self.session, end: end.to_string() });
        }
    }
}

/// Each session's lock is taken by itself, and the observer's is not held meanwhile.
fn look(session: u64, watched: &Watched) -> Option<SessionSnapshot> {
    let shared = watched.shared.upgrade()?;
    let (traffic, stats, connections) = shared.observe(SNAPSHOT_CONNECTIONS);
    let identity = watched.peer.identity.get().map(|identity| identity.name().to_owned());
    let (peer, age) = (watched.peer.info.to_string(), watched.since.elapsed());
    Some(SessionSnapshot { session, peer, identity, age, traffic, stats, queues: shared.queues(), connections })
}

/// Bytes that it takes as a part of an answer.
fn encoded<T: Serialize>(value: &T) -> usize {
    postcard::to_stdvec(value).map_or(usize::MAX, |bytes| bytes.len())
}

/// What happened to a connection.
#[derive(Debug)]
pub(crate) enum Happened {
    Opened(ConnectionId, Option<String>),
    Refused(ConnectionId, Reason),
    Closed(ConnectionId, String),
}

/// The observer of a session, once it is open.
pub(crate) type ObservedCell = OnceLock<ObservedSession>;

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_slow_subscriber_is_told_how_much_it_missed_and_goes_on() {
        let observer = Observer::new();
        let mut slow = observer.subscribe();
        let event = |session| Event::SessionClosed { session, end: String::new() };
        for session in 0..EVENTS as u64 + 10 {
            observer.tell(event(session));
        }
        assert_eq!(slow.next().await, Some(Observed::Missed(10)));
        assert_eq!(slow.next().await, Some(Observed::Event(Arc::new(event(10)))));
        drop(observer);
        for session in 11..EVENTS as u64 + 10 {
            assert_eq!(slow.next().await, Some(Observed::Event(Arc::new(event(session)))));
        }
        assert_eq!(slow.next().await, None);
    }
}

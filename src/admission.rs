//! Who gets a session on a server: the gate for those that have not proved anything, and the places for those that have.
//!
//! A [`Gate`] bounds the conduits whose handshake has not ended. Who comes when it is full takes the place of the one
//! that has been at it for longest: an honest handshake takes a few round trips, so a crowd that says nothing keeps
//! nobody out. An [`Admission`] answers one Hello and holds the session's place for as long as its task lives.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;
use tollway_protocol::error::{Reason, code};
use tollway_protocol::metadata::Metadata;

use crate::auth::{Authenticator, Greeting, SessionPeer};
use crate::observe::Observer;
use crate::shared::Shared;

/// The sessions that a server may have at once.
#[derive(Debug)]
pub(crate) struct Places {
    free: Arc<Semaphore>,
    max: usize,
}

impl Places {
    pub(crate) fn new(max: usize) -> Arc<Self> {
        // A semaphore has its own limit, above what any machine holds sessions.
        let max = max.min(Semaphore::MAX_PERMITS);
        Arc::new(Places { free: Arc::new(Semaphore::new(max)), max })
    }

    pub(crate) fn taken(&self) -> usize {
        self.max.saturating_sub(self.free.available_permits())
    }

    fn take(&self) -> Result<OwnedSemaphorePermit, Reason> {
        let full = |_| {
            let text = format!("this server holds its most sessions, {}, already: try again later", self.max);
            Reason::new(code::AT_CAPACITY, text)
        };
        self.free.clone().try_acquire_owned().map_err(full)
    }
}

/// Decides about the peer of one session. The session's task holds it, and with it the session's place.
#[derive(Debug)]
pub(crate) struct Admission {
    places: Arc<Places>,
    authenticator: Option<Arc<dyn Authenticator>>,
    observer: Option<Observer>,
    place: Mutex<Option<OwnedSemaphorePermit>>,
}

impl Admission {
    pub(crate) fn new(
        places: Arc<Places>,
        authenticator: Option<Arc<dyn Authenticator>>,
        observer: Option<Observer>,
    ) -> Arc<Self> {
        Arc::new(Admission { places, authenticator, observer, place: Mutex::new(None) })
    }

    /// Answers the Hello, in a task of its own: what it waits for delays no other frame.
    pub(crate) async fn admit(self: Arc<Self>, shared: Arc<Shared>, peer: Arc<SessionPeer>, metadata: Metadata) {
        let unanswered = Unanswered(shared.clone());
        let decision = tokio::select! {
            decision = self.decide(&shared, &peer, metadata) => decision,
            // The peer has gone, or the handshake took too long.
            _ended = shared.closed() => return,
        };
        match decision {
            Ok(()) => shared.accept_session(Metadata::new()),
            Err(reason) => {
                tracing::debug!(peer = %peer.info, %reason, "a session was refused");
                #[cfg(feature = "metrics")]
                crate::observe::metrics::session_refused(&reason);
                if let Some(observer) = &self.observer {
                    observer.refused(&peer, &reason);
                }
                shared.refuse_session(reason);
            }
        }
        drop(unanswered);
    }

    async fn decide(&self, shared: &Arc<Shared>, peer: &Arc<SessionPeer>, metadata: Metadata) -> Result<(), Reason> {
        // Who would find no place need not prove anything.
        drop(self.places.take()?);
        if let Some(authenticator) = &self.authenticator {
            let mut greeting = Greeting::new(metadata, peer.clone(), shared.clone());
            let identity = authenticator.authenticate(&mut greeting).await.map_err(|refusal| refusal.reason)?;
            peer.identity.get_or_init(|| identity);
        }
        // Only who has proved itself takes one.
        *self.place.lock() = Some(self.places.take()?);
        Ok(())
    }
}

/// A Hello whose authenticator panics is refused. One that was answered takes no second answer.
struct Unanswered(Arc<Shared>);

impl Drop for Unanswered {
    fn drop(&mut self) {
        self.0.refuse_session(Reason::new(code::INTERNAL, "the authentication failed on this side"));
    }
}

/// Bounds the conduits whose handshake has not ended.
#[derive(Debug)]
pub(crate) struct Gate {
    max: usize,
    inside: Mutex<Inside>,
    left: Notify,
}

#[derive(Debug, Default)]
struct Inside {
    next: u64,
    /// In the order of arrival.
    places: BTreeMap<u64, CancellationToken>,
}

impl Gate {
    pub(crate) fn new(max: usize) -> Arc<Self> {
        Arc::new(Gate { max: max.max(1), inside: Mutex::default(), left: Notify::new() })
    }

    pub(crate) fn count(&self) -> usize {
        self.inside.lock().places.len()
    }

    /// Takes a place, which the oldest one inside gives up if there is no other.
    ///
    /// # Cancel safety
    /// A dropped future has taken no place.
    pub(crate) async fn enter(self: &Arc<Self>) -> GatePlace {
        loop {
            let left = self.left.notified();
            let oldest = {
                let mut inside = self.inside.lock();
                match inside.places.first_key_value().filter(|_| inside.places.len() >= self.max) {
                    Some((_, oldest)) => oldest.clone(),
                    None => {
                        let (id, given_up) = (inside.next, CancellationToken::new());
                        inside.next += 1;
                        inside.places.insert(id, given_up.clone());
                        return GatePlace { gate: self.clone(), id, given_up };
                    }
                }
            };
            oldest.cancel();
            left.await;
        }
    }
}

/// A place inside a [`Gate`], until it is dropped.
#[derive(Debug)]
pub(crate) struct GatePlace {
    gate: Arc<Gate>,
    id: u64,
    given_up: CancellationToken,
}

impl GatePlace {
    /// Waits until the place is needed for somebody else.
    pub(crate) async fn given_up(&self) {
        self.given_up.cancelled().await;
    }
}

impl Drop for GatePlace {
    fn drop(&mut self) {
        self.gate.inside.lock().places.remove(&self.id);
        self.gate.left.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_full_gate_lets_the_newcomer_in_and_the_oldest_out() {
        let gate = Gate::new(2);
        let first = gate.enter().await;
        let second = gate.enter().await;
        let newcomer = tokio::spawn({
            let gate = gate.clone();
            async move { gate.enter().await }
        });
        first.given_up().await;
        assert_eq!(gate.count(), 2, "the newcomer waits until the place is free");
        assert!(!second.given_up.is_cancelled(), "one place is enough");
        drop(first);
        let third = newcomer.await.expect("it has entered");
        assert_eq!(gate.count(), 2);
        drop((second, third));
        assert_eq!(gate.count(), 0);
    }
}

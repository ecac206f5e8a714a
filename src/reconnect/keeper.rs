//! The task of a client: connects when somebody asks, holds the session, and ends the client in order.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;
use tollway_protocol::error::{Reason, code};

use super::service::Slot;
use super::{CancelOnDrop, ClientConfig, ClientError, Dial, Health, WhenDown};
use crate::client::ConnectError;
use crate::session::{Session, SessionError};

/// How a client stands, with what goes along.
///
/// ```text
/// Idle ── a call ──▶ Connecting ── a session ──▶ Ready
///  ▲                  ▲     │                      │
///  │ nobody asks      │     └ a failure ▶ Backoff ◀┘ lost soon after it began
///  ├──────────────────┴──────── waited ────┘       │
///  └────────────────── lost, or the server leaves ─┘        Closed ◀ from everywhere
/// ```
#[derive(Debug, Clone)]
pub(super) enum State {
    Idle,
    Connecting,
    Ready(Session),
    Backoff { failures: u32, delay: Duration, error: Arc<ConnectError> },
    Closed,
}

impl State {
    pub(super) fn health(&self) -> Health {
        match self {
            State::Idle => Health::Idle,
            State::Connecting => Health::Connecting,
            State::Ready(_) => Health::Ready,
            State::Backoff { failures, delay, error } => {
                Health::Backoff { failures: *failures, delay: *delay, error: error.clone() }
            }
            State::Closed => Health::Closed,
        }
    }
}

/// What a client's handles and its task share.
pub(super) struct Core {
    pub(super) dial: Box<dyn Dial>,
    pub(super) config: ClientConfig,
    /// Changed by the task alone.
    state: watch::Sender<State>,
    /// Somebody wants a session.
    wanted: Notify,
    pub(super) closing: CancellationToken,
    /// The task has done its last.
    pub(super) ended: CancellationToken,
    /// By name: as many as the program asks for.
    slots: Mutex<HashMap<Arc<str>, Arc<Slot>>>,
}

impl Core {
    pub(super) fn start(dial: Box<dyn Dial>, config: ClientConfig) -> Arc<Self> {
        let core = Arc::new(Core {
            dial,
            config,
            state: watch::Sender::new(State::Idle),
            wanted: Notify::new(),
            closing: CancellationToken::new(),
            ended: CancellationToken::new(),
            slots: Mutex::default(),
        });
        tokio::spawn(core.clone().keep());
        core
    }

    pub(super) fn state(&self) -> State {
        self.state.borrow().clone()
    }

    pub(super) fn watch(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    /// The place of a service's connection.
    pub(super) fn slot(&self, service: &str) -> Arc<Slot> {
        let mut slots = self.slots.lock();
        match slots.get(service) {
            Some(slot) => slot.clone(),
            None => slots.entry(Arc::from(service)).or_default().clone(),
        }
    }

    // ---- those who want a session

    /// The session, as soon as there is one.
    pub(super) async fn session(&self) -> Result<Session, ClientError> {
        let (waits, patience) = match self.config.when_down {
            // An attempt has a timeout of its own.
            WhenDown::FailFast => (false, None),
            WhenDown::WaitUpTo(patience) => (true, Some(patience)),
        };
        let Some(patience) = patience else { return self.wait_for_session(waits).await };
        match timeout(patience, self.wait_for_session(waits)).await {
            Ok(session) => session,
            Err(_late) => Err(ClientError::NotInTime {
                waited: patience,
                last: match self.state() {
                    State::Backoff { error, .. } => Some(error),
                    _ => None,
                },
            }),
        }
    }

    async fn wait_for_session(&self, through_backoff: bool) -> Result<Session, ClientError> {
        let mut states = self.watch();
        loop {
            let state = states.borrow_and_update().clone();
            match state {
                State::Ready(session) if !session.is_peer_leaving() => return Ok(session),
                State::Backoff { failures, delay, error } if !through_backoff => {
                    return Err(ClientError::Down { failures, delay, error });
                }
                State::Closed => return Err(ClientError::Closed),
                // The task keeps the wish until it can look, and each change of the state is a new reason to wish.
                _ => self.wanted.notify_one(),
            }
            if states.changed().await.is_err() {
                return Err(ClientError::Closed);
            }
        }
    }

    // ---- the task

    async fn keep(self: Arc<Self>) {
        let _ended = CancelOnDrop(self.ended.clone());
        let closing = self.closing.clone();
        tokio::select! {
            () = closing.cancelled() => {}
            never = self.hold_sessions() => match never {},
        }
        let last = self.state.send_replace(State::Closed);
        self.end(last).await;
    }

    async fn hold_sessions(&self) -> std::convert::Infallible {
        let mut failures = 0u32;
        loop {
            self.wanted.notified().await;
            let error = match self.attempt().await {
                Ok(session) => {
                    let began = Instant::now();
                    self.state.send_replace(State::Ready(session.clone()));
                    // Who waited has what it wished for.
                    pin!(self.wanted.notified()).enable();
                    session.peer_leaving().await;
                    let error = lost(&session);
                    self.give_up(session);
                    if began.elapsed() >= self.config.backoff.reset_after {
                        failures = 0;
                        self.state.send_replace(State::Idle);
                        continue;
                    }
                    error
                }
                Err(error) => error,
            };
            failures = failures.saturating_add(1);
            let delay = self.config.backoff.delay(failures);
            tracing::debug!(address = self.dial.address(), failures, ?delay, %error, "no session");
            self.state.send_replace(State::Backoff { failures, delay, error: Arc::new(error) });
            sleep(delay).await;
            self.state.send_replace(State::Idle);
        }
    }

    async fn attempt(&self) -> Result<Session, ConnectError> {
        self.state.send_replace(State::Connecting);
        self.dial.dial(self.config.session.clone()).await
    }

    /// Leaves a session that takes no new connections: what is under way on it may end, and its channels stay for the
    /// next one.
    fn give_up(&self, session: Session) {
        if session.end().is_some() {
            return;
        }
        let grace = self.config.grace;
        for slot in self.slots() {
            tokio::spawn(async move { slot.clear(grace).await });
        }
        tokio::spawn(async move { session.drain(Reason::new(code::NONE, "the client has left")).await });
    }

    fn slots(&self) -> Vec<Arc<Slot>> {
        self.slots.lock().values().cloned().collect()
    }

    /// Ends what is open, within the grace period.
    async fn end(&self, last: State) {
        let State::Ready(session) = last else { return };
        let (grace, keep_channels) = (self.config.grace, self.config.keep_channels);
        let mut leaving = JoinSet::new();
        for open in self.slots().into_iter().filter_map(|slot| slot.take()) {
            leaving.spawn(async move { open.leave(grace, keep_channels).await });
        }
        while leaving.join_next().await.is_some() {}
        let reason = Reason::new(code::NONE, "the client was closed");
        if timeout(self.config.grace, session.drain(reason.clone())).await.is_err() {
            session.close(reason);
        }
    }
}

/// A session's end as the failure of an attempt.
fn lost(session: &Session) -> ConnectError {
    let peer = session.peer().to_string();
    let left = || tollway_protocol::error::SessionEnd::ClosedByPeer(Reason::new(code::GOING_AWAY, "it is going away"));
    ConnectError::Session(SessionError { peer, end: session.end().cloned().unwrap_or_else(left) })
}

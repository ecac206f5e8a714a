//! Calls with an idempotency key: executed once and charged once, however often they are made.
//!
//! A payer whose connection was lost cannot know whether its call was executed. With a key it makes the same call again
//! and gets the answer of the first execution. What a call with this key has cost before is taken off what it costs now, so
//! all attempts together cost what one does. `[pay.key.once]`
//!
//! ```text
//!  (new) ──► Fresh ──started, noted in the store──► Executing ──► Executed (answer kept | not kept) ──age──► (forgotten)
//!              ▲                                        │
//!              └─── failed by the payee's fault, free ──┘      a crash while it executes ──► Executed (not kept)
//! ```
//!
//! A call with a key runs to its end, whatever becomes of its caller; attempts of one key take turns, and each waits until
//! it is known what the one before has cost. The record is bounded in keys, bytes and age, each by a named limit.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{OwnedMutexGuard, oneshot};
use tollway_protocol::error::{Reason, code};
use tollway_protocol::message::Status;
use tollway_protocol::payment::{Amount, ChannelId, Hash, keccak256};

use super::payee::Payee;
use crate::rpc::{BoxReply, IncomingCall, MethodId, Reply, Scope, Service};
use crate::store::{AnswerBody, KeptAnswer, StoreError};

/// The metadata entry with the key.
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";
/// The longest key, in bytes: two UUIDs as text, or a hash.
pub const MAX_KEY_BYTES: usize = 128;
/// Keys that are remembered. When so many are younger than [`ANSWER_AGE`], further ones are refused and may be tried again:
/// none is forgotten early, or its call would be charged twice. At about 300 bytes each without their answers, 5 MiB.
pub const MAX_KEYS: usize = 16_384;
/// The largest answer that is kept, in bytes; of a larger one, and of one with streams, only that it was given.
pub const MAX_ANSWER_BYTES: usize = 64 * 1024;
/// All answers that are kept, in bytes; beyond it only that they were given.
pub const MAX_ANSWERS_BYTES: usize = 64 * 1024 * 1024;
/// How long a key is remembered: a payer that was cut off comes back within minutes.
pub const ANSWER_AGE: Duration = Duration::from_secs(3600);

/// Names a call: its channel, method and key.
type AnswerId = Hash;

/// What a connection is paid from, for the handlers on it.
pub(super) struct PaidFrom(pub(super) ChannelId);

/// All keys that are remembered.
#[derive(Debug, Default)]
pub(super) struct Answers {
    keys: Mutex<Keys>,
    /// Bytes of answers that are kept. The books of one more or less under a race don't matter.
    bytes: Arc<AtomicUsize>,
}

#[derive(Debug, Default)]
struct Keys {
    entries: HashMap<AnswerId, Entry>,
    /// In the order in which they came.
    order: VecDeque<(Instant, AnswerId)>,
}

#[derive(Debug, Clone)]
struct Entry {
    args: Hash,
    turn: Arc<tokio::sync::Mutex<Turn>>,
}

/// What has become of a call so far. Who has the lock makes an attempt.
#[derive(Debug)]
struct Turn {
    state: State,
    /// What all attempts have cost.
    charged: Amount,
    bytes: Arc<AtomicUsize>,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Fresh,
    Executed(Option<AnswerBody>),
}

impl Drop for Turn {
    fn drop(&mut self) {
        if let State::Executed(Some(body)) = &self.state {
            self.bytes.fetch_sub(body.payload.len(), Ordering::Relaxed);
        }
    }
}

impl Answers {
    /// The entry of a key, which is made if there is none. `None` when there are too many.
    fn enter(&self, id: AnswerId, args: Hash, now: Instant) -> Option<Entry> {
        let mut keys = self.keys.lock();
        while let Some(&(made, old)) = keys.order.front()
            && now.saturating_duration_since(made) >= ANSWER_AGE
        {
            keys.order.pop_front();
            keys.entries.remove(&old);
        }
        if let Some(entry) = keys.entries.get(&id) {
            return Some(entry.clone());
        }
        if keys.entries.len() >= MAX_KEYS {
            return None;
        }
        let turn = Turn { state: State::Fresh, charged: Amount::ZERO, bytes: self.bytes.clone() };
        let entry = Entry { args, turn: Arc::new(tokio::sync::Mutex::new(turn)) };
        keys.entries.insert(id, entry.clone());
        keys.order.push_back((now, id));
        Some(entry)
    }

    fn set_args(&self, id: AnswerId, args: Hash) {
        if let Some(entry) = self.keys.lock().entries.get_mut(&id) {
            entry.args = args;
        }
    }
}

impl Turn {
    /// Keeps what can be kept of an answer.
    fn keep(&mut self, reply: &Reply) -> Option<AnswerBody> {
        let size = reply.payload.len();
        let fits = reply.slots.is_empty() && size <= MAX_ANSWER_BYTES;
        let body = (fits && self.bytes.load(Ordering::Relaxed).saturating_add(size) <= MAX_ANSWERS_BYTES).then(|| {
            self.bytes.fetch_add(size, Ordering::Relaxed);
            AnswerBody {
                is_error: reply.status == Status::AppError,
                metadata: reply.metadata.clone(),
                payload: reply.payload.to_vec(),
                cost: reply.cost,
            }
        });
        self.state = State::Executed(body.clone());
        body
    }
}

/// An answer that only this payee can have given.
fn refused(code: u32, text: &str) -> Reply {
    Reply::refused(&Reason::new(code, text))
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Joins texts so that no two lists of them give the same bytes.
fn answer_id(channel: ChannelId, method: MethodId, key: &[u8]) -> AnswerId {
    keccak256(&[channel.0.as_slice(), &method.0.to_be_bytes(), key].concat())
}

impl Payee {
    /// Starts a call with a key, or answers it from the record.
    pub(super) fn call_once(self: &Arc<Self>, service: &Arc<dyn Service>, mut incoming: IncomingCall) -> BoxReply {
        let context = &mut incoming.context;
        let Some(key) = context.metadata.value(IDEMPOTENCY_KEY).filter(|key| key.len() <= MAX_KEY_BYTES) else {
            return refused(code::LIMIT, "an idempotency key has at most 128 bytes").boxed();
        };
        let (Some(from), Some(cost)) = (context.cell.data().get::<PaidFrom>(), context.cost.take()) else {
            return service.call(incoming);
        };
        let id = answer_id(from.0, context.method, key);
        let (payee, service, scope) = (self.clone(), service.clone(), Scope::current());
        Box::pin(async move { payee.attempt(id, service, incoming, (cost, scope)).await })
    }

    async fn attempt(
        self: Arc<Self>,
        id: AnswerId,
        service: Arc<dyn Service>,
        incoming: IncomingCall,
        (cost, scope): (oneshot::Receiver<Amount>, Scope),
    ) -> Reply {
        let args = keccak256(&incoming.payload);
        let Some(entry) = self.answers.enter(id, args, Instant::now()) else {
            return refused(code::AT_CAPACITY, "too many idempotency keys are remembered: try again later");
        };
        // The one before is through, and what it cost is known.
        let mut turn = entry.turn.clone().lock_owned().await;
        let mut expected = entry.args;
        if matches!(turn.state, State::Fresh) && self.config.store.survives_restart() {
            match self.config.store.load_answer(id).await {
                Ok(Some(kept)) if now_ms().saturating_sub(kept.made_ms) < ANSWER_AGE.as_millis() as u64 => {
                    // From before a crash: what was charged then is not known any more, and is not charged twice.
                    expected = kept.args;
                    self.answers.set_args(id, kept.args);
                    self.answers
                        .bytes
                        .fetch_add(kept.body.as_ref().map_or(0, |body| body.payload.len()), Ordering::Relaxed);
                    (turn.state, turn.charged) = (State::Executed(kept.body), Amount::MAX);
                }
                Ok(_) => {}
                Err(error) => return self.store_failed(&error),
            }
        }
        if expected != args {
            return refused(code::KEY_REUSED, "the idempotency key was used with other arguments");
        }
        match &turn.state {
            State::Executed(Some(body)) => {
                let status = if body.is_error { Status::AppError } else { Status::Ok };
                let (payload, metadata) = (Bytes::from(body.payload.clone()), body.metadata.clone());
                let reply = Reply { status, payload, metadata, cost: body.cost, ..Reply::failed() };
                let paid_before = turn.charged;
                tokio::spawn(note_cost(turn, cost));
                Reply { paid_before, ..reply }
            }
            State::Executed(None) => {
                refused(code::ANSWER_NOT_KEPT, "the call was executed, and its answer was not kept")
            }
            State::Fresh => self.execute(id, service, (incoming, args), (turn, cost, scope)).await,
        }
    }

    /// Executes the call in a task of its own, so that its end and its cost are known whatever becomes of the caller.
    async fn execute(
        self: Arc<Self>,
        id: AnswerId,
        service: Arc<dyn Service>,
        (incoming, args): (IncomingCall, Hash),
        (mut turn, cost, scope): (OwnedMutexGuard<Turn>, oneshot::Receiver<Amount>, Scope),
    ) -> Reply {
        let (answer, answered) = oneshot::channel();
        let paid_before = turn.charged;
        tokio::spawn(async move {
            let kept = |body| KeptAnswer { args, made_ms: now_ms(), body };
            // After a crash while it executes, it may have been executed.
            if let Err(error) = self.config.store.keep_answer(id, Some(kept(None))).await {
                let _abandoned = answer.send(self.store_failed(&error));
                return;
            }
            let reply = scope.hold(self.call_reserved(&*service, incoming)).await;
            let executed = matches!(reply.status, Status::Ok | Status::AppError);
            let noted = match executed {
                true => Some(kept(turn.keep(&reply))),
                // The payee's own failure is free, and the next attempt executes it.
                false => None,
            };
            let reply = match self.config.store.keep_answer(id, noted).await {
                Ok(()) => reply,
                Err(error) => self.store_failed(&error),
            };
            // The caller may be gone: then what the session has charged for that counts.
            let _abandoned = answer.send(Reply { paid_before, ..reply });
            note_cost(turn, cost).await;
        });
        answered.await.unwrap_or_else(|_panicked| Reply::failed())
    }

    fn store_failed(&self, error: &StoreError) -> Reply {
        tracing::error!(%error, "a call with an idempotency key cannot be noted, so it is not answered");
        Reply::failed()
    }
}

/// Ends an attempt when the session says what it has cost; one whose session does not say it any more costs nothing more.
async fn note_cost(mut turn: OwnedMutexGuard<Turn>, cost: oneshot::Receiver<Amount>) {
    turn.charged = turn.charged.saturating_add(cost.await.unwrap_or(Amount::MAX));
}

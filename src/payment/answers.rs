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
//! it is known what the one before has cost. One that still waits costs nothing; one whose caller is gone when its turn
//! comes executes nothing. What is not known to be charged is not taken off, and a kept answer of which it is not known what
//! was charged for it is given to nobody. The record is bounded in keys, bytes and age, each by a named limit.

use std::collections::{BTreeMap, HashMap};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::Poll;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{OwnedMutexGuard, oneshot};
use tollway_protocol::error::{Reason, code};
use tollway_protocol::message::Status;
/// The metadata entry with the key.
pub use tollway_protocol::payment::IDEMPOTENCY_KEY;
use tollway_protocol::payment::{Amount, ChannelId, Hash, keccak256};

use super::payee::Payee;
use crate::rpc::{BoxReply, IncomingCall, MethodId, NamedCall, Reply, Scope, Service};
use crate::store::{AnswerBody, KeptAnswer, StoreError};

/// The longest key, in bytes: two UUIDs as text, or a hash.
pub const MAX_KEY_BYTES: usize = 128;
/// Keys that are remembered. When so many are younger than [`ANSWER_AGE`], further ones are refused and may be tried again:
/// none is forgotten early, or its call would be charged twice. At about 400 bytes each without their answers, 6 MiB.
pub const MAX_KEYS: usize = 16_384;
/// Keys that one channel may always have of [`MAX_KEYS`]. It has more only while half of all are unused, so that no payer
/// takes the room of the others.
const CHANNEL_KEYS: usize = MAX_KEYS / 16;
/// The largest answer that is kept, in bytes; of a larger one, and of one with streams, only that it was given.
pub const MAX_ANSWER_BYTES: usize = 64 * 1024;
/// All answers that are kept, in bytes; beyond it only that they were given.
pub const MAX_ANSWERS_BYTES: usize = 64 * 1024 * 1024;
/// How long a key is remembered: a payer that was cut off comes back within minutes.
pub const ANSWER_AGE: Duration = Duration::from_secs(3600);

/// Names a call: its channel, method and key.
type AnswerId = Hash;

type TurnLock = tokio::sync::Mutex<Turn>;

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
    order: BTreeMap<u64, AnswerId>,
    last: u64,
    by_channel: HashMap<ChannelId, usize>,
}

#[derive(Debug)]
struct Entry {
    channel: ChannelId,
    made: Instant,
    /// Its place in the order.
    number: u64,
    /// Cloned only under the lock of the keys: whoever finds no clone beside this one knows that nobody makes an attempt.
    turn: Arc<TurnLock>,
}

/// What has become of a call so far. Who has the lock makes an attempt.
#[derive(Debug)]
struct Turn {
    args: Hash,
    /// When it was noted, in milliseconds since the Unix epoch.
    made_ms: u64,
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

impl Keys {
    fn forget(&mut self, id: AnswerId) {
        let Some(entry) = self.entries.remove(&id) else { return };
        self.order.remove(&entry.number);
        if let Some(count) = self.by_channel.get_mut(&entry.channel) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.by_channel.remove(&entry.channel);
            }
        }
    }
}

impl Answers {
    /// The turn of a key, whose entry is made if there is none. `None` when there are too many.
    fn enter(&self, (channel, id): (ChannelId, AnswerId), args: Hash, now: Instant) -> Option<Arc<TurnLock>> {
        let mut keys = self.keys.lock();
        while let Some((_, &old)) = keys.order.first_key_value()
            && keys.entries.get(&old).is_none_or(|entry| now.saturating_duration_since(entry.made) >= ANSWER_AGE)
        {
            keys.forget(old);
        }
        if let Some(entry) = keys.entries.get(&id) {
            return Some(entry.turn.clone());
        }
        let (all, own) = (keys.entries.len(), keys.by_channel.get(&channel).copied().unwrap_or_default());
        if all >= MAX_KEYS || (own >= CHANNEL_KEYS && all >= MAX_KEYS / 2) {
            return None;
        }
        let (made_ms, bytes) = (now_ms(), self.bytes.clone());
        let turn = Turn { args, made_ms, state: State::Fresh, charged: Amount::ZERO, bytes };
        let turn = Arc::new(TurnLock::new(turn));
        keys.last = keys.last.saturating_add(1);
        let number = keys.last;
        keys.entries.insert(id, Entry { channel, made: now, number, turn: turn.clone() });
        keys.order.insert(number, id);
        keys.by_channel.insert(channel, own.saturating_add(1));
        Some(turn)
    }

    /// Forgets a key of which nothing is to be remembered and that nobody else waits for.
    fn leave(&self, id: AnswerId) {
        let mut keys = self.keys.lock();
        let is_unused = keys.entries.get(&id).is_some_and(|entry| {
            let unused = |turn: &Turn| matches!(turn.state, State::Fresh) && turn.charged.is_zero();
            Arc::strong_count(&entry.turn) == 1 && entry.turn.try_lock().is_ok_and(|turn| unused(&turn))
        });
        if is_unused {
            keys.forget(id);
        }
    }
}

/// An attempt at a call, from before it waits for its turn until after it has given it up.
struct Attempt {
    payee: Arc<Payee>,
    id: AnswerId,
}

impl Drop for Attempt {
    fn drop(&mut self) {
        self.payee.answers.leave(self.id);
    }
}

impl Turn {
    /// Keeps what can be kept of an answer.
    fn keep(&mut self, reply: &Reply) {
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
        self.state = State::Executed(body);
    }

    /// Goes on from what a store has kept.
    fn restore(&mut self, kept: KeptAnswer) {
        (self.args, self.made_ms) = (kept.args, kept.made_ms);
        // Cut off by a crash before it was known what was charged: neither given for free nor charged twice.
        let body = kept.body.filter(|_| kept.charged.is_some());
        self.charged = kept.charged.unwrap_or_default();
        self.bytes.fetch_add(body.as_ref().map_or(0, |body| body.payload.len()), Ordering::Relaxed);
        self.state = State::Executed(body);
    }
}

/// An answer that only this payee can have given.
fn refused(code: u32, text: &str) -> Reply {
    Reply::refused(&Reason::new(code, text))
}

pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Joins texts so that no two lists of them give the same bytes.
fn answer_id(channel: ChannelId, method: MethodId, key: &[u8]) -> AnswerId {
    keccak256(&[channel.0.as_slice(), &method.0.to_be_bytes(), key].concat())
}

impl Payee {
    /// Starts a call with a key, or answers it from the record. One without a price is executed as often as it is made.
    pub(super) fn call_once(self: &Arc<Self>, service: &Arc<dyn Service>, mut incoming: IncomingCall) -> BoxReply {
        let context = &mut incoming.context;
        let Some(key) = context.metadata.value(IDEMPOTENCY_KEY).filter(|key| key.len() <= MAX_KEY_BYTES) else {
            return refused(code::LIMIT, "an idempotency key has at most 128 bytes").boxed();
        };
        let Some(named) = context.named.take() else { return self.call_reserved(&**service, incoming) };
        let Some(from) = context.cell.data().get::<PaidFrom>() else {
            return refused(code::AT_CAPACITY, "nothing pays for the call yet: try again later").boxed();
        };
        let name = (from.0, answer_id(from.0, context.method, key));
        let (payee, service, scope) = (self.clone(), service.clone(), Scope::current());
        Box::pin(async move { payee.attempt(name, (service, scope), incoming, named).await })
    }

    async fn attempt(
        self: Arc<Self>,
        (channel, id): (ChannelId, AnswerId),
        service: (Arc<dyn Service>, Scope),
        incoming: IncomingCall,
        named: NamedCall,
    ) -> Reply {
        let args = keccak256(&incoming.payload);
        let attempt = Attempt { payee: self.clone(), id };
        let Some(turn) = self.answers.enter((channel, id), args, Instant::now()) else {
            return refused(code::AT_CAPACITY, "too many idempotency keys are remembered: try again later");
        };
        // The one before is through, and what it cost is known.
        let mut turn = turn.lock_owned().await;
        if matches!(turn.state, State::Fresh) && turn.charged.is_zero() && self.config.store.survives_restart() {
            match self.config.store.load_answer(id).await {
                Ok(Some(kept)) if now_ms().saturating_sub(kept.made_ms) < ANSWER_AGE.as_millis() as u64 => {
                    turn.restore(kept);
                }
                Ok(_) => {}
                Err(error) => return self.store_failed(&error),
            }
        }
        if turn.args != args {
            return refused(code::KEY_REUSED, "the idempotency key was used with other arguments");
        }
        if matches!(turn.state, State::Executed(None)) {
            return refused(code::ANSWER_NOT_KEPT, "the call was executed, and its answer was not kept");
        }
        // Whose caller is gone pays nothing any more, so nothing is done for it.
        let Some(cost) = named.begin(turn.charged) else { return Reply::empty(Status::Cancelled) };
        let (answer, answered) = oneshot::channel();
        let paid_before = turn.charged;
        // In a task of its own, so that its end and its cost are known whatever becomes of the caller.
        tokio::spawn(async move {
            let reply = match self.answer(id, &mut turn, service, incoming).await {
                Ok(reply) => reply,
                Err(error) => self.store_failed(&error),
            };
            // The caller may be gone: then what the session has charged for that counts.
            let _abandoned = answer.send(Reply { paid_before, ..reply });
            self.note_cost(id, turn, cost).await;
            drop(attempt);
        });
        answered.await.unwrap_or_else(|_ended| Reply::failed())
    }

    /// The answer of a call whose turn it is: the one that was given, or that of its execution.
    async fn answer(
        &self,
        id: AnswerId,
        turn: &mut OwnedMutexGuard<Turn>,
        (service, scope): (Arc<dyn Service>, Scope),
        incoming: IncomingCall,
    ) -> Result<Reply, StoreError> {
        // After a crash from here on it may have been executed, and have cost more.
        self.note(id, turn, None).await?;
        if let State::Executed(Some(body)) = &turn.state {
            let status = if body.is_error { Status::AppError } else { Status::Ok };
            let (payload, metadata) = (Bytes::from(body.payload.clone()), body.metadata.clone());
            return Ok(Reply { status, payload, metadata, cost: body.cost, ..Reply::failed() });
        }
        let reply = contained(scope.hold(async { self.call_reserved(&*service, incoming).await })).await;
        if matches!(reply.status, Status::Ok | Status::AppError) {
            turn.keep(&reply);
            self.note(id, turn, None).await?;
        } else {
            // The payee's own failure is free, and the next attempt executes it.
            self.config.store.keep_answer(id, None).await?;
        }
        Ok(reply)
    }

    /// Has the store keep what has become of a call; `charged` once it is known what it has cost.
    async fn note(&self, id: AnswerId, turn: &Turn, charged: Option<Amount>) -> Result<(), StoreError> {
        if !self.config.store.survives_restart() {
            return Ok(());
        }
        let body = match &turn.state {
            State::Fresh => None,
            State::Executed(body) => body.clone(),
        };
        let kept = KeptAnswer { args: turn.args, made_ms: turn.made_ms, body, charged };
        self.config.store.keep_answer(id, Some(kept)).await
    }

    /// Ends an attempt when the session says what it has cost. One that is lost without a word has lost what it counted,
    /// too, so nothing is known to be charged.
    async fn note_cost(&self, id: AnswerId, mut turn: OwnedMutexGuard<Turn>, cost: oneshot::Receiver<Amount>) {
        turn.charged = turn.charged.saturating_add(cost.await.unwrap_or_default());
        if let State::Executed(_) = turn.state
            && let Err(error) = self.note(id, &turn, Some(turn.charged)).await
        {
            tracing::error!(%error, "what a call has cost cannot be noted: after a restart its answer is given to nobody");
        }
    }

    fn store_failed(&self, error: &StoreError) -> Reply {
        tracing::error!(%error, "a call with an idempotency key cannot be noted, so it is not answered");
        Reply::failed()
    }
}

/// The reply of a handler; one that panics has failed.
async fn contained(handler: impl Future<Output = Reply>) -> Reply {
    let mut handler = pin!(handler);
    std::future::poll_fn(|cx| {
        catch_unwind(AssertUnwindSafe(|| handler.as_mut().poll(cx)))
            .unwrap_or_else(|_panic| Poll::Ready(Reply::failed()))
    })
    .await
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn id(number: usize) -> AnswerId {
        keccak256(&number.to_be_bytes())
    }

    /// `[pay.key.arguments]`
    #[test]
    fn no_channel_takes_the_room_of_the_others_and_unused_keys_take_none() {
        let (answers, now) = (Answers::default(), Instant::now());
        let [greedy, other] = [1, 2].map(|byte| ChannelId([byte; 32]));
        let enter = |channel, number| answers.enter((channel, id(number)), id(0), now);
        let mut number = 0;
        while enter(greedy, number).is_some() {
            number += 1;
        }
        assert_eq!(number, MAX_KEYS / 2);
        for number in MAX_KEYS..MAX_KEYS + CHANNEL_KEYS {
            assert!(enter(other, number).is_some());
        }
        assert!(enter(other, 2 * MAX_KEYS).is_none());
        // A key of which there is nothing to remember is forgotten, but not while somebody waits for its turn.
        let waiting = enter(greedy, 0).unwrap();
        answers.leave(id(0));
        assert!(Arc::ptr_eq(&waiting, &enter(greedy, 0).unwrap()));
        drop(waiting);
        for number in 0..MAX_KEYS / 2 {
            answers.leave(id(number));
        }
        let paid = enter(greedy, 0).unwrap();
        paid.try_lock().unwrap().charged = Amount::new(1);
        drop(paid);
        answers.leave(id(0));
        let keys = answers.keys.lock();
        assert_eq!((keys.entries.len(), keys.order.len()), (CHANNEL_KEYS + 1, CHANNEL_KEYS + 1));
        assert_eq!((keys.by_channel[&greedy], keys.by_channel[&other]), (1, CHANNEL_KEYS));
    }
}

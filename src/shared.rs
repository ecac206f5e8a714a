//! What a session's handles, its streams and its driver share: the machine and its tables behind one short lock.
//!
//! Nothing under the lock waits, calls user code or wakes: what is to be woken or dropped is collected in an
//! [`Aftermath`]. The lock comes before any stream's.

mod cell;
mod paid;

use std::sync::{Arc, OnceLock};
use std::task::Waker;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use rustc_hash::FxHashMap;
use slotmap::{SecondaryMap, SlotMap};
use tokio::sync::{Notify, oneshot};
use tollway_protocol::error::{ConnectionEnd, Reason, SessionEnd};
use tollway_protocol::id::ConnectionId;
use tollway_protocol::limits::ConnectionLimits;
use tollway_protocol::metadata::Metadata;
use tollway_protocol::payment::Amount;
use tollway_protocol::relay::{Relayed, Side};
use tollway_protocol::session::{
    CallKey, CallSpec, CommandError, ConnectionStats, Machine, OpenSpec, PayerMoney, ResponseSpec, SessionStats,
    StreamSource,
};
use tollway_protocol::stream::{Grant, StreamKey, Taken};
use tollway_protocol::time::Time;
use tracing::Span;

use crate::auth::SessionPeer;
use crate::connection::Draining;
use crate::handler::{CancelFlag, Refused, ServedBody};
use crate::observe::{Happened, ObservedCell, ObservedSession, Traffic};
use crate::payment::{CREDENTIAL_RATE, CheckGate, MAX_MESSAGES, Mailbox};
use crate::queue::{QueueSnapshot, Unit};
use crate::relay::Relay;
use crate::rpc::{Aftermath, CallSlot, InboundStream, OUTBOX_BYTES, OutboundSlots, Reply, ServiceEntry, StreamCore};

pub(crate) use cell::ConnectionCell;

/// Streams of a session that are looked at for a snapshot, 1,000: the lock is held meanwhile.
const OBSERVED_STREAMS: usize = 1_000;

/// One session.
pub(crate) struct Shared {
    state: Mutex<State>,
    /// The origin of the machine's time.
    start: Instant,
    peer: Arc<SessionPeer>,
    /// The session's, below which are those of its connections.
    span: Span,
    end: OnceLock<SessionEnd>,
    /// The peer accepts no new connections any more.
    leaving: OnceLock<Reason>,
    /// Notified with the end, and when the peer is leaving.
    ended: Notify,
    /// Notified when calls of this side have ended.
    call_gone: Notify,
    /// Notified with each connection that is forgotten.
    connection_gone: Notify,
    /// Who watches over it.
    observed: ObservedCell,
    /// Whether the metrics count it as open.
    #[cfg(feature = "metrics")]
    is_counted: std::sync::atomic::AtomicBool,
    /// Paces the credentials that the peer has checked.
    pub(crate) credentials: CheckGate,
}

slotmap::new_key_type! {
    /// A place where a caller waits for an answer.
    pub(crate) struct SlotKey;
}

/// What the lock guards.
pub(crate) struct State {
    pub(crate) machine: Machine,
    /// Where callers wait. An answer may lie here when the machine has forgotten its call and used the key's place
    /// again, so the slots have keys of their own.
    pub(crate) slots: SlotMap<SlotKey, CallSlot>,
    /// The slots of calls that are not answered.
    pub(crate) calls: SecondaryMap<CallKey, SlotKey>,
    /// Handlers of the peer's calls that can be told of a cancel.
    pub(crate) served: SecondaryMap<CallKey, Arc<CancelFlag>>,
    pub(crate) streams: SecondaryMap<StreamKey, Arc<StreamCore>>,
    /// Streams of calls that wait for their price, until the calls are delivered.
    pub(crate) announced: FxHashMap<CallKey, Vec<InboundStream>>,
    /// Who waits to hear what a call of the peer's has cost.
    pub(crate) costs: FxHashMap<CallKey, oneshot::Sender<Amount>>,
    pub(crate) opens: FxHashMap<ConnectionId, oneshot::Sender<OpenAnswer>>,
    pub(crate) connections: FxHashMap<ConnectionId, Arc<ConnectionCell>>,
    pub(crate) mailboxes: FxHashMap<ConnectionId, Arc<Mailbox>>,
    /// Connections that are one side of a relay.
    pub(crate) relays: FxHashMap<ConnectionId, (Arc<Relay>, Side)>,
    /// Answers [`Event::SessionOpened`] to whoever waits for the handshake.
    pub(crate) opened: Option<oneshot::Sender<Metadata>>,
    /// Responder: where an authenticator waits for the answer to its challenge.
    pub(crate) proof: Option<oneshot::Sender<Bytes>>,
    /// Responder: the metadata of the peer's hello, until the session is open.
    pub(crate) hello: Option<Metadata>,
    /// Why the peer is going away, once it has said so.
    pub(crate) peer_going_away: Option<Reason>,
    pub(crate) traffic: Traffic,
    /// What of it the metrics have.
    #[cfg(feature = "metrics")]
    told_traffic: Traffic,
    /// The driver, while nothing was put into the outbox since it looked.
    driver: Option<Waker>,
}

/// A connection to be opened.
pub(crate) struct Opening<'a> {
    pub(crate) service: &'a str,
    /// What this side receives on it.
    pub(crate) limits: ConnectionLimits,
    pub(crate) metadata: Metadata,
    /// The credential of a paid one, how it is counted, and who hears of it.
    pub(crate) paid: Option<(Bytes, PayerMoney, Arc<Mailbox>)>,
    /// What this side serves on it.
    pub(crate) serves: Option<Arc<ServiceEntry>>,
}

impl<'a> Opening<'a> {
    pub(crate) fn of(service: &'a str, limits: ConnectionLimits) -> Self {
        Opening { service, limits, metadata: Metadata::new(), paid: None, serves: None }
    }
}

/// The answer to an open.
pub(crate) enum OpenAnswer {
    Accepted { metadata: Metadata, receipt: Bytes },
    Rejected { reason: Reason, metadata: Metadata, terms: Bytes },
    Ended(ConnectionEnd),
}

impl State {
    /// The driver has seen the outbox: whoever puts something into it from now on wakes it.
    pub(crate) fn park(&mut self, driver: &Waker) {
        if !self.driver.as_ref().is_some_and(|parked| parked.will_wake(driver)) {
            self.driver = Some(driver.clone());
        }
    }

    /// Answers a call of the peer's, and gives its body's bytes back to the window.
    pub(crate) fn respond(
        &mut self,
        shared: &Arc<Shared>,
        body: ServedBody,
        reply: Reply,
        after: &mut Aftermath,
    ) -> Result<(), Refused> {
        let Reply { status, metadata, payload, slots, cost, paid_before } = reply;
        self.machine.consume_body(body.connection, body.bytes);
        let flows = slots.flows();
        match self
            .machine
            .respond(body.call, ResponseSpec { status, metadata, payload, slots: &flows, cost, paid_before })
        {
            Ok(keys) => {
                self.bind_streams(shared, body.connection, slots, &keys, after);
                Ok(())
            }
            Err(error) => Err(Refused { body, error, slots }),
        }
    }

    /// Enters the streams that a frame will announce.
    fn bind_streams(
        &mut self,
        shared: &Arc<Shared>,
        connection: ConnectionId,
        slots: OutboundSlots,
        keys: &[StreamKey],
        after: &mut Aftermath,
    ) {
        if slots.is_empty() {
            return;
        }
        let Some((own, peer)) = self.machine.limits(connection).map(|(own, peer)| (*own, *peer)) else { return };
        for (core, &key) in slots.into_cores().into_iter().zip(keys) {
            if let Some(code) = core.bind(shared, key, (&own, &peer), after) {
                self.machine.stop_stream(key, code);
            }
            self.streams.insert(key, core);
        }
    }
}

impl Shared {
    pub(crate) fn new(
        make: impl FnOnce(Time) -> Machine,
        peer: Arc<SessionPeer>,
        span: Span,
        opened: oneshot::Sender<Metadata>,
    ) -> Arc<Self> {
        let state = State {
            machine: make(Time::ZERO),
            slots: SlotMap::with_key(),
            calls: SecondaryMap::new(),
            served: SecondaryMap::new(),
            streams: SecondaryMap::new(),
            announced: FxHashMap::default(),
            costs: FxHashMap::default(),
            opens: FxHashMap::default(),
            connections: FxHashMap::default(),
            mailboxes: FxHashMap::default(),
            relays: FxHashMap::default(),
            opened: Some(opened),
            hello: None,
            proof: None,
            peer_going_away: None,
            traffic: Traffic::default(),
            #[cfg(feature = "metrics")]
            told_traffic: Traffic::default(),
            driver: None,
        };
        Arc::new(Shared {
            state: Mutex::new(state),
            start: Instant::now(),
            peer,
            span,
            end: OnceLock::new(),
            leaving: OnceLock::new(),
            ended: Notify::new(),
            call_gone: Notify::new(),
            connection_gone: Notify::new(),
            observed: ObservedCell::new(),
            #[cfg(feature = "metrics")]
            is_counted: Default::default(),
            credentials: CheckGate::new(CREDENTIAL_RATE),
        })
    }

    /// The other end of the conduit.
    pub(crate) fn peer(&self) -> &Arc<SessionPeer> {
        &self.peer
    }

    pub(crate) fn span(&self) -> &Span {
        &self.span
    }

    pub(crate) fn now(&self) -> Time {
        Time::since_origin(self.start.elapsed())
    }

    /// The machine's time of an instant.
    pub(crate) fn time_of(&self, instant: Instant) -> Time {
        Time::since_origin(instant.saturating_duration_since(self.start))
    }

    /// The instant of a machine's time on tokio's clock.
    pub(crate) fn instant(&self, time: Time) -> tokio::time::Instant {
        tokio::time::Instant::from_std(self.start + time.elapsed())
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }

    /// Drops the lock, then wakes the driver if it has looked already.
    pub(crate) fn unlock_and_kick(mut state: MutexGuard<'_, State>) {
        let driver = state.driver.take();
        drop(state);
        if let Some(driver) = driver {
            driver.wake();
        }
    }

    pub(crate) fn end(&self) -> Option<&SessionEnd> {
        self.end.get()
    }

    pub(crate) fn set_end(&self, end: SessionEnd) {
        if self.end.set(end.clone()).is_ok() {
            #[cfg(feature = "metrics")]
            if self.is_counted.swap(false, std::sync::atomic::Ordering::Relaxed) {
                self.tell_traffic();
                crate::observe::metrics::session_closed(&self.peer.info, &end);
            }
            if let Some(observed) = self.observed.get() {
                observed.ended(&end);
            }
            self.ended.notify_waiters();
        }
    }

    pub(crate) async fn closed(&self) -> SessionEnd {
        loop {
            let ended = self.ended.notified();
            if let Some(end) = self.end() {
                return end.clone();
            }
            ended.await;
        }
    }

    pub(crate) fn set_leaving(&self, reason: Reason) {
        tracing::debug!(%reason, "the peer is going away");
        if self.leaving.set(reason).is_ok() {
            self.ended.notify_waiters();
        }
    }

    /// Whether the session takes no new connections: the peer is leaving, or it has ended.
    pub(crate) fn is_leaving(&self) -> bool {
        self.leaving.get().is_some() || self.end().is_some()
    }

    pub(crate) async fn peer_leaving(&self) {
        loop {
            let ended = self.ended.notified();
            if self.is_leaving() {
                return;
            }
            ended.await;
        }
    }

    // ---- observation

    pub(crate) fn set_observed(&self, observed: ObservedSession) {
        let observed = self.observed.get_or_init(|| observed);
        // It may have ended before it was known to anybody.
        if let Some(end) = self.end() {
            observed.ended(end);
        }
    }

    /// The session is open, and counts as such until its end.
    #[cfg(feature = "metrics")]
    pub(crate) fn count(&self) {
        if self.end().is_none() {
            crate::observe::metrics::session_opened(&self.peer.info);
            self.is_counted.store(true, std::sync::atomic::Ordering::Relaxed);
            // It may have ended meanwhile, and nobody has seen that it counts.
            if let Some(end) = self.end().filter(|_| self.is_counted.swap(false, std::sync::atomic::Ordering::Relaxed))
            {
                crate::observe::metrics::session_closed(&self.peer.info, end);
            }
        }
    }

    /// Adds what was carried since it was added last.
    #[cfg(feature = "metrics")]
    fn tell_traffic(&self) {
        let since = {
            let mut state = self.lock();
            let traffic = state.traffic;
            traffic.since(&std::mem::replace(&mut state.told_traffic, traffic))
        };
        crate::observe::metrics::carried(since);
    }

    /// Whether anybody is told what happens to connections.
    pub(crate) fn is_watched(&self) -> bool {
        cfg!(feature = "metrics") || self.observed.get().is_some_and(ObservedSession::is_watched)
    }

    /// Tells who watches what happened. To be called without a lock.
    pub(crate) fn tell(&self, happened: Happened) {
        #[cfg(feature = "metrics")]
        crate::observe::metrics::happened(&happened);
        if let Some(observed) = self.observed.get() {
            observed.tell(happened);
        }
    }

    /// The session at this moment, and its connections, `most` at most.
    pub(crate) fn observe(&self, most: usize) -> (Traffic, SessionStats, Vec<ConnectionStats>) {
        #[cfg(feature = "metrics")]
        self.tell_traffic();
        let state = self.lock();
        (state.traffic, state.machine.stats(), state.machine.connection_stats(most))
    }

    /// What waits in the session.
    pub(crate) fn queues(&self) -> Vec<QueueSnapshot> {
        let state = self.lock();
        let of_machine = state.machine.queues();
        let relays = state.machine.relay_memory();
        let letters = state.mailboxes.values().map(|mailbox| mailbox.depth()).max();
        let fullest = state.streams.values().take(OBSERVED_STREAMS).map(|core| core.waiting()).max();
        drop(state);
        let unit = |is_bytes| if is_bytes { Unit::Bytes } else { Unit::Entries };
        let mut queues: Vec<QueueSnapshot> = of_machine
            .iter()
            .map(|it| QueueSnapshot::new(it.name, unit(it.is_bytes), it.capacity, it.depth, it.high_water))
            .collect();
        queues
            .extend(relays.map(|(depth, most)| QueueSnapshot::new("session.relays", Unit::Bytes, most, depth, depth)));
        let (letters, most_letters) = letters.unwrap_or_default();
        queues.extend([
            QueueSnapshot::new("payment.mailbox", Unit::Entries, MAX_MESSAGES as u64, letters, most_letters),
            QueueSnapshot::new("stream.outbox", Unit::Bytes, OUTBOX_BYTES, fullest.unwrap_or(0), 0),
        ]);
        queues
    }

    // ---- the handshake

    pub(crate) fn accept_session(&self, metadata: Metadata) {
        let mut state = self.lock();
        state.machine.accept_session(metadata);
        Self::unlock_and_kick(state);
    }

    /// Asks the peer for a proof. The receiver gets it, or an error when the session ends before.
    pub(crate) fn challenge(&self, method: &str, challenge: Bytes) -> Result<oneshot::Receiver<Bytes>, CommandError> {
        let (proof, proved) = oneshot::channel();
        let mut state = self.lock();
        state.machine.challenge_session(method, challenge)?;
        state.proof = Some(proof);
        Self::unlock_and_kick(state);
        Ok(proved)
    }

    pub(crate) fn prove(&self, proof: Bytes) {
        let mut state = self.lock();
        state.machine.prove_session(proof);
        Self::unlock_and_kick(state);
    }

    pub(crate) fn refuse_session(&self, reason: Reason) {
        let mut state = self.lock();
        state.machine.refuse_session(reason);
        Self::unlock_and_kick(state);
    }

    // ---- connections

    /// Tells who waits for the last connection that one has ended.
    pub(crate) fn notice_gone(&self) {
        self.connection_gone.notify_waiters();
    }

    /// Waits until no connection is left.
    pub(crate) async fn emptied(&self) {
        loop {
            let gone = self.connection_gone.notified();
            if self.lock().connections.is_empty() {
                return;
            }
            gone.await;
        }
    }

    /// Sends an Open. The receiver gets the answer; dropping it early is up to the caller, who closes the connection.
    pub(crate) fn open(
        self: &Arc<Self>,
        spec: Opening<'_>,
    ) -> Result<(ConnectionId, Arc<ConnectionCell>, oneshot::Receiver<OpenAnswer>), CommandError> {
        let Opening { service, limits, metadata, paid, serves } = spec;
        let (answer, answered) = oneshot::channel();
        let now = self.now();
        let mut state = self.lock();
        let (paid, mailbox) = match paid {
            Some((credential, money, mailbox)) => (Some((credential, money)), Some(mailbox)),
            None => (None, None),
        };
        let id = state.machine.open(now, service, limits, metadata, paid)?;
        let cell = ConnectionCell::new(self, serves);
        state.opens.insert(id, answer);
        state.connections.insert(id, cell.clone());
        if let Some(mailbox) = mailbox {
            state.mailboxes.insert(id, mailbox);
        }
        Self::unlock_and_kick(state);
        Ok((id, cell, answered))
    }

    pub(crate) fn close_connection(&self, id: ConnectionId, reason: Reason) {
        let mut state = self.lock();
        state.machine.close(id, reason);
        Self::unlock_and_kick(state);
    }

    /// Takes no new calls on a connection, which closes when those that are open have ended. One that has ended is left
    /// alone.
    pub(crate) fn drain_connection(&self, id: ConnectionId, reason: Reason, grace: Option<Duration>) {
        let now = self.now();
        let mut state = self.lock();
        // Fails if it has ended meanwhile, and its end says why.
        let _ended = state.machine.drain(now, id, reason, grace);
        Self::unlock_and_kick(state);
    }

    /// Takes no new connections, and no new calls on those that are open.
    pub(crate) fn drain_session(&self, reason: &Reason) {
        let mut state = self.lock();
        state.machine.drain_all(reason.clone());
        let told: Vec<_> = state.relays.values().map(|(relay, side)| relay.drain(*side, reason.clone())).collect();
        let cells: Vec<_> = state.connections.values().cloned().collect();
        Self::unlock_and_kick(state);
        cells.iter().for_each(|cell| cell.set_draining(Draining { reason: reason.clone(), until: None }));
        told.into_iter().flatten().flatten().for_each(|endpoint| endpoint.tell());
    }

    pub(crate) fn close_session(&self, reason: Reason) {
        let mut state = self.lock();
        state.machine.close_session(reason);
        Self::unlock_and_kick(state);
    }

    // ---- calls

    /// Makes a call and leaves `waker` to be woken by its answer.
    pub(crate) fn start_call(
        self: &Arc<Self>,
        spec: CallSpec<'_>,
        slots: OutboundSlots,
        waker: Waker,
    ) -> Result<(CallKey, SlotKey), CommandError> {
        let connection = spec.connection;
        let mut state = self.lock();
        let (call, keys) = state.machine.start_call(spec)?;
        let slot = state.slots.insert(CallSlot::waiting(waker));
        state.calls.insert(call, slot);
        let mut after = Aftermath::default();
        state.bind_streams(self, connection, slots, &keys, &mut after);
        Self::unlock_and_kick(state);
        after.settle();
        Ok((call, slot))
    }

    /// Answers a call of the peer's; see [`State::respond`].
    pub(crate) fn respond(self: &Arc<Self>, body: ServedBody, reply: Reply) -> Result<(), Refused> {
        let mut after = Aftermath::default();
        let mut state = self.lock();
        let cancel_flag = state.served.remove(body.call);
        let result = state.respond(self, body, reply, &mut after);
        Self::unlock_and_kick(state);
        drop(cancel_flag);
        after.settle();
        result
    }

    /// The caller is gone. `call` may be the key of nothing any more.
    pub(crate) fn cancel_call(&self, connection: ConnectionId, call: CallKey, slot: SlotKey) {
        let mut state = self.lock();
        let slot = state.slots.remove(slot);
        state.calls.remove(call);
        state.machine.consume_body(connection, slot.as_ref().map_or(0, CallSlot::untaken));
        state.machine.cancel_call(call);
        Self::unlock_and_kick(state);
        // One that was not announced has ended with this, and no event says so.
        self.notice_calls_gone();
        // An answer that nobody took may hold streams, which tell the session when they are dropped.
        drop(slot);
    }

    // ---- streams; none of these is called with a stream's lock held

    pub(crate) fn stream_ready(&self, key: StreamKey, ready: bool, dropped: &[StreamKey]) {
        if !ready && dropped.is_empty() {
            return;
        }
        let mut state = self.lock();
        let mut after = Aftermath::default();
        for &unannounced in dropped {
            state.machine.forget_unannounced(unannounced);
            let core = state.streams.remove(unannounced);
            if let Some(core) = &core {
                core.fail(crate::rpc::StreamError::NotSent, &mut after);
            }
            after.bury(core);
        }
        if ready {
            state.machine.stream_ready(key);
        }
        Self::unlock_and_kick(state);
        after.settle();
    }

    pub(crate) fn stop_stream(&self, key: StreamKey, code: u32) {
        let mut state = self.lock();
        state.machine.stop_stream(key, code);
        Self::unlock_and_kick(state);
    }

    pub(crate) fn grant(&self, key: StreamKey, grant: Grant) {
        let now = self.now();
        let mut state = self.lock();
        if let Some(window) = state.machine.grant(now, key, grant)
            && let Some(core) = state.streams.get(key)
        {
            core.widen(window);
        }
        Self::unlock_and_kick(state);
    }

    /// The items of a stream that has ended were read or dropped.
    pub(crate) fn release_stream(&self, held: u64) {
        self.lock().machine.release_stream(held);
    }

    pub(crate) fn create_item_streams(
        self: &Arc<Self>,
        of: StreamKey,
        slots: OutboundSlots,
    ) -> Result<Vec<StreamKey>, CommandError> {
        let flows = slots.flows();
        let mut state = self.lock();
        let (connection, keys) = state.machine.create_item_streams(of, &flows)?;
        let mut after = Aftermath::default();
        state.bind_streams(self, connection, slots, &keys, &mut after);
        drop(state);
        after.settle();
        Ok(keys)
    }

    // ---- relays

    /// An open of the peer's becomes one side of a relay. `false` if the opener has given up.
    pub(crate) fn enter_relay(self: &Arc<Self>, id: ConnectionId, relay: &Arc<Relay>, side: Side) -> bool {
        let mut state = self.lock();
        let waits = state.machine.limits(id).is_some();
        if waits {
            relay.enter(side, self, id, state.machine.relay_pool());
            state.relays.insert(id, (relay.clone(), side));
        }
        waits
    }

    /// Asks for the right side of a relay.
    pub(crate) fn open_relayed(
        self: &Arc<Self>,
        spec: OpenSpec<'_>,
        relay: &Arc<Relay>,
    ) -> Result<oneshot::Receiver<OpenAnswer>, CommandError> {
        let (answer, answered) = oneshot::channel();
        let now = self.now();
        let mut state = self.lock();
        let id = state.machine.open_relayed(now, spec)?;
        relay.enter(Side::Right, self, id, state.machine.relay_pool());
        state.relays.insert(id, (relay.clone(), Side::Right));
        state.opens.insert(id, answer);
        state.connections.insert(id, ConnectionCell::new(self, None));
        Self::unlock_and_kick(state);
        Ok(answered)
    }

    pub(crate) fn accept_relayed(
        &self,
        id: ConnectionId,
        limits: ConnectionLimits,
        metadata: Metadata,
        receipt: Bytes,
    ) -> Result<(), CommandError> {
        let mut state = self.lock();
        let result = state.machine.accept_relayed(id, limits, metadata, receipt);
        // The other side may have been faster.
        state.machine.relay_ready(id);
        Self::unlock_and_kick(state);
        result
    }

    /// Something waits in the relay for the peer of this connection.
    pub(crate) fn relay_ready(&self, id: ConnectionId) {
        let mut state = self.lock();
        state.machine.relay_ready(id);
        Self::unlock_and_kick(state);
    }
}

/// Lends the streams to the machine while it takes frames for writing.
pub(crate) struct LentStreams<'a> {
    pub(crate) relays: &'a FxHashMap<ConnectionId, (Arc<Relay>, Side)>,
    pub(crate) streams: &'a mut SecondaryMap<StreamKey, Arc<StreamCore>>,
    pub(crate) after: &'a mut Aftermath,
}

impl StreamSource for LentStreams<'_> {
    fn take(&mut self, stream: StreamKey, max_bytes: usize, affordable: &dyn Fn(u64, u64) -> bool) -> Taken {
        let Some(core) = self.streams.get(stream) else { return Taken::Empty };
        let taken = core.take(max_bytes, affordable, self.after);
        if matches!(taken, Taken::End | Taken::Reset(_)) {
            // The machine forgets the stream with this frame.
            self.after.bury(self.streams.remove(stream));
        }
        taken
    }

    fn take_relayed(&mut self, connection: ConnectionId, max_frame: usize) -> Relayed {
        match self.relays.get(&connection) {
            Some((relay, side)) => relay.take(*side, connection, max_frame),
            None => Relayed::Empty,
        }
    }
}

//! Events of the session machine, settled under the session's lock; what must not be done there is collected as
//! [`Work`] for the driver.

use std::collections::VecDeque;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::oneshot;
use tollway_protocol::error::{ConnectionEnd, Reason, SessionEnd, code};
use tollway_protocol::id::ConnectionId;
use tollway_protocol::message::Status;
use tollway_protocol::metadata::Metadata;
use tollway_protocol::payment::Amount;
use tollway_protocol::relay::{RelayError, Side};
use tollway_protocol::session::{
    CallKey, Event, InboundSlot, IncomingCall as Call, IncomingResponse, MoneyCount, ResponseSpec,
};
use tollway_protocol::stream::StreamKey;

use crate::connection::Draining;
use crate::driver::Serving;
use crate::handler::CancelFlag;
use crate::incoming::{Acceptor, IncomingOpen, OpenDetails};
use crate::observe::Happened;
use crate::payment::{IDEMPOTENCY_KEY, OpenRequest, PaymentEvent};
use crate::relay::{Endpoint, Relay};
use crate::rpc::{
    Aftermath, Answer, AnswerBytes, CallContext, CallSlot, InboundStream, IncomingCall, MethodId, NamedCall, Outcome,
    StreamCore, StreamError, accept_metadata,
};
use crate::shared::{ConnectionCell, OpenAnswer, Shared, State};

/// A call that waits for its handler to start.
pub(crate) struct PendingCall {
    pub(crate) call: CallKey,
    pub(crate) incoming: IncomingCall,
    /// The caller lost interest before it could start.
    pub(crate) cancelled: bool,
}

/// What is to be logged: subscribers are user code, which does not run under the lock.
enum Remark {
    /// Payee and payer count a call differently.
    CountedDifferently {
        charged: Amount,
        counted: Amount,
    },
    Pong(Duration),
}

impl Remark {
    fn log(self) {
        match self {
            Remark::CountedDifferently { charged, counted } => {
                tracing::warn!(%charged, %counted, "payee and payer count a call differently");
            }
            Remark::Pong(rtt) => {
                #[cfg(feature = "metrics")]
                crate::observe::metrics::rtt(rtt);
                tracing::trace!(?rtt, "pong");
            }
        }
    }
}

/// What the driver does after the lock is dropped. Used again for the next lock, with its memory.
#[derive(Default)]
pub(crate) struct Work {
    pub(crate) after: Aftermath,
    /// Handlers to start.
    pub(crate) calls: Vec<PendingCall>,
    /// Opens of paid services, each to be answered by a task.
    pub(crate) opens: Vec<OpenRequest>,
    draining: Vec<(Arc<ConnectionCell>, Draining)>,
    ended: Vec<(Arc<ConnectionCell>, ConnectionEnd, Option<MoneyCount>)>,
    cancelled: Vec<Arc<CancelFlag>>,
    /// Openers and the handshake's waiter, with what they wait for: their wakers may be anybody's.
    answers: Vec<(oneshot::Sender<OpenAnswer>, OpenAnswer)>,
    opened: Option<(oneshot::Sender<Metadata>, Metadata)>,
    /// What calls of the peer's have cost, for who waits to hear it.
    costs: Vec<(oneshot::Sender<Amount>, Amount)>,
    /// Calls of this side have ended.
    calls_ended: bool,
    /// Connections were forgotten.
    connections_gone: bool,
    session_end: Option<SessionEnd>,
    /// The peer accepts no new connections any more.
    leaving: Option<Reason>,
    /// Opens that the application answers.
    pub(crate) incoming: Vec<(Arc<dyn Acceptor>, IncomingOpen)>,
    /// Sides of relays for which something waits.
    relays: Vec<Endpoint>,
    /// Relays that have lost this side.
    relays_ended: Vec<(Arc<Relay>, Side, ConnectionEnd)>,
    /// For who watches over the session.
    happened: Vec<Happened>,
    remarks: Vec<Remark>,
    /// The metadata of a hello about which the session's admission decides.
    pub(crate) greeting: Option<Metadata>,
    /// The method and the challenge that the peer wants to be answered.
    pub(crate) challenge: Option<(String, Bytes)>,
    proved: Option<(oneshot::Sender<Bytes>, Bytes)>,
}

impl Work {
    /// Tells everybody who waits; what is to be begun is left in `calls` and `opens`. To be called without a lock.
    pub(crate) fn tell(&mut self, shared: &Shared) {
        if std::mem::take(&mut self.calls_ended) {
            shared.notice_calls_gone();
        }
        if std::mem::take(&mut self.connections_gone) {
            shared.notice_gone();
        }
        for (cell, draining) in self.draining.drain(..) {
            cell.set_draining(draining);
        }
        for (cell, end, money) in self.ended.drain(..) {
            cell.set_end(end, money);
        }
        self.cancelled.drain(..).for_each(|flag| flag.raise());
        if let Some((opened, metadata)) = self.opened.take() {
            // Nobody waits any more if the handshake was given up; the session's end follows then.
            let _given_up = opened.send(metadata);
        }
        if let Some((proved, proof)) = self.proved.take() {
            // The authenticator may have given up meanwhile.
            let _given_up = proved.send(proof);
        }
        for (open, answer) in self.answers.drain(..) {
            // An opener that was dropped has closed the connection.
            let _abandoned = open.send(answer);
        }
        for (tell, charged) in self.costs.drain(..) {
            // A handler that was dropped doesn't wait.
            let _dropped = tell.send(charged);
        }
        self.relays.drain(..).for_each(|endpoint| endpoint.tell());
        for (relay, side, end) in self.relays_ended.drain(..) {
            relay.handle_end(side, end);
        }
        self.happened.drain(..).for_each(|happened| shared.tell(happened));
        self.remarks.drain(..).for_each(Remark::log);
        self.after.settle();
        if let Some(reason) = self.leaving.take() {
            shared.set_leaving(reason);
        }
        if let Some(end) = self.session_end.take() {
            shared.set_end(end);
        }
    }

    /// The caller of a call of the peer's is gone.
    fn cancel(&mut self, state: &mut State, call: CallKey) {
        match state.served.remove(call) {
            Some(flag) => self.cancelled.push(flag),
            // It may have come with the same read, and not have been started.
            None => {
                if let Some(pending) = self.calls.iter_mut().find(|pending| pending.call == call) {
                    pending.cancelled = true;
                }
            }
        }
    }
}

/// Settles all events under the session's lock.
pub(crate) fn settle(
    shared: &Arc<Shared>,
    serving: &Serving,
    events: &mut VecDeque<Event>,
    state: &mut State,
    work: &mut Work,
) {
    // A violation found here is an event of its own.
    while state.machine.has_events() {
        state.machine.swap_events(events);
        for event in events.drain(..) {
            settle_event(shared, serving, state, event, work);
        }
    }
}

/// Settles one event under the session's lock.
fn settle_event(shared: &Arc<Shared>, serving: &Serving, state: &mut State, event: Event, work: &mut Work) {
    match event {
        Event::SessionRequested { metadata } => {
            match serving.admission {
                Some(_) => work.greeting = Some(metadata.clone()),
                None => state.machine.accept_session(Metadata::new()),
            }
            state.hello = Some(metadata);
        }
        Event::SessionChallenged { method, challenge } => work.challenge = Some((method, challenge)),
        Event::SessionProved { proof } => work.proved = state.proof.take().map(|proved| (proved, proof)),
        Event::SessionOpened { metadata, .. } => {
            // The responder has the peer's metadata from its hello.
            let metadata = state.hello.take().unwrap_or(metadata);
            work.opened = state.opened.take().map(|opened| (opened, metadata));
        }
        Event::SessionEnded(end) => {
            (state.opened, state.proof) = (None, None);
            // Streams refer to the session: without this they would keep each other.
            work.after.bury_all(state.streams.drain().map(|(_, core)| core));
            state.announced.drain().for_each(|(_, streams)| work.after.discard(streams));
            work.session_end = Some(end);
        }
        Event::ConnectionRequested { connection, service, metadata, limits, parity, credential } => {
            let request = OpenDetails { service, metadata, limits, parity, credential };
            settle_open(shared, serving, state, work, connection, request);
        }
        Event::ConnectionAccepted { connection, metadata, limits, receipt } => {
            if shared.is_watched() {
                work.happened.push(Happened::Opened(connection, None));
            }
            // Frames for the other side may come at once.
            if let Some((relay, side)) = state.relays.get(&connection) {
                relay.join(limits, !receipt.is_empty());
                if let Some(reason) = &state.peer_going_away {
                    work.relays.extend(relay.drain(side.other(), reason.clone()).into_iter().flatten());
                }
            }
            answer_open(state, work, connection, OpenAnswer::Accepted { metadata, receipt });
        }
        Event::ConnectionRejected { connection, reason, metadata, terms } => {
            if shared.is_watched() {
                work.happened.push(Happened::Refused(connection, reason.clone()));
            }
            work.connections_gone |= state.connections.remove(&connection).is_some();
            state.mailboxes.remove(&connection);
            state.relays.remove(&connection);
            answer_open(state, work, connection, OpenAnswer::Rejected { reason, metadata, terms });
        }
        Event::ConnectionClosed { connection, end, money } => {
            if let Some(mailbox) = state.mailboxes.remove(&connection) {
                mailbox.post(PaymentEvent::Ended(money));
            }
            if let Some(cell) = state.connections.remove(&connection) {
                work.connections_gone = true;
                if shared.is_watched() {
                    work.happened.push(Happened::Closed(connection, end.to_string()));
                }
                work.ended.push((cell, end.clone(), money));
            }
            if let Some((relay, side)) = state.relays.remove(&connection) {
                work.relays_ended.push((relay, side, end.clone()));
            }
            answer_open(state, work, connection, OpenAnswer::Ended(end));
        }
        Event::ConnectionDraining { connection, reason, deadline } => {
            if let Some(cell) = state.connections.get(&connection) {
                let until = deadline.and_then(|left| Instant::now().checked_add(left));
                work.draining.push((cell.clone(), Draining { reason, until }));
            }
        }
        Event::Relayed { connection, frame } => settle_relayed(state, work, connection, &frame),
        Event::StreamsAnnounced { connection, call, slots } => {
            let streams = enter_streams(shared, state, connection, &slots);
            state.announced.insert(call, streams);
        }
        Event::CallRequested(call) => settle_call(shared, state, work, call),
        Event::CallCancelled { call } => work.cancel(state, call),
        Event::CallExpired { call, sent } => {
            if let Some(slot) = waiting_slot(state, call) {
                work.after.wake(slot.settle(Outcome::Expired(sent)));
            }
            if let Some(flag) = state.served.get(call) {
                flag.set_late();
            }
            work.cancel(state, call);
        }
        Event::CallAnswered(answer) => {
            let connection = answer.connection;
            let streams = enter_streams(shared, state, connection, &answer.slots);
            let IncomingResponse { call, status, metadata, charged, payload, .. } = answer;
            match waiting_slot(state, call) {
                Some(slot) => {
                    let payload = AnswerBytes::new(payload);
                    let answer = Answer { status, metadata, charged, payload, streams };
                    work.after.wake(slot.settle(Outcome::Answered(answer)));
                }
                None => {
                    // The caller was dropped: its streams are ended by their drop.
                    state.machine.consume_body(connection, payload.len());
                    work.after.discard(streams);
                }
            }
        }
        Event::CallEnded { charged, counted, .. } => {
            work.calls_ended = true;
            if charged != counted {
                work.remarks.push(Remark::CountedDifferently { charged, counted });
            }
        }
        Event::CallUnsent { call } => {
            work.calls_ended = true;
            if let Some(slot) = waiting_slot(state, call) {
                work.after.wake(slot.settle(Outcome::Unsent));
            }
        }
        Event::CallFailed { call } => {
            work.calls_ended = true;
            work.after.discard(state.announced.remove(&call).unwrap_or_default());
            match waiting_slot(state, call) {
                Some(slot) => work.after.wake(slot.settle(Outcome::Failed)),
                None => work.cancel(state, call),
            }
        }
        Event::CallCharged { call, charged } => {
            work.costs.extend(state.costs.remove(&call).map(|tell| (tell, charged)));
        }
        Event::PeerGoingAway { reason, .. } => {
            // Whoever is on the other side of a relay looks for another way. [relay.draining]
            for (relay, side) in state.relays.values() {
                work.relays.extend(relay.drain(side.other(), reason.clone()).into_iter().flatten());
            }
            work.leaving = Some(reason.clone());
            state.peer_going_away = Some(reason);
        }
        Event::Pong { rtt } => work.remarks.push(Remark::Pong(rtt)),
        Event::Payment { connection, message } => post(state, connection, PaymentEvent::Message(message)),
        Event::MoneyLow { connection } => post(state, connection, PaymentEvent::Low),
        Event::MoneyNeeded { connection, .. } => post(state, connection, PaymentEvent::Needed),
        Event::ReceivedMark { connection, received } => post(state, connection, PaymentEvent::Received(received)),
        stream_event => settle_stream(shared, state, stream_event, work),
    }
}

/// Where the caller of a call of ours waits, if it still does.
fn waiting_slot(state: &mut State, call: CallKey) -> Option<&mut CallSlot> {
    let slot = state.calls.remove(call)?;
    state.slots.get_mut(slot)
}

fn post(state: &mut State, connection: ConnectionId, event: PaymentEvent) {
    if let Some(mailbox) = state.mailboxes.get(&connection) {
        mailbox.post(event);
    }
}

/// Forgets streams of items that were dropped, and those in the items of these.
fn forget_unannounced(state: &mut State, work: &mut Work, mut dropped: Vec<StreamKey>) {
    while let Some(unannounced) = dropped.pop() {
        state.machine.forget_unannounced(unannounced);
        if let Some(core) = state.streams.remove(unannounced) {
            core.fail(StreamError::NotSent, &mut work.after);
            dropped.extend(core.handle_stopped(code::DROPPED, &mut work.after).1);
            work.after.bury(Some(core));
        }
    }
}

fn settle_stream(shared: &Arc<Shared>, state: &mut State, event: Event, work: &mut Work) {
    match event {
        Event::StreamItems { connection, stream, run, slots } => {
            let Some(core) = state.streams.get(stream).cloned() else {
                // Nobody will see the streams in it.
                return slots.iter().for_each(|slot| state.machine.discard_stream(slot.stream));
            };
            let streams = enter_streams(shared, state, connection, &slots);
            if let Err(violation) = core.handle_items(run, streams, &mut work.after) {
                state.machine.handle_violation(violation);
            }
            work.after.bury(Some(core));
        }
        Event::StreamEnded { stream, ending, held } => {
            let core = state.streams.remove(stream);
            state.machine.release_stream(core.as_ref().map_or(held, |core| core.hold(held)));
            if let Some(core) = core {
                core.handle_ending(ending, &mut work.after);
                work.after.bury(Some(core));
            }
        }
        Event::StreamStopped { stream, code } => {
            let Some(core) = state.streams.get(stream).cloned() else { return };
            let (ready, dropped) = core.handle_stopped(code, &mut work.after);
            forget_unannounced(state, work, dropped);
            if ready {
                state.machine.stream_ready(stream);
            }
        }
        Event::StreamExpired { stream } => {
            let Some(core) = state.streams.get(stream).cloned() else { return };
            core.fail(StreamError::DeadlineExceeded, &mut work.after);
            let (ready, dropped) = core.handle_stopped(code::DEADLINE, &mut work.after);
            forget_unannounced(state, work, dropped);
            if ready {
                state.machine.stream_ready(stream);
            }
        }
        Event::StreamCredit { stream, limit, .. } => {
            let Some(core) = state.streams.get(stream) else { return };
            match core.handle_credit(limit) {
                Ok(true) => state.machine.stream_ready(stream),
                Ok(false) => {}
                Err(violation) => state.machine.handle_violation(violation),
            }
        }
        Event::StreamFailed { stream, held } => {
            let core = state.streams.remove(stream);
            state.machine.release_stream(core.as_ref().map_or(held, |core| core.hold(held)));
            if let Some(core) = core {
                core.fail(StreamError::ConnectionEnded, &mut work.after);
                // Its call may live on, and would wait for streams in items that nobody sends any more.
                let (_, dropped) = core.handle_stopped(code::DROPPED, &mut work.after);
                forget_unannounced(state, work, dropped);
                work.after.bury(Some(core));
            }
        }
        _ => debug_assert!(false, "every other event is settled before"),
    }
}

/// An open for an unpaid service is answered at once; one for a paid service in a task of its own.
fn settle_open(
    shared: &Arc<Shared>,
    serving: &Serving,
    state: &mut State,
    work: &mut Work,
    connection: ConnectionId,
    request: OpenDetails,
) {
    let OpenDetails { service, .. } = &request;
    if let Some(acceptor) = serving.services.acceptor(service) {
        state.connections.insert(connection, ConnectionCell::new(shared, None));
        let (shared, own_limits, peer) = (shared.clone(), serving.limits, shared.peer().clone());
        let open = IncomingOpen { shared, connection, request, own_limits, peer, answered: false };
        return work.incoming.push((acceptor.clone(), open));
    }
    let Some(entry) = serving.services.get(service) else {
        let reason = Reason::new(code::UNKNOWN_SERVICE, format!("no service '{service}' is served here"));
        if shared.is_watched() {
            work.happened.push(Happened::Refused(connection, reason.clone()));
        }
        state.machine.close(connection, reason);
        return;
    };
    let cell = ConnectionCell::new(shared, Some(entry.clone()));
    state.connections.insert(connection, cell.clone());
    match &entry.payee {
        None => {
            // Fails if the opener gave up, or broke a rule, with a frame that came together with the open.
            let accepted = state.machine.accept(connection, serving.limits, accept_metadata(entry.schema), None);
            if accepted.is_ok() && shared.is_watched() {
                work.happened.push(Happened::Opened(connection, Some(request.service)));
            }
        }
        Some(payee) => work.opens.push(OpenRequest {
            shared: shared.clone(),
            payee: payee.clone(),
            cell,
            connection,
            service: request.service,
            credential: request.credential,
            limits: serving.limits,
        }),
    }
}

/// A frame of a relayed connection goes to the other side.
fn settle_relayed(state: &mut State, work: &mut Work, connection: ConnectionId, frame: &Bytes) {
    // One that is not there any more is being closed.
    let Some((relay, side)) = state.relays.get(&connection) else { return };
    match relay.handle_frame(*side, frame) {
        Ok(told) => work.relays.extend(told.into_iter().flatten()),
        Err(RelayError::Violation(violation)) => state.machine.handle_violation(violation),
        Err(error) => {
            let code = if error == RelayError::OutOfMemory { code::AT_CAPACITY } else { code::LIMIT };
            state.machine.close(connection, Reason::new(code, error.to_string()));
        }
    }
}

fn answer_open(state: &mut State, work: &mut Work, connection: ConnectionId, answer: OpenAnswer) {
    if let Some(open) = state.opens.remove(&connection) {
        work.answers.push((open, answer));
    }
}

fn settle_call(shared: &Arc<Shared>, state: &mut State, work: &mut Work, call: Call) {
    // Those of a call that waited for its price are there, perhaps with items.
    let announced = state.announced.remove(&call.call);
    let streams = announced.unwrap_or_else(|| enter_streams(shared, state, call.connection, &call.slots));
    let cell = state.connections.get(&call.connection).filter(|cell| cell.service.is_some()).cloned();
    let Some(cell) = cell else {
        // A connection on which this side serves nothing.
        work.after.discard(streams);
        let spec = ResponseSpec {
            status: Status::UnknownMethod,
            metadata: Metadata::new(),
            payload: Bytes::new(),
            slots: &[],
            cost: None,
            paid_before: Amount::ZERO,
        };
        // Fails if the connection was closed by a frame that came together with the call.
        let _ended = state.machine.respond(call.call, spec);
        state.machine.consume_body(call.connection, call.payload.len());
        return;
    };
    // Who pays and names its call may make it again: what it has cost is to be known then.
    let payee = cell.service.as_ref().and_then(|service| service.payee.as_ref());
    let is_named =
        payee.is_some_and(|payee| payee.is_priced(call.method)) && call.metadata.value(IDEMPOTENCY_KEY).is_some();
    let named = is_named.then(|| NamedCall { shared: shared.clone(), call: call.call });
    let context = CallContext {
        cell,
        connection: call.connection,
        method: MethodId(call.method),
        metadata: call.metadata,
        deadline: call.deadline.and_then(|left| Instant::now().checked_add(left)),
        token: OnceLock::new(),
        reservation: None,
        named,
    };
    let incoming = IncomingCall { context, payload: call.payload, streams };
    work.calls.push(PendingCall { call: call.call, incoming, cancelled: false });
}

/// Creates this side's end of the streams that the peer announced.
fn enter_streams(
    shared: &Arc<Shared>,
    state: &mut State,
    connection: ConnectionId,
    slots: &[InboundSlot],
) -> Vec<InboundStream> {
    if slots.is_empty() {
        return Vec::new();
    }
    let Some((own, peer)) = state.machine.limits(connection).map(|(own, peer)| (*own, *peer)) else {
        return Vec::new();
    };
    let mut enter = |slot: &InboundSlot| {
        let core = StreamCore::inbound(shared, slot.stream, slot.flow, (&own, &peer));
        state.streams.insert(slot.stream, core.clone());
        InboundStream::new(core, slot.stream, slot.flow)
    };
    slots.iter().map(&mut enter).collect()
}

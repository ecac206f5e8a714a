//! One peer without locks: the session machine and the ends of all its streams.
//!
//! A runtime keeps [`Machine`] and each [`SendStream`] or [`RecvStream`] behind locks of their own. [`Peer`] joins the
//! same machines in one value, and does by the way what every runtime must do: it creates the end of a stream before
//! anything is applied to it, gives items and credit to the ends, answers Stop with Reset, passes grants on, and ends
//! the streams of slots that nobody will see. It takes commands, `(lane, frame)` and the time; it yields
//! [`PeerEvent`]s, frames and the next deadline.
//!
//! Invariant: a stream in the machine's table has its end here, unless it was discarded unseen.

use std::collections::VecDeque;

use bytes::Bytes;
use rustc_hash::FxHashMap;
use slotmap::SecondaryMap;

use crate::error::code;
use crate::frame::{Lane, Transmit};
use crate::id::ConnectionId;
use crate::message::Flow;
use crate::session::{
    CallKey, CallSpec, CommandError, Config, Event, InboundSlot, Machine, ResponseSpec, StreamSource,
};
use crate::stream::{Ending, ItemRun, RecvStream, SendStream, StreamKey, Taken, write_item};
use crate::time::Time;

/// What happened at a [`Peer`].
#[derive(Debug)]
#[non_exhaustive]
pub enum PeerEvent {
    /// Something of the session. Never `StreamItems`, `StreamCredit` or `StreamsAnnounced`, which end here; after
    /// `StreamStopped` and `StreamExpired` the Reset is on its way already.
    Session(Event),
    /// [`Peer::read`] has something new for this stream: an item, or its end.
    Readable(StreamKey),
}

/// What [`Peer::read`] found.
#[derive(Debug, PartialEq, Eq)]
pub enum Read {
    /// The next item, with the streams of its slots.
    Item(Bytes, Vec<InboundSlot>),
    /// Nothing yet.
    Pending,
    /// All items were read. Said once; the stream is forgotten then.
    Ended(Ending),
    /// The stream is not there (any more), or was stopped.
    Closed,
}

/// An item that cannot be sent.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PushError {
    /// The stream has ended, or is not one that this side sends.
    #[error("the stream has ended")]
    Closed,
    /// Above what the peer receives.
    #[error("an item of {bytes} bytes is above the peer's limit of {limit} bytes")]
    TooLarge {
        /// The item, in bytes.
        bytes: usize,
        /// The peer's limit, in bytes.
        limit: u32,
    },
    /// The streams of its slots cannot be opened.
    #[error(transparent)]
    Slots(#[from] CommandError),
}

#[derive(Debug)]
struct Sender {
    stream: SendStream,
    max_item: u32,
}

#[derive(Debug)]
struct Receiver {
    stream: RecvStream,
    /// The run that is being read. One whose item has slots is read at once.
    run: Option<ItemRun>,
    connection: ConnectionId,
    /// What its unread items count once it has ended.
    held: u64,
}

/// The sending ends, as the machine borrows them.
#[derive(Debug, Default)]
struct Senders(SecondaryMap<StreamKey, Sender>);

impl StreamSource for Senders {
    fn take(&mut self, stream: StreamKey, max_bytes: usize, affordable: &dyn Fn(u64, u64) -> bool) -> Taken {
        let Some(sender) = self.0.get_mut(stream) else { return Taken::Empty };
        let taken = sender.stream.take(max_bytes, affordable);
        if matches!(taken, Taken::End | Taken::Reset(_)) {
            self.0.remove(stream);
        }
        taken
    }
}

/// One peer; see the module's documentation.
#[derive(Debug)]
pub struct Peer {
    machine: Machine,
    senders: Senders,
    /// Not a map by slot: what was not read yet outlives the machine's entry, and the slot may be used again.
    receivers: FxHashMap<StreamKey, Receiver>,
    events: VecDeque<PeerEvent>,
    /// The latest time that was heard of.
    now: Time,
}

impl Peer {
    /// The side that speaks first.
    pub fn initiator(config: Config, now: Time) -> Self {
        Peer::new(Machine::initiator(config, now))
    }

    /// The side that answers.
    pub fn responder(config: Config, now: Time) -> Self {
        Peer::new(Machine::responder(config, now))
    }

    fn new(machine: Machine) -> Self {
        let (senders, receivers, events) = (Senders::default(), FxHashMap::default(), VecDeque::new());
        Peer { machine, senders, receivers, events, now: Time::ZERO }
    }

    /// The session's state.
    pub const fn session(&self) -> &Machine {
        &self.machine
    }

    /// For the commands that neither create nor end a stream: open, accept, reject, close, go away, windows, money.
    /// Those that do have methods here.
    pub const fn session_mut(&mut self) -> &mut Machine {
        &mut self.machine
    }

    /// Takes a frame in that came on `lane`.
    pub fn handle_frame(&mut self, now: Time, lane: Lane, frame: Bytes) {
        self.now = self.now.max(now);
        self.machine.handle_frame(now, lane, frame);
        self.pump();
    }

    /// The time is `now`: what is due happens.
    pub fn handle_timeout(&mut self, now: Time) {
        self.now = self.now.max(now);
        self.machine.handle_timeout(now);
        self.pump();
    }

    /// When [`handle_timeout`](Self::handle_timeout) must be called, at the latest.
    pub fn poll_timeout(&self) -> Option<Time> {
        self.machine.poll_timeout()
    }

    /// The next frame to write.
    pub fn poll_transmit(&mut self, now: Time) -> Option<Transmit> {
        self.pump();
        // Lanes are only numbers here: nothing has to be done at their ends.
        while self.machine.poll_ended_lane().is_some() {}
        self.machine.poll_transmit(now, &mut self.senders)
    }

    /// The next event.
    pub fn poll_event(&mut self) -> Option<PeerEvent> {
        self.pump();
        self.events.pop_front()
    }

    /// Ends of streams that are held here: sending ones, and receiving ones with what was not read yet.
    pub fn stream_ends(&self) -> (usize, usize) {
        (self.senders.0.len(), self.receivers.len())
    }

    /// Makes a call; see [`Machine::start_call`].
    ///
    /// # Errors
    /// Those of [`Machine::start_call`].
    pub fn start_call(&mut self, spec: CallSpec<'_>) -> Result<(CallKey, Vec<StreamKey>), CommandError> {
        let (connection, flows) = (spec.connection, spec.slots);
        let (call, keys) = self.machine.start_call(spec)?;
        self.create_ends(connection, &keys, flows);
        Ok((call, keys))
    }

    /// Answers a call; see [`Machine::respond`].
    ///
    /// # Errors
    /// Those of [`Machine::respond`].
    pub fn respond(&mut self, call: CallKey, spec: ResponseSpec<'_>) -> Result<Vec<StreamKey>, CommandError> {
        let connection = self.machine.call_connection(call).ok_or(CommandError::NoCall)?;
        let flows = spec.slots;
        let keys = self.machine.respond(call, spec)?;
        self.create_ends(connection, &keys, flows);
        Ok(keys)
    }

    /// Cancels a call. Its streams must be ended too: each side ends its own half of them.
    pub fn cancel_call(&mut self, call: CallKey) {
        self.machine.cancel_call(call);
        self.pump();
    }

    /// Sends an item.
    ///
    /// # Errors
    /// When the stream has ended, or the item is above the peer's limit.
    pub fn push(&mut self, stream: StreamKey, item: &[u8]) -> Result<(), PushError> {
        let sender = self.open_sender(stream, item)?;
        if sender.stream.push(item) {
            self.machine.stream_ready(stream);
        }
        Ok(())
    }

    /// Sends an item that carries streams, whose keys come in the order of `slots`.
    ///
    /// # Errors
    /// When the stream has ended, the item is above the peer's limit, or its streams cannot be opened.
    pub fn push_with(&mut self, stream: StreamKey, item: &[u8], slots: &[Flow]) -> Result<Vec<StreamKey>, PushError> {
        self.open_sender(stream, item)?;
        let (connection, keys) = self.machine.create_item_streams(stream, slots)?;
        self.create_ends(connection, &keys, slots);
        let mut framed = Vec::new();
        write_item(&mut framed, item);
        let sender = self.senders.0.get_mut(stream).ok_or(PushError::Closed)?;
        if sender.stream.push_framed(Bytes::from(framed), keys.clone()) {
            self.machine.stream_ready(stream);
        }
        Ok(keys)
    }

    fn open_sender(&mut self, stream: StreamKey, item: &[u8]) -> Result<&mut Sender, PushError> {
        let sender = self.senders.0.get_mut(stream).filter(|sender| sender.stream.is_open());
        let sender = sender.ok_or(PushError::Closed)?;
        match item.len() > sender.max_item as usize {
            true => Err(PushError::TooLarge { bytes: item.len(), limit: sender.max_item }),
            false => Ok(sender),
        }
    }

    /// Credit that waits in a stream's outbox, or `None` if the stream was taken to its end.
    pub fn buffered(&self, stream: StreamKey) -> Option<u64> {
        self.senders.0.get(stream).map(|sender| sender.stream.buffered())
    }

    /// Whether a sending stream has something that could be written now: items within its credit, its end, or a reset.
    pub fn is_ready(&self, stream: StreamKey) -> bool {
        self.senders.0.get(stream).is_some_and(|sender| sender.stream.is_ready())
    }

    /// No more items will be sent.
    pub fn finish(&mut self, stream: StreamKey) {
        if self.senders.0.get_mut(stream).is_some_and(|sender| sender.stream.finish()) {
            self.machine.stream_ready(stream);
        }
    }

    /// Gives a sending stream up.
    pub fn reset(&mut self, stream: StreamKey, code: u32) {
        let Some(sender) = self.senders.0.get_mut(stream) else { return };
        let (tell, dropped) = sender.stream.reset(code);
        if tell {
            self.machine.stream_ready(stream);
        }
        self.forget_unannounced(dropped);
    }

    /// The deadline of its call has passed: nothing more of it is sent or read.
    fn expire(&mut self, stream: StreamKey) {
        self.reset(stream, crate::error::code::DEADLINE);
        let unread = self.receivers.get_mut(&stream).map(|receiver| receiver.stream.stop().1);
        self.discard(unread.unwrap_or_default());
    }

    /// Reads the next item of a receiving stream.
    pub fn read(&mut self, stream: StreamKey) -> Read {
        let Some(receiver) = self.receivers.get_mut(&stream).filter(|receiver| !receiver.stream.is_stopped()) else {
            return Read::Closed;
        };
        let run = receiver.run.take().map(|run| (run, Vec::new())).or_else(|| receiver.stream.take_run());
        let Some((mut run, slots)) = run else {
            let Some(ending) = receiver.stream.ending() else { return Read::Pending };
            self.forget_receiver(stream);
            return Read::Ended(ending);
        };
        let before = run.credit();
        let item = run.next_item().unwrap_or_default();
        let grant = receiver.stream.consume(before.saturating_sub(run.credit()), 1);
        if run.items() > 0 {
            receiver.run = Some(run);
        }
        if let Some(grant) = grant
            && let Some(wider) = self.machine.grant(self.now, stream, grant)
        {
            receiver.stream.widen(wider);
        }
        let flow = |key| if self.senders.0.contains_key(key) { Flow::ToPeer } else { Flow::FromPeer };
        Read::Item(item, slots.into_iter().map(|stream| InboundSlot { stream, flow: flow(stream) }).collect())
    }

    /// The receiver of a stream wants no more.
    pub fn stop(&mut self, stream: StreamKey, code: u32) {
        let Some(receiver) = self.receivers.get_mut(&stream) else { return };
        let (send, unseen) = receiver.stream.stop();
        receiver.run = None;
        if receiver.stream.has_ended() {
            self.forget_receiver(stream);
        }
        if send {
            self.machine.stop_stream(stream, code);
        }
        self.discard(unseen);
    }

    /// What it held is nobody's any more.
    fn forget_receiver(&mut self, stream: StreamKey) -> Option<Receiver> {
        let receiver = self.receivers.remove(&stream)?;
        self.machine.release_stream(receiver.held);
        Some(receiver)
    }

    /// Applies what the machine has to say to the ends of streams, in order.
    fn pump(&mut self) {
        while let Some(event) = self.machine.poll_event() {
            self.apply(event);
        }
    }

    fn apply(&mut self, event: Event) {
        match &event {
            Event::CallRequested(call) => self.create_inbound(call.connection, &call.slots),
            Event::CallAnswered(answer) => self.create_inbound(answer.connection, &answer.slots),
            &Event::StreamEnded { stream, ending, held } => match self.receivers.get_mut(&stream) {
                Some(receiver) => {
                    receiver.stream.handle_ending(ending);
                    receiver.held = held;
                    self.events.push_back(PeerEvent::Readable(stream));
                    if receiver.stream.is_stopped() {
                        self.forget_receiver(stream);
                    }
                }
                None => self.machine.release_stream(held),
            },
            &Event::StreamStopped { stream, code } => self.reset(stream, code),
            &Event::StreamExpired { stream } => self.expire(stream),
            &Event::StreamFailed { stream, held } => {
                self.machine.release_stream(held);
                // Its call may live on, and would wait for streams in items that nobody sends any more.
                self.reset(stream, crate::error::code::DROPPED);
                self.senders.0.remove(stream);
                let receiver = self.forget_receiver(stream);
                // Streams in its unread items may have ended before, with items that nobody will read.
                self.discard(receiver.map_or(Vec::new(), |mut receiver| receiver.stream.stop().1));
            }
            _ => {}
        }
        match event {
            Event::StreamsAnnounced { connection, slots, .. } => self.create_inbound(connection, &slots),
            Event::StreamItems { stream, run, slots, .. } => self.receive(stream, run, &slots),
            Event::StreamCredit { stream, limit, .. } => {
                let granted = self.senders.0.get_mut(stream).map(|sender| sender.stream.handle_credit(limit));
                match granted {
                    Some(Ok(true)) => self.machine.stream_ready(stream),
                    Some(Err(violation)) => self.machine.handle_violation(violation),
                    Some(Ok(false)) | None => {}
                }
            }
            event => self.events.push_back(PeerEvent::Session(event)),
        }
    }

    fn receive(&mut self, stream: StreamKey, run: ItemRun, slots: &[InboundSlot]) {
        let keys = slots.iter().map(|slot| slot.stream).collect();
        let Some(receiver) = self.receivers.get(&stream) else { return self.discard(keys) };
        let connection = receiver.connection;
        self.create_inbound(connection, slots);
        let Some(receiver) = self.receivers.get_mut(&stream) else { return };
        match receiver.stream.handle_items(run, keys) {
            Ok(unseen) if receiver.stream.is_stopped() => self.discard(unseen),
            Ok(_) => self.events.push_back(PeerEvent::Readable(stream)),
            Err(violation) => self.machine.handle_violation(violation),
        }
    }

    fn create_ends(&mut self, connection: ConnectionId, keys: &[StreamKey], flows: &[Flow]) {
        let slots = keys.iter().zip(flows).map(|(&stream, &flow)| InboundSlot { stream, flow });
        self.create_inbound(connection, &slots.collect::<Vec<_>>());
    }

    /// Creates the ends of streams, unless they are there already.
    fn create_inbound(&mut self, connection: ConnectionId, slots: &[InboundSlot]) {
        let Some((own, peer)) = self.machine.limits(connection) else { return };
        let (window, limit, max_item) = (own.stream_window, peer.stream_window, peer.max_item);
        for slot in slots {
            // One that has ended already has no end to be created, unless what it brought is to be read still.
            if self.receivers.contains_key(&slot.stream) || self.machine.stream_connection(slot.stream).is_none() {
                continue;
            }
            match slot.flow {
                Flow::ToPeer if !self.senders.0.contains_key(slot.stream) => {
                    let stream = SendStream::new(u64::from(limit));
                    self.senders.0.insert(slot.stream, Sender { stream, max_item });
                }
                Flow::ToPeer => {}
                Flow::FromPeer => {
                    let stream = RecvStream::new(u64::from(window));
                    let receiver = Receiver { stream, run: None, connection, held: 0 };
                    self.receivers.insert(slot.stream, receiver);
                }
            }
        }
    }

    /// Ends streams that the peer announced and nobody here will see, and those in their unread items.
    fn discard(&mut self, mut streams: Vec<StreamKey>) {
        while let Some(key) = streams.pop() {
            if let Some(mut receiver) = self.forget_receiver(key) {
                streams.extend(receiver.stream.stop().1);
            }
            if let Some(mut sender) = self.senders.0.remove(key) {
                let (_, dropped) = sender.stream.reset(code::CANCELLED);
                self.forget_unannounced(dropped);
            }
            self.machine.discard_stream(key);
        }
    }

    /// Forgets streams of slots of items that were dropped before they were sent.
    fn forget_unannounced(&mut self, mut streams: Vec<StreamKey>) {
        while let Some(key) = streams.pop() {
            self.forget_receiver(key);
            if let Some(mut sender) = self.senders.0.remove(key) {
                streams.extend(sender.stream.reset(code::CANCELLED).1);
            }
            self.machine.forget_unannounced(key);
        }
    }
}

//! What two applications do with a session, at random, and what they know of each other.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tollway_protocol::error::{Reason, code};
use tollway_protocol::id::ConnectionId;
use tollway_protocol::limits::{ConnectionLimits, SessionLimits};
use tollway_protocol::memory::MemoryLimits;
use tollway_protocol::message::{Flow, Status};
use tollway_protocol::metadata::Metadata;
use tollway_protocol::payment::{Amount, Price};
use tollway_protocol::peer::Peer;
use tollway_protocol::session::{CallKey, CallSpec, Config, InboundSlot, LaneMode, MoneyCount};
use tollway_protocol::session::{PayeeMoney, PayerMoney, PriceTable, ResponseSpec};
use tollway_protocol::stream::StreamKey;
use tollway_protocol::time::Time;

use crate::choices::Choices;
use crate::net::{MAX_FRAME, Net};
use crate::referee::MAX_WINDOW;
use crate::relay::RelayNode;

pub(crate) const MAX_ITEM: usize = 600;
/// Credit in an inbox: the window and one largest item.
pub(crate) const STREAM_WINDOW: u32 = 700;
/// Bytes of an item that say which it is: the tag of its stream and its number there.
pub(crate) const ITEM_MARK: usize = 16;

/// What a call may cost whose answer states it.
const MAX_COST: u128 = 30;

/// What a stream's sender has done, by the tag that its items begin with.
#[derive(Debug, Default)]
pub(crate) struct Sent {
    pub(crate) items: u64,
    pub(crate) finished: bool,
}

/// A paid connection, by the number in its service's name.
#[derive(Debug, Default)]
pub(crate) struct Book {
    pub(crate) payer: Option<(usize, ConnectionId)>,
    pub(crate) payee: Option<(usize, ConnectionId)>,
    pub(crate) leased: u128,
    /// The payer grants nothing beyond a count that is not durable yet.
    pub(crate) is_held: bool,
    /// The counts of the payer and of the payee when the connection ended.
    pub(crate) last: [Option<MoneyCount>; 2],
    /// Payment messages of the payer and of the payee: sent, and come.
    pub(crate) messages: [(u64, u64); 2],
}

/// What one side knows of its connections, calls and streams.
#[derive(Debug, Default)]
pub(crate) struct Side {
    pub(crate) connections: Vec<ConnectionId>,
    /// Opens to be answered, with their books.
    pub(crate) asked: Vec<(ConnectionId, Option<u64>)>,
    pub(crate) calls: Vec<CallKey>,
    pub(crate) served: Vec<CallKey>,
    /// Streams to send on, with their tag.
    pub(crate) sending: Vec<(StreamKey, u64)>,
    /// Streams to read, with the tag (known from the first item) and the number of items that were read.
    pub(crate) reading: BTreeMap<StreamKey, (Option<u64>, u64)>,
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) net: Net,
    pub(crate) sides: [Side; 2],
    pub(crate) sent: BTreeMap<u64, Sent>,
    pub(crate) books: BTreeMap<u64, Book>,
    /// The memory budgets of both sides.
    pub(crate) memory: [u64; 2],
    /// A session was closed or cut on purpose.
    pub(crate) is_broken: bool,
    next_tag: u64,
}

pub(crate) fn prices() -> Arc<PriceTable> {
    let price = |call, item, rate: &str| Price {
        call: Amount::new(call),
        item: Amount::new(item),
        bytes_out: Some(rate.parse().unwrap()),
        bytes_in: None,
        max: None,
    };
    let stated = Price { max: Some(Amount::new(MAX_COST)), ..price(5, 1, "1/100B") };
    let methods = [(1, price(10, 0, "0/B")), (2, price(0, 2, "1/100B")), (3, price(7, 1, "3/KiB")), (4, stated)];
    Arc::new(methods.into_iter().collect())
}

fn config(choices: &mut Choices, lanes: LaneMode) -> Config {
    let limits = SessionLimits {
        max_frame: MAX_FRAME,
        max_connections: 1 + choices.below(6) as u32,
        max_pending_opens: 1 + choices.below(3) as u32,
    };
    // Often too little: then calls are refused and streams stopped, and everything else stays true.
    let session = if choices.chance(50) { 256 << 20 } else { choices.below(8_000) as u64 };
    let (max_stream_window, max_body_window) = (MAX_WINDOW, MAX_WINDOW);
    let memory = MemoryLimits { session, max_stream_window, max_body_window, ..Default::default() };
    Config { limits, memory, lanes, ..Config::default() }
}

fn limits(choices: &mut Choices) -> ConnectionLimits {
    ConnectionLimits {
        max_item: MAX_ITEM as u32,
        max_body: 300,
        window: 300 + choices.below(500) as u32,
        stream_window: 1 + choices.below(STREAM_WINDOW as usize) as u32,
        max_calls: 1 + choices.below(4) as u32,
        max_streams: choices.below(12) as u32,
    }
}

fn lane_mode(choices: &mut Choices) -> LaneMode {
    if choices.chance(50) { LaneMode::One } else { LaneMode::PerConnection }
}

impl World {
    pub(crate) fn new(mut choices: Choices) -> Self {
        let lanes = lane_mode(&mut choices);
        let (a, b) = (config(&mut choices, lanes), config(&mut choices, lanes));
        let memory = [a.memory.session, b.memory.session];
        let relay = choices.chance(40).then(|| {
            let (answering, opening) = (config(&mut choices, lanes), config(&mut choices, lanes));
            // Sometimes it takes less than either end, and cuts what they grant each other.
            let own =
                if choices.chance(50) { ConnectionLimits { max_item: 600, ..limits(&mut choices) } } else { wide() };
            RelayNode::new(answering, opening, own)
        });
        let peers = [Peer::initiator(a, Time::ZERO), Peer::responder(b, Time::ZERO)];
        let mut net = Net::open(peers, relay, lanes, choices);
        let piece = [1, 5, 64, 1_000, 1 << 20][net.choices.below(5)];
        for end in net.ends() {
            net.pipes[end].capacity = 1 + net.choices.below(3000);
            net.pipes[end].piece = piece;
        }
        let (sides, sent, books) = Default::default();
        World { net, sides, sent, books, memory, is_broken: false, next_tag: 1 }
    }

    fn flows(&mut self) -> Vec<Flow> {
        let count = if self.net.choices.chance(50) { 0 } else { self.net.choices.below(3) };
        (0..count).map(|_| if self.net.choices.chance(50) { Flow::ToPeer } else { Flow::FromPeer }).collect()
    }

    fn payload(&mut self) -> Bytes {
        vec![0; self.net.choices.below(301)].into()
    }

    pub(crate) fn own(&mut self, side: usize, stream: StreamKey, flow: Flow) {
        match flow {
            Flow::ToPeer => {
                self.sent.insert(self.next_tag, Sent::default());
                self.sides[side].sending.push((stream, self.next_tag));
                self.next_tag += 1;
            }
            Flow::FromPeer => _ = self.sides[side].reading.insert(stream, (None, 0)),
        }
    }

    pub(crate) fn own_inbound(&mut self, side: usize, slots: &[InboundSlot]) {
        slots.iter().for_each(|slot| self.own(side, slot.stream, slot.flow));
    }

    fn own_all(&mut self, side: usize, keys: &[StreamKey], flows: &[Flow]) {
        keys.iter().zip(flows).for_each(|(&key, &flow)| self.own(side, key, flow));
    }

    /// A random element's place.
    fn pick(&mut self, length: usize) -> Option<usize> {
        (length > 0).then(|| self.net.choices.below(length))
    }

    /// One thing that an application does, or that happens to a conduit.
    pub(crate) fn command(&mut self, side: usize) {
        match self.net.choices.below(100) {
            0..8 => self.open(side),
            8..17 => self.answer_open(side),
            17..29 => self.call(side),
            29..41 => self.respond(side),
            41..61 => self.push(side),
            61..67 => self.end_sending(side),
            67..82 => self.read_some(side),
            82..84 => self.stop(side),
            84..87 => self.cancel(side),
            87..94 => self.money(side),
            94..95 => self.close(side),
            95..97 => self.wait(),
            97..98 => self.upheaval(side),
            _ => {
                let end = self.net.choices.below(self.net.pipes.len());
                self.net.pipes[end].stalled ^= true;
            }
        }
    }

    fn open(&mut self, side: usize) {
        let (limits, now) = (limits(&mut self.net.choices), self.net.now);
        let number = self.books.len() as u64;
        let is_paid = self.net.choices.chance(50);
        let mark = Amount::new(self.net.choices.below(100) as u128);
        let is_held = self.net.choices.chance(30);
        let hold = if is_held { Amount::new(self.net.choices.below(40) as u128) } else { Amount::MAX };
        let paid = is_paid
            .then(|| (Bytes::from_static(b"c"), PayerMoney { prices: prices(), received: Amount::ZERO, mark, hold }));
        let service = if is_paid { number.to_string() } else { "free".into() };
        let session = self.net.peers[side].session_mut();
        if let Ok(id) = session.open(now, &service, limits, Metadata::new(), paid) {
            self.sides[side].connections.push(id);
            if is_paid {
                self.books.insert(number, Book { payer: Some((side, id)), is_held, ..Book::default() });
            }
        }
    }

    pub(crate) fn answer_open(&mut self, side: usize) {
        let Some(at) = self.pick(self.sides[side].asked.len()) else { return };
        let (id, book) = self.sides[side].asked.swap_remove(at);
        if self.net.choices.chance(20) {
            _ = self.net.peers[side].session_mut().reject(id, Reason::none(), Metadata::new(), Bytes::new());
            return;
        }
        let leased = self.net.choices.below(60) as u128;
        let low = Amount::new(5);
        let money = PayeeMoney { prices: prices(), spent: Amount::ZERO, leased: Amount::new(leased), low };
        let limits = limits(&mut self.net.choices);
        let paid = book.map(|_| (Bytes::from_static(b"r"), money));
        if self.net.peers[side].session_mut().accept(id, limits, Metadata::new(), paid).is_ok() {
            self.sides[side].connections.push(id);
            if let Some(book) = book.and_then(|number| self.books.get_mut(&number)) {
                (book.payee, book.leased) = (Some((side, id)), leased);
            }
        }
    }

    fn call(&mut self, side: usize) {
        let Some(at) = self.pick(self.sides[side].connections.len()) else { return };
        let connection = self.sides[side].connections[at];
        if self.net.peers[side].session().open_calls(connection) > 12 {
            return;
        }
        let (method, flows, payload) = (self.net.choices.below(5) as u64, self.flows(), self.payload());
        let millis = self.net.choices.below(5_000) as u64;
        let deadline = self.net.choices.chance(20).then(|| self.net.now.after(Duration::from_millis(millis)));
        let spec = CallSpec { connection, method, deadline, metadata: Metadata::new(), payload, slots: &flows };
        if let Ok((call, keys)) = self.net.peers[side].start_call(spec) {
            self.sides[side].calls.push(call);
            self.own_all(side, &keys, &flows);
        }
    }

    pub(crate) fn respond(&mut self, side: usize) {
        let Some(at) = self.pick(self.sides[side].served.len()) else { return };
        let call = self.sides[side].served[at];
        let status =
            [Status::Ok, Status::AppError, Status::HandlerFailed, Status::Cancelled][self.net.choices.below(4)];
        let (payload, flows) = (self.payload(), self.flows());
        let units = self.net.choices.below(MAX_COST as usize + 1) as u128;
        let cost = self.net.choices.chance(50).then_some(Amount::new(units));
        let metadata = Metadata::new();
        // Above what the price reserves it is refused, and the call is answered another time.
        let spec = ResponseSpec { status, metadata, payload, slots: &flows, cost, paid_before: Amount::ZERO };
        if let Ok(keys) = self.net.peers[side].respond(call, spec) {
            self.sides[side].served.swap_remove(at);
            self.own_all(side, &keys, &flows);
        }
    }

    fn push(&mut self, side: usize) {
        let Some(at) = self.pick(self.sides[side].sending.len()) else { return };
        let (stream, tag) = self.sides[side].sending[at];
        if self.net.peers[side].buffered(stream).is_some_and(|bytes| bytes > 5_000) {
            return;
        }
        for _ in 0..1 + self.net.choices.below(6) {
            let number = self.sent[&tag].items;
            let mut item = tag.to_le_bytes().to_vec();
            item.extend(number.to_le_bytes());
            let most = if self.net.choices.chance(90) { 30 } else { MAX_ITEM - ITEM_MARK };
            let filling = self.net.choices.below(most);
            item.resize(item.len() + filling, number as u8);
            let flows = if self.net.choices.chance(10) { self.flows() } else { vec![] };
            let pushed = match flows.is_empty() {
                true => self.net.peers[side].push(stream, &item).map(|()| vec![]),
                false => self.net.peers[side].push_with(stream, &item, &flows),
            };
            if let Ok(keys) = pushed {
                self.sent.get_mut(&tag).unwrap().items += 1;
                self.own_all(side, &keys, &flows);
            }
        }
    }

    pub(crate) fn end_sending(&mut self, side: usize) {
        let Some(at) = self.pick(self.sides[side].sending.len()) else { return };
        let (stream, tag) = self.sides[side].sending.swap_remove(at);
        if self.net.choices.chance(70) {
            self.sent.get_mut(&tag).unwrap().finished = true;
            self.net.peers[side].finish(stream);
        } else {
            self.net.peers[side].reset(stream, 5);
        }
    }

    fn read_some(&mut self, side: usize) {
        let keys: Vec<_> = self.sides[side].reading.keys().copied().collect();
        for key in keys {
            if self.net.choices.chance(60) {
                let most = self.net.choices.below(8);
                self.read(side, key, most);
            }
        }
    }

    fn stop(&mut self, side: usize) {
        let Some(at) = self.pick(self.sides[side].reading.len()) else { return };
        let key = *self.sides[side].reading.keys().nth(at).unwrap();
        self.sides[side].reading.remove(&key);
        self.net.peers[side].stop(key, 6);
    }

    fn cancel(&mut self, side: usize) {
        let Some(at) = self.pick(self.sides[side].calls.len()) else { return };
        let call = self.sides[side].calls[at];
        self.net.peers[side].cancel_call(call);
    }

    /// Something about the money of a paid connection.
    fn money(&mut self, side: usize) {
        let Some(number) = self.pick(self.books.len()).map(|at| at as u64) else { return };
        let amount = self.net.choices.below(80) as u128;
        match self.net.choices.below(20) {
            0 => {
                // The payer declines: what cannot be paid ends, free of charge.
                if let Some((side, id)) = self.books[&number].payee {
                    self.net.peers[side].session_mut().fail_unpaid(id);
                }
            }
            1..4 => self.free_grants(number, Amount::new(amount)),
            4..8 => {
                if let Some((side, id)) = self.books[&number].payer {
                    self.net.peers[side].session_mut().set_received_mark(id, Amount::new(amount));
                }
            }
            8..12 => self.send_payment(side, number),
            _ => self.raise_by(number, amount),
        }
    }

    /// The payer's count is durable up to here, or to the end.
    pub(crate) fn free_grants(&mut self, number: u64, hold: Amount) {
        let Some(book) = self.books.get_mut(&number) else { return };
        book.is_held &= hold != Amount::MAX;
        if let Some((side, id)) = book.payer {
            self.net.peers[side].session_mut().raise_received_hold(id, hold);
        }
    }

    fn send_payment(&mut self, side: usize, number: u64) {
        let Some(book) = self.books.get_mut(&number) else { return };
        for (who, party) in [book.payer, book.payee].into_iter().enumerate() {
            let Some((_, id)) = party.filter(|(of, _)| *of == side) else { continue };
            let message = [number.to_le_bytes(), book.messages[who].0.to_le_bytes()].concat();
            if self.net.peers[side].session_mut().send_payment(id, message.into()).is_ok() {
                book.messages[who].0 += 1;
            }
        }
    }

    pub(crate) fn raise_by(&mut self, number: u64, more: u128) {
        let Some(book) = self.books.get_mut(&number) else { return };
        let Some((side, id)) = book.payee else { return };
        book.leased += more;
        self.net.peers[side].session_mut().raise_money(id, Amount::new(book.leased));
    }

    fn close(&mut self, side: usize) {
        let Some(at) = self.pick(self.sides[side].connections.len()) else { return };
        let id = self.sides[side].connections.swap_remove(at);
        self.net.peers[side].session_mut().close(id, Reason::none());
    }

    /// Time passes: a little with all standing still, or much while everything moves that can.
    fn wait(&mut self) {
        let millis = self.net.choices.below(1_000) as u64;
        // A peer that stands still for longer than keepalive waits has gone, which is not what is tried here.
        let moves = self.net.pipes.iter().all(|pipe| !pipe.stalled);
        match self.net.choices.below(4) {
            0 if moves => self.net.advance(Duration::from_millis(millis * 40)),
            _ => self.net.pass(Duration::from_millis(millis / 10)),
        }
    }

    /// What ends more than a connection. Rare, since little happens behind it.
    fn upheaval(&mut self, side: usize) {
        match self.net.choices.below(40) {
            0 => {
                self.is_broken = true;
                self.net.peers[side].session_mut().close_session(Reason::new(code::APPLICATION, "enough"));
            }
            1 => {
                self.is_broken = true;
                let end = self.net.choices.below(self.net.pipes.len());
                self.net.cut(end);
            }
            2..5 => self.net.peers[side].session_mut().go_away(Reason::none()),
            5 => {
                if let Some(relay) = &mut self.net.relay {
                    relay.machines[side].go_away(Reason::none());
                }
            }
            _ => {}
        }
    }
}

/// More than any side takes.
fn wide() -> ConnectionLimits {
    ConnectionLimits { max_item: 20_000, max_body: 1_000, stream_window: 20_000, ..ConnectionLimits::default() }
}

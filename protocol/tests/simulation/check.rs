//! What must be true whatever the two applications do: while it goes on, whenever nothing moves, and in the end.

use std::time::Duration;

use tollway_protocol::error::Reason;
use tollway_protocol::id::ConnectionId;
use tollway_protocol::payment::Amount;
use tollway_protocol::peer::Read;
use tollway_protocol::session::{ConnectionState, Event};
use tollway_protocol::stream::{Ending, StreamKey};

use crate::net::MAX_FRAME;
use crate::pair::{A, B};
use crate::world::{ITEM_MARK, World};

impl World {
    /// A whole run: random steps, then the end of everything.
    pub(crate) fn play(&mut self, steps: usize) {
        for _ in 0..steps {
            if self.net.choices.is_over() {
                break;
            }
            let side = self.net.choices.below(2);
            self.command(side);
            // The conduits move a little.
            for _ in 0..self.net.choices.below(6) {
                let end = self.net.choices.below(self.net.pipes.len());
                self.net.write(end);
                self.net.read(end ^ 1);
            }
            self.check();
        }
        self.finish();
    }

    /// Checks that the items of a stream come whole, in order, and all of them.
    pub(crate) fn read(&mut self, side: usize, stream: StreamKey, most: usize) {
        for _ in 0..most {
            let (tag, count) = self.sides[side].reading[&stream];
            match self.net.peers[side].read(stream) {
                Read::Item(item, slots) => {
                    let is = u64::from_le_bytes(item[..8].try_into().unwrap());
                    let number = u64::from_le_bytes(item[8..ITEM_MARK].try_into().unwrap());
                    assert_eq!((tag.unwrap_or(is), count), (is, number), "lost or reordered");
                    assert!(item[ITEM_MARK..].iter().all(|&byte| byte == number as u8));
                    self.sides[side].reading.insert(stream, (Some(is), count + 1));
                    self.own_inbound(side, &slots);
                }
                Read::Ended(ending) => {
                    self.sides[side].reading.remove(&stream);
                    if let (Ending::End, Some(tag)) = (ending, tag) {
                        assert_eq!((self.sent[&tag].items, self.sent[&tag].finished), (count, true), "lost at the end");
                    }
                    return;
                }
                Read::Closed => {
                    self.sides[side].reading.remove(&stream);
                    return;
                }
                Read::Pending => return,
            }
        }
    }

    /// Looks at what happened. Returns whether anything did.
    fn observe(&mut self, side: usize) -> bool {
        let events = self.net.take(side);
        let happened = !events.is_empty();
        for event in events {
            let (own, peer) = (&mut self.sides[side], &mut self.net.peers[side]);
            match event {
                Event::ConnectionRequested { connection, service, .. } => {
                    own.asked.push((connection, service.parse().ok()));
                }
                Event::ConnectionRejected { connection, .. } => own.connections.retain(|&id| id != connection),
                Event::ConnectionClosed { connection, money, .. } => {
                    own.connections.retain(|&id| id != connection);
                    own.asked.retain(|&(id, _)| id != connection);
                    for book in self.books.values_mut() {
                        for (who, party) in [book.payer, book.payee].into_iter().enumerate() {
                            if party == Some((side, connection)) {
                                book.last[who] = money;
                            }
                        }
                    }
                }
                Event::CallRequested(call) => {
                    own.served.push(call.call);
                    peer.session_mut().consume_body(call.connection, call.payload.len());
                    self.own_inbound(side, &call.slots);
                }
                Event::CallAnswered(answer) => {
                    peer.session_mut().consume_body(answer.connection, answer.payload.len());
                    self.own_inbound(side, &answer.slots);
                }
                Event::CallEnded { call, charged, counted } => {
                    own.calls.retain(|&key| key != call);
                    assert_eq!(charged, counted, "both sides count the same");
                }
                Event::CallFailed { call } => {
                    own.calls.retain(|&key| key != call);
                    own.served.retain(|&key| key != call);
                }
                Event::StreamFailed { stream, .. } | Event::StreamExpired { stream } => {
                    own.sending.retain(|&(key, _)| key != stream);
                    own.reading.remove(&stream);
                }
                Event::StreamStopped { stream, .. } => own.sending.retain(|&(key, _)| key != stream),
                Event::Payment { message, .. } => self.count_payment(side, &message),
                Event::SessionEnded(end) => assert!(self.is_broken, "honest peers: {end}"),
                _ => {}
            }
        }
        happened
    }

    /// Payment messages come all and in their order.
    fn count_payment(&mut self, side: usize, message: &[u8]) {
        let number = u64::from_le_bytes(message[..8].try_into().unwrap());
        let serial = u64::from_le_bytes(message[8..].try_into().unwrap());
        let book = self.books.get_mut(&number).unwrap();
        let who = usize::from(book.payer.is_some_and(|(of, _)| of == side));
        assert_eq!(serial, book.messages[who].1, "a payment message was lost or reordered");
        book.messages[who].1 += 1;
    }

    /// What is true after every step. Returns whether anything has happened since the last one.
    pub(crate) fn check(&mut self) -> bool {
        let mut happened = false;
        for side in [A, B] {
            happened |= self.observe(side);
            let session = self.net.peers[side].session();
            assert!(session.granted_bytes() <= self.memory[side], "within the budget");
            assert!(session.connection_count() <= 14 && session.call_count() <= 200 && session.stream_count() <= 200);
        }
        for end in self.net.ends() {
            let pipe = &self.net.pipes[end];
            assert!(pipe.bytes <= pipe.capacity + MAX_FRAME as usize + 4);
            let machine = self.net.machine(end);
            assert!(machine.wants_frames() || machine.end().is_some(), "honest peers read always");
            let most = machine.call_count() * 3 + 64 + 1;
            assert!(machine.deadline_count() <= most, "{} deadlines", machine.deadline_count());
        }
        for (number, book) in &self.books {
            let count = |party: Option<(usize, _)>, last: Option<_>| {
                last.or_else(|| party.and_then(|(side, id)| self.net.peers[side].session().money(id)))
            };
            let [payer, payee] = [count(book.payer, book.last[0]), count(book.payee, book.last[1])];
            let charged = payee.map_or(Amount::ZERO, |count| count.amount);
            assert!(charged.units() <= book.leased, "book {number}: {charged} of {}", book.leased);
            if let (Some(payer), Some(payee)) = (payer, payee) {
                let within = payer.amount <= payee.amount && payer.bytes <= payee.bytes && payer.items <= payee.items;
                assert!(within, "book {number}: the payer counted {payer:?} of {payee:?}");
            }
        }
        happened
    }

    /// Goes on until nothing moves. Then nothing waits that could go: no wake-up was lost.
    pub(crate) fn settle(&mut self) {
        self.net.pipes.iter_mut().for_each(|pipe| pipe.stalled = false);
        self.net.run();
        // To look at a body gives its window back, and that makes more come.
        while self.check() {
            self.net.run();
        }
        for side in [A, B] {
            self.check_idle(side);
        }
    }

    fn check_idle(&self, side: usize) {
        let peer = &self.net.peers[side];
        let session = peer.session();
        if session.end().is_some() {
            return;
        }
        let stats = session.stats();
        assert_eq!((stats.waiting_control, stats.waiting_payments, stats.waiting_connections), (0, 0, 0));
        let waits_for_money = |id| session.money_needed(id).is_some();
        for &(stream, tag) in &self.sides[side].sending {
            let Some(id) = session.stream_connection(stream) else { continue };
            let may_wait = session.stream_id(stream).is_none() || waits_for_money(id);
            assert!(may_wait || !peer.is_ready(stream), "stream {tag} of side {side} was forgotten");
        }
        for connection in session.connection_stats(usize::MAX) {
            let (id, window) = (connection.id, connection.body_credit);
            if connection.state != ConnectionState::Open || self.waits_for_payer(side, id) {
                continue;
            }
            let (_, limits) = session.limits(id).unwrap();
            assert!(window > 0, "all bodies were read, and side {side} has no window on {id}");
            assert_eq!(connection.waiting_answers, 0, "answers of side {side} were forgotten on {id}");
            let has_place = connection.calls < limits.max_calls as usize;
            assert!(connection.waiting_calls == 0 || !has_place, "calls of side {side} were forgotten on {id}");
        }
    }

    /// Whether anything on the connection may wait for what its payer does: authorise money, or make its count durable.
    fn waits_for_payer(&self, side: usize, id: ConnectionId) -> bool {
        let book = self.books.values().find(|book| [book.payer, book.payee].contains(&Some((side, id))));
        book.is_some_and(|book| {
            let needed = book.payee.and_then(|(side, id)| self.net.peers[side].session().money_needed(id));
            book.is_held || needed.is_some()
        })
    }

    /// Ends everything in an orderly way: first answers and streams, then connections.
    pub(crate) fn finish(&mut self) {
        for _ in 0..200 {
            self.settle();
            for side in [A, B] {
                self.finish_work(side);
            }
            for number in 0..self.books.len() as u64 {
                self.raise_by(number, 1000);
                self.free_grants(number, Amount::MAX);
            }
            self.settle();
            if self.left().iter().all(|&(_, calls, streams)| (calls, streams) == (0, 0)) {
                break;
            }
        }
        if !self.left().iter().all(|&(_, calls, streams)| (calls, streams) == (0, 0)) {
            let ends = self.net.ends().map(|end| self.net.machine(end).connection_stats(usize::MAX));
            panic!("calls and streams that never end: {:#?}", ends.collect::<Vec<_>>());
        }
        self.check_books();
        for side in [A, B] {
            let ids: Vec<_> = self.sides[side].connections.drain(..).collect();
            ids.into_iter().for_each(|id| self.net.peers[side].session_mut().close(id, Reason::none()));
        }
        self.settle();
        // Opens that were answered while the last ones ended.
        self.net.advance(Duration::from_secs(60));
        self.settle();
        assert_eq!(self.left(), [(0, 0, 0); 2]);
        for end in self.net.ends() {
            let machine = self.net.machine(end);
            assert_eq!(machine.connection_count(), 0);
        }
        assert_eq!(self.net.relay.as_ref().map_or(0, |relay| relay.live()), 0, "lines of the relay");
        for side in [A, B] {
            // Items may hold streams that hold items.
            while let Some(&key) = self.sides[side].reading.keys().next() {
                self.read(side, key, 10_000);
            }
            assert_eq!(self.net.peers[side].stream_ends(), (0, 0));
            assert_eq!(self.net.peers[side].session().granted_bytes(), 0, "all that was granted came back");
        }
        self.check_ends();
    }

    fn finish_work(&mut self, side: usize) {
        while !self.sides[side].asked.is_empty() {
            self.answer_open(side);
        }
        while !self.sides[side].sending.is_empty() {
            self.end_sending(side);
        }
        while !self.sides[side].served.is_empty() {
            let before = self.sides[side].served.len();
            self.respond(side);
            if self.sides[side].served.len() == before {
                break;
            }
        }
        let keys: Vec<_> = self.sides[side].reading.keys().copied().collect();
        keys.into_iter().for_each(|key| self.read(side, key, 10_000));
    }

    /// Connections, calls and streams in the tables of both sides.
    fn left(&self) -> [(usize, usize, usize); 2] {
        [A, B].map(|side| {
            let session = self.net.peers[side].session();
            (session.connection_count(), session.call_count(), session.stream_count())
        })
    }

    /// When nothing is under way, both sides of a connection that is open have counted the same.
    fn check_books(&self) {
        for (number, book) in &self.books {
            let (Some(payer), Some(payee)) = (book.payer, book.payee) else { continue };
            let [payer, payee] = [payer, payee].map(|(side, id)| self.net.peers[side].session().money(id));
            if let (Some(payer), Some(payee)) = (payer, payee) {
                assert_eq!(payer, payee, "book {number}");
                assert_eq!(book.messages[0].0, book.messages[0].1, "a payment message was lost");
                assert_eq!(book.messages[1].0, book.messages[1].1, "a payment message was lost");
            }
        }
    }

    /// Both ends of each conduit agree on whether the session goes on.
    fn check_ends(&self) {
        for end in self.net.ends().step_by(2) {
            let ended = [end, end + 1].map(|end| self.net.machine(end).end());
            assert_eq!(ended[0].is_some(), ended[1].is_some(), "{ended:?}");
        }
    }
}

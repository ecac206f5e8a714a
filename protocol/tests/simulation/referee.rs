//! A referee at one conduit: it sees each frame when it is written and knows the rules, but nothing of the machines.
//!
//! It is the specification written a second time, as far as honest peers are concerned: ids, states, limits and credit.
//! What a side was granted by a frame that is still under way counts as granted, so it says nothing about races; those
//! are the machines' own, which would answer with a violation.

use std::collections::BTreeMap;

use bytes::{Bytes, BytesMut};
use tollway_protocol::frame::{Lane, Transmit};
use tollway_protocol::id::Parity;
use tollway_protocol::limits::{ConnectionLimits, ITEM_OVERHEAD};
use tollway_protocol::message::*;
use tollway_protocol::session::LaneMode;
use tollway_protocol::stream::ItemRun;

use crate::net::MAX_FRAME;

/// Windows do not grow beyond this in the simulation.
pub(crate) const MAX_WINDOW: u32 = 2_000;

#[derive(Debug, Default)]
struct Stream {
    call: u64,
    sender: usize,
    announcer: usize,
    sent: u64,
    limit: u64,
    consumed: u64,
    ended: bool,
    stopped: bool,
}

#[derive(Debug)]
struct Call {
    caller: usize,
    answered: bool,
    has_streams: bool,
    ended: bool,
}

#[derive(Debug, Default)]
struct Connection {
    opener: usize,
    accepted: bool,
    rejected: bool,
    closed: [bool; 2],
    is_paid: bool,
    /// What each side receives.
    limits: [ConnectionLimits; 2],
    /// Bodies of each side: bytes sent, and granted.
    sent: [u64; 2],
    window: [u64; 2],
    next_call: [u64; 2],
    next_stream: [u64; 2],
    calls: BTreeMap<u64, Call>,
    streams: BTreeMap<u64, Stream>,
}

/// See the module's documentation.
#[derive(Debug)]
pub(crate) struct Referee {
    lanes: LaneMode,
    next: [u64; 2],
    connections: BTreeMap<u64, Connection>,
    /// Nothing may follow the last word of a side.
    over: [bool; 2],
}

impl Connection {
    fn open_calls(&self, caller: usize) -> usize {
        self.calls.values().filter(|call| call.caller == caller && !call.ended).count()
    }

    fn body(&mut self, by: usize, bytes: usize) {
        assert!(bytes <= self.limits[1 - by].max_body as usize, "a body of {bytes} bytes");
        assert!(self.sent[by] < self.window[by], "[call.window.start] {} of {}", self.sent[by], self.window[by]);
        self.sent[by] += bytes as u64;
    }

    fn announce(&mut self, by: usize, call: u64, slots: &[Slot]) {
        for slot in slots {
            assert_eq!(slot.stream.0, self.next_stream[by], "[stream.id.next]");
            self.next_stream[by] += 2;
            let open = self.streams.values().filter(|stream| stream.announcer == by && !stream.ended).count();
            assert!(open < self.limits[1 - by].max_streams as usize, "{open} streams are open already");
            let sender = if slot.flow == Flow::ToPeer { by } else { 1 - by };
            let limit = u64::from(self.limits[1 - sender].stream_window);
            let stream = Stream { call, sender, announcer: by, limit, ..Stream::default() };
            self.streams.insert(slot.stream.0, stream);
            self.calls.get_mut(&call).unwrap().has_streams = true;
        }
    }

    fn request(&mut self, by: usize, request: &Request, bytes: usize) {
        assert_eq!(request.call.0, self.next_call[by], "[call.id.next]");
        self.next_call[by] += 2;
        assert!(self.open_calls(by) < self.limits[1 - by].max_calls as usize, "more calls than the peer takes");
        self.body(by, bytes);
        let call = Call { caller: by, answered: false, has_streams: false, ended: false };
        self.calls.insert(request.call.0, call);
        self.announce(by, request.call.0, &request.slots);
    }

    fn response(&mut self, by: usize, response: &Response, bytes: usize) {
        self.body(by, bytes);
        let call = self.calls.get_mut(&response.call.0).expect("an answer to a call");
        assert_eq!((call.caller, call.answered), (1 - by, false), "[call.end.once]");
        call.answered = true;
        self.announce(by, response.call.0, &response.slots);
        let call = self.calls.get_mut(&response.call.0).unwrap();
        call.ended = !call.has_streams;
    }

    fn done(&mut self, by: usize, id: u64) {
        let streams_open = self.streams.values().any(|stream| stream.call == id && !stream.ended);
        let call = self.calls.get_mut(&id).expect("the end of a call");
        assert_eq!((call.caller, call.answered, call.ended), (1 - by, true, false), "[call.end.done]");
        assert!(call.has_streams && !streams_open, "[call.end.last]");
        call.ended = true;
    }

    fn items(&mut self, by: usize, items: &Items, payload: Bytes) {
        let max_item = self.limits[1 - by].max_item;
        let mut run = ItemRun::parse(payload, max_item).expect("[stream.items.whole]");
        assert!(items.slots.is_empty() || run.items() == 1, "an item with streams in it travels alone");
        let stream = self.streams.get_mut(&items.stream.0).expect("a stream that was announced");
        assert_eq!((stream.sender, stream.ended), (by, false), "[stream.end.last]");
        while let Some(item) = run.next_item() {
            assert!(stream.sent < stream.limit, "[stream.credit.start] {} of {}", stream.sent, stream.limit);
            stream.sent += item.len() as u64 + ITEM_OVERHEAD;
        }
        let call = stream.call;
        self.announce(by, call, &items.slots);
    }

    fn ending(&mut self, by: usize, id: u64) {
        let stream = self.streams.get_mut(&id).expect("a stream that was announced");
        assert_eq!((stream.sender, stream.ended), (by, false), "[stream.end.once]");
        stream.ended = true;
    }

    fn stop(&mut self, by: usize, id: u64) {
        let stream = self.streams.get_mut(&id).expect("a stream that was announced");
        assert_eq!((stream.sender, stream.stopped), (1 - by, false), "[stream.stop.once]");
        stream.stopped = true;
    }

    fn credit(&mut self, by: usize, credit: &Credit) {
        let stream = self.streams.get_mut(&credit.stream.0).expect("a stream that was announced");
        assert_eq!(stream.sender, 1 - by, "the receiver grants");
        assert!(credit.limit > stream.limit, "[stream.credit.monotonic] {} to {}", stream.limit, credit.limit);
        assert!(credit.consumed >= stream.consumed);
        // What is granted is what is free: credit is neither made nor lost.
        assert!(credit.limit <= stream.sent + u64::from(MAX_WINDOW), "{} granted, {} sent", credit.limit, stream.sent);
        (stream.limit, stream.consumed) = (credit.limit, credit.consumed);
    }

    fn widen(&mut self, by: usize, limit: u64) {
        let other = 1 - by;
        assert!(limit > self.window[other], "[call.window.monotonic] {} to {limit}", self.window[other]);
        assert!(limit <= self.sent[other] + u64::from(MAX_WINDOW), "{limit} granted, {} sent", self.sent[other]);
        self.window[other] = limit;
    }
}

impl Referee {
    pub(crate) fn new(lanes: LaneMode) -> Self {
        Referee { lanes, next: [1, 2], connections: BTreeMap::new(), over: [false; 2] }
    }

    /// A side (0 the initiator) writes a frame.
    pub(crate) fn see(&mut self, by: usize, sent: &Transmit) {
        let mut frame = BytesMut::from(sent.head.as_slice());
        frame.extend_from_slice(&sent.payload);
        assert!(frame.len() <= MAX_FRAME as usize, "[session.frame.max] {}", frame.len());
        assert!(!self.over[by], "something follows the last word: {frame:?}");
        let mut frame = frame.freeze();
        match frame[0] {
            ProtocolError::KIND => panic!("honest peers: {frame:?}"),
            ..=8 => assert_eq!(sent.lane, Lane::ROOT, "[session.lane.own]"),
            Open::KIND => {
                let open: Open = decode_header(&mut frame).unwrap();
                self.check_lane(sent, open.connection.0);
                self.open(by, &open, !frame.is_empty());
            }
            Close::KIND => {
                let close: Close = decode_header(&mut frame).unwrap();
                self.check_lane(sent, close.connection.0);
                self.close(by, close.connection.0);
            }
            Accept::KIND => {
                let accept: Accept = decode_header(&mut frame).unwrap();
                self.check_lane(sent, accept.connection.0);
                self.accept(by, &accept, !frame.is_empty());
            }
            Reject::KIND => {
                let reject: Reject = decode_header(&mut frame).unwrap();
                self.check_lane(sent, reject.connection.0);
                self.unanswered(by, reject.connection.0).rejected = true;
            }
            _ => self.see_inside(by, sent, frame),
        }
    }

    fn check_lane(&self, sent: &Transmit, connection: u64) {
        let own = if self.lanes == LaneMode::One { Lane::ROOT } else { Lane(connection) };
        assert_eq!(sent.lane, own, "[session.lane.own]");
    }

    fn open(&mut self, by: usize, open: &Open, has_credential: bool) {
        assert_eq!(open.connection.0, self.next[by], "[session.id.next]");
        self.next[by] += 2;
        let mut connection = Connection { opener: by, is_paid: has_credential, ..Connection::default() };
        connection.limits[by] = open.limits;
        let first = |side| if (side == by) == (open.parity == Parity::Odd) { 1 } else { 2 };
        (connection.next_call, connection.next_stream) = ([first(0), first(1)], [first(0), first(1)]);
        self.connections.insert(open.connection.0, connection);
    }

    /// The connection, if this side may answer its open.
    fn unanswered(&mut self, by: usize, id: u64) -> &mut Connection {
        let open = self.connections.get_mut(&id).expect("[session.open.answer]");
        let answered = open.accepted || open.rejected || open.closed[by];
        assert_eq!((open.opener, answered), (1 - by, false), "[session.open.answer]");
        open
    }

    fn accept(&mut self, by: usize, accept: &Accept, has_receipt: bool) {
        let connection = self.unanswered(by, accept.connection.0);
        connection.accepted = true;
        connection.is_paid &= has_receipt;
        connection.limits[by] = accept.limits;
        connection.window = [1, 0].map(|other: usize| u64::from(connection.limits[other].window));
    }

    fn close(&mut self, by: usize, id: u64) {
        if id == 0 {
            self.over[by] = true;
            return;
        }
        let connection = self.connections.get_mut(&id).expect("[session.id.known]");
        assert!(!core::mem::replace(&mut connection.closed[by], true), "closed twice");
    }

    /// Frames of connections that are open.
    fn see_inside(&mut self, by: usize, sent: &Transmit, mut frame: Bytes) {
        macro_rules! connection {
            ($header:expr) => {{
                self.check_lane(sent, $header.connection.0);
                let connection = self.connections.get_mut(&$header.connection.0).expect("[session.id.known]");
                assert!(connection.accepted, "[session.open.silence]");
                assert!(!connection.closed[by], "nothing follows a Close");
                connection
            }};
        }
        macro_rules! header {
            ($type:ty) => {
                decode_header::<$type>(&mut frame).unwrap()
            };
        }
        match frame[0] {
            Request::KIND => {
                let request = header!(Request);
                connection!(request).request(by, &request, frame.len());
            }
            Response::KIND => {
                let response = header!(Response);
                connection!(response).response(by, &response, frame.len());
            }
            Cancel::KIND => {
                let cancel = header!(Cancel);
                let call = &connection!(cancel).calls[&cancel.call.0];
                assert_eq!(call.caller, by, "[call.cancel.once]");
            }
            Done::KIND => {
                let done = header!(Done);
                connection!(done).done(by, done.call.0);
            }
            Items::KIND => {
                let items = header!(Items);
                connection!(items).items(by, &items, frame);
            }
            End::KIND => {
                let end = header!(End);
                connection!(end).ending(by, end.stream.0);
            }
            Reset::KIND => {
                let reset = header!(Reset);
                connection!(reset).ending(by, reset.stream.0);
            }
            Stop::KIND => {
                let stop = header!(Stop);
                connection!(stop).stop(by, stop.stream.0);
            }
            Credit::KIND => {
                let credit = header!(Credit);
                connection!(credit).credit(by, &credit);
            }
            Window::KIND => {
                let window = header!(Window);
                connection!(window).widen(by, window.limit);
            }
            Payment::KIND => {
                let payment = header!(Payment);
                assert!(connection!(payment).is_paid, "payment on an unpaid connection");
            }
            kind => panic!("kind {kind}"),
        }
    }
}

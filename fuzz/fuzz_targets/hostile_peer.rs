//! One machine against a peer that sends what it likes.

use core::time::Duration;

use bytes::{Bytes, BytesMut};
use libfuzzer_sys::arbitrary::Unstructured;
use tollway_fuzz::Watch;
use tollway_protocol::error::Reason;
use tollway_protocol::frame::Lane;
use tollway_protocol::id::{CallId, ConnectionId, Parity, StreamId};
use tollway_protocol::limits::{ConnectionLimits, SessionLimits};
use tollway_protocol::memory::MemoryLimits;
use tollway_protocol::message::*;
use tollway_protocol::metadata::Metadata;
use tollway_protocol::payment::Amount;
use tollway_protocol::peer::{Peer, PeerEvent, Read};
use tollway_protocol::session::{
    CallKey, CallSpec, Config, Event, InboundSlot, LaneMode, PayeeMoney, PayerMoney, ResponseSpec,
};
use tollway_protocol::stream::{StreamKey, write_item};
use tollway_protocol::time::Time;

use crate::world::prices;

const MAX_CONNECTIONS: u32 = 6;
/// What is authorised on a connection that is paid to this side.
const LEASED: Amount = Amount::new(200);

pub(crate) fn run(how: u8, bytes: &[u8]) {
    let mut bytes = Unstructured::new(bytes);
    let mut stage = Stage::open(how);
    while !bytes.is_empty() {
        if stage.step(&mut bytes).is_err() {
            break;
        }
        stage.settle();
    }
    stage.finish();
}

type Step = libfuzzer_sys::arbitrary::Result<()>;

struct Stage {
    peer: Peer,
    now: Time,
    lanes: LaneMode,
    memory: u64,
    watch: Watch,
    /// Whether frames are taken for writing.
    writes: bool,
    connections: Vec<ConnectionId>,
    asked: Vec<ConnectionId>,
    calls: Vec<CallKey>,
    served: Vec<CallKey>,
    streams: Vec<StreamKey>,
    /// Calls and streams that this side has begun: no peer makes it hold more of these.
    begun: usize,
}

fn limits() -> ConnectionLimits {
    ConnectionLimits { max_item: 200, max_body: 100, window: 300, stream_window: 400, max_calls: 3, max_streams: 6 }
}

/// A frame of small numbers, so that it often hits something that is there.
fn frame(bytes: &mut Unstructured<'_>) -> libfuzzer_sys::arbitrary::Result<(ConnectionId, Bytes)> {
    let kind: u8 = bytes.arbitrary()?;
    let [on, a, b, c] = bytes.arbitrary::<[u8; 4]>()?;
    let connection = ConnectionId(u64::from(on % 8));
    let (call, stream) = (CallId(u64::from(a % 8)), StreamId(u64::from(a % 12)));
    let (metadata, limits) = (Metadata::new(), limits());
    let flow = |bit: u8| if bit == 0 { Flow::ToPeer } else { Flow::FromPeer };
    let slot = |first: u8| Slot { stream: StreamId(u64::from(first % 12)), flow: flow(first >> 4 & 1) };
    let slots: Vec<Slot> = (0..c % 3).map(|n| slot(b.wrapping_add(2 * n))).collect();
    let reason = || WireReason::from(Reason::new(u32::from(b), "why"));
    let payload = vec![0; usize::from(c >> 2)];
    let statuses = [Status::Ok, Status::AppError, Status::HandlerFailed, Status::Cancelled];
    let framed = match kind % 20 {
        0 => pair(&Open { connection, service: "s".into(), parity: Parity::Odd, limits, metadata }, &payload),
        1 => pair(&Accept { connection, limits, metadata }, &payload),
        2 => pair(&Reject { connection, reason: reason(), metadata }, b""),
        3 => pair(&Close { connection, reason: reason(), metadata }, b""),
        4..=6 => {
            let deadline_us = (b & 0x80 != 0).then(|| u64::from(b) * 1_000);
            pair(&Request { connection, call, method: u64::from(b % 4), deadline_us, metadata, slots }, &payload)
        }
        7 | 8 => {
            let (status, charged) = (statuses[usize::from(b % 4)], Amount::new(u128::from(b)));
            pair(&Response { connection, call, status, charged, metadata, slots }, &payload)
        }
        9 => pair(&Cancel { connection, call }, b""),
        10 => pair(&Done { connection, call, charged: Amount::new(u128::from(b)) }, b""),
        11..=13 => {
            let (mut items, count) = (Vec::new(), if slots.is_empty() { 1 + c % 4 } else { 1 });
            (0..count).for_each(|_| write_item(&mut items, &payload));
            pair(&Items { connection, stream, slots }, &items)
        }
        14 => pair(&End { connection, stream }, b""),
        15 => pair(&Reset { connection, stream, code: u32::from(b) }, b""),
        16 => pair(&Stop { connection, stream, code: u32::from(b) }, b""),
        17 => pair(&Credit { connection, stream, limit: u64::from(b) * 16, consumed: u64::from(c) }, b""),
        18 => pair(&Window { connection, limit: u64::from(b) * 16 }, b""),
        _ => pair(&Payment { connection }, &payload),
    };
    Ok((connection, framed))
}

fn pair<H: Header>(header: &H, payload: &[u8]) -> Bytes {
    let mut frame = BytesMut::from(encode_head(header).as_slice());
    frame.extend_from_slice(payload);
    frame.freeze()
}

fn pick<T: Copy>(of: &[T], by: u8) -> Option<T> {
    of.get(usize::from(by) % of.len().max(1)).copied()
}

impl Stage {
    /// A session that is open, of either role.
    fn open(how: u8) -> Self {
        let lanes = if how & 4 == 0 { LaneMode::One } else { LaneMode::PerConnection };
        let limits = SessionLimits { max_frame: 34_000, max_connections: MAX_CONNECTIONS, max_pending_opens: 3 };
        let session = if how & 8 == 0 { 64 << 20 } else { 900 };
        let memory = MemoryLimits { session, ..MemoryLimits::default() };
        let config = Config { lanes, limits, memory, ..Config::default() };
        let metadata = Metadata::new;
        let (mut peer, first) = match how & 2 {
            0 => {
                let hello =
                    Hello { min_version: 1, max_version: 1, parity: Parity::Odd, limits, metadata: metadata() };
                (Peer::responder(config, Time::ZERO), pair(&hello, b""))
            }
            _ => (
                Peer::initiator(config, Time::ZERO),
                pair(&HelloAck { version: 1, limits, metadata: metadata() }, b""),
            ),
        };
        peer.handle_frame(Time::ZERO, Lane::ROOT, first);
        peer.session_mut().accept_session(metadata());
        peer.handle_frame(Time::ZERO, Lane::ROOT, pair(&Ping { nonce: 1 }, b""));
        let (connections, asked, calls, served, streams) = Default::default();
        let (now, watch, writes, begun) = (Time::ZERO, Watch::default(), true, 0);
        let mut stage =
            Stage { peer, now, lanes, memory: session, watch, writes, connections, asked, calls, served, streams, begun };
        stage.settle();
        assert!(stage.peer.session().is_open());
        stage
    }

    fn step(&mut self, bytes: &mut Unstructured<'_>) -> Step {
        match bytes.arbitrary::<u8>()? % 24 {
            0..=3 => {
                let length = usize::from(bytes.arbitrary::<u8>()?).min(bytes.len());
                let frame = Bytes::copy_from_slice(bytes.bytes(length)?);
                let lane = if self.lanes == LaneMode::One { 0 } else { u64::from(frame.get(1).copied().unwrap_or(0)) };
                self.peer.handle_frame(self.now, Lane(lane), frame);
            }
            4..=12 => {
                let (connection, frame) = frame(bytes)?;
                let lane = if self.lanes == LaneMode::One { 0 } else { connection.0 };
                self.peer.handle_frame(self.now, Lane(lane), frame);
            }
            13 => self.connect(bytes.arbitrary()?),
            14 => self.answer_open(bytes.arbitrary()?),
            15 => self.call(bytes.arbitrary()?, bytes.arbitrary()?),
            16 => self.respond(bytes.arbitrary()?, bytes.arbitrary()?),
            17 | 18 => self.push(bytes.arbitrary()?, bytes.arbitrary()?),
            19 | 20 => self.read(bytes.arbitrary()?),
            21 => self.end_stream(bytes.arbitrary()?, bytes.arbitrary()?),
            22 => self.end_more(bytes.arbitrary()?, bytes.arbitrary()?),
            _ => {
                let step: u8 = bytes.arbitrary()?;
                self.writes = step & 1 == 0;
                self.now = self.now.after(Duration::from_millis(u64::from(step) * 20));
                self.peer.handle_timeout(self.now);
            }
        }
        Ok(())
    }

    fn connect(&mut self, how: u8) {
        let (received, hold) = (Amount::ZERO, if how & 2 == 0 { Amount::MAX } else { Amount::new(30) });
        let money = PayerMoney { prices: prices(), received, mark: Amount::new(20), hold };
        let paid = (how & 1 == 1).then(|| (Bytes::from_static(b"c"), money));
        if let Ok(id) = self.peer.session_mut().open(self.now, "s", limits(), Metadata::new(), paid) {
            self.connections.push(id);
        }
    }

    fn answer_open(&mut self, how: u8) {
        let Some(id) = pick(&self.asked, how >> 2) else { return };
        self.asked.retain(|&asked| asked != id);
        let session = self.peer.session_mut();
        let money = PayeeMoney { prices: prices(), spent: Amount::ZERO, leased: LEASED, low: Amount::new(10) };
        let paid = (how & 1 == 1).then(|| (Bytes::from_static(b"r"), money));
        match how & 2 {
            0 => _ = session.accept(id, limits(), Metadata::new(), paid).map(|()| self.connections.push(id)),
            _ => _ = session.reject(id, Reason::none(), Metadata::new(), Bytes::new()),
        }
    }

    fn flows(how: u8) -> Vec<Flow> {
        (0..how % 3).map(|n| if how >> (4 + n) & 1 == 0 { Flow::ToPeer } else { Flow::FromPeer }).collect()
    }

    fn call(&mut self, on: u8, how: u8) {
        let Some(connection) = pick(&self.connections, on) else { return };
        let slots = &Self::flows(how);
        let deadline = (how & 8 != 0).then(|| self.now.after(Duration::from_millis(u64::from(how))));
        let payload = vec![0; usize::from(how % 100)].into();
        let spec = CallSpec { connection, method: u64::from(how % 4), deadline, metadata: Metadata::new(), payload, slots };
        if let Ok((call, streams)) = self.peer.start_call(spec) {
            self.calls.push(call);
            self.begin(streams);
        }
    }

    fn begin(&mut self, streams: Vec<StreamKey>) {
        self.begun += 1 + streams.len();
        self.streams.extend(streams);
    }

    fn respond(&mut self, on: u8, how: u8) {
        let Some(call) = pick(&self.served, on) else { return };
        let slots = &Self::flows(how);
        let payload = vec![0; usize::from(how % 100)].into();
        let (metadata, paid_before) = (Metadata::new(), Amount::ZERO);
        let spec = ResponseSpec { status: Status::Ok, metadata, payload, slots, cost: None, paid_before };
        if let Ok(streams) = self.peer.respond(call, spec) {
            self.begin(streams);
        }
    }

    fn push(&mut self, on: u8, how: u8) {
        let Some(stream) = pick(&self.streams, on) else { return };
        let (item, slots) = (vec![0; usize::from(how % 200)], Self::flows(how));
        if let Ok(streams) = self.peer.push_with(stream, &item, &slots) {
            self.begin(streams);
        }
    }

    fn read(&mut self, on: u8) {
        let Some(stream) = pick(&self.streams, on) else { return };
        if let Read::Item(item, slots) = self.peer.read(stream) {
            assert!(item.len() <= limits().max_item as usize);
            self.meet(&slots);
        }
    }

    fn end_stream(&mut self, on: u8, how: u8) {
        let Some(stream) = pick(&self.streams, on) else { return };
        match how % 3 {
            0 => self.peer.finish(stream),
            1 => self.peer.reset(stream, 7),
            _ => self.peer.stop(stream, 8),
        }
    }

    fn end_more(&mut self, on: u8, how: u8) {
        let connection = pick(&self.connections, on);
        let session = self.peer.session_mut();
        match (how % 10, connection) {
            (0 | 1, _) => {
                if let Some(call) = pick(&self.calls, on) {
                    self.peer.cancel_call(call);
                }
            }
            (2, Some(id)) => session.close(id, Reason::none()),
            (3, Some(id)) => session.raise_money(id, LEASED),
            (4, Some(id)) => session.fail_unpaid(id),
            (5, Some(id)) => _ = session.stop_money(id),
            (6, Some(id)) => _ = session.send_payment(id, Bytes::from_static(b"message")),
            (7, Some(id)) => session.set_received_mark(id, Amount::new(u128::from(on))),
            (8, Some(id)) => session.raise_received_hold(id, Amount::new(u128::from(on))),
            (9, _) if how > 250 => session.close_session(Reason::none()),
            (9, _) if how > 240 => session.go_away(Reason::none()),
            _ => {}
        }
    }

    fn meet(&mut self, slots: &[InboundSlot]) {
        self.streams.extend(slots.iter().map(|slot| slot.stream));
    }

    fn settle(&mut self) {
        while let Some(event) = self.peer.poll_event() {
            let PeerEvent::Session(event) = event else { continue };
            self.watch.event(&event);
            match event {
                Event::ConnectionRequested { connection, .. } => self.asked.push(connection),
                Event::CallRequested(call) => {
                    self.peer.session_mut().consume_body(call.connection, call.payload.len());
                    self.served.push(call.call);
                    self.meet(&call.slots);
                }
                Event::CallAnswered(answer) => {
                    self.peer.session_mut().consume_body(answer.connection, answer.payload.len());
                    self.meet(&answer.slots);
                }
                _ => {}
            }
        }
        let over = self.peer.session().end().is_some();
        while self.writes || over {
            let Some(frame) = self.peer.poll_transmit(self.now) else {
                self.watch.rest(self.peer.session());
                break;
            };
            self.watch.frame(self.peer.session(), &frame);
        }
        self.check();
    }

    /// What a peer can make this side hold has its bounds, whatever it sends.
    fn check(&self) {
        let session = self.peer.session();
        assert!(session.granted_bytes() <= self.memory, "{} bytes are granted", session.granted_bytes());
        let (connections, per_connection) = (session.connection_count(), limits());
        assert!(connections <= 2 * MAX_CONNECTIONS as usize);
        let calls = connections * per_connection.max_calls as usize + self.begun;
        assert!(session.call_count() <= calls, "{} calls", session.call_count());
        let streams = connections * per_connection.max_streams as usize + self.begun;
        assert!(session.stream_count() <= streams, "{} streams", session.stream_count());
        assert!(session.deadline_count() <= 2 * (calls + 64));
        for &id in &self.connections {
            let count = session.money(id).map_or(Amount::ZERO, |money| money.amount);
            let is_payer = session.connection_stats(64).iter().any(|stats| stats.id == id && stats.opened_by_us);
            assert!(is_payer || count <= LEASED, "{count} was spent");
        }
    }

    /// However it stands, it can be ended, and then nothing is left.
    fn finish(mut self) {
        self.writes = true;
        self.peer.session_mut().close_session(Reason::none());
        self.settle();
        let session = self.peer.session();
        assert!(session.end().is_some());
        assert_eq!((session.connection_count(), session.call_count(), session.stream_count()), (0, 0, 0));
    }
}

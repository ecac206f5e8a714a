//! A relay's view of one connection that it carries between two sessions.
//!
//! A [`Bridge`] takes the frames of a connection from either side and yields those for the other side. It reads their
//! headers and leaves payloads alone; call and stream ids pass unchanged. It holds both sides to the rules as their
//! peers would: a frame that the other side would have to answer with ProtocolError ends the session that it came from,
//! not the one that it would have gone to, which carries other people's connections as well. `[relay.checks]`
//!
//! Credit passes from end to end. The bridge may hold a grant up, and never makes one: what waits in it was granted by
//! whom it is for. Frames that no credit covers, such as the ends of streams, are bounded by [`MAX_UNCOVERED`].
//!
//! The two directions share the tables of calls and streams and nothing else: one that is stuck does not stop the other.

mod draining;
mod end;
mod queue;
mod tables;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use std::sync::Arc;

use bytes::Bytes;
use rustc_hash::FxHashMap;

use crate::error::{Reason, Violation};
use crate::id::{CallId, ConnectionId, Parity, StreamId};
use crate::limits::{ConnectionLimits, HEADER_ALLOWANCE, MAX_SLOTS};
use crate::memory::MemoryPool;
use crate::message::{
    Cancel, Credit, Done, Drained, Draining, End as StreamEnd, Flow, Header, Items, Payment, Request, Reset, Response,
    Slot, Stop, Window, decode_header,
};
use crate::payment::MAX_PAYMENT_MESSAGE_BYTES;
use crate::stream::ItemRun;

use end::End;
use queue::Entry;
pub use queue::{MAX_UNCOVERED, Relayed, Traffic};
use tables::{ENTRY_BYTES, shrink};

/// Bytes of kind and header that a frame with a list in it may have: what every receiver leaves room for, less what the
/// connection's id may grow by on the other side (nine bytes) and the length of an item (five). An honest header is below
/// 29 KiB; only numbers in more bytes than they need make a longer one.
const MAX_PASSED_HEADER: usize = HEADER_ALLOWANCE as usize - 16;

/// One of the two sides between which a relay stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Side {
    /// The one from which the connection came.
    Left,
    /// The one to which it goes.
    Right,
}

impl Side {
    /// The opposite one.
    #[must_use]
    pub const fn other(self) -> Self {
        match self {
            Side::Left => Side::Right,
            Side::Right => Side::Left,
        }
    }
}

/// What a relay agreed on with one side.
#[derive(Debug, Clone)]
pub struct Terms {
    /// The half of the call and stream ids that this side assigns.
    pub parity: Parity,
    /// What this side receives.
    pub receives: ConnectionLimits,
    /// What this side was told that it may send: at most what the other one receives. `[relay.limits]`
    pub may_send: ConnectionLimits,
    /// Where the frames count that came from this side and wait for the other one, and the calls and streams that this
    /// side began; nowhere without it.
    pub memory: Option<Arc<MemoryPool>>,
}

/// Two sides that cannot be joined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("both sides assign the same half of the ids inside the connection")]
pub struct SameParity;

/// Why a frame could not be taken in.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RelayError {
    /// Its sender broke a rule, which ends the sender's session.
    #[error(transparent)]
    Violation(#[from] Violation),
    /// The other side does not read, and what waits for it without credit is above [`MAX_UNCOVERED`]: the connection is
    /// to be closed.
    #[error("more than {MAX_UNCOVERED} bytes of frames that no credit covers wait for a side that does not read")]
    Overrun,
    /// There is no memory for what waits for the other side, or for another call or stream: the connection is to be closed.
    #[error("the relay has no memory for what waits for a side that does not read, or for another call or stream")]
    OutOfMemory,
}

/// A call that has not ended.
#[derive(Debug)]
struct Call {
    caller: Side,
    answered: bool,
    cancelled: bool,
    streams: u32,
    had_streams: bool,
}

/// A stream that has not ended.
#[derive(Debug)]
struct Stream {
    call: CallId,
    announced_by: Side,
    sender: Side,
    /// Credit that the sender may use, and has used, in bytes with overhead.
    limit: u64,
    used: u64,
    stopped: bool,
    /// A grant that waits in the receiver's queue: limit for the sender, items consumed.
    grant: Option<(u64, u64)>,
}

/// One connection of a relay; see the module's documentation.
#[derive(Debug)]
pub struct Bridge {
    left: End,
    right: End,
    calls: FxHashMap<CallId, Call>,
    streams: FxHashMap<StreamId, Stream>,
    is_paid: bool,
}

impl Bridge {
    /// Joins two sides. `is_paid` says that payment messages may pass: the Open carried a credential and the Accept a
    /// receipt.
    ///
    /// # Errors
    /// When both sides assign the same half of the ids. `[relay.parity]`
    pub fn new(left: &Terms, right: &Terms, is_paid: bool) -> Result<Self, SameParity> {
        if left.parity == right.parity {
            return Err(SameParity);
        }
        let (calls, streams) = Default::default();
        Ok(Bridge { left: End::new(left, right), right: End::new(right, left), calls, streams, is_paid })
    }

    fn end(&mut self, side: Side) -> &mut End {
        match side {
            Side::Left => &mut self.left,
            Side::Right => &mut self.right,
        }
    }

    /// What came from a side so far.
    pub const fn traffic_from(&self, side: Side) -> Traffic {
        match side {
            Side::Left => self.left.queue.traffic(),
            Side::Right => self.right.queue.traffic(),
        }
    }

    /// Takes in a whole frame of the connection that came from a side. Whom it concerns is asked by
    /// [`poll_told`](Self::poll_told).
    ///
    /// # Errors
    /// When the frame breaks a rule, or too much waits for the other side.
    pub fn handle_frame(&mut self, from: Side, frame: &Bytes) -> Result<(), RelayError> {
        let kind = *frame.first().ok_or(Violation::EmptyFrame)?;
        let mut payload = frame.clone();
        let rest = &mut payload;
        match kind {
            Items::KIND => self.receive_items(from, frame, &decode_list(rest)?, payload)?,
            Credit::KIND => self.receive_credit(from, &decode_header(rest)?)?,
            Request::KIND => self.receive_request(from, frame, decode_list(rest)?, payload)?,
            Response::KIND => self.receive_response(from, frame, decode_list(rest)?, payload)?,
            Window::KIND => self.receive_window(from, &decode_header(rest)?)?,
            StreamEnd::KIND => {
                let StreamEnd { stream, .. } = decode_header(rest)?;
                self.receive_ending(from, frame, stream)?;
            }
            Reset::KIND => {
                let Reset { stream, .. } = decode_header(rest)?;
                self.receive_ending(from, frame, stream)?;
            }
            Stop::KIND => self.receive_stop(from, frame, &decode_header(rest)?)?,
            Cancel::KIND => self.receive_cancel(from, frame, &decode_header(rest)?)?,
            Done::KIND => self.receive_done(from, frame, &decode_header(rest)?)?,
            Payment::KIND => {
                let Payment { .. } = decode_header(rest)?;
                self.receive_payment(from, frame, payload.len())?;
            }
            Draining::KIND => self.receive_draining(from, decode_header(rest)?)?,
            Drained::KIND => {
                let Drained { .. } = decode_header(rest)?;
                self.receive_drained(from, frame)?;
            }
            kind => return Err(Violation::UnknownKind { kind }.into()),
        }
        self.end(from).queue.count(frame.len());
        self.close_if_drained();
        Ok(())
    }

    /// A side that must be told that something is ready for it: it is told once, until [`take`](Self::take) finds nothing.
    pub fn poll_told(&mut self) -> Option<Side> {
        [Side::Left, Side::Right].into_iter().find(|side| self.end(side.other()).queue.must_tell())
    }

    /// A side has ended. What waits for it is dropped; the other one is sent what waits for that, then closed for this
    /// reason.
    pub fn finish(&mut self, from: Side, reason: Reason) {
        self.end(from.other()).queue.abandon();
        self.end(from).queue.finish(reason);
    }

    /// The next thing for a side, whose frames are of at most `max_frame` bytes and carry its own id of the connection.
    pub fn take(&mut self, to: Side, connection: ConnectionId, max_frame: usize) -> Relayed {
        let from = match to {
            Side::Left => &mut self.right,
            Side::Right => &mut self.left,
        };
        while let Some(entry) = from.queue.pop() {
            match entry {
                Entry::Frame(frame) => return from.queue.frame(frame, connection, max_frame),
                Entry::Credit(stream) => {
                    // Of a stream that has ended since there is nothing to grant.
                    let grant = self.streams.get_mut(&stream).and_then(|live| live.grant.take());
                    if let Some((limit, consumed)) = grant {
                        return Relayed::control(&Credit { connection, stream, limit, consumed });
                    }
                }
                Entry::Window => {
                    if let Some(limit) = from.window_grant.take() {
                        return Relayed::control(&Window { connection, limit });
                    }
                }
            }
        }
        from.queue.end()
    }

    // ---- calls

    fn receive_request(
        &mut self,
        from: Side,
        frame: &Bytes,
        request: Request,
        payload: Bytes,
    ) -> Result<(), RelayError> {
        let end = self.end(from);
        end.drain.check_call()?;
        // [call.id.next]
        if !end.call_ids.expect(request.call.0) {
            return Err(Violation::CallId { id: request.call }.into());
        }
        end.receive_body(payload.len())?;
        request.metadata.check().map_err(Violation::from)?;
        let (open, limit) = (end.open_calls.saturating_add(1), end.may_send.max_calls);
        if open > limit {
            let (value, limit) = (u64::from(open), u64::from(limit));
            return Err(Violation::AboveLimit { what: "open calls", value, limit }.into());
        }
        end.charge_tables(1)?;
        end.open_calls = open;
        let call = Call { caller: from, answered: false, cancelled: false, streams: 0, had_streams: false };
        self.calls.insert(request.call, call);
        self.register_slots(from, request.call, &request.slots)?;
        // [relay.no-propagate]
        let stripped = request.metadata.propagated().map(|metadata| Request { metadata, ..request });
        self.pass_body(from, frame, stripped, payload)
    }

    fn receive_response(
        &mut self,
        from: Side,
        frame: &Bytes,
        response: Response,
        payload: Bytes,
    ) -> Result<(), RelayError> {
        let id = response.call;
        let Some(call) = self.calls.get_mut(&id).filter(|call| call.caller == from.other()) else {
            return Err(Violation::UnknownCall { frame: Response::NAME, id }.into());
        };
        if core::mem::replace(&mut call.answered, true) {
            return Err(Violation::Unexpected { frame: Response::NAME, state: "the call was answered" }.into());
        }
        self.end(from).receive_body(payload.len())?;
        response.metadata.check().map_err(Violation::from)?;
        self.register_slots(from, id, &response.slots)?;
        if self.calls.get(&id).is_some_and(|call| !call.had_streams) {
            self.end_call(id);
        }
        let stripped = response.metadata.propagated().map(|metadata| Response { metadata, ..response });
        self.pass_body(from, frame, stripped, payload)
    }

    /// Queues a frame with a body, with another header if entries of its metadata must not be passed on.
    fn pass_body<H: Header>(
        &mut self,
        from: Side,
        frame: &Bytes,
        stripped: Option<H>,
        payload: Bytes,
    ) -> Result<(), RelayError> {
        let covered = payload.len() as u64;
        let queue = &mut self.end(from).queue;
        match stripped {
            None => queue.pass(frame, covered),
            Some(header) => queue.pass_with(&header, payload, covered),
        }
    }

    fn end_call(&mut self, id: CallId) {
        if let Some(call) = self.calls.remove(&id) {
            shrink(&mut self.calls);
            let end = self.end(call.caller);
            end.open_calls = end.open_calls.saturating_sub(1);
            end.tables.release(ENTRY_BYTES);
        }
    }

    fn receive_cancel(&mut self, from: Side, frame: &Bytes, cancel: &Cancel) -> Result<(), RelayError> {
        let was_made = self.end(from).has_called(cancel.call);
        match self.calls.get_mut(&cancel.call) {
            Some(call) if call.caller == from => {
                // Said twice it says nothing more.
                if !core::mem::replace(&mut call.cancelled, true) {
                    self.end(from).queue.pass(frame, 0)?;
                }
                Ok(())
            }
            // Listed race: the cancel crossed the answer.
            None if was_made => Ok(()),
            _ => Err(Violation::UnknownCall { frame: Cancel::NAME, id: cancel.call }.into()),
        }
    }

    fn receive_done(&mut self, from: Side, frame: &Bytes, done: &Done) -> Result<(), RelayError> {
        let id = done.call;
        match self.calls.get(&id) {
            Some(call) if call.caller == from.other() => {
                // Response and streams first. [call.end.last]
                if !call.answered || call.streams > 0 {
                    return Err(Violation::CallEndedEarly { id }.into());
                }
            }
            _ => return Err(Violation::UnknownCall { frame: Done::NAME, id }.into()),
        }
        self.end_call(id);
        self.end(from).queue.pass(frame, 0)
    }

    fn receive_window(&mut self, from: Side, window: &Window) -> Result<(), RelayError> {
        let sender = self.end(from.other());
        let before = sender.window;
        // What was cut off the first window stays cut off. [relay.credit]
        let limit = window.limit.checked_sub(sender.window_cut).filter(|&limit| limit >= before);
        let Some(limit) = limit else {
            let (from, to) = (before.saturating_add(sender.window_cut), window.limit);
            return Err(Violation::CreditWentBack { what: "body window", from, to }.into());
        };
        sender.window = limit;
        let receiver = self.end(from);
        if receiver.window_grant.replace(limit).is_none() {
            receiver.queue.push_grant(Entry::Window)?;
        }
        Ok(())
    }

    fn receive_payment(&mut self, from: Side, frame: &Bytes, bytes: usize) -> Result<(), RelayError> {
        if !self.is_paid {
            let state = "the connection is not a paid one";
            return Err(Violation::Unexpected { frame: Payment::NAME, state }.into());
        }
        // [pay.message.max]
        if bytes > MAX_PAYMENT_MESSAGE_BYTES {
            let (value, limit) = (bytes as u64, MAX_PAYMENT_MESSAGE_BYTES as u64);
            return Err(Violation::AboveLimit { what: "payment message", value, limit }.into());
        }
        self.end(from).queue.pass(frame, 0)
    }

    // ---- streams

    /// The stream, `None` if it has ended.
    fn stream(&mut self, id: StreamId, frame: &'static str) -> Result<Option<&mut Stream>, Violation> {
        if !self.left.has_announced(id) && !self.right.has_announced(id) {
            return Err(Violation::UnknownStream { frame, id });
        }
        Ok(self.streams.get_mut(&id))
    }

    fn receive_items(&mut self, from: Side, frame: &Bytes, items: &Items, payload: Bytes) -> Result<(), RelayError> {
        let id = items.stream;
        let max_item = self.end(from).may_send.max_item;
        let Some(stream) = self.stream(id, Items::NAME)? else {
            // [stream.end.last]
            return Err(Violation::Unexpected { frame: Items::NAME, state: "the stream has ended" }.into());
        };
        if stream.sender != from {
            return Err(Violation::UnknownStream { frame: Items::NAME, id }.into());
        }
        let run = ItemRun::parse(payload, max_item)?;
        if !items.slots.is_empty() && run.items() != 1 {
            return Err(Violation::Items("an item with streams in it travels alone").into());
        }
        stream.used = run.check_credit(stream.used, stream.limit)?;
        let call = stream.call;
        self.register_slots(from, call, &items.slots)?;
        let queue = &mut self.end(from).queue;
        match items.slots.is_empty() {
            true => queue.pass_run(id, run),
            false => queue.pass(frame, run.credit()),
        }
    }

    fn receive_ending(&mut self, from: Side, frame: &Bytes, id: StreamId) -> Result<(), RelayError> {
        const FRAME: &str = "End or Reset";
        let Some(stream) = self.stream(id, FRAME)? else {
            // [stream.end.once]
            return Err(Violation::Unexpected { frame: FRAME, state: "the stream has ended" }.into());
        };
        if stream.sender != from {
            return Err(Violation::UnknownStream { frame: FRAME, id }.into());
        }
        let (call, announced_by) = (stream.call, stream.announced_by);
        self.streams.remove(&id);
        shrink(&mut self.streams);
        let announcer = self.end(announced_by);
        announcer.open_streams = announcer.open_streams.saturating_sub(1);
        announcer.tables.release(ENTRY_BYTES);
        if let Some(call) = self.calls.get_mut(&call) {
            call.streams = call.streams.saturating_sub(1);
        }
        self.end(from).queue.pass(frame, 0)
    }

    fn receive_stop(&mut self, from: Side, frame: &Bytes, stop: &Stop) -> Result<(), RelayError> {
        // Listed race: the stop crossed the end.
        let Some(stream) = self.stream(stop.stream, Stop::NAME)? else { return Ok(()) };
        if stream.sender == from {
            return Err(Violation::UnknownStream { frame: Stop::NAME, id: stop.stream }.into());
        }
        // Said twice it says nothing more.
        if !core::mem::replace(&mut stream.stopped, true) {
            self.end(from).queue.pass(frame, 0)?;
        }
        Ok(())
    }

    fn receive_credit(&mut self, from: Side, credit: &Credit) -> Result<(), RelayError> {
        let cut = self.end(from.other()).stream_cut;
        // Listed race: the credit crossed the end.
        let Some(stream) = self.stream(credit.stream, Credit::NAME)? else { return Ok(()) };
        if stream.sender == from {
            return Err(Violation::UnknownStream { frame: Credit::NAME, id: credit.stream }.into());
        }
        // What was cut off the first credit stays cut off. [relay.credit]
        let limit = credit.limit.checked_sub(cut).filter(|&limit| limit >= stream.limit);
        let Some(limit) = limit else {
            let from = stream.limit.saturating_add(cut);
            return Err(Violation::CreditWentBack { what: "stream credit", from, to: credit.limit }.into());
        };
        stream.limit = limit;
        if stream.grant.replace((limit, credit.consumed)).is_none() {
            self.end(from).queue.push_grant(Entry::Credit(credit.stream))?;
        }
        Ok(())
    }

    /// Enters the streams that a frame announces.
    fn register_slots(&mut self, from: Side, id: CallId, slots: &[Slot]) -> Result<(), RelayError> {
        // [stream.slots.max]
        if slots.len() > MAX_SLOTS {
            let (value, limit) = (slots.len() as u64, MAX_SLOTS as u64);
            return Err(Violation::AboveLimit { what: "slots in one frame", value, limit }.into());
        }
        self.end(from).charge_tables(slots.len())?;
        for slot in slots {
            let end = self.end(from);
            // [stream.id.next]
            if !end.stream_ids.expect(slot.stream.0) {
                return Err(Violation::StreamId { id: slot.stream }.into());
            }
            let (open, limit) = (end.open_streams.saturating_add(1), end.may_send.max_streams);
            if open > limit {
                let (value, limit) = (u64::from(open), u64::from(limit));
                return Err(Violation::AboveLimit { what: "open streams", value, limit }.into());
            }
            end.open_streams = open;
            let sender = match slot.flow {
                Flow::ToPeer => from,
                Flow::FromPeer => from.other(),
            };
            let limit = u64::from(self.end(sender).may_send.stream_window);
            let stream = Stream { call: id, announced_by: from, sender, limit, used: 0, stopped: false, grant: None };
            self.streams.insert(slot.stream, stream);
            if let Some(call) = self.calls.get_mut(&id) {
                call.streams = call.streams.saturating_add(1);
                call.had_streams = true;
            }
        }
        Ok(())
    }
}

/// Reads a header with lists in it, whose length nothing else bounds by what the other side takes. `[relay.checks]`
fn decode_list<H: Header>(frame: &mut Bytes) -> Result<H, Violation> {
    let whole = frame.len();
    let header = decode_header(frame)?;
    let bytes = whole.saturating_sub(frame.len());
    if bytes > MAX_PASSED_HEADER {
        let (value, limit) = (bytes as u64, MAX_PASSED_HEADER as u64);
        return Err(Violation::AboveLimit { what: "header of a frame that is relayed", value, limit });
    }
    Ok(header)
}

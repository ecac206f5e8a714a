//! The witness: what really left the payer and the payee, as it was seen on the wire between them.
//!
//! It reads the frames that pass the proxy and trusts no book of either side: vouchers and epochs as the payer sent
//! them, receipts as the payee sent them, and the price of every frame that the payee delivered. It outlives every kill,
//! and what a process had written to its socket before it died is still read.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::time::Instant;

use bytes::{Buf, Bytes, BytesMut};
use tollway::protocol::frame::{FrameDecoder, PREFACE};
use tollway::protocol::id::{CallId, ConnectionId, StreamId};
use tollway::protocol::message::{
    Accept, Close, Done, Header, Items, Open, Payment, Reject, Request, Response, Slot, Status, decode_header,
};
use tollway::protocol::payment::{Amount, ChannelDescriptor, ChannelId, Credential, PaymentMessage, Receipt};

use crate::scene::{CALL_PRICE, ITEM_PRICE, MAX_AHEAD};

/// Larger than any frame of the workload.
const MAX_FRAME: usize = 1 << 20;

/// What was seen of one channel. All amounts are cumulative base units.
#[derive(Debug, Clone, Default)]
pub(crate) struct Seen {
    /// Every amount that the payer signed, in vouchers and close vouchers.
    pub(crate) signed: BTreeSet<u128>,
    /// The price of all that the payee delivered.
    pub(crate) delivered: u128,
    /// The most that an honest payer can have counted: what was delivered, and what stands as lost at its last opening.
    pub(crate) counted: u128,
    /// By how much a voucher was ever above what was counted and `max_ahead`.
    pub(crate) signed_beyond: u128,
    /// The highest `accepted` that the payee has stated.
    pub(crate) stated_accepted: u128,
    /// The highest `settled` that the payee has stated.
    pub(crate) stated_settled: u128,
    /// The greatest epoch that the payer has sent.
    pub(crate) offered_epoch: u64,
    /// The greatest epoch that the payee has accepted.
    pub(crate) accepted_epoch: u64,
    /// The greatest epoch under which the payer has gone on after the payee's acceptance: then both have written what
    /// was lost before.
    pub(crate) active_epoch: u64,
    /// How often the payee has accepted a connection on it.
    pub(crate) openings: u64,
}

impl Seen {
    /// The highest amount that the payer signed.
    pub(crate) fn highest(&self) -> u128 {
        self.signed.last().copied().unwrap_or(0)
    }
}

/// Messages that are kept for who looks into a finding: those of some openings and what they paid.
const TAPE: usize = 400;

/// All channels that were seen.
#[derive(Debug)]
pub(crate) struct Witness {
    pub(crate) channels: BTreeMap<ChannelId, Seen>,
    begun: Instant,
    /// The last messages about money.
    tape: VecDeque<String>,
    /// Frames that could not be read: a defect of the witness, and reported as one.
    pub(crate) garbled: Vec<String>,
}

impl Default for Witness {
    fn default() -> Self {
        Witness { channels: BTreeMap::new(), begun: Instant::now(), tape: VecDeque::new(), garbled: Vec::new() }
    }
}

impl Witness {
    fn note(&mut self, channel: ChannelId, what: fmt::Arguments<'_>) {
        if self.tape.len() == TAPE {
            self.tape.pop_front();
        }
        let (at, [first, second, ..]) = (self.begun.elapsed().as_secs_f64(), channel.0);
        self.tape.push_back(format!("{at:9.4} {first:02x}{second:02x} {what}"));
    }

    /// Notes what is no message, such as a kill.
    pub(crate) fn remark(&mut self, what: &str) {
        self.note(ChannelId([0; 32]), format_args!("== {what}"));
    }

    /// The last messages about money, oldest first, one to a line.
    pub(crate) fn tape(&self) -> String {
        self.tape.iter().map(|line| format!("{line}\n")).collect()
    }

    /// The price of all that was ever delivered.
    pub(crate) fn delivered(&self) -> u128 {
        self.channels.values().map(|seen| seen.delivered).sum()
    }

    /// How often the payee has accepted a paid connection.
    pub(crate) fn openings(&self) -> u64 {
        self.channels.values().map(|seen| seen.openings).sum()
    }

    /// Vouchers and close vouchers that were seen.
    pub(crate) fn vouchers(&self) -> usize {
        self.channels.values().map(|seen| seen.signed.len()).sum()
    }
}

/// Which way bytes go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// Payer to payee.
    Up,
    /// Payee to payer.
    Down,
}

/// A call: what its frames have cost, and what the payee says that it has cost.
#[derive(Debug, Default)]
struct Call {
    delivered: u128,
    counted: u128,
}

/// A paid connection of a session.
#[derive(Debug)]
struct Paid {
    channel: ChannelId,
    descriptor: ChannelDescriptor,
    epoch: u64,
    accepted: bool,
    calls: HashMap<CallId, Call>,
    streams: HashMap<StreamId, CallId>,
}

/// One session between payer and payee.
#[derive(Debug, Default)]
pub(crate) struct Conversation {
    halves: [BytesMut; 2],
    begun: [bool; 2],
    paid: HashMap<ConnectionId, Paid>,
}

type Garbled = Box<dyn std::error::Error + Send + Sync>;

impl Conversation {
    /// Takes in what has passed one way.
    pub(crate) fn feed(&mut self, way: Way, bytes: &[u8], witness: &mut Witness) {
        let half = way as usize;
        self.halves[half].extend_from_slice(bytes);
        if !self.begun[half] {
            if self.halves[half].len() < PREFACE.len() {
                return;
            }
            self.halves[half].advance(PREFACE.len());
            self.begun[half] = true;
        }
        let mut decoder = FrameDecoder::new(MAX_FRAME);
        loop {
            let frame = match decoder.decode(&mut self.halves[half]) {
                Ok(Some(frame)) => frame,
                Ok(None) => return,
                Err(error) => return witness.garbled.push(format!("{way:?}: {error}")),
            };
            let read = match way {
                Way::Up => self.read_up(frame, witness),
                Way::Down => self.read_down(frame, witness),
            };
            if let Err(error) = read {
                witness.garbled.push(format!("{way:?}: {error}"));
            }
        }
    }

    fn read_up(&mut self, mut frame: Bytes, witness: &mut Witness) -> Result<(), Garbled> {
        match frame.first().copied() {
            Some(Open::KIND) => {
                let open: Open = decode_header(&mut frame)?;
                if !frame.is_empty() {
                    self.offer(open.connection, Credential::decode(&frame)?, witness);
                }
            }
            Some(Request::KIND) => {
                let request: Request = decode_header(&mut frame)?;
                self.note_active(request.connection, witness);
            }
            Some(Payment::KIND) => {
                let payment: Payment = decode_header(&mut frame)?;
                self.note_active(payment.connection, witness);
                let Some(paid) = self.paid.get(&payment.connection) else { return Ok(()) };
                let message = PaymentMessage::decode(&frame)?;
                witness.note(paid.channel, format_args!("payer: {}", told(&message)));
                let seen = witness.channels.entry(paid.channel).or_default();
                match message {
                    PaymentMessage::Voucher { amount, .. } => {
                        let most = seen.counted.saturating_add(MAX_AHEAD);
                        seen.signed_beyond = seen.signed_beyond.max(amount.units().saturating_sub(most));
                        seen.signed.insert(amount.units());
                    }
                    PaymentMessage::Close { voucher, .. } => {
                        seen.signed.insert(voucher.amount.units());
                    }
                    _ => {}
                }
            }
            Some(Close::KIND) => {
                let close: Close = decode_header(&mut frame)?;
                if let Some(paid) = self.paid.get(&close.connection) {
                    witness.note(paid.channel, format_args!("payer: ends the connection, {}", close.reason.text));
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn offer(&mut self, connection: ConnectionId, credential: Credential, witness: &mut Witness) {
        let (channel, epoch) = (credential.descriptor.id(), credential.epoch);
        witness.note(channel, format_args!("payer: opens at epoch {epoch}, received {}", credential.received));
        let seen = witness.channels.entry(channel).or_default();
        seen.offered_epoch = seen.offered_epoch.max(epoch);
        let paid = Paid {
            channel,
            descriptor: credential.descriptor,
            epoch,
            accepted: false,
            calls: HashMap::new(),
            streams: HashMap::new(),
        };
        self.paid.insert(connection, paid);
    }

    /// The payer goes on with what the payee has accepted.
    fn note_active(&mut self, connection: ConnectionId, witness: &mut Witness) {
        if let Some(paid) = self.paid.get(&connection).filter(|paid| paid.accepted) {
            let seen = witness.channels.entry(paid.channel).or_default();
            seen.active_epoch = seen.active_epoch.max(paid.epoch);
        }
    }

    fn read_down(&mut self, mut frame: Bytes, witness: &mut Witness) -> Result<(), Garbled> {
        match frame.first().copied() {
            Some(Accept::KIND) => {
                let accept: Accept = decode_header(&mut frame)?;
                if let Some(paid) = self.paid.get_mut(&accept.connection) {
                    paid.accepted = true;
                    let seen = witness.channels.entry(paid.channel).or_default();
                    seen.accepted_epoch = seen.accepted_epoch.max(paid.epoch);
                    seen.openings += 1;
                    let receipt = paid.receipt(PaymentMessage::decode(&frame)?, seen)?;
                    // What did not arrive stands as lost from here.
                    seen.counted = seen.counted.max(receipt.map_or(0, |receipt| receipt.spent.units()));
                    witness.note(paid.channel, format_args!("payee: accepts, {}", stated(receipt)));
                }
            }
            Some(Reject::KIND) => {
                let reject: Reject = decode_header(&mut frame)?;
                if let Some(paid) = self.paid.get(&reject.connection) {
                    witness.note(paid.channel, format_args!("payee: rejects, {}", reject.reason.text));
                }
            }
            Some(Close::KIND) => {
                let close: Close = decode_header(&mut frame)?;
                if let Some(paid) = self.paid.get(&close.connection) {
                    witness.note(paid.channel, format_args!("payee: ends the connection, {}", close.reason.text));
                }
            }
            Some(Payment::KIND) => {
                let payment: Payment = decode_header(&mut frame)?;
                if let Some(paid) = self.paid.get_mut(&payment.connection) {
                    let seen = witness.channels.entry(paid.channel).or_default();
                    let message = PaymentMessage::decode(&frame)?;
                    let text = told(&message);
                    let receipt = paid.receipt(message, seen)?;
                    witness.note(paid.channel, format_args!("payee: {text} {}", stated(receipt)));
                }
            }
            Some(Response::KIND) => {
                let answer: Response = decode_header(&mut frame)?;
                let cost = if answer.status == Status::Ok { CALL_PRICE + frame.len() as u128 } else { 0 };
                self.charge(answer.connection, answer.call, (cost, answer.charged), witness);
                if let Some(paid) = self.paid.get_mut(&answer.connection) {
                    let streams = answer.slots.iter().map(|Slot { stream, .. }| (*stream, answer.call));
                    paid.streams.extend(streams);
                }
            }
            Some(Items::KIND) => {
                let items: Items = decode_header(&mut frame)?;
                let cost = cost_of_items(&frame)?;
                let call = self.paid.get(&items.connection).and_then(|paid| paid.streams.get(&items.stream).copied());
                if let Some(call) = call {
                    self.charge(items.connection, call, (cost, Amount::ZERO), witness);
                }
            }
            Some(Done::KIND) => {
                let done: Done = decode_header(&mut frame)?;
                self.charge(done.connection, done.call, (0, done.charged), witness);
            }
            _ => {}
        }
        Ok(())
    }

    /// Books what a frame delivers, and what the payee says that the call has cost, where that is more: a call that was
    /// cancelled has its price.
    fn charge(&mut self, on: ConnectionId, call: CallId, (cost, stated): (u128, Amount), witness: &mut Witness) {
        let Some(paid) = self.paid.get_mut(&on) else { return };
        let seen = witness.channels.entry(paid.channel).or_default();
        let call = paid.calls.entry(call).or_default();
        call.delivered += cost;
        seen.delivered += cost;
        let counted = call.counted.max(call.delivered).max(stated.units());
        seen.counted += counted - call.counted;
        call.counted = counted;
    }
}

impl Paid {
    /// What the payee states binds it.
    fn receipt(&self, message: PaymentMessage, seen: &mut Seen) -> Result<Option<Receipt>, Garbled> {
        match message {
            PaymentMessage::Receipt(signed) => {
                let receipt = signed.verify(&self.descriptor)?;
                seen.stated_accepted = seen.stated_accepted.max(receipt.accepted.units());
                seen.stated_settled = seen.stated_settled.max(receipt.settled.units());
                Ok(Some(receipt))
            }
            PaymentMessage::NeedVoucher { accepted, .. } => {
                seen.stated_accepted = seen.stated_accepted.max(accepted.units());
                Ok(None)
            }
            _ => Ok(None),
        }
    }
}

/// A message in few words.
fn told(message: &PaymentMessage) -> String {
    match message {
        PaymentMessage::Voucher { amount, received, .. } => format!("voucher {amount}, received {received}"),
        PaymentMessage::NeedVoucher { required, accepted, spent, deposit } => {
            format!("needs {required}, accepted {accepted}, spent {spent}, deposit {deposit}")
        }
        PaymentMessage::Close { voucher, .. } => format!("closes at {}", voucher.amount),
        PaymentMessage::Receipt(_) => "receipt".to_owned(),
        other => format!("{other:?}"),
    }
}

fn stated(receipt: Option<Receipt>) -> String {
    receipt.map_or(String::new(), |Receipt { accepted, spent, settled, status, .. }| {
        format!("{status:?}: accepted {accepted}, spent {spent}, settled {settled}")
    })
}

/// The price of a run of items: n × (varint length, bytes), whose lengths are free.
fn cost_of_items(mut payload: &[u8]) -> Result<u128, Garbled> {
    let mut cost = 0;
    while !payload.is_empty() {
        let (mut length, mut shift) = (0_usize, 0);
        loop {
            let byte = payload.try_get_u8()?;
            length |= usize::from(byte & 0x7f) << shift;
            shift += 7;
            if byte < 0x80 {
                break;
            }
        }
        payload = payload.get(length..).ok_or("an item is cut off")?;
        cost += ITEM_PRICE + length as u128;
    }
    Ok(cost)
}

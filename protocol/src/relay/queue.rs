//! What waits in a relay for one side, in the order in which it came.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::{Buf, Bytes};

use super::RelayError;
use crate::error::{Reason, code};
use crate::id::{ConnectionId, StreamId};
use crate::memory::{Ledger, MemoryPool};
use crate::message::{Head, Header, Items, encode_head};
use crate::stream::{ItemRun, split_front};

/// Bytes of frames that may wait for a side beyond what credit covers, 16 MiB.
///
/// Bodies and items are bounded by the credit of whom they are for, and count here only as far as they take more than
/// eight times that. What else a side may send without being granted it (cancels, ends of streams, grants, answers
/// without a body) is a hundred bytes and some a frame: an honest side that is not read comes to a few thousand of them,
/// and more than a hundred thousand have room.
pub const MAX_UNCOVERED: u64 = 16 * 1024 * 1024;

/// What a frame takes beside its bytes: the entry in the queue, and the allocation of a detached frame.
const ENTRY_BYTES: u64 = 128;

/// How much memory a byte of credit may stand for: an item of one byte costs 17 of credit and some 136 of memory.
const COVERED_FACTOR: u64 = 8;

/// Frames below this size are copied out of the block that they were read into, so that a frame that waits pins what it
/// holds and not the block.
const DETACH_BELOW: usize = 16 * 1024;

/// The same while the memory budget is used: half of the largest block that conduits read into.
const DETACH_BELOW_CROWDED: usize = 128 * 1024;

/// What share of the memory budget may wait before larger frames are copied, too: a frame that is not copied pins at most
/// sixteen times what it counts, so a sixteenth pins no more than the budget. What is passed on at once, as bulk is, is
/// not copied.
const CROWDED_SHARE: u64 = 16;

/// What passed in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Frames of the connection.
    pub frames: u64,
    /// Their bytes, without the length in front of each.
    pub bytes: u64,
}

/// The next thing to do for a side.
#[derive(Debug)]
pub enum Relayed {
    /// A frame to be sent.
    Frame {
        /// Its kind and its header, or the beginning of it.
        head: Head,
        /// What follows.
        payload: Bytes,
    },
    /// Everything was sent, and the connection is to be closed.
    Close(Reason),
    /// Nothing for now.
    Empty,
}

impl Relayed {
    pub(super) fn control<H: Header>(header: &H) -> Self {
        Relayed::Frame { head: encode_head(header), payload: Bytes::new() }
    }
}

/// Something that waits.
#[derive(Debug)]
pub(super) enum Entry {
    Frame(Waiting),
    /// A Credit with the latest grant of a stream.
    Credit(StreamId),
    /// A Window with the latest grant.
    Window,
}

/// A frame that waits.
#[derive(Debug)]
pub(super) struct Waiting {
    content: Content,
    uncovered: u64,
    /// What it counts against the memory budget, in bytes.
    memory: u64,
}

/// What a frame has beside the connection's id, which is another one on the other side.
#[derive(Debug)]
enum Content {
    /// Kind, and all that follows the id.
    AsItCame(u8, Bytes),
    /// Kind, what follows the id in the new header, payload.
    NewHeader(u8, Box<[u8]>, Bytes),
    /// Items that may be cut.
    Run(StreamId, ItemRun),
}

/// The frames that wait for a side, and what comes after the last.
#[derive(Debug)]
pub(super) struct Queue {
    entries: VecDeque<Entry>,
    uncovered: u64,
    /// What all that waits counts.
    memory: Ledger,
    closing: Closing,
    /// Whom the frames are for has been told that something waits.
    told: bool,
    traffic: Traffic,
}

/// How a direction ends.
#[derive(Debug, Default, PartialEq, Eq)]
enum Closing {
    /// More may come.
    #[default]
    Open,
    /// Nothing comes any more; to be closed once what waits is sent.
    Due(Reason),
    /// It was closed.
    Done,
}

impl Queue {
    /// A queue whose content counts against `pool`.
    pub(super) fn new(pool: Option<Arc<MemoryPool>>) -> Self {
        Queue {
            entries: VecDeque::new(),
            uncovered: 0,
            memory: Ledger::of_pool(pool),
            closing: Closing::Open,
            told: false,
            traffic: Traffic::default(),
        }
    }

    pub(super) const fn traffic(&self) -> Traffic {
        self.traffic
    }

    /// Counts a frame that came.
    pub(super) fn count(&mut self, bytes: usize) {
        self.traffic.frames = self.traffic.frames.saturating_add(1);
        self.traffic.bytes = self.traffic.bytes.saturating_add(bytes as u64);
    }

    /// Passes a frame on as it is. `covered` is the credit that its sender used for it, in bytes.
    pub(super) fn pass(&mut self, frame: &Bytes, covered: u64) -> Result<(), RelayError> {
        let kind = frame.first().copied().unwrap_or_default();
        let mut rest = frame.clone();
        rest.advance(after_connection(frame));
        let rest = self.detach(rest);
        self.enter(Content::AsItCame(kind, rest), covered)
    }

    /// Passes a frame on with another header, whose connection is not looked at.
    pub(super) fn pass_with<H: Header>(&mut self, header: &H, payload: Bytes, covered: u64) -> Result<(), RelayError> {
        let head = encode_head(header);
        let rest = head.get(after_connection(&head)..).unwrap_or_default();
        let payload = self.detach(payload);
        self.enter(Content::NewHeader(H::KIND, rest.into(), payload), covered)
    }

    /// Passes items without streams in them on. Those that a peer with smaller frames cannot take at once are cut when
    /// they are taken.
    pub(super) fn pass_run(&mut self, stream: StreamId, run: ItemRun) -> Result<(), RelayError> {
        let covered = run.credit();
        let run = if self.must_detach(run.as_bytes().len()) { run.detached() } else { run };
        self.enter(Content::Run(stream, run), covered)
    }

    fn must_detach(&self, bytes: usize) -> bool {
        bytes < DETACH_BELOW || (bytes < DETACH_BELOW_CROWDED && self.memory.is_pool_used_above(CROWDED_SHARE))
    }

    fn detach(&self, bytes: Bytes) -> Bytes {
        if self.must_detach(bytes.len()) { Bytes::copy_from_slice(&bytes) } else { bytes }
    }

    fn enter(&mut self, content: Content, covered: u64) -> Result<(), RelayError> {
        let bytes = match &content {
            Content::AsItCame(_, rest) => rest.len(),
            Content::NewHeader(_, head, payload) => head.len().saturating_add(payload.len()),
            Content::Run(_, run) => run.as_bytes().len(),
        };
        let memory = (bytes as u64).saturating_add(ENTRY_BYTES);
        let uncovered = memory.saturating_sub(covered.saturating_mul(COVERED_FACTOR));
        self.push(Entry::Frame(Waiting { content, uncovered, memory }), uncovered, memory)
    }

    /// Queues a grant; there is one entry for each thing that can be granted.
    pub(super) fn push_grant(&mut self, grant: Entry) -> Result<(), RelayError> {
        self.push(grant, ENTRY_BYTES, ENTRY_BYTES)
    }

    fn push(&mut self, entry: Entry, uncovered: u64, memory: u64) -> Result<(), RelayError> {
        // What comes behind the end is for nobody.
        if self.closing != Closing::Open {
            return Ok(());
        }
        self.uncovered = self.uncovered.saturating_add(uncovered);
        if self.uncovered > MAX_UNCOVERED {
            return Err(RelayError::Overrun);
        }
        // [session.memory.bound]
        if !self.memory.try_charge(memory) {
            return Err(RelayError::OutOfMemory);
        }
        self.entries.push_back(entry);
        Ok(())
    }

    /// Nobody takes anything any more.
    pub(super) fn abandon(&mut self) {
        (self.entries, self.uncovered, self.closing) = (VecDeque::new(), 0, Closing::Done);
        self.memory.release(self.memory.charged());
        self.memory.rest();
    }

    /// Nothing comes any more.
    pub(super) fn finish(&mut self, reason: Reason) {
        if self.closing == Closing::Open {
            self.closing = Closing::Due(reason);
        }
    }

    /// Whether whom the frames are for must be told that something waits. True once, until all is taken.
    pub(super) fn must_tell(&mut self) -> bool {
        let waits = !self.entries.is_empty() || matches!(self.closing, Closing::Due(_));
        waits && !core::mem::replace(&mut self.told, true)
    }

    pub(super) fn pop(&mut self) -> Option<Entry> {
        let entry = self.entries.pop_front()?;
        let (uncovered, memory) = match &entry {
            Entry::Frame(frame) => (frame.uncovered, frame.memory),
            Entry::Credit(_) | Entry::Window => (ENTRY_BYTES, ENTRY_BYTES),
        };
        self.uncovered = self.uncovered.saturating_sub(uncovered);
        self.memory.release(memory);
        if self.entries.is_empty() {
            self.memory.rest();
        }
        Some(entry)
    }

    /// What comes when nothing waits any more.
    pub(super) fn end(&mut self) -> Relayed {
        self.told = false;
        match core::mem::replace(&mut self.closing, Closing::Done) {
            Closing::Open => {
                self.closing = Closing::Open;
                Relayed::Empty
            }
            Closing::Due(reason) => Relayed::Close(reason),
            Closing::Done => Relayed::Empty,
        }
    }

    /// Makes a frame that waited one of another connection. What does not fit goes back to the front. One that its taker
    /// would have to answer with ProtocolError ends the connection instead. `[relay.checks]`
    pub(super) fn frame(&mut self, frame: Waiting, connection: ConnectionId, max_frame: usize) -> Relayed {
        let (head, payload) = match frame.content {
            Content::AsItCame(kind, rest) => (begin(kind, connection), rest),
            Content::NewHeader(kind, rest, payload) => {
                let mut head = begin(kind, connection);
                head.extend_from_slice(&rest);
                (head, payload)
            }
            Content::Run(stream, mut run) => {
                let head = encode_head(&Items { connection, stream, slots: Vec::new() });
                let room = max_frame.saturating_sub(head.len());
                if run.as_bytes().len() <= room {
                    return Relayed::Frame { head, payload: run.as_bytes().clone() };
                }
                let Ok(first) = split_front(&mut run, room, u64::MAX, |_, _| true) else { return Relayed::Empty };
                if run.items() > 0 {
                    // Its credit covers it as it did before.
                    let content = Content::Run(stream, run);
                    self.entries.push_front(Entry::Frame(Waiting { content, uncovered: 0, memory: 0 }));
                }
                (head, first.as_bytes().clone())
            }
        };
        if head.len().saturating_add(payload.len()) > max_frame {
            self.abandon();
            return Relayed::Close(Reason::new(
                code::LIMIT,
                "a frame to be relayed is larger than the other side takes",
            ));
        }
        Relayed::Frame { head, payload }
    }
}

/// Kind and connection.
fn begin(kind: u8, connection: ConnectionId) -> Head {
    let mut head = Head::new();
    head.push(kind);
    let mut rest = connection.0;
    while rest > 0x7f {
        head.push((rest & 0x7f) as u8 | 0x80);
        rest >>= 7;
    }
    head.push(rest as u8);
    head
}

/// Bytes of a frame up to the end of its connection's id. The frame was decoded before, so there is one.
fn after_connection(frame: &[u8]) -> usize {
    let id = frame.iter().skip(1).take_while(|&byte| byte & 0x80 != 0).count();
    id.saturating_add(2).min(frame.len())
}

//! The receiving end: an inbox that has room for all that was granted, and the grants.

use std::collections::VecDeque;

use super::StreamKey;
use super::run::ItemRun;
use crate::error::Violation;

/// Runs in an inbox from which on small ones that follow are packed: a reader that keeps up takes each as it came.
const PACK_FROM: usize = 8;
/// Runs below this size, in bytes, are packed: an entry of its own, with its allocation, takes up to 200 bytes beside the
/// items, of which an item of one byte pays 17 in credit.
const PACK_BELOW: usize = 512;
/// Bytes from which on a packed run takes no more: so that a reader does not free too much at once.
const PACK_TARGET: usize = 16 * 1024;

/// How a stream ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// The sender sent its last item.
    End,
    /// The sender gave up with this code; items before it are still there.
    Reset(u32),
}

/// A Credit that should be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grant {
    /// Credit since the stream began.
    pub limit: u64,
    /// Items that were consumed since the stream began.
    pub consumed: u64,
}

/// The receiving end of a stream.
///
/// Its inbox holds at most the credit that was granted plus one largest item, because an item that starts without
/// credit is a violation. So taking an item in never waits, and one stream that is not read never delays another.
#[derive(Debug)]
pub struct RecvStream {
    inbox: VecDeque<(ItemRun, Vec<StreamKey>)>,
    /// What comes behind the inbox: small runs that came while nobody read.
    packed: Option<Box<Packed>>,
    window: u64,
    limit: u64,
    received: u64,
    consumed: u64,
    consumed_items: u64,
    stopped: bool,
    ending: Option<Ending>,
}

/// Small runs in one.
#[derive(Debug)]
struct Packed {
    bytes: Vec<u8>,
    items: u32,
    item_bytes: u64,
}

impl Packed {
    fn append(&mut self, run: &ItemRun) {
        self.bytes.extend_from_slice(run.as_bytes());
        self.items = self.items.saturating_add(run.items());
        self.item_bytes = self.item_bytes.saturating_add(run.item_bytes());
    }

    fn into_run(self) -> ItemRun {
        ItemRun::trusted(self.bytes.into(), self.items, self.item_bytes)
    }
}

impl RecvStream {
    /// A stream whose sender may have `window` bytes of credit under way.
    pub fn new(window: u64) -> Self {
        RecvStream {
            inbox: VecDeque::new(),
            packed: None,
            window,
            limit: window,
            received: 0,
            consumed: 0,
            consumed_items: 0,
            stopped: false,
            ending: None,
        }
    }

    /// Sets the window of a stream that was created before its connection was known.
    pub fn bind(&mut self, window: u64) {
        (self.window, self.limit) = (window, window);
    }

    /// Takes items in. `slots` are the streams of a single item's slots. They come back if the stream was stopped, and
    /// must be ended with [`Machine::discard_stream`](crate::session::Machine::discard_stream).
    ///
    /// # Errors
    /// When an item started without credit. `[stream.credit.start]`
    pub fn handle_items(&mut self, run: ItemRun, slots: Vec<StreamKey>) -> Result<Vec<StreamKey>, Violation> {
        self.received = run.check_credit(self.received, self.limit)?;
        if self.stopped {
            return Ok(slots);
        }
        if self.inbox.len() >= PACK_FROM && slots.is_empty() && run.as_bytes().len() < PACK_BELOW {
            self.pack(&run);
        } else {
            self.seal();
            self.inbox.push_back((run, slots));
        }
        Ok(Vec::new())
    }

    /// Puts a small run to the others, so that what waits takes little more than the credit that it used.
    #[cold]
    fn pack(&mut self, run: &ItemRun) {
        if self.packed.as_ref().is_some_and(|packed| packed.bytes.len() >= PACK_TARGET) {
            self.seal();
        }
        let empty = || Box::new(Packed { bytes: Vec::new(), items: 0, item_bytes: 0 });
        self.packed.get_or_insert_with(empty).append(run);
    }

    /// What was packed becomes a run like any other.
    fn seal(&mut self) {
        if let Some(packed) = self.packed.take() {
            self.inbox.push_back((packed.into_run(), Vec::new()));
        }
    }

    /// The sender has ended the stream.
    pub fn handle_ending(&mut self, ending: Ending) {
        self.ending.get_or_insert(ending);
    }

    /// Takes the oldest run out of the inbox. Its items count as consumed when [`consume`](Self::consume) says so.
    pub fn take_run(&mut self) -> Option<(ItemRun, Vec<StreamKey>)> {
        self.inbox.pop_front().or_else(|| self.packed.take().map(|packed| (packed.into_run(), Vec::new())))
    }

    /// Whether a run is in the inbox.
    pub fn has_run(&self) -> bool {
        !self.inbox.is_empty() || self.packed.is_some()
    }

    /// Whether the receiver wants no more.
    pub const fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// How the stream ended, once its items were all taken.
    pub fn ending(&self) -> Option<Ending> {
        self.ending.filter(|_| !self.has_run())
    }

    /// Whether the sender has ended the stream, be there items left or not.
    pub const fn has_ended(&self) -> bool {
        self.ending.is_some()
    }

    /// The receiver is done with items that cost `credit`. Returns a grant when half of the window is free again: rarer
    /// grants would stall the sender, more frequent ones cost frames.
    pub fn consume(&mut self, credit: u64, items: u64) -> Option<Grant> {
        self.consumed = self.consumed.saturating_add(credit);
        self.consumed_items = self.consumed_items.saturating_add(items);
        let limit = self.consumed.saturating_add(self.window);
        let due = limit.saturating_sub(self.limit).saturating_mul(2) >= self.window;
        if !due || self.stopped || self.ending.is_some() {
            return None;
        }
        self.limit = limit;
        Some(Grant { limit, consumed: self.consumed_items })
    }

    /// The window has grown to `window` bytes, and the grant that was made last with it.
    pub fn widen(&mut self, window: u64) {
        self.limit = self.limit.saturating_add(window.saturating_sub(self.window));
        self.window = window;
    }

    /// The receiver wants no more: what is in the inbox is dropped, and so is what still comes. Returns whether a Stop
    /// should be sent, and the streams of the slots of dropped items: each must be ended with
    /// [`Machine::discard_stream`](crate::session::Machine::discard_stream), or their call would never end.
    #[must_use]
    pub fn stop(&mut self) -> (bool, Vec<StreamKey>) {
        let unseen = self.inbox.drain(..).flat_map(|(_, slots)| slots).collect();
        self.packed = None;
        let send = !self.stopped && self.ending.is_none();
        self.stopped = true;
        (send, unseen)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::write_item;
    use bytes::Bytes;

    fn run(lengths: &[usize]) -> ItemRun {
        let mut buffer = Vec::new();
        lengths.iter().for_each(|&length| write_item(&mut buffer, &vec![0; length]));
        ItemRun::parse(Bytes::from(buffer), 1 << 20).unwrap()
    }

    #[test]
    fn the_last_item_may_pass_the_limit_if_it_started_below_it() {
        let mut stream = RecvStream::new(100);
        assert_eq!(
            stream.handle_items(run(&[83, 5000]), vec![]),
            Ok(vec![]),
            "99 of 100 are used when the second starts"
        );
        assert_eq!(stream.handle_items(run(&[0]), vec![]), Err(Violation::NoCredit { what: "item" }));
        let mut stream = RecvStream::new(99);
        assert_eq!(stream.handle_items(run(&[83, 0]), vec![]), Err(Violation::NoCredit { what: "item" }));
    }

    #[test]
    fn empty_items_use_up_credit_too() {
        let mut stream = RecvStream::new(160);
        assert_eq!(stream.handle_items(run(&[0; 10]), vec![]), Ok(vec![]));
        assert!(stream.handle_items(run(&[0]), vec![]).is_err());
    }

    #[test]
    fn a_grant_comes_when_half_of_the_window_is_free() {
        let mut stream = RecvStream::new(1000);
        stream.handle_items(run(&[484, 484]), vec![]).unwrap();
        assert_eq!(stream.consume(499, 1), None);
        assert_eq!(stream.consume(1, 1), Some(Grant { limit: 1500, consumed: 2 }));
        assert_eq!(stream.consume(499, 0), None);
        assert_eq!(stream.consume(1, 0), Some(Grant { limit: 2000, consumed: 2 }));
    }

    #[test]
    fn a_stopped_stream_drops_what_comes_and_grants_nothing() {
        let mut stream = RecvStream::new(100);
        let mut keys = slotmap::SlotMap::<StreamKey, ()>::with_key();
        let (seen, late) = (keys.insert(()), keys.insert(()));
        assert_eq!(stream.handle_items(run(&[10]), vec![seen]), Ok(vec![]));
        assert_eq!(stream.stop(), (true, vec![seen]), "nobody else knows the streams of a dropped item");
        assert_eq!(stream.stop(), (false, vec![]), "said once");
        assert_eq!(stream.handle_items(run(&[10]), vec![late]), Ok(vec![late]));
        assert!(!stream.has_run());
        assert_eq!(stream.consume(1000, 1), None);
    }

    #[test]
    fn the_ending_is_seen_after_the_items() {
        let mut stream = RecvStream::new(100);
        stream.handle_items(run(&[10]), vec![]).unwrap();
        stream.handle_ending(Ending::End);
        assert_eq!(stream.ending(), None);
        assert!(stream.take_run().is_some());
        assert_eq!(stream.ending(), Some(Ending::End));
    }

    /// What waits takes about the memory that its credit says, in however small frames it came.
    #[test]
    fn small_frames_that_nobody_reads_are_packed_and_come_out_in_order() {
        let mut stream = RecvStream::new(1 << 20);
        let small = |number: u32| {
            let mut framed = Vec::new();
            write_item(&mut framed, &number.to_le_bytes());
            ItemRun::parse(framed.into(), 1 << 20).unwrap()
        };
        let large = |number: u32| {
            let mut framed = Vec::new();
            write_item(&mut framed, &number.to_le_bytes().repeat(1_000));
            ItemRun::parse(framed.into(), 1 << 20).unwrap()
        };
        for number in 0..20_000 {
            let run = if number == 10_000 { large(number) } else { small(number) };
            stream.handle_items(run, vec![]).unwrap();
        }
        let packed = stream.packed.as_ref().map_or(0, |packed| packed.bytes.len());
        assert!(stream.inbox.len() < 30 && packed <= PACK_TARGET, "{} entries, {packed} bytes", stream.inbox.len());
        stream.handle_ending(Ending::End);
        let mut expected = 0u32;
        while let Some((mut run, _)) = stream.take_run() {
            assert_eq!(stream.has_run(), stream.ending().is_none());
            let (items, credit) = (run.items(), run.credit());
            let mut seen = (0, 0);
            while let Some(item) = run.next_item() {
                assert_eq!(item[..4], expected.to_le_bytes());
                expected += 1;
                seen = (seen.0 + 1, seen.1 + item.len() as u64 + crate::limits::ITEM_OVERHEAD);
            }
            assert_eq!(seen, (items, credit), "the counts of a packed run are those of its items");
        }
        assert_eq!((expected, stream.ending()), (20_000, Some(Ending::End)));
        for number in 0..20 {
            stream.handle_items(small(number), vec![]).unwrap();
        }
        assert!(stream.has_run());
        let _ = stream.stop();
        assert!(!stream.has_run(), "what is packed is dropped, too");
    }
}

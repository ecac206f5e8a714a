//! The receiving end: an inbox that has room for all that was granted, and the grants.

use std::collections::VecDeque;

use super::StreamKey;
use super::run::ItemRun;
use crate::error::Violation;

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
    window: u64,
    limit: u64,
    received: u64,
    consumed: u64,
    consumed_items: u64,
    stopped: bool,
    ending: Option<Ending>,
}

impl RecvStream {
    /// A stream whose sender may have `window` bytes of credit under way.
    pub fn new(window: u64) -> Self {
        RecvStream {
            inbox: VecDeque::new(),
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
        self.inbox.push_back((run, slots));
        Ok(Vec::new())
    }

    /// The sender has ended the stream.
    pub fn handle_ending(&mut self, ending: Ending) {
        self.ending.get_or_insert(ending);
    }

    /// Takes the oldest run out of the inbox. Its items count as consumed when [`consume`](Self::consume) says so.
    pub fn take_run(&mut self) -> Option<(ItemRun, Vec<StreamKey>)> {
        self.inbox.pop_front()
    }

    /// Whether a run is in the inbox.
    pub fn has_run(&self) -> bool {
        !self.inbox.is_empty()
    }

    /// Whether the receiver wants no more.
    pub const fn is_stopped(&self) -> bool {
        self.stopped
    }

    /// How the stream ended, once its items were all taken.
    pub fn ending(&self) -> Option<Ending> {
        self.ending.filter(|_| self.inbox.is_empty())
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
}

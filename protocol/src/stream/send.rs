//! The sending end: an outbox of items, and the byte credit that the receiver granted.

use std::collections::VecDeque;

use bytes::{Buf, Bytes};

use super::StreamKey;
use super::run::{ItemRun, write_item, write_pieces};
use crate::error::Violation;
use crate::limits::ITEM_OVERHEAD;

/// Bytes at which a run of small items is closed: large enough that a frame's costs vanish, small enough that a turn of
/// one stream delays the others by microseconds.
const RUN_BYTES: usize = 32 * 1024;
/// Items from this size up travel in a buffer of their own, so that they are not copied into a run. Copying 4 KiB is
/// 100 ns, and what a frame costs at both ends is ten times that.
pub const LARGE_ITEM: usize = 16 * 1024;

/// What [`SendStream::take`] found.
///
/// After `NoCredit` and `Empty` the stream is no longer scheduled: it says so again when something is ready.
#[derive(Debug)]
pub enum Taken {
    /// Items to send; there may be more.
    Run(TakenRun),
    /// The next item is there, and there is credit for it, but it cannot be paid.
    Unpaid {
        /// Bytes of that item.
        bytes: u64,
    },
    /// The next item waits for credit.
    NoCredit,
    /// Nothing is there.
    Empty,
    /// All items were taken and the stream has ended. Said once.
    End,
    /// The stream was given up. Said once.
    Reset(u32),
}

/// Items that were taken for writing.
#[derive(Debug)]
pub struct TakenRun {
    /// The items.
    pub run: ItemRun,
    /// The streams of the slots of a single item; empty for every other run.
    pub slots: Vec<StreamKey>,
    /// Whether [`SendStream::take`] would find more.
    pub more: bool,
}

#[derive(Debug)]
struct Queued {
    run: ItemRun,
    /// Bytes of the run's last item, to know without a walk whether all items may start.
    last_bytes: u32,
    slots: Vec<StreamKey>,
}

/// Small items that are still being added to.
#[derive(Debug, Default)]
struct OpenRun {
    bytes: Vec<u8>,
    items: u32,
    item_bytes: u64,
    last_bytes: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Finish {
    /// More items may come.
    Open,
    /// No more items; End is due when the outbox is empty.
    Ending,
    /// Reset is due at once.
    Resetting(u32),
    /// End or Reset was taken.
    Finished,
}

/// The sending end of a stream.
///
/// ```text
///            finish()             take() = End
///   Open ───────────────► Ending ───────────────┐
///    │ reset(), handle_stop()  │                ▼
///    └───────────► Resetting ◄─┘            Finished
///                      └──── take() = Reset ────▲
/// ```
#[derive(Debug)]
pub struct SendStream {
    queue: VecDeque<Queued>,
    open_run: OpenRun,
    /// Credit that is waiting in the outbox.
    buffered: u64,
    /// Credit that was taken since the stream began.
    sent: u64,
    /// Credit that the receiver granted since the stream began.
    limit: u64,
    finish: Finish,
    /// The session was told that something is ready, and has not yet found the outbox empty or without credit.
    scheduled: bool,
}

impl SendStream {
    /// A stream whose receiver has granted `limit` bytes of credit.
    pub fn new(limit: u64) -> Self {
        SendStream {
            queue: VecDeque::new(),
            open_run: OpenRun::default(),
            buffered: 0,
            sent: 0,
            limit,
            finish: Finish::Open,
            scheduled: false,
        }
    }

    /// Adds a small item, or one whose buffer the caller keeps: it is copied. Like all methods that return a `bool`, it
    /// says whether the session must be told with [`Machine::stream_ready`](crate::session::Machine::stream_ready).
    #[must_use]
    pub fn push(&mut self, item: &[u8]) -> bool {
        if self.finish != Finish::Open {
            return false;
        }
        if item.len() >= LARGE_ITEM {
            let mut bytes = Vec::new();
            write_item(&mut bytes, item);
            return self.push_framed(Bytes::from(bytes), Vec::new());
        }
        write_item(&mut self.room_in_run().bytes, item);
        self.count(item.len())
    }

    /// Adds an item that is framed already (its length in front) and has less than [`LARGE_ITEM`] bytes: `bytes` without
    /// its length. It is copied.
    #[inline]
    #[must_use]
    pub fn push_small(&mut self, framed: &[u8], bytes: usize) -> bool {
        debug_assert!(bytes < LARGE_ITEM && framed.len() > bytes, "a framed item");
        if self.finish != Finish::Open {
            return false;
        }
        self.room_in_run().bytes.extend_from_slice(framed);
        self.count(bytes)
    }

    /// Adds an item that lies in pieces, as [`push`](Self::push) does: it is copied once, into its frame.
    #[must_use]
    pub fn push_pieces<'a>(&mut self, pieces: impl Iterator<Item = &'a [u8]> + Clone) -> bool {
        if self.finish != Finish::Open {
            return false;
        }
        let bytes = pieces.clone().fold(0_usize, |sum, piece| sum.saturating_add(piece.len()));
        if bytes >= LARGE_ITEM {
            let mut framed = Vec::new();
            write_pieces(&mut framed, bytes, pieces);
            return self.push_framed(Bytes::from(framed), Vec::new());
        }
        write_pieces(&mut self.room_in_run().bytes, bytes, pieces);
        self.count(bytes)
    }

    /// The run that small items are added to, with room for one.
    #[inline]
    fn room_in_run(&mut self) -> &mut OpenRun {
        if self.open_run.bytes.len() >= RUN_BYTES {
            self.close_run();
            // More will follow: the next run is as long, and need not grow into it.
            self.open_run.bytes.reserve(RUN_BYTES.saturating_add(RUN_BYTES >> 2));
        }
        &mut self.open_run
    }

    /// Counts a small item that was added.
    #[inline]
    fn count(&mut self, bytes: usize) -> bool {
        let open = &mut self.open_run;
        open.items = open.items.saturating_add(1);
        open.item_bytes = open.item_bytes.saturating_add(bytes as u64);
        open.last_bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
        self.buffered = self.buffered.saturating_add(bytes as u64).saturating_add(ITEM_OVERHEAD);
        self.schedule()
    }

    /// Adds one item that is framed already (its length in front) without a copy, with the streams of its slots.
    #[must_use]
    pub fn push_framed(&mut self, framed: Bytes, slots: Vec<StreamKey>) -> bool {
        if self.finish != Finish::Open {
            return false;
        }
        self.close_run();
        let mut run = ItemRun::trusted(framed, 1, 0);
        let bytes = run.next_length().unwrap_or(0);
        run = ItemRun::trusted(run.as_bytes().clone(), 1, u64::from(bytes));
        self.buffered = self.buffered.saturating_add(run.credit());
        self.queue.push_back(Queued { run, last_bytes: bytes, slots });
        self.schedule()
    }

    #[inline]
    fn schedule(&mut self) -> bool {
        !self.scheduled && self.is_ready() && !core::mem::replace(&mut self.scheduled, true)
    }

    #[inline(never)]
    fn close_run(&mut self) {
        let open = &mut self.open_run;
        if open.items == 0 {
            return;
        }
        let bytes = core::mem::take(&mut open.bytes);
        let run = ItemRun::trusted(Bytes::from(bytes), open.items, open.item_bytes);
        self.queue.push_back(Queued { run, last_bytes: open.last_bytes, slots: Vec::new() });
        (open.items, open.item_bytes, open.last_bytes) = (0, 0, 0);
    }

    /// Credit that waits in the outbox: bytes of the items and their overhead. A sender that is fair to its memory
    /// stops pushing at some bound.
    pub const fn buffered(&self) -> u64 {
        self.buffered
    }

    /// Whether [`take`](Self::take) would find something else than [`Taken::Empty`] or [`Taken::NoCredit`].
    #[inline]
    pub fn is_ready(&self) -> bool {
        match self.finish {
            Finish::Finished => false,
            Finish::Resetting(_) => true,
            Finish::Open => self.buffered > 0 && self.sent < self.limit,
            Finish::Ending => self.buffered == 0 || self.sent < self.limit,
        }
    }

    /// Whether items are still taken.
    pub fn is_open(&self) -> bool {
        self.finish == Finish::Open
    }

    /// Whether the end or a reset was taken: nothing is left to send.
    pub fn has_finished(&self) -> bool {
        self.finish == Finish::Finished
    }

    /// No more items will come. What is in the outbox is still sent.
    #[must_use]
    pub fn finish(&mut self) -> bool {
        if self.finish == Finish::Open {
            self.finish = Finish::Ending;
        }
        self.schedule()
    }

    /// Gives the stream up: what is in the outbox is dropped. The session must be told even of a stream that it has
    /// scheduled: it may have set it aside for money, which a reset needs none of. The second value has the streams of
    /// slots that will never be announced.
    #[must_use]
    pub fn reset(&mut self, code: u32) -> (bool, Vec<StreamKey>) {
        if matches!(self.finish, Finish::Finished | Finish::Resetting(_)) {
            return (false, Vec::new());
        }
        self.finish = Finish::Resetting(code);
        self.buffered = 0;
        self.open_run = OpenRun::default();
        self.scheduled = true;
        (true, self.queue.drain(..).flat_map(|queued| queued.slots).collect())
    }

    /// Takes in the receiver's Credit.
    ///
    /// # Errors
    /// When the limit does not rise. `[stream.credit.monotonic]`
    pub fn handle_credit(&mut self, limit: u64) -> Result<bool, Violation> {
        if limit <= self.limit {
            return Err(Violation::CreditWentBack { what: "stream credit", from: self.limit, to: limit });
        }
        self.limit = limit;
        Ok(self.schedule())
    }

    /// Sets the first limit, for a stream that was created before its connection was known.
    pub fn bind(&mut self, limit: u64) {
        self.limit = limit;
    }

    /// Takes what may be sent: at most about `max_bytes` of frame payload, within the credit, and only what
    /// `affordable(items, bytes)` agrees to in sum. A single item is never cut, so it may be above `max_bytes`.
    pub fn take(&mut self, max_bytes: usize, affordable: impl Fn(u64, u64) -> bool) -> Taken {
        let mut taken = self.take_front(max_bytes, affordable);
        // What cannot be paid stays scheduled: the session has set the stream aside and comes back by itself.
        self.scheduled = matches!(taken, Taken::Unpaid { .. }) || self.is_ready();
        if let Taken::Run(taken) = &mut taken {
            taken.more = self.scheduled;
        }
        taken
    }

    fn take_front(&mut self, max_bytes: usize, affordable: impl Fn(u64, u64) -> bool) -> Taken {
        match self.finish {
            Finish::Finished => return Taken::Empty,
            Finish::Resetting(code) => {
                self.finish = Finish::Finished;
                return Taken::Reset(code);
            }
            Finish::Open | Finish::Ending => {}
        }
        if self.queue.is_empty() {
            self.close_run();
        }
        let Some(front) = self.queue.front_mut() else {
            if self.finish == Finish::Ending {
                self.finish = Finish::Finished;
                return Taken::End;
            }
            return Taken::Empty;
        };
        if self.sent >= self.limit {
            return Taken::NoCredit;
        }
        let room = self.limit.saturating_sub(self.sent);
        // Every item may start while credit is above zero [stream.credit.start]: the last one decides.
        let before_last = front.run.credit().saturating_sub(u64::from(front.last_bytes).saturating_add(ITEM_OVERHEAD));
        let all_fit = before_last < room && (front.run.as_bytes().len() <= max_bytes || front.run.items() == 1);
        if all_fit && affordable(u64::from(front.run.items()), front.run.item_bytes()) {
            let Some(Queued { run, slots, .. }) = self.queue.pop_front() else { return Taken::Empty };
            return self.taken(run, slots);
        }
        match split_front(&mut front.run, max_bytes, room, affordable) {
            Ok(run) => {
                if front.run.items() == 0 {
                    self.queue.pop_front();
                }
                self.taken(run, Vec::new())
            }
            Err(bytes) => Taken::Unpaid { bytes },
        }
    }

    fn taken(&mut self, run: ItemRun, slots: Vec<StreamKey>) -> Taken {
        self.buffered = self.buffered.saturating_sub(run.credit());
        self.sent = self.sent.saturating_add(run.credit());
        Taken::Run(TakenRun { run, slots, more: false })
    }
}

/// Splits off the longest run of items at the front that fits all three bounds, or says how large the first item is,
/// which is not affordable. The first item fits the other bounds always.
pub(crate) fn split_front(
    run: &mut ItemRun,
    max_bytes: usize,
    room: u64,
    affordable: impl Fn(u64, u64) -> bool,
) -> Result<ItemRun, u64> {
    let mut rest = run.clone();
    let (mut framed, mut items, mut item_bytes, mut credit) = (0usize, 0u32, 0u64, 0u64);
    while let Some(length) = rest.next_length() {
        let before = rest.as_bytes().len();
        rest.skip();
        let next_framed = framed.saturating_add(before.saturating_sub(rest.as_bytes().len()));
        let next_items = items.saturating_add(1);
        let next_bytes = item_bytes.saturating_add(u64::from(length));
        let first = items == 0;
        if !affordable(u64::from(next_items), next_bytes) {
            if first {
                return Err(u64::from(length));
            }
            break;
        }
        if !first && (next_framed > max_bytes || credit >= room) {
            break;
        }
        credit = credit.saturating_add(u64::from(length)).saturating_add(ITEM_OVERHEAD);
        (framed, items, item_bytes) = (next_framed, next_items, next_bytes);
    }
    let mut left = run.as_bytes().clone();
    let bytes = left.split_to(framed.min(left.remaining()));
    let taken = ItemRun::trusted(bytes, items, item_bytes);
    *run = ItemRun::trusted(left, run.items().saturating_sub(items), run.item_bytes().saturating_sub(item_bytes));
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::{MAX_PREFIX, frame_in_place};
    use proptest::prelude::*;

    fn lengths(taken: Taken) -> Vec<usize> {
        let Taken::Run(TakenRun { mut run, .. }) = taken else { panic!("{taken:?}") };
        core::iter::from_fn(|| run.next_item()).map(|item| item.len()).collect()
    }

    #[test]
    fn an_item_may_start_while_credit_is_above_zero() {
        let mut stream = SendStream::new(17);
        assert!(stream.push(&[0; 1]), "the session must hear of the first item");
        assert!(!stream.push(&[0; 9]), "and only of the first");
        assert_eq!(lengths(stream.take(1000, |_, _| true)), [1], "1 + 16 uses all credit");
        assert!(matches!(stream.take(1000, |_, _| true), Taken::NoCredit));
        assert!(stream.handle_credit(18).unwrap(), "one byte of credit lets the next item start");
        assert_eq!(lengths(stream.take(1000, |_, _| true)), [9]);
        assert!(matches!(stream.take(1000, |_, _| true), Taken::Empty));
        assert!(stream.handle_credit(17).is_err());
    }

    #[test]
    fn a_batch_is_split_at_the_item_that_cannot_be_paid() {
        let mut stream = SendStream::new(10_000);
        (0..5).for_each(|_| _ = stream.push(&[7; 10]));
        assert_eq!(lengths(stream.take(1000, |items, bytes| items <= 3 && bytes <= 30)), [10, 10, 10]);
        assert!(matches!(stream.take(1000, |_, _| false), Taken::Unpaid { bytes: 10 }));
        assert_eq!(lengths(stream.take(1000, |_, _| true)), [10, 10]);
    }

    #[test]
    fn an_item_in_pieces_is_the_same_as_one_in_a_row() {
        for size in [0, 3, 200, LARGE_ITEM - 1, LARGE_ITEM, LARGE_ITEM + 1] {
            let item: Vec<u8> = (0..size).map(|byte| byte as u8).collect();
            let (mut whole, mut parts) = (SendStream::new(1 << 20), SendStream::new(1 << 20));
            _ = whole.push(&item);
            let (left, right) = item.split_at(size / 3);
            _ = parts.push_pieces([left, &[], right].into_iter());
            assert_eq!(whole.buffered(), parts.buffered());
            let [Taken::Run(whole), Taken::Run(parts)] = [whole, parts].map(|mut one| one.take(1 << 20, |_, _| true))
            else {
                panic!("there is an item");
            };
            assert_eq!(whole.run, parts.run, "{size}");
        }
    }

    #[test]
    fn end_follows_the_items_and_is_said_once() {
        let mut stream = SendStream::new(10_000);
        _ = stream.push(b"a");
        _ = stream.finish();
        _ = stream.push(b"late");
        assert_eq!(lengths(stream.take(1000, |_, _| true)), [1]);
        assert!(!stream.has_finished());
        assert!(matches!(stream.take(1000, |_, _| true), Taken::End));
        assert!(stream.has_finished());
        assert!(matches!(stream.take(1000, |_, _| true), Taken::Empty));
    }

    #[test]
    fn a_reset_drops_the_items_and_names_the_streams_that_will_never_be_announced() {
        let mut keys = slotmap::SlotMap::<StreamKey, ()>::with_key();
        let key = keys.insert(());
        let mut stream = SendStream::new(10_000);
        _ = stream.push(b"a");
        _ = stream.push_framed(Bytes::from_static(&[1, 9]), vec![key]);
        assert_eq!(stream.reset(7), (true, vec![key]));
        assert_eq!(stream.buffered(), 0);
        assert!(matches!(stream.take(1000, |_, _| true), Taken::Reset(7)));
        assert!(matches!(stream.take(1000, |_, _| true), Taken::Empty));
    }

    #[test]
    fn an_item_with_slots_travels_alone() {
        let mut keys = slotmap::SlotMap::<StreamKey, ()>::with_key();
        let key = keys.insert(());
        let mut stream = SendStream::new(10_000);
        _ = stream.push(b"a");
        _ = stream.push_framed(Bytes::from_static(&[1, 9]), vec![key]);
        _ = stream.push(b"b");
        let mut runs = Vec::new();
        while let Taken::Run(taken) = stream.take(1000, |_, _| true) {
            runs.push((taken.run.items(), taken.slots));
        }
        assert_eq!(runs, [(1, vec![]), (1, vec![key]), (1, vec![])]);
    }

    proptest! {
        #[test]
        fn nothing_is_lost_or_reordered_and_no_bound_is_passed(
            items in prop::collection::vec(0usize..9000, 1..60),
            takes in prop::collection::vec((1usize..9000, 0u64..20_000, 0u64..6), 1..200),
        ) {
            let mut stream = SendStream::new(0);
            for (index, &length) in items.iter().enumerate() {
                let mut item = vec![index as u8; MAX_PREFIX + length];
                let start = frame_in_place(&mut item);
                _ = match index % 2 {
                    0 => stream.push_small(&item[start..], length),
                    _ => stream.push(&item[MAX_PREFIX..]),
                };
            }
            _ = stream.finish();
            let (mut limit, mut sent, mut received) = (0u64, 0u64, Vec::new());
            for (max_bytes, more, most_items) in takes {
                // A grant that raises nothing is a violation.
                if more > 0 {
                    limit += more;
                    stream.handle_credit(limit).unwrap();
                }
                match stream.take(max_bytes, |items, _| items <= most_items) {
                    Taken::Run(TakenRun { mut run, .. }) => {
                        prop_assert!(u64::from(run.items()) <= most_items);
                        prop_assert!(run.items() == 1 || run.as_bytes().len() <= max_bytes);
                        while let Some(item) = run.next_item() {
                            prop_assert!(sent < limit, "an item started without credit");
                            sent += item.len() as u64 + ITEM_OVERHEAD;
                            received.push(item);
                        }
                    }
                    Taken::Unpaid { .. } => prop_assert_eq!(most_items, 0),
                    Taken::NoCredit => prop_assert!(sent >= limit),
                    Taken::End => prop_assert_eq!(received.len(), items.len()),
                    Taken::Empty => break,
                    Taken::Reset(_) => prop_assert!(false),
                }
            }
            for (index, item) in received.iter().enumerate() {
                prop_assert_eq!(item.len(), items[index]);
                prop_assert!(item.iter().all(|&byte| byte == index as u8));
            }
        }
    }
}

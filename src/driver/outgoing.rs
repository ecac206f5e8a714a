//! The way out: when the driver writes, and what it takes out of the machine for it.
//!
//! Writing is batched by nature: all that is there when the conduit takes bytes goes together. Where several calls are
//! in flight and little is pending, the driver lets the other tasks run once before it writes (a *smart cork*): their
//! frames share the write. It never does so for a stream or a lone call, which would only wait, and seldom where it has
//! waited in vain.

use std::task::Waker;

use tollway_protocol::frame::Lane;
use tollway_protocol::session::WriteWatch;
use tollway_protocol::time::Time;

use crate::conduit::FrameWriter;
use crate::settle::Work;
use crate::shared::{LentStreams, State};

/// Bytes that are handed to the conduit ahead of its writes. One write of this size is 20 µs on loopback.
pub(super) const WRITE_AHEAD: usize = 128 * 1024;
/// With less than this pending, several calls in flight are worth a wait for their neighbours.
const CORK_BELOW: usize = 16 * 1024;
/// Waits in vain, one after the other, that don't count yet: among many callers some come too late for one.
const VAIN_CORKS: u32 = 4;
/// Writes after which the driver waits for company again, though it never came: one wait in 512 doesn't show in a p99.
const LONGEST_CORK_PAUSE: u32 = 512;

/// The way out: the writer, and what the machine said under the last lock. Whatever changes that kicks the driver,
/// which asks again in the round that it is woken for.
pub(super) struct Outgoing<W> {
    pub(super) writer: W,
    cork: Cork,
    pub(super) corked: bool,
    /// The outbox was seen empty, and whoever puts something into it wakes the driver.
    pub(super) drained: bool,
    /// Lanes that take frames again.
    pub(super) unblocked: Vec<Lane>,
    /// Whether frames should be read.
    pub(super) wants_frames: bool,
    /// When the machine must be told the time.
    pub(super) deadline: Option<Time>,
    /// Whether the peer takes what waits in the conduit.
    pub(super) watch: WriteWatch,
}

/// Decides when a write is worth a wait.
///
/// That several calls are open does not say that others are about to be made: a call whose stream nobody reads stays open
/// and sends nothing, and an echo beside it would wait for company each time, at 20 µs a wait. So a wait that brought
/// nothing is not repeated for the next writes, for twice as many each time, and one that did starts anew.
#[derive(Debug, Default)]
struct Cork {
    /// Bodies that waited when the driver began to wait.
    waited_with: Option<usize>,
    /// Waits in a row that brought nothing.
    in_vain: u32,
    /// Writes until the next wait.
    pause: u32,
}

impl Cork {
    /// Whether the next write waits, with so many bodies that could share it; `None` if a wait makes no sense.
    fn holds(&mut self, waiting: Option<usize>) -> bool {
        if let Some(before) = self.waited_with.take() {
            // More than could be counted came, if it is no longer worth a wait.
            let gained = waiting.is_none_or(|waiting| waiting > before);
            self.in_vain = if gained { 0 } else { (self.in_vain + 1).min(VAIN_CORKS + LONGEST_CORK_PAUSE.ilog2()) };
            self.pause = 1 << self.in_vain.saturating_sub(VAIN_CORKS);
            return false;
        }
        let Some(waiting) = waiting else { return false };
        self.pause = self.pause.saturating_sub(1);
        if self.pause == 0 {
            self.waited_with = Some(waiting);
        }
        self.pause == 0
    }
}

impl<W: FrameWriter> Outgoing<W> {
    pub(super) fn new(writer: W, watch: WriteWatch) -> Self {
        Outgoing {
            writer,
            cork: Cork::default(),
            corked: false,
            drained: false,
            unblocked: Vec::new(),
            wants_frames: true,
            deadline: None,
            watch,
        }
    }

    /// Takes frames out of the machine into the conduit's buffer, and leaves `waker` to be woken by the next change.
    /// What the machine says meanwhile is settled at once.
    pub(super) fn take_frames(
        &mut self,
        now: Time,
        state: &mut State,
        (work, waker): (&mut Work, &Waker),
        mut settle: impl FnMut(&mut State, &mut Work),
    ) {
        self.drained = false;
        for lane in self.unblocked.drain(..) {
            state.machine.release_lane(lane);
        }
        let machine = &state.machine;
        let may_wait = self.writer.buffered() == 0 && machine.call_count() > 1;
        let waiting = if may_wait { machine.small_bodies(CORK_BELOW) } else { None };
        self.corked = self.cork.holds(waiting);
        while !self.corked && !self.drained && self.writer.ahead() < WRITE_AHEAD {
            let State { machine, streams, relays, traffic, .. } = state;
            let mut lent = LentStreams { relays, streams, after: &mut work.after };
            match machine.poll_transmit(now, &mut lent) {
                Some(frame) => {
                    traffic.frames_sent += 1;
                    traffic.bytes_sent += (frame.head.len() + frame.payload.len()) as u64;
                    let lane = frame.lane;
                    self.writer.start_send(frame);
                    // It waits in the session, where it delays no other lane.
                    if self.writer.is_blocked(lane) {
                        machine.hold_lane(lane);
                    }
                }
                None if machine.has_events() => settle(state, work),
                None => self.drained = true,
            }
        }
        while let Some(lane) = state.machine.poll_ended_lane() {
            self.writer.end_lane(lane);
        }
        // Asked also while the conduit takes nothing: a peer that does not read must not be read without end, nor a
        // deadline that has passed be looked at for ever.
        (self.wants_frames, self.deadline) = (state.machine.wants_frames(), state.machine.poll_timeout());
        state.park(waker);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of so many writes wait, where each brings what `gain` says.
    fn waits(cork: &mut Cork, writes: usize, gain: usize) -> usize {
        let mut waits = 0;
        for _ in 0..writes {
            if cork.holds(Some(1)) {
                waits += 1;
                assert!(!cork.holds(Some(1 + gain)), "a write waits once");
            }
        }
        waits
    }

    #[test]
    fn waits_that_bring_company_go_on_and_waits_in_vain_become_rare() {
        let mut cork = Cork::default();
        assert_eq!(waits(&mut cork, 100, 3), 100);
        assert_eq!(waits(&mut cork, 1022, 0), 4 + 9, "four, and then 2 + 4 + … + 512 writes for one each");
        assert_eq!(waits(&mut cork, 5120, 0), 10);
        while waits(&mut cork, 1, 3) == 0 {}
        assert_eq!(waits(&mut cork, 100, 3), 100, "company is back");
    }

    #[test]
    fn what_cannot_wait_does_not_and_a_wait_that_a_stream_ends_was_not_in_vain() {
        let mut cork = Cork::default();
        assert!(!cork.holds(None));
        assert!(cork.holds(Some(2)));
        assert!(!cork.holds(None));
        assert!(cork.holds(Some(2)));
    }
}

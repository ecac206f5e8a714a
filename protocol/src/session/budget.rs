//! Budgets for what costs a peer little and this side much; the numbers are [`AbuseLimits`].
//!
//! Nothing here is touched by a frame of an honest, quiet session: pings, refusals, unknown extensions and frames that
//! crossed an end are rare, and work that was given up is entered only when a Close gives it up. Each budget is a few
//! counters. Honest churn at full speed uses none of them: an open that is accepted and closed leaves nothing behind.
//!
//! Work and refusals can come from a peer that is merely clumsy, so their budget has two steps: GoAway when it is used
//! up, a violation when it is used up a second time. The others are a violation at once.

use rustc_hash::FxHashSet;

use super::connection::CallState;
use super::{CallKey, Machine};
use crate::error::{Reason, Violation, code};
use crate::id::ConnectionId;
use crate::limits::{AbuseLimits, Rate};
use crate::session::money::Money;
use crate::time::Time;

/// Work of the application that the peer asked for and then gave up by a Close.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Work {
    /// An open whose answer is being made.
    Open(ConnectionId),
    /// A call whose handler runs.
    Call(CallKey),
}

/// Tokens that come back with time. They may be used twice over: see [`Verdict`].
#[derive(Debug)]
struct Bucket {
    /// From the burst down to its negative.
    tokens: i64,
    refilled: Time,
}

/// What a budget says of one more use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Within,
    /// The budget is used up.
    Over,
    /// It is used up twice over.
    FarOver,
}

impl Bucket {
    fn new(rate: Rate, now: Time) -> Self {
        Bucket { tokens: i64::from(rate.burst), refilled: now }
    }

    fn take(&mut self, rate: Rate, now: Time) -> Verdict {
        let burst = i64::from(rate.burst);
        if self.tokens < burst {
            let nanos = now.since(self.refilled).as_nanos().saturating_mul(u128::from(rate.per_second));
            let earned = i64::try_from(nanos.checked_div(1_000_000_000).unwrap_or_default()).unwrap_or(i64::MAX);
            // Less than a token is not lost: the time that it took goes on counting.
            if earned > 0 {
                self.tokens = self.tokens.saturating_add(earned).min(burst);
                self.refilled = now;
            }
        } else {
            self.refilled = now;
        }
        self.tokens = self.tokens.saturating_sub(1);
        match self.tokens {
            0.. => Verdict::Within,
            tokens if tokens >= burst.saturating_neg() => Verdict::Over,
            _ => Verdict::FarOver,
        }
    }
}

/// How much of each budget is used.
#[derive(Debug)]
pub(super) struct Budgets {
    limits: AbuseLimits,
    unfinished: FxHashSet<Work>,
    refusals: Bucket,
    pings: Bucket,
    extensions: Bucket,
    late_frames: Bucket,
}

impl Budgets {
    pub(super) fn new(limits: AbuseLimits, now: Time) -> Self {
        Budgets {
            unfinished: FxHashSet::default(),
            refusals: Bucket::new(limits.refusals, now),
            pings: Bucket::new(limits.pings, now),
            extensions: Bucket::new(limits.extensions, now),
            late_frames: Bucket::new(limits.late_frames, now),
            limits,
        }
    }

    /// A Ping came. `[session.ping.budget]`
    pub(super) fn spend_ping(&mut self, now: Time) -> Result<(), Violation> {
        within(self.pings.take(self.limits.pings, now), "pings", self.limits.pings)
    }

    /// A frame of an unknown extension was skipped. `[session.extension.budget]`
    pub(super) fn spend_extension(&mut self, now: Time) -> Result<(), Violation> {
        let rate = self.limits.extensions;
        within(self.extensions.take(rate, now), "frames of unknown extensions", rate)
    }

    /// A frame for a connection that is closing or closed was dropped. `[session.late.budget]`
    pub(super) fn spend_late_frame(&mut self, now: Time) -> Result<(), Violation> {
        let rate = self.limits.late_frames;
        within(self.late_frames.take(rate, now), "frames for closed connections", rate)
    }
}

fn within(verdict: Verdict, what: &'static str, rate: Rate) -> Result<(), Violation> {
    match verdict {
        Verdict::Within => Ok(()),
        Verdict::Over | Verdict::FarOver => Err(Violation::OverBudget { what, limit: u64::from(rate.burst) }),
    }
}

impl Machine {
    /// The peer closes a connection on which the application still works for it. `[session.work.budget]`
    ///
    /// The story that this is for: open, close, open, close, as fast as the wire takes it. Each Close frees the id, so
    /// no other limit is ever reached, and the handlers that were begun pile up.
    pub(super) fn abandon_open(&mut self, id: ConnectionId) -> Result<(), Violation> {
        self.budgets.unfinished.insert(Work::Open(id));
        self.judge_unfinished()
    }

    /// See [`abandon_open`](Self::abandon_open); here it is the handlers of calls that run.
    pub(super) fn abandon_calls(&mut self, id: ConnectionId) -> Result<(), Violation> {
        let Some(connection) = self.connections.get(&id) else { return Ok(()) };
        let Some(active) = connection.active.as_deref().filter(|active| !active.served.is_empty()) else {
            return Ok(());
        };
        for &call in active.served.values() {
            if self.calls.get(call).is_some_and(|call| matches!(call.state, CallState::Running { .. })) {
                self.budgets.unfinished.insert(Work::Call(call));
            }
        }
        // Those that wait for their price have no handler.
        if let Some(Money::Payee(payee)) = connection.money.as_deref() {
            for waiting in &payee.calls {
                self.budgets.unfinished.remove(&Work::Call(waiting.call));
            }
        }
        self.judge_unfinished()
    }

    fn judge_unfinished(&mut self) -> Result<(), Violation> {
        let limit = self.budgets.limits.unfinished_work as usize;
        let unfinished = self.budgets.unfinished.len();
        if unfinished > limit.saturating_mul(2) {
            return Err(Violation::OverBudget { what: "unfinished work", limit: limit as u64 });
        }
        if unfinished > limit {
            self.go_away(Reason::new(code::ABUSE, format!("{limit} handlers run for what the peer has closed")));
        }
        Ok(())
    }

    /// A Reject that the peer has caused. `[session.refusal.budget]`
    pub(super) fn spend_refusal(&mut self) -> Result<(), Violation> {
        let (rate, now) = (self.budgets.limits.refusals, self.timers.last_received());
        let verdict = self.budgets.refusals.take(rate, now);
        let limit = u64::from(rate.burst);
        match verdict {
            Verdict::Within => Ok(()),
            Verdict::Over => {
                self.go_away(Reason::new(code::ABUSE, format!("{limit} opens were refused")));
                Ok(())
            }
            Verdict::FarOver => Err(Violation::OverBudget { what: "refused opens", limit }),
        }
    }

    /// The application's work for an open that the peer closed before its answer has ended. Accepting or rejecting such
    /// an open says it too; without either, the open counts as unfinished for as long as the session lives.
    pub fn finish_open(&mut self, id: ConnectionId) {
        self.finish_work(Work::Open(id));
    }

    /// The handler of a call that has failed with its connection has ended. Answering such a call says it too.
    pub fn finish_call(&mut self, call: CallKey) {
        self.finish_work(Work::Call(call));
    }

    pub(super) fn finish_work(&mut self, work: Work) {
        if !self.budgets.unfinished.is_empty() {
            self.budgets.unfinished.remove(&work);
        }
    }

    /// Opens and calls that the peer has given up by a Close while the application still works for them.
    pub fn unfinished_work(&self) -> usize {
        self.budgets.unfinished.len()
    }
}

#[cfg(test)]
mod tests {
    use core::time::Duration;

    use super::*;

    #[test]
    fn a_bucket_is_over_after_its_burst_and_far_over_after_a_second_one() {
        let rate = Rate { burst: 3, per_second: 0 };
        let mut bucket = Bucket::new(rate, Time::ZERO);
        let verdicts: Vec<_> = (0..7).map(|_| bucket.take(rate, Time::from_nanos(u64::MAX))).collect();
        use Verdict::*;
        assert_eq!(verdicts, [Within, Within, Within, Over, Over, Over, FarOver]);
    }

    #[test]
    fn tokens_come_back_with_time_up_to_the_burst_and_no_fraction_is_lost() {
        let rate = Rate { burst: 2, per_second: 10 };
        let mut bucket = Bucket::new(rate, Time::ZERO);
        let at = |millis| Time::ZERO.after(Duration::from_millis(millis));
        assert_eq!([bucket.take(rate, at(0)), bucket.take(rate, at(0))], [Verdict::Within; 2]);
        // A token takes 100 ms; two looks at 60 ms each must not forget the first 60.
        assert_eq!(bucket.take(rate, at(60)), Verdict::Over);
        assert_eq!(bucket.take(rate, at(200)), Verdict::Within, "one owed, two earned");
        assert_eq!(bucket.take(rate, at(100_000)), Verdict::Within);
        assert_eq!(bucket.take(rate, at(100_000)), Verdict::Within);
        assert_eq!(bucket.take(rate, at(100_000)), Verdict::Over, "a long rest earns no more than the burst");
    }
}

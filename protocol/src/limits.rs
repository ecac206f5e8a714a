//! Limits that two sides tell each other: what a side is ready to receive.

use serde::{Deserialize, Serialize};

/// Bytes that a frame's kind and header may need on top of an item or a body: metadata at its cap, and slack.
pub const HEADER_ALLOWANCE: u32 = 32 * 1024;

/// Credit that an item costs on top of its bytes, so that empty items are not free. `[stream.credit.overhead]`
pub const ITEM_OVERHEAD: u64 = 16;

/// Slots in one frame: with metadata at its cap they still fit [`HEADER_ALLOWANCE`]. `[stream.slots.max]`
pub const MAX_SLOTS: usize = 1_024;

/// What a side receives in one session; said in Hello and HelloAck.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionLimits {
    /// Largest frame in bytes, without its length prefix.
    pub max_frame: u32,
    /// Virtual connections, opened by the other side, that may be open at once.
    pub max_connections: u32,
    /// Opens by the other side that may be unanswered at once.
    pub max_pending_opens: u32,
}

impl Default for SessionLimits {
    fn default() -> Self {
        SessionLimits {
            // An item of 1 MiB, the default of `ConnectionLimits`, and its header.
            max_frame: (1 << 20) + HEADER_ALLOWANCE,
            // An idle connection is one small table entry, so many are cheap.
            max_connections: 65_536,
            // An opener beyond it waits for answers; a handler that answers late is not swamped.
            max_pending_opens: 1_024,
        }
    }
}

/// What a side receives on one virtual connection; said in Open and Accept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConnectionLimits {
    /// Largest item of a stream in bytes.
    pub max_item: u32,
    /// Largest body of a request or a response in bytes, at most `window`.
    pub max_body: u32,
    /// Bytes of request and response bodies that may be on their way or unread at once; to begin with.
    pub window: u32,
    /// Credit of a new stream in bytes, [`ITEM_OVERHEAD`] for each item included.
    pub stream_window: u32,
    /// Calls by the other side that may be open at once.
    pub max_calls: u32,
    /// Streams opened by the other side that may be open at once.
    pub max_streams: u32,
}

impl ConnectionLimits {
    /// What [`Default`] gives, for constants.
    pub const DEFAULT: Self = ConnectionLimits {
        max_item: 1 << 20,
        max_body: 1 << 20,
        window: 1 << 20,
        // What a stream begins with: enough that one on the same machine rarely waits, and little enough for a
        // thousand within the memory budget of a session. It grows while it is what holds the sender up.
        stream_window: 256 << 10,
        max_calls: 1_024,
        max_streams: 1_024,
    };
}

impl Default for ConnectionLimits {
    fn default() -> Self {
        ConnectionLimits::DEFAULT
    }
}

/// How often something may happen: a burst at once, and a steady rate after it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// How often at once.
    pub burst: u32,
    /// How often a second when the burst is used up.
    pub per_second: u32,
}

/// Budgets of a session for what costs a peer little and this side much. They are this side's own business and are not
/// told to the peer: no honest one comes near them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AbuseLimits {
    /// Opens and calls that the peer has given up by a Close while this side still works for them. Above it the peer
    /// is told to go away, above twice as many it is cut off. `[session.work.budget]`
    pub unfinished_work: u32,
    /// Opens that are rejected. When the burst is used up the peer is told to go away, when it is used up a second time
    /// it is cut off. `[session.refusal.budget]`
    pub refusals: Rate,
    /// Pings. `[session.ping.budget]`
    pub pings: Rate,
    /// Frames of extensions that this side doesn't know. `[session.extension.budget]`
    pub extensions: Rate,
    /// Frames for connections that are closing or closed. `[session.late.budget]`
    pub late_frames: Rate,
}

impl Default for AbuseLimits {
    fn default() -> Self {
        AbuseLimits {
            // A handler is a task of a few KiB, so tens of MiB at most. A peer that closes eight connections full of
            // calls at once stays below it, if the handlers notice that they are cancelled.
            unfinished_work: 8_192,
            // A refusal costs no more than reading the open does, so a million of them is a second of work; who needs
            // more than that is a client in a loop.
            refusals: Rate { burst: 1 << 20, per_second: 16_384 },
            // Keepalive needs four a minute, and who measures round trips all the time a hundred a second.
            pings: Rate { burst: 1_024, per_second: 128 },
            // A newer peer may try its luck with each call for a while before it learns that nobody answers.
            extensions: Rate { burst: 1 << 16, per_second: 4_096 },
            // All that a closed connection was granted may be on its way in small frames: 13,000 for each stream with a
            // window of 1 MiB.
            late_frames: Rate { burst: 1 << 20, per_second: 1 << 17 },
        }
    }
}

/// Frames for ended calls and streams that a connection may bring at any time, before the bound for each of them.
pub const LATE_FRAMES: u64 = 1_024;

/// Frames that may come for each call or stream of a connection after it has ended. An honest peer needs five: a Cancel
/// or a Stop that crosses the end, and the grants of one round trip. `[session.late.bound]`
pub const LATE_FRAMES_EACH: u64 = 8;

/// Limits that contradict themselves or the session's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LimitsError {
    /// A body that is allowed would never fit the window.
    #[error("max_body of {max_body} bytes is above the window of {window} bytes")]
    BodyAboveWindow {
        /// The largest body, in bytes.
        max_body: u32,
        /// The window, in bytes.
        window: u32,
    },
    /// An item or a body that is allowed would not fit a frame.
    #[error("an item or body of {bytes} bytes with its header is above the largest frame of {max_frame} bytes")]
    AboveFrame {
        /// The larger of item and body, in bytes.
        bytes: u32,
        /// The largest frame, in bytes.
        max_frame: u32,
    },
    /// A window of zero lets nothing start.
    #[error("a window of zero lets nothing start")]
    ZeroWindow,
}

impl ConnectionLimits {
    /// The smaller of each two: what may be sent to a side and through one. Consistent limits stay so.
    #[must_use]
    pub fn at_most(&self, other: &Self) -> Self {
        ConnectionLimits {
            max_item: self.max_item.min(other.max_item),
            max_body: self.max_body.min(other.max_body),
            window: self.window.min(other.window),
            stream_window: self.stream_window.min(other.stream_window),
            max_calls: self.max_calls.min(other.max_calls),
            max_streams: self.max_streams.min(other.max_streams),
        }
    }

    /// What a relay that takes `own` itself states for a side that takes these limits: the smaller of each two, but no less
    /// than half of a window. A receiver grants again when half of what it has granted was used, so a sender that was
    /// told less would wait for ever. `[relay.limits]`
    #[must_use]
    pub fn through_relay(&self, own: &Self) -> Self {
        let least = self.at_most(own);
        ConnectionLimits {
            window: least.window.max(self.window.div_ceil(2)),
            stream_window: least.stream_window.max(self.stream_window.div_ceil(2)),
            ..least
        }
    }

    /// Checks the limits against each other and against the largest frame of the side that states them.
    /// `[session.limits.consistent]`
    ///
    /// # Errors
    /// When a body cannot fit the window, an item or body cannot fit a frame, or a window is zero.
    pub fn check(&self, session: &SessionLimits) -> Result<(), LimitsError> {
        if self.window == 0 || self.stream_window == 0 {
            return Err(LimitsError::ZeroWindow);
        }
        if self.max_body > self.window {
            return Err(LimitsError::BodyAboveWindow { max_body: self.max_body, window: self.window });
        }
        let bytes = self.max_item.max(self.max_body);
        if bytes.saturating_add(HEADER_ALLOWANCE) > session.max_frame {
            return Err(LimitsError::AboveFrame { bytes, max_frame: session.max_frame });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_agree_with_each_other() {
        assert_eq!(ConnectionLimits::default().check(&SessionLimits::default()), Ok(()));
    }

    #[test]
    fn a_body_above_the_window_or_the_frame_is_refused() {
        let session = SessionLimits::default();
        let limits = ConnectionLimits { max_body: 4097, window: 4096, ..Default::default() };
        assert_eq!(limits.check(&session), Err(LimitsError::BodyAboveWindow { max_body: 4097, window: 4096 }));
        let limits = ConnectionLimits { max_item: (1 << 20) + 1, ..Default::default() };
        assert!(matches!(limits.check(&session), Err(LimitsError::AboveFrame { .. })));
        let limits = ConnectionLimits { stream_window: 0, ..Default::default() };
        assert_eq!(limits.check(&session), Err(LimitsError::ZeroWindow));
    }
}

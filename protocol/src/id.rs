//! Ids of connections, calls and streams: parity-allocated, increasing by exactly 2, never used twice.

use core::fmt;
use core::num::NonZeroU64;

use serde::{Deserialize, Serialize};

/// Which half of an id space one side allocates from. The other side has the other half.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Parity {
    /// 1, 3, 5, …
    Odd,
    /// 2, 4, 6, …
    Even,
}

impl Parity {
    /// The other side's parity.
    pub const fn other(self) -> Self {
        match self {
            Parity::Odd => Parity::Even,
            Parity::Even => Parity::Odd,
        }
    }

    /// The parity of `id`. Zero is even, but no id that is allocated is zero.
    pub const fn of(id: u64) -> Self {
        if id & 1 == 1 { Parity::Odd } else { Parity::Even }
    }

    const fn first(self) -> u64 {
        match self {
            Parity::Odd => 1,
            Parity::Even => 2,
        }
    }
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }
    };
}

id! {
    /// The id of a virtual connection in its session. Connection 0 is the root: control only, it serves no calls.
    ConnectionId
}
id! {
    /// The id of a call in its connection.
    CallId
}
id! {
    /// The id of a stream in its connection; a space of its own beside the calls'.
    StreamId
}

impl ConnectionId {
    /// The root connection.
    pub const ROOT: ConnectionId = ConnectionId(0);

    /// Whether this is the root connection.
    pub const fn is_root(self) -> bool {
        self.0 == 0
    }
}

/// One side's half of an id space: what was used, and what comes next.
///
/// It serves both ends: the owner of the half calls [`take`](Self::take), the other end checks with
/// [`expect`](Self::expect). Ids rise by exactly 2, so that a gap or a repetition is seen at once. `[session.id.next]`
#[derive(Debug, Clone, Copy)]
pub struct IdSequence {
    /// `None` once the space is used up. Never zero, which is no id but the root's, so that a sequence is one word.
    next: Option<NonZeroU64>,
}

impl IdSequence {
    /// The half of `parity`, unused.
    pub const fn new(parity: Parity) -> Self {
        IdSequence { next: NonZeroU64::new(parity.first()) }
    }

    /// The half of `parity` with `next` as its next id; for tests near the end of the space.
    #[cfg(test)]
    pub(crate) const fn starting_at(next: u64) -> Self {
        IdSequence { next: NonZeroU64::new(next) }
    }

    /// The id that comes next, or `None` if the space is used up.
    pub const fn next(&self) -> Option<u64> {
        match self.next {
            Some(next) => Some(next.get()),
            None => None,
        }
    }

    /// How many ids were used.
    pub const fn used(&self) -> u64 {
        match self.next {
            Some(next) => next.get().saturating_sub(1) >> 1,
            None => u64::MAX >> 1,
        }
    }

    /// How many ids are left.
    pub const fn left(&self) -> u64 {
        match self.next {
            Some(next) => (u64::MAX.saturating_sub(next.get()) >> 1).saturating_add(1),
            None => 0,
        }
    }

    /// Uses the next id, or returns `None` if the space is used up.
    pub fn take(&mut self) -> Option<u64> {
        let id = self.next?;
        self.next = id.checked_add(2);
        Some(id.get())
    }

    /// Uses `id` if it is the next one; else changes nothing and returns `false`.
    #[must_use]
    pub fn expect(&mut self, id: u64) -> bool {
        match self.next {
            Some(next) if next.get() == id => {
                self.next = next.checked_add(2);
                true
            }
            _ => false,
        }
    }

    /// Whether `id`, which is of this parity, was used before.
    pub fn was_used(&self, id: u64) -> bool {
        id != 0 && self.next.is_none_or(|next| id < next.get())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_rise_by_two_and_are_never_used_twice() {
        let mut odd = IdSequence::new(Parity::Odd);
        assert_eq!([odd.take(), odd.take(), odd.take()], [Some(1), Some(3), Some(5)]);
        let mut peer = IdSequence::new(Parity::Odd);
        assert!(peer.expect(1));
        assert!(!peer.expect(1), "a repetition is refused");
        assert!(!peer.expect(5), "a gap is refused");
        assert!(peer.expect(3));
        assert!(peer.was_used(1) && peer.was_used(3) && !peer.was_used(5) && !peer.was_used(0));
    }

    #[test]
    fn exhaustion_is_an_answer_and_not_a_wrap() {
        let mut ids = IdSequence::starting_at(u64::MAX);
        assert_eq!((ids.left(), IdSequence::new(Parity::Even).left()), (1, u64::MAX >> 1));
        assert_eq!(ids.take(), Some(u64::MAX));
        assert_eq!(ids.take(), None);
        assert_eq!((ids.left(), ids.used()), (0, u64::MAX >> 1));
        assert!(!ids.expect(1));
        assert!(ids.was_used(u64::MAX));
    }
}

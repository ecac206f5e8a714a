//! Named points at which a process can be made to die, and guards that can be taken away: for crash tests alone.
//!
//! Nothing of it is compiled unless the feature `failpoints` is on, which is for no build that is used.
//!
//! - `failpoint!("disk.before-commit")` is a point. The environment variable `TOLLWAY_FAILPOINT`, such as
//!   `disk.before-commit:3`, or [`arm`] makes the process abort, without unwinding or flushing anything, when it passes
//!   that point for the third time from then on (the first without a number).
//! - `broken!("disk.lose-last")` is `false`, and `true` if `TOLLWAY_BREAK` names that guard: the code behind it does what
//!   must never be done. With `disk.lose-last/2` it is so at every second pass. A crash harness that does not find a
//!   guard missing would not find the defect that it guards against.

/// A named point at which a test may have the process die.
macro_rules! failpoint {
    ($name:literal) => {
        #[cfg(feature = "failpoints")]
        $crate::failpoint::pass($name);
    };
}
pub(crate) use failpoint;

/// Whether a test has taken a guard away.
macro_rules! broken {
    ($name:literal) => {{
        #[cfg(feature = "failpoints")]
        let broken = $crate::failpoint::is_broken($name);
        #[cfg(not(feature = "failpoints"))]
        let broken = false;
        broken
    }};
}
pub(crate) use broken;

#[cfg(feature = "failpoints")]
mod armed {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use parking_lot::Mutex;

    /// A name, and at which passes something happens.
    struct Named {
        name: String,
        number: u64,
    }

    impl Named {
        /// From a variable, such as `name:3`; 1 without a number.
        fn from_environment(variable: &str, separator: char) -> Option<Named> {
            let text = std::env::var(variable).ok()?;
            Some(match text.rsplit_once(separator) {
                Some((name, number)) => Named { name: name.to_owned(), number: number.parse().ok()? },
                None => Named { name: text, number: 1 },
            })
        }
    }

    static ARMED: LazyLock<Mutex<Option<Named>>> =
        LazyLock::new(|| Mutex::new(Named::from_environment("TOLLWAY_FAILPOINT", ':')));
    static BROKEN: LazyLock<Option<Named>> = LazyLock::new(|| Named::from_environment("TOLLWAY_BREAK", '/'));
    static BROKEN_PASSES: AtomicU64 = AtomicU64::new(0);

    /// From now on the process dies when it passes this point for the `passes`-th time.
    pub fn arm(name: &str, passes: u64) {
        *ARMED.lock() = Some(Named { name: name.to_owned(), number: passes.max(1) });
    }

    /// Passes the point, or dies there.
    pub(crate) fn pass(name: &str) {
        let mut armed = ARMED.lock();
        let Some(armed) = armed.as_mut().filter(|armed| armed.name == name) else { return };
        armed.number = armed.number.saturating_sub(1);
        if armed.number == 0 {
            std::process::abort();
        }
    }

    /// Whether the guard of this name is taken away, at this pass.
    pub fn is_broken(name: &str) -> bool {
        BROKEN.as_ref().filter(|broken| broken.name == name).is_some_and(|broken| {
            let passes = BROKEN_PASSES.fetch_add(1, Ordering::Relaxed);
            passes.checked_rem(broken.number).is_none_or(|rest| rest == 0)
        })
    }
}

#[cfg(feature = "failpoints")]
pub(crate) use armed::pass;
#[cfg(feature = "failpoints")]
pub use armed::{arm, is_broken};

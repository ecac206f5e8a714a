//! Named points at which a process can be made to die, for tests that kill it at the worst instant.
//!
//! `failpoint!("store.before-commit")` is nothing at all unless the feature `failpoints` is on. With it, the environment
//! variable `TOLLWAY_FAILPOINT`, such as `store.before-commit:3`, makes the process abort, without unwinding or flushing
//! anything, when it passes that point for the third time (the first without a number).

/// A named point at which a test may have the process die.
macro_rules! failpoint {
    ($name:literal) => {
        #[cfg(feature = "failpoints")]
        $crate::failpoint::pass($name);
    };
}
pub(crate) use failpoint;

#[cfg(feature = "failpoints")]
mod armed {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    struct Armed {
        name: String,
        left: AtomicU64,
    }

    static ARMED: LazyLock<Option<Armed>> = LazyLock::new(|| {
        let wanted = std::env::var("TOLLWAY_FAILPOINT").ok()?;
        let (name, passes) = match wanted.rsplit_once(':') {
            Some((name, passes)) => (name.to_owned(), passes.parse().ok()?),
            None => (wanted, 1),
        };
        Some(Armed { name, left: AtomicU64::new(passes) })
    });

    /// Passes the point, or dies there.
    pub(crate) fn pass(name: &str) {
        let Some(armed) = ARMED.as_ref().filter(|armed| armed.name == name) else { return };
        // The one that takes the last pass dies; those after it, in other threads, go on for the instant that is left.
        if armed.left.fetch_sub(1, Ordering::Relaxed) == 1 {
            std::process::abort();
        }
    }
}

#[cfg(feature = "failpoints")]
pub(crate) use armed::pass;

//! Random numbers for ids of spans and for jitter: well spread and cheap, and not for secrets.

use std::cell::Cell;
use std::hash::{BuildHasher, RandomState};

thread_local! {
    /// Each thread hashes its own count with keys of its own, which the system's randomness has seeded.
    static GENERATOR: (RandomState, Cell<u64>) = (RandomState::new(), Cell::new(0));
}

/// A number that nobody could guess who has not seen the process.
pub(crate) fn number() -> u64 {
    GENERATOR.with(|(keys, count)| {
        count.set(count.get().wrapping_add(1));
        keys.hash_one(count.get())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_spread_and_differ_between_threads() {
        let here: Vec<u64> = (0..1_000).map(|_| number()).collect();
        let there = std::thread::spawn(|| (0..1_000).map(|_| number()).collect::<Vec<_>>()).join().expect("it counts");
        let mut all = [here.clone(), there].concat();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 2_000, "none came twice");
        let upper = here.iter().filter(|number| **number > u64::MAX / 2).count();
        assert!((350..650).contains(&upper), "{upper} of 1000 are in the upper half");
    }
}

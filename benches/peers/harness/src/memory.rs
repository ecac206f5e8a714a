//! Counts the bytes that live on the heap, while somebody asks.
//!
//! The counter is switched on for the one workload that reads it: a shared counter that every allocation writes to would
//! cost a peer that allocates much more than one that doesn't, on every core. Switched off it is one load of a value
//! that nobody writes.
//!
//! Memory that was allocated before and freed meanwhile counts as negative. Both ends of a peer are counted, as they
//! share the process; the kernel's buffers are not.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicIsize, Ordering};

#[global_allocator]
static HEAP: Counting = Counting;

static COUNTED: AtomicBool = AtomicBool::new(false);
static LIVE: AtomicIsize = AtomicIsize::new(0);

struct Counting;

fn count(bytes: usize, sign: isize) {
    if COUNTED.load(Ordering::Relaxed) {
        // A layout is never larger than `isize::MAX`.
        LIVE.fetch_add(bytes as isize * sign, Ordering::Relaxed);
    }
}

#[allow(unsafe_code, reason = "the trait of allocators is unsafe; all calls go to the system's as they came")]
// SAFETY: every method passes its arguments on to `System`, which is an allocator, and returns what that returned.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 1);
        // SAFETY: the caller keeps the contract of this method, which is that of `System`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 1);
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        count(layout.size(), -1);
        // SAFETY: as above; the block came from `System`.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count(layout.size(), -1);
        count(size, 1);
        // SAFETY: as above; the block came from `System`.
        unsafe { System.realloc(block, layout, size) }
    }
}

/// Counts from here to its end.
pub(crate) struct Count(());

impl Count {
    pub(crate) fn start() -> Self {
        LIVE.store(0, Ordering::Relaxed);
        COUNTED.store(true, Ordering::Relaxed);
        Count(())
    }

    /// Bytes that were allocated since the start, without those that were freed.
    pub(crate) fn live(&self) -> isize {
        LIVE.load(Ordering::Relaxed)
    }
}

impl Drop for Count {
    fn drop(&mut self) {
        COUNTED.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lives_is_counted_and_what_was_freed_is_not() {
        const LARGE: usize = 64 << 20;
        let count = Count::start();
        let mut kept: Vec<u8> = Vec::with_capacity(LARGE);
        kept.reserve_exact(2 * LARGE);
        drop(Vec::<u8>::with_capacity(LARGE));
        let live = count.live();
        drop(kept);
        let after = count.live();
        // Other tests allocate and free meanwhile, but nothing of this size.
        let close_to = |expected: usize, found: isize| found.abs_diff(expected as isize) < 16 << 20;
        assert!(close_to(2 * LARGE, live), "{live}");
        assert!(close_to(0, after), "{after}");
    }
}

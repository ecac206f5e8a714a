//! What a byte-stream writer has accepted and not yet written: small pieces copied together, large ones kept as they
//! are, all handed to the socket in as few vectored writes as possible.
//!
//! ```text
//! stream:   copied[start..a]  large 1  copied[a..b]  large 2  …  copied[z..]
//! ```
//!
//! Invariants: `large` is ordered by `at`; every `at` lies between the first unwritten and the last copied byte;
//! `len` is the sum of all unwritten bytes.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, Bytes};

/// Payloads below this many bytes are copied. Copying 4 KiB costs about 100 ns; keeping a piece costs a queue entry, an
/// IoSlice, two atomic operations on its count and the kernel's own work for each slice, which is of that order.
pub(super) const COPY_BELOW: usize = 4 * 1024;

/// Slices given to one vectored write. Far below the system's limit (1,024), and on the stack 1 KiB.
pub(super) const MAX_SLICES: usize = 64;

/// Memory that is kept for the next frames when all is written; what a burst took above it is given back.
const KEEP: usize = 256 * 1024;

/// Written bytes at the front of `copied` that are worth moving the rest for.
const COMPACT: usize = 64 * 1024;

#[derive(Debug, Default)]
pub(super) struct OutBuf {
    /// Small pieces, one after the other.
    copied: Vec<u8>,
    /// Bytes of `copied` that were written.
    start: usize,
    /// Large pieces, each standing before the byte of `copied` that has this number, counted as if `copied` had never
    /// been compacted.
    large: VecDeque<(u64, Bytes)>,
    /// Bytes removed from the front of `copied` by compaction, which is what those numbers have to be reduced by.
    removed: u64,
    /// Unwritten bytes in all.
    len: usize,
}

impl OutBuf {
    /// Unwritten bytes.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Appends a frame: copies of its length and head, and its payload as by [`push`](Self::push).
    pub(super) fn push_frame(&mut self, length: u32, head: &[u8], payload: Bytes) {
        self.compact();
        let length = length.to_le_bytes();
        let copied = if payload.len() < COPY_BELOW { &payload[..] } else { &[] };
        let small = length.len() + head.len() + copied.len();
        self.copied.reserve(small);
        self.copied.extend_from_slice(&length);
        self.copied.extend_from_slice(head);
        self.copied.extend_from_slice(copied);
        self.len += small;
        if payload.len() >= COPY_BELOW {
            self.push(payload);
        }
    }

    /// Appends a copy of `bytes`.
    pub(super) fn copy(&mut self, bytes: &[u8]) {
        self.compact();
        self.copied.extend_from_slice(bytes);
        self.len += bytes.len();
    }

    #[inline]
    fn compact(&mut self) {
        // A peer that reads slowly but steadily never lets the buffer run empty: without this, what was written would
        // pile up at its front. Moving at most as much as was written makes each byte move once on average.
        if self.start >= COMPACT && self.start >= self.copied.len() / 2 {
            self.copied.drain(..self.start);
            self.removed += self.start as u64;
            self.start = 0;
        }
    }

    /// Appends `bytes`, without copying them if they are large.
    pub(super) fn push(&mut self, bytes: Bytes) {
        if bytes.len() < COPY_BELOW {
            self.copy(&bytes);
        } else {
            self.len += bytes.len();
            self.large.push_back((self.removed + self.copied.len() as u64, bytes));
        }
    }

    /// Forgets everything unwritten.
    pub(super) fn clear(&mut self) {
        self.large.clear();
        self.len = 0;
        self.reset();
    }

    /// Fills `slices` with what comes next and returns how many were filled.
    pub(super) fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>; MAX_SLICES]) -> usize {
        let mut filled = 0;
        let mut put = |bytes: &'a [u8]| {
            if !bytes.is_empty() && filled < MAX_SLICES {
                slices[filled] = IoSlice::new(bytes);
                filled += 1;
            }
        };
        let mut from = self.start;
        // Each large piece fills a slice, so no more of them can matter.
        for (at, piece) in self.large.iter().take(MAX_SLICES) {
            let to = self.index(*at);
            put(&self.copied[from..to]);
            put(piece);
            from = to;
        }
        put(&self.copied[from..]);
        filled
    }

    /// Drops the first `written` bytes, which must not be more than [`len`](Self::len).
    pub(super) fn advance(&mut self, mut written: usize) {
        self.len -= written;
        while written > 0 {
            let before = match self.large.front() {
                Some((at, _)) => self.index(*at) - self.start,
                None => self.copied.len() - self.start,
            };
            let step = before.min(written);
            self.start += step;
            written -= step;
            if written == 0 {
                break;
            }
            // All copied bytes in front of the first large piece are written: the rest comes out of that piece.
            let Some((_, piece)) = self.large.front_mut() else { break };
            let step = piece.len().min(written);
            piece.advance(step);
            written -= step;
            if piece.is_empty() {
                self.large.pop_front();
            }
        }
        if self.len == 0 {
            self.reset();
        }
    }

    fn index(&self, at: u64) -> usize {
        // `at` counts bytes that are in `copied` now, plus those removed, so the difference is an index.
        (at - self.removed) as usize
    }

    fn reset(&mut self) {
        self.copied.clear();
        self.copied.shrink_to(KEEP);
        self.start = 0;
        self.removed = 0;
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn visible(out: &OutBuf) -> Vec<u8> {
        let mut slices = [IoSlice::new(&[]); MAX_SLICES];
        let filled = out.slices(&mut slices);
        slices[..filled].iter().flat_map(|slice| slice.to_vec()).collect()
    }

    #[test]
    fn small_payloads_are_copied_together_and_large_ones_are_not_copied() {
        let mut out = OutBuf::default();
        let large = Bytes::from(vec![2; COPY_BELOW]);
        out.copy(&[1; 10]);
        out.push(Bytes::from(vec![1; COPY_BELOW - 1]));
        out.push(large.clone());
        out.copy(&[3; 10]);
        let mut slices = [IoSlice::new(&[]); MAX_SLICES];
        assert_eq!(out.slices(&mut slices), 3);
        assert_eq!(slices[1].as_ptr(), large.as_ptr());
        assert_eq!(out.len(), 10 + COPY_BELOW - 1 + COPY_BELOW + 10);
    }

    #[test]
    fn steady_backpressure_does_not_pile_up_written_bytes() {
        let mut out = OutBuf::default();
        out.copy(&[0; 1000]);
        for _ in 0..10_000 {
            out.copy(&[0; 1000]);
            out.advance(1000);
        }
        assert!(out.copied.capacity() <= 4 * COMPACT, "{}", out.copied.capacity());
        out.advance(1000);
        assert_eq!((out.len(), out.start), (0, 0));
    }

    #[test]
    fn a_burst_gives_its_memory_back() {
        let mut out = OutBuf::default();
        for _ in 0..1000 {
            out.copy(&[0; 4000]);
        }
        out.advance(4_000_000);
        assert!(out.copied.capacity() <= KEEP);
    }

    proptest! {
        #[test]
        fn any_mix_of_pieces_and_partial_writes_keeps_the_stream(
            steps in prop::collection::vec((0_usize..3 * COPY_BELOW, 0_usize..4 * COPY_BELOW), 0..30),
        ) {
            let (mut out, mut sent, mut written) = (OutBuf::default(), Vec::new(), Vec::new());
            for (index, (size, write)) in steps.into_iter().enumerate() {
                let piece: Vec<u8> = (0..size).map(|byte| (byte + index) as u8).collect();
                sent.extend_from_slice(&piece);
                match index % 2 {
                    0 => out.push(Bytes::from(piece)),
                    _ => {
                        let head = [index as u8; 9];
                        sent.truncate(sent.len() - size);
                        sent.extend_from_slice(&[(size as u32).to_le_bytes().as_slice(), &head, &piece].concat());
                        out.push_frame(size as u32, &head, Bytes::from(piece));
                    }
                }
                let next = visible(&out);
                let step = write.min(next.len());
                written.extend_from_slice(&next[..step]);
                out.advance(step);
            }
            while out.len() > 0 {
                let next = visible(&out);
                prop_assert!(!next.is_empty());
                written.extend_from_slice(&next);
                out.advance(next.len());
            }
            prop_assert_eq!(written, sent);
        }
    }
}

//! stub until merge
use bytes::Bytes;
/// Lane
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Lane(pub u64);
/// Transmit
#[derive(Debug)]
pub struct Transmit {
    /// Lane
    pub lane: Lane,
    /// Head
    pub head: smallvec::SmallVec<[u8; 64]>,
    /// Payload
    pub payload: Bytes,
}

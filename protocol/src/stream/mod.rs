//! Streams of items: the run in which items travel, and the sending and the receiving end of one stream.
//!
//! These are the small machines that a runtime puts behind a lock of their own, one for each stream: they own the byte
//! credit and the items. The session machine owns everything that a stream shares with others.

mod receive;
mod run;
mod send;

pub use receive::{Ending, Grant, RecvStream};
pub use run::{ItemRun, MAX_PREFIX, frame_in_place, write_item};
pub(crate) use send::split_front;
pub use send::{LARGE_ITEM, SendStream, Taken, TakenRun};

slotmap::new_key_type! {
    /// A stream inside the two machines. Unlike its id it exists before the stream is announced on the wire.
    pub struct StreamKey;
}

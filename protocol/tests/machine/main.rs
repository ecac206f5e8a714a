//! The session machine and the streams, as two peers back to back and against a hostile peer.
#![allow(clippy::unwrap_used)]

mod abuse;
mod calls;
mod connections;
mod deadlines;
mod draining;
mod handshake;
mod hostile;
mod isolation;
mod memory;
mod money;
mod pair;
mod streams;
